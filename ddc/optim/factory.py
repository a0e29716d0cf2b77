"""Optimizers by configuration."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from ddc.gauges import GaugeSet, hidden_matrices, plain_name
from ddc.optim.combined import CombinedOptimizer
from ddc.optim.ddcadam import DDCAdam
from ddc.optim.ddcmuon import DDCMuon
from ddc.optim.muon import Muon


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Param groups with decay on matrices and none on vectors (norm scales and biases)."""
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_muon(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float,
    adam_lr: float,
    momentum: float,
    nesterov: bool,
    adjust_lr_fn: str,
    orthogonalizer: str,
    betas: tuple[float, float],
    eps: float,
) -> CombinedOptimizer:
    """The baseline: Muon for hidden matrices, ``torch.optim.AdamW`` for the rest."""
    hidden = {matrix.parameter for matrix in hidden_matrices(model)}
    groups = decay_groups(model, weight_decay)
    matrices = [(n, p) for group in groups for n, p in group["params"] if plain_name(n) in hidden]
    rest = [{**g, "params": [(n, p) for n, p in g["params"] if plain_name(n) not in hidden]} for g in groups]
    muon = Muon(
        matrices,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        adjust_lr_fn=adjust_lr_fn,
        orthogonalizer=orthogonalizer,
    )
    adamw = AdamW([group for group in rest if group["params"]], adam_lr, betas, eps, fused=True)
    return CombinedOptimizer((muon, adamw))


def make_optimizer(name: str, model: nn.Module, gauges: GaugeSet, weight_decay: float, **options: Any) -> Optimizer:
    """The optimizer of this name over the model's parameters.

    Raises:
        ValueError: an unknown name, a hyperparameter out of range, or a Muon for a model whose hidden matrices are not
            known.
    """
    groups = decay_groups(model, weight_decay)
    match name:
        case "adamw":
            return AdamW(groups, fused=True, **options)
        case "ddcadam":
            return DDCAdam(groups, gauges, **options)
        case "muon":
            return make_muon(model, weight_decay, **options)
        case "ddcmuon":
            hidden = hidden_matrices(model, options.pop("per_head"))
            return DDCMuon(groups, gauges, hidden, **options)
    raise ValueError(f"Invalid optimizer.name={name!r}: expected adamw, ddcadam, muon or ddcmuon")
