"""Claim C2b: whether drift along gauge orbits blurs the rates of dead directions.

Written before the runs.

The cells of claim C2 are functions of the network's function: no gauge changes them, so no drift
along an orbit can blur them. Here cells are read where a gauge does act (:mod:`.sites`): after the
scale of a norm, at the hidden units of a feed-forward block, at the values of the heads; five
observables each, and at every linear map the smallest positive eigenvalue of the Gram matrix of
per-sample gradients, the third observable of the paper's companion (arXiv:2606.21158), counted
apart. Each run is read twice from the weights that it kept: as they are (*raw*), and after they
were moved to the balanced point of their orbit (*balanced*, :func:`ddc.gauges.balance_`), where
nothing is left of a drift under shifts and scales. Rotations of heads change no eigenvalue of a
site. All is read in float64, by the rule of the configuration, against the excess loss.

AdamW and DDCAdam on the setting of past_fit (4,000 steps, 250 epochs of 4,096 bytes), at rate
0.001, decay 0.1 on matrices, radial rate 1; seeds 0 to 4.

*Verdict*, on the cells of the five observables. Two effects, each paired by seed, Student's t, Holm
over both: DDCAdam reads more raw cells than AdamW; and balancing adds more cells to AdamW's than to
DDCAdam's, as it must if drift had blurred them. Reproduced: both with p < 0.05. Direction only: one
of them, and the other not significantly the other way round.

*Null control*: how many cells are read of random walks that move together as these cells do, with
the share of 200 such grids that read as many as the run.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from experiments.blurred.read import FILE
from experiments.protocols import ROOT, Experiment, left_by, product

SCRIPT = "experiments/blurred/read.py"
RESULTS, SEEDS = ROOT / "results/blurred", range(5)
OPTIMIZERS = ("adamw", "ddcadam")
SETTINGS = (
    "optimizer=adamw optimizer.lr=0.001 optimizer.weight_decay=0.1",
    "optimizer=ddcadam optimizer.lr=0.001 optimizer.weight_decay=0.1 optimizer.radial_rate=1",
)


def measured(folder: Path, stages: Collection[str]) -> dict[str, Any]:
    """What was read of a run."""
    return {"read": left_by(SCRIPT, folder / FILE)}


EXPERIMENT = Experiment(
    overrides="+experiment=blurred",
    seeds=SEEDS,
    curve=("step", "epoch", "train_loss", "validation_loss"),
    results=RESULTS,
    measured=measured,
    scripts={"runs": SCRIPT},
    more={"runs": lambda runs: product(SETTINGS, SEEDS)},
)
