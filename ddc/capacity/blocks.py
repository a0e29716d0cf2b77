"""Feed-forward blocks of any model that ``torch.export`` traces, and the weights of their hidden
units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import Node

from ddc.gauges import Axis
from ddc.gauges.trace import (
    KEEPS,
    Inputs,
    LinearMap,
    Trace,
    inputs,
    module_path,
    operation,
    traced,
    value_of,
)

#: Operations on each entry by itself, which may lie between the linear maps of a block.
ELEMENTWISE = KEEPS | frozenset(
    (
        *(
            "relu",
            "relu_",
            "leaky_relu",
            "leaky_relu_",
            "gelu",
            "silu",
            "silu_",
            "sigmoid",
            "tanh",
            "mish",
        ),
        *("hardswish", "softplus", "abs", "square", "pow", "mul", "div", "neg", "add", "sub"),
    )
)
#: Operations that leave the last axis alone where its size stays the same.
VIEWS = frozenset(["view", "reshape", "_unsafe_view"])


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block: linear maps that give its hidden units, and the one that reads them.

    Attributes:
        where: the place in the model, in the model's own names.
        inward: weights, and biases, of the linear maps that give the units, with the axis of the
            units: W_up, and W_gate where there is one.
        outward: weight of the linear map that reads the units, with their axis: W_down.
        outward_bias: name of its bias; None if it has none.
        units: number of hidden units.
    """

    where: str
    inward: tuple[Axis, ...]
    outward: Axis
    outward_bias: str | None
    units: int

    @property
    def reader(self) -> str:
        """Name of the module that reads the units."""
        return self.outward.parameter.rpartition(".")[0]


def feed_forward_blocks(model: nn.Module, example: Inputs | None = None) -> list[FeedForward]:
    """The feed-forward blocks of a model, in its order.

    A block is a linear map whose input is computed, entry by entry, from the outputs of linear maps
    that nothing else reads. Layers of a plain chain, whose units come from the units of the layer
    before, are no blocks.

    Args:
        model: any model that ``torch.export`` traces.
        example: inputs as for :func:`ddc.find_gauges`; None where the model's kind is known.

    Raises:
        ValueError: the model cannot be traced, or ``example`` is needed.
    """
    trace = traced(model, example)
    blocks = [
        block
        for linear in trace.linear_maps.values()
        if (block := _block_before(trace, linear)) is not None
    ]
    places = [block.where for block in blocks]
    blocks = [
        replace(block, where=block.reader) if places.count(block.where) > 1 else block
        for block in blocks
    ]
    inward = {axis.parameter for block in blocks for axis in block.inward}
    outward = {block.outward.parameter for block in blocks}
    return [
        block
        for block in blocks
        if block.outward.parameter not in inward
        and not outward & {axis.parameter for axis in block.inward}
    ]


def _block_before(trace: Trace, reader: LinearMap) -> FeedForward | None:
    """The block that a linear map ends; None if what it reads is not computed from linear maps
    entry by entry.
    """
    # back from what the reader reads, through what is elementwise, to the linear maps before it
    sources: list[LinearMap] = []
    between: set[Node] = set()
    waiting, width = [reader.input], value_of(reader.input).shape[-1:]
    while waiting:
        node = waiting.pop()
        if value_of(node).shape[-1:] != width:
            return None
        if node in trace.linear_maps:
            sources.append(trace.linear_maps[node])
        elif operation(node) in ELEMENTWISE | VIEWS:
            waiting += [each for each in inputs(node) if each not in between]
        else:
            return None
        between.add(node)
    # nothing else may read what lies between, and each weight must be used here alone
    maps = [*sources, reader]
    elementwise = between - trace.linear_maps.keys()
    if (
        reader.input in trace.linear_maps
        or not all(
            user is reader.node or user in elementwise for node in between for user in node.users
        )
        or not all(_is_alone(trace, linear) for linear in maps)
        # its module must be there to be asked for its input
        or module_path(reader.node) != reader.weight.rpartition(".")[0]
    ):
        return None
    # the block, its linear maps in the order in which the model runs them
    sources.sort(key=lambda linear: trace.order[linear.node])
    axes = [
        axis
        for linear in sources
        for axis in (
            Axis(linear.weight, linear.rows),
            *([Axis(linear.bias)] if linear.bias else []),
        )
    ]
    units = trace.tensors[reader.weight].shape[1 - reader.rows]
    where = common_owner([linear.weight for linear in maps])
    return FeedForward(where, tuple(axes), Axis(reader.weight, 1 - reader.rows), reader.bias, units)


def _is_alone(trace: Trace, linear: LinearMap) -> bool:
    """Whether weight and bias are parameters of their own that nothing else uses."""
    bias = linear.bias_node is None or (linear.bias is not None and trace.used_once(linear.bias))
    return bias and trace.used_once(linear.weight)


def common_owner(names: Sequence[str]) -> str:
    """The innermost module that holds all of the parameters."""
    paths = [name.split(".")[:-1] for name in names]
    depth = next(
        (i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1),
        min(map(len, paths)),
    )
    return ".".join(paths[0][:depth])
