"""Residual streams of a traced model: who writes to them, and who reads them.

A stream is what additions join: the outputs of linear maps, rows of embeddings, positions. Where
norms alone read it, and linear maps alone read these, the loss cannot see it turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ddc.gauges.trace import (
    CONVOLUTIONS,
    KEEPS,
    MOVES,
    Trace,
    apply,
    arguments,
    channels_of,
    has_fixed_shape,
    inputs,
    labels_of,
    last_axis,
    operation,
    readers,
    reads_a_batch,
    value_of,
)


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis: of what node, whether it centres, and the node that it gives,
    before any scale of its own.
    """

    input: Node
    centres: bool
    output: Node
    inside: frozenset[Node]


@dataclass
class Stream:
    """What additions join.

    Attributes:
        nodes: all values of the stream.
        writers: what is added to it: outputs of linear maps, also behind a layer scale,
            embeddings, parameters.
        norms: that read it.
        faults: in words, what else writes to it or reads it.
    """

    nodes: set[Node] = field(default_factory=set)
    writers: list[Node] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Entries of a vector of the stream."""
        return value_of(self.norms[0].input).shape[-1]


def norms_of(trace: Trace) -> Iterator[Norm]:
    """All norms over the last axis, as one operation or spelt out."""
    for node in trace.graph.nodes:
        match operation(node), arguments(node):
            case (("layer_norm" | "rms_norm") as name, (x, shape, *_)) if len(shape) == 1:
                yield Norm(x, name == "layer_norm", node, frozenset([node]))
            case "rsqrt", (inside,):
                if (norm := _spelt_out(node, inside)) is not None:
                    yield norm


def _spelt_out(node: Node, inside: object) -> Norm | None:
    """The norm x · rsqrt(mean(x²) + eps) over the last axis."""
    if not isinstance(inside, Node) or operation(inside) != "add":
        return None
    mean, eps = arguments(inside)[:2]
    if isinstance(eps, Node) or not isinstance(mean, Node) or operation(mean) != "mean":
        return None
    square = arguments(mean)[0]
    if list(arguments(mean)[1]) != [-1] or value_of(mean).shape[-1] != 1:
        return None
    x = arguments(square)[0]
    match operation(square), arguments(square)[1:]:
        case ("square", ()) | ("pow", (2 | 2.0,)):
            pass
        case "mul", (other,) if other is x:
            pass
        case _:
            return None
    if any(len(readers(each)) != 1 for each in (square, mean, inside)):
        return None  # squares that anything else reads do not turn
    if len(users := readers(node)) != 1 or operation(users[0]) != "mul":
        return None
    if {*arguments(users[0])} != {x, node}:
        return None
    parts = {node, inside, mean, square, users[0]}
    while (
        operation(x) in KEEPS - {"dropout"}
        and {*readers(x)} <= parts
        and value_of(x).is_floating_point()
    ):
        parts.add(x)
        x = arguments(x)[0]
    return Norm(x, False, users[0], frozenset(parts))


def streams(trace: Trace, scaled: Collection[Node]) -> list[Stream]:
    """The streams that norms read, each with all that it is.

    Args:
        trace: of the model.
        scaled: nodes that write to a stream, for they are outputs of linear maps times a vector.
    """
    norms = list(norms_of(trace))
    found: list[Stream] = []
    for norm in norms:
        if not any(norm.input in stream.nodes for stream in found):
            found.append(_stream(trace, norm, norms, scaled))
    return [stream for stream in found if stream.norms]


def _stream(trace: Trace, start: Norm, norms: list[Norm], scaled: Collection[Node]) -> Stream:
    """The stream of which the input of a norm is a part."""
    stream, width = Stream(), value_of(start.input).shape[-1]
    inside = {part: norm for norm in norms for part in norm.inside}
    waiting = [start.input]
    while waiting:
        node = waiting.pop()
        if node in stream.nodes:
            continue
        stream.nodes.add(node)
        before = [] if node in scaled else _sources(trace, node, width)
        if before is None:
            stream.faults.append(f"{operation(node) or node.name} writes to it")
        elif before:
            waiting += before
        else:
            stream.writers.append(node)
        for user in readers(node):
            if user in inside and inside[user].input is node:
                if inside[user] not in stream.norms:
                    stream.norms.append(inside[user])
            elif carries(user, node, width):
                waiting.append(user)
            else:
                name = operation(user) or "the output of the model"
                stream.faults.append(f"{name} reads it")
    return stream


def _sources(trace: Trace, node: Node, width: int) -> list[Node] | None:
    """The nodes of the stream from which one is made; none of a writer; None of what cannot be
    turned.
    """
    if node in trace.maps_by_output or node in trace.experts_by_output:
        return []
    if (view := trace.parameter(node)) is not None:
        return [] if trace.tensors[view[0]].shape[-1] == width and view[1] % 2 == 0 else None
    name, args = operation(node), arguments(node)
    if name == "embedding":
        return [] if trace.parameter(args[0]) is not None else None
    if name in ("add", "add_", "sub") and all(isinstance(each, Node) for each in args[:2]):
        whole = all(value_of(each).shape[-1:] == (width,) for each in args)
        return list(args) if whole and len(args) == 2 and not node.kwargs else None
    if patches_of(node, width) is not None:
        return []
    if name == "mul" and len(args) == 2:
        vectors = [each for each in args if isinstance(each, Node) and carries(node, each, width)]
        return vectors if len(vectors) == 1 else None
    if name in ("cat", "stack"):
        return list(args[0]) if _keeps_last_axis(node, args[0][0], width) else None
    if args and isinstance(args[0], Node) and carries(node, args[0], width):
        return [args[0]]
    return None


def patches_of(node: Node, width: int) -> Node | None:
    """The convolution whose channels are the entries of a node's vectors, as those of patches
    are; None if there is none.
    """
    moved = [node]
    while operation(moved[-1]) in MOVES:
        moved.append(arguments(moved[-1])[0])
    *moves, convolution = moved
    if not moves or operation(convolution) not in CONVOLUTIONS or not reads_a_batch(convolution):
        return None
    if value_of(convolution).shape[1] != width:
        return None  # some of its channels
    labels: Any = channels_of(convolution)
    for each in reversed(moves):
        labels = apply(each, labels)
    at_last = last_axis(labels) if isinstance(labels, torch.Tensor) else None
    alone = all(len(readers(each)) == 1 for each in [convolution, *moves[1:]])
    whole = at_last is not None and torch.equal(at_last, torch.arange(width))
    if arguments(convolution)[6:] not in ((), (1,)):
        return None  # groups, of which each reads channels of its own
    return convolution if alone and whole else None


def carries(user: Node, node: Node, width: int) -> bool:
    """Whether what a node gives is a value of the stream if what it reads is."""
    name, args = operation(user), arguments(user)
    value = user.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.shape[-1:] != (width,):
        return False
    if not value.is_floating_point():  # rounded to integers
        return False
    if name in ("add", "add_", "sub"):
        return len(args) == 2 and all(isinstance(each, Node) for each in args) and not user.kwargs
    before = node.meta.get("val")
    if not isinstance(before, torch.Tensor) or before.shape[-1:] != (width,):
        return False  # several parts of a whole, perhaps
    if name in ("mul", "div"):  # by one number, or one for each vector
        other = args[1] if args[0] is node else args[0]
        by_number = not isinstance(other, Node) or value_of(other).shape[-1:] in ((), (1,))
        return by_number and not user.kwargs and not (name == "div" and args[1] is node)
    if name in ("sum", "mean") and len(args) > 1:  # of vectors
        axes = [args[1]] if isinstance(args[1], int) else list(args[1])
        return all(axis % value_of(node).ndim != value_of(node).ndim - 1 for axis in axes)
    if name == "index":  # of vectors
        return args[0] is node and len(args[1]) < value_of(node).ndim
    if name == "dropout":
        return not float(args[1]) > 0
    if name in KEEPS:
        return True
    if name in ("cat", "stack") or name in MOVES:
        return _keeps_last_axis(user, node, width)
    return False


def _keeps_last_axis(user: Node, node: Node, width: int) -> bool:
    """Whether an operation leaves the entries of each vector together, in their order."""
    if value_of(node).shape[-1:] != (width,):
        return False
    if operation(user) in ("cat", "stack"):
        axis: Any = arguments(user)[1] if len(arguments(user)) > 1 else user.kwargs.get("dim", 0)
        return int(axis) not in (-1, value_of(user).ndim - 1)
    if len(inputs(user)) > 1 or not has_fixed_shape(user):
        return False  # where to, other values say
    after = apply(user, labels_of(node))
    if not isinstance(after, torch.Tensor):
        return False
    labels = last_axis(after)
    return labels is not None and torch.equal(labels, torch.arange(width))
