"""What the records of this question are asked for, whether all of them are there or not."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddc.report.stages import Record
from ddc.training.records import Records
from experiments.past_fit.settings import AXES, Point, choices, setting_at

#: The optimizers that are tuned; the last is the step of the paper's companion.
OPTIMIZERS = ("adamw", "ddcadam", "ddcadam_paper")
ADAMW, DDCADAM, AUTHOR = OPTIMIZERS
#: The variants of the mechanism, and how the optimizer of a run tells that it is one.
AUTHORS_STEP, GAUGES_ALONE, LENGTH_ALONE = (
    "the paper's step",
    "its gauges, AdamW's length",
    "its length, no gauge",
)
MECHANISM: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "AdamW": lambda optimizer: optimizer["name"] == ADAMW,
    "DDCAdam": lambda optimizer: optimizer["name"] == DDCADAM,
    AUTHORS_STEP: lambda optimizer: (
        optimizer["name"] == AUTHOR and optimizer["step_scale"] == "norm"
    ),
    GAUGES_ALONE: lambda optimizer: (
        optimizer["name"] == AUTHOR and optimizer["step_scale"] == "init"
    ),
    LENGTH_ALONE: lambda optimizer: optimizer["name"] == "adamw_relative",
}


def step_lengths(folder: Path) -> dict[str, dict[str, list[float | None]]]:
    """How far the step before each evaluation moved each matrix, from a run's folder: ``relative``
    and ``angle`` by matrix, four digits.
    """
    rows = [row["matrix_step"] for row in Records(folder / "records.jsonl").read()]
    steps = [row for row in rows if row]
    return {
        key: {
            name: [
                None if row[key][name] is None else float(f"{row[key][name]:.4g}") for row in steps
            ]
            for name in steps[0][key]
        }
        for key in ("relative", "angle")
    }


def median_lengths(record: Record, key: str) -> list[float]:
    """The median over matrices of :func:`step_lengths`, from the first evaluation after the
    start on.
    """
    columns = zip(*record["steps"][key].values(), strict=True)
    return [statistics.median(each for each in column if each is not None) for column in columns]


def without_diverged(runs: Sequence[Record]) -> list[Record]:
    return [each for each in runs if not each["diverged"]]


def by_seed(runs: Sequence[Record]) -> list[Record]:
    return sorted(runs, key=lambda run: run["seed"])


@functools.cache
def points_of(optimizer: str) -> dict[str, Point]:
    """The points of an optimizer's lattice by their overrides."""
    indices = itertools.product(*(range(len(axis)) for axis in AXES[optimizer].values()))
    return {setting_at(optimizer, point): point for point in indices}


def searched(record: Record) -> str | None:
    """The stage of the search (grid or widening) that a record is of."""
    stages = [stage for stage in record["stages"] if stage == "grid" or stage.startswith("widen_")]
    return min(stages, default=None)


def tried(records: Sequence[Record], optimizer: str) -> dict[Point, Record]:
    """The runs of the search by point."""
    known = points_of(optimizer)
    return {
        known[record["stages"][stage]]: record
        for record in records
        if record["config"]["optimizer"]["name"] == optimizer and (stage := searched(record))
    }


def chosen_runs(records: Sequence[Record], question: str) -> dict[str, list[Record]]:
    """The runs that report what a question chose, by optimizer; those that there are."""
    found = {}
    for name in OPTIMIZERS:
        cells = tried(records, name)
        point = choices(cells).get(question) if cells else None
        if point is not None:
            overrides = setting_at(name, point)
            runs = [each for each in records if each["stages"].get("reported") == overrides]
            if runs:
                found[name] = by_seed(runs)
    return found


def mechanism_runs(records: Sequence[Record], stages: Sequence[str]) -> dict[str, list[Record]]:
    """The runs of some stages of the mechanism by variant; those variants that have any."""
    found = {
        title: by_seed(
            [
                run
                for run in records
                if is_variant(run["config"]["optimizer"]) and set(stages) & set(run["stages"])
            ]
        )
        for title, is_variant in MECHANISM.items()
    }
    return {title: runs for title, runs in found.items() if runs}
