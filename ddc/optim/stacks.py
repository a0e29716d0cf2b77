"""The arithmetic of a step, on parameters of equal role and shape stacked over the layers of a
model.

Shapes in this file: L layers in a stack, U units of a gauge. A stacked parameter is (L, *shape), a
quantity per unit is (L, U). There are loops over stacks and over the sides of a gauge, never over
layers or units. Where parameters are split over ranks (:mod:`ddc.optim.sharding`), a stacked
parameter is this rank's part of it, and a quantity per unit is whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddc.optim.sharding import check_split_alike
from ddc.optim.stacked import (
    SHARED,
    Arithmetic,
    Bias,
    Context,
    Hyper,
    Layers,
    StackedParameter,
    Term,
    adam_,
    layers_at_once,
    per_layer,
    safe_power,
    scaled,
    unit_sums,
)


class Pairs(NamedTuple):
    """Weights and gradients of some layers, and the factor of decoupled weight decay."""

    weights: list[Tensor]
    grads: list[Tensor]
    decay: float | Tensor


class FreeStack:
    """Parameters that no rescale decomposes: AdamW, with second moments averaged and rows centred
    by role.
    """

    shared = SHARED

    def __init__(self, parameter: StackedParameter) -> None:
        self.parameter = parameter
        parameter.allocate()
        self.step_count = torch.zeros(len(parameter.params), device=parameter.params[0].device)
        first = parameter.params[0]
        self.at_once = layers_at_once(len(parameter.params), first.numel(), first.device)
        self.single_chunk = self.at_once == len(parameter.params)
        self.move, self.measure = (
            Arithmetic(f, first.device) for f in (FreeStack._move, FreeStack._measure)
        )

    @property
    def parameters(self) -> list[StackedParameter]:
        return [self.parameter]

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """State by parameter."""
        p = self.parameter
        return {
            param: {"step": self.step_count[i], **p.state(i)} for i, param in enumerate(p.params)
        }

    def grad_norm_squared(self, context: Context) -> Tensor:
        """|g|², of the centred or dressed gradient where the role says so."""
        p = self.parameter
        chunks = (
            p.gather(rows, context) for rows in context.chunks([True] * len(p.params), self.at_once)
        )
        return torch.stack(
            [self.measure(context.compiles(p), self, layers) for layers in chunks]
        ).sum()

    def _measure(self, layers: Layers) -> Tensor:
        return self.parameter.shards.reduced(self._gradient(layers).square().sum())[0]

    def _gradient(self, layers: Layers) -> Tensor:
        p, gradient = self.parameter, self.parameter.stack(layers.grads)
        if (factor := p.factor(layers.before)) is not None:
            gradient = scaled(gradient, safe_power(factor, -1))
        return p.centre(gradient) if p.role.centred else gradient

    def step(self, context: Context) -> None:
        p = self.parameter
        hyper = context.hyper(p)
        has_gradient = [param.grad is not None for param in p.params]
        for rows in context.chunks(has_gradient, self.at_once):
            self.step_count[rows] += 1
            compiled = all(has_gradient) and context.compiles(p)
            self.move(compiled, self, p.gather(rows, context), self.step_count[rows], hyper)

    def _move(self, layers: Layers, step_count: Tensor, hyper: Hyper) -> None:
        p, weight = self.parameter, self.parameter.stack(layers.weights)
        bias = Bias.at(step_count, hyper.betas, p.dtype)
        assert layers.moments is not None
        u = adam_(self._gradient(layers), layers.moments, bias, hyper.betas, hyper.eps, p.averaging)
        if p.role.centred:
            u = p.centre(u)
        u = scaled(u, per_layer(-hyper.lr * bias.ratio, u))
        if (factor := p.factor(layers.after)) is not None:
            u = scaled(u, safe_power(factor, -1))
        if p.role.centred:  # the mean row is gauge: decay leaves it
            u = u + p.shards.row_mean(weight) * (1 - layers.decay)
        moved = scaled(weight, layers.decay).add_(u)
        factor = p.factor(layers.relaxed)
        layers.write(moved if factor is None else moved / factor)


@dataclass
class Side:
    """One side of a rescale over L layers. All entries of a unit are one vector, one *block*."""

    parameters: list[StackedParameter]

    def __post_init__(self) -> None:
        self.unit_size = sum(p.unit_size for p in self.parameters)
        matrices = [p.params[0] for p in self.parameters if p.params[0].ndim == 2]
        fan_in = matrices[0].shape[1] if matrices else self.unit_size
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
        return [p.gather(rows, context) for p in self.parameters]

    def rounded_norm(self, layers: Sequence[Layers], decayed: bool) -> Tensor:
        """Norms of the weights as they were rounded to a lower precision, (L, U), with decay or
        apart from it.

        What this side dresses must follow these: a step too small for the weights' precision moves
        nothing.
        """

        def square(p: StackedParameter, i: int) -> Tensor:
            weight = p.stack(layers[i].weights)
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
        for p, (weights_, grads_, _, before, _, _, decay) in zip(
            self.parameters, layers, strict=True
        ):
            weight, grad, mean = p.stack(weights_), p.stack(grads_), None
            originals.append(weight)
            if p.role.centred:
                mean = p.shards.row_mean(weight)
                weight, grad = weight - mean, p.centre(grad)
            if decayed:
                weight = weight * decay
            if (factor := p.factor(before)) is not None:
                weight, grad = weight * factor, scaled(grad, safe_power(factor, -1))
            weights.append(weight)
            grads.append(grad)
            means.append(mean)
        squares, log_norm_grad = self.sums(
            lambda p, i: p.unit_sum(weights[i].square()),
            lambda p, i: p.unit_sum(weights[i] * grads[i]),
        )
        return Block(
            self, layers, decayed, originals, weights, grads, means, squares.sqrt(), log_norm_grad
        )


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

    def grad_norm_squared(self, step_scale: str) -> Tensor:
        """Σ over units of s² |g|², which is |g|² at the 1/√fan_in initialisation and invariant
        always.
        """
        squares = self.side.sums(lambda p, i: p.unit_sum(self.grads[i].square()))[0]
        return (squares * self.scale(self.norm, step_scale).square()).sum()

    def scale(self, norm: Tensor, step_scale: str) -> Tensor:
        """The step scale s per unit."""
        return norm * self.side.init_scale if step_scale == "init" else norm

    def turn(
        self,
        norm: Tensor,
        log_change: Tensor,
        bias: Bias,
        hyper: Hyper,
        along_gauge: Tensor | float = 0.0,
    ) -> Turn:
        """The step of the side: W becomes keep · W - turn · u, per unit.

        With u the Adam direction of x = rho g_tan and s the step scale, the turned side is W - eta
        s (u - <u, W> W / rho²), a combination of W and u; so only its two coefficients are worked
        out, and neither the projection nor the retraction takes a pass of its own.

        Args:
            norm: rho, or what stands for it.
            log_change: of the norm.
            bias: Adam's bias corrections.
            hyper: hyperparameters.
            along_gauge: the part of ``log_change`` that moves all of the side, where the rest
                scales W alone.
        """
        side, growth = self.side, log_change.exp()
        if side.unit_size == 1:
            return Turn([], growth, growth, growth * self.norm)
        inverse, alive = safe_power(norm, -1), self.norm > 0
        directions: list[Tensor] = []
        for p, layers, weight, grad in zip(
            side.parameters, self.layers, self.weights, self.grads, strict=True
        ):
            x = scaled(grad, p.spread(norm)).addcmul_(
                weight, p.spread(self.log_norm_grad * inverse), value=-1
            )
            assert layers.moments is not None
            u = adam_(x, layers.moments, bias, hyper.betas, hyper.eps, p.averaging)
            directions.append(p.centre(u) if p.role.centred else u)
        scale = bias.ratio[:, None]
        products, squares = side.sums(
            lambda p, i: p.unit_sum(directions[i] * self.weights[i]),
            lambda p, i: p.unit_sum(directions[i].square()),
        )
        along = scale * inverse * products * alive
        across_squared = (scale.square() * squares - along.square()).clamp_(min=0)
        stride = hyper.lr * self.scale(norm, hyper.step_scale)
        if hyper.additive:
            stride = stride * torch.as_tensor(along_gauge).exp()
            keep = growth + stride * inverse * along
            new_norm = torch.hypot(growth * self.norm, stride * across_squared.sqrt())
            return Turn(directions, keep, stride * scale, new_norm)
        angle = stride * inverse
        stretch = (1 + angle.square() * across_squared).sqrt()
        if hyper.retract:
            growth = torch.where(alive, growth / stretch, growth)
        new_norm = growth * torch.where(alive, self.norm * stretch, stride * across_squared.sqrt())
        return Turn(directions, growth * (1 + angle * along), growth * stride * scale, new_norm)

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
            layers.write(weight if mean is None else weight + mean)


class Turn(NamedTuple):
    """The step of a side over L layers of U units: u of each parameter, two coefficients, and the
    norms, (L, U).
    """

    directions: list[Tensor]
    keep: Tensor
    turn: Tensor
    norm: Tensor


def mode_step(
    mode: str, gradient: Tensor, modes: dict[str, Tensor], bias: Bias, hyper: Hyper
) -> Tensor:
    """Adam's step of a radial or vertical mode, whose moments are in ``modes``; like the
    gradient.
    """
    u = adam_(
        gradient,
        (modes[f"{mode}_exp_avg"], modes[f"{mode}_exp_avg_sq"]),
        bias,
        hyper.betas,
        hyper.eps,
    )
    return u * per_layer(-hyper.lr * hyper.radial_rate * bias.ratio, gradient)


class PolarStack:
    """One rescale gauge in L layers: norms and directions of its sides step apart."""

    shared = SHARED

    def __init__(
        self,
        degree: float,
        plus: list[StackedParameter],
        minus: list[StackedParameter],
        dressed: list[StackedParameter],
        vertical: bool,
    ) -> None:
        self.degree, self.dressed = degree, dressed
        self.plus, self.minus = Side(plus), Side(minus) if minus else None
        check_split_alike((p.names[0], p.params[0]) for p in (*plus, *minus, *dressed))
        first = plus[0]
        self.layers = len(first.params)
        options: dict[str, Any] = {"device": first.params[0].device}
        self.step_count = torch.zeros(self.layers, **options)
        self.units = first.units
        modes = (("radial",) + (("vertical",) if vertical else ())) if minus else ()
        self.modes = {
            f"{mode}_{moment}": torch.zeros(self.layers, self.units, dtype=first.dtype, **options)
            for mode in modes
            for moment in ("exp_avg", "exp_avg_sq")
        }
        layer_size = sum(p.params[0].numel() for p in self.parameters)
        self.at_once = layers_at_once(self.layers, layer_size, first.params[0].device)
        self.single_chunk = self.at_once == self.layers
        functions = PolarStack._move, PolarStack._measure
        self.move, self.measure = (Arithmetic(f, first.params[0].device) for f in functions)

    @property
    def parameters(self) -> list[StackedParameter]:
        return self.plus.parameters + (self.minus.parameters if self.minus else [])

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """State by parameter; that of the gauge's modes is with the first parameter of each
        layer.
        """
        states = {
            param: {"step": self.step_count[i], **p.state(i)}
            for p in self.parameters
            for i, param in enumerate(p.params)
        }
        for i, param in enumerate(self.plus.parameters[0].params):
            states[param] |= {key: value[i] for key, value in self.modes.items()}
        return states

    def grad_norm_squared(self, context: Context) -> Tensor:
        """Squared norm of the gradient in the invariant metric, all layers together."""
        first, measured = self.plus.parameters[0], []
        for rows in context.chunks([True] * self.layers, self.at_once):
            minus = self.minus.gather(rows, context) if self.minus is not None else []
            layers = self.plus.gather(rows, context), minus
            measured.append(
                self.measure(
                    context.compiles(first), self, *layers, context.hyper(first).step_scale
                )
            )
        norms, squares = zip(*measured, strict=True)
        context.norms[self] = (torch.cat(norms),) * 2
        return torch.stack(squares).sum()

    def _measure(
        self, plus_layers: Sequence[Layers], minus_layers: Sequence[Layers], step_scale: str
    ) -> tuple[Tensor, Tensor]:
        """The plus norms, and the squared norm of the gradient."""
        plus = self.plus.read(plus_layers)
        squared = plus.grad_norm_squared(step_scale)
        if self.minus is not None:
            squared = squared + self.minus.read(minus_layers).grad_norm_squared(step_scale)
        return plus.norm, squared

    def step(self, context: Context) -> None:
        """Move all layers that have a gradient. Afterwards ``context`` has this stack's plus
        norms.
        """
        has_gradient = [
            any(p.params[i].grad is not None for p in self.parameters) for i in range(self.layers)
        ]
        chunks = context.chunks(has_gradient, self.at_once)
        if all(has_gradient):
            compiled = context.compiles(self.plus.parameters[0])
            norms = [self._step(rows, context, compiled) for rows in chunks]
            old, new = map(torch.cat, zip(*norms, strict=True))
        else:  # the layers left alone may still dress others
            old = self.plus.read(self.plus.gather(slice(None), context)).norm
            new = old.clone()
            for rows in chunks:
                old[rows], new[rows] = self._step(rows, context, compiled=False)
        context.norms[self] = (old, new)

    def _step(self, rows: slice, context: Context, compiled: bool) -> tuple[Tensor, Tensor]:
        """One step of the given layers; returns the plus norms before and after, decay apart where
        it comes last.
        """
        self.step_count[rows] += 1
        plus = self.plus.gather(rows, context)
        minus = self.minus.gather(rows, context) if self.minus is not None else []
        dressed = [Pairs(*p.pairs(rows), context.decay(p)) for p in self.dressed]
        modes = {key: value[rows] for key, value in self.modes.items()}
        hyper = context.hyper(self.plus.parameters[0])
        old, new = self.move(
            compiled, self, plus, minus, dressed, modes, self.step_count[rows], hyper
        )
        return old, new

    def _move(
        self,
        plus_layers: Sequence[Layers],
        minus_layers: Sequence[Layers],
        dressed: Sequence[Pairs],
        modes: dict[str, Tensor],
        step_count: Tensor,
        hyper: Hyper,
    ) -> tuple[Tensor, Tensor]:
        """Move both sides; the plus norms before and after."""
        first = self.plus.parameters[0]
        bias = Bias.at(step_count, hyper.betas, first.dtype)
        plus = self.plus.read(plus_layers, hyper.additive)
        old = plus.norm
        if self.minus is None:  # the plus norm is the gauge coordinate: it keeps still
            turn = plus.turn(old, torch.zeros_like(old), bias, hyper)
        else:
            minus = self.minus.read(minus_layers, hyper.additive)
            plus_change, minus_change, relaxed = self._radial(
                plus, minus, dressed, modes, bias, hyper
            )
            # A dead side (norm 0) has no direction. It steps in the other's covariant scale until
            # it has one.
            plus_scale = torch.where(old > 0, old, safe_power(minus.norm, -1 / self.degree))
            minus_scale = torch.where(minus.norm > 0, minus.norm, safe_power(old, -self.degree))
            turn = plus.turn(plus_scale, plus_change, bias, hyper, relaxed)
            minus.write(minus.turn(minus_scale, minus_change, bias, hyper, -self.degree * relaxed))
        plus.write(turn)
        rounded = first.params[0].dtype != first.dtype
        return old, self.plus.rounded_norm(plus_layers, hyper.additive) if rounded else turn.norm

    def _radial(
        self,
        plus: Block,
        minus: Block,
        dressed: Sequence[Pairs],
        modes: dict[str, Tensor],
        bias: Bias,
        hyper: Hyper,
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Changes of log rho_P and log rho_M: the shared radial step and the vertical mode.

        The third is how far ``balance`` moves along the gauge, as log rho_P has it, which is in the
        first two as well.
        """
        k, size = self.degree, math.sqrt(1 + self.degree**2)

        # What the plus side dresses is undressed by its new norms, so it does not feel the plus
        # side's move.
        plus_grad = plus.log_norm_grad
        if self.dressed:

            def log_norm_grad(p: StackedParameter, i: int) -> Tensor:
                felt = p.unit_sum(p.stack(dressed[i].weights) * p.stack(dressed[i].grads))
                return felt * dressed[i].decay if hyper.additive else felt

            plus_grad = plus_grad - k * unit_sums(self.dressed, log_norm_grad)[0]
        radial = mode_step(
            "radial", (k * plus_grad + minus.log_norm_grad) / size, modes, bias, hyper
        )
        if hyper.vertical == "freeze":
            return radial * (k / size), radial / size, 0.0
        relaxed: Tensor | float = 0.0
        if hyper.vertical == "adam":
            vertical = mode_step(
                "vertical", (plus_grad - k * minus.log_norm_grad) / size, modes, bias, hyper
            )
        else:
            gap = plus.norm.log() - k * minus.norm.log()
            vertical = torch.where(gap.isfinite(), -hyper.lr * hyper.radial_rate * gap / size, 0.0)
            relaxed = vertical / size
        return (k * radial + vertical) / size, (radial - k * vertical) / size, relaxed


class ChainStack:
    """A chain of layers, each a block as a whole, alike ones stacked; the total log-norm steps,
    shared equally.

    Where other layers of the chain are hidden, and step elsewhere, the norms of these keep still.
    """

    shared, single_chunk = SHARED, True

    def __init__(self, layers: list[StackedParameter], still: bool, vertical: bool) -> None:
        self.sides = [Side([layer]) for layer in layers]
        self.still = still
        first = layers[0]
        options: dict[str, Any] = {"device": first.params[0].device}
        self.step_count = torch.zeros(1, **options)
        self.layers = [len(layer.params) for layer in layers]
        self.move = Arithmetic(ChainStack._move, first.params[0].device)
        sizes = (
            {} if still else {"radial": 1} | ({"vertical": sum(self.layers)} if vertical else {})
        )
        self.modes = {
            f"{mode}_{moment}": torch.zeros(size, dtype=first.dtype, **options)
            for mode, size in sizes.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }

    @property
    def parameters(self) -> list[StackedParameter]:
        return [side.parameters[0] for side in self.sides]

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """State by parameter; that of the chain's modes is with the first layer."""
        states = {
            param: {"step": self.step_count[0], **p.state(i)}
            for p in self.parameters
            for i, param in enumerate(p.params)
        }
        states[self.parameters[0].params[0]] |= self.modes
        return states

    def grad_norm_squared(self, context: Context) -> Tensor:
        """Squared norm of the gradient in the invariant metric."""
        step_scale = context.hyper(self.parameters[0]).step_scale
        blocks = [side.read(side.gather(slice(None), context)) for side in self.sides]
        return torch.stack([block.grad_norm_squared(step_scale) for block in blocks]).sum()

    def step(self, context: Context) -> None:
        """Move all layers, if any has a gradient."""
        if all(param.grad is None for p in self.parameters for param in p.params):
            return
        self.step_count += 1
        layers = [side.gather(slice(None), context) for side in self.sides]
        hyper = context.hyper(self.parameters[0])
        self.move(
            context.compiles(self.parameters[0]), self, layers, self.modes, self.step_count, hyper
        )

    def _move(
        self,
        layers: Sequence[Sequence[Layers]],
        modes: dict[str, Tensor],
        step_count: Tensor,
        hyper: Hyper,
    ) -> None:
        bias = Bias.at(step_count, hyper.betas, self.parameters[0].dtype)
        blocks = [
            side.read(each, hyper.additive) for side, each in zip(self.sides, layers, strict=True)
        ]
        radial = (
            each.unsqueeze(1).split(self.layers)
            for each in self._radial(blocks, modes, bias, hyper)
        )
        for block, change, relaxed in zip(blocks, *radial, strict=True):
            block.write(block.turn(block.norm, change, bias, hyper, relaxed))

    def _radial(
        self, blocks: list[Block], modes: dict[str, Tensor], bias: Bias, hyper: Hyper
    ) -> tuple[Tensor, Tensor]:
        """Changes of the layers' log-norms, (L,), and of these, how far ``balance`` moves along the
        gauge.
        """
        log_norm_grads = torch.cat([block.log_norm_grad.flatten() for block in blocks])
        none = torch.zeros_like(log_norm_grads)
        if self.still:
            return none, none
        size = math.sqrt(sum(self.layers))
        shared = (
            mode_step("radial", log_norm_grads.sum(0, keepdim=True) / size, modes, bias, hyper)
            / size
        )
        if hyper.vertical == "freeze":
            return shared.expand(sum(self.layers)), none
        if hyper.vertical == "adam":
            vertical = mode_step(
                "vertical", log_norm_grads - log_norm_grads.mean(), modes, bias, hyper
            )
            return shared + vertical - vertical.mean(), none
        log_norms = torch.cat([block.norm.flatten() for block in blocks]).log()
        gap = torch.where(log_norms.isfinite().all(), log_norms - log_norms.mean(), 0.0)
        relaxed = -hyper.lr * hyper.radial_rate * gap
        return shared + relaxed, relaxed
