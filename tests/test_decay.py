"""What decay acts on: shares that move nothing along an orbit, and runs that keep their names."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddc.gauges import (
    Axis,
    Chain,
    GaugeSet,
    Rescale,
    find_gauges,
    hidden_matrices,
    named_parameters,
)
from ddc.models import GPT, GPTConfig
from ddc.optim.decay import consistent, decay_groups, decay_shares
from ddc.optim.factory import make_optimizer
from ddc.training.compose import compose_config, restored
from ddc.training.schema import OPTIMIZERS

LEAST, RATE, DECAY = 1e-12, 1e-2, 0.5
STEPS = 20


def gpt(seed: int = 0, **options: Any) -> GPT:
    """A small model in float64, off its start: norm scales of 1 would test too little."""
    torch.manual_seed(seed)
    sizes = {"context": 8, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "hidden": 24}
    model = GPT(GPTConfig(**{**sizes, **options}), 11).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def places(model: nn.Module, gauges: GaugeSet) -> Tensor:
    """Where each unit is on its orbits under the rescales."""
    params, found = named_parameters(model), []
    for gauge in gauges:
        if isinstance(gauge, Rescale):
            plus, minus = gauge.log_norms(params)
            found.append(plus - gauge.degree * minus)
    return torch.cat(found)


def train(model: GPT, gauges: GaugeSet, name: str, decay_on: str, **options: Any) -> Tensor:
    """Some steps; the logits at the end."""
    optimizer = make_optimizer(name, model, gauges, DECAY, decay_on=decay_on, lr=RATE, **options)
    tokens = torch.arange(32).view(4, 8) * 7 % 11
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
        loss.backward()
        optimizer.step()
    return model(tokens).log_softmax(-1).detach()


def test_shares_by_hand() -> None:
    model = gpt()
    shares = decay_shares(dict(model.named_parameters()), "consistent", find_gauges(model))
    # one norm scale: half each. γ | gate, up | down: the rates 2e and 2e, nearest to 1 and 2
    for name, share in shares.items():
        is_free = name == "embedding.weight" or name.endswith("output.weight")
        wanted = 1.0 if is_free else 0.75 if ".mlp" in name else 0.5
        assert share == pytest.approx(wanted), name


def test_shares_follow_degrees_and_chains_and_vanish_where_these_contradict() -> None:
    on_matrices = dict.fromkeys("abc", 1.0)

    def rescale(plus: str, minus: str, degree: float) -> Rescale:
        return Rescale("relu_rescale", "x", (Axis(plus, 0),), (Axis(minus, 1),), degree)

    squared = consistent(on_matrices, [rescale("a", "b", 2)])
    assert squared["a"] == pytest.approx(2 * squared["b"])
    assert 2 * squared["a"] + squared["b"] == pytest.approx(3)  # the rate of both on matrices
    assert consistent(on_matrices, [Chain(("a", "b", "c"))]) == pytest.approx(on_matrices)
    circle = [rescale("a", "b", 2), rescale("b", "a", 1)]
    assert set(consistent(on_matrices, circle).values()) == {0.0}
    assert consistent(on_matrices, []) == {}


@pytest.mark.parametrize("decay_on", ["matrices", "all", "consistent"])
def test_every_parameter_is_in_one_group(decay_on: str) -> None:
    model = gpt()
    groups = decay_groups(model, DECAY, decay_on, find_gauges(model))
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    decays = [group["weight_decay"] for group in groups]
    assert decays == sorted({*decays}, reverse=True)
    with pytest.raises(ValueError, match="expected one of matrices, all, consistent"):
        decay_groups(model, DECAY, "vectors")


@pytest.mark.parametrize("name", ["ddcadam", "adamw"])
def test_the_drift_of_norm_scales_is_decays(name: str) -> None:
    """Of those whose readers no other rescale moves: DDCAdam has no other drift, AdamW has."""
    model = gpt()
    gauges = find_gauges(model)
    apart = GaugeSet(tuple(g for g in gauges.only(["norm_scale"]) if "attention" in g.where))
    drift = {}
    for decay_on in ("matrices", "all", "consistent"):
        mine = copy.deepcopy(model)
        train(mine, gauges, name, decay_on)
        drift[decay_on] = float((places(mine, apart) - places(model, apart)).abs().max())
    lost = -STEPS * math.log(1 - RATE * DECAY)  # by readers, on matrices alone
    if name == "ddcadam":
        assert drift["matrices"] == pytest.approx(lost, rel=1e-9)
        assert max(drift["all"], drift["consistent"]) < LEAST
    else:
        assert min(drift.values()) > lost / 10


@pytest.mark.parametrize("name", ["adamw", "ddcadam", "ddcadam_paper", "muon", "ddcmuon"])
@pytest.mark.parametrize(("mlp", "decay_on"), [("swiglu", "all"), ("relu2", "consistent")])
def test_without_gradients_units_stay_in_their_places(name: str, mlp: str, decay_on: str) -> None:
    model = gpt(mlp=mlp, norm="rms" if mlp == "swiglu" else "layer")
    # a logit shift lets the centred part decay alone
    gauges = GaugeSet(tuple(g for g in find_gauges(model) if g.kind != "logit_shift"))
    options = dataclasses.asdict(OPTIMIZERS[name]()) | {"lr": RATE}
    options |= {"adam_lr": RATE} if "muon" in name else {}
    for key in ("name", "weight_decay", "canonicalise", "base_width", "per_head", "decay_on"):
        options.pop(key, None)
    moved = {}
    for each in (decay_on, "matrices"):
        mine = copy.deepcopy(model)
        hidden = hidden_matrices(mine) if "muon" in name else ()
        optimizer = make_optimizer(name, mine, gauges, DECAY, hidden, decay_on=each, **options)
        for parameter in mine.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved[each] = float((places(mine, gauges) - places(model, gauges)).abs().max())
    second_order = (RATE * DECAY) ** 2 if mlp == "relu2" else 0.0
    assert moved[decay_on] <= LEAST + second_order
    assert moved["matrices"] > RATE * DECAY / 2


@pytest.mark.parametrize("decay_on", ["matrices", "all", "consistent"])
def test_ddcadam_stays_equivariant(decay_on: str) -> None:
    model = gpt()
    gauges = find_gauges(model)
    moved = copy.deepcopy(model)
    gauges.transform_(moved, torch.Generator().manual_seed(1))
    first, second = (train(each, gauges, "ddcadam", decay_on) for each in (model, moved))
    assert (first - second).abs().max() < 1e-9


def test_runs_keep_their_names_and_older_ones_their_decay() -> None:
    base = ["+experiment=past_fit", "optimizer=ddcadam"]
    before = compose_config(base)
    assert "decay_on" not in before.identity["optimizer"]
    assert before.run_id == "ddcadam-seed0-d52855f0"  # as before there was a choice
    ids = {
        compose_config([*base, f"optimizer.decay_on={each}"]).run_id
        for each in ("matrices", "all", "consistent")
    }
    assert len(ids) == 3
    assert before.run_id in ids
    assert restored(before.identity).optimizer.decay_on == "matrices"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("optimizer.decay_on=vectors", "optimizer.decay_on"),
        ("optimizer.decay_on=consistent gauges=none", "those of the paper"),
        ("optimizer.decay_on=consistent gauges=complete", "those of the paper"),
        ("optimizer=adamw optimizer.decay_on=all optimizer.base_width=64", "decay of muP"),
    ],
)
def test_a_decay_that_has_no_meaning_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config(["+experiment=past_fit", *overrides.split()])


def test_what_is_frozen_holds_what_it_is_tied_to() -> None:
    """Else its readers would shrink alone, along the orbit."""
    model = gpt()
    model.blocks[0].attention_norm.weight.requires_grad_(False)
    shares = decay_shares(dict(model.named_parameters()), "consistent", find_gauges(model))
    held = ("attention_norm.weight", *(f"attention.{each}.weight" for each in ("query", "key")))
    assert all(shares[f"blocks.0.{name}"] == 0 for name in held)
    assert shares["blocks.1.attention_norm.weight"] == 0.5


def test_a_norm_that_scales_by_1_plus_gamma_is_consistent_under_ddc_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    gauge = Rescale("norm_scale", "norm", (Axis("0.bias", 0, offset=1),), (Axis("1.weight", 1),))
    options = {"lr": 0.1, "weight_decay": 0.1, "decay_on": "consistent"}
    with pytest.raises(ValueError, match=r"optimizer.decay_on=consistent: norm_scale.*1 \+ a"):
        make_optimizer("adamw", model, GaugeSet([gauge]), **options)
    make_optimizer("ddcadam", model, GaugeSet([gauge]), **options)
