"""Attention in a traced model, as one operation or spelt out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ddc.gauges.trace import (
    KEEPS,
    MOVES,
    Trace,
    apply,
    arguments,
    inputs,
    module_path,
    operands,
    operation,
    readers,
    value_of,
)

ATTENTION = "scaled_dot_product_attention"
SOFTMAX = ("softmax", "_softmax")


class Read(NamedTuple):
    """Where an operation reads heads.

    Attributes:
        node: the operation.
        argument: which of its operands it reads (:func:`ddc.gauges.trace.operands`).
        order: axes of what is read: those of the batch (examples and heads, or both in one),
            positions, entries.
    """

    node: Node
    argument: int
    order: tuple[int, ...]

    @property
    def value(self) -> Node:
        """What is read."""
        value = operands(self.node)[self.argument]
        assert isinstance(value, Node)
        return value

    @property
    def positions(self) -> int:
        """How many positions there are."""
        return value_of(self.value).shape[self.order[-2]]

    def swapped(self) -> Read:
        """The same with positions for entries."""
        return self._replace(order=_swapped(self.order))


class Product(NamedTuple):
    """A product of two values that is summed over one axis of each, for each index of a batch.

    Attributes:
        left, right: the two, with the axis that is summed as entries.
        order: axes of what it gives: the batch, what is left of the first, of the second.
    """

    left: Read
    right: Read
    order: tuple[int, ...]


class Attention(NamedTuple):
    """Attention, as one operation or spelt out.

    Attributes:
        where: its place in the model.
        node: what gives its output, by heads.
        order: axes of that: the batch, positions, entries.
        weights: what gives its weights: the operation itself, or a softmax.
        mixed: where the weights meet the values, over whose positions they are summed; None for
            one operation.
        query, key, value: where it reads them; None where that is not known.
    """

    where: str
    node: Node
    order: tuple[int, ...]
    weights: Node
    mixed: Read | None
    query: Read | None
    key: Read | None
    value: Read | None


def product_of(node: Node) -> Product | None:
    """The product that an operation is, if it is one of two different nodes."""
    name, factors = operation(node), operands(node)
    if name == "einsum":
        return _einsum(node)
    first = {"matmul": 0, "bmm": 0, "baddbmm": 1}.get(name)
    if first is None:
        return None
    a, b = factors[first : first + 2]
    axes = [tuple(range(value_of(each).ndim)) for each in (a, b, node)]
    if a is b or len(axes[2]) < 3 or min(map(len, axes)) < 2:
        return None
    return Product(Read(node, first, axes[0]), Read(node, first + 1, _swapped(axes[1])), axes[2])


def _einsum(node: Node) -> Product | None:
    """The product of two that an equation spells out, each index once in each, one of them
    summed.
    """
    equation, *factors = operands(node)
    sides = str(equation).replace(" ", "").split("->")
    if len(sides) != 2 or len(factors) != 2 or factors[0] is factors[1]:
        return None
    (first, _, second), given = sides[0].partition(","), sides[1]
    if any(len({*each}) < len(each) or not each.isalpha() for each in (first, second, given)):
        return None  # an index twice, or axes that are left open
    batch = [index for index in given if index in first and index in second]
    summed = [index for index in first if index in second and index not in given]
    lefts = [index for index in first if index not in second]
    rights = [index for index in second if index not in first]
    if not batch or [len(each) for each in (summed, lefts, rights)] != [1, 1, 1]:
        return None
    if not {*lefts, *rights} <= {*given}:
        return None
    left, right, order = (
        tuple(map(name.index, (*batch, *rest)))
        for name, rest in (
            (first, lefts + summed),
            (second, rights + summed),
            (given, lefts + rights),
        )
    )
    sums = {
        value_of(each).shape[axes[-1]] for each, axes in zip(factors, (left, right), strict=True)
    }
    if len(sums) > 1:  # one entry, taken for all
        return None
    return Product(Read(node, 1, left), Read(node, 2, right), order)


def attentions_of(trace: Trace) -> list[Attention]:
    """All attention of a model, in order."""
    found = []
    for node in trace.graph.nodes:
        where = module_path(node) or "attention"
        if operation(node) == ATTENTION:
            axes = [tuple(range(value_of(each).ndim)) for each in (*operands(node)[:3], node)]
            reads = (Read(node, i, axes[i]) for i in range(3))
            found.append(Attention(where, node, axes[3], node, None, *reads))
        elif operation(node) in SOFTMAX and (mixing := _mixing(trace, node)):
            found.append(_spelt_out(trace, node, *mixing, where))
    return found


def _mixing(trace: Trace, weights: Node) -> tuple[Product, bool] | None:
    """The product by which weights of attention mix values, and whether they are the second in it,
    if a node gives such weights.
    """
    waiting = [weights]
    while waiting:
        node = waiting.pop(0)
        for user in readers(node):
            if (product := product_of(user)) is not None and user not in trace.linear_maps:
                reads = [product.left.value is node, product.right.value is node]
                if node not in trace.rewritten and any(reads):
                    return product, reads[1]
            elif operation(user) in MOVES | KEEPS:
                waiting.append(user)
    return None


def _spelt_out(trace: Trace, softmax: Node, mixing: Product, second: bool, where: str) -> Attention:
    """Attention as a product of queries and keys, a softmax, and a product with values.

    Scores decide the weights, and a turn of queries and keys leaves all of them as they are; so
    whatever is between the product and the softmax is none of a rotation's business.
    """
    products: list[Product] = []
    reader, waiting = {softmax: softmax}, [softmax]
    while waiting:
        node = waiting.pop()
        for each in inputs(node):
            if each in reader or each in trace.linear_maps or not _is_like(each, softmax):
                continue
            reader[each] = node
            if (product := product_of(each)) is not None:
                products.append(product)
            else:
                waiting.append(each)
    mixed, value = (mixing.right, mixing.left) if second else (mixing.left, mixing.right)
    order = _swapped(mixing.order) if second else mixing.order
    query = key = None
    if len(products) == 1:
        query, key, _ = products[0]
        if not _sums_over(softmax, products[0], reader):
            query, key = key, query
    node = mixing.left.node
    return Attention(where, node, order, softmax, mixed, query, key, value.swapped())


def _sums_over(softmax: Node, product: Product, reader: Mapping[Node, Node]) -> bool:
    """Whether a softmax sums over what is left of the second factor of a product of scores, as far
    as can be told.
    """
    node = product.left.node
    shape, axis = value_of(node).shape, product.order[-1]
    sizes = [size if i == axis else 1 for i, size in enumerate(shape)]
    labels: Any = torch.arange(shape[axis]).view(sizes).expand(shape)
    while node is not softmax:
        node = reader[node]
        labels = apply(node, labels) if operation(node) in MOVES else labels
        if not isinstance(labels, Tensor) or labels.shape != value_of(node).shape:
            return True
    along = softmax_axis(softmax)
    return bool((labels.amin(along) < labels.amax(along)).any())


def softmax_axis(node: Node) -> int:
    """The axis along which what a softmax gives sums to one."""
    return int(arguments(node)[1]) % value_of(node).ndim


def _is_like(node: Node, softmax: Node) -> bool:
    """Whether a node may give scores: as many numbers as a softmax takes, or as many a row, beside
    which there are others.
    """
    value, weights = node.meta.get("val"), value_of(softmax)
    return isinstance(value, Tensor) and (
        value.numel() == weights.numel() or value.shape[:-1] == weights.shape[:-1]
    )


def _swapped(order: tuple[int, ...]) -> tuple[int, ...]:
    return (*order[:-2], order[-1], order[-2])
