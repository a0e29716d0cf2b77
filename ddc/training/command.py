"""What a command does with a configuration: the run, its exit status, and what is said of it.

The exit status is 0 when the run is complete, 75 (try again) when Ctrl-C or SIGTERM stopped it: a
checkpoint is saved, and the same command goes on. It is 1 when something is wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ddc.training.checkpoint import CheckpointError
from ddc.training.lock import BusyError
from ddc.training.ranks import join_ranks
from ddc.training.records import Row
from ddc.training.run_folder import RECORDS, SUMMARY, DivergedError
from ddc.training.schema import Config

#: What ends a run before its time, and is no bug.
STOPS = (DivergedError, BusyError, CheckpointError, MemoryError, OSError)


def run_config(config: Config, draw: Callable[[Path], Sequence[Path]]) -> tuple[Path, Row]:
    """Train; the folder of the run and its summary. ``draw`` as for
    :func:`ddc.training.loop.train`.

    Raises:
        SystemExit: the run stopped or cannot begin: one line that says why, and the exit status.
    """
    from ddc.training.loop import train
    from ddc.training.setup import prepare

    try:
        setup = prepare(config, join_ranks(config.launcher, config.training.device))
    except (ValueError, MemoryError) as error:
        fail(f"error: {error}")
    try:
        return setup.folder, train(setup, draw)
    except KeyboardInterrupt as stop:
        if speaks():
            print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except STOPS as error:
        fail(f"stopped: {error}")


def show(folder: Path, summary: Row, figures: Sequence[Path]) -> None:
    """Print the summary of a run, and where its files are."""
    from rich.console import Console

    from ddc.report.runs import Run, summary_table

    if summary.get("already_complete"):
        print(
            f"This run was complete already; training.resume=never runs it again. Folder: {folder}"
        )
    Console().print(summary_table([Run.read(folder)]))
    for path in (folder / SUMMARY, folder / RECORDS, *figures):
        print(path)


def speaks() -> bool:
    """Whether this process prints: one of several is enough."""
    return os.environ.get("RANK", "0") == "0"


def fail(message: str) -> NoReturn:
    """End with a message and exit status 1."""
    sys.exit(message if speaks() else 1)


def draw(folder: Path) -> list[Path]:
    """The figures of a complete run, from its records."""
    from ddc.report.rates import draw_readings
    from ddc.report.runs import Run, plot_curves

    run = Run.read(folder)
    return [*plot_curves([run], folder / "curves"), *draw_readings(run, folder)]
