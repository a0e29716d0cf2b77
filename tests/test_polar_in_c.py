"""A rescale's step by its kernel in C, where test_fused.py has no such model: against torch."""

from __future__ import annotations

import copy
import ctypes
import pickle
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import Axis, Gauge, Rescale
from ddc.models import GPT, DeepMLP, DeepMLPConfig, GPTConfig
from ddc.optim import native, polar_in_c
from ddc.optim.polar import PolarStack
from ddc.optim.polar_in_c import CMatrix, CPolar, CSide
from tests.test_fused import assert_same, fill, gpt, same_steps

LARGE = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9)}
VARIANTS: dict[str, dict[str, Any]] = {
    "freeze": {},
    "adam": {"vertical": "adam", "step_scale": "norm"},
    "balance": {"vertical": "balance", "retract": False},
    "still": {"radial_rate": 0.0},
}


class Bag(nn.Module):
    """Parameters by name."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(1234)  # of no step: what is a multiple of its gradient has no direction
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 3))


def stacks_in_c(optimizer: Any) -> int:
    """How many rescales the kernel has stepped."""
    found = [stack for stack in optimizer._stacks if isinstance(stack, PolarStack)]
    in_c = [stack.in_c for stack in found]
    assert all(in_c), "the kernel left a rescale to torch"
    return len(in_c)


def compare(
    model: nn.Module,
    gauges: Sequence[Gauge],
    tolerance: float = 1e-5,
    steps: int = 4,
    **options: Any,
) -> None:
    """That steps by the kernel are those in torch, of everything that is a rescale."""
    a, b = same_steps(
        model,
        lambda m, f: DDCAdam(m.named_parameters(), gauges, **LARGE, fused=f, **options),
        steps,
    )
    assert_same(a, b, tolerance)
    assert stacks_in_c(a)


RESCALES = {
    "units of a layer": (
        Bag(up=(5, 7), bias=(5,), down=(3, 5)),
        Rescale("relu_rescale", "mlp", (Axis("up", 0), Axis("bias", 0)), (Axis("down", 1),)),
    ),
    "degree 2": (
        Bag(up=(5, 7), down=(3, 5)),
        Rescale("relu_rescale", "mlp", (Axis("up", 0),), (Axis("down", 1),), degree=2),
    ),
    "one input": (
        Bag(up=(5, 1), down=(3, 5)),
        Rescale("relu_rescale", "mlp", (Axis("up", 0),), (Axis("down", 1),)),
    ),
    "one output": (
        Bag(up=(5, 7), down=(1, 5)),
        Rescale("relu_rescale", "mlp", (Axis("up", 0),), (Axis("down", 1),)),
    ),
    "a convolution": (
        Bag(up=(5, 2, 3, 3), bias=(5,), down=(3, 5)),
        Rescale("relu_rescale", "mlp", (Axis("up", 0), Axis("bias", 0)), (Axis("down", 1),)),
    ),
    "1 + gamma": (
        Bag(gamma=(6,), reader=(4, 6), other=(9, 6)),
        Rescale(
            "norm_scale",
            "norm",
            (Axis("gamma", 0, offset=1),),
            (Axis("reader", 1), Axis("other", 1)),
        ),
    ),
    "gamma and beta": (
        Bag(gamma=(6,), beta=(6,), reader=(4, 6)),
        Rescale("norm_scale", "norm", (Axis("gamma", 0), Axis("beta", 0)), (Axis("reader", 1),)),
    ),
    "more rows and columns than are summed at once": (
        Bag(up=(70, 1100), down=(150, 70)),
        Rescale("relu_rescale", "mlp", (Axis("up", 0),), (Axis("down", 1),)),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RESCALES)
def test_rescales_of_every_form(name: str, variant: str) -> None:
    model, gauge = RESCALES[name]
    compare(copy.deepcopy(model), [gauge], **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "zero", [("up",), ("down",), ("up", "down"), ("up", "bias"), ("one of up",), ("one of both",)]
)
def test_what_is_zero_wakes_alike(zero: tuple[str, ...], variant: str) -> None:
    model, gauge = copy.deepcopy(RESCALES["units of a layer"])
    with torch.no_grad():
        for name in zero:
            if name.startswith("one of"):
                model.up[2], model.bias[2] = 0, 0
                if name == "one of both":
                    model.down[:, 2] = 0
            else:
                model.get_parameter(name).zero_()
    compare(model, [gauge], steps=8, tolerance=1e-4, **VARIANTS[variant])


@pytest.mark.parametrize("alike", ["head", "a column", "gamma"])
def test_dead_units_of_a_language_model(alike: str) -> None:
    model = gpt("rms-swiglu-rope-gqa")
    gauges = find_gauges(model)
    with torch.no_grad():
        match alike:
            case "head":  # rows that are all alike are zero, centred
                model.head.weight.copy_(model.head.weight[:1].expand_as(model.head.weight))
            case "a column":
                model.head.weight[:, 3] = 0.7
            case "gamma":  # what it dresses stays
                model.blocks[0].mlp_norm.weight[2] = 0
    compare(model, gauges)


@pytest.mark.parametrize("name", ["rms-swiglu-rope-gqa", "layer-relu-bias", "tied-qk-norm"])
def test_layers_and_parameters_without_gradients(name: str) -> None:
    model = gpt(name)
    gauges, models = find_gauges(model), [model, copy.deepcopy(model)]
    optimizers = [
        DDCAdam(each.named_parameters(), gauges, lr=0.05, fused=by_kernels)
        for each, by_kernels in zip(models, (True, False), strict=True)
    ]
    for each, optimizer in zip(models, optimizers, strict=True):
        for step, without in enumerate(("blocks.0.mlp", "norm.weight", "attention.value", "no")):
            fill(each, step)
            for key, p in each.named_parameters():
                if without in key:
                    p.grad = None
            optimizer.step()
        optimizer.norms = []
    assert_same(*optimizers, 1e-5)


BAD_AT = (
    *(f"blocks.0.mlp{each}" for each in (".up.weight", "_norm.weight", "_norm.bias")),
    "head.weight",
)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BAD_AT)
@pytest.mark.parametrize("make", [DDCAdam, DDCMuon])
def test_a_gradient_that_is_no_number_shows_alike(make: type[Any], name: str, bad: float) -> None:
    """DDCMuon has rescales of one side."""
    found: list[list[Tensor]] = []
    for by_kernels in (True, False):
        model = gpt("layer-relu-bias")
        hidden = (hidden_matrices(model),) if make is DDCMuon else ()
        options = {"lr": 0.05, "fused": by_kernels}
        optimizer = make(model.named_parameters(), find_gauges(model), *hidden, **options)
        fill(model, 0)
        model.get_parameter(name).grad.view(-1)[3] = bad
        assert not optimizer.grad_norm().isfinite()
        optimizer.step()
        found.append([p.detach().isfinite() for p in model.parameters()])
    assert all(map(torch.equal, *found))
    assert not all(each.all() for each in found[0])


@pytest.mark.parametrize("degree", [0.5, 1.0, 3.0])
def test_norms_of_any_degree_dress(degree: float) -> None:
    """A matrix between two rescales is dressed by the norms of one of them."""
    model = Bag(first=(5, 7), second=(6, 5), third=(4, 6))
    gauges = [
        Rescale("relu_rescale", "a", (Axis("first", 0),), (Axis("second", 1),), degree=degree),
        Rescale("relu_rescale", "b", (Axis("second", 0),), (Axis("third", 1),), degree=degree),
    ]
    compare(model, gauges)


def test_decay_of_its_own_for_each_side() -> None:
    model, gauge = copy.deepcopy(RESCALES["units of a layer"])
    models, optimizers = [model, copy.deepcopy(model)], []
    for each, by_kernels in zip(models, (True, False), strict=True):
        named = [*each.named_parameters()]
        groups = [{"params": [named[i]], "weight_decay": 0.2 * i} for i in range(3)]
        optimizers.append(DDCAdam(groups, [gauge], lr=0.05, fused=by_kernels))
        for step in range(3):
            fill(each, step)
            optimizers[-1].step()
        optimizers[-1].norms = []
    assert_same(*optimizers, 1e-5)
    assert stacks_in_c(optimizers[0])


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_nothing(default: torch.dtype) -> None:
    found = []
    for dtype, device in ((torch.float32, "cpu"), (default, "meta")):
        model, gauge = copy.deepcopy(RESCALES["units of a layer"])
        fill(model, 0)
        torch.set_default_dtype(dtype)
        try:
            optimizer = DDCAdam(model.named_parameters(), [gauge], lr=0.05)
            with torch.device(device):
                optimizer.step()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_an_interrupted_step_waits_for_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """They write to memory that whoever catches the interrupt would free."""
    monkeypatch.setattr(native, "WORTH_A_THREAD", 1)
    ended = []

    def kernel(begin: int, end: int) -> None:
        if begin == 0:
            raise KeyboardInterrupt
        time.sleep(0.2)
        ended.append(begin)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            native.run_programs(kernel, 2, 2)
    finally:
        torch.set_num_threads(threads)
    assert ended == [1]


def test_the_companions_step_and_parts_that_are_no_matrices_are_left_to_torch() -> None:
    model, gauge = copy.deepcopy(RESCALES["units of a layer"])
    optimizer = DDCAdam(
        model.named_parameters(), [gauge], additive=True, retract=False, step_scale="norm"
    )
    fill(model, 0)
    (stack,) = (each for each in optimizer._stacks if isinstance(each, PolarStack))
    before = native.run_polar
    try:
        polar_in_c.run_polar = None  # type: ignore[assignment]  # would be called
        optimizer.step()
        for group in optimizer.param_groups:
            group.update(additive=False)
        with pytest.raises(TypeError):
            optimizer.step()
    finally:
        polar_in_c.run_polar = before
    assert stack.in_c


def test_it_goes_on_after_copies_pickles_and_moved_weights() -> None:
    """It keeps addresses, none of which may outlive what lay there."""
    model = DeepMLP(DeepMLPConfig(depth=3, width=8), 7, 7)
    optimizer = DDCAdam(model.named_parameters(), find_gauges(model), lr=0.05)
    fill(model, 0)
    optimizer.step()
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for p in model.parameters():
        p.data = p.data.clone()
    results = []
    for each, own in ((model, optimizer), copied, pickled):
        for step in (1, 2):
            fill(each, step)
            own.step()
        results.append([p.detach() for p in each.parameters()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_blocks_of_units_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (16, 32, 8192):
        monkeypatch.setattr(polar_in_c, "MOST", most)
        torch.manual_seed(0)
        model = GPT(GPTConfig(context=8, layers=2, width=48, heads=2, kv_heads=1, hidden=76), 13)
        optimizer = DDCAdam(model.named_parameters(), find_gauges(model), lr=0.05)
        for step in range(3):
            fill(model, step)
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("structure", [CMatrix, CSide, CPolar])
def test_structures_have_the_size_that_c_gives_them(structure: type[ctypes.Structure]) -> None:
    library = native.library()
    assert library is not None
    size = ctypes.c_int64.in_dll(library, f"ddc_size_of_{structure.__name__[1:].lower()}")
    assert size.value == ctypes.sizeof(structure)
