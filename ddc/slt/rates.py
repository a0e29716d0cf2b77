"""Rates of dead directions: the power of an approach parameter with which an observable vanishes.

A reading is a fit of log y against log t, t → 0 as training nears a minimum, over a window that a
stated rule chooses. A cell (a layer × an observable) is *read*, or *refused* for a named reason.
The constants of the rule belong to the configuration; they are the same for every run that is
compared.

The window is anchored at the small-t end, where the asymptotic regime would be. Of all windows that
start there and have enough checkpoints and decades, the longest is taken that passes every test:

- the slope exceeds ``min_slope`` and its interval excludes 0;
- R² is at least ``min_r2``;
- no kink: the slopes of its two halves differ by less than ``kink`` of the slope, or within the
  scatter.

Refusals, in the words of the record:

- ``few``: not enough checkpoints with t > 0;
- ``narrow``: they span too few decades of t;
- ``floor``: the observable sits at its rounding floor, or falls at first and is flat in the end;
- ``plateau``: flat: the interval of the slope lies within ±``min_slope``;
- ``rising``: it grows as t falls;
- ``kink``: it falls, but with no one slope up to the end;
- ``noise``: none of these, R² or the interval fails.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddc.slt.observables import OBSERVABLES

Array = NDArray[np.float64]

#: What may stand for the nearness of the minimum.
APPROACHES = ("excess_loss", "arc_length", "step")
#: Power of each observable in units of a second moment of one direction; a volume has no order of
#: its own.
MOMENT_POWERS = {"activation_sigma_min": 2.0, "gradient_lambda_min": 1.0, "fisher_min": 1.0}


@dataclass
class RateRule:
    """The constants by which every cell is read or refused.

    Args:
        min_checkpoints: least size of a window.
        min_decades: least size of a window, in decades of t.
        min_r2: least R² of the fit.
        min_slope: least slope; less is flat.
        kink: largest difference of the slopes of a window's halves, relative to its slope.
        confidence: of the interval of the slope.

    Raises:
        ValueError: on construction, a constant out of range.
    """

    min_checkpoints: int = 8
    min_decades: float = 0.5
    min_r2: float = 0.9
    min_slope: float = 0.1
    kink: float = 0.25
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for key, holds, expected in (
            ("min_checkpoints", self.min_checkpoints >= 6, "an integer >= 6"),
            ("min_decades", self.min_decades > 0, "a positive number"),
            ("min_r2", 0 < self.min_r2 < 1, "a number in (0, 1)"),
            ("min_slope", self.min_slope > 0, "a positive number"),
            ("kink", self.kink > 0, "a positive number"),
            ("confidence", 0 < self.confidence < 1, "a number in (0, 1)"),
        ):
            if not holds:
                raise ValueError(
                    f"Invalid slt.rule.{key}={getattr(self, key)}: expected {expected}"
                )


class Fit(NamedTuple):
    """A line through (log t, log y), with the interval of its slope."""

    slope: float
    intercept: float
    low: float
    high: float
    r2: float


@dataclass(frozen=True)
class Rate:
    """The verdict on one cell, with the fit that it rests on (of the shortest window, if
    refused).

    ``verdict`` is ``read``, or why it is refused: ``few``, ``narrow``, ``floor``, ``plateau``,
    ``rising``, ``kink`` or ``noise``.
    """

    verdict: str
    checkpoints: int = 0
    decades: float = 0.0
    fit: Fit | None = None

    @property
    def read(self) -> bool:
        return self.verdict == "read"


def fit_line(x: Array, y: Array, confidence: float = 0.95) -> Fit:
    """Least squares with an interval of the slope that respects serial correlation.

    The variance of the slope is that of a circular block bootstrap of the residuals (Politis and
    Romano 1992), summed over all blocks exactly instead of resampled. From the residuals' lag-one
    correlation ρ, corrected for its bias in small samples (Kendall 1954), come the length of the
    blocks (Carlstein, Ann. Stat. 14, 1986) and a factor for the correlation that blocks of this
    length cut off. The interval is Student's t with as many degrees of freedom as there are blocks,
    less two. Simulated (results/coverage), intervals of 95% cover 96% of the time for white
    residuals; with ρ = 0.5, 87% to 93%, and with ρ = 0.8, 81% to 90%, for 8 to 30 points.

    Args:
        x: shape (n,), in the order of training, n >= 3.
        y: shape (n,).
        confidence: of the interval.
    """
    from scipy import stats  # takes half a second to import

    # the line
    n = len(x)
    centred = x - x.mean()
    weights = centred / (centred @ centred)
    slope = float(weights @ y)
    intercept = float(y.mean() - slope * x.mean())
    residuals = y - intercept - slope * x
    total = float(np.square(y - y.mean()).sum())
    r2 = 1 - float(residuals @ residuals) / total if total > 0 else 0.0
    if not residuals.any():
        return Fit(slope, intercept, slope, slope, r2)
    # the residuals' correlation, and the length of blocks that it asks for
    rho = float(residuals[1:] @ residuals[:-1] / (residuals @ residuals))
    rho = min(max(rho + (2 + 4 * rho) / n, 0.0), 0.9)
    length = round((math.sqrt(6) * rho / (1 - rho**2)) ** (2 / 3) * n ** (1 / 3))
    length = min(max(1, length), max(1, n // 3))
    # row j, column s: the residual j places into the block that starts at s
    blocks = residuals[(np.arange(n)[None, :] + np.arange(length)[:, None]) % n]
    parts = [weights[i : i + length] for i in range(0, n, length)]
    variance = sum(float((part @ blocks[: len(part)]).var()) for part in parts)
    # what blocks of this length miss of the correlation
    kept = 1 + 2 * sum((1 - lag / length) * rho**lag for lag in range(1, length))
    variance *= (1 + rho) / (1 - rho) / kept
    # residuals are smaller than errors: two parameters are fitted
    error = math.sqrt(variance * n / (n - 2))
    reach = error * float(stats.t.ppf((1 + confidence) / 2, max(1.0, n / length - 2)))
    return Fit(slope, intercept, slope - reach, slope + reach, r2)


def read_rate(
    log_t: Sequence[float] | Array, log_y: Sequence[float] | Array, rule: RateRule | None = None
) -> Rate:
    """Read or refuse one cell.

    Args:
        log_t: shape (n,), logarithm of the approach parameter at each checkpoint, in the order of
            training. Not finite where t is 0 or unknown: the checkpoint is left out.
        log_y: shape (n,), logarithm of the observable; not finite where it is at its rounding
            floor.
        rule: the constants.
    """
    # checkpoints that have a place on the axis
    rule = rule or RateRule()
    x, y = np.asarray(log_t, dtype=np.float64), np.asarray(log_y, dtype=np.float64)
    x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    if len(x) < rule.min_checkpoints:
        return Rate("few", len(x))
    if decades(x) < rule.min_decades:
        return Rate("narrow", len(x), decades(x))
    # those above the rounding floor, and windows of them from the small-t end
    visible = np.isfinite(y)
    x, y = x[visible], y[visible]
    windows = list(anchored_windows(x, rule))
    if not windows:
        return Rate("floor", len(x), decades(x))
    # the longest that passes; else the shortest, and why it does not
    for window in reversed(windows):
        # first, for it spares the interval, which is most of the work
        if squared_correlation(x[window], y[window]) < rule.min_r2:
            continue
        fit = fit_line(x[window], y[window], rule.confidence)
        if steep(fit, rule) and not has_kink(x[window], y[window], fit, rule):
            return Rate("read", len(window), decades(x[window]), fit)
    end = windows[0]
    fit = fit_line(x[end], y[end], rule.confidence)
    return Rate(reason(x, y, end, fit, rule), len(end), decades(x[end]), fit)


def squared_correlation(x: Array, y: Array) -> float:
    """R² of the line through (x, y); 0 where y is constant."""
    a, b = x - x.mean(), y - y.mean()
    spread = float((a @ a) * (b @ b))
    return float(a @ b) ** 2 / spread if spread > 0 else 0.0


def decades(x: Array) -> float:
    """Width of a window of log t, in decades."""
    return float(np.ptp(x)) / math.log(10) if len(x) else 0.0


def anchored_windows(x: Array, rule: RateRule) -> list[NDArray[np.int64]]:
    """Indices, in the order of training, of the m smallest x, for every m that makes a window;
    shortest first.
    """
    order = np.argsort(x, kind="stable")
    return [
        np.sort(order[:m])
        for m in range(rule.min_checkpoints, len(x) + 1)
        if decades(x[order[:m]]) >= rule.min_decades
    ]


def steep(fit: Fit, rule: RateRule) -> bool:
    """The slope is positive beyond doubt."""
    return fit.slope > rule.min_slope and fit.low > 0


def has_kink(x: Array, y: Array, fit: Fit, rule: RateRule) -> bool:
    """The slope changes from one half of a window to the other, by much and beyond the scatter.

    By a quadratic fit: its slopes at the centres of the halves of [min x, max x] differ by more
    than ``rule.kink`` of the line's slope, and an F-test prefers it to the line. (The test takes
    residuals for white; serial correlation makes it refuse too often rather than too rarely.)
    """
    from scipy import stats

    centred = x - x.mean()
    design = np.stack([np.ones_like(x), centred, centred**2], axis=1)
    coefficients = np.linalg.lstsq(design, y)[0]
    if abs(coefficients[2]) * np.ptp(x) <= rule.kink * abs(fit.slope):
        return False
    straight = float(np.square(y - fit.intercept - fit.slope * x).sum())
    curved = float(np.square(y - design @ coefficients).sum())
    freedom = len(x) - 3
    return (straight - curved) * freedom > stats.f.ppf(rule.confidence, 1, freedom) * curved


def reason(x: Array, y: Array, end: NDArray[np.int64], fit: Fit, rule: RateRule) -> str:
    """Why no window passes: from the shortest one, ``end``, its fit, and as many points at the
    other end.
    """
    if -rule.min_slope <= fit.low and fit.high <= rule.min_slope:
        early = np.sort(np.argsort(x, kind="stable")[-rule.min_checkpoints :])
        return "floor" if steep(fit_line(x[early], y[early], rule.confidence), rule) else "plateau"
    if fit.slope < -rule.min_slope and fit.high < 0:
        return "rising"
    if fit.slope > rule.min_slope and has_kink(x[end], y[end], fit, rule):
        return "kink"
    return "noise"


def order(slope: float, observable: str, approach: str) -> float | None:
    """Order k of the dead direction whose observable vanishes with this slope; None where the slope
    has none.

    Against a distance t the second moment goes like t^(2(k - 1)), hence k = 1 + slope / 2. Against
    the excess loss, itself t^(2k), the slope is (k - 1) / k, hence k = 1 / (1 - slope) for slopes
    under 1. A volume adds up several directions, and steps measure no nearness.
    """
    if observable not in MOMENT_POWERS or approach == "step":
        return None
    slope *= MOMENT_POWERS[observable]
    if approach == "arc_length":
        return 1 + slope / 2
    return 1 / (1 - slope) if slope < 1 else None


@dataclass(frozen=True)
class Cell:
    """One layer × observable of a run, with its verdict."""

    layer: str
    observable: str
    approach: str
    rate: Rate

    @property
    def order(self) -> float | None:
        """k, where the cell is read and has one."""
        if not self.rate.read or self.rate.fit is None:
            return None
        return order(self.rate.fit.slope, self.observable, self.approach)

    @property
    def share(self) -> float | None:
        """1/(2k): what a direction of order k adds to the learning coefficient."""
        return None if self.order is None else 1 / (2 * self.order)

    def record(self) -> dict[str, Any]:
        """The cell as a row for JSON."""
        fit = self.rate.fit
        return {
            "layer": self.layer,
            "observable": self.observable,
            "approach": self.approach,
            "verdict": self.rate.verdict,
            "checkpoints": self.rate.checkpoints,
            "decades": self.rate.decades,
            **(
                {}
                if fit is None
                else {"slope": fit.slope, "low": fit.low, "high": fit.high, "r2": fit.r2}
            ),
            "order": self.order,
            "share": self.share,
        }


def log_approach(
    rows: Sequence[Mapping[str, Any]], approach: str, loss_floor: float = 0.0
) -> Array:
    """Logarithm of the approach parameter at each reading of a run; -inf or nan where it is not
    positive.

    Args:
        rows: readings in the order of training, each with ``step``, ``loss`` and ``arc_length``
            (from the start).
        approach: ``excess_loss``: the probe's loss above ``loss_floor``; ``arc_length``: what is
            left of the path to the last reading; ``step``: 1/step, which knows nothing of the
            minimum, for contrast.
        loss_floor: the loss at the minimum that training approaches.

    Raises:
        ValueError: an unknown approach.
    """
    match approach:
        case "excess_loss":
            t = np.array([row["loss"] for row in rows]) - loss_floor
        case "arc_length":
            lengths = np.array([row["arc_length"] for row in rows])
            t = lengths[-1] - lengths
        case "step":
            t = np.array([1 / row["step"] if row["step"] else 0.0 for row in rows])
        case _:
            raise ValueError(f"Invalid {approach=}: expected one of {', '.join(APPROACHES)}")
    return safe_log(t)


def safe_log(values: Array) -> Array:
    """Logarithm; nan where a value is not positive."""
    positive = values > 0
    return np.where(positive, np.log(np.where(positive, values, 1.0)), np.nan)


def log_observables(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Array]:
    """Logarithm of every observable along a run, by (layer, observable).

    A value at the rounding floor is nan. So is a log-volume whose rank is not the highest of the
    run: an eigenvalue that has sunk below the floor takes its logarithm out of the sum, which is no
    rate.
    """
    series: dict[tuple[str, str], Array] = {}
    for i, first in enumerate(rows[0]["layers"] if rows else []):
        layers = [row["layers"][i] for row in rows]
        for observable in OBSERVABLES:
            values = np.array([layer["values"][observable] for layer in layers], dtype=np.float64)
            if observable.endswith("log_volume"):
                ranks = np.array(
                    [layer[observable.removesuffix("_log_volume")]["rank"] for layer in layers]
                )
                series[first["layer"], observable] = np.where(ranks == ranks.max(), values, np.nan)
            else:
                series[first["layer"], observable] = safe_log(values)
    return series


def read_cells(
    rows: Sequence[Mapping[str, Any]],
    approach: str,
    rule: RateRule | None = None,
    loss_floor: float = 0.0,
) -> list[Cell]:
    """The whole grid of a run; arguments as for :func:`log_approach` and :func:`read_rate`."""
    x = log_approach(rows, approach, loss_floor)
    return [
        Cell(layer, observable, approach, read_rate(x, y, rule))
        for (layer, observable), y in log_observables(rows).items()
    ]


def shuffled_share(
    rows: Sequence[Mapping[str, Any]],
    approach: str,
    rule: RateRule,
    loss_floor: float = 0.0,
    shuffles: int = 100,
) -> float:
    """Null control: share of cells read when the readings are dealt out to the checkpoints at
    random.
    """
    x = log_approach(rows, approach, loss_floor)
    series = list(log_observables(rows).values())
    generator = np.random.default_rng(0)
    read = [
        read_rate(x, y[permutation], rule).read
        for permutation in (generator.permutation(len(x)) for _ in range(shuffles))
        for y in series
    ]
    return float(np.mean(read))


def noise_share(log_t: Array, rule: RateRule, walk: bool, cells: int = 1000) -> float:
    """Null control: share of cells read when log y is white noise, or (``walk``) a random walk
    along training.
    """
    noise = np.random.default_rng(1).normal(size=(cells, len(log_t)))
    series = noise.cumsum(1) if walk else noise
    return float(np.mean([read_rate(log_t, y, rule).read for y in series]))


def increment_correlation(rows: Sequence[Mapping[str, Any]]) -> Array:
    """Correlation between cells of the increments of log observables from one reading to the next.

    Of each pair of cells over the readings that both have; a cell that never moves correlates with
    none.

    Returns:
        shape (cells, cells), symmetric and positive semidefinite, ones on the diagonal.
    """
    with np.errstate(invalid="ignore"):
        steps = np.diff(np.stack(list(log_observables(rows).values())), axis=1)
    there = np.isfinite(steps)
    steps = np.where(there, steps, 0.0)
    centred = np.where(
        there, steps - steps.sum(1, keepdims=True) / np.maximum(1, there.sum(1, keepdims=True)), 0.0
    )
    both = there.astype(np.float64)
    products, squares = centred @ centred.T, (centred**2) @ both.T
    scale = np.sqrt(squares * squares.T)
    correlation = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    np.fill_diagonal(correlation, 1.0)
    values, vectors = np.linalg.eigh(correlation)  # pairs of unlike readings may make it indefinite
    correlation = vectors * np.maximum(values, 0) @ vectors.T
    size = np.sqrt(np.diag(correlation))
    return np.asarray(correlation / np.outer(size, size))


def walk_counts(
    rows: Sequence[Mapping[str, Any]],
    approach: str,
    rule: RateRule,
    loss_floor: float = 0.0,
    runs: int = 200,
    correlated: bool = True,
    only: Collection[tuple[str, str]] | None = None,
) -> list[int]:
    """Null control: how many cells of a grid are read, where all are random walks that move as
    these cells do together.

    As many normal increments of unit variance as there are readings, with the cells' own
    :func:`increment_correlation`. Independent walks (``correlated=False``) have the same mean
    count, but spread less: layers that move together are read together.

    The arguments of :func:`read_cells`, then how many grids (``runs``), whether their walks move
    together, and which cells (layer, observable) they have (None: all).
    """
    x = log_approach(rows, approach, loss_floor)
    chosen = [i for i, key in enumerate(log_observables(rows)) if only is None or key in only]
    correlation = increment_correlation(rows)[np.ix_(chosen, chosen)]
    values, vectors = np.linalg.eigh(correlation if correlated else np.eye(len(correlation)))
    mix = vectors * np.sqrt(np.maximum(values, 0))
    generator = np.random.default_rng(2)
    grids = ((mix @ generator.normal(size=(len(mix), len(x)))).cumsum(1) for _ in range(runs))
    return [sum(read_rate(x, y, rule).read for y in grid) for grid in grids]
