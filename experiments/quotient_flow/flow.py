r"""The flow of DDCAdam and of AdamW on a ReLU² network of one hidden layer, integrated by itself.

Written from the formulas of docs/method.md, without the package's gauges and optimizers, so that it
can disagree with them. With memories :math:`\tau_1, \tau_2` in units of time (steps times learning
rate), Adam's moments of an input x follow

.. math:: \tau_1 \dot m = x - m, \qquad \tau_2 \dot v = x^2 - v, \qquad
    u = \frac{m / (1 - e^{-t / \tau_1})}{\sqrt{v / (1 - e^{-t / \tau_2})} + \epsilon},

which is the limit of Adam with :math:`\beta_i = e^{-\eta / \tau_i}` as its learning rate
:math:`\eta` goes to zero (da Silva and Gazeau, arXiv:1810.13108). At t = 0, u is x / (|x| + eps).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

#: Weights and biases of both layers: (hidden, inputs), (hidden,), (classes, hidden), (classes,).
Weights = tuple[Tensor, ...]
#: Inputs of Adam, and velocities of the weights given Adam's directions.
Field = Callable[[Weights, Weights], tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]]]]


@dataclass(frozen=True)
class Clock:
    """What a learning rate leaves as it is.

    Attributes:
        time: of training: steps times learning rate.
        memories: of first and second moments, in the same unit.
        decay: as of AdamW.
        eps: of Adam.
    """

    time: float
    memories: tuple[float, float]
    decay: float
    eps: float

    def betas(self, lr: float) -> tuple[float, float]:
        """Of the moments, at a learning rate."""
        first, second = (math.exp(-lr / memory) for memory in self.memories)
        return first, second


def gradients(weights: Weights, x: Tensor, y: Tensor) -> Weights:
    """Of the mean cross-entropy of the network on a batch."""
    leaves = [w.detach().requires_grad_() for w in weights]
    w1, b1, w2, b2 = leaves
    loss = F.cross_entropy(F.linear(F.linear(x, w1, b1).relu().square(), w2, b2), y)
    return torch.autograd.grad(loss, leaves)


def adamw(decay: float) -> Field:
    """AdamW: each entry by itself, with decay on all."""

    def field(weights: Weights, grads: Weights):  # type: ignore[no-untyped-def]
        def velocities(u: list[Tensor]) -> list[Tensor]:
            return [-decay * w - each for w, each in zip(weights, u, strict=True)]

        return list(grads), velocities

    return field


def ddcadam(decay: float) -> Field:
    """DDCAdam under the rescale of each hidden unit, of degree 2, and the logit shift, radial rate
    1.
    """
    degrees = (2.0, 1.0)  # by which the log-norms of both sides move with the radial coordinate
    size = math.hypot(*degrees)

    def field(weights: Weights, grads: Weights):  # type: ignore[no-untyped-def]
        w1, b1, w2, b2 = weights
        g1, h1, g2, h2 = grads
        # plus and minus side of each unit as a row; the head is read centred over classes
        plus, g_plus = (torch.cat([w, b[:, None]], 1) for w, b in ((w1, b1), (g1, h1)))
        minus, g_minus = ((w - w.mean(0)).T for w in (w2, g2))
        bias, g_bias = b2 - b2.mean(), h2 - h2.mean()
        inner = [(g * w).sum(1) for g, w in ((g_plus, plus), (g_minus, minus))]
        norms = [w.norm(dim=1) for w in (plus, minus)]
        inputs = [
            norms[0][:, None] * g_plus - (inner[0] / norms[0])[:, None] * plus,
            norms[1][:, None] * g_minus - (inner[1] / norms[1])[:, None] * minus,
            (degrees[0] * inner[0] + degrees[1] * inner[1]) / size,
            g_bias,
        ]

        def velocities(u: list[Tensor]) -> list[Tensor]:
            u_plus, u_minus, u_radial, u_bias = u
            u_minus = u_minus - u_minus.mean(1, keepdim=True)
            classes, hidden = w2.shape
            scales = [
                math.sqrt(w1.shape[1] / plus.shape[1]) * norms[0],
                math.sqrt(hidden / classes) * norms[1],
            ]
            moved = []
            for w, direction, norm, scale, degree in zip(
                (plus, minus), (u_plus, u_minus), norms, scales, degrees, strict=True
            ):
                along = ((direction * w).sum(1) / norm**2)[:, None] * w
                growth = -degree / size * u_radial - decay
                moved.append(growth[:, None] * w - scale[:, None] * (direction - along))
            up, down = moved
            return [
                up[:, :-1],
                up[:, -1],
                down.T,
                -decay * bias - (u_bias - u_bias.mean()),
            ]

        return inputs, velocities

    return field


def integrate(
    weights: Weights, field: Field, x: Tensor, y: Tensor, clock: Clock, steps: int
) -> Weights:
    """The weights after the time of the clock, by the classical Runge-Kutta method.

    Args:
        weights: at the start, in float64.
        field: :func:`adamw` or :func:`ddcadam`.
        x: inputs, the same at every time: (examples, inputs).
        y: labels.
        clock: time, memories, decay and eps.
        steps: of the method, short ones first, where the corrected moments change fastest: the i-th
            ends at the time (i / steps)² of the whole.
    """
    times = [clock.time * (i / steps) ** 2 for i in range(steps + 1)]
    first, second = clock.memories
    count = len(weights)

    def slope(t: float, state: list[Tensor]) -> list[Tensor]:
        here = tuple(state[:count])
        inputs, velocities = field(here, gradients(here, x, y))
        n = len(inputs)
        m, v = state[count : count + n], state[count + n :]
        if t == 0:
            u = [each / (each.abs() + clock.eps) for each in inputs]
        else:
            c1, c2 = -math.expm1(-t / first), -math.expm1(-t / second)
            u = [
                (a / c1) / ((b.clamp(min=0) / c2).sqrt() + clock.eps)
                for a, b in zip(m, v, strict=True)
            ]
        return [
            *velocities(u),
            *((each - a) / first for each, a in zip(inputs, m, strict=True)),
            *((each.square() - b) / second for each, b in zip(inputs, v, strict=True)),
        ]

    moments = [torch.zeros_like(each) for each in field(weights, gradients(weights, x, y))[0]]
    state = [*weights, *moments, *(m.clone() for m in moments)]
    for t, after in pairwise(times):
        h = after - t
        k1 = slope(t, state)
        k2 = slope(t + h / 2, [s + h / 2 * k for s, k in zip(state, k1, strict=True)])
        k3 = slope(t + h / 2, [s + h / 2 * k for s, k in zip(state, k2, strict=True)])
        k4 = slope(t + h, [s + h * k for s, k in zip(state, k3, strict=True)])
        state = [
            s + h / 6 * (a + 2 * b + 2 * c + d)
            for s, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
        ]
    return tuple(state[:count])
