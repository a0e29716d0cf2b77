"""The maximal update parametrisation of AdamW (muP): a learning rate that is tuned at one width is
meant for all.

Source: Yang et al., arXiv:2203.03466, table 3, which changes starts and rates alone, and nothing of
what the model computes (table 8 is the same up to a factor that moves into the head). With r the
width over the width at which the rate was tuned, and a start that is N(0, 1/fan_in) there:

=========  =====================  ====  ============
..         start                  rate  weight decay
=========  =====================  ====  ============
embedding  as at the base width   1     1
hidden     N(0, 1/fan_in)         1/r   r
head       N(0, 1/(r fan_in))     1/r   r
vectors    as they are            1     0
=========  =====================  ====  ============

Decay is decoupled and multiplied by the rate, so that it is the same at all widths, as in the
authors' package ``mup``. Heads are of one size at all widths here, so their softmax has no factor.
Nothing depends on the depth. Zero starts of head and queries, which the authors advise, are left
out: at the base width all is AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddc.gauges import plain_name


def embeddings(model: nn.Module) -> set[str]:
    """The names of tables that are looked up: of the matrices of a language model those whose
    fan-in, a vocabulary or a context, does not grow with the width.
    """
    return {
        plain_name(f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def mup_groups(
    model: nn.Module, weight_decay: float, lr: float, width_ratio: float
) -> list[dict[str, Any]]:
    """Param groups of AdamW under muP: embeddings, other matrices, vectors."""
    tables, named = embeddings(model), list(model.named_parameters())
    matrices = [(name, p) for name, p in named if p.ndim >= 2]
    inner = [(name, p) for name, p in matrices if plain_name(name) not in tables]
    groups = [
        {"params": [each for each in matrices if plain_name(each[0]) in tables], "lr": lr}
        | {"weight_decay": weight_decay},
        {"params": inner, "lr": lr / width_ratio, "weight_decay": weight_decay * width_ratio},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def mup_start_(model: nn.Module, head: nn.Linear, width_ratio: float) -> None:
    """Move weights that started as N(0, 1/fan_in), embeddings as N(0, 1/width), to muP's start.

    Args:
        model: of which only embeddings and the head change.
        head: which gives the logits, with a weight of its own.
        width_ratio: the width over the base width.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.mul_(width_ratio**0.5)
    head.weight.div_(width_ratio**0.5)
