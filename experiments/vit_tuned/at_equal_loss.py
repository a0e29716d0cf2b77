"""Spare capacity of finished runs where their train loss first falls to a level: ``PYTHONPATH=.
python experiments/vit_tuned/at_equal_loss.py RUN_DIR ...``.

A run keeps its last checkpoints alone, and one of fewer steps has another schedule. So its steps
are made again, from its start and with its configuration, up to its last evaluation above the
level, where the train loss must be that of its records; and from there until the train loss, read
every few steps, is at most the level. Writes at_loss.json to the run folder; one that has it is
left as it is.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch.amp.grad_scaler import GradScaler

from ddc.report.runs import Run
from ddc.training.capacity import PREDICTIONS, capacity_of
from ddc.training.compose import restored
from ddc.training.display import print_plainly
from ddc.training.evaluate import evaluation_batches, measure
from ddc.training.loop import train_step
from ddc.training.records import Row, write_json
from ddc.training.setup import Setup, prepare
from experiments.vit_tuned.plan import AT_LOSS_FILE, LEVEL

#: After how many steps each the train loss is read, near the level.
EVERY = 5


def main() -> None:
    """Measure the run folders of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    for folder in parser.parse_args().folders:
        path = folder / AT_LOSS_FILE
        try:
            if not path.exists():
                write_json(path, at_level(folder, LEVEL, PREDICTIONS))
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"error: {error}")
        print(path)


def at_level(folder: Path, level: float, predictions: int) -> Row:
    """The capacity of a run at a train loss, as :mod:`ddc.training.capacity` measures it, with the
    ``step`` where that is: None, and no capacity, where the run never gets there.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the run has not ended; or made again it is not what its records say.
    """
    run = Run.read(folder)
    if run.summary is None:
        raise ValueError(f"{folder} has not ended: the same command of train.py goes on with it")
    before = last_above(run.rows, level)
    if before is None:
        return {"level": level, "step": None}
    setup, step = prepare(restored(run.info["config"])), before["step"]
    batches = evaluation_batches(setup, "train")
    train_between(setup, 0, step)
    loss = measure(setup, batches)["loss"]
    if not math.isclose(loss, before["train_loss"], rel_tol=1e-6):
        raise ValueError(
            f"{folder}: after {step} steps made again, the train loss is {loss}, in the records"
            f" {before['train_loss']}: use the versions and the kind of machine of the run"
        )
    while loss > level:
        train_between(setup, step, step + EVERY)
        step += EVERY
        loss = measure(setup, batches)["loss"]
    return {"level": level, "step": step, **capacity_of(setup, predictions, Console(quiet=True))}


def last_above(rows: Sequence[Row], level: float) -> Row | None:
    """The last evaluation before the one at which the train loss first is at most a level; None if
    there is no such one.
    """
    pairs = itertools.pairwise(rows)
    return next((a for a, b in pairs if b["train_loss"] <= level < a["train_loss"]), None)


def train_between(setup: Setup, start: int, stop: int) -> None:
    """The steps of a run from one to another; in float32, which needs no scale of the loss."""
    scaler = GradScaler(setup.device.type, enabled=False)
    for step in range(start, stop):
        train_step(setup, step, scaler, audited=False)


if __name__ == "__main__":
    print_plainly()
    main()
