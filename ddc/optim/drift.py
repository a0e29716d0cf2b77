"""Where on their gauge orbits weights lie, in coordinates that DDCAdam keeps still, and how far
they moved there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ddc.gauges import Gauge, Rescale, Rotation, Shift, nearest_turn, whole
from ddc.gauges.affine import StreamRotation
from ddc.gauges.base import Params, spread_units, unit_view
from ddc.optim.parts import cut
from ddc.optim.plan import Role, make_plan
from ddc.optim.sections import Sections


@torch.no_grad()
def gauge_coordinates(params: Mapping[str, Tensor], gauges: Iterable[Gauge]) -> dict[Gauge, Tensor]:
    """The vertical coordinates of weights, which the loss cannot see and DDCAdam
    (``vertical="freeze"``) keeps still.

    - rescale: per unit 2 (log rho_P - k log rho_M) / (1 + k²), of sides as DDCAdam decomposes and
      dresses them (:mod:`ddc.optim.plan`), and 2 log rho_P where all readers are dressed. The group
      element c moves it by 2 log c; for k = 1 it is log(rho_P / rho_M);
    - chain: twice each layer's log-norm less the mean over layers;
    - shift: the mean row, in the unit of the weights: a norm scale on the head moves it as well;
    - gauges that add: the element by which weights lie away from their section
      (:mod:`ddc.optim.sections`).

    Rotations have no coordinate of this kind (:class:`GaugeDrift` gives their angles), general
    linear maps and rotations of a stream none; the last are left out, since they do not go into one
    plan with those of heads, and an optimizer that is told of both need not be one.

    Args:
        params: parameters by name; those that are split over ranks are gathered, so all ranks must
            call.
        gauges: the gauges of the model.

    Returns:
        Float64 vectors; infinite or nan where a side has norm zero.
    """
    gauges = [gauge for gauge in gauges if not isinstance(gauge, StreamRotation)]
    params = {name: whole(p.detach()) for name, p in params.items()}
    parts = cut({name: p.requires_grad_() for name, p in params.items()}, gauges)
    params, plan = parts.params, make_plan(parts.params, parts.gauges)
    plus_norms: dict[Rescale, Tensor] = {}

    def log_norms(roles: Sequence[Role]) -> Tensor:
        squares = []
        for role in roles:
            values = params[role.name].double() + role.offset
            if role.centred:
                values = values - values.mean(0)
            if role.dressing is not None:
                factor = plus_norms[role.dressing.gauge] ** role.dressing.degree
                values = values * spread_units(factor, values, role.dressing.axis)
            squares.append(unit_view(values, role.axis).square().sum(1))
        return torch.stack(squares).sum(0).log() / 2

    found: dict[Gauge, Tensor] = {}
    for each in plan.polar:  # whoever dresses comes before what it dresses
        plus = log_norms(each.plus)
        plus_norms[each.gauge] = plus.exp()
        k = each.gauge.degree
        found[parts.given[each.gauge]] = (
            2 * (plus - k * log_norms(each.minus)) / (1 + k**2) if each.minus else 2 * plus
        )
    for chain in plan.chains:
        logs = torch.stack([params[role.name].double().norm().log() for role in chain.layers])
        found[chain.gauge] = 2 * (logs - logs.mean())
    for gauge in parts.gauges:
        if isinstance(gauge, Shift):
            found[gauge] = torch.cat(
                [params[name].double().mean(0).reshape(-1) for name in gauge.parameters]
            )
    found |= Sections(gauges, params).elements({n: p.double() for n, p in params.items()})
    return found


class GaugeDrift:
    """How far weights have moved *along* their orbits since a start, by kind of gauge.

    The root mean square, over all units of a kind, of the change of :func:`gauge_coordinates`; for
    a rotation, of the angle in radians of the rotation without reflection that turns a unit best
    onto where it was (Procrustes; the root of the sum of its planes' squared angles). Units with a
    side of norm zero are left out.

    Args:
        start: parameters by name.
        gauges: the gauges of the model.
    """

    def __init__(self, start: Params, gauges: Iterable[Gauge]) -> None:
        self.gauges = list(gauges)
        self.start = {name: whole(p) for name, p in start.items()}

    @cached_property
    def coordinates(self) -> dict[Gauge, Tensor]:
        """Those of the start."""
        return gauge_coordinates(self.start, self.gauges)

    @torch.no_grad()
    def at(self, now: Params) -> dict[str, float]:
        """The drift of weights, parameters by name of the same model."""
        now = {name: whole(p) for name, p in now.items()}
        before, after = self.coordinates, gauge_coordinates(now, self.gauges)
        changes: dict[str, list[Tensor]] = {}
        for gauge in self.gauges:
            if isinstance(gauge, Rotation):
                turn = nearest_turn(gauge, now, self.start, reflections=False)
                angles = torch.linalg.eigvals(turn).angle()
                # the angles of a plane come with both signs
                change = (angles.square().sum(-1) / 2).sqrt()
            elif gauge in before:
                change = after[gauge].cpu() - before[gauge].cpu()
            else:
                continue
            changes.setdefault(gauge.kind, []).append(change[change.isfinite()])
        joined = {kind: torch.cat(each) for kind, each in changes.items()}
        return {kind: float(x.square().mean().sqrt()) for kind, x in joined.items() if len(x)}
