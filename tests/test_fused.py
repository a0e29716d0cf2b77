"""Adam's step by kernels, against the same in torch: those in C, and those in Triton, which it
interprets on a CPU.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import Axis, GaugeSet, HiddenMatrix, Rescale, in_blocks
from ddc.models import GPT, DeepMLP, DeepMLPConfig, GPTConfig
from ddc.optim import fused, native
from ddc.optim.fused import Kernels
from ddc.optim.plan import Role
from ddc.optim.rules import Adam
from ddc.optim.stacked import StackedParameter

ROOT = Path(__file__).parents[1]
GPTS = {
    "rms-swiglu-rope-gqa": GPTConfig(context=8, layers=2, width=16, heads=2, kv_heads=1, hidden=12),
    "layer-relu-bias": GPTConfig(
        context=8,
        layers=2,
        width=16,
        heads=2,
        kv_heads=2,
        hidden=12,
        norm="layer",
        mlp="relu",
        positions="learned",
        bias=True,
    ),
    "tied-qk-norm": GPTConfig(
        context=8, layers=1, width=16, heads=2, kv_heads=2, hidden=12, qk_norm=True, tied_head=True
    ),
}


def need_triton() -> None:
    """Skip the test where there is none; importing it would fix whether it interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is made for Linux alone")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """conftest.py has told Triton to interpret."""
    if torch.cuda.is_available():
        pytest.skip("they are compiled here: python -m benchmarks.gpu --stages checks")
    need_triton()
    monkeypatch.setattr(fused, "interpreted", True)
    fused.available.cache_clear()
    yield
    fused.available.cache_clear()


@pytest.fixture(params=["c", pytest.param("triton", marks=pytest.mark.slow)])
def kernels(request: pytest.FixtureRequest) -> str:
    """Kernels of either language."""
    name: str = request.param
    if name == "triton":
        request.getfixturevalue("interpreted")
    else:
        assert native.library() is not None, "there is no C compiler"
    return name


def gpt(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = GPT(GPTS[name], 13)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(dtype)


def vit() -> nn.Module:
    """Packed queries, keys and values: parts, and groups that are no regular pattern."""
    from ddc.compatibility import provide_torchvision_operators

    provide_torchvision_operators()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=5, embed_dim=16, depth=1, num_heads=2,
        act_layer=nn.ReLU,
    )  # fmt: skip


def fill(model: nn.Module, step: int) -> None:
    """Gradients that no rounding decides: they are drawn."""
    draw = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def same_steps(
    model: nn.Module, make: Callable[[nn.Module, bool], Any], steps: int = 2
) -> tuple[Any, Any]:
    """Optimizers after some steps, by kernels and in torch, whose norms were the same."""
    optimizers = []
    models = [model, copy.deepcopy(model)]
    for each, by_kernels in zip(models, (True, False), strict=True):
        optimizers.append(make(each, by_kernels))
        norms = []
        for step in range(steps):
            fill(each, step)
            norms.append(float(optimizers[-1].grad_norm()))
            optimizers[-1].step()
        optimizers[-1].norms = norms
    return optimizers[0], optimizers[1]


def assert_same(a: Any, b: Any, tolerance: float) -> None:
    """Weights and all state."""
    assert a.norms == pytest.approx(b.norms, rel=tolerance)
    pairs = zip(a.param_groups, b.param_groups, strict=True)
    for p, q in [pq for x, y in pairs for pq in zip(x["params"], y["params"], strict=True)]:
        assert_close(p.detach(), q.detach(), tolerance)
        for key, value in a.state[p].items():
            assert_close(value, b.state[q][key], tolerance)


def assert_close(x: Tensor, y: Tensor, tolerance: float) -> None:
    largest = max(float(y.abs().max()), 1e-30)
    assert float((x.double() - y.double()).abs().max()) <= tolerance * largest


def by_kernels(optimizer: Any) -> dict[str, bool]:
    """Whether kernels step each stacked parameter, by its first name."""
    return {
        p.names[0]: optimizer.fused
        and (bool(getattr(stack, "in_c", None)) or any(fused.fit(p)[:2]))
        for stack in optimizer._stacks
        for p in stack.parameters
    }


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", GPTS)
def test_kernels_step_as_torch_does(name: str) -> None:
    model = gpt(name)
    gauges = find_gauges(model)
    a, b = same_steps(
        model,
        lambda m, f: DDCAdam(
            m.named_parameters(), gauges, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), fused=f
        ),
    )
    assert_same(a, b, 1e-5)
    here, there = by_kernels(a), by_kernels(b)
    assert not any(there.values())
    matrices = {name for name, fits in here.items() if not fits}
    # the scale of a norm alone has no direction, and a centred vector is small
    assert all("norm" in each or each == "head.bias" for each in matrices), matrices


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "options",
    [
        {"vertical": "balance", "retract": False},
        {"step_scale": "norm", "eps": 0.1},
        {"vertical": "adam", "radial_rate": 0.3},
    ],
    ids=str,
)
def test_options_of_a_lift_are_the_same(options: dict[str, Any]) -> None:
    model = gpt("rms-swiglu-rope-gqa")
    gauges = find_gauges(model)
    assert_same(
        *same_steps(
            model, lambda m, f: DDCAdam(m.named_parameters(), gauges, lr=0.01, fused=f, **options)
        ),
        tolerance=1e-5,
    )


@pytest.mark.usefixtures("kernels")
def test_packed_and_convolved_weights_are_the_same() -> None:
    model = vit()
    gauges = find_gauges(model)
    assert any("qkv" in name for gauge in gauges for name in gauge.parameters)
    assert_same(
        *same_steps(model, lambda m, f: DDCAdam(m.named_parameters(), gauges, lr=0.01, fused=f)),
        tolerance=1e-5,
    )


@pytest.mark.usefixtures("kernels")
def test_blocks_chains_and_the_companions_step_are_left_to_torch() -> None:
    torch.manual_seed(0)
    model = DeepMLP(DeepMLPConfig(depth=3, width=8), 7, 7)
    gauges = GaugeSet(in_blocks(find_gauges(model)))
    a, b = same_steps(
        model,
        lambda m, f: DDCAdam(
            m.named_parameters(), gauges, retract=False, additive=True, step_scale="norm", fused=f
        ),
    )
    assert_same(a, b, 1e-5)


@pytest.mark.usefixtures("kernels")
def test_the_adam_part_of_ddcmuon_is_the_same() -> None:
    model = gpt("rms-swiglu-rope-gqa")
    gauges, hidden = find_gauges(model), hidden_matrices(model)
    a, b = same_steps(
        model, lambda m, f: DDCMuon(m.named_parameters(), gauges, hidden, lr=0.01, fused=f)
    )
    assert_same(a, b, 1e-4)
    assert by_kernels(a)["embedding.weight"]


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_weights_of_low_precision_are_rounded_alike() -> None:
    model = gpt("rms-swiglu-rope-gqa", torch.bfloat16)
    gauges = find_gauges(model)
    a, b = same_steps(
        model, lambda m, f: DDCAdam(m.named_parameters(), gauges, lr=0.01, fused=f), steps=1
    )
    assert_same(a, b, 2 * torch.finfo(torch.bfloat16).eps)
    assert all(value.dtype == torch.float32 for s in a.state.values() for value in s.values())


@pytest.mark.usefixtures("kernels")
def test_a_layer_without_gradients_is_left_alone() -> None:
    model = gpt("rms-swiglu-rope-gqa")
    gauges = find_gauges(model)
    optimizer = DDCAdam(model.named_parameters(), gauges, lr=0.01)
    fill(model, 0)
    before = copy.deepcopy(model.state_dict())
    versions = {name: p._version for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if name.startswith("blocks.1."):
            p.grad = None
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {name for name in before if not name.startswith("blocks.1.")}
    # autograd sees that they have moved
    assert moved == {name for name, p in model.named_parameters() if p._version > versions[name]}


@pytest.mark.usefixtures("kernels")
def test_copies_and_loaded_states_go_on_alike() -> None:
    model = gpt("rms-swiglu-rope-gqa")
    optimizer = DDCAdam(model.named_parameters(), find_gauges(model), lr=0.01)
    fill(model, 0)
    optimizer.step()
    copied, state = copy.deepcopy((model, optimizer))
    other = DDCAdam(copied.named_parameters(), find_gauges(copied), lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    for each, steps in ((model, optimizer), (copied, other)):
        fill(each, 1)
        steps.step()
    assert all(map(torch.equal, model.parameters(), copied.parameters()))
    assert state.fused


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    """What Triton interprets may still be no kernel."""
    need_triton()
    there = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=there, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "26 kernels\n"


def test_on_a_cpu_kernels_are_for_float32_alone() -> None:
    assert fused.available(torch.device("cpu"))
    for dtype, some in ((torch.float32, True), (torch.float64, False), (torch.bfloat16, False)):
        optimizer = DDCAdam(nn.Linear(4, 3, dtype=dtype).named_parameters())
        assert any(by_kernels(optimizer).values()) == some


@pytest.mark.usefixtures("kernels")
def test_gradients_that_are_not_contiguous() -> None:
    """They are copied: no kernel reads strides."""
    model = gpt("rms-swiglu-rope-gqa")
    other, gauges = copy.deepcopy(model), find_gauges(model)
    for each in (model, other):
        fill(each, 0)
    p = other.get_parameter("blocks.0.mlp.up.weight")
    assert p.grad is not None
    p.grad = p.grad.T.contiguous().T
    assert not p.grad.is_contiguous()
    for each in (model, other):
        DDCAdam(each.named_parameters(), gauges, lr=0.01).step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


class Experts(nn.Module):
    """Two experts' layers with biases, stacked: units along two axes, of a bias as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = (nn.Parameter(torch.randn(2, *s)) for s in ((3, 4), (4, 3)))
        self.bias = nn.Parameter(torch.randn(2, 3))


@pytest.mark.usefixtures("kernels")
def test_what_two_axes_dress_together_is_left_to_torch() -> None:
    units = Axis("up", (0, 1)), Axis("bias", (0, 1))
    gauges = [Rescale("relu_rescale", "mlp", units, (Axis("down", (0, 2)),))]
    hidden = [HiddenMatrix("up"), HiddenMatrix("down")]
    a, b = same_steps(
        Experts(), lambda m, f: DDCMuon(m.named_parameters(), gauges, hidden, fused=f)
    )
    assert_same(a, b, 1e-5)
    assert not any(by_kernels(a).values())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("betas", [(0.0, 0.9), (torch.tensor(0.9), torch.tensor(0.99))], ids=str)
def test_betas_that_are_zero_or_tensors(betas: tuple[Any, Any]) -> None:
    """Without a first average the last gradient is all of it, however much larger others were."""
    models = nn.Linear(4, 3), nn.Linear(4, 3)
    models[1].load_state_dict(models[0].state_dict())
    for model, by_kernels in zip(models, (True, False), strict=True):
        optimizer = DDCAdam(model.named_parameters(), betas=betas, fused=by_kernels)
        for size in (1e9, 1.0):
            fill(model, 0)
            torch._foreach_mul_([p.grad for p in model.parameters()], size)
            optimizer.step()
        if betas[0] == 0:
            means = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
            assert all(map(torch.equal, means, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(models[0].weight, models[1].weight)


@pytest.mark.usefixtures("kernels")
def test_sums_are_in_float32_whatever_tensors_are_by_default() -> None:
    model = DeepMLP(DeepMLPConfig(depth=2, width=8), 7, 7)
    gauges = find_gauges(model)
    other = copy.deepcopy(model)
    for each, default in ((model, torch.float32), (other, torch.bfloat16)):
        optimizer = DDCAdam(each.named_parameters(), gauges)
        fill(each, 0)
        torch.set_default_dtype(default)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", [(262_145, 256), (4, 2**26)], ids=str)
def test_large_matrices_fit_the_grid(shape: tuple[int, int]) -> None:
    """Along all axes of a grid but the first there are at most 65,535 programs."""
    param = nn.Parameter(torch.zeros(1).expand(shape))
    p = StackedParameter(Role("w", None), ["w"], [param], [0], Adam())
    k = Kernels(p)
    assert k.tiles * k.br * k.bc >= param.numel()
    _, parts, _ = k.parts(k.row_groups)
    assert parts < 2**16
    assert k.tiles < 2**31


@pytest.mark.usefixtures("interpreted")
def test_what_a_cuda_graph_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay reads the tables of offsets again, which steps outside it must not free."""
    layers = [torch.zeros(2, 3) for _ in range(2)]
    k = Kernels(StackedParameter(Role("w", None), ["a", "b"], layers, [0, 0], Adam()))
    eager = k.offsets(layers)
    monkeypatch.setattr(fused, "capturing", lambda _: True)
    assert k.offsets(layers) is eager
    new = k.offsets(layers[::-1])
    assert new.tolist() == [-each for each in eager.tolist()]
    monkeypatch.undo()
    kept = weakref.ref(eager)
    del eager
    room = torch.zeros(100, 2, 3)
    for i in range(1, 2 * fused.KNOWN):
        assert k.offsets([room[0], room[i]]).tolist() == [0, 6 * i]
    assert kept() is not None
    # what was made in a capture has no values before the first replay
    assert all(new is not each for each in k.known.values())


class NoCompiler:
    """Triton's driver where there is no C compiler."""

    @property
    def active(self) -> Any:
        raise RuntimeError("Failed to find C compiler")


def test_a_triton_that_does_not_work_leaves_all_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or a GPU that is older than what Triton compiles for."""
    device = torch.device("cuda:0")
    runtime = SimpleNamespace(driver=NoCompiler())
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert not fused.works(device)
    assert "Failed to find C compiler" in caplog.text
    monkeypatch.setattr(runtime, "driver", MagicMock())
    assert fused.works(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert not fused.works(device)


@pytest.mark.usefixtures("kernels")
def test_fake_tensors_are_left_to_torch() -> None:
    """They lie nowhere."""
    with FakeTensorMode():
        model = nn.Linear(4, 3)
        optimizer = DDCAdam(model.named_parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert not any(by_kernels(optimizer).values())
