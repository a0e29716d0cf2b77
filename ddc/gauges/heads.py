"""The heads of a traced model: the linear maps whose outputs are added, averaged or picked from to
become its logits.

A head that is shifted, ``W + 1 vᵀ``, gives all classes of a position one number more. What is done
with its outputs on the way passes that on where it treats all classes alike and adds up with what
other heads give: sums, means over positions or heads, numbers and gates that are the same for all
classes, choices of positions. Then each head has a logit shift of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ddc.gauges.trace import (
    MOVES,
    LinearMap,
    Trace,
    apply,
    arguments,
    drops,
    has_fixed_shape,
    inputs,
    operation,
    readers,
    value_of,
)

#: Operations after which the logits are the same numbers, in another place or type.
SAME = frozenset(["alias", "to", "clone", "contiguous", "_to_copy"])
#: A node, and the axis along which its classes lie.
Along = tuple[Node, int]


@dataclass
class Logits:
    """How the logits of a model come about.

    Attributes:
        heads: the linear maps that they come from, each application once, in order.
        stops: where the way back ended at something else that the model's inputs decide.
        axes: the nodes on the way, heads' outputs included, with the axis of the classes.
        passed: each node on the way with what of its arguments it passes on class by class; what it
            takes otherwise, as a gate say, is not among them.
        given: the logits, and the same before a change of place or type.
    """

    heads: list[LinearMap] = field(default_factory=list)
    stops: list[Node] = field(default_factory=list)
    axes: dict[Node, int] = field(default_factory=dict)
    passed: set[tuple[Node, Node]] = field(default_factory=set)
    given: set[Node] = field(default_factory=set)

    def reader_beside(self, head: LinearMap) -> Node | None:
        """What else reads the outputs of a head, or what becomes of them, than the way to the
        logits; what is computed from the logits themselves does not count.
        """
        waiting, seen = [head.output], {head.output}
        while waiting:
            node = waiting.pop()
            if node in self.given:
                continue
            for reader in readers(node):
                if (node, reader) not in self.passed:
                    return reader
                if reader not in seen:
                    seen.add(reader)
                    waiting.append(reader)
        return None


def heads_of(trace: Trace) -> list[LinearMap]:
    """The linear maps that are a model's heads, whatever its loss.

    Where other things add up to the logits too, or read what a map adds, there are none: the maps
    that write to a residual stream are not heads because the model gives that stream.
    """
    logits = logits_of(trace)
    if logits.stops or any(logits.reader_beside(head) is not None for head in logits.heads):
        return []
    return logits.heads


def logits_of(trace: Trace) -> Logits:
    """The heads of a model's logits (:attr:`Trace.logits`), and what lies between."""
    found, node = Logits(), trace.logits
    if not isinstance(node.meta.get("val"), Tensor) or not value_of(node).ndim:
        return Logits(stops=[node])
    found.given.add(node)
    while operation(node) in SAME and inputs(node):
        node = inputs(node)[0]
        found.given.add(node)
    waiting: list[Along] = [(trace.logits, value_of(trace.logits).ndim - 1)]
    while waiting:
        node, axis = waiting.pop()
        if node in found.axes:
            if found.axes[node] != axis:  # a matrix and its transpose
                return Logits(stops=[node])
            continue
        found.axes[node] = axis
        written = node in trace.rewritten
        linear = trace.maps_by_output.get(node)
        if linear is not None and axis == value_of(node).ndim - 1 and not written:
            found.heads.append(linear)
            continue
        before = None if written else _before(trace, node, axis)
        if before is None:
            found.stops.append(node)
            continue
        reader = node
        if operation(node) == "getitem":
            reader = arguments(node)[0]
            found.passed.add((reader, node))
        found.passed |= {(each, reader) for each, _ in before}
        waiting += before
    found.heads.sort(key=lambda linear: trace.order[linear.node])
    found.stops.sort(key=trace.order.__getitem__)
    return found


def _before(trace: Trace, node: Node, axis: int) -> list[Along] | None:
    """The values that a node adds up, class by class, each with the axis of its classes: one number
    more for all classes of one of them is one number more for all classes of the node. None if it
    does anything else. What the inputs do not decide is left out.
    """
    name, args = operation(node), arguments(node)
    if not isinstance(node.meta.get("val"), Tensor) or not has_fixed_shape(node):
        return None
    value = value_of(node)
    if not value.is_floating_point():
        return None
    match name.removesuffix("_"):
        case "add" | "sub" if len(args) == 2 and node.kwargs.keys() <= {"alpha"}:
            return _varying(trace, args, node, axis)
        case "mul" | "div" if len(args) == 2 and not node.kwargs:
            terms = [(i, at) for i in (0, 1) if (at := _aligned(args[i], node, axis)) is not None]
            if len(terms) != 1 or (name.startswith("div") and terms[0][0]):
                return None
            ((i, at),) = terms
            return [(args[i], at)]
        case "neg" | "to" | "_to_copy" | "alias" | "clone" | "contiguous":
            return [(args[0], axis)]
        case "dropout":
            return None if drops(node) else [(args[0], axis)]
        case "mean" | "sum":
            return _reduced(node, axis)
        case "stack" | "cat":
            return _joined(trace, node, axis)
        case "index":
            return _picked(node, axis)
        case "index_select" if args[1] % value.ndim != axis:
            return [(args[0], axis)]
        case "getitem" if operation(args[0]) in MOVES:
            return _moved(args[0], axis, value, args[1])
    return _moved(node, axis, value) if name in MOVES else None


def _aligned(operand: Any, node: Node, axis: int) -> int | None:
    """The axis of an operand along which it differs by class, if it does; ``axis`` is that of what
    it is broadcast to.
    """
    if not isinstance(operand, Node) or not isinstance(operand.meta.get("val"), Tensor):
        return None
    at = axis - (value_of(node).ndim - value_of(operand).ndim)
    return at if at >= 0 and value_of(operand).shape[at] > 1 else None


def _varying(trace: Trace, operands: Sequence[Any], node: Node, axis: int) -> list[Along]:
    """Those of the terms of a sum that differ by class and by what the model is given."""
    return [
        (each, at)
        for each in operands
        if (at := _aligned(each, node, axis)) is not None and trace.ancestors(each) & trace.inputs
    ]


def _reduced(node: Node, axis: int) -> list[Along] | None:
    """The argument of a sum or mean over other axes than that of the classes."""
    match arguments(node):
        case x, [*dims], *rest if dims:
            size = value_of(x).ndim
        case _:
            return None
    gone = {dim % size for dim in dims}
    kept = [i for i in range(size) if i not in gone]
    at = axis if rest and rest[0] else kept[axis]
    return None if at in gone else [(x, at)]


def _joined(trace: Trace, node: Node, axis: int) -> list[Along] | None:
    """The arguments that are put side by side along another axis than that of the classes."""
    parts, *rest = arguments(node)
    along = (rest[0] if rest else 0) % value_of(node).ndim
    if along == axis:
        return None
    at = axis - (operation(node) == "stack" and along < axis)
    return [(each, at) for each in dict.fromkeys(parts) if trace.ancestors(each) & trace.inputs]


def _picked(node: Node, axis: int) -> list[Along] | None:
    """The argument of which some positions are chosen, each with all of its classes."""
    x, chosen = arguments(node)
    last = value_of(x).ndim - 1
    whole = len(chosen) <= last or chosen[last] is None
    return [(x, last)] if whole and axis == value_of(node).ndim - 1 else None


def _moved(move: Node, axis: int, value: Tensor, part: int | None = None) -> list[Along] | None:
    """The argument that an operation moves, if all classes of a position stay together."""
    x = arguments(move)[0]
    if inputs(move) != [x]:
        return None  # where to, other values say
    shape, classes = value_of(x).shape, value.shape[axis]

    def moved(labels: Tensor) -> Tensor:
        after = apply(move, labels)
        return (after if part is None else after[part]).movedim(axis, -1)

    for at in range(len(shape)):
        if shape[at] != classes:
            continue
        along = [-1 if i == at else 1 for i in range(len(shape))]
        label = torch.arange(classes, dtype=torch.int32).view(along).expand(shape)
        others = [1 if i == at else size for i, size in enumerate(shape)]
        position = torch.arange(shape.numel() // classes, dtype=torch.int32)
        position = moved(position.view(others).expand(shape))
        expected = torch.arange(classes, dtype=torch.int32)
        same_class = bool((moved(label) == expected).all())
        if same_class and bool((position == position[..., :1]).all()):
            return [(x, at)]
    return None
