"""Parameters that a step treats in a way of their own, or that it refuses in a line that says what
to do.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.testing._internal.two_tensor import TwoTensor

import ddc
from ddc import DDCAdam, DDCMuon
from ddc.gauges import (
    Axis,
    Chain,
    Gauge,
    GaugeSet,
    HiddenMatrix,
    Rescale,
    RotatedAxis,
    Rotation,
    Shift,
)
from ddc.optim.factory import make_optimizer
from ddc.optim.muon import Muon
from tests.helpers import relu_mlp, relu_mlp_gauges

Named = Iterable[tuple[str, Tensor]]
MAKERS: dict[str, Callable[[Named], Optimizer]] = {
    "DDCAdam": lambda named: DDCAdam(named, lr=0.1),
    "DDCMuon": lambda named: DDCMuon(named, (), [HiddenMatrix("0.weight")], adam_lr=0.1),
    "Muon": lambda named: Muon([(name, p) for name, p in named if p.ndim == 2], lr=0.1),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def mlp(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)
    ).to(device)


def backward(model: nn.Module, seed: int = 0) -> None:
    model.zero_grad()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


# ------------------------------------------------------------------------------------------------
# complex numbers


def loss(w: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """One whose gradients of the bias torch gives as conjugated views."""
    return (w @ x).abs().square().sum() + (bias.conj() * x).real.sum()


@pytest.mark.parametrize("make", [DDCAdam, DDCMuon])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_stepped_as_adamw_does(make, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, dtype=dtype, generator=generator) for shape in ((3, 3), (3,))]
    twins = [[nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    options = {"betas": (0.8, 0.9), "weight_decay": 0.1}
    rate = "adam_lr" if make is DDCMuon else "lr"
    ours, plain = (
        make(zip("wb", twins[0], strict=True), **{rate: 0.1}, **options),
        AdamW(twins[1], lr=0.1, **options),
    )
    for step in range(4):
        x = torch.randn(3, dtype=dtype, generator=generator)
        for params in twins:
            for p in params:
                p.grad = None
            loss(*params, x).backward()
        assert twins[0][1].grad.is_conj()
        twins[1][1].grad = twins[1][1].grad.resolve_conj()  # torch's own refuses it
        if step == 2:
            fresh = make(zip("wb", twins[0], strict=True), **{rate: 0.1}, **options)
            fresh.load_state_dict(ours.state_dict())
            norm = torch.stack([p.grad.abs().square().sum() for p in twins[0]]).sum().sqrt()
            torch.testing.assert_close(fresh.grad_norm().to(norm), norm)
            twins[0], ours = copy.deepcopy((twins[0], fresh))
            for p, q in zip(*twins, strict=True):
                p.grad = q.grad.clone()  # which a copy does not have
        ours.step()
        plain.step()
    tolerance = 1e-5 if dtype == torch.complex64 else 1e-12
    for p, q in zip(*twins, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            ours.state[p]["exp_avg"], plain.state[q]["exp_avg"], rtol=tolerance, atol=tolerance
        )


def test_complex_matrices_are_refused_where_real_ones_are_meant() -> None:
    w = [("w", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))]
    with pytest.raises(
        ValueError, match=r"'w' has shape \(2, 2\) and torch.complex64. Give it to AdamW"
    ):
        Muon(w)
    with pytest.raises(ValueError, match=r"hidden matrix 'w' is complex.* Leave it out of hidden"):
        DDCMuon(w, (), [HiddenMatrix("w")])
    with pytest.raises(
        ValueError, match=r"logit_shift at head: its parameter 'w' is complex.* leave out one gauge"
    ):
        DDCAdam(w, [Shift("w")])
    with pytest.raises(ValueError, match="'w' is complex and a conjugated view"):
        DDCAdam([("w", nn.Parameter(torch.ones(2, dtype=torch.complex64).conj()))])


# ------------------------------------------------------------------------------------------------
# quantised, absent


@pytest.mark.parametrize("make", [DDCAdam, DDCMuon])
@pytest.mark.parametrize("kind", ["int8", "wrapped"])
def test_frozen_quantised_weights_are_left_alone(make, kind: str) -> None:
    """bitsandbytes' are of an integer dtype; torchao's are tensors that wrap others."""
    plain, model = mlp(), mlp()
    values = torch.ones(5, 5, dtype=torch.int8)
    model.quantised = nn.Parameter(
        values if kind == "int8" else TwoTensor(values * 0.1, values * 0.1), False
    )
    optimizers = [make(each.named_parameters()) for each in (plain, model)]
    for each, optimizer in zip((plain, model), optimizers, strict=True):
        for seed in range(2):
            backward_of = nn.Sequential(*list(each.children())[:2])
            backward(backward_of, seed)
            optimizer.grad_norm()
            optimizer.step()
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    assert not optimizers[1].state.get(model.quantised)
    for name, p in plain.named_parameters():
        assert torch.equal(p, model.get_parameter(name))


def test_what_cannot_be_stepped_is_named() -> None:
    wrapped = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    with pytest.raises(
        ValueError, match=r"'w' is a TwoTensor, which keeps its values in another form.* the others"
    ):
        DDCAdam([("w", wrapped)])
    integers = [("q", nn.Parameter(torch.ones(2, 2, dtype=torch.int8), False))]
    with pytest.raises(
        ValueError, match=r"'q' has shape \(2, 2\) and torch.int8. Give it to AdamW"
    ):
        Muon(integers)
    with pytest.raises(
        ValueError, match="hidden matrix 'q' is not among the optimizer's parameters, or quantised"
    ):
        DDCMuon(integers, (), [HiddenMatrix("q")])
    with pytest.raises(
        ValueError, match=r"logit_shift at head: its parameter 'q' is not among .*, or quantised"
    ):
        DDCAdam(integers, [Shift("q")])


@pytest.mark.parametrize("make", [DDCAdam, DDCMuon, Muon])
def test_a_model_without_parameters(make) -> None:
    with pytest.raises(
        ValueError, match=rf"{make.__name__} got no parameters.* Pass model.named_parameters\(\)"
    ):
        make(nn.ReLU().named_parameters())
    with pytest.raises(TypeError, match=r"pass model.named_parameters\(\)"):
        make(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "options"), [("adamw", {}), ("ddcadam", {"compiled": None}), ("ddcmuon", {})]
)
def test_nor_is_there_an_optimizer_by_configuration(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got no parameters"):
        make_optimizer(name, nn.ReLU(), GaugeSet(), 0.1, **options)


def test_the_norm_of_nothing() -> None:
    assert DDCAdam([{"params": []}]).grad_norm() == 0


# ------------------------------------------------------------------------------------------------
# other devices


@every
def test_a_model_that_got_its_values_after_the_optimizer_was_made(make) -> None:
    model = mlp("meta")
    optimizer = make(model.named_parameters())
    model.to_empty(device="cpu").load_state_dict(mlp().state_dict())
    backward(model)
    with pytest.raises(
        ValueError, match=r"'0.weight' is on the meta device.* Make the optimizer after that"
    ):
        optimizer.step()


@every
def test_the_state_goes_with_parameters_that_are_moved(make) -> None:
    """The same parameters, moved from the meta device, where all is that has no values; then as if
    made here.
    """
    model, plain = mlp("meta"), mlp()
    optimizer, other = make(model.named_parameters()), make(plain.named_parameters())
    for parameter, its in zip(model.parameters(), plain.parameters(), strict=True):
        torch.utils.swap_tensors(parameter, nn.Parameter(its.detach().clone()))
    for seed in range(2):
        for each, mine in ((model, optimizer), (plain, other)):
            backward(each, seed)
            mine.step()
    for parameter, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, its)


# ------------------------------------------------------------------------------------------------
# groups and names


@every
def test_groups_without_names_may_come_later(make) -> None:
    """As Lightning's BaseFinetuning adds what it unfreezes, and puts the groups back where it
    resumes.
    """
    model = mlp()
    model.append(nn.Linear(2, 2, dtype=torch.float64))

    def grown(optimizer: Optimizer) -> Optimizer:
        last = model[2]
        optimizer.add_param_group(
            {"params": [last.weight] if isinstance(optimizer, Muon) else list(last.parameters())}
        )
        return optimizer

    def first() -> Optimizer:
        return make(model[:2].named_parameters())

    optimizer = grown(first())
    assert optimizer.param_groups[-1]["param_names"][0].endswith("parameter 0")
    backward(model)
    before = model[2].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[2].weight)
    saved = copy.deepcopy(optimizer.state_dict())
    other = grown(first())
    other.load_state_dict(saved)
    for p, state in optimizer.state.items():
        assert all(torch.equal(value, other.state[p][key]) for key, value in state.items())
    if not isinstance(optimizer, Muon):
        resumed = first()
        resumed.param_groups = [dict(group) for group in optimizer.param_groups]
        resumed.load_state_dict(saved)
        resumed.step()
        assert float(resumed.state[model[2].weight]["step"]) == 2
        resumed.param_groups[0]["params"] = list(mlp().parameters())
        with pytest.raises(ValueError, match="param_groups hold other parameters"):
            resumed.step()


def test_names_are_given_to_all_and_differ() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(
        ValueError, match="parameter 1 of param group 0 has no name, and others of it have"
    ):
        DDCAdam([("a", a), b])
    with pytest.raises(
        ValueError, match=r"param group 1 have names \('b'\), those of the groups before have not"
    ):
        DDCAdam([{"params": [a]}, {"params": [("b", b)]}])
    with pytest.raises(
        ValueError, match=r"two parameters are called 'a' \(given as 'a' and '_orig_mod.a'\)"
    ):
        DDCAdam([("a", a), ("_orig_mod.a", b)])
    optimizer = DDCAdam([("a", a)])
    for refused in ([("a", b)], [("b", nn.Parameter(TwoTensor(b.data, b.data)))]):
        with pytest.raises(ValueError, match=r"'[ab]'"):
            optimizer.add_param_group({"params": refused})
        with pytest.raises(ValueError, match="Invalid lr=-1"):
            optimizer.add_param_group({"params": [("b", b)], "lr": -1})
        assert len(optimizer.param_groups) == 1  # it stays outside
    optimizer.step()


# ----------------------------------------------------------------------------------------- gauges
# that do not fit


def rescale(where: str, plus: str, minus: str, plus_axis: int = 0, minus_axis: int = 1) -> Rescale:
    return Rescale("relu_rescale", where, (Axis(plus, plus_axis),), (Axis(minus, minus_axis),))


def rotation(where: str, name: str, indices: Any, axis: int = 0) -> Rotation:
    return Rotation("value_rotation", where, (RotatedAxis(name, axis, np.array(indices)),), True)


W = "0.weight"
CASES: dict[str, tuple[list[Gauge], tuple[str, ...]]] = {
    "same index": ([rotation("x", W, [[[0, 1]]]), rotation("y", W, [[[1, 2]]])], ()),
    "same index of one": ([rotation("x", W, [[[0, 1]], [[1, 2]]])], ()),
    "two axes": ([rotation("x", W, [[[0, 1]]]), rotation("y", W, [[[0, 1]]], axis=1)], ()),
    "beyond the end": ([rotation("x", W, [[[5, 6]]])], ()),
    "no such axis": ([rescale("x", W, "2.weight", minus_axis=2)], ()),
    "plus sides": ([rescale("x", W, "2.weight"), rescale("y", W, "4.weight")], ()),
    "minus sides": ([rescale("x", "2.weight", W), rescale("y", "4.weight", W)], ()),
    "one axis": ([rescale("x", "2.weight", W, minus_axis=0), rescale("y", W, "4.weight")], ()),
    "circle": ([rescale("x", W, "2.weight"), rescale("y", "2.weight", W)], ()),
    "shifts": ([Shift(W, where="x"), Shift(W, where="y")], ()),
    "shift and rows": ([rescale("x", W, "2.weight"), Shift(W, where="y")], ()),
    "rotation and rescale": ([rescale("x", W, "2.weight"), rotation("y", W, [[[0, 1]]])], ()),
    "chains": ([Chain((W, "2.weight"), "x"), Chain(("4.weight", W), "y")], ()),
    "chain and rescale": ([rescale("x", W, "2.weight"), Chain((W, "4.weight"), "y")], ()),
    "hidden, plus sides": (
        [rescale("x", W, "2.weight"), rescale("y", W, "4.weight", 1)],
        (W, "2.weight", "4.weight"),
    ),
    "hidden, one axis": ([rescale("x", "2.weight", W), rescale("y", "4.weight", W)], (W,)),
    "beside hidden": (
        [
            Rescale("relu_rescale", "x", (Axis("2.weight"),), (Axis(W), Axis("4.weight", 1))),
            Shift(W, where="y"),
        ],
        ("4.weight",),
    ),
}


@pytest.mark.parametrize(("gauges", "hidden"), CASES.values(), ids=CASES)
def test_gauges_that_do_not_fit_are_named_with_what_helps(
    gauges: list[Gauge], hidden: tuple[str, ...]
) -> None:
    """The message has the parameter and the gauges; and what it says to leave out makes the rest
    fit.
    """
    named = list(relu_mlp(bias=False).named_parameters())

    def make(gauges: list[Gauge]) -> DDCAdam:
        return (
            DDCMuon(named, gauges, list(map(HiddenMatrix, hidden)))
            if hidden
            else DDCAdam(named, gauges)
        )

    with pytest.raises(ValueError, match=W) as refused:
        make(gauges)
    message = str(refused.value)
    assert "\n" not in message
    assert all(str(gauge) in message for gauge in gauges)
    (fix,) = re.findall(r"\[gauge for gauge in gauges if .*\]", message)
    left = eval(fix, {"gauges": gauges})
    assert len(left) < len(gauges)
    make(left)


def test_a_refusal_in_a_step_names_the_gauge() -> None:
    model = relu_mlp()
    optimizer = DDCAdam(model.named_parameters(), relu_mlp_gauges(model))
    model[0].weight.requires_grad_(False)
    model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(
        ValueError, match=r"'0.weight' was frozen.*its gauge \(relu_rescale at 0-2\)"
    ):
        optimizer.step()
    hidden = [HiddenMatrix("0.weight", heads=2), HiddenMatrix("2.weight")]
    model = relu_mlp(bias=False)
    with pytest.raises(
        ValueError, match=r"'0.weight': under relu_rescale at 0-2 .* HiddenMatrix\('0.weight'\)"
    ):
        DDCMuon(model.named_parameters(), relu_mlp_gauges(model)[:1], hidden)


# ------------------------------------------------------------------------------------------------
# tools and schedules


def test_the_norm_through_accelerate() -> None:
    model = relu_mlp()
    optimizer = DDCAdam(model.named_parameters(), relu_mlp_gauges(model))
    wrapped_model, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
    wrapped_model(torch.ones(2, 6, dtype=torch.float64)).square().sum().backward()
    assert type(wrapped) is not DDCAdam
    assert ddc.grad_norm(wrapped) == ddc.grad_norm(optimizer) == optimizer.grad_norm() > 0
    plain = AdamW(model.parameters())
    for other in (plain, Accelerator(cpu=True).prepare(plain), None):
        with pytest.raises(
            TypeError, match=r"has no gauge-invariant norm: clip by torch.nn.utils.clip_grad_norm_"
        ):
            ddc.grad_norm(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDCAdam", "DDCMuon"])
def test_a_compiled_step_holds_for_betas_and_momentum_that_change(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OneCycleLR has it by default. Compiled without the compiler's last stage, to save time."""
    compiles: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiles.append(len(inputs))
        return graph.forward

    real = torch.compile

    def compile_(function: Callable[..., Any], options: Any, **others: Any) -> Callable[..., Any]:
        return real(function, backend=backend, **others)  # options are for the last stage

    monkeypatch.setattr(torch, "compile", compile_)
    models = [relu_mlp(depth=3) for _ in range(2)]
    optimizers = []
    for model in models:
        named, gauges = model.named_parameters(), relu_mlp_gauges(model)
        options = {"compiled": model is models[1], "vertical": "balance", "weight_decay": 0.1}
        hidden = [HiddenMatrix("0.weight"), HiddenMatrix("2.weight")]
        make = DDCAdam if name == "DDCAdam" else DDCMuon
        optimizers.append(make(named, gauges, *([hidden] if make is DDCMuon else []), **options))
    schedulers = [OneCycleLR(optimizer, 0.01, total_steps=12) for optimizer in optimizers]
    betas, norms = set(), []
    for step in range(8):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            for group in optimizer.param_groups:
                group["radial_rate"] = 1 - 0.01 * step
                if "momentum" in group:
                    group["momentum"] = 0.85 + 0.01 * step
            model.zero_grad()
            model(torch.ones(2, 6, dtype=torch.float64) * (1 + step)).square().sum().backward()
            norms.append(optimizer.grad_norm())
            optimizer.step()
            scheduler.step()
        betas.add(optimizers[1].param_groups[0]["betas"])
        if step == 0:
            first = len(compiles)
    assert len(betas) == 8
    assert first == len(compiles) == 2  # the step, and the norm
    for a, b in zip(norms[::2], norms[1::2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
