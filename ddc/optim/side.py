"""One side of a rescale, or one layer of a chain: read, turned and written as one vector a unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddc.optim.compiled import Hyper, Number, safe_power, scaled
from ddc.optim.stack import Context
from ddc.optim.stacked import Layers, StackedParameter, Term, unit_sums

#: A centred unit is zero if it is no longer than this many roundings of the mean row.
CENTRED_ROUNDING = 16


@dataclass
class Side:
    """One side of a rescale over L layers. All entries of a unit are one vector, one *block*."""

    parameters: list[StackedParameter]

    def __post_init__(self) -> None:
        self.unit_size = sum(p.unit_size for p in self.parameters)
        matrices = [p for p in self.parameters if p.params[0].ndim > 1]
        fan_in = matrices[0].fan_in if matrices else self.unit_size
        #: step scale over norm: s = √fan_in · rms = √(fan_in / unit_size) · rho; s = rho for
        #: vectors
        self.init_scale = math.sqrt(fan_in / self.unit_size)
        if self.unit_size > 1:
            for p in self.parameters:
                p.allocate()

    def sums(self, *terms: Term) -> Sequence[Tensor]:
        """Sums of per-unit terms over the tensors that hold the side, each (L, U)."""
        return unit_sums(self.parameters, *terms)

    def gather(self, rows: slice, context: Context) -> list[Layers]:
        """What a step reads of each parameter, and where it writes."""
        return [context.gather(p, rows) for p in self.parameters]

    def rounded_norm(self, layers: Sequence[Layers], decayed: bool) -> Tensor:
        """Norms of the weights as they were rounded to a lower precision, (L, U), with decay or
        apart from it.

        What this side dresses must follow these: a step too small for the weights' precision moves
        nothing.
        """

        def square(p: StackedParameter, i: int) -> Tensor:
            weight = p.read(layers[i])
            if not decayed:
                weight = weight / layers[i].decay
            if p.role.centred:
                weight = p.centre(weight)
            factor = p.factor(layers[i].after)
            return p.unit_sum((weight if factor is None else weight * factor).square())

        return self.sums(square)[0].sqrt()

    def read(self, layers: Sequence[Layers], decayed: bool = False) -> Block:
        """Weights and gradients in the coordinates in which the side is decomposed; ``decayed``:
        after decay.
        """
        originals, weights, grads, means = [], [], [], []
        taken: list[Tensor | None] = []  # the mean rows, in the coordinates of the weights
        for p, each in zip(self.parameters, layers, strict=True):
            weight, grad, mean = p.read(each), p.stack(each.grads), None
            originals.append(weight)
            if p.role.centred:
                mean = p.shards.row_mean(weight)
                weight, grad = weight - mean, p.centre(grad)
            if decayed:
                weight = weight * each.decay
            shift = mean
            if (factor := p.factor(each.before)) is not None:
                weight, grad = weight * factor, scaled(grad, safe_power(factor, -1))
                shift = None if mean is None else mean * factor
            taken.append(shift)
            weights.append(weight)
            grads.append(grad)
            means.append(mean)
        squares, log_norm_grad = self.sums(
            lambda p, i: p.unit_sum(weights[i].square()),
            lambda p, i: p.unit_sum(weights[i] * grads[i]),
        )
        if any(mean is not None for mean in means):
            # of rows that are all alike, centring leaves rounding, which is no direction
            size = self.sums(lambda p, i: _sum_of_rows(p, weights[i], taken[i]))[0]
            rounding = CENTRED_ROUNDING * torch.finfo(squares.dtype).eps
            alive = squares > rounding**2 * size
            squares, log_norm_grad = squares * alive, log_norm_grad * alive
        norm = squares.sqrt()
        return Block(self, layers, decayed, originals, weights, grads, means, norm, log_norm_grad)


def _sum_of_rows(p: StackedParameter, weight: Tensor, row: Tensor | None) -> Tensor:
    """Squares of a row, summed per unit, (L, U), as if all rows of the weight were this one."""
    if row is None:
        return weight.new_zeros(())
    return p.unit_sum(row.square()) * weight.shape[1]


@dataclass
class Block:
    """A side at one step: weights and gradients in centred, dressed coordinates, and what they sum
    to.

    ``decayed`` says whether weights are those after decay. ``originals`` are the weights as they
    were, and used up where those coordinates are the weights' own.
    """

    side: Side
    layers: Sequence[Layers]
    decayed: bool
    originals: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]
    means: list[Tensor | None]
    norm: Tensor
    log_norm_grad: Tensor

    def grad_norm_squared(self, norm: Tensor, step_scale: str) -> Tensor:
        """Σ over units of s² |g|², which is |g|² at the 1/√fan_in initialisation and invariant
        always; ``norm`` is rho, or what stands for it.
        """
        squares = self.side.sums(lambda p, i: p.unit_sum(self.grads[i].square()))[0]
        return (squares * self.scale(norm, step_scale).square()).sum()

    def scale(self, norm: Tensor, step_scale: str) -> Tensor:
        """The step scale s per unit."""
        return norm * self.side.init_scale if step_scale == "init" else norm

    def turn(
        self,
        norm: Tensor,
        log_change: Tensor,
        clock: Any,
        hyper: Hyper,
        along_gauge: Tensor | float = 0.0,
        waking: Tensor | None = None,
    ) -> Turn:
        """The step of the side: W becomes keep · W - turn · u, per unit.

        With u the rule's direction of x = rho g_tan and s the step scale, the turned side is
        W - eta s (u - <u, W> W / rho²), a combination of W and u; so only its two coefficients are
        worked out, and neither the projection nor the retraction takes a pass of its own.

        Args:
            norm: rho, or what stands for it.
            log_change: of the norm.
            clock: the rule's.
            hyper: hyperparameters.
            along_gauge: the part of ``log_change`` that moves all of the side, where the rest
                scales W alone.
            waking: units that have no direction to keep, so that u is neither tangential nor
                retracted; by default those of norm zero.
        """
        side, growth = self.side, log_change.exp()
        if side.unit_size == 1:
            return Turn([], growth, growth, growth * self.norm)
        # the rule's directions, of the tangential input
        inverse = safe_power(norm, -1)
        awake = self.norm > 0 if waking is None else ~waking
        leaning = self.log_norm_grad * inverse * awake
        directions: list[Tensor] = []
        ratio: Number = 1.0
        for p, layers, weight, grad in zip(
            side.parameters, self.layers, self.weights, self.grads, strict=True
        ):
            x = scaled(grad, p.spread(norm)).addcmul_(weight, p.spread(leaning), value=-1)
            u, ratio = p.rule.direction(x, layers.moments, clock, hyper, p)
            directions.append(p.centre(u) if p.role.centred else u)
        # how much of them is along the weights, and how much across
        scale = torch.as_tensor(ratio, dtype=norm.dtype, device=norm.device).view(-1, 1)
        products, squares = side.sums(
            lambda p, i: p.unit_sum(directions[i] * self.weights[i]),
            lambda p, i: p.unit_sum(directions[i].square()),
        )
        along = scale * inverse * products * awake
        across_squared = (scale.square() * squares - along.square()).clamp_(min=0)
        # the two coefficients
        stride = hyper["lr"] * self.scale(norm, hyper["step_scale"])
        if hyper["additive"]:
            stride = stride * torch.as_tensor(along_gauge).exp()
            keep, before = growth + stride * inverse * along, growth * self.norm
            woken = self._woken_norm(before, stride, scale * growth * products, across_squared)
            new_norm = torch.hypot(before, stride * across_squared.sqrt())
            new_norm = torch.where(awake, new_norm, woken)
            return Turn(directions, keep, stride * scale, new_norm)
        angle = stride * inverse
        stretch = (1 + angle.square() * across_squared).sqrt()
        if hyper["retract"]:
            growth = torch.where(awake, growth / stretch, growth)
        woken = self._woken_norm(self.norm, stride, scale * products, across_squared)
        new_norm = growth * torch.where(awake, self.norm * stretch, woken)
        return Turn(directions, growth * (1 + angle * along), growth * stride * scale, new_norm)

    @staticmethod
    def _woken_norm(norm: Tensor, stride: Tensor, product: Tensor, squares: Tensor) -> Tensor:
        """|W - stride · u|, given |W|, <W, u> and |u|²."""
        return (norm.square() - 2 * stride * product + stride.square() * squares).clamp_(0).sqrt()

    def write(self, turn: Turn) -> None:
        """Write the weights after the step: combined, decayed, undressed by the new factors, with
        the mean row back.
        """
        for i, (p, layers) in enumerate(zip(self.side.parameters, self.layers, strict=True)):
            decay = 1.0 if self.decayed else layers.decay
            weight = scaled(self.weights[i], p.spread(turn.keep * decay))
            if turn.directions:
                weight.addcmul_(turn.directions[i], p.spread(turn.turn * decay), value=-1)
            if (factor := p.factor(layers.after)) is not None:
                # what a dead factor dresses has no effect, and stays as it is
                undress = safe_power(factor, -1)
                weight = torch.where(undress > 0, scaled(weight, undress), self.originals[i])
            mean = self.means[i]
            p.write(layers, weight if mean is None else weight + mean)


class Turn(NamedTuple):
    """The step of a side over L layers of U units: u of each parameter, two coefficients, and the
    norms, (L, U).
    """

    directions: list[Tensor]
    keep: Tensor
    turn: Tensor
    norm: Tensor
