"""What the experiments that compare optimizers share: two protocols, a tuning in stages, and the way to the records.

*matched*: all optimizers at comparable settings. *tuned*: each at the best of the same number of settings. All of them
run on one seed (``tuning``), the best go on to further seeds (``finals``), the best of these is reported on seeds of
its own (``tuned``).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from ddc.report.runs import Run, read_lines
from ddc.report.stages import Record
from ddc.training.sweep import SweepRun, parse_sweep, shown
from experiments.output import save_records

#: Runs as overrides and seeds.
Plan = list[tuple[str, int]]
TUNING_SEED, FINAL_SEEDS = 100, (101, 102)
FINALISTS = 2
STAGES = ("matched", "tuning", "finals", "tuned")


@dataclass(frozen=True)
class Experiment:
    """The runs of an experiment.

    Args:
        overrides: of every run; the first of them is its ``+experiment=``.
        seeds: on which both protocols report.
        matched: one setting an optimizer.
        grid: the settings that the tuning tries, as many for each optimizer.
        score: what the tuning chooses by, from the records of a setting's runs; larger is better.
        curve: keys of the evaluations that a record keeps, as columns.
        more: further stages by name; what gives their runs may ask :meth:`tuned`.
    """

    overrides: str
    seeds: Sequence[int]
    matched: Sequence[str]
    grid: Mapping[str, Sequence[str]]
    score: Callable[[Sequence[Record]], Any]
    curve: Sequence[str]
    more: Mapping[str, Callable[[str], Plan]]

    @property
    def stages(self) -> tuple[str, ...]:
        return (*STAGES, *self.more)

    def plan(self, stage: str, runs: str) -> Plan:
        """The runs of a stage; those of finals and tuned follow from ended runs.

        Args:
            stage: one of :attr:`stages`.
            runs: the folder of the runs.

        Raises:
            ValueError: an unknown stage, or one that follows from runs that have not ended.
        """
        match stage:
            case "matched":
                return product(self.matched, self.seeds)
            case "tuning":
                return product([each for settings in self.grid.values() for each in settings], [TUNING_SEED])
            case "finals":
                return product([each for name in self.grid for each in self.finalists(name, runs)], FINAL_SEEDS)
            case "tuned":
                return product([self.tuned(name, runs) for name in self.grid], self.seeds)
        if stage not in self.more:
            raise ValueError(f"Invalid stage={stage!r}: expected one of {', '.join(self.stages)}")
        return self.more[stage](runs)

    def best(
        self,
        settings: Sequence[str],
        seeds: Sequence[int],
        runs: str,
        score: Callable[[Sequence[Record]], Any] | None = None,
    ) -> list[str]:
        """Settings, the best first, by :attr:`score` or by another.

        Raises:
            ValueError: a run that is needed has not ended.
        """
        score = score or self.score

        def value(setting: str) -> Any:
            return score([self.record(ended_run(run)) for run in self.sweep(product([setting], seeds), runs)])

        return sorted(settings, key=value, reverse=True)

    def finalists(self, optimizer: str, runs: str) -> list[str]:
        """The settings that go on from the tuning."""
        return self.best(self.grid[optimizer], [TUNING_SEED], runs)[:FINALISTS]

    def tuned(self, optimizer: str, runs: str) -> str:
        """The setting that the tuning chose."""
        return self.best(self.finalists(optimizer, runs), [TUNING_SEED, *FINAL_SEEDS], runs)[0]

    def lines(self, planned: Plan, runs: str) -> list[str]:
        """A plan as the lines of a sweep file."""
        return [f"{self.overrides} wandb=disabled runs={runs} seed={seed} {each}" for each, seed in planned]

    def sweep(self, planned: Plan, runs: str) -> list[SweepRun]:
        """A plan as runs, in its order."""
        return parse_sweep(self.lines(planned, runs))

    def record(self, run: Run) -> Record:
        """What a report needs of a run, and where it comes from."""
        curve = {key: [row[key] for row in run.rows] for key in self.curve}
        seconds = sum(row["seconds"] for row in read_lines(run.folder / "timing.jsonl"))
        return {**run.info, "curve": curve, "summary": run.summary, "seconds": seconds, "diverged": run.summary is None}

    def ended(self, runs: str) -> dict[Path, dict[str, str]]:
        """Folders of all runs, which must have ended, with the stages that each belongs to and its setting there.

        Raises:
            ValueError: a run has not ended.
        """
        stages: dict[Path, dict[str, str]] = defaultdict(dict)
        for stage in self.stages:
            planned = self.plan(stage, runs)
            for (setting, _), run in zip(planned, self.sweep(planned, runs), strict=True):
                ended_run(run)
                stages[run.folder][stage] = setting
        return stages

    def collect(self, runs: str, more: Callable[[Path], Record] = lambda folder: {}) -> list[Record]:
        """One record a run: its setting in each stage that it belongs to, configuration, origin, curve, and ``more``.

        Raises:
            ValueError: a run has not ended.
        """
        return [
            {"stages": stages, **self.record(Run.read(folder)), **more(folder)}
            for folder, stages in track(self.ended(runs).items(), "collecting")
        ]


def product(settings: Iterable[str], seeds: Iterable[int]) -> Plan:
    """Settings on seeds, seed by seed: a sweep that is cut short has whole seeds."""
    return [(each, seed) for seed, each in itertools.product(seeds, list(settings))]


def ended_run(run: SweepRun) -> Run:
    """The records of a run.

    Raises:
        ValueError: it has not ended.
    """
    if not run.ended:
        raise ValueError(f"{shown(run.folder)} is {run.state}: run the stages before this one first")
    return Run.read(run.folder)


def command_line(
    experiment: Experiment,
    doc: str,
    results: Path,
    collect: Callable[[str], list[Record]],
    report: Callable[[Path], Any],
) -> None:
    """``plan STAGE``, ``collect`` and ``report`` of an experiment.

    Args:
        experiment: whose runs these are.
        doc: help text.
        results: folder of the records, and of what is made from them.
        collect: from the folder of the runs, the records that ``results/runs.jsonl`` is to hold.
        report: makes tables and figures in a folder that holds the records.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("plan").add_argument("stage", choices=experiment.stages)
    commands.add_parser("collect")
    commands.add_parser("report")
    for command in ("plan", "collect"):
        commands.choices[command].add_argument("--runs", default="runs", help="folder of the runs")
    for command in ("collect", "report"):
        commands.choices[command].add_argument("--output", type=Path, default=results)
    arguments = parser.parse_args()
    try:
        if arguments.command == "plan":
            print("\n".join(experiment.lines(experiment.plan(arguments.stage, arguments.runs), arguments.runs)))
        elif arguments.command == "collect":
            save_records(arguments.output / "runs.jsonl", collect(arguments.runs))
        else:
            report(arguments.output)
    except ValueError as error:
        sys.exit(f"error: {error}")
