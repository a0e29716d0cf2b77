"""The rate reader: intervals against simulation and scipy, every refusal, null controls, the chain
rule.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ddc.slt.observables import OBSERVABLES
from ddc.slt.rates import (
    RateRule,
    fit_line,
    increment_correlation,
    log_approach,
    log_observables,
    noise_share,
    order,
    read_cells,
    read_rate,
    shuffled_share,
    walk_counts,
)

LOG_T = np.linspace(0, -4 * math.log(10), 32)
RULE = RateRule()


def autoregressive(rho: float, n: int, generator: np.random.Generator) -> np.ndarray:
    noise = generator.normal(size=n)
    for i in range(1, n):
        noise[i] = rho * noise[i - 1] + math.sqrt(1 - rho**2) * noise[i]
    return noise


def test_the_line_is_that_of_scipy() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 20))
    fit, reference = fit_line(x, y), stats.linregress(x, y)
    assert fit.slope == pytest.approx(reference.slope)
    assert fit.intercept == pytest.approx(reference.intercept)
    assert fit.r2 == pytest.approx(reference.rvalue**2)


def test_the_block_bootstrap_is_the_limit_of_resampling() -> None:
    """White residuals, blocks of one: the summed variance is that of many resamples."""
    generator = np.random.default_rng(1)
    x = np.linspace(0, 1, 12)
    while True:
        y = 3 * x + 0.1 * generator.normal(size=12)
        fit = fit_line(x, y)
        residuals = y - fit.intercept - fit.slope * x
        rho = residuals[1:] @ residuals[:-1] / (residuals @ residuals)
        if rho + (2 + 4 * rho) / 12 <= 0:  # the rule then takes blocks of one and no further factor
            break
    resampled = residuals[generator.integers(12, size=(200_000, 12))]
    centred = x - x.mean()
    slopes = resampled @ centred / (centred @ centred)
    reach = slopes.std() * math.sqrt(12 / 10) * stats.t.ppf(0.975, 10)
    assert fit.high - fit.slope == pytest.approx(reach, rel=0.01)
    assert fit.slope - fit.low == pytest.approx(reach, rel=0.01)


@pytest.mark.parametrize(
    ("rho", "points", "least"), [(0.0, 8, 0.94), (0.0, 30, 0.94), (0.5, 30, 0.90), (0.8, 30, 0.88)]
)
def test_intervals_cover(rho: float, points: int, least: float) -> None:
    """As the docstring says; an interval for white residuals would cover 47% at rho = 0.8, which is
    tested too.
    """
    generator = np.random.default_rng(2)
    x = np.linspace(0, -3, points)
    covered = naive = 0
    for _ in range(500):
        y = 2 * x + 0.2 * autoregressive(rho, points, generator)
        fit = fit_line(x, y)
        covered += fit.low <= 2 <= fit.high
        line = stats.linregress(x, y)
        naive += abs(line.slope - 2) <= line.stderr * stats.t.ppf(0.975, points - 2)
    assert covered / 500 >= least
    assert covered / 500 < 0.995
    if rho == 0.8:
        assert naive / 500 < 0.65


def test_a_power_is_read_through_noise() -> None:
    generator = np.random.default_rng(3)
    misses = 0
    for exponent in (0.5, 2.0, 6.0):
        for _ in range(20):
            rate = read_rate(
                LOG_T, exponent * LOG_T + 0.3 * autoregressive(0.5, 32, generator), RULE
            )
            assert rate.read
            assert rate.fit is not None
            misses += not rate.fit.low <= exponent <= rate.fit.high
    assert misses <= 8


@pytest.mark.parametrize(
    ("verdict", "log_t", "log_y"),
    [
        ("few", LOG_T[:7], 2 * LOG_T[:7]),
        ("few", np.where(np.arange(32) < 26, np.nan, LOG_T), 2 * LOG_T),
        ("narrow", LOG_T / 20, LOG_T),
        ("floor", LOG_T, np.full(32, np.nan)),
        ("floor", LOG_T, np.where(np.arange(32) < 7, LOG_T, np.nan)),
        ("floor", LOG_T, np.log(1e-3 + np.exp(2 * LOG_T))),
        ("plateau", LOG_T, np.zeros(32)),
        ("plateau", LOG_T, 0.05 * LOG_T),
        ("rising", LOG_T, -LOG_T),
        ("kink", LOG_T, np.where(LOG_T > -8.2, 0.5 * LOG_T, 5 * LOG_T + 36.9)),
        ("noise", LOG_T, np.random.default_rng(4).normal(size=32)),
    ],
)
def test_every_refusal_has_its_reason(verdict: str, log_t: np.ndarray, log_y: np.ndarray) -> None:
    assert read_rate(log_t, log_y, RULE).verdict == verdict


def test_the_rounding_floor_ends_the_window_and_not_the_reading() -> None:
    log_y = np.where(LOG_T < -6, np.nan, 3 * LOG_T)
    rate = read_rate(LOG_T, log_y, RULE)
    assert rate.read
    assert rate.checkpoints == int((LOG_T >= -6).sum())
    assert rate.fit is not None
    assert rate.fit.slope == pytest.approx(3)


def test_the_window_is_anchored_at_the_end_of_training() -> None:
    """A slope that changes: what counts is the end, and the window stops at the change."""
    log_y = np.where(LOG_T > -4, 0.2 * LOG_T - 15.2, 4 * LOG_T)
    rate = read_rate(LOG_T, log_y, RULE)
    assert rate.read
    assert rate.fit is not None
    assert rate.fit.slope == pytest.approx(4, abs=0.5)
    assert rate.checkpoints < 27


def test_null_controls_read_about_none() -> None:
    assert noise_share(LOG_T, RULE, walk=False, cells=200) <= 0.01
    # a random walk has trends: it is the hard one
    assert noise_share(LOG_T, RULE, walk=True, cells=200) <= 0.15


def rows(steps: int = 30, layers: int = 2, noise: float = 0.0) -> list[dict]:
    """Readings of an imagined run: the loss falls as 1/step; everything else is a power of it."""
    generator = np.random.default_rng(0)
    made = []
    for i in range(steps):
        loss = 10 ** (-2 * i / steps)
        values = {
            "activation_sigma_min": loss**0.5,
            "gradient_lambda_min": loss**1.0,
            "activation_log_volume": 3 * math.log(loss),
            "gradient_log_volume": -1.0,
            "fisher_min": 0.0 if i > 20 else loss**2,
        }
        values = {k: v * math.exp(noise * generator.normal()) for k, v in values.items()}
        side = {"rank": 4 if i % 2 else 5}
        layer = {"values": values, "activation": {"rank": 5}, "gradient": side}
        made.append(
            {
                "step": i,
                "loss": loss + 1,
                "arc_length": 1 - loss,
                "layers": [{"layer": f"l{k}", **layer} for k in range(layers)],
            }
        )
    return made


def test_the_grid() -> None:
    cells = {
        c.observable: c
        for c in read_cells(rows(), "excess_loss", RULE, loss_floor=1.0)
        if c.layer == "l1"
    }
    slopes = {name: cell.rate.fit.slope for name, cell in cells.items() if cell.rate.read}
    assert slopes == pytest.approx(
        {
            "activation_sigma_min": 0.5,
            "gradient_lambda_min": 1.0,
            "activation_log_volume": 3.0,
            "fisher_min": 2.0,
        }
    )
    assert cells["gradient_log_volume"].rate.verdict == "plateau"
    assert cells["activation_log_volume"].order is None
    assert len(read_cells(rows(), "step", RULE)) == 10
    assert shuffled_share(rows(), "excess_loss", RULE, 1.0, shuffles=20) < 0.02
    record = cells["activation_sigma_min"].record()
    assert record["verdict"] == "read"
    assert {"slope", "low", "high", "r2", "order", "share", "checkpoints", "decades"} <= set(record)


def test_a_log_volume_counts_only_at_full_rank() -> None:
    series = log_observables(rows())
    visible = np.isfinite(series["l0", "gradient_log_volume"])
    assert visible.tolist() == [i % 2 == 0 for i in range(30)]
    assert np.isfinite(series["l0", "activation_log_volume"]).all()
    assert np.isfinite(series["l0", "fisher_min"]).sum() == 21


def test_approach_parameters() -> None:
    made = rows(10)
    loss = np.array([row["loss"] for row in made])
    np.testing.assert_allclose(np.exp(log_approach(made, "excess_loss", 0.5)), loss - 0.5)
    left = made[-1]["arc_length"] - np.array([row["arc_length"] for row in made])
    np.testing.assert_allclose(np.exp(log_approach(made, "arc_length"))[:-1], left[:-1])
    assert np.isnan(log_approach(made, "arc_length")[-1])
    np.testing.assert_allclose(np.exp(log_approach(made, "step"))[1:], 1 / np.arange(1, 10))
    assert np.isnan(log_approach(made, "step")[0])
    with pytest.raises(
        ValueError, match="Invalid approach='loss': expected one of excess_loss, arc_length, step"
    ):
        log_approach(made, "loss")


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_chain_rule_between_approach_parameters(depth: int) -> None:
    """Gradient flow of the scalar chain K = (w₁⋯w_L)²/2 from a symmetric start, solved in closed
    form.

    With all w = t the Fisher information along the orbit's normal is L t^(2(L-1)), the excess loss
    t^(2L)/2 and the arc length to the end √L t. Slopes against loss and length differ by the factor
    2L of the chain rule, and give the same order k = L.
    """
    t = np.exp(np.linspace(-1, -6, 40))
    log_fisher = np.log(depth * t ** (2 * (depth - 1)))
    log_loss, log_length = np.log(t ** (2 * depth) / 2), np.log(math.sqrt(depth) * t)
    by_loss, by_length = (read_rate(x, log_fisher, RULE).fit for x in (log_loss, log_length))
    change = fit_line(log_length, log_loss).slope
    assert change == pytest.approx(2 * depth)
    assert by_length is not None
    assert by_loss is not None
    assert by_length.slope == pytest.approx(by_loss.slope * change)
    assert order(by_length.slope, "gradient_lambda_min", "arc_length") == pytest.approx(depth)
    assert order(by_loss.slope, "gradient_lambda_min", "excess_loss") == pytest.approx(depth)
    # σ_min is the root of a second moment
    assert order(by_length.slope / 2, "activation_sigma_min", "arc_length") == pytest.approx(depth)


def test_slopes_without_an_order() -> None:
    assert order(1.5, "gradient_lambda_min", "excess_loss") is None
    assert order(1.5, "gradient_lambda_min", "step") is None
    assert order(1.5, "gradient_log_volume", "arc_length") is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_checkpoints", 5),
        ("min_decades", 0.0),
        ("min_r2", 1.0),
        ("min_slope", 0.0),
        ("kink", -1.0),
        ("confidence", 1.0),
    ],
)
def test_constants_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Invalid slt\.rule\.{key}={value}"):
        RateRule(**{key: value})


def made_up_rows(values: np.ndarray) -> list[dict]:
    """Readings of one layer whose observables, as logarithms, are the rows of ``values``; the loss
    falls by a power.
    """
    names = list(OBSERVABLES)
    found = []
    for i, column in enumerate(values.T):
        numbers = {
            name: value if name.endswith("volume") else math.exp(value)
            for name, value in zip(names, column, strict=True)
        }
        layer = {
            "layer": "block 1",
            "values": numbers,
            "activation": {"rank": 3},
            "gradient": {"rank": 3},
        }
        found.append({"step": i, "loss": math.exp(LOG_T[i]), "layers": [layer]})
    return found


def test_the_correlation_of_increments_is_that_of_numpy() -> None:
    steps = np.random.default_rng(0).normal(size=(len(OBSERVABLES), 31))
    steps[1] = 0.8 * steps[0] + 0.2 * steps[1]
    values = np.concatenate([np.zeros((len(OBSERVABLES), 1)), steps.cumsum(1)], axis=1)
    expected = np.corrcoef(np.diff(values, axis=1))
    np.testing.assert_allclose(increment_correlation(made_up_rows(values)), expected, atol=1e-6)
    values[2] = 1.0  # a cell that never moves
    correlation = increment_correlation(made_up_rows(values))
    assert correlation[2, 2] == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(np.delete(correlation[2], 2), 0, atol=1e-12)


def test_walks_that_move_together_are_read_together() -> None:
    """The same mean count as independent walks, all or none of the grid."""
    walk = np.random.default_rng(0).normal(size=31).cumsum()
    values = np.tile(np.concatenate([[0.0], walk]), (len(OBSERVABLES), 1))
    rows = made_up_rows(values)
    together = walk_counts(rows, "excess_loss", RULE, runs=400)
    alone = walk_counts(rows, "excess_loss", RULE, runs=400, correlated=False)
    assert {0, len(OBSERVABLES)} == set(together)
    assert abs(np.mean(together) - np.mean(alone)) < 4 * math.sqrt(np.var(together) / 400)
    assert np.var(together) > 2 * np.var(alone)
