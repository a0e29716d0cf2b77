"""Records of the stages: parts by name, each with what it was made by and on.

A file is ``CARD/STAGE.json`` in the folder of the records. A part is written as soon as it is
there, so that what a stage has done stays when it is stopped; one that failed says why, and is
tried again.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddc.training.records import commit, provenance, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results/gpu"
Part = dict[str, Any]


class NotHere(Exception):
    """Why a part cannot be made on this device."""


@dataclass(frozen=True)
class Place:
    """Where and how large stages run.

    Attributes:
        device: of all that is computed.
        tiny: everything in its smallest form.
        folder: of the records.
        runs: of the runs, with their checkpoints.
        until: when to begin no more parts, in seconds since the epoch.
    """

    device: torch.device
    tiny: bool
    folder: Path
    runs: Path
    until: float

    @property
    def card(self) -> str:
        """The name of the device, as that of a folder."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()


class Record:
    """The parts of one stage on one card."""

    def __init__(self, place: Place, stage: str) -> None:
        self.place, self.stage = place, stage
        self.path = place.folder / place.card / f"{stage}.json"
        self.parts: dict[str, Part] = read(self.path)["parts"] if self.path.exists() else {}

    def is_done(self, name: str, overrides: list[str] | None = None) -> bool:
        """Whether a part is recorded: of this commit, with no change to it; or for a run of these
        settings, of whatever commit.
        """
        part, mine = self.parts.get(name), commit()
        if part is None or "error" in part or not part.get("complete", True):
            return False
        if overrides is not None:
            return bool(part.get("overrides") == overrides)
        return part["commit"] == mine and not str(mine).endswith("+")

    def write(self, name: str, part: Mapping[str, Any]) -> None:
        """Put a part into the file, as it stands."""
        self.parts[name] = {**part, **provenance()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"card": self.place.card, "stage": self.stage, "parts": self.parts})

    def make(self, parts: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
        """Make the parts that are not recorded, one after the other, as long as time is left."""
        for name, make in parts.items():
            if self.is_done(name):
                print(f"{self.stage}: {name} is recorded", flush=True)
                continue
            if self.place.left <= 0:
                print(f"{self.stage}: no time is left for {name} and what follows", flush=True)
                return
            began = time.perf_counter()
            try:
                part = dict(make())
            except NotHere as reason:
                part = {"skipped": str(reason)}
            except Exception as error:  # the other parts are worth having all the same
                part = {"error": f"{type(error).__name__}: {error}", "where": where(error)}
            self.write(name, {**part, "seconds": time.perf_counter() - began})
            said = part.get("error") or part.get("skipped") or ""
            print(f"{self.stage}: {name} {said.partition(chr(10))[0]}".rstrip(), flush=True)


def where(error: Exception) -> list[str]:
    """The last lines of the way to an error."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return [line.replace(f"{ROOT}/", "") for line in lines[-12:]]


def read(path: Path) -> dict[str, Any]:
    """A record."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def all_records(folder: Path) -> Iterator[dict[str, Any]]:
    """All records of a folder, card by card."""
    for path in sorted(folder.glob("*/*.json")):
        yield read(path)


def as_arguments(place: Place) -> list[str]:
    """A place as arguments of a stage's process."""
    values = dataclasses.asdict(place)
    return [
        json.dumps({key: v if key in ("tiny", "until") else str(v) for key, v in values.items()})
    ]


def from_arguments(arguments: list[str]) -> Place:
    """The inverse."""
    values = json.loads(arguments[0])
    return Place(
        torch.device(values["device"]),
        values["tiny"],
        Path(values["folder"]),
        Path(values["runs"]),
        values["until"],
    )
