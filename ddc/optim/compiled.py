"""Arithmetic that runs as it is or compiled: what compiles it, and what reads alike in both."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddc.compatibility import OWN_COMPILE_CACHE

log = logging.getLogger(__name__)

#: A hyperparameter: where a step is compiled a tensor of one element in float64, so that it may
#: change.
Number = float | Tensor
#: Hyperparameters of a step by name: numbers, names and switches.
Hyper = dict[str, Any]

#: For a CPU, inductor fuses loops over rows with loops over columns, and works out what there is
#: one of per unit once per entry. Here it does less of both.
CPU_OPTIONS: dict[str, Any] = {"cpp.max_horizontal_fusion_size": 2, "realize_opcount_threshold": 6}


class Arithmetic:
    """A function of stacks and tensors, compiled when asked for; there is one of it for what it is
    compiled for.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device = function, device
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, compiled: bool, *arguments: Any) -> Any:
        if not compiled:
            return self.function(*arguments)
        # takes a second to import, which only who compiles should wait for
        from torch._dynamo.exc import FailOnRecompileLimitHit

        if self.compiled is None:
            self.compiled = torch.compile(
                self.function,
                fullgraph=True,
                dynamic=False,
                options=CPU_OPTIONS if self.device.type == "cpu" else {},
                **OWN_COMPILE_CACHE,
            )
        try:
            return self.compiled(*arguments)
        except FailOnRecompileLimitHit:
            log.warning(
                "a compiled step was compiled anew too often, and goes on uncompiled: numbers, such"
                " as learning rates and betas, may change from step to step, but not names and"
                " switches, such as vertical and retract"
            )
            self.compiled = self.function
            return self.function(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "compiled": None}


def as_tensors(value: Any) -> Any:
    """Numbers as tensors in float64, whose values a compiled step does not know; names and switches
    as they are.
    """
    if isinstance(value, tuple | list):
        return tuple(map(as_tensors, value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return torch.tensor(value, dtype=torch.float64) if number else value


def approach_(x: Tensor, end: Tensor, weight: Number) -> Tensor:
    """``x.lerp_(end, weight)``, for a weight that is a tensor of one element as well, whatever its
    dtype and device.
    """
    return x.lerp_(end, weight.to(x) if isinstance(weight, Tensor) else weight)


def scaled(x: Tensor, factor: Number) -> Tensor:
    """The product, in place of x, which must be a copy of one's own; a compiler knows itself where
    to put it.
    """
    return x * factor if torch.compiler.is_compiling() else x.mul_(factor)


def per_layer(values: Number, like: Tensor) -> Number:
    """Shape (L,) to what broadcasts against a stacked tensor; what is one number stays it."""
    if isinstance(values, Tensor) and values.ndim:
        return values.view(-1, *(1,) * (like.ndim - 1))
    return values


def safe_power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for a negative exponent; 0 where x is 0, or so near to it that this would not be a
    finite number.
    """
    limits = torch.finfo(x.dtype)
    smallest = max(limits.tiny, limits.max ** (1 / exponent))
    return torch.where(x >= smallest, x.reciprocal() if exponent == -1 else x.pow(exponent), 0.0)
