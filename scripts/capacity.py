"""How much feed-forward capacity finished runs use: ``python scripts/capacity.py RUN_DIR ...``.

For each feed-forward block of the trained model: what the removal of each hidden unit by itself, to
zero and to its mean, does to the validation loss; invariant norms of the units; effective and
stable rank of W_up and W_down in coordinates that no gauge changes. For the model: losses and
accuracies with 75, 50 and 25% of the units, without further training. Writes capacity.json and
capacity.png to the run folder; one that has them is shown as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ddc.capacity import (
    dressed_spectra,
    feed_forward_blocks,
    pruned_parameters,
    removal_effects,
    unit_norms,
    unit_statistics,
)
from ddc.gauges import find_gauges, named_parameters
from ddc.models import cross_entropy
from ddc.report.capacity import capacity_table, plot_capacity
from ddc.report.runs import Run
from ddc.training.display import print_plainly
from ddc.training.evaluate import evaluation_batches, measure
from ddc.training.records import provenance, write_json
from ddc.training.run_folder import CAPACITY
from ddc.training.setup import Setup, restore

SHARES = (1.0, 0.75, 0.5, 0.25)


def main() -> None:
    """Measure the run folders of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--predictions", type=int, default=512, help="of validation, for the removal of units"
    )
    arguments = parser.parse_args()
    console = Console()
    for folder in arguments.folders:
        path = folder / CAPACITY
        try:
            run = Run.read(folder)
            if run.summary is None:
                raise ValueError(
                    f"{folder} has not ended: the same command of train.py goes on with it"
                )
            if (
                not path.exists()
                or json.loads(path.read_text()).get("predictions") != arguments.predictions
            ):
                write_json(path, capacity_of(restore(folder), arguments.predictions, console))
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"error: {error}")
        record = json.loads(path.read_text())
        console.print(capacity_table(record, run.label))
        for figure in (path, *plot_capacity(record, run.label, folder / "capacity")):
            print(figure)


def capacity_of(setup: Setup, predictions: int, console: Console) -> dict[str, Any]:
    """All that is measured of one trained model, as a record; in float32 throughout but for the
    pruned models' losses.

    The loss of the removals is over ``predictions`` images or tokens, a whole number of sequences.

    Raises:
        ValueError: the model has no feed-forward blocks.
    """
    began, model = time.perf_counter(), setup.model
    train, validation = (evaluation_batches(setup, split) for split in ("train", "validation"))
    examples = max(1, predictions // setup.data.units_per_example)
    (inputs, targets), *_ = setup.data.evaluation_batches("validation", 1, examples)
    inputs, targets = inputs.to(setup.device), targets.to(setup.device)
    blocks = feed_forward_blocks(model, (inputs,))
    if not blocks:
        raise ValueError(
            f"model={setup.config.model.name} has no feed-forward blocks whose units are its own"
        )
    parameters = named_parameters(model)
    # the model's, not those that its optimizer was told of
    gauges = find_gauges(model, inputs=(inputs[:2],))
    statistics = unit_statistics(model, blocks, [x for x, _ in train])
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("removing units", total=sum(block.units for block in blocks))
        effects = removal_effects(
            model,
            blocks,
            statistics,
            inputs,
            lambda y: cross_entropy(y, targets),
            lambda: progress.advance(task),
        )
    found = []
    for block in blocks:
        up, down = dressed_spectra(parameters, gauges, block)
        found.append(
            {
                "where": block.where,
                "units": block.units,
                "removal_to_zero": rounded(effects[block.where].to_zero),
                "removal_to_mean": rounded(effects[block.where].to_mean),
                "unit_norms": rounded(unit_norms(parameters, gauges, block)),
                "active": int((statistics[block.where].mean_square > 0).sum()),
                "effective_rank": {"up": up.effective_rank, "down": down.effective_rank},
                "stable_rank": {"up": up.stable_rank, "down": down.stable_rank},
            }
        )
    pruning = []
    for keep in SHARES:
        changed = pruned_parameters(parameters, blocks, statistics, keep)
        smaller = dataclasses.replace(setup, model=_Pruned(model, changed))
        measured = {"train": measure(smaller, train), "validation": measure(smaller, validation)}
        values = {
            f"{split}_{key}": value
            for split, each in measured.items()
            for key, value in each.items()
        }
        pruning.append({"keep": keep, **values})
    seconds = time.perf_counter() - began
    about = {
        "predictions": predictions,
        "examples": len(inputs),
        "capacity_seconds": seconds,
        **provenance(),
    }
    return {"blocks": found, "pruning": pruning, **about}


class _Pruned(torch.nn.Module):
    """A model with some of its parameters replaced, by smaller ones."""

    def __init__(self, model: torch.nn.Module, changed: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model, self.changed = model, changed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.model, self.changed, (x,))


def rounded(values: torch.Tensor) -> list[float]:
    """To six digits, which a file of thousands of numbers needs."""
    return [float(f"{value:.6g}") for value in values.tolist()]


if __name__ == "__main__":
    print_plainly()
    main()
