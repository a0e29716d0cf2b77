"""A model as a graph of operations: which linear maps there are, and where a scale or a head goes
from one to another.

The graph is ``torch.export``'s: operations of ATen on parameters, buffers and example inputs. All
that is said here is said of the operations, so it holds for any module that makes them, whatever
its class is called.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from ddc.gauges.base import first_line, frozen_tables, is_split, place_of, plain_name
from ddc.gauges.buffers import with_values
from ddc.gauges.double import InDouble, Untouched, computing_device

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
SUMS = frozenset(["add", "add_"])
#: Operations that put entries elsewhere, or leave them where they are.
MOVES = frozenset(
    [
        "view",
        "reshape",
        "transpose",
        "permute",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "broadcast_to",
        "mT",
        "numpy_T",
        "flatten",
        "unflatten",
        "contiguous",
        "alias",
        "clone",
        "detach",
        "t",
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "unbind",
        "movedim",
        "swapaxes",
        "narrow",
        "repeat",
        "repeat_interleave",
        "_unsafe_view",
        "roll",
        "flip",
        "reshape_as",
        "view_as",
        "expand_as",
    ]
)
#: Operations on their first argument, of which the second lends its type or its shape alone.
LENT = {"type_as": None, "reshape_as": "reshape", "view_as": "reshape", "expand_as": "expand"}
#: Operations that change nothing but the type, or drop entries at random.
KEEPS = frozenset(["to", "type_as", "dropout", "_to_copy", "float", "lift_fresh_copy"])
#: Elementwise operations f with f(c x) = c f(x) for c > 0.
HOMOGENEOUS = frozenset(["relu", "relu_", "leaky_relu", "leaky_relu_", "abs"])
#: Operations that take the greatest or the mean of a channel's entries, here and there.
POOLS = frozenset(
    [
        f"{kind}_pool{n}d"
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
        for n in (1, 2, 3)
    ]
)
#: Linear operations: what a rotary embedding is made of.
LINEAR_OPERATIONS = (
    MOVES
    | KEEPS
    | frozenset(["mul", "div", "add", "sub", "neg", "cat", "stack", "getitem", "rsub", "index"])
)

#: What is not looked into: values without parts of their own, classes, functions, imported modules.
CLOSED: tuple[type, ...] = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.Generator,
)
CLOSED += (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)

#: At how many positions a head is looked at.
POSITIONS = 8
#: How many numbers a value may have of which those of several unit vectors are worked out at once.
AT_ONCE = 2**21


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Afterwards all that a model keeps is what it was: a forward pass may leave losses, caches and
    counts.

    Attributes of its modules and of plain objects that they hold, lists, dicts and sets; not the
    values of tensors.
    """
    kept: list[tuple[Any, Any]] = [
        (each, kind(each))
        for each in reachable(model)
        if (kind := next((kind for kind in (dict, list, set) if isinstance(each, kind)), None))
        is not None
    ]
    try:
        yield
    finally:
        for each, before in kept:
            if isinstance(each, list):
                each[:] = before
            elif isinstance(each, set):
                if each != before:
                    each.clear()
                    each.update(before)
            elif len(each) != len(before) or any(
                each.get(key, each) is not value for key, value in before.items()
            ):
                each.clear()
                each.update(before)


def reachable(value: Any) -> list[Any]:
    """What a model, or another value, holds: modules, containers, plain objects and their dicts,
    tensors.
    """
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, CLOSED):
            continue
        seen.add(id(each))
        found.append(each)
        if isinstance(each, Tensor):
            continue
        if isinstance(each, Mapping):
            waiting += reversed(list(each.values()))
        elif isinstance(each, list | tuple | set | frozenset):
            waiting += reversed(list(each))
        elif isinstance(own := getattr(each, "__dict__", None), dict):
            waiting.append(own)
    return found


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, each of its modules afterwards as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def running(model: nn.Module, training: bool, seed: int) -> Iterator[None]:
    """A model in a mode, with random numbers from a seed; afterwards all is as it was, generators
    too.
    """
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with preserved(model), torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            torch.cuda.default_generators[device].manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # what models draw from
        for module in model.modules():
            module.training = training
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])  # noqa: NPY002


def fill_caches(
    model: nn.Module, inputs: tuple[Any, Any], training: bool = False, seed: int = 0
) -> None:
    """Run a model as it is, so that what it, or what it calls, computes once and keeps is real, not
    traced.
    """
    held = [each for each in reachable(model) if isinstance(each, Tensor)]
    with (
        running(model, training, seed),
        torch.no_grad(),
        contextlib.suppress(Exception),
        Untouched(held),
    ):
        model(*inputs[0], **inputs[1])


def arguments(node: Node) -> tuple[Any, ...]:
    """Positional arguments of a node; torch.fx types them too widely to read."""
    return node.args


def inputs(node: Node) -> list[Node]:
    """The nodes from whose values that of a node is computed; not those that lend their type or
    shape alone.
    """
    if operation(node) in LENT:
        return [arguments(node)[0]]
    return node.all_input_nodes


def operands(node: Node) -> list[Any]:
    """All arguments of a node, those in lists one by one; then those by name."""
    return list(_flat([node.args, list(node.kwargs.values())]))


def readers(node: Node) -> list[Node]:
    """The nodes that compute with the value of a node; not those that only look at its type or
    shape.
    """
    return [
        user
        for user in node.users
        if node in inputs(user) and operation(user) != "_assert_tensor_metadata"
    ]


def operation(node: Node) -> str:
    """Name of what a node does: ``linear``, ``view``; ``getitem``; empty for what is no call."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    return (
        str(node.target).split(".")[1]
        if isinstance(node.target, torch._ops.OpOverload)
        else str(node.target)
    )


@dataclass(frozen=True)
class LinearMap:
    """A node that applies a weight to the last axis of its input.

    Attributes:
        node, input: the operation, and the node that it reads.
        output: the node of what it gives: the operation, or the addition of the bias where that is
            one by itself.
        weight: name of the weight.
        rows: axis of the weight along which the outputs lie: 0, or 1 where the weight is stored as
            (in, out).
        bias: name of the bias where it is a parameter by itself, and the node of the bias whatever
            it is.
    """

    node: Node
    input: Node
    output: Node
    weight: str
    rows: int
    bias: str | None
    bias_node: Node | None


@dataclass(frozen=True)
class ExpertMap:
    """A node that applies to each entry of a batch one of several weights that are stacked in a
    parameter: the experts.

    Attributes:
        node: the operation.
        argument: which of its arguments it applies them to.
        weight: name of the parameter, of shape (experts, ...).
        rows, columns: axes of the weight along which outputs and inputs lie.
        slots: the node that says whose expert each entry of the batch is; None where the batch is
            that of the experts.
        inputs, outputs: axis of the argument along which the inputs of an entry lie, and of the
            value for its outputs; the batch is axis 0.
    """

    node: Node
    argument: int
    weight: str
    rows: int
    columns: int
    slots: Node | None
    inputs: int
    outputs: int

    def labels(self) -> Tensor:
        """Labels of the outputs, another one for each output of each entry of the batch."""
        return of_batch(value_of(self.node).shape, self.outputs)

    def reads(self, labels: Tensor, apart: bool) -> bool:
        """Whether labels of the argument are those of the inputs, one for one; ``apart``: with
        others for each entry of the batch, as :meth:`labels` has them.
        """
        if labels.ndim <= self.inputs:
            return False
        expected = of_batch(labels.shape, self.inputs)
        return torch.equal(labels, expected if apart else expected % labels.shape[self.inputs])


def of_batch(shape: Sequence[int], axis: int) -> Tensor:
    """Labels b · n + i of the index i, of n, along an axis, in the entry b of the batch."""
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    along = torch.arange(shape[axis]).view(sizes)
    sizes[0], sizes[axis] = shape[0], 1
    return (along + shape[axis] * torch.arange(shape[0]).view(sizes)).expand(tuple(shape))


@dataclass(frozen=True)
class Arrival:
    """Where a flow ends: at argument ``argument`` of ``node``, with the labels and the degree that
    it has there.
    """

    node: Node
    argument: int
    labels: Tensor
    degree: float


@dataclass
class Flow:
    """Where the scales of some units go: the ends, and what was on the way.

    Attributes:
        arrivals: the ends.
        activations: homogeneous functions that are not linear.
        gated: whether anything that follows from parameters was multiplied in.
        dropout: whether entries are dropped at random.
        factors: what was multiplied in, each with the labels of what it multiplies.
    """

    arrivals: list[Arrival]
    activations: set[str]
    gated: bool
    dropout: bool
    factors: list[tuple[Node, Tensor]] = field(default_factory=list)

    @property
    def uneven(self) -> bool:
        """Whether factors were multiplied in that may differ between units."""
        return self.varies(lambda labels: labels)

    def varies(self, units: Callable[[Tensor], Tensor]) -> bool:
        """Whether factors were multiplied in that may differ between units, which a function of
        their labels numbers.
        """
        return any(_varies_with(factor, units(labels)) for factor, labels in self.factors)


class Entering(NamedTuple):
    """How outputs of a linear map enter the heads of attention, without the many zeros: an output
    meets few heads.

    ``outputs`` and ``head``, (pairs,): which output meets which head, outputs ascending;
    ``blocks``, (pairs, positions, entries): as which entries of the head. ``heads`` and ``entries``
    say how many there are.
    """

    outputs: Tensor
    head: Tensor
    blocks: Tensor
    heads: int
    entries: int


class NoValue(Exception):
    """A value that is asked for follows from tensors on the meta device, which have none, from
    what is written to in place, or from random numbers.
    """


class Trace:
    """The graph of a model on example inputs.

    Args:
        model: in evaluation mode while it is traced; left as it was.
        args, kwargs: example inputs.

    Raises:
        ValueError: the model cannot be traced.
    """

    def __init__(
        self, model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> None:
        fill_caches(model, (tuple(args), dict(kwargs or {})))
        try:
            with running(model, training=False, seed=0), warnings.catch_warnings():
                # what is left on the model is seen by trying
                warnings.filterwarnings("ignore", "The tensor attribute")
                program = torch.export.export(model, tuple(args), dict(kwargs or {}), strict=False)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced by torch.export: {first_line(error)}"
            ) from error
        # the graph, and where each operation stands in it
        self.model = model
        self.graph = program.graph
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        # parameters by the placeholder that stands for them; shared ones by their first name
        signature = program.graph_signature
        first_name: dict[object, str] = {}
        named = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in named.items():
            first_name.setdefault(place_of(parameter) or id(parameter), plain_name(name))
        placeholders = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        self.parameters: dict[Node, str] = {
            placeholders[node]: first_name[place_of(named[name]) or id(named[name])]
            for node, name in signature.inputs_to_parameters.items()
        }
        self.tensors: dict[str, Tensor] = {
            plain_name(name): parameter for name, parameter in named.items()
        }
        # outputs, constants, and which parameters other tensors share their memory with
        self.inputs = {placeholders[n] for n in signature.user_inputs if n in placeholders}
        self.outputs = list(_output_nodes(self.graph))
        self._output_names = _output_names(program)
        self._constants = self._constant_values(program, placeholders, args, kwargs or {})
        self._module = program.graph_module
        others = [
            *model.buffers(),
            *program.constants.values(),
            *reachable(vars(program.graph_module)),
        ]
        self.shared = overlapping(named, [each for each in others if isinstance(each, Tensor)])

    def _constant_values(
        self,
        program: Any,
        placeholders: Mapping[str, Node],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> dict[Node, Any]:
        """Values of all placeholders."""
        signature = program.graph_signature
        values: dict[Node, Any] = {
            node: self.tensors[name] for node, name in self.parameters.items()
        }
        for node, name in signature.inputs_to_buffers.items():
            buffer = program.state_dict.get(name, program.constants.get(name))
            values[placeholders[node]] = with_values(self.model, name, buffer)
        for node, name in getattr(signature, "inputs_to_lifted_tensor_constants", {}).items():
            values[placeholders[node]] = program.constants[name]
        flat = tree_leaves((tuple(args), dict(kwargs)))
        for node, value in zip(signature.user_inputs, flat, strict=False):
            if isinstance(node, str) and node in placeholders and isinstance(value, Tensor):
                values[placeholders[node]] = value
        return values

    # ------------------------------------------------------------------------------------------
    # parameters

    def parameter(self, node: object) -> tuple[str, int] | None:
        """The parameter that a node is a view of, and how often it is transposed; None if it is
        none.
        """
        transposed = 0
        while isinstance(node, Node) and node.op == "call_function":
            name = operation(node)
            if name in ("t", "numpy_T", "mT", "transpose", "permute") and value_of(node).ndim == 2:
                transposed += _swaps(node)
            elif name not in ("alias", "detach", "contiguous", "to", "clone"):
                return None
            if not value_of(node).is_floating_point() and not value_of(node).is_complex():
                return None  # rounded to integers
            node = arguments(node)[0]
        if isinstance(node, Node) and node in self.parameters:
            return self.parameters[node], transposed
        return None

    @cached_property
    def uses(self) -> dict[str, list[Node]]:
        """By parameter, the nodes that compute with it."""
        found: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            if operation(node) == "_assert_tensor_metadata":
                continue
            if node.op in ("call_function", "output") and self.parameter(node) is None:
                for argument in inputs(node):
                    if (view := self.parameter(argument)) is not None:
                        found.setdefault(view[0], []).append(node)
        return found

    def used_once(self, name: str) -> bool:
        """Whether one operation alone computes with the parameter, and no other tensor has its
        values.
        """
        return len(self.uses.get(name, ())) == 1 and name not in self.shared

    @cached_property
    def tables(self) -> set[Node]:
        """Parameters that are no weights: tables that are not trained (:func:`frozen_tables`), of
        which rows are taken, of positions say, that neither inputs nor weights choose. What shares
        its memory with other tensors may change with them.
        """
        frozen = frozen_tables(self.model) - self.shared
        variable = self.inputs | self.parameters.keys()
        return {
            node
            for node, name in self.parameters.items()
            if name in frozen
            and (uses := self.uses.get(name))
            and all(self.ancestors(use) & variable == {node} for use in uses)
        }

    @cached_property
    def logits(self) -> Node:
        """The output that is called ``logits``, or the first."""
        return next(
            (node for node in self.outputs if self.output_name(node) == "logits"), self.outputs[0]
        )

    def output_name(self, node: Node) -> str:
        """The key of an output, of a model that gives its outputs by name; empty for others."""
        return self._output_names.get(node, "")

    @cached_property
    def convolutions(self) -> dict[str, Node]:
        """Convolutions that have no groups, by the name of their weight; one of several that share
        it.
        """
        found = {}
        for node in self.graph.nodes:
            if operation(node) not in CONVOLUTIONS or node.kwargs or not reads_a_batch(node):
                continue
            if arguments(node)[6:] in ((), (1,)):
                view = self.parameter(arguments(node)[1])
                if view is not None:
                    found[view[0]] = node
        return found

    @cached_property
    def linear_maps(self) -> dict[Node, LinearMap]:
        """All applications of a weight that is a parameter, in order."""
        maps = {}
        for node in self.graph.nodes:
            match operation(node), arguments(node):
                case "linear", (x, w, *rest):
                    bias, rows = (rest[0] if rest else None), 0
                case "addmm", (bias, x, w):
                    rows = 1
                case (("mm" | "matmul"), (x, w)):
                    bias, rows = None, 1
                case _:
                    continue
            if node.kwargs:  # addmm with a number of its own before the product or the bias
                continue
            # the weight must be a whole matrix that is a parameter, transposed or not
            view = self.parameter(w)
            if view is None or self.tensors[view[0]].ndim != 2:
                continue
            # a bias, of the operation itself or added after it; one number a row
            name, transposed = view
            output = node
            if bias is None and (added := self._added_bias(node)) is not None:
                output, bias = added
            rows = (rows + transposed) % 2
            of_bias = self.parameter(bias)
            if (
                of_bias is not None
                and self.tensors[of_bias[0]].shape != self.tensors[name].shape[rows : rows + 1]
            ):
                of_bias = None  # a matrix, or one number for all rows
            maps[node] = LinearMap(
                node, x, output, name, rows, of_bias[0] if of_bias else None, bias
            )
        return maps

    @cached_property
    def maps_by_output(self) -> dict[Node, LinearMap]:
        """The same by the node of what they give."""
        return {linear.output: linear for linear in self.linear_maps.values()}

    @cached_property
    def expert_maps(self) -> dict[Node, ExpertMap]:
        """All applications of stacked weights that are one parameter, in order."""
        maps = {}
        for node in self.graph.nodes:
            if node.kwargs or not has_fixed_shape(node):
                continue
            match operation(node), arguments(node):
                case "bmm", (a, b):
                    found = self._experts(node, a, 1, b) or self._experts(node, b, 0, a)
                case (("grouped_mm_fallback" | "_grouped_mm" | "grouped_mm"), (x, weight, slots)):
                    found = self._experts(node, weight, 0, x, slots)
                case _:
                    continue
            if found is not None and found.slots not in self.rewritten:
                maps[node] = found
        return maps

    @cached_property
    def experts_by_output(self) -> dict[Node, ExpertMap]:
        """The same by the node in which their outputs lie along the last axis."""
        found = {}
        for node, experts in self.expert_maps.items():
            users = readers(node)
            if experts.outputs == value_of(node).ndim - 1:
                found[node] = experts
            elif len(users) == 1 and operation(users[0]) in MOVES and has_fixed_shape(users[0]):
                after = apply(users[0], experts.labels())
                shape = value_of(node).shape
                if isinstance(after, Tensor) and after.shape == (shape[0], shape[experts.outputs]):
                    found[users[0]] = experts
        return found

    def _experts(
        self, node: Node, weight: Node, argument: int, x: Node, slots: Node | None = None
    ) -> ExpertMap | None:
        """What a product is, if this of its factors is stacked weights of a parameter and nothing
        else reads them on the way.
        """
        grouped, swapped = slots is not None, False
        while weight not in self.parameters:
            if len(readers(weight)) != 1 or not arguments(weight):
                return None
            match operation(weight), arguments(weight)[1:]:
                case "transpose", (first, second):
                    if {first % 3, second % 3} != {1, 2}:
                        return None
                    swapped = not swapped
                case "index", ([chosen],) if slots is None and value_of(chosen).ndim == 1:
                    slots = chosen
                case (("alias" | "detach" | "contiguous" | "to" | "clone"), _):
                    pass
                case _:
                    return None
            weight = arguments(weight)[0]
        name = self.parameters[weight]
        if self.tensors[name].ndim != 3 or value_of(x).shape[0] != value_of(node).shape[0]:
            return None
        # of a product of weights and inputs, (out, in) · (in, n), or of inputs and weights
        first = argument == 1
        inputs, outputs = (1, 1) if grouped or first else (2, 2)
        rows = 1 if first != swapped else 2
        return ExpertMap(node, argument, name, rows, 3 - rows, slots, inputs, outputs)

    def _added_bias(self, node: Node) -> tuple[Node, Node] | None:
        """The addition, and what it adds, where all that is done with a product is to add a
        parameter to its rows.
        """
        users = list(node.users)
        if len(users) != 1 or operation(users[0]) not in SUMS or len(arguments(users[0])) != 2:
            return None
        (add,) = users
        (bias,) = [each for each in arguments(add) if each is not node] or [None]
        view = self.parameter(bias)
        if view is None or self.tensors[view[0]].shape != value_of(node).shape[-1:] or add.kwargs:
            return None
        return add, bias

    # ------------------------------------------------------------------------------------------
    # flow of scales

    def flow(self, sources: Mapping[Node, Tensor]) -> Flow:
        """Follow scales through the graph, from nodes whose entries are multiplied by c of their
        label.

        Args:
            sources: int64 labels of the shape of each node's value; entries with a label below 0
                are not scaled.

        Returns:
            The operations at which the flow ends: linear maps, attention, the output, and all that
                is not homogeneous.
        """
        # labels and degree of each node reached; operations wait in the order in which they run
        state: dict[Node, tuple[Any, float]] = {
            node: (labels, 1.0) for node, labels in sources.items()
        }
        flow = Flow([], set(), gated=False, dropout=False)
        waiting = sorted(
            {user for node in sources for user in readers(node)}, key=self.order.__getitem__
        )
        seen = set(waiting)
        while waiting:
            node = waiting.pop(0)
            ends = node in self.linear_maps or node in self.expert_maps
            after = None if ends else self._transfer(node, state, flow)
            if after is None:
                flow.arrivals += [
                    Arrival(node, i, *state[argument])
                    for i, argument in enumerate(_flat(arguments(node)))
                    if isinstance(argument, Node) and argument in state
                ]
                continue
            if isinstance(after[0], Tensor) and bool((after[0] < 0).all()):
                continue  # nothing in it is scaled
            state[node] = after
            fresh = [user for user in readers(node) if user not in seen]
            seen.update(fresh)
            waiting = sorted([*waiting, *fresh], key=self.order.__getitem__)
        return flow

    def _transfer(
        self, node: Node, state: Mapping[Node, tuple[Any, float]], flow: Flow
    ) -> tuple[Any, float] | None:
        """Labels and degree of a node's value; None where the flow ends."""
        name, args = operation(node), arguments(node)
        scaled = [each for each in inputs(node) if each in state]
        if not has_fixed_shape(node):
            return None
        # of several values
        # (a term that a sum is written to scales as the sum does, if both of its terms do)
        if name in ("mul", "div", "add", "add_", "sub") and len(args) == 2 and not node.kwargs:
            return self._combine(node, state, flow)
        if name in ("cat", "stack") and set(scaled) == set(args[0]):
            degrees = {state[each][1] for each in scaled}
            return (
                (apply(node, [state[each][0] for each in args[0]]), degrees.pop())
                if len(degrees) == 1
                else None
            )
        # of one value, as the first argument
        if scaled != [args[0]]:
            return None
        labels, degree = state[args[0]]
        if isinstance(value := node.meta.get("val"), Tensor) and not value.is_floating_point():
            return None  # rounded to integers
        if name == "getitem":
            return labels[args[1]], degree
        if name == "index":
            moved = self._indexed(node, labels)
            return None if moved is None else (moved, degree)
        # moved, kept, or taken to a power
        if name in MOVES and len(inputs(node)) > 1:
            return None  # where to, other values say
        if name in MOVES:
            return apply(node, labels), degree
        if name in KEEPS or name == "neg":
            flow.dropout |= name == "dropout" and args[1] > 0
            return labels, degree
        if name in HOMOGENEOUS:
            flow.activations.add(name.rstrip("_"))
            return labels, degree
        if name == "square" or (name == "pow" and isinstance(args[1], int | float) and args[1] > 0):
            flow.activations.add("pow")
            return labels, degree * (2 if name == "square" else args[1])
        if name in POOLS:
            shape = value_of(node).shape
            over_places = len(shape) == labels.ndim == int(name[-2]) + 2  # of a batch
            channels = labels.flatten(2)[:, :, :1] if over_places else None
            if channels is None or not torch.equal(
                labels.flatten(2), channels.expand(labels.flatten(2).shape)
            ):
                return None
            return channels.view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape), degree
        # reduced over what has one label
        if name in ("mean", "sum") and len(args) > 1:
            keep = len(args) > 2 and bool(args[2])
            lows, highs = (
                extreme(labels, args[1], keepdim=keep) for extreme in (torch.amin, torch.amax)
            )
            return (lows, degree) if torch.equal(lows, highs) else None
        return None

    def _indexed(self, node: Node, labels: Tensor) -> Tensor | None:
        """Labels of chosen entries: of any, where neither input nor parameters choose; else of
        whole vectors, wherever they go.
        """
        chosen = arguments(node)[1]
        origins = {each for i in chosen if i is not None for each in self.ancestors(i)}
        if not origins & (self.inputs | self.parameters.keys()):
            with contextlib.suppress(NoValue):
                indices = [None if i is None else self.value(i, {}).cpu() for i in chosen]
                return torch.ops.aten.index.Tensor(labels, indices)
        along = last_axis(labels)
        whole = along is not None and len(chosen) < labels.ndim
        return along.expand(value_of(node).shape) if along is not None and whole else None

    def _combine(
        self, node: Node, state: Mapping[Node, tuple[Any, float]], flow: Flow
    ) -> tuple[Any, float] | None:
        """Labels and degree of a product, quotient, sum or difference of two values."""
        name, (a, b) = operation(node), arguments(node)
        shape = value_of(node).shape
        # both are scaled: a product adds degrees, a sum needs equal ones
        if a in state and b in state:
            (labels, p), (others, q) = state[a], state[b]
            if name == "div" or (name != "mul" and p != q) or not torch.equal(labels, others):
                return None
            if name == "mul":
                flow.activations.add("mul")
            return labels, p + q if name == "mul" else p
        # one is scaled, and the other must not be a scale that is a parameter
        scaled, other = (a, b) if a in state else (b, a)
        if name in ("add", "add_", "sub") or (name == "div" and scaled is b):
            return None
        if isinstance(other, Node) and self.parameter(other) is not None:
            return None  # a scale of its own
        labels = state[scaled][0].broadcast_to(shape)
        if isinstance(other, Node):
            flow.gated |= self.depends_on_parameters(other)
            flow.factors.append((other, labels))
        return labels, state[scaled][1]

    def device_of(self, source: LinearMap | Node) -> torch.device:
        """Where to compute with the outputs of a linear map, or of another node; the CPU for what
        has no values.
        """
        if isinstance(source, Node):
            return computing_device(value_of(source).device)
        return computing_device(self.tensors[source.weight].device)

    @torch.no_grad()
    def leak(
        self, source: LinearMap | Node, rows: Sequence[int], target: Node, argument: int
    ) -> Node | None:
        """An operation other than ``target``, at this argument alone, that reads these outputs of a
        linear map, if any.

        Where outputs go is told by changing them: what is only moved, and does not change, does not
        hold them.
        """
        # outputs of the linear map at random, and the same but for these rows
        start = source if isinstance(source, Node) else source.output
        on_the_way = self.ancestors(operands(target)[argument], [start])
        generator = torch.Generator().manual_seed(0)
        shape = value_of(start).shape
        outputs = torch.randn(shape, generator=generator, dtype=torch.float64).to(
            self.device_of(source)
        )
        moved = outputs.clone()
        moved[..., list(rows)] += 1
        before: dict[Node, Any] = {start: outputs}
        after: dict[Node, Any] = {start: moved}

        def changes(node: Node) -> bool:
            try:
                with InDouble():
                    values = (tree_leaves(self.value(node, each)) for each in (before, after))
                    return not all(torch.equal(a, b) for a, b in zip(*values, strict=True))
            except NoValue:
                return True

        # along what differs; whatever reads that, and is not on the way to the target, is a leak
        waiting = [start]
        while waiting:
            node = waiting.pop()
            for user in readers(node):
                if user is target:
                    taken = [i for i, each in enumerate(operands(user)) if each is node]
                    if taken != [argument]:
                        return user
                elif user in on_the_way or operation(user) in MOVES | KEEPS | {"getitem", "index"}:
                    if changes(user):
                        waiting.append(user)
                else:
                    return user
        return None

    def depends_on_parameters(self, node: Node) -> bool:
        """Whether parameters decide the value of a node."""
        return any(each in self.parameters for each in self.ancestors(node))

    def descendants(self, node: Node) -> set[Node]:
        """All that is computed from a node."""
        found: set[Node] = set()
        waiting = [node]
        while waiting:
            fresh = set(waiting.pop().users) - found
            found |= fresh
            waiting += fresh
        return found

    def ancestors(self, node: Node, stop: Iterable[Node] = ()) -> set[Node]:
        """A node and all that it is computed from, up to ``stop``."""
        stop, found, waiting = set(stop), {node}, [node]
        while waiting:
            current = waiting.pop()
            if current in stop:
                continue
            for argument in inputs(current):
                if argument not in found:
                    found.add(argument)
                    waiting.append(argument)
        return found

    # ------------------------------------------------------------------------------------------
    # values

    def constant(self, node: Node) -> Any:
        """The value of a node that nothing is computed for: what the model holds, or is given."""
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self._module)
        return self._constants.get(node)

    @cached_property
    def rewritten(self) -> set[Node]:
        """Nodes whose value in the graph is not all that there is to it: what shares their memory
        is written to, and they, or other views of it, are read afterwards.
        """
        writes = [node for node in self.graph.nodes if _writes(node)]

        def bases(dropouts: Collection[Node]) -> dict[Node, Node]:
            base: dict[Node, Node] = {}
            for node in self.graph.nodes:
                base[node] = (
                    base[arguments(node)[0]] if _is_view(node) or node in dropouts else node
                )
            return base

        # dropout that drops nothing may give its argument, which a later write then changes
        dropouts = [node for node in self.graph.nodes if operation(node) == "dropout"]
        last: dict[Node, int] = {}
        base = bases(dropouts)
        for write in writes:
            last[base[write]] = self.order[write]
        base = bases({each for each in dropouts if self.order[each] < last.get(base[each], -1)})
        of_base: dict[Node, list[Node]] = {}
        for node in self.graph.nodes:
            of_base.setdefault(base[node], []).append(node)
        found: set[Node] = set()
        for write in writes:
            place, after = self.order[write], {write, *self.descendants(write)}
            sharing = [each for each in of_base[base[write]] if each not in after]
            if any(
                self.order[user] > place and operation(user) != "_assert_tensor_metadata"
                for each in sharing
                for user in each.users
            ):
                found.update(of_base[base[write]])
        return found

    def value(self, node: Node, given: dict[Node, Any]) -> Any:
        """Compute the value of a node, on the example inputs, and keep it in ``given`` with all
        that it took.

        Args:
            node: what is asked for.
            given: values to start from, of any nodes.

        Raises:
            NoValue: it takes what is on the meta device, written to in place, or drawn at random.
        """
        for each in sorted(self.ancestors(node, given), key=self.order.__getitem__):
            if each in given:
                continue
            if each in self.rewritten:
                raise NoValue(f"{each.name} is written to in place")
            if _draws(each):
                raise NoValue(f"{each.name} is drawn at random")
            if each.op == "placeholder":
                given[each] = self._constants[each]
                if isinstance(given[each], Tensor) and given[each].is_meta:
                    raise NoValue(f"{each.name} is on the meta device and has no values")
            elif each.op == "get_attr":
                given[each] = self.constant(each)
            elif operation(each) in LENT:
                given[each] = apply(each, given[inputs(each)[0]])
            else:
                args, kwargs = torch.fx.node.map_arg(
                    (arguments(each), dict(each.kwargs)), given.__getitem__
                )
                args, kwargs = tree_map_only(torch.device, computing_device, (args, kwargs))
                if operation(each).endswith("_"):  # what was given is not to change
                    args = (args[0].clone(), *args[1:])
                if operation(each) in CONVOLUTIONS:  # one type, before a mode could see to it
                    kind = args[0].dtype
                    args = tuple(x.to(kind) if isinstance(x, Tensor) else x for x in args)
                given[each] = callable_of(each)(*args, **kwargs)
        return given[node]

    @torch.no_grad()
    def matrix(
        self, source: LinearMap | Node, target: Node, order: Sequence[int]
    ) -> Entering | None:
        """How the outputs of a linear map, the same at every position, enter attention; ``order``
        has the axes of ``target``: the batch (examples and heads, or both in one), positions,
        entries.

        Returns:
            In float64, of at most :data:`POSITIONS` positions of each example, evenly spread;
                None if an operation between the two is not linear, or depends on parameters.
                Examples that differ from the first count as positions too, for heads may lie among
                them.

        Raises:
            NoValue: a constant on the way is on the meta device.
        """
        # operations on the way must be linear; what they take from elsewhere is computed once
        start = source if isinstance(source, Node) else source.output
        between = self.ancestors(target, [start])
        on_the_way = self.descendants(start) & between
        moving = {start, *on_the_way}
        fixed: dict[Node, Any] = {}
        with InDouble():
            for node in on_the_way:
                if not _is_linear(node, moving):
                    return None
                for argument in inputs(node):
                    if argument not in moving:
                        if self.ancestors(argument) & self.parameters.keys() - self.tables:
                            return None
                        if operation(node) == "index" and self.ancestors(argument) & self.inputs:
                            return None  # where to, the input says
                        self.value(argument, fixed)
            # the passage of each unit vector, at some positions
            shape = value_of(start).shape
            heads, length, entries = (1, *(value_of(target).shape[axis] for axis in order))[-3:]
            positions = torch.linspace(0, length - 1, min(POSITIONS, length)).round().long()

            def enter(outputs: Tensor) -> Tensor:
                given = {**fixed, start: outputs.broadcast_to(shape)}
                value = torch.as_tensor(self.value(target, given))
                given.clear()  # of a wide model they are large
                value = value.permute(*order)
                value = value[(None,) * (3 - value.ndim)]  # one head, perhaps
                return value.reshape(-1, *value.shape[-3:])[:, :, positions]

            zero = torch.zeros(shape[-1], dtype=torch.float64, device=self.device_of(source))
            if enter(zero).any():
                return None  # a constant is added on the way
            parts = []
            at_once = max(1, AT_ONCE // value_of(start).numel())
            for outputs in torch.arange(shape[-1], device=zero.device).split(at_once):
                units = zero.expand(len(outputs), -1).scatter(1, outputs[:, None], 1.0)
                entered = torch.func.vmap(enter)(units).transpose(1, 2)
                # (outputs, heads, examples, positions, entries); of alike examples one says all
                if bool((entered == entered[:, :, :1]).all()):
                    entered = entered[:, :, :1]
                output, head = (entered != 0).flatten(2).any(2).nonzero().T
                parts.append((outputs[output], head, entered[output, head]))
            examples = max(blocks.shape[1] for *_, blocks in parts)
            output, head = (torch.cat([part[i] for part in parts]).cpu() for i in (0, 1))
            blocks = torch.cat([each.expand(-1, examples, -1, -1) for *_, each in parts]).cpu()
            return Entering(output, head, blocks.flatten(1, 2), heads, entries)


def overlapping(named: Mapping[str, Tensor], others: Sequence[Tensor]) -> set[str]:
    """Names of parameters whose values other tensors hold too, or other parameters in part."""
    spans: dict[object, list[tuple[int, int, object]]] = {}

    def span(tensor: Tensor) -> tuple[object, int, int] | None:
        if place_of(tensor) is None:
            return None
        extent = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        start, size = int(tensor.storage_offset()), tensor.element_size()
        return tensor.untyped_storage().data_ptr(), start * size, (start + extent) * size

    # the stretches of each storage, and whose they are
    parameters = {id(parameter) for parameter in named.values()}
    for tensor in [*named.values(), *others]:
        if (where := span(tensor)) is not None:
            owner: object = place_of(tensor) if id(tensor) in parameters else id(tensor)
            spans.setdefault(where[0], []).append((where[1], where[2], owner))
    # parameters that meet a stretch of another owner
    found = set()
    for name, parameter in named.items():
        if (where := span(parameter)) is None:
            continue
        for start, end, whose in spans[where[0]]:
            if whose != place_of(parameter) and start < where[2] and where[1] < end:
                found.add(plain_name(name))
    return found


def module_path(node: Node) -> str:
    """Name of the module in which a node is."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def callable_of(node: Node) -> Any:
    """What a node calls; a view is taken of any value, also where strides are others than in the
    model.
    """
    return (
        torch.ops.aten.reshape.default
        if node.target is torch.ops.aten.view.default
        else node.target
    )


def apply(node: Node, first: Any) -> Any:
    """What a node does, done to another first argument; its type is not lent."""
    if (name := operation(node)) in LENT:
        moved = LENT[name]
        return getattr(first, moved)(value_of(node).shape) if moved else first
    return callable_of(node)(first, *arguments(node)[1:], **node.kwargs)


def _varies_with(factor: Node, labels: Tensor) -> bool:
    """Whether a factor has different entries along an axis along which labels differ."""
    value = factor.meta.get("val")
    if not isinstance(value, Tensor):
        return value is None  # a number is the same for all
    sizes = [1] * (labels.ndim - value.ndim) + list(value.shape)
    return any(
        size > 1 and bool((labels.amin(axis) != labels.amax(axis)).any())
        for axis, size in enumerate(sizes)
    )


def _writes(node: Node) -> bool:
    """Whether an operation changes its first argument in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def number_of(node: Node) -> float | None:
    """The number, not zero, that a node multiplies its one input by; None of anything else."""
    match operation(node), arguments(node):
        case "mul", (Node(), int() | float() as number) if number and not node.kwargs:
            return float(number)
        case "mul", (int() | float() as number, Node()) if number and not node.kwargs:
            return float(number)
        case "div", (Node(), int() | float() as number) if number and not node.kwargs:
            return 1 / number
    return None


def drops(node: Node) -> bool:
    """Whether an operation drops entries at random in training."""
    return operation(node) == "dropout" and float(arguments(node)[1]) > 0


def _draws(node: Node) -> bool:
    """Whether an operation draws random numbers; dropout is told by its own."""
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.nondeterministic_seeded in tags and operation(node) not in (
        "dropout",
        "scaled_dot_product_attention",
    )


def _is_view(node: Node) -> bool:
    """Whether what a node gives may lie in the memory of its first argument."""
    if operation(node) == "getitem":  # one of several views, or one of several results
        return _is_view(arguments(node)[0])
    return isinstance(node.target, torch._ops.OpOverload) and any(
        each.alias_info is not None for each in node.target._schema.returns
    )


def _swaps(node: Node) -> bool:
    """Whether an operation exchanges the two axes of a matrix."""
    match operation(node), arguments(node):
        case "transpose", (_, a, b):
            return bool((a - b) % 2)
        case "permute", (_, dims):
            return bool(dims[0] % 2)
    return True


def _is_linear(node: Node, moving: Collection[Node]) -> bool:
    """Whether an operation is linear in those of its arguments that are among ``moving``."""
    name, args = operation(node), arguments(node)
    if name not in LINEAR_OPERATIONS or not value_of_any(node).is_floating_point():
        return False
    if name == "dropout":
        return not float(args[1]) > 0
    if name in ("mul", "div"):
        return [argument in moving for argument in args].count(True) == 1 and (
            name == "mul" or args[1] not in moving
        )
    return True


def _output_nodes(graph: torch.fx.Graph) -> Iterator[Node]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    for node in _flat(output.args):
        if isinstance(node, Node):
            yield node


def _output_names(program: Any) -> dict[Node, str]:
    """Keys of the outputs that a model gives by name."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    flat = list(output.args[0])[-len(program.graph_signature.user_outputs) :]
    given = tree_unflatten(flat, program.call_spec.out_spec)
    return (
        {node: key for key, node in given.items() if isinstance(node, Node)}
        if isinstance(given, Mapping)
        else {}
    )


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def value_of_any(node: Node) -> Tensor:
    """As :func:`value_of`; the first of several."""
    value = node.meta["val"]
    return value_of(node) if isinstance(value, Tensor) else value[0]


def value_of(node: Node) -> Tensor:
    """What the trace knows of a node's value: shape and type."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def has_fixed_shape(node: Node) -> bool:
    """Whether the shape of a node's value does not depend on other values, as that of a selection
    does.
    """
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or all(isinstance(size, int) for size in value.shape)


def labels_of(node: Node) -> Tensor:
    """Labels of a node whose units lie along the last axis."""
    shape = value_of(node).shape
    return torch.arange(shape[-1]).expand(shape)


def reads_a_batch(convolution: Node) -> bool:
    """Whether a convolution reads a batch, so that its channels lie along axis 1."""
    return value_of(convolution).ndim == value_of(arguments(convolution)[1]).ndim


def channels_of(node: Node) -> Tensor:
    """Labels of a node whose units lie along axis 1."""
    shape = value_of(node).shape
    return torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2)).expand(shape)


def last_axis(labels: Tensor) -> Tensor | None:
    """The labels along the last axis, if they are the same at all positions."""
    rows = labels.reshape(-1, labels.shape[-1])
    return rows[0] if bool((rows == rows[0]).all()) else None


#: An example of what a model takes: positional arguments, or keyword arguments.
Inputs = Sequence[Any] | Mapping[str, Any]


def traced(model: nn.Module, inputs: Inputs | None = None) -> Trace:
    """The trace of a model on ``inputs``, or on the example that its kind is known to take.

    Raises:
        ValueError: the model cannot be traced, or ``inputs`` are needed.
    """
    args, kwargs = example(model, inputs)
    return Trace(model, args, kwargs)


def constant_tables(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[str]:
    """Names of the parameters that are no weights (:attr:`Trace.tables`), on an example.

    Raises:
        ValueError: there are tables that may be some, and the model cannot be traced.
    """
    if not frozen_tables(model):
        return set()
    trace = Trace(model, args, kwargs)
    return {trace.parameters[node] for node in trace.tables}


def example(
    model: nn.Module, inputs: Inputs | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of ``inputs``, or of the example that the model's kind is
    known to take.

    Raises:
        ValueError: the model cannot be traced, or ``inputs`` are needed.
    """
    name, parameters = type(model).__name__, dict(model.named_parameters())
    if not parameters:
        raise ValueError(f"{name} has no parameters: there is nothing to condition")
    if any(map(is_split, parameters.values())):
        raise ValueError(
            "a model whose parameters are DTensors cannot be traced: find its gauges before"
            " fully_shard"
        )
    for key, parameter in parameters.items():
        if not parameter.is_floating_point() and not parameter.is_complex():
            raise ValueError(
                f"parameter {key!r} of {name} is {parameter.dtype}, quantised: gauges move weights"
                " continuously, so find them in the model before it is quantised"
            )
    if inputs is None:
        return example_inputs(model)
    if isinstance(inputs, Tensor):  # type: ignore[unreachable]  # which callers may not know
        raise ValueError(
            "Invalid inputs, a tensor: pass a tuple of what the model takes, inputs=(x,)"
        )
    if next(iter(parameters.values())).is_meta:  # and with them all that is computed
        inputs = tree_map_only(Tensor, lambda x: x.to("meta"), inputs)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    return args, _without_cache(model) | kwargs


def _without_cache(model: nn.Module) -> dict[str, Any]:
    """What tells a model of transformers, adapters of peft around it or not, to return no keys and
    values of a cache, which training does not use.
    """
    adapted: Any = getattr(model, "get_base_model", lambda: model)
    takes = "use_cache" in inspect.signature(adapted().forward).parameters
    return (
        {"use_cache": False}
        if takes and hasattr(getattr(model, "config", None), "use_cache")
        else {}
    )


def example_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Small inputs for the models whose inputs are known: transformers', timm's, torch's, our own.

    Raises:
        ValueError: any other model.
    """
    if callable(own := getattr(model, "example_inputs", None)):
        return tuple(own()), {}
    weight = next(model.parameters())

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)

    # transformers
    config, main_input = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if main_input == "pixel_values":
        size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        return (), {"pixel_values": random(2, channels, height, width)}
    if main_input == "input_ids":
        return (), {
            "input_ids": torch.arange(6, device=weight.device).view(2, 3),
            **_without_cache(model),
        }
    # timm
    if (patches := getattr(model, "patch_embed", None)) is not None and getattr(
        patches, "img_size", None
    ):
        return (random(2, weight_channels(patches), *patches.img_size),), {}
    # torch
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.TransformerEncoderLayer)
    ]
    if isinstance(model, nn.Sequential | nn.Linear) and layers and isinstance(layers[0], nn.Linear):
        return (random(2, layers[0].in_features),), {}
    if isinstance(model, nn.TransformerEncoder | nn.TransformerEncoderLayer):
        encoder, *_ = (layer for layer in layers if isinstance(layer, nn.TransformerEncoderLayer))
        return (random(2, 3, encoder.linear1.in_features),), {}
    raise ValueError(
        f"what a {type(model).__name__} takes is not known: pass an example, find_gauges(model,"
        " inputs=(x,)), or inputs={...} for keyword arguments"
    )


def weight_channels(patches: nn.Module) -> int:
    """Channels of the images that a patch embedding takes."""
    weight, *_ = (p for p in patches.parameters() if p.ndim > 1)
    return weight.shape[1]
