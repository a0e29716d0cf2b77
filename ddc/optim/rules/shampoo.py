"""Shampoo, and its lift: each axis of a tensor by the root of its own second moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from ddc.gauges import Gauge
from ddc.optim.compiled import Hyper, approach_, per_layer
from ddc.optim.lift import Lift, LiftOptions, Params
from ddc.optim.rules.base import Direction, Moments, Rule, Subject, check_betas

#: An axis of more indices is preconditioned by a multiple of the identity.
LARGEST = 2048


class Shampoo(Rule):
    r"""Shampoo on a tensor of k axes, :math:`x_{(i)}` its matrix with axis i for rows:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) x, \quad
        L_i \leftarrow \beta_2 L_i + (1 - \beta_2)\, x_{(i)} x_{(i)}^T, \quad
        u = \hat m, \quad u_{(i)} \leftarrow (\hat L_i + \epsilon)^{-1/2k}\, u_{(i)}

    Hats are bias corrections as Adam's; :math:`\beta_2 = 1` sums instead, as the original does. A
    root of a matrix turns with it, so a rotation of any axis needs no average. An eigenbasis does
    not where eigenvalues are equal, as those of the unseen are: so this is no SOAP. Source: Gupta
    et al., arXiv:1802.09568, algorithm 2; averages for sums: Shi et al., arXiv:2309.06497.
    """

    settings = ("betas", "eps")
    moments = ("exp_avg",)
    takes_maps = False  # a root does not turn with what is no rotation
    compilable = False  # eigenvalues are not

    def check(self, group: Mapping[str, Any]) -> None:
        check_betas(group["betas"], sums=True)
        if not group["eps"] > 0:
            raise ValueError(f"Invalid eps={group['eps']}: expected a number > 0")

    def others(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        sizes = [(n, n) if n <= LARGEST else (1, 1) for n in shape]
        return {f"preconditioner_{i}": size for i, size in enumerate(sizes or [()])}

    def moments_of_numbers(self) -> tuple[str, ...]:
        return "exp_avg", "preconditioner_0"

    def clock(self, step: Tensor, hyper: Hyper, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The bias corrections, (L,); none of a sum."""
        first, second = (1 - float(beta) ** step.to(dtype) for beta in hyper["betas"])
        return first, second if float(hyper["betas"][1]) < 1 else torch.ones_like(first)

    def direction(
        self, x: Tensor, moments: Moments, clock: Any, hyper: Hyper, of: Subject
    ) -> Direction:
        if x.ndim == 1:
            return self.of_numbers(x, moments, clock, hyper)
        (first, second), eps = map(float, hyper["betas"]), float(hyper["eps"])
        approach_(moments["exp_avg"], x, 1 - first)
        x, u = of.gathered(x), of.gathered(moments["exp_avg"])
        for axis in range(1, x.ndim):
            matrix = moments[f"preconditioner_{axis - 1}"]
            shape = u.movedim(axis, 1).shape
            lines, turned = (each.movedim(axis, 1).reshape(*shape[:2], -1) for each in (x, u))
            full = matrix.shape[1] == shape[1]
            now = lines @ lines.mT if full else lines.square().mean(1).sum(1).view(-1, 1, 1)
            matrix.mul_(second).add_(now, alpha=1 - second or 1.0)
            # what is not finite has no eigenvalues, and would raise: its direction is nan
            finite = matrix.isfinite().all(2, keepdim=True).all(1, keepdim=True)
            average = torch.where(finite, matrix / clock[1].view(-1, 1, 1), 0.0)
            values, vectors = torch.linalg.eigh(average)
            values = (values.clamp_min(0) + eps).pow(-0.5 / (x.ndim - 1))
            root = torch.where(finite, (vectors * values.unsqueeze(1)) @ vectors.mT, torch.nan)
            u = (root @ turned if full else root * turned).view(shape).movedim(1, axis)
        return Direction(of.part(u).contiguous(), 1 / clock[0])

    def of_numbers(self, x: Tensor, moments: Moments, clock: Any, hyper: Hyper) -> Direction:
        (first, second), number = map(float, hyper["betas"]), moments["preconditioner_0"]
        u = approach_(moments["exp_avg"], x, 1 - first)
        number.mul_(second).add_(x.square(), alpha=1 - second or 1.0)
        root = (number / per_layer(clock[1], x) + float(hyper["eps"])).sqrt()
        return Direction(u / root, 1 / clock[0])


class DDCShampoo(Lift):
    r"""Shampoo lifted to the orbits of a model's gauges.

    The step of :class:`ddc.DDCAdam` with the u of :class:`Shampoo` where that has Adam(x). Without
    gauges it is Shampoo. Eigenvalues are worked out at every step, which takes longer than all else
    where axes have more than some hundred indices.

    Args:
        params, gauges, weight_decay, options: as for :class:`ddc.DDCAdam`; ``compiled`` changes
            nothing.
        lr: learning rate; for a matrix, about the length of a step in each of its directions.
        betas, eps: as above.

    Raises:
        ValueError: as :class:`ddc.DDCAdam`.
    """

    rule = Shampoo()

    def __init__(
        self,
        params: Params,
        gauges: Iterable[Gauge] = (),
        *,
        lr: float | Tensor = 0.02,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-10,
        weight_decay: float = 0.01,
        **options: Unpack[LiftOptions],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, gauges, hyper, **options)
