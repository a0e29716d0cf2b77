"""How experiments leave their results: records as JSON lines, and tables made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddc.report.book import latex
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
