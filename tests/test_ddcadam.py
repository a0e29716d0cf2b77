"""DDCAdam: equivariance, agreement with independent implementations, and good manners as a torch
optimizer.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ddc import DDCAdam, find_gauges
from ddc.data import TextData
from ddc.gauges import KINDS, Axis, GaugeSet, Rescale, RotatedAxis, Rotation, Shift, in_blocks
from ddc.gauges import named_parameters as params_of
from ddc.models import GPT, DeepMLP, DeepMLPConfig, GPTConfig
from ddc.optim.decay import decay_groups
from ddc.optim.drift import GaugeDrift
from experiments.equivariance.measure import MODELS as TABLE_MODELS
from experiments.equivariance.measure import adamw, ddcadam, ddcmuon, orbit_divergence, random_model
from tests.conftest import MODELS
from tests.helpers import VOCABULARY, backward, make_model, relu_mlp, relu_mlp_gauges
from tests.reference import ReferenceDDCAdam, ReferencePaperStep
from tests.test_gauges import orbit_tangents

LLAMA = TABLE_MODELS["RMSNorm, SwiGLU, RoPE, GQA"]
LAYER = TABLE_MODELS["LayerNorm, biases, ReLU, learned positions"]
RELU2 = TABLE_MODELS["RMSNorm, ReLU², partial RoPE, GQA"]
#: The step of the paper's companion; its gauges are in blocks.
PAPER = {"step_scale": "norm", "retract": False, "additive": True}
VERTICAL = ["freeze", "adam", "balance"]


# ----------------------------------------------------------------------------------------------
# equivariance


def divergence(
    config: GPTConfig,
    data: TextData,
    make=ddcadam,
    *,
    kinds=tuple(KINDS),
    blocks=False,
    dtype=torch.float64,
    **options,
):
    model = random_model(config, data.vocab_size, 0, dtype)
    clip = options.pop("max_grad_norm", None)
    steps = options.pop("steps", 100)
    gauges = find_gauges(model).only(kinds)
    gauges = in_blocks(gauges) if blocks else gauges
    return orbit_divergence(
        model, gauges, functools.partial(make, **options), data, steps=steps, max_grad_norm=clip
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_MODELS)
def test_whole_product_group(name: str, shakespeare: TextData) -> None:
    assert divergence(TABLE_MODELS[name], shakespeare) < 1e-7
    assert divergence(TABLE_MODELS[name], shakespeare, adamw) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (config, kind)
        for config in (LLAMA, LAYER, RELU2)
        for kind in KINDS
        if kind in {gauge.kind for gauge in find_gauges(GPT(config, 10))}
    ],
)
def test_each_gauge_alone(config: GPTConfig, kind: str, shakespeare: TextData) -> None:
    assert divergence(config, shakespeare, kinds=[kind], steps=50) < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"vertical": "adam"},
        {"vertical": "balance"},
        {"step_scale": "norm", "lr": 3e-4},
        {"retract": False},
        {"radial_rate": 0.0},
        {"radial_rate": 0.1, "weight_decay": 1.0},
        {"weight_decay": 0.0},
        {"max_grad_norm": 0.3},
        {"max_grad_norm": 0.3, "step_scale": "norm", "vertical": "balance", "retract": False},
        {"blocks": True},
        {"max_grad_norm": 0.3, "additive": True, "retract": False, "vertical": "adam"},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [LLAMA, LAYER, RELU2], ids=["llama", "layer", "relu2"])
def test_every_mode(config: GPTConfig, options: dict, shakespeare: TextData) -> None:
    assert divergence(config, shakespeare, **options) < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("vertical", VERTICAL)
@pytest.mark.parametrize("name", TABLE_MODELS)
def test_the_papers_step_in_blocks(name: str, vertical: str, shakespeare: TextData) -> None:
    """Equivariant under its own group; with decay on all weights, and clipped."""
    options = {"blocks": True, "vertical": vertical, "max_grad_norm": 1.0, **PAPER}
    assert divergence(TABLE_MODELS[name], shakespeare, **options) < 1e-7


@pytest.mark.parametrize("vertical", VERTICAL)
@pytest.mark.parametrize("config", [LLAMA, LAYER], ids=["llama", "layer"])
def test_the_papers_step_with_decay_on_matrices_alone(
    config: GPTConfig, vertical: str, shakespeare: TextData
) -> None:
    """Sides that decay at different rates: gamma does not, its readers do."""

    def make(model: nn.Module, gauges: GaugeSet) -> DDCAdam:
        return DDCAdam(decay_groups(model, 0.5), gauges, lr=3e-3, vertical=vertical, **PAPER)

    assert divergence(config, shakespeare, make, blocks=True, steps=10) < 1e-9


def test_in_blocks_it_is_not_equivariant_under_scales_of_units(shakespeare: TextData) -> None:
    """The tests above can fail."""

    def blocks(model: nn.Module, gauges: GaugeSet) -> DDCAdam:
        return ddcadam(model, in_blocks(gauges), **PAPER)

    assert divergence(LLAMA, shakespeare, blocks, steps=10) > 1e-2


def test_euclidean_clipping_would_break_it(shakespeare: TextData) -> None:
    """The reason for grad_norm: with the Euclidean norm the same clipping leaves the orbit."""
    model = random_model(LLAMA, shakespeare.vocab_size, 0, torch.float64)
    gauges = find_gauges(model)

    class Euclidean(DDCAdam):
        def grad_norm(self) -> torch.Tensor:
            return torch.nn.utils.get_total_norm(
                [p.grad for group in self.param_groups for p in group["params"]]
            )

    options = {"data": shakespeare, "steps": 10, "max_grad_norm": 0.3}
    make = lambda cls: lambda m, g: cls(m.named_parameters(), g, lr=3e-3)  # noqa: E731
    assert orbit_divergence(model, gauges, make(DDCAdam), **options) < 1e-10
    assert orbit_divergence(model, gauges, make(Euclidean), **options) > 1e-4


@pytest.mark.slow
def test_float32(shakespeare: TextData) -> None:
    """Rounding grows along a trajectory, but stays far from what AdamW does."""
    found = divergence(LLAMA, shakespeare, dtype=torch.float32)
    assert found < 1e-3
    assert found < 1e-2 * divergence(LLAMA, shakespeare, adamw, dtype=torch.float32)


def test_state_is_invariant() -> None:
    """On two points of one orbit the state is the same, but that rotations turn the first moment
    along.
    """
    model = make_model(MODELS["layer-bias-swiglu-rope-mqa"])
    kinds = ["logit_shift", "gated_rescale", "norm_scale"]
    states = []
    for each in (model, copy.deepcopy(model)):
        gauges = find_gauges(each)
        if states:
            gauges.only(kinds).transform_(each, torch.Generator().manual_seed(1))
        optimizer = DDCAdam(each.named_parameters(), gauges, lr=1e-2)
        for seed in range(5):
            backward(each, seed)
            optimizer.step()
        states.append(optimizer.state_dict()["state"])
    for index, state in states[0].items():
        for key, value in state.items():
            torch.testing.assert_close(value, states[1][index][key], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_chain_of_relu_layers(bias: bool) -> None:
    """Hidden matrices under two rescales at once: decomposed by one, dressed by the other, level by
    level.
    """
    model = relu_mlp(bias=bias)
    gauges = relu_mlp_gauges(model)
    copies = [model, copy.deepcopy(model)]
    GaugeSet(tuple(gauges)).transform_(copies[1], torch.Generator().manual_seed(0))
    x = torch.randn(32, 6, dtype=torch.float64)
    outputs = []
    for each in copies:
        optimizer = DDCAdam(each.named_parameters(), gauges, lr=1e-2, weight_decay=0.1)
        start = each(x).detach().clone()
        for _ in range(50):
            optimizer.zero_grad()
            (each(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
        outputs.append(each(x))
        assert (outputs[-1] - start).abs().max() > 0.1
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-9)


# ------------------------------------------------------------------- what moves, what does not, and
# how far


def test_nothing_is_frozen_but_the_gauge(config: GPTConfig) -> None:
    """Rank of the map from gradient to first update = parameters - dimension of the orbit.

    With eps far above the gradients Adam is linear, and so is the map; gradients are those that a
    loss invariant under the gauges can have: orthogonal to the orbit.
    """
    model = tiny_model(config)
    gauges = find_gauges(model)
    tangents = orbit_tangents(model, gauges)
    count = tangents.shape[1]
    across = torch.linalg.qr(tangents.mT, mode="complete").Q[:, len(tangents) :]
    updates = first_updates(model, gauges, across.mT, eps=1e6, lr=1.0)
    assert matrix_rank(updates) == count - gauges.dimension(model)


def test_rescales_and_shifts_are_frozen_whatever_the_gradient(config: GPTConfig) -> None:
    """With Adam as it is used, and any gradients, updates span all but the orbits of shifts and
    rescales.
    """
    model = tiny_model(config)
    gauges = find_gauges(model)
    frozen = GaugeSet(tuple(g for g in gauges if not isinstance(g, Rotation)))
    count = sum(p.numel() for p in model.parameters())
    torch.manual_seed(0)
    updates = first_updates(
        model, gauges, torch.randn(count + 20, count, dtype=torch.float64), eps=1e-8, lr=1e-6
    )
    assert matrix_rank(updates) == count - frozen.dimension(model)


def tiny_model(config: GPTConfig) -> GPT:
    """One layer of the same architecture, small enough to take as many first steps as it has
    parameters.
    """
    return make_model(
        dataclasses.replace(
            config,
            layers=1,
            context=4,
            width=8,
            heads=2,
            hidden=4,
            kv_heads=1 if config.kv_heads < config.heads else 2,
        )
    )


def matrix_rank(rows: torch.Tensor) -> int:
    """Number of singular values above the largest gap in the spectrum, which must be a wide one."""
    values = torch.linalg.svdvals(rows / rows.norm(dim=1, keepdim=True))
    values = (
        torch.cat([values, values.new_tensor([1e-16 * values[0]])])
        if values[-1] > 1e-7 * values[0]
        else values
    )
    ratios = values[:-1] / values[1:].clamp(min=1e-18)
    rank = int(ratios.argmax()) + 1
    assert ratios[rank - 1] > 100
    return rank


def first_updates(
    model: GPT, gauges: GaugeSet, grads: torch.Tensor, eps: float, lr: float
) -> torch.Tensor:
    """The change of all weights, divided by the size of the map, that each gradient makes in a
    first step.
    """
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    optimizer = DDCAdam(model.named_parameters(), gauges, lr=lr, eps=eps, weight_decay=0.0)
    fresh = copy.deepcopy(optimizer.state_dict())
    rows = []
    for grad in grads:
        optimizer.load_state_dict(fresh)
        for p, p0, g in zip(params, start, grad.split([p.numel() for p in params]), strict=True):
            p.data.copy_(p0)
            p.grad = g.view_as(p).clone()
        optimizer.step()
        rows.append(
            torch.cat(
                [
                    ((p - p0).detach() * (eps / lr if eps > 1 else 1 / lr)).flatten()
                    for p, p0 in zip(params, start, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def test_blocks_keep_still_along_their_orbits() -> None:
    """Up to rounding, in the recorded drift; and units, which are none of their gauges, do not."""
    model = make_model(MODELS["layer-bias-swiglu-rope-mqa"])
    units = find_gauges(model).only(["gated_rescale"])
    start = {name: p.detach().clone() for name, p in params_of(model).items()}
    optimizer = DDCAdam(model.named_parameters(), in_blocks(units), lr=1e-2)
    for seed in range(10):
        backward(model, seed)
        optimizer.step()
    assert GaugeDrift(start, in_blocks(units)).at(params_of(model))["gated_rescale"] < 1e-13
    assert GaugeDrift(start, units).at(params_of(model))["gated_rescale"] > 1e-3


@pytest.mark.parametrize("vertical", ["freeze", "adam", "balance"])
def test_vertical_modes(vertical: str) -> None:
    model = make_model(MODELS["layer-bias-swiglu-rope-mqa"])
    gauge = find_gauges(model).only(["gated_rescale"])[0]
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.mul_(3)

    def coordinate() -> torch.Tensor:
        plus, minus = gauge.log_norms(params_of(model))
        return plus - minus

    before = coordinate()
    optimizer = DDCAdam(
        model.named_parameters(),
        [gauge],
        lr=1e-2,
        vertical=vertical,
        weight_decay=0.1,
        radial_rate=2.0,
    )
    invariant = sum(gauge.log_norms(params_of(model)))
    for seed in range(20):
        backward(model, seed)
        optimizer.step()
    assert (sum(gauge.log_norms(params_of(model))) - invariant).abs().min() > 1e-3
    if vertical == "balance":  # the gap falls by the factor 1 - 2 lr r / 2 a step, times √2 / √2
        torch.testing.assert_close(
            coordinate(), before * (1 - 1e-2 * 2.0) ** 20, rtol=1e-8, atol=1e-10
        )
    else:
        torch.testing.assert_close(
            coordinate(), before, rtol=0, atol=1e-12 if vertical == "freeze" else 1e-5
        )


def test_retraction_keeps_norms() -> None:
    """Without radial step and decay, norms stay as they are; without retraction they only grow."""
    for retract in (True, False):
        model = make_model(MODELS["rms-relu2-partial-gqa"])
        gauges = find_gauges(model)
        rescales = [g for g in gauges if isinstance(g, Rescale) and g.kind == "relu_rescale"]
        before = [g.log_norms(params_of(model))[1] for g in rescales]
        optimizer = DDCAdam(
            model.named_parameters(),
            gauges,
            lr=1e-2,
            weight_decay=0.0,
            radial_rate=0.0,
            retract=retract,
        )
        for seed in range(10):
            backward(model, seed)
            optimizer.step()
        changes = torch.cat(
            [g.log_norms(params_of(model))[1] - b for g, b in zip(rescales, before, strict=True)]
        )
        assert changes.abs().max() < 1e-12 if retract else changes.min() > 0


def test_the_mean_row_of_the_head_never_moves() -> None:
    model = make_model(MODELS["layer-bias-relu-learned"])
    head = model.head
    before = head.weight.mean(0).clone(), head.bias.mean().clone()
    optimizer = DDCAdam(model.named_parameters(), find_gauges(model), lr=1e-2, weight_decay=0.3)
    for seed in range(10):
        backward(model, seed)
        optimizer.step()
    torch.testing.assert_close(head.weight.mean(0), before[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(head.bias.mean(), before[1], rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------- independent
# implementations


def copy_gradients(source: nn.Module, target: nn.Module) -> None:
    """Give both the same gradients: Adam makes full steps of gradients that are only rounding
    error, and the bias of the keys has no other (softmax does not see it).
    """
    for p, q in zip(source.parameters(), target.parameters(), strict=True):
        q.grad = p.grad.clone()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vertical": "adam"},
        {"vertical": "balance", "radial_rate": 0.3},
        {"step_scale": "norm"},
        {"retract": False, "betas": (0.8, 0.95), "eps": 1e-3},
    ],
    ids=str,
)
def test_agrees_with_the_reference(config: GPTConfig, options: dict) -> None:
    """Batched against unit by unit, on random gradients: where those of a loss are zero, an error
    would not show.
    """
    model = make_model(config)
    gauges = find_gauges(model)
    other = copy.deepcopy(model)
    optimizer = DDCAdam(model.named_parameters(), gauges, lr=1e-2, weight_decay=0.1, **options)
    reference = ReferenceDDCAdam(
        params_of(other), list(gauges), lr=1e-2, weight_decay=0.1, **options
    )
    assert_same_steps(model, optimizer, other, reference, steps=6)


def assert_same_steps(model: nn.Module, optimizer, other: nn.Module, reference, steps: int) -> None:
    """On random gradients, the same for both."""
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p) / 10
        copy_gradients(model, other)
        optimizer.step()
        reference.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("vertical", VERTICAL)
def test_agrees_with_the_papers_step_in_plain_loops(config: GPTConfig, vertical: str) -> None:
    assert_the_papers_step(make_model(dataclasses.replace(config, layers=1)), vertical)


@pytest.mark.parametrize("vertical", VERTICAL)
def test_agrees_with_the_papers_step_on_a_chain(vertical: str) -> None:
    torch.manual_seed(0)
    assert_the_papers_step(DeepMLP(DeepMLPConfig(depth=3, width=8), 7, 7).double(), vertical)


def assert_the_papers_step(model: nn.Module, vertical: str) -> None:
    """With random gradients, and decay on matrices alone."""
    other, gauges = copy.deepcopy(model), in_blocks(find_gauges(model))
    optimizer = DDCAdam(decay_groups(model, 0.3), gauges, lr=1e-2, vertical=vertical, **PAPER)
    decays = {name: 0.3 if p.ndim > 1 else 0.0 for name, p in params_of(other).items()}
    reference = ReferencePaperStep(params_of(other), list(gauges), 1e-2, decays, vertical)
    assert_same_steps(model, optimizer, other, reference, steps=3)


def test_agrees_with_the_reference_on_a_chain() -> None:
    model = relu_mlp()
    gauges = relu_mlp_gauges(model)
    other = copy.deepcopy(model)
    optimizer = DDCAdam(model.named_parameters(), gauges, lr=1e-2)
    reference = ReferenceDDCAdam(params_of(other), gauges, lr=1e-2)
    x = torch.randn(32, 6, dtype=torch.float64)
    for _ in range(10):
        for each in (model, other):
            each.zero_grad()
            (each(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        reference.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_gauges_it_is_adamw(config: GPTConfig, dtype: torch.dtype) -> None:
    model = make_model(config, dtype=dtype)
    other = copy.deepcopy(model)
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, adam = (
        DDCAdam(model.named_parameters(), [], **options),
        torch.optim.AdamW(other.parameters(), **options),
    )
    for seed in range(20):
        backward(model, seed)
        copy_gradients(model, other)
        ours.step()
        adam.step()
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ optimizer
# citizenship


def trained(
    optimizer_options: dict | None = None,
    steps: int = 3,
    dtype=torch.float64,
    seed: int = 0,
    blocks=False,
):
    model = make_model(MODELS["layer-bias-swiglu-rope-mqa"], seed, dtype)
    gauges = in_blocks(find_gauges(model)) if blocks else find_gauges(model)
    optimizer = DDCAdam(model.named_parameters(), gauges, lr=1e-2, **(optimizer_options or {}))
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    return model, optimizer


def assert_same_future(pair, other) -> None:
    for seed in range(10, 13):
        for model, optimizer in (pair, other):
            backward(model, seed)
            optimizer.step()
    for a, b in zip(pair[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_is_complete_from_construction() -> None:
    model, optimizer = trained(steps=0)
    before = {
        key: {k: v.shape for k, v in s.items()}
        for key, s in optimizer.state_dict()["state"].items()
    }
    assert len(before) == len(list(model.parameters()))
    assert all("step" in state for state in before.values())
    backward(model, 0)
    optimizer.step()
    assert before == {
        key: {k: v.shape for k, v in s.items()}
        for key, s in optimizer.state_dict()["state"].items()
    }
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


@pytest.mark.parametrize("vertical", ["freeze", "adam"])
def test_state_dict_round_trip_through_a_file(vertical: str) -> None:
    model, optimizer = trained({"vertical": vertical})
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_optimizer = trained({"vertical": vertical}, steps=1, seed=5)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    assert_same_future((model, optimizer), (other, other_optimizer))


def test_state_dict_into_another_dtype() -> None:
    _, double = trained()
    model, single = trained(dtype=torch.float32, steps=0)
    single.load_state_dict(double.state_dict())
    for param, state in single.state.items():
        assert param.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in state.values())
    backward(model, 0)
    single.step()
    saved = double.state_dict()["state"][0]["exp_avg"]
    assert not torch.equal(saved.float(), single.state[next(model.parameters())]["exp_avg"])
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("make_optimizer", [ddcadam, ddcmuon])
def test_state_follows_parameters_to_another_device(make_optimizer) -> None:
    """As when Trainer moves a model to a GPU, but without one: the same parameters, moved here from
    the meta device.
    """

    def make(device: str) -> tuple[GPT, torch.optim.Optimizer]:
        model = make_model(MODELS["layer-bias-relu-learned"]).to(device)
        optimizer = make_optimizer(model, find_gauges(model))
        model.late = nn.Linear(3, 3, dtype=torch.float64, device=device)
        optimizer.add_param_group({"params": [*model.late.named_parameters("late")]})
        return model, optimizer

    trained_model, trained_optimizer = make("cpu")
    for seed in range(3):
        backward(trained_model, seed)
        trained_model.late(torch.ones(3, dtype=torch.float64)).sum().backward()
        trained_optimizer.step()
    model, optimizer = make("meta")
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    model.load_state_dict(trained_model.state_dict())
    optimizer.load_state_dict(trained_optimizer.state_dict())
    for parameter, its in zip(trained_model.parameters(), model.parameters(), strict=True):
        for key, value in trained_optimizer.state[parameter].items():
            assert torch.equal(optimizer.state[its][key], value), key
    assert_same_future((trained_model, trained_optimizer), (model, optimizer))


def test_state_of_another_optimizer_is_refused() -> None:
    model, optimizer = trained()
    plain = DDCAdam(model.named_parameters(), [])
    with pytest.raises(ValueError, match=r"saved with other gauges"):
        optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("options", [{}, PAPER], ids=["ours", "paper"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_copies_and_pickles(duplicate, options: dict) -> None:
    pair = trained(options, blocks=bool(options))
    assert_same_future(pair, duplicate(pair))


def test_a_state_that_was_saved_before_a_hyperparameter_came() -> None:
    (model, optimizer), (other, restored) = trained(), trained(steps=0)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["additive"]
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(saved)
    assert_same_future((model, optimizer), (other, restored))


@pytest.mark.parametrize("blocks", [False, True])
def test_state_is_no_larger_than_adamws(config: GPTConfig, blocks: bool) -> None:
    def size(optimizer: torch.optim.Optimizer) -> int:
        return sum(v.numel() for s in optimizer.state.values() for v in s.values())

    model = make_model(config)
    gauges = in_blocks(find_gauges(model)) if blocks else find_gauges(model)
    ours, plain = ddcadam(model, gauges, vertical="adam"), adamw(model, GaugeSet())
    backward(model, 0)
    plain.step()
    assert size(ours) < size(plain)


def test_low_precision_weights_have_float32_state() -> None:
    model = make_model(MODELS["rms-swiglu-rope-gqa"]).bfloat16()
    double = copy.deepcopy(model).double()
    gauges = find_gauges(model)
    optimizer = DDCAdam(model.named_parameters(), gauges, lr=3e-2)
    exact = DDCAdam(double.named_parameters(), gauges, lr=3e-2)
    assert all(v.dtype == torch.float32 for s in optimizer.state.values() for v in s.values())
    backward(double, 0)
    for p, q in zip(model.parameters(), double.parameters(), strict=True):
        p.grad = q.grad.bfloat16()
        q.grad = p.grad.double()
    optimizer.step()
    exact.step()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for p, q in zip(model.parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=2**-7, atol=1e-3)  # bfloat16 has 8 bits
    restored = DDCAdam(model.named_parameters(), gauges, lr=3e-2)
    restored.load_state_dict(optimizer.state_dict())
    for a, b in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) and b[key].dtype == torch.float32 for key in a)


@pytest.mark.parametrize(
    "options", [{}, {"additive": True, "retract": False, "weight_decay": 1e-3}], ids=str
)
def test_low_precision_follows_the_rounded_norms(options: dict) -> None:
    """Steps too small for bfloat16 move nothing, and so they must not move what is dressed either,
    however many.
    """
    model = relu_mlp().bfloat16()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = DDCAdam(
        model.named_parameters(),
        relu_mlp_gauges(model),
        **{"lr": 1e-5, "weight_decay": 0.0, **options},
    )
    torch.manual_seed(0)
    for _ in range(200):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, b, rtol=2**-7, atol=1e-3)


def test_gradients_are_not_written_to() -> None:
    model, optimizer = trained(steps=0)
    backward(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.grad_norm()
    optimizer.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


def test_grad_norm_is_invariant_and_about_euclidean_at_the_initialisation() -> None:
    model = make_model(MODELS["layer-bias-swiglu-rope-mqa"])
    gauges = find_gauges(model)
    backward(model, 0)
    norm = DDCAdam(model.named_parameters(), gauges).grad_norm()
    gauges.transform_(model, torch.Generator().manual_seed(0))
    backward(model, 0)
    torch.testing.assert_close(
        DDCAdam(model.named_parameters(), gauges).grad_norm(), norm, rtol=1e-10, atol=0
    )

    torch.manual_seed(0)
    wide = GPT(
        GPTConfig(context=16, layers=1, width=256, heads=4, kv_heads=4, hidden=512), VOCABULARY
    )
    backward(wide, 0)
    ours = DDCAdam(wide.named_parameters(), find_gauges(wide)).grad_norm()
    euclidean = torch.nn.utils.get_total_norm([p.grad for p in wide.parameters()])
    torch.testing.assert_close(ours, euclidean, rtol=0.2, atol=0)


def test_param_groups_and_schedulers() -> None:
    """Groups may differ in decay under one gauge, and in anything elsewhere; schedulers drive
    them.
    """
    model = make_model(MODELS["layer-bias-swiglu-rope-mqa"])
    gauges = find_gauges(model)
    named = list(model.named_parameters())
    groups = [
        {
            "params": [(n, p) for n, p in named if n == "embedding.weight"],
            "lr": 1e-4,
            "betas": (0.8, 0.9),
        },
        {
            "params": [(n, p) for n, p in named if p.ndim == 2 and n != "embedding.weight"],
            "weight_decay": 0.2,
        },
        {"params": [(n, p) for n, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = DDCAdam(groups, gauges, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    backward(model, 0)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 5e-3, 5e-3]
    frozen = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward(model, 1)
    optimizer.step()
    for p, before in zip(model.parameters(), frozen, strict=True):
        torch.testing.assert_close(p, before, rtol=1e-14, atol=1e-15)
    optimizer.param_groups[1]["lr"] = 1e-3
    with pytest.raises(ValueError, match=r"param groups disagree in lr .* under one gauge"):
        optimizer.step()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("options", [{}, PAPER], ids=["ours", "paper"])
def test_weight_decay_of_groups_under_one_gauge(options: dict, blocks: bool) -> None:
    """Each parameter decays at its own rate, and no other moves for it."""
    model = make_model(MODELS["layer-bias-swiglu-rope-mqa"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim == d], "weight_decay": w}
        for d, w in ((2, 0.5), (1, 0.0))
    ]
    gauges = in_blocks(find_gauges(model)) if blocks else find_gauges(model)
    optimizer = DDCAdam(groups, gauges, lr=0.1, **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = before[name] * (0.95 if p.ndim == 2 else 1.0)
        if name == "head.weight":
            expected += 0.05 * before[name].mean(0)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=1e-14, msg=name)


def test_a_group_added_later() -> None:
    _model, optimizer = trained()
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.1, "weight_decay": 0.0})
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full_like(extra, 0.9))


def test_tensor_learning_rate_closure_and_accumulation() -> None:
    pair = trained(steps=0)
    other = trained(steps=0)
    for group in other[1].param_groups:
        group["lr"] = torch.tensor(1e-2, dtype=torch.float64)

    def closure() -> torch.Tensor:
        backward(other[0], 0)
        return torch.tensor(1.5)

    backward(pair[0], 0)
    pair[1].step()
    assert other[1].step(closure) == 1.5
    for a, b in zip(pair[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@pytest.mark.slow
def test_compiled_step_equals_eager() -> None:
    model, optimizer = trained({"weight_decay": 0.1}, dtype=torch.float32, steps=0)
    other, other_optimizer = trained({"weight_decay": 0.1}, dtype=torch.float32, steps=0)
    for o in (optimizer, other_optimizer):
        for group in o.param_groups:
            group["lr"] = torch.tensor(1e-2)
    compiled = torch.compile(lambda: other_optimizer.step(), backend="aot_eager")
    for seed in range(3):
        backward(model, seed)
        backward(other, seed)
        optimizer.step()
        compiled()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, PAPER], ids=["ours", "paper"])
def test_compiled_arithmetic_is_the_same_step(options: dict) -> None:
    """Compiled once for every rate, all of it or stack by stack; layers without gradients, copies
    and pickles go on.
    """
    both = [
        trained(
            {"weight_decay": 0.1, "compiled": c, **options},
            dtype=torch.float64,
            steps=0,
            blocks=bool(options),
        )
        for c in (False, True)
    ]

    def step(seed: int) -> None:
        for model, optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + seed)
            backward(model, seed)
            if seed == 2:
                for name, p in model.named_parameters():
                    p.grad = None if name.startswith("blocks.0") else p.grad
            optimizer.step()

    step(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(1)
    assert both[1][1]._advance.compiled
    step(2)  # one layer has no gradients: the stacks of the others are compiled, each for itself
    with torch.compiler.set_stance("fail_on_recompile"):
        step(3)
        step(2)
    norms = [optimizer.grad_norm() for _, optimizer in both]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    both[1] = copy.deepcopy(both[1])
    step(4)
    assert both[1][1]._advance.compiled
    norms = [optimizer.grad_norm() for _, optimizer in both]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    for a, b in zip(*(model.parameters() for model, _ in both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_prefixes_of_wrappers_are_seen_through() -> None:
    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    gauges = find_gauges(model)
    compiled = torch.compile(model)
    assert next(iter(compiled.named_parameters()))[0].startswith("_orig_mod.")
    assert len(find_gauges(compiled)) == len(gauges)
    DDCAdam(compiled.named_parameters(), gauges)
    DDCAdam([("module." + n, p) for n, p in model.named_parameters()], gauges)


# -------------------------------------------------------------------------------------------- bad
# input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid lr=-1.0"),
        ({"lr": math.nan}, "Invalid lr=nan"),
        ({"betas": (0.9, 1.0)}, r"Invalid betas=\(0.9, 1.0\)"),
        ({"eps": -1e-8}, "Invalid eps"),
        ({"weight_decay": -0.1}, "Invalid weight_decay"),
        ({"radial_rate": -1.0}, "Invalid radial_rate"),
        (
            {"vertical": "frozen"},
            "Invalid vertical='frozen': expected one of freeze, adam, balance",
        ),
        ({"step_scale": "rms"}, "Invalid step_scale='rms': expected one of init, norm"),
        ({"additive": True}, "Invalid retract=True with additive=True: .* set retract=False"),
    ],
)
def test_bad_hyperparameters(options: dict, message: str) -> None:
    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    with pytest.raises(ValueError, match=message):
        DDCAdam(model.named_parameters(), find_gauges(model), **options)


def rescale(plus: str, minus: str, plus_axis: int = 0, minus_axis: int = 1) -> Rescale:
    return Rescale(
        "relu_rescale", f"{plus}|{minus}", (Axis(plus, plus_axis),), (Axis(minus, minus_axis),)
    )


@pytest.mark.parametrize(
    ("gauges", "message"),
    [
        ([rescale("0.weight", "no.such")], "'no.such' is not among the optimizer's"),
        (
            [rescale("0.weight", "2.weight"), rescale("0.weight", "4.weight")],
            "'0.weight' is on the plus side of both",
        ),
        (
            [rescale("0.weight", "2.weight"), rescale("4.weight", "2.weight")],
            "'2.weight' is on the minus side of both",
        ),
        (
            [rescale("0.weight", "2.weight", minus_axis=0), rescale("2.weight", "4.weight")],
            "rescale the same axis",
        ),
        (
            [rescale("0.weight", "2.weight"), rescale("2.weight", "0.weight")],
            "dress each other in a circle",
        ),
        ([Shift("0.weight"), Shift("0.weight")], "two shifts act on it"),
        ([Shift("0.weight"), rescale("0.weight", "2.weight")], "rescale of the columns only"),
        (
            [
                rescale("0.weight", "2.weight"),
                Rotation(
                    "value_rotation",
                    "x",
                    (RotatedAxis("0.weight", 0, np.arange(6).reshape(3, 1, 2)),),
                    True,
                ),
            ],
            "do not commute",
        ),
        (
            [
                Rotation(
                    "value_rotation",
                    "x",
                    (RotatedAxis("0.weight", 0, np.array([[[0, 1]], [[1, 2]]])),),
                    True,
                )
            ],
            "turn the same index",
        ),
    ],
)
def test_gauges_that_do_not_fit(gauges: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDCAdam(relu_mlp(bias=False).named_parameters(), gauges)


def test_gauges_need_names_and_trainable_parameters() -> None:
    model = relu_mlp()
    gauges = relu_mlp_gauges(model)
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        DDCAdam(model.parameters(), gauges)
    with pytest.raises(TypeError, match="got str"):
        DDCAdam(model.named_parameters(), ["relu"])
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'2.weight' is frozen"):
        DDCAdam(model.named_parameters(), gauges)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = DDCAdam(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.slow
def test_switches_that_change_at_every_step_end_compiling_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers may change (tests/test_parameters.py). Compiled without the compiler's last stage, to
    save time.
    """
    monkeypatch.setattr("ddc.optim.compiled.CPU_OPTIONS", {})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    models = [relu_mlp(depth=2, width=3) for _ in range(2)]
    optimizers = [
        DDCAdam(m.named_parameters(), relu_mlp_gauges(m), compiled=m is models[1]) for m in models
    ]
    with torch._dynamo.config.patch(recompile_limit=2):
        for step in range(5):
            for m, optimizer in zip(models, optimizers, strict=True):
                optimizer.param_groups[0]["vertical"] = ("freeze", "balance")[step % 2]
                optimizer.param_groups[0]["step_scale"] = ("init", "norm")[step // 2 % 2]
                for p in m.parameters():
                    p.grad = torch.sin(p.detach() * (step + 1))
                optimizer.step()
    assert "compiled anew too often" in caplog.text
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_weights_of_low_precision_are_not_compiled() -> None:
    """A compiler may leave out the rounding, which what a side dresses must follow."""
    model = nn.Linear(3, 2).bfloat16()
    optimizer = DDCAdam(model.named_parameters(), compiled=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not optimizer._advance.compiled
    assert not any(stack.move.compiled for stack in optimizer._stacks)


def test_a_group_without_parameters() -> None:
    DDCAdam([{"params": []}]).step()
