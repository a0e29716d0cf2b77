"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

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
    lock = FileLock(folder / "lock", timeout=PATIENCE, poll_interval=0.02)
    try:
        lock.acquire()
    except Timeout as error:
        raise BusyError(
            f"another process is at work in {folder}; wait for it, or end it"
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process is at work in a folder."""
    if not (folder / "lock").exists():
        return False
    try:
        with FileLock(folder / "lock", timeout=0):
            return False
    except Timeout:
        return True
