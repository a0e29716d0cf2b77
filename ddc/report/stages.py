"""Records of an experiment by stage, optimizer and setting; tables in Markdown.

A record has the ``stages`` that its run belongs to, each with the overrides of its setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ddc.report.runs import TITLES

Record = dict[str, Any]
PROTOCOLS = ("matched", "tuned")


def of_stage(records: Iterable[Record], stage: str) -> dict[str, dict[str, list[Record]]]:
    """The runs of a stage by optimizer and setting, in order of seeds."""
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in sorted(records, key=lambda each: each["seed"]):
        if stage in record["stages"]:
            settings = groups.setdefault(record["config"]["optimizer"]["name"], {})
            settings.setdefault(record["stages"][stage], []).append(record)
    return {name: groups[name] for name in (*TITLES, *groups) if name in groups}


def only_setting(settings: dict[str, list[Record]]) -> list[Record]:
    """The runs of a stage that has one setting an optimizer."""
    (runs,) = settings.values()
    return runs


def is_shared(records: Sequence[Record], name: str) -> bool:
    """Whether the runs of an optimizer are the same in both protocols."""
    stages = [
        record["stages"] for record in records if record["config"]["optimizer"]["name"] == name
    ]
    return any(set(PROTOCOLS) <= set(each) for each in stages)


def commits(records: Iterable[Record], key: str = "commit") -> str:
    """The commits that made the records, each once."""
    return ", ".join(sorted({str(record[key]) for record in records}))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first columns are text and whose others are numbers.

    The dashes under the header are as long as the column is wide, up to 40: where a table is too
    wide for a page, converters share out the page by them.
    """
    rows = [*rows]
    widths = [min(40, max(3, *map(len, column))) for column in zip(header, *rows, strict=True)]
    align = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))
