"""The scale of a channel that BatchNorms write, alone or added up along a stream of a ResNet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.fx import Node

from ddc.gauges.actions import Axis, Rescale
from ddc.gauges.base import Gauge
from ddc.gauges.stream import gives_channels
from ddc.gauges.trace import (
    HOMOGENEOUS,
    KEEPS,
    POOLS,
    SUMS,
    Flow,
    LinearMap,
    arguments,
    channels_of,
    drops,
    inputs,
    number_of,
    operation,
)
from ddc.gauges.traced import Finding, NotProved, owner


def channel_scale(finding: Finding, node: Node, where: str) -> list[Gauge]:
    """Scale and shift of a BatchNorm, and of all that is added to what it gives, against the
    channels that convolutions, or linear maps, read of the sum, with what is homogeneous between
    them.

    Args:
        finding: of the trace.
        node: the BatchNorm.
        where: it is.

    Returns:
        The gauge; nothing where one with it is found at an earlier BatchNorm.

    Raises:
        NotProved: what is added to it, or reads it, does not scale.
    """
    done = finding.kept.setdefault(("joined channels",), set())
    if node in done:
        return []
    writers, flow = _joined(finding, node)
    done |= {*writers}
    plus = [axis for each in writers for axis in _rows_of(finding, each)]
    if not flow.arrivals:
        raise NotProved("nothing reads it")
    if len(degrees := {arrival.degree for arrival in flow.arrivals}) > 1:
        raise NotProved("its readers read it at different degrees")
    columns = [finding.reader(arrival) for arrival in flow.arrivals]
    units = len(finding.trace.tensors[plus[0].parameter])
    finding.require_alike(units, columns)
    finding.require_single([axis.parameter for axis in plus], columns)
    return [Rescale("channel_scale", where, tuple(plus), tuple(columns), degrees.pop())]


def _joined(finding: Finding, node: Node) -> tuple[list[Node], Flow]:
    """A BatchNorm with all that is added to what it gives, in order, and where the channels of them
    all go.
    """
    writers, trace = {node}, finding.trace
    while True:
        flow = trace.flow({each: channels_of(each) for each in writers})
        # a flow ends at a sum one of whose terms is not scaled
        reached = Counter(each.node for each in flow.arrivals if operation(each.node) in SUMS)
        fresh = set[Node]()
        for arrival in flow.arrivals:
            if reached[arrival.node] == 1:
                others = [
                    each for i, each in enumerate(arguments(arrival.node)) if i != arrival.argument
                ]
                fresh |= _writers(finding, others)
        if fresh <= writers:
            return sorted(writers, key=trace.order.__getitem__), flow
        writers |= fresh


def _writers(finding: Finding, terms: Sequence[object]) -> set[Node]:
    """The BatchNorms and convolutions whose channels some terms of a sum have, and nothing else."""
    found, seen, waiting = set[Node](), set[object](), [*terms]
    while waiting:
        term = waiting.pop()
        if term in seen:
            continue
        seen.add(term)
        if not isinstance(term, Node):
            raise NotProved("a number is added to it")
        name = operation(term)
        if name == "batch_norm" or gives_channels(term):
            found.add(term)
        elif name in SUMS and len(arguments(term)) == 2 and not term.kwargs:
            waiting += arguments(term)
        elif number_of(term) is not None:
            waiting += inputs(term)
        elif name in HOMOGENEOUS | POOLS | KEEPS | {"neg"} and not drops(term):
            waiting.append(arguments(term)[0])
        else:
            raise NotProved(f"{finding.describe(term)} is added to it")
    return found


def _rows_of(finding: Finding, writer: Node) -> list[Axis]:
    """What of a BatchNorm, or of a convolution, multiplies its channels."""
    if operation(writer) != "batch_norm":
        return [Axis(*row) for row in rows_of_map(finding, writer)]
    views = [finding.trace.parameter(each) for each in arguments(writer)[1:3]]
    names = [view[0] for view in views if view is not None]
    if len({*names}) < 2:
        raise NotProved("its scale and shift are not two parameters as they stand")
    return [Axis(name) for name in names]


def rows_of_map(finding: Finding, source: LinearMap | Node) -> list[tuple[str, int]]:
    """Weight and bias of a linear map, or of a convolution, and the axis along which its outputs
    lie.
    """
    if isinstance(source, LinearMap):
        if source.bias_node is not None and source.bias is None:
            raise NotProved(f"the bias of {owner(source.weight)} is no parameter of its own")
        names, axis = [source.weight, *([source.bias] if source.bias else [])], source.rows
    else:
        given = [each for each in arguments(source)[1:3] if each is not None]
        views = [finding.trace.parameter(each) for each in given]
        names, axis = [view[0] for view in views if view is not None], 0
        if len(names) < len(given):
            raise NotProved("the weights of a convolution are no parameters of their own")
    finding.require_single(names)
    return [(names[0], axis), *((name, 0) for name in names[1:])]
