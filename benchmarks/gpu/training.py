"""Runs of ``train.py`` at ``scale=gpu``: over-training of a language model of 12 layers and width
768, as the paper's is, and a vision transformer of ViT-S's size.

The language model has 64 kB of text, in batches of an eighth of it, which it has memorised long
before the end. Runs are in order of worth: all optimizers on one seed, at once, since none of them
fills the card; then the next seed. A run that time cuts off is recorded as far as it came; where
its folder is still there, it goes on from its checkpoint. A run that is recorded is not run again,
whatever the commit: its settings are its identity.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from benchmarks.gpu.record import Place, Record
from ddc.training.compose import compose_config
from ddc.training.loop import train
from ddc.training.records import Row, read_lines
from ddc.training.run_folder import (
    DIVERGED,
    INFO,
    READINGS,
    RECORDS,
    SUMMARY,
    TIMING,
    DivergedError,
)
from ddc.training.schema import Config
from ddc.training.setup import prepare

SEEDS = range(5)
#: What a record keeps of a run's evaluations, as columns.
CURVE = ("step", "epoch", "train_loss", "validation_loss", "gap")
#: The paper's gap of AdamW.
GAP = 5.88
#: Seconds that a run needs to have any use.
LEAST = 20.0

OVERTRAINING = (
    "+experiment=lm_overtrain",
    "scale=gpu",
    "name=gpu_overtrain",
    "data.train_tokens=65536",
    "training.batch_size=8",
    "training.steps=1500",
    "training.evaluations=10",
    "training.checkpoints=3",
    "slt=cells",
    "slt.readings=16",
    "slt.sequences=8",
    "slt.keep_snapshots=false",
)
VISION = (
    "+experiment=vit_scratch",
    "scale=gpu",
    "name=gpu_vision",
    "data=mnist_5k",
    "training.steps=1200",
    "training.evaluations=12",
    "training.evaluation_batches=4",
    "training.checkpoints=1",
)
COMMON = ("wandb=disabled", "optimizer.lr=0.0003", "optimizer.weight_decay=0.1")
#: The smallest form of each.
TINY = (
    "training.device=cpu",
    "training.precision=float32",
    "training.steps=4",
    "training.evaluations=2",
    "training.checkpoints=2",
    "training.evaluation_batches=1",
    "training.batch_size=2",
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.hidden=16",
)
TINY_OVERTRAINING = (
    "model.kv_heads=1",
    "model.context=16",
    "data.train_tokens=2048",
    "slt.readings=8",
    "slt.sequences=2",
)
TINY_VISION = ("model.patch=7",)


def overtraining(place: Place) -> None:
    """AdamW, DDCAdam and the author's step, over seeds."""
    small = (*TINY, *TINY_OVERTRAINING) if place.tiny else ()
    optimizers = ("adamw", "ddcadam", "ddcadam_paper")
    train_all(place, "overtraining", (*OVERTRAINING, *COMMON, *small), optimizers)


def vision(place: Place) -> None:
    """AdamW and DDCAdam, over seeds."""
    small = (*TINY, *TINY_VISION) if place.tiny else ()
    train_all(place, "vision", (*VISION, *COMMON, *small), ("adamw", "ddcadam"))


def train_all(
    place: Place, stage: str, overrides: tuple[str, ...], optimizers: tuple[str, ...]
) -> None:
    """Train, as long as there is time, and record each run when it ends, or is stopped."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    record = Record(place, stage)
    threads = 1 if place.tiny else max(1, (os.cpu_count() or 1) // (len(optimizers) + 1))
    here = (f"training.threads={threads}", f"runs={place.runs}")
    for seed in SEEDS[:1] if place.tiny else SEEDS:
        runs = {
            f"{optimizer}, seed {seed}": [*overrides, f"optimizer={optimizer}", f"seed={seed}"]
            for optimizer in optimizers
        }
        for name, run in [*runs.items()]:
            if record.is_done(name, run):
                print(f"{stage}: {name} is recorded", flush=True)
                del runs[name]
        if runs and (stopped.is_set() or place.left < LEAST):
            print(f"{stage}: no time is left for {', '.join(runs)} and what follows", flush=True)
            return
        with ProcessPoolExecutor(len(optimizers), multiprocessing.get_context("spawn")) as pool:
            configs = {name: compose_config([*run, *here]) for name, run in runs.items()}
            left = {name: pool.submit(train_one, config) for name, config in configs.items()}

            def write(name: str, end: Row, runs: dict[str, list[str]] = runs) -> None:
                record.write(name, {**end, "overrides": runs[name], "at_once": len(runs)})

            while left:
                wait(left.values(), timeout=1, return_when=FIRST_COMPLETED)
                for name in [name for name, end in left.items() if end.done()]:
                    write(name, left.pop(name).result())
                if stopped.is_set():  # the runs are stopped as well, and save what may be large
                    for name in left:
                        if (folder_of(configs[name]) / INFO).exists():
                            write(name, {"complete": False, **recorded(folder_of(configs[name]))})
                    return


def folder_of(config: Config) -> Path:
    """Where a run writes."""
    return Path(config.runs) / config.name / config.run_id


def train_one(config: Config) -> Row:
    """Train, and return what a record has of the run."""
    folder = folder_of(config)
    try:
        train(prepare(config))
    except KeyboardInterrupt:
        return {"complete": False, **recorded(folder)}
    except DivergedError as error:
        return {"complete": True, "message": str(error), **recorded(folder)}
    except Exception as error:  # the other runs are worth having all the same
        found = recorded(folder) if (folder / INFO).exists() else {}
        return {"error": f"{type(error).__name__}: {error}", **found}
    return {"complete": True, **recorded(folder)}


def recorded(folder: Path) -> Row:
    """What a record has of a run, as far as it came."""
    rows, timing = read_lines(folder / RECORDS), read_lines(folder / TIMING)
    info, readings = json.loads((folder / INFO).read_text()), read_lines(folder / READINGS)
    found: Row = {
        "id": info["id"],
        "config": info["config"],
        "data": info["data"],
        "curve": {key: [row[key] for row in rows] for key in CURVE},
        "seconds": sum(row["seconds"] for row in timing),
        "reading_seconds": sum(row["reading_seconds"] for row in timing),
        "units_per_second": speed(timing),
        "diverged": (folder / DIVERGED).exists(),
    }
    if rows and "validation_accuracy" in rows[0]:
        found["curve"]["validation_accuracy"] = [row["validation_accuracy"] for row in rows]
    if (folder / SUMMARY).exists():
        found["summary"] = json.loads((folder / SUMMARY).read_text())
    if readings:
        found["readings"] = [slim(each) for each in readings]
    return found


def slim(reading: Row) -> Row:
    """A reading without its spectra, which are large."""
    layers = [
        {
            **layer,
            **{
                side: {key: value for key, value in layer[side].items() if key != "spectrum"}
                for side in ("activation", "gradient")
            },
        }
        for layer in reading["layers"]
    ]
    return {**reading, "layers": layers}


def speed(timing: list[Row]) -> float | None:
    """The median speed of training between evaluations."""
    values = [
        value for row in timing[1:] for key, value in row.items() if key.endswith("_per_second")
    ]
    return statistics.median(values) if values else None
