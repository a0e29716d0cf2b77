"""How wide the range of rates is, from records: of those seeds and starts that have them all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ddc.report.stages import Record
from experiments.rate_range.plan import COUNT, LOWEST, NEAR, ROUNDS, first, loss_of, setting

#: Last validation losses by half decade of the rate.
Losses = Mapping[int, float]
HALF_DECADE = 0.5


class Range(NamedTuple):
    """A range of rates: its length in decades, the best loss on the lattice, and whether it reaches
    an end of it.
    """

    decades: float
    best: float
    is_open: bool


def length_below(losses: Losses, highest: float) -> float:
    """Length, in decades, on which losses are at most ``highest``, linear between two rates;
    between a finite and an infinite one there is none.
    """
    total = 0.0
    for (left, a), (right, b) in itertools.pairwise(sorted(losses.items())):
        low, high = sorted((a, b))
        if high <= highest:
            share = 1.0
        elif low <= highest and high < float("inf"):
            share = (highest - low) / (high - low)
        else:
            share = 0.0
        total += share * HALF_DECADE * (right - left)
    return total


def found_losses(
    by_run: Mapping[tuple[str, int], Record], optimizer: str, spread: float, seed: int
) -> Losses | None:
    """The losses of an optimizer at a start on a seed; None where the first lattice is not
    complete.
    """
    lattice = range(LOWEST[optimizer] - ROUNDS, LOWEST[optimizer] + COUNT + ROUNDS)
    found = {
        each: loss_of(record)
        for each in lattice
        if (record := by_run.get((setting(optimizer, spread, each), seed)))
    }
    return found if found.keys() >= {*first(optimizer)} else None


def by_run(records: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """Records by setting and seed."""
    return {
        (overrides, record["seed"]): record
        for record in records
        for overrides in record["stages"].values()
    }


def range_of(
    runs: Mapping[tuple[str, int], Record], optimizer: str, spread: float, seed: int
) -> Range | None:
    """The range at a start, near the best from the standard one; None where runs are missing."""
    standard = found_losses(runs, optimizer, 0, seed)
    here = found_losses(runs, optimizer, spread, seed)
    if standard is None or here is None:
        return None
    highest = NEAR * min(standard.values())
    ends = here[min(here)], here[max(here)]
    return Range(length_below(here, highest), min(here.values()), min(ends) <= highest)
