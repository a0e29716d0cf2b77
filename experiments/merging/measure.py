"""The barriers of claim W6, from the checkpoints of its runs.

python -m experiments.merging.measure [--runs FOLDER]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddc.gauges import align_, canonicalise_, find_gauges, named_parameters
from ddc.training.evaluate import evaluation_batches, measure
from ddc.training.records import provenance
from ddc.training.setup import Setup, restore
from experiments.merging.plan import EXPERIMENT, OPTIMIZERS, RESULTS, SEEDS, first, second, settings
from experiments.output import save_records
from experiments.regauged.plan import STARTS

TURNED = ("value_rotation", "qk_rotation")


def moved_together(one: nn.Module, other: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies of two models at the balanced points of their orbits, the heads of the second turned
    onto those of the first, in float64.
    """
    both = [copy.deepcopy(each).double() for each in (one, other)]
    gauges = find_gauges(one, kinds="complete")
    for each in both:
        canonicalise_(each, gauges)
    reference, turned = map(named_parameters, both)
    align_(turned, reference, find_gauges(one, kinds=TURNED))
    return both[0], both[1]


@torch.no_grad()
def average(one: nn.Module, other: nn.Module) -> nn.Module:
    """The mean of the weights of two models, in float32."""
    mean = copy.deepcopy(one)
    theirs = named_parameters(other)
    for name, p in named_parameters(mean).items():
        p.copy_((p + theirs[name]) / 2)
    return mean.float()


def loss(setup: Setup, model: nn.Module) -> float:
    """The validation loss of a model of the same architecture."""
    there = copy.copy(setup)
    there.model = model
    return measure(there, evaluation_batches(there, "validation"))["loss"]


def pair(one: Setup, other: Setup) -> dict[str, float]:
    """The losses of two runs, of their average as they are, and of that after both were moved."""
    return {
        "first": loss(one, one.model),
        "second": loss(one, other.model),
        "as_is": loss(one, average(one.model, other.model)),
        "moved": loss(one, average(*moved_together(one.model, other.model))),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every pair whose runs have ended.

    Raises:
        FileNotFoundError: a run of a pair has no checkpoint.
        ValueError: the tuning of claim W1 has not ended.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    runs = parser.parse_args(arguments).runs
    records: list[dict[str, Any]] = []
    about = provenance()
    for name, setting in settings(runs).items():
        for seed in SEEDS:
            planned = [first(setting, seed), *(second(setting, each, seed) for each in STARTS)]
            one, *others = (restore(run.folder) for run in EXPERIMENT.sweep(planned, runs))
            for start, other in zip(STARTS, others, strict=True):
                found = {"optimizer": OPTIMIZERS[name], "start": start, "seed": seed}
                records.append({**found, **pair(one, other), **about})
    save_records(RESULTS / "pairs.jsonl", records)


if __name__ == "__main__":
    main()
