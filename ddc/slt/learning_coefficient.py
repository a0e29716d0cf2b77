"""The local learning coefficient λ of a loss at a minimum w*, estimated by sampling near w*.

    λ̂ = nβ (E[Lₙ(w)] - Lₙ(w*)),   w ~ exp(-nβ Lₙ(w) - γ/2 |w - w*|²)

Source: Lau et al., The local learning coefficient (arXiv:2308.12108), with β = 1/log n after
Watanabe, A widely applicable Bayesian information criterion (JMLR 14, 2013).

Two samplers, chosen by what the loss is.

A loss of minibatches is sampled by SGLD (Welling and Teh 2011) with an exponential integrator: over
a step of time ε/2 localisation and noise are an Ornstein-Uhlenbeck process, integrated exactly, and
the gradient F = nβ ∇L_batch is held:

    y' = a y - (1 - a)/γ · F + √((1 - a²)/γ) ξ,   y = w - w*,  a = exp(-γε/2)

(the usual step for small γε). So the localisation, which outweighs the loss in most directions of a
large network, costs no accuracy, and steps may be as long as 1/γ and more.

An exact loss (all the data, or a potential in closed form) is sampled by Hamiltonian Monte Carlo,
whose accept step has no discretisation bias; with one gradient step a draw it is MALA with steps of
random size.

The step size is the largest of a grid 2^(-j/2)/γ, with one burn-in a trial, at which

- SGLD: the bias ½ tanh(γε/4) · E|F|²/γ is at most :data:`MAX_BIAS` of λ̂. On a quadratic of
  curvature h the recursion above inflates the variance by 1/(1 - tanh(γε/4) nβh/γ), and this is the
  excess energy of it; the noise of the minibatches, which is in |F|² too, adds at most its share. A
  threshold on acceptance would not do: at a given bias it falls with the dimension.
- HMC: the mean acceptance is at least :data:`MIN_ACCEPTANCE`, for speed alone (Beskos et al. 2013:
  the best is about 0.65 in high dimension, and the cost is flat up to 0.9; Stan aims at 0.8).

Both are measured on the second half of the burn-in, and the chains of the burn-in go on into the
draws.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddc.gauges import balance_
from ddc.gauges.base import Gauge

MAX_BIAS = 0.02
MIN_ACCEPTANCE = 0.8
GRID = 64
#: the 99% point of χ² with one degree of freedom
SIGNIFICANT = 6.63

Params = dict[str, Tensor]
Batch = tuple[Tensor, ...]
#: ``loss(params, *batch)``: the mean over the samples of a batch; ``loss(params)`` for an exact
#: loss.
Loss = Callable[..., Tensor]
#: From the number of a gradient step to tensors of shape (chains, batch, ...), independent between
#: chains.
Batches = Callable[[int], Batch]


@dataclass(frozen=True)
class Settings:
    """How to sample.

    Attributes:
        chains: independent chains, run as one batch.
        draws: recorded for each chain.
        burn_in: draws thrown away before them.
        steps: gradient steps a draw: thinning for SGLD, leapfrog steps for HMC.
        gamma: strength γ of the localisation, in units of 1/(parameter)².
        step_size: ε, twice the time of a step of SGLD, the square of HMC's largest leapfrog step;
            None to calibrate it.
        seed: of the noise.

    Raises:
        ValueError: a number out of range.
    """

    chains: int = 16
    draws: int = 500
    burn_in: int = 200
    steps: int = 1
    gamma: float = 1.0
    step_size: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("chains", 2), ("draws", 4), ("burn_in", 0), ("steps", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"Invalid {name}={value}: expected an integer of at least {least}")
        for name in ("gamma", "step_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Invalid {name}={value}: expected a positive number")
        if self.step_size is None and self.burn_in < 20:
            raise ValueError(
                f"Invalid burn_in={self.burn_in}: calibration needs at least 20; or give step_size"
            )


@dataclass(frozen=True)
class Estimate:
    """A local learning coefficient with its errors.

    Attributes:
        value: λ̂.
        standard_error: of λ̂, from the spread of the chains' means.
        interval: 95%, by Student's t over the chains' means, which are independent whatever the
            autocorrelation within a chain. It covers the error of sampling; not what the
            temperature, the localisation or the draw of the data do to λ̂, nor (SGLD) ``bias``.
        r_hat: split R-hat of the losses, rank-normalised (Vehtari et al. 2021); above 1.01, chains
            have not mixed.
        ess: bulk effective sample size of the losses, of all chains together.
        step_size: ε.
        acceptance: mean acceptance probability of HMC; None for SGLD.
        bias: bound on the relative excess of λ̂ from step size and minibatch noise; 0 for HMC.
        n: number of samples.
        beta: inverse temperature.
        gamma: localisation.
        seconds: of sampling and calibration.
        trace: Lₙ(w) - Lₙ(w*) of each draw, on the draw's own batch: shape (chains, draws), on the
            CPU.
    """

    value: float
    standard_error: float
    interval: tuple[float, float]
    r_hat: float
    ess: float
    step_size: float
    acceptance: float | None
    bias: float
    n: float
    beta: float
    gamma: float
    seconds: float
    trace: Tensor = field(repr=False)


def estimate(
    loss: Loss,
    params: Mapping[str, Tensor],
    n: float,
    beta: float | None = None,
    *,
    batches: Batches | None = None,
    gauges: Iterable[Gauge] = (),
    settings: Settings | None = None,
) -> Estimate:
    """Estimate the local learning coefficient.

    Args:
        loss: mean loss per sample, in nats, of a batch; see :func:`module_loss` for a network.
        params: w* by name, all of one dtype and device; not changed.
        n: number of samples that the loss stands for.
        beta: inverse temperature; 1/log n by default. A potential K at inverse temperature τ has
            n=τ, beta=1.
        batches: minibatches, sampled by SGLD (see :func:`minibatches`); None where the loss takes
            no data.
        gauges: with these, w* is first moved to the point of least norm on its gauge orbit, so that
            the estimate is a function of the orbit. (Noise and localisation are not invariant
            otherwise.)
        settings: how to sample; :class:`Settings` by default.

    Raises:
        ValueError: n or beta out of range, no parameters, or parameters that are not finite
            floating numbers of one dtype; a loss that is not finite at w*.
        RuntimeError: no step of the grid passes the rule; a chain leaves the finite numbers or
            never moves.
    """
    # these two take a second to import, which every run of the trainer would wait for
    from arviz_stats.base import array_stats
    from scipy import stats

    settings = Settings() if settings is None else settings
    if not 1 <= n < math.inf:
        raise ValueError(f"Invalid {n=}: expected a number of samples, at least 1")
    if beta is None:
        if n < 3:
            raise ValueError(f"Invalid {n=}: beta = 1/log n needs n of at least 3; or give beta")
        beta = 1 / math.log(n)
    if not 0 < beta < math.inf:
        raise ValueError(f"Invalid {beta=}: expected a positive number")
    # w*, at the point of least norm on its orbit
    center = {name: p.detach().clone() for name, p in params.items()}
    _check(center)
    balance_(center, gauges)

    # sample
    start = time.perf_counter()
    sampler = (_HMC if batches is None else _SGLD)(loss, center, n * beta, batches, settings)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
        sampler.check_center()
        if settings.step_size is None:
            step_size = sampler.calibrate()
        else:
            step_size = settings.step_size
            if settings.burn_in:
                sampler.run(settings.burn_in, step_size)
        drawn = sampler.run(settings.draws, step_size)
    sampler.check_chains()
    trace = drawn.excess.double().cpu()
    seconds = time.perf_counter() - start

    # the mean energy, with the error of independent chains
    draws = n * beta * trace.numpy()
    means = draws.mean(1)
    value, error = float(means.mean()), float(means.std(ddof=1) / math.sqrt(settings.chains))
    half = error * float(stats.t.ppf(0.975, settings.chains - 1))
    return Estimate(
        value=value,
        standard_error=error,
        interval=(value - half, value + half),
        r_hat=float(array_stats.rhat(draws, chain_axis=0, draw_axis=1)),
        ess=float(array_stats.ess(draws, chain_axis=0, draw_axis=1)),
        step_size=step_size,
        acceptance=drawn.diagnostic if batches is None else None,
        bias=0.0 if batches is None else drawn.diagnostic,
        n=n,
        beta=beta,
        gamma=settings.gamma,
        seconds=seconds,
        trace=trace,
    )


class _Drawn(NamedTuple):
    """Lₙ(w) - Lₙ(w*) of each draw, of shape (chains, draws), and the mean diagnostic."""

    excess: Tensor
    diagnostic: float


class _Sampler(ABC):
    """All chains as one matrix ``w`` of shape (chains, parameters)."""

    #: Of the grid, in units of 1/γ.
    longest_step = 1.0

    def __init__(
        self, loss: Loss, center: Params, tau: float, batches: Batches | None, settings: Settings
    ) -> None:
        self.tau, self.batches, self.settings = tau, batches, settings
        shapes = {name: p.shape for name, p in center.items()}
        sizes = [shape.numel() for shape in shapes.values()]

        def of_vector(w: Tensor, *batch: Tensor) -> Tensor:
            parts = zip(shapes.items(), w.split(sizes), strict=True)
            return loss({name: part.view(shape) for (name, shape), part in parts}, *batch)

        self.loss = of_vector
        self.center = torch.cat([p.flatten() for p in center.values()])
        self.generator = torch.Generator(self.center.device)
        self.grad_and_loss: Callable[..., tuple[Tensor, Tensor]] = vmap(grad_and_value(of_vector))
        self.restart()

    @abstractmethod
    def run(self, draws: int, step_size: float) -> _Drawn:
        """Go on by so many draws."""

    @abstractmethod
    def passes(self, diagnostic: float) -> bool:
        """The rule of the step size; False for nan."""

    def restart(self) -> None:
        self.w = self.center.repeat(self.settings.chains, 1)
        self.generator.manual_seed(self.settings.seed)
        self.gradient_steps = 0

    def burn_in(self, step_size: float) -> float:
        """Run from w*; the mean of the diagnostic over the second half."""
        half = self.settings.burn_in // 2
        self.restart()
        self.run(half, step_size)
        return self.run(self.settings.burn_in - half, step_size).diagnostic

    def calibrate(self) -> float:
        """The largest step of the grid that passes; the chains are left at the end of its burn-in.

        From the largest down, four at a time, and then between: steps so small that a burn-in leads
        nowhere, which tells nothing, are not tried before larger ones have failed.
        """
        passing = next(
            (index for index in range(0, GRID, 4) if self.passes(self.burn_in(self.step(index)))),
            None,
        )
        if passing is None:
            raise RuntimeError(
                f"no step size from {self.step(0):.1e} to {self.step(GRID - 4):.1e} passes the"
                " rule: take larger minibatches, a longer burn_in, a smaller n * beta or a larger"
                " gamma; or w* is no minimum, and the loss falls on the way from it"
            )
        low, high = max(passing - 3, 0), passing
        best = self.w, self.generator.get_state(), self.gradient_steps
        while low < high:
            middle = (low + high) // 2
            if self.passes(self.burn_in(self.step(middle))):
                high = middle
                best = self.w, self.generator.get_state(), self.gradient_steps
            else:
                low = middle + 1
        self.w, state, self.gradient_steps = best
        self.generator.set_state(state)
        return self.step(high)

    def step(self, index: int) -> float:
        return self.longest_step * 2 ** (-index / 2) / self.settings.gamma

    def noise(self) -> Tensor:
        return torch.randn(
            self.w.shape, generator=self.generator, dtype=self.w.dtype, device=self.w.device
        )

    def uniform(self) -> Tensor:
        """One number in [0, 1) a chain."""
        return torch.rand(
            len(self.w), generator=self.generator, dtype=self.w.dtype, device=self.w.device
        )

    def check_center(self) -> None:
        batch = () if self.batches is None else tuple(tensor[0] for tensor in self.batches(0))
        if not (value := self.loss(self.center, *batch)).isfinite():
            raise ValueError(
                f"Invalid params: the loss there is {float(value)}, expected a finite minimum"
            )

    def check_chains(self) -> None:
        broken = int((~self.w.isfinite().all(1)).sum())
        if broken:
            raise RuntimeError(
                f"{broken} of {len(self.w)} chains left the finite numbers: take a smaller"
                " step_size (or None, to calibrate it) or a larger gamma"
            )


class _SGLD(_Sampler):
    """Exponential integrator of the Langevin equation, see the top of this file."""

    longest_step = 16.0

    def passes(self, diagnostic: float) -> bool:
        return 0 <= diagnostic <= MAX_BIAS

    @torch.no_grad()
    def run(self, draws: int, step_size: float) -> _Drawn:
        assert self.batches is not None
        loss_at_center = vmap(partial(self.loss, self.center))
        gamma = self.settings.gamma
        decay = math.exp(-gamma * step_size / 2)
        excess, squares = [], []
        for _ in range(draws):
            for substep in range(self.settings.steps):
                batch = self.batches(self.gradient_steps)
                self.gradient_steps += 1
                grad, loss = self.grad_and_loss(self.w, *batch)
                force, away = self.tau * grad, self.w - self.center
                if substep == 0:
                    # the same batch at w* takes most of the batch's noise out of the difference
                    excess.append(loss - loss_at_center(*batch))
                    squares.append(force.square().sum(1).mean())
                noise = ((1 - decay**2) / gamma) ** 0.5 * self.noise()
                self.w = self.center + decay * away - (1 - decay) / gamma * force + noise
        trace = torch.stack(excess, 1)
        excess_energy = math.tanh(gamma * step_size / 4) * torch.stack(squares).mean() / gamma / 2
        bias = excess_energy / (self.tau * trace.mean())
        return _Drawn(trace, float(bias))


class _HMC(_Sampler):
    """Leapfrog of step h uniform in [0, 1]·√ε, drawn for each chain and draw.

    No orbit is then a period (Neal 2011, section 3.2), and some steps are small enough for the
    narrow arms of a singular posterior, which steps of one size, tuned to the bulk, leave out: that
    took 2% off λ̂ of w₁² w₂⁴.
    """

    def passes(self, diagnostic: float) -> bool:
        return diagnostic >= MIN_ACCEPTANCE

    def potential(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of U = nβ L + γ/2 |w - w*|², of shape (chains, parameters); U and L, each of
        shape (chains,).
        """
        grad, loss = self.grad_and_loss(w)
        away = w - self.center
        gamma = self.settings.gamma
        return (
            self.tau * grad + gamma * away,
            self.tau * loss + gamma / 2 * away.square().sum(1),
            loss,
        )

    @torch.no_grad()
    def run(self, draws: int, step_size: float) -> _Drawn:
        losses, acceptances = [], []
        grad, energy, loss = self.potential(self.w)
        for _ in range(draws):
            h = (step_size**0.5 * self.uniform()).unsqueeze(1)
            momentum = self.noise()
            total = energy + momentum.square().sum(1) / 2
            # leapfrog steps
            w, new_grad = self.w, grad
            for _ in range(self.settings.steps):
                momentum = momentum - h / 2 * new_grad
                w = w + h * momentum
                new_grad, new_energy, new_loss = self.potential(w)
                momentum = momentum - h / 2 * new_grad
            # Metropolis' acceptance
            # a proposal that is not finite is not accepted
            change = (total - new_energy - momentum.square().sum(1) / 2).nan_to_num(
                -torch.inf, -torch.inf
            )
            acceptance = change.clamp(max=0).exp()
            accept = self.uniform() < acceptance
            self.w = torch.where(accept.unsqueeze(1), w, self.w)
            grad = torch.where(accept.unsqueeze(1), new_grad, grad)
            energy, loss = (
                torch.where(accept, new_energy, energy),
                torch.where(accept, new_loss, loss),
            )
            losses.append(loss)
            acceptances.append(acceptance.mean())
        trace = torch.stack(losses, 1) - self.loss(self.center)
        return _Drawn(trace, float(torch.stack(acceptances).mean()))

    def check_chains(self) -> None:
        super().check_chains()
        still = int((self.w == self.center).all(1).sum())
        if still:
            raise RuntimeError(
                f"{still} of {len(self.w)} chains never moved: take a smaller step_size (or None,"
                " to calibrate it)"
            )


def _check(params: Params) -> None:
    if not params:
        raise ValueError("Invalid params: expected at least one parameter")
    if len({(p.dtype, p.device) for p in params.values()}) > 1:
        raise ValueError(
            "Invalid params: expected one dtype and device, for instance by model.float()"
        )
    for name, p in params.items():
        if not p.is_floating_point() or not p.isfinite().all():
            raise ValueError(f"Invalid params[{name!r}]: expected finite floating numbers")


def module_loss(model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The loss of a network: ``criterion(model(*inputs), target)`` on batches ``(*inputs,
    target)``.

    Args:
        model: without dropout; its own parameters are not used. Take w* from
            :func:`ddc.gauges.named_parameters`.
        criterion: mean loss per sample, such as ``torch.nn.functional.cross_entropy``.
    """

    def loss(params: Params, *batch: Tensor) -> Tensor:
        *inputs, target = batch
        return criterion(functional_call(model, params, tuple(inputs)), target)

    return loss


def minibatches(data: Sequence[Tensor], size: int, settings: Settings) -> Batches:
    """Minibatches with replacement, independent between chains and steps.

    Args:
        data: tensors of shape (samples, ...).
        size: samples a batch.
        settings: for the number of chains and the seed.

    Raises:
        ValueError: a size below 1, no data, or tensors of different lengths.
    """
    lengths = {len(tensor) for tensor in data}
    if len(lengths) != 1:
        raise ValueError(f"Invalid data: expected tensors of one length, got {sorted(lengths)}")
    if size < 1:
        raise ValueError(f"Invalid {size=}: expected a positive integer")
    samples = lengths.pop()

    def batches(step: int) -> Batch:
        random = np.random.default_rng((settings.seed, step))
        index = torch.from_numpy(random.integers(samples, size=(settings.chains, size)))
        return tuple(tensor[index.to(tensor.device)] for tensor in data)

    return batches


@dataclass(frozen=True)
class TemperatureFit:
    """The learning coefficient and its multiplicity, from the dependence on the temperature.

    Attributes:
        value: λ.
        interval: 95% of λ, the choice of m included: percentiles of a parametric bootstrap of the
            estimates.
        multiplicity: m.
        multiplicity_probability: share of the bootstrap that chose this m.
        chi_square, degrees_of_freedom: of the residuals; a chi_square far above says that the form
            does not hold.
        estimates: at each temperature.
    """

    value: float
    interval: tuple[float, float]
    multiplicity: int
    multiplicity_probability: float
    chi_square: float
    degrees_of_freedom: int
    estimates: tuple[Estimate, ...] = field(repr=False)


def fit_temperatures(
    loss: Loss,
    params: Mapping[str, Tensor],
    temperatures: Sequence[float],
    *,
    batches: Batches | None = None,
    gauges: Iterable[Gauge] = (),
    settings: Settings | None = None,
) -> TemperatureFit:
    """Estimate at several τ = nβ and fit E[τ (L - L*)] = λ - P'(log τ)/P(log τ), P a polynomial of
    degree m - 1.

    From Z(τ) ~ τ^-λ P(log τ) (Watanabe 2009, section 6.3), of which the left side is -d log Z/d log
    τ. A single temperature falls short of λ by about (m - 1)/log τ. The multiplicity, 1 to 3, is
    the least that a larger one does not improve on by :data:`SIGNIFICANT` in χ²: errors too large
    for it give an m and a λ that are too small.

    The form neglects powers τ^-δ, δ the distance of λ to the next pole of the zeta function. Where
    δ is small (powers of a normal crossing that differ) the fit takes them for a multiplicity, and
    λ comes out too large.

    Args:
        loss: as for :func:`estimate`, and so are the others.
        params: w* by name.
        temperatures: at least four τ, which ought to span orders of magnitude.
        batches: minibatches; None where the loss takes no data.
        gauges: to balance w* by.
        settings: the seed of temperature i is ``settings.seed + i``.

    Raises:
        ValueError: fewer than four temperatures; otherwise as :func:`estimate`.
    """
    if len(temperatures) < 4:
        raise ValueError(f"Invalid temperatures={list(temperatures)}: expected at least four")
    settings = Settings() if settings is None else settings
    gauges = list(gauges)
    # an estimate at each temperature
    estimates = tuple(
        estimate(
            loss,
            params,
            tau,
            1.0,
            batches=batches,
            gauges=gauges,
            settings=replace(settings, seed=settings.seed + i),
        )
        for i, tau in enumerate(temperatures)
    )
    # the fit, and its error from fits to estimates with noise of their own size
    values = np.array([each.value for each in estimates])
    errors = np.array([each.standard_error for each in estimates])
    random = np.random.default_rng(settings.seed)
    noise = random.standard_t(settings.chains - 1, size=(1000, len(values)))
    chi_square, value, multiplicity = _fit(np.log(temperatures), values[None], errors)[
        :, 0
    ].tolist()
    _, bootstrap, chosen = _fit(np.log(temperatures), values + errors * noise, errors)
    low, high = np.percentile(bootstrap, [2.5, 97.5])
    m = int(multiplicity)
    return TemperatureFit(
        value=value,
        interval=(float(low), float(high)),
        multiplicity=m,
        multiplicity_probability=float((chosen == m).mean()),
        chi_square=chi_square,
        degrees_of_freedom=len(values) - m,
        estimates=estimates,
    )


def _shortfalls(log_tau: NDArray[np.float64]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """For each m, P'/P at the temperatures on a grid of polynomials P of degree m - 1, of shape
    (grid, temperatures).

    P is 1, x or x² + e with x = log τ + c, positive at the least τ. For normal crossings of equal
    powers k, e = ψ'(1/(2k)) + m k² ψ'(1), a sum of trigammas, so that e ≥ 0.
    """
    c = np.geomspace(0.1, 100, 500) - log_tau.min()
    x = log_tau + c[:, None]
    yield 1, np.zeros((1, len(log_tau)))
    yield 2, 1 / x
    x, e = x[::2, None], np.concatenate([[0], np.geomspace(0.5, 100, 30)])[:, None]
    yield 3, (2 * x / (x**2 + e)).reshape(-1, len(log_tau))


def _fit(
    log_tau: NDArray[np.float64], values: NDArray[np.float64], errors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Best chi², λ and m for each row of values, of shape (rows, temperatures); returned as 3
    rows.
    """
    rows, precision = np.arange(len(values)), errors**-2
    mean = values @ precision / precision.sum()
    residual = values - mean[:, None]
    best = np.full((3, len(values)), np.inf)
    for m, shortfall in _shortfalls(log_tau):
        mean_shortfall = shortfall @ precision / precision.sum()
        centered = shortfall - mean_shortfall[:, None]
        # Σ (residual + centered)²/error², multiplied out so that no array over rows, offsets and τ
        # is made
        chi_square = (
            (residual**2 @ precision)[:, None]
            + 2 * (residual * precision) @ centered.T
            + centered**2 @ precision
        )
        at = chi_square.argmin(1)
        found = np.stack([chi_square[rows, at], mean + mean_shortfall[at], np.full(len(values), m)])
        best = np.where(found[0] < best[0] - SIGNIFICANT, found, best)
    return best
