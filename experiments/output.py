"""How experiments leave their results: records as JSON lines, and tables made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddc.report.book import latex
from ddc.report.figures import Drawing
from ddc.training.records import write_atomically


def save_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    print(path)


def save_document(path: Path, markdown: str) -> None:
    """Write a document of tables as Markdown to a ``.md`` path, and as LaTeX beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, markdown.encode())
    write_atomically(path.with_suffix(".tex"), latex(markdown).encode())
    print(path)


@dataclass(frozen=True)
class Results:
    """The tables and figures of a folder of committed records, by name; none is made before it is
    asked for.

    Attributes:
        folder: of records, tables and figures.
        tables: what makes a table, as Markdown.
        figures: those that are not drawn yet.
    """

    folder: Path
    tables: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    figures: Mapping[str, Drawing] = field(default_factory=dict)

    def table(self, name: str) -> str:
        """Make a table, as Markdown and as LaTeX; returns the Markdown."""
        document = self.tables[name]()
        save_document(self.folder / f"{name}.md", document)
        return document

    def figure(self, name: str) -> None:
        """Draw a figure, as PNG and as PDF."""
        for path in self.figures[name].plot(self.folder / name):
            print(path)

    @property
    def paths(self) -> list[Path]:
        """All files that there are to make."""
        kinds = ((self.tables, (".md", ".tex")), (self.figures, (".png", ".pdf")))
        return [
            self.folder / f"{name}{suffix}"
            for names, suffixes in kinds
            for name in names
            for suffix in suffixes
        ]

    def make(self, path: Path) -> None:
        """Make one of :attr:`paths`; the other format of the same table or figure comes with it."""
        if path.suffix in (".md", ".tex"):
            self.table(path.stem)
        else:
            self.figure(path.stem)
