"""Optimizers by configuration."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from ddc.gauges import GaugeSet
from ddc.optim.ddcadam import DDCAdam


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Param groups with decay on matrices and none on vectors (norm scales and biases)."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(name: str, model: nn.Module, gauges: GaugeSet, weight_decay: float, **options: Any) -> Optimizer:
    """The optimizer of this name over the model's parameters.

    Raises:
        ValueError: an unknown name, or a hyperparameter out of range.
    """
    groups = [group for group in decay_groups(model, weight_decay) if group["params"]]
    match name:
        case "adamw":
            return AdamW(groups, fused=True, **options)
        case "ddcadam":
            return DDCAdam(groups, gauges, **options)
    raise ValueError(f"Invalid optimizer.name={name!r}: expected adamw or ddcadam")
