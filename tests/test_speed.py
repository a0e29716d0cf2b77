"""What makes a step fast on a GPU, as far as it shows without one: nothing waits for the device;
one graph holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import named_parameters
from ddc.models import GPTConfig
from tests.helpers import backward, make_model

CONFIGS = {
    "all gauges": GPTConfig(context=8, layers=2, width=16, heads=4, kv_heads=2, hidden=12),
    "learned positions, ReLU, biases": GPTConfig(
        context=8, layers=2, width=16, heads=4, kv_heads=4, hidden=12,
        norm="layer", mlp="relu", positions="learned", bias=True,
    ),
}  # fmt: skip
OPTIMIZERS = ("DDCAdam", "DDCMuon")


class Crossing(Exception):
    """Data of the host and of the device met in one operation, or were copied from one to the
    other.
    """


class NoCrossings(TorchDispatchMode):
    """Raises at a :class:`Crossing`, where the host would wait and no graph be captured; numbers
    may come from there.

    What it cannot see is ``torch.tensor`` of a list made on the device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in leaves if isinstance(x, Tensor) and x.ndim > 0}
        if len(devices) > 1:
            raise Crossing(f"{func} between {' and '.join(sorted(devices))}")
        return result


def without_data(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters with gradients on torch's device without data, where whatever needs a value on the
    host raises.
    """
    empty: dict[str, Tensor] = {
        n: nn.Parameter(torch.empty_like(p, device="meta")) for n, p in parameters.items()
    }
    for p in empty.values():
        p.grad = torch.empty_like(p)
    return empty


def optimizer_of(
    name: str, model: nn.Module, parameters: Mapping[str, Tensor], **options: Any
) -> DDCAdam:
    """With all gauges of the model, over parameters named as its own."""
    gauges = find_gauges(model)
    if name == "DDCAdam":
        return DDCAdam(parameters.items(), gauges, **options)
    return DDCMuon(parameters.items(), gauges, hidden_matrices(model), **options)


@pytest.mark.parametrize("vertical", ["freeze", "adam", "balance"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_in_a_step_waits_for_the_device(
    name: str, config: GPTConfig, vertical: str
) -> None:
    model = make_model(config, dtype=torch.float32)
    parameters = without_data(named_parameters(model))
    optimizer = optimizer_of(name, model, parameters, vertical=vertical)
    with NoCrossings():
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), 1.0, optimizer.grad_norm())
        optimizer.step()


def test_nor_where_a_rotation_turns_a_part_of_each_head() -> None:
    config = GPTConfig(
        context=8, layers=2, width=16, heads=2, kv_heads=1, hidden=12, positions="partial_rope"
    )
    model = make_model(config, dtype=torch.float32)
    optimizer = optimizer_of("DDCAdam", model, without_data(named_parameters(model)))
    with NoCrossings():
        optimizer.step()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda p: p.sum().item(),
    "bool": lambda p: bool(p.isfinite().all()),
    "nonzero": lambda p: p.nonzero(),
    "mask": lambda p: p[p > 0],
    "to the host": lambda p: p.detach().cpu(),
    "from the host": lambda p: torch.zeros(p.shape).to(p.device),
    "with the host's": lambda p: p + torch.zeros(3),
}


@pytest.mark.parametrize("kind", WAITS)
def test_waiting_would_be_seen(kind: str) -> None:
    class Waiting(DDCAdam):
        def step(self, closure: Any = None) -> Any:
            WAITS[kind](self.param_groups[0]["params"][0])
            return super().step(closure)

    optimizer = Waiting(without_data({"p": torch.empty(3)}).items())
    with NoCrossings(), pytest.raises((Crossing, RuntimeError)):
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_one_graph(name: str) -> None:
    """``fullgraph`` raises at a graph break; the captured step moves the weights as the eager one
    does.
    """
    moved = []
    for compiled in (False, True):
        model = make_model(CONFIGS["all gauges"])
        optimizer = optimizer_of(name, model, named_parameters(model))
        step = (
            torch.compile(optimizer.step, fullgraph=True, backend="eager")
            if compiled
            else optimizer.step
        )
        for seed in range(2):
            backward(model, seed)
            step()
        moved.append([p.detach().clone() for p in model.parameters()])
    for eager, captured in zip(*moved, strict=True):
        torch.testing.assert_close(eager, captured, rtol=1e-9, atol=1e-12)
