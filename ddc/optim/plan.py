"""Who does what: from a list of gauges to the stacks of parameters that a step handles at once.

The rules, from which all overlaps follow (docs/method.md):

- a parameter on the plus side of a rescale is decomposed by that rescale, together with the rest of the side;
- a parameter on the minus side is decomposed there too, unless it is on the plus side of another rescale:
  then that other one decomposes it, and this one only *dresses* it, by the norms of its plus side;
- a parameter under a logit shift is centred over the vocabulary;
- a rotation averages the second moment over the indices it turns;
- what no rescale decomposes is *free*: plain Adam, centred and averaged where the above says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

import numpy as np
import torch
from torch import Tensor

from ddc.gauges import Gauge, Rescale, Rotation, Shift
from ddc.optim.averaging import Averaging


@dataclass(frozen=True)
class Dressing:
    """A parameter is multiplied, along ``axis``, by the ``degree``-th power of the plus norms of ``gauge``."""

    gauge: Rescale
    axis: int
    degree: int


@dataclass(frozen=True)
class Role:
    """How one parameter takes part in the step. Axes are those of the parameter itself."""

    name: str
    axis: int
    averaging: Averaging | None = None
    centred: bool = False
    dressing: Dressing | None = None


@dataclass(frozen=True)
class PolarPlan:
    """What one rescale gauge decomposes. An empty minus side means that all its readers are dressed."""

    gauge: Rescale
    plus: tuple[Role, ...]
    minus: tuple[Role, ...]
    dressed: tuple[Role, ...]
    level: int


@dataclass(frozen=True)
class Plan:
    """Every parameter of the optimizer has a role in exactly one entry."""

    polar: list[PolarPlan] = field(default_factory=list)
    free: list[Role] = field(default_factory=list)


def make_plan(params: Mapping[str, Tensor], gauges: Iterable[Gauge]) -> Plan:
    """Give every parameter its role.

    Raises:
        ValueError: a gauge names a parameter that is absent or frozen, or two gauges cannot be combined.
        TypeError: an object that is no gauge.
    """
    gauges = list(gauges)
    for gauge in gauges:
        if not isinstance(gauge, Rescale | Rotation | Shift):
            raise TypeError(f"expected gauges as find_gauges returns them, got {type(gauge).__name__}")
        for name in gauge.parameters:
            if name not in params:
                raise ValueError(
                    f"{gauge}: its parameter {name!r} is not among the optimizer's. Pass named_parameters() of "
                    "the model that the gauges were found in, or leave the gauge out"
                )
            if not params[name].requires_grad:
                raise ValueError(f"{gauge}: its parameter {name!r} is frozen. Unfreeze it or leave the gauge out")

    rescales = [gauge for gauge in gauges if isinstance(gauge, Rescale)]
    plus_of = _sides(rescales, plus=True)
    minus_of = _sides(rescales, plus=False)
    centred = _centred(gauges)
    averagings = _averagings(params, gauges)

    def role(name: str, axis: int) -> Role:
        averaging = averagings.get(name)
        if averaging is not None and averaging.dim == axis + 1 and (name in plus_of or name in minus_of):
            raise ValueError(f"{name!r}: a rotation and a rescale along the same axis do not commute")
        if name in centred and (name in plus_of or (axis == 0 and name in minus_of)):
            raise ValueError(f"{name!r}: a logit shift combines with a rescale of the columns only")
        dressing = None
        if name in plus_of and name in minus_of:
            gauge, minus_axis = minus_of[name]
            if minus_axis == axis:
                raise ValueError(f"{name!r}: {gauge} and {plus_of[name][0]} rescale the same axis")
            dressing = Dressing(gauge, minus_axis, gauge.degree)
        return Role(name, axis, averaging, name in centred, dressing)

    plan = Plan()
    for gauge, level in _levels(rescales, plus_of).items():
        plan.polar.append(
            PolarPlan(
                gauge,
                plus=tuple(role(*axis) for axis in gauge.plus),
                minus=tuple(role(*axis) for axis in gauge.minus if axis.parameter not in plus_of),
                dressed=tuple(Role(*axis) for axis in gauge.minus if axis.parameter in plus_of),
                level=level,
            )
        )
    plan.free.extend(role(name, 0) for name in params if name not in plus_of and name not in minus_of)
    return plan


def _sides(rescales: list[Rescale], plus: bool) -> dict[str, tuple[Rescale, int]]:
    """For each parameter on a plus (minus) side, the gauge and the axis."""
    found: dict[str, tuple[Rescale, int]] = {}
    for gauge in rescales:
        for name, axis in gauge.plus if plus else gauge.minus:
            if name in found:
                side = "plus" if plus else "minus"
                raise ValueError(f"{name!r} is on the {side} side of both {found[name][0]} and {gauge}")
            found[name] = (gauge, axis)
    return found


def _centred(gauges: list[Gauge]) -> set[str]:
    names = [name for gauge in gauges if isinstance(gauge, Shift) for name in gauge.parameters]
    if len(set(names)) != len(names):
        raise ValueError("two logit shifts act on the same parameter")
    return set(names)


def _averagings(params: Mapping[str, Tensor], gauges: list[Gauge]) -> dict[str, Averaging]:
    slots: dict[str, list[tuple[int, np.ndarray]]] = {}
    for gauge in gauges:
        if isinstance(gauge, Rotation):
            for name, axis, indices in gauge.slots:
                slots.setdefault(name, []).append((axis, indices.reshape(-1, indices.shape[2])))
    averagings = {}
    for name, entries in slots.items():
        axes = {axis for axis, _ in entries}
        if len(axes) != 1:
            raise ValueError(f"{name!r}: rotations along two axes of one parameter are not supported")
        axis = axes.pop()
        averagings[name] = Averaging(axis + 1, [block for _, block in entries], params[name].shape[axis])
    return averagings


def _levels(rescales: list[Rescale], plus_of: Mapping[str, tuple[Rescale, int]]) -> dict[Rescale, int]:
    """Gauges in an order in which whoever dresses moves before what it dresses; equal levels are independent."""
    dressers: dict[Rescale, list[Rescale]] = {gauge: [] for gauge in rescales}
    for gauge in rescales:
        for name, _ in gauge.minus:
            if name in plus_of:
                dressers[plus_of[name][0]].append(gauge)
    try:
        order = list(TopologicalSorter(dressers).static_order())
    except CycleError as error:
        raise ValueError("rescale gauges dress each other in a circle: " + ", ".join(map(str, error.args[1]))) from None
    levels: dict[Rescale, int] = {}
    for gauge in order:
        levels[gauge] = 1 + max((levels[dresser] for dresser in dressers[gauge]), default=-1)
    return levels


def compute_dtype(param: Tensor) -> torch.dtype:
    """State and arithmetic are in float32 for lower precisions, else in the parameter's own dtype."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32
