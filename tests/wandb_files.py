"""What was sent to W&B, read back from the files of an offline run: no record of the run is looked
at.

wandb has no reader of its own in Python. The file is a header of seven bytes, then records in
LevelDB's log format (blocks of 32 KiB; CRC-32, length, kind; a record may be in several fragments),
each a protobuf message.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = b":W&B\xe1\xbe\x00", 32768
WHOLE, FIRST, MIDDLE, LAST = range(1, 5)


@dataclass
class Sent:
    """A run as W&B has it."""

    id: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    exit_code: int | None = None

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The rows of the history that hold a key."""
        return [row for row in self.history if key in row]


def sent(folder: Path) -> Sent:
    """What the last file in the folder of a run holds."""
    path = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda each: each.stat().st_mtime_ns)
    found = Sent()
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                found.id, found.group, found.job_type, found.tags = (
                    run.run_id,
                    run.run_group,
                    run.job_type,
                    [*run.tags],
                )
                merge(found.config, run.config.update)
            case "history":
                found.history.append(merge({}, record.history.item))
            case "summary":
                merge(found.summary, record.summary.update)
            case "exit":
                found.exit_code = record.exit.exit_code
    for name, value in found.summary.items():
        if isinstance(value, dict) and value.get("_type") == "table-file":
            table = json.loads((path.parent / "files" / value["path"]).read_text())
            found.tables[name] = [
                dict(zip(table["columns"], row, strict=True)) for row in table["data"]
            ]
    return found


def merge(into: dict[str, Any], items: Iterable[Any]) -> dict[str, Any]:
    """Set keys, nested ones too, to the JSON that stands beside them."""
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = into
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return into


def records(path: Path) -> Iterator[Record]:
    """The records of a file, their checksums checked."""
    data = path.read_bytes()
    assert data.startswith(HEADER)
    position, parts = len(HEADER), b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        fragment = data[position + 6 : position + 7 + length]
        assert zlib.crc32(fragment) == checksum
        parts = (b"" if kind in (WHOLE, FIRST) else parts) + fragment[1:]
        position += 7 + length
        if kind in (WHOLE, LAST):
            yield Record.FromString(parts)
