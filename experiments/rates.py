"""Claim C2: in how many cells a dead-direction rate is read (``make rates``).

python -m experiments.rates plan STAGE      # the runs of a stage, for scripts/sweep.py
python -m experiments.rates collect         # records of all runs, and what was read of them, into results/rates
python -m experiments.rates report          # tables and figures from there

AdamW and DDCAdam at one setting (rate 0.001, decay 0.1) on ``+experiment=lm_overtrain slt=cells``, whose configuration
holds the rule by which a cell is read. Stages: ``small``, 4 layers, 5 × 5 cells, seeds 0 to 2; ``deep``, 12 layers,
the paper's 13 × 5 cells, seed 0; ``coefficients``, estimates of the learning coefficient along the run, seed 0.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path

from ddc.report import singular as report
from ddc.report.book import Section
from ddc.report.claims import Claim, Verdict
from ddc.report.runs import RECORD_FILES, Run
from ddc.training.sweep import SweepRun, parse_sweep
from experiments.output import save_document
from experiments.protocols import ROOT, Stage, command_line, ended_run

RESULTS = ROOT / "results/rates"
OPTIMIZERS = ("adamw", "ddcadam")
#: Overrides and seeds of each stage, and the folder of its records.
STAGES = {
    "small": ("slt=cells", range(3), RESULTS),
    "deep": ("slt=cells model.layers=12", range(1), RESULTS),
    "coefficients": ("slt=full", range(1), ROOT / "results/lm_overtrain_full"),
}


def plan(stage: str, runs: str) -> list[str]:
    """The runs of a stage as the lines of a sweep file."""
    overrides, seeds, _ = STAGES[stage]
    return [
        f"+experiment=lm_overtrain wandb=disabled runs={runs} seed={seed} optimizer={optimizer} {overrides}"
        for seed, optimizer in itertools.product(seeds, OPTIMIZERS)
    ]


def recorded(run: SweepRun, folder: Path) -> bool:
    """Whether a folder of records has a run of this optimizer, seed and depth."""
    return any(described(Run.read(path.parent)) == planned(run) for path in folder.glob("*/summary.json"))


def described(run: Run) -> tuple[str, str, str]:
    """Optimizer, seed and depth of a recorded run."""
    config = run.info["config"]
    return config["optimizer"]["name"], str(config["seed"]), str(config["model"]["layers"])


def planned(run: SweepRun) -> tuple[str, str, str]:
    """Optimizer, seed and depth of a planned run."""
    values = dict(each.split("=", 1) for each in run.overrides)
    return values["optimizer"], values["seed"], values.get("model.layers", "4")


def status(runs: str) -> list[Stage]:
    """How far each stage is."""
    found = []
    for name, (_, _, folder) in STAGES.items():
        sweep = parse_sweep(plan(name, runs))
        missing = [run for run in sweep if not recorded(run, folder)]
        seconds = [
            run.summary["seconds"] for path in folder.glob("*/summary.json") if (run := Run.read(path.parent)).summary
        ]
        ended = sum(run.ended for run in missing)
        mean = statistics.mean(seconds) if seconds else None
        found.append(Stage(name, len(sweep), len(sweep) - len(missing), ended, mean))
    return found


def collect(runs: str) -> None:
    """Keep the records of the runs of all stages, and what ``scripts/read_rates.py`` read of them.

    Raises:
        ValueError: a run has not ended, or was not read.
    """
    for name, (_, _, folder) in STAGES.items():
        for run in parse_sweep(plan(name, runs)):
            ended_run(run)
            if name != "coefficients" and not (run.folder / "rates.json").exists():
                raise ValueError(f"{run.folder} is not read: python scripts/read_rates.py {run.folder}")
            (folder / run.folder.name).mkdir(parents=True, exist_ok=True)
            for pattern in (*RECORD_FILES, "rates.json", "rates.p*", "rates-spectra.p*"):
                for path in run.folder.glob(pattern):
                    shutil.copyfile(path, folder / run.folder.name / path.name)


def verdicts(claims: Mapping[str, Claim]) -> list[Verdict]:
    """What the records say on the claim."""
    return report.verdicts(report.load(RESULTS), claims["C2"])


def section(claims: Mapping[str, Claim]) -> Section:
    """Tables and figures of the records."""
    readings = report.load(RESULTS)
    document = report.markdown(readings, claims["C2"])
    save_document(RESULTS / "table.md", document)
    estimated = [Run.read(path.parent) for path in sorted(STAGES["coefficients"][2].glob("*/run.json"))]
    figures = report.draw(readings, estimated, RESULTS)
    return Section("Dead-direction rates and learning coefficients", ("C2",), "make rates", document, figures)


if __name__ == "__main__":
    command_line(str(__doc__), list(STAGES), plan, collect, section)
