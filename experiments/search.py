"""A fair search over hyperparameters: as many settings for each optimizer, and wider where what is
chosen lies at an edge.

A *point* of an optimizer has one index an axis; the axes are hyperparameters, mostly about half a
decade a step. A chosen point is *interior* if all its neighbours on this lattice (one step along
one axis) have been tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from ddc.report.stages import Record
from experiments.protocols import TUNING_SEED, Experiment, Plan, product

Point = tuple[int, ...]
#: What an optimizer has tried: the run of each point.
Tried = Mapping[Point, Record]


def last_loss(record: Record) -> float:
    """The last validation loss; infinite for a run that diverged."""
    return math.inf if record["diverged"] else float(record["summary"]["validation_loss"])


def best_loss(record: Record) -> float:
    """The best validation loss; infinite for a run that diverged."""
    return math.inf if record["diverged"] else float(record["summary"]["best_validation_loss"])


def last_loss_of_fit(level: float) -> Callable[[Record], float]:
    """The last validation loss; infinite for a run that diverged, or whose train loss is above a
    level at the end.
    """

    def value(record: Record) -> float:
        fits = not record["diverged"] and record["summary"]["train_loss"] <= level
        return last_loss(record) if fits else math.inf

    return value


@dataclass(frozen=True, eq=False)
class Search:
    """A search in rounds, on one seed.

    Args:
        axes: by optimizer (its name, and any overrides that belong to it), the values of each
            hyperparameter, in order.
        first: by optimizer, the values of each that the first round crosses; as many settings for
            each optimizer.
        questions: what is asked of a run, by name; smaller is better, infinite does not qualify.
        rounds: of widening.
        most: settings that a round adds to an optimizer at most.
        shared: overrides of every setting.
        suffix: of the names of its stages, ``grid``, ``widen_1`` and so on, where an experiment has
            several searches.
        tied: by optimizer, hyperparameters that are a multiple of its first axis, and of which one.
    """

    axes: Mapping[str, Mapping[str, Sequence[float]]]
    first: Mapping[str, Sequence[Sequence[float]]]
    questions: Mapping[str, Callable[[Record], float]]
    rounds: int
    most: int
    shared: str = ""
    suffix: str = ""
    tied: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of its stages, in order."""
        rounds = ["grid", *(f"widen_{i}" for i in range(1, self.rounds + 1))]
        return [each + self.suffix for each in rounds]

    def setting(self, optimizer: str, *values: float) -> str:
        """Overrides of an optimizer with these values of its axes."""
        pairs = zip(self.axes[optimizer], values, strict=True)
        parts = [f"optimizer={optimizer}", *(f"optimizer.{k}={v:g}" for k, v in pairs)]
        tied = self.tied.get(optimizer, {}).items()
        parts += [f"optimizer.{key}={multiple * values[0]:g}" for key, multiple in tied]
        return " ".join([*parts, self.shared]).strip()

    def setting_at(self, optimizer: str, point: Point) -> str:
        """Overrides of a point."""
        axes = self.axes[optimizer].values()
        return self.setting(optimizer, *(axis[i] for axis, i in zip(axes, point, strict=True)))

    @cache  # noqa: B019  a search lives as long as the program
    def points(self, optimizer: str) -> Mapping[str, Point]:
        """All points of an optimizer by their overrides."""
        indices = itertools.product(*(range(len(a)) for a in self.axes[optimizer].values()))
        return {self.setting_at(optimizer, point): point for point in indices}

    def grid(self, optimizer: str) -> list[Point]:
        """The points of the first round."""
        crossed = itertools.product(*self.first[optimizer])
        return [self.points(optimizer)[self.setting(optimizer, *each)] for each in crossed]

    def neighbours(self, optimizer: str, point: Point) -> Iterator[Point]:
        """The points one step along one axis, as far as the lattice goes."""
        for i, axis in enumerate(self.axes[optimizer].values()):
            for step in (1, -1):
                if 0 <= point[i] + step < len(axis):
                    yield (*point[:i], point[i] + step, *point[i + 1 :])

    def untried(
        self, optimizer: str, points: Sequence[Point], tried: Collection[Point]
    ) -> list[Point]:
        """Neighbours of points, in the order of these, that have not been tried."""
        found = [each for point in points for each in self.neighbours(optimizer, point)]
        return [each for each in dict.fromkeys(found) if each not in tried]

    def is_at_an_end(self, optimizer: str, point: Point) -> bool:
        """Whether the lattice does not go on from a point, where a smaller or larger value would
        be possible: there is none below zero.
        """
        axes = self.axes[optimizer].values()
        return any(
            i == len(axis) - 1 or (i == 0 and axis[0] > 0)
            for i, axis in zip(point, axes, strict=True)
        )

    def open_sides(self, optimizer: str, point: Point, tried: Collection[Point]) -> list[Point]:
        """Neighbours of a point that were not tried, and itself where the lattice ends there: an
        interior point has none.
        """
        beyond = [point] if self.is_at_an_end(optimizer, point) else []
        return [*self.untried(optimizer, [point], tried), *beyond]

    def choices(self, tried: Tried) -> dict[str, Point]:
        """The best point by each question; a question that no run answers chooses none."""
        found = {}
        for question, value in self.questions.items():
            ranked = ((value(record), point) for point, record in tried.items())
            lowest, best = min(ranked, default=(math.inf, ()))
            if lowest < math.inf:
                found[question] = best
        return found

    def widened(self, tried: Mapping[str, Tried]) -> dict[str, list[Point]]:
        """The points that a round adds, by optimizer: as many for each, and none where all that is
        chosen is interior.

        They are untried neighbours of what the questions choose, in the order of the questions. An
        optimizer that has fewer of them than another gets neighbours of its next best points by
        the first question.
        """
        chosen = {name: list(self.choices(each).values()) for name, each in tried.items()}
        wanted = [len(self.untried(name, chosen[name], each)) for name, each in tried.items()]
        count = min(self.most, max(wanted))
        first = next(iter(self.questions.values()))
        added = {}
        for name, each in tried.items():
            ranked = sorted(each, key=lambda point: (first(each[point]), point))
            added[name] = self.untried(name, [*chosen[name], *ranked], each)[:count]
        return added

    def tried(
        self, experiment: Experiment, rounds: int, runs: str | None
    ) -> dict[str, dict[Point, Record]]:
        """What each optimizer has tried after so many rounds of widening.

        Raises:
            ValueError: a run of them has not ended.
        """
        found: dict[str, dict[Point, Record]] = {name: {} for name in self.axes}
        points = {name: self.grid(name) for name in self.axes}
        for number in range(rounds + 1):
            for name, each in points.items():
                for point in each:
                    overrides = self.setting_at(name, point)
                    found[name][point] = experiment.found(overrides, TUNING_SEED, runs)
            if number < rounds:
                points = self.widened(found)
        return found

    def stages(
        self, experiment: Callable[[], Experiment]
    ) -> dict[str, Callable[[str | None], Plan]]:
        """The plans of its stages, by name."""

        def plan(points: Mapping[str, Sequence[Point]]) -> Plan:
            settings = [self.setting_at(name, p) for name, each in points.items() for p in each]
            return product(settings, [TUNING_SEED])

        def widening(number: int) -> Callable[[str | None], Plan]:
            return lambda runs: plan(self.widened(self.tried(experiment(), number - 1, runs)))

        return {
            self.names[0]: lambda runs: plan({name: self.grid(name) for name in self.axes}),
            **{name: widening(i) for i, name in enumerate(self.names[1:], 1)},
        }

    def chosen(
        self, experiment: Experiment, questions: Sequence[str], runs: str | None
    ) -> dict[str, list[str]]:
        """The settings that questions choose at the end, each once, by optimizer."""
        found = {}
        for name, each in self.tried(experiment, self.rounds, runs).items():
            points = self.choices(each)
            settings = [self.setting_at(name, points[q]) for q in questions if q in points]
            found[name] = list(dict.fromkeys(settings))
        return found

    def recorded(self, records: Sequence[Record], optimizer: str) -> dict[Point, Record]:
        """What an optimizer has tried by records, whether a round of them is complete or not."""
        known = self.points(optimizer)
        return {
            known[record["stages"][stage]]: record
            for record in records
            if (stage := self.stage_of(record)) and record["stages"][stage] in known
        }

    def open_at(self, records: Sequence[Record], optimizer: str, question: str) -> list[Point]:
        """The open sides of what a question chooses by records; none where it chooses nothing."""
        tried = self.recorded(records, optimizer)
        chosen = self.choices(tried).get(question)
        return [] if chosen is None else self.open_sides(optimizer, chosen, tried)

    def not_interior(
        self, records: Sequence[Record], questions: Collection[str] | None = None
    ) -> list[str]:
        """The optimizers of which a choice, by records, has a neighbour that was not tried, or lies
        where the lattice ends; of some questions, or of all.
        """
        asked = self.questions if questions is None else questions
        return [
            name
            for name in self.axes
            if any(self.open_at(records, name, question) for question in asked)
        ]

    def reported(
        self, records: Sequence[Record], question: str, stage: str = "reported"
    ) -> dict[str, list[Record]]:
        """The runs of a stage at what a question chooses by records, by optimizer, in order of
        seeds; those that there are.
        """
        found = {}
        for name in self.axes:
            point = self.choices(self.recorded(records, name)).get(question)
            if point is not None:
                overrides = self.setting_at(name, point)
                runs = [each for each in records if each["stages"].get(stage) == overrides]
                if runs:
                    found[name] = sorted(runs, key=lambda run: run["seed"])
        return found

    def stage_of(self, record: Record) -> str | None:
        """The first of its stages that a record is of, if it is of any."""
        return next((name for name in self.names if name in record["stages"]), None)
