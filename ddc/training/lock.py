"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

#: Seconds for which a folder is asked for again: who asks whether it is held holds it for a moment.
PATIENCE = 1.0


class BusyError(RuntimeError):
    """Another process is at work in the folder."""


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the system lets go when this one ends, however it ends.

    Raises:
        BusyError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + PATIENCE
    with (folder / "lock").open("w") as file:
        while not taken(file):
            if time.monotonic() > end:
                raise BusyError(f"another process is at work in {folder}; wait for it, or end it")
            time.sleep(0.02)
        yield


def is_held(folder: Path) -> bool:
    """Whether a process is at work in a folder."""
    if not (folder / "lock").exists():
        return False
    with (folder / "lock").open("w") as file:
        return not taken(file)


def taken(file: TextIO) -> bool:
    """Take the lock on a file, and hold it until the file is closed; False if another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
