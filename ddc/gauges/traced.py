"""The gauges of a traced model: rules on its graph, one for each kind.

What a rule cannot prove it refuses. The rules read operations; names of modules and classes serve
for messages alone.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from ddc.gauges.actions import Axis, Chain, Rescale, RotatedAxis, Rotation, Shift
from ddc.gauges.attention import ATTENTION, Attention, Read, attentions_of
from ddc.gauges.base import Gauge, Refusal, axes_of
from ddc.gauges.gauge_set import GaugeSet
from ddc.gauges.heads import Logits, logits_of
from ddc.gauges.parts import named_part, part_named
from ddc.gauges.signature import signature
from ddc.gauges.trace import (
    CONVOLUTIONS,
    Arrival,
    Entering,
    ExpertMap,
    Flow,
    LinearMap,
    NoValue,
    Trace,
    arguments,
    channels_of,
    has_fixed_shape,
    inputs,
    labels_of,
    last_axis,
    module_path,
    operation,
    readers,
    value_of,
)

#: Two numbers of a rotary embedding count as equal within this; it is computed in single precision
#: or less.
CLOSE = 1e-3

#: Kinds of loss in transformers (``model.loss_type``) that are softmax cross-entropy of the logits.
SOFTMAX_LOSSES = frozenset(
    [
        "ForCausalLM",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForImageClassification",
        "ForVideoClassification",
        "ForAudioClassification",
        "ForTokenClassification",
        "ForConditionalGeneration",
        "ForCTC",
    ]
)

Key = TypeVar("Key", bound=Hashable)
#: By unit, the copies of k indices that it turns.
Indices = Sequence[Sequence[tuple[int, ...]]]


Rule = Callable[["Finding"], None]


class NotProved(Exception):
    """Why a gauge is refused."""


@dataclass(frozen=True)
class Heads:
    """How the outputs of a linear map enter attention, head by head.

    Attributes:
        planes: by head, the pairs of outputs that a rotary embedding turns; key: the pair of
            entries that they become.
        rest: by head, the outputs that enter as they are; key: the entry that they become.
    """

    planes: list[dict[tuple[int, int], tuple[int, int]]]
    rest: list[dict[int, int]]

    def entries(self, head: int) -> tuple[object, ...]:
        """The outputs of which a head is made, and as which of its entries."""
        return *sorted(self.planes[head].items()), *sorted(self.rest[head].items())

    def outputs(self) -> set[int]:
        """All outputs that enter attention."""
        pairs = chain.from_iterable(planes.values() for planes in self.planes)
        return {
            *chain.from_iterable(pairs),
            *chain.from_iterable(rest.values() for rest in self.rest),
        }


@dataclass(frozen=True)
class Source:
    """Where units come from that a rescale may scale.

    Attributes:
        axes: the side: the rows of a weight, with its bias; the columns of a table.
        nodes: what gives the units, with their labels.
        experts: of which the units are, if they are.
    """

    axes: tuple[Axis, ...]
    nodes: dict[Node, Tensor]
    experts: ExpertMap | None = None

    @property
    def labels(self) -> int:
        """Number of labels."""
        return max(int(labels.max()) for labels in self.nodes.values()) + 1

    def among(self, part: Sequence[int], size: int) -> dict[Node, Tensor]:
        """The nodes with labels for a part of ``size`` units alone, as if there were no others."""
        place = torch.full((size,), -1)
        place[list(part)] = torch.arange(len(part))
        return {
            node: torch.where(
                place[labels % size] < 0, -1, labels // size * len(part) + place[labels % size]
            )
            for node, labels in self.nodes.items()
        }


def gauges_of_trace(
    trace: Trace,
    per_layer: bool = False,
    loss: str | None = None,
    rules: Sequence[Rule] | None = None,
) -> GaugeSet:
    """All gauges that the rules prove, and all that they refuse.

    Args:
        trace: of the model.
        per_layer: chains of ReLU layers without biases as one chained rescale each, in place of
            their neurons'.
        loss: as for :func:`ddc.find_gauges`.
        rules: which; None for all.
    """
    return proved(Finding(trace, loss), per_layer, rules)


def proved(
    finding: Finding, per_layer: bool = False, rules: Sequence[Rule] | None = None
) -> GaugeSet:
    """The same of a finding that has proved nothing yet; what its rules have read it keeps."""
    for prove in RULES if rules is None else rules:
        prove(finding)
    finding.drop_overlaps()
    found = chained(finding.found) if per_layer else finding.found
    return GaugeSet(tuple(found), tuple(finding.refused))


def chained(gauges: Sequence[Gauge]) -> list[Gauge]:
    """Rescales of neurons that follow each other, without biases, as one rescale of whole
    layers.
    """
    links = {
        gauge.plus[0].parameter: gauge
        for gauge in gauges
        if isinstance(gauge, Rescale) and gauge.kind == "relu_rescale" and gauge.degree == 1
        if len(gauge.plus) == len(gauge.minus) == 1
        if isinstance(gauge.plus[0].axis, int) and part_named(gauge.plus[0].parameter) is None
    }
    second = {gauge.minus[0].parameter for gauge in links.values()}
    chains: list[Gauge] = []
    for name in links:
        if name not in second:
            weights = [name]
            while weights[-1] in links:
                weights.append(links[weights[-1]].minus[0].parameter)
            chains.append(Chain(tuple(weights), where=owner(name)))
    return [*chains, *(gauge for gauge in gauges if gauge not in links.values())]


Proof = TypeVar("Proof", bound=Callable[..., Any])


def once(prove: Proof) -> Proof:
    """Have a method prove the same but once: what it gives, or why not, is kept in ``kept`` of its
    object by its arguments.
    """

    @functools.wraps(prove)
    def kept(self: Any, *args: Any) -> Any:
        key = prove.__name__, *args
        if key not in self.kept:
            try:
                self.kept[key] = prove(self, *args)
            except NotProved as reason:
                self.kept[key] = reason
        if isinstance(found := self.kept[key], NotProved):
            raise found
        return found

    return cast(Proof, kept)


class Finding:
    """Collects what is found and refused in one trace.

    Attributes:
        trace: of the model.
        loss: as for :func:`ddc.find_gauges`.
        modules: of the model by name.
        found, refused: what rules append to.
    """

    def __init__(self, trace: Trace, loss: str | None = None) -> None:
        self.trace = trace
        self.loss = loss
        self.modules = dict(trace.model.named_modules())
        self.found: list[Gauge] = []
        self.refused: list[Refusal] = []
        #: What :func:`once` has proved.
        self.kept: dict[tuple[Any, ...], Any] = {}
        #: Of the slots of a query-key rotation, those of the keys.
        self.key_slots: dict[Rotation, tuple[RotatedAxis, ...]] = {}
        #: Heads by what is done between a linear map and attention.
        self._ways: dict[tuple[str, str, str], Heads] = {}

    # ------------------------------------------------------------------------------------------
    # norm scale

    def norm_scales(self) -> None:
        """A scale gamma (and beta) after a norm, against the columns of all linear maps that read
        it.
        """
        # operations that scale the last axis by parameters, and what reads their outputs
        scales: set[str] = set()
        for node in self.trace.graph.nodes:
            if (scale := self.scale(node)) is not None:
                source, plus, reason = scale
                scales.update(axis.parameter for axis in plus)
                where = owner(plus[0].parameter)
                try:
                    if reason:
                        raise NotProved(reason)
                    self.found.append(self.norm_scale(source, plus, where))
                except NotProved as reason:
                    self.refused.append(Refusal("norm_scale", where, str(reason)))
        # norms by name that none of these operations belongs to, so that their refusal is listed
        for name, module in self.modules.items():
            if "norm" in type(module).__name__.lower() and not any(
                owner(scale) == name for scale in scales
            ):
                weight = getattr(module, "weight", None)
                why = (
                    "the norm has no scale"
                    if weight is None
                    else "its weight does not multiply what the norm gives"
                )
                self.refused.append(Refusal("norm_scale", name, why))

    def scale(self, node: Node) -> tuple[Node, tuple[Axis, ...], str] | None:
        """A node whose entries along the last axis are scaled (and shifted), the parameters that
        do, and why not.
        """
        match operation(node), arguments(node):
            case (("layer_norm" | "rms_norm"), (_, shape, *rest)) if len(shape) == 1:
                affine = [each for each in rest[:2] if isinstance(each, Node)]
                scaled, offset = bool(rest) and rest[0] is not None, 0.0
            case "mul", (a, b):
                factors = [(each, *self.without_number(each)) for each in (a, b)]
                vectors = [each for each in factors if self.is_vector(each[1], node)]
                if len(vectors) != 1:
                    return None
                ((_, gamma, offset),) = vectors
                affine, users, scaled = [gamma], list(node.users), True
                if (
                    len(users) == 1
                    and operation(users[0]) == "add"
                    and self.is_vector(arguments(users[0])[1], node)
                ):
                    node = users[0]
                    affine.append(arguments(node)[1])
            case _:
                return None
        # scale and shift must be parameters as they stand
        views = [self.trace.parameter(each) for each in affine]
        if not (names := tuple(view[0] for view in views if view is not None)):
            return None
        axes = (Axis(names[0], 0, offset), *(Axis(name) for name in names[1:]))
        if not scaled:
            return node, axes, "the norm has a shift, but no scale"
        reason = "its scale and shift are not both parameters as they stand (computed, or a buffer)"
        return node, axes, "" if len(names) == len(affine) else reason

    def without_number(self, factor: Any) -> tuple[Any, float]:
        """The parameter that a number is added to, and that number; anything else as it is, and
        0.
        """
        x, offset = factor, 0.0
        while isinstance(x, Node) and len(readers(x)) == 1 and value_of(x).is_floating_point():
            if operation(x) == "add":
                _, *others = arguments(x)
                if len(others) != 1 or not isinstance(others[0], int | float) or x.kwargs:
                    break
                offset += others[0]
            elif operation(x) not in ("to", "_to_copy"):
                break
            x = arguments(x)[0]
        return (x, offset) if offset and self.trace.parameter(x) is not None else (factor, 0.0)

    def is_vector(self, argument: object, node: Node) -> bool:
        view = self.trace.parameter(argument)
        return view is not None and self.trace.tensors[view[0]].shape == value_of(node).shape[-1:]

    @once
    def norm_scale(self, source: Node, plus: tuple[Axis, ...], where: str) -> Rescale:
        if not has_fixed_shape(source):
            raise NotProved("how many positions it has depends on values")
        readers = self.readers_of(source)
        names = [axis.parameter for axis in plus]
        if len({*names}) < len(names):
            raise NotProved("its scale and shift are one parameter")
        self.require_single(names)
        return Rescale("norm_scale", where, tuple(plus), tuple(readers))

    @once
    def readers_of(self, source: Node) -> list[Axis]:
        """The columns of the linear maps that alone read what a norm gives."""
        flow = self.trace.flow({source: labels_of(source)})
        readers = [self.reader(arrival) for arrival in flow.arrivals]
        if not readers:
            raise NotProved("nothing reads it")
        if flow.activations or any(arrival.degree != 1 for arrival in flow.arrivals):
            raise NotProved("what reads it is not a linear map")
        self.require_single([], readers)
        self.require_alike(value_of(source).shape[-1], readers)
        return readers

    def reader(self, arrival: Arrival, experts: ExpertMap | None = None) -> Axis:
        """The columns of the linear map at which a flow ends, or of all ``experts``; of each apart
        where the flow begins at experts too. Of a convolution its input channels.
        """
        not_units = "the columns of a linear map that reads it are not its units, one for one"
        reader = self.trace.expert_maps.get(arrival.node)
        if reader is not None and arrival.argument == reader.argument:
            if experts is not None and reader.slots is not experts.slots:
                raise NotProved("the experts that read it are not those that give it")
            if not reader.reads(arrival.labels, apart=experts is not None):
                raise NotProved(not_units)
            return Axis(reader.weight, reader.columns if experts is None else (0, reader.columns))
        if operation(arrival.node) in CONVOLUTIONS and experts is None:
            return self._channels(arrival)
        linear = self.trace.linear_maps.get(arrival.node)
        place = 1 if operation(arrival.node) == "addmm" else 0
        if linear is None or arrival.argument != place:
            raise NotProved(f"its reader, {self.describe(arrival.node)}, is not a linear map")
        labels = last_axis(arrival.labels)
        units = self.trace.tensors[linear.weight].shape[1 - linear.rows]
        if experts is not None or labels is None or not torch.equal(labels, torch.arange(units)):
            raise NotProved(not_units)
        return Axis(linear.weight, 1 - linear.rows)

    def _channels(self, arrival: Arrival) -> Axis:
        """The input channels of the convolution at which a flow ends."""
        node, args = arrival.node, arguments(arrival.node)
        weight = self.trace.parameter(args[1])
        if arrival.argument != 0 or weight is None:
            raise NotProved(f"the weight of its reader, {self.describe(node)}, is no parameter")
        self.require_single([weight[0]])
        if self.trace.convolutions.get(weight[0]) is not node:
            raise NotProved(
                f"its reader, {self.describe(node)}, has groups of channels, or reads no batch"
            )
        if not torch.equal(arrival.labels, channels_of(args[0])):
            raise NotProved("the channels of a convolution that reads it are not its own")
        return Axis(weight[0], 1)

    def require_alike(self, units: int, axes: Sequence[Axis]) -> None:
        """Each parameter has all units along its axis, and no others."""
        for name, axis, _ in axes:
            tensor = self.trace.tensors.get(name)  # none of a part
            if tensor is not None and isinstance(axis, int) and tensor.shape[axis] != units:
                raise NotProved("what reads it reads some of its entries alone")

    def require_single(self, names: Sequence[str], axes: Sequence[Axis] = ()) -> None:
        """Each parameter computes in one place alone."""
        for name in [*names, *(axis.parameter for axis in axes)]:
            if not self.trace.used_once(name):
                raise NotProved(
                    f"{owner(name).rpartition('.')[2]} is tied to another parameter, or used more"
                    " than once"
                )

    def describe(self, node: Node) -> str:
        """What a node does, with the class of the module that does it where that says more."""
        if node.op == "output":
            return "the output of the model"
        name = operation(node)
        module = self.modules.get(module_path(node))
        if (
            module is None
            or self._activation(node) is None
            or type(module).__name__.lower() == name
        ):
            return name
        return type(module).__name__

    def _activation(self, node: Node) -> str | None:
        """The module in which a node is, if it has neither parameters nor modules of its own."""
        module = self.modules.get(path := module_path(node))
        plain = module is not None and not [*module.children(), *module.parameters()]
        return path if plain else None

    # ------------------------------------------------------------------------------------------
    # rescales

    def rescales(self) -> None:
        """Rows of one linear map against columns of the next, with what is homogeneous, or a gate,
        between them.
        """
        taken: dict[Axis, str] = {}
        for source, name, flow, plus in self.flows():
            if not flow.arrivals or not self._is_between(flow):
                continue
            # which of the two kinds the flow suggests
            ends = [self._is_map(arrival.node) for arrival in flow.arrivals]
            parts = [arrival.labels.unique().numel() < source.labels for arrival in flow.arrivals]
            # a gate by itself, or in one weight with the values, of which a part of the units
            # goes on
            gated = flow.gated and (
                all(ends) or any(end and part for end, part in zip(ends, parts, strict=True))
            )
            kind = "gated_rescale" if gated else "relu_rescale"
            # proved, or refused with the reason
            try:
                gauge = self.rescale(kind, source, flow, plus)
                if (
                    clash := next((axis for axis in gauge.minus if axis in taken), None)
                ) is not None:
                    raise NotProved(f"the other side is scaled by {taken[clash]} already")
            except NotProved as reason:
                self.refused.append(Refusal(kind, self.place([name]), str(reason)))
                continue
            taken.update(dict.fromkeys(gauge.minus, name))
            self.found.append(gauge)

    @once
    def flows(self) -> list[tuple[Source, str, Flow, tuple[Axis, ...]]]:
        """Where the output units of weights go: the source, the name of the weight or of a part,
        the flow, and the side.
        """
        return [(each, *found) for each in self._rescale_sources() for found in self._flows(each)]

    def _rescale_sources(self) -> list[Source]:
        """Weights whose output units may be scaled."""
        sources = []
        # outputs of linear maps: rows, with the bias
        for linear in self.trace.linear_maps.values():
            if not has_fixed_shape(linear.output):  # experts that are chosen by their index
                continue
            axes = [Axis(linear.weight, linear.rows)]
            if linear.bias is not None:
                axes.append(Axis(linear.bias))
            sources.append(Source(tuple(axes), {linear.output: labels_of(linear.output)}))
        # outputs of experts: rows of each
        for each in self.trace.expert_maps.values():
            rows = Axis(each.weight, (0, each.rows))
            sources.append(Source((rows,), {each.node: each.labels()}, each))
        # outputs of embeddings: columns of a table, wherever it is looked up
        tables: dict[str, list[Node]] = defaultdict(list)
        for node in self.trace.graph.nodes:
            if (
                operation(node) == "embedding"
                and (view := self.trace.parameter(arguments(node)[0])) is not None
                and not view[1] % 2  # not of its transpose
            ):
                tables[view[0]].append(node)
        for name, nodes in tables.items():
            sources.append(Source((Axis(name, 1),), {node: labels_of(node) for node in nodes}))
        return sources

    def _flows(self, source: Source) -> list[tuple[str, Flow, tuple[Axis, ...]]]:
        """Where all of the units of a source go, or those of its parts that go to linear maps
        alone: the name of the weight, or part, the flow, and the side.
        """
        whole = self.trace.flow(source.nodes)
        name = source.axes[0].parameter
        if all(self._is_map(arrival.node) for arrival in whole.arrivals):
            return [(name, whole, source.axes)]
        # a packed weight gives each reader some of its rows; which, the flow of these alone proves
        size = self.trace.tensors[name].shape[axes_of(source.axes[0].axis)[-1]]
        found = []
        parts = {
            tuple((arrival.labels[arrival.labels >= 0] % size).unique().tolist())
            for arrival in whole.arrivals
        }
        for part in sorted(parts):
            if not 0 < len(part) < size:
                continue
            try:
                axes = tuple(
                    axis._replace(
                        parameter=named_part(axis.parameter, axes_of(axis.axis)[-1], part, size)
                    )
                    for axis in source.axes
                )
            except ValueError:  # no range
                continue
            flow = self.trace.flow(source.among(part, size))
            if flow.arrivals and all(self._is_map(arrival.node) for arrival in flow.arrivals):
                found.append((axes[0].parameter, flow, axes))
        return found or [(name, whole, source.axes)]

    def _is_map(self, node: Node) -> bool:
        return node in self.trace.linear_maps or node in self.trace.expert_maps

    def _is_between(self, flow: Flow) -> bool:
        """Whether the flow is what a feed-forward block does: elementwise from linear map to linear
        map.

        A gate branch, whose scale its activation does not pass on, is none: the value branch is
        looked at by itself.
        """
        linear = [self._is_map(arrival.node) for arrival in flow.arrivals]
        if all(linear):
            return bool(flow.activations) or flow.gated
        onward = [
            self._onward(arrival.node)
            for arrival in flow.arrivals
            if not self._is_map(arrival.node)
        ]
        return any(each is not None and (any(linear) or not each.gated) for each in onward)

    def _onward(self, node: Node) -> Flow | None:
        """Where an activation's values go, if to linear maps alone."""
        known = (
            ATTENTION,
            "add",
            "output",
            "layer_norm",
            "rms_norm",
            "mul",
            "cat",
            "matmul",
            "bmm",
            "baddbmm",
            "einsum",
            "",
        )
        # an activation: a module of several operations, or an operation that is none of those known
        if (module := self._activation(node)) is not None:  # of several operations
            node = [each for each in self.trace.graph.nodes if module_path(each) == module][-1]
        elif operation(node) in known:
            return None
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim < 2:
            return None
        # its values must reach linear maps alone
        flow = self.trace.flow({node: labels_of(node)})
        return (
            flow if flow.arrivals and all(self._is_map(end.node) for end in flow.arrivals) else None
        )

    def rescale(self, kind: str, source: Source, flow: Flow, plus: tuple[Axis, ...]) -> Rescale:
        # all that the flow reaches must be a linear map, at one degree
        name = source.axes[0].parameter
        other = [arrival.node for arrival in flow.arrivals if not self._is_map(arrival.node)]
        if other and kind == "gated_rescale":
            raise NotProved("its rows are in one weight with those of its gate")
        if other:
            raise NotProved(f"{self.describe(other[0])} is not homogeneous")
        readers = [self.reader(arrival, source.experts) for arrival in flow.arrivals]
        if kind == "gated_rescale" and flow.activations:
            raise NotProved("the gate branch is not touched; its value branch is")
        degrees = {arrival.degree for arrival in flow.arrivals}
        if len(degrees) > 1:
            raise NotProved("its readers read it at different degrees")
        # every parameter on both sides must be whole, and used here alone
        if not self._bias_is_whole(name):
            raise NotProved("its bias is not a parameter of its own")
        tables = {
            axis.parameter
            for axis in source.axes
            if axis.axis == 1 and self._is_table(axis.parameter)
        }
        self.require_single(
            [axis.parameter for axis in source.axes if axis.parameter not in tables], readers
        )
        whole = [each for each in plus if each.parameter in self.trace.tensors]
        if whole and isinstance(whole[0].axis, int):
            units = self.trace.tensors[whole[0].parameter].shape[whole[0].axis]
            self.require_alike(units, [*whole, *readers])
        return Rescale(
            kind, self.place([name, readers[0].parameter]), plus, tuple(readers), degrees.pop()
        )

    def _is_table(self, name: str) -> bool:
        """Whether embeddings alone use a parameter."""
        return all(operation(node) == "embedding" for node in self.trace.uses[name])

    def _bias_is_whole(self, name: str) -> bool:
        return all(
            linear.bias_node is None or linear.bias is not None
            for linear in self.trace.linear_maps.values()
            if linear.weight == name
        )

    # ------------------------------------------------------------------------------------------
    # rotations

    def rotations(self) -> None:
        """Heads of each attention: values against outputs, queries and keys with each other."""
        for attention in self.attentions:
            for kind, rule in (
                ("value_rotation", self.value_rotation),
                ("qk_rotation", self.qk_rotation),
            ):
                try:
                    self.found += rule(attention)
                except (NotProved, NoValue) as reason:
                    self.refused.append(Refusal(kind, attention.where, str(reason)))

    @cached_property
    def attentions(self) -> list[Attention]:
        """All attention of the model."""
        return attentions_of(self.trace)

    def origin(self, node: Node) -> LinearMap | None:
        """The one linear map from which an input of attention comes."""
        maps = self.trace.linear_maps
        found = [maps[each] for each in self.trace.ancestors(node, stop=maps) if each in maps]
        return found[0] if len(found) == 1 else None

    def _of_three_axes(self, node: Node) -> str:
        """The name of the last weight of more than two axes (in, heads, entries) that is applied to
        make an input of attention; empty if there is none.
        """
        before = self.trace.ancestors(node, stop=self.trace.linear_maps)
        for each in sorted(before, key=self.trace.order.__getitem__, reverse=True):
            if operation(each) in ("einsum", "tensordot", "matmul"):
                for view in map(self.trace.parameter, inputs(each)):
                    if view is not None and self.trace.tensors[view[0]].ndim > 2:
                        return view[0]
        return ""

    @once
    def _heads(self, read: Read | None, what: str) -> tuple[LinearMap, Heads]:
        """The linear map of what attention reads, and its heads, whose outputs go nowhere else."""
        if read is None:
            raise NotProved(f"its {what} meet otherwise than in one product of heads")
        linear = self.origin(read.value)
        if weight := self._of_three_axes(read.value):
            raise NotProved(f"its {what} are a product with {weight}, a weight of three axes")
        if linear is None:
            raise NotProved(f"its {what} do not come from one linear map")
        self.require_single([linear.weight])
        # one layer does as the next: the way from the linear map to attention is read once
        way = what, str(read.order), signature(self.trace, linear.output, read.value)
        if way not in self._ways:
            self._ways[way] = self._enter(linear, read, what)
        heads = self._ways[way]
        blocks = [heads.entries(block) for block in range(len(heads.rest))]
        one = 1 in value_of(linear.output).shape[:-1]
        if len(read.order) == 3 and one and len({*blocks}) == len(blocks) > 1:
            raise NotProved(
                f"its {what} have heads and examples in one axis, and the example has one of the"
                " latter: pass one of two or more"
            )
        rows = [*heads.outputs()]
        if (user := self.trace.leak(linear, rows, read.node, read.argument)) is not None:
            raise NotProved(f"its {what} are read by {self.describe(user)} as well")
        return linear, heads

    def _enter(self, linear: LinearMap, read: Read, what: str) -> Heads:
        try:
            entering = self.trace.matrix(linear, read.value, read.order)
        except NoValue as error:
            raise NotProved(f"how its {what} enter attention is not known: {error}") from None
        if entering is None:
            raise NotProved(
                f"its {what} pass through what is not linear (a QK-norm, say) before they meet"
            )
        return heads_of(entering, what)

    # values as they are, head by head

    def value_rotation(self, attention: Attention, single: bool = False) -> list[Rotation]:
        """What turns values; ``single`` entries too, which have nothing to turn."""
        where = attention.where
        value, heads = self._heads(attention.value, "values")
        if any(heads.planes):
            raise NotProved("its values are turned by position")
        # what attention gives must go, unchanged, to one linear map of all heads
        output, columns, rests = self._read_by(attention, heads)
        query_heads = len(columns) // (width := value_of(attention.node).shape[attention.order[-1]])
        # query heads that share a value head turn its rows and their own columns together
        self.require_single([], [Axis(output.weight)])
        position = np.empty(len(columns), dtype=np.int64)
        position[columns.numpy()] = np.arange(len(columns))
        groups = grouped(rests, query_heads)
        rows = np.array(list(groups))[:, None, :]
        reading = np.array(
            [
                [position[h * width : (h + 1) * width] for h in members]
                for members in groups.values()
            ]
        )
        slots = [
            *self._row_slots(value, rows),
            RotatedAxis(output.weight, 1 - output.rows, reading),
        ]
        return (
            [Rotation("value_rotation", where, tuple(slots), reflections=True)]
            if width > 1 or single
            else []
        )

    def _read_by(
        self, attention: Attention, heads: Heads
    ) -> tuple[LinearMap, Tensor, list[tuple[int, ...]]]:
        """The linear map that alone reads what attention gives; which entry of which head each of
        its columns reads; and the rows of each value head.
        """
        rests = [tuple(rest[i] for i in sorted(rest)) for rest in heads.rest]
        shape = value_of(attention.node).shape
        if len(shape) > 3:
            return *self._columns(attention, torch.arange(shape[attention.order[-3]])), rests
        # heads and examples in one axis: heads are what is the same in each example, and what the
        # linear map tells apart
        reasons = []
        for head in numberings(rests):
            try:
                output, columns = self._columns(attention, head)
            except NotProved as reason:
                reasons.append(reason)
                continue
            first = [head.tolist().index(each) for each in range(int(head.max()) + 1)]
            return output, columns, [rests[each] for each in first]
        raise reasons[-1]

    def _columns(self, attention: Attention, head: Tensor) -> tuple[LinearMap, Tensor]:
        """The linear map that alone reads what attention gives, and what each of its columns reads:
        by number of the head (``head``, along the last axis of the batch) and entry.
        """
        order = attention.order
        shape = [value_of(attention.node).shape[axis] for axis in order]
        labels = head[:, None, None] * shape[-1] + torch.arange(shape[-1])
        labels = (
            (labels if len(shape) > 2 else labels[0])
            .expand(shape)
            .permute(*(order.index(axis) for axis in range(len(order))))
        )
        flow = self.trace.flow({attention.node: labels})
        # a number may multiply all entries of a head
        uneven = flow.varies(lambda labels: labels % shape[-1])
        changed = flow.activations or flow.dropout or uneven
        if changed or len(flow.arrivals) != 1 or flow.arrivals[0].degree != 1:
            raise NotProved("what it gives does not go to one linear map alone, as it is")
        (arrival,) = flow.arrivals
        output = self.trace.linear_maps.get(arrival.node)
        columns = last_axis(arrival.labels)
        expected = torch.arange((int(head.max()) + 1) * shape[-1])
        if output is None or columns is None or not torch.equal(columns.sort().values, expected):
            raise NotProved(
                f"what it gives goes to {self.describe(arrival.node)}, no linear map of all heads"
            )
        return output, columns

    def qk_rotation(self, attention: Attention, single: bool = False) -> list[Rotation]:
        """What turns queries and keys alike; ``single`` entries too, which have nothing to turn."""
        where, reads = attention.where, (attention.query, attention.key)
        if any(read is not None and read.positions < 3 for read in reads):
            raise NotProved(
                "the example has too few positions to see how they turn its heads: pass a"
                " longer one"
            )
        # queries and keys, turned in the same planes
        (query, q), (key_map, k) = (
            self._heads(read, what) for read, what in zip(reads, ("queries", "keys"), strict=True)
        )
        units = met_heads(q, k)
        # turns of planes, and of what no position turns
        rotations = []
        if planes := sorted(q.planes[0]):
            of_query: Indices = [
                [q.planes[head][plane] for head in group] for _, group in units for plane in planes
            ]
            of_key: Indices = [[k.planes[key][plane]] for key, _ in units for plane in planes]
            rotations.append(self._qk(where, query, of_query, key_map, of_key, reflections=False))
        if len(rest := sorted(q.rest[0])) > (0 if single else 1):
            of_query = [
                [tuple(q.rest[head][i] for i in rest) for head in group] for _, group in units
            ]
            of_key = [[tuple(k.rest[key][i] for i in rest)] for key, _ in units]
            rotations.append(self._qk(where, query, of_query, key_map, of_key, reflections=True))
        return rotations

    def _qk(
        self,
        where: str,
        query: LinearMap,
        q: Indices,
        key: LinearMap,
        k: Indices,
        reflections: bool,
    ) -> Rotation:
        keys = tuple(self._row_slots(key, np.array(k)))
        rotation = Rotation(
            "qk_rotation", where, (*self._row_slots(query, np.array(q)), *keys), reflections
        )
        self.key_slots[rotation] = keys
        return rotation

    def _row_slots(self, linear: LinearMap, rows: np.ndarray) -> list[RotatedAxis]:
        """Rows of a weight, and the same entries of its bias.

        Raises:
            NotProved: units share a row, which cannot turn with both.
        """
        if len({*rows.ravel().tolist()}) < rows.size:
            raise NotProved("its heads share some of their entries, but not all")
        slots = [RotatedAxis(linear.weight, linear.rows, rows)]
        for name, start, size in self._bias_parts(linear):
            inside = (rows >= start) & (rows < start + size)
            if inside.all():
                self.require_single([name])
                slots.append(RotatedAxis(name, 0, rows - start))
            elif inside.any():
                raise NotProved("its heads lie across the parts of a bias")
        return slots

    def _bias_parts(self, linear: LinearMap) -> list[tuple[str, int, int]]:
        """The parameters that a bias is put together from: name, first row, number of rows; zeros
        are left out.
        """
        node = linear.bias_node
        if node is None:
            return []
        parts, start = [], 0
        pieces = list(arguments(node)[0]) if operation(node) == "cat" else [node]
        for piece in pieces:
            size = value_of(piece).numel()
            if (view := self.trace.parameter(piece)) is not None:
                parts.append((view[0], start, size))
            elif self.trace.depends_on_parameters(piece) or bool(self.trace.value(piece, {}).any()):
                raise NotProved("its bias is not made of parameters as they are")
            start += size
        return parts

    # ------------------------------------------------------------------------------------------
    # logit shift

    def logit_shift(self) -> None:
        """The same vector added to all rows of a linear map that gives the logits, or of each of
        those whose outputs are added or averaged to them.
        """
        logits = logits_of(self.trace)
        maps: dict[str, list[LinearMap]] = defaultdict(list)
        for linear in logits.heads:
            maps[linear.weight].append(linear)
        try:
            if logits.stops and (not maps or self.loss != "cross_entropy"):
                stop = self.describe(logits.stops[-1])
                if logits.stops[-1] in logits.given:
                    raise NotProved(f"{stop}, which gives the output, is not a linear map")
                raise NotProved(f"{stop}, of which the output is made, is not a linear map")
            self.require_softmax(*logits.heads)
        except NotProved as reason:
            heads = {owner(name) for name in maps}
            where = heads.pop() if len(heads) == 1 else "output"
            self.refused.append(Refusal("logit_shift", where, str(reason)))
            return
        for name, uses in maps.items():
            try:
                self.found.append(self.head_shift(name, uses, logits))
            except NotProved as reason:
                self.refused.append(Refusal("logit_shift", owner(name), str(reason)))

    def head_shift(self, name: str, uses: Sequence[LinearMap], logits: Logits) -> Shift:
        """The shift of one head, all of whose outputs go to the logits and nowhere else."""
        nodes = {linear.node for linear in uses}
        others = [use for use in self.trace.uses[name] if use not in nodes]
        if any(operation(use) == "embedding" for use in others):
            raise NotProved("the head is tied to the embedding")
        if any(linear.rows != 0 for linear in uses) or others or name in self.trace.shared:
            raise NotProved("the head is used more than once")
        if any(linear.bias_node is not None and linear.bias is None for linear in uses):
            raise NotProved("its bias is not a parameter of its own")
        (bias, *more) = dict.fromkeys(linear.bias for linear in uses)
        if more:
            raise NotProved("it is used with different biases")
        if bias is not None:
            adds = nodes | {linear.output for linear in uses}
            if bias in self.trace.shared or not adds.issuperset(self.trace.uses[bias]):
                self.require_single([bias])
                raise NotProved("its bias is used more than once")
        for linear in uses:
            if (reader := logits.reader_beside(linear)) is not None:
                raise NotProved(f"what it gives is read by {self.describe(reader)} as well")
        return Shift(name, bias, where=owner(name))

    def require_softmax(self, *heads: LinearMap) -> None:
        """The loss is softmax cross-entropy of the logits that heads give: the caller says so, or
        no sign speaks against it.

        Raises:
            NotProved: one output, a loss of another kind, or signs of one.
        """
        if value_of(heads[0].output).shape[-1] == 1:
            raise NotProved(
                "it has one output, which a softmax makes constant: its loss is another one"
            )
        if self.loss == "other":
            raise NotProved("the loss is not softmax cross-entropy")
        if self.loss is not None:
            return
        ask = (
            "; if it is softmax cross-entropy of this output, say so: find_gauges(model,"
            " loss='cross_entropy')"
        )
        if problem := other_loss(self.trace.model):
            raise NotProved(problem + ask)
        if (name := self.trace.output_name(self.trace.logits)) and name != "logits":
            raise NotProved(f"the output is called {name!r}, not logits{ask}")
        related: set[Node] = set()
        for head in heads:
            related |= self.trace.ancestors(head.output) | self.trace.descendants(head.output)
        if any(
            each not in related and self.trace.depends_on_parameters(each)
            for each in self.trace.outputs
        ):
            raise NotProved(f"the model has other outputs, of which the loss may be made{ask}")

    def drop_overlaps(self) -> None:
        """Refuse rotations that turn the same index: each by itself may be a symmetry, but they do
        not commute.
        """
        on_axis: dict[tuple[str, int], list[tuple[Gauge, set[int]]]] = defaultdict(list)
        for gauge in self.found:
            if isinstance(gauge, Rotation):
                for name, axis, indices in gauge.slots:
                    on_axis[name, axis].append((gauge, {*indices.flatten().tolist()}))
        clashing = {
            gauge
            for turned in on_axis.values()
            for (a, of_a), (b, of_b) in itertools.combinations(turned, 2)
            if a is not b and of_a & of_b
            for gauge in (a, b)
        }
        reason = "another rotation turns the same heads"
        self.refused += [
            Refusal(gauge.kind, gauge.where, reason) for gauge in self.found if gauge in clashing
        ]
        self.found = [gauge for gauge in self.found if gauge not in clashing]

    # ------------------------------------------------------------------------------------------
    # places

    def place(self, names: Sequence[str]) -> str:
        """The module that holds these parameters; of the first alone, if that is but a list of
        modules.
        """
        paths = [owner(name).split(".") for name in names]
        shared = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        path = ".".join(shared)
        if not path or isinstance(self.modules.get(path), nn.ModuleList | nn.Sequential):
            return owner(names[0])
        return path


#: What proves the kinds, in the order in which they are tried. A rule may prove several; a chained
#: rescale is made of ReLU rescales.
RULES: list[Rule] = [Finding.norm_scales, Finding.rescales, Finding.rotations, Finding.logit_shift]
#: Those of them that a reader of a family of models stands for (:func:`ddc.gauges.read_gauges`).
OF_READERS = tuple(RULES)


def rule(prove: Rule) -> Rule:
    """Have a rule tried on every trace, after those that there are. It appends to
    :attr:`Finding.found` what it proves, and to :attr:`Finding.refused` what it looked for and
    could not prove.
    """
    RULES.append(prove)
    return prove


def other_loss(model: nn.Module) -> str:
    """What a model of transformers says of its loss, if that is not softmax cross-entropy; empty
    otherwise.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        return f"config.problem_type is {problem!r}"
    kind = getattr(model, "loss_type", None)
    if isinstance(kind, str) and kind not in SOFTMAX_LOSSES:
        return f"its loss is that of {kind}"
    return ""


def owner(parameter: str) -> str:
    """Name of the module that has a parameter."""
    return parameter.rpartition(".")[0]


def grouped(keys: Sequence[Key], count: int) -> dict[Key, list[int]]:
    """Which of ``count`` query heads read which key-value head; ``keys`` tells key-value heads
    apart.
    """
    groups: dict[Key, list[int]] = {}
    if count % len(keys):
        raise NotProved("its key-value heads are not as many as its query heads, or a part")
    group = count // len(keys)
    for head in range(count):
        groups.setdefault(keys[head // group], []).append(head)
    if len({len(members) for members in groups.values()}) != 1:
        raise NotProved("its key-value heads are read by different numbers of query heads")
    return groups


def numberings(blocks: Sequence[Hashable]) -> Iterator[Tensor]:
    """Ways in which blocks that differ by their head and example, in one axis, may be numbered by
    their head: examples outside or inside, blocks of one head alike. Few heads first.
    """
    count = len(blocks)
    for heads in range(len({*blocks}), count + 1):
        if count % heads:
            continue
        for head in (torch.arange(count) % heads, torch.arange(count) // (count // heads)):
            if len({*zip(head.tolist(), blocks, strict=True)}) == heads:
                yield head


def met_heads(q: Heads, k: Heads) -> list[tuple[int, list[int]]]:
    """Key heads, one of those with the same outputs, and the query heads that meet each of them,
    one of those with the same outputs; the same in each example.

    Raises:
        NotProved: heads that are turned in different planes, or whose numbers do not match.
    """
    kinds = {frozenset(planes) for planes in (*q.planes, *k.planes)}
    if len(kinds) != 1:
        raise NotProved("its queries and keys are turned in different planes")
    if len(q.rest) % len(k.rest):
        raise NotProved("its key-value heads are not as many as its query heads, or a part")
    repeated = len(q.rest) // len(k.rest)  # by attention itself
    groups: dict[object, tuple[int, list[int]]] = {}
    met = set()
    for head in range(len(q.rest)):
        key = head // repeated
        _, members = groups.setdefault(k.entries(key), (key, []))
        if (k.entries(key), q.entries(head)) not in met:
            met.add((k.entries(key), q.entries(head)))
            members.append(head)
    if len({len(members) for _, members in groups.values()}) != 1:
        raise NotProved("its key-value heads are read by different numbers of query heads")
    return [*groups.values()]


def heads_of(entering: Entering, what: str) -> Heads:
    """Read heads from how the outputs of a linear map enter attention.

    Args:
        entering: from :meth:`Trace.matrix`.
        what: for messages.

    Raises:
        NotProved: entries of a head that are no outputs as they are, nor pairs of them turned by
            position.
    """
    heads = Heads([], [])
    for head in range(entering.heads):
        # (outputs, positions, entries), (outputs, entries)
        block = entering.blocks[entering.head == head]
        met = (block != 0).any(1)
        names = entering.outputs[entering.head == head].tolist()
        planes, rest, scales = {}, {}, []
        for places, entries in components(met, range(len(names))):
            at = block[places][:, :, entries].permute(1, 2, 0)  # (positions, entries, outputs)
            rows = [names[i] for i in places]
            # one entry: left alone, at one scale
            if len(rows) == len(entries) == 1:
                scales.append(at[0, 0, 0])
                if (at - at[0]).abs().max() > CLOSE * at.abs().max():
                    raise NotProved(f"its {what} are scaled by position")
                rest[entries[0]] = rows[0]
                continue
            # two entries: a rotation times one number at every position
            if not len(rows) == len(entries) == 2:
                raise NotProved(f"its {what} are mixed within a head in more than planes")
            size = at.square().sum((1, 2)) / 2
            identity = torch.eye(2, dtype=at.dtype) * size[:, None, None]
            determinant = torch.linalg.det(at)
            if (at @ at.mT - identity).abs().max() > CLOSE * size.max() or (
                size - size[0]
            ).abs().max() > CLOSE * size.max():
                raise NotProved(f"its {what} are mixed in pairs, but not turned")
            if not bool((determinant > 0).all() | (determinant < 0).all()):
                raise NotProved(f"its {what} are mixed in pairs, but not turned")
            if determinant[0] < 0:
                rows.reverse()
            planes[entries[0], entries[1]] = (rows[0], rows[1])
        # every entry accounted for, at one scale for the whole head
        if len(planes) * 2 + len(rest) != entering.entries:
            raise NotProved(f"entries of its {what} do not come from the linear map")
        if scales and (torch.stack(scales) - scales[0]).abs().max() > CLOSE * scales[0].abs():
            raise NotProved(f"entries of its {what} are scaled apart")
        heads.planes.append(planes)
        heads.rest.append(rest)
    return heads


def components(met: Tensor, names: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Connected components of a bipartite graph: rows, by name, with their columns; isolated
    columns are left out.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, columns = met.nonzero().T.numpy()
    size = sum(met.shape)
    edges = coo_array((np.ones(len(rows)), (rows, columns + met.shape[0])), shape=(size, size))
    _, label = connected_components(edges, directed=False)
    found: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for i in range(met.shape[0]):
        found[label[i]][0].append(names[i])
    for j in range(met.shape[1]):
        if label[met.shape[0] + j] in found:
            found[label[met.shape[0] + j]][1].append(j)
    return list(found.values())
