"""Tables in the README and in the documentation, copied from the tables of committed records.

A block of a page says where its tables come from; what stands between its two comments is made::

    <!-- table: results/vit_scratch/table.md; under: Matched; columns: AdamW | DDCAdam | seeds -->
    <!-- /table -->

``under`` is the heading that the tables stand below, up to the next one (default: all of the file),
``number`` the one table to take of several, from 1 on, ``columns`` which columns, in the order of
the source (default: all; the first has no name in many tables, and is always there), and
``without`` leaves out the rows in which a cell is one of those.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path

from ddc.training.records import write_atomically

BLOCK = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- /table -->)", re.DOTALL)


def pages(root: Path) -> list[Path]:
    """The pages that may hold such blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(root: Path) -> None:
    """Make the tables of all pages anew.

    Raises:
        ValueError: a block that names a file, heading or column that does not exist.
    """
    for page in pages(root):
        text = page.read_text()
        if (made := filled(text, page, root)) != text:
            write_atomically(page, made.encode())
            print(page)


def filled(text: str, page: Path, root: Path) -> str:
    """The text of a page with its tables made anew.

    Raises:
        ValueError: as :func:`fill`.
    """

    def block(found: re.Match[str]) -> str:
        start, source, end = found.groups()
        try:
            return f"{start}\n{tables(source, root)}\n\n{end}"
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{page}: no table for {source!r}: {error}") from error

    return BLOCK.sub(block, text)


def tables(source: str, root: Path) -> str:
    """The tables that a block names, as Markdown."""
    path, *rest = source.split("; ")
    options = dict(each.split(": ", 1) for each in rest)
    if unknown := set(options) - {"under", "number", "columns", "without"}:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    text = (root / path).read_text()
    if "under" in options:
        parts = re.split(r"^#+ (.*)\n", text, flags=re.MULTILINE)
        if options["under"] not in parts[1::2]:
            raise ValueError(f"there is no heading {options['under']!r}")
        text = parts[parts.index(options["under"]) + 1]
    found = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    if "number" in options:
        found = found[int(options["number"]) - 1 : int(options["number"])]
    if not found:
        raise ValueError("there is no table")
    columns = options["columns"].split(" | ") if "columns" in options else None
    without = options["without"].split(" | ") if "without" in options else []
    return "\n\n".join(selected(each, columns, without) for each in found)


def selected(table: str, columns: list[str] | None, without: Collection[str] = ()) -> str:
    """The first column of a table and these others, but for rows with a cell that is one of
    ``without``; cells that begin a row and repeat those above them are left empty.
    """
    header, rule, *rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in table.strip().splitlines()
    ]
    if missing := set(columns or ()) - set(header):
        raise ValueError(f"there is no column {', '.join(sorted(missing))}")
    keep = [i for i, name in enumerate(header) if i == 0 or columns is None or name in columns]
    aligned = ["---:" if each.endswith(":") else "---" for each in rule]
    rows = [row for row in rows if {*without}.isdisjoint(row)]
    lines = [[line[i] for i in keep] for line in (header, aligned, *rows)]
    shown = lines[:2]
    for above, line in zip([lines[0], *lines[2:]], lines[2:], strict=False):
        same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(above, line, strict=True))])
        shown.append([""] * same + line[same:] if same < len(line) else line)
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)
