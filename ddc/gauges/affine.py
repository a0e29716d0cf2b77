"""The ways in which the further gauges act: general linear maps of heads, translations, and shears
of biases.

The kinds of the paper (:mod:`ddc.gauges.actions`) are 18 to 62% of what a transformer's loss cannot
see; with these, and residual rotations, they are all of it (:mod:`ddc.gauges.certificate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddc.gauges.actions import RotatedAxis, ratio, rms
from ddc.gauges.base import Gauge, Params, check_kind, is_fake, is_split, unit_view

#: A side of a general linear map spans its dimensions if its smallest singular value is more than
#: this of the largest: float32 tells no smaller one from zero.
SPANNED = 1e-6


@dataclass(frozen=True, eq=False)
class General(Gauge):
    """Per unit, slices x of k entries become G x, and slices of the other side G⁻ᵀ x.

    So products between the sides stay: queries by keys, values by the output projection. The group
    is GL(k) per unit, or what of it commutes with all that lies between the sides.

    Args:
        plus: slots that G multiplies.
        minus: slots that G⁻ᵀ multiplies; all must agree in the number of units and in k.
        group: ``"all"`` of GL(k); ``"complex"``, for k = 2: aI + bJ, which commute with turns of a
            plane, as rotary embeddings make them; ``"scale"``: aI with a > 0.
        offset: what is multiplied, on both sides, is the parameters plus this number: 1 for the
            1 + γ of Gemma's norms.

    Raises:
        ValueError: an unknown kind or group, a side without slots, slots that disagree, or complex
            numbers of another k than 2.
    """

    kind: str
    where: str
    plus: tuple[RotatedAxis, ...]
    minus: tuple[RotatedAxis, ...]
    group: str = "all"
    offset: float = 0.0

    def __post_init__(self) -> None:
        check_kind(self.kind)
        shapes = {(s.indices.shape[0], s.indices.shape[2]) for s in self.plus + self.minus}
        if not self.plus or not self.minus or len(shapes) != 1:
            raise ValueError(f"{self}: both sides need slots of the same (units, k), got {shapes}")
        if self.group not in ("all", "complex", "scale"):
            raise ValueError(f"{self}: Invalid group={self.group!r}: all, complex or scale")
        if self.group == "complex" and self.shape[1] != 2:
            raise ValueError(f"{self}: complex numbers have two entries, got {self.shape[1]}")

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(slot.parameter for slot in self.plus + self.minus))

    @property
    def shape(self) -> tuple[int, int]:
        """(units, k)."""
        units, _, k = self.plus[0].indices.shape
        return units, k

    def dimension(self, params: Params) -> int:
        return self.shape[0] * len(self._algebra())

    def _algebra(self) -> Tensor:
        """A basis of the group's Lie algebra, (dimension of a unit, k, k)."""
        k = self.shape[1]
        one = torch.eye(k, dtype=torch.float64)
        if self.group == "scale":
            return one[None]
        if self.group == "complex":
            return torch.stack([one, torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()])
        return torch.eye(k * k, dtype=torch.float64).reshape(k * k, k, k)

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        """Matrices G, (units, k, k), whose singular values lie in e^±spread."""
        units, k = self.shape
        turns = torch.randn(2, units, k, k, generator=generator, dtype=torch.float64)
        uniform = 2 * torch.rand(units, k, generator=generator, dtype=torch.float64) - 1
        scales = (spread * uniform).exp()
        if self.group == "all":
            u, v = torch.linalg.qr(turns).Q
            element = (u * scales[:, None, :]) @ v.mT
        else:
            element = scales[:, :1, None] * torch.eye(k, dtype=torch.float64)
        if self.group == "complex":
            angle = math.pi * uniform[:, 1, None, None]
            one, turn = self._algebra()
            element = element @ (angle.cos() * one + angle.sin() * turn)
        return element.to(params[self.parameters[0]])

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        for side, matrix in ((self.plus, element), (self.minus, torch.linalg.inv(element).mT)):
            for name, axis, indices in side:
                rows = unit_view(params[name], axis)
                index = torch.from_numpy(indices).to(rows.device)
                turn = matrix.to(rows)
                moved = torch.einsum("uij,ucjd->ucid", turn, rows[index])
                if self.offset:  # G (w + offset) - offset
                    one = torch.eye(turn.shape[1], dtype=turn.dtype, device=turn.device)
                    moved = moved + self.offset * (turn - one).sum(2)[:, None, :, None]
                rows[index] = moved

    def _side(self, params: Params, side: tuple[RotatedAxis, ...]) -> Tensor:
        """All slices of a side, (units, slices, k), in float64."""
        slices = []
        for name, axis, indices in side:
            rows = unit_view(params[name], axis).double() + self.offset
            index = torch.from_numpy(indices).to(rows.device)
            slices.append(rows[index].movedim(2, 3).flatten(1, 2))
        return torch.cat(slices, 1)

    @torch.no_grad()
    def balancing(self, params: Params) -> tuple[Tensor, float] | None:
        """Equal moments Σ x xᵀ of both sides, by the symmetric positive G; of numbers, equal norms.

        A unit with a side that does not span its k dimensions has no balanced point and stays as it
        is.
        """
        plus, minus = (self._side(params, side) for side in (self.plus, self.minus))
        one = torch.eye(self.shape[1], dtype=plus.dtype, device=plus.device)
        if self.group != "all":  # |c X|² + |Y / c|², whatever the turn
            sizes = [side.square().sum((1, 2)).log() / 2 for side in (plus, minus)]
            log_scale = (sizes[1] - sizes[0]) / 2
            log_scale = torch.where(log_scale.isfinite(), log_scale, 0.0)
            element, moved = log_scale.exp()[:, None, None] * one, log_scale.abs().max()
        elif min(plus.shape[1], minus.shape[1]) < len(one):
            return None
        else:
            # X = Rᵀ Qᵀ on both sides: what stays is the product R R'ᵀ = U Σ Vᵀ, and balanced sides
            # are √Σ Uᵀ and √Σ Vᵀ, up to a rotation of both
            r, r_minus = (torch.linalg.qr(side, mode="r").R for side in (plus, minus))
            spans = torch.stack([_spans(r), _spans(r_minus)]).all(0)[:, None, None]
            r, r_minus = (torch.where(spans, each, one) for each in (r, r_minus))
            u, middle, _ = torch.linalg.svd(r @ r_minus.mT)
            turned = torch.linalg.solve(r, u * middle.sqrt()[:, None, :]).mT
            _, scales, axes = torch.linalg.svd(turned)  # its polar factor is symmetric
            element, moved = axes.mT @ (scales[..., None] * axes), scales.log().abs().max()
        return element.to(params[self.parameters[0]]), float(moved)

    @torch.no_grad()
    def velocities(self, params: Params) -> dict[str, Tensor]:
        algebra = self._algebra()
        moved: dict[str, Tensor] = {}
        units = self.shape[0]
        for side, matrices in ((self.plus, algebra), (self.minus, -algebra.mT)):
            for name, axis, indices in side:
                rows = unit_view(params[name].detach().double().cpu(), axis) + self.offset
                each = rows.new_zeros(units, len(algebra), *rows.shape)
                for unit, copies in enumerate(torch.from_numpy(indices)):
                    for copy in copies:
                        each[unit, :, copy] = matrices @ rows[copy]
                flat = each.flatten(0, 1)
                flat = flat.mT if axis else flat
                moved[name] = moved.get(name, 0) + flat.reshape(-1, *params[name].shape)
        return moved

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        units, k = self.shape
        moment = torch.zeros(units, k, k, dtype=torch.float64)
        size = torch.zeros(units, dtype=torch.float64)
        for side, sign in ((self.plus, 1), (self.minus, -1)):
            for name, axis, indices in side:
                index = torch.from_numpy(indices)
                rows, grad = (
                    unit_view(t[name], axis).double().cpu()[index] for t in (params, grads)
                )
                part = torch.einsum("ucid,ucjd->uij", grad, rows + self.offset)
                moment += part if sign > 0 else -part.mT
                size += part.square().sum((1, 2))
        along = torch.einsum("nij,uij->un", self._algebra(), moment)
        return ratio(float(along.square().sum()), float(size.sum()))


def _spans(matrices: Tensor) -> Tensor:
    """Which of several matrices have full rank."""
    singular = torch.linalg.svdvals(matrices)
    return singular[:, -1] > SPANNED * singular[:, 0]


class Translated(NamedTuple):
    """A parameter to which a vector is added, times ``rate``, at all places of its other axis.

    ``axis`` is the one along which the vector lies: 1 adds it to every row of a matrix, 0 to every
    column, -1 to every filter of a convolution, which it is as long as. ``indices`` are those that
    it is added to, None for all; ``axis`` None adds the same number to all entries.
    ``places`` are the first and the end of those along the other axes, taken as one: the rows of a
    head, or the positions of a table that some tokens have; None for all.
    """

    parameter: str
    axis: int | None
    rate: float = 1.0
    indices: tuple[int, ...] | None = None
    places: tuple[int, int] | None = None


@dataclass(frozen=True)
class Translation(Gauge):
    """The same vector added to several parameters, times a rate of each. The group is (R^n, +).

    Args:
        slots: what it is added to; all must agree in n.

    Raises:
        ValueError: an unknown kind, or no slots.
    """

    kind: str
    where: str
    slots: tuple[Translated, ...]

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if not self.slots:
            raise ValueError(f"{self}: a translation needs parameters")

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(slot.parameter for slot in self.slots))

    def dimension(self, params: Params) -> int:
        slot = self.slots[0]
        return len(coordinates(params[slot.parameter], slot)[1])

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        drawn = torch.randn(self.dimension(params), generator=generator, dtype=torch.float64)
        return (spread * drawn).to(params[self.slots[0].parameter])

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        for slot in self.slots:
            rows, index = coordinates(params[slot.parameter], slot)
            rows[index] += slot.rate * element.to(rows)[:, None]

    def squares(self, params: Params) -> tuple[Tensor, Tensor]:
        """The squared norm of what is moved, as a function of the vector v added: but for a
        constant, v² times the first and 2 v times the second.
        """
        curvature, slope = torch.zeros(2, self.dimension(params), dtype=torch.float64)
        for slot in self.slots:
            rows, index = coordinates(params[slot.parameter].detach().double().cpu(), slot)
            curvature += slot.rate**2 * rows.shape[1]
            slope += slot.rate * rows[index].sum(1)
        return curvature, slope

    @torch.no_grad()
    def balancing(self, params: Params) -> tuple[Tensor, float] | None:
        """Least squares."""
        curvature, slope = self.squares(params)
        element = -slope / curvature
        return element.to(params[self.slots[0].parameter]), rms(element)

    @torch.no_grad()
    def velocities(self, params: Params) -> dict[str, Tensor]:
        count = self.dimension(params)
        moved: dict[str, Tensor] = {}
        for slot in self.slots:
            shape = params[slot.parameter].shape
            each = torch.zeros(count, *shape, dtype=torch.float64)
            for i in range(count):
                rows, index = coordinates(each[i], slot)
                rows[index[i]] += slot.rate
            moved[slot.parameter] = moved.get(slot.parameter, 0) + each
        return moved

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        total = torch.zeros(self.dimension(params), dtype=torch.float64)
        length, size = 0.0, 0.0
        for slot in self.slots:
            rows, index = coordinates(grads[slot.parameter].double().cpu(), slot)
            total += slot.rate * rows[index].sum(1)
            length += slot.rate**2 * rows.shape[1]
            size += float(rows[index].square().sum())
        size += typical(grads) * len(total)  # all that a bias is may lie along the orbit
        return ratio(float(total.square().sum()) / length, size)


def typical(grads: Params) -> float:
    """Mean square of an entry of the model's gradient."""
    squares = sum(float(grad.double().square().sum()) for grad in grads.values())
    return squares / sum(grad.numel() for grad in grads.values())


def coordinates(tensor: Tensor, slot: Translated) -> tuple[Tensor, Tensor]:
    """A view (coordinates, entries that move alike), and the coordinates that a translation
    moves.
    """
    rows = rows_of(tensor, slot.axis)
    if slot.places is not None:
        rows = rows[:, slice(*slot.places)]
    if slot.indices is None:
        return rows, torch.arange(len(rows), device=rows.device)
    return rows, torch.tensor(slot.indices, device=rows.device)


def rows_of(tensor: Tensor, axis: int | None) -> Tensor:
    """A view of a parameter as (entries along an axis, all others); of None, one row; of -1, all
    axes but the first as one, and the first.
    """
    if axis is None:
        return tensor.view(1, -1)
    if axis == -1:
        return tensor.flatten(1).mT
    moved = tensor.movedim(axis, 0)
    return moved.unsqueeze(1) if tensor.ndim == 1 else moved.flatten(1)


class Sheared(NamedTuple):
    """A linear map that takes back what a bias before it adds: bias -= rate W v.

    ``columns`` are the indices along ``axis`` of the weight that read the vector, (copies, n), and
    ``rate`` what it is multiplied by before they do. One without a bias takes it back by its rows
    (:class:`Shear`).
    """

    weight: str
    axis: int
    columns: np.ndarray
    bias: str | None
    rate: float = 1.0


@dataclass(frozen=True, eq=False)
class Shear(Gauge):
    """A vector added to biases, and taken back by the biases of the linear maps that read it. The
    group is (R^n, +).

    Behind a norm that centres, a reader without a bias has another way: its rows move by multiples
    of 1/γ, whose product with γ x + β is a constant.

    Args:
        slots: the biases that it is added to.
        readers: the linear maps, none of which may have a bias that it is added to.
        scale: γ, where a reader has no bias; the one slot is then β.

    Raises:
        ValueError: an unknown kind, or no slots or readers.
    """

    kind: str
    where: str
    slots: tuple[Translated, ...]
    readers: tuple[Sheared, ...]
    scale: str | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if not self.slots or not self.readers:
            raise ValueError(f"{self}: a shear needs biases and their readers")

    @property
    def parameters(self) -> tuple[str, ...]:
        names = [slot.parameter for slot in self.slots]
        names += [name for reader in self.readers for name in (reader.weight, reader.bias) if name]
        return tuple(dict.fromkeys([*names, *([self.scale] if self.scale else [])]))

    @property
    def _shift(self) -> Translation:
        return Translation(self.kind, self.where, self.slots)

    def dimension(self, params: Params) -> int:
        return self._shift.dimension(params)

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        return self._shift.sample(params, generator, spread)

    def _responses(self, params: Params) -> Iterator[tuple[Sheared, Tensor]]:
        """Reader by reader, how much its output changes with the vector: (outputs, n)."""
        for reader in self.readers:
            weight = params[reader.weight]
            rows = unit_view(weight, reader.axis)
            change = rows[torch.from_numpy(reader.columns).to(rows.device)].sum(0).mT
            places = weight[0, 0].numel() if weight.ndim > 2 else 1  # of a convolution's kernel
            yield reader, reader.rate * change.unflatten(0, (-1, places)).sum(1)

    def _inverse(self, params: Params) -> tuple[Tensor, Tensor]:
        """1/γ, and Σ β/γ, by which the output of a row changes with it."""
        assert self.scale is not None
        inverse = 1 / params[self.scale]
        return inverse, (inverse * params[self.slots[0].parameter]).sum()

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        require_no_zero(self, params)
        changes = [(each, matrix @ element.to(matrix)) for each, matrix in self._responses(params)]
        self._shift.act_(params, element)
        for reader, change in changes:
            if reader.bias is not None:
                params[reader.bias].sub_(change)
            else:
                columns = unit_view(params[reader.weight], reader.axis)
                inverse, sum_ = self._inverse(params)
                columns.sub_((inverse / sum_)[:, None] * change)

    @torch.no_grad()
    def balancing(self, params: Params) -> tuple[Tensor, float] | None:
        """Least squares, where every reader has a bias; else the problem is not convex."""
        if self.scale is not None:
            return None
        diagonal, slope = self._shift.squares(params)
        curvature = diagonal.diag()
        held = {name: params[name].detach().double().cpu() for name in self.parameters}
        responses: dict[str, Tensor] = {}
        for reader, matrix in self._responses(held):
            assert reader.bias is not None
            responses[reader.bias] = responses.get(reader.bias, 0) + matrix
        for bias, matrix in responses.items():
            curvature = curvature + matrix.mT @ matrix
            slope = slope - matrix.mT @ held[bias]
        element = -torch.linalg.solve(curvature, slope)
        return element.to(params[self.slots[0].parameter]), rms(element)

    @torch.no_grad()
    def velocities(self, params: Params) -> dict[str, Tensor]:
        held = {name: params[name].detach().double().cpu() for name in self.parameters}
        # all of them times Σ β/γ, where readers divide by it: at β = 0 they move alone
        inverse, pace = (None, 1.0) if self.scale is None else self._inverse(held)
        moved = {name: pace * each for name, each in self._shift.velocities(held).items()}
        for reader, matrix in self._responses(held):
            if reader.bias is not None:
                moved[reader.bias] = moved.get(reader.bias, 0) - pace * matrix.mT
            else:
                assert inverse is not None
                each = -matrix.mT[:, None, :] * inverse[:, None]
                moved[reader.weight] = each if reader.axis == 0 else each.mT
        return moved

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        held, slopes = (
            {name: each[name].detach().double().cpu() for name in self.parameters}
            for each in (params, grads)
        )
        inverse, pace = (None, 1.0) if self.scale is None else self._inverse(held)
        # gradients times velocities, which are not formed: they are as large as n weights
        along, size = torch.zeros(self.dimension(params), dtype=torch.float64), 0.0
        for slot in self.slots:
            rows, index = coordinates(slopes[slot.parameter], slot)
            part = pace * slot.rate * rows[index]
            along, size = along + part.sum(1), size + float(part.square().sum())
        for reader, matrix in self._responses(held):
            if reader.bias is not None:
                part = -pace * (matrix.mT @ slopes[reader.bias])[:, None]
            else:
                assert inverse is not None
                columns = unit_view(slopes[reader.weight], reader.axis)
                part = -matrix.mT @ (columns * inverse[:, None]).mT
            along, size = along + part.sum(1), size + float(part.square().sum())
        return ratio(float(along.square().sum()), size)


def require_no_zero(gauge: Gauge, params: Params) -> None:
    """Make sure that a gauge can divide by the scales by which it does.

    Args:
        gauge: any.
        params: by name; what is absent, split or without values says nothing.

    Raises:
        ValueError: an entry of a scale has no finite inverse in its dtype.
    """
    match gauge:
        case StreamRotation():
            scales: dict[str | None, float] = {scale: 0.0 for _, scale in gauge.shifts}
            scales |= {each.scale: each.offset for each in (*gauge.writers, *gauge.readers)}
        case ScaledShift() | Shear():
            scales = {gauge.scale: 0.0}
        case _:
            return
    for name, offset in scales.items():
        if name is None or name not in params or is_fake(params[name]) or is_split(params[name]):
            continue
        if not bool((1 / (params[name].detach() + offset)).isfinite().all()):
            raise ValueError(
                f"{gauge}: it divides by {name!r}, of which an entry is zero, or has no finite"
                " inverse; leave it out"
            )


@dataclass(frozen=True)
class ScaledShift(Gauge):
    """Behind a norm that centres: row i of what reads it moves by a_i / γ, its bias by what the
    norm's shift β makes of that. The group is (R^outputs, +) of each reader.

    Since the entries of a centred vector x sum to zero, a · (1/γ) (γ x + β) = a Σ β/γ.

    Of what writes to a stream of such norms, behind a layer scale γ, column j moves by a_j / γ, a
    bias by a / γ: the stream moves along the vector of ones.

    Of a convolution, whose weights are ``(outputs, channels, *kernel)``, the rows are those of all
    places of its kernel, each of which moves by an a of its own.

    Args:
        weight, axis: the reader, and the axis along which its outputs lie; of a writer its inputs.
            A vector moves as a whole.
        bias: of the reader; None where there is no β.
        scale, shift: γ and β; None for 1 and 0.

    Raises:
        ValueError: an unknown kind, or a shift without a bias.
    """

    kind: str
    where: str
    weight: str
    axis: int
    bias: str | None = None
    scale: str | None = None
    shift: str | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.shift is not None and self.bias is None:
            raise ValueError(f"{self}: behind a shift the reader needs a bias")

    @property
    def parameters(self) -> tuple[str, ...]:
        names = (self.weight, self.bias, self.scale, self.shift)
        return tuple(name for name in names if name is not None)

    def rows(self, weight: Tensor) -> Tensor:
        """A view of the weight, or of its gradient, whose last axis has the entries of γ."""
        if weight.ndim > 2:
            return weight.movedim(1 - self.axis, -1)
        return weight[None] if weight.ndim == 1 else unit_view(weight, self.axis)

    def dimension(self, params: Params) -> int:
        return self.rows(params[self.weight])[..., 0].numel()

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        drawn = torch.randn(self.dimension(params), generator=generator, dtype=torch.float64)
        return (spread * drawn).to(params[self.weight])

    def _directions(self, params: Params) -> tuple[Tensor, Tensor]:
        """1/γ, (inputs,), and Σ β/γ."""
        rows = self.rows(params[self.weight])
        inverse = rows.new_ones(rows.shape[-1])
        if self.scale is not None:
            inverse = 1 / params[self.scale]
        shift = torch.zeros_like(inverse) if self.shift is None else params[self.shift]
        return inverse, (inverse * shift).sum()

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        require_no_zero(self, params)
        inverse, sum_ = self._directions(params)
        rows = self.rows(params[self.weight])
        rows.add_(element.view(rows.shape[:-1])[..., None] * inverse)
        if self.bias is not None and self.shift is not None:
            params[self.bias].sub_(element.view(len(rows), -1).sum(1) * sum_)

    @torch.no_grad()
    def balancing(self, params: Params) -> tuple[Tensor, float] | None:
        """Least squares, row by row; None where an entry of γ is zero."""
        inverse, sum_ = self._directions(params)
        if not inverse.isfinite().all():
            return None
        rows = self.rows(params[self.weight])
        slope, curvature = (rows @ inverse).view(len(rows), -1), inverse.square().sum()
        if self.bias is not None and self.shift is not None:
            # all a of an output move one bias, by their sum
            places, bias = slope.shape[1], params[self.bias]
            total = (places * sum_ * bias - slope.sum(1)) / (curvature + places * sum_**2)
            slope = slope + (sum_ * (sum_ * total - bias))[:, None]
        element = -(slope / curvature).flatten()
        return element, rms(element) * rms(inverse)

    @torch.no_grad()
    def velocities(self, params: Params) -> dict[str, Tensor]:
        require_no_zero(self, params)
        held = {name: params[name].detach().double().cpu() for name in self.parameters}
        inverse, sum_ = self._directions(held)
        count = self.dimension(params)
        moved = {self.weight: torch.zeros(count, *params[self.weight].shape, dtype=torch.float64)}
        for i, one in enumerate(torch.eye(count, dtype=torch.float64)):
            rows = self.rows(moved[self.weight][i])
            rows.copy_(one.view(rows.shape[:-1])[..., None] * inverse)
        if self.bias is not None and self.shift is not None:
            outputs = torch.eye(len(held[self.bias]), dtype=torch.float64)
            moved[self.bias] = -sum_ * outputs.repeat_interleave(count // len(outputs), 0)
        return moved

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        require_no_zero(self, params)
        inverse, sum_ = self._directions(params)
        rows = self.rows(grads[self.weight])
        parts = rows * inverse
        along, size = parts.sum(-1), float(parts.double().square().sum())
        if self.bias is not None and self.shift is not None:
            along = along.view(len(rows), -1) - sum_ * grads[self.bias][:, None]
            size += float((sum_ * grads[self.bias]).double().square().sum())
        return ratio(float(along.double().square().sum()), size)


@dataclass(frozen=True)
class Behind:
    """A parameter at the side of a stream, whose entries lie along an axis of it: a linear map that
    reads the stream behind the scale of a norm, or what writes to it, behind a layer scale perhaps.
    The scale is None for 1, and ``offset`` more than its parameter.
    """

    weight: str
    axis: int
    scale: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class StreamRotation(Gauge):
    """A rotation R of a residual stream: all that writes to it is turned, all that reads it turned
    back.

    A reader W behind a scale γ becomes W diag(γ) Rᵀ diag(γ)⁻¹, a shift β diag(γ) R diag(γ)⁻¹ β, a
    writer W behind a layer scale λ diag(λ)⁻¹ R diag(λ) W. The group is O(width); of a stream that a
    centring norm reads, what of it leaves the vector of ones as it is.

    Args:
        writers: what is added to the stream.
        readers: the linear maps behind the norms.
        shifts: (β, γ) of the norms that have both.
        width: entries of the stream.
        centred: whether the vector of ones stays.

    Raises:
        ValueError: an unknown kind, or no writers or readers.
    """

    kind: str
    where: str
    writers: tuple[Behind, ...]
    readers: tuple[Behind, ...]
    shifts: tuple[tuple[str, str], ...]
    width: int
    centred: bool

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if not self.writers or not self.readers:
            raise ValueError(f"{self}: a stream needs writers and readers")

    @property
    def parameters(self) -> tuple[str, ...]:
        sides = [*self.writers, *self.readers]
        names = [each.weight for each in sides]
        names += [name for pair in self.shifts for name in pair]
        names += [each.scale for each in sides if each.scale is not None]
        return tuple(dict.fromkeys(names))

    def dimension(self, params: Params) -> int:
        k = self.width - self.centred
        return k * (k - 1) // 2

    def _basis(self) -> Tensor:
        """Columns that span what is turned, (width, width or one less)."""
        if not self.centred:
            return torch.eye(self.width, dtype=torch.float64)
        ones = torch.ones(self.width, 1, dtype=torch.float64)
        others = torch.eye(self.width, dtype=torch.float64)[:, 1:]
        return torch.linalg.qr(torch.cat([ones, others], dim=1)).Q[:, 1:]

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        basis = self._basis()
        k = basis.shape[1]
        q, r = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))
        turn = q * r.diagonal().sign()
        rest = torch.eye(self.width, dtype=torch.float64) - basis @ basis.T
        return (basis @ turn @ basis.T + rest).to(params[self.writers[0].weight])

    def _slices(self, params: Params) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """What is turned: its parameter, a view (width, *others), whatever its strides, and the
        scale that it is behind, of which vectors along the first axis are x in x -> γ⁻¹ R γ x.
        """
        for each in (*self.writers, *self.readers):
            scale = None if each.scale is None else params[each.scale] + each.offset
            yield each.weight, params[each.weight].movedim(each.axis, 0), scale
        for shift, gamma in self.shifts:
            yield shift, params[shift], 1 / params[gamma]

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        require_no_zero(self, params)
        for _, rows, scale in self._slices(params):
            turn = element.to(rows)
            if scale is not None:
                turn = turn * scale / scale[:, None]
            rows.copy_(torch.tensordot(turn, rows, 1))

    @torch.no_grad()
    def velocities(self, params: Params) -> dict[str, Tensor]:
        require_no_zero(self, params)
        held = {name: params[name].detach().double().cpu() for name in self.parameters}
        basis = self._basis()
        first, second = torch.triu_indices(basis.shape[1], basis.shape[1], 1)
        turns = torch.einsum("in,jn->nij", basis[:, second], basis[:, first])
        turns = turns - turns.mT
        moved = {name: torch.zeros(len(turns), *held[name].shape).double() for name in held}
        still = {name: value.clone() for name, value in held.items()}
        for i, turn in enumerate(turns):
            fast = {name: each[i] for name, each in moved.items()}
            into = self._slices(_with_scales(fast, still, self))
            for (_, rows, scale), (_, out, _) in zip(self._slices(still), into, strict=True):
                matrix = turn if scale is None else turn * scale / scale[:, None]
                out += torch.tensordot(matrix, rows, 1)
        return moved

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        require_no_zero(self, params)
        basis = self._basis()
        moment, size = torch.zeros(self.width, self.width, dtype=torch.float64), 0.0
        slices = self._slices(params), self._slices(_with_scales(grads, params, self))
        for (_, rows, scale), (_, grad, _) in zip(*slices, strict=True):
            rows, grad = (each.double().cpu().reshape(self.width, -1) for each in (rows, grad))
            part = grad @ rows.T  # dL/dM of x -> M x
            if scale is not None:  # M = γ⁻¹ R γ
                scale = scale.double().cpu()
                part = part * scale / scale[:, None]
            part = basis.T @ part @ basis
            moment[: len(part), : len(part)] += part
            size += float(part.square().sum())
        return ratio(float((moment - moment.T).square().sum()) / 4, size)


def _with_scales(moved: Params, params: Params, gauge: StreamRotation) -> dict[str, Tensor]:
    """Tensors by parameter, with the model's own scales, which are read and do not move."""
    sides = (*gauge.writers, *gauge.readers)
    scales = {each.scale for each in sides if each.scale is not None}
    scales |= {scale for _, scale in gauge.shifts}
    return {**moved, **{name: params[name] for name in scales}}
