r"""Gauges that add: a step is taken at the point of the orbit where what they add is zero.

Shifts of biases, norms and tables form a solvable group, and each has a *coordinate*, the element
by which the weights lie away from a section of its orbit: β of a norm, the bias of the values, the
mean of a table's rows. Weights are moved to the section, gradients are pulled back to it, all other
gauges and the rule see these, and afterwards weights are moved back by the same element. What the
step reads is then the same at every point of the orbit, and maps and scales of other gauges act on
it as they do on the weights (docs/method.md).

So are scales that hold at eps = 0 alone (:class:`ddc.gauges.Scale`), behind those that add: their
section has the usual norm, and their coordinate is measured where no other gauge changes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import torch
from torch import Tensor

from ddc.gauges import Gauge, Rescale, Rotation, Scale, Scaled, is_fake, is_split
from ddc.gauges.affine import (
    ScaledShift,
    Shear,
    StreamRotation,
    Translated,
    Translation,
    coordinates,
)
from ddc.gauges.base import spread_units
from ddc.gauges.parts import whole_name

#: Of these kinds all that the first parameter is may be gauge: it keeps still, for its gradient at
#: the section is no more than rounding, or what others have taken over.
STILL = ("norm_shift", "factor_bias", "value_bias", "key_bias")

Params = Mapping[str, Tensor]


def is_section(gauge: Gauge) -> bool:
    """Whether a gauge is respected by moving to a section."""
    return isinstance(gauge, Translation | Shear | ScaledShift | Scale)


class Sections:
    """The gauges of an optimizer that add, and scales that hold at eps = 0 alone.

    Args:
        gauges: those of its gauges; others are left out.
        params: its parameters by name.

    Raises:
        ValueError: a gauge whose coordinate is not defined everywhere, or parameters that cannot be
            moved to and fro.
    """

    def __init__(self, gauges: Sequence[Gauge], params: Params) -> None:
        scales = [gauge for gauge in gauges if isinstance(gauge, Scale)]
        adding = [gauge for gauge in gauges if is_section(gauge) and gauge not in scales]
        self.gauges = [*_in_order(adding), *scales]
        self.measured = {scale: _measured(scale, gauges) for scale in scales}
        read = {each.scale for of in self.measured.values() for each in of} - {None}
        names = {name for gauge in self.gauges for name in gauge.parameters} | read
        self.params = {name: param for name, param in params.items() if name in names}
        for gauge in self.gauges:
            _check(gauge, self.params)
        for scale, measured in self.measured.items():
            norms = _norms(scale, measured, self.params)
            if not is_fake(norms) and bool((norms == 0).any()):
                raise ValueError(
                    f"{scale}: {measured[0].slot.parameter!r} is zero, which no scale moves; give"
                    f" it weights, or {_without(scale)}"
                )

    def tied(self) -> list[list[tuple[str, Tensor]]]:
        """Parameters, with their names, that a gauge moves together, as of a stack."""
        return [[(name, self.params[name]) for name in g.parameters] for g in self.gauges]

    @contextlib.contextmanager
    def entered(self, grads: dict[Tensor, Tensor], restore: bool = False) -> Iterator[None]:
        """Within, weights are at the section, and ``grads`` has the gradients there that differ.

        Args:
            grads: by parameter; written to.
            restore: put back the weights as they were, where nothing has moved them.
        """
        held = {name: param.detach() for name, param in self.params.items()}
        before = {name: each.clone() for name, each in held.items()} if restore else {}
        slopes = {
            name: torch.zeros_like(held[name]) if param.grad is None else param.grad
            for name, param in self.params.items()
        }
        elements = []
        for gauge in self.gauges:
            elements.append(element := self._coordinate(gauge, held))
            gauge.act_(held, inverse(gauge, element))
            pull_back(gauge, held, slopes, element)
        for gauge in self.gauges:
            if gauge.kind in STILL:
                assert isinstance(gauge, Translation | Shear)
                name = gauge.slots[0].parameter
                slopes[name] = slopes[name].clone()
                rows, index = coordinates(slopes[name], gauge.slots[0])
                rows[index] = 0
        grads.update(
            (param, slopes[name])
            for name, param in self.params.items()
            if slopes[name] is not param.grad and param.grad is not None
        )
        try:
            yield
        finally:
            if restore:
                for name, each in before.items():
                    held[name].copy_(each)
            else:
                for gauge, element in zip(reversed(self.gauges), reversed(elements), strict=True):
                    gauge.act_(held, element)

    def elements(self, params: Params) -> dict[Gauge, Tensor]:
        """By which element each gauge has moved some weights from the section; of scales, its
        logarithm.
        """
        held = {name: params[name].detach().clone() for name in self.params}
        found = {}
        for gauge in self.gauges:
            element = self._coordinate(gauge, held)
            found[gauge] = element.log() if isinstance(gauge, Scale) else element
            gauge.act_(held, inverse(gauge, element))
        return found

    def _coordinate(self, gauge: Gauge, params: Params) -> Tensor:
        """By which element the weights lie away from the section."""
        if isinstance(gauge, Scale):
            return _norms(gauge, self.measured[gauge], params)
        return coordinate(gauge, params)


def inverse(gauge: Gauge, element: Tensor) -> Tensor:
    """The inverse of an element."""
    return 1 / element if isinstance(gauge, Scale) else -element


class Measured(NamedTuple):
    """What the coordinate of a scale is measured by: its slot, whose entries are multiplied, along
    an axis, by the parameter ``scale`` where there is one.
    """

    slot: Scaled
    scale: str | None = None
    axis: int = 0


def _measured(gauge: Scale, gauges: Sequence[Gauge]) -> list[Measured]:
    """The slots whose norm no other gauge changes: those that others turn or add to, or whose
    columns the scale of a norm dresses.

    Raises:
        ValueError: there is none.
    """
    found, blocking = [], []
    scaled = [other for other in gauges if isinstance(other, Rescale)]
    for slot in gauge.slots:
        acting = [
            other
            for other in gauges
            if other is not gauge and slot.parameter in map(whole_name, other.parameters)
        ]
        dressing: list[Measured] = []
        others: list[Gauge] = []
        for other in acting:
            if isinstance(other, StreamRotation) or is_section(other):
                continue
            if isinstance(other, Rotation) and slot.indices is None:
                continue
            if isinstance(other, Rescale) and (by := _dresses(other, slot, scaled)):
                dressing.append(by)
            else:
                others.append(other)
        blocking += others
        if not others and len(dressing) < 2:
            found.append(dressing[0] if dressing else Measured(slot))
    if not found:
        raise ValueError(
            f"{gauge}: what it scales has no norm that {blocking[0]} does not change;"
            f" {_without(gauge)}"
        )
    return found


def _dresses(other: Rescale, slot: Scaled, rescales: Sequence[Rescale]) -> Measured | None:
    """By what a rescale of the columns of a slot dresses them: the scale of a norm, if no other
    rescale has that too.
    """
    name, axis, offset = other.plus[0]
    alone = sum(name in map(whole_name, each.parameters) for each in rescales) == 1
    sides = [a.axis for a in other.minus if a.parameter == slot.parameter]
    if other.block or other.degree != 1 or offset or axis != 0 or not alone:
        return None
    if other.kind not in ("norm_scale", "channel_scale") or len(sides) != 1:
        return None
    (columns,) = sides
    if not isinstance(columns, int) or (columns == slot.axis and slot.indices is not None):
        return None
    return Measured(slot, name, columns)


def _norms(gauge: Scale, measured: Sequence[Measured], params: Params) -> Tensor:
    """The norm of each unit, over that at the 1/√fan_in initialisation."""
    squares, usual = torch.zeros(()), 0.0
    for slot, scale, axis in measured:
        weight = params[slot.parameter].detach()
        if scale is not None:
            weight = weight * spread_units(params[scale].detach(), weight, axis)
        squares = squares.to(weight) + slot.unit_sum(weight.square())
        entries = weight.numel()
        if slot.indices is not None:
            entries = entries // weight.shape[slot.axis] * slot.indices.shape[1]
        usual += entries / weight.shape[1:].numel()
    return (squares / usual).sqrt()


def _without(gauge: Gauge) -> str:
    """How to leave out a gauge, in a message."""
    return f"leave it out: [gauge for gauge in gauges if str(gauge) != {str(gauge)!r}]"


def _in_order(gauges: Sequence[Gauge]) -> list[Gauge]:
    """Gauges so that none moves what another, which came before, has at zero: the shift of a norm
    goes to the biases of its readers first, that of the values to the output's then.
    """

    def moved(gauge: Gauge) -> set[str | None]:
        match gauge:
            case Shear(slots=(_, *others), readers=readers):
                return {*(slot.parameter for slot in others), *(each.bias for each in readers)}
            case ScaledShift(bias=bias):
                return {bias}
            case Translation(slots=(_, *others)):
                return {slot.parameter for slot in others}
        return set()

    def zero(gauge: Gauge) -> str:
        return gauge.slots[0].parameter if isinstance(gauge, Shear | Translation) else ""

    before = {
        i: {j for j, other in enumerate(gauges) if j != i and zero(gauge) in moved(other)}
        for i, gauge in enumerate(gauges)
    }
    try:
        return [gauges[i] for i in TopologicalSorter(before).static_order()]
    except CycleError as error:
        circle = [gauges[i] for i in dict.fromkeys(error.args[1])]
        names = " and ".join(map(str, circle))
        raise ValueError(
            f"gauges take up each other's shifts in a circle: {names}; leave one of them out:"
            f" [gauge for gauge in gauges if str(gauge) != {str(circle[-1])!r}]"
        ) from None


def _check(gauge: Gauge, params: Params) -> None:
    """Raise ValueError for a gauge that has no section, or weights that would suffer."""
    leave_out = _without(gauge)
    if isinstance(gauge, Shear) and gauge.scale is not None:
        raise ValueError(
            f"{gauge}: a reader without a bias takes the shift back by its rows, over Σ β/γ, which"
            f" may be zero, so that no step respects it everywhere; {leave_out}"
        )
    for name in gauge.parameters:
        param = params[name]
        if is_split(param):
            raise ValueError(f"{gauge}: {name!r} is split over ranks; {leave_out}")
        if param.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{gauge}: {name!r} is {param.dtype}, and moved along the gauge and back in every"
                f" step, which would round it each time; keep it in float32, or {leave_out}"
            )
        if param.ndim > 2 and not param.is_contiguous():
            raise ValueError(
                f"{gauge}: {name!r} is not contiguous, as channels_last is not; {leave_out}"
            )


def coordinate(gauge: Gauge, params: Params) -> Tensor:
    """By which element the weights lie away from the section."""
    match gauge:
        case Translation(slots=(slot, *_)) | Shear(slots=(slot, *_)):
            return _mean(params[slot.parameter], slot)
        case ScaledShift():
            rows = gauge.rows(params[gauge.weight])
            return (rows if gauge.scale is None else rows * params[gauge.scale]).mean(-1).flatten()
    raise TypeError(f"{gauge} is none that adds")


def _mean(param: Tensor, slot: Translated) -> Tensor:
    """What a slot has of the vector that a gauge adds to it, as the mean of all places."""
    rows, index = coordinates(param, slot)
    return rows[index].mean(1) / slot.rate


def pull_back(gauge: Gauge, params: Params, grads: dict[str, Tensor], element: Tensor) -> None:
    """Gradients at the section, of those where the weights are: by the transposed derivative of the
    action of an element, which for a translation is one.

    Args:
        gauge: whose element.
        params: at the section.
        grads: by name; what changes is replaced, not written to.
        element: that moves from the section to the weights.
    """
    match gauge:
        case Scale():
            for slot in gauge.slots:
                grad = grads[slot.parameter]
                grads[slot.parameter] = grad * slot.spread(element, grad)
        case Shear():
            for reader in gauge.readers:
                assert reader.bias is not None
                grad = grads[reader.weight] = grads[reader.weight].clone()
                rows = grad.movedim(reader.axis, 0)  # (inputs, outputs, *kernel)
                columns = torch.from_numpy(reader.columns).to(rows.device)
                change = reader.rate * element[:, None] * grads[reader.bias]
                rows[columns] -= change.view(*change.shape, *[1] * (rows.ndim - 2))
        case ScaledShift(scale=scale, shift=shift):
            rows = gauge.rows(grads[gauge.weight])
            felt = element @ rows.reshape(len(element), -1)  # how the readers feel 1/γ
            inverse = 1.0 if scale is None else 1 / params[scale]
            if shift is not None and gauge.bias is not None:
                along = element.view(len(rows), -1).sum(1) @ grads[gauge.bias]
                grads[shift] = grads[shift] - along * inverse
                felt = felt - along * params[shift]
            if scale is not None:
                grads[scale] = grads[scale] - felt / params[scale].square()
