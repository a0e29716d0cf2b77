"""What low precision costs an optimizer: ``python -m experiments.precision.measure``.

A model trains in float64, and on the same batches from the same weights, rounded, in lower
precisions. *Error* is how far a run is from the float64 run; *equivariance* is how far two runs of
one precision are from each other whose starts differ by a random element of the gauge group (moved
in float64, then rounded). Both are read from the weights, in float64: as the root mean square
difference of log-probabilities on held-out data.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ddc import find_gauges
from ddc.data import TextConfig, TextData, load_text
from ddc.gauges import GaugeSet
from ddc.models import GPTConfig, cross_entropy
from ddc.training.records import provenance
from experiments.equivariance.measure import (
    BATCH,
    CONTEXT,
    LR,
    MODELS,
    MUON_LR,
    SEEDS,
    STEPS,
    WEIGHT_DECAY,
    OptimizerMaker,
    adamw,
    ddcadam,
    ddcmuon,
    muon,
    random_model,
)
from experiments.output import save_records
from experiments.protocols import ROOT

RESULTS = ROOT / "results/precision"
CONFIGS = dict(itertools.islice(MODELS.items(), 2))
READ_AT = (0, 10, STEPS)
# the same orthogonaliser in every precision, in that of the state
OPTIMIZERS: dict[str, OptimizerMaker] = {
    "adamw": adamw,
    "ddcadam": ddcadam,
    "muon": functools.partial(muon, orthogonalizer="newton_schulz"),
    "ddcmuon": functools.partial(ddcmuon, orthogonalizer="newton_schulz"),
}


@dataclass(frozen=True)
class Precision:
    """What weights are stored in, and what the forward and backward pass are cast to; float16 has
    its loss scaled. ``products`` is torch's precision of products in float32: ``high`` is TF32.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None = None
    products: str = "highest"


PRECISIONS = (
    Precision("float64", torch.float64),
    Precision("float32", torch.float32),
    Precision("mixed bfloat16", torch.float32, torch.bfloat16),
    Precision("mixed float16", torch.float32, torch.float16),
    Precision("bfloat16 weights", torch.bfloat16),
)


@dataclass(frozen=True)
class Reading:
    """A run at one step, in float64: all weights, and log-probabilities and loss on held-out
    data.
    """

    weights: Tensor
    log_probabilities: Tensor
    loss: float


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Products of float32 in another precision, on devices that have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def run(
    start: nn.Module,
    gauges: GaugeSet,
    make_optimizer: OptimizerMaker,
    data: TextData,
    precision: Precision,
    seed: int,
    read_at: Collection[int] = READ_AT,
) -> dict[int, Reading]:
    """Train from float64 weights, rounded, on their device, and read the weights at these steps.

    Raises:
        ArithmeticError: the loss scaler skipped a step, and so the run is not to be compared step
            by step.
    """
    model = copy.deepcopy(start).to(precision.weights)
    optimizer, device = make_optimizer(model, gauges), next(model.parameters()).device
    scaler = GradScaler(device.type, enabled=precision.autocast == torch.float16)
    scale = scaler.get_scale()
    batches = data.evaluation_batches("validation", 2, BATCH)
    probe, targets = (torch.cat(each).to(device) for each in zip(*batches, strict=True))
    found = {}
    for step in range(max(read_at) + 1):
        if step in read_at:
            with torch.no_grad():
                exact = copy.deepcopy(model).double()
                logits = exact(probe)
                weights = torch.cat([p.flatten() for p in exact.parameters()])
                found[step] = Reading(
                    weights, logits.log_softmax(-1), float(cross_entropy(logits, targets))
                )
        x, y = (each.to(device) for each in data.batch(step, BATCH, seed))
        optimizer.zero_grad()
        mixed = torch.autocast(
            device.type, precision.autocast, enabled=precision.autocast is not None
        )
        with products_in(precision.products):
            with mixed:
                loss = cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        scaler.update()
    if scaler.get_scale() != scale:
        raise ArithmeticError(f"a step in {precision.name} overflowed")
    return found


def difference(a: Reading, b: Reading) -> float:
    """Root mean square difference of log-probabilities."""
    return float((a.log_probabilities - b.log_probabilities).square().mean().sqrt())


def compare(
    config: GPTConfig,
    name: str,
    data: TextData,
    seed: int,
    read_at: Collection[int] = READ_AT,
    precisions: Sequence[Precision] = PRECISIONS,
    device: str | torch.device = "cpu",
) -> Iterable[dict[str, Any]]:
    """Errors of one optimizer in every precision, of which the first is float64, by step.

    ``error`` and ``orbit`` are in log-probabilities; ``weights`` is the distance from the float64
    run's weights, over the length of the way that these have gone.
    """
    start = random_model(config, data.vocab_size, seed, torch.float64).to(device)
    moved, gauges = copy.deepcopy(start), find_gauges(start)
    gauges.transform_(moved, torch.Generator().manual_seed(seed))
    exact: dict[int, Reading] = {}
    for precision in precisions:
        began = time.perf_counter()
        here, there = (
            run(each, gauges, OPTIMIZERS[name], data, precision, seed, read_at)
            for each in (start, moved)
        )
        exact = exact or here
        way = {
            step: float((reading.weights - exact[0].weights).norm())
            for step, reading in exact.items()
        }
        yield {
            "optimizer": name,
            "precision": precision.name,
            "seed": seed,
            "error": {str(step): difference(here[step], exact[step]) for step in here},
            "weights": {
                str(s): float((here[s].weights - exact[s].weights).norm()) / way[s]
                for s in here
                if way[s]
            },
            "orbit": {str(step): difference(here[step], there[step]) for step in here},
            "loss": {str(step): here[step].loss for step in here},
            "seconds": time.perf_counter() - began,
        }


def measure() -> list[dict[str, Any]]:
    """All cells of the tables."""
    about, data = provenance(), load_text(TextConfig(), CONTEXT)
    records = []
    for seed, (model, config), name in track(
        [*itertools.product(SEEDS, CONFIGS.items(), OPTIMIZERS)], "measuring"
    ):
        muon_lr = {"muon_lr": MUON_LR} if "muon" in name else {}
        options = {
            "steps": STEPS,
            "batch": BATCH,
            "lr": LR,
            **muon_lr,
            "weight_decay": WEIGHT_DECAY,
        }
        for record in compare(config, name, data, seed):
            about_run = {"config": asdict(config) | options, "data": data.source, **about}
            records.append({"model": model, **record, **about_run})
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the records."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    save_records(RESULTS / "records.jsonl", measure())


if __name__ == "__main__":
    main()
