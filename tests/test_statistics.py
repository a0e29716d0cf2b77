"""The statistical rule: coverage of intervals by simulation, tests against known values."""

from __future__ import annotations

import numpy as np
import pytest

from ddc.report.statistics import combined_p, fisher_p, holm, mean_interval, share_interval


@pytest.mark.parametrize(("seeds", "coverage"), [(3, 0.95), (5, 0.95), (11, 0.905)])
def test_intervals_of_the_mean_cover_it_as_often_as_documented(seeds: int, coverage: float) -> None:
    generator = np.random.default_rng(seeds)
    trials, hits = 1000, 0
    for _ in range(trials):
        low, high = mean_interval(generator.normal(1.0, 2.0, seeds))
        hits += low <= 1.0 <= high
    assert hits / trials == pytest.approx(coverage, abs=0.03)


def test_intervals_of_equal_values_and_of_one_value() -> None:
    assert mean_interval([0.5] * 11) == (0.5, 0.5)
    with pytest.raises(ValueError, match="two values, not 1"):
        mean_interval([0.5])


def test_shares_and_counts_agree_with_closed_forms() -> None:
    low, high = share_interval(11, 11)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 11)), 1.0)
    assert share_interval(0, 11)[0] == 0.0
    assert fisher_p((11, 0), (11, 11)) == pytest.approx(2 / 705432)  # 2 / binomial(22, 11)
    assert fisher_p((5, 5), (11, 11)) == pytest.approx(1.0)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_combined_p_is_fishers() -> None:
    p = [0.05, 0.2, 0.6]
    # of three uniform numbers, the chance of a product as small, in closed form
    product = np.prod(p)
    assert combined_p(p) == pytest.approx(
        product * (1 - np.log(product) + np.log(product) ** 2 / 2)
    )
    assert combined_p([0.03]) == pytest.approx(0.03)
