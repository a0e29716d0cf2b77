"""What the offline mirror to W&B costs a run: ``python -m benchmarks.mirror``.

Runs of the claims are sent again from their committed records, by what sends them while they train,
each in a process of its own: from the import of wandb until the file is whole. Counted are seconds
of the processor, so that other work on the machine does not count. Beside them stands the time of
the run. System metrics, which W&B samples while a run trains, are not in it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import mirror_table
from ddc.report.rates import draw_readings
from ddc.report.runs import Run, plot_curves, read_lines
from ddc.training.compose import restored
from ddc.training.mirror import Mirror
from ddc.training.records import provenance, write_atomically, write_json
from ddc.training.schema import WandbConfig

ROOT = Path(__file__).resolve().parents[1]
TURNS = 3
PARTS = ("start", "rows_and_readings", "figures", "end")
#: Folders of runs, and whether their readings are sent as well.
RUNS = {
    "C1, no readings": ("results/rates/small/ddcadam-seed0", False),
    "C2, 5 × 5 cells": ("results/rates/small/ddcadam-seed0", True),
    "C2, 13 × 5 cells": ("results/rates/deep/ddcadam-seed0", True),
}


def measure(name: str, place: str, with_readings: bool) -> dict[str, Any]:
    """Send a run; seconds of the processor for each part and for W&B's own process, and bytes on
    disk.
    """
    folder = ROOT / place
    run = Run.read(folder)
    assert run.summary is not None
    summary, seconds = run.summary, run.summary["seconds"]
    if not with_readings:
        seconds -= summary["reading_seconds"]
        run = replace(run, readings=[])
    timing = read_lines(folder / "timing.jsonl")
    rows = [{**times, **row} for times, row in zip(timing, run.rows, strict=True)]
    config = restored(run.info["config"])
    config.wandb = WandbConfig("offline")
    with tempfile.TemporaryDirectory() as temporary:
        clock = [time.process_time()]
        mirror = Mirror(config, Path(temporary))
        clock.append(time.process_time())
        mirror.catch_up(rows, run.readings)
        clock.append(time.process_time())
        # as train.py does
        figures = [
            *plot_curves([run], Path(temporary) / "curves"),
            *draw_readings(run, Path(temporary)),
        ]
        clock.append(time.process_time())
        mirror.finish(summary, run.readings, lambda: figures)
        clock.append(time.process_time())
        service = resource.getrusage(resource.RUSAGE_CHILDREN)  # it has ended, and was waited for
        size = sum(
            path.stat().st_size for path in Path(temporary).glob("wandb/**/*") if path.is_file()
        )
    parts = dict(
        zip(PARTS, (after - before for before, after in itertools.pairwise(clock)), strict=True)
    )
    return {
        "run": name,
        "folder": str(folder.relative_to(ROOT)),
        "rows": len(rows),
        "readings": len(run.readings),
        **parts,
        "service": service.ru_utime + service.ru_stime,
        "bytes": size,
        "run_seconds": seconds,
    }


def main() -> None:
    """Measure, and write the record and the table."""
    cells = [(name, *run) for name, run in RUNS.items() for _ in range(TURNS)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        turns = pool.starmap(measure, cells, chunksize=1)
    rows = []
    for name in RUNS:
        mine = [turn for turn in turns if turn["run"] == name]
        timed = {key: statistics.median(turn[key] for turn in mine) for key in (*PARTS, "service")}
        rows.append({**mine[0], **timed})
    record = {"turns": TURNS, "rows": rows, **provenance()}
    folder = ROOT / "results/benchmark"
    write_json(folder / "mirror.json", record)
    write_atomically(folder / "mirror.md", mirror_table(record).encode())
    print(json.dumps(rows, indent=2), mirror_table(record), sep="\n")


if __name__ == "__main__":
    main()
