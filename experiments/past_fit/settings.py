"""What the tuning of claim C1 far past the point of fit tries, and what it asks."""

from __future__ import annotations

import math

from ddc.report.stages import Record
from experiments.search import Search, best_loss, last_loss, last_loss_of_fit

#: A run fits if its train loss at the end is at most this; the level of the gap at equal loss.
FIT = 0.5
#: The optimizers that are tuned; the last is the step of the paper's companion.
OPTIMIZERS = ("adamw", "ddcadam", "ddcadam_paper")
ADAMW, DDCADAM, AUTHOR = OPTIMIZERS


def gap_at_equal_loss(record: Record) -> float:
    """The gap where the train loss first falls to 0.5; infinite for a run that never gets there."""
    gap = None if record["diverged"] else record["summary"]["gap_at_train_loss"][str(FIT)]
    return math.inf if gap is None else float(gap)


_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_RADIAL_RATES = (0.0, 0.3, 1.0, 3.0, 10.0)
SEARCH = Search(
    axes={
        ADAMW: {"lr": _RATES, "weight_decay": _DECAYS},
        DDCADAM: {"lr": _RATES, "weight_decay": _DECAYS, "radial_rate": _RADIAL_RATES},
        AUTHOR: {"lr": _RATES, "weight_decay": _DECAYS},
    },
    first={
        ADAMW: ((1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0, 10.0)),
        DDCADAM: ((1e-3, 3e-3), (0.3, 1.0, 3.0), (0.0, 1.0)),
        AUTHOR: ((3e-4, 1e-3, 3e-3), (0.3, 1.0, 3.0, 10.0)),
    },
    questions={
        "last": last_loss,
        "last_fit": last_loss_of_fit(FIT),
        "equal_loss": gap_at_equal_loss,
        "best": best_loss,
    },
    rounds=4,
    most=6,
)
