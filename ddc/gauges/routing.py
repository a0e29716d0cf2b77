"""What every parameter of a model is for, read from a trace: its role, and the heads that it holds.

An optimizer that treats parameters by what they are (Muon) needs this whatever its brand;
:func:`param_groups` gives it as param groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ddc.gauges.attention import ATTENTION
from ddc.gauges.base import named_parameters, unwrapped
from ddc.gauges.double import InDouble
from ddc.gauges.heads import heads_of
from ddc.gauges.trace import (
    KEEPS,
    MOVES,
    Inputs,
    LinearMap,
    NoValue,
    Trace,
    arguments,
    inputs,
    last_axis,
    operation,
    readers,
    traced,
    value_of,
)
from ddc.gauges.traced import Finding
from ddc.gauges.unsplit import unsplit

#: Roles, and what has them.
ROLES = {
    "embedding": "a table that is looked up, added or put beside: of tokens, of positions, a class",
    "head": "the linear map that gives the model's output",
    "hidden": "a linear map from one hidden representation to another",
    "router": "such a map that chooses among experts",
    "experts": "such maps of several experts, stacked in one parameter",
    "input": "a linear map or convolution that reads the model's inputs as they are",
    "convolution": "a convolution of hidden representations",
    "norm": "scale or shift of a norm",
    "scale": "a vector that multiplies something else, as a layer scale does",
    "bias": "what is added to the outputs of a map",
    "other": "something else: what is computed with before it acts (parametrisations), say",
    "unused": "nothing on the example; it gets no gradient",
}
NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")
PRODUCTS = (
    "bmm",
    "baddbmm",
    "matmul",
    "einsum",
    "grouped_mm",
    "_grouped_mm",
    "grouped_mm_fallback",
)
CHOICES = ("topk", "sort", "argsort", "argmax", "kthvalue", "scatter", "one_hot")
#: Between a router and its choice.
SCORES = KEEPS | MOVES | {"softmax", "_softmax", "sigmoid", "add", "sub", "div", "mul", "getitem"}
#: Between the head and the output.
ENTRYWISE = (
    KEEPS | MOVES | {"tanh", "sigmoid", "softmax", "log_softmax", "mul", "div", "add", "sub"}
)
#: Between a parameter and what it does.
ON_THE_WAY = KEEPS | MOVES | {"getitem", "index", "index_select"}


@dataclass(frozen=True)
class ParameterRole:
    """What a parameter is for.

    Attributes:
        parameter: its name.
        role: one of :data:`ROLES`.
        shape: of the parameter.
        heads: how many attention heads a matrix holds, as equal parts of an axis; 1 where it holds
            none, or none that could be told apart (attention that is not
            ``scaled_dot_product_attention``, a model without values).
        axis: along which the heads lie.
        tied: whether it is an embedding and the head at once.
    """

    parameter: str
    role: str
    shape: tuple[int, ...]
    heads: int = 1
    axis: int = 0
    tied: bool = False

    def __str__(self) -> str:
        """The role, with what there is to say about it."""
        heads = f", {self.heads} heads of {('rows', 'columns')[self.axis]}" * (self.heads > 1)
        return self.role + heads + ", and the head" * self.tied


class Roles(Sequence[ParameterRole]):
    """The roles of all parameters of a model, in its order. Printed, it is a table."""

    def __init__(self, roles: Sequence[ParameterRole]) -> None:
        self._roles = tuple(roles)

    def __len__(self) -> int:
        return len(self._roles)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int or slice, as a tuple
        return self._roles[index]

    def __iter__(self) -> Iterator[ParameterRole]:
        return iter(self._roles)

    def of(self, role: str) -> list[str]:
        """Names of the parameters that have a role.

        Raises:
            ValueError: there is no such role.
        """
        check_role(role)
        return [each.parameter for each in self if each.role == role]

    def __str__(self) -> str:
        alike: dict[tuple[str, str, str], list[str]] = {}
        for each in self:
            place = ".".join("*" if p.isdigit() else p for p in each.parameter.split("."))
            key = place, str(each), " × ".join(map(str, each.shape))
            alike.setdefault(key, []).append(each.parameter)
        rows = [("parameter", "role", "shape")]
        for (place, role, shape), names in alike.items():
            where = names[0] if len(names) == 1 else f"{place} ({len(names)}×)"
            rows.append((where, role, shape))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def check_role(role: str) -> None:
    """Raise ValueError for a role that there is not."""
    if role not in ROLES:
        raise ValueError(f"Invalid role {role!r}: expected one of {', '.join(ROLES)}")


def parameter_roles(model: nn.Module, inputs: Inputs | None = None) -> Roles:
    """The role of every parameter, found by tracing: names, classes and shapes decide nothing.

    Args:
        model: any model that ``torch.export`` traces; left as it is.
        inputs: as for :func:`ddc.find_gauges`.

    Raises:
        ValueError: the model cannot be traced, or ``inputs`` are needed.
    """
    model = unwrapped(model)
    trace = traced(unsplit(model), inputs)
    reading = _Reading(trace)
    try:
        heads = heads_of_matrices(trace)
    except NoValue:
        heads = {}
    roles = []
    for name, param in named_parameters(model).items():
        role = replace(reading.role(name), shape=tuple(param.shape))
        if role.role == "hidden" and name in heads:
            role = replace(role, heads=heads[name][0], axis=heads[name][1])
        roles.append(role)
    return Roles(roles)


def param_groups(
    model: nn.Module, settings: Mapping[str, Mapping[str, Any]], inputs: Inputs | None = None
) -> list[dict[str, Any]]:
    """Param groups by role, for any optimizer: one for each key of ``settings`` with parameters.

    Args:
        model: as for :func:`parameter_roles`; frozen parameters are left out.
        settings: hyperparameters by role (:data:`ROLES`), and under ``"rest"`` those of all roles
            that are not named.
        inputs: as for :func:`ddc.find_gauges`.

    Returns:
        Groups whose ``"params"`` are pairs of name and parameter, as torch's optimizers take them,
        with the hyperparameters beside them.

    Raises:
        ValueError: no such role, a role that nothing is said of, or as :func:`parameter_roles`.
    """
    for role in settings:
        if role != "rest":
            check_role(role)
    members: dict[str, list[tuple[str, Tensor]]] = {role: [] for role in settings}
    params = named_parameters(unwrapped(model))
    for each in parameter_roles(model, inputs):
        if not params[each.parameter].requires_grad:
            continue
        key = each.role if each.role in settings else "rest"
        if key not in settings:
            raise ValueError(
                f"nothing is said of {each.parameter!r}, whose role is {each.role!r}: add it to"
                " settings, or 'rest' for all that is not named"
            )
        members[key].append((each.parameter, params[each.parameter]))
    return [{"params": members[key], **values} for key, values in settings.items() if members[key]]


class _Reading:
    """Reads roles from what is done with parameters in one trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.heads = heads_of(trace)
        self.biases = {linear.output: linear.bias for linear in trace.linear_maps.values()}

    def role(self, name: str) -> ParameterRole:
        """The role of a parameter, by all that is done with it."""
        found = {self._of_use(name, *use) for use in self._uses(name)}
        tied = found == {"embedding", "head"}
        role = "embedding" if tied else found.pop() if len(found) == 1 else "other"
        return ParameterRole(name, role if self.trace.uses.get(name) else "unused", (), tied=tied)

    def _uses(self, name: str) -> list[tuple[Node, Node | None]]:
        """What computes with a parameter, once it has been moved; and as which argument."""
        waiting: list[tuple[Node, Node | None]] = [
            (node, next((a for a in inputs(node) if self._is_view(a, name)), None))
            for node in self.trace.uses.get(name, [])
            if operation(node) != "_assert_tensor_metadata"
        ]
        found = []
        while waiting:
            node, source = waiting.pop()
            # scales of 1 + weight are scales
            number = operation(node) in ("add", "mul") and len(inputs(node)) == 1
            known = node in self.trace.linear_maps
            if not known and (operation(node) in ON_THE_WAY or number) and readers(node):
                waiting += [(reader, node) for reader in readers(node)]
            else:
                found.append((node, source))
        return found

    def _is_view(self, node: Node, name: str) -> bool:
        view = self.trace.parameter(node)
        return view is not None and view[0] == name

    def _of_use(self, name: str, node: Node, source: Node | None) -> str:
        trace, args, does = self.trace, arguments(node), operation(node)
        size = trace.tensors[name].ndim
        if (linear := trace.linear_maps.get(node)) is not None and linear.weight == name:
            return self._of_map(linear)
        if self.biases.get(node) == name:
            return "bias"
        if (does == "linear" and source in args[2:]) or (does == "addmm" and args[0] is source):
            return "bias"
        if does == "embedding":
            return "embedding"
        if does.startswith(("conv", "_conv")):
            if len(args) > 2 and args[2] is source:
                return "bias"
            return "convolution" if trace.depends_on_parameters(args[0]) else "input"
        if any(norm in does for norm in NORMS):
            return "norm"
        if does in PRODUCTS and size > 2:
            return "experts"
        if does in ("add", "add_", "sub", "cat", "stack"):
            return "bias" if size == 1 else "embedding"
        if does in ("mul", "mul_") and size == 1:
            return "norm" if any(map(self._normed, inputs(node))) else "scale"
        return "scale" if does in ("mul", "mul_") else "other"

    def _of_map(self, linear: LinearMap) -> str:
        if linear in self.heads:
            return "head"
        if not self.trace.depends_on_parameters(linear.input):
            return "input"
        if self._chooses(linear):
            return "router"
        return "head" if gives_output(self.trace, linear) else "hidden"

    def _chooses(self, linear: LinearMap) -> bool:
        """Whether what a map gives are scores, of which the greatest are taken, or that weigh other
        values after a softmax.
        """
        waiting, seen = [(linear.output, False)], {linear.output}
        while waiting:
            node, soft = waiting.pop()
            for reader in readers(node):
                does = operation(reader)
                if does in CHOICES or (soft and does == "mul" and len(inputs(reader)) > 1):
                    return True
                if does in SCORES and reader not in seen and reader not in self.trace.linear_maps:
                    seen.add(reader)
                    waiting.append((reader, soft or "softmax" in does))
        return False

    @staticmethod
    def _normed(node: Node) -> bool:
        """Whether a value is another one over its root mean square."""
        while operation(node) in KEEPS:
            node = inputs(node)[0]
        if operation(node) not in ("mul", "div"):
            return False
        return any(operation(each) in ("rsqrt", "sqrt", "norm", "pow") for each in inputs(node))


def gives_output(trace: Trace, linear: LinearMap) -> bool:
    """Whether an output of the model is what a map gives, entry by entry: capped, or as
    probabilities.
    """
    waiting = [linear.output]
    while waiting:
        for reader in readers(waiting.pop()):
            if reader.op == "output":
                return True
            others = [each for each in inputs(reader) if trace.depends_on_parameters(each)]
            if operation(reader) in ENTRYWISE and len(others) == 1:
                waiting.append(reader)
    return False


# ---- heads


def heads_of_matrices(trace: Trace) -> dict[str, tuple[int, int]]:
    """By weight, how many attention heads it holds and along which axis, if they are equal parts of
    it, one after the other.

    Queries, keys and values: parts of the outputs, each of which changes heads of its own. Several
    of the three may come from one weight. Output projections: parts of the inputs, each from one
    head.

    Raises:
        ddc.gauges.trace.NoValue: what lies between a map and attention has no values (the meta
            device).
    """
    finding = Finding(trace)
    rows: dict[str, dict[int, set[int]]] = {}
    found: dict[str, tuple[int, int]] = {}
    for node in trace.graph.nodes:
        if operation(node) != ATTENTION:
            continue
        for argument in arguments(node)[:3]:
            linear = finding.origin(argument)
            if linear is not None and trace.used_once(linear.weight):
                width = value_of(argument).shape[-1]
                parts = rows.setdefault(linear.weight, {})
                parts.setdefault(width, set()).update(_parts(trace, linear, argument, width))
        if (output := _output_projection(trace, node)) is not None:
            found[output.weight] = value_of(node).shape[-3], 1 - output.rows
    for weight, by_width in rows.items():
        size = trace.tensors[weight].shape[trace_rows(trace, weight)]
        (width, whole), *others = by_width.items()
        if not others and len(whole) * width == size and len(whole) > 1:
            found[weight] = len(whole), trace_rows(trace, weight)
    return found


def trace_rows(trace: Trace, weight: str) -> int:
    """The axis of a weight along which its outputs lie."""
    return next(each.rows for each in trace.linear_maps.values() if each.weight == weight)


@torch.no_grad()
def _parts(trace: Trace, linear: LinearMap, argument: Node, width: int) -> set[int]:
    """Which parts of a map's outputs, of this width, are heads of an argument of attention: told by
    changing them. Empty unless each head changes with one part alone.
    """
    size = value_of(linear.output).shape[-1]
    if size % width:
        return set()
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(
        value_of(linear.output).shape, generator=generator, dtype=torch.float64
    ).to(trace.device_of(linear))
    after = trace.descendants(linear.output) | {linear.output}
    given: dict[Node, Any] = {linear.output: outputs}
    owner: dict[int, int] = {}
    with InDouble():
        before = trace.value(argument, given)
        fixed = {node: value for node, value in given.items() if node not in after}
        for part in range(size // width):
            moved = outputs.clone()
            moved[..., part * width : (part + 1) * width] += 1
            changed = trace.value(argument, {**fixed, linear.output: moved}) != before
            heads = changed.movedim(-3, 0).flatten(1).any(1).nonzero().flatten().tolist()
            if any(head in owner for head in heads):
                return set()
            owner |= dict.fromkeys(heads, part)
    return set(owner.values())


def _output_projection(trace: Trace, node: Node) -> LinearMap | None:
    """The map that reads an attention, if its inputs are the heads, one after the other."""
    heads = value_of(node).shape[-3]
    labels = torch.arange(heads).view(heads, 1, 1).expand(value_of(node).shape)
    ends = trace.flow({node: labels}).arrivals
    linear = trace.linear_maps.get(ends[0].node) if len(ends) == 1 else None
    if linear is None or heads < 2 or not trace.used_once(linear.weight):
        return None
    along, size = last_axis(ends[0].labels), value_of(linear.input).shape[-1]
    if along is None or size % heads:
        return None
    in_order = torch.arange(heads).repeat_interleave(size // heads)
    return linear if torch.equal(along, in_order) else None
