"""From a plan to stacks: what has equal roles, shapes and param groups is stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddc.gauges import HiddenMatrix, Rescale, is_fake, is_split, whole
from ddc.gauges.base import axes_of
from ddc.optim.chain import ChainStack
from ddc.optim.factor import FactorStack, part_of
from ddc.optim.frames import Frames, Member
from ddc.optim.free import FreeStack
from ddc.optim.hidden import HiddenStack, Matrices
from ddc.optim.plan import (
    ChainPlan,
    Dressing,
    FactorPlan,
    InnerPlan,
    Plan,
    PolarPlan,
    Role,
    acted_on,
    without,
)
from ddc.optim.polar import PolarStack
from ddc.optim.rules import Rule
from ddc.optim.sharding import check_split_alike, shards_of
from ddc.optim.stack import Stack
from ddc.optim.stacked import Dressed, StackedParameter


def check_not_zero(params: Mapping[str, Tensor], why: str, otherwise: str) -> None:
    """Raise ValueError if parameters that cannot leave zero, and could without gauges, are all
    zero.
    """
    if not any(is_fake(param) or bool(whole(param.detach().any())) for param in params.values()):
        names = " and ".join(map(repr, params))
        raise ValueError(
            f"{names}: all zero, and {why}, so would stay zero. Initialise at random, or"
            f" {otherwise}"
        )


def check_hidden(hidden: Mapping[str, HiddenMatrix], params: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a hidden matrix that cannot be one."""
    for name, matrix in hidden.items():
        if name not in params:
            raise ValueError(
                f"hidden matrix {name!r} is not among the optimizer's parameters, or quantised."
                " Pass named_parameters() of the model that it was found in, or leave it out of"
                " hidden"
            )
        param = params[name]
        if param.ndim not in (2, 3) or (param.ndim == 3 and matrix.heads > 1):
            raise ValueError(
                f"hidden matrix {name!r} has shape {tuple(param.shape)}: expected a matrix, or"
                " experts' that are stacked along the first of three axes, without heads. Leave it"
                " out of hidden"
            )
        if param.ndim == 3 and is_split(param):
            raise ValueError(
                f"hidden matrix {name!r} is of stacked experts and split over ranks, which is not"
                " supported. Leave it out of hidden"
            )
        if param.is_complex():
            raise ValueError(
                f"hidden matrix {name!r} is complex, and orthogonalised are real ones. Leave it out"
                " of hidden: it takes AdamW's step then"
            )
        if param.shape[matrix.axis] % matrix.heads:
            raise ValueError(
                f"hidden matrix {name!r}: {matrix.heads} heads do not divide"
                f" {param.shape[matrix.axis]}. Give it the heads that it has, or heads=1"
            )


def gauges_of(plan: Plan, name: str) -> str:
    """The gauges that link a hidden matrix to others, for messages."""
    linking = [*(inner.gauge for inner in plan.inner), *(chain.gauge for chain in plan.chains)]
    return " and ".join(str(gauge) for gauge in linking if name in acted_on(gauge))


class Builder:
    """Makes stacks of a plan: what has equal roles, shapes and param groups is stacked.

    ``place`` says where the norms of each gauge are found in a step: its stack, and which layer of
    it.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        group_of: dict[str, int],
        groups: list[dict[str, Any]],
        rule: Rule,
        matrix_rule: Rule | None = None,
        matrices: Mapping[str, HiddenMatrix] | None = None,
    ) -> None:
        self.params, self.group_of, self.groups = params, group_of, groups
        self.rule, self.matrix_rule, self.matrices = rule, matrix_rule, matrices or {}
        self.place: dict[Rescale, tuple[PolarStack | Frames, int]] = {}

    def stacks(self, plan: Plan) -> list[Stack]:
        """All stacks of a plan, in the order in which they step: who dresses before what it
        dresses.
        """
        polar, chains = self.polar(plan.polar), self.chains(plan.chains)
        hidden = [self.hidden(plan)] if plan.hidden else []
        return [*polar, *chains, *hidden, *self.factors(plan.factors), *self.free(plan.free)]

    def polar(self, plans: list[PolarPlan]) -> list[PolarStack]:
        """Stacks of rescale gauges, in the order of their levels."""
        stacks = []
        for plan in plans:
            self._check_sides(plan)
        for level in sorted({plan.level for plan in plans}):
            alike: dict[object, list[PolarPlan]] = {}
            for plan in plans:
                if plan.level == level:
                    alike.setdefault(self._polar_key(plan), []).append(plan)
            for members in alike.values():
                group = self.groups[self.group_of[members[0].plus[0].name]]
                stack = PolarStack(
                    members[0].gauge.degree,
                    [
                        self.stack(roles)
                        for roles in zip(*(plan.plus for plan in members), strict=True)
                    ],
                    [
                        self.stack(roles)
                        for roles in zip(*(plan.minus for plan in members), strict=True)
                    ],
                    [
                        self.stack(roles)
                        for roles in zip(*(plan.dressed for plan in members), strict=True)
                    ],
                    vertical=group["vertical"] == "adam",
                )
                self.place.update(
                    {plan.gauge: (stack, layer) for layer, plan in enumerate(members)}
                )
                stacks.append(stack)
        return stacks

    def chains(self, plans: list[ChainPlan]) -> list[ChainStack]:
        """Stacks of chains, but of those that are all hidden."""
        stacks = []
        for plan in plans:
            for name in plan.gauge.weights:
                why = f"under {plan.gauge} its norm moves by multiplication"
                check_not_zero({name: self.params[name]}, why, "leave the gauge out")
            if plan.layers:
                group = self.groups[self.group_of[plan.layers[0].name]]
                alike: dict[object, list[Role]] = {}
                for role in plan.layers:
                    alike.setdefault(self._role_key(role), []).append(role)
                layers = [self.stack(tuple(roles)) for roles in alike.values()]
                stacks.append(ChainStack(layers, plan.still, vertical=group["vertical"] == "adam"))
        return stacks

    def factors(self, plans: list[FactorPlan]) -> list[FactorStack]:
        """Stacks of general linear maps."""
        alike: dict[object, list[FactorPlan]] = {}
        for plan in plans:
            self._check_maps(plan)
            alike.setdefault(self._factor_key(plan), []).append(plan)
        stacks = []
        for members in alike.values():
            parameters = [
                self.stack(roles) for roles in zip(*(plan.roles for plan in members), strict=True)
            ]
            first = members[0]
            place = {role.name: i for i, role in enumerate(first.roles)}
            like = [self.params[role.name] for role in first.roles]
            parts = [part_of(gauge, place, like) for gauge in first.gauges]
            stacks.append(FactorStack(parameters, parts))
        return stacks

    def _check_maps(self, plan: FactorPlan) -> None:
        """Raise ValueError for what a stack of maps cannot step."""
        gauge, params = plan.gauges[0], {role.name: self.params[role.name] for role in plan.roles}
        if not self.rule.takes_maps:
            raise ValueError(
                f"{gauge}: {type(self.rule).__name__} respects rotations, and no general linear"
                f" map; {without(gauge)}"
            )
        for name, param in params.items():
            if shards_of(param).layout is not None:
                raise ValueError(
                    f"{gauge}: {name!r} is split over ranks, and a step under a map needs all of"
                    f" it. Keep it whole, or {without(gauge)}"
                )
        for each in plan.gauges:
            side = {slot.parameter: params[slot.parameter] + each.offset for slot in each.plus}
            why = f"under {each} its steps are in proportion to it"
            check_not_zero(side, why, "leave the gauge out")

    def _factor_key(self, plan: FactorPlan) -> object:
        place = {role.name: i for i, role in enumerate(plan.roles)}
        gauges = tuple(
            (
                gauge.kind,
                gauge.group,
                *(
                    tuple((place[n], axis, i.shape, i.tobytes()) for n, axis, i in side)
                    for side in (gauge.plus, gauge.minus)
                ),
            )
            for gauge in plan.gauges
        )
        return gauges, tuple(map(self._role_key, plan.roles))

    def free(self, roles: list[Role]) -> list[FreeStack]:
        """Stacks of parameters that no rescale decomposes."""
        alike: dict[object, list[Role]] = {}
        for role in roles:
            alike.setdefault(self._role_key(role), []).append(role)
        return [FreeStack(self.stack(tuple(members))) for members in alike.values()]

    def hidden(self, plan: Plan) -> HiddenStack:
        """Frames and stacks of all hidden matrices."""
        frames = self.frames(plan)
        alike: dict[object, list[str]] = {}
        for name in plan.hidden:
            matrix = self.matrices[name]
            alike.setdefault((self._kind(name), matrix.heads, matrix.axis), []).append(name)
        alike_matrices = [self.alike(names, plan) for names in alike.values()]
        for p, m, _ in plan.linked:
            for name in (p, m):
                if self.matrices[name].heads > 1:
                    raise ValueError(
                        f"hidden matrix {name!r}: under {gauges_of(plan, name)} it cannot be taken"
                        f" by heads. Make it one matrix, HiddenMatrix({name!r}), or leave the"
                        " gauge out"
                    )
            if self.params[p].shape[:-2] != self.params[m].shape[:-2]:
                raise ValueError(
                    f"hidden matrices {p!r} and {m!r}: {gauges_of(plan, p)} links one matrix with"
                    " stacked ones. Leave one out of hidden, or leave the gauge out"
                )
        group = self.groups[alike_matrices[0].parameter.groups[0]]
        vertical = group["vertical"] == "adam"
        return HiddenStack(self.rule, frames, alike_matrices, plan.linked, plan.moved, vertical)

    def alike(self, names: list[str], plan: Plan) -> Matrices:
        """Hidden matrices that are alike, with what dresses each."""
        heads, axis = self.matrices[names[0]].heads, self.matrices[names[0]].axis
        params = [self.params[name] for name in names]
        experts = 0 if params[0].ndim == 3 else None
        role = Role(names[0], axis, heads=heads) if heads > 1 else Role(names[0], experts)
        groups = [self.group_of[name] for name in names]
        assert self.matrix_rule is not None
        parameter = StackedParameter(role, names, params, groups, self.matrix_rule)
        return Matrices(
            parameter,
            [tuple(self.dressed(dressing) for dressing in plan.hidden[name]) for name in names],
        )

    def frames(self, plan: Plan) -> list[Frames]:
        """Frames of inner gauges, in the order of their levels."""
        frames = []
        for level in sorted({inner.level for inner in plan.inner}):
            alike: dict[object, list[InnerPlan]] = {}
            for inner in plan.inner:
                if inner.level == level:
                    params = {
                        axis.parameter: self.params[axis.parameter]
                        for axis in inner.plus + inner.minus
                    }
                    axes = tuple(axis.axis for axis in inner.plus + inner.minus)
                    check_split_alike(params.items())
                    shapes = tuple(
                        (tuple(param.shape), shards_of(param).group) for param in params.values()
                    )
                    alike.setdefault(
                        (inner.gauge.degree, shapes, axes, len(inner.plus)), []
                    ).append(inner)
            for members in alike.values():
                scaled = [self.params[name] for inner in members for name in acted_on(inner.gauge)]
                frame = Frames(members[0].gauge.degree, [], [], scaled)
                self.place.update({inner.gauge: (frame, i) for i, inner in enumerate(members)})
                frames.append((frame, members))
        for frame, members in frames:  # only now is every gauge in its place
            for inner in members:
                for side, of_side in ((frame.plus, inner.plus), (frame.minus, inner.minus)):
                    side.append(
                        [self.member(name, axis, plan.hidden[name]) for name, axis, _ in of_side]
                    )
        return [frame for frame, _ in frames]

    def member(
        self, name: str, axis: int | tuple[int, ...], dressings: Sequence[Dressing]
    ) -> Member:
        """A matrix on one side of an inner gauge, with what dresses its other axis."""
        other = [
            self.dressed(dressing)
            for dressing in dressings
            if axes_of(dressing.axis)[-1] != axes_of(axis)[-1]
        ]
        return Member(self.params[name], axis, other[0] if other else None)

    def dressed(self, dressing: Dressing) -> Dressed:
        """A dressing, with the stack where its norms are found."""
        source, layer = self.place[dressing.gauge]
        return Dressed(source, layer, dressing.axis, dressing.degree)

    def stack(self, roles: tuple[Role, ...]) -> StackedParameter:
        """Parameters of equal roles as one."""
        names = [role.name for role in roles]
        params = [self.params[name] for name in names]
        dressed = None
        if (dressing := roles[0].dressing) is not None:
            places = [self.place[role.dressing.gauge] for role in roles if role.dressing]
            layers = [layer for _, layer in places]
            in_order = layers == [*range(len(layers))]
            index = None if in_order else torch.tensor(layers, device=params[0].device)
            dressed = Dressed(places[0][0], index, dressing.axis, dressing.degree)
        groups = [self.group_of[name] for name in names]
        return StackedParameter(roles[0], names, params, groups, self.rule, dressed)

    def _kind(self, name: str) -> tuple[object, ...]:
        param = self.params[name]
        return (
            tuple(param.shape),
            param.dtype,
            param.device,
            shards_of(param).layout,
            self.group_of[name],
        )

    def _check_sides(self, plan: PolarPlan) -> None:
        """Raise ValueError for a side that is zero and has no way out: one entry a unit, or no
        other side to go by.
        """
        for side in (plan.plus, plan.minus):
            params = {role.name: self.params[role.name] + role.offset for role in side}
            single = sum(param.numel() for param in params.values()) == plan.gauge.units(
                self.params
            )
            if side and (single or not plan.minus):
                why = f"under {plan.gauge} its norms move by multiplication"
                check_not_zero(params, why, "leave the gauge out")

    def _role_key(self, role: Role) -> object:
        dressing = role.dressing and (
            id(self.place[role.dressing.gauge][0]),
            role.dressing.axis,
            role.dressing.degree,
        )
        averaging = role.averaging and role.averaging.signature
        kind = self._kind(role.name)
        return kind, role.axis, role.centred, averaging, dressing, role.offset

    def _polar_key(self, plan: PolarPlan) -> object:
        sides = (tuple(self._role_key(role) for role in side) for side in (plan.plus, plan.minus))
        dressed = tuple(self._role_key(role) for role in plan.dressed)
        return plan.gauge.degree, *sides, dressed
