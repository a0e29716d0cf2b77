"""One side of a rescale, or one layer of a chain: read, turned and written as one vector a unit."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddc.optim.compiled import Hyper, Number, safe_power, scaled
from ddc.optim.fused import OF_SIDE, FusedPart, fuses
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
        parts: list[Part | FusedPart] = [
            FusedPart(p, each)
            if each.fused and not decayed and fuses(p, each, OF_SIDE)
            else Part(p, each, decayed)
            for p, each in zip(self.parameters, layers, strict=True)
        ]
        squares, log_norm_grad = self.reduced([part.sums for part in parts])
        if any(p.role.centred for p in self.parameters):
            # of rows that are all alike, centring leaves rounding, which is no direction
            (means,) = self.reduced([(part.mean_squares,) for part in parts])
            rounding = CENTRED_ROUNDING * torch.finfo(squares.dtype).eps
            alive = squares > rounding**2 * means
            squares, log_norm_grad = squares * alive, log_norm_grad * alive
        return Block(self, decayed, parts, squares.sqrt(), log_norm_grad)

    def reduced(self, sums: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        """Sums per unit, one after the other of each parameter, over the parameters and over all
        ranks that have parts of them, each (L, U).
        """
        totals = (functools.reduce(operator.add, each) for each in zip(*sums, strict=True))
        return self.parameters[0].shards.reduced(*totals)


class Part:
    """One parameter of a side at one step: weights and gradients in centred, dressed coordinates,
    and the rule's direction.

    The weights as they were are kept, and used up where those coordinates are the weights' own.
    """

    def __init__(self, p: StackedParameter, layers: Layers, decayed: bool) -> None:
        self.p, self.layers = p, layers
        self.original = weight = p.read(layers)
        grad = p.stack(layers.grads)
        self.mean: Tensor | None = None
        if p.role.centred:
            self.mean = p.shards.row_mean(weight)
            weight, grad = weight - self.mean, p.centre(grad)
        if decayed:
            weight = weight * layers.decay
        self.taken = self.mean  # in the coordinates of the weights
        if (factor := p.factor(layers.before)) is not None:
            weight, grad = weight * factor, scaled(grad, safe_power(factor, -1))
            self.taken = None if self.mean is None else self.mean * factor
        self.weight, self.grad = weight, grad
        self.u: Tensor | None = None

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Squares of the weights, and their products with the gradients, (L, U) each."""
        return self.p.unit_sum(self.weight.square()), self.p.unit_sum(self.weight * self.grad)

    @property
    def mean_squares(self) -> Tensor:
        """Squares of what centring takes off, (L, U); zero where it takes nothing."""
        if self.taken is None:
            return self.weight.new_zeros(())
        rows = self.weight.shape[1] // self.taken.shape[1]
        return self.p.unit_sum(self.taken.square()) * rows

    @property
    def grad_squares(self) -> Tensor:
        """Squares of the gradients, (L, U)."""
        return self.p.unit_sum(self.grad.square())

    def direct(
        self, norm: Tensor, leaning: Tensor, clock: Any, hyper: Hyper
    ) -> tuple[Tensor, Tensor, Number]:
        """The rule's direction of norm g - leaning w, which takes the gradients' place: its
        products with the weights, its squares, and its factor.
        """
        p = self.p
        x = scaled(self.grad, p.spread(norm)).addcmul_(self.weight, p.spread(leaning), value=-1)
        u, factor = p.rule.direction(x, self.layers.moments, clock, hyper, p)
        self.u = u = p.centre(u) if p.role.centred else u
        return p.unit_sum(u * self.weight), p.unit_sum(u.square()), factor

    def write(self, keep: Tensor, turn: Tensor | None) -> None:
        """Weights become keep w - turn u, undressed by the new factors, with the mean row back."""
        p = self.p
        weight = scaled(self.weight, p.spread(keep))
        if self.u is not None and turn is not None:
            weight.addcmul_(self.u, p.spread(turn), value=-1)
        if (factor := p.factor(self.layers.after)) is not None:
            # what a dead factor dresses has no effect, and stays as it is
            undress = safe_power(factor, -1)
            weight = torch.where(undress > 0, scaled(weight, undress), self.original)
        p.write(self.layers, weight if self.mean is None else weight + self.mean)


@dataclass
class Block:
    """A side at one step: its parameters, and what their weights and gradients sum to.

    ``decayed`` says whether weights are those after decay.
    """

    side: Side
    decayed: bool
    parts: Sequence[Part | FusedPart]
    norm: Tensor
    log_norm_grad: Tensor

    def grad_norm_squared(self, norm: Tensor, step_scale: str) -> Tensor:
        """Σ over units of s² |g|², which is |g|² at the 1/√fan_in initialisation and invariant
        always; ``norm`` is rho, or what stands for it.
        """
        (squares,) = self.side.reduced([(part.grad_squares,) for part in self.parts])
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
            return Turn(growth, None, growth * self.norm)
        # the rule's directions, of the tangential input
        inverse = safe_power(norm, -1)
        awake = self.norm > 0 if waking is None else ~waking
        leaning = self.log_norm_grad * inverse * awake
        directed = [part.direct(norm, leaning, clock, hyper) for part in self.parts]
        # how much of them is along the weights, and how much across
        ratio: Number = directed[0][2]
        scale = torch.as_tensor(ratio, dtype=norm.dtype, device=norm.device).view(-1, 1)
        products, squares = side.reduced([each[:2] for each in directed])
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
            return Turn(keep, stride * scale, new_norm)
        angle = stride * inverse
        stretch = (1 + angle.square() * across_squared).sqrt()
        if hyper["retract"]:
            growth = torch.where(awake, growth / stretch, growth)
        woken = self._woken_norm(self.norm, stride, scale * products, across_squared)
        new_norm = growth * torch.where(awake, self.norm * stretch, woken)
        return Turn(growth * (1 + angle * along), growth * stride * scale, new_norm)

    @staticmethod
    def _woken_norm(norm: Tensor, stride: Tensor, product: Tensor, squares: Tensor) -> Tensor:
        """|W - stride · u|, given |W|, <W, u> and |u|²."""
        return (norm.square() - 2 * stride * product + stride.square() * squares).clamp_(0).sqrt()

    def write(self, turn: Turn) -> None:
        """Write the weights after the step: combined, decayed, undressed by the new factors, with
        the mean row back.
        """
        for part in self.parts:
            decay = 1.0 if self.decayed else part.layers.decay
            turned = None if turn.turn is None else turn.turn * decay
            part.write(turn.keep * decay, turned)


class Turn(NamedTuple):
    """The step of a side over L layers of U units: two coefficients, the second None where nothing
    turns, and the norms, (L, U).
    """

    keep: Tensor
    turn: Tensor | None
    norm: Tensor
