"""Estimates against known learning coefficients, the sampler against a plain loop, and the errors
it reports.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from arviz_stats.base import array_stats
from scipy import integrate, special

from ddc import find_gauges
from ddc.gauges import GaugeSet, balance_, named_parameters
from ddc.models import GPT, GPTConfig, cross_entropy
from ddc.slt.known_coefficients import (
    aoyagi_watanabe,
    normal_crossing,
    normal_crossing_energy,
    normal_crossing_loss,
    origin,
    quadratic_loss,
    reduced_rank_data,
    reduced_rank_loss,
    reduced_rank_minimum,
    reduced_rank_potential,
    regular,
)
from ddc.slt.learning_coefficient import (
    MAX_BIAS,
    Estimate,
    Settings,
    _fit,
    estimate,
    fit_temperatures,
    minibatches,
    module_loss,
)
from tests.helpers import relu_mlp, relu_mlp_gauges

HALF = Fraction(1, 2)
SMALL = Settings(chains=4, draws=20, burn_in=20, steps=3)
GPT_CONFIG = GPTConfig(context=8, layers=1, width=8, heads=4, kv_heads=2, hidden=12)


def assert_close(found: Estimate, truth: float, error: float = 0.03) -> None:
    """Within 5%, or in the interval; with an interval that says something and chains that have
    mixed.
    """
    low, high = found.interval
    assert abs(found.value / truth - 1) < 0.05 or low <= truth <= high, (found, truth)
    assert abs(found.value - truth) < 4.5 * found.standard_error + 0.02 * truth, (found, truth)
    assert found.standard_error < error * truth, (found, truth)
    assert found.r_hat < 1.05, found


def tokens(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(
        20, (count, GPT_CONFIG.context + 1), generator=torch.Generator().manual_seed(0)
    )
    return text[:, :-1], text[:, 1:]


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPT_CONFIG, 20).double()


# closed forms


@pytest.mark.parametrize(
    ("shape", "coefficient", "multiplicity"),
    [
        ((1, 1, 1, 0), HALF, 2),  # (b a)²: two factors
        ((2, 1, 2, 0), Fraction(1), 2),  # |a|² |b|²
        # (b · a)²: by hand, one smooth hypersurface with an isolated singularity
        (
            (1, 2, 1, 0),
            HALF,
            1,
        ),
        ((2, 2, 2, 0), Fraction(3, 2), 1),
        ((2, 2, 2, 1), Fraction(2), 2),
        ((3, 3, 3, 1), Fraction(4), 1),
        ((5, 2, 1, 0), Fraction(1), 1),  # case N + H < M + r
        ((1, 2, 5, 0), Fraction(1), 1),  # case M + H < N + r
        ((1, 5, 2, 0), Fraction(1), 1),  # case M + N < H + r: all outputs free
    ],
)
def test_aoyagi_watanabe_values(
    shape: tuple[int, int, int, int], coefficient: Fraction, multiplicity: int
) -> None:
    assert aoyagi_watanabe(*shape) == (coefficient, multiplicity)


def test_aoyagi_watanabe_is_consistent() -> None:
    for m in range(1, 6):
        for n in range(1, 6):
            for h in range(1, 12):
                for r in range(min(m, n, h) + 1):
                    coefficient, multiplicity = aoyagi_watanabe(m, h, n, r)
                    assert (coefficient, multiplicity) == aoyagi_watanabe(n, h, m, r)
                    # at most half the parameters that count, more with more hidden units, and more
                    # with more rank
                    assert (
                        0
                        < coefficient
                        <= Fraction(min(m * n, h * (m + n - h) if h <= min(m, n) else m * n), 2)
                    )
                    assert coefficient <= aoyagi_watanabe(m, h + 1, n, r)[0]
                    if r < min(m, n, h):
                        assert coefficient <= aoyagi_watanabe(m, h, n, r + 1)[0]
                    if r == h:
                        assert (coefficient, multiplicity) == (Fraction(h * (m + n - h), 2), 1)
                    if h + r > m + n:
                        assert (coefficient, multiplicity) == (Fraction(m * n, 2), 1)


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (2, 3, 1, 2), (1, 1, 1, -1)])
def test_aoyagi_watanabe_refuses_an_impossible_rank(shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"Invalid rank=.*expected 0 to 1"):
        aoyagi_watanabe(*shape)


def test_other_closed_forms() -> None:
    assert regular(5) == (Fraction(5, 2), 1)
    assert normal_crossing((1, 2, 2)) == (Fraction(1, 4), 2)
    with pytest.raises(ValueError, match="Invalid powers"):
        normal_crossing((0, 1))
    with pytest.raises(ValueError, match="Invalid inputs=0"):
        aoyagi_watanabe(0, 1, 1, 0)


@pytest.mark.parametrize("tau", [0.3, 1e2, 1e6])
def test_energy_of_a_normal_crossing(tau: float) -> None:
    def moment(j: int, power: int) -> float:
        def integrand(log_w: float) -> float:
            w = math.exp(log_w)
            energy = tau * w ** (2 * power)
            return energy**j * math.exp(-energy - w**2 / 2 + log_w)

        return integrate.quad(
            integrand, -40, 3, limit=500, points=[-8, -4, 0], epsabs=0, epsrel=1e-10
        )[0]

    for power in (1, 2):
        assert normal_crossing_energy((power,), tau) == pytest.approx(
            moment(1, power) / moment(0, power), rel=1e-6
        )
    a = 1 / (8 * tau)
    bessel = 0.5 + a - a * special.k1e(a) / special.k0e(a)
    assert normal_crossing_energy((1, 1), tau) == pytest.approx(bessel, rel=1e-6)
    # a localisation is a unit of length
    assert normal_crossing_energy((1, 2), tau * 4**3, 4.0) == pytest.approx(
        normal_crossing_energy((1, 2), tau)
    )


@pytest.mark.parametrize("loss", [reduced_rank_potential(reduced_rank_minimum(3, 2, 4, 1))])
def test_the_minimum_of_reduced_rank_regression(loss) -> None:
    truth = reduced_rank_minimum(3, 2, 4, 1)
    assert float(loss(truth)) == 0
    x, y = reduced_rank_data(truth, 50, 0.0, 0)
    assert float(reduced_rank_loss(truth, x, y)) == 0
    assert torch.linalg.matrix_rank(truth["B"] @ truth["A"]) == 1


# the sampler


def test_one_step_of_all_chains_is_a_step_of_each() -> None:
    """The batched step of a GPT under vmap, attention and integer inputs included, against a loop
    with autograd.
    """
    model = small_gpt()
    settings = Settings(chains=3, draws=4, burn_in=0, step_size=1e-4, gamma=3.0, seed=5)
    batches = minibatches(tokens(), 6, settings)
    params = named_parameters(model)
    found = estimate(
        module_loss(model, cross_entropy), params, 100, batches=batches, settings=settings
    )
    tau = 100 / math.log(100)
    generator = torch.Generator().manual_seed(5)
    size = sum(p.numel() for p in params.values())
    chains = [copy.deepcopy(model) for _ in range(3)]
    for step in range(4):
        noise = torch.randn(3, size, generator=generator, dtype=torch.float64)
        x, y = batches(step)
        for c, chain in enumerate(chains):
            chain.zero_grad()
            loss = cross_entropy(chain(x[c]), y[c])
            loss.backward()
            excess = (loss - cross_entropy(model(x[c]), y[c])).detach()
            assert found.trace[c, step] == pytest.approx(float(excess), abs=1e-12)
            kicks = noise[c].split([p.numel() for p in chain.parameters()])
            with torch.no_grad():
                for p, start, kick in zip(
                    chain.parameters(), model.parameters(), kicks, strict=True
                ):
                    # exact for the localisation of strength 3, to first order the Langevin step of
                    # ε = 1e-4
                    decay = math.exp(-1.5e-4)
                    spread = math.sqrt((1 - decay**2) / 3)
                    p.copy_(
                        start
                        + decay * (p - start)
                        - (1 - decay) / 3 * tau * p.grad
                        + spread * kick.view_as(p)
                    )
                    assert spread == pytest.approx(1e-2, rel=1e-3)
                    assert (1 - decay) / 3 == pytest.approx(0.5e-4, rel=1e-3)


def test_minibatches_are_independent_and_reproducible() -> None:
    settings = replace(SMALL, seed=3)
    data = (torch.arange(1000), torch.arange(1000) + 1)
    x, y = minibatches(data, 8, settings)(7)
    assert x.shape == (4, 8)
    torch.testing.assert_close(y, x + 1)
    assert len({tuple(row) for row in x.tolist()}) == 4
    assert torch.equal(x, minibatches(data, 8, settings)(7)[0])
    assert not torch.equal(x, minibatches(data, 8, settings)(8)[0])
    assert not torch.equal(x, minibatches(data, 8, replace(settings, seed=4))(7)[0])


@pytest.mark.parametrize("sgld", [False, True])
def test_a_seed_gives_one_result_and_leaves_the_global_generator_alone(sgld: bool) -> None:
    truth = reduced_rank_minimum(2, 2, 2, 1)
    settings = replace(SMALL, burn_in=40)
    data = reduced_rank_data(truth, 200, 0.1, 0)
    loss, batches = (
        (reduced_rank_loss, minibatches(data, 100, settings))
        if sgld
        else (reduced_rank_potential(truth), None)
    )

    def run(seed: int) -> Estimate:
        return estimate(
            loss, truth, 100, 1.0, batches=batches, settings=replace(settings, seed=seed)
        )

    state = torch.get_rng_state()
    first, again, other = run(1), run(1), run(2)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.trace, again.trace)
    assert first.step_size == again.step_size
    assert not torch.equal(first.trace, other.trace)
    assert all(
        torch.equal(p, q)
        for p, q in zip(truth.values(), reduced_rank_minimum(2, 2, 2, 1).values(), strict=True)
    )


def test_diagnostics_are_those_of_arviz() -> None:
    found = estimate(
        quadratic_loss(torch.ones(2)), origin(2), 100, 1.0, settings=replace(SMALL, draws=100)
    )
    losses = found.trace.numpy()
    assert found.trace.shape == (4, 100)
    assert found.r_hat == pytest.approx(
        float(array_stats.rhat(losses, chain_axis=0, draw_axis=1)), rel=1e-6
    )
    assert found.ess == pytest.approx(
        float(array_stats.ess(losses, chain_axis=0, draw_axis=1)), rel=1e-6
    )
    assert found.value == pytest.approx(100 * losses.mean())
    assert found.standard_error == pytest.approx(100 * losses.mean(1).std(ddof=1) / 2)


def test_r_hat_tells_chains_that_have_not_mixed() -> None:
    """A step far too small: the chains are still leaving w*."""
    settings = Settings(chains=8, draws=200, burn_in=0, step_size=1e-7)
    found = estimate(
        quadratic_loss(torch.ones(3, dtype=torch.float64)), origin(3), 1000, 1.0, settings=settings
    )
    assert found.r_hat > 1.5
    assert found.ess < 0.05 * 8 * 200


def test_the_interval_covers() -> None:
    """100 estimates of 8 chains each, cut out of one run of independent chains."""
    settings = Settings(chains=800, draws=40, burn_in=20, steps=4, seed=1)
    found = estimate(
        quadratic_loss(torch.ones(3, dtype=torch.float64)), origin(3), 1e4, 1.0, settings=settings
    )
    means = 1e4 * found.trace.mean(1).view(100, 8)
    half = 2.3646 * means.std(1) / 8**0.5  # Student's t, 7 degrees of freedom
    covered = ((means.mean(1) - 1.5).abs() <= half).sum()
    assert 88 <= covered <= 100
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(1.9629 * found.standard_error, rel=1e-3)


def test_sgld_bias_is_what_the_rule_says() -> None:
    """On a quadratic with exact gradients the variance is inflated as the linear recursion says."""
    tau, step = 99.0, 0.01  # of curvature 100 with γ = 1: ε a = 1, a third too much variance
    settings = Settings(chains=500, draws=100, burn_in=20, step_size=step, seed=2)
    loss = quadratic_loss(torch.ones(3, dtype=torch.float64))

    def with_data(params: dict[str, torch.Tensor], nothing: torch.Tensor) -> torch.Tensor:
        return loss(params) + 0 * nothing.sum()

    found = estimate(
        with_data, origin(3), tau, 1.0, batches=lambda _: (torch.zeros(500, 1),), settings=settings
    )
    decay = math.exp(-step / 2)
    inflation = (1 + decay) / (1 + decay - (1 - decay) * tau)
    assert inflation == pytest.approx(4 / 3, rel=0.01)
    assert found.value == pytest.approx(1.5 * 0.99 * inflation, rel=0.03)
    assert found.bias == pytest.approx((inflation - 1) / inflation, rel=0.03)
    assert found.acceptance is None


def test_localisation_alone_is_sampled_exactly_at_any_step() -> None:
    """The loss is negligible: the energies are those of the Gaussian of variance 1/γ, also at steps
    of 16/γ.
    """
    loss = quadratic_loss(torch.ones(50, dtype=torch.float64))
    for step in (0.1, 16.0):
        settings = Settings(chains=200, draws=50, burn_in=100, step_size=step / 4, gamma=4.0)
        found = estimate(
            lambda params, nothing: 1e-3 * loss(params) + 0 * nothing.sum(), origin(50), 1.0, 1.0,
            batches=lambda _: (torch.zeros(200, 1),), settings=settings,
        )  # fmt: skip
        assert found.value == pytest.approx(1e-3 * 50 / 2 / 4, rel=0.03)
        assert found.bias < 1e-3


# failures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chains": 1}, "Invalid chains=1"),
        ({"draws": 0}, "Invalid draws=0"),
        ({"steps": 0}, "Invalid steps=0"),
        ({"burn_in": -1}, "Invalid burn_in=-1"),
        ({"burn_in": 5}, r"Invalid burn_in=5: calibration needs at least 20"),
        ({"gamma": 0.0}, "Invalid gamma=0.0"),
        ({"step_size": -1.0}, "Invalid step_size=-1.0"),
        ({"step_size": math.nan}, "Invalid step_size=nan"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "Invalid n=0"),
        ({"n": 2, "beta": None}, "Invalid n=2: beta = 1/log n"),
        ({"beta": -1.0}, "Invalid beta=-1.0"),
        ({"params": {}}, "Invalid params: expected at least one"),
        ({"params": {"w": torch.tensor([math.nan])}}, r"Invalid params\['w'\]: expected finite"),
        ({"params": {"w": torch.tensor([1])}}, r"Invalid params\['w'\]: expected finite floating"),
        ({"params": {"w": torch.zeros(1), "v": torch.zeros(1).double()}}, "one dtype"),
        (
            {"loss": lambda params: params["w"].sum().log()},
            "Invalid params: the loss there is -inf",
        ),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    defaults = {"loss": quadratic_loss(torch.ones(2)), "params": origin(2), "n": 10, "beta": 1.0}
    with pytest.raises(ValueError, match=message):
        estimate(**(defaults | arguments), settings=SMALL)


def test_bad_data_and_temperatures() -> None:
    with pytest.raises(ValueError, match="tensors of one length"):
        minibatches((torch.zeros(3), torch.zeros(4)), 2, SMALL)
    with pytest.raises(ValueError, match="Invalid size=0"):
        minibatches((torch.zeros(3),), 0, SMALL)
    with pytest.raises(ValueError, match="at least four"):
        fit_temperatures(quadratic_loss(torch.ones(1)), origin(1), [1.0, 2.0], settings=SMALL)


def test_diverging_and_frozen_chains_are_errors() -> None:
    truth = reduced_rank_minimum(2, 2, 2, 1)
    far = replace(SMALL, draws=200, step_size=10.0)
    batches = minibatches(reduced_rank_data(truth, 100, 0.1, 0), 10, far)
    with pytest.raises(
        RuntimeError, match=r"4 of 4 chains left the finite numbers: take a smaller step_size"
    ):
        estimate(reduced_rank_loss, truth, 1000, 1.0, batches=batches, settings=far)
    with pytest.raises(RuntimeError, match=r"4 of 4 chains never moved: take a smaller step_size"):
        estimate(reduced_rank_potential(truth), truth, 1e6, 1.0, settings=far)


def test_no_step_size_is_an_error() -> None:
    """One sample a batch at a low temperature: the noise of the minibatches swamps the posterior at
    any step.
    """
    truth = reduced_rank_minimum(2, 2, 2, 2)
    batches = minibatches(reduced_rank_data(truth, 100, 1.0, 0), 1, SMALL)
    with pytest.raises(
        RuntimeError, match=r"no step size from .* passes the rule: take larger minibatches"
    ):
        estimate(reduced_rank_loss, truth, 1e5, 1.0, batches=batches, settings=SMALL)


# known coefficients


@pytest.mark.parametrize(("dimension", "condition"), [(3, 1.0), (20, 1.0), (20, 1000.0)])
def test_regular_models(dimension: int, condition: float) -> None:
    curvatures = torch.logspace(0, math.log10(condition), dimension, dtype=torch.float64)
    settings = Settings(
        chains=64, draws=200, burn_in=40, steps=10 if condition == 1 else 40, seed=1
    )
    found = estimate(quadratic_loss(curvatures), origin(dimension), 1e4, 1.0, settings=settings)
    assert_close(found, float(regular(dimension)[0]))


@pytest.mark.parametrize("powers", [(1,), (2,), (1, 1)])
def test_normal_crossings_at_one_temperature(powers: tuple[int, ...]) -> None:
    settings = Settings(chains=500, draws=100, burn_in=40, steps=20, seed=1)
    found = estimate(normal_crossing_loss(powers), origin(len(powers)), 1e3, 1.0, settings=settings)
    assert_close(found, normal_crossing_energy(powers, 1e3))


def test_the_fit_of_exact_energies() -> None:
    tau = np.geomspace(1e3, 1e7, 8)
    for powers in ((1,), (1, 1), (2, 2), (1, 1, 1), (2, 2, 2)):
        energies = np.array([normal_crossing_energy(powers, t) for t in tau])
        chi_square, value, multiplicity = _fit(np.log(tau), energies[None], 0.005 * energies)[:, 0]
        coefficient, m = normal_crossing(powers)
        assert value == pytest.approx(float(coefficient), rel=0.01), powers
        assert multiplicity == m, powers
        assert chi_square < 1


@pytest.mark.slow
@pytest.mark.parametrize("powers", [(2, 2), (1, 2), (1, 3), (1, 1, 1), (2, 1, 2)])
def test_more_normal_crossings_at_one_temperature(powers: tuple[int, ...]) -> None:
    settings = Settings(chains=1000, draws=100, burn_in=40, steps=25, seed=1)
    found = estimate(normal_crossing_loss(powers), origin(len(powers)), 1e4, 1.0, settings=settings)
    assert_close(found, normal_crossing_energy(powers, 1e4))


@pytest.mark.slow
@pytest.mark.parametrize(("powers", "first"), [((1, 1), 1e2), ((2, 2), 1e3)])
def test_multiplicity_from_temperatures(powers: tuple[int, ...], first: float) -> None:
    settings = Settings(chains=2000, draws=80, burn_in=30, steps=25, seed=1)
    temperatures = [first * 4**i for i in range(5)]
    found = fit_temperatures(
        normal_crossing_loss(powers), origin(2), temperatures, settings=settings
    )
    coefficient, multiplicity = normal_crossing(powers)
    assert found.multiplicity == multiplicity
    low, high = found.interval
    assert found.value == pytest.approx(float(coefficient), rel=0.05)
    # the interval reaches up to the λ that goes with one multiplicity more, where the bootstrap
    # chose it
    assert 0.9 * coefficient < low < high < 1.5 * coefficient
    # one temperature alone falls short
    assert all(each.value < 0.95 * coefficient for each in found.estimates)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2, 0),
        (3, 2, 4, 1),
        (4, 2, 3, 2),
        (2, 4, 2, 0),
        (5, 3, 2, 1),
        (3, 3, 3, 1),
        (1, 2, 4, 0),
    ],
)
def test_reduced_rank_regression(shape: tuple[int, int, int, int]) -> None:
    truth = reduced_rank_minimum(*shape)
    coefficient, multiplicity = aoyagi_watanabe(*shape)
    assert multiplicity == 1
    settings = Settings(chains=200, draws=100, burn_in=40, steps=30, gamma=10.0, seed=1)
    assert_close(
        estimate(reduced_rank_potential(truth), truth, 1e6, 1.0, settings=settings),
        float(coefficient),
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 2, 4, 2), (4, 2, 3, 1)])
def test_reduced_rank_regression_from_minibatches(shape: tuple[int, int, int, int]) -> None:
    """SGLD on noisy data. The noise is small: it shifts λ̂ of one data set by about noise·√(λ/log
    n).
    """
    truth = reduced_rank_minimum(*shape)
    settings = Settings(chains=32, draws=300, burn_in=200, steps=5, gamma=1.0, seed=1)
    batches = minibatches(reduced_rank_data(truth, 5000, 0.1, 0), 100, settings)
    found = estimate(reduced_rank_loss, truth, 5000, batches=batches, settings=settings)
    assert found.bias < MAX_BIAS * 1.5
    assert_close(found, float(aoyagi_watanabe(*shape)[0]))


# gauges


@pytest.mark.slow
def test_invariant_along_the_orbit_of_a_relu_mlp() -> None:
    model = relu_mlp(depth=2, width=4)
    gauges = relu_mlp_gauges(model)
    moved = copy.deepcopy(model)
    GaugeSet(tuple(gauges)).transform_(moved, torch.Generator().manual_seed(1), spread=2.0)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = model(x).detach()
    loss = module_loss(model, F.mse_loss)
    settings = Settings(chains=32, draws=100, burn_in=40, steps=10, gamma=10.0, seed=1)

    def run(each: torch.nn.Module, seed: int, told: list) -> Estimate:
        params = named_parameters(each)
        return estimate(
            lambda p: loss(p, x, y), params, 1000, 1.0, gauges=told, settings=replace(settings,
            seed=seed)
        )  # fmt: skip

    here, there = run(model, 1, gauges), run(moved, 2, gauges)
    error = math.hypot(here.standard_error, there.standard_error)
    assert error < 0.05 * here.value
    assert abs(here.value - there.value) < 3 * error
    blind = run(moved, 2, [])
    assert abs(blind.value - here.value) > 4 * error  # what is lost without them


@pytest.mark.slow
def test_invariant_along_the_orbit_of_a_gpt() -> None:
    model = small_gpt()
    gauges = find_gauges(model)
    moved = copy.deepcopy(model)
    gauges.transform_(moved, torch.Generator().manual_seed(1), spread=1.0)
    x = tokens(16)[0]
    target = model(x).softmax(-1).detach()

    def divergence(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()

    loss = module_loss(model, divergence)
    settings = Settings(chains=16, draws=40, burn_in=20, steps=5, gamma=30.0)
    found = [
        estimate(
            lambda p: loss(p, x, target), named_parameters(each), 1000, 1.0, gauges=gauges,
            settings=replace(settings, seed=seed),
        )
        for seed, each in enumerate((model, moved))
    ]  # fmt: skip
    error = math.hypot(*(each.standard_error for each in found))
    assert error < 0.05 * found[0].value
    assert abs(found[0].value - found[1].value) < 3 * error


def test_the_given_minimum_is_left_where_it_is() -> None:
    model = relu_mlp(depth=2, width=3)
    gauges = relu_mlp_gauges(model)
    before = {name: p.detach().clone() for name, p in named_parameters(model).items()}
    x = torch.ones(2, 3, dtype=torch.float64)
    loss = module_loss(model, F.mse_loss)
    estimate(
        lambda p: loss(p, x, x), named_parameters(model), 10, 1.0, gauges=gauges, settings=SMALL
    )
    assert all(torch.equal(p, before[name]) for name, p in named_parameters(model).items())
    balance_(before, gauges)
    assert not all(torch.equal(p, before[name]) for name, p in named_parameters(model).items())
