"""The gauges of a traced model beyond the paper's: rules on its graph, one for each kind.

Together with those of :mod:`ddc.gauges.traced` they are meant to be all continuous symmetries of a
transformer; :mod:`ddc.gauges.certificate` tells by rank whether they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ddc.gauges.actions import Axis, Rescale, RotatedAxis, Shift
from ddc.gauges.affine import (
    Behind,
    General,
    ScaledShift,
    Shear,
    Sheared,
    StreamRotation,
    Translated,
    Translation,
)
from ddc.gauges.approximate import attempts
from ddc.gauges.attention import ATTENTION, SOFTMAX, Attention, Read, product_of, softmax_axis
from ddc.gauges.base import Gauge, Refusal, approximate_kinds, paper_kinds
from ddc.gauges.channels import channel_scale, rows_of_map
from ddc.gauges.gauge_set import GaugeSet
from ddc.gauges.heads import logits_of
from ddc.gauges.norms import NormReaders, bias_of, columns_of, require_passed_on
from ddc.gauges.scores import ScoreTable, score_table
from ddc.gauges.stream import (
    Norm,
    ScaledMap,
    Stream,
    axis_of,
    carried,
    gives_channels,
    in_groups,
    streams,
)
from ddc.gauges.trace import (
    CONVOLUTIONS,
    KEEPS,
    MOVES,
    SUMS,
    Entering,
    Flow,
    LinearMap,
    NoValue,
    Trace,
    apply,
    arguments,
    channels_of,
    drops,
    has_fixed_shape,
    inputs,
    labels_of,
    module_path,
    number_of,
    operation,
    readers,
    value_of,
)
from ddc.gauges.traced import (
    RULES,
    Finding,
    NotProved,
    Source,
    heads_of,
    met_heads,
    once,
    owner,
    proved,
)


def gauges_of_kinds(trace: Trace, kinds: Collection[str], loss: str | None = None) -> GaugeSet:
    """All gauges of these kinds that the rules prove, and all of them that they refuse.

    Args:
        trace: of the model.
        kinds: of :data:`ddc.gauges.base.KINDS`.
        loss: as for :func:`ddc.find_gauges`.
    """
    finding = Finding(trace, loss)
    turned = {"value_rotation", "qk_rotation"} & {*kinds}
    rules = [prove for prove in RULES if turned or prove is not Finding.rotations]
    paper = proved(finding, "chained_rescale" in kinds and "relu_rescale" not in kinds, rules)
    finding.found, finding.refused = [], []
    Further(finding).find(kinds)
    kept = paper.only({*kinds} & {*paper_kinds()})
    return GaugeSet((*kept.found, *finding.found), (*kept.refused, *finding.refused))


class Further:
    """Collects what is found and refused of the further kinds in one trace.

    Args:
        finding: of the trace; its rules on linear maps and heads serve here too.
    """

    def __init__(self, finding: Finding) -> None:
        self.finding, self.trace, self.kept = finding, finding.trace, finding.kept
        self.norms = NormReaders(finding)

    def find(self, kinds: Collection[str]) -> None:
        """Add the gauges of these kinds, and what of them is refused, to the finding's."""
        at_eps_zero = {*kinds} & {*approximate_kinds()}
        for kind, where, prove in chain(self._attempts(), attempts(self) if at_eps_zero else ()):
            if kind not in kinds:
                continue
            try:
                self.finding.found += prove()
            except (NotProved, NoValue) as reason:
                self.finding.refused.append(Refusal(kind, where, str(reason)))

    def _attempts(self) -> Iterator[tuple[str, str, Callable[[], Sequence[Gauge]]]]:
        """Kind, place and proof of each gauge that is looked for."""
        for source, name, flow, plus in self.finding.flows():
            onward = [arrival.node in self.trace.linear_maps for arrival in flow.arrivals]
            whole = source.experts is None and plus == source.axes
            if whole and onward and all(onward) and not flow.activations and not flow.gated:
                yield "factor_map", owner(name), partial(self.factor_map, source, flow)
                yield "factor_bias", owner(name), partial(self.factor_bias, source, flow)
        for each in self.finding.attentions:
            where = each.where
            yield "value_map", where, partial(self.value_map, each)
            yield "value_bias", where, partial(self.value_bias, each)
            yield "qk_map", where, partial(self.qk_map, each)
            yield "key_bias", where, partial(self.key_bias, each)
            yield "qk_norm_scale", where, partial(self.qk_norm_scale, each)
        for linear in self.trace.linear_maps.values():
            if self._is_router(linear):
                yield "router_shift", owner(linear.weight), partial(self.router_shift, linear)
        for scaled in self.scaled.values():
            yield "layer_scale", owner(scaled.scale), partial(self.layer_scale, scaled)
        for name in self.trace.uses:
            if (table := score_table(self.trace, name)) is not None:
                yield "score_shift", owner(name) or name, partial(self.score_shift, name, table)
        for node in self.trace.graph.nodes:
            if operation(node) == "batch_norm":
                where = module_path(node) or "batch_norm"
                yield "channel_scale", where, partial(channel_scale, self.finding, node, where)
        found = streams(self.trace, self.scaled)
        inside = {node for stream in found for node in stream.nodes}
        for node in self.trace.graph.nodes:
            if node not in inside and len(terms := self._shifts(node)) > 1:
                yield "translation", owner(terms[0].parameter), partial(self.translation, terms)
        writers = [node for stream in found if stream.faults for node in stream.writers]
        for name in dict.fromkeys(filter(None, map(self._table, writers))):
            head = self._tied_head(name)
            looked_up = [use for use in self.trace.uses[name] if use is not head]
            yield "translation", owner(name), partial(self.norms.table_shift, name, looked_up)
        for stream in found:
            where = self.place(stream)
            yield "stream_rotation", where, partial(self.stream_rotation, stream)
            yield "stream_mean", where, partial(self.stream_mean, stream)
            for node in sorted(stream.nodes, key=self.trace.order.__getitem__):
                if len(terms := self._terms(stream, node)) > 1:
                    yield "translation", where, partial(self.translation, terms)
                for terms in self._parts(stream, node):
                    if len(terms) > 1:
                        yield "translation", where, partial(self.translation, terms)
            for norm in stream.norms:
                at = module_path(norm.output) or "norm"
                if stream.faults and norm.centres and (normed := self._normed(norm)):
                    yield "stream_mean", at, partial(self.means_of_heads, norm, *normed)
                yield "reader_shift", at, partial(self.norms.reader_shift, norm)
                yield "norm_shift", at, partial(self.norms.norm_shift, norm)

    # ------------------------------------------------------------------------------------------
    # factors

    def factor_map(self, source: Source, flow: Flow) -> list[General]:
        """Outputs of one linear map, or of an embedding, by G; what reads them by its inverse."""
        if flow.dropout:
            raise NotProved("entries are dropped at random between the two maps")
        if flow.uneven:
            raise NotProved("entries are scaled apart between the two maps")
        plus = source.axes
        gauge = self.finding.rescale("factor_map", source, flow, plus)
        if gauge.degree != 1:
            raise NotProved("what is between the two maps is not linear")
        columns = gauge.minus[0]
        assert isinstance(columns.axis, int)
        units = np.arange(self.trace.tensors[columns.parameter].shape[columns.axis])[None, None]
        plus_slots, minus_slots = (
            tuple(RotatedAxis(name, axis, units) for name, axis in columns_of(side))
            for side in (gauge.plus, gauge.minus)
        )
        return [General("factor_map", gauge.where, plus_slots, minus_slots)]

    def factor_bias(self, source: Source, flow: Flow) -> list[Gauge]:
        """A vector added to the bias of one linear map, and taken back by those of what reads
        it.
        """
        plus = source.axes
        if len(plus) == 1:
            return []
        (gauge,) = self.factor_map(source, flow)
        (bias,) = plus[1:]
        for linear in self.trace.linear_maps.values():
            if linear.weight == plus[0].parameter:
                require_passed_on(self.trace, linear.output)
        readers = []
        for weight, axis, indices in gauge.minus:
            if (taking := bias_of(self.trace, weight)) is None:
                raise NotProved(f"{owner(weight)} has no bias of its own")
            readers.append(Sheared(weight, axis, indices[0], taking))
        return [Shear("factor_bias", gauge.where, (Translated(bias.parameter, 0),), tuple(readers))]

    # ------------------------------------------------------------------------------------------
    # attention

    @once
    def value_map(self, attention: Attention) -> list[General]:
        """Values by G, the output projection by its inverse: attention is linear in them."""
        (rotation,) = self.finding.value_rotation(attention, single=True)
        *rows, columns = rotation.slots
        return [General("value_map", attention.where, tuple(rows), (columns,))]

    def value_bias(self, attention: Attention) -> list[Gauge]:
        """A constant added to all values arrives at the output projection as it is, for the weights
        of attention sum to one.
        """
        (gauge,) = self.value_map(attention)
        biases = [s for s in gauge.plus if self.trace.tensors[s.parameter].ndim == 1]
        (columns,) = gauge.minus
        bias = bias_of(self.trace, columns.parameter)
        if not biases:
            return []
        self._require_sum_of_one(attention)
        assert attention.value is not None
        self._require_alike(attention.value, "values")
        require_passed_on(self.trace, attention.node)
        if bias is None:
            raise NotProved("the output projection has no bias of its own")
        copies = columns.indices.swapaxes(0, 1).reshape(columns.indices.shape[1], -1)
        (moved,) = biases
        slot = Translated(moved.parameter, 0, 1.0, tuple(moved.indices.flatten().tolist()))
        reader = Sheared(columns.parameter, columns.axis, copies, bias)
        return [Shear("value_bias", attention.where, (slot,), (reader,))]

    def _require_sum_of_one(self, attention: Attention) -> None:
        """Weights of attention sum to one over positions."""
        node, args = attention.node, arguments(attention.node)
        if operation(node) == ATTENTION:
            if len(args) > 4 and args[4] > 0:
                raise NotProved("weights of attention are dropped at random")
            mask = args[3] if len(args) > 3 else None
            if isinstance(mask, Node) and self.trace.ancestors(mask) & self.trace.inputs:
                raise NotProved("a mask that is given may mask a whole row, whose weights are zero")
            if isinstance(mask, Node):
                values = self.trace.value(mask, {})
                unmasked = values if values.dtype == torch.bool else values > -math.inf
                if not bool(unmasked.any(-1).all()):
                    raise NotProved("its mask masks a whole row, whose weights are zero")
            return
        # each row of the softmax arrives whole
        softmax = attention.weights
        assert attention.mixed is not None
        numbers = torch.arange(value_of(softmax).numel()).view(value_of(softmax).shape)
        along = softmax_axis(softmax)
        rows = _without_axis(numbers.shape, along)
        way = [attention.mixed.value]
        while way[-1] is not softmax:
            way.append(inputs(way[-1])[0])
        if self.trace.rewritten & {*way}:
            raise NotProved("weights of attention are written to in place")
        arrived = numbers
        for each in reversed(way[:-1]):
            if drops(each):
                raise NotProved("weights of attention are dropped at random")
            if operation(each) in MOVES:
                arrived = apply(each, arrived)
        arrived = arrived.permute(*attention.mixed.order)
        row = rows.flatten()[arrived]
        ordered = arrived.sort(-1).values
        if (
            arrived.shape[-1] != numbers.shape[along]
            or bool((row != row[..., :1]).any())
            or bool((ordered[..., 1:] == ordered[..., :-1]).any())
        ):
            raise NotProved("its softmax is not over positions")

    def _require_softmax_of_scores(self, attention: Attention) -> None:
        """What is between a product that is spelt out and its softmax adds the same to both of two
        scores that differ by it, and scales all of a query's alike.
        """
        if operation(attention.node) == ATTENTION:
            return
        assert attention.key is not None
        shape = value_of(attention.key.node).shape
        product = product_of(attention.key.node)
        assert product is not None
        over = product.order[-1 if product.right.argument == attention.key.argument else -2]
        # all scores of a query have its number
        queries = {attention.key.node: _without_axis(shape, over)}
        scores = {attention.key.node, *self.trace.descendants(attention.key.node)}
        waiting = [attention.key.node]
        while waiting:
            node = waiting.pop()
            for user in readers(node):
                labels = queries[node]
                if user is attention.weights:
                    along = softmax_axis(user)
                    if not torch.equal(labels.amin(along), labels.amax(along)):
                        raise NotProved("its softmax is not over positions")
                    continue
                others = [x for x in arguments(user) if x is not node and not isinstance(x, Node)]
                name = operation(user)
                by_number = name in ("mul", "div") and len(others) == 1 and not user.kwargs
                adds = name in SUMS and not user.kwargs and len(inputs(user)) == 2
                adds = adds and len({*inputs(user)} & scores) == 1
                moves = name in MOVES and len(inputs(user)) == 1
                if not (by_number or adds or moves or name in KEEPS - {"dropout"}):
                    raise NotProved(f"{name or 'the output of the model'} reads its scores")
                labels = apply(user, labels) if moves else labels
                if not isinstance(labels, Tensor) or labels.shape != value_of(user).shape:
                    raise NotProved(f"{name} gives its scores another shape")
                queries[user] = labels
                waiting.append(user)

    @once
    def qk_map(self, attention: Attention) -> list[General]:
        """Keys by G, queries by its inverse transpose; under a rotary embedding what commutes with
        it.
        """
        gauges = []
        for rotation in self.finding.qk_rotation(attention, single=True):
            keys = self.finding.key_slots[rotation]
            queries = rotation.slots[: -len(keys)]
            group = "all" if rotation.reflections else "complex"
            gauges.append(General("qk_map", attention.where, keys, queries, group))
        return gauges

    def key_bias(self, attention: Attention) -> list[Gauge]:
        """A constant added to all keys adds the same to all scores of a query, if no position turns
        it.
        """
        if (read := attention.key) is not None and (side := self._scale_before(read.value)):
            names, _, scaled = side
            return self._key_shift(attention, read, names[1:], scaled)
        for gauge in self.qk_map(attention):
            for slot in gauge.plus if gauge.group == "all" else ():
                if self.trace.tensors[slot.parameter].ndim == 1:
                    assert attention.key is not None
                    self._require_alike(attention.key, "keys", factors=True)
                    self._require_softmax_of_scores(attention)
                    indices = tuple(slot.indices.flatten().tolist())
                    moved = Translated(slot.parameter, 0, 1.0, indices)
                    return [Translation("key_bias", attention.where, (moved,))]
        return []

    def _key_shift(
        self, attention: Attention, read: Read, shifts: Sequence[str], scaled: Node
    ) -> list[Gauge]:
        """The shift of a norm of keys, if there is one."""
        if not shifts:
            raise NotProved("the norm of its keys has no shift")
        self.finding.require_single(shifts)
        if any(heads_of(self._behind_norm(scaled, read, "keys"), "keys").planes):
            raise NotProved("its keys are turned by position")
        self._require_alike(read, "keys", factors=True, source=scaled)
        self._require_softmax_of_scores(attention)
        return [Translation("key_bias", attention.where, (Translated(shifts[0], 0),))]

    def _behind_norm(self, scaled: Node, read: Read, what: str) -> Entering:
        """How what a norm of queries or keys gives enters attention, where alone it goes."""
        if self.trace.leak(scaled, range(value_of(scaled).shape[-1]), read.node, read.argument):
            raise NotProved(f"its {what} are read elsewhere as well")
        entering = self.trace.matrix(scaled, read.value, read.order)
        if entering is None:
            raise NotProved(f"its {what} pass through what is not linear behind their norm")
        return entering

    def _require_alike(
        self, read: Read, what: str, factors: bool = False, source: Node | None = None
    ) -> None:
        """What is added to all values or keys arrives at attention as it is, at every position and
        on any input; with ``factors``, but for numbers that no input decides. ``source`` gives
        them, if it is no linear map.
        """
        target = read.value
        if source is None:
            linear = self.finding.origin(target)
            assert linear is not None
            source = linear.output
        between = self.trace.ancestors(target, [source])
        moving = between & {source, *self.trace.descendants(source)}
        for each in moving - {source}:
            others = [x for x in inputs(each) if x not in moving]
            moved = operation(each) in MOVES | KEEPS | {"getitem"}
            known = factors and operation(each) not in ("cat", "stack")
            if (others or not moved) and not (known or (factors and not others)):
                raise NotProved(f"{operation(each)} changes its {what} before they meet")
            if any(self.trace.ancestors(other) & self.trace.inputs for other in others):
                raise NotProved(f"its {what} are scaled by what the model is given")

    def qk_norm_scale(self, attention: Attention) -> list[Gauge]:
        """Scales of normed queries against those of normed keys, entry by entry or plane by
        plane; where they are 1 + γ, these sums.
        """
        reads = [read for read in (attention.query, attention.key) if read is not None]
        sides = [self._scale_before(read.value) for read in reads]
        if None in sides or len(reads) < 2:
            return []
        turned = []
        for (names, _, scaled), read, what in zip(sides, reads, ("queries", "keys"), strict=True):  # type: ignore[misc]
            self.finding.require_single(names)
            turned.append((names, heads_of(self._behind_norm(scaled, read, what), what)))
        (queries, q), (keys, k) = turned
        offset, of_keys = (offset for _, offset, _ in sides)  # type: ignore[misc]
        if of_keys != offset:
            raise NotProved("different numbers are added to the scales of its queries and keys")
        units, planes, rest = met_heads(q, k), sorted(q.planes[0]), sorted(q.rest[0])
        if any(sorted(each) != rest for each in (*q.rest, *k.rest)):
            raise NotProved("its queries and keys are turned in different planes")
        entries = (
            (
                [[q.planes[head][each] for head in group] for _, group in units for each in planes],
                [[k.planes[head][each]] for head, _ in units for each in planes],
            ),
            (
                [[(q.rest[head][each],) for head in group] for _, group in units for each in rest],
                [[(k.rest[head][each],)] for head, _ in units for each in rest],
            ),
        )
        gauges: list[Gauge] = []
        for of_query, of_key in ((np.array(a), np.array(b)) for a, b in entries if a):
            if any(len({*each.ravel().tolist()}) < each.size for each in (of_query, of_key)):
                raise NotProved("its heads share some of the entries of a scale, but not all")
            plus = tuple(RotatedAxis(name, 0, of_query) for name in queries)
            minus = tuple(RotatedAxis(name, 0, of_key) for name in keys)
            gauges.append(General("qk_norm_scale", attention.where, plus, minus, "scale", offset))
        return gauges

    def _scale_before(self, node: Node) -> tuple[list[str], float, Node] | None:
        """The scale that entries of heads were last multiplied by, and the shift that the same
        operation adds, if any; what is added to the scale before; and the node that it gives.
        """
        between = sorted(self.trace.ancestors(node), key=self.trace.order.__getitem__, reverse=True)
        for each in between:
            if each in self.trace.linear_maps:
                return None
            name, factors = operation(each), arguments(each)
            shifts: tuple[Any, ...] = ()
            if name in ("rms_norm", "layer_norm"):
                factors, shifts = (
                    tuple(x for x in part if isinstance(x, Node))
                    for part in (factors[2:3], factors[3:4])
                )
            elif name != "mul":
                continue
            for factor, offset in map(self.finding.without_number, factors):
                vectors = [factor, *shifts]
                if all(self.finding.is_vector(x, each) for x in vectors):
                    views = [self.trace.parameter(x) for x in vectors]
                    names = [view[0] for view in views if view is not None]
                    return (names, offset, each) if not (offset and shifts) else None
            if name != "mul" and factors:
                return None
        return None

    # ------------------------------------------------------------------------------------------
    # routers and layer scales

    def _is_router(self, linear: LinearMap) -> bool:
        if not has_fixed_shape(linear.output):
            return False
        shape = value_of(linear.output).shape
        positions = torch.arange(shape[:-1].numel()).view(*shape[:-1], 1).expand(shape)
        return bool(found := self._onward(linear.output, positions)) and all(
            operation(each) in SOFTMAX
            and int(arguments(each)[1]) in (-1, value_of(each).ndim - 1)
            and torch.equal(labels.amin(-1), labels.amax(-1))  # over outputs, not positions
            for each, labels in found
        )

    def _onward(self, node: Node, labels: Tensor) -> list[tuple[Node, Tensor]]:
        """What reads a node, seen through what only moves or keeps its values, and where the
        labels of these are then.
        """
        found: list[tuple[Node, Tensor]] = []
        for user in readers(node):
            keeps = operation(user) in KEEPS and not drops(user)
            moves = operation(user) in MOVES and len(inputs(user)) == 1
            after = apply(user, labels) if moves else labels
            if (keeps or moves) and has_fixed_shape(user) and isinstance(after, Tensor):
                found += self._onward(user, after)
            else:
                found.append((user, labels))
        return found

    def router_shift(self, linear: LinearMap) -> list[Gauge]:
        """The same row added to all rows of what a softmax alone reads."""
        self.finding.require_single([linear.weight])
        if linear.rows != 0 or (linear.bias_node is not None and linear.bias is None):
            raise NotProved("its weight lies the other way round, or its bias is no parameter")
        if linear.bias is not None:
            self.finding.require_single([linear.bias])
        return [Shift(linear.weight, linear.bias, owner(linear.weight), "router_shift")]

    def score_shift(self, name: str, table: ScoreTable) -> list[Gauge]:
        """A number added to all that a table of relative positions has for a head."""
        if table.fault:
            raise NotProved(table.fault)
        slot = Translated(name, table.axis)
        return [Translation("score_shift", owner(name) or name, (slot,))]

    @cached_property
    def scaled(self) -> dict[Node, ScaledMap]:
        """Linear maps and convolutions whose outputs are multiplied by a vector, by the product."""
        sources: list[tuple[LinearMap | Node, Node, Callable[[Node], Tensor]]] = [
            (linear, linear.output, labels_of) for linear in self.trace.linear_maps.values()
        ]
        sources += [
            (node, node, channels_of) for node in self.trace.graph.nodes if gives_channels(node)
        ]
        return dict(filter(None, (self._layer_scale(*source) for source in sources)))

    def _layer_scale(
        self, source: LinearMap | Node, output: Node, units: Callable[[Node], Tensor]
    ) -> tuple[Node, ScaledMap] | None:
        """The product of the outputs of a map and a vector, and these two, if that is all that is
        done to them.
        """
        if not has_fixed_shape(output):
            return None
        found = self._onward(output, units(output))
        if len(found) != 1 or operation(found[0][0]) != "mul":
            return None
        ((user, labels),) = found
        if value_of(user).shape != labels.shape:  # one output, times a vector
            return None
        count = int(units(output).max()) + 1
        for argument in arguments(user):
            vector = self._vector(argument)
            if vector is None or len(self.trace.tensors[vector[0]]) != count:
                continue
            name, entries = vector
            if torch.equal(entries.broadcast_to(labels.shape), labels):  # each has its own entry
                return user, ScaledMap(source, name, axis_of(labels, count))
        return None

    def _vector(self, factor: object) -> tuple[str, Tensor] | None:
        """The parameter, a vector, that a factor is, moved at most and for it alone, and where its
        entries are then.
        """
        moves = list[Node]()
        while isinstance(factor, Node) and (view := self.trace.parameter(factor)) is None:
            moved = operation(factor) in MOVES and len(inputs(factor)) == len(readers(factor)) == 1
            if not moved or not has_fixed_shape(factor):
                return None
            moves.append(factor)
            factor = arguments(factor)[0]
        if not isinstance(factor, Node) or view is None or self.trace.tensors[view[0]].ndim != 1:
            return None
        entries: Any = torch.arange(len(self.trace.tensors[view[0]]))
        for move in reversed(moves):
            entries = apply(move, entries)
        return (view[0], entries) if isinstance(entries, Tensor) else None

    def layer_scale(self, scaled: ScaledMap) -> list[Gauge]:
        """Rows of a map, and its bias, against the vector that multiplies them."""
        rows, scale = (
            tuple(Axis(*row) for row in rows_of_map(self.finding, scaled.map)),
            scaled.scale,
        )
        self.finding.require_single([scale])
        others = [each for each in self.scaled.values() if owner(each.scale) == owner(scale)]
        where = scale if len(others) > 1 else owner(scale) or scale
        return [Rescale("layer_scale", where, rows, (Axis(scale),))]

    # ------------------------------------------------------------------------------------------
    # residual streams

    def place(self, stream: Stream) -> str:
        """Where a stream begins."""
        return module_path(min(stream.nodes, key=self.trace.order.__getitem__)) or "stream"

    def stream_rotation(self, stream: Stream) -> list[Gauge]:
        """All that writes to a stream turned, all that reads it turned back."""
        self.require_sound(stream)
        # a table that is looked up twice is one
        writers = {each: None for node in stream.writers for each in self.writer(stream, node)}
        if grouped := [each for node in stream.writers if (each := self._grouped(node))]:
            what = self.finding.describe(grouped[0])
            raise NotProved(f"{what}, which writes to it, has groups of channels")
        behind: list[Behind] = []
        shifts: list[tuple[str, str]] = []
        for norm in stream.norms:
            scale, shift, linears = self.norms.behind(norm)
            gamma, offset = (None, 0.0) if scale is None else scale
            if shift is not None and (gamma is None or offset):
                raise NotProved("a norm has a shift, but no scale that is a parameter")
            if shift is not None and gamma is not None:
                shifts.append((shift, gamma))
            behind += [Behind(name, axis, gamma, offset) for name, axis in linears]
        centred = any(norm.centres for norm in stream.norms)
        where = self.place(stream)
        width = stream.width
        sides = tuple(writers), tuple(behind), tuple(shifts)
        return [StreamRotation("stream_rotation", where, *sides, width, centred)]

    def stream_mean(self, stream: Stream) -> list[Gauge]:
        """The same number added to all entries of what is written: a norm that centres takes it
        off again.
        """
        if not stream.writers:
            raise NotProved("nothing that has weights writes to it")
        gauges: dict[tuple[str, ...], Gauge] = {}  # a table that is looked up twice has one
        refused = []
        for node in stream.writers:
            try:
                self._require_centred(stream, node)
                for gauge in self._means(stream, node):
                    gauges.setdefault(gauge.parameters, gauge)
            except NotProved as reason:  # the others' means are gauges all the same
                place = module_path(node) or self.place(stream)
                refused.append(Refusal("stream_mean", place, str(reason)))
        if not gauges:
            raise NotProved(stream.faults[0] if stream.faults else refused[0].reason)
        self.finding.refused += refused
        return [*gauges.values()]

    def _require_centred(self, stream: Stream, writer: Node) -> None:
        """Norms that centre, and nothing else, read what a writer adds to a stream; what others add
        to it does not matter to its mean.
        """
        inside = {part: norm for norm in stream.norms for part in norm.inside}
        waiting, seen = [writer], {writer}
        if (name := self._table(writer)) is not None:  # wherever the table is looked up
            waiting += [use for use in self.trace.uses[name] if use is not self._tied_head(name)]
        while waiting:
            node = waiting.pop()
            if node not in stream.nodes:
                raise NotProved(f"{operation(node)} reads it")
            if node in self.trace.rewritten:
                raise NotProved("it is written to in place")
            for user in readers(node):
                norm, axis = inside.get(user), stream.nodes[node]
                if norm is not None and norm.input is node and axis == -1:
                    if not norm.centres:
                        raise NotProved("a norm that does not centre reads the stream")
                elif (after := carried(user, node, axis)) is None:
                    raise NotProved(f"{operation(user) or 'the output of the model'} reads it")
                elif stream.nodes[user] != after:
                    raise NotProved(f"{operation(user)} has its entries along two axes")
                elif user not in seen:
                    seen.add(user)
                    waiting.append(user)

    def _means(self, stream: Stream, node: Node) -> list[Gauge]:
        """The means of what one writer adds to a stream."""
        if node in self.trace.experts_by_output:
            raise NotProved("experts write to it, whose weights are stacked")
        if (name := self._table(node)) is not None and self._tied_head(name) is not None:
            # a softmax does not see all rows move alike; of one alone it sees the logit
            slot = Translated(name, None)
            return [Translation("stream_mean", owner(name) or name, (slot,))]
        written = self.writer(stream, node)
        if (linear := self.trace.maps_by_output.get(node)) is not None and linear.rows == 0:
            return [Shift(linear.weight, linear.bias, owner(linear.weight), "stream_mean")]
        if self._grouped(node) is not None:
            written = written[1:]  # filters read channels of their own group: their biases alone
        gauges: list[Gauge] = []
        for each in written:
            name, axis, where = each.weight, each.axis, owner(each.weight) or each.weight
            shape = self.trace.tensors[name].shape
            if each.scale is not None:
                along = 1 - axis if len(shape) > 1 else 0
                gauges.append(ScaledShift("stream_mean", where, name, along, scale=each.scale))
                continue
            others = [a for a, size in enumerate(shape) if a != axis and size > 1]
            if axis == 0 and len(shape) > 2:  # filters of a convolution
                slot = Translated(name, -1)
            else:
                slot = Translated(name, max(others, key=shape.__getitem__) if others else None)
            gauges.append(Translation("stream_mean", where, (slot,)))
        return gauges

    def _normed(self, norm: Norm) -> tuple[LinearMap, Tensor] | None:
        """The linear map whose outputs a norm reads, moved at most, and these by vector, (vectors,
        entries); None if other things are done to them.
        """
        moves, node = list[Node](), norm.input
        while node not in self.trace.maps_by_output:
            taken = operation(node) == "getitem" and operation(arguments(node)[0]) in MOVES
            if not taken and (operation(node) not in MOVES | KEEPS or drops(node)):
                return None
            if inputs(node) != [arguments(node)[0]]:  # where to, other values say
                return None
            moves.append(node)
            node = arguments(node)[0]
        labels = labels_of(node)
        for move in reversed(moves):
            labels = apply(move, labels)
        vectors = labels.flatten(0, -2).unique(dim=0).sort(1).values
        return self.trace.maps_by_output[node], vectors

    def means_of_heads(self, norm: Norm, linear: LinearMap, vectors: Tensor) -> list[Gauge]:
        """The means of those outputs of a linear map that a LayerNorm reads as one vector each: the
        queries of a head, say.
        """
        if len(vectors.unique()) < vectors.numel() or bool((vectors.diff(dim=1) != 1).any()):
            raise NotProved("outputs of one vector do not lie side by side, or are in several")
        self.finding.require_single([linear.weight])
        read = vectors.flatten().tolist()
        if len(norm.inside) > 1 or self.trace.leak(linear, read, norm.output, 0):
            raise NotProved("what it norms is read elsewhere as well")
        if self.trace.tensors[linear.weight].ndim != 2:
            raise NotProved("the weights of what it norms are stacked")
        gauges: list[Gauge] = []
        for vector in vectors.tolist():
            places, where = (vector[0], vector[-1] + 1), owner(linear.weight)
            slots = [Translated(linear.weight, 1 - linear.rows, places=places)]
            if linear.bias is not None and self.trace.used_once(linear.bias):
                slots.append(Translated(linear.bias, None, places=places))
            gauges += [Translation("stream_mean", where, (slot,)) for slot in slots]
        return gauges

    def require_sound(self, stream: Stream) -> None:
        """Raise NotProved unless writers and norms that are known are all that a stream has."""
        if stream.faults:
            raise NotProved(stream.faults[0])
        if not stream.writers:
            raise NotProved("nothing that has weights writes to it")

    def writer(self, stream: Stream, node: Node) -> list[Behind]:
        """The parameters whose vectors a writer adds to the stream."""
        if (scaled := self.scaled.get(node)) is not None:
            self.finding.require_single([scaled.scale])
            return [Behind(*row, scaled.scale) for row in rows_of_map(self.finding, scaled.map)]
        linear = self.trace.maps_by_output.get(node)
        if linear is not None or operation(node) in CONVOLUTIONS:
            return [Behind(*row) for row in rows_of_map(self.finding, linear or node)]
        if (experts := self.trace.experts_by_output.get(node)) is not None:
            self.finding.require_single([experts.weight])
            return [Behind(experts.weight, experts.rows)]
        table = operation(node) == "embedding"
        view = self.trace.parameter(arguments(node)[0] if table else node)
        assert view is not None
        name = view[0]
        if table and (
            name in self.trace.shared
            or any(
                operation(use) != "embedding" or use not in stream.nodes
                for use in self.trace.uses[name]
            )
        ):
            raise NotProved(f"{owner(name)} is tied to another parameter, or used more than once")
        if not table:
            self.finding.require_single([name])
        return [Behind(name, self.trace.tensors[name].ndim + stream.nodes[node])]

    def _grouped(self, writer: Node) -> Node | None:
        """The convolution by which a writer is given, if it has groups of channels."""
        source = self.scaled[writer].map if writer in self.scaled else writer
        is_one = isinstance(source, Node) and operation(source) in CONVOLUTIONS
        return source if isinstance(source, Node) and is_one and in_groups(source) else None

    def _terms(self, stream: Stream, node: Node) -> list[Translated]:
        """Tables and biases that are added up to a node of a stream before anything reads it."""
        if operation(node) not in SUMS:
            return []
        if len(users := readers(node)) == 1 and operation(users[0]) in SUMS:
            return []  # a part of a larger sum
        return self._collected(stream, inputs(node))

    def _collected(self, stream: Stream, nodes: Sequence[Node]) -> list[Translated]:
        """Tables and biases that are added up to some nodes, which nothing else reads."""
        terms: list[Translated] = []
        waiting = [(node, 1.0) for node in nodes]  # and what it is multiplied by
        while waiting:
            each, factor = waiting.pop()
            if each not in stream.nodes or len(readers(each)) > 1:
                continue
            if each in stream.writers or _is_batch_norm(each, stream.nodes[each]):
                terms += [term._replace(rate=1 / factor) for term in self._shift(stream, each)]
            elif operation(each) in SUMS:
                waiting += [(term, factor) for term in _terms_of(each)]
            elif (number := number_of(each)) is not None:
                waiting.append((inputs(each)[0], factor * number))
            elif operation(each) in MOVES | KEEPS and not drops(each):
                waiting.append((arguments(each)[0], factor))
        return terms

    def _shift(self, stream: Stream, writer: Node) -> list[Translated]:
        """The table or bias of a writer that moves all that it writes alike, if it has one."""
        axis = stream.nodes[writer]
        if gives_channels(writer, axis) or _is_batch_norm(writer, axis):
            return self._bias_of_channels(writer)
        if writer in self.trace.experts_by_output:
            return []
        if (linear := self.trace.maps_by_output.get(writer)) is not None:
            alone = linear.bias is not None and self.trace.used_once(linear.bias)
            return [Translated(linear.bias, 0)] if alone and linear.bias is not None else []
        name = self._table(writer)
        view = self.trace.parameter(writer)
        name = name if name is not None or view is None else view[0]
        if name is None or not self._may_move(name, writer):
            return []
        return [Translated(name, self.trace.tensors[name].ndim + axis)]

    def _parts(self, stream: Stream, node: Node) -> Iterator[list[Translated]]:
        """Where tokens of several kinds, put side by side, are added to a table of positions: for
        each kind its tables and biases, and the rows of the table that are added to it.
        """
        joined = [each for each in inputs(node) if operation(each) == "cat"]
        tables = [each for each in inputs(node) if self.trace.parameter(each) is not None]
        if operation(node) not in SUMS or (len(joined), len(tables)) != (1, 1):
            return
        if stream.nodes[node] != -1:
            return
        (cat,), (table,) = joined, tables
        view, shape = self.trace.parameter(table), value_of(table).shape
        parts, *rest = arguments(cat)
        along = (rest[0] if rest else 0) % value_of(cat).ndim
        assert view is not None
        if (
            node.kwargs
            or len(readers(cat)) > 1
            or not self.trace.used_once(view[0])
            or self.trace.tensors[view[0]].shape != shape
            or len(shape) != value_of(cat).ndim
            or along != len(shape) - 2
            or any(size > 1 for size in shape[:-2])
            or shape[-2:] != value_of(cat).shape[-2:]
        ):
            return
        start = 0
        for part in parts:
            end = start + value_of(part).shape[along]
            places = Translated(view[0], len(shape) - 1, places=(start, end))
            yield [*self._collected(stream, [part]), places]
            start = end

    def _shifts(self, node: Node) -> list[Translated]:
        """Shifts of BatchNorms and biases of convolutions that are added up to a node, channel by
        channel, before anything reads them.
        """
        if operation(node) not in SUMS or any(operation(each) in SUMS for each in readers(node)):
            return []
        terms, waiting = [], [node]
        while waiting:
            each = waiting.pop()
            if not isinstance(each.meta.get("val"), Tensor):
                continue
            if value_of(each).shape != value_of(node).shape:
                continue  # what is broadcast
            if each is not node and len(readers(each)) > 1:
                continue
            name = operation(each)
            if name in SUMS and not each.kwargs:
                waiting += _terms_of(each)
            elif name == "batch_norm" or gives_channels(each):
                terms += self._bias_of_channels(each)
        return terms

    def _bias_of_channels(self, node: Node) -> list[Translated]:
        """The shift of a BatchNorm, or the bias of a convolution, if it is a parameter of its
        own.
        """
        view = self.trace.parameter((*arguments(node), None)[2])
        return [Translated(view[0], 0)] if view and self.trace.used_once(view[0]) else []

    def _table(self, node: Node) -> str | None:
        """The parameter of which an embedding looks rows up; None of anything else."""
        view = self.trace.parameter(arguments(node)[0]) if operation(node) == "embedding" else None
        return None if view is None or view[1] % 2 else view[0]  # not of its transpose

    def _tied_head(self, name: str) -> Node | None:
        """Where the head reads a table, if its softmax does not see all rows of it move alike."""
        logits = logits_of(self.trace)
        if len(logits.heads) != 1 or logits.stops or name in self.trace.shared:
            return None
        (head,) = logits.heads
        if head.weight != name or head.rows != 0 or logits.reader_beside(head) is not None:
            return None
        try:
            self.finding.require_softmax(head)
        except NotProved:
            return None
        return head.node

    def _may_move(self, name: str, node: Node) -> bool:
        """Whether all rows of a table may move alike: nothing else reads it but, at most, the head,
        whose softmax does not see it.
        """
        others = [use for use in self.trace.uses.get(name, ()) if use is not node]
        if self._table(node) is not None and len(others) == 1:
            return others[0] is self._tied_head(name)
        return self.trace.used_once(name)

    def translation(self, terms: Sequence[Translated]) -> list[Gauge]:
        """A vector added to one of the terms of a sum, and taken from the next."""
        gauges: list[Gauge] = []
        for first, second in pairwise(terms):
            slots = (first, second._replace(rate=-second.rate))
            where = owner(first.parameter) or first.parameter
            gauges.append(Translation("translation", where, slots))
        return gauges


def _terms_of(add: Node) -> list[Node]:
    """The terms of a sum; none of a value and itself, which moves twice as much as either."""
    terms = [each for each in arguments(add) if isinstance(each, Node)]
    return terms if len({*terms}) == len(terms) else []


def _is_batch_norm(node: Node, axis: int) -> bool:
    """Whether a node is a BatchNorm, whose channels are the entries along an axis."""
    return operation(node) == "batch_norm" and axis == 1 - value_of(node).ndim


def _without_axis(shape: Sequence[int], axis: int) -> Tensor:
    """Labels that differ between all entries but those along an axis."""
    sizes = [*shape]
    sizes[axis] = 1
    return torch.arange(math.prod(sizes)).view(sizes).expand(tuple(shape))
