"""All that is measured of the feed-forward capacity of one trained model, as a record."""

from __future__ import annotations

import dataclasses
import time
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
from ddc.training.evaluate import evaluation_batches, measure
from ddc.training.records import provenance
from ddc.training.setup import Setup

SHARES = (1.0, 0.75, 0.5, 0.25)
#: Of validation, on which single units are removed.
PREDICTIONS = 512


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
