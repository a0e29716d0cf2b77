"""Muon's rule: orthogonalised momentum of a matrix."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddc.optim.compiled import Hyper, approach_, safe_power
from ddc.optim.orthogonal import ORTHOGONALIZERS
from ddc.optim.ranges import check_ranges
from ddc.optim.rules.base import Direction, Moments, Rule, Subject


class Orthogonaliser(Rule):
    r"""The polar factor of the momentum, head by head where matrices are taken by heads.

    .. math:: m \leftarrow \mu m + (1 - \mu) x, \qquad u = \mathrm{orth}(\mu m + (1 - \mu) x)

    It turns with rows and columns by itself, and needs no averaging. Source: Keller Jordan,
    https://kellerjordan.github.io/posts/muon.
    """

    settings = ("momentum", "nesterov", "orthogonalizer")
    moments = ("momentum_buffer",)

    def check(self, group: Mapping[str, Any]) -> None:
        check_ranges(group)

    def direction(
        self, x: Tensor, moments: Moments, clock: None, hyper: Hyper, of: Subject
    ) -> Direction:
        momentum = approach_(moments["momentum_buffer"], x, 1 - hyper["momentum"])
        mixed = approach_(x, momentum, hyper["momentum"]) if hyper["nesterov"] else momentum
        return Direction(
            of.on_whole(functools.partial(orthogonal, name=hyper["orthogonalizer"]), mixed)
        )


def orthogonal(matrices: Tensor, name: str) -> Tensor:
    """Matrices, (B, rows, columns), orthogonalised whatever their size, as long as that is a normal
    number.
    """
    size = matrices.abs().amax((1, 2), keepdim=True)
    size = torch.where(size >= torch.finfo(size.dtype).tiny, size, 0.0)
    return ORTHOGONALIZERS[name](matrices * safe_power(size, -1))
