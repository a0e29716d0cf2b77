"""Intervals and tests for few seeds. The rule: t below ten seeds, bootstrap from ten on, exact
tests for counts, Holm.

Percentile bootstrap intervals that say 95% cover 74% at three normal values and 84% at five, where
Student's t covers 95 to 97%; at eleven the bootstrap covers 90 to 91%.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep

CONFIDENCE = 0.95
BOOTSTRAP_FROM = 10
#: Fewer seeds than this are shown, and never tested.
TESTED_FROM = 5


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean over seeds: Student's t below ten values, bias-corrected bootstrap
    from ten on.

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
        low, high = stats.bootstrap(
            (values,), np.mean, confidence_level=CONFIDENCE, rng=generator
        ).confidence_interval
    return float(low), float(high)


def combined_p(p_values: Sequence[float]) -> float:
    """One p-value of independent ones, by Fisher's method."""
    return float(stats.combine_pvalues(p_values, "fisher").pvalue)


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of what is left when a quarter of the values (rounded down) goes at each end."""
    return float(stats.trim_mean(values, 0.25))


def effect_size(differences: Sequence[float]) -> float | None:
    """Mean of paired differences over their standard deviation, with Hedges' correction for few of
    them.

    Hedges 1981: times 1 - 3 / (4 (n - 1) - 1). None below three values, and where they do not
    differ.
    """
    if len(differences) < 3 or np.ptp(differences) == 0:
        return None
    correction = 1 - 3 / (4 * (len(differences) - 1) - 1)
    return float(correction * np.mean(differences) / np.std(differences, ddof=1))


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p-value that the mean of paired differences is zero; None below five of them.

    Student's t-test below ten; from ten on, as the interval is a bootstrap's, the exact test that
    flips signs (up to 20,000 flips). Where all differences are one number, which counts may be, the
    exact sign test: 2^(1 - n).
    """
    if len(differences) < TESTED_FROM:
        return None
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 2.0 ** (1 - len(differences))
    if len(differences) < BOOTSTRAP_FROM:
        return float(stats.ttest_1samp(differences, 0.0).pvalue)
    flips = {"permutation_type": "samples", "n_resamples": 20_000, "rng": np.random.default_rng(0)}
    return float(stats.permutation_test((differences,), np.mean, **flips).pvalue)


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a probability from a count: Clopper and Pearson's exact one."""
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def fisher_p(successes: tuple[int, int], trials: tuple[int, int]) -> float:
    """Two-sided p-value of Fisher's exact test that two counts have one probability."""
    table = [[s, n - s] for s, n in zip(successes, trials, strict=True)]
    return float(stats.fisher_exact(table).pvalue)


def share_difference_interval(
    successes: tuple[int, int], trials: tuple[int, int]
) -> tuple[float, float]:
    """95% interval of the difference of two probabilities, the first less the second, from counts:
    Newcombe's.
    """
    (a, b), (n, m) = successes, trials
    low, high = confint_proportions_2indep(
        a, n, b, m, method="newcomb", compare="diff", alpha=1 - CONFIDENCE
    )
    return float(low), float(high)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for several comparisons by Holm's method, in the order given; None stays
    None.
    """
    tested = [p for p in p_values if p is not None]
    adjusted = iter(multipletests(tested, method="holm")[1] if tested else ())
    return [None if p is None else float(next(adjusted)) for p in p_values]
