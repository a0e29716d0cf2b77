"""Lion, and its lift: the sign of mixed momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from ddc.gauges import Gauge
from ddc.optim.compiled import Hyper, approach_
from ddc.optim.lift import Lift, LiftOptions, Params
from ddc.optim.rules.base import Direction, Moments, Rule, Subject, check_betas


class Lion(Rule):
    r"""Lion, the sign taken over the indices that a rotation turns together.

    .. math::
        c = \beta_1 m + (1 - \beta_1) x, \qquad u = c / \sqrt{\overline{c^2}}, \qquad
        m \leftarrow \beta_2 m + (1 - \beta_2) x

    Where nothing turns, the average is over one entry, and u the sign of c. A sign of each entry of
    a vector does not turn with it; the vector over the root mean square of its entries does, and is
    as long as the signs are. Source: Chen et al., arXiv:2302.06675, algorithm 2; the average is
    ours.
    """

    settings = ("betas",)
    moments = ("exp_avg",)

    def check(self, group: Mapping[str, Any]) -> None:
        check_betas(group["betas"])

    def direction(
        self, x: Tensor, moments: Moments, clock: None, hyper: Hyper, of: Subject
    ) -> Direction:
        momentum, averaging = moments["exp_avg"], of.averaging
        first, second = hyper["betas"]
        mixed = approach_(momentum.clone(), x, 1 - first)
        approach_(momentum, x, 1 - second)
        size = mixed.abs() if averaging is None else averaging.mean_square(mixed).sqrt()
        # zero has sign zero; and what is no number stays none, which torch.sign would hide
        size = torch.where(size == 0, torch.inf, size)
        return Direction(mixed / size if averaging is None else averaging.divide(mixed, size))


class DDCLion(Lift):
    r"""Lion lifted to the orbits of a model's gauges.

    The step of :class:`ddc.DDCAdam` with another rule: where that has Adam(x), this has the u of
    :class:`Lion`, for directions, norms and all that is under no rescale. Without gauges it is
    Lion. Its state is half of AdamW's.

    Args:
        params, gauges: as for :class:`ddc.DDCAdam`.
        lr: learning rate; Lion's is some 3 to 10 times smaller than AdamW's.
        betas: of what is stepped by, and of the momentum.
        weight_decay: decoupled, as for :class:`ddc.DDCAdam`.
        options: ``radial_rate``, ``vertical``, ``step_scale``, ``retract``, ``additive``,
            ``compiled`` and ``approximate``, as for :class:`ddc.DDCAdam`.

    Raises:
        ValueError: as :class:`ddc.DDCAdam`.
    """

    rule = Lion()

    def __init__(
        self,
        params: Params,
        gauges: Iterable[Gauge] = (),
        *,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        **options: Unpack[LiftOptions],
    ) -> None:
        hyper = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, gauges, hyper, **options)
