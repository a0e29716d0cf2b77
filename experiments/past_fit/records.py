"""What the records of this question are asked for, whether all of them are there or not."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddc.report.stages import Record
from ddc.training.records import Records
from experiments.past_fit.settings import ADAMW, AUTHOR, DDCADAM, SEARCH

#: The matrices under the block rescale of a SwiGLU: what the paper's step moves further.
IN_BLOCKS = ("mlp.up.weight", "mlp.down.weight")
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


def median_lengths(record: Record, key: str, in_blocks: bool) -> list[float]:
    """The median over matrices of :func:`step_lengths`, from the first evaluation after the start
    on: of those under a block rescale (:data:`IN_BLOCKS`), or of the others.
    """
    found = [v for name, v in record["steps"][key].items() if name.endswith(IN_BLOCKS) == in_blocks]
    columns = zip(*found, strict=True)
    return [statistics.median(each for each in column if each is not None) for column in columns]


def without_diverged(runs: Sequence[Record]) -> list[Record]:
    return [each for each in runs if not each["diverged"]]


def by_seed(runs: Sequence[Record]) -> list[Record]:
    return sorted(runs, key=lambda run: run["seed"])


def chosen_runs(records: Sequence[Record], question: str) -> dict[str, list[Record]]:
    """The runs that report what a question chose, by optimizer; those that there are."""
    return SEARCH.reported(records, question)


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
