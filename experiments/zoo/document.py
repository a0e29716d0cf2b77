"""``docs/zoo.md`` from the records of the zoo."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ddc.gauges import paper_kinds
from ddc.gauges.base import first_line

Record = dict[str, Any]
LIBRARIES = {"transformers": "transformers", "timm": "timm", "named": "picked by hand"}
SHOWN = [kind for kind in paper_kinds() if kind != "chained_rescale"]
TEXT = """# Gauges of models that others wrote

Which gauges `find_gauges` finds in the architectures of transformers and timm, whether they are
real, and whether the optimizers train on them: each model small (two layers, width 64, mostly)
and at random, with random norm scales and biases, in a process of its own that may use {seconds}
of a core and {memory}. Those picked by hand are the models of `tests/zoo.py`.

Every gauge was applied at random to a float64 copy, by itself, on other and longer inputs than
it was traced on, in evaluation and in training mode. It is *false* where a log-probability (or
an output, where that is no vector of logits) changes by more than 1e-9 of the largest. Ten steps
are on random targets in float32, learning rate 1e-3 (and 0.01 for hidden matrices); they are
*sound* where every loss is finite and the last is not above the first by 0.5.

Made by `make zoo` ({hours:.1f} hours of a core; `experiments/zoo`) from
`results/zoo/records.jsonl`:
{versions}
Of the {known} architectures that are known, {without} have no record yet; `make zoo` run again
makes these.
"""
#: Commits of records that are older than gauges on parts of parameters.
BEFORE_PARTS = ("1294617", "d03b4d8", "86c9c59")
OLDER = """
{count} of the records are older than gauges on packed weights, on experts, on 1 + weight and on
attention that is spelt out ([The gauges, derived](gauges.md)). Some of what they refuse is found
now, as in Phi-3, Mixtral and Gemma.
"""
LEGEND = """Numbers are gauges; r1, r2, … are the reasons above for which others of the kind were
refused; – is a kind that nothing in the model suggests. *change* is the largest of all gauges of
the model. The optimizers' columns are the first and last loss. *seconds* are those of
`find_gauges` and of everything.

"""
REFUSED = """By reason, with the names of modules and operations left out. Numbers are those of
the last table.

"""
GAUGES = [
    "kind",
    "models that have it",
    "gauges",
    "false",
    "not checked by find_gauges",
    "largest change",
]
ALL = [
    "model",
    "family",
    *(kind.replace("_", " ") for kind in SHOWN),
    "change",
    "DDCAdam",
    "DDCMuon",
    "seconds",
]


def document(records: Sequence[Record], names: Sequence[str], seconds: str, memory: str) -> str:
    """The numbers, the reasons, and a table of all models.

    Args:
        records: those of the zoo.
        names: of the models, in the order of the table.
        seconds: what a model may use of a core.
        memory: what it may hold.
    """
    order = {name: i for i, name in enumerate(names)}
    records = sorted(records, key=lambda each: order.get(each["model"], len(order)))
    traced = [each for each in records if "found" in each]
    reasons = _reasons(traced)
    about = records[0]
    versions = ", ".join(
        f"{name} {about['versions'][name]}" for name in ("torch", "transformers", "timm")
    )
    hours = sum(each.get("seconds", 0.0) for each in records) / 3600
    commits = ", ".join(
        f"{commit[:7]} ({count})" for commit, count in Counter(r["commit"] for r in records).items()
    )
    head = TEXT.format(
        versions=textwrap.fill(f"{versions}, commits {commits}.", width=100),
        hours=hours,
        seconds=seconds,
        memory=memory,
        known=len(names),
        without=len({*names} - {each["model"] for each in records}),
    )
    if older := sum(each["commit"].startswith(BEFORE_PARTS) for each in records):
        head += OLDER.format(count=older)
    sections = (
        ("## In numbers", "", ["", *LIBRARIES.values()], _numbers(records)),
        ("## Gauges", "", GAUGES, _kinds(traced)),
        (
            "## Refused",
            REFUSED,
            ["", "kind", "reason", "times", "models"],
            _refused(traced, reasons),
        ),
        ("## False, crashed, stopped", "", ["model", "what"], _faults(records) or [["none", ""]]),
        (
            "## Not built, and refused as a whole",
            "",
            ["model", "why"],
            _left_out(records) or [["none", ""]],
        ),
        ("## All models", LEGEND, ALL, [_row(each, reasons) for each in traced]),
    )
    return head + "".join(
        f"\n{title}\n\n{text}{_table(header, rows)}" for title, text, header, rows in sections
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"
        for cells in lines
    )


#: Names and numbers in reasons, which are put together without them.
PARTICULARS = (
    r"^(?!its\b|what\b|the\b)\S+(?= is | are )",
    r"^\S+(?=, which gives the output)",
    r"(?<=^its reader, )(?!the\b).+?(?=, is )",
    r"(?<=are read by )\S+(?= as well)",
    r"(?<=^a random element changes outputs by )\S+",
)


def general(reason: str) -> str:
    """A reason without names of modules and operations, and without numbers."""
    for particular in PARTICULARS:
        reason = re.sub(particular, "…", reason)
    return reason


def dropped(record: Record) -> list[tuple[str, str, int]]:
    """What the rules found in a model, and find_gauges then refused since it changes an output:
    kind, reason, times.
    """
    return [
        tuple(each)
        for each in record.get("refused", ())
        if each[1].startswith("a random element changes outputs by ")
    ]


def _reasons(traced: Sequence[Record]) -> dict[tuple[str, str], int]:
    """A number for each kind and reason, the most frequent first."""
    times: Counter[tuple[str, str]] = Counter()
    for record in traced:
        for kind, reason, count in record["refused"]:
            times[kind, general(reason)] += count
    ordered = sorted(times, key=lambda each: ([*paper_kinds()].index(each[0]), -times[each]))
    return {each: number for number, each in enumerate(ordered, 1)}


def _numbers(records: Sequence[Record]) -> list[list[object]]:
    """One row a number, one column a library."""
    rows: dict[str, Callable[[Record], bool]] = {
        "architectures": lambda each: True,
        "built": lambda each: each["outcome"] != "not built",
        "traced": lambda each: "found" in each,
        "refused as a whole": lambda each: each["outcome"] == "refused",
        "with a gauge": lambda each: bool(each.get("found")),
        "each gauge checked": lambda each: "false" in each,
        "with a gauge that the rules found and the trial dropped": lambda each: bool(dropped(each)),
        "with a gauge that find_gauges could not try": lambda each: bool(each.get("unchecked")),
        "**with a false gauge**": lambda each: bool(each.get("false")),
        "crashed, out of time or memory": (
            lambda each: each["outcome"].startswith(("crashed", "out of"))
        ),
        "DDCAdam: ten steps sound": lambda each: each.get("DDCAdam", {}).get("sound", False),
        "DDCMuon: ten steps sound": lambda each: each.get("DDCMuon", {}).get("sound", False),
    }
    numbers: list[list[object]] = [
        [
            name,
            *(
                sum(holds(each) for each in records if each["library"] == library)
                for library in LIBRARIES
            ),
        ]
        for name, holds in rows.items()
    ]
    times = {
        "seconds of find_gauges, median": "find_seconds",
        "of these, of the trial, median": "trial_seconds",
        "seconds of everything, median": "seconds",
    }
    for name, key in times.items():
        of = [
            [each[key] for each in records if each["library"] == library and key in each]
            for library in LIBRARIES
        ]
        numbers.append(
            [name, *(f"{statistics.median(values):.1f}" if values else "–" for values in of)]
        )
    return numbers


def _kinds(traced: Sequence[Record]) -> Iterator[list[object]]:
    for kind in paper_kinds():
        false = sum(each[0] == kind for record in traced for each in record.get("false", ()))
        unchecked = sum(
            count for record in traced for each, _, count in record["unchecked"] if each == kind
        )
        changes = [
            record["largest_change_by_kind"][kind]
            for record in traced
            if kind in record.get("largest_change_by_kind", ())
        ]
        found = [record["found"].get(kind, 0) for record in traced]
        yield [
            kind,
            sum(map(bool, found)),
            sum(found),
            false,
            unchecked,
            f"{max(changes):.0e}" if changes else "–",
        ]


def _refused(
    traced: Sequence[Record], reasons: Mapping[tuple[str, str], int]
) -> Iterator[list[object]]:
    for (kind, reason), number in reasons.items():
        times = [
            sum(
                count
                for each, why, count in record["refused"]
                if (each, general(why)) == (kind, reason)
            )
            for record in traced
        ]
        yield [number, kind, reason, sum(times), sum(map(bool, times))]


def _faults(records: Sequence[Record]) -> list[list[object]]:
    rows: list[list[object]] = []
    for record in records:
        what = [
            f"{kind} at {where} is false: {change:.0e}"
            for kind, where, change in record.get("false", ())
        ]
        if record["outcome"].startswith(("crashed", "out of", "not checked")):
            what.append(f"{record['outcome']}: {first_line(Exception(record['why']))}")
        for name in ("DDCAdam", "DDCMuon"):
            steps = record.get(name, {"sound": True})
            if not steps.get("sound"):
                what.append(
                    f"{name}: "
                    + (
                        steps.get("error")
                        or f"loss from {steps['first']:.3g} to {steps['last']:.3g}"
                    )
                )
        rows += [[record["model"], "; ".join(what)]] if what else []
    return rows


def _left_out(records: Sequence[Record]) -> list[list[object]]:
    return [
        [each["model"], each["why"]]
        for each in records
        if each["outcome"] in ("not built", "refused")
    ]


def _row(record: Record, reasons: Mapping[tuple[str, str], int]) -> list[object]:
    cells = []
    for kind in SHOWN:
        why = sorted(
            {
                reasons[kind, general(reason)]
                for each, reason, _ in record["refused"]
                if each == kind
            }
        )
        count = record["found"].get(kind, 0)
        numbers = ", ".join(f"r{number}" for number in why)
        cells.append(f"{count} ({numbers})" if count and why else count or numbers or "–")
    change = record.get("largest_change")
    steps = []
    for name in ("DDCAdam", "DDCMuon"):
        of = record.get(name, {})
        steps.append(f"{of['first']:.2f} → {of['last']:.2f}" if "last" in of else "–")
    shown = "–" if change is None else f"{change:.0e}"
    return [
        record["model"],
        record["family"],
        *cells,
        shown,
        *steps,
        f"{record['find_seconds']:.1f} / {record['seconds']:.1f}",
    ]
