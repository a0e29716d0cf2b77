"""How fine a rescale is: a scale for each hidden unit, or one for a whole block of weights.

Between two linear maps the group is R+ for each hidden unit. One scale for the whole pair of
matrices is a subgroup of it: the one that the paper's companion decomposes, as the model of it that
is machine-checked states (repository DeadDirections/DeadDirections, ``DdcAdamEquivariance.lean``).
An optimizer that is told of the smaller group is equivariant under that alone, and free in more:
the ratios between units are a direction like any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from ddc.gauges.actions import Chain, Rescale
from ddc.gauges.base import Gauge, Refusal
from ddc.gauges.gauge_set import GaugeSet

GRANULARITIES = ("unit", "block")
#: The kinds whose units are hidden units; the units of a norm scale are channels, and stay.
OF_HIDDEN_UNITS = ("relu_rescale", "gated_rescale")


def in_blocks(gauges: GaugeSet) -> GaugeSet:
    """The same gauges, but with one scale for all hidden units of a ReLU or gated rescale.

    Each side becomes one block, a bias with the matrix that it is added to. ReLU layers that follow
    each other become a :class:`~ddc.gauges.Chain`, with one scale a layer. Where they cannot
    (biases, a degree other than 1, a norm scale on one of them), their rescales are refused.
    """
    rescales = [
        gauge for gauge in gauges if isinstance(gauge, Rescale) and gauge.kind in OF_HIDDEN_UNITS
    ]
    others = [gauge for gauge in gauges if gauge not in rescales]
    found: list[Gauge] = []
    refused = list(gauges.refused)
    unchecked = {gauge: reason for gauge, reason in gauges.unchecked.items() if gauge in others}
    for together in _connected(rescales):
        if len(together) > 1 and (reason := _no_chain(together, others)):
            refused += [Refusal(gauge.kind, gauge.where, reason) for gauge in together]
            continue
        block = replace(together[0], block=True) if len(together) == 1 else _as_chain(together)
        found.append(block)
        for gauge in set(together) & set(gauges.unchecked):
            unchecked[block] = gauges.unchecked[gauge]
    return GaugeSet((*others, *found), tuple(refused), unchecked, gauges.sizes)


def _connected(rescales: Sequence[Rescale]) -> list[list[Rescale]]:
    """The rescales, those together that share a parameter, directly or through others."""
    groups: list[list[Rescale]] = []
    for gauge in rescales:
        mine = set(gauge.parameters)
        touched = [
            group for group in groups if any(mine & set(other.parameters) for other in group)
        ]
        groups = [group for group in groups if group not in touched]
        groups.append([*itertools.chain.from_iterable(touched), gauge])
    return groups


def _no_chain(rescales: Sequence[Rescale], others: Sequence[Gauge]) -> str | None:
    """Why rescales that share parameters are no chain, if they are none."""
    scaled = {name for gauge in others if isinstance(gauge, Rescale) for name in gauge.parameters}
    why = "one scale a layer is for layers"
    for gauge in rescales:
        if len(gauge.plus) > 1 or len(gauge.minus) > 1:
            return f"{why} without biases that have one reader each"
        if gauge.degree != 1:
            return f"{why} with a function of degree 1 between them, here it is {gauge.degree:g}"
        if under := scaled & set(gauge.parameters):
            return f"{why} under no other rescale, and {min(under)} is under one"
    return None


def _as_chain(rescales: Sequence[Rescale]) -> Chain:
    """Rescales of which each, but the last, has on its minus side what the next one has on its plus
    side.
    """
    after = {gauge.plus[0].parameter: gauge.minus[0].parameter for gauge in rescales}
    weights = [next(name for name in after if name not in after.values())]
    while weights[-1] in after:
        weights.append(after[weights[-1]])
    where = next(gauge.where for gauge in rescales if gauge.plus[0].parameter == weights[0])
    return Chain(tuple(weights), where)
