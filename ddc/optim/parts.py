"""Packed parameters, cut into the parts that gauges and hidden matrices name.

A step handles a part as a parameter of its own: it is a view of the weights, with a role, a shape
and a stack like any other. Its state is with the parameter that it is a part of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ddc.gauges import Axis, Gauge, HiddenMatrix, Rescale, RotatedAxis, Rotation, is_split
from ddc.gauges.affine import StreamRotation
from ddc.gauges.base import axes_of
from ddc.gauges.parts import Part, named_part, part_named
from ddc.optim.plan import acted_on, without
from ddc.optim.sections import is_section


@dataclass
class Cut:
    """Parameters, gauges and hidden matrices in which parts are parameters.

    Attributes:
        params: by name, parts in the place of what is cut.
        gauges: of these, in the order of those that were given; a rotation gauge of what is cut is
            one for each part.
        hidden: likewise.
        given: by gauge, the one that it was given as.
        views: of each part, what it is a view of, and which.
    """

    params: dict[str, Tensor]
    gauges: list[Gauge]
    hidden: dict[str, HiddenMatrix]
    given: dict[Gauge, Gauge]
    views: list[tuple[Tensor, Tensor, Part]] = field(default_factory=list)


def cut(
    params: Mapping[str, Tensor],
    gauges: Iterable[Gauge],
    hidden: Mapping[str, HiddenMatrix] | None = None,
) -> Cut:
    """Cut each parameter of which gauges, or hidden matrices, name a part.

    Raises:
        ValueError: parts that overlap or lie along different axes, a parameter that ranks hold
            parts of already, a gauge that does not go with the parts, or a hidden matrix of which a
            part alone is hidden.
    """
    gauges, hidden = list(gauges), dict(hidden or {})
    named: dict[str, set[Part]] = {}
    under = (gauge for gauge in gauges if isinstance(gauge, Gauge))  # others are refused later
    for name in [*hidden, *(name for gauge in under for name in acted_on(gauge))]:
        part = None if name in params else part_named(name)
        if part is not None and part.parameter in params:
            named.setdefault(part.parameter, set()).add(part)
    if not named:
        return Cut(dict(params), gauges, hidden, {gauge: gauge for gauge in gauges})
    parts = {name: cover(name, params[name], found) for name, found in named.items()}
    made: dict[str, Tensor] = {}
    views = []
    for name, param in params.items():
        if name not in parts:
            made[name] = param
        whole = param.detach()  # compilers take views of one tensor alone
        for part in parts.get(name, ()):
            view = part.of(whole).requires_grad_(param.requires_grad)
            made[part.name] = view
            views.append((view, param, part))
    given = {each: gauge for gauge in gauges for each in among(gauge, parts)}
    return Cut(made, [*given], hidden_among(hidden, parts), given, views)


def cover(name: str, param: Tensor, named: Collection[Part]) -> list[Part]:
    """Parts of which a parameter is made: those that are named, and what is left, as ranges."""
    if is_split(param):
        raise ValueError(
            f"{name!r} is split over ranks, and gauges or hidden matrices name a part of it"
            f" ({min(named).name!r}): only whole parameters are cut. Leave these gauges out, with"
            " whole matrices as hidden"
        )
    axis, *others = {part.axis for part in named}
    size = param.shape[axis] if axis < param.ndim else 0
    taken = [index for part in named for index in part.indices]
    empty = any(not part.indices for part in named)
    if others or empty or len({*taken}) < len(taken) or max(taken) >= size:
        names = ", ".join(part.name for part in sorted(named))
        raise ValueError(
            f"{name!r}, of shape {tuple(param.shape)}, cannot be cut into {names}: expected parts"
            " along one axis that do not overlap, none empty. Find gauges and hidden matrices of"
            " this very model"
        )
    rest = np.setdiff1d(np.arange(size), taken)
    runs = np.split(rest, np.flatnonzero(np.diff(rest) > 1) + 1) if len(rest) else []
    left = [part_named(_regular(name, axis, run, size)) for run in _joined(runs)]
    return sorted([*named, *(part for part in left if part is not None)], key=lambda p: p.start)


def _joined(runs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Runs of indices; single indices at equal distances as one."""
    if len(runs) > 1 and all(len(run) == 1 for run in runs):
        together = np.concatenate(runs)
        if len({*np.diff(together)}) == 1:
            return [together]
    return list(runs)


def _regular(name: str, axis: int, indices: np.ndarray, size: int) -> str:
    return named_part(name, axis, indices.tolist(), size)


def among(gauge: Gauge, parts: Mapping[str, Sequence[Part]]) -> list[Gauge]:
    """A gauge of whole parameters as one of their parts; of a rotation, one for each."""
    if not {*acted_on(gauge)} & parts.keys():
        return [gauge]
    if isinstance(gauge, Rescale):
        sides = (
            tuple(each for axis in side for each in axes_among(gauge, axis, parts))
            for side in (gauge.plus, gauge.minus)
        )
        plus, minus = sides
        return [replace(gauge, plus=plus, minus=minus)]
    if isinstance(gauge, Rotation):
        slots = [each for slot in gauge.slots for each in slots_among(gauge, slot, parts)]
        return [replace(gauge, slots=(slot,)) for slot in slots]
    if isinstance(gauge, StreamRotation):
        writers, readers = (
            tuple(
                replace(each, weight=name)
                for each in side
                for name, _ in vectors_among(gauge, each.weight, each.axis, parts)
            )
            for side in (gauge.writers, gauge.readers)
        )
        return [replace(gauge, writers=writers, readers=readers)]
    if is_section(gauge):
        return [gauge]  # a step is taken where it has nothing to add, on whole parameters
    (name, *_) = {*acted_on(gauge)} & parts.keys()
    raise ValueError(f"{gauge}: it does not go with parts of {name!r}. {without(gauge)}")


def vectors_among(
    gauge: Gauge, name: str, axis: int, parts: Mapping[str, Sequence[Part]]
) -> list[tuple[str, int]]:
    """What reads or writes a stream along an axis, of parts, which must lie along another."""
    of_name = parts.get(name, ())
    if any(part.axis == axis for part in of_name):
        raise ValueError(f"{gauge}: it turns all of {name!r}, which is cut. {without(gauge)}")
    return [(part.name, axis) for part in of_name] or [(name, axis)]


def axes_among(gauge: Gauge, axis: Axis, parts: Mapping[str, Sequence[Part]]) -> list[Axis]:
    """A side of a rescale, of parts: units that lie along another axis than that which is cut."""
    if axis.parameter not in parts:
        return [axis]
    for part in parts[axis.parameter]:
        if part.axis in axes_of(axis.axis):
            raise ValueError(
                f"{gauge}: its units are those of all of {axis.parameter!r}, of which other gauges"
                f" act on a part, {part.name!r}. {without(gauge)}"
            )
    return [axis._replace(parameter=part.name) for part in parts[axis.parameter]]


def slots_among(
    gauge: Gauge, slot: RotatedAxis, parts: Mapping[str, Sequence[Part]]
) -> list[RotatedAxis]:
    """What a rotation turns, of parts. It is taken apart, for a step averages over what turns
    together and needs no more.
    """
    if slot.parameter not in parts:
        return [slot]
    turned = slot.indices.reshape(-1, 1, slot.indices.shape[2])
    if parts[slot.parameter][0].axis != slot.axis:
        return [slot._replace(parameter=p.name, indices=turned) for p in parts[slot.parameter]]
    found, seen = [], 0
    for part in parts[slot.parameter]:
        inside = np.isin(turned, part.indices)
        here = turned[inside.all((1, 2))]
        seen += len(here)
        if len(here):
            local = (here - part.start) // part.step
            found.append(RotatedAxis(part.name, slot.axis, local))
    if seen < len(turned):
        raise ValueError(
            f"{gauge}: it turns indices of several parts of {slot.parameter!r}. {without(gauge)}"
        )
    return found


def hidden_among(
    hidden: Mapping[str, HiddenMatrix], parts: Mapping[str, Sequence[Part]]
) -> dict[str, HiddenMatrix]:
    """Hidden matrices, with the parts in the place of what is cut."""
    found: dict[str, HiddenMatrix] = {}
    for name, matrix in hidden.items():
        if name not in parts:
            found[name] = matrix
            continue
        if matrix.heads > 1:
            raise ValueError(
                f"hidden matrix {name!r}: it has {matrix.heads} heads, and is cut into"
                f" {', '.join(part.name for part in parts[name])}. Name the heads of each part:"
                f" HiddenMatrix({parts[name][0].name!r}, heads=...)"
            )
        found |= {part.name: HiddenMatrix(part.name) for part in parts[name]}
    for name, of_name in parts.items():
        is_hidden = [part.name in found for part in of_name]
        if any(is_hidden) and not all(is_hidden):
            other = of_name[is_hidden.index(False)].name
            raise ValueError(
                f"hidden matrices are parts of {name!r}, but not {other!r}: one rate is for all of"
                " a parameter. Name all parts, or the whole"
            )
    return found


class Views:
    """The parts that an optimizer steps, as views of its parameters."""

    def __init__(self) -> None:
        self.views: list[tuple[Tensor, Tensor, Part]] = []

    def add(self, views: Iterable[tuple[Tensor, Tensor, Part]]) -> None:
        self.views += views

    def joined(
        self, states: Mapping[Tensor, dict[str, Tensor]]
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """States by parameter; that of a part is its parameter's, by keys that name the part."""
        parts = {id(view): (param, part) for view, param, part in self.views}
        for tensor, state in states.items():
            if id(tensor) in parts:
                param, part = parts[id(tensor)]
                which = part.name.removeprefix(part.parameter)
                yield param, {key + which: value for key, value in state.items()}
            else:
                yield tensor, state

    def among(self, grads: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Of gradients by parameter, those of the parts."""
        return {view: part.of(grads[param]) for view, param, part in self.views if param in grads}

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Parts of the weights and gradients that parameters have now; no gradient is kept."""
        try:
            for view, param, part in self.views:
                weights = part.of(param.data)
                if view.data_ptr() != weights.data_ptr() or view.dtype != weights.dtype:
                    view.data = weights
                view.requires_grad = param.requires_grad
                view.grad = None if param.grad is None else part.of(param.grad)
            yield
        finally:
            for view, _, _ in self.views:
                view.grad = None
