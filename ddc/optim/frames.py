"""Frames: by what hidden matrices are dressed where a rescale has them on both of its sides.

Shapes: G inner gauges in the frames of one stack, U units.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ddc.gauges.base import axes_of
from ddc.optim.parameters import compute_dtype
from ddc.optim.sharding import shards_of
from ddc.optim.stack import Context
from ddc.optim.stacked import Dressed


def log_norm(dressed: Dressed, context: Context, after: bool = False) -> Tensor:
    """Logarithm of the norms that dress one matrix, (U,), before or after their stack has moved."""
    if isinstance(dressed.source, Frames):
        return context.log_frames[dressed.source][dressed.layer]
    return context.norms[dressed.source][after][dressed.layer].log()


class Member(NamedTuple):
    """A hidden matrix on one side of an inner gauge, with what dresses its other axis."""

    param: Tensor
    axis: int | tuple[int, ...]
    other: Dressed | None


class Frames:
    r"""Frames of alike inner gauges: per unit, a number that scales with the gauge.

    The forward norm f of a unit is that of its plus side dressed by what comes before, the backward
    norm b that of its minus side dressed by what comes after; along a chain :math:`f^2` and
    :math:`b^2` sum the squared products of weights over all paths to and from the unit. The frame
    :math:`(f / b)^{1 / (1 + k)}` divides the plus side and multiplies (to the power k) the minus
    side, after which both have path norms in balance. A unit that is dead on one side goes by the
    other, one that is dead on both has frame 1. ``params`` are all that the gauges scale, biases
    too.
    """

    def __init__(
        self,
        degree: float,
        plus: list[list[Member]],
        minus: list[list[Member]],
        params: list[Tensor],
    ) -> None:
        self.degree, self.plus, self.minus, self.params = degree, plus, minus, params

    def sweep_forward(self, context: Context) -> None:
        """Forward norms, given those of earlier levels."""
        context.log_forward[self] = self._log_norms(self.plus, context, forward=True)
        forward = context.log_forward[self].exp()
        context.norms[self] = (forward, forward)

    def sweep_backward(self, context: Context) -> None:
        """Backward norms, given those of later levels; and the frame."""
        f, b, k = (
            context.log_forward[self],
            self._log_norms(self.minus, context, forward=False),
            self.degree,
        )
        context.log_backward[self] = b
        one_sided = torch.where(f.isfinite(), f, torch.where(b.isfinite(), -b / k, 0.0))
        context.log_frames[self] = torch.where(
            f.isfinite() & b.isfinite(), (f - b) / (1 + k), one_sided
        )

    @staticmethod
    def _log_norms(side: list[list[Member]], context: Context, forward: bool) -> Tensor:
        """Logarithm of the norms of each unit's members together, (G, U)."""
        squares, shifts = [], []
        for param, axis, other in itertools.chain.from_iterable(side):
            shards = shards_of(param)
            weight = shards.local(param).to(compute_dtype(param))
            last = axes_of(axis)[-1]
            rows = weight.mT if last == param.ndim - 1 else weight
            shift = rows.new_zeros(())
            if other is None:
                square = rows.square().sum(-1)
            else:
                if isinstance(other.source, Frames):
                    log = (context.log_forward if forward else context.log_backward)[other.source]
                    # a forward norm dresses by its power k; a backward norm, which scales as c^-k,
                    # by its power 1/k
                    factor = log[other.layer] * (
                        other.degree if forward else 1 / other.source.degree
                    )
                else:
                    factor = log_norm(other, context) * other.degree
                shift = factor.max().nan_to_num(neginf=0.0)
                felt = shards.part((2 * (factor - shift)).exp(), 0, axes_of(other.axis)[-1])
                if isinstance(other.axis, tuple):  # of each expert
                    square = (rows.square() @ felt.view(len(rows), -1, 1)).squeeze(-1)
                else:
                    square = rows.square() @ felt
            if isinstance(axis, tuple):
                square = square.flatten()
            elif square.ndim > 1:  # one unit of all experts
                square = square.sum(0)
            squares.append(shards.placed(square, 0, last))
            shifts.append(shift)
        (summed,) = shards.reduced(torch.stack(squares))
        logs = (summed.log() / 2 + torch.stack(shifts)[:, None]).unflatten(0, (len(side), -1))
        return torch.logsumexp(2 * logs, 1) / 2 if logs.shape[1] > 1 else logs[:, 0]
