"""Stochastic gradient descent with momentum, and its lift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

from ddc.gauges import Gauge
from ddc.optim.compiled import Hyper
from ddc.optim.lift import Lift, LiftOptions, Params
from ddc.optim.ranges import check_ranges
from ddc.optim.rules.base import Direction, Moments, Rule, Subject


class SGD(Rule):
    r"""The input summed with decay, as ``torch.optim.SGD`` has it (without dampening).

    .. math:: m \leftarrow \mu m + x, \qquad u = m, \quad\text{with Nesterov}\quad u = x + \mu m

    It is linear in its inputs, so it turns with them by itself.
    """

    settings = ("momentum", "nesterov")
    moments = ("momentum_buffer",)

    def check(self, group: Mapping[str, Any]) -> None:
        check_ranges(group)

    def direction(
        self, x: Tensor, moments: Moments, clock: None, hyper: Hyper, of: Subject
    ) -> Direction:
        momentum = moments["momentum_buffer"].mul_(hyper["momentum"]).add_(x)
        # a copy: the direction is written to
        return Direction(
            x + momentum * hyper["momentum"] if hyper["nesterov"] else momentum.clone()
        )


class DDCSGD(Lift):
    r"""SGD with momentum, lifted to the orbits of a model's gauges.

    The step of :class:`ddc.DDCAdam` with another rule: where that has Adam(x), this has the u of
    :class:`SGD`. A step of a unit is then :math:`\eta s \rho` times its tangential gradient, where
    the gradient scales as :math:`1 / \rho`: a *relative* step that no scale changes, which of plain
    SGD it is only at norm 1. Without gauges it is ``torch.optim.SGD``, but for weight decay, which
    is decoupled. Its state is half of AdamW's.

    Args:
        params, gauges: as for :class:`ddc.DDCAdam`.
        lr: learning rate.
        momentum: :math:`\mu` above.
        nesterov: step by :math:`x + \mu m`; else by m.
        weight_decay: decoupled, as for :class:`ddc.DDCAdam`.
        options: ``radial_rate``, ``vertical``, ``step_scale``, ``retract``, ``additive``,
            ``compiled`` and ``approximate``, as for :class:`ddc.DDCAdam`.

    Raises:
        ValueError: as :class:`ddc.DDCAdam`.
    """

    rule = SGD()

    def __init__(
        self,
        params: Params,
        gauges: Iterable[Gauge] = (),
        *,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.01,
        **options: Unpack[LiftOptions],
    ) -> None:
        hyper = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
        }
        super().__init__(params, gauges, hyper, **options)
