"""Time, traffic, launches and memory of a step, on the device.

Two models in batches that fill a card of 80 GB, under bfloat16 autocast. A part has some of the
optimizers beside those that they are compared to, in turns, as on a CPU (:mod:`benchmarks.speed`).
What is most worth knowing comes first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.graph import InGraph
from benchmarks.gpu.record import NotHere, Place, Record
from benchmarks.speed import (
    GPT_124M,
    LR,
    OPTIMIZERS,
    Bench,
    Case,
    Subject,
    bytes_of,
    copy_bandwidth,
    ddcmuon,
    text_case,
    vit_s,
)
from ddc import DDCAdam
from ddc.models import GPTConfig

TURNS = 10
BASES = ("AdamW fused", "torch.optim.Muon")
#: What is measured together; the first of each are what the others are compared to.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "fused": (*BASES, "DDCAdam fused", "DDCMuon fused"),
    "in a graph": (*BASES, "DDCAdam in a graph", "DDCMuon in a graph"),
    "eager": (*BASES, "AdamW foreach", "DDCAdam eager", "DDCMuon eager"),
    "DDCAdam compiled": ("AdamW fused", "DDCAdam compiled"),
    "DDCMuon compiled": ("torch.optim.Muon", "DDCMuon compiled"),
}
#: How torch's Muon orthogonalises.
AS_TORCH: dict[str, Any] = {"orthogonalizer": "newton_schulz_bfloat16"}
MAKERS: Mapping[str, Callable[[Subject], Optimizer]] = {
    **OPTIMIZERS,
    "DDCAdam fused": lambda s: DDCAdam(s.model.named_parameters(), s.gauges, lr=LR),
    "DDCMuon eager": lambda s: ddcmuon(s, **AS_TORCH),
    "DDCMuon fused": lambda s: ddcmuon(s, fused=True, **AS_TORCH),
    "DDCMuon compiled": lambda s: ddcmuon(s, compiled=True, **AS_TORCH),
}
#: Of the smallest form: a compiler takes longer than all else.
TINY_GROUPS = ("eager", "in a graph")


def cases(tiny: bool) -> dict[str, list[Case]]:
    """Models, each in batches from the largest on: a smaller one where memory does not hold it."""
    if tiny:
        config = GPTConfig(context=16, layers=1, width=32, heads=2, kv_heads=1, hidden=32)
        return {"GPT": [text_case("GPT, tiny", config, 1, 2, 16)]}
    gpt = dataclasses.replace(GPT_124M, context=1024)
    return {
        "GPT 124M": [text_case("GPT 124M", gpt, TURNS, n, 1024, 50257) for n in (32, 16, 8)],
        "ViT-S": [vit_s("ViT-S 22M", n, turns=TURNS) for n in (512, 256, 128)],
    }


class Speed:
    """The benches of one process, each made when it is first asked for."""

    def __init__(self, place: Place) -> None:
        self.place, self.device = place, place.device
        self.benches: dict[str, Bench] = {}
        torch.set_num_threads(1 if place.tiny else 8)

    def parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What is most worth having first: each group on both models before the next."""
        groups = TINY_GROUPS if self.place.tiny else tuple(GROUPS)
        models = cases(self.place.tiny)
        return {
            f"{model}, {group}": functools.partial(self.measure, model, group)
            for group, model in itertools.product(groups, models)
        }

    def measure(self, model: str, group: str) -> dict[str, Any]:
        """A group of optimizers on a model."""
        if "graph" in group and self.device.type != "cuda":
            raise NotHere("CUDA graphs need a GPU")
        bench = self.bench(model)
        names = GROUPS[group]
        try:
            for name in names:
                if name not in bench.optimizers:
                    bench.add(name, made(name, bench))
            bandwidth = copy_bandwidth(self.device)
            found = bench.measure(names, bench.case.turns)
            bandwidth += copy_bandwidth(self.device)
            for name in names:
                found[name] |= self.counted(bench, name)
        finally:
            for name in set(bench.optimizers) - set(BASES):  # their state would fill the card
                del bench.optimizers[name], bench.steps[name]
        return {
            "model": bench.case.title,
            "parameters": sum(p.numel() for p in bench.subject.model.parameters()),
            "batch": bench.case.batch_title,
            "copy_bandwidth": statistics.median(bandwidth),
            "optimizers": found,
        }

    def bench(self, model: str) -> Bench:
        """Of a model, in the largest batch that memory holds."""
        if model not in self.benches:
            for case in cases(self.place.tiny)[model]:
                try:
                    bench = Bench(case, self.device, torch.bfloat16, verify=False)
                    bench.add("AdamW fused", made("AdamW fused", bench))
                    bench.training_step("AdamW fused")
                except torch.OutOfMemoryError:
                    continue
                self.benches[model] = bench
                break
            else:
                raise MemoryError(f"no batch of {model} fits")
        return self.benches[model]

    def counted(self, bench: Bench, name: str) -> dict[str, Any]:
        """Launches of a step, and the peak of a training step's memory with one optimizer alone."""
        optimizer = bench.optimizers[name]
        if self.device.type != "cuda":
            with Operations() as operations:
                optimizer.step()
            return {"operations": operations.count}
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            optimizer.step()
            torch.cuda.synchronize(self.device)
        events = profiler.events() or []
        launches = sum("Launch" in each.name and each.name.startswith("cu") for each in events)
        kernels = [
            each
            for each in events
            if each.device_type.name == "CUDA" and not each.is_user_annotation
        ]
        optimizer.zero_grad()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        bench.training_step(name)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        own = bytes_of([*bench.subject.model.parameters()])
        own += sum(bytes_of(dict(each)) for each in optimizer.state.values())
        return {
            "launches": launches,
            "kernels": len(kernels),
            "device_ms": sum(each.time_range.elapsed_us() for each in kernels) / 1e3,
            "peak_bytes": peak + own,
        }


def made(name: str, bench: Bench) -> Optimizer:
    """An optimizer for a bench, by its name in a table."""
    if name.endswith(" in a graph"):
        return InGraph(MAKERS[name.replace(" in a graph", " fused")](bench.subject))
    return MAKERS[name](bench.subject)


class Operations(TorchDispatchMode):
    """Counts operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def stage(place: Place) -> None:
    """Make the record of the speed."""
    speed = Speed(place)
    Record(place, "speed").make(speed.parts())
