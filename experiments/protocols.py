"""What the experiments that compare optimizers share: two protocols, a tuning in stages, and the
way to the records.

*matched*: all optimizers at comparable settings. *tuned*: each at the best of the same number of
settings. All of them run on one seed (``tuning``), the best go on to further seeds (``finals``),
the best of these is reported on seeds of its own (``tuned``).
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from rich.progress import track

from ddc.report.claims import load_claims
from ddc.report.runs import Run, read_lines
from ddc.report.stages import Record
from ddc.training.sweep import SweepRun, parse_sweep, shown
from experiments.output import save_records

ROOT = Path(__file__).resolve().parents[1]
#: Where each claim or question has its folder (:mod:`experiments.questions`).
EXPERIMENTS = ROOT / "experiments"

#: Runs as overrides and seeds.
Plan = list[tuple[str, int]]
TUNING_SEED, FINAL_SEEDS = 100, (101, 102)
FINALISTS = 2
STAGES = ("matched", "tuning", "finals", "tuned")
#: The protocol that a stage is a part of; further stages are of none.
PROTOCOL_OF = {"matched": "matched", "tuning": "tuned", "finals": "tuned", "tuned": "tuned"}


@dataclass(frozen=True)
class Stage:
    """How far a stage of an experiment is.

    Attributes:
        name: of the stage.
        needed: runs that it consists of; None where that follows from runs that are missing.
        recorded: how many of them have a committed record.
        ended: how many of the others have ended in the folder of the runs.
        seconds: that a run takes on one core; None where no record tells.
    """

    name: str
    needed: int | None
    recorded: int
    ended: int
    seconds: float | None

    @property
    def missing(self) -> int:
        """How many are still to run."""
        return (self.needed or 0) - self.recorded - self.ended


@dataclass(frozen=True)
class Experiment:
    """The runs of an experiment.

    Args:
        overrides: of every run; the first of them is its ``+experiment=``.
        seeds: on which both protocols report.
        curve: keys of the evaluations that a record keeps, as columns.
        results: folder of the committed records.
        more: further stages by name; what gives their runs may ask :meth:`tuned`. In a setting
            ``{runs}`` stands for the folder of the runs.
        matched: one setting an optimizer.
        grid: the settings that the tuning tries, as many for each optimizer; without one there are
            no stages but ``more``.
        score: what the tuning chooses by, from the records of a setting's runs; larger is better.
        final_seeds: on which the best settings run after the tuning seed; none: the best there is
            taken.
        more: further stages by name; what gives their runs may ask :meth:`tuned`.
        scripts: by stage, the script that measures each of its ended runs.
        measured: what a record holds of that, from the folder of its run and its stages.
    """

    overrides: str
    seeds: Sequence[int]
    curve: Sequence[str]
    results: Path
    more: Mapping[str, Callable[[str | None], Plan]]
    matched: Sequence[str] = ()
    grid: Mapping[str, Sequence[str]] = field(default_factory=dict)
    score: Callable[[Sequence[Record]], Any] = len
    final_seeds: Sequence[int] = FINAL_SEEDS
    scripts: Mapping[str, str] = field(default_factory=dict)
    measured: Callable[[Path, Collection[str]], Record] = lambda folder, stages: {}

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of all stages, in an order in which they can run."""
        own = [stage for stage in STAGES if stage != "finals" or self.final_seeds]
        return (*(own if self.grid else ()), *self.more)

    @cached_property
    def records(self) -> list[Record]:
        """The committed records."""
        return read_lines(self.results / "runs.jsonl")

    def committed(self) -> list[Record]:
        """The committed records, which must be those of all planned runs.

        Raises:
            ValueError: some are missing.
        """
        for stage in self.stages:
            planned = self.plan(stage, None)
            missing = sum(self.recorded(*each) is None for each in planned)
            if missing:
                path = self.results / "runs.jsonl"
                raise ValueError(
                    f"{path} lacks {missing} of {len(planned)} runs of {stage}: run and collect"
                    " them first"
                )
        return self.records

    def missing(self) -> str:
        """Which stages lack committed records, in words; empty where none does."""
        words = []
        for stage in self.stages:
            try:
                planned = self.plan(stage, None)
            except ValueError:  # follows from runs that are missing
                words.append(f"{stage} (not planned yet)")
                continue
            there = sum(self.recorded(*each) is not None for each in planned)
            if there < len(planned):
                words.append(f"{stage} ({there} of {len(planned)})")
        return f"Stages with missing runs: {', '.join(words)}." if words else ""

    def plan(self, stage: str, runs: str | None) -> Plan:
        """The runs of a stage; those of finals and tuned follow from ended runs, or from the
        records of such.

        Args:
            stage: one of :attr:`stages`.
            runs: the folder of the runs; None for the committed records alone.

        Raises:
            ValueError: an unknown stage, or one that follows from runs that have not ended.
        """
        match stage:
            case "matched":
                return product(self.matched, self.seeds)
            case "tuning":
                return product(
                    [each for settings in self.grid.values() for each in settings], [TUNING_SEED]
                )
            case "finals":
                return product(
                    [each for name in self.grid for each in self.finalists(name, runs)],
                    self.final_seeds,
                )
            case "tuned":
                return product([self.tuned(name, runs) for name in self.grid], self.seeds)
        if stage not in self.more:
            raise ValueError(f"Invalid stage={stage!r}: expected one of {', '.join(self.stages)}")
        return self.more[stage](runs)

    def best(
        self,
        settings: Sequence[str],
        seeds: Sequence[int],
        runs: str | None,
        score: Callable[[Sequence[Record]], Any] | None = None,
    ) -> list[str]:
        """Settings, the best first, by :attr:`score` or by another.

        Raises:
            ValueError: a run that is needed has not ended, or no setting scores more than minus
                infinity.
        """
        score = score or self.score
        values = {
            each: score([self.found(each, seed, runs) for seed in seeds]) for each in settings
        }
        ranked = sorted(settings, key=values.__getitem__, reverse=True)
        if values[ranked[0]] == -math.inf:
            raise ValueError(
                f"none of {len(ranked)} settings qualifies, the first of them {ranked[0]!r}"
            )
        return ranked

    def recorded(self, setting: str, seed: int) -> Record | None:
        """The committed record of a run, if there is one."""
        here = (
            each
            for each in self.records
            if each["seed"] == seed and setting in each["stages"].values()
        )
        return next(here, None)

    def found(self, setting: str, seed: int, runs: str | None) -> Record:
        """The record of a run: of the run itself where it has ended, else the committed one.

        Raises:
            ValueError: there is neither.
        """
        record = self.recorded(setting, seed)
        if runs is None:
            if record is None:
                raise ValueError(
                    f"{self.results}/runs.jsonl lacks seed {seed} of {setting!r}: run and collect"
                    " it first"
                )
            return record
        (run,) = self.sweep([(setting, seed)], runs)
        return record if record and not run.ended else self.record(ended_run(run))

    def status(self, runs: str) -> list[Stage]:
        """How far each stage is; a run that two stages share is missing in the first alone."""
        seconds = (
            statistics.mean(record["seconds"] for record in self.records) if self.records else None
        )
        found: list[Stage] = []
        counted: set[tuple[str, int]] = set()
        for name in self.stages:
            try:
                planned = self.plan(name, runs)
            except ValueError:  # follows from runs that are missing
                found.append(Stage(name, None, 0, 0, seconds))
                continue
            missing = [
                each for each in planned if self.recorded(*each) is None and each not in counted
            ]
            counted |= {*missing}
            ended = sum(run.ended for run in self.sweep(missing, runs))
            found.append(Stage(name, len(planned), len(planned) - len(missing), ended, seconds))
        return found

    def finalists(self, optimizer: str, runs: str | None) -> list[str]:
        """The settings that go on from the tuning."""
        return self.best(self.grid[optimizer], [TUNING_SEED], runs)[:FINALISTS]

    def tuned(self, optimizer: str, runs: str | None) -> str:
        """The setting that the tuning chose."""
        return self.best(self.finalists(optimizer, runs), [TUNING_SEED, *self.final_seeds], runs)[0]

    def plan_lines(self, stage: str, runs: str, missing: bool = False) -> list[str]:
        """The runs of a stage as the lines of a sweep file, with their names in W&B; with
        ``missing`` those alone that have no committed record.
        """
        names = wandb_names(self.results.name, stage, PROTOCOL_OF.get(stage))
        planned = [
            each for each in self.plan(stage, runs) if not missing or self.recorded(*each) is None
        ]
        return [f"{line} {names}" for line in self.lines(planned, runs)]

    def lines(self, planned: Plan, runs: str) -> list[str]:
        """A plan as overrides."""
        return [
            f"{self.overrides} runs={runs} seed={seed} {each.replace('{runs}', runs)}"
            for each, seed in planned
        ]

    def sweep(self, planned: Plan, runs: str) -> list[SweepRun]:
        """A plan as runs, in its order."""
        return [resolved(line) for line in self.lines(planned, runs)]

    def record(self, run: Run) -> Record:
        """What a report needs of a run, and where it comes from."""
        curve = {key: [row[key] for row in run.rows] for key in self.curve}
        seconds = sum(row["seconds"] for row in read_lines(run.folder / "timing.jsonl"))
        return {
            **run.info,
            "curve": curve,
            "summary": run.summary,
            "seconds": seconds,
            "diverged": run.summary is None,
        }

    def collect(self, runs: str) -> None:
        """Write the records of all runs to :attr:`results`.

        Raises:
            ValueError: no run has ended.
        """
        save_records(self.results / "runs.jsonl", self.collected(runs))
        self.__dict__.pop("records", None)  # the next to ask reads these

    def collected(self, runs: str) -> list[Record]:
        """One record a run: its setting in each stage that it belongs to, configuration, origin,
        curve, and what was measured of it.

        Of runs that have not ended here, the committed records stay; what has neither is missing,
        and said so. So an experiment can be run on several machines, or in several goes.

        Args:
            runs: the folder of the runs.

        Raises:
            ValueError: no run has ended.
        """
        here: dict[Path, dict[str, str]] = defaultdict(dict)
        kept: dict[str, Record] = {}
        for stage in self.stages:
            try:
                planned = self.plan(stage, runs)
            except ValueError as error:
                print(f"{stage}: {error}")
                continue
            missing = 0
            for (setting, seed), run in zip(planned, self.sweep(planned, runs), strict=True):
                record = self.recorded(setting, seed)
                if run.ended:
                    here[run.folder][stage] = setting
                elif record:
                    kept.setdefault(record["id"], {**record, "stages": {}})["stages"][stage] = (
                        setting
                    )
                else:
                    missing += 1
            if missing:
                print(f"{stage}: {missing} of {len(planned)} runs are missing")
        if not here and not kept:
            raise ValueError(f"no run of {self.overrides!r} has ended in {runs}")
        fresh = track(here.items(), "collecting")
        collected = [
            {"stages": stages, **self.record(Run.read(folder)), **self.measured(folder, stages)}
            for folder, stages in fresh
        ]
        return [*collected, *kept.values()]


def wandb_names(experiment: str, stage: str, protocol: str | None) -> str:
    """Overrides that name a run in W&B: its experiment, its stage, and as tags the claims and the
    protocol.

    They are no part of a run's id. A run that two stages share keeps the names of the one that ran
    it.
    """
    claims = [
        claim.id for claim in load_claims(EXPERIMENTS).values() if claim.experiment == experiment
    ]
    tags = ",".join(claims + ([protocol] if protocol else []))
    return f"wandb.group={experiment} wandb.job_type={stage} wandb.tags=[{tags}]"


@cache
def resolved(line: str) -> SweepRun:
    """The run of one line of a sweep file; plans ask for the same runs again and again."""
    (run,) = parse_sweep([line])
    return run


def left_by(script: str, path: Path) -> Any:
    """What a script left in the folder of a run.

    Raises:
        ValueError: it has not measured that run.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: python {script} {path.parent}")
    return json.loads(path.read_text())


def product(settings: Iterable[str], seeds: Iterable[int]) -> Plan:
    """Settings on seeds, seed by seed: a sweep that is cut short has whole seeds."""
    return [(each, seed) for seed, each in itertools.product(seeds, list(settings))]


def ended_run(run: SweepRun) -> Run:
    """The records of a run.

    Raises:
        ValueError: it has not ended.
    """
    if not run.ended:
        raise ValueError(
            f"{shown(run.folder)} is {run.state}: run the stages before this one first"
        )
    return Run.read(run.folder)
