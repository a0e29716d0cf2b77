"""The table of analytic rates: ``python -m experiments.known_rates`` (or ``make known_rates``).

Every network of :mod:`ddc.slt.known_rates` is observed at 24 weight sizes and read by the rule of
the trainer; its exponent and coefficient as t → 0 are put beside what was recovered. Takes seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from ddc.report.runs import read_lines
from ddc.slt.known_rates import known_rates
from ddc.slt.rates import RateRule
from ddc.training.records import provenance
from experiments.output import Results, save_document, save_records

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results/known_rates"


def measure() -> list[dict[str, Any]]:
    """One record a case."""
    rule, about = RateRule(), provenance()
    records = []
    for case in known_rates():
        start = time.perf_counter()
        rate = case.recover(rule)
        records.append(
            {
                "row": case.row,
                "case": case.name,
                "exponent": case.exponent,
                "coefficient": case.coefficient,
                "must_refuse": case.refusal,
                "verdict": rate.verdict,
                "slope": rate.fit.slope if rate.fit else None,
                "recovered_coefficient": case.recovered_coefficient(),
                "note": case.note,
                "seconds": time.perf_counter() - start,
                "rule": vars(rule),
                **about,
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, one row a case."""
    lines = [
        "| network and observable | case | exponent | recovered | coefficient | recovered | note |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in records:
        found = f"{r['slope']:.4f}" if r["verdict"] == "read" else f"refused: {r['verdict']}"
        known = "–" if r["coefficient"] is None else f"{r['coefficient']:.6g}"
        lines.append(
            f"| {r['row']} | {r['case']} | {r['exponent']:g} | {found} | {known} "
            f"| {r['recovered_coefficient']:.6g} | {r['note']} |"
        )
    lines += [
        "",
        (
            "Of second moments, in the size t of a dead weight. A flat observable has no rate to"
            f" read and must be refused. Commit {records[0]['commit']}. Made by `make known_rates`"
            " from `records.jsonl` beside this file."
        ),
    ]
    return "\n".join(lines) + "\n"


def results() -> list[Results]:
    """The table of the committed records."""
    return [Results(RESULTS, {"table": lambda: table(read_lines(RESULTS / "records.jsonl"))})]


def main() -> None:
    """Measure and write the records and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = measure()
    save_records(arguments.output / "records.jsonl", records)
    save_document(arguments.output / "table.md", table(records))


if __name__ == "__main__":
    main()
