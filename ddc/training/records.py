"""What a run leaves on disk: rows, provenance, summary. The local records are the truth; everything
else mirrors or reads them (:mod:`ddc.training.run_folder`).
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
PACKAGES = (
    *(
        "torch",
        "numpy",
        "scipy",
        "arviz-stats",
        "hydra-core",
        "omegaconf",
        "wandb",
        "datasets",
        "transformers",
    ),
    *("timm", "torchvision", "mlxtend", "safetensors"),
)
Row = dict[str, Any]


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that at any moment it is either the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # a full disk: what was written of it must not fill the disk further
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_lines(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; none if there is no such file.

    A last line that was cut short, by a kill or a full disk, is left out with a warning.
    """
    if not path.exists():
        return []
    *lines, last = path.read_text().split("\n")
    rows = [json.loads(line) for line in lines]
    if last:  # what is whole ends with a line break
        log.warning("the last line of %s is cut short: it is left out", path)
    return rows


class Records:
    """Append-only JSON lines, one row a step number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        """All rows, as :func:`read_lines` has them."""
        return read_lines(self.path)

    def append(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, last_step: int) -> None:
        """Drop the rows after ``last_step``: a resumed run writes them again."""
        if not self.path.exists():
            return
        rows = [row for row in self.read() if row["step"] <= last_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def provenance() -> dict[str, Any]:
    """Commit, versions and kind of machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    import torch  # tables are read without

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {
            "system": platform.platform(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "gpu": gpu,
        },
    }


def commit() -> str | None:
    """The commit of the code, with ``+`` where tracked files differ from it: what the environment
    variable ``DDC_COMMIT`` says, for copies that are no checkout of it, or else git; or None.
    """
    if given := os.environ.get("DDC_COMMIT"):
        return given
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "HEAD").strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def summarize(
    rows: list[Row], gap_levels: list[float], accuracy_levels: Sequence[float] = ()
) -> Mapping[str, Any]:
    """Final and best losses, the gap, and the gap at given train losses (null where never reached).

    Where accuracy levels are given, final and best accuracies, the final calibration error, and for
    each level the step of the first evaluation at which the validation accuracy is at least that
    (null where there is none).

    The gap at a train loss is read where the run first reaches it, interpolated linearly in the
    train loss between two evaluations.
    """
    last = rows[-1]
    best = min(rows, key=lambda row: row["validation_loss"])
    summary = {
        "steps": last["step"],
        "train_loss": last["train_loss"],
        "validation_loss": last["validation_loss"],
        "gap": last["gap"],
        "best_validation_loss": best["validation_loss"],
        "best_validation_step": best["step"],
        "gap_at_train_loss": {str(level): gap_at(rows, level) for level in gap_levels},
    }
    if not accuracy_levels:
        return summary
    return {
        **summary,
        "train_accuracy": last["train_accuracy"],
        "validation_accuracy": last["validation_accuracy"],
        "validation_calibration_error": last["validation_calibration_error"],
        "best_validation_accuracy": max(row["validation_accuracy"] for row in rows),
        "step_of_accuracy": {
            str(level): next(
                (row["step"] for row in rows if row["validation_accuracy"] >= level), None
            )
            for level in accuracy_levels
        },
    }


def gap_at(rows: list[Row], level: float) -> float | None:
    """Validation - train loss where the train loss first falls to ``level``; None if it never
    does.
    """
    for before, after in itertools.pairwise(rows):
        if after["train_loss"] <= level < before["train_loss"]:
            weight = (before["train_loss"] - level) / (before["train_loss"] - after["train_loss"])
            return float(before["gap"] + weight * (after["gap"] - before["gap"]))
    return None
