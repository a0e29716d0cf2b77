"""What would be a gauge at eps = 0: scales of what norms alone read. Rules on the traced program,
and the measurement of how far eps breaks them.

A norm divides by the length of what it reads, √(mean x² + eps), so that a factor of all of x is
seen through eps alone. Nothing here is ever called exact: such gauges are kinds of their own, in no
set of kinds, and each comes with its size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ddc.gauges.base import KINDS, Gauge, first_line
from ddc.gauges.double import InDouble, double
from ddc.gauges.gauge_set import GaugeSet
from ddc.gauges.scales import Scale, Scaled
from ddc.gauges.stream import Norm, norms_of, streams
from ddc.gauges.trace import (
    CONVOLUTIONS,
    KEEPS,
    MOVES,
    LinearMap,
    Trace,
    apply,
    arguments,
    has_fixed_shape,
    inputs,
    labels_of,
    module_path,
    operation,
    readers,
)
from ddc.gauges.traced import NotProved, owner
from ddc.gauges.verify import TOLERANCE, Change, difference, generic, noise_like, refuse

if TYPE_CHECKING:
    from ddc.gauges.further import Further

#: Which argument of a norm is its eps.
EPS_OF = {"layer_norm": 4, "rms_norm": 3}


def attempts(further: Further) -> Iterator[tuple[str, str, Callable[[], Sequence[Gauge]]]]:
    """Kind, place and proof of each approximate gauge that is looked for."""
    trace = further.trace
    inside = {part: norm for norm in norms_of(trace) for part in norm.inside}
    of_maps: set[Norm] = set()
    for linear in trace.linear_maps.values():
        for norm, groups in groups_before_norms(linear, inside).items():
            of_maps.add(norm)
            where = module_path(norm.output) or "norm"
            yield "normed_scale", where, partial(normed_scale, further, linear, groups, where)
    for stream in streams(trace, further.scaled):
        if not of_maps & {*stream.norms}:
            where = further.place(stream)
            yield "stream_scale", where, partial(stream_scale, further, stream, where)
    for node in trace.graph.nodes:
        if operation(node) == "batch_norm":
            where = module_path(node) or "batch_norm"
            yield "filter_scale", where, partial(filter_scale, further, node, where)


def stream_scale(further: Further, stream: Any, where: str) -> list[Gauge]:
    """All that writes to a stream which norms alone read, times c."""
    further.require_sound(stream)
    # a table that is looked up twice is one
    writers = [each for node in stream.writers for each in further.writer(stream, node)]
    names = dict.fromkeys(each.weight for each in writers)
    return [Scale("stream_scale", where, tuple(Scaled(name) for name in names))]


def normed_scale(
    further: Further, linear: LinearMap, groups: np.ndarray, where: str
) -> list[Gauge]:
    """Rows of a linear map, and its bias, that a norm alone reads together, times c: those of a
    head, in front of a QK-norm.
    """
    further.finding.require_single([linear.weight])
    if linear.bias_node is not None and linear.bias is None:
        raise NotProved(f"the bias of {owner(linear.weight)} is no parameter of its own")
    slots = [Scaled(linear.weight, linear.rows, groups)]
    if linear.bias is not None:
        further.finding.require_single([linear.bias])
        slots.append(Scaled(linear.bias, 0, groups))
    return [Scale("normed_scale", where, tuple(slots))]


def filter_scale(further: Further, norm: Node, where: str) -> list[Gauge]:
    """A filter, and its bias, in front of a batch norm in training, times c."""
    trace, source = further.trace, arguments(norm)[0]
    linear = trace.maps_by_output.get(source)
    if operation(source) not in CONVOLUTIONS and (linear is None or source.meta["val"].ndim != 2):
        raise NotProved(f"{further.finding.describe(source)} gives what it norms, no convolution")
    if len(users := readers(source)) != 1:
        raise NotProved(f"{further.finding.describe(users[-1])} reads what it norms as well")
    if linear is not None:
        axis, given = linear.rows, [linear.weight, *([linear.bias] if linear.bias else [])]
        known = linear.bias_node is None or linear.bias is not None
    else:
        views = [trace.parameter(each) for each in arguments(source)[1:3] if each is not None]
        axis, given = 0, [view[0] for view in views if view is not None]
        known = len(given) == len(views)
    if not known:
        raise NotProved("the weights of its filters are no parameters of their own")
    further.finding.require_single(given)
    units = np.arange(trace.tensors[given[0]].shape[axis])[:, None]
    slots = (Scaled(given[0], axis, units), *(Scaled(name, 0, units) for name in given[1:]))
    return [Scale("filter_scale", where, slots, training=True)]


def groups_before_norms(linear: LinearMap, inside: Mapping[Node, Norm]) -> dict[Norm, np.ndarray]:
    """By norm, the outputs of a linear map that it reads together, (groups, k): those that go
    nowhere else, and have no part in another group. ``inside`` has all norms by their nodes.
    """
    if not has_fixed_shape(linear.output):
        return {}
    read: dict[Norm, Tensor] = {}
    elsewhere: set[int] = set()
    waiting: list[tuple[Node, Any]] = [(linear.output, labels_of(linear.output))]
    while waiting:
        node, labels = waiting.pop()
        for user in readers(node):
            name = operation(user)
            alone = len(inputs(user)) == 1 and has_fixed_shape(user)
            if user in inside and inside[user].input is node:
                read[inside[user]] = labels
            elif name == "getitem":
                waiting.append((user, labels[arguments(user)[1]]))
            elif name in MOVES and alone:
                waiting.append((user, apply(user, labels)))
            elif name in KEEPS and not (name == "dropout" and float(arguments(user)[1]) > 0):
                waiting.append((user, labels))
            else:
                parts = [labels] if isinstance(labels, Tensor) else labels
                elsewhere.update(each for part in parts for each in part.unique().tolist())
    found = {
        norm: labels.reshape(-1, labels.shape[-1]).unique(dim=0) for norm, labels in read.items()
    }
    counts = torch.bincount(torch.cat([each.flatten() for each in found.values()])) if found else ()
    return {
        norm: groups.numpy()
        for norm, groups in found.items()
        if not {*groups.flatten().tolist()} & elsewhere
        and bool((counts[groups.flatten()] == 1).all())
    }


# ------------------------------------------------------------------------------------------------
# at eps = 0, and at the eps that there is


def measured(gauges: GaugeSet, trace: Trace) -> GaugeSet:
    """The same gauges with their sizes, without those that are none at eps = 0, which are refused.

    Both are told on the traced program: at eps = 0 with weights at random, and as it is with the
    weights that the model has (at random where these hide it, as zeros do that multiply what
    changes). A batch norm reads the statistics of the example for those gauges
    that are none in evaluation.
    """
    failing: dict[Gauge, str] = {}
    unchecked, sizes = dict(gauges.unchecked), {}
    for gauge in gauges:
        if not KINDS[gauge.kind].approximate:
            continue
        try:
            with as_program(trace, gauge, eps=False):
                change = changed(trace, gauge, moved=True)
            if change > TOLERANCE:
                failing[gauge] = f"at eps = 0, {Change(change)}"
                continue
            with as_program(trace, gauge, eps=True):
                sizes[gauge] = changed(trace, gauge, moved=False) or changed(
                    trace, gauge, moved=True
                )
        except Exception as error:  # whatever an operation may raise, NoValue included
            unchecked[gauge] = first_line(error)
    return replace(refuse(gauges, failing), unchecked=unchecked, sizes=sizes)


def changed(trace: Trace, gauge: Gauge, moved: bool) -> float:
    """The largest change of a centred log-probability under a random element, relative to that by
    another move of the same weights by as much.

    Args:
        trace: whose program is run, in float64.
        gauge: whose element.
        moved: whether weights are moved at random first.
    """
    generator = torch.Generator().manual_seed(0)
    tables = {trace.parameters[node] for node in trace.tables}
    weights = {
        name: generic(p, generator) if moved and name not in tables else double(p).clone()
        for name in {*trace.parameters.values()}
        for p in (trace.tensors[name].detach(),)
    }
    after = weights | {name: weights[name].clone() for name in gauge.parameters}
    gauge.act_(after, gauge.sample(after, generator))
    control = dict(weights)
    for name in gauge.parameters:
        size = (after[name] - weights[name]).square().mean().sqrt()
        control[name] = noise_like(weights[name], generator).mul_(size).add_(weights[name])
    before, ours, others = (logits(trace, each) for each in (weights, after, control))
    return difference([before], [ours], [others], before.shape[-1:])


@torch.no_grad()
def logits(trace: Trace, weights: Mapping[str, Tensor]) -> Tensor:
    """What the program gives with these weights."""
    given: dict[Node, Any] = {
        node: double(trace.constant(node)) for node in trace.graph.nodes if node.op == "placeholder"
    }
    given |= {node: weights[name] for node, name in trace.parameters.items()}
    with InDouble():
        found: Tensor = trace.value(trace.logits, given)
    return found


@contextlib.contextmanager
def as_program(trace: Trace, gauge: Gauge, eps: bool) -> Iterator[None]:
    """Within, the program has no eps in its norms, unless it is to keep that, and batch norms are
    as in training, for a gauge that is none in evaluation.
    """
    before: dict[Node, Any] = {}

    def put(node: Node, changes: Mapping[int, Any]) -> None:
        args = list(before.setdefault(node, node.args))
        args += [None] * (1 + max(changes) - len(args))  # those that it left out
        for place, value in changes.items():
            args[place] = value
        node.args = tuple(args)

    try:
        for norm in [] if eps else [*norms_of(trace)]:
            if (place := EPS_OF.get(operation(norm.output))) is not None:
                put(norm.output, {place: 0.0})
            else:  # spelt out
                put(next(each for each in norm.inside if operation(each) == "add"), {1: 0.0})
        in_training = isinstance(gauge, Scale) and gauge.training
        statistics = {3: None, 4: None, 5: True} if in_training else {}
        for node in trace.graph.nodes:
            if operation(node) == "batch_norm" and (
                changes := statistics | ({} if eps else {7: 0.0})
            ):
                put(node, changes)
        yield
    finally:
        for node, args in before.items():
            node.args = args
