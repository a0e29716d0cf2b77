"""Tables of the completeness of gauges, from records alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from ddc.report.claims import Claim
from ddc.report.runs import read_lines
from ddc.report.stages import Record, commits
from experiments.output import Results
from experiments.protocols import ROOT

RESULTS = ROOT / "results/completeness"
#: Records of the zoo: which narrow models there are, and a certificate of each.
ZOO_MODELS, ZOO = "zoo_models.jsonl", "zoo.jsonl"
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
    " the largest of all. A model with BatchNorms is measured in training mode, where the"
    " statistics of the batch are a part of the function."
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


def load() -> dict[str, list[Record]]:
    """The committed records of all measurements, by the name of their file; none of what is not
    measured yet.
    """
    paths = [RESULTS / name for name in ("records.jsonl", "steps.jsonl", ZOO_MODELS, ZOO)]
    return {path.name: read_lines(path) if path.exists() else [] for path in paths}


def results(records: Mapping[str, Sequence[Record]], claims: Mapping[str, Claim]) -> list[Results]:
    """The tables."""
    tables = {
        "table": partial(table, records["records.jsonl"]),
        "steps": partial(steps_table, records["steps.jsonl"]),
    }
    if records[ZOO]:
        tables["zoo"] = partial(zoo_table, records[ZOO_MODELS], records[ZOO])
    return [Results(RESULTS, tables)]


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


# ----------------------------------------------------------------------------------------------
# the zoo

ZOO_HEAD = (
    "| family | entries | narrow models | certified | complete | not complete | unexplained"
    " | refused |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)
ZOO_NOTE = (
    "*Entries*: the architectures of [the zoo](../../docs/zoo.md) that were made narrow so far;"
    " *narrow models*: how many different programs these compute, each counted where its first"
    " entry is; *certified*: those that have a record. *Unexplained*: dimensions of all that are"
    " not complete, together. *Refused*: has no certificate, for a reason below. Models with"
    " BatchNorms are measured in training mode, where the statistics of the batch are a part of the"
    " function:"
    " a bias before one then moves nothing, and is counted as dead. Where a model gives no"
    " logits of classes, its first output is taken as it is."
)


def zoo_table(models: Sequence[Record], certificates: Sequence[Record]) -> str:
    """Markdown: families in numbers, then each model that is not complete, what was refused, and a
    table of all certificates. It works with a part of the records.
    """
    of_signature = {each["signature"]: each for each in certificates}
    by_library: dict[str, list[Record]] = {}
    by_module: dict[str, list[Record]] = {}
    for each in models:
        timm = each["library"] == "timm"
        by_library.setdefault("timm" if timm else each["family"], []).append(each)
        if timm:
            by_module.setdefault(each["family"], []).append(each)
    first: dict[str, Record] = {}
    for each in models:
        if "signature" in each:
            first.setdefault(each["signature"], each)

    def row(name: str, entries: Sequence[Record]) -> str:
        own = [one for one in entries if first.get(one.get("signature", "")) is one]
        made = [of_signature[one["signature"]] for one in own if one["signature"] in of_signature]
        sound = [one for one in made if "refused" not in one]
        lacking = [one for one in sound if not one["complete"]]
        counts = (
            len(entries),
            len(own),
            len(made),
            len(sound) - len(lacking),
            len(lacking),
            sum(one["unexplained"] for one in lacking),
            len(made) - len(sound),
        )
        return f"| {name} | " + " | ".join(map(str, counts)) + " |"

    sound = [each for each in certificates if "refused" not in each]
    lines = [*ZOO_HEAD, *(row(*each) for each in by_library.items()), row("**all**", models)]
    lines += ["", ZOO_NOTE, "", "## By module of timm", "", *ZOO_HEAD]
    lines += [row(*each) for each in sorted(by_module.items())]
    lines += ["", "## Not complete", ""]
    lines += [f"- {lacks(each)}" for each in sound if not each["complete"]] or ["None so far."]
    refusals = {
        "Refused": [each for each in certificates if "refused" in each],
        "Entries without a narrow form": [each for each in models if "refused" in each],
    }
    for title, refused in refusals.items():
        lines += ["", f"## {title}", "", *reasons(refused, lambda each: each["model"])]
    lines += ["", "## All certificates", "", *CERTIFIED_HEAD, *map(certified_row, sound)]
    about = f"Commit {commits([*models, *certificates])}."
    return "\n".join([*lines, "", f"{about} Made from `{ZOO_MODELS}` and `{ZOO}`."]) + "\n"


CERTIFIED_HEAD = (
    "| model | others | parameters | kernel | all kinds | dead | unexplained | gap | mode |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
)


def certified_row(record: Record) -> str:
    """One narrow model: its first entry, and how many others share it."""
    gap = f"{record['zero']:.0e} \\| {record['smallest']:.0e}"
    numbers = (record[key] for key in ("kernel", "orbit", "dead"))
    cells = (
        record["model"],
        len(record["models"]) - 1,
        f"{record['parameters']:,}",
        *numbers,
        record["unexplained"] or "**0**",
        gap,
        record["mode"],
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def lacks(record: Record) -> str:
    """What is missing in a model, in words: how much, what would close it, where it lies, and what
    was refused.
    """
    if record["unexplained"] <= 0:
        return f"{record['model']}: not all gauges are symmetries (leak {record['leak']:.0e})."
    words = [f"{record['unexplained']} dimensions"]
    if record["closing"]:
        kinds = ", ".join(f"{count} by `{kind}`" for kind, count in record["closing"].items())
        words.append(f"closed, {kinds}, by what the trial dropped")
    most = [f"`{name}` ({share:.1f})" for name, share in [*record["places"].items()][:4]]
    words.append(f"most in {', '.join(most)}")
    missed = "; ".join(record["missed"]) or "no kind that is missing was looked for"
    return f"{record['model']}: {', '.join(words)}. Refused: {missed}."


def reasons(records: Iterable[Record], name: Callable[[Record], str]) -> list[str]:
    """Why records have no numbers: each reason, without its numbers, with how many and which."""
    names: dict[str, list[str]] = {}
    for each in records:
        names.setdefault(re.sub(r"\d[\d.,e+-]*\d|\d", "…", each["refused"]), []).append(name(each))
    counted = sorted(names.items(), key=lambda each: -len(each[1]))
    return [f"- {len(of)}: {reason} ({', '.join(of)})" for reason, of in counted] or [
        "None so far."
    ]
