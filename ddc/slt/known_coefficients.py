"""Models whose learning coefficient is known in closed form, and their losses: the ground truth of
the estimator.

A learning coefficient comes with its multiplicity: Z(τ) = ∫ exp(-τ K(w)) φ(w) dw falls as τ^-λ (log
τ)^(m-1). Every loss here takes parameters by name and is least, and zero, at the point that its
``*_minimum`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import reduce

import numpy as np
import torch
from torch import Tensor

Coefficient = tuple[Fraction, int]
Potential = Callable[[dict[str, Tensor]], Tensor]


def regular(dimension: int) -> Coefficient:
    """(d/2, 1): a model with a positive definite Hessian in d dimensions."""
    return Fraction(dimension, 2), 1


def normal_crossing(powers: Sequence[int]) -> Coefficient:
    """Coefficient of K(w) = Π wᵢ^(2kᵢ) at 0: λ = min 1/(2kᵢ), and m is how many factors attain it.

    Source: Watanabe, Algebraic Geometry and Statistical Learning Theory (2009), section 4.2.

    Raises:
        ValueError: no powers, or one below 1.
    """
    if not powers or min(powers) < 1:
        raise ValueError(
            f"Invalid powers={tuple(powers)}: expected positive integers, at least one"
        )
    return Fraction(1, 2 * max(powers)), list(powers).count(max(powers))


def aoyagi_watanabe(inputs: int, hidden: int, outputs: int, rank: int) -> Coefficient:
    """Coefficient of reduced-rank regression y = B A x, A of shape (hidden, inputs), where the true
    B A has ``rank``.

    Source: Aoyagi and Watanabe, Stochastic complexities of reduced rank regression in Bayesian
    estimation, Neural Networks 18 (2005), main theorem.

    Raises:
        ValueError: a size below 1, or a rank that B A cannot have.
    """
    m, h, n, r = inputs, hidden, outputs, rank
    if min(m, h, n) < 1:
        raise ValueError(f"Invalid {inputs=}, {hidden=}, {outputs=}: expected positive integers")
    if not 0 <= r <= min(m, h, n):
        raise ValueError(
            f"Invalid {rank=}: expected 0 to {min(m, h, n)}, the least of inputs, hidden and"
            " outputs"
        )
    if m + h < n + r:
        return Fraction(h * m - h * r + n * r, 2), 1
    if n + h < m + r:
        return Fraction(h * n - h * r + m * r, 2), 1
    if m + n < h + r:
        return Fraction(m * n, 2), 1
    odd = (m + h + n + r) % 2
    return (
        Fraction(2 * (h + r) * (m + n) + 2 * m * n - (h + r) ** 2 - m**2 - n**2 + odd, 8),
        1 + odd,
    )


def quadratic_loss(curvatures: Tensor) -> Potential:
    """K(w) = ½ Σ aᵢ wᵢ², on parameters ``{"w": (d,)}``; least at 0."""
    return lambda params: (curvatures * params["w"].square()).sum() / 2


def normal_crossing_loss(powers: Sequence[int]) -> Potential:
    """K(w) = Π wᵢ^(2kᵢ), on parameters ``{"w": (d,)}``; least at 0."""
    exponents = [2 * power for power in powers]
    return lambda params: reduce(
        torch.mul, (w**e for w, e in zip(params["w"].unbind(), exponents, strict=True))
    )


def origin(dimension: int) -> dict[str, Tensor]:
    """The minimum of the losses above, in float64."""
    return {"w": torch.zeros(dimension, dtype=torch.float64)}


def reduced_rank_minimum(inputs: int, hidden: int, outputs: int, rank: int) -> dict[str, Tensor]:
    """The most singular minimum, in float64: identities of size ``rank`` in A and B, zeros in all
    surplus.

    There the local coefficient is the global one; at a minimum with surplus rows in use it is
    larger.
    """
    weights = {"A": torch.zeros(hidden, inputs), "B": torch.zeros(outputs, hidden)}
    for weight in weights.values():
        weight[:rank, :rank] = torch.eye(rank)
    return {name: weight.double() for name, weight in weights.items()}


def reduced_rank_potential(truth: dict[str, Tensor]) -> Potential:
    """K(w) = ½ ‖B A - B₀ A₀‖², the excess loss over inputs from N(0, I) and noise of any size."""
    target = truth["B"] @ truth["A"]
    return lambda params: (params["B"] @ params["A"] - target).square().sum() / 2


def reduced_rank_data(
    truth: dict[str, Tensor], n: int, noise: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Inputs (n, M) from N(0, I), and outputs (n, N) of the true map with noise of this standard
    deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, truth["A"].shape[1], generator=generator, dtype=torch.float64)
    y = x @ (truth["B"] @ truth["A"]).mT
    return x, y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float64)


def reduced_rank_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean over samples of ½ |y - B A x|²."""
    return (y - x @ params["A"].mT @ params["B"].mT).square().sum(-1).mean() / 2


def normal_crossing_energy(powers: Sequence[int], tau: float, gamma: float = 1.0) -> float:
    """The exact E[τ K(w)] at a finite τ, for K = Π wᵢ^(2kᵢ) localised by exp(-γ|w|²/2).

    log K is a sum of independent 2kᵢ log|wᵢ| with wᵢ ~ N(0, 1/γ), so its density s ↦ q(s) is a
    convolution, and E[τ K] = ∫ τ eˢ exp(-τ eˢ) q(s) ds / ∫ exp(-τ eˢ) q(s) ds. The trapezoidal rule
    converges exponentially here.

    For two factors with k = 1 it is ½ + a - a K₁(a)/K₀(a), a = γ²/(8τ), with Bessel functions K.
    """
    spacing = 0.05
    density, start = np.ones(1), 0.0
    for power in powers:
        s = np.arange(-40.0 * 2 * power, 2 * power * 2.5, spacing)
        log_w = s / (2 * power)
        w = np.exp(log_w)
        density = np.convolve(density, w * np.exp(-(w**2) / 2))
        density /= density.sum()
        start += s[0]
    log_k = start + spacing * np.arange(len(density)) - sum(powers) * np.log(gamma)
    energy = tau * np.exp(log_k)
    weight = density * np.exp(-energy)
    return float((energy * weight).sum() / weight.sum())
