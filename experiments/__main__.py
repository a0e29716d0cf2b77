"""All claims of the paper: how far their runs are, and the report (``make status``, ``make
report``).

python -m experiments status   # runs needed, recorded, missing; how long these take
python -m experiments report   # all tables and figures from records; results/report/index.html
python -m experiments make PATH# results/overtraining/losses.pdf; or all tables, or all figures
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

from ddc.report import cost
from ddc.report.book import Section, html, page
from ddc.report.claims import FEW_SEEDS, Claim, Verdict, load_claims, rule, verdict_table
from ddc.report.figures import Drawing, drawn
from ddc.report.runs import Run, markdown_table, plot_curves, read_lines
from ddc.report.stages import Record
from ddc.training.display import print_plainly
from ddc.training.records import write_atomically
from experiments import coverage, known_rates, learning_coefficients, precision
from experiments.output import Results, save_document
from experiments.pages import fill
from experiments.protocols import CLAIMS, ROOT, Stage

RESULTS = ROOT / "results"
REPORT = RESULTS / "report"
TITLE = "Dead-Direction Conditioners: the paper's claims, rerun"


def modules(claims: Mapping[str, Claim]) -> dict[str, ModuleType]:
    """The modules that test the claims, by name, in the claims' order."""
    names = dict.fromkeys(claim.experiment for claim in claims.values())
    return {name: importlib.import_module(f"experiments.{name}") for name in names}


def time_left(stage: Stage) -> str:
    """How long the missing runs of a stage take, on one core."""
    if stage.needed is None:
        return "later"
    if not stage.missing:
        return ""
    return "unknown" if stage.seconds is None else f"{stage.missing * stage.seconds / 3600:.1f} h"


def recorded_seconds() -> float:
    """What all runs and measurements in results took, by their own records, but for the
    benchmarks.
    """
    # runs and records
    lines = [line for path in RESULTS.glob("*/r*s.jsonl") for line in read_lines(path)]
    summaries = [json.loads(path.read_text()) for path in RESULTS.glob("rates/*/*/summary.json")]
    return sum(float(record["seconds"]) for record in (*lines, *summaries))


def status(runs: str) -> Table:
    """One row a stage: runs needed, recorded, ended but not collected, missing, and the time that
    these take.
    """
    claims = load_claims(CLAIMS)
    caption = (
        "time: of one core; later: follows from the stages before. What is recorded took "
        f"{recorded_seconds() / 3600:.1f} hours of one core."
    )
    table = Table(title="runs of the claims", caption=caption)
    for name in ("claims", "experiment", "stage", "needed", "recorded", "ended", "missing", "time"):
        table.add_column(
            name,
            justify="left" if name in ("claims", "experiment", "stage") else "right",
            no_wrap=True,
        )
    for name, module in modules(claims).items():
        ids = ", ".join(claim.id for claim in claims.values() if claim.experiment == name)
        for stage in module.status(runs):
            needed = "?" if stage.needed is None else str(stage.needed)
            numbers = [
                needed,
                str(stage.recorded),
                str(stage.ended),
                "?" if stage.needed is None else str(stage.missing),
            ]
            table.add_row(ids, name, stage.name, *numbers, time_left(stage))
            ids, name = "", ""
        table.add_section()
    return table


def summary(claims: Mapping[str, Claim], verdicts: list[Verdict]) -> str:
    """The main table with the rules of the verdicts, as Markdown."""
    parts = [
        "# Claims and verdicts",
        (
            "The claims are those of arXiv:2606.29176, as its abstract states them; each was"
            " tested at the scale that the table names, on CPUs, far below the paper's. A verdict"
            " is about that scale. Differences are paired by seed; intervals are nominally 95%:"
            " Student's t below ten seeds, bootstrap from there on, Newcombe's for differences of"
            " shares. p-values are adjusted by Holm's method within an experiment: Student's"
            f" t-test of paired differences, Fisher's exact test of counts. {FEW_SEEDS} The verdict"
            " is what the rule says; what the same records hold against it stands beside it."
        ),
        verdict_table(claims, verdicts),
        (
            "The paper has 28 figures and 9 tables. We know its abstract alone, from which they"
            " cannot be matched one by one: what answers which statement of the abstract stands at"
            " each section below, and no figure here is a copy of one of the paper's."
        ),
        "\n".join(f"- {rule(claim)}" for claim in claims.values()),
    ]
    return "\n\n".join(parts) + "\n"


def benchmarks() -> list[Results]:
    """Tables and figures of the benchmarks."""
    folder = ROOT / "results/benchmark"
    makers: dict[str, Callable[[Record], str]] = {
        "speed": cost.speed_table,
        "memory": cost.memory_table,
        "mirror": cost.mirror_table,
        "probe": cost.reading_table,
        "learning_coefficient": cost.sampling_table,
    }
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in makers}
    tables = {name: partial(make, records[name]) for name, make in makers.items()}
    return [Results(folder, tables, cost.drawings(records["speed"], records["memory"]))]


def main_job() -> list[Results]:
    """Table and curves of ``make lm_overtrain``."""
    folder = ROOT / "results/lm_overtrain"
    runs = [Run.read(path.parent) for path in sorted(folder.glob("*/run.json"))]
    curves = Drawing(
        partial(plot_curves, runs),
        "Loss curves of both optimizers, and the gap against the train loss.",
    )
    return [Results(folder, {"comparison": lambda: markdown_table(runs)}, {"comparison": curves})]


def cost_section() -> Section:
    """What a step costs, from the records of the benchmarks."""
    (made,) = benchmarks()
    tables = [made.table(name) for name in ("speed", "memory", "mirror")]
    return Section(
        "Cost", (), "make benchmark", "\n".join(tables), drawn(made.figures, made.folder)
    )


def ground_truths() -> Section:
    """What the measurement of singular structure was calibrated on."""
    parts = {
        "Analytic rates": known_rates,
        "Coverage of the intervals of rates": coverage,
        "Known learning coefficients": learning_coefficients,
    }
    tables = [
        f"## {title}\n\n{module.results()[0].table('table')}" for title, module in parts.items()
    ]
    return Section(
        "Ground truths",
        (),
        "make known_rates coverage learning_coefficients",
        "\n".join(tables),
        {},
    )


def sources(claims: Mapping[str, Claim]) -> dict[str, Callable[[], list[Results]]]:
    """What gives the tables and figures of each folder in results."""
    return {
        **{name: partial(module.results, claims) for name, module in modules(claims).items()},
        "known_rates": known_rates.results,
        "learning_coefficients": learning_coefficients.results,
        "coverage": coverage.results,
        "precision": precision.results,
        "benchmark": benchmarks,
        "lm_overtrain": main_job,
        "report": lambda: [
            Results(REPORT, {"claims": lambda: summary(claims, all_verdicts(claims))})
        ],
    }


def all_verdicts(claims: Mapping[str, Claim]) -> list[Verdict]:
    """What the records say on all claims.

    Raises:
        ValueError: an experiment's runs are not complete.
    """
    return [verdict for module in modules(claims).values() for verdict in module.verdicts(claims)]


def make(names: Sequence[str]) -> None:
    """Make tables and figures from committed records: those with these paths; ``tables`` and
    ``figures`` are all.

    Raises:
        ValueError: no such table or figure; names those that there are.
    """
    of_folder = sources(load_claims(CLAIMS))
    for name in names:
        path = ROOT / name
        if name in ("tables", "figures"):
            for each in [result for source in of_folder.values() for result in source()]:
                for one in each.tables if name == "tables" else each.figures:
                    each.table(one) if name == "tables" else each.figure(one)
            if name == "tables":
                fill(ROOT)
            continue
        top = Path(name).parts[1] if name.startswith("results/") and name.count("/") > 1 else ""
        there = (
            of_folder[top]()
            if top in of_folder
            else [r for source in of_folder.values() for r in source()]
        )
        made = next((each for each in there if path in each.paths), None)
        if made is None:
            known = ", ".join(
                str(each.relative_to(ROOT)) for result in there for each in result.paths
            )
            raise ValueError(f"{name} is no table or figure; there are {known}")
        made.make(path)


def report(console: Console) -> None:
    """Every table and figure, the main table, and the pages that show them."""
    began = time.perf_counter()
    claims = load_claims(CLAIMS)
    sections, verdicts = [], []
    for name, module in modules(claims).items():
        console.print(f"[bold]{name}")
        try:
            sections.append(module.section(claims))
            verdicts += module.verdicts(claims)
        except ValueError as error:  # its runs are not there yet
            console.print(f"[yellow]not reported: {error}")
            ids = tuple(claim.id for claim in claims.values() if claim.experiment == name)
            reason = f"Not reported: {str(error).removeprefix(f'{ROOT}/')}."
            sections.append(Section(name.capitalize(), ids, claims[ids[0]].command, reason, {}))
            nothing = ("–", "the runs are not complete", "–", "–", "–", "–", "not tested")
            verdicts += [Verdict(each, *nothing) for each in ids]
    sections += [cost_section(), ground_truths()]
    main_table = summary(claims, verdicts)
    save_document(REPORT / "claims.md", main_table)
    fill(ROOT)
    text = html(page(sections, main_table, ROOT), TITLE, ROOT, ROOT / "experiments/report.css")
    write_atomically(REPORT / "index.html", text.encode())
    console.print(f"{REPORT / 'index.html'}, after {time.perf_counter() - began:.0f} s")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status").add_argument("--runs", default="runs", help="folder of the runs")
    commands.add_parser("report")
    commands.add_parser("make").add_argument(
        "names", nargs="+", metavar="PATH", help="or tables, figures"
    )
    arguments = parser.parse_args()
    console = Console()
    try:
        if arguments.command == "status":
            console.print(status(arguments.runs))
        elif arguments.command == "make":
            make(arguments.names)
        else:
            report(console)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    print_plainly()
    main()
