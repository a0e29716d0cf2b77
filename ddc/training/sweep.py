"""Sweeps: many runs of ``train.py``, listed in a file, that can be stopped and started again.

A sweep file has one run a line, as the overrides of its configuration; empty lines and lines that
begin with # are left out. A run is complete if the folder that its resolved configuration names has
a summary. One that diverged is a result too, and is not run again; one that a process is at work on
is left to it.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from joblib import Parallel, delayed
from rich.progress import Progress

from ddc.training.command import draw, run_config
from ddc.training.compose import compose_alike
from ddc.training.run_folder import OUTPUT, STATES, state_of
from ddc.training.schema import Config

ROOT = Path(__file__).resolve().parents[2]
#: What ``train.py`` needs and what torch, W&B and the figures import late: six seconds, once a
#: sweep instead of once a run.
IMPORTS = [
    "ddc.report.rates",
    "ddc.report.runs",
    "ddc.training.command",
    "ddc.training.loop",
    "ddc.training.sweep",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_pdf",
    "matplotlib.figure",
    "PIL.PngImagePlugin",
    "torch._dynamo",
    "wandb.sdk.launch",
]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its overrides, the folder and the configuration that they resolve to."""

    overrides: tuple[str, ...]
    folder: Path
    config: Config

    @property
    def state(self) -> str:
        """One of :data:`ddc.training.run_folder.STATES`."""
        return state_of(self.folder)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state in ("complete", "diverged")

    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "train.py"), *self.overrides]


def read_sweep(path: Path) -> list[SweepRun]:
    """The runs of a sweep file, each configuration resolved and validated.

    Raises:
        ValueError: a line that is no valid configuration, or two lines that are the same run; with
            line numbers.
    """
    try:
        return parse_sweep(path.read_text().splitlines())
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


def parse_sweep(lines: Sequence[str]) -> list[SweepRun]:
    """The runs of the lines of a sweep file, as :func:`read_sweep`."""
    runs: dict[Path, tuple[int, SweepRun]] = {}
    for number, line in enumerate(lines, 1):
        try:
            overrides = tuple(shlex.split(line, comments=True))
            if not overrides:
                continue
            config = compose_alike(overrides)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        folder = ROOT / config.runs / config.name / config.run_id
        if folder in runs:
            raise ValueError(f"line {number}: the same run as line {runs[folder][0]}")
        runs[folder] = (number, SweepRun(overrides, folder, config))
    return [run for _, run in runs.values()]


def run_missing(runs: list[SweepRun], jobs: int) -> None:
    """Run, or resume, what has not ended, ``jobs`` at a time; a run that fails does not stop the
    others.

    SIGTERM ends the runs, which save a checkpoint, and starts no others.
    """
    waiting = [run for run in runs if not run.ended and run.state != "running"]
    started: list[BaseProcess] = []
    stopping = threading.Event()

    def stop(number: int, frame: object) -> None:
        stopping.set()
        for process in started:
            process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with Progress() as progress:
            task = progress.add_task(
                f"{len(runs)} runs", total=len(runs), completed=len(runs) - len(waiting)
            )

            def one(run: SweepRun) -> None:
                if stopping.is_set():
                    return
                process = start(run)
                started.append(process)
                if stopping.is_set():  # asked while it started
                    process.terminate()
                process.join()
                progress.advance(task)

            Parallel(n_jobs=jobs, prefer="threads")(delayed(one)(run) for run in waiting)
    finally:
        signal.signal(signal.SIGTERM, before)


def start(run: SweepRun) -> BaseProcess:
    """Begin a run, or go on with it, in a process of its own; its output goes to ``output.log`` in
    its folder.

    The process is forked from one that has made the imports and does nothing else. So a run begins
    within milliseconds, and whatever kills it, the others do not notice.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTS)
    process = server.Process(target=in_own_process, args=(run,), name=run.folder.name)
    process.start()
    return process


def in_own_process(run: SweepRun) -> None:
    """What ``train.py`` does, but for the table and the figures that it shows."""
    os.chdir(ROOT)
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / OUTPUT).open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    run_config(run.config, draw)


def summary(runs: list[SweepRun]) -> str:
    """How many runs are in which state, and which are not complete."""
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    lines = [f"{len(runs)} runs: {counts}"]
    for run, state in zip(runs, states, strict=True):
        if state != "complete":
            lines.append(f"  {state:<10}  {shlex.join(run.overrides)}  in {shown(run.folder)}")
    return "\n".join(lines)


def shown(folder: Path) -> Path:
    """A folder as seen from the repository, where it is inside."""
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
