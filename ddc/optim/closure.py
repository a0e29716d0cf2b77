"""The closure of a step: what recomputes loss and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """The loss that a step's closure gives, computed with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
