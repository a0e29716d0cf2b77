"""Networks whose dead directions vanish at a known rate: the oracle for observables and reader.

Every case builds a real module at a weight size t, observes it as a trained network is observed,
and knows the exponent (and coefficient) of a second moment as t → 0. The table is that of the
project's design; the derivations are one line each and are repeated symbolically in
tests/test_known_rates.py. Where a row holds under a condition that the table leaves out, the case
says so in its note.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc.slt.observables import (
    Layer,
    Reading,
    accumulate,
    fisher_block,
    gaussian_score,
    layers_of,
    observe,
)
from ddc.slt.rates import Array, Rate, RateRule, read_rate

FLOAT = torch.float64


@dataclass(frozen=True)
class KnownRate:
    """A network with one weight size t, and what its dead direction must show.

    Args:
        row: of the table.
        name: the case within the row.
        measure: the observable, as a second moment (or, for a log-volume, its exponential), at a
            given t.
        exponent: of the observable in t as t → 0.
        coefficient: of the leading power; None where the table gives none.
        refusal: the word by which the reader must refuse; None where it must read.
        note: a condition that the row needs.
        span: the range of t, as log10 of its ends.
    """

    row: str
    name: str
    measure: Callable[[float], float]
    exponent: float
    coefficient: float | None = None
    refusal: str | None = None
    note: str = ""
    span: tuple[float, float] = (-2.0, -4.0)

    def series(self, points: int = 24) -> tuple[Array, Array]:
        """(log t, log y) at geometrically spaced t, largest first, as training would meet them."""
        log_t = np.linspace(*self.span, points) * math.log(10)
        return log_t, np.array([math.log(self.measure(math.exp(x))) for x in log_t])

    def recover(self, rule: RateRule | None = None) -> Rate:
        """What the reader makes of it."""
        return read_rate(*self.series(), rule)

    def recovered_coefficient(self) -> float:
        """The observable over t^exponent, at the smallest t."""
        log_t, log_y = self.series(2)
        return math.exp(log_y[-1] - self.exponent * log_t[-1])


def linear(weight: Tensor) -> nn.Linear:
    """A bias-free linear map with the given weight."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=FLOAT)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


def diagonal(*entries: float) -> nn.Linear:
    """diag(entries); of one entry, a scalar weight."""
    return linear(torch.diag(torch.tensor(entries, dtype=FLOAT)))


def orthogonal_inputs(width: int) -> Tensor:
    """All sign vectors: second moment exactly the identity."""
    return torch.tensor(list(itertools.product((1.0, -1.0), repeat=width)), dtype=FLOAT)


def normal_inputs(count: int = 2000) -> Tensor:
    """Standard normal numbers (count, 1), stratified and symmetric, with second moment exactly
    1.
    """
    x = torch.special.ndtri((torch.arange(count, dtype=FLOAT) + 0.5) / count)
    return (x / x.square().mean().sqrt())[:, None]


def repeated(make: Callable[[float], nn.Module], count: int, t: float) -> nn.Sequential:
    """A chain of ``count`` modules of weight t."""
    return nn.Sequential(*(make(t) for _ in range(count)))


def output_moment(
    make: Callable[[float], nn.Module], x: Tensor, direction: Tensor | None, t: float
) -> float:
    """Second moment of the output of ``make(t)`` along a direction (None: the last axis)."""
    outer = nn.Sequential(make(t))
    moments = accumulate(outer, [Layer("output", "0")], [(x, x)], gaussian_score(0))[0]
    moment = moments.activation / moments.rows
    return float(moment[-1, -1] if direction is None else direction @ moment @ direction)


# --- diagonal linear chains
# ------------------------------------------------------------------------------------------


def deep_linear(powers: Sequence[float], width: int, dead: int, t: float) -> nn.Sequential:
    """Layers diag(1, …, 1, t^p, …, t^p), one for each power p, with ``dead`` dying entries each."""
    return nn.Sequential(*(diagonal(*[1.0] * (width - dead), *[t**p] * dead) for p in powers))


def linear_reading(powers: Sequence[float], layer: int, width: int, dead: int, t: float) -> Reading:
    """The layer-th map, counted from 1, of a deep linear chain, under a Gaussian model with unit
    noise.
    """
    model = deep_linear(powers, width, dead, t)
    x = orthogonal_inputs(width)
    return observe(model, [layers_of(model)[layer - 1]], [(x, x)], gaussian_score(0))[0]


def forward_moment(powers: Sequence[float], layer: int, t: float) -> float:
    return linear_reading(powers, layer, 3, 1, t).activation.smallest


def backward_moment(powers: Sequence[float], layer: int, t: float) -> float:
    return linear_reading(powers, layer, 3, 1, t).gradient.smallest


def fisher_moment(powers: Sequence[float], layer: int, t: float) -> float:
    return linear_reading(powers, layer, 3, 1, t).values["fisher_min"]


def volume(layer: int, dead: int, t: float) -> float:
    return math.exp(
        linear_reading([1.0] * layer, layer, 5, dead, t).values["activation_log_volume"]
    )


def linear_rows() -> Iterator[KnownRate]:
    depth = 4
    # beside a live 1 the rounding floor is at 3e-14
    case = partial(KnownRate, coefficient=1.0, span=(-0.5, -1.5))
    equal, unequal = [1.0] * depth, [0.5, 1.0, 2.0, 1.5]
    for n in range(1, depth + 1):
        name, above, below = f"layer {n} of {depth}", 2 * (depth - n), 2 * (n - 1)
        yield case(
            "deep linear, backward moment",
            name,
            partial(backward_moment, equal, n),
            above,
            refusal=None if above else "plateau",
        )
        yield case(
            "deep linear, forward moment",
            name,
            partial(forward_moment, equal, n),
            below,
            refusal=None if below else "plateau",
        )
        yield case(
            "product of the two (A–G duality)",
            name,
            partial(fisher_moment, equal, n),
            above + below,
        )
    for n in range(1, depth):
        name = f"layer {n} of {depth}, p = {unequal}"
        yield case(
            "weights t^p, backward moment",
            name,
            partial(backward_moment, unequal, n),
            2 * sum(unequal[n:]),
        )
    for dead in (1, 2, 3, 4):
        yield case(
            "log det⁺ of the forward moment",
            f"r = {dead}, layer 3",
            partial(volume, 3, dead),
            4 * dead,
        )


# --- nonlinear and residual chains
# -----------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """One-unit block w_down · silu(w_gate x) · w_up x with all weights t."""

    def __init__(self, t: float) -> None:
        super().__init__()
        self.gate, self.up, self.down = diagonal(t), diagonal(t), diagonal(t)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def activated(activation: Callable[[], nn.Module], t: float) -> nn.Sequential:
    """A weight t and an activation after it."""
    return nn.Sequential(diagonal(t), activation())


def residual_layer(t: float) -> nn.Module:
    return Residual(diagonal(t))


def partly_residual(depth: int, skipped: int, t: float) -> nn.Sequential:
    """A chain of ``depth`` weights with a residual connection around ``skipped`` of them."""
    skip = Residual(repeated(diagonal, skipped, t))
    return nn.Sequential(diagonal(t), skip, repeated(diagonal, depth - skipped - 1, t))


def chain_rows() -> Iterator[KnownRate]:
    x = normal_inputs()

    def moment(make: Callable[[float], nn.Module], count: int) -> Callable[[float], float]:
        return partial(output_moment, partial(repeated, make, count), x, None)

    for n in (1, 3, 6):
        yield KnownRate(
            "ReLU chain", f"L = {n}", moment(partial(activated, nn.ReLU), n), 2 * n, 0.5
        )
    for name, activation, slope in (
        ("tanh", nn.Tanh, 1.0),
        ("GELU", nn.GELU, 0.5),
        ("SiLU", nn.SiLU, 0.5),
    ):
        yield KnownRate(
            "smooth activation",
            f"{name}, L = 3",
            moment(partial(activated, activation), 3),
            6,
            slope**6,
            note="the activation is 0 at 0",
        )
    yield KnownRate("SwiGLU block", "one", moment(SwiGLU, 1), 6, float(x.pow(4).mean()) / 4)
    for n in (2, 3):
        yield KnownRate(
            "SwiGLU chain", f"n = {n}", moment(SwiGLU, n), 2 * (2**n - 1) * 3, span=(-2.0, -3.5)
        )
    yield KnownRate(
        "every layer residual",
        "L = 4",
        moment(residual_layer, 4),
        0,
        1.0,
        "plateau",
        span=(-3.0, -5.0),
    )
    for skipped in (1, 3):
        make = partial(partly_residual, 5, skipped)
        yield KnownRate(
            "residual block",
            f"L = 5, {skipped} of them skipped",
            moment(make, 1),
            2 * (5 - skipped),
        )


# --- attention, norms, quotient
# --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention without biases, (batch, time, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(y.transpose(1, 2).flatten(-2))


def dead_value_output(blocks: int, t: float) -> nn.Sequential:
    """Attention blocks whose value and output maps are diag(1, 1, 1, t), with random queries and
    keys.
    """
    generator = torch.Generator().manual_seed(0)
    chain = nn.Sequential()
    for _ in range(blocks):
        attention = Attention(width=4, heads=2).double()
        with torch.no_grad():
            for module in (attention.query, attention.key):
                module.weight.copy_(torch.randn(4, 4, generator=generator, dtype=FLOAT))
            for module in (attention.value, attention.output):
                module.weight.copy_(torch.diag(torch.tensor([1, 1, 1, t], dtype=FLOAT)))
        chain.append(attention)
    return chain


def around_a_norm(before: int, after: int, norm: nn.Module, t: float) -> nn.Sequential:
    """Maps t · 1 before and after a norm."""
    dying = partial(deep_linear, [1.0], 3, 3)
    return nn.Sequential(repeated(dying, before, t), norm, repeated(dying, after, t))


def horizontal_fisher(depth: int, t: float) -> float:
    """Fisher information of the scalar chain at w = (t, …, t), along the unit vector orthogonal to
    the gauge orbit.

    The orbit is that of the rescalings that keep the product: its tangent space at the symmetric
    point is all v with Σ v = 0.
    """
    model = repeated(diagonal, depth, t)
    x = normal_inputs(64)
    signs = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0).to(FLOAT)[:, None]
    names = [name for name, _ in model.named_parameters()]
    fisher = fisher_block(model, names, x, signs, lambda output, sign: (output * sign).sum())
    direction = torch.ones(depth, dtype=FLOAT) / math.sqrt(depth)
    return float(direction @ fisher @ direction)


def other_rows() -> Iterator[KnownRate]:
    tokens = torch.randn(32, 6, 4, generator=torch.Generator().manual_seed(1), dtype=FLOAT)
    for n in (1, 2):
        yield KnownRate(
            "attention, value-output route",
            f"{n} blocks",
            partial(output_moment, partial(dead_value_output, n), tokens, None),
            4 * n,
        )
    before, after, x = 2, 3, orthogonal_inputs(3)

    def moment(norm: nn.Module) -> Callable[[float], float]:
        return partial(output_moment, partial(around_a_norm, before, after, norm), x, None)

    case = f"{before} weights before, {after} after"
    yield KnownRate(
        "scale-free norm",
        case,
        moment(nn.RMSNorm(3, 0.0, False)),
        2 * after,
        1.0,
        note="all that the norm reads must die, not one direction of it",
    )
    yield KnownRate(
        "scale-free norm",
        f"{case}, eps = 1e-6",
        moment(nn.RMSNorm(3, 1e-6, False)),
        2 * (before + after),
        1e6,
        note="far below eps the norm is a gain of 1/√eps",
        span=(-3.0, -5.0),
    )
    yield KnownRate("norm-free", case, moment(nn.Identity()), 2 * (before + after), 1.0)
    for n in (2, 3, 5):
        yield KnownRate(
            "quotient of the scalar chain",
            f"L = {n}",
            partial(horizontal_fisher, n),
            2 * (n - 1),
            n,
        )


# --- where the rate collapses or hides
# -------------------------------------------------------------------------------


def rotated_relu(live: Tensor, gain: float, t: float) -> nn.Sequential:
    """relu(W x), W = gain · u uᵀ + t v vᵀ with the live direction u and v orthogonal to it."""
    return nn.Sequential(
        linear(gain * torch.outer(live, live) + t * torch.outer(across(live), across(live))),
        nn.ReLU(),
    )


def across(u: Tensor) -> Tensor:
    """The unit vector orthogonal to a unit vector of the plane."""
    return torch.stack([-u[1], u[0]])


def leaking(floor: float, gain: float, power: float, t: float) -> nn.Sequential:
    """A dying path and an independent one that leaks: second moment floor + gain · t^power."""
    return nn.Sequential(
        linear(torch.tensor([[math.sqrt(gain) * t ** (power / 2), math.sqrt(floor)]], dtype=FLOAT))
    )


def hidden_rows() -> Iterator[KnownRate]:
    gain = 2.0
    plane = torch.randn(500, 2, generator=torch.Generator().manual_seed(2), dtype=FLOAT)
    plane = torch.cat([plane, -plane])
    mixed, same = torch.tensor([0.6, -0.8], dtype=FLOAT), torch.tensor([0.6, 0.8], dtype=FLOAT)

    def reading(live: Tensor) -> Callable[[float], float]:
        return partial(output_moment, partial(rotated_relu, live, gain), plane, across(live))

    input_moment = float((plane @ mixed).square().mean())
    row = "rotated dead direction under ReLU"
    yield KnownRate(
        row,
        "3-4-5, mixed signs",
        reading(mixed),
        0,
        (12 * gain / 25) ** 2 * input_moment,
        "plateau",
        note="12c/25 is the amplitude, per unit of the live input",
    )
    yield KnownRate(
        row,
        "3-4-5, one sign",
        reading(same),
        2,
        span=(-3.0, -5.0),
        note="no collapse where all entries of the live direction have one sign",
    )
    yield KnownRate(
        "leak floor",
        "c0 = 1e-6, b = 1, m = 2",
        partial(output_moment, partial(leaking, 1e-6, 1.0, 2.0), orthogonal_inputs(2), None),
        0,
        1e-6,
        "floor",
        span=(-1.0, -5.0),
    )


def known_rates() -> list[KnownRate]:
    """Every case of every row."""
    return [*linear_rows(), *chain_rows(), *other_rows(), *hidden_rows()]


def local_slope(measure: Callable[[float], float], t: float, step: float = 1e-4) -> float:
    """The derivative d log y / d log t at t, by a central difference."""
    return (math.log(measure(t * math.exp(step))) - math.log(measure(t * math.exp(-step)))) / (
        2 * step
    )
