"""Gauges of models whose parameters are split over processes, found without their values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ddc import DDCAdam, find_gauges, hidden_matrices
from ddc.gauges.buffers import with_values
from ddc.gauges.unsplit import unsplit
from ddc.models import GPTConfig
from tests.helpers import make_model
from tests.test_false_gauges import llama


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of one process, which holds all parts."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


class Rotary(nn.Module):
    """Attention whose angles are a buffer that no config tells of, beside what a module may hold of
    its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.again = [self.maps[3]]
        self.register_buffer("angles", torch.arange(32)[:, None] * torch.tensor([1.0, 0.3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def turned(x: torch.Tensor) -> torch.Tensor:
            angles, (a, b) = self.angles[: x.shape[-2]], x.chunk(2, -1)
            return torch.cat(
                (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1
            )

        q, k, v = (m(x).unflatten(-1, (-1, 4)).transpose(1, 2) for m in self.maps[:3])
        given = nn.functional.scaled_dot_product_attention(turned(q), turned(k), v)
        return x + self.again[0](given.transpose(1, 2).flatten(-2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...] | None]] = {
    "of transformers": (llama, None),
    "Sequential": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), None),
    "a buffer": (Rotary, (torch.ones(2, 5, 16),)),
    "ours": (lambda: make_model(GPTConfig(context=8, layers=1, width=16, hidden=12)), None),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "of transformers")) for name in MODELS],
)
def test_a_split_model_has_the_gauges_of_the_whole_one(name: str, mesh: DeviceMesh) -> None:
    make, inputs = MODELS[name]
    model = make()
    expected = [
        (gauge.kind, gauge.where, gauge.parameters)
        for gauge in find_gauges(model, inputs=inputs, verify=False)
    ]
    hidden = list(hidden_matrices(model, inputs=inputs))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    fully_shard(layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gauges = find_gauges(model, inputs=inputs)
    assert [(gauge.kind, gauge.where, gauge.parameters) for gauge in gauges] == expected
    assert list(hidden_matrices(model, inputs=inputs)) == hidden
    # tried on a twin where there is a config to build one from, else said not to be tried
    assert (not gauges.unchecked) == (name == "of transformers")
    # the model is as it was: it trains, split
    assert all(isinstance(p, DTensor) for p in model.parameters())
    if name == "a buffer":
        assert isinstance(unsplit(model).again[0], nn.Linear)
        optimizer = DDCAdam(model.named_parameters(), gauges)
        model(*inputs).square().sum().backward()
        optimizer.step()


def test_a_whole_model_is_left_alone() -> None:
    model = nn.Linear(3, 3)
    assert unsplit(model) is model


def test_a_buffer_that_is_saved_is_not_made_anew() -> None:
    """A checkpoint may bring other values than the config says."""

    class Constant(nn.Module):
        def __init__(self, config: list[float], persistent: bool) -> None:
            super().__init__()
            self.config = config
            self.register_buffer("w", torch.tensor(config), persistent=persistent)

    class Saved(Constant):
        def __init__(self, config: list[float]) -> None:
            super().__init__(config, persistent=True)

    class Derived(Constant):
        def __init__(self, config: list[float]) -> None:
            super().__init__(config, persistent=False)

    for kind, known in ((Saved, False), (Derived, True)):
        model = nn.Sequential(kind([1.0, 2.0])).to("meta")
        buffer = with_values(model, "0.w", model[0].w)
        assert buffer.is_meta is not known
        assert not known or buffer.tolist() == [1.0, 2.0]
