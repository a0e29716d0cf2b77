"""Tables of the completeness of gauges, from records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from ddc.report.claims import Claim
from ddc.report.runs import read_lines
from ddc.report.stages import Record, commits
from experiments.output import Results
from experiments.protocols import ROOT

RESULTS = ROOT / "results/completeness"

HEAD = (
    "| model | parameters | kernel | paper's kinds | all kinds | dead | unexplained | gap |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
)
NOTE = (
    "*Kernel*: the dimension of the kernel of the Jacobian of the centred log-probabilities in all"
    " parameters, at generic weights in float64: the dimension of all continuous symmetries."
    " *Paper's kinds*, *all kinds*: the rank of the tangents of the gauges that `find_gauges`"
    ' finds, overlaps counted once; all kinds are `kinds="complete"`. *Dead*: single parameters'
    " that no input reaches. *Unexplained*: the rest of the kernel; 0 is complete. *Gap*: the"
    " largest singular value that counts as zero and the smallest that does not, both relative to"
    " the largest of all."
)


def load() -> list[Record]:
    """The committed records."""
    return read_lines(RESULTS / "records.jsonl")


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """The tables."""
    return [Results(RESULTS, {"table": partial(table, records)})]


def table(records: Sequence[Record]) -> str:
    """Markdown: one row a model, then what is refused in those that are not complete."""
    lines = [*HEAD]
    for record in records:
        if "error" in record:
            lines.append(f"| {record['model']} | – | – | – | – | – | {record['error']} | – |")
            continue
        found, paper = record["complete"], record["paper"]
        gap = f"{found['zero']:.0e} \\| {found['smallest']:.0e}"
        unexplained = found["unexplained"] or "**0**"
        lines.append(
            f"| {record['model']} | {found['parameters']:,} | {found['kernel']} | {paper['orbit']} "
            f"| {found['orbit']} | {found['dead']} | {unexplained} | {gap} |"
        )
    lines += ["", NOTE, "", "## What is missing", ""]
    for record in records:
        if record.get("complete", {}).get("unexplained"):
            refused = dict.fromkeys(f"{kind}: {reason}" for kind, _, reason in record["refused"])
            lines.append(f"- {record['model']}: {'; '.join(refused) or 'no kind was looked for'}.")
    lines += ["", f"Commit {commits(records)}. Made by `make completeness` from `records.jsonl`."]
    return "\n".join(lines) + "\n"
