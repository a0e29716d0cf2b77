"""Tables of relative positions: numbers, one for each head, that are looked up and added to the
scores of attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ddc.gauges.attention import ATTENTION, SOFTMAX, softmax_axis
from ddc.gauges.trace import (
    KEEPS,
    MOVES,
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

#: What is added to scores as low as this is lost to rounding in every dtype, so that they need not
#: move with the others, even where nothing else of a query is to be seen.
HIDDEN = -1e30
#: Ways of one kind in which a table may arrive at one place.
WAYS = 64


class ScoreTable(NamedTuple):
    """A parameter of which what is looked up is added to scores.

    Attributes:
        axis: along which its heads lie.
        fault: in words, what else reads it, or tells scores of one query apart; empty if a number
            added to all entries of a head is added to all scores of each query alike.
    """

    axis: int
    fault: str


def score_table(trace: Trace, name: str) -> ScoreTable | None:
    """How a parameter enters the scores of attention; None if no softmax reads it so."""
    axes, reached, faults = set(), False, []
    for use in trace.uses[name]:
        axis = _axis_of_heads(trace, use)
        if axis is None:
            faults.append(f"{operation(use) or 'the output of the model'} reads its table")
            continue
        axes.add(axis)
        shape = value_of(use).shape
        heads = torch.arange(shape[-1 if axis else 0])
        labels = (heads if axis else heads.view(-1, *[1] * (len(shape) - 1))).expand(shape)
        arrived, found = _to_softmax(trace, use, labels)
        reached |= arrived
        faults += found
    if not reached:
        return None
    if name in trace.shared:
        faults.append("its table is tied to another parameter")
    if len(axes) > 1:
        faults.append("its table is looked up along both axes")
    return ScoreTable(min(axes), faults[0] if faults else "")


def _axis_of_heads(trace: Trace, use: Node) -> int | None:
    """The axis of a table, of two, that a lookup leaves as it is; None of what is no lookup."""
    name, args = operation(use), arguments(use)
    if name not in ("embedding", "index", "index_select") or not has_fixed_shape(use):
        return None
    view = trace.parameter(args[0])
    if view is None or view[1] % 2 or trace.tensors[view[0]].ndim != 2:
        return None
    match name, args[1:]:
        case "embedding", _:
            return 1
        case "index", ([Node()],):
            return 1
        case "index", ([None, Node()],):
            return 0
        case "index_select", (axis, _):
            return 1 - int(axis) % 2
    return None


def _to_softmax(trace: Trace, start: Node, labels: Tensor) -> tuple[bool, list[str]]:
    """Whether softmaxes of scores read what is looked up, and what is against a gauge.

    Args:
        trace: of the model.
        start: what is looked up.
        labels: of its entries: the head of each.
    """
    reached, faults = False, list[str]()
    waiting, seen = [(start, labels)], dict[Node, list[Tensor]]()
    while waiting:
        node, labels = waiting.pop()
        if any(torch.equal(labels, each) for each in seen.setdefault(node, [])):
            continue  # another way of the same
        seen[node].append(labels)
        if len(seen[node]) > WAYS:
            return reached, [*faults, "what is looked up is added to itself in too many ways"]
        if node in trace.rewritten:
            faults.append("its scores are written to in place")
        for user in readers(node):
            name, args = operation(user), arguments(user)
            if name == ATTENTION and node in args[3:] and node not in args[:3]:
                along = -1
            elif name in SOFTMAX:
                along = softmax_axis(user)
            else:
                after = _onward(user, node, labels)
                if after is None:
                    faults.append(f"{name or 'the output of the model'} reads its scores")
                else:
                    waiting.append((user, after))
                continue
            reached = True
            if not torch.equal(labels.amin(along), labels.amax(along)):
                faults.append("its softmax is not over the positions that a query meets")
    return reached, faults


def _onward(user: Node, node: Node, labels: Tensor) -> Tensor | None:
    """Labels behind an operation that moves scores, hides some of them, or adds to them; None of
    any other. Where what is looked up arrives in several ways, each adds one number to all scores
    of a query, and so does their sum.
    """
    name, args = operation(user), arguments(user)
    value = user.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or not has_fixed_shape(user):
        return None
    after: object = None
    if name in ("add", "add_") or (name in ("sub", "sub_", "baddbmm") and node not in args[1:]):
        after = labels.broadcast_to(value.shape) if not user.kwargs else None
    elif name in ("where", "masked_fill", "masked_fill_"):
        after = labels.broadcast_to(value.shape) if _hides(name, args, node) else None
    elif name in MOVES and inputs(user) == [node]:
        after = apply(user, labels)
    elif name in KEEPS and not drops(user):
        after = labels
    return after if isinstance(after, Tensor) and after.shape == value.shape else None


def _hides(name: str, args: tuple[Any, ...], node: Node) -> bool:
    """Whether an operation leaves scores as they are, but those of what is not to be seen, which
    get a weight of zero.
    """
    _, *both = args if name == "where" else (args[1], args[0], args[2])
    others = [each for each in both if each is not node]
    return len(others) == 1 and isinstance(others[0], int | float) and others[0] <= HIDDEN
