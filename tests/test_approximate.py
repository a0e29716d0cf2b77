"""Scales of what norms alone read: symmetries at eps = 0, never called exact, taken by no optimizer
unasked.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ddc import DDCAdam, DDCMuon, certify, check, find_gauges, hidden_matrices
from ddc.gauges import (
    Axis,
    GaugeSet,
    Rescale,
    approximate_kinds,
    audit,
    complete_kinds,
    paper_kinds,
)
from ddc.gauges.certificate import Jacobian
from ddc.gauges.double import InDouble, double
from ddc.optim import respected
from ddc.optim.drift import gauge_coordinates
from ddc.training.setup import prepare
from tests.test_complete import LAYER_NORM, MODELS, Made, gpt, moved, text
from tests.test_complete_steps import TARGETS
from tests.test_training import composed

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Convolutions(nn.Module):
    """Two convolutions with batch norm, one with a bias, and a head behind the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.other = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.other(self.second(x)).relu()
        return self.head(x.mean((2, 3)))


def vit() -> Made:
    import timm  # behind tests.test_complete, which provides the operators that it asks for

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    name = "vit_tiny_patch16_224"
    return timm.create_model(name, **sizes, num_classes=5, qk_norm=True), (IMAGES,)


CASES: dict[str, tuple[Callable[[], Made], dict[str, int]]] = {
    "GPT": (MODELS["GPT, RMSNorm, SwiGLU, RoPE, grouped heads"], {"stream_scale": 1}),
    "GPT, LayerNorm": (gpt(**LAYER_NORM), {"stream_scale": 1}),
    # two query heads and a key head; norms spelt out
    "Qwen3": (MODELS["Qwen3"], {"stream_scale": 1, "normed_scale": 3}),
    # queries, keys, and what the norms behind attention and feed-forward read
    "OLMo 2": (text("Olmo2"), {"normed_scale": 4}),
    # queries, keys and values in one weight
    "ViT, QK-norm": (vit, {"stream_scale": 1, "normed_scale": 4}),
    "convolutions": (lambda: (Convolutions().train(), (IMAGES,)), {"filter_scale": 8}),
}

SLOW = ("Qwen3", "OLMo 2", "ViT, QK-norm")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@functools.cache
def found(name: str) -> tuple[nn.Module, Any, GaugeSet]:
    torch.manual_seed(0)
    model, inputs = CASES[name][0]()
    model.train("convolutions" in name)
    return model, inputs, find_gauges(model, inputs=inputs, kinds=approximate_kinds())


def with_eps(model: nn.Module, eps: float) -> nn.Module:
    """A copy in which every norm has this eps."""
    model, count = copy.deepcopy(model), 0
    for module in model.modules():
        for key in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, max(eps, 1e-300))  # torch's batch norm refuses zero
                count += 1
    assert count
    return model


def log_probs(inputs: Any) -> Callable[[nn.Module], Tensor]:
    """All in float64, also what norms of transformers compute in float32."""

    def of(model: nn.Module) -> Tensor:
        args = tree_map(double, inputs)
        with InDouble():
            given = model(**args) if isinstance(args, Mapping) else model(*args)
        logits = given if isinstance(given, Tensor) else given.logits
        return F.log_softmax(logits, -1)

    return of


def at_random(model: nn.Module) -> nn.Module:
    return moved(model).double().train(model.training)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_found(name: str) -> None:
    model, _, gauges = found(name)
    params = dict(model.named_parameters())
    dimensions = dict.fromkeys(CASES[name][1], 0)
    for gauge in gauges:
        dimensions[gauge.kind] += gauge.dimension(params)
    assert dimensions == CASES[name][1]
    assert not gauges.unchecked
    assert {*gauges.sizes} == {*gauges}


@pytest.mark.parametrize("name", NAMES)
def test_exact_at_eps_zero_alone(name: str) -> None:
    model, inputs, gauges = found(name)
    at_zero = check(at_random(with_eps(model, 0.0)), gauges, log_probs(inputs), seed=1)
    assert max(at_zero.values()) < 1e-10
    seen = check(at_random(with_eps(model, 1e-5)), gauges, log_probs(inputs), seed=1)
    assert min(seen.values()) > 1e-9
    small = find_gauges(with_eps(model, 1e-5), inputs=inputs, kinds=approximate_kinds())
    smaller = find_gauges(with_eps(model, 1e-7), inputs=inputs, kinds=approximate_kinds())
    for a, b in zip(small.sizes.values(), smaller.sizes.values(), strict=True):
        assert 0 < b < a < 10
        assert b < 0.2 * a or a > 0.1  # linear in eps, where that is small beside what is normed


def test_the_size_is_that_of_the_model_itself() -> None:
    """Small weights, which eps does not leave alone, have a large one."""
    model, inputs, gauges = found("GPT")
    small = copy.deepcopy(model)
    GaugeSet(gauges.found).transform_(small, torch.Generator(), 0.0)
    with torch.no_grad():
        for gauge in gauges:
            gauge.act_(dict(small.named_parameters()), torch.tensor([1e-2]))
    again = find_gauges(small, inputs=inputs, kinds=approximate_kinds())
    assert min(again.sizes.values()) > 100 * max(gauges.sizes.values())


@pytest.mark.parametrize("name", NAMES)
def test_tangents_and_audit(name: str) -> None:
    """The gradient along the orbit is zero at eps = 0, and tangents are what elements move by."""
    model, inputs, gauges = found(name)
    model = at_random(with_eps(model, 0.0))
    loss = log_probs(inputs)(model).square().sum()
    with InDouble():
        loss.backward()
    assert max(audit(model, gauges).values()) < 1e-9
    params = {name: p.detach() for name, p in model.named_parameters()}
    for gauge in gauges:
        element = torch.linspace(-1, 1, gauge.dimension(params), dtype=torch.float64)
        after = {key: p.clone() for key, p in params.items()}
        gauge.act_(after, (1e-6 * element).exp())
        difference = torch.cat([((after[k] - params[k]) / 1e-6).flatten() for k in params])
        assert (element @ gauge.tangents(params) - difference).abs().max() < 1e-4


@pytest.mark.slow
def test_the_certificate_tells_them_apart() -> None:
    model, inputs, gauges = found("GPT")
    exact = find_gauges(model, inputs=inputs, kinds="complete", verify=False)
    told = certify(model, exact, inputs, passes=128, explain=True)
    assert told.complete
    assert {kind: count for kind, (count, _) in told.approximate.items()} == CASES["GPT"][1]
    assert "complete, at eps = 0 alone: 1 by stream_scale (" in str(told)
    # no part of the kernel, but of that at eps = 0
    at_zero = Jacobian.of(with_eps(model, 0.0), inputs, passes=128)
    assert at_zero.certificate([*exact, *gauges]).complete
    assert at_zero.certificate(exact).unexplained == 1


def test_they_are_in_no_set_of_kinds_and_say_what_they_are() -> None:
    assert not {*approximate_kinds()} & {*paper_kinds(), *complete_kinds()}
    model, inputs, gauges = found("GPT")
    assert "found, at eps = 0 alone: changes " in str(gauges)
    assert not {g.kind for g in find_gauges(model, inputs=inputs, kinds="complete")} & {
        *approximate_kinds()
    }
    kept = gauges.only(["stream_scale"]).among(model.named_parameters())
    assert kept.sizes == gauges.sizes


def test_what_is_none_is_refused() -> None:
    class Read(nn.Module):
        """A stream that the head reads as well, and a filter whose output is read beside."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
            self.first, self.batch = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.table(tokens)
            y = self.first(self.norm(h))
            return self.head(h + self.batch(y) + y)

    gauges = find_gauges(Read(), inputs=(torch.arange(6),), kinds=approximate_kinds())
    assert not gauges.found
    reasons = {refusal.kind: refusal.reason for refusal in gauges.refused}
    assert reasons == {
        "stream_scale": "linear reads it",
        "filter_scale": "add reads what it norms as well",
    }


# ---- optimizers


def trained(
    name: str, gauges: GaugeSet, moves: GaugeSet, steps: int, make: Any, **options: Any
) -> Tensor:
    model, inputs, _ = found(name)
    here = at_random(with_eps(model, 0.0))
    moves.transform_(here, torch.Generator().manual_seed(1), 2.0)
    optimizer = make(here, gauges, **({"weight_decay": 0.1} | options))
    of = log_probs(inputs)
    targets = TARGETS if name != "convolutions" else torch.arange(6) % 5
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.nll_loss(of(here).flatten(0, -2), targets.flatten())
        with InDouble():
            loss.backward()
        optimizer.step()
    return of(here).detach()


def adam(model: nn.Module, gauges: GaugeSet, **options: Any) -> DDCAdam:
    return DDCAdam(model.named_parameters(), gauges, lr=3e-3, approximate=True, **options)


def muon(model: nn.Module, gauges: GaugeSet, **options: Any) -> DDCMuon:
    hidden = hidden_matrices(model)
    named = model.named_parameters()
    return DDCMuon(named, gauges, hidden, adam_lr=3e-3, approximate=True, **options)


def together(name: str) -> GaugeSet:
    """All exact gauges that DDCAdam takes, and the approximate ones."""
    model, inputs, some = found(name)
    kinds = [kind for kind in complete_kinds() if kind != "stream_rotation"]
    exact = find_gauges(model, inputs=inputs, kinds=kinds, verify=False)
    taken = respected(DDCAdam, model.named_parameters(), exact)
    return GaugeSet((*taken, *some))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT, LayerNorm", "Qwen3", "convolutions"])
def test_steps_are_equivariant_at_eps_zero(name: str) -> None:
    gauges = together(name)
    first, second = (trained(name, gauges, m, 100, adam) for m in (GaugeSet(), gauges))
    assert (first - trained(name, gauges, GaugeSet(), 0, adam)).abs().max() > 0.1
    assert (first - second).abs().max() < 1e-7
    # without being told of them it moves otherwise
    exact = GaugeSet(tuple(g for g in gauges if g.kind not in approximate_kinds()))
    scales = GaugeSet(tuple(g for g in gauges if g.kind in approximate_kinds()))
    first, second = (trained(name, exact, m, 20, adam) for m in (GaugeSet(), scales))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.slow
def test_muon_is_too() -> None:
    model, inputs, some = found("Qwen3")
    gauges = GaugeSet((*find_gauges(model, inputs=inputs, verify=False), *some))
    options = {"orthogonalizer": "polar"}
    first, second = (trained("Qwen3", gauges, m, 50, muon, **options) for m in (GaugeSet(), gauges))
    assert (first - second).abs().max() < 1e-7


def test_no_optimizer_takes_them_silently() -> None:
    model, _, gauges = found("GPT")
    with pytest.raises(ValueError, match="stream_scale at embedding: it is a symmetry at eps = 0"):
        DDCAdam(model.named_parameters(), gauges)
    with pytest.raises(ValueError, match="taken only with approximate=True"):
        DDCMuon(model.named_parameters(), gauges, hidden_matrices(model))
    optimizer = DDCAdam(model.named_parameters(), gauges, approximate=True)
    again = copy.deepcopy(optimizer)
    again.load_state_dict(optimizer.state_dict())


def test_the_coordinate_of_a_scale_is_its_logarithm() -> None:
    model, _, gauges = found("GPT")
    here = moved(model)
    before = gauge_coordinates(dict(here.named_parameters()), gauges)
    (gauge,) = gauges
    gauge.act_(dict(here.named_parameters()), torch.tensor([3.0], dtype=torch.float64))
    after = gauge_coordinates(dict(here.named_parameters()), gauges)
    assert (after[gauge] - before[gauge] - torch.tensor(3.0).log()).abs().max() < 1e-6


def test_scales_without_a_norm_that_keeps_still_are_refused() -> None:
    model, _, gauges = found("convolutions")
    first, second = gauges
    here = copy.deepcopy(model)
    rows = Rescale("relu_rescale", "rows", (Axis("second.weight"),), (Axis("head.weight", 1),))
    with pytest.raises(ValueError, match="no norm that relu_rescale at rows does not change"):
        DDCAdam(here.named_parameters(), [rows, second], approximate=True)
    for param in here.first.parameters():
        nn.init.zeros_(param)
    with pytest.raises(ValueError, match=r"'first.weight' is zero, which no scale moves"):
        DDCAdam(here.named_parameters(), [first], approximate=True)


@pytest.mark.slow
def test_configurations_ask_for_them_twice() -> None:
    small = ("model.width=16", "model.layers=1", "model.heads=2", "model.hidden=8")
    with pytest.raises(ValueError, match=r"gauges.stream_scale=true: .* gauges.approximate=true"):
        composed("gauges=stream_scale")
    asked = (*small, "gauges=[paper,stream_scale]", "gauges.approximate=true")
    assert composed(*asked).run_id != composed(*small, "gauges=paper").run_id
    for optimizer in ("ddcadam", "ddcmuon", "adamw"):
        setup = prepare(composed(*asked, f"optimizer={optimizer}"))
        assert "stream_scale" in {gauge.kind for gauge in setup.gauges}
