"""AdamW and DDCAdam on the same seeds: what runs end with, and the differences by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ddc.report.claims import Claim
from ddc.report.runs import TITLES
from ddc.report.stages import Record, of_stage, only_setting, table
from ddc.report.statistics import effect_size, interquartile_mean, mean_interval, paired_p

BASELINE, SUBJECT = "adamw", "ddcadam"
#: The runs of a stage by optimizer, in order of seeds.
Runs = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class Quantity:
    """A number that a run ends with.

    Attributes:
        title: in tables.
        of: the number of a record; None where it has none.
        sign: of the difference DDCAdam - AdamW that is in the paper's direction; 0 where it has
            none.
        form: of the number in tables.
    """

    title: str
    of: Callable[[Record], float | None]
    sign: int
    form: str = ".3f"


def from_summary(key: str) -> Callable[[Record], float | None]:
    """A value of the run's summary."""
    return lambda record: record["summary"][key]


def gap_at(level: str) -> Callable[[Record], float | None]:
    """The gap where the train loss first falls to a level."""
    return lambda record: record["summary"]["gap_at_train_loss"][level]


def stage_runs(records: Sequence[Record], stage: str) -> Runs:
    """The runs of a stage by optimizer, in order of seeds: of the seeds on which all of them ran
    and none diverged.

    Empty where there is no such seed.
    """
    runs = {name: only_setting(settings) for name, settings in of_stage(records, stage).items()}
    ended = [
        {record["seed"] for record in each if not record["diverged"]} for each in runs.values()
    ]
    shared = set.intersection(*ended) if len(ended) > 1 else set()
    return {
        name: [record for record in each if record["seed"] in shared]
        for name, each in runs.items()
        if shared
    }


def against_adamw(baseline: Sequence[Record], subject: Sequence[Record]) -> Runs:
    """Runs of AdamW and of what stands against it, of the seeds on which both ran and neither
    diverged; the second by the name :data:`SUBJECT`, whatever it is.
    """
    ended = [
        {run["seed"]: run for run in runs if not run["diverged"]} for runs in (baseline, subject)
    ]
    seeds = sorted(ended[0].keys() & ended[1].keys())
    return {
        name: [each[seed] for seed in seeds]
        for name, each in zip((BASELINE, SUBJECT), ended, strict=True)
    }


def values(records: Sequence[Record], quantity: Quantity) -> list[float | None]:
    """The number of each run."""
    return [quantity.of(record) for record in records]


def pairs(runs: Runs, quantity: Quantity) -> list[tuple[float, float]]:
    """(AdamW's, DDCAdam's) number by seed, where both have one."""
    both = zip(values(runs[BASELINE], quantity), values(runs[SUBJECT], quantity), strict=True)
    return [(a, b) for a, b in both if a is not None and b is not None]


def differences(runs: Runs, quantity: Quantity) -> list[float]:
    """DDCAdam - AdamW by seed, where both have the number."""
    return [ours - baseline for baseline, ours in pairs(runs, quantity)]


def advantages(runs: Runs, quantity: Quantity) -> list[float]:
    """Differences by seed, positive in the paper's direction."""
    return [quantity.sign * each for each in differences(runs, quantity)]


def reduction(runs: Runs, quantity: Quantity) -> float:
    """Mean advantage relative to AdamW's mean, on the seeds where both have the number."""
    baseline = [each for each, _ in pairs(runs, quantity)]
    return (
        statistics.mean(advantages(runs, quantity)) / statistics.mean(baseline) if baseline else 0.0
    )


def is_enough(claim: Claim, runs: Runs, quantity: Quantity) -> bool:
    """Whether AdamW's mean is reduced by the share of the paper's relative reduction that
    *reproduced* asks for.
    """
    return reduction(runs, quantity) >= claim.enough * (
        1 - claim.values[SUBJECT] / claim.values[BASELINE]
    )


def seeds_that_ran(records: Sequence[Record], stage: str) -> int:
    """How many seeds a stage has, those with runs that diverged, or never got there, included."""
    return len({record["seed"] for record in records if stage in record["stages"]})


def seeds_cell(shown: int, ran: int) -> str:
    """How many seeds are shown, and of how many, where some are missing."""
    return str(shown) if shown == ran else f"{shown} of {ran}"


def interval(differences: Sequence[float], form: str) -> str:
    """Mean and 95% interval of differences."""
    if len(differences) < 2:
        return f"{differences[0]:+{form}} (one seed)" if differences else "–"
    low, high = mean_interval(differences)
    return f"{statistics.mean(differences):+{form}} ({low:+{form}} to {high:+{form}})"


def mean_cell(numbers: Sequence[float], form: str) -> str:
    """Mean, and in brackets interquartile mean."""
    if not numbers:
        return "never reached"
    cell = f"{statistics.mean(numbers):{form}}"
    return f"{cell} ({interquartile_mean(numbers):{form}})" if len(numbers) > 1 else cell


def p_cell(p: float | None) -> str:
    """A p-value, or a dash where too few seeds were there to test."""
    return "–" if p is None else f"{p:.2g}"


def quantity_table(runs: Runs, quantities: Sequence[Quantity]) -> str:
    """One row a quantity: means of both optimizers, paired difference with its interval, effect
    size, p, seeds.
    """
    rows = []
    for quantity in quantities:
        both, found = pairs(runs, quantity), differences(runs, quantity)
        size = effect_size(found)
        rows.append(
            [
                quantity.title,
                *(mean_cell([pair[i] for pair in both], quantity.form) for i in range(2)),
                interval(found, quantity.form),
                "–" if size is None else f"{size:+.2f}",
                p_cell(paired_p(found)),
                str(len(found)),
            ]
        )
    header = [
        "",
        TITLES[BASELINE],
        TITLES[SUBJECT],
        "DDCAdam - AdamW (95%)",
        "effect size",
        "p, unadjusted",
        "seeds",
    ]
    return table(header, rows)


#: What :func:`quantity_table` shows, for the text beside it.
QUANTITY_NOTE = (
    "Means over the seeds on which both have the number, in brackets the interquartile mean;"
    " differences are paired by seed, their intervals Student's t below ten seeds. Effect size:"
    " mean difference over its standard deviation, with Hedges' correction. p: Student's t-test,"
    " from five seeds on, not adjusted: many rows, so read them as description."
)


def seeds_table(
    runs: Mapping[str, Runs], quantities: Sequence[Quantity], setting: Callable[[Record], str]
) -> str:
    """Every seed: one row a stage and optimizer, one column a quantity."""
    rows = []
    for stage, each in runs.items():
        for name, records in each.items():
            cells = [
                ", ".join(
                    "–" if value is None else f"{value:{quantity.form}}"
                    for value in values(records, quantity)
                )
                for quantity in quantities
            ]
            seeds = ", ".join(str(record["seed"]) for record in records)
            rows.append([stage, TITLES[name], setting(records[0]), seeds, *cells])
    header = [
        "stage",
        "optimizer",
        "setting",
        "seeds",
        *(quantity.title for quantity in quantities),
    ]
    return table(header, rows, left=len(header))
