"""Who does what: from a list of gauges to the stacks of parameters that a step handles at once.

The rules, from which all overlaps follow (docs/method.md):

- a *hidden* matrix (there are some in DDCMuon only) is never decomposed unit by unit; every rescale
  dresses it;
- a side of a rescale that holds no hidden matrix is decomposed. Where the other side does hold one,
  the norms of this side keep still and dress the other; where both sides do, the rescale is *inner*
  and dresses both by its path norms;
- what shares a side with a hidden matrix (a bias) is dressed as well, and else free;
- where no side holds one: a parameter on the plus side is decomposed there, together with the rest
  of the side; a parameter on the minus side is decomposed there too, unless it is on the plus side
  of another rescale: then that other one decomposes it, and this one only *dresses* it, by the
  norms of its plus side;
- a chain decomposes each of its layers, but for the hidden ones, as a whole;
- a rescale of blocks decomposes each side as one unit; where all of them are hidden it dresses
  nothing, for a hidden matrix steps in its norm and its direction by itself;
- a parameter under a logit shift is centred over the vocabulary;
- a rotation averages the second moment over the indices it turns;
- a parameter under a general linear map (an adapter, a head) is never decomposed: it steps together
  with the other side of its map, and every rescale of its other axis only dresses it. Where a
  rescale has it on the plus side, the minus side decomposes and dresses, and what shares a side
  with it (a bias) is dressed and else free;
- what writes to or reads a stream that turns is averaged over its width, but for hidden matrices,
  whose step turns by itself; what reads it is only dressed, by the scale of its norm;
- what nothing decomposes is *free*: plain Adam, centred, averaged and dressed where the above says
  so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ddc.gauges import KINDS, Axis, Chain, Gauge, General, Rescale, RotatedAxis, Rotation, Shift
from ddc.gauges.affine import ScaledShift, Shear, StreamRotation, require_no_zero
from ddc.gauges.base import UnitAxis, axes_of
from ddc.gauges.parts import whole_name
from ddc.optim.averaging import Averaging
from ddc.optim.sections import is_section


@dataclass(frozen=True)
class Dressing:
    """A parameter is multiplied, along ``axis``, by the ``degree``-th power of the plus norms of
    ``gauge``.
    """

    gauge: Rescale
    axis: int | tuple[int, ...]
    degree: float


@dataclass(frozen=True)
class Role:
    """How one parameter takes part in the step. Axes are those of the parameter itself.

    An ``axis`` of None makes the whole parameter one unit; with ``heads``, each of these is a unit,
    as many indices of the axis. What steps is the parameter plus ``offset``.
    """

    name: str
    axis: UnitAxis
    averaging: Averaging | None = None
    centred: bool = False
    dressing: Dressing | None = None
    heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class PolarPlan:
    """What one rescale gauge decomposes. An empty minus side means that all its readers are
    dressed.
    """

    gauge: Rescale
    plus: tuple[Role, ...]
    minus: tuple[Role, ...]
    dressed: tuple[Role, ...]
    level: int


@dataclass(frozen=True)
class ChainPlan:
    """The layers that a chain decomposes as wholes. Where others are hidden (``still``), their
    norms keep still.
    """

    gauge: Chain
    layers: tuple[Role, ...]
    still: bool


@dataclass(frozen=True)
class InnerPlan:
    """A rescale with hidden matrices on both sides. Its level is one more than that of those it is
    dressed by.
    """

    gauge: Rescale
    plus: tuple[Axis, ...]
    minus: tuple[Axis, ...]
    level: int


@dataclass(frozen=True)
class FactorPlan:
    """Gauges of general linear maps that share parameters, and the roles of all of these."""

    gauges: tuple[General, ...]
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Plan:
    """Every parameter of the optimizer has a role in exactly one of ``polar``, ``chains``,
    ``factors``, ``free`` and ``hidden``.

    ``hidden`` has the dressings of each hidden matrix; ``linked``, pairs of hidden matrices (P, M,
    k) whose norms a gauge moves against each other, by c and c^-k; ``moved``, those of them that
    a block links, which dresses neither.
    """

    polar: list[PolarPlan] = field(default_factory=list)
    chains: list[ChainPlan] = field(default_factory=list)
    inner: list[InnerPlan] = field(default_factory=list)
    factors: list[FactorPlan] = field(default_factory=list)
    free: list[Role] = field(default_factory=list)
    hidden: dict[str, tuple[Dressing, ...]] = field(default_factory=dict)
    linked: list[tuple[str, str, float]] = field(default_factory=list)
    moved: list[tuple[str, str, float]] = field(default_factory=list)


def make_plan(
    params: Mapping[str, Tensor], gauges: Iterable[Gauge], hidden: Collection[str] = ()
) -> Plan:
    """Give every parameter its role.

    Args:
        params: the optimizer's parameters by name.
        gauges: those that the step respects.
        hidden: names of the hidden matrices.

    Raises:
        ValueError: a gauge names a parameter that is absent or frozen, or two gauges cannot be
            combined.
        TypeError: an object that is no gauge.
    """
    gauges = list(gauges)
    _check_gauges(params, gauges, hidden)
    chains = [gauge for gauge in gauges if isinstance(gauge, Chain)]
    rescales = [gauge for gauge in gauges if isinstance(gauge, Rescale)]
    _check_chains(chains, rescales)
    streams = [gauge for gauge in gauges if isinstance(gauge, StreamRotation)]
    mapped = _mapped(gauges, hidden)
    sorted_ = _sort_rescales(rescales, hidden, mapped)
    for stream in streams:
        _check_stream(stream, gauges, [*sorted_.sided, *sorted_.inner])
    dressings = _hidden_dressings(sorted_, hidden)
    turned = [each for stream in streams for each in stream.writers if each.scale is not None]
    turned += [each for stream in streams for each in stream.readers]
    dressed = {each.weight for each in turned} - {*hidden}
    roles = _Roles(params, gauges, sorted_.sided, dressings, mapped, dressed, hidden)
    inner = _inner_plans(sorted_.inner, hidden)
    decomposed = {*roles.plus_of, *(roles.minus_of.keys() - dressed), *hidden, *mapped}
    decomposed.update(name for chain in chains for name in chain.weights)
    return Plan(
        polar=_polar_plans(sorted_.sided, roles),
        chains=_chain_plans(chains, roles, hidden),
        inner=inner,
        factors=_factor_plans(gauges, roles),
        free=[
            roles.of(name, None if name in dressed else 0)
            for name in params
            if name not in decomposed
        ],
        hidden={name: tuple(dressings[name]) for name in hidden},
        linked=_linked(chains, [*sorted_.blocks, *(each.gauge for each in inner)], hidden),
        moved=_linked([], sorted_.blocks, hidden),
    )


# ---- which rescales decompose, and which only dress


class _Rescales(NamedTuple):
    """Rescales by what they do: ``sided`` ones decompose a side or two, ``inner`` ones dress hidden
    matrices on both sides, ``blocks`` of hidden matrices dress nothing. Of the sided ones, all
    that is on the minus side of one that is ``turned`` round is dressed.
    """

    sided: list[Rescale]
    inner: list[Rescale]
    blocks: list[Rescale]
    turned: list[Rescale]


def _sort_rescales(
    rescales: list[Rescale], hidden: Collection[str], mapped: Mapping[str, General]
) -> _Rescales:
    found = _Rescales([], [], [], [])
    for gauge in rescales:
        plus_hidden, minus_hidden = (
            any(a.parameter in hidden for a in side) for side in (gauge.plus, gauge.minus)
        )
        if gauge.block and (plus_hidden or minus_hidden):
            _check_block(gauge, hidden)
            found.blocks.append(gauge)
        elif of_map := [a.parameter for a in gauge.plus if a.parameter in mapped]:
            found.sided.append(_turned(gauge, mapped[of_map[0]], hidden, mapped))
            found.turned.append(found.sided[-1])
        elif plus_hidden and minus_hidden:
            found.inner.append(gauge)
        elif plus_hidden:  # the side that dresses comes first
            found.sided.append(_other_way_round(gauge))
        else:
            found.sided.append(gauge)
    return found


def _other_way_round(gauge: Rescale) -> Rescale:
    """The same gauge with its sides exchanged."""
    return Rescale(gauge.kind, gauge.where, gauge.minus, gauge.plus, 1 / gauge.degree, gauge.block)


def _turned(
    gauge: Rescale, of_map: General, hidden: Collection[str], mapped: Mapping[str, General]
) -> Rescale:
    """A rescale whose plus side a map holds as well, so that its minus side is what decomposes."""
    held = [a.parameter for a in gauge.minus if a.parameter in mapped or a.parameter in hidden]
    if held or gauge.block:
        what = f"{held[0]!r} on its other side" if held else "a block as a whole"
        raise ValueError(
            f"{gauge} scales outputs of what {of_map} maps, and {what}, neither of which has norms"
            f" to dress the other by. Of these, {without(gauge, of_map)}"
        )
    return _other_way_round(gauge)


def _hidden_dressings(rescales: _Rescales, hidden: Collection[str]) -> dict[str, list[Dressing]]:
    """What dresses each hidden matrix, and what shares a side with one."""
    dressings: dict[str, list[Dressing]] = {name: [] for name in hidden}
    # by the norms of the other side
    for gauge in rescales.sided:
        if gauge in rescales.turned or any(axis.parameter in hidden for axis in gauge.minus):
            for name, axis, offset in gauge.minus:
                _check_no_offset(gauge, name, offset)
                dressings.setdefault(name, []).append(Dressing(gauge, axis, gauge.degree))
    # by frames
    for gauge in rescales.inner:
        for side, degree in ((gauge.plus, -1.0), (gauge.minus, gauge.degree)):
            for name, axis, offset in side:
                _check_no_offset(gauge, name, offset)
                dressings.setdefault(name, []).append(Dressing(gauge, axis, degree))
        _check_inner(gauge, rescales.inner, hidden)
    # one for each axis
    for name, several in dressings.items():
        axes = [axes_of(dressing.axis)[-1] for dressing in several]
        if len(set(axes)) != len(axes):
            both = [dressing.gauge for dressing in several]
            raise ValueError(
                f"{name!r}: {named(*both)} rescale the same axis. Of these, {without(*both)}"
            )
    return dressings


# ---- roles


class _Roles:
    """The role of each parameter, given all that acts on it.

    ``plus_of`` and ``minus_of`` are, of each parameter on a side that is decomposed, the gauge and
    the axis; ``dressings``, of those that hidden matrices bring with them, what dresses them;
    ``mapped``, of each parameter under a general linear map, one such gauge; ``dressed`` has the
    readers of streams that turn, and what writes to them behind a scale.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        gauges: list[Gauge],
        sided: list[Rescale],
        dressings: Mapping[str, list[Dressing]],
        mapped: Mapping[str, General],
        dressed: Collection[str],
        hidden: Collection[str],
    ) -> None:
        self.gauges, self.dressings, self.mapped, self.dressed = gauges, dressings, mapped, dressed
        self.plus_of = _sides(sided, plus=True)
        self.minus_of = _sides(sided, plus=False, but=dressings)
        self.centred = _centred(gauges)
        self.averagings = _averagings(params, gauges, hidden)

    def of(self, name: str, axis: UnitAxis, offset: float = 0.0) -> Role:
        """The role of a parameter whose units are along this axis."""
        self._check_axis(name, axis)
        dressing = self._dressing(name, axis)
        averaging = self.averagings.get(name)
        return Role(name, axis, averaging, name in self.centred, dressing, offset=offset)

    def _over(self, name: str, *kinds: type[Gauge]) -> list[Gauge]:
        """The gauges of these kinds that act on a parameter."""
        return [g for g in self.gauges if isinstance(g, kinds) and name in acted_on(g)]

    def _check_axis(self, name: str, axis: UnitAxis) -> None:
        """Raise ValueError where something else acts on the axis that a rescale scales, or a map
        mixes.
        """
        if name in self.mapped and name in self.centred and self._mixed(name) == 0:
            both = self._over(name, Shift, General)
            raise ValueError(
                f"{name!r}: {named(*both)} act on the same axis, which an optimizer does not"
                f" combine. Of these, {without(*both)}"
            )
        if name not in self.plus_of and name not in self.minus_of:
            return
        averaging = self.averagings.get(name)
        if averaging is not None and averaging.dim - 1 == axis:
            both = self._over(name, Rotation, Rescale)
            raise ValueError(
                f"{name!r}: {named(*both)} turn and rescale the same axis, which do not commute. Of"
                f" these, {without(*both)}"
            )
        if name in self.centred and axis == 0:
            both = self._over(name, Shift, Rescale)
            raise ValueError(
                f"{name!r}: {named(*both)} do not combine: a logit shift goes with a rescale of the"
                f" columns only. Of these, {without(*both)}"
            )

    def _dressing(self, name: str, axis: UnitAxis) -> Dressing | None:
        """What dresses a parameter that is no hidden matrix."""
        if name in self.mapped:
            return self._dressing_of_mapped(name)
        if name in self.plus_of and name in self.minus_of:
            gauge, minus_axis = self.minus_of[name]
            if minus_axis is None or axes_of(minus_axis)[-1:] == axes_of(axis)[-1:]:
                both = [gauge, self.plus_of[name][0]]
                raise ValueError(
                    f"{name!r}: {named(*both)} rescale the same axis. Of these, {without(*both)}"
                )
            return Dressing(gauge, minus_axis, gauge.degree)
        if name in self.dressed and name in self.minus_of:
            gauge, minus_axis = self.minus_of[name]
            assert minus_axis is not None
            return Dressing(gauge, minus_axis, gauge.degree)
        if name not in self.dressings:
            return None
        dressing, *others = self.dressings[name]
        turned = name in self.averagings and name not in self.dressed  # by other than a stream
        if others or turned or name in self.plus_of or name in self.centred:
            acting = self._over(name, Rescale, Rotation, Shift)
            raise ValueError(
                f"{name!r} shares a side of {dressing.gauge} with a hidden matrix and is under"
                f" another gauge as well ({named(*acting)}): make it hidden too, or"
                f" {without(*acting)}"
            )
        return dressing

    def _mixed(self, name: str) -> int:
        """The axis of a parameter that a map mixes."""
        gauge = self.mapped[name]
        return next(slot.axis for slot in gauge.plus + gauge.minus if slot.parameter == name)

    def _dressing_of_mapped(self, name: str) -> Dressing | None:
        """What dresses a parameter under a general linear map: one rescale of its other axis."""
        found = list(self.dressings.get(name, ()))
        if name in self.minus_of:
            gauge, axis = self.minus_of[name]
            found.append(Dressing(gauge, -1 if axis is None else axis, gauge.degree))
        offsets = [self.mapped[name].offset]
        for gauge in (each.gauge for each in found):
            offsets += [a.offset for a in gauge.plus + gauge.minus if a.parameter == name]
        if (
            len(found) > 1
            or any(each.axis != 1 - self._mixed(name) for each in found)
            or (found and any(offsets))
        ):
            acting = [self.mapped[name], *(each.gauge for each in found)]
            raise ValueError(
                f"{name!r}: {named(*acting)} do not combine: a map goes with one rescale, of units"
                f" along the other axis, and of the parameter as it stands. Of these,"
                f" {without(*acting)}"
            )
        return found[0] if found else None


# ---- what is decomposed, by what


def _polar_plans(sided: list[Rescale], roles: _Roles) -> list[PolarPlan]:
    """Each rescale with its sides; a reader that another one decomposes, or that is under a map, is
    only dressed.
    """
    plans, only_dressed = [], {*roles.plus_of, *roles.mapped, *roles.dressed}
    for gauge, level in _levels(sided, roles.plus_of, roles.minus_of).items():
        readers = [axis for axis in gauge.minus if axis.parameter in roles.minus_of]
        plans.append(
            PolarPlan(
                gauge,
                plus=tuple(
                    roles.of(name, gauge.unit_axis(axis), offset)
                    for name, axis, offset in gauge.plus
                ),
                minus=tuple(
                    roles.of(name, gauge.unit_axis(axis), offset)
                    for name, axis, offset in readers
                    if name not in only_dressed
                ),
                dressed=tuple(
                    Role(name, axis) for name, axis, _ in readers if name in only_dressed
                ),
                level=level,
            )
        )
    return plans


def _chain_plans(chains: list[Chain], roles: _Roles, hidden: Collection[str]) -> list[ChainPlan]:
    """Each chain with its layers, but for the hidden ones."""
    plans = []
    for chain in chains:
        layers = tuple(roles.of(name, None) for name in chain.weights if name not in hidden)
        plans.append(ChainPlan(chain, layers, still=len(layers) < len(chain.weights)))
    return plans


def _factor_plans(gauges: Sequence[Gauge], roles: _Roles) -> list[FactorPlan]:
    """Maps, those together that share parameters."""
    together: list[list[General]] = []
    for gauge in gauges:
        if isinstance(gauge, General):
            names = {*gauge.parameters}
            alike = [each for each in together if any(names & {*g.parameters} for g in each)]
            together = [each for each in together if each not in alike]
            together.append([*(g for each in alike for g in each), gauge])
    offsets: dict[str, float] = {}
    for gauge in (gauge for each in together for gauge in each):
        for name in gauge.parameters:
            if offsets.setdefault(name, gauge.offset) != gauge.offset:
                raise ValueError(
                    f"{gauge}: of {name!r} {gauge.offset:g} more is scaled, and {offsets[name]:g}"
                    f" more by another gauge. Of these, {without(gauge)}"
                )
    return [
        FactorPlan(
            tuple(each),
            tuple(
                roles.of(n, None, offsets[n])
                for n in dict.fromkeys(n for g in each for n in g.parameters)
            ),
        )
        for each in together
    ]


def _linked(
    chains: list[Chain], rescales: list[Rescale], hidden: Collection[str]
) -> list[tuple[str, str, float]]:
    """Pairs of hidden matrices whose norms a gauge moves against each other."""
    linked = []
    for chain in chains:
        among = [name for name in chain.weights if name in hidden]
        linked += [(a, b, 1.0) for a, b in pairwise(among)]
    for gauge in rescales:
        sides = (
            [a.parameter for a in side if a.parameter in hidden]
            for side in (gauge.plus, gauge.minus)
        )
        linked += [(p, m, gauge.degree) for p, m in product(*sides)]
    return linked


# ---- what gauges must fulfil


def _check_gauges(
    params: Mapping[str, Tensor], gauges: list[Gauge], hidden: Collection[str]
) -> None:
    cut = {whole_name(name) for name in params}
    for gauge in gauges:
        known = Rescale | Chain | Rotation | General | Shift | StreamRotation
        if not isinstance(gauge, known) and not is_section(gauge):
            if isinstance(gauge, Gauge):
                raise TypeError(f"{gauge}: no optimizer respects this kind; {without(gauge)}")
            raise TypeError(
                f"expected gauges as find_gauges returns them, got {type(gauge).__name__}"
            )
        if isinstance(gauge, Shift) and gauge.weight in hidden:
            raise ValueError(
                f"{gauge}: {gauge.weight!r} is a hidden matrix, whose step is not centred over its"
                f" rows; {without(gauge)}"
            )
        for name in acted_on(gauge):
            if name not in params and name in cut and is_section(gauge):
                continue  # it is taken on whole parameters
            if name not in params:
                raise ValueError(
                    f"{gauge}: its parameter {name!r} is not among the optimizer's, or quantised."
                    " Pass named_parameters() of the model that the gauges were found in, or"
                    f" {without(gauge)}"
                )
            if not params[name].requires_grad:
                raise ValueError(
                    f"{gauge}: its parameter {name!r} is frozen. Unfreeze it, or take the gauges of"
                    " what is trained, gauges.among(model.named_parameters())"
                )
            if params[name].is_complex():
                raise ValueError(
                    f"{gauge}: its parameter {name!r} is complex, and gauges act on real ones:"
                    f" {without(gauge)}"
                )
        _check_sizes(params, gauge)
        require_no_zero(gauge, params)
    scaled = {name for gauge in gauges if isinstance(gauge, Rescale) for name in acted_on(gauge)}
    for gauge in gauges:
        match gauge:
            case ScaledShift(kind="stream_mean", scale=scale) if scale not in scaled:
                raise ValueError(
                    f"{gauge}: it divides by {scale!r}, which nothing keeps from zero: add the"
                    f" layer_scale, or {without(gauge)}"
                )


def _check_sizes(params: Mapping[str, Tensor], gauge: Gauge) -> None:
    """Raise ValueError for a gauge of parameters that have these names and other shapes."""
    slots: list[tuple[str, int | tuple[int, ...], np.ndarray | None]]
    match gauge:
        case Rescale():
            slots = [(name, axis, None) for name, axis, _ in gauge.plus + gauge.minus]
        case General():
            slots = [*gauge.plus, *gauge.minus]
        case Rotation():
            slots = [*gauge.slots]
        case ScaledShift(scale=str(scale)):
            ndim = params[gauge.weight].ndim
            slots = [(gauge.weight, 0 if ndim == 1 else 1 - gauge.axis, None), (scale, 0, None)]
        case StreamRotation():
            sides = (*gauge.writers, *gauge.readers)
            slots = [(each.weight, each.axis, None) for each in sides]
            slots += [(each.scale, 0, None) for each in sides if each.scale is not None]
        case _:
            return
    sizes = [
        math.prod(shape[each] for each in axes) if max(axes) < len(shape) else -1
        for name, axis, _ in slots
        for shape, axes in ((params[name].shape, axes_of(axis)),)
    ]
    needed = [sizes[0] if indices is None else 1 + int(indices.max()) for _, _, indices in slots]
    fits = [size >= need for size, need in zip(sizes, needed, strict=True)]
    alike = isinstance(gauge, Rescale | ScaledShift | StreamRotation)
    if not all(fits) or (alike and len(set(sizes)) > 1):
        there = ", ".join(
            f"{name!r} {tuple(params[name].shape)} along axis {axis}" for name, axis, _ in slots
        )
        raise ValueError(
            f"{gauge} does not fit the shapes of its parameters: {there}. Find the gauges of this"
            f" very model, or {without(gauge)}"
        )


def check_exact(gauges: Iterable[Gauge]) -> None:
    """Raise ValueError for a gauge that is a symmetry at eps = 0 alone."""
    for gauge in gauges:
        if isinstance(gauge, Gauge) and KINDS[gauge.kind].approximate:
            raise ValueError(
                f"{gauge}: it is a symmetry at eps = 0 alone, and taken only with approximate=True"
                f" (gauges.approximate=true in a configuration); {without(gauge)}"
            )


def acted_on(gauge: Gauge) -> tuple[str, ...]:
    """Names of what a gauge acts on: parameters, or parts of them."""
    if isinstance(gauge, Rescale):
        return tuple(dict.fromkeys(axis.parameter for axis in gauge.plus + gauge.minus))
    return gauge.parameters


def named(*gauges: Gauge) -> str:
    """Gauges in a message."""
    return " and ".join(map(str, gauges))


def without(*gauges: Gauge) -> str:
    """How to leave out one of these gauges, in a message."""
    return f"leave out one gauge: [gauge for gauge in gauges if str(gauge) != {str(gauges[-1])!r}]"


def _check_chains(chains: list[Chain], rescales: list[Rescale]) -> None:
    rescaled = {name: gauge for gauge in rescales for name in acted_on(gauge)}
    seen: dict[str, Chain] = {}
    for chain in chains:
        for name in chain.weights:
            if name in rescaled:
                raise ValueError(
                    f"{name!r} is under both {chain} and {rescaled[name]}: rescales of all neurons"
                    " contain the rescale of their layer; leave the chain out, or the rescales:"
                    f" [gauge for gauge in gauges if gauge.kind != {chain.kind!r}]"
                )
            if name in seen:
                raise ValueError(
                    f"{name!r} is under both {seen[name]} and {chain}. Of these, {without(chain)}"
                )
            seen[name] = chain


def _check_block(gauge: Rescale, hidden: Collection[str]) -> None:
    free = [name for name in acted_on(gauge) if name not in hidden]
    if free:
        raise ValueError(
            f"{gauge}: {free[0]!r} is not hidden, and shares one scale with a hidden matrix. An"
            " optimizer of hidden matrices takes a block of them without biases; take scales of"
            " single units (gauges.granularity=unit)"
        )


def _check_no_offset(gauge: Rescale, name: str, offset: float) -> None:
    if offset:
        raise ValueError(
            f"{gauge}: of {name!r} {offset:g} more is scaled, and it shares its side with a hidden"
            f" matrix. Leave that out of hidden, or {without(gauge)}"
        )


def _check_stream(
    stream: StreamRotation, gauges: Sequence[Gauge], rescales: Sequence[Rescale]
) -> None:
    """Raise ValueError for a stream whose norms do not dress all that reads it, or have a shift
    that turns with it, or to which anything writes behind a scale that does not dress it.

    Args:
        stream: that turns.
        gauges: all of them.
        rescales: of them, with the side that dresses first.
    """
    scaled = {
        (plus.parameter, minus.parameter)
        for gauge in rescales
        if not gauge.block
        for plus in gauge.plus
        for minus in gauge.minus
    }
    still = {gauge.slots[0].parameter for gauge in gauges if isinstance(gauge, Shear)}
    for reader in stream.readers:
        if reader.scale is not None and (reader.scale, reader.weight) not in scaled:
            raise ValueError(
                f"{stream}: {reader.weight!r} reads it behind the scale {reader.scale!r}, which"
                f" must dress it: add the norm_scale of that norm, by units, or {without(stream)}"
            )
    for writer in stream.writers:
        if writer.scale is not None and (writer.scale, writer.weight) not in scaled:
            raise ValueError(
                f"{stream}: {writer.weight!r} writes to it behind the scale {writer.scale!r}, which"
                " dresses hidden matrices alone, as of DDCMuon, under the layer_scale;"
                f" {without(stream)}"
            )
    for shift, _ in stream.shifts:
        if shift not in still:
            raise ValueError(
                f"{stream}: the shift {shift!r} of a norm turns with it, unless it is a gauge of"
                f" its own: add the norm_shift of that norm, or {without(stream)}"
            )


def _check_inner(gauge: Rescale, inner: list[Rescale], hidden: Collection[str]) -> None:
    """Raise ValueError for a hidden matrix on the plus side of this inner rescale and of
    another.
    """
    for name in (axis.parameter for axis in gauge.plus):
        others = [g for g in inner if g is gauge or any(name == a.parameter for a in g.plus)]
        if name in hidden and len(others) > 1:
            raise ValueError(
                f"{name!r}: a hidden matrix cannot be on the plus side of two rescales,"
                f" {named(*others)}. Leave it out of hidden, or {without(*others)}"
            )


# ---- sides, averages, orders


def _mapped(gauges: Iterable[Gauge], hidden: Collection[str]) -> dict[str, General]:
    """For each parameter under general linear maps, one of them."""
    found: dict[str, General] = {}
    for gauge in gauges:
        if isinstance(gauge, General):
            axes: dict[str, int] = {}
            for name, axis, _ in gauge.plus + gauge.minus:
                if name in hidden:
                    raise ValueError(
                        f"{gauge}: {name!r} is a hidden matrix, which is orthogonalised, and that"
                        f" does not commute with it. Leave it out of hidden, or {without(gauge)}"
                    )
                if axes.setdefault(name, axis) != axis:
                    raise ValueError(f"{gauge} mixes two axes of {name!r}; {without(gauge)}")
                found[name] = gauge
    return found


def _sides(
    rescales: list[Rescale], plus: bool, but: Collection[str] = ()
) -> dict[str, tuple[Rescale, UnitAxis]]:
    """For each parameter on a plus (minus) side, the gauge and the axis; ``but`` are left out."""
    found: dict[str, tuple[Rescale, UnitAxis]] = {}
    for gauge in rescales:
        for name, axis, _ in gauge.plus if plus else gauge.minus:
            if name in but:
                continue
            if name in found:
                side = "plus" if plus else "minus"
                both = [found[name][0], gauge]
                raise ValueError(
                    f"{name!r} is on the {side} side of both {named(*both)}. Of these,"
                    f" {without(*both)}"
                )
            found[name] = (gauge, gauge.unit_axis(axis))
    return found


def _centred(gauges: list[Gauge]) -> set[str]:
    found: dict[str, Gauge] = {}
    for gauge in gauges:
        for name in gauge.parameters if isinstance(gauge, Shift) else ():
            if name in found:
                both = [found[name], gauge]
                raise ValueError(
                    f"{name!r}: two shifts act on it, {named(*both)}. Of these, {without(*both)}"
                )
            found[name] = gauge
    return set(found)


def _averagings(
    params: Mapping[str, Tensor], gauges: list[Gauge], hidden: Collection[str]
) -> dict[str, Averaging]:
    slots: dict[str, list[tuple[Gauge, int, np.ndarray]]] = {}
    for gauge in gauges:
        turned_by: Sequence[RotatedAxis] = ()
        if isinstance(gauge, Rotation):
            turned_by = gauge.slots
        elif isinstance(gauge, General) and gauge.group != "scale":  # which mixes nothing
            turned_by = gauge.plus + gauge.minus
        elif isinstance(gauge, StreamRotation):
            width = np.arange(gauge.width)[None, None]
            sides = [(each.weight, each.axis) for each in (*gauge.writers, *gauge.readers)]
            turned_by = [RotatedAxis(*side, width) for side in sides if side[0] not in hidden]
        for name, axis, indices in turned_by:
            slots.setdefault(name, []).append((gauge, axis, indices.reshape(-1, indices.shape[2])))
    averagings = {}
    for name, entries in slots.items():
        axis = entries[0][1]
        turned: dict[int, Gauge] = {}
        for gauge, other, block in entries:
            if other != axis:
                both = [entries[0][0], gauge]
                raise ValueError(
                    f"{name!r}: {named(*both)} turn two axes of it. Of these, {without(*both)}"
                )
            for index in block.ravel().tolist():
                if index in turned:
                    both = [turned[index], gauge]
                    raise ValueError(
                        f"{name!r}: {named(*both)} turn the same index ({index} of axis {axis}). Of"
                        f" these, {without(*both)}"
                    )
                turned[index] = gauge
        averagings[name] = Averaging(
            axis + 1, [block for _, _, block in entries], params[name].shape[axis]
        )
    return averagings


def _levels(
    rescales: list[Rescale],
    plus_of: Mapping[str, tuple[Rescale, UnitAxis]],
    minus_of: Mapping[str, tuple[Rescale, UnitAxis]],
) -> dict[Rescale, int]:
    """Gauges in an order in which whoever dresses moves before what it dresses; equal levels are
    independent.
    """
    dressers: dict[Rescale, list[Rescale]] = {gauge: [] for gauge in rescales}
    for name, (gauge, _) in minus_of.items():
        if name in plus_of:
            dressers[plus_of[name][0]].append(gauge)
    return _in_order(dressers)


def _inner_plans(rescales: list[Rescale], hidden: Collection[str]) -> list[InnerPlan]:
    """Inner gauges by level: forward norms are taken in this order, backward norms in the
    reverse.
    """
    of_minus = {
        axis.parameter: gauge
        for gauge in rescales
        for axis in gauge.minus
        if axis.parameter in hidden
    }
    before = {
        gauge: [of_minus[a.parameter] for a in gauge.plus if a.parameter in of_minus]
        for gauge in rescales
    }
    return [
        InnerPlan(
            gauge,
            tuple(axis for axis in gauge.plus if axis.parameter in hidden),
            tuple(axis for axis in gauge.minus if axis.parameter in hidden),
            level,
        )
        for gauge, level in _in_order(before).items()
    ]


def _in_order(before: dict[Rescale, list[Rescale]]) -> dict[Rescale, int]:
    """Levels of gauges, given which must come before each; in topological order."""
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        circle = list(dict.fromkeys(error.args[1]))
        names = ", ".join(sorted({repr(name) for gauge in circle for name in acted_on(gauge)}))
        raise ValueError(
            f"rescales dress each other in a circle: {named(*circle)} (over {names}). Of these,"
            f" {without(*circle)}"
        ) from None
    levels: dict[Rescale, int] = {}
    for gauge in order:
        levels[gauge] = 1 + max((levels[each] for each in before[gauge]), default=-1)
    return levels
