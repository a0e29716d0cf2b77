"""The barriers of claim W6, from the checkpoints of its runs, and averages along runs that are
trained here. Run again, it goes on.

python -m experiments.merging.measure [--runs FOLDER]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import lru_cache

from rich.progress import track
from torch import nn
from torch.amp import GradScaler

from ddc.report.stages import Record
from ddc.training.evaluate import evaluation_batches
from ddc.training.evaluate import measure as measured
from ddc.training.loop import train_step
from ddc.training.records import Records, provenance
from ddc.training.setup import Setup, prepare, restore
from experiments.merging.averages import Moves, average, even, exponential, moved_together
from experiments.merging.plan import EXPERIMENT, OPTIMIZERS, RESULTS, SEEDS, first, second, settings
from experiments.output import save_records
from experiments.regauged.plan import STARTS

SNAPSHOTS = 10
#: The first run of a pair is that of the next as well.
restored = lru_cache(maxsize=2)(restore)


def loss(setup: Setup, model: nn.Module) -> float:
    """The validation loss of a model of the same architecture, in float32."""
    there = copy.copy(setup)
    there.model = copy.deepcopy(model).float()
    return measured(there, evaluation_batches(there, "validation"))["loss"]


def pair(setting: str, seed: int, start: str, moves: Moves, runs: str) -> dict[str, float]:
    """The losses of two runs, of their average as they are, and of the second and of their average
    after both were moved.

    Raises:
        ArithmeticError: the second does not compute the same after it was moved.
        FileNotFoundError: a run has no checkpoint.
    """
    planned = [first(setting, seed), second(setting, start, seed)]
    one, other = (restored(run.folder) for run in EXPERIMENT.sweep(planned, runs))
    moved = moved_together([one.model, other.model], moves)
    second_loss, second_moved = loss(one, other.model), loss(one, moved[1])
    if abs(second_moved - second_loss) > 1e-4:
        raise ArithmeticError(f"a move changes the loss from {second_loss} to {second_moved}")
    return {
        "first": loss(one, one.model),
        "second": second_loss,
        "as_is": loss(one, average(one.model, other.model)),
        "second_moved": second_moved,
        "moved": loss(one, average(moved[0], moved[1])),
    }


def along(setting: str, seed: int, moves: Moves, runs: str) -> dict[str, float]:
    """Train a run of which snapshots alone are kept: the loss at its end, and of their averages."""
    overrides, seed = first(setting, seed)
    (run,) = EXPERIMENT.sweep([(f"{overrides} training.schedule=constant", seed)], runs)
    setup = prepare(run.config)
    steps = run.config.training.steps
    models, scaler = list[nn.Module](), GradScaler(setup.device.type, enabled=False)
    for step in range(steps):
        train_step(setup, step, scaler, audited=False)
        if step >= steps // 2 and (step + 1) % (steps // 2 // SNAPSHOTS) == 0:
            models.append(copy.deepcopy(setup.model))
    moved = moved_together(models[::-1], moves)[::-1]
    averages = {
        f"{title}{suffix}": of(each)
        for title, of in (("swa", even), ("ema", exponential))
        for suffix, each in (("", models), ("_moved", moved))
    }
    return {"last": loss(setup, setup.model), **{k: loss(setup, m) for k, m in averages.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every pair, and every run, that has no record.

    Raises:
        FileNotFoundError: a run of a pair has no checkpoint.
        ValueError: the tuning of claim W1 has not ended.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="runs", help="folder of the runs, those of claim W1 too")
    runs = parser.parse_args(arguments).runs
    about, chosen = provenance(), settings(runs)
    planned = [(name, seed) for name in chosen for seed in SEEDS]
    (run, *_) = EXPERIMENT.sweep([first(chosen[planned[0][0]], 0)], runs)
    moves = Moves.of(prepare(run.config).model)
    records, known = recorded("pairs")
    pairs = [(*each, start) for each in planned for start in STARTS]
    for name, seed, start in track(pairs, "pairs"):
        found: Record = {"optimizer": OPTIMIZERS[name], "start": start, "seed": seed}
        if found not in known:
            records.append({**found, **pair(chosen[name], seed, start, moves, runs), **about})
    records, known = recorded("along")
    for name, seed in track(planned, "runs"):
        found = {"optimizer": OPTIMIZERS[name], "seed": seed}
        if found not in known:
            records.append({**found, **along(chosen[name], seed, moves, runs), **about})


def recorded(name: str) -> tuple[Records, list[Record]]:
    """Where records go, and what those that there are are of."""
    records = Records(RESULTS / f"{name}.jsonl")
    rows, keys = records.read(), ("optimizer", "start", "seed")
    save_records(records.path, rows)  # without a line that was cut short
    return records, [{key: row[key] for key in keys if key in row} for row in rows]


if __name__ == "__main__":
    main()
