"""Train one model: ``python train.py +experiment=lm_overtrain optimizer=ddcadam``.

By several processes: ``torchrun --nproc-per-node=2 train.py launcher=torchrun
+experiment=lm_overtrain``.

The exit status is 0 when the run is complete, 75 (try again) when Ctrl-C or SIGTERM stopped it: a
checkpoint is saved, and the same command goes on. It is 1 when something is wrong.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ddc.report.rates import draw_readings
from ddc.report.runs import Run, plot_curves, summary_table
from ddc.training.checkpoint import CheckpointError
from ddc.training.config import Config, check_choices, register_schemas, resolve
from ddc.training.display import print_plainly
from ddc.training.errors import explained
from ddc.training.lock import BusyError
from ddc.training.loop import DivergedError, prepare, train
from ddc.training.ranks import join_ranks
from ddc.training.records import Row

#: What ends a run before its time, and is no bug.
STOPS = (DivergedError, BusyError, CheckpointError, MemoryError, OSError)
register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(composed: DictConfig) -> None:
    """Run what the composed configuration says, and show what came of it."""
    try:
        config = resolve(composed)
    except ValueError as error:
        fail(f"error: {error}")
    drawn = functools.cache(draw)  # for W&B and for the list below
    folder, summary = run(config, drawn)
    if speaks():
        show(folder, summary, drawn(folder))


def run(config: Config, draw: Callable[[Path], Sequence[Path]]) -> tuple[Path, Row]:
    """Train; the folder of the run and its summary. ``draw`` as for
    :func:`ddc.training.loop.train`.

    Raises:
        SystemExit: the run stopped or cannot begin: one line that says why, and the exit status.
    """
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
    if summary.get("already_complete"):
        print(
            f"This run was complete already; training.resume=never runs it again. Folder: {folder}"
        )
    Console().print(summary_table([Run.read(folder)]))
    for path in (folder / "summary.json", folder / "records.jsonl", *figures):
        print(path)


def speaks() -> bool:
    """Whether this process prints: one of several is enough."""
    return os.environ.get("RANK", "0") == "0"


def fail(message: str) -> NoReturn:
    """End with a message and exit status 1."""
    sys.exit(message if speaks() else 1)


def draw(folder: Path) -> list[Path]:
    """The figures of a complete run, from its records."""
    run = Run.read(folder)
    return [*plot_curves([run], folder / "curves"), *draw_readings(run, folder)]


if __name__ == "__main__":
    print_plainly()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come here, to be said in one line
    try:
        check_choices(sys.argv[1:])
        main()
    except (HydraException, OmegaConfBaseException) as error:
        fail(f"error: {explained(error)}")
