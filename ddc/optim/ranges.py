"""Which values hyperparameters may have: for the optimizers, and for the configuration of a run.

Those of which rules differ, betas and eps, are checked by the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ddc.optim.orthogonal import ORTHOGONALIZERS

VERTICAL_MODES = ("freeze", "adam", "balance")
STEP_SCALES = ("init", "norm")
#: By how much Muon's update of a matrix of so many rows and columns is scaled.
ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
}

Range = tuple[Callable[[Any], bool], str]


def _one_of(choices: Collection[str]) -> Range:
    return lambda value: value in choices, f"one of {', '.join(choices)}"


_AT_LEAST_0: Range = (lambda value: bool(value >= 0), "a number >= 0")
#: By name: whether a value is in range, and the range in words.
RANGES: dict[str, Range] = {
    "lr": _AT_LEAST_0,
    "adam_lr": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "radial_rate": _AT_LEAST_0,
    "momentum": (lambda value: bool(0 <= value < 1), "a number in [0, 1)"),
    "vertical": _one_of(VERTICAL_MODES),
    "step_scale": _one_of(STEP_SCALES),
    "adjust_lr_fn": _one_of(ADJUSTMENTS),
    "orthogonalizer": _one_of(ORTHOGONALIZERS),
}


def expected(name: str, value: Any) -> str | None:
    """The range of a hyperparameter in words, if a value is out of it; else None."""
    if name not in RANGES:
        return None
    holds, words = RANGES[name]
    return None if holds(value) else words


def check_ranges(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a hyperparameter out of range."""
    for name, value in group.items():
        if (words := expected(name, value)) is not None:
            raise ValueError(f"Invalid {name}={value!r}: expected {words}")
