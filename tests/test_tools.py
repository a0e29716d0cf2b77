"""What is put around models and optimizers: wrappers, averages, schedules, copies, other dtypes,
frozen parts, adapters, parametrisations. The examples have tests of their own.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from ddc import (
    DDCSGD,
    DDCAdam,
    DDCLion,
    DDCMuon,
    InvariantClipping,
    clip_grad_norm_,
    find_gauges,
    hidden_matrices,
)
from ddc.gauges import GaugeSet, Shift, align_, balance_, named_parameters
from tests.conftest import MODELS
from tests.helpers import backward, batch, make_model, relu_mlp, relu_mlp_gauges
from tests.zoo import logits, make

LLAMA, LAYER = "rms-swiglu-rope-gqa", "layer-bias-relu-learned"


def ddcadam(model: nn.Module, gauges: GaugeSet, **options: Any) -> Optimizer:
    return DDCAdam(model.named_parameters(), gauges, **{"lr": 1e-2, **options})


def ddcmuon(model: nn.Module, gauges: GaugeSet, **options: Any) -> Optimizer:
    options = {"adam_lr": 1e-2, "orthogonalizer": "polar", **options}
    return DDCMuon(model.named_parameters(), gauges, hidden_matrices(model), **options)


MAKERS: dict[str, Callable[..., Optimizer]] = {"DDCAdam": ddcadam, "DDCMuon": ddcmuon}
both = pytest.mark.parametrize("make_optimizer", MAKERS.values(), ids=MAKERS)


@torch.no_grad()
def function(model: nn.Module, like: nn.Module | None = None) -> Tensor:
    config = (like or model).config
    return model(batch(config, 99)[:, :-1]).log_softmax(-1)


def on_one_orbit(name: str) -> tuple[list[nn.Module], GaugeSet]:
    models = [make_model(MODELS[name]) for _ in range(2)]
    gauges = find_gauges(models[0])
    gauges.transform_(models[1], torch.Generator().manual_seed(1))
    return models, gauges


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# ---- partly frozen models


@both
def test_what_is_frozen_takes_its_gauges_with_it(make_optimizer) -> None:
    """The rest is trained equivariantly under what is left."""
    models, _ = on_one_orbit(LAYER)
    for model in models:
        model.load_state_dict(models[0].state_dict())
        for name in ("blocks.0.mlp.down.weight", "blocks.1.attention.query.weight", "head.bias"):
            model.get_parameter(name).requires_grad_(False)
    gauges = find_gauges(models[0])
    with pytest.raises(ValueError, match=r"is frozen. .*gauges.among\(model.named_parameters\(\)"):
        make_optimizer(models[0], gauges)
    left = gauges.among(models[0].named_parameters())
    lost = {str(gauge) for gauge in gauges} - {str(gauge) for gauge in left}
    assert lost == {
        "relu_rescale at blocks.0.mlp",
        "norm_scale at blocks.1.attention_norm",
        "qk_rotation at blocks.1.attention",
    }
    assert "refused: 'blocks.0.mlp.down.weight' is frozen" in str(left)
    assert [gauge.parameters for gauge in left if isinstance(gauge, Shift)] == [("head.weight",)]
    left.transform_(models[1], torch.Generator().manual_seed(1))
    before = function(models[0])
    for model in models:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        hidden = [m for m in hidden_matrices(model) if m.parameter in dict(trained)]
        optimizer = (
            DDCAdam(trained, left, lr=1e-2)
            if make_optimizer is ddcadam
            else DDCMuon(trained, left, hidden, adam_lr=1e-2, orthogonalizer="polar")
        )
        for seed in range(10):
            backward(model, seed)
            optimizer.step()
    assert distance(function(models[0]), function(models[1])) < 1e-9
    assert distance(function(models[0]), before) > 1e-2


def test_among_goes_by_what_is_given() -> None:
    """Parts of a model, under the names of a wrapper too; what was not checked stays marked."""
    model = make_model(MODELS[LAYER])
    gauges = find_gauges(model)
    marked = GaugeSet(gauges.found, (), dict.fromkeys(gauges.found, "no reason"))
    everything = [("module." + name, p) for name, p in model.named_parameters()]
    assert marked.among(everything) == marked
    block = [(name, p) for name, p in model.named_parameters() if name.startswith("blocks.0")]
    few = marked.among(block)
    assert {gauge.where.split(".")[1] for gauge in few} == {"0"}
    assert set(few.unchecked) == set(few.found)
    assert "'norm.weight' is not among the parameters" in str(few)


@pytest.mark.slow
@both
def test_adapters_of_peft(make_optimizer) -> None:
    """B starts at zero, and wakes; nothing else moves but the adapters."""
    from peft import LoraConfig, get_peft_model  # after what tests.zoo provides

    model, inputs = make("Llama")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).double()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gauges = find_gauges(model, inputs=inputs, verify=False).among(trained)
    if make_optimizer is ddcadam:
        optimizer: DDCAdam | DDCMuon = DDCAdam(trained, gauges, lr=1e-2)
    else:
        found = hidden_matrices(model, inputs=inputs)
        hidden = [matrix for matrix in found if matrix.parameter in dict(trained)]
        optimizer = DDCMuon(trained, gauges, hidden)
        assert len(hidden) == len(trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = logits(model, inputs)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(out, inputs["input_ids"][:, 1:].flatten())
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@both
def test_a_layer_is_frozen_for_some_steps_and_goes_on(make_optimizer) -> None:
    """All that a gauge ties together, frozen and unfrozen: weights and state wait, then move."""
    model = make_model(MODELS[LLAMA])
    optimizer = make_optimizer(model, find_gauges(model))
    block = model.blocks[0]
    for frozen, seeds in ((False, (0, 1)), (True, (2, 3)), (False, (4,))):
        block.requires_grad_(not frozen)
        before = [p.detach().clone() for p in block.parameters()]
        for seed in seeds:
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.step()
        for p, then in zip(block.parameters(), before, strict=True):
            assert p.isfinite().all()
            if p.ndim == 2:
                assert torch.equal(p, then) == frozen


# ---- wrappers


@pytest.mark.slow
@both
def test_a_compiled_model_is_trained_as_the_model_itself(make_optimizer) -> None:
    models = [make_model(MODELS[LLAMA]) for _ in range(2)]
    compiled = torch.compile(models[1], backend="aot_eager")
    optimizers = [make_optimizer(each, find_gauges(each)) for each in (models[0], compiled)]
    for seed in range(3):
        for model, runs, optimizer in zip(models, (models[0], compiled), optimizers, strict=True):
            tokens = batch(model.config, seed)
            optimizer.zero_grad()
            F.cross_entropy(runs(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert distance(p, q) < 1e-10


# ---- averages and schedules


@pytest.mark.slow
@both
def test_averages_along_a_run_respect_the_gauge(make_optimizer) -> None:
    """A gauge acts linearly, and from both starts by one element all along: so averages of weights
    are on one orbit, too. Those of AdamW are not.
    """
    for kind, bound in ((make_optimizer, 1e-8), (AdamW, None)):
        models, gauges = on_one_orbit(LLAMA)
        averages = []
        for model in models:
            optimizer = AdamW(model.parameters(), 1e-2) if kind is AdamW else kind(model, gauges)
            ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
            swa = AveragedModel(model)
            schedule = SWALR(optimizer, swa_lr=5e-3, anneal_epochs=5)
            for seed in range(10):
                backward(model, seed)
                optimizer.step()
                schedule.step()
                ema.update_parameters(model)
                swa.update_parameters(model)
            averages.append([function(each, model) for each in (ema, swa)])
        for a, b in zip(*averages, strict=True):
            assert distance(a, b) < bound if bound else distance(a, b) > 1e-4


def test_an_average_over_an_orbit_needs_one_place_on_it() -> None:
    """Two points of an orbit are one function, and their mean is another one; moved to the balanced
    point, and turned alike, they have a mean that is that function again.
    """
    models, gauges = on_one_orbit(LLAMA)
    before = function(models[0])
    mean = AveragedModel(models[0])
    for model in models:
        mean.update_parameters(model)
    assert distance(function(mean, models[0]), before) > 1e-2
    params = [named_parameters(model) for model in models]
    with torch.no_grad():
        for each in params:
            balance_(each, gauges)
        align_(params[1], params[0], gauges)
    mean = AveragedModel(models[0])
    for model in models:
        mean.update_parameters(model)
    assert distance(function(mean, models[0]), before) < 1e-9


@pytest.mark.parametrize("kind", ["DDCAdam", "DDCMuon", "DDCLion", "DDCSGD"])
def test_one_cycle_with_its_momentum(kind: str) -> None:
    """It cycles the first of betas, or the momentum where there are none, and the step stays
    equivariant. The momentum of hidden matrices, beside betas, it leaves.
    """
    models, gauges = on_one_orbit(LLAMA)
    key = "momentum" if kind == "DDCSGD" else "betas"
    seen = []
    for model in models:
        named = model.named_parameters()
        optimizer = {
            "DDCAdam": lambda n=named: DDCAdam(n, gauges),
            "DDCMuon": lambda m=model: ddcmuon(m, gauges),
            "DDCLion": lambda n=named: DDCLion(n, gauges),
            "DDCSGD": lambda n=named: DDCSGD(n, gauges, momentum=0.9),
        }[kind]()
        rates = [10 * group["lr"] for group in optimizer.param_groups]
        schedule = OneCycleLR(optimizer, rates, total_steps=12)
        for seed in range(10):
            value = optimizer.param_groups[0][key]
            seen.append(value if key == "momentum" else value[0])
            backward(model, seed)
            optimizer.step()
            schedule.step()
        if kind == "DDCMuon":
            momenta = [g["momentum"] for g in optimizer.param_groups if "momentum" in g]
            assert momenta
            assert {*momenta} == {0.95}
    assert min(seen) < 0.87 < 0.93 < max(seen)
    assert distance(function(models[0]), function(models[1])) < 1e-8


# ---- copies and dtypes


def test_gauges_are_copied_and_pickled() -> None:
    model = make_model(MODELS[LAYER])
    gauges = find_gauges(model)
    gauges = GaugeSet(gauges.found, gauges.refused, {gauges.found[0]: "no reason"})
    for other in (copy.deepcopy(gauges), pickle.loads(pickle.dumps(gauges))):
        assert str(other) == str(gauges)
        assert set(other.unchecked) == {other.found[0]}
        copies = [copy.deepcopy(model), copy.deepcopy(model)]
        for each, its in zip(copies, (gauges, other), strict=True):
            its.transform_(each, torch.Generator().manual_seed(1))
            backward(each, 0)
            ddcadam(each, its).step()
        for p, q in zip(*(each.parameters() for each in copies), strict=True):
            assert torch.equal(p, q)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_changes_its_dtype_takes_the_optimizer_along(make_optimizer, dtype) -> None:
    """As if the optimizer had been made for the new dtype, and had loaded the state."""
    options = {} if make_optimizer is ddcadam else {"orthogonalizer": "newton_schulz"}
    model = make_model(MODELS[LLAMA], dtype=torch.float32)
    gauges = find_gauges(model)
    optimizer = make_optimizer(model, gauges, **options)
    backward(model, 0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    model.to(dtype)
    other = copy.deepcopy(model)
    anew = make_optimizer(other, gauges, **options)
    anew.load_state_dict(state)
    for each, its in ((model, optimizer), (other, anew)):
        for seed in (1, 2):
            backward(each, seed)
            its.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert value.dtype == anew.state[q][key].dtype
            assert torch.equal(value, anew.state[q][key]), key


# ---- parametrisations


@pytest.mark.parametrize("parametrise", [weight_norm, spectral_norm])
def test_a_parametrised_matrix_has_no_gauge_and_adams_step(parametrise) -> None:
    """Its weight is computed from others, which no gauge of ours acts on; what is computed after it
    keeps its own.
    """
    torch.manual_seed(0)
    model = relu_mlp(depth=4)
    parametrise(model[2])
    x = torch.randn(16, 6, dtype=torch.float64)
    gauges = find_gauges(model, inputs=(x,))
    assert [gauge.where for gauge in gauges if gauge.kind == "relu_rescale"] == ["4"]
    assert all(matrix.parameter[0] != "2" for matrix in hidden_matrices(model, inputs=(x,)))
    plain = copy.deepcopy(model)
    optimizers = DDCAdam(model.named_parameters(), gauges), AdamW(plain.parameters())
    for _ in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    moved = dict(plain.named_parameters())
    first = next(name for name, _ in model.named_parameters() if "parametrizations" in name)
    assert distance(model.get_parameter(first), moved[first]) < 2e-3
    assert all(p.isfinite().all() for p in model.parameters())


# ---- clipping


def test_clipping_goes_by_the_optimizers_own_norm() -> None:
    model = relu_mlp()
    optimizer = DDCAdam(model.named_parameters(), relu_mlp_gauges(model))
    model(torch.ones(2, 6, dtype=torch.float64)).square().sum().backward()
    before = optimizer.grad_norm()
    grads = [p.grad.clone() for p in model.parameters()]
    assert clip_grad_norm_(optimizer, 10 * float(before)) == before
    assert clip_grad_norm_(optimizer, float(before) / 2) == before
    torch.testing.assert_close(optimizer.grad_norm(), before / 2, rtol=1e-5, atol=0)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad / 2, rtol=1e-5, atol=0)
    with pytest.raises(TypeError, match="no gauge-invariant norm"):
        clip_grad_norm_(AdamW(model.parameters()), 1.0)
    with pytest.raises(ValueError, match="Invalid gradient_clip_algorithm='value'"):
        InvariantClipping().configure_gradient_clipping(optimizer, 1.0, "value")
