"""The specification curve: in which readings of the abstract its ratio comes out.

A *reading* is a setting of the step with a budget and a comparator. Where several seeds ran, its
numbers are means over the seeds that both ran on.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ddc.report.stages import Record, table
from experiments.past_fit.records import chosen_runs, mechanism_runs
from experiments.past_fit.settings import ADAMW, FIT

#: The paper's gap of DDCAdam over that of AdamW.
PAPERS_RATIO = 0.67 / 5.88
STAGES = ("specification", "specification_more", "specification_decay")
#: Shares of the budget at which a run is read.
BUDGETS = (0.25, 0.5, 1.0)
#: What a reading chooses, in the order of figures.
CHOICES = (
    "granularity",
    "step",
    "step scale",
    "radial rate",
    "vertical mode",
    "decay on",
    "rate",
    "budget",
    "comparator",
)


@dataclass(frozen=True)
class Reading:
    """A reading and what it comes to.

    Attributes:
        choices: one for each of :data:`CHOICES`.
        gap: validation - train loss of DDCAdam at the budget, in nats.
        baseline: the same of the comparator, an AdamW.
        train_loss: of DDCAdam there.
        seeds: how many.
    """

    choices: tuple[str, ...]
    gap: float
    baseline: float
    train_loss: float
    seeds: int

    @property
    def difference(self) -> float:
        return self.gap - self.baseline

    @property
    def ratio(self) -> float:
        return self.gap / self.baseline

    @property
    def is_papers(self) -> bool:
        """Whether the gap is at most the paper's share of AdamW's."""
        return self.gap <= PAPERS_RATIO * self.baseline


def step_of(record: Record) -> tuple[str, ...]:
    """The choices of a run: all but budget and comparator."""
    optimizer = record["config"]["optimizer"]
    form = (
        "author's order"
        if optimizer["additive"]
        else "norm kept"
        if optimizer["retract"]
        else "not retracted"
    )
    return (
        record["config"]["gauges"]["granularity"],
        form,
        optimizer["step_scale"],
        f"{optimizer['radial_rate']:g}",
        optimizer["vertical"],
        decay_on(record),
        f"{optimizer['lr']:g}",
    )


def decay_on(record: Record) -> str:
    """What decays; matrices, before there was a choice."""
    return str(record["config"]["optimizer"].get("decay_on", "matrices"))


def read_at(record: Record, share: float) -> tuple[float, float]:
    """(gap, train loss) at a share of the budget."""
    curve = record["curve"]
    i = curve["step"].index(round(share * record["config"]["training"]["steps"]))
    return curve["validation_loss"][i] - curve["train_loss"][i], curve["train_loss"][i]


def comparators(records: Sequence[Record], decayed: str, rate: str) -> dict[str, dict[int, Record]]:
    """AdamW's runs that a reading is compared with, by seed: at its rate, with decay on the same;
    and tuned.
    """
    stages = ("mechanism", "mechanism_fast", "specification_decay")
    matched = [
        run
        for run in mechanism_runs(records, stages).get("AdamW", [])
        if (decay_on(run), f"{run['config']['optimizer']['lr']:g}") == (decayed, rate)
    ]
    found = {
        "matched": matched,
        "tuned: last loss": chosen_runs(records, "last").get(ADAMW, []),
        "tuned: that fits": chosen_runs(records, "last_fit").get(ADAMW, []),
        "tuned: equal loss": chosen_runs(records, "equal_loss").get(ADAMW, []),
    }
    return {
        name: {run["seed"]: run for run in runs if not run["diverged"]}
        for name, runs in found.items()
    }


def is_reading(record: Record) -> bool:
    """Whether a run is one of the curve, and not AdamW that it is compared with."""
    is_adamw = record["config"]["optimizer"]["name"] == ADAMW
    return bool({*STAGES} & {*record["stages"]}) and not is_adamw


def readings(records: Sequence[Record]) -> Iterator[Reading]:
    """All readings of runs that are there, whose comparator is too, and that did not diverge."""
    steps: dict[tuple[str, ...], dict[int, Record]] = {}
    for record in records:
        if is_reading(record) and not record["diverged"]:
            steps.setdefault(step_of(record), {})[record["seed"]] = record
    for step, runs in steps.items():
        for name, others in comparators(records, *step[-2:]).items():
            seeds = sorted(runs.keys() & others.keys())
            for share in BUDGETS if seeds else ():
                ours = [read_at(runs[seed], share) for seed in seeds]
                theirs = [read_at(others[seed], share) for seed in seeds]
                yield Reading(
                    (*step, f"{share:g}", name),
                    statistics.mean(gap for gap, _ in ours),
                    statistics.mean(gap for gap, _ in theirs),
                    statistics.mean(train for _, train in ours),
                    len(seeds),
                )


def summary(records: Sequence[Record]) -> str:
    """How many readings give what, and those nearest to the paper's ratio."""
    found = sorted(readings(records), key=lambda each: each.difference)
    diverged = sum(record["diverged"] for record in records if is_reading(record))
    if not found:
        return "No reading is recorded yet."
    papers = [each for each in found if each.is_papers]
    smaller = sum(each.difference < 0 for each in found)
    fit = sum(each.train_loss <= FIT for each in papers)
    text = (
        f"{len(found)} readings (setting of the step, budget, comparator);"
        f" {diverged} runs diverged and are not among them. The gap is smaller than AdamW's in"
        f" {smaller}, at most the paper's share of it ({PAPERS_RATIO:.3f}) in {len(papers)}, and of"
        f" these {fit} have a train loss of at most {FIT:g}."
    )
    ranked = sorted(found, key=lambda each: each.ratio)[:12]
    return f"{text} The twelve with the smallest ratio:\n\n{reading_table(ranked)}"


def reading_table(found: Sequence[Reading]) -> str:
    """One row a reading."""
    rows = [
        [
            *each.choices,
            str(each.seeds),
            f"{each.train_loss:.3f}",
            f"{each.gap:.3f}",
            f"{each.baseline:.3f}",
            f"{each.difference:+.3f}",
            f"{each.ratio:.3f}",
        ]
        for each in found
    ]
    header = [*CHOICES, "seeds", "train loss", "gap", "AdamW's gap", "difference", "ratio"]
    return table(header, rows, left=len(CHOICES))


def markdown(records: Sequence[Record]) -> str:
    """All readings, by difference in gap."""
    found = sorted(readings(records), key=lambda each: each.difference)
    return f"{reading_table(found) if found else 'No reading is recorded yet.'}\n"
