"""The folder of a run: what things in it are called, and which state they tell.

A run folder holds

- ``run.json``: configuration, seed, commit, versions, machine, data source, gauges found and
  refused;
- ``records.jsonl``: one row an evaluation, nothing in it that depends on the machine's speed, so
  that an interrupted and resumed run ends with the same bytes as an unbroken one. ``gauge_audit``
  and ``matrix_step`` (of each matrix, :func:`ddc.optim.relative_step.relative_steps`) are those of
  the step before;
- ``timing.jsonl``: seconds and tokens per second at the same steps, and the seconds that readings
  took of them;
- ``readings.jsonl``: one row a reading of singular structure (:mod:`ddc.slt`), where there are any;
- ``snapshots/``: the weights at each reading;
- ``checkpoint-STEP-SHA256.pt``: the last checkpoint, and the one before;
- ``summary.json``: written when the run is complete, and the mark that it is;
- ``diverged.json``: instead of a summary, where the loss became infinite or undefined;
- ``capacity.json``: what ``scripts/capacity.py`` measured on the complete run;
- ``output.log``: what the run printed, where a sweep started it;
- ``lock``: held by the process that is at work on the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ddc.optim import DDCMuon
from ddc.training.checkpoint import checkpoints
from ddc.training.lock import is_held
from ddc.training.ranks import Ranks
from ddc.training.records import Records, Row, provenance, write_json

if TYPE_CHECKING:
    from ddc.training.setup import Setup

INFO, SUMMARY, DIVERGED = "run.json", "summary.json", "diverged.json"
RECORDS, TIMING, READINGS = "records.jsonl", "timing.jsonl", "readings.jsonl"
CAPACITY, OUTPUT, SNAPSHOTS = "capacity.json", "output.log", "snapshots"
#: What tells a run's story: all but checkpoints, snapshots and mirrors.
RECORD_FILES = (INFO, RECORDS, TIMING, READINGS, SUMMARY, DIVERGED)
#: What a run may be. A failed one has ended without a checkpoint; its output says why.
STATES = ("complete", "diverged", "running", "unfinished", "failed", "missing")


def state_of(folder: Path) -> str:
    """One of :data:`STATES`, by what is in the folder of a run."""
    for state, mark in (("complete", SUMMARY), ("diverged", DIVERGED)):
        if (folder / mark).exists():
            return state
    if is_held(folder):
        return "running"
    if checkpoints(folder):
        return "unfinished"
    return "failed" if (folder / OUTPUT).exists() else "missing"


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


def complete_summary(folder: Path) -> Row | None:
    """The summary of a run that is complete."""
    path = folder / SUMMARY
    return json.loads(path.read_text()) if path.exists() else None


def make_folder(setup: Setup) -> None:
    """Make the folder of a run.

    Raises:
        OSError: it cannot be made; the message names the key.
    """
    try:
        setup.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"Invalid runs={setup.config.runs}: the folder cannot be made ({error})"
        ) from error


def start_folder(setup: Setup) -> None:
    """Begin a run folder: an older run in it ends here, and what made this one is written down."""
    # killed in between, a run goes on only from a checkpoint whose records are all there
    for path in (
        *(setup.folder / name for name in (SUMMARY, CAPACITY)),
        *checkpoints(setup.folder),
        *(setup.folder / name for name in (RECORDS, TIMING, READINGS)),
    ):
        path.unlink(missing_ok=True)
    shutil.rmtree(setup.folder / SNAPSHOTS, ignore_errors=True)
    write_json(
        setup.folder / INFO,
        {
            "id": setup.config.run_id,
            "config": dataclasses.asdict(setup.config),
            "seed": setup.config.seed,
            "data": setup.data.source,
            "processes": setup.ranks.size,
            "compiled": getattr(setup.optimizer, "compiled", False),
            "gauges": str(setup.gauges).splitlines(),
            **(
                {"routing": setup.optimizer.routing().splitlines()}
                if isinstance(setup.optimizer, DDCMuon)
                else {}
            ),
            **provenance(),
        },
    )


class Tables(NamedTuple):
    """The tables of a run."""

    records: Records
    timing: Records
    readings: Records

    @classmethod
    def of(cls, folder: Path) -> Tables:
        return cls(*(Records(folder / name) for name in (RECORDS, TIMING, READINGS)))


def begin(setup: Setup, last: int | None, tables: Tables) -> list[list[Row]]:
    """The rows of each table up to the last checkpoint; the later ones go. Without one, the folder
    begins anew.
    """
    if last is None:
        start_folder(setup)
    for table in tables:
        table.truncate(last or 0)
    return [table.read() for table in tables]


@contextlib.contextmanager
def noted(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Leave ``diverged.json`` in the folder of a run that diverges: a result, which a sweep need
    not ask for again.
    """
    marker = folder / DIVERGED
    if ranks.first:
        marker.unlink(missing_ok=True)
    try:
        yield
    except DivergedError as error:
        if ranks.first:
            write_json(marker, {"message": str(error)})
        raise


def where_to_go_on(folder: Path) -> str:
    last = next(iter(checkpoints(folder)), None)
    good = f"The last good checkpoint is {last}; a" if last else "There is no checkpoint yet; a"
    return f"{good} smaller optimizer.lr or training.max_grad_norm may help"
