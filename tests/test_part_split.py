"""A model of which FSDP2 splits a part, and one of which a part is frozen: two processes take the
steps of one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import audit, named_parameters, whole
from ddc.models import GPTConfig
from ddc.optim import clip_grad_norm_
from experiments.equivariance.measure import random_model

VOCABULARY, STEPS = 19, 5
CONFIG = GPTConfig(context=12, layers=2, width=18, heads=3, hidden=11, kv_heads=1)


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("blocks").children())


def ends(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule("head")]


#: What is split, and what is frozen first, by name.
PARTS: dict[str, tuple[Callable[[nn.Module], list[nn.Module]], str]] = {
    "blocks": (blocks, ""),
    "one block": (lambda model: blocks(model)[:1], ""),
    "blocks, one frozen": (blocks, "blocks.0"),
    "blocks, embedding frozen": (blocks, "embedding"),
}
#: Parts that a gauge links with what is not split.
LINKED: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "head": ends,
    "down": lambda model: [blocks(model)[0].get_submodule("mlp.down")],
}


def made(optimizer: str, frozen: str) -> tuple[nn.Module, Any, Any]:
    model = random_model(CONFIG, VOCABULARY, 0, torch.float64)
    for name, p in model.named_parameters():
        if frozen and name.startswith(frozen):
            p.requires_grad = False
    gauges = find_gauges(model).among(model.named_parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    hidden = [each for each in hidden_matrices(model) if each.parameter in trained]
    return model, gauges, hidden if optimizer == "DDCMuon" else None


def optimizer_of(name: str, model: nn.Module, gauges: Any, hidden: Any) -> Any:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if name == "DDCMuon":
        return DDCMuon(named, gauges, hidden, lr=0.05, adam_lr=1e-2, orthogonalizer="polar")
    return DDCAdam(named, gauges, lr=1e-2, weight_decay=0.1)


def trajectory(name: str, part: str, ranks: int, rank: int) -> dict[str, Any]:
    """Weights and norms of gradients after some steps."""
    split, frozen = PARTS[part]
    model, gauges, hidden = made(name, frozen)
    if ranks > 1:
        for module in split(model):
            fully_shard(module)
    optimizer = optimizer_of(name, model, gauges, hidden)
    norms, largest = [], 0.0
    for seed in range(STEPS):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCABULARY, (4, 13), generator=generator).chunk(ranks)[rank]
        optimizer.zero_grad()
        cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for p in model.parameters():  # what is not split nobody averages
            if ranks > 1 and p.grad is not None and not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= ranks
        norms.append(float(whole(clip_grad_norm_(optimizer, 1.0))))
        if not frozen and not seed:
            largest = max(audit(model, gauges).values())
        optimizer.step()
    weights = {key: whole(p.detach()).clone() for key, p in named_parameters(model).items()}
    return {"weights": weights, "norms": torch.tensor(norms), "audit": largest}


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name in ("DDCAdam", "DDCMuon"):
        for part in PARTS:
            results[f"{name}, {part}"] = trajectory(name, part, 2, rank)
        for part, split in LINKED.items():
            model, gauges, hidden = made(name, "")
            for module in split(model):
                fully_shard(module)
            try:
                optimizer_of(name, model, gauges, hidden)
                results[f"{name}, {part}"] = ""
            except ValueError as error:
                results[f"{name}, {part}"] = str(error)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("part")
    mp.spawn(process, (folder,), nprocs=2)
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["DDCAdam", "DDCMuon"])
@pytest.mark.parametrize("part", PARTS)
def test_the_trajectory_is_that_of_one_process(
    optimizer: str, part: str, results: dict[str, Any]
) -> None:
    found, expected = results[f"{optimizer}, {part}"], trajectory(optimizer, part, 1, 0)

    def difference(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    assert difference(found["norms"], expected["norms"]) < 1e-9
    for key, weight in expected["weights"].items():
        assert difference(found["weights"][key], weight) < 1e-9, key
    assert found["audit"] < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["DDCAdam", "DDCMuon"])
@pytest.mark.parametrize("part", LINKED)
def test_what_a_gauge_links_with_what_is_whole_is_refused(
    optimizer: str, part: str, results: dict[str, Any]
) -> None:
    message = results[f"{optimizer}, {part}"]
    assert "are linked by gauges, and not split over the same ranks" in message
    assert " is split over 2 ranks" in message
    assert " is whole on each rank" in message
    assert "Shard all parameters of a gauge over one mesh, or none of them" in message
