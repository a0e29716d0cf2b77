"""The four ways in which a gauge acts: by a shift, by scales of units or of whole layers, by
rotations.

Each class is one row or more of the table of gauges in docs/method.md: :class:`Shift` is the logit
shift; :class:`Rescale` is the ReLU, ReLU² and gated rescale and the norm scale; :class:`Chain` is
the chained rescale; :class:`Rotation` is the value rotation and the query-key rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddc.gauges.base import Gauge, Params, UnitAxis, axes_of, check_kind, spread_units, unit_view
from ddc.gauges.parts import at, part_named, whole_name


class Axis(NamedTuple):
    """A parameter and the axis along which the units of a gauge lie: 0 for rows, 1 for columns.

    Attributes:
        parameter: its name, or that of a part of it (:mod:`ddc.gauges.parts`).
        axis: of the units; several axes where they lie along these jointly: (0, 1) for the rows of
            stacked experts, (experts, out, in).
        offset: what is scaled is the parameter plus this number: 1 for the 1 + γ of Gemma's norms.
    """

    parameter: str
    axis: int | tuple[int, ...] = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Shift(Gauge):
    """Logit shift: the same vector added to every row of the head (and the same number to its
    bias).

    Softmax cross-entropy does not see it, nor does a norm that centres, of what writes to a
    residual stream. The group is (R^d, +), and R for a bias.
    """

    weight: str
    bias: str | None = None
    where: str = "head"
    kind: str = "logit_shift"

    def __post_init__(self) -> None:
        check_kind(self.kind)

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def dimension(self, params: Params) -> int:
        return params[self.weight].shape[1] + (self.bias is not None)

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        weight = params[self.weight]
        shift = torch.randn(self.dimension(params), generator=generator, dtype=torch.float64)
        return (spread * shift).to(weight)

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        width = params[self.weight].shape[1]
        params[self.weight].add_(element[:width])
        if self.bias is not None:
            params[self.bias].add_(element[width])

    @torch.no_grad()
    def balancing(self, params: Params) -> tuple[Tensor, float] | None:
        """Means at zero."""
        weight = params[self.weight]
        means = [weight.mean(0)]
        if self.bias is not None:
            means.append(params[self.bias].mean()[None])
        element = -torch.cat(means)
        return element, rms(element)

    def velocities(self, params: Params) -> dict[str, Tensor]:
        weight = params[self.weight]
        moved = {self.weight: torch.zeros(self.dimension(params), *weight.shape).double()}
        columns = torch.arange(weight.shape[1])
        moved[self.weight][columns, :, columns] = 1
        if self.bias is not None:
            moved[self.bias] = torch.zeros(self.dimension(params), len(weight)).double()
            moved[self.bias][-1] = 1
        return moved

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        gradients = [grads[name].double() for name in self.parameters]
        vertical = sum(float(g.mean(0).square().sum()) * len(g) for g in gradients)
        return ratio(vertical, sum(float(g.square().sum()) for g in gradients))


@dataclass(frozen=True)
class Rescale(Gauge):
    """A multiplicative gauge: per unit, the plus side is multiplied by c > 0, the minus side by
    c^-degree.

    Args:
        plus, minus: the sides. All entries of a unit that one side names, whichever tensor holds
            them, form one vector: a weight row with its bias entry, gamma_j with beta_j, the
            columns j of W_Q, W_K, W_V.
        degree: degree of homogeneity of what lies between the sides: 1, but 2 for ReLU². With the
            sides exchanged it is the reciprocal.
        block: one scale for all units: each side as a whole is one unit
            (:func:`ddc.gauges.in_blocks`).

    Raises:
        ValueError: an unknown kind, a side without parameters, or a degree that is not positive.
    """

    kind: str
    where: str
    plus: tuple[Axis, ...]
    minus: tuple[Axis, ...]
    degree: float = 1
    block: bool = False

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if not self.plus or not self.minus:
            raise ValueError(f"{self}: a rescale needs parameters on both sides")
        if not self.degree > 0:
            raise ValueError(f"{self}: Invalid degree={self.degree}, expected a positive number")

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(whole_name(axis.parameter) for axis in self.plus + self.minus))

    def unit_axis(self, axis: int | tuple[int, ...]) -> UnitAxis:
        """Of the axis that an :class:`Axis` names: along it lie the units; None where the parameter
        is of one unit.
        """
        return None if self.block else axis

    def units(self, params: Params) -> int:
        """Number of units: neurons or channels; 1 of a block."""
        if self.block:
            return 1
        name, axis, _ = self.plus[0]
        shape = at(params, name).shape
        return math.prod(shape[each] for each in axes_of(axis))

    def dimension(self, params: Params) -> int:
        return self.units(params)

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        uniform = torch.rand(self.units(params), generator=generator, dtype=torch.float64)
        return ((2 * uniform - 1) * spread).exp().to(at(params, self.plus[0].parameter))

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        for side, scales in ((self.plus, element), (self.minus, element**-self.degree)):
            for name, axis, offset in side:
                tensor = at(params, name)
                scale = spread_units(scales, tensor, self.unit_axis(axis))
                tensor.mul_(scale)
                if offset:  # (w + offset) c - offset
                    tensor.add_(offset * (scale - 1))

    @torch.no_grad()
    def velocities(self, params: Params) -> dict[str, Tensor]:
        units = self.units(params)
        moved: dict[str, Tensor] = {}
        for side, rate in ((self.plus, 1.0), (self.minus, -self.degree)):
            for name, axis, offset in side:
                weight = at(params, name).double() + offset
                whole = whole_name(name)
                if whole not in moved:
                    moved[whole] = weight.new_zeros(units, *params[whole].shape)
                part = part_named(name)
                each = moved[whole] if part is None else part.of(moved[whole], 1)
                if self.block:
                    each[0] += rate * weight
                    continue
                # a unit's entries lie at its indices on the axes
                axes = axes_of(axis)
                first = tuple(range(len(axes)))
                rows = weight.movedim(axes, first)
                unit = torch.arange(units, device=weight.device)
                places = torch.unravel_index(unit, rows.shape[: len(axes)])
                at_unit = each.movedim([1 + a for a in axes], [1 + a for a in first])
                at_unit[(unit, *places)] += rate * rows.flatten(0, len(axes) - 1)
        return moved

    @torch.no_grad()
    def log_norms(self, params: Params) -> tuple[Tensor, Tensor]:
        """(log rho_P, log rho_M): logarithms of the two sides' norms, per unit, in float64."""

        def log_norm(side: tuple[Axis, ...]) -> Tensor:
            squares = [
                unit_view(at(params, name) + offset, self.unit_axis(axis)).double().square().sum(1)
                for name, axis, offset in side
            ]
            return torch.stack(squares).sum(0).log() / 2

        return log_norm(self.plus), log_norm(self.minus)

    @torch.no_grad()
    def balancing(self, params: Params) -> tuple[Tensor, float] | None:
        """``|plus|² = degree · |minus|²``; a unit with a side of norm zero stays as it is."""
        log_plus, log_minus = self.log_norms(params)
        # |P|² c² + |M|² c^-2k is least where c^(2 + 2k) = k |M|² / |P|²
        log_ratio = torch.tensor(float(self.degree)).log() / 2 + log_minus - log_plus
        log_scale = torch.where(log_ratio.isfinite(), log_ratio / (1 + self.degree), 0.0)
        element = log_scale.exp().to(params[self.parameters[0]])
        return element, float(log_scale.abs().max())

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        def radial(side: tuple[Axis, ...]) -> Tensor:
            terms = [
                unit_view((at(params, name) + offset) * at(grads, name), self.unit_axis(axis))
                .double()
                .sum(1)
                for name, axis, offset in side
            ]
            return torch.stack(terms).sum(0)

        plus, minus = radial(self.plus), radial(self.minus)
        vertical, horizontal = plus - self.degree * minus, self.degree * plus + minus
        return ratio(float(vertical.square().sum()), float(horizontal.square().sum()))


@dataclass(frozen=True)
class Chain(Gauge):
    """Chained rescale: in a chain of L layers without biases, layer l is multiplied by c_l, and Π
    c_l = 1.

    What lies between two layers must be homogeneous of degree 1 (ReLU). The group is (R+)^(L-1);
    per neuron instead of per layer it is a :class:`Rescale` between each two layers, which contains
    it.

    Args:
        weights: one weight a layer, the input's and the head's included.

    Raises:
        ValueError: fewer than two layers, or a parameter named twice.
    """

    weights: tuple[str, ...]
    where: str = "layers"
    kind: str = "chained_rescale"

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if len(self.weights) < 2 or len(set(self.weights)) != len(self.weights):
            raise ValueError(
                f"{self}: Invalid weights={self.weights}: expected two or more different parameters"
            )

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.weights

    def dimension(self, params: Params) -> int:
        return len(self.weights) - 1

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        uniform = torch.rand(self.dimension(params), generator=generator, dtype=torch.float64)
        return ((2 * uniform - 1) * spread).exp().to(params[self.weights[0]])

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        """Layer l is multiplied by element_l, the layer after it divided by the same."""
        for (before, after), c in zip(pairwise(self.weights), element, strict=True):
            params[before].mul_(c)
            params[after].div_(c)

    @torch.no_grad()
    def balancing(self, params: Params) -> tuple[Tensor, float] | None:
        """Equal norms, their geometric mean; a layer of norm zero leaves the chain as it is."""
        log_norms = torch.stack([params[name].double().norm().log() for name in self.weights])
        if not log_norms.isfinite().all():
            return None
        log_scales = log_norms.mean() - log_norms
        element = log_scales.cumsum(0)[:-1].exp().to(params[self.weights[0]])
        return element, float(log_scales.abs().max())

    @torch.no_grad()
    def velocities(self, params: Params) -> dict[str, Tensor]:
        moved = {}
        for layer, name in enumerate(self.weights):
            weight = params[name].double()
            moved[name] = weight.new_zeros(self.dimension(params), *weight.shape)
            if layer < len(self.weights) - 1:
                moved[name][layer] = weight
            if layer:
                moved[name][layer - 1] = -weight
        return moved

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        radial = torch.stack(
            [(params[name] * grads[name]).double().sum().cpu() for name in self.weights]
        )
        return ratio(float((radial - radial.mean()).square().sum()), float(radial.square().sum()))


class RotatedAxis(NamedTuple):
    """A parameter and the indices, along one of its axes, that each unit of a rotation gauge turns.

    ``indices`` is an int64 array of shape (units, copies, k): unit u turns each of its copies (the
    query heads of a group, say) of k indices by the same k × k matrix.
    """

    parameter: str
    axis: int
    indices: np.ndarray


@dataclass(frozen=True, eq=False)
class Rotation(Gauge):
    """Per unit, the same rotation of the named indices of several parameters.

    Since W_V -> R W_V goes with W_O -> W_O R^T, acting on rows and acting on columns are the same:
    each slice of k entries x becomes R x.

    Args:
        slots: what is turned; all must agree in the number of units and in k.
        reflections: the group is O(k); without, SO(k) (the planes of RoPE commute with rotations
            only).

    Raises:
        ValueError: an unknown kind, no slots, or slots that disagree.
    """

    kind: str
    where: str
    slots: tuple[RotatedAxis, ...]
    reflections: bool

    def __post_init__(self) -> None:
        check_kind(self.kind)
        shapes = {(slot.indices.shape[0], slot.indices.shape[2]) for slot in self.slots}
        if len(shapes) != 1:
            raise ValueError(f"{self}: slots must agree in (units, k), got {sorted(shapes)}")

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(slot.parameter for slot in self.slots))

    @property
    def shape(self) -> tuple[int, int]:
        """(units, k)."""
        units, _, k = self.slots[0].indices.shape
        return units, k

    def dimension(self, params: Params) -> int:
        units, k = self.shape
        return units * k * (k - 1) // 2

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        units, k = self.shape
        q, r = torch.linalg.qr(torch.randn(units, k, k, generator=generator, dtype=torch.float64))
        # uniform on O(k): Mezzadri, math-ph/0609050
        q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
        if not self.reflections:
            q[:, :, 0] *= torch.linalg.det(q).sign()[:, None]
        return q.to(params[self.parameters[0]])

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        for name, axis, indices in self.slots:
            rows = unit_view(params[name], axis)
            index = torch.from_numpy(indices).to(rows.device)
            rows[index] = torch.einsum("uij,ucjd->ucid", element, rows[index])

    @torch.no_grad()
    def velocities(self, params: Params) -> dict[str, Tensor]:
        units, k = self.shape
        first, second = torch.triu_indices(k, k, 1)
        moved: dict[str, Tensor] = {}
        for name, axis, indices in self.slots:
            rows = unit_view(params[name].double(), axis)
            each = rows.new_zeros(units, len(first), *rows.shape)
            index = torch.from_numpy(indices).to(rows.device)
            for unit in range(units):
                for copy in index[unit]:  # the plane of entries i < j turns i towards j
                    plane = torch.arange(len(first), device=rows.device)
                    each[unit, plane, copy[first]] = -rows[copy[second]]
                    each[unit, plane, copy[second]] = rows[copy[first]]
            shape = params[name].shape
            each = each.flatten(0, 1)
            each = each.reshape(-1, *shape) if axis == 0 else each.mT
            moved[name] = moved.get(name, 0) + each
        return moved

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        units, k = self.shape
        moment = torch.zeros(units, k, k, dtype=torch.float64)
        size = torch.zeros(units, dtype=torch.float64)
        for name, axis, indices in self.slots:
            index = torch.from_numpy(indices)
            rows, grad = (unit_view(t[name], axis).double().cpu()[index] for t in (params, grads))
            part = torch.einsum("ucid,ucjd->uij", grad, rows)
            moment += part
            size += part.square().sum((1, 2))
        return ratio(float((moment - moment.mT).square().sum()) / 4, float(size.sum()))


def ratio(vertical_squared: float, total_squared: float) -> float:
    """Ratio of two norms given their squares; 0 / 0 (no gradient at all) is 0."""
    return math.sqrt(vertical_squared / total_squared) if vertical_squared else 0.0


def rms(tensor: Tensor) -> float:
    """Root of the mean square."""
    return float(tensor.double().square().mean().sqrt())
