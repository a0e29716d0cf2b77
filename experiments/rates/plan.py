"""Claim C2: in how many cells a dead-direction rate is read.

AdamW and DDCAdam at one setting (rate 0.001, decay 0.1) on ``+experiment=lm_overtrain slt=cells``,
whose configuration holds the rule by which a cell is read. Stages: ``small``, 4 layers, 5 × 5
cells, seeds 0 to 2; ``deep``, 12 layers, 13 × 5 cells, as many as the paper's, seed 0;
``coefficients``, estimates of the learning coefficient along the run, seed 0.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddc.report.runs import RECORD_FILES
from ddc.training.sweep import SweepRun, parse_sweep
from experiments.protocols import ROOT, Stage, wandb_names

OPTIMIZERS = ("adamw", "ddcadam")
READ_RATES = "scripts/read_rates.py"


@dataclass(frozen=True)
class Experiment:
    """Runs whose records are kept in folders, with what :data:`READ_RATES` read of them.

    Args:
        results: folder of the committed records.
        settings: overrides and seeds of each stage.
        read: the stages whose cells are read.
    """

    results: Path
    settings: Mapping[str, tuple[str, range]]
    read: tuple[str, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of all stages."""
        return tuple(self.settings)

    @property
    def scripts(self) -> dict[str, str]:
        """By stage, the script that reads each of its ended runs."""
        return dict.fromkeys(self.read, READ_RATES)

    def plan_lines(self, stage: str, runs: str, missing: bool = False) -> list[str]:
        """The runs of a stage as the lines of a sweep file; with ``missing`` those alone that have
        no committed records.
        """
        overrides, seeds = self.settings[stage]
        names = wandb_names("rates", stage, "matched")
        return [
            f"+experiment=lm_overtrain runs={runs} seed={seed} optimizer={optimizer} {overrides}"
            f" {names}"
            for seed, optimizer in itertools.product(seeds, OPTIMIZERS)
            if not missing or not (self.results / stage / f"{optimizer}-seed{seed}").exists()
        ]

    def sweep(self, stage: str, runs: str) -> dict[Path, SweepRun]:
        """The runs of a stage, by the folder of their records."""
        _, seeds = self.settings[stage]
        kept = [
            self.results / stage / f"{name}-seed{seed}"
            for seed, name in itertools.product(seeds, OPTIMIZERS)
        ]
        return dict(zip(kept, parse_sweep(self.plan_lines(stage, runs)), strict=True))

    def status(self, runs: str) -> list[Stage]:
        """How far each stage is."""
        found = []
        for stage in self.stages:
            planned = self.sweep(stage, runs)
            missing = [run for kept, run in planned.items() if not (kept / "run.json").exists()]
            seconds = [
                json.loads(path.read_text())["seconds"]
                for path in (self.results / stage).glob("*/summary.json")
            ]
            mean = statistics.mean(seconds) if seconds else None
            ended = sum(run.ended for run in missing)
            found.append(Stage(stage, len(planned), len(planned) - len(missing), ended, mean))
        return found

    def collect(self, runs: str) -> None:
        """Keep the records of the ended runs, and what was read of them; those of others stay.

        Raises:
            ValueError: a run was not read.
        """
        for stage in self.stages:
            for kept, run in self.sweep(stage, runs).items():
                if not run.ended:
                    state = "stays as recorded" if kept.exists() else "is missing"
                    print(f"{stage}: {kept.name} {state}")
                    continue
                read = (run.folder / "rates.json").exists()
                if stage in self.read and run.state == "complete" and not read:
                    raise ValueError(f"{run.folder} is not read: python {READ_RATES} {run.folder}")
                shutil.rmtree(kept, ignore_errors=True)
                kept.mkdir(parents=True)
                for pattern in (*RECORD_FILES, "rates.json", "rates.p*", "rates-spectra.p*"):
                    for path in run.folder.glob(pattern):
                        shutil.copyfile(path, kept / path.name)


EXPERIMENT = Experiment(
    results=ROOT / "results/rates",
    settings={
        "small": ("slt=cells", range(3)),
        "deep": ("slt=cells model.layers=12", range(1)),
        "coefficients": ("slt=full", range(1)),
    },
    read=("small", "deep"),
)
