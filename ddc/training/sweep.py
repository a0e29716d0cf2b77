"""Sweeps: many runs of ``train.py``, listed in a file, that can be stopped and started again.

A sweep file has one run a line, as the overrides of its configuration; empty lines and lines that begin with # are left
out. A run is complete if the folder that its resolved configuration names has a summary.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from joblib import Parallel, delayed
from omegaconf.errors import OmegaConfBaseException
from rich.progress import Progress

from ddc.training.config import register_schemas, resolve

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its overrides, and the folder that they resolve to."""

    overrides: tuple[str, ...]
    folder: Path

    @property
    def state(self) -> str:
        """``complete``, ``unfinished`` (it has a checkpoint to go on from) or ``missing``."""
        if (self.folder / "summary.json").exists():
            return "complete"
        return "unfinished" if (self.folder / "checkpoint.pt").exists() else "missing"

    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "train.py"), *self.overrides]


def read_sweep(path: Path) -> list[SweepRun]:
    """The runs of a sweep file, each configuration resolved and validated.

    Raises:
        ValueError: a line that is no valid configuration, or two lines that are the same run; with line numbers.
    """
    register_schemas()
    runs: dict[Path, tuple[int, SweepRun]] = {}
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            overrides = tuple(shlex.split(line, comments=True))
            if not overrides:
                continue
            try:
                config = resolve(compose("config", overrides=list(overrides)))
            except (ValueError, HydraException, OmegaConfBaseException) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            folder = Path(config.runs) / config.name / config.run_id
            if folder in runs:
                raise ValueError(f"{path}, line {number}: the same run as line {runs[folder][0]}")
            runs[folder] = (number, SweepRun(overrides, folder))
    return [run for _, run in runs.values()]


def run_missing(runs: list[SweepRun], jobs: int) -> None:
    """Run, or resume, what is not complete, ``jobs`` at a time; a run that fails does not stop the others.

    The output of each goes to ``output.log`` in its folder.
    """
    waiting = [run for run in runs if run.state != "complete"]
    with Progress() as progress:
        task = progress.add_task(f"{len(runs)} runs", total=len(runs), completed=len(runs) - len(waiting))

        def one(run: SweepRun) -> None:
            run.folder.mkdir(parents=True, exist_ok=True)
            with (run.folder / "output.log").open("a") as log:
                subprocess.run(run.command(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
            progress.advance(task)

        Parallel(n_jobs=jobs, prefer="threads")(delayed(one)(run) for run in waiting)


def summary(runs: list[SweepRun]) -> str:
    """How many runs are complete, and which are not."""
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "unfinished", "missing"))
    lines = [f"{len(runs)} runs: {counts}"]
    for run, state in zip(runs, states, strict=True):
        if state != "complete":
            lines.append(f"  {state:<10}  {shlex.join(run.overrides)}  in {run.folder}")
    return "\n".join(lines)
