"""Degenerate weights and gradients: the step stays finite and equivariant, and does what
docs/method.md says.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.data import TextData
from ddc.gauges import KINDS, GaugeSet, HiddenMatrix, Rescale, in_blocks
from ddc.models import DeepMLP, DeepMLPConfig, GPTConfig, cross_entropy
from ddc.report.runs import read_lines
from experiments.precision.measure import CONFIGS, OPTIMIZERS, PRECISIONS, RESULTS, compare
from experiments.precision.report import document
from tests.conftest import MODELS
from tests.helpers import VOCABULARY, backward, batch, make_model, relu_mlp, relu_mlp_gauges

LLAMA, LAYER, RELU2 = "rms-swiglu-rope-gqa", "layer-bias-relu-learned", "rms-relu2-partial-gqa"
MLP, CHAIN = "deep ReLU network", "deep ReLU network, chained"
MIXTURE = "experts and an adapter"
PRIME = 7
PAIRS = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
ALL = slice(None)
#: A parameter, and an index into it.
Place = tuple[str, Any]


class Mixture(nn.Module):
    """Experts, their router, and an adapter beside them, between two norms."""

    def __init__(self, width: int = 16, experts: int = 3, rank: int = 4) -> None:
        super().__init__()
        self.config = GPTConfig(context=8)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.norm, self.last_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width, False) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(2 * width, width, False) for _ in range(experts))
        self.a, self.b = nn.Linear(width, rank, False), nn.Linear(rank, width, False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.arange(8).view(2, 4),)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        h = self.norm(x)
        shares = self.router(h).softmax(-1).unbind(-1)
        for share, up, down in zip(shares, self.up, self.down, strict=True):
            x = x + share.unsqueeze(-1) * down(up(h).relu())
        return self.head(self.last_norm(x + self.b(self.a(h))))


@functools.cache
def original(name: str) -> nn.Module:
    if name in MODELS:
        return make_model(MODELS[name])
    torch.manual_seed(0)
    if name == MIXTURE:
        return Mixture().double()
    return DeepMLP(DeepMLPConfig(depth=3, width=8), PRIME, PRIME).double()


@functools.cache
def gauges_of(name: str) -> GaugeSet:
    return find_gauges(original(name), per_layer=name == CHAIN)


def fresh(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return copy.deepcopy(original(name)).to(dtype)


def ddcadam(model: nn.Module, gauges: GaugeSet, **options: Any) -> DDCAdam:
    return DDCAdam(model.named_parameters(), gauges, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def ddcmuon(model: nn.Module, gauges: GaugeSet, per_head: bool = False, **options: Any) -> DDCMuon:
    exact = next(model.parameters()).dtype == torch.float64
    options = {
        "orthogonalizer": "polar" if exact else "newton_schulz",
        "weight_decay": 0.1,
        **options,
    }
    return DDCMuon(
        model.named_parameters(), gauges, hidden_matrices(model, per_head), adam_lr=1e-2, **options
    )


MAKERS: dict[str, Callable[..., DDCAdam]] = {"DDCAdam": ddcadam, "DDCMuon": ddcmuon}
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def gradients(model: nn.Module, seed: int) -> None:
    """Those of the model's own loss."""
    if isinstance(model, DeepMLP):
        model.zero_grad()
        cross_entropy(model(PAIRS), PAIRS.sum(1) % PRIME).backward()
    else:
        backward(model, seed)


def train(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> None:
    for seed in range(first, first + steps):
        gradients(model, seed)
        optimizer.step()


@torch.no_grad()
def function(model: nn.Module) -> Tensor:
    inputs = PAIRS if isinstance(model, DeepMLP) else batch(model.config, 99)[:, :-1]
    return model(inputs).log_softmax(-1)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def all_of(model: nn.Module, optimizer: Optimizer) -> dict[tuple[str, str], Tensor]:
    """Copies of weights and of all state that a step moves (not what grows from zero, which stays
    nothing in most tests).
    """
    found = {(name, "weight"): p.detach().clone() for name, p in named(model).items()}
    for name, p in named(model).items():
        found |= {
            (name, key): value.clone()
            for key, value in optimizer.state[p].items()
            if not key.endswith("waking")
        }
    return found


def assert_finite(model: nn.Module, optimizer: DDCAdam) -> None:
    infinite = [
        key for key, value in all_of(model, optimizer).items() if not value.isfinite().all()
    ]
    assert not infinite
    assert optimizer.grad_norm().isfinite()


# ------------------------------------------------------------------------------------------------
# dead weights


@dataclass(frozen=True)
class Case:
    """What is zero at the start, and under which optimizers it leaves zero.

    ``moved`` are the kinds of gauges that tell the two starts apart; the optimizer respects all.
    ``only`` is the optimizer of a case that is the other's by construction.
    """

    model: str
    zero: tuple[Place, ...]
    wakes: tuple[str, ...] = ()
    moved: tuple[str, ...] = tuple(KINDS)
    only: tuple[str, ...] = tuple(MAKERS)
    options: dict[str, Any] = field(default_factory=dict)


MLP_AT, ATTENTION = "blocks.0.mlp", "blocks.0.attention"
BOTH, ADAM = tuple(MAKERS), ("DDCAdam",)
# behind a head that is nothing but its mean row, gradients are rounding and not zero, which Muon
# orthogonalises, and Adam steps by 1e-9: no shift there
UNSHIFTED = tuple(kind for kind in KINDS if kind != "logit_shift")
QKV = tuple((f"{ATTENTION}.{name}.weight", (ALL, 3)) for name in ("query", "key", "value"))
UP, DOWN = (f"{MLP_AT}.up.weight", 2), (f"{MLP_AT}.down.weight", (ALL, 2))
BIAS = (f"{MLP_AT}.up.bias", 2)
CASES = {
    "a unit, plus side": Case(LLAMA, (UP,), BOTH),
    "a unit, minus side": Case(LLAMA, (DOWN,), BOTH),
    "a unit, both sides": Case(LLAMA, (UP, DOWN)),
    "a unit of degree 2, minus side": Case(RELU2, (DOWN,), BOTH),
    "a ReLU² unit without gradient": Case(RELU2, (UP,)),
    "a ReLU unit without gradient": Case(LAYER, (UP, BIAS)),
    "a ReLU unit, minus side": Case(LAYER, (DOWN,), BOTH),
    "a ReLU unit with its bias, both sides": Case(LAYER, (UP, BIAS, DOWN)),
    "all of a unit but its bias": Case(LAYER, (UP, DOWN), ADAM, only=ADAM),
    "a gamma that dresses": Case(LLAMA, ((f"{MLP_AT}_norm.weight", 3),)),
    "a gamma": Case(LLAMA, ((f"{ATTENTION}_norm.weight", 3),)),
    "the last gamma": Case(LLAMA, (("norm.weight", 3),)),
    "a gamma with its beta alive": Case(LAYER, ((f"{MLP_AT}_norm.weight", 3),), BOTH),
    "gamma and beta": Case(
        LAYER, ((f"{ATTENTION}_norm.weight", 3), (f"{ATTENTION}_norm.bias", 3)), ADAM
    ),
    "gamma and beta that dress": Case(
        LAYER, ((f"{MLP_AT}_norm.weight", 3), (f"{MLP_AT}_norm.bias", 3))
    ),
    "all readers of a channel": Case(LLAMA, QKV, BOTH),
    "the head": Case(LLAMA, (("head.weight", ALL),), BOTH, UNSHIFTED),
    "head and bias": Case(LAYER, (("head.weight", ALL), ("head.bias", ALL)), BOTH, UNSHIFTED),
    "output projections": Case(
        LLAMA,
        (("blocks.0.mlp.down.weight", ALL), ("blocks.1.attention.output.weight", ALL)),
        BOTH,
    ),
    "output projections, by heads": Case(
        LLAMA,
        (("blocks.0.attention.output.weight", ALL),),
        BOTH,
        only=("DDCMuon",),
        options={"per_head": True},
    ),
    "output projections of degree 2": Case(RELU2, (("blocks.0.mlp.down.weight", ALL),), BOTH),
    "output projections beside biases": Case(LAYER, (("blocks.0.mlp.down.weight", ALL),), BOTH),
    "an input projection": Case(LLAMA, ((f"{MLP_AT}.up.weight", ALL),), BOTH),
    "all values": Case(LLAMA, ((f"{ATTENTION}.value.weight", ALL),), BOTH),
    "queries": Case(LLAMA, ((f"{ATTENTION}.query.weight", ALL),), BOTH),
    "a head of values": Case(LLAMA, ((f"{ATTENTION}.value.weight", slice(4)),), BOTH),
    "a head that is a block": Case(
        LLAMA,
        ((f"{ATTENTION}.value.weight", slice(4)),),
        BOTH,
        only=("DDCMuon",),
        options={"per_head": True},
    ),
    "a neuron, plus side": Case(MLP, (("layers.1.weight", 3),)),
    "a neuron, minus side": Case(MLP, (("layers.2.weight", (ALL, 3)),), BOTH),
    "a neuron, both sides": Case(MLP, (("layers.1.weight", 3), ("layers.2.weight", (ALL, 3)))),
    "a neuron that the head reads": Case(MLP, (("head.weight", (ALL, 2)),), ADAM, UNSHIFTED),
    "an input neuron": Case(MLP, (("embedding.weight", (ALL, 2)),)),
    "the network's head": Case(MLP, (("head.weight", ALL),), ADAM, UNSHIFTED, only=ADAM),
    "a row within a layer": Case(CHAIN, (("layers.1.weight", 3),)),
    "a column within a layer": Case(CHAIN, (("layers.2.weight", (ALL, 3)),), BOTH),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "freeze": {},
    "adam": {"vertical": "adam", "step_scale": "norm"},
    "balance": {"vertical": "balance", "retract": False},
    "still": {"radial_rate": 0.0},
    "paper": {"additive": True, "step_scale": "norm", "retract": False, "vertical": "balance"},
}


def at(model: nn.Module, place: Place) -> Tensor:
    return named(model)[place[0]].detach()[place[1]]


def starts(case: Case) -> list[nn.Module]:
    """Two points of an orbit."""
    models = [fresh(case.model), fresh(case.model)]
    for model in models:
        for place in case.zero:
            at(model, place).zero_()
    gauges = gauges_of(case.model)
    moved = gauges.only([kind for kind in case.moved if kind in {gauge.kind for gauge in gauges}])
    moved.transform_(models[1], torch.Generator().manual_seed(1))
    torch.testing.assert_close(function(models[0]), function(models[1]), rtol=0, atol=1e-10)
    return models


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("case", "optimizer"), [(name, each) for name, case in CASES.items() for each in case.only]
)
def test_dead_weights(case: str, optimizer: str, variant: str) -> None:
    """From two points of an orbit the same function; all is finite; and what is dead wakes, or
    stays exactly zero.
    """
    this = CASES[case]
    models = starts(this)
    before = function(models[0])
    for model in models:
        made = MAKERS[optimizer](model, gauges_of(this.model), **VARIANTS[variant], **this.options)
        train(model, made, 4)
        assert_finite(model, made)
        for place in this.zero:
            assert bool(at(model, place).any()) == (optimizer in this.wakes), place
    torch.testing.assert_close(function(models[0]), function(models[1]), rtol=0, atol=1e-7)
    assert (function(models[0]) - before).abs().max() > 1e-2


#: What starts at zero: names of matrices by how they end, in a model of the tests or of others.
ZERO_STARTS = {
    "output projections in blocks": (LLAMA, ("output.weight", "down.weight")),
    "output projections": (LLAMA, ("output.weight", "down.weight")),
    "output projections, ReLU and biases": (LAYER, ("output.weight", "down.weight")),
    "output projections, ReLU²": (RELU2, ("output.weight", "down.weight")),
    "head": (LLAMA, ("head.weight",)),
    "router": (MIXTURE, ("router.weight",)),
    "adapter": (MIXTURE, ("b.weight",)),
    "router, adapter and experts": (MIXTURE, ("router.weight", "b.weight", "down.0.weight")),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", MAKERS)
@pytest.mark.parametrize("start", ZERO_STARTS)
def test_zero_starts_grow_and_stay_equivariant(start: str, optimizer: str) -> None:
    """Over 100 steps, at the end of which what was zero is far longer than multiplication by
    exp(lr) a step would have made it.
    """
    name, ends = ZERO_STARTS[start]
    models = [fresh(name), fresh(name)]
    zero = [each for each in named(models[0]) if each.endswith(ends)]
    for model in models:
        for each in zero:
            nn.init.zeros_(named(model)[each])
    gauges = in_blocks(gauges_of(name)) if "blocks" in start else gauges_of(name)
    kinds = UNSHIFTED if start == "head" else tuple(KINDS)
    moved = gauges.only([kind for kind in kinds if kind in {gauge.kind for gauge in gauges}])
    moved.transform_(models[1], torch.Generator().manual_seed(1))
    before, optimizers = function(models[0]), []
    for model in models:
        optimizers.append(MAKERS[optimizer](model, gauges))
        train(model, optimizers[-1], 100)
    torch.testing.assert_close(function(models[0]), function(models[1]), rtol=0, atol=1e-7)
    assert (function(models[0]) - before).abs().max() > 0.1
    for each in zero:
        param = named(models[0])[each]
        assert param.norm() > 0.1 * math.sqrt(param.shape[0]), each
    # what is waking is the same at both starts, and has a place in the state
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        a, b = (each.state[p_] for each, p_ in zip(optimizers, (p, q), strict=True))
        for key in a:
            assert not key.endswith("waking") or torch.equal(a[key], b[key])


@pytest.mark.parametrize("optimizer", MAKERS)
def test_growing_from_zero_goes_on_after_loading(optimizer: str) -> None:
    """Bit by bit; and a state that was saved without what is waking is loaded as if nothing is."""
    model = fresh(LLAMA)
    for name, p in named(model).items():
        if name.endswith("down.weight"):
            nn.init.zeros_(p)
    made = MAKERS[optimizer](model, gauges_of(LLAMA))
    train(model, made, 3)
    other = copy.deepcopy(model)
    loaded = MAKERS[optimizer](other, gauges_of(LLAMA))
    loaded.load_state_dict(copy.deepcopy(made.state_dict()))
    train(model, made, 3, first=3)
    train(other, loaded, 3, first=3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    saved = copy.deepcopy(made.state_dict())
    waking = [
        (i, key) for i, state in saved["state"].items() for key in state if key.endswith("waking")
    ]
    assert any(saved["state"][i][key].any() for i, key in waking)
    for i, key in waking:
        del saved["state"][i][key]
    loaded.load_state_dict(saved)
    now = loaded.state_dict()["state"]
    assert not any(now[i][key].any() for i, key in waking)


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [
        # gradients behind it are rounding where it is shifted
        (Case(LLAMA, (("head.weight", ALL),)), "DDCMuon"),
        (Case(LAYER, (UP, DOWN)), "DDCMuon"),  # a bias is left of the unit
    ],
    ids=["a shifted zero head", "a bias alone"],
)
def test_where_equivariance_ends(case: Case, optimizer: str) -> None:
    models = starts(case)
    for model in models:
        made = MAKERS[optimizer](model, gauges_of(case.model))
        train(model, made, 4)
        assert_finite(model, made)
    assert (function(models[0]) - function(models[1])).abs().max() > 1e-5


@pytest.mark.parametrize("model", [LLAMA, LAYER])
def test_a_shifted_zero_head_wakes_alike(model: str) -> None:
    """That its columns are nothing but their mean is told from rounding."""
    models = starts(Case(model, (("head.weight", ALL),)))
    before = function(models[0])
    for each in models:
        train(each, MAKERS["DDCAdam"](each, gauges_of(model)), 4)
    assert (function(models[0]) - before).abs().max() > 1e-2
    torch.testing.assert_close(function(models[0]), function(models[1]), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("optimizer", "stay"), [("DDCAdam", ["up"]), ("DDCMuon", ["up", "gate"])])
def test_what_a_zero_gamma_dresses_stays(optimizer: str, stay: list[str]) -> None:
    """It has no effect, and not even decays; columns that the gamma does not dress decay."""
    model = fresh(LLAMA)
    block = model.blocks[0]
    with torch.no_grad():
        block.mlp_norm.weight[3] = 0
    before = {
        name: getattr(block.mlp, name).weight[:, 3].detach().clone() for name in ("up", "gate")
    }
    made = MAKERS[optimizer](model, gauges_of(LLAMA))
    train(model, made, 4)
    for name, column in before.items():
        now = getattr(block.mlp, name).weight[:, 3]
        rate = made.param_groups[-1]["lr"]
        expected = column if name in stay else column * (1 - rate * 0.1) ** 4
        torch.testing.assert_close(now, expected, rtol=0 if name in stay else 1e-12, atol=0)


def test_a_tiny_unit_is_dead_where_its_powers_are_no_numbers() -> None:
    """Below 1e-19, what a side of degree 2 dresses can be neither dressed nor undressed in
    float32.
    """

    class SquaredReLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu().square()

    for scale in (1e-15, 1e-19, 1e-20, 1e-21, 1e-22, 1e-23, 1e-30, 1e-42):
        model = relu_mlp(depth=5, bias=False, dtype=torch.float32)
        gauges = [
            Rescale(g.kind, g.where, g.plus, g.minus, degree=2) for g in relu_mlp_gauges(model)
        ]
        for i in range(1, len(model), 2):
            model[i] = SquaredReLU()
        with torch.no_grad():
            model[2].weight[1] *= scale
        optimizer = DDCAdam(model.named_parameters(), gauges, lr=1e-2)
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
        for _ in range(4):
            optimizer.zero_grad()
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
            assert_finite(model, optimizer)


@pytest.mark.parametrize(
    ("model", "zero", "make", "message"),
    [
        (CHAIN, ["layers.1.weight"], ddcmuon, "'layers.1.weight': all zero.* chained_rescale"),
        (
            LLAMA,
            ["norm.weight"],
            ddcadam,
            "'norm.weight': all zero.* under norm_scale at norm .* leave the gauge out",
        ),
        (LLAMA, ["blocks.0.mlp_norm.weight"], ddcmuon, "'blocks.0.mlp_norm.weight': all zero"),
        (
            LAYER,
            ["blocks.1.mlp_norm.weight", "blocks.1.mlp_norm.bias"],
            ddcadam,
            "'blocks.1.mlp_norm.weight' and 'blocks.1.mlp_norm.bias': all zero",
        ),
        (MLP, ["head.weight"], ddcmuon, "'head.weight': all zero.* under relu_rescale at layers.2"),
        (CHAIN, ["head.weight"], ddcadam, "'head.weight': all zero.* under chained_rescale"),
        (CHAIN, ["head.weight"], ddcmuon, "'head.weight': all zero.* under chained_rescale"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else getattr(value, "__name__", ""),
)
def test_what_would_stay_zero_though_adamw_moves_it_is_refused(
    model: str, zero: list[str], make: Callable[..., Optimizer], message: str
) -> None:
    made = fresh(model)
    start = named(made)
    for name in zero:
        nn.init.zeros_(start[name])
    with pytest.raises(ValueError, match=message):
        make(made, gauges_of(model))
    if make is ddcadam:
        train(made, AdamW(made.parameters()), 2)
        assert all(bool(start[name].any()) for name in zero)


# ------------------------------------------------------------------- frozen parameters and missing
# gradients


def test_what_freezes_later_is_refused_where_it_would_move() -> None:
    """Alone it would move with its gauge; with all that shares its gauges it stays, and so does its
    state.
    """
    model = fresh(LLAMA)
    optimizer = ddcadam(model, gauges_of(LLAMA))
    train(model, optimizer, 2)
    model.blocks[0].mlp.down.weight.requires_grad_(False)
    gradients(model, 2)  # this leaves a gradient of zero behind; from the next on there is none
    model.blocks[0].mlp.down.weight.grad = None
    before = all_of(model, optimizer)
    with pytest.raises(
        ValueError, match=r"'blocks.0.mlp.down.weight' was frozen .* Freeze that too"
    ):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in all_of(model, optimizer).items())
    model.blocks[0].requires_grad_(False)
    for p in model.blocks[0].parameters():
        p.grad = None
    train(model, optimizer, 2)
    for key, value in all_of(model, optimizer).items():
        assert torch.equal(value, before[key]) == key[0].startswith("blocks.0."), key


def test_frozen_hidden_matrices_stay_and_what_they_dress_moves() -> None:
    """Biases of a ReLU block are dressed by the norms of its hidden matrices."""
    model = fresh(LAYER)
    optimizer = MAKERS["DDCMuon"](model, gauges_of(LAYER))
    train(model, optimizer, 2)
    hidden = {matrix.parameter for matrix in hidden_matrices(model)}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in hidden)
        p.grad = None
    before = all_of(model, optimizer)
    train(model, optimizer, 2)
    after = all_of(model, optimizer)
    moved = {
        name
        for name, p in model.named_parameters()
        if not torch.equal(after[name, "weight"], before[name, "weight"])
    }
    assert moved == {name for name, _ in model.named_parameters()} - hidden


@both
def test_layers_without_gradient_stay_and_the_rest_moves_as_ever(make) -> None:
    """A block skipped in the forward pass (layer drop) keeps weights, state and step count."""
    model = fresh("layer-bias-swiglu-rope-mqa")
    optimizer = make(model, gauges_of("layer-bias-swiglu-rope-mqa"))
    train(model, optimizer, 3)
    whole, whole_optimizer = copy.deepcopy((model, optimizer))
    gradients(model, 7)
    gradients(whole, 7)
    for p in model.blocks[0].parameters():
        p.grad = None
    for p in whole.blocks[0].parameters():  # nothing of theirs goes into the rest
        p.grad.normal_()
    before = all_of(model, optimizer)
    optimizer.step()
    whole_optimizer.step()
    expected = all_of(whole, whole_optimizer)
    for key, value in all_of(model, optimizer).items():
        if make is ddcmuon and key[1] in ("step", "radial_exp_avg", "radial_exp_avg_sq"):
            continue  # those of all hidden matrices are together, with the first
        if key[0].startswith("blocks.0."):
            assert torch.equal(value, before[key]), key
        else:
            torch.testing.assert_close(value, expected[key], rtol=1e-13, atol=1e-15)


@both
def test_a_norm_without_gradient_still_dresses(make) -> None:
    """Only the readers have gradients: the missing gradient of the norm counts as zero."""
    name = "layer-bias-swiglu-rope-mqa"
    model = fresh(name)
    optimizer = make(model, gauges_of(name))
    train(model, optimizer, 3)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    gradients(model, 7)
    gradients(other, 7)
    model.blocks[0].mlp_norm.weight.grad = None
    other.blocks[0].mlp_norm.weight.grad.zero_()
    optimizer.step()
    other_optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


@both
@pytest.mark.parametrize("without", ["up.weight", "up.bias", "down.weight"])
def test_balance_moves_along_the_gauge_whatever_lacks_a_gradient(make, without: str) -> None:
    """Gradients are zero and nothing decays, so that nothing but the gauge is left to move."""
    model = fresh(LAYER)
    gauges_of(LAYER).transform_(model, torch.Generator().manual_seed(3))
    optimizer = make(model, gauges_of(LAYER), vertical="balance", weight_decay=0.0)
    start, weights = function(model), named(model)["blocks.0.mlp.up.weight"].detach().clone()
    for missing in (f"blocks.0.mlp.{without}", None):
        for name, p in named(model).items():
            p.grad = None if name == missing else torch.zeros_like(p)
        optimizer.step()
        torch.testing.assert_close(function(model), start, rtol=0, atol=1e-10)
    assert (named(model)["blocks.0.mlp.up.weight"] - weights).abs().max() > 1e-3


# ------------------------------------------------------------------------------ gradients of
# extreme sizes


@both
@pytest.mark.parametrize("name", [LAYER, CHAIN])
def test_zero_gradients_move_nothing(make, name: str) -> None:
    model = fresh(name)
    optimizer = make(model, gauges_of(name), weight_decay=0.0)
    before = all_of(model, optimizer)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for key, value in all_of(model, optimizer).items():
        if key[1] != "step":
            torch.testing.assert_close(value, before[key], rtol=1e-12, atol=1e-15)


@both
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
@pytest.mark.parametrize("name", [LAYER, CHAIN])
def test_tiny_and_huge_gradients_in_float32(make, name: str, scale: float) -> None:
    """Weights stay finite, and so does all state but second moments, which overflow as AdamW's
    do.
    """
    model = fresh(name, torch.float32)
    optimizer = make(model, gauges_of(name))
    plain = copy.deepcopy(model)
    adamw = AdamW(plain.parameters())
    for seed in range(4):
        for each, its in ((model, optimizer), (plain, adamw)):
            gradients(each, seed)
            if seed == 1:
                for p in each.parameters():
                    p.grad.mul_(scale)
            its.step()
    for (parameter, key), value in all_of(model, optimizer).items():
        overflows = scale > 1 and key.endswith("exp_avg_sq")
        assert value.isfinite().all() or overflows, (parameter, key)
    overflown = any(not state["exp_avg_sq"].isfinite().all() for state in adamw.state.values())
    assert overflown == (scale > 1)


def test_gradients_may_have_any_size_in_float64() -> None:
    """Two starts stay on one orbit through a step with gradients of 1e±30."""
    for make in MAKERS.values():
        models = [fresh(LLAMA), fresh(LLAMA)]
        gauges_of(LLAMA).transform_(models[1], torch.Generator().manual_seed(1))
        for model in models:
            optimizer = make(model, gauges_of(LLAMA))
            for seed, scale in enumerate((1.0, 1e-30, 1.0, 1e30, 1.0)):
                gradients(model, seed)
                for p in model.parameters():
                    p.grad.mul_(scale)
                optimizer.step()
            assert_finite(model, optimizer)
        torch.testing.assert_close(function(models[0]), function(models[1]), rtol=0, atol=1e-7)


def test_the_angle_of_a_hidden_matrix_does_not_depend_on_the_size_of_its_gradient() -> None:
    """As long as that is a normal number: under a denormal one it does not turn at all."""
    torch.manual_seed(0)
    gradient, start = torch.randn(6, 6), torch.randn(6, 6)
    for scale, angle in ((1e30, 0.02), (1.0, 0.02), (1e-30, 0.02), (1e-42, 0.0)):
        weight = nn.Parameter(start.clone())
        optimizer = DDCMuon(
            [("weight", weight)], (), [HiddenMatrix("weight")], lr=0.02, weight_decay=0.0
        )
        weight.grad = gradient * scale
        optimizer.step()
        cosine = nn.functional.cosine_similarity(
            weight.detach().double().flatten(), start.double().flatten(), 0
        )
        assert math.acos(min(1.0, float(cosine))) == pytest.approx(angle, abs=1e-4)


# ------------------------------------------------------------------------------------- what is no
# number


MLP_NORM = (f"{MLP_AT}_norm.weight", 3)
OUTPUT, GATE = f"{ATTENTION}.output.weight", f"{MLP_AT}.gate.weight"
#: Where the gradient of one entry may go: all units that it is in, on both sides of their gauges,
#: and what averages its square; under DDCMuon a hidden matrix, and those whose norms a gauge links
#: with its norm.
REACH: dict[Place, dict[str, tuple[Place, ...]]] = {
    (UP[0], (2, 3)): {
        "DDCAdam": (UP, (UP[0], (ALL, 3)), DOWN, (GATE, (ALL, 3)), MLP_NORM),
        "DDCMuon": ((UP[0], ALL), (DOWN[0], ALL)),
    },
    (QKV[0][0], (5, 3)): {
        "DDCAdam": (*QKV, (f"{ATTENTION}_norm.weight", 3)),
        "DDCMuon": ((QKV[0][0], ALL),),
    },
    (OUTPUT, (1, 5)): {"DDCAdam": ((OUTPUT, (1, slice(4, 8))),), "DDCMuon": ((OUTPUT, ALL),)},
    ("head.weight", (4, 3)): dict.fromkeys(MAKERS, (("head.weight", (ALL, 3)), ("norm.weight", 3))),
    ("embedding.weight", (2, 3)): dict.fromkeys(MAKERS, (("embedding.weight", (2, 3)),)),
    MLP_NORM: {"DDCAdam": (MLP_NORM, (UP[0], (ALL, 3)), (GATE, (ALL, 3))), "DDCMuon": ()},
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", MAKERS)
@pytest.mark.parametrize("place", REACH, ids=lambda place: place[0])
def test_a_gradient_that_is_no_number_shows_and_stays_in_its_units(
    place: Place, optimizer: str, value: float
) -> None:
    """It shows in the weights, as under AdamW, and in the norm; what shares no unit with it moves
    as if it were finite.

    (A gamma whose readers are all hidden matrices keeps still whatever its gradient: there it shows
    in the norm alone.)
    """
    found = {}
    for gradient in (value, 0.5):
        model = fresh(LLAMA, torch.float32)
        made = MAKERS[optimizer](model, gauges_of(LLAMA))
        train(model, made, 2)
        gradients(model, 2)
        named(model)[place[0]].grad[place[1]] = gradient
        assert bool(made.grad_norm().isfinite()) == math.isfinite(gradient)
        made.step()
        found[gradient] = {name: p.detach() for name, p in named(model).items()}
    reach = REACH[place][optimizer]
    shows = [name for name, p in found[value].items() if not p.isfinite().all()]
    assert (place[0] in shows) == bool(reach)
    for name, p in found[value].items():
        outside = torch.ones_like(p, dtype=torch.bool)
        for other, index in reach:
            if other == name:
                outside[index] = False
        assert torch.equal(p[outside], found[0.5][name][outside]), name


def test_the_exact_polar_factor_raises() -> None:
    model = fresh(LLAMA)
    optimizer = ddcmuon(model, gauges_of(LLAMA))
    gradients(model, 0)
    model.blocks[0].mlp.up.weight.grad[0, 0] = math.nan
    with pytest.raises(torch.linalg.LinAlgError, match="non-finite"):
        optimizer.step()


def test_clipping_by_a_norm_that_is_no_number() -> None:
    """As with torch's own norm: by nan all gradients become nan, by inf all zero but those that
    were inf.
    """
    for value, rest in ((math.nan, math.nan), (math.inf, 0.0)):
        model = fresh(LLAMA)
        optimizer = ddcadam(model, gauges_of(LLAMA))
        gradients(model, 0)
        named(model)[OUTPUT].grad[1, 5] = value
        nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, optimizer.grad_norm())
        for name, p in named(model).items():
            expected = torch.full_like(p, rest)
            if name == OUTPUT:
                expected[1, 5] = math.nan
            torch.testing.assert_close(p.grad, expected, equal_nan=True)


@both
def test_a_grad_scaler_skips_an_overflow_and_loses_nothing(make) -> None:
    """Weights and state are as they were, bit by bit, also with clipping in between; and the next
    step is as ever.
    """
    model, plain = fresh(LLAMA, torch.float32), fresh(LLAMA, torch.float32)
    optimizer, other = make(model, gauges_of(LLAMA)), make(plain, gauges_of(LLAMA))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    tokens = batch(model.config, 0)
    for bad in (False, True, False):
        before = all_of(model, optimizer)
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])).backward()
        if bad:
            model.blocks[0].mlp.up.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, optimizer.grad_norm())
        scaler.step(optimizer)
        scaler.update()
        unchanged = [
            key
            for key, value in all_of(model, optimizer).items()
            if torch.equal(value, before[key])
        ]
        assert len(unchanged) == (len(before) if bad else 0)
        if not bad:
            gradients(plain, 0)
            nn.utils.clip_grads_with_norm_(plain.parameters(), 1.0, other.grad_norm())
            other.step()
    assert scaler.get_scale() == 2.0**9
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


# -------------------------------------------------------------------------------------------------
# precision


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_error_against_float64(optimizer: str, shakespeare: TextData) -> None:
    """It is that of the rounding, and so is the distance of two starts on one orbit, but for AdamW
    and Muon.
    """
    config = CONFIGS["RMSNorm, SwiGLU, RoPE, GQA"]
    found = {each["precision"]: each for each in compare(config, optimizer, shakespeare, 0, (0, 4))}
    assert list(found) == [precision.name for precision in PRECISIONS]
    error = {name: each["error"]["4"] for name, each in found.items()}
    assert error["float64"] == 0 < error["float32"] < 1e-5 < error["mixed bfloat16"] < 0.03
    assert 1e-5 < error["mixed float16"] < error["bfloat16 weights"] < 0.1
    for name, each in found.items():
        if optimizer.startswith("ddc"):
            assert each["orbit"]["4"] < 3 * (each["orbit"]["0"] + each["error"]["4"]) + 1e-12, name
        else:
            assert each["orbit"]["4"] > 0.05, name


def test_the_table_of_precisions_follows_from_its_records() -> None:
    assert document(read_lines(RESULTS / "records.jsonl")) == (RESULTS / "table.md").read_text()
