"""How experiments leave their results: records as JSON lines, and a table made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddc.training.records import write_atomically


def save(folder: Path, records: Sequence[dict[str, Any]], table: str) -> None:
    """Write ``records.jsonl`` and ``table.md``, and show the table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "records.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    write_atomically(folder / "table.md", table.encode())
    print(table)
    print(folder / "table.md")
