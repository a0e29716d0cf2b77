"""Claim C2: in how many cells a dead-direction rate is read (``make rates``).

python -m experiments.rates plan STAGE      # the runs of a stage, for scripts/sweep.py
python -m experiments.rates collect         # committed records, from runs
python -m experiments.rates report          # tables and figures from there

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
from functools import partial
from pathlib import Path

from ddc.report import singular as report
from ddc.report.book import Section
from ddc.report.claims import Claim, Verdict
from ddc.report.figures import Drawing, drawn
from ddc.report.rates import cells_of, plot_cells, plot_spectra, settings, titled
from ddc.report.runs import RECORD_FILES, Run, markdown_table, plot_curves, read_lines
from ddc.training.sweep import SweepRun, parse_sweep
from experiments.output import Results
from experiments.protocols import ROOT, Stage, command_line, wandb_names

RESULTS = ROOT / "results/rates"
#: What :mod:`experiments.walks` makes.
WALKS = RESULTS / "walks.jsonl"
OPTIMIZERS = ("adamw", "ddcadam")
#: Overrides and seeds of each stage.
STAGES = {
    "small": ("slt=cells", range(3)),
    "deep": ("slt=cells model.layers=12", range(1)),
    "coefficients": ("slt=full", range(1)),
}
#: The stages whose cells are read.
READ = ("small", "deep")


def plan(stage: str, runs: str) -> list[str]:
    """The runs of a stage as the lines of a sweep file."""
    overrides, seeds = STAGES[stage]
    names = wandb_names("rates", stage, "matched")
    return [
        f"+experiment=lm_overtrain runs={runs} seed={seed} optimizer={optimizer} {overrides}"
        f" {names}"
        for seed, optimizer in itertools.product(seeds, OPTIMIZERS)
    ]


def sweep(stage: str, runs: str) -> dict[Path, SweepRun]:
    """The runs of a stage, by the folder of their records."""
    _, seeds = STAGES[stage]
    kept = [
        RESULTS / stage / f"{name}-seed{seed}"
        for seed, name in itertools.product(seeds, OPTIMIZERS)
    ]
    return dict(zip(kept, parse_sweep(plan(stage, runs)), strict=True))


def status(runs: str) -> list[Stage]:
    """How far each stage is."""
    found = []
    for stage in STAGES:
        planned = sweep(stage, runs)
        missing = [run for kept, run in planned.items() if not (kept / "run.json").exists()]
        seconds = [
            json.loads(path.read_text())["seconds"]
            for path in (RESULTS / stage).glob("*/summary.json")
        ]
        mean = statistics.mean(seconds) if seconds else None
        ended = sum(run.ended for run in missing)
        found.append(Stage(stage, len(planned), len(planned) - len(missing), ended, mean))
    return found


def collect(runs: str) -> None:
    """Keep the records of the ended runs, and what ``scripts/read_rates.py`` read of them; those of
    others stay.

    Raises:
        ValueError: a run was not read.
    """
    for stage in STAGES:
        for kept, run in sweep(stage, runs).items():
            if not run.ended:
                print(
                    f"{stage}: {kept.name} {'stays as recorded' if kept.exists() else 'is missing'}"
                )
                continue
            if (
                stage in READ
                and run.state == "complete"
                and not (run.folder / "rates.json").exists()
            ):
                raise ValueError(
                    f"{run.folder} is not read: python scripts/read_rates.py {run.folder}"
                )
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            for pattern in (*RECORD_FILES, "rates.json", "rates.p*", "rates-spectra.p*"):
                for path in run.folder.glob(pattern):
                    shutil.copyfile(path, kept / path.name)


def readings() -> list[report.Reading]:
    """The committed readings of both grids; the report shows those that there are.

    Raises:
        ValueError: there are none.
    """
    found = [each for stage in READ for each in report.load(RESULTS / stage)]
    if not found:
        raise ValueError(f"{RESULTS} has no readings: run and collect them first")
    return found


def verdicts(claims: Mapping[str, Claim]) -> list[Verdict]:
    """What the records say on the claim."""
    return report.verdicts(readings(), read_lines(WALKS), claims["C2"])


def results(claims: Mapping[str, Claim]) -> list[Results]:
    """Tables and figures of the records, then those of each run that was read."""
    found, walks = readings(), read_lines(WALKS)
    estimated = [
        Run.read(path.parent) for path in sorted((RESULTS / "coefficients").glob("*/run.json"))
    ]
    small = sorted(
        (each.run for each in report.load(RESULTS / "small")), key=lambda run: run.info["id"]
    )
    figures = report.drawings(found, estimated)
    figures["comparison"] = Drawing(
        partial(plot_curves, small),
        "The runs of the 5 × 5 grid: loss curves, and the gap against the train loss, a line a"
        " run.",
    )
    tables = {
        "table": lambda: report.markdown(found, walks, claims["C2"]),
        "comparison": lambda: markdown_table(small),
    }
    return [Results(RESULTS, tables, figures), *(of_run(each.run) for each in found)]


def of_run(run: Run) -> Results:
    """The figures of one run, as ``scripts/read_rates.py`` draws them."""
    _, primary, _ = settings(run)
    return Results(
        run.folder,
        figures={
            "rates": Drawing(
                partial(plot_cells, cells_of(run), titled(run, primary)), "Cells of the run."
            ),
            "rates-spectra": Drawing(
                partial(plot_spectra, run.readings, run.label), "Spectra along the run."
            ),
        },
    )


def section(claims: Mapping[str, Claim]) -> Section:
    """Those of all runs together, made."""
    made = results(claims)[0]
    document, _ = made.table("table"), made.table("comparison")
    figures = drawn(made.figures, RESULTS)
    return Section(
        "Dead-direction rates and learning coefficients", ("C2",), "make rates", document, figures
    )


if __name__ == "__main__":
    command_line(str(__doc__), list(STAGES), plan, collect, section)
