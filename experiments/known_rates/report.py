"""The table of analytic rates, from records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from ddc.report.claims import Claim
from ddc.report.runs import read_lines
from ddc.report.stages import Record
from experiments.known_rates.measure import RESULTS
from experiments.output import Results


def load() -> list[Record]:
    """The committed records."""
    return read_lines(RESULTS / "records.jsonl")


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """The table."""
    return [Results(RESULTS, {"table": partial(table, records)})]


def table(records: Sequence[Record]) -> str:
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
