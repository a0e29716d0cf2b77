"""Claims C3 and C4: a vision transformer from scratch, its validation loss and its spare capacity.

Written before the runs (commit 1ca1623), apart from one pilot of each optimizer at the matched
setting on seed 100 (1,600 steps), which chose the number of steps:

- AdamW and DDCAdam on the first 2,000 images of Fashion-MNIST, ``+experiment=vit_scratch``, seeds 0
  to 4, which set initialisation and order; differences are paired by seed.
- *matched*: rate 0.001 and decay 0.1 for both. *tuned*: each at the best of nine settings of rate
  and decay, by the mean of the last validation loss; all run on seed 100, the best two on 101 and
  102.
- C3: the last validation loss. C4: the share of hidden units that can be replaced by their means,
  one at a time, with a change of the validation loss of less than 0.001 nats; and the loss after
  pruning to half the width.

Written later: the rules of the verdicts (``claim.yaml``; commit 7488cac), when the matched
runs and most of the tuning had ended, but before any capacity was measured in them; and ``beyond``,
when the tuning was done: both choices lay at the edge of the grid, so two settings each beyond it
ran on the three tuning seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

from ddc.report.stages import PROTOCOLS, Record
from ddc.training.run_folder import CAPACITY as CAPACITY_FILE
from experiments.protocols import (
    FINAL_SEEDS,
    ROOT,
    TUNING_SEED,
    Experiment,
    Plan,
    left_by,
    product,
)

RESULTS = ROOT / "results/vit_scratch"
OPTIMIZERS = ("adamw", "ddcadam")
CAPACITY = "scripts/capacity.py"
#: Keys of the evaluations that a record keeps.
CURVE = (
    "step",
    "train_loss",
    "validation_loss",
    "train_accuracy",
    "validation_accuracy",
    "validation_calibration_error",
)
RATES, DECAYS = (5e-4, 1e-3, 2e-3), (0.1, 1.0, 3.0)
#: Settings beyond the grid, for both choices lay at its edge: no protocol reports them.
BEYOND = {"adamw": ((2e-3, 10.0), (4e-3, 3.0)), "ddcadam": ((2.5e-4, 3.0), (1e-3, 2.0))}


def setting(optimizer: str, rate: float, decay: float) -> str:
    """Overrides of one setting."""
    return f"optimizer={optimizer} optimizer.lr={rate:g} optimizer.weight_decay={decay:g}"


def score(records: Sequence[Record]) -> float:
    """Minus the sum of the last validation losses; a run that diverged is worse than any."""
    return -sum(
        float("inf") if each["diverged"] else each["curve"]["validation_loss"][-1]
        for each in records
    )


def beyond(runs: str | None) -> Plan:
    """Settings next to the chosen ones, outside the grid, on the seeds of the tuning."""
    settings = [setting(name, *each) for name, more in BEYOND.items() for each in more]
    return product(settings, [TUNING_SEED, *FINAL_SEEDS])


def capacity(folder: Path, stages: Collection[str]) -> Record:
    """What :data:`CAPACITY` measured of a run of the two protocols.

    Raises:
        ValueError: it has not.
    """
    if not {*PROTOCOLS} & {*stages}:
        return {}
    return {"capacity": left_by(CAPACITY, folder / CAPACITY_FILE)}


EXPERIMENT = Experiment(
    overrides="+experiment=vit_scratch data=fashion_mnist",
    seeds=range(5),
    matched=[setting(name, 1e-3, 0.1) for name in OPTIMIZERS],
    grid={
        name: [setting(name, *each) for each in itertools.product(RATES, DECAYS)]
        for name in OPTIMIZERS
    },
    score=score,
    curve=CURVE,
    results=RESULTS,
    more={"beyond": beyond},
    scripts=dict.fromkeys(PROTOCOLS, CAPACITY),
    measured=capacity,
)
