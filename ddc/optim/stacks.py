"""The arithmetic of a step, on parameters of equal role and shape stacked over the layers of a model.

Shapes in this file: L layers in a stack, U units of a gauge. A stacked parameter is (L, *shape), a quantity
per unit is (L, U). There are loops over stacks and over the sides of a gauge, never over layers or units.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddc.optim.averaging import Averaging
from ddc.optim.plan import Role, compute_dtype

Group = dict[str, Any]
#: Hyperparameters in which all parameters under one gauge must agree; weight decay is each one's own.
SHARED = ("lr", "betas", "eps", "radial_rate", "vertical", "step_scale", "retract")


class Bias(NamedTuple):
    """Adam's bias corrections 1 - beta1^t and √(1 - beta2^t), each (L,)."""

    first: Tensor
    root_second: Tensor

    @classmethod
    def at(cls, step: Tensor, betas: tuple[float, float], dtype: torch.dtype) -> Bias:
        """At these step counts; through expm1, which does not cancel where beta^t is near 1."""
        first, second = (
            (step.to(dtype) * math.log(beta)).expm1().neg() if beta else torch.ones_like(step, dtype=dtype)
            for beta in betas
        )
        return cls(first, second.sqrt())


def adam_(
    x: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    bias: Bias,
    betas: tuple[float, float],
    eps: float,
    averaging: Averaging | None = None,
) -> Tensor:
    """Take x into the moments in place and return Adam's direction but for a factor of √(1 - beta2^t) / (1 - beta1^t).

    That factor, one number a layer, is left to the caller to fold into its own. Source: Kingma and Ba,
    arXiv:1412.6980, algorithm 1 and the note after it.
    """
    exp_avg.lerp_(x, 1 - betas[0])
    if averaging is None:
        exp_avg_sq.mul_(betas[1]).addcmul_(x, x, value=1 - betas[1])
    else:
        # no lerp_, which makes nan of what has overflowed to inf
        exp_avg_sq.mul_(betas[1]).add_(averaging.mean(x.square()), alpha=1 - betas[1])
    denominator = exp_avg_sq.sqrt().add_(per_layer(eps * bias.root_second, x))
    if averaging is None:
        return torch.div(exp_avg, denominator, out=denominator)
    return averaging.divide(exp_avg, denominator)


def per_layer(values: Tensor, like: Tensor) -> Tensor:
    """Shape (L,) to what broadcasts against a stacked tensor."""
    return values.view(-1, *(1,) * (like.ndim - 1))


#: What puts norms into :class:`Context`: a stack of polar or of inner gauges.
Dresser = Hashable


@dataclass(eq=False)
class StackedParameter:
    """One role, played by the parameters of L layers, with their moments.

    ``exp_avg`` is None where there is nothing but a radial step (a gamma by itself).
    """

    role: Role
    names: list[str]
    params: list[Tensor]
    groups: list[int]
    dressed_by: tuple[Dresser, Tensor] | None = None
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.params[0])

    def allocate(self) -> None:
        """Make the moments."""
        shape = (len(self.params), *self.params[0].shape)
        reduced = shape if self.role.averaging is None else self.role.averaging.reduced_shape(shape)
        device = self.params[0].device
        self.exp_avg = torch.zeros(shape, dtype=self.dtype, device=device)
        self.exp_avg_sq = torch.zeros(reduced, dtype=self.dtype, device=device)

    def state(self, layer: int) -> dict[str, Tensor]:
        """Views of one layer's moments."""
        if self.exp_avg is None or self.exp_avg_sq is None:
            return {}
        return {"exp_avg": self.exp_avg[layer], "exp_avg_sq": self.exp_avg_sq[layer]}

    def stack(self, rows: slice) -> Tensor:
        """A new stacked tensor of the weights."""
        return torch.stack(self.params[rows]).to(self.dtype)

    def stack_grads(self, rows: slice) -> Tensor:
        """A new stacked tensor of the gradients; a missing one is zero."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params[rows]]
        return torch.stack(grads).to(self.dtype)

    def spread(self, per_unit: Tensor) -> Tensor:
        """Shape (L, U) to what broadcasts against the stacked parameter."""
        if self.role.axis is None:
            return per_layer(per_unit, self.params[0].unsqueeze(0))
        if self.params[0].ndim == 1:
            return per_unit
        return per_unit.unsqueeze(2 if self.role.axis == 0 else 1)

    def unit_sum(self, stacked: Tensor) -> Tensor:
        """Sum over the entries of each unit, (L, U)."""
        if self.role.axis is None:
            return stacked.flatten(1).sum(1, keepdim=True)
        return stacked if stacked.ndim == 2 else stacked.sum(2 if self.role.axis == 0 else 1)

    def dressing(self, rows: slice, context: Context, after: bool) -> Tensor | None:
        """What this parameter is multiplied by to dress it, before or after what dresses it has moved."""
        if self.dressed_by is None or self.role.dressing is None:
            return None
        stack, layers = self.dressed_by
        return self.along_dressing(context.norms[stack][after][layers[rows]] ** self.role.dressing.degree)

    def along_dressing(self, factor: Tensor) -> Tensor:
        """Shape (L, U) of what dresses to what broadcasts against the stacked parameter."""
        assert self.role.dressing is not None
        if self.params[0].ndim == 1:
            return factor
        return factor.unsqueeze(2 if self.role.dressing.axis == 0 else 1)

    @property
    def units(self) -> int:
        """Units of one layer."""
        return 1 if self.role.axis is None else self.params[0].shape[self.role.axis]

    @property
    def unit_size(self) -> int:
        """Entries that one unit has in this parameter."""
        return self.params[0].numel() // self.units


@dataclass
class Context:
    """What the stacks of one step share: the param groups, and the norms that dress.

    ``norms`` holds, for each stack that has moved, the norms of its plus sides before and after, both (L, U);
    ``relaxed``, for each frame of hidden matrices that has relaxed, what its plus side was multiplied by, (L, U).
    """

    groups: list[Group]
    norms: dict[Dresser, tuple[Tensor, Tensor]] = field(default_factory=dict)
    relaxed: dict[Dresser, Tensor] = field(default_factory=dict)

    def decay(self, parameter: StackedParameter) -> float | Tensor:
        """The factor of decoupled weight decay."""
        group = self.groups[parameter.groups[0]]
        return 1 - group["lr"] * group["weight_decay"]


#: On a CPU, temporaries of more than a few megabytes leave the cache, and their pages are asked of the system
#: and cleared anew at every step, which costs many times the arithmetic: as many layers at once as fit this.
CPU_CHUNK = 2**20


def layers_at_once(params: Sequence[Tensor], layer_size: int) -> int:
    """How many layers of a stack a step takes at once: all on an accelerator, as many as fit on a CPU."""
    return max(1, CPU_CHUNK // layer_size) if params[0].device.type == "cpu" else len(params)


def active_rows(has_gradient: Sequence[bool], at_once: int) -> Iterator[slice]:
    """Slices of layers that have gradients, at most so many at once."""
    if all(has_gradient):
        yield from (slice(i, i + at_once) for i in range(0, len(has_gradient), at_once))
    else:
        yield from (slice(i, i + 1) for i, active in enumerate(has_gradient) if active)


class FreeStack:
    """Parameters that no rescale decomposes: AdamW, with second moments averaged and rows centred by role."""

    shared = SHARED

    def __init__(self, parameter: StackedParameter) -> None:
        self.parameter = parameter
        parameter.allocate()
        self.step_count = torch.zeros(len(parameter.params), device=parameter.params[0].device)

    @property
    def parameters(self) -> list[StackedParameter]:
        return [self.parameter]

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """State by parameter."""
        p = self.parameter
        return {param: {"step": self.step_count[i], **p.state(i)} for i, param in enumerate(p.params)}

    def grad_norm_squared(self, context: Context) -> Tensor:
        """|g|², of the centred or dressed gradient where the role says so."""
        return self._gradient(slice(None), context).square().sum()

    def _gradient(self, rows: slice, context: Context) -> Tensor:
        gradient = self.parameter.stack_grads(rows)
        if (factor := self.parameter.dressing(rows, context, after=False)) is not None:
            gradient.mul_(safe_power(factor, -1))
        return centre(gradient) if self.parameter.role.centred else gradient

    def step(self, context: Context) -> None:
        params = self.parameter.params
        for rows in active_rows([p.grad is not None for p in params], layers_at_once(params, params[0].numel())):
            self._step(rows, context)

    def _step(self, rows: slice, context: Context) -> None:
        p = self.parameter
        group = context.groups[p.groups[0]]
        assert p.exp_avg is not None
        assert p.exp_avg_sq is not None
        lr, decay = group["lr"], context.decay(p)
        self.step_count[rows] += 1
        gradient = self._gradient(rows, context)
        bias = Bias.at(self.step_count[rows], group["betas"], p.dtype)
        u = adam_(gradient, p.exp_avg[rows], p.exp_avg_sq[rows], bias, group["betas"], group["eps"], p.role.averaging)
        if p.role.centred:
            u = centre(u)
        u.mul_(per_layer(-lr * bias.root_second / bias.first, u))
        if (factor := p.dressing(rows, context, after=True)) is not None:
            u.mul_(safe_power(factor, -1))
        params = p.params[rows]
        if p.role.centred:  # the mean row is gauge: decay leaves it
            u.add_(p.stack(rows).mean(1, keepdim=True) * (1 - decay))
        relaxed = self._relaxed(rows, context)
        if params[0].dtype == p.dtype and relaxed is None:
            torch._foreach_mul_(params, decay)
            torch._foreach_add_(params, u.unbind())
        else:
            moved = p.stack(rows) * decay + u
            torch._foreach_copy_(params, (moved if relaxed is None else moved * relaxed).unbind())

    def _relaxed(self, rows: slice, context: Context) -> Tensor | None:
        """What the parameter is multiplied by because the frame that dresses it has relaxed."""
        p = self.parameter
        if p.dressed_by is None or p.role.dressing is None or p.dressed_by[0] not in context.relaxed:
            return None
        stack, layers = p.dressed_by
        return p.along_dressing(context.relaxed[stack][layers[rows]] ** -p.role.dressing.degree)


def centre(stacked: Tensor) -> Tensor:
    """Take the mean over the rows (the vocabulary) from a stacked tensor."""
    return stacked - stacked.mean(1, keepdim=True)


@dataclass
class Side:
    """One side of a rescale over L layers. All entries of a unit are one vector, one *block*."""

    parameters: list[StackedParameter]

    def __post_init__(self) -> None:
        self.unit_size = sum(p.unit_size for p in self.parameters)
        matrices = [p.params[0] for p in self.parameters if p.params[0].ndim == 2]
        fan_in = matrices[0].shape[1] if matrices else self.unit_size
        #: step scale over norm: s = √fan_in · rms = √(fan_in / unit_size) · rho; s = rho for vectors
        self.init_scale = math.sqrt(fan_in / self.unit_size)
        if self.unit_size > 1:
            for p in self.parameters:
                p.allocate()

    def sum(self, term: Callable[[StackedParameter, int], Tensor]) -> Tensor:
        """Sum of a per-unit term over the tensors that hold the side, (L, U)."""
        return functools.reduce(operator.add, (term(p, i) for i, p in enumerate(self.parameters)))

    def rounded_norm(self, rows: slice, context: Context) -> Tensor:
        """Norms of the weights as they were rounded to a lower precision, decay apart, (L, U).

        What this side dresses must follow these: a step too small for the weights' precision moves nothing.
        """

        def square(p: StackedParameter, i: int) -> Tensor:
            weight = p.stack(rows) / context.decay(p)
            if p.role.centred:
                weight = centre(weight)
            factor = p.dressing(rows, context, after=True)
            return p.unit_sum((weight if factor is None else weight * factor).square())

        return self.sum(square).sqrt_()

    def read(self, rows: slice, context: Context) -> Block:
        """Weights and gradients in the coordinates in which the side is decomposed."""
        weights, grads, means = [], [], []
        for p in self.parameters:
            weight, grad, mean = p.stack(rows), p.stack_grads(rows), None
            if p.role.centred:
                mean = weight.mean(1, keepdim=True)
                weight.sub_(mean)
                grad.sub_(grad.mean(1, keepdim=True))
            if (factor := p.dressing(rows, context, after=False)) is not None:
                weight.mul_(factor)
                grad.mul_(safe_power(factor, -1))
            weights.append(weight)
            grads.append(grad)
            means.append(mean)
        norm = self.sum(lambda p, i: p.unit_sum(weights[i].square())).sqrt_()
        log_norm_grad = self.sum(lambda p, i: p.unit_sum(weights[i] * grads[i]))
        return Block(self, weights, grads, means, norm, log_norm_grad)


@dataclass
class Block:
    """A side at one step: weights and gradients in centred, dressed coordinates, and what they sum to."""

    side: Side
    weights: list[Tensor]
    grads: list[Tensor]
    means: list[Tensor | None]
    norm: Tensor
    log_norm_grad: Tensor

    def grad_norm_squared(self, step_scale: str) -> Tensor:
        """Σ over units of s² |g|², which is |g|² at the 1/√fan_in initialisation and invariant always."""
        squared = self.side.sum(lambda p, i: p.unit_sum(self.grads[i].square()))
        return (squared * self.scale(self.norm, step_scale).square()).sum()

    def scale(self, norm: Tensor, step_scale: str) -> Tensor:
        """The step scale s per unit."""
        return norm * self.side.init_scale if step_scale == "init" else norm

    def turn(
        self, norm: Tensor, log_change: Tensor, rows: slice, bias: Bias, group: Group
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The step of one side as (u, keep, turn, new_norm): W becomes keep · W - turn · u, per unit.

        With u the Adam direction of x = rho g_tan and s the step scale, the turned side is
        W - eta s (u - <u, W> W / rho²), a combination of W and u; so only its two coefficients are worked out,
        and neither the projection nor the retraction takes a pass of its own.
        """
        side, growth = self.side, log_change.exp()
        if side.unit_size == 1:
            return [], growth, growth, growth * self.norm
        inverse, alive = safe_power(norm, -1), self.norm > 0
        directions: list[Tensor] = []
        for p, weight, grad in zip(side.parameters, self.weights, self.grads, strict=True):
            assert p.exp_avg is not None
            assert p.exp_avg_sq is not None
            x = grad.mul_(p.spread(norm)).addcmul_(weight, p.spread(self.log_norm_grad * inverse), value=-1)
            u = adam_(x, p.exp_avg[rows], p.exp_avg_sq[rows], bias, group["betas"], group["eps"], p.role.averaging)
            directions.append(centre(u) if p.role.centred else u)
        scale = (bias.root_second / bias.first)[:, None]
        along = scale * inverse * side.sum(lambda p, i: p.unit_sum(directions[i] * self.weights[i]))
        along = along * alive
        across_squared = scale.square() * side.sum(lambda p, i: p.unit_sum(directions[i].square())) - along.square()
        across_squared.clamp_(min=0)
        stride = group["lr"] * self.scale(norm, group["step_scale"])
        angle = stride * inverse
        stretch = (1 + angle.square() * across_squared).sqrt()
        if group["retract"]:
            growth = torch.where(alive, growth / stretch, growth)
        new_norm = growth * torch.where(alive, self.norm * stretch, stride * across_squared.sqrt())
        return directions, growth * (1 + angle * along), growth * stride * scale, new_norm

    def write(self, directions: list[Tensor], keep: Tensor, turn: Tensor, rows: slice, context: Context) -> None:
        """Combine, decay, undress by the new factors, put the mean row back, and copy into the parameters."""
        for i, p in enumerate(self.side.parameters):
            decay = context.decay(p)
            weight = self.weights[i].mul_(p.spread(keep * decay))
            if directions:
                weight.addcmul_(directions[i], p.spread(turn * decay), value=-1)
            if (factor := p.dressing(rows, context, after=True)) is not None:
                # what a dead factor dresses has no effect, and stays as it is
                undress = safe_power(factor, -1)
                weight = torch.where(undress > 0, weight.mul_(undress), p.stack(rows))
            mean = self.means[i]
            if mean is not None:
                weight.add_(mean)
            torch._foreach_copy_(p.params[rows], weight.unbind())


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

    @property
    def parameters(self) -> list[StackedParameter]:
        return self.plus.parameters + (self.minus.parameters if self.minus else [])

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """State by parameter; that of the gauge's modes is with the first parameter of each layer."""
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
        plus = self.plus.read(slice(None), context)
        context.norms[self] = (plus.norm, plus.norm)
        step_scale = self._group(context)["step_scale"]
        if self.minus is None:
            return plus.grad_norm_squared(step_scale)
        minus = self.minus.read(slice(None), context)
        return plus.grad_norm_squared(step_scale) + minus.grad_norm_squared(step_scale)

    def step(self, context: Context) -> None:
        """Move all layers that have a gradient. Afterwards ``context`` has this stack's plus norms."""
        first = self.plus.parameters[0]
        has_gradient = [any(p.params[i].grad is not None for p in self.parameters) for i in range(self.layers)]
        if all(has_gradient):
            old = torch.empty(self.layers, self.units, dtype=first.dtype, device=self.step_count.device)
        else:  # the layers left alone may still dress others
            old = self.plus.read(slice(None), context).norm
        new = old.clone()
        layer_size = sum(p.params[0].numel() for p in self.parameters)
        for rows in active_rows(has_gradient, layers_at_once(first.params, layer_size)):
            old[rows], new[rows] = self._step(rows, context)
        context.norms[self] = (old, new)

    def _group(self, context: Context) -> Group:
        """The hyperparameters that all parameters of the stack share."""
        return context.groups[self.plus.parameters[0].groups[0]]

    def _step(self, rows: slice, context: Context) -> tuple[Tensor, Tensor]:
        """One step of the given layers; returns the plus norms before and after, decay apart."""
        group = self._group(context)
        self.step_count[rows] += 1
        bias = Bias.at(self.step_count[rows], group["betas"], self.plus.parameters[0].dtype)
        plus = self.plus.read(rows, context)
        minus = self.minus.read(rows, context) if self.minus is not None else None
        old = plus.norm
        if minus is None:  # the plus norm is the gauge coordinate: it keeps still
            directions, keep, turn, new = plus.turn(old, torch.zeros_like(old), rows, bias, group)
        else:
            plus_change, minus_change = self._radial(plus, minus, rows, bias, group)
            # A dead side (norm 0) has no direction. It steps in the other's covariant scale until it has one.
            plus_scale = torch.where(old > 0, old, safe_power(minus.norm, -1 / self.degree))
            minus_scale = torch.where(minus.norm > 0, minus.norm, safe_power(old, -self.degree))
            directions, keep, turn, new = plus.turn(plus_scale, plus_change, rows, bias, group)
            minus.write(*minus.turn(minus_scale, minus_change, rows, bias, group)[:3], rows, context)
        plus.write(directions, keep, turn, rows, context)
        if self.plus.parameters[0].params[0].dtype != self.plus.parameters[0].dtype:
            new = self.plus.rounded_norm(rows, context)
        return old, new

    def _radial(self, plus: Block, minus: Block, rows: slice, bias: Bias, group: Group) -> tuple[Tensor, Tensor]:
        """Changes of log rho_P and log rho_M: the shared radial step and the vertical mode."""
        k, size = self.degree, math.sqrt(1 + self.degree**2)
        rate = group["lr"] * group["radial_rate"]

        def mode_step(mode: str, gradient: Tensor) -> Tensor:
            exp_avg, exp_avg_sq = self.modes[f"{mode}_exp_avg"][rows], self.modes[f"{mode}_exp_avg_sq"][rows]
            u = adam_(gradient, exp_avg, exp_avg_sq, bias, group["betas"], group["eps"])
            return u.mul_(per_layer(-rate * bias.root_second / bias.first, u))

        # What the plus side dresses is undressed by its new norms, so it does not feel the plus side's move.
        plus_grad = plus.log_norm_grad
        for p in self.dressed:
            plus_grad = plus_grad - k * p.unit_sum(p.stack(rows).mul_(p.stack_grads(rows)))
        radial = mode_step("radial", (k * plus_grad + minus.log_norm_grad) / size)
        if group["vertical"] == "freeze":
            return radial * (k / size), radial / size
        if group["vertical"] == "adam":
            vertical = mode_step("vertical", (plus_grad - k * minus.log_norm_grad) / size)
        else:
            gap = plus.norm.log() - k * minus.norm.log()
            vertical = torch.where(gap.isfinite(), -rate * gap / size, 0.0)
        return (k * radial + vertical) / size, (radial - k * vertical) / size


class ChainStack:
    """A chain of layers, each a block as a whole; the total log-norm steps, shared equally.

    Where other layers of the chain are hidden, and step elsewhere, the norms of these keep still.
    """

    shared = SHARED

    def __init__(self, layers: list[StackedParameter], still: bool, vertical: bool) -> None:
        self.sides = [Side([layer]) for layer in layers]
        self.still = still
        first = layers[0]
        options: dict[str, Any] = {"device": first.params[0].device}
        self.step_count = torch.zeros(1, **options)
        sizes = {} if still else {"radial": 1} | ({"vertical": len(layers)} if vertical else {})
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
        states = {p.params[0]: {"step": self.step_count[0], **p.state(0)} for p in self.parameters}
        states[self.parameters[0].params[0]] |= self.modes
        return states

    def _group(self, context: Context) -> Group:
        return context.groups[self.parameters[0].groups[0]]

    def grad_norm_squared(self, context: Context) -> Tensor:
        """Squared norm of the gradient in the invariant metric."""
        step_scale = self._group(context)["step_scale"]
        terms = [side.read(slice(None), context).grad_norm_squared(step_scale) for side in self.sides]
        return torch.stack(terms).sum()

    def step(self, context: Context) -> None:
        """Move all layers, if any has a gradient."""
        if all(p.params[0].grad is None for p in self.parameters):
            return
        group, rows = self._group(context), slice(None)
        self.step_count += 1
        bias = Bias.at(self.step_count, group["betas"], self.parameters[0].dtype)
        blocks = [side.read(rows, context) for side in self.sides]
        changes = self._radial(blocks, bias, group).view(-1, 1, 1)
        for block, change in zip(blocks, changes, strict=True):
            block.write(*block.turn(block.norm, change, rows, bias, group)[:3], rows, context)

    def _radial(self, blocks: list[Block], bias: Bias, group: Group) -> Tensor:
        """Changes of the layers' log-norms, (L,)."""
        log_norm_grads = torch.cat([block.log_norm_grad.flatten() for block in blocks])
        if self.still:
            return torch.zeros_like(log_norm_grads)
        rate, size = group["lr"] * group["radial_rate"], math.sqrt(len(blocks))

        def mode_step(mode: str, gradient: Tensor) -> Tensor:
            exp_avg, exp_avg_sq = self.modes[f"{mode}_exp_avg"], self.modes[f"{mode}_exp_avg_sq"]
            u = adam_(gradient, exp_avg, exp_avg_sq, bias, group["betas"], group["eps"])
            return u.mul_(-rate * bias.root_second / bias.first)

        shared = mode_step("radial", log_norm_grads.sum(0, keepdim=True) / size) / size
        if group["vertical"] == "freeze":
            return shared.expand(len(blocks))
        if group["vertical"] == "adam":
            vertical = mode_step("vertical", log_norm_grads - log_norm_grads.mean())
            return shared + vertical - vertical.mean()
        log_norms = torch.cat([block.norm.flatten() for block in blocks]).log()
        gap = torch.where(log_norms.isfinite().all(), log_norms - log_norms.mean(), 0.0)
        return shared - rate * gap


def safe_power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for a negative exponent; 0 where x is 0, or so near to it that this would not be a finite number."""
    limits = torch.finfo(x.dtype)
    smallest = max(limits.tiny, limits.max ** (1 / exponent))
    return torch.where(x >= smallest, x.reciprocal() if exponent == -1 else x.pow(exponent), 0.0)
