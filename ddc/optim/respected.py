"""Which gauges an optimizer takes, and why not the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddc.gauges import KINDS, Gauge, GaugeSet, Refusal, is_split
from ddc.gauges.affine import require_no_zero

#: Makes an optimizer of named parameters and gauges.
Maker = Callable[[list[tuple[str, Tensor]], list[Gauge]], Optimizer]

#: How to leave a gauge out, which a message ends with.
RECIPE = re.compile(
    r"; leave |\. Of these, leave |\. Leave it out of hidden|: add the |, or leave out "
)


def respected(make: Maker, params: Iterable[tuple[str, Tensor]], gauges: GaugeSet) -> GaugeSet:
    """The gauges that an optimizer takes together, tried in the order of their kinds.

    A kind that is refused beside those before it is tried gauge by gauge, and what of it is refused
    once more beside all that is taken. A kind whose group another's contains comes last, for what
    was refused of that one. Nothing is allocated: the
    optimizers that are made for this hold parameters without values.

    Args:
        make: ``DDCAdam``, or a function as ``lambda params, gauges: DDCMuon(params, gauges,
            hidden)``.
        params: ``model.named_parameters()``.
        gauges: what :func:`ddc.find_gauges` returns.

    Returns:
        The set with those that are left out among the refused, each with the reason.
    """
    values = dict(params)
    shapes: list[tuple[str, Tensor]] = [
        (name, p if is_split(p) else without_values(p)) for name, p in values.items()
    ]
    order = sorted(KINDS, key=lambda kind: KINDS[kind].within is not None)
    kept: list[Gauge] = []
    reasons: dict[Gauge, str] = {}

    def taken(some: list[Gauge]) -> str:
        """Why the optimizer does not take some gauges beside what is kept; empty if it does."""
        try:
            for gauge in some:
                require_no_zero(gauge, values)
            make(shapes, [*kept, *some])
        except (ValueError, TypeError) as error:
            return RECIPE.split(str(error))[0]
        return ""

    def take(some: list[Gauge]) -> None:
        """Keep them all, or those that the optimizer takes one by one."""
        if not taken(some):
            kept.extend(some)
            return
        for gauge in some:
            if reason := taken([gauge]):
                reasons[gauge] = reason
            else:
                kept.append(gauge)

    by_kind = sorted(gauges, key=lambda gauge: order.index(gauge.kind))
    for _, members in groupby(by_kind, key=lambda gauge: gauge.kind):
        take([gauge for gauge in members if not contained(gauge, kept)])
    # what is refused beside a few may be taken beside all: a rotation of the stream needs the
    # shifts of the norms that read it
    for gauge in [*reasons]:
        if not taken([gauge]):
            kept.append(gauge)
            del reasons[gauge]
    left_out = (Refusal(gauge.kind, gauge.where, why) for gauge, why in reasons.items())
    found = tuple(gauge for gauge in gauges if gauge in kept)
    unchecked = {gauge: why for gauge, why in gauges.unchecked.items() if gauge in kept}
    sizes = {gauge: size for gauge, size in gauges.sizes.items() if gauge in kept}
    return GaugeSet(found, (*gauges.refused, *left_out), unchecked, sizes)


def contained(gauge: Gauge, others: Iterable[Gauge]) -> bool:
    """Whether one of the others has the group of a gauge in its own."""
    names = {*gauge.parameters}
    larger = KINDS[gauge.kind].within
    return any(each.kind == larger and names & {*each.parameters} for each in others)


def without_values(param: Tensor) -> nn.Parameter:
    """A parameter like another on the meta device."""
    like = torch.empty_like(param, device="meta")
    return nn.Parameter(like, requires_grad=param.requires_grad)
