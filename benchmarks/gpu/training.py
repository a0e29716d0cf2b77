"""Runs of ``train.py`` at ``scale=gpu``: over-training of a language model of 12 layers and width
768, as the paper's is, and a vision transformer of ViT-S's size.

The language model has 256 kB of text, which it can memorise; batches are a 32nd of it, so that
there are many steps in a minute. Runs are in order of worth: all
optimizers on one seed, then the next seed. A run that time cuts off is recorded as far as it came;
where its folder is still there, it goes on from its checkpoint. A run that is recorded is not run
again, whatever the commit: its configuration is its identity.
"""

from __future__ import annotations

import itertools
import json
import statistics
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
    "data.train_tokens=262144",
    "training.batch_size=8",
    "training.steps=2400",
    "training.evaluations=12",
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
COMMON = ("wandb=disabled", "optimizer.lr=0.001", "optimizer.weight_decay=0.1")
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
    record = Record(place, stage)
    seeds = SEEDS[:1] if place.tiny else SEEDS
    for seed, optimizer in itertools.product(seeds, optimizers):
        name = f"{optimizer}, seed {seed}"
        if record.is_done(name, whatever_commit=True):
            print(f"{stage}: {name} is recorded", flush=True)
            continue
        if place.left < LEAST:
            print(f"{stage}: no time is left for {name} and what follows", flush=True)
            return
        threads = 1 if place.tiny else 8
        config = compose_config(
            [
                *overrides,
                f"optimizer={optimizer}",
                f"seed={seed}",
                f"training.threads={threads}",
                f"runs={place.runs}",
            ]
        )
        folder = Path(config.runs) / config.name / config.run_id
        try:
            train(prepare(config))
        except KeyboardInterrupt:
            record.write(name, {"complete": False, **recorded(folder)})
            raise
        except DivergedError as error:
            record.write(name, {"complete": True, "message": str(error), **recorded(folder)})
        except Exception as error:  # the other runs are worth having all the same
            found = recorded(folder) if (folder / INFO).exists() else {}
            record.write(name, {"error": f"{type(error).__name__}: {error}", **found})
        else:
            record.write(name, {"complete": True, **recorded(folder)})


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
