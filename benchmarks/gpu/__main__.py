"""Checks, speed, over-training and vision on a GPU, in as many minutes as are given:
``python -m benchmarks.gpu --minutes 9``.

Stages run in this order, each in a process of its own and within its own time; one that takes
longer is stopped, and what it has recorded stays. What is recorded for this commit and card in
``results/gpu`` is not done again (a run of training whatever the commit), so the same command goes
on where it was stopped. Where there is no ``.git``, ``--commit`` says which commit this is. At the
end stands a table of all records.

``--device cpu --tiny`` does everything in its smallest form, on any machine; only ``--minutes``
limits its stages.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.record import RESULTS, ROOT, Place, all_records, as_arguments, from_arguments
from benchmarks.gpu.report import summary
from ddc.training.records import commit, write_atomically

#: Seconds from the request to end to the end: a run saves a checkpoint.
GRACE = 15.0


@dataclass(frozen=True)
class Stage:
    """A function of a module, and its time in seconds: at most so long, and so long is kept for it
    while others run.
    """

    name: str
    function: str
    most: float
    kept: float = 0.0


STAGES = (
    Stage("checks", "checks.stage", 90),
    Stage("speed", "speed.stage", 150),
    Stage("overtraining", "training.overtraining", 3600),
    Stage("vision", "training.vision", 300, kept=60),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages, and print and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--minutes", type=float, default=9.0, help="for all together (9)")
    parser.add_argument("--stages", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="everything in its smallest form")
    parser.add_argument("--commit", help="of this code, where there is no .git")
    parser.add_argument("--output", type=Path, help="folder of the records (results/gpu)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (runs)")
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.stage:
        name, place = given.stage
        run_stage(next(stage for stage in STAGES if stage.name == name), from_arguments([place]))
        return
    chosen = given.stages.split(",")
    if unknown := sorted({*chosen} - {*names}):
        parser.error(f"--stages {unknown[0]}: expected some of {','.join(names)}")
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(
            1,
            "torch finds no GPU here: --device cpu --tiny does everything in its smallest form on"
            " the CPU\n",
        )
    if given.commit:
        os.environ["DDC_COMMIT"] = given.commit
    if commit() is None:
        parser.error("--commit is needed: there is no .git that tells which commit this is")
    small = ROOT / "build/gpu-tiny"
    folder = given.output or (small / "results" if given.tiny else RESULTS)
    runs = given.runs or (small / "runs" if given.tiny else ROOT / "runs")
    end = time.time() + 60 * given.minutes
    place = Place(given.device, given.tiny, folder.resolve(), runs.resolve(), end)
    print(f"{place.card}, commit {commit()}, {given.minutes:g} minutes", flush=True)
    stages = [stage for stage in STAGES if stage.name in chosen]
    for i, stage in enumerate(stages):
        until = end - sum(later.kept for later in stages[i + 1 :])
        if not given.tiny:  # which says whether all stages work, however slow the machine is
            until = min(until, time.time() + stage.most)
        watch(stage, dataclasses.replace(place, until=until))
    text = summary(all_records(folder))
    print(text)
    if folder.exists():
        write_atomically(folder / "summary.md", text.encode())


def run_stage(stage: Stage, place: Place) -> None:
    """A stage, in its own process."""
    module, function = stage.function.split(".")
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device.index or 0)
    try:
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(place)
    except KeyboardInterrupt as stopped:
        print(f"{stage.name}: {stopped}", flush=True)


def watch(stage: Stage, place: Place) -> None:
    """Run a stage in a process, and end that, with all that it started, in time."""
    left = place.left - GRACE
    if left <= 0:
        print(f"{stage.name}: no time is left", flush=True)
        return
    own = dataclasses.replace(place, until=place.until - GRACE)
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage.name, *as_arguments(own)]
    began = time.time()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(left)
        said = "" if code == 0 else f", ended with status {code}"
    except subprocess.TimeoutExpired:
        said = ", stopped at the end of its time"
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    print(f"{stage.name}: {time.time() - began:.0f} s{said}", flush=True)


if __name__ == "__main__":
    main()
