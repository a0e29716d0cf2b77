"""Residual streams of a traced model: who writes to them, and who reads them.

A stream is what additions join: the outputs of linear maps, rows of embeddings, positions. Its
vectors lie along the last axis, or along that of channels, and may move from one to the other.
Where norms alone read it, and linear maps alone read these, the loss cannot see it turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ddc.gauges.trace import (
    CONVOLUTIONS,
    KEEPS,
    MOVES,
    POOLS,
    LinearMap,
    Trace,
    apply,
    arguments,
    has_fixed_shape,
    inputs,
    operation,
    readers,
    reads_a_batch,
    value_of,
)

#: Pools that take the mean of a channel's entries.
AVERAGES = frozenset(name for name in POOLS if "avg" in name)


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis: of what node, whether it centres, and the node that it gives,
    before any scale of its own.
    """

    input: Node
    centres: bool
    output: Node
    inside: frozenset[Node]


class ScaledMap(NamedTuple):
    """A map whose outputs are multiplied by a vector, one for one.

    Attributes:
        map: a linear map, or the node of a convolution.
        scale: name of the vector.
        axis: of the product, counted from the last, along which its entries lie; None if they are
            along several.
    """

    map: LinearMap | Node
    scale: str
    axis: int | None


@dataclass
class Stream:
    """What additions join.

    Attributes:
        nodes: all values of the stream, with the axis along which the entries of its vectors lie,
            counted from the last: -1, or that of the channels of an image, -3.
        writers: what is added to it: outputs of linear maps and convolutions, also behind a layer
            scale, embeddings, parameters.
        norms: that read it.
        faults: in words, what else writes to it or reads it.
    """

    nodes: dict[Node, int] = field(default_factory=dict)
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
    """The norm x · rsqrt(mean(x²) + eps) over the last axis; also of x - mean(x), which centres."""
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
    others = [each for each in arguments(users[0]) if each is not node]
    if len(others) != 1:
        return None
    parts = {node, inside, mean, square, users[0]}
    centred = _centred(x)
    if centred is not None:
        if _centred(others[0]) != centred:
            return None
        parts |= {x, others[0], centred[1]}
        if any({*readers(each)} - parts for each in (x, others[0], centred[1])):
            return None
        x = centred[0]
    elif others[0] is not x:
        return None
    while (
        operation(x) in KEEPS - {"dropout"}
        and {*readers(x)} <= parts
        and value_of(x).is_floating_point()
    ):
        parts.add(x)
        x = arguments(x)[0]
    return Norm(x, centred is not None, users[0], frozenset(parts))


def _centred(node: Node) -> tuple[Node, Node] | None:
    """Of x - mean(x), over the last axis, x and its mean; None of anything else."""
    match operation(node), arguments(node):
        case "sub", (Node() as x, Node() as mean) if not node.kwargs and operation(mean) == "mean":
            of, axes, *keep = (*arguments(mean), None)
            if of is x and axes == [-1] and keep[:1] == [True] and not mean.kwargs:
                return x, mean
    return None


def streams(trace: Trace, scaled: Mapping[Node, ScaledMap]) -> list[Stream]:
    """The streams that norms read, each with all that it is.

    Args:
        trace: of the model.
        scaled: what writes to a stream behind a layer scale, by the product.
    """
    norms = list(norms_of(trace))
    found: list[Stream] = []
    for norm in norms:
        if not any(stream.nodes.get(norm.input) == -1 for stream in found):
            found.append(_stream(trace, norm, norms, scaled))
    return [stream for stream in found if stream.norms]


def _stream(
    trace: Trace, start: Norm, norms: list[Norm], scaled: Mapping[Node, ScaledMap]
) -> Stream:
    """The stream of which the input of a norm is a part."""
    stream, width = Stream(), value_of(start.input).shape[-1]
    inside = {part: norm for norm in norms for part in norm.inside}
    waiting = [(start.input, -1)]
    while waiting:
        node, axis = waiting.pop()
        if node in stream.nodes:
            if stream.nodes[node] != axis:
                stream.faults.append(f"{operation(node) or node.name} is read along two axes")
            continue
        stream.nodes[node] = axis
        before = _sources(trace, node, axis, width, scaled)
        if before is None:
            stream.faults.append(f"{operation(node) or node.name} writes to it")
        elif before:
            waiting += before
        else:
            stream.writers.append(node)
        for user in readers(node):
            if user in inside and inside[user].input is node and axis == -1:
                if inside[user] not in stream.norms:
                    stream.norms.append(inside[user])
            elif (after := carried(user, node, axis)) is not None:
                waiting.append((user, after))
            else:
                name = operation(user) or "the output of the model"
                stream.faults.append(f"{name} reads it")
    return stream


def _sources(
    trace: Trace, node: Node, axis: int, width: int, scaled: Mapping[Node, ScaledMap]
) -> list[tuple[Node, int]] | None:
    """The nodes of the stream from which one is made, with their axes; none of a writer; None of
    what cannot be turned.
    """
    if node in scaled:
        return [] if scaled[node].axis == axis else None
    if node in trace.maps_by_output or node in trace.experts_by_output:
        return [] if axis == -1 else None
    if (view := trace.parameter(node)) is not None:
        as_it_is = trace.tensors[view[0]].shape == value_of(node).shape and view[1] % 2 == 0
        return [] if as_it_is and value_of(node).shape[axis] == width else None
    name, args = operation(node), arguments(node)
    if name == "embedding":
        return [] if axis == -1 and trace.parameter(args[0]) is not None else None
    if name in CONVOLUTIONS:
        return [] if gives_channels(node, axis) else None
    if name in ("add", "add_", "sub") and all(isinstance(each, Node) for each in args[:2]):
        whole = len(args) == 2 and not node.kwargs
        whole = whole and all(_size(each, axis) == width for each in args)
        return [(each, axis) for each in args] if whole else None
    if name == "mul" and len(args) == 2:
        vectors = [
            each for each in args if isinstance(each, Node) and carried(node, each, axis) == axis
        ]
        return [(vectors[0], axis)] if len(vectors) == 1 else None
    if name in ("cat", "stack"):
        parts = [(each, _axis_before(node, each, axis, width)) for each in args[0]]
        found = [(each, before) for each, before in parts if before is not None]
        return found if len(found) == len(parts) else None
    if args and isinstance(args[0], Node):
        before = _axis_before(node, args[0], axis, width)
        return None if before is None else [(args[0], before)]
    return None


def _axis_before(user: Node, node: Node, axis: int, width: int) -> int | None:
    """The axis of a node along which entries lie that are along another of what reads it."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    axes = range(-1, -1 - value_of(node).ndim, -1)
    fitting = (each for each in axes if _size(node, each) == width)
    return next((each for each in fitting if carried(user, node, each) == axis), None)


def gives_channels(node: Node, axis: int | None = None) -> bool:
    """Whether a node is a convolution of a batch, whose channels are the entries along an axis."""
    if operation(node) not in CONVOLUTIONS or node.kwargs or not reads_a_batch(node):
        return False
    return axis is None or axis == 1 - value_of(node).ndim


def in_groups(convolution: Node) -> bool:
    """Whether channels of a convolution read channels of their own group alone."""
    return arguments(convolution)[6:] not in ((), (1,))


def carried(user: Node, node: Node, axis: int) -> int | None:
    """The axis along which what reads a node has the entries that this has along one, where it is a
    value of the stream if the node is; None if it is none, or has them elsewhere.

    Args:
        user: the operation that reads the node.
        node: a value of the stream.
        axis: of the node, counted from the last.
    """
    name, args = operation(user), arguments(user)
    value, width = user.meta.get("val"), _size(node, axis)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or width is None:
        return None  # rounded to integers, perhaps
    same = axis if _size(user, axis) == width else None
    if name in ("add", "add_", "sub"):
        whole = len(args) == 2 and all(isinstance(each, Node) for each in args) and not user.kwargs
        return same if whole else None
    if name in ("mul", "div"):  # by one number, or one for each vector
        other = args[1] if args[0] is node else args[0]
        divisor = name == "div" and args[1] is node
        return same if _is_number(other, axis) and not user.kwargs and not divisor else None
    if name == "index":  # of vectors
        chosen = args[0] is node and len(args[1]) < value_of(node).ndim
        return same if chosen and axis == -1 else None
    if name == "dropout":
        return same if not float(args[1]) > 0 else None
    if name in KEEPS:
        return same
    if name in AVERAGES:  # of vectors
        return same if axis < -int(name[-2]) else None
    if name in ("sum", "mean") and len(args) > 1:
        return _axis_of_mean(user, node, axis)
    if name in ("cat", "stack"):
        return _axis_beside(user, node, axis)
    if name in MOVES and len(inputs(user)) == 1 and has_fixed_shape(user) and has_fixed_shape(node):
        return axis_of(apply(user, along(value_of(node).shape, axis)), width)
    return None


def _axis_of_mean(user: Node, node: Node, axis: int) -> int | None:
    """The axis of the entries of vectors, behind a sum or mean of vectors."""
    ndim = value_of(node).ndim
    reduced, *keep = arguments(user)[1:]
    axes = {each % ndim for each in ([reduced] if isinstance(reduced, int) else reduced or [])}
    if not axes or axis % ndim in axes:
        return None
    if keep and keep[0]:
        return axis
    return axis + sum(each > axis % ndim for each in axes)


def _axis_beside(user: Node, node: Node, axis: int) -> int | None:
    """The axis of the entries of vectors that are put beside others."""
    beside: Any = arguments(user)[1] if len(arguments(user)) > 1 else user.kwargs.get("dim", 0)
    beside = beside % value_of(user).ndim
    place = axis % value_of(node).ndim
    if operation(user) == "cat":
        return None if beside == place else axis
    return axis - 1 if beside > place else axis


def along(shape: Sequence[int], axis: int) -> Tensor:
    """Labels that number the entries along an axis, counted from the last."""
    return torch.arange(shape[axis]).view(-1, *[1] * (-1 - axis)).expand(tuple(shape))


def axis_of(labels: Any, width: int) -> int | None:
    """The axis, counted from the last, that labels number one by one, as far as ``width``; None if
    there is none.
    """
    if not isinstance(labels, Tensor):
        return None  # several parts of a whole, perhaps
    axes = (axis for axis in range(-1, -1 - labels.ndim, -1) if labels.shape[axis] == width)
    return next((axis for axis in axes if torch.equal(labels, along(labels.shape, axis))), None)


def _is_number(factor: object, axis: int) -> bool:
    """Whether a factor is one number for each vector whose entries lie along an axis."""
    if not isinstance(factor, Node) or not isinstance(factor.meta.get("val"), Tensor):
        return True
    return value_of(factor).ndim < -axis or _size(factor, axis) == 1


def _size(node: Node, axis: int) -> int | None:
    """How long an axis of a node's value is, counted from the last; None if it has none, or other
    values say how long.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < -axis:
        return None
    return size if isinstance(size := value.shape[axis], int) else None
