"""All claims of the paper: how far their runs are, and the report (``make status``, ``make report``).

python -m experiments status      # runs needed, recorded, missing, and how long the missing ones take
python -m experiments report      # every table and figure from committed records, and results/report/index.html
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Mapping
from types import ModuleType

from rich.console import Console
from rich.table import Table

from ddc.report import cost
from ddc.report.book import Section, html, page
from ddc.report.claims import FEW_SEEDS, Claim, Verdict, load_claims, rule, verdict_table
from ddc.training.records import write_atomically
from experiments.output import save_document
from experiments.protocols import CLAIMS, ROOT, Stage

REPORT = ROOT / "results/report"
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


def status(runs: str) -> Table:
    """One row a stage: runs needed, recorded, ended but not collected, missing, and the time that these take."""
    claims = load_claims(CLAIMS)
    table = Table(title="runs of the claims", caption="time: of one core; later: follows from the stages before")
    for name in ("claims", "experiment", "stage", "needed", "recorded", "ended", "missing", "time"):
        table.add_column(name, justify="left" if name in ("claims", "experiment", "stage") else "right", no_wrap=True)
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
        "The claims are those of arXiv:2606.29176, as its abstract states them; each was tested at the scale that the "
        "table names, on CPUs, far below the paper's. A verdict is about that scale. Differences are paired by seed; "
        "intervals are nominally 95%: Student's t below ten seeds, bootstrap from there on, Newcombe's for differences "
        "of shares. p-values are adjusted by Holm's method within an experiment: Student's t-test of paired "
        f"differences, Fisher's exact test of counts. {FEW_SEEDS}",
        verdict_table(claims, verdicts),
        "\n".join(f"- {rule(claim)}" for claim in claims.values()),
    ]
    return "\n\n".join(parts) + "\n"


def cost_section() -> Section:
    """What a step costs, from the records of the benchmarks."""
    folder = ROOT / "results/benchmark"
    names = ("speed", "memory", "mirror")
    speed, memory, mirror = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    tables = cost.speed_table(speed), cost.memory_table(memory), cost.mirror_table(mirror)
    for name, document in zip(names, tables, strict=True):
        save_document(folder / f"{name}.md", document)
    return Section("Cost", (), "make benchmark", "\n".join(tables), cost.draw(speed, memory, folder))


def ground_truths() -> Section:
    """What the measurement of singular structure was calibrated on."""
    tables = [(ROOT / f"results/{name}/table.md").read_text() for name in ("known_rates", "learning_coefficients")]
    document = f"## Analytic rates\n\n{tables[0]}\n## Known learning coefficients\n\n{tables[1]}"
    return Section("Ground truths", (), "make known_rates learning_coefficients", document, {})


def report(console: Console) -> None:
    """Every table and figure, the main table, and the page that shows them."""
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
            verdicts += [Verdict(each, "–", "the runs are not complete", "–", "–", "–", "not tested") for each in ids]
    sections += [cost_section(), ground_truths()]
    main_table = summary(claims, verdicts)
    save_document(REPORT / "claims.md", main_table)
    text = html(page(sections, main_table, ROOT), TITLE, ROOT, ROOT / "experiments/report.css")
    write_atomically(REPORT / "index.html", text.encode())
    console.print(f"{REPORT / 'index.html'}, after {time.perf_counter() - began:.0f} s")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status").add_argument("--runs", default="runs", help="folder of the runs")
    commands.add_parser("report")
    arguments = parser.parse_args()
    console = Console()
    try:
        if arguments.command == "status":
            console.print(status(arguments.runs))
        else:
            report(console)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
