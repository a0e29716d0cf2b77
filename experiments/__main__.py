"""All claims and questions: their runs, and the report.

python -m experiments status            # runs needed, recorded, missing; how long these take
python -m experiments run NAME          # all stages of a question, its measurements, its report
python -m experiments plan NAME STAGE   # the runs of a stage, as a sweep file for scripts/sweep.py
python -m experiments collect NAME      # committed records, of the runs that have ended
python -m experiments report [NAME]     # all tables and figures from records, and the page
python -m experiments make PATH         # results/lm_overtrain/losses.pdf; or tables, or figures
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from joblib import Parallel, delayed
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import report as benchmark
from ddc.report.book import Section, html, page
from ddc.report.claims import (
    FEW_SEEDS,
    Claim,
    Verdict,
    load_claims,
    rule,
    short_table,
    verdict_table,
)
from ddc.report.figures import drawn
from ddc.report.runs import read_lines
from ddc.training.display import print_plainly
from ddc.training.records import write_atomically
from ddc.training.sweep import parse_sweep, run_missing
from ddc.training.sweep import summary as states
from experiments.output import Results, save_document
from experiments.pages import fill
from experiments.protocols import EXPERIMENTS, ROOT, Stage
from experiments.questions import Planned, Question, questions

RESULTS = ROOT / "results"
REPORT = RESULTS / "report"
#: Headings under which the README finds them.
PAPERS_IN_SHORT, OWN_IN_SHORT = "The paper's claims in short", "Our own claims in short"
TITLE = "Dead-Direction Conditioners: the paper's claims, rerun"


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
    summaries = [json.loads(path.read_text()) for path in RESULTS.glob("*/*/*/summary.json")]
    return sum(float(record["seconds"]) for record in (*lines, *summaries))


def status(runs: str) -> Table:
    """One row a stage: runs needed, recorded, ended but not collected, missing, and the time that
    these take.
    """
    claims = load_claims(EXPERIMENTS)
    caption = (
        "time: of one core; later: follows from the stages before. What is recorded took "
        f"{recorded_seconds() / 3600:.1f} hours of one core."
    )
    table = Table(title="runs of the claims", caption=caption, box=box.SIMPLE_HEAD, padding=0)
    for name in ("claims", "experiment", "stage", "needed", "recorded", "ended", "missing", "time"):
        table.add_column(
            name,
            justify="left" if name in ("claims", "experiment", "stage") else "right",
            no_wrap=True,
        )
    for question in questions(claims):
        ids = ", ".join(question.ids(claims))
        if not ids and question.plan is None:
            continue
        name = question.name
        for stage in question.status(runs):
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


def summary(claims: Mapping[str, Claim], verdicts: list[Verdict]) -> tuple[str, str]:
    """The main table, and what is to be known of it, rules of verdicts included, as Markdown."""
    notes = [
        (
            "Claims that begin with C are those of arXiv:2606.29176, as its abstract states them;"
            " those that begin with W are our own, on what a user gains, and *hold* or do not. Each"
            " was tested at the scale that the table names, on CPUs, far below the paper's. A"
            " verdict is about that scale. Differences are paired by seed; intervals are nominally"
            " 95%: Student's t below ten seeds, bootstrap from there on, Newcombe's for"
            " differences of shares. p-values are adjusted by Holm's method within an experiment:"
            f" Student's t-test of paired differences, Fisher's exact test of counts. {FEW_SEEDS}"
            " The verdict is what the rule says; what the same records hold against it stands"
            " beside it."
        ),
        (
            "The paper has 28 figures and 9 tables. We know its abstract alone, from which they"
            " cannot be matched one by one: what answers which statement of the abstract stands at"
            " each section below, and no figure here is a copy of one of the paper's."
        ),
        "\n".join(f"- {rule(claim)}" for claim in claims.values()),
    ]
    for heading, own in ((PAPERS_IN_SHORT, False), (OWN_IN_SHORT, True)):
        mine = {name: claim for name, claim in claims.items() if claim.own == own}
        notes.append(f"## {heading}\n\n{short_table(mine, verdicts)}")
    return f"# Claims and verdicts\n\n{verdict_table(claims, verdicts)}", "\n\n".join(notes)


def document(claims: Mapping[str, Claim], verdicts: list[Verdict]) -> str:
    """Both, as one document."""
    return "\n\n".join(summary(claims, verdicts)) + "\n"


def cost_section() -> Section:
    """What a step costs, from the records of the benchmarks."""
    made = benchmark.results()
    tables = [made.table(name) for name in ("speed", "memory", "mirror")]
    tables.append(re.sub("^#", "###", gpu_results().table("summary"), flags=re.MULTILINE))
    return Section(
        "Cost", (), "make benchmark", "\n".join(tables), drawn(made.figures, made.folder)
    )


def sources(claims: Mapping[str, Claim]) -> dict[str, Callable[[], list[Results]]]:
    """What gives the tables and figures of each folder in results."""
    return {
        **{each.name: partial(results_of, each, claims) for each in questions(claims)},
        "benchmark": lambda: [benchmark.results()],
        "gpu": lambda: [gpu_results()],
        "report": lambda: [
            Results(REPORT, {"claims": lambda: document(claims, all_verdicts(claims))})
        ],
    }


def gpu_results() -> Results:
    """What ``make gpu`` has recorded, card by card."""
    from benchmarks.gpu.record import RESULTS, all_records
    from benchmarks.gpu.report import summary

    return Results(RESULTS, {"summary": lambda: summary(all_records(RESULTS))})


def results_of(question: Question, claims: Mapping[str, Claim]) -> list[Results]:
    """The tables and figures of a question; none, and a word, where its runs are not complete."""
    try:
        return question.results(claims)
    except ValueError as error:
        print(f"{question.name}: {error}", file=sys.stderr)
        return []


def all_verdicts(claims: Mapping[str, Claim]) -> list[Verdict]:
    """What the records say on all claims."""
    return [v for each in claimed(claims) for v in verdicts_of(each, claims)]


def verdicts_of(question: Question, claims: Mapping[str, Claim]) -> list[Verdict]:
    """What its records say on the claims of a question; *not tested* if they are not complete."""
    try:
        return question.verdicts(claims)
    except ValueError:
        nothing = ("–", "the runs are not complete", "–", "–", "–", "–", "not tested")
        return [Verdict(each, *nothing) for each in question.ids(claims)]


def claimed(claims: Mapping[str, Claim]) -> list[Question]:
    """The questions that are claims."""
    return [each for each in questions(claims) if each.ids(claims)]


def make(names: Sequence[str]) -> None:
    """Make tables and figures from committed records: those with these paths; ``tables`` and
    ``figures`` are all.

    Raises:
        ValueError: no such table or figure; names those that there are.
    """
    of_folder = sources(load_claims(EXPERIMENTS))
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
    claims = load_claims(EXPERIMENTS)
    reported = [each for each in questions(claims) if each.module("report") is not None]
    sections, verdicts = [], []
    # drawing takes most of the time: a question a process, on all cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cores, mp_context=get_context("fork")) as processes:
        cost = processes.submit(cost_section)
        making = [processes.submit(each.section, claims) for each in reported]
        for question, section in zip(reported, making, strict=True):
            verdicts += verdicts_of(question, claims)
            try:
                sections.append(section.result())
                console.print(f"[bold]{question.name}")
            except ValueError as error:  # its runs are not there yet
                console.print(f"[bold]{question.name}[/bold] [yellow]not reported: {error}")
                reason = f"Not reported: {str(error).removeprefix(f'{ROOT}/')}."
                ids = question.ids(claims)
                sections.append(Section(question.title, ids, f"make {question.name}", reason, {}))
        sections.append(cost.result())
    save_document(REPORT / "claims.md", document(claims, verdicts))
    fill(ROOT)
    whole = page(sections, *summary(claims, verdicts), ROOT)
    text = html(whole, TITLE, ROOT, ROOT / "experiments/report.css")
    write_atomically(REPORT / "index.html", text.encode())
    console.print(f"{REPORT / 'index.html'}, after {time.perf_counter() - began:.0f} s")


def report_of(question: Question) -> None:
    """The tables and figures of one question."""
    for made in question.results(load_claims(EXPERIMENTS)):
        for name in made.tables:
            made.table(name)
        for name in made.figures:
            made.figure(name)


def run(question: Question, runs: str, jobs: int) -> None:
    """Its runs, stage by stage, its measurements and its report. What has ended is not run again.

    Raises:
        ValueError: a run has not ended: its output says why.
    """
    if question.plan is not None:
        for stage in question.plan.stages:
            run_stage(question.plan, stage, runs, jobs)
        question.plan.collect(runs)
    measure = question.module("measure")
    if measure is not None:
        measure.main([])
    report_of(question)


def run_stage(plan: Planned, stage: str, runs: str, jobs: int) -> None:
    """The runs of a stage, and what a script measures of each."""
    print(f"stage {stage}")
    sweep = parse_sweep(plan.plan_lines(stage, runs))
    run_missing(sweep, jobs)
    if not all(each.ended for each in sweep):
        raise ValueError(states(sweep))
    if script := plan.scripts.get(stage):
        commands = [[sys.executable, str(ROOT / script), str(each.folder)] for each in sweep]
        call = delayed(subprocess.run)
        # a script finds the folders beside it, which are not installed
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        Parallel(n_jobs=jobs, prefer="threads")(
            call(each, check=True, env=env) for each in commands
        )


def main() -> None:
    """Do what the command line says."""
    names = {each.name: each for each in questions(load_claims(EXPERIMENTS))}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("status", "run", "plan", "collect", "report", "make"):
        commands.add_parser(command)
    for command in ("run", "plan", "collect"):
        commands.choices[command].add_argument("name", choices=names)
    commands.choices["plan"].add_argument("stage")
    commands.choices["plan"].add_argument(
        "--missing", action="store_true", help="those alone that have no committed record"
    )
    commands.choices["report"].add_argument("name", choices=names, nargs="?")
    for command in ("status", "run", "plan", "collect"):
        commands.choices[command].add_argument("--runs", default="runs", help="folder of the runs")
    commands.choices["run"].add_argument("--jobs", type=int, default=2, help="runs at a time")
    commands.choices["make"].add_argument(
        "names", nargs="+", metavar="PATH", help="or tables, figures"
    )
    arguments = parser.parse_args()
    console = Console()
    try:
        match arguments.command:
            case "status":
                console.print(status(arguments.runs))
            case "run":
                run(names[arguments.name], arguments.runs, arguments.jobs)
            case "plan":
                plan = planned(names[arguments.name])
                print(
                    *plan.plan_lines(arguments.stage, arguments.runs, arguments.missing), sep="\n"
                )
            case "collect":
                planned(names[arguments.name]).collect(arguments.runs)
            case "make":
                make(arguments.names)
            case _ if arguments.name:
                report_of(names[arguments.name])
            case _:
                report(console)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


def planned(question: Question) -> Planned:
    """The runs of a question.

    Raises:
        ValueError: it has none.
    """
    if question.plan is None:
        raise ValueError(
            f"{question.name} has no runs of train.py: make {question.name} measures it"
        )
    return question.plan


if __name__ == "__main__":
    print_plainly()
    main()
