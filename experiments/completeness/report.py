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
#: Of two runs from one orbit (:mod:`experiments.completeness.steps`).
STEPS = 100

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


STEPS_HEAD = (
    "| model | optimizer | left out | start | difference | of rounding | way |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: |",
)
STEPS_NOTE = (
    f"Two runs of {STEPS} steps in float64, at generic weights, the second from where a random"
    " element of the whole product group moves the first one's start (maps of condition numbers up"
    " to 100): the largest difference of log-probabilities at the *start* and at the end. *Of"
    " rounding*: the same of a run from the first one's start but for relative noise of 1e-15,"
    " which training amplifies as it does any rounding. *Way*: how far the first run moves a"
    " log-probability at most. Under all exact"
    " kinds that `respected` says the optimizer takes; *left out* is what was found and is refused,"
    " with rotations of heads in place of maps."
)


def load() -> list[Record]:
    """The committed records of both measurements."""
    paths = (RESULTS / "records.jsonl", RESULTS / "steps.jsonl")
    return [record for path in paths if path.exists() for record in read_lines(path)]


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """The tables."""
    kernels = [record for record in records if "optimizer" not in record]
    steps = [record for record in records if "optimizer" in record]
    return [
        Results(RESULTS, {"table": partial(table, kernels), "steps": partial(steps_table, steps)})
    ]


def steps_table(records: Sequence[Record]) -> str:
    """Markdown: one row a model and optimizer, then why what is left out is."""
    lines = [*STEPS_HEAD]
    reasons: dict[tuple[str, str], tuple[str, str]] = {}
    for record in records:
        names = f"{record['model']} | {record['optimizer']}"
        if "error" in record:
            lines.append(f"| {names} | {record['error']} | – | – | – | – |")
            continue
        left_out = ", ".join(f"`{kind}`" for kind in record["left_out"]) or "–"
        numbers = " | ".join(f"{record[key]:.0e}" for key in ("start", "difference", "near"))
        lines.append(f"| {names} | {left_out} | {numbers} | {record['way']:.1f} |")
        for kind, reason in record["left_out"].items():
            reasons.setdefault((record["optimizer"], kind), (record["model"], reason))
    lines += ["", STEPS_NOTE, "", "## Why", ""]
    for (optimizer, kind), (model, reason) in sorted(reasons.items()):
        lines.append(f"- {optimizer}, `{kind}` (first in {model}): {reason}.")
    lines += [
        "",
        f"Commit {commits(records)}. Made by `make completeness` from `steps.jsonl`.",
    ]
    return "\n".join(lines) + "\n"


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
