"""Time of an optimizer step and of a whole training step: ``python -m benchmarks.optimizer_step`` (``make benchmark``).

All optimizers take turns in one process, so that a drift of the machine's speed meets all alike. Figures are medians;
ratios are medians of the ratios of one turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.optim import AdamW, Optimizer

from ddc import DDCAdam, find_gauges
from ddc.models import GPT, GPTConfig, cross_entropy
from ddc.training.loop import grad_norm
from ddc.training.records import provenance, write_atomically

VOCABULARY, BATCH = 256, 16
MODELS = {
    "0.8M (scale=cpu)": GPTConfig(),
    "10M": GPTConfig(layers=6, width=384, heads=6, kv_heads=2, hidden=1024),
}
OPTIMIZERS: dict[str, Callable[[GPT], Optimizer]] = {
    "AdamW foreach": lambda model: AdamW(model.parameters(), lr=1e-5, foreach=True),
    "AdamW fused": lambda model: AdamW(model.parameters(), lr=1e-5, fused=True),
    "DDCAdam, no gauges": lambda model: DDCAdam(model.named_parameters(), lr=1e-5),
    "DDCAdam, all gauges": lambda model: DDCAdam(model.named_parameters(), find_gauges(model), lr=1e-5),
}


def time_once(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(config: GPTConfig, turns: int, title: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of every turn, for the optimizer step alone and for a whole training step with clipping."""
    torch.manual_seed(0)
    model = GPT(config, VOCABULARY)
    optimizers = {name: make(model) for name, make in OPTIMIZERS.items()}
    tokens = torch.randint(VOCABULARY, (BATCH, config.context + 1))

    def training_step(optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        norm = grad_norm(model, optimizer)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
        optimizer.step()

    times: dict[str, dict[str, list[float]]] = {
        "step": {n: [] for n in optimizers},
        "whole": {n: [] for n in optimizers},
    }
    for optimizer in optimizers.values():  # warm up
        training_step(optimizer)
    for _ in track(range(turns), title):
        for name, optimizer in optimizers.items():
            times["step"][name].append(time_once(optimizer.step))
    for _ in track(range(max(3, turns // 5)), f"{title}, whole step"):
        for name, optimizer in optimizers.items():
            times["whole"][name].append(time_once(lambda optimizer=optimizer: training_step(optimizer)))  # type: ignore[misc]
    return times


def summarize(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median milliseconds, and median ratio to each AdamW of the same turn."""
    return {
        name: {
            "ms": 1e3 * statistics.median(values),
            **{
                f"ratio to {base}": statistics.median(a / b for a, b in zip(values, times[base], strict=True))
                for base in ("AdamW foreach", "AdamW fused")
            },
        }
        for name, values in times.items()
    }


def table(record: dict[str, Any]) -> str:
    """Markdown of one record."""
    lines = [
        "| model | optimizer | step, ms | / AdamW foreach | / AdamW fused | whole training step / AdamW fused |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model, results in record["results"].items():
        for name, step in results["step"].items():
            whole = results["whole"][name]["ratio to AdamW fused"]
            lines.append(
                f"| {model} | {name} | {step['ms']:.2f} | {step['ratio to AdamW foreach']:.2f} "
                f"| {step['ratio to AdamW fused']:.2f} | {whole:.3f} |"
            )
    machine = record["machine"]
    lines += [
        "",
        f"Medians over {record['turns']} turns, one thread of {machine['cpu']}, float32, eager. Whole training step: "
        f"forward, backward, clipping and optimizer on {BATCH} sequences. Commit {record['commit']}. "
        "Made by `make benchmark`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("results/benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, config in MODELS.items():
        times = measure(config, arguments.turns, name)
        results[name] = {kind: summarize(by_optimizer) for kind, by_optimizer in times.items()}
    record = {"results": results, "turns": arguments.turns, "seed": 0, **provenance()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output / "optimizer_step.json", (json.dumps(record, indent=2) + "\n").encode())
    write_atomically(arguments.output / "optimizer_step.md", table(record).encode())
    print(table(record))


if __name__ == "__main__":
    main()
