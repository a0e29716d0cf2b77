"""Attention in a traced model, as one operation or spelt out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from ddc.gauges.trace import (
    KEEPS,
    Trace,
    arguments,
    inputs,
    module_path,
    operation,
    readers,
    value_of,
)

ATTENTION = "scaled_dot_product_attention"


class Read(NamedTuple):
    """Where attention reads heads, (examples, heads, positions, entries): the operation and its
    argument, and whether positions and entries lie the other way round there.
    """

    node: Node
    argument: int
    transposed: bool = False

    @property
    def value(self) -> Node:
        """What is read."""
        value = arguments(self.node)[self.argument]
        assert isinstance(value, Node)
        return value

    @property
    def positions(self) -> int:
        """How many positions there are."""
        return value_of(self.value).shape[-1 if self.transposed else -2]


class Attention(NamedTuple):
    """Attention, as one operation or spelt out.

    Attributes:
        where: its place in the model.
        node: what gives its output, by heads.
        weights: what gives its weights: the operation itself, or a softmax.
        query, key, value: where it reads them; None where that is not known.
    """

    where: str
    node: Node
    weights: Node
    query: Read | None
    key: Read | None
    value: Read | None


def attentions_of(trace: Trace) -> list[Attention]:
    """All attention of a model, in order."""
    found = []
    for node in trace.graph.nodes:
        where = module_path(node) or "attention"
        if operation(node) == ATTENTION:
            found.append(Attention(where, node, node, *(Read(node, i) for i in range(3))))
        elif operation(node) in ("softmax", "_softmax") and (mixing := _mixing(trace, node)):
            found.append(_spelt_out(node, mixing, where))
    return found


def _mixing(trace: Trace, weights: Node) -> Node | None:
    """The product by which weights of attention mix values, if a node gives such weights."""
    node = weights
    while len(users := readers(node)) == 1 and operation(users[0]) in {*KEEPS, "clone"}:
        node = users[0]
    if node in trace.rewritten:
        return None
    for user in readers(node):
        match operation(user), arguments(user):
            case (("matmul" | "bmm"), (a, b)) if a is node and b is not node:
                return user
    return None


def _spelt_out(softmax: Node, mixing: Node, where: str) -> Attention:
    """Attention as a product of queries and keys, a softmax, and a product with values.

    Scores decide the weights, and a turn of queries and keys leaves all of them as they are; so
    whatever is between the product and the softmax is none of a rotation's business.
    """
    products: list[Node] = []
    seen, waiting = {softmax}, [softmax]
    while waiting:
        for each in inputs(waiting.pop()):
            if each in seen:
                continue
            seen.add(each)
            value = each.meta.get("val")
            scores = isinstance(value, Tensor) and value.shape == value_of(softmax).shape
            if operation(each) in ("matmul", "bmm") and scores:
                products.append(each)
            elif scores:
                waiting.append(each)
    value = Read(mixing, 1) if value_of(mixing).ndim == 4 else None
    if len(products) != 1 or value is None:
        return Attention(where, mixing, softmax, None, None, value)
    reads = Read(products[0], 0), Read(products[0], 1, transposed=True)
    return Attention(where, mixing, softmax, *reads, value)
