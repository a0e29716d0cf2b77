"""Time and memory of an optimizer's step: ``python -m benchmarks.speed`` writes
results/benchmark/speed.json and .md.

For each model, all optimizers act on the same weights and take turns in one process, in an order
drawn anew at every turn, so that a drift of the machine's speed, and what the one before leaves in
the caches, meet all alike. Figures are medians over turns; ratios are medians of the ratios of one
turn. Each model's results are written as they come, into the record that is there: ``--models``
measures a part anew.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.report import BASES, speed_table
from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import (
    Chain,
    Gauge,
    GaugeSet,
    Rescale,
    complete_kinds,
    named_parameters,
    paper_kinds,
)
from ddc.models import GPT, GPTConfig, cross_entropy
from ddc.models.deep_mlp import DeepMLP, DeepMLPConfig
from ddc.models.vit import ViTConfig, vision_transformer
from ddc.optim import Lift, respected
from ddc.optim.combined import CombinedOptimizer
from ddc.optim.muon import Muon
from ddc.training.allocator import keep_freed_memory
from ddc.training.loop import grad_norm
from ddc.training.records import provenance, write_atomically, write_json

PEERS = "pytorch-optimizer"
LR = 1e-5
#: Turns of an action that takes more than SLOW seconds, whatever the others have.
FEW, SLOW = 3, 20.0
COPIED_BYTES = 2**28


@dataclass(frozen=True)
class Case:
    """A model, one batch for it, and how many turns its optimizers take.

    ``too_slow`` are left out on a CPU; ``only``, where it is given, says which are measured at all,
    in place of :data:`USUAL`.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    batch_title: str
    turns: int
    too_slow: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


def text_case(
    title: str,
    config: GPTConfig,
    turns: int,
    sequences: int,
    tokens: int,
    vocabulary: int = 256,
    **options: Any,
) -> Case:
    """A language model on random tokens."""

    def batch() -> tuple[Tensor, Tensor]:
        drawn = torch.randint(vocabulary, (sequences, tokens + 1))
        return drawn[:, :-1], drawn[:, 1:]

    batch_title = f"{sequences} sequences of {tokens} tokens"
    return Case(title, lambda: GPT(config, vocabulary), batch, batch_title, turns, **options)


def vit_s(title: str, images: int, **options: Any) -> Case:
    """ViT-S on random images."""

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(images, 3, 224, 224), torch.randint(1000, (images,))

    return Case(
        title,
        lambda: vision_transformer(VIT_S, (3, 224, 224), 1000),
        batch,
        f"{images} images of 224 × 224",
        **options,
    )


VIT_S = ViTConfig(patch=16, layers=12, width=384, heads=6, hidden=1536)
GPT_10M = GPTConfig(layers=6, width=384, heads=6, kv_heads=2, hidden=1024)
GPT_124M = GPTConfig(layers=12, width=768, heads=12, kv_heads=12, hidden=2048, tied_head=True)
#: They orthogonalise in bfloat16, which many CPUs emulate: too slow for the large models there.
BFLOAT16 = ("torch.optim.Muon", "Muon, pytorch-optimizer")
#: Under all exact kinds that they take; measured on models of their own.
COMPLETE = ("DDCAdam kernels, complete group", "DDCMuon kernels, complete group")
PAPER_AND_COMPLETE = ("AdamW fused", "DDCAdam kernels", "Muon", "DDCMuon kernels", *COMPLETE)
IN_A_LARGER_BATCH = ("AdamW fused", "DDCAdam kernels")
CASES = {
    "gpt-1m": text_case("GPT 0.8M", GPTConfig(), 60, 16, 128),
    "gpt-10m": text_case("GPT 10M", GPT_10M, 20, 16, 128, too_slow=BFLOAT16),
    "gpt-124m": text_case(
        "GPT 124M", GPT_124M, 5, 1, 128, 50257, too_slow=(*BFLOAT16, "SOAP, pytorch-optimizer")
    ),
    "gpt-124m-8": text_case(
        "GPT 124M, 8 sequences", GPT_124M, 5, 8, 128, 50257, only=IN_A_LARGER_BATCH
    ),
    "vit-s": vit_s("ViT-S 22M", 2, turns=10, too_slow=BFLOAT16),
    "vit-s-32": vit_s("ViT-S 22M, 32 images", 32, turns=5, only=IN_A_LARGER_BATCH),
    "gpt-1m-complete": text_case(
        "GPT 0.8M, complete group", GPTConfig(), 60, 16, 128, only=PAPER_AND_COMPLETE
    ),
    "vit-s-complete": vit_s("ViT-S 22M, complete group", 2, turns=10, only=PAPER_AND_COMPLETE),
    "deep-mlp": Case(
        "deep MLP 0.25M",
        lambda: DeepMLP(DeepMLPConfig(depth=24, width=96), 97, 97),
        lambda: (torch.randint(97, (256, 2)), torch.randint(97, (256,))),
        "256 pairs",
        100,
    ),
}
#: Sizes of a GPT along which the time of a step is followed, one at a time.
SCALING: dict[str, dict[int, GPTConfig]] = {
    "width": {
        n: GPTConfig(width=n, heads=n // 32, kv_heads=n // 32, hidden=8 * n // 3)
        for n in (96, 192, 384, 576, 768)
    },
    "depth": {n: GPTConfig(layers=n, kv_heads=4) for n in (4, 8, 16, 32, 48)},
    "heads": {n: GPTConfig(width=256, heads=n, kv_heads=n, hidden=688) for n in (2, 4, 8, 16)},
}


class Subject:
    """A model with its gauges, and its parameters as Muon and AdamW share them."""

    def __init__(self, model: nn.Module, verify: bool = True) -> None:
        self.model, self.hidden = model, hidden_matrices(model)
        self.gauges, self.verify = find_gauges(model, verify=verify), verify
        names = {matrix.parameter for matrix in self.hidden}
        parameters = named_parameters(model)
        self.matrices = [(name, p) for name, p in parameters.items() if name in names]
        self.rest = [(name, p) for name, p in parameters.items() if name not in names]
        #: what is decomposed: its norms must be known before it can move
        self.in_orbits = names.union(
            *(g.parameters for g in self.gauges if isinstance(g, Rescale | Chain))
        )

    @functools.cached_property
    def complete(self) -> GaugeSet:
        """All exact kinds, also those that another contains."""
        kinds = dict.fromkeys((*complete_kinds(), *paper_kinds()))
        return find_gauges(self.model, kinds=[*kinds], verify=self.verify)

    def with_adamw(self, muon: Optimizer) -> Optimizer:
        """Muon's part and fused AdamW for the rest, as the configurations have it."""
        return CombinedOptimizer((muon, AdamW(self.rest, lr=LR, fused=True)))


def peer(name: str) -> Any:
    """An optimizer of pytorch-optimizer; ImportError where that is not installed."""
    return getattr(importlib.import_module("pytorch_optimizer"), name)


def peer_muon(s: Subject) -> Optimizer:
    groups = [
        {"params": [p for _, p in s.matrices], "use_muon": True},
        {"params": [p for _, p in s.rest], "use_muon": False},
    ]
    optimizer: Optimizer = peer("Muon")(groups, lr=LR, adamw_lr=LR)
    return optimizer


def ddcmuon(s: Subject, fused: bool = False, **options: Any) -> Optimizer:
    return DDCMuon(
        s.model.named_parameters(), s.gauges, s.hidden, lr=LR, adam_lr=LR, fused=fused, **options
    )


def under_complete_group(
    s: Subject, make: Callable[[Any, Sequence[Gauge]], Optimizer]
) -> Optimizer:
    """An optimizer under all exact kinds that it takes."""
    parameters = [*s.model.named_parameters()]
    return make(parameters, respected(make, parameters, s.complete).found)


OPTIMIZERS: dict[str, Callable[[Subject], Optimizer]] = {
    "AdamW foreach": lambda s: AdamW(s.model.parameters(), lr=LR, foreach=True),
    "AdamW fused": lambda s: AdamW(s.model.parameters(), lr=LR, fused=True),
    "DDCAdam eager": lambda s: DDCAdam(s.model.named_parameters(), s.gauges, lr=LR, fused=False),
    "DDCAdam kernels": lambda s: DDCAdam(s.model.named_parameters(), s.gauges, lr=LR),
    "DDCAdam compiled": lambda s: DDCAdam(
        s.model.named_parameters(), s.gauges, lr=LR, compiled=True
    ),
    "torch.optim.Muon": lambda s: s.with_adamw(torch.optim.Muon(s.matrices, lr=LR)),
    "Muon": lambda s: s.with_adamw(Muon(s.matrices, lr=LR)),
    "DDCMuon eager": ddcmuon,
    "DDCMuon kernels": lambda s: ddcmuon(s, fused=True),
    "DDCMuon compiled": lambda s: ddcmuon(s, compiled=True),
    "Muon, pytorch-optimizer": peer_muon,
    "AdamP, pytorch-optimizer": lambda s: peer("AdamP")(s.model.parameters(), lr=LR),
    "SOAP, pytorch-optimizer": lambda s: peer("SOAP")(s.model.parameters(), lr=LR),
    COMPLETE[0]: lambda s: under_complete_group(
        s, lambda named, gauges: DDCAdam(named, gauges, lr=LR)
    ),
    COMPLETE[1]: lambda s: under_complete_group(
        s, lambda named, gauges: DDCMuon(named, gauges, s.hidden, lr=LR, adam_lr=LR)
    ),
}
#: What a model is measured with that says nothing of it.
USUAL = tuple(name for name in OPTIMIZERS if name not in COMPLETE)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """How long an action takes, until an accelerator is done with it."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    start = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - start


def take_turns(
    actions: Mapping[str, Callable[[], object]], turns: int, device: torch.device, title: str
) -> dict[str, list[float]]:
    """Seconds of every action at every turn, those of the first :data:`FEW` turns alone where it is
    slow.
    """
    draw, times, left = random.Random(0), {name: list[float]() for name in actions}, list(actions)
    for turn in track(range(turns), title):
        if turn == FEW:
            left = [name for name in actions if statistics.median(times[name]) < SLOW]
        for name in draw.sample(left, len(left)):
            times[name].append(seconds(actions[name], device))
    return times


def summarize(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Milliseconds, median and mean, and the median ratio to each base at the same turn."""
    return {
        name: {
            "turns": len(values),
            "ms": 1e3 * statistics.median(values),
            "mean ms": 1e3 * statistics.fmean(values),
            **{
                f"ratio to {base}": statistics.median(
                    a / b for a, b in zip(values, times[base], strict=False)
                )
                for base in BASES
                if base in times
            },
        }
        for name, values in times.items()
    }


def copy_bandwidth(device: torch.device) -> list[float]:
    """Bytes that a large copy reads and writes in a second, ten times."""
    source = torch.zeros(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return [2 * COPIED_BYTES / seconds(lambda: target.copy_(source), device) for _ in range(11)][1:]


def tensors(value: Any) -> Iterable[Tensor]:
    """All tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def bytes_of(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def least_bytes(optimizer: Optimizer, subject: Subject) -> int:
    """What a step must move if it keeps nothing between passes over the weights (docs/speed.md).

    Weights and gradients are read, weights written, the state is read and written: 28 bytes a
    parameter for AdamW in float32. In orbits, two passes more: norms and inner products need
    weights and gradients before all else, and the update, whose norm must be known before it is
    applied, is worked out again from the state: 48.
    """
    total = 0
    for name, p in named_parameters(subject.model).items():
        weights, state = bytes_of(p), bytes_of(optimizer.state[p])
        total += 3 * weights + 2 * state
        if isinstance(optimizer, Lift) and name in subject.in_orbits:
            total += 3 * weights + state
    return total


def captured(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step another one replays, or the optimizer itself."""
    inner: Optimizer = getattr(optimizer, "captured", optimizer)
    return inner


class Bench:
    """A model and a batch, on which optimizers take turns: whole training steps with clipping, and
    the optimizer's step within each.

    Args:
        case: model and batch.
        device: where.
        autocast: what the forward and backward pass are cast to; None for float32.
        verify: as for :func:`ddc.find_gauges`.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        autocast: torch.dtype | None = None,
        verify: bool = True,
    ) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.subject = Subject(case.build().to(device), verify)
        self.inputs, self.targets = (each.to(device) for each in case.batch())
        self.mixed = torch.autocast(device.type, autocast, enabled=autocast is not None)
        self.optimizers: dict[str, Optimizer] = {}
        self.steps: dict[str, list[float]] = {}

    def add(self, name: str, optimizer: Optimizer) -> None:
        self.optimizers[name], self.steps[name] = optimizer, []

    def gradients(self, optimizer: Optimizer) -> None:
        """Forward and backward pass, and clipping, as an optimizer asks for it."""
        model = self.subject.model
        optimizer.zero_grad()
        with self.mixed:
            loss = cross_entropy(model(self.inputs), self.targets)
        loss.backward()
        norm = grad_norm(model, captured(optimizer))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)

    def training_step(self, name: str) -> None:
        """The optimizer's step in it is timed where that disturbs nothing: an accelerator would
        have to wait for it.
        """
        self.gradients(self.optimizers[name])
        if self.device.type == "cpu":
            self.steps[name].append(seconds(self.optimizers[name].step, self.device))
        else:
            self.optimizers[name].step()

    def measure(self, names: Collection[str], turns: int) -> dict[str, dict[str, Any]]:
        """Times, state and least traffic of some of the optimizers, by name."""
        whole = {name: functools.partial(self.training_step, name) for name in names}
        for name in track(names, f"{self.case.title}: warming up"):
            whole[name]()
            whole[name]()
        for name in names:
            self.steps[name].clear()
        times = {"whole": take_turns(whole, turns, self.device, self.case.title)}
        if self.device.type == "cpu":
            times["step"] = {name: self.steps[name] for name in names}
        else:
            alone = {name: self.optimizers[name].step for name in names}
            times["step"] = take_turns(alone, turns, self.device, self.case.title)
        summaries = {kind: summarize(by_optimizer) for kind, by_optimizer in times.items()}
        return {
            name: {
                **{kind: summaries[kind][name] for kind in ("step", "whole")},
                "state_bytes": sum(map(bytes_of, self.optimizers[name].state.values())),
                "least_bytes": least_bytes(captured(self.optimizers[name]), self.subject),
            }
            for name in names
        }


def measure(case: Case, turns: int, device: torch.device) -> dict[str, Any]:
    """One model with all optimizers."""
    bench, results = Bench(case, device), dict[str, dict[str, Any]]()
    for name, make in OPTIMIZERS.items():
        if name not in (case.only or USUAL):
            continue
        results[name] = {}
        if device.type == "cpu" and name in case.too_slow:
            results[name]["skipped"] = "it takes too long on a CPU"
            continue
        try:
            bench.add(name, make(bench.subject))
        except ImportError as error:
            results[name]["skipped"] = f"{error.name} is not installed"
    bandwidth = copy_bandwidth(device)
    results |= bench.measure(bench.optimizers.keys(), turns)
    bandwidth += copy_bandwidth(device)
    return {
        "parameters": sum(p.numel() for p in bench.subject.model.parameters()),
        "batch": case.batch_title,
        "copy_bandwidth": statistics.median(bandwidth),
        "optimizers": results,
        **conditions(turns, device),
    }


def measure_scaling(turns: int, device: torch.device) -> dict[str, Any]:
    """The step alone along width, depth and number of heads, on random gradients."""
    names = ("AdamW fused", "DDCAdam eager", "DDCAdam kernels", "Muon", "DDCMuon kernels")
    along: dict[str, Any] = {}
    for axis, configs in SCALING.items():
        along[axis] = {
            "sizes": [*configs],
            "parameters": [],
            "optimizers": {name: [] for name in names},
        }
        for size, config in configs.items():
            torch.manual_seed(0)
            subject = Subject(GPT(config, 256).to(device))
            for p in subject.model.parameters():
                p.grad = torch.randn_like(p)
            steps = {name: OPTIMIZERS[name](subject).step for name in names}
            for step in steps.values():
                step()
            times = summarize(take_turns(steps, turns, device, f"GPT, {axis} {size}"))
            along[axis]["parameters"].append(sum(p.numel() for p in subject.model.parameters()))
            for name in names:
                along[axis]["optimizers"][name].append(times[name])
    return {"along": along, **conditions(turns, device)}


def conditions(turns: int, device: torch.device) -> dict[str, Any]:
    """Under which a part of the record was made."""
    about = provenance()
    try:
        about["versions"][PEERS] = importlib.metadata.version(PEERS)
    except importlib.metadata.PackageNotFoundError:
        about["versions"][PEERS] = None
    return {
        "turns": turns,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "seed": 0,
        **about,
    }


def main() -> None:
    """Measure, and write the record and the table after each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = [*CASES, "scaling"]
    parser.add_argument(
        "--models", nargs="+", choices=parts, default=parts, metavar="MODEL", help=", ".join(parts)
    )
    parser.add_argument("--turns", type=int, help="turns of each part (as many as the part says)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path, default=Path("results/benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "speed.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"models": {}}
    for part in arguments.models:
        if part == "scaling":
            record["scaling"] = measure_scaling(arguments.turns or 30, arguments.device)
        else:
            case = CASES[part]
            measured = {
                **record["models"],
                case.title: measure(case, arguments.turns or case.turns, arguments.device),
            }
            record["models"] = {
                c.title: measured[c.title] for c in CASES.values() if c.title in measured
            }
        write_json(path, record)
        write_atomically(path.with_suffix(".md"), speed_table(record).encode())
    print(speed_table(record))


if __name__ == "__main__":
    main()
