from __future__ import annotations

import itertools

import torch
from torch import nn

from ddc.gauges import Axis, Gauge, Rescale
from ddc.models import GPT, GPTConfig, cross_entropy
from experiments.equivariance.measure import random_model

VOCABULARY = 20


def make_model(config: GPTConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> GPT:
    return random_model(config, VOCABULARY, seed, dtype)


def batch(config: GPTConfig, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (4, config.context + 1), generator=generator)


def backward(model: GPT, seed: int) -> None:
    tokens = batch(model.config, seed)
    model.zero_grad()
    cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).backward()


def off_tangents(gauge: Gauge, params: dict[str, torch.Tensor], size: float = 1e-6) -> float:
    """How much of the change that a small element makes does not lie along the gauge's tangents, of
    its length.
    """
    turned = {name: p.clone() for name, p in params.items()}
    gauge.act_(turned, gauge.sample(turned, torch.Generator().manual_seed(0), size))
    change = torch.cat([(turned[name] - p).flatten() for name, p in params.items()]) / size
    tangents = gauge.tangents(params)
    assert tangents.shape == (gauge.dimension(params), len(change))
    rest = change - torch.linalg.lstsq(tangents.T, change[:, None]).solution.T[0] @ tangents
    return float(rest.norm() / change.norm())


def relu_mlp(
    depth: int = 4, width: int = 6, bias: bool = True, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """A chain of ReLU layers: each hidden matrix is under two rescale gauges."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _i in range(depth):
        layers += [nn.Linear(width, width, bias=bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    if bias:
        for p in model.parameters():
            if p.ndim == 1:
                nn.init.normal_(p, std=0.3)
    return model


def relu_mlp_gauges(model: nn.Sequential) -> list[Rescale]:
    linear = [str(i) for i, m in enumerate(model) if isinstance(m, nn.Linear)]
    return [
        Rescale(
            "relu_rescale",
            f"{a}-{b}",
            plus=(
                Axis(f"{a}.weight"),
                *((Axis(f"{a}.bias"),) if model[int(a)].bias is not None else ()),
            ),
            minus=(Axis(f"{b}.weight", 1),),
        )
        for a, b in itertools.pairwise(linear)
    ]
