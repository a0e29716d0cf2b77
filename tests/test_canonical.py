"""Balanced representatives and distances between orbits."""

from __future__ import annotations

import copy

import pytest
import torch

from ddc.gauges import balance_, find_gauges, named_parameters, orbit_distance
from ddc.models import GPTConfig
from tests.helpers import make_model, relu_mlp, relu_mlp_gauges


def moved(model: torch.nn.Module, gauges, seed: int, spread: float = 1.0) -> torch.nn.Module:
    other = copy.deepcopy(model)
    gauges.transform_(other, torch.Generator().manual_seed(seed), spread)
    return other


def norm(model: torch.nn.Module) -> float:
    return float(torch.cat([p.flatten() for p in model.parameters()]).detach().norm())


def test_the_distance_is_a_function_of_the_orbits(config: GPTConfig) -> None:
    model = make_model(config)
    gauges = find_gauges(model)
    near = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in near.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    a, b = named_parameters(model), named_parameters(near)
    distance = float(orbit_distance(a, b, gauges))
    assert distance > 0.01
    for seed in range(3):
        a2, b2 = named_parameters(moved(model, gauges, seed)), named_parameters(moved(near, gauges, 10 + seed))
        assert float(orbit_distance(a2, b2, gauges)) == pytest.approx(distance, rel=1e-9)
        assert float(orbit_distance(a, a2, gauges)) < 1e-9
    before = copy.deepcopy(dict(a))
    assert all(torch.equal(before[name], p) for name, p in a.items())


def test_the_balanced_point_has_the_least_norm(config: GPTConfig) -> None:
    model = make_model(config)
    gauges = find_gauges(model)
    before = model(torch.arange(5)[None]).log_softmax(-1)
    balance_(named_parameters(model), gauges)
    torch.testing.assert_close(model(torch.arange(5)[None]).log_softmax(-1), before, rtol=0, atol=1e-11)
    for seed in range(5):
        for spread in (0.01, 1.0):
            assert norm(moved(model, gauges, seed, spread)) >= norm(model) * (1 - 1e-12)


def test_chained_rescales_balance_together() -> None:
    model = relu_mlp(bias=True)
    balance_(named_parameters(model), relu_mlp_gauges(model))
    for gauge in relu_mlp_gauges(model):
        plus, minus = gauge.log_norms(named_parameters(model))
        torch.testing.assert_close(plus, minus, rtol=0, atol=1e-10)


def test_dead_units_stay_as_they_are() -> None:
    model = relu_mlp(bias=True)
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2], model[2].weight[:, 3] = 0, 0, 0
    before = model[2].weight[:, 2].clone()
    balance_(named_parameters(model), relu_mlp_gauges(model)[:1])
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model[2].weight[:, 2], before)


def test_no_end_is_an_error() -> None:
    model = relu_mlp(bias=True)
    with pytest.raises(RuntimeError, match="not balanced after 1 sweeps"):
        balance_(named_parameters(model), relu_mlp_gauges(model), sweeps=1)


def test_float32_balances_to_its_rounding() -> None:
    model = relu_mlp(bias=True, dtype=torch.float32)
    balance_(named_parameters(model), relu_mlp_gauges(model))
