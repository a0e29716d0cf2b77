"""The questions of this project. Each is a folder beside this file, found by looking, and has one
name: of the folder, of its configuration, of its ``make`` target, and of its folder in results.

What a folder may hold, besides an ``__init__.py`` whose docstring is the title:

- ``claim.yaml``: the claims of the paper that it tests, and the rule of their verdicts
  (:class:`ddc.report.claims.Claim`);
- ``run.yaml``: the configuration of its runs, ``train.py +experiment=NAME``;
- ``plan.py``: its runs by stages, as ``EXPERIMENT`` (:class:`Planned`);
- ``measure.py``: ``main(arguments)``, which measures, after the runs if there are any, and writes
  records;
- ``report.py``: ``load()`` gives the committed records, ``results(records, claims)`` their tables
  and figures, the first of them the question's own, and where there is a claim ``verdicts(records,
  claims)`` its rows of the main table, and ``FIGURES``, by claim the name of the figure that stands
  beside that table. None of them trains or measures.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ddc.report.book import Section
from ddc.report.claims import Claim, Verdict
from ddc.report.figures import drawn
from experiments.output import Results
from experiments.protocols import EXPERIMENTS, Stage


class Planned(Protocol):
    """Runs of ``train.py`` in stages; :class:`experiments.protocols.Experiment` is the usual
    one.
    """

    @property
    def stages(self) -> Sequence[str]:
        """Names of all stages, in an order in which they can run."""

    @property
    def scripts(self) -> Mapping[str, str]:
        """By stage, the script that measures each of its ended runs, where there is one."""

    def plan_lines(self, stage: str, runs: str, missing: bool = False) -> list[str]:
        """The runs of a stage as the lines of a sweep file; with ``missing`` those alone that have
        no committed record.
        """

    def status(self, runs: str) -> list[Stage]:
        """How far each stage is."""

    def collect(self, runs: str) -> None:
        """Write the records that are committed, of the runs that have ended."""


@dataclass(frozen=True)
class Question:
    """A folder of ``experiments``; its modules are imported when they are asked for."""

    name: str

    def module(self, part: str) -> ModuleType | None:
        """``plan``, ``measure`` or ``report``; None if the folder has none."""
        if not (EXPERIMENTS / self.name / f"{part}.py").exists():
            return None
        return importlib.import_module(f"experiments.{self.name}.{part}")

    @property
    def title(self) -> str:
        """In words."""
        doc = importlib.import_module(f"experiments.{self.name}").__doc__ or self.name
        return doc.strip().removesuffix(".")

    def ids(self, claims: Mapping[str, Claim]) -> tuple[str, ...]:
        """Of its claims."""
        return tuple(claim.id for claim in claims.values() if claim.experiment == self.name)

    @property
    def plan(self) -> Planned | None:
        """Its runs; None if it measures by itself."""
        plan = self.module("plan")
        return None if plan is None else plan.EXPERIMENT

    @cached_property
    def records(self) -> Any:
        """What is committed of it.

        Raises:
            ValueError: not all that its report needs.
        """
        report = self.module("report")
        return None if report is None else report.load()

    def status(self, runs: str) -> list[Stage]:
        """How far each of its stages is."""
        return (self.plan or self.module("measure")).status(runs)  # type: ignore[union-attr]

    def results(self, claims: Mapping[str, Claim]) -> list[Results]:
        """Its tables and figures; none without a report."""
        report = self.module("report")
        return [] if report is None else report.results(self.records, claims)

    def verdicts(self, claims: Mapping[str, Claim]) -> list[Verdict]:
        """What its records say on its claims."""
        report = self.module("report")
        if report is None or not self.ids(claims):
            return []
        return report.verdicts(self.records, claims)

    def section(self, claims: Mapping[str, Claim]) -> Section:
        """Its part of the report: its own tables and figures, made."""
        own = self.results(claims)[0]
        documents = {name: own.table(name) for name in own.tables}
        named = getattr(self.module("report"), "FIGURES", {})
        leading = {claim: name for claim, name in named.items() if name in own.figures}
        return Section(
            self.title,
            self.ids(claims),
            f"make {self.name}",
            documents["table"].removeprefix(f"# {self.title}\n\n"),
            drawn(own.figures, own.folder),
            {claim: own.folder / f"{name}.png" for claim, name in leading.items()},
        )


def questions(claims: Mapping[str, Claim], folder: Path = EXPERIMENTS) -> list[Question]:
    """All of them: those with claims in the order of these, then the others by name."""
    names = sorted(path.parent.name for path in folder.glob("*/__init__.py"))
    claimed = dict.fromkeys(claim.experiment for claim in claims.values())
    return [Question(name) for name in dict.fromkeys([*claimed, *names])]
