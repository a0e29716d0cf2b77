"""Train one model: ``python train.py +experiment=lm_overtrain optimizer=ddcadam``.

The exit status is 0 when the run is complete, 75 (try again) when Ctrl-C or SIGTERM stopped it: a checkpoint is saved,
and the same command goes on. It is 1 when something is wrong.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from ddc.report.rates import draw_readings
from ddc.report.runs import Run, plot_curves, summary_table
from ddc.training.checkpoint import CheckpointError
from ddc.training.config import Config, register_schemas, resolve
from ddc.training.lock import BusyError
from ddc.training.loop import DivergedError, prepare, train
from ddc.training.records import Row

register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(composed: DictConfig) -> None:
    """Run what the composed configuration says, and show what came of it."""
    try:
        config = resolve(composed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    drawn = functools.cache(draw)  # for W&B and for the list below
    folder, summary = run(config, drawn)
    if summary.get("already_complete"):
        print(f"This run was complete already; training.resume=never runs it again. Folder: {folder}")
    Console().print(summary_table([Run.read(folder)]))
    for path in (folder / "summary.json", folder / "records.jsonl", *drawn(folder)):
        print(path)


def run(config: Config, draw: Callable[[Path], Sequence[Path]]) -> tuple[Path, Row]:
    """Train; the folder of the run and its summary. ``draw`` as for :func:`ddc.training.loop.train`.

    Raises:
        SystemExit: the run stopped or cannot begin: one line that says why, and the exit status.
    """
    try:
        setup = prepare(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        return setup.folder, train(setup, draw)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except (DivergedError, BusyError, CheckpointError, OSError) as error:
        sys.exit(f"stopped: {error}")


def draw(folder: Path) -> list[Path]:
    """The figures of a complete run, from its records."""
    run = Run.read(folder)
    return [*plot_curves([run], folder / "curves"), *draw_readings(run, folder)]


if __name__ == "__main__":
    main()
