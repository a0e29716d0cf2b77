"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


class BusyError(RuntimeError):
    """Another process is at work in the folder."""


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the system lets go when this one ends, however it ends.

    Raises:
        BusyError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(f"another process is at work in {folder}; wait for it, or end it") from error
        yield


def is_held(folder: Path) -> bool:
    """Whether a process is at work in a folder."""
    if not (folder / "lock").exists():
        return False
    try:
        with only_process_in(folder):
            return False
    except BusyError:
        return True
