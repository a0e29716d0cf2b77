"""Adam: each entry by the root of its own second moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddc.optim.compiled import Hyper, Number, approach_, per_layer
from ddc.optim.rules.base import Direction, Moments, Rule, Subject, check_betas


class Bias(NamedTuple):
    """Bias corrections 1 - beta1^t and √(1 - beta2^t), each (L,)."""

    first: Tensor
    root_second: Tensor

    @classmethod
    def at(cls, step: Tensor, betas: tuple[Number, Number], dtype: torch.dtype) -> Bias:
        """At these step counts; through expm1, which does not cancel where beta^t is near 1."""
        first, second = (cls._correction(step.to(dtype), beta) for beta in betas)
        return cls(first, second.sqrt())

    @staticmethod
    def _correction(step: Tensor, beta: Number) -> Tensor:
        if isinstance(beta, Tensor):
            return (step * beta.log()).expm1().neg()
        return (step * math.log(beta)).expm1().neg() if beta else torch.ones_like(step)


class Adam(Rule):
    r"""Adam, the second moment averaged over the indices that a rotation turns.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) x, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) \overline{x^2}, \quad
        u = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Source: Kingma and Ba, arXiv:1412.6980, algorithm 1 and the note after it. The averaging is
    ours: the second moment is then invariant, and the direction turns with the input.
    """

    settings = ("betas", "eps")
    moments, averaged = ("exp_avg",), ("exp_avg_sq",)

    def check(self, group: Mapping[str, Any]) -> None:
        if not float(group["eps"]) >= 0:
            raise ValueError(f"Invalid eps={group['eps']}: expected a number >= 0")
        check_betas(group["betas"])

    def clock(self, step: Tensor, hyper: Hyper, dtype: torch.dtype) -> Bias:
        return Bias.at(step, hyper["betas"], dtype)

    def direction(
        self, x: Tensor, moments: Moments, clock: Bias, hyper: Hyper, of: Subject
    ) -> Direction:
        exp_avg, exp_avg_sq = moments["exp_avg"], moments["exp_avg_sq"]
        (first, second), averaging = hyper["betas"], of.averaging
        approach_(exp_avg, x, 1 - first)
        if isinstance(second, Tensor):
            square = x.square() if averaging is None else averaging.mean_square(x)
            exp_avg_sq.mul_(second).add_(square * (1 - second))
        elif averaging is None:
            exp_avg_sq.mul_(second).addcmul_(x, x, value=1 - second)
        else:
            # no lerp_, which makes nan of what has overflowed to inf
            exp_avg_sq.mul_(second).add_(averaging.mean_square(x), alpha=1 - second)
        denominator = exp_avg_sq.sqrt().add_(per_layer(hyper["eps"] * clock.root_second, x))
        ratio = clock.root_second / clock.first
        if averaging is None:
            return Direction(torch.div(exp_avg, denominator, out=denominator), ratio)
        return Direction(averaging.divide(exp_avg, denominator), ratio)
