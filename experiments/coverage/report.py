"""How often the intervals of rates hold the true slope, as a table, from records alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from ddc.report.claims import Claim
from ddc.report.runs import read_lines
from ddc.report.stages import Record, commits
from ddc.report.stages import table as columns
from experiments.coverage.measure import RESULTS
from experiments.output import Results


def load() -> list[Record]:
    """The committed records."""
    return read_lines(RESULTS / "records.jsonl")


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """The table."""
    return [Results(RESULTS, {"table": partial(table, records)})]


def table(records: Sequence[Record]) -> str:
    """Markdown, one row a record."""
    rows = [
        [
            f"{r['correlation']:g}",
            str(r["points"]),
            f"{r['held'] / r['lines']:.1%}",
            f"{r['white_held'] / r['lines']:.1%}",
            f"{r['read'] / r['lines']:.1%}",
            f"{r['read_held'] / r['read']:.1%}" if r["read"] else "–",
        ]
        for r in records
    ]
    header = [
        "correlation",
        "points",
        "interval holds",
        "least squares holds",
        "read by the rule",
        "interval holds",
    ]
    first = records[0]
    error = math.sqrt(0.95 * 0.05 / first["lines"])
    note = (
        f"Nominal: {first['rule']['confidence']:.0%}. {first['lines']:,} lines a row (standard"
        f" error at 95%: {error:.1%}), slope {first['slope']:g}, noise {first['noise']:g} in"
        f" natural logarithms, seed {first['seed']}. Commit {commits(records)}. Made by `make"
        " coverage` from `records.jsonl` beside this file."
    )
    return f"{columns(header, rows, left=0)}\n\n{note}\n"
