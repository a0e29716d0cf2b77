"""Outliers at the end of the float32 runs of claim W5, and what 4-bit rounding loses there.

python -m experiments.low_precision.measure [--runs FOLDER]

Each run is measured once: a record is written when it is ready, and what is recorded is passed
over.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from ddc.gauges import canonicalise_, find_gauges, named_parameters
from ddc.report.runs import read_lines
from ddc.training.evaluate import evaluation_batches, measure
from ddc.training.records import Records, provenance
from ddc.training.setup import Batch, Setup, restore
from experiments.low_precision.plan import EXPERIMENT, FLOAT32, RESULTS, reported
from experiments.output import save_records
from experiments.regauged.starts import inputs_of_maps, rounded

ENDS = "ends.jsonl"
NORMS = (nn.LayerNorm, nn.RMSNorm)


def kurtosis(entries: Tensor) -> float:
    """The fourth central moment over the square of the second; 3 of a normal distribution."""
    centred = entries.double() - entries.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


def outliers(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Kurtosis over all entries of an activation, mean over its places in the model: ``stream``,
    what norms get; ``hidden``, the units that the last map of a feed-forward block gets; ``inputs``
    of all linear maps.
    """
    batches = list(batches)
    maps = {name: kurtosis(x) for name, x in inputs_of_maps(model, batches).items()}
    stream = inputs_of_maps(model, batches, NORMS).values()
    return {
        "stream": statistics.mean(map(kurtosis, stream)),
        "hidden": statistics.mean(k for name, k in maps.items() if name.endswith("down.weight")),
        "inputs": statistics.mean(maps.values()),
    }


@torch.no_grad()
def quantised(model: nn.Module) -> nn.Module:
    """A copy whose matrices are rounded to nearest, each row to 16 values of its own."""
    copied = copy.deepcopy(model)
    for p in named_parameters(copied).values():
        if p.ndim == 2:
            p.copy_(rounded(p.T).T)
    return copied


def balanced(model: nn.Module) -> nn.Module:
    """A copy at the balanced point of its orbit under all kinds that are known, found in
    float64.
    """
    moved = copy.deepcopy(model).double()
    canonicalise_(moved, find_gauges(model, kinds="complete"))
    return moved.to(next(model.parameters()).dtype)


def loss(setup: Setup, model: nn.Module, batches: list[Batch]) -> float:
    """The validation loss of a model of the same architecture."""
    there = copy.copy(setup)
    there.model = model
    return measure(there, batches)["loss"]


def end_of(setup: Setup) -> dict[str, Any]:
    """What is measured of a run: of its weights ``as_trained`` and ``balanced``, the validation
    loss, that after 4-bit rounding, and the kurtosis of activations before it.
    """
    batches = evaluation_batches(setup, "validation")
    model = setup.model.eval()
    return {
        name: {
            "loss": loss(setup, each, batches),
            "quantised": loss(setup, quantised(each), batches),
            "kurtosis": outliers(each, (x for x, _ in batches)),
        }
        for name, each in (("as_trained", model), ("balanced", balanced(model)))
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the float32 runs that have ended and have no record.

    Raises:
        FileNotFoundError: such a run has no checkpoint.
        ValueError: the tuning in float32 has not ended.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    runs = parser.parse_args(arguments).runs
    planned = EXPERIMENT.sweep(reported(runs, (FLOAT32,)), runs)
    known = read_lines(RESULTS / ENDS)
    save_records(RESULTS / ENDS, known)  # without a last line that was cut short
    done = {record["id"] for record in known}
    left = [run for run in planned if run.state == "complete" and run.folder.name not in done]
    ends, about = Records(RESULTS / ENDS), provenance()
    for run in track(left, "measuring"):
        setup = restore(run.folder)
        optimizer, start = setup.config.optimizer, setup.config.start
        origin = {
            "id": run.folder.name,
            "optimizer": optimizer.name,
            "canonicalise": optimizer.canonicalise,
            "spread": start.spread,
            "seed": setup.config.seed,
        }
        ends.append({**origin, **end_of(setup), **about})


if __name__ == "__main__":
    main()
