"""Runs as processes that are killed for real: what is left is gone on from, to the same bytes as
without.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from ddc.training.checkpoint import NAME, checkpoints, read_checkpoint
from ddc.training.records import Records
from ddc.training.sweep import SweepRun, parse_sweep, start
from tests.test_training import TINY

STEPS = 300
#: An evaluation, a record and a checkpoint after every step, and readings of singular structure at
#: some.
OFTEN = [
    *TINY, f"training.steps={STEPS}", f"training.evaluations={STEPS}", "slt=cells",
    "slt.readings=24",
    "slt.sequences=8",
]  # fmt: skip
#: How many kills at random moments: while a process starts, and while it trains; and how many
#: within a write.
STARTING, TRAINING, WRITING = 5, 15, 6
IN_WRITE = "inside a checkpoint's write"


def often(folder: Path) -> SweepRun:
    (run,) = parse_sweep([" ".join([*OFTEN, f"runs={folder}"])])
    return run


def wait_for(condition: Callable[[], object], process: BaseProcess) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.0005)


def freeze(process: BaseProcess) -> None:
    """Stop a process where it is, so that one can look at what it has written."""
    os.kill(process.pid, signal.SIGSTOP)
    wait_for(
        lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T",
        process,
    )


def recorded(folder: Path) -> int:
    """How many records there are."""
    path = folder / "records.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def place(folder: Path, since: int) -> str:
    """Where the frozen process of a run is, by what it has written since it was started
    (nanoseconds).
    """

    def written(path: Path) -> bool:
        return path.exists() and path.stat().st_mtime_ns > since

    if any(map(written, folder.glob("checkpoint-*.tmp"))):
        return IN_WRITE
    records, saved = folder / "records.jsonl", checkpoints(folder)
    if not written(records):
        return "before it goes on"
    if not records.read_text().endswith("\n"):
        return "inside a record"
    if not saved or int(NAME.fullmatch(saved[0].name)[1]) < recorded(folder) - 1:
        return "between a record and its checkpoint"
    return "between a checkpoint and the next record"


@pytest.mark.slow
def test_killed_at_random_moments_and_inside_writes(tmp_path: Path) -> None:
    whole, broken = often(tmp_path / "whole"), often(tmp_path / "broken")
    unbroken = start(whole)
    folder, chance = broken.folder, random.Random(0)
    kinds = ["starting"] * STARTING + ["training"] * TRAINING + ["writing"] * WRITING
    chance.shuffle(kinds)
    kills: Counter[str] = Counter()
    seconds = 0.5  # that a start takes
    for kind in kinds:
        before, since = recorded(folder), time.time_ns()
        process = start(broken)
        if kind == "starting":
            time.sleep(chance.uniform(0, seconds))
            freeze(process)
        elif kind == "training":
            wait_for(lambda before=before: recorded(folder) > before, process)
            begun, seconds = time.time_ns(), (time.time_ns() - since) / 1e9
            rows = chance.randint(1, 5)
            wait_for(lambda goal=before + rows: recorded(folder) > goal, process)
            time.sleep(chance.uniform(0, 2e-9 * (time.time_ns() - begun) / rows))
            freeze(process)
        else:
            while place(folder, since) != IN_WRITE:
                os.kill(process.pid, signal.SIGCONT)
                wait_for(lambda since=since: place(folder, since) == IN_WRITE, process)
                freeze(process)
        kills[place(folder, since)] += 1
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (folder / "summary.json").exists()
    print(
        f"{kills.total()} kills: "
        + ", ".join(f"{count} {where}" for where, count in kills.most_common())
    )
    assert kills.total() == STARTING + TRAINING + WRITING
    assert kills[IN_WRITE] >= WRITING

    last = start(broken)
    for process in (unbroken, last):
        process.join()
        assert process.exitcode == 0
    for name in ("records", "timing"):
        assert [row["step"] for row in Records(folder / f"{name}.jsonl").read()] == list(
            range(STEPS + 1)
        )
    for name in (
        "records.jsonl",
        "readings.jsonl",
        *(path.name for path in checkpoints(whole.folder)),
    ):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()
    snapshots = list(whole.folder.glob("snapshots/*"))
    assert len(snapshots) == len(Records(folder / "readings.jsonl").read()) > 8
    for path in snapshots:
        assert (folder / "snapshots" / path.name).read_bytes() == path.read_bytes()
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = often(tmp_path)
    first = start(run)
    wait_for(lambda: recorded(run.folder) > 2, first)
    freeze(first)  # as good as hanging: it is there
    output, records = run.folder / "output.log", run.folder / "records.jsonl"
    before = records.read_bytes()
    second = start(run)
    second.join()
    assert second.exitcode == 1
    said = output.read_text().splitlines()[-1]
    assert said == f"stopped: another process is at work in {run.folder}; wait for it, or end it"
    assert records.read_bytes() == before
    assert run.state == "running"
    first.kill()
    first.join()
    assert run.state == "unfinished"
    third = start(run)
    wait_for(lambda: recorded(run.folder) > 5, third)
    third.terminate()
    third.join()
    assert third.exitcode == os.EX_TEMPFAIL
    saved = read_checkpoint(run.folder)["step"]
    said = output.read_text().splitlines()[-1]
    assert said == f"stopped after step {saved}; the same command goes on from there"
