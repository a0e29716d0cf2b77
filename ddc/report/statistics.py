"""Intervals and tests for few seeds. The rule: t below ten seeds, bootstrap from ten on, exact tests for counts, Holm.

Percentile bootstrap intervals that say 95% cover 74% at three normal values and 84% at five, where Student's t covers
95 to 97%; at eleven the bootstrap covers 90 to 91%.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

CONFIDENCE = 0.95
BOOTSTRAP_FROM = 10


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean over seeds: Student's t below ten values, bias-corrected bootstrap from ten on.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs two values, not {len(values)}")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    if len(values) < BOOTSTRAP_FROM:
        mean, error = np.mean(values), stats.sem(values)
        low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, error)
    else:
        generator = np.random.default_rng(0)
        low, high = stats.bootstrap((values,), np.mean, confidence_level=CONFIDENCE, rng=generator).confidence_interval
    return float(low), float(high)


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of Student's t-test that the mean of paired differences is zero."""
    if np.ptp(differences) == 0:  # no spread: certainly zero, or certainly not
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a probability from a count: Clopper and Pearson's exact one."""
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def fisher_p(successes: tuple[int, int], trials: tuple[int, int]) -> float:
    """Two-sided p-value of Fisher's exact test that two counts have one probability."""
    table = [[s, n - s] for s, n in zip(successes, trials, strict=True)]
    return float(stats.fisher_exact(table).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for several comparisons by Holm's method, in the order given."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]]
