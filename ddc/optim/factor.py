"""Two sides of a product under a general linear map: adapters, heads, two linear maps in a row.

Shapes: L layers, U units of a gauge (heads, planes; one of an adapter), k entries that a map mixes,
N vectors of them on a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddc.gauges import General
from ddc.optim.averaging import Averaging
from ddc.optim.compiled import Hyper, per_layer, safe_power, scaled
from ddc.optim.rules.base import Numbers
from ddc.optim.sharding import CutAveraging
from ddc.optim.stack import Context, Stack, layers_at_once, states_of
from ddc.optim.stacked import Layers, StackedParameter

#: δ by kind of gauge: what takes the place of the minus side's size where that is smaller, as at
#: the start of an adapter, whose B is zero. There √δ is the ratio of the two sides' steps, which
#: for LoRA is best above 1; elsewhere it is to change little.
FLOORS = {"factor_map": 16 / 9}
FLOOR = 1 / 9


class Slot(NamedTuple):
    """What one side of a gauge has in a stacked parameter: slices of k entries along an axis.

    ``parameter`` is its place in the stack, ``indices`` are (U, copies, k); ``regular`` says that
    they are all indices of the axis in order.
    """

    parameter: int
    axis: int
    indices: Tensor
    regular: bool

    @classmethod
    def of(cls, parameter: int, axis: int, indices: np.ndarray, like: Tensor) -> Slot:
        """Of a parameter like this."""
        size = like.shape[axis]
        regular = indices.size == size and np.array_equal(indices.ravel(), np.arange(size))
        return cls(parameter, axis, torch.from_numpy(indices).to(like.device), regular)

    def read(self, x: Tensor) -> Tensor:
        """The slices of a stacked tensor, (L, U, k, N)."""
        rows = self._rows(x)
        taken = rows.unflatten(1, self.indices.shape) if self.regular else rows[:, self.indices]
        return taken.transpose(2, 3).flatten(3)

    def written(self, slices: Tensor, x: Tensor) -> Tensor:
        """A stacked tensor with other slices."""
        back = slices.unflatten(3, (self.indices.shape[1], -1)).transpose(2, 3)
        if self.regular:
            rows = back.flatten(1, 3)
        else:
            rows = self._rows(x).clone()
            rows[:, self.indices] = back
        return rows.squeeze(2) if x.ndim == 2 else rows if self.axis == 0 else rows.mT

    def _rows(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2) if x.ndim == 2 else x if self.axis == 0 else x.mT


class Part(NamedTuple):
    """One gauge of a stack: its slots on both sides."""

    group: str
    floor: float
    plus: tuple[Slot, ...]
    minus: tuple[Slot, ...]


class SideFrames(NamedTuple):
    r"""Frames of both sides of a gauge, (L, U, k, k): with P and M the sides, G P and
    :math:`G^{-T} M` have the frames :math:`G F_P K` and :math:`G^{-T} F_M K`, K a rotation.

    A gradient g of a side is dressed as :math:`F^T g`, which G does but turn by K, and steps as
    :math:`F F^T g`, which G moves as it does the side.
    """

    plus: Tensor
    minus: Tensor


class FactorStack(Stack):
    r"""Alike gauges of general linear maps in L layers: P -> G P, :math:`M \to G^{-T} M`.

    With :math:`X = P P^T`, :math:`Y = M M^T` and # the geometric mean of positive matrices,

    .. math::
        S = X^{-1} \mathbin{\#} (Y + \delta X^{-1}), \qquad
        P \leftarrow P - \eta\, S^{-1} u_P, \qquad M \leftarrow M - \eta\, S u_M

    where u is the rule's direction of the raw gradient, of which second moments are those of the
    dressed one (:class:`SideFrames`), averaged over what the map mixes. A map moves raw gradients,
    and their averages, by a constant; so nothing has to follow the frames from step to step. With
    :math:`X = L L^T` and :math:`L^T Y L = V \Sigma^2 V^T` the frames are
    :math:`F_P = L V (\Sigma^2 + \delta)^{-1/4}` and
    :math:`F_M = L^{-T} V (\Sigma^2 + \delta)^{1/4}`, with :math:`S^{-1} = F_P F_P^T` and
    :math:`S = F_M F_M^T`. X, Y and what follows are in float64, for they square what the sides are.

    Args:
        parameters: all that the gauges act on.
        parts: the gauges, more than one where they share parameters.
    """

    def __init__(self, parameters: list[StackedParameter], parts: list[Part]) -> None:
        self.parameters, self.parts, self.rule = parameters, parts, parameters[0].rule
        first = parameters[0].params[0]
        for p in parameters:
            p.allocate()
            p.compilable = False  # eigenvalues are not
        self.layers = len(parameters[0].params)
        self.step_count = torch.zeros(self.layers, dtype=torch.float32, device=first.device)
        size = sum(p.params[0].numel() for p in parameters)
        self.at_once = layers_at_once(self.layers, size, first.device)
        #: by parameter, the slots in it, and which side of which part they are
        self.slots: list[list[tuple[Slot, int, int]]] = [
            [
                (slot, i, side)
                for i, part in enumerate(parts)
                for side, slots in enumerate((part.plus, part.minus))
                for slot in slots
                if slot.parameter == index
            ]
            for index in range(len(parameters))
        ]

    def tied(self) -> list[list[tuple[str, Tensor]]]:
        named = [zip(p.names, p.params, strict=True) for p in self.parameters]
        return [list(layer) for layer in zip(*named, strict=True)]

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        return states_of(self.parameters, self.step_count)

    def grad_norm_squared(self, context: Context) -> Tensor:
        """|g|² of the dressed gradients."""
        squares = []
        for rows in context.chunks([True] * self.layers, self.at_once):
            views = [View(p, context.gather(p, rows)) for p in self.parameters]
            frames = self._frames(views)
            dressed = (self.dressed(i, v.gradient, frames) for i, v in enumerate(views))
            squares.append(torch.stack([each.square().sum() for each in dressed]).sum())
        return torch.stack(squares).sum()

    def step(self, context: Context) -> None:
        has_gradient = [
            any(p.params[i].grad is not None for p in self.parameters) for i in range(self.layers)
        ]
        hyper = context.hyper(self.parameters[0])
        for rows in context.chunks(has_gradient, self.at_once):
            self.step_count[rows] += 1
            views = [View(p, context.gather(p, rows)) for p in self.parameters]
            frames = self._frames(views)
            for i, view in enumerate(views):
                self._move(i, view, frames, self.step_count[rows], hyper)

    def _move(
        self, i: int, view: View, frames: list[SideFrames], step_count: Tensor, hyper: Hyper
    ) -> None:
        p = self.parameters[i]
        clock = self.rule.clock(step_count, hyper, p.dtype)
        subject = InMetric(self, i, frames)
        u, ratio = self.rule.direction(view.gradient, view.layers.moments, clock, hyper, subject)
        u = self.raised(i, u, frames)
        view.write(scaled(u, per_layer(-hyper["lr"] * ratio, u)))

    # ---- the metric

    def _frames(self, views: Sequence[View]) -> list[SideFrames]:
        """The frames of all parts."""
        weights = [view.weight.double() for view in views]
        found = []
        for part in self.parts:
            x, y = (
                torch.stack([gram(slot.read(weights[slot.parameter])) for slot in side]).sum(0)
                for side in (part.plus, part.minus)
            )
            frames = frames_of(x, y, part.floor, part.group == "all")
            found.append(SideFrames(*(frame.to(self.parameters[0].dtype) for frame in frames)))
        return found

    def dressed(self, i: int, x: Tensor, frames: list[SideFrames]) -> Tensor:
        """A gradient of the i-th parameter in the frames."""
        for slot, part, side in self.slots[i]:
            x = slot.written(frames[part][side].mT @ slot.read(x), x)
        return x

    def raised(self, i: int, x: Tensor, frames: list[SideFrames]) -> Tensor:
        """What a gradient moves the i-th parameter by."""
        for slot, part, side in self.slots[i]:
            frame = frames[part][side]
            x = slot.written(frame @ (frame.mT @ slot.read(x)), x)
        return x


def gram(slices: Tensor) -> Tensor:
    """Products of the rows of slices, (L, U, k, k)."""
    return slices @ slices.mT


def frames_of(x: Tensor, y: Tensor, floor: float, general: bool) -> SideFrames:
    """The frames of the two sides.

    Args:
        x: X as in :class:`FactorStack`, (L, U, k, k), in float64. Where it is singular, so are the
            frames: what no vector on the plus side has does not reach the minus side.
        y: Y as there.
        floor: δ.
        general: under all of GL(k); else under what commutes with turns of all k entries, whose
            frames are multiples of one.
    """
    k = x.shape[-1]
    if not general:
        x, y = (each.diagonal(dim1=-2, dim2=-1).mean(-1) for each in (x, y))
        size = (safe_power(x, -1) * (y + floor * safe_power(x, -1))).pow(1 / 4)[..., None, None]
        one = torch.eye(k, dtype=x.dtype, device=x.device)
        return SideFrames(safe_power(size, -1) * one, size * one)
    values, vectors = spectrum(x)
    smallest = k * torch.finfo(x.dtype).eps * values[..., -1:]
    values = torch.where(values <= smallest, 0.0, values)
    inverses = torch.where(values == 0, 0.0, values.rsqrt())
    root, inverse = vectors * values.sqrt().unsqueeze(-2), vectors * inverses.unsqueeze(-2)
    sizes, turns = spectrum(root.mT @ y @ root)
    sizes = (sizes.clamp_min(0) + floor).pow(1 / 4).unsqueeze(-2)
    return SideFrames((root @ turns) / sizes, (inverse @ turns) * sizes)


def spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of symmetric matrices and their vectors; nan of what is not finite, which has
    none, and would raise.
    """
    finite = x.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], x, 0.0))
    return torch.where(finite[..., None], values, torch.nan), vectors


class View:
    """A stacked parameter at a step, in centred, dressed coordinates; rows as in
    :class:`ddc.optim.free.FreeStack`.
    """

    def __init__(self, parameter: StackedParameter, layers: Layers) -> None:
        self.parameter, self.layers = parameter, layers
        self.original = weight = parameter.read(layers)
        gradient = parameter.stack(layers.grads)
        self.mean: Tensor | None = None
        if parameter.role.centred:
            self.mean = parameter.shards.row_mean(weight)
            weight, gradient = weight - self.mean, parameter.centre(gradient)
        if (factor := parameter.factor(layers.before)) is not None:
            weight, gradient = weight * factor, scaled(gradient, safe_power(factor, -1))
        self.weight, self.gradient = weight, gradient

    def write(self, change: Tensor) -> None:
        """Write the weights after decay and this change."""
        p = self.parameter
        change = p.centre(change) if p.role.centred else change
        weight = self.weight * self.layers.decay + change
        if (factor := p.factor(self.layers.after)) is not None:
            undress = safe_power(factor, -1)  # what a dead factor dresses stays as it is
            weight = torch.where(undress > 0, weight * undress, self.original)
        p.write(self.layers, weight if self.mean is None else weight + self.mean)


class InMetric(Numbers):
    """The :class:`ddc.optim.rules.base.Subject` of raw gradients of the i-th parameter of a
    stack: averages are those of the dressed ones.
    """

    def __init__(self, stack: FactorStack, i: int, frames: list[SideFrames]) -> None:
        self.averaging = MetricAveraging(stack, i, frames)


class MetricAveraging:
    """Averages, over what a general linear map mixes, in the metric of a step."""

    def __init__(self, stack: FactorStack, i: int, frames: list[SideFrames]) -> None:
        self.stack, self.i, self.frames = stack, i, frames
        self.averaging: Averaging | CutAveraging | None = stack.parameters[i].averaging

    def mean_square(self, x: Tensor) -> Tensor:
        """As of :class:`ddc.optim.averaging.Averaging`."""
        square = self.stack.dressed(self.i, x, self.frames).square()
        return square if self.averaging is None else self.averaging.mean(square)

    def divide(self, x: Tensor, divisor: Tensor) -> Tensor:
        """As of :class:`ddc.optim.averaging.Averaging`."""
        return x / divisor if self.averaging is None else self.averaging.divide(x, divisor)


def part_of(gauge: General, place: dict[str, int], like: Sequence[Tensor]) -> Part:
    """A gauge of one layer as a part of a stack, given the places of its parameters in it."""
    sides = (
        tuple(
            Slot.of(place[name], axis, indices, like[place[name]]) for name, axis, indices in side
        )
        for side in (gauge.plus, gauge.minus)
    )
    return Part(gauge.group, FLOORS.get(gauge.kind, FLOOR), *sides)
