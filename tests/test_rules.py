"""Lion, SGD and Shampoo, lifted: equivariant under all gauges, and what they were without any."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import math
import pickle
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddc.optim
from ddc import DDCSGD, DDCLion, DDCShampoo, find_gauges
from ddc.data import TextData
from ddc.gauges import GaugeSet, in_blocks
from ddc.models import DeepMLP, DeepMLPConfig
from ddc.optim import Lift
from ddc.optim.factory import LIFTS, make_optimizer
from experiments.equivariance.measure import orbit_divergence, random_model
from tests.conftest import MODELS
from tests.helpers import backward, make_model, relu_mlp, relu_mlp_gauges
from tests.test_ddcmuon import mlp_divergence
from tests.test_docs import python_blocks

RULES: dict[str, Callable[..., Lift]] = {
    "lion": functools.partial(DDCLion, lr=1e-3, weight_decay=0.1),
    "sgd": functools.partial(DDCSGD, lr=0.03, weight_decay=0.1),
    "nesterov": functools.partial(DDCSGD, lr=0.03, weight_decay=0.1, nesterov=True),
    "shampoo": functools.partial(DDCShampoo, lr=0.02, weight_decay=0.1),
}
NEW = ["lion", "sgd", "shampoo"]


def gpt(name: str, data: TextData) -> nn.Module:
    config = dataclasses.replace(MODELS[name], context=32)
    return random_model(config, data.vocab_size, 0, torch.float64)


def lifted(model: nn.Module, gauges: GaugeSet, rule: str, **options) -> Lift:
    return RULES[rule](model.named_parameters(), gauges, **options)


# ----------------------------------------------------------------------------------------------
# equivariance


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_whole_product_group(rule: str, name: str, shakespeare: TextData) -> None:
    """A hundred steps from two points of one orbit, a random element of all groups at once."""
    model = gpt(name, shakespeare)
    make = functools.partial(lifted, rule=rule)
    assert orbit_divergence(model, find_gauges(model), make, shakespeare, steps=100) < 1e-7


@pytest.mark.parametrize("rule", NEW)
def test_without_gauges_it_is_not_equivariant(rule: str, shakespeare: TextData) -> None:
    """The test above can fail."""
    model = gpt("rms-swiglu-rope-gqa", shakespeare)

    def blind(model: nn.Module, gauges: GaugeSet) -> Lift:
        return lifted(model, GaugeSet(), rule)

    assert orbit_divergence(model, find_gauges(model), blind, shakespeare, steps=20) > 1e-4


@pytest.mark.parametrize(("per_layer", "residual"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("rule", NEW)
def test_deep_mlp(rule: str, per_layer: bool, residual: bool) -> None:
    assert mlp_divergence(functools.partial(lifted, rule=rule), per_layer, residual) < 1e-7


@pytest.mark.parametrize("rule", NEW)
def test_chain_of_relu_layers(rule: str) -> None:
    """With biases, each hidden matrix decomposed by one rescale and dressed by another."""
    model = relu_mlp()
    gauges = GaugeSet(tuple(relu_mlp_gauges(model)))
    copies = [model, copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(0))
    x = torch.randn(32, 6, dtype=torch.float64)
    for each in copies:
        optimizer = lifted(each, gauges, rule)
        for _ in range(100):
            optimizer.zero_grad()
            (each(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
    assert (copies[0](x) - copies[1](x)).abs().max() < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"vertical": "adam"},
        {"vertical": "balance", "step_scale": "norm", "lr": 1e-3},
        {"retract": False, "max_grad_norm": 0.3, "radial_rate": 0.3},
        {"additive": True, "retract": False, "blocks": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", NEW)
def test_every_mode(rule: str, options: dict, shakespeare: TextData) -> None:
    model = gpt("layer-bias-swiglu-rope-mqa", shakespeare)
    options = dict(options)
    clip, blocks = options.pop("max_grad_norm", None), options.pop("blocks", False)
    gauges = in_blocks(find_gauges(model)) if blocks else find_gauges(model)
    make = functools.partial(lifted, rule=rule, **options)
    found = orbit_divergence(model, gauges, make, shakespeare, steps=50, max_grad_norm=clip)
    assert found < 1e-7


# ------------------------------------------------------------------------------------- originals


def lion(params: list[Tensor], lr: float, betas: tuple[float, float]) -> Callable[[], None]:
    """Chen et al., arXiv:2302.06675, algorithm 2, entry by entry; without decay."""
    momenta = [[0.0] * p.numel() for p in params]

    def step() -> None:
        for p, m in zip(params, momenta, strict=True):
            w, g = p.data.view(-1), p.grad.view(-1)
            for i in range(len(m)):
                c = betas[0] * m[i] + (1 - betas[0]) * float(g[i])
                w[i] -= lr * ((c > 0) - (c < 0))
                m[i] = betas[1] * m[i] + (1 - betas[1]) * float(g[i])

    return step


def shampoo(
    params: list[Tensor], lr: float, betas: tuple[float, float], eps: float
) -> Callable[[], None]:
    """Gupta et al., arXiv:1802.09568, algorithm 2, one tensor and one axis at a time; averages in
    the place of sums where beta2 < 1 (Shi et al., arXiv:2309.06497).
    """
    momenta = [torch.zeros_like(p) for p in params]
    sums = [[torch.zeros(n, n, dtype=p.dtype) for n in p.shape] for p in params]
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        for p, m, matrices in zip(params, momenta, sums, strict=True):
            m.copy_(betas[0] * m + (1 - betas[0]) * p.grad)
            u = m / (1 - betas[0] ** count)
            for axis, matrix in enumerate(matrices):
                others = [i for i in range(p.ndim) if i != axis]
                outer = torch.tensordot(p.grad, p.grad, dims=(others, others))
                if betas[1] < 1:
                    matrix.copy_(betas[1] * matrix + (1 - betas[1]) * outer)
                    average = matrix / (1 - betas[1] ** count)
                else:
                    average = matrix.add_(outer)
                # the inverse root by singular values, which for such a matrix are its eigenvalues
                left, values, right = torch.linalg.svd(average + eps * torch.eye(len(average)))
                root = left @ torch.diag(values ** (-1 / (2 * p.ndim))) @ right
                u = torch.tensordot(root, u, dims=([1], [axis])).movedim(0, axis)
            p.data.sub_(lr * u)

    return step


class Shapes(nn.Module):
    """Parameters of no, one, two and four axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"scalar": (), "vector": (5,), "matrix": (4, 6), "tall": (7, 2)}
        shapes["filters"] = (3, 2, 2, 3)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))


def both_take(ours: Lift, theirs: Callable[[], None], models: list[nn.Module], steps=8) -> None:
    """The same random gradients to both; their weights must agree after every step."""
    generator = torch.Generator().manual_seed(1)
    start = [p.detach().clone() for p in models[0].parameters()]
    for _ in range(steps):
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            q.grad = p.grad.clone()
        ours.step()
        theirs()
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=name)
    assert all((p != q).any() for p, q in zip(models[0].parameters(), start, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    """And decay, which torch couples, is that of a weight before the step."""
    models = [Shapes(), Shapes()]
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
    sgd = torch.optim.SGD(models[1].parameters(), **options)

    def decay_and_step() -> None:
        for p in models[1].parameters():
            p.data.mul_(1 - 0.1 * 0.3)
        sgd.step()

    ours = DDCSGD(models[0].named_parameters(), weight_decay=0.3, **options)
    both_take(ours, decay_and_step, models)


def test_lion_is_the_published_one() -> None:
    models = [Shapes(), Shapes()]
    options = {"lr": 0.01, "betas": (0.9, 0.95)}
    theirs = lion(list(models[1].parameters()), **options)
    both_take(DDCLion(models[0].named_parameters(), weight_decay=0.0, **options), theirs, models)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 1.0)])
def test_shampoo_is_the_published_one(betas: tuple[float, float]) -> None:
    models = [Shapes(), Shapes()]
    for model in models:
        del model.scalar  # of which the algorithm does not speak
    options = {"lr": 0.1, "betas": betas, "eps": 1e-4}
    theirs = shampoo(list(models[1].parameters()), **options)
    both_take(DDCShampoo(models[0].named_parameters(), weight_decay=0.0, **options), theirs, models)


def test_they_are_those_of_pytorch_optimizer() -> None:
    """Where it is installed (the extra "benchmark"), beside the references above."""
    theirs = pytest.importorskip("pytorch_optimizer")
    models = [Shapes(), Shapes()]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    other = theirs.Lion(models[1].parameters(), **options)
    both_take(DDCLion(models[0].named_parameters(), **options), other.step, models)
    models = [Shapes(), Shapes()]
    for model in models:
        del model.scalar, model.filters, model.vector  # it takes other axes than it says
    other = theirs.Shampoo(models[1].parameters(), lr=0.1, matrix_eps=1e-4)
    ours = DDCShampoo(
        models[0].named_parameters(), lr=0.1, betas=(0.0, 1.0), eps=1e-4, weight_decay=0.0
    )
    both_take(ours, other.step, models)


def test_a_long_axis_of_shampoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is preconditioned by a number, which is the exact matrix where its eigenvalues are equal."""
    monkeypatch.setattr("ddc.optim.rules.shampoo.LARGEST", 4)
    weight = nn.Parameter(torch.zeros(6, 3, dtype=torch.float64))
    optimizer = DDCShampoo([("weight", weight)], lr=1.0, betas=(0.0, 0.0), weight_decay=0.0)
    assert optimizer.state[weight]["preconditioner_0"].shape == (1, 1)
    weight.grad = torch.randn(6, 3, dtype=torch.float64)
    optimizer.step()
    u, s, v = torch.linalg.svd(weight.grad, full_matrices=False)
    number = (s.square().sum() / 6) ** -0.25
    torch.testing.assert_close(
        weight.detach(), -number * u @ torch.diag(s**0.5) @ v, rtol=1e-6, atol=0
    )


# ----------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("rule", NEW)
def test_state_is_no_larger_than_the_originals(rule: str) -> None:
    """Entries of all that grows with the parameters; and none comes later."""
    model = make_model(MODELS["layer-bias-swiglu-rope-mqa"])
    optimizer = lifted(model, find_gauges(model), rule)
    own = {
        "lion": lambda p: p.numel(),
        "sgd": lambda p: p.numel(),
        "shampoo": lambda p: p.numel() + sum(n * n for n in p.shape),
    }[rule]
    for p, state in optimizer.state.items():
        modes = sum(
            v.numel()
            for k, v in state.items()
            if k == "step" or k.startswith("radial") or k.endswith("waking")
        )
        assert sum(v.numel() for v in state.values()) - modes <= own(p)
    before = {p: {k: v.shape for k, v in state.items()} for p, state in optimizer.state.items()}
    backward(model, 0)
    optimizer.step()
    now = {p: {k: v.shape for k, v in state.items()} for p, state in optimizer.state.items()}
    assert now == before


@pytest.mark.parametrize("rule", NEW)
def test_states_and_copies_go_on(rule: str) -> None:
    """From a state dict, and from a pickle."""
    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    optimizer = lifted(model, find_gauges(model), rule)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
    twin = copy.deepcopy(model)
    loaded = lifted(twin, find_gauges(twin), rule)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    third, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for each, its in ((model, optimizer), (twin, loaded), (third, pickled)):
        backward(each, 7)
        its.step()
    for p, q, r in zip(*(m.parameters() for m in (model, twin, third)), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@pytest.mark.parametrize("rule", NEW)
def test_low_precision(rule: str) -> None:
    """State in float32; weights that are no numbers are none of a gradient of numbers."""
    model = make_model(MODELS["rms-swiglu-rope-gqa"]).bfloat16()
    optimizer = lifted(model, find_gauges(model), rule)
    assert all(v.dtype == torch.float32 for s in optimizer.state.values() for v in s.values())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("rule", NEW)
def test_a_gradient_that_is_no_number_is_not_hidden(rule: str) -> None:
    """A sign would hide it, and eigenvalues raise. Shampoo's is in all of the matrix."""
    for bad in (math.nan, math.inf):
        model = relu_mlp(depth=2, width=3)
        optimizer = lifted(model, GaugeSet(tuple(relu_mlp_gauges(model))), rule)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model[0].weight.grad[1, 2] = bad
        optimizer.step()
        assert not model[0].weight[1].isfinite().any()
        assert model[0].weight[0].isfinite().all() == (rule != "shampoo")


@pytest.mark.slow
@pytest.mark.parametrize("rule", NEW)
def test_compiled_arithmetic_is_the_same_step(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for every rate; without the compiler's last stage, to save time. Shampoo is not
    compiled, and says nothing.
    """
    monkeypatch.setattr("ddc.optim.compiled.CPU_OPTIONS", {})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    models = [relu_mlp(depth=2, width=3) for _ in range(2)]
    gauges = GaugeSet(tuple(relu_mlp_gauges(models[0])))
    optimizers = [lifted(m, gauges, rule, compiled=m is models[1]) for m in models]
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + seed)
            for p in model.parameters():
                p.grad = torch.sin(p.detach() * (1 + seed))
            optimizer.step()
    assert bool(optimizers[1]._advance.compiled) == (rule != "shampoo")
    torch.testing.assert_close(*(each.grad_norm() for each in optimizers), rtol=1e-12, atol=0)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_rule_that_the_documentation_writes(shakespeare: TextData) -> None:
    """A toy, of one class for the rule and one for the lift, has all that the others have."""
    page = Path(__file__).parents[1] / "docs/extending.md"
    (block,) = (each for each in python_blocks(page) if "(Rule)" in each)
    model = gpt("layer-bias-swiglu-rope-mqa", shakespeare)
    names: dict[str, Any] = {"__name__": "snippet", "model": model}
    exec(compile(block, str(page), "exec"), names)

    def make(model: nn.Module, gauges: GaugeSet) -> Lift:
        return names["DDCRMSProp"](model.named_parameters(), gauges, lr=3e-3)

    assert orbit_divergence(model, find_gauges(model), make, shakespeare, steps=20) < 1e-9


# --------------------------------------------------------------------------------- by configuration


def test_the_registry_makes_them() -> None:
    model = DeepMLP(DeepMLPConfig(depth=2, width=8), 5, 5)
    for name, lift in LIFTS.items():
        optimizer = make_optimizer(name, model, find_gauges(model), 0.1)
        assert type(optimizer) is lift
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("lion", {"betas": (0.9, 1.0)}, r"Invalid betas=\(0.9, 1.0\): expected two numbers"),
        ("lion", {"lr": -1.0}, "Invalid lr=-1.0"),
        ("sgd", {"momentum": 1.0}, "Invalid momentum=1.0: expected a number in"),
        ("shampoo", {"eps": 0.0}, "Invalid eps=0.0: expected a number > 0"),
        ("shampoo", {"betas": (1.0, 1.0)}, r"two numbers in \[0, 1\), or 1 for the second"),
        ("shampoo", {"betas": (0.9,)}, r"Invalid betas=\(0.9,\): expected two numbers"),
        ("shampoo", {"vertical": "up"}, "Invalid vertical='up'"),
    ],
)
def test_bad_hyperparameters(rule: str, options: dict, message: str) -> None:
    model = relu_mlp(depth=2, width=3)
    with pytest.raises(ValueError, match=message):
        lifted(model, GaugeSet(), rule, **options)


def test_schemas_have_what_the_signatures_have() -> None:
    """And refuse what the rule refuses, by the name of the key."""
    from ddc.training.schema import OPTIMIZERS

    fields = {field.name: field.default for field in dataclasses.fields(OPTIMIZERS["ddcsgd"])}
    assert fields["name"] == "ddcsgd"
    assert (fields["momentum"], fields["nesterov"]) == (0.9, False)
    assert not {"betas", "eps"} & fields.keys()
    with pytest.raises(ValueError, match=r"Invalid optimizer\.momentum=2"):
        OPTIMIZERS["ddcsgd"](momentum=2)


def test_no_file_of_the_optimizers_imports_one_that_imports_it() -> None:
    """Imports for types alone count."""
    folder = Path(ddc.optim.__file__).parent
    graph: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(("ddc.optim", *parts)).removesuffix(".__init__")
        imports = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
        ]
        graph[name] = {str(each.module) for each in imports}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
