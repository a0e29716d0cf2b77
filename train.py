"""Train one model: ``python train.py +experiment=lm_overtrain optimizer=ddcadam``."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ddc.report.rates import draw_readings
from ddc.report.runs import Run, plot_curves, summary_table
from ddc.training.checkpoint import CheckpointError
from ddc.training.config import check_choices, register_schemas, resolve
from ddc.training.errors import explained
from ddc.training.lock import BusyError
from ddc.training.loop import DivergedError, prepare, train

#: What ends a run before its time, and is no bug.
STOPS = (DivergedError, BusyError, CheckpointError, MemoryError, OSError, KeyboardInterrupt)
register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(composed: DictConfig) -> None:
    """Run what the composed configuration says, and show what came of it."""
    try:
        setup = prepare(resolve(composed))
    except (ValueError, MemoryError) as error:
        sys.exit(f"error: {error}")
    drawn = functools.cache(draw)  # for the mirror and for the list below
    try:
        summary = train(setup, drawn)
    except STOPS as error:
        sys.exit(f"stopped: {error}")
    if summary.get("already_complete"):
        print(f"This run was complete already; training.resume=never runs it again. Folder: {setup.folder}")
    Console().print(summary_table([Run.read(setup.folder)]))
    for path in (setup.folder / "summary.json", setup.folder / "records.jsonl", *drawn(setup.folder)):
        print(path)


def draw(folder: Path) -> list[Path]:
    """The figures of a complete run, from its records."""
    run = Run.read(folder)
    return [*plot_curves([run], folder / "curves"), *draw_readings(run, folder)]


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come here, to be said in one line
    try:
        check_choices(sys.argv[1:])
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explained(error)}")
