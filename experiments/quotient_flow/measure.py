"""Claim C7: the trajectory is a flow on the quotient (``python -m
experiments.quotient_flow.measure``).

Written before the runs. *Flow*: the whole batch at every step, so that there is one; the time of
training, which is steps times learning rate, and the memories of both moments in that time keep
still while the learning rate goes to zero (:mod:`experiments.quotient_flow.flow`). Five learning
rates, from 0.001 on each half of the one before. All in float64.

*Models*: a network of one hidden layer on 256 digits, with ReLU², since a flow needs a gradient
without jumps: its flow is integrated by code that shares nothing with the package. And a GPT on 8
sequences, with all of its gauges at once, whose steps are compared with those at half the learning
rate, since for it there is no such code.

*Distances* are between orbits (:func:`ddc.gauges.orbit_distance`), over the distance from the start
to where the flow ends.

- ``to_flow``: of the last weights to those of the flow, or of half the learning rate. It falls with
  the learning rate to the power that a line through the five has in logarithms.
- ``apart``: between the last weights of two trainings that start on one orbit, a random element of
  the whole gauge group apart.

*Verdict*. Reproduced: for DDCAdam ``apart`` is below 1e-7 for every model, seed and learning rate,
and the power is between 0.8 and 1.2 for every model and seed. One of both: direction only. AdamW is
measured beside it, with its own flow.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ddc import DDCAdam, find_gauges
from ddc.data import ImageConfig, TextConfig, load_images, load_text
from ddc.gauges import GaugeSet, named_parameters, orbit_distance
from ddc.models import GPT, GPTConfig, cross_entropy
from ddc.report.runs import read_lines
from ddc.training.records import provenance
from experiments.output import save_records
from experiments.protocols import ROOT, Stage
from experiments.quotient_flow.flow import Clock, adamw, ddcadam, integrate

RESULTS, SEEDS = ROOT / "results/quotient_flow", (0, 1, 2)
STEPS = (100, 200, 400, 800, 1600)
#: Of the independent integration; half as many tell how exact it is.
REFERENCE_STEPS = 800
CLOCK = Clock(time=0.1, memories=(0.01, 0.1), decay=0.1, eps=1e-8)
IMAGES, SIDE, HIDDEN, CLASSES = 256, 14, 16, 10
CONTEXT, SEQUENCES = 32, 8
TRANSFORMER = GPTConfig(context=CONTEXT, layers=2, width=16, heads=2, kv_heads=1, hidden=24)
MODELS = ("ReLU² network", "GPT")
OPTIMIZERS = ("ddcadam", "adamw")
Loss = Callable[[nn.Module], Tensor]
Point = dict[str, Tensor]


class SquaredReLU(nn.Module):
    """Homogeneous of degree 2, with a continuous derivative."""

    def forward(self, x: Tensor) -> Tensor:
        """The square of what is positive."""
        return x.relu().square()


def network(seed: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    """The ReLU² network, its images (each pixel the mean of 2 × 2) and labels, and their source."""
    data = load_images(ImageConfig(name="mnist_5k", train_images=IMAGES))
    pixels, y = data.train
    x = F.avg_pool2d(data.normalized(pixels), 2).flatten(1).double()
    torch.manual_seed(seed)
    layers = nn.Linear(SIDE**2, HIDDEN), SquaredReLU(), nn.Linear(HIDDEN, CLASSES)
    return nn.Sequential(*layers).double(), x, y, data.source


def problem(name: str, seed: int) -> tuple[nn.Module, GaugeSet, Loss, str]:
    """A model at its start, its gauges, its loss on the whole batch, and the source of its data."""
    if name == "ReLU² network":
        model, x, y, source = network(seed)
        gauges = find_gauges(model, inputs=(x[:4],))
        return model, gauges, lambda m: F.cross_entropy(m(x), y), source
    data = load_text(TextConfig(), CONTEXT)
    torch.manual_seed(seed)
    model = GPT(TRANSFORMER, data.vocab_size).double()
    tokens, targets = data.batch(0, SEQUENCES, seed)
    return (
        model,
        find_gauges(model),
        lambda m: cross_entropy(m(tokens), targets),
        data.source,
    )


def optimizer(name: str, model: nn.Module, gauges: GaugeSet, steps: int) -> Optimizer:
    """One whose learning rate makes the time of the clock in so many steps."""
    lr = CLOCK.time / steps
    options: dict[str, Any] = {
        "lr": lr, "betas": CLOCK.betas(lr), "weight_decay": CLOCK.decay, "eps": CLOCK.eps
    }  # fmt: skip
    if name == "adamw":
        return AdamW(model.parameters(), **options)
    return DDCAdam(model.named_parameters(), gauges, **options)


def end(name: str, model: nn.Module, gauges: GaugeSet, loss: Loss, steps: int) -> Point:
    """Where a training ends that starts at the model, which is left as it is."""
    model = copy.deepcopy(model)
    stepper = optimizer(name, model, gauges, steps)
    for _ in range(steps):
        stepper.zero_grad()
        loss(model).backward()
        stepper.step()
    return point(model)


def point(model: nn.Module) -> Point:
    """The weights, by name."""
    return {name: p.detach().clone() for name, p in named_parameters(model).items()}


def flow_end(name: str, seed: int, steps: int) -> Point:
    """Where the flow of the ReLU² network ends, by the independent integration."""
    model, x, y, _ = network(seed)
    field = (adamw if name == "adamw" else ddcadam)(CLOCK.decay)
    start = point(model)
    found = integrate(tuple(start.values()), field, x, y, CLOCK, steps)
    return dict(zip(start, found, strict=True))


def measure(seeds: Sequence[int] = SEEDS, steps: Sequence[int] = STEPS) -> list[dict[str, Any]]:
    """One record a model, optimizer, seed and learning rate."""
    about, records = provenance(), []
    for seed, name, which in track(
        [*itertools.product(seeds, MODELS, OPTIMIZERS)], "training to a fixed time"
    ):
        began = time.perf_counter()
        model, gauges, loss, source = problem(name, seed)
        moved = copy.deepcopy(model)
        gauges.transform_(moved, torch.Generator().manual_seed(seed))
        ends = {n: end(which, model, gauges, loss, n) for n in steps}
        if name == "ReLU² network":
            flow = flow_end(which, seed, REFERENCE_STEPS)
            half = flow_end(which, seed, REFERENCE_STEPS // 2)
            error = float(orbit_distance(half, flow, gauges))
            limits = dict.fromkeys(steps, flow)
        else:
            limits = {n: ends.get(2 * n) or end(which, model, gauges, loss, 2 * n) for n in steps}
            error = None
        length = float(orbit_distance(point(model), limits[steps[-1]], gauges))
        for n in steps:
            apart = orbit_distance(ends[n], end(which, moved, gauges, loss, n), gauges)
            records.append(
                {
                    "model": name,
                    "optimizer": which,
                    "seed": seed,
                    "steps": n,
                    "lr": CLOCK.time / n,
                    "to_flow": float(orbit_distance(ends[n], limits[n], gauges)) / length,
                    "apart": float(apart) / length,
                    "length": length,
                    "reference_error": None if error is None else error / length,
                    "loss": float(loss(with_weights(model, ends[n])).detach()),
                    "loss_at_start": float(loss(model).detach()),
                    "dimension": gauges.dimension(model),
                    "config": vars(CLOCK) | {"reference_steps": REFERENCE_STEPS},
                    "data": source,
                    "seconds": (time.perf_counter() - began) / len(steps),
                    **about,
                }
            )
    return records


def with_weights(model: nn.Module, weights: Point) -> nn.Module:
    """A copy of a model with these weights."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights, strict=False)
    return model


def needed() -> int:
    """How many records there are."""
    return len(SEEDS) * len(MODELS) * len(OPTIMIZERS) * len(STEPS)


def status(runs: str) -> list[Stage]:
    """How many are recorded; nothing of it is in the folder of the runs."""
    records = read_lines(RESULTS / "records.jsonl")
    seconds = statistics.mean(record["seconds"] for record in records) if records else None
    return [Stage("trainings", needed(), len(records), 0, seconds)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the records."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    save_records(RESULTS / "records.jsonl", measure())


if __name__ == "__main__":
    main()
