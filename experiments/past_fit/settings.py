"""The settings that the grids try, as points of a lattice; what a tuning asks, and how it goes on
where its answer is at an edge.

A *point* of an optimizer has one index an axis; the axes are hyperparameters on a logarithmic
scale, about half a decade a step. A chosen point is *interior* if all its neighbours on the lattice
(one step along one axis) have been tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from ddc.report.stages import Record

Point = tuple[int, ...]
#: A run fits if its train loss at the end is at most this; the level of the gap at equal loss.
FIT = 0.5

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
RADIAL_RATES = (0.0, 0.3, 1.0, 3.0, 10.0)
AXES: dict[str, dict[str, tuple[float, ...]]] = {
    "adamw": {"lr": RATES, "weight_decay": DECAYS},
    "ddcadam": {"lr": RATES, "weight_decay": DECAYS, "radial_rate": RADIAL_RATES},
    "ddcadam_paper": {"lr": RATES, "weight_decay": DECAYS},
}
#: The values that the first grid crosses: twelve settings an optimizer.
FIRST: dict[str, tuple[tuple[float, ...], ...]] = {
    "adamw": ((1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0, 10.0)),
    "ddcadam": ((1e-3, 3e-3), (0.3, 1.0, 3.0), (0.0, 1.0)),
    "ddcadam_paper": ((3e-4, 1e-3, 3e-3), (0.3, 1.0, 3.0, 10.0)),
}


def setting(optimizer: str, *values: float) -> str:
    """Overrides of an optimizer with these values of its axes."""
    pairs = zip(AXES[optimizer], values, strict=True)
    return " ".join([f"optimizer={optimizer}", *(f"optimizer.{k}={v:g}" for k, v in pairs)])


def setting_at(optimizer: str, point: Point) -> str:
    """Overrides of a point."""
    axes = AXES[optimizer].values()
    return setting(optimizer, *(axis[i] for axis, i in zip(axes, point, strict=True)))


def first_grid(optimizer: str) -> list[Point]:
    """The points of the first grid."""
    axes = AXES[optimizer].values()
    crossed = itertools.product(*FIRST[optimizer])
    return [tuple(a.index(v) for a, v in zip(axes, values, strict=True)) for values in crossed]


def neighbours(optimizer: str, point: Point) -> Iterator[Point]:
    """The points one step along one axis, as far as the lattice goes."""
    for i, axis in enumerate(AXES[optimizer].values()):
        for step in (1, -1):
            if 0 <= point[i] + step < len(axis):
                yield (*point[:i], point[i] + step, *point[i + 1 :])


def last_loss(record: Record) -> float:
    """The last validation loss; infinite for a run that diverged."""
    return math.inf if record["diverged"] else float(record["summary"]["validation_loss"])


def last_loss_that_fits(record: Record) -> float:
    """The last validation loss; infinite for a run that diverged, or does not fit."""
    fits = not record["diverged"] and record["summary"]["train_loss"] <= FIT
    return last_loss(record) if fits else math.inf


def gap_at_equal_loss(record: Record) -> float:
    """The gap where the train loss first falls to 0.5; infinite for a run that never gets there."""
    gap = None if record["diverged"] else record["summary"]["gap_at_train_loss"][str(FIT)]
    return math.inf if gap is None else float(gap)


def best_loss(record: Record) -> float:
    """The best validation loss; infinite for a run that diverged."""
    return math.inf if record["diverged"] else float(record["summary"]["best_validation_loss"])


#: What a tuning asks of a run, by name; smaller is better.
QUESTIONS: dict[str, Callable[[Record], float]] = {
    "last": last_loss,
    "last_fit": last_loss_that_fits,
    "equal_loss": gap_at_equal_loss,
    "best": best_loss,
}


def choices(tried: Mapping[Point, Record]) -> dict[str, Point]:
    """The best point by each question; a question that no run answers chooses none."""
    found = {}
    for question, value in QUESTIONS.items():
        ranked = ((value(record), point) for point, record in tried.items())
        lowest, best = min(ranked, default=(math.inf, ()))
        if lowest < math.inf:
            found[question] = best
    return found


def untried(optimizer: str, points: Sequence[Point], tried: Collection[Point]) -> list[Point]:
    """Neighbours of points, in the order of these, that have not been tried."""
    found = [each for point in points for each in neighbours(optimizer, point)]
    return [each for each in dict.fromkeys(found) if each not in tried]


def widened(tried: Mapping[str, Mapping[Point, Record]], most: int) -> dict[str, list[Point]]:
    """The points by which a round of the search widens what each optimizer has tried: as many for
    each, and none where all that is chosen is interior.

    They are untried neighbours of what the questions choose, in the order of the questions. An
    optimizer that has fewer of them than another gets neighbours of its next best points by the
    last validation loss.

    Args:
        tried: records by point, by optimizer.
        most: points an optimizer.
    """
    chosen = {name: list(choices(each).values()) for name, each in tried.items()}
    wanted = {name: untried(name, chosen[name], each) for name, each in tried.items()}
    count = min(most, max(map(len, wanted.values())))
    ranked = {name: sorted(each, key=lambda p: last_loss(each[p])) for name, each in tried.items()}
    return {
        name: untried(name, [*chosen[name], *ranked[name]], each)[:count]
        for name, each in tried.items()
    }
