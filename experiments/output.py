"""How experiments leave their results: records as JSON lines, and a table made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddc.training.records import write_atomically


def save(folder: Path, records: Sequence[dict[str, Any]], table: str) -> None:
    """Write ``records.jsonl`` and ``table.md``, and show the table."""
    save_records(folder / "records.jsonl", records)
    save_table(folder / "table.md", table)


def save_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def save_table(path: Path, table: str) -> None:
    """Write a table, and show it."""
    write_atomically(path, table.encode())
    print(table)
    print(path)
