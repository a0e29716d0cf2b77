"""The trainings of claim W4 (:mod:`experiments.adapters.settings`).

python -m experiments.adapters.measure [CASE ...] [--runs FOLDER] [--results FOLDER]

Each training adds its record to the file of its case when it ends, and what is recorded is not run
again. The cases share nothing but the pretrained bases, in the folder of the runs, which whoever
needs them first makes; so two processes may measure different cases at a time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.optim import AdamW, Optimizer

from ddc import DDCAdam, canonicalise_
from ddc.report.runs import read_lines
from ddc.training.records import Records, provenance
from experiments.adapters.model import (
    PRETRAINING,
    SIZES,
    WARMING,
    Adapted,
    adapted,
    batch,
    loss_of,
    text,
    validation_loss,
)
from experiments.adapters.rite import LoRARite
from experiments.adapters.settings import (
    ADAMW,
    BATCH,
    BETAS,
    CASES,
    CONTEXT,
    DDCADAM,
    LORA_PLUS,
    RESULTS,
    RITE,
    RIVAL,
    STEPS,
    WARMUP,
    Case,
    Run,
    by_run,
    missing,
)
from experiments.output import save_records
from experiments.protocols import Stage


def adamw(model: Adapted, lr: float, ratio: float = 1.0) -> Optimizer:
    """AdamW; with a ratio LoRA+, whose rate for B is so many times that for A."""
    a, b = zip(*model.pairs, strict=True)
    groups: list[dict[str, Any]] = [{"params": a, "lr": lr}, {"params": b, "lr": lr * ratio}]
    return AdamW(groups, lr=lr, betas=BETAS, weight_decay=0.0)


def balanced(model: Adapted, lr: float) -> Optimizer:
    """AdamW from the balanced point of the orbit."""
    canonicalise_(model.model, model.gauges, verify=False)
    return adamw(model, lr)


MAKERS: dict[str, Callable[..., Optimizer]] = {
    ADAMW: adamw,
    RIVAL: balanced,
    LORA_PLUS: adamw,
    RITE: lambda model, lr: LoRARite(model.pairs, lr, BETAS),
    DDCADAM: lambda model, lr: DDCAdam(
        model.trained.items(), model.gauges, lr=lr, betas=BETAS, weight_decay=0.0
    ),
}


def share(step: int) -> float:
    """Of the learning rate at a step: a warm-up, then half a cosine."""
    warmup = WARMUP * STEPS
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Train the adapters of a run; its record.

    Args:
        run: what to train, where from and how.
        folder: of the pretrained bases.
    """
    began = time.perf_counter()
    model = adapted(CASES[run.case], run.seed, folder)
    model.begin(run.start, run.seed)
    optimizer = MAKERS[run.optimizer](model, *run.setting)
    rates = [group["lr"] for group in optimizer.param_groups]
    seconds: dict[str, list[float]] = {"gradient_seconds": [], "step_seconds": []}
    diverged = False
    for step in range(STEPS):
        times = [time.perf_counter()]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share(step)
        optimizer.zero_grad()
        loss = loss_of(model.model, *batch(step, run.seed))
        loss.backward()
        times.append(time.perf_counter())
        diverged = not bool(loss.isfinite())
        if diverged:
            break
        try:
            optimizer.step()
        except LinAlgError:  # eigenvalues of what is not finite
            diverged = True
            break
        times.append(time.perf_counter())
        for i, each in enumerate(seconds.values()):
            each.append(times[i + 1] - times[i])
    loss_at_end = math.nan if diverged else validation_loss(model.model)
    diverged = not math.isfinite(loss_at_end)
    return {
        **run.about,
        "loss": None if diverged else loss_at_end,
        "diverged": diverged,
        "seconds": time.perf_counter() - began,
        **{key: statistics.median(each) if each else None for key, each in seconds.items()},
    }


def configuration(case: Case) -> dict[str, Any]:
    """What all runs of a case share."""
    model = {**SIZES, "rank": case.rank, "warm": case.warm}
    training = {"steps": STEPS, "warmup": WARMUP, "betas": BETAS, "batch": BATCH, "decay": 0.0}
    return {
        "model": model,
        "training": training | {"context": CONTEXT},
        "pretraining": PRETRAINING,
        "warming": WARMING,
    }


def measure(case: Case, folder: Path, results: Path) -> None:
    """Run what a case lacks, round by round."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{case.name}_runs.jsonl"
    save_records(path, read_lines(path))  # without a line that a kill has cut off
    records = Records(path)
    about = {"config": configuration(case), "data": text(True).source, **provenance()}
    about["versions"]["peft"] = importlib.metadata.version("peft")
    while runs := missing(case, by_run(read_lines(records.path))):
        for run in track(runs, f"{case.name}, {runs[0].start} and on"):
            records.append({**train(run, folder), **about})


def status(runs: str) -> list[Stage]:
    """How far each case is; what it needs follows from runs that are missing until it is tuned."""
    found = []
    for case in CASES.values():
        records = read_lines(RESULTS / f"{case.name}_runs.jsonl")
        seconds = statistics.mean(record["seconds"] for record in records) if records else None
        needed = None if missing(case, by_run(records)) else len(records)
        found.append(Stage(case.name, needed, len(records), 0, seconds))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure cases, all of them if none is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the bases")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    chosen = parser.parse_args(arguments)
    if unknown := {*chosen.cases} - {*CASES}:
        parser.error(f"no case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for name in chosen.cases or CASES:
        measure(CASES[name], chosen.runs / "adapters", chosen.results)


if __name__ == "__main__":
    main()
