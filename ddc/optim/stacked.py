"""What a step reads and writes: parameters of equal role and shape, stacked over the layers of a
model.

Shapes as in :mod:`ddc.optim.stacks`. Here is Adam too, and what the stacks of one step share.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ddc.compatibility import OWN_COMPILE_CACHE
from ddc.optim.averaging import Averaging
from ddc.optim.plan import Role, compute_dtype
from ddc.optim.sharding import CutAveraging, Whole, shards_of

if TYPE_CHECKING:
    from ddc.optim.hidden import HiddenStack

log = logging.getLogger(__name__)

Group = dict[str, Any]
#: A hyperparameter: where a step is compiled a tensor of one element in float64, so that it may
#: change.
Number = float | Tensor
Betas = tuple[Number, Number]
#: Hyperparameters in which all parameters under one gauge must agree; weight decay is each one's
#: own.
SHARED = ("lr", "betas", "eps", "radial_rate", "vertical", "step_scale", "retract", "additive")


class Bias(NamedTuple):
    """Adam's bias corrections 1 - beta1^t and √(1 - beta2^t), each (L,)."""

    first: Tensor
    root_second: Tensor

    @property
    def ratio(self) -> Tensor:
        """√(1 - beta2^t) / (1 - beta1^t)."""
        return self.root_second / self.first

    @classmethod
    def at(cls, step: Tensor, betas: Betas, dtype: torch.dtype) -> Bias:
        """At these step counts; through expm1, which does not cancel where beta^t is near 1."""
        first, second = (cls._correction(step.to(dtype), beta) for beta in betas)
        return cls(first, second.sqrt())

    @staticmethod
    def _correction(step: Tensor, beta: Number) -> Tensor:
        if isinstance(beta, Tensor):
            return (step * beta.log()).expm1().neg()
        return (step * math.log(beta)).expm1().neg() if beta else torch.ones_like(step)


def adam_(
    x: Tensor,
    moments: tuple[Tensor, Tensor],
    bias: Bias,
    betas: Betas,
    eps: Number,
    averaging: Averaging | CutAveraging | None = None,
) -> Tensor:
    """Take x into the moments in place and return Adam's direction but for a factor of √(1 -
    beta2^t) / (1 - beta1^t).

    That factor, one number a layer, is left to the caller to fold into its own. Source: Kingma and
    Ba, arXiv:1412.6980, algorithm 1 and the note after it.
    """
    exp_avg, exp_avg_sq = moments
    approach_(exp_avg, x, 1 - betas[0])
    if isinstance(betas[1], Tensor):
        square = x.square() if averaging is None else averaging.mean(x.square())
        exp_avg_sq.mul_(betas[1]).add_(square * (1 - betas[1]))
    elif averaging is None:
        exp_avg_sq.mul_(betas[1]).addcmul_(x, x, value=1 - betas[1])
    else:
        # no lerp_, which makes nan of what has overflowed to inf
        exp_avg_sq.mul_(betas[1]).add_(averaging.mean(x.square()), alpha=1 - betas[1])
    denominator = exp_avg_sq.sqrt().add_(per_layer(eps * bias.root_second, x))
    if averaging is None:
        return torch.div(exp_avg, denominator, out=denominator)
    return averaging.divide(exp_avg, denominator)


def approach_(x: Tensor, end: Tensor, weight: Number) -> Tensor:
    """``x.lerp_(end, weight)``, for a weight that is a tensor of one element as well, whatever its
    dtype and device.
    """
    return x.lerp_(end, weight.to(x) if isinstance(weight, Tensor) else weight)


def per_layer(values: Tensor, like: Tensor) -> Tensor:
    """Shape (L,) to what broadcasts against a stacked tensor."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def local_weights(params: Sequence[Tensor], shards: Whole) -> list[Tensor]:
    """The weights themselves, as far as they are on this rank."""
    return [shards.local(p) for p in params]


def local_grads(params: Sequence[Tensor], shards: Whole) -> list[Tensor]:
    """The same of their gradients; a missing one is zero."""
    return [shards.local(torch.zeros_like(p) if p.grad is None else p.grad) for p in params]


def stack_layers(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A copy of one tensor a layer, stacked, in the dtype of the arithmetic."""
    return torch.stack(list(tensors)).to(dtype)


def is_compilable(param: Tensor) -> bool:
    """Not where it is split over ranks; nor where it is rounded to a lower precision, which
    compilers leave out.
    """
    return shards_of(param).layout is None and param.dtype == compute_dtype(param)


#: What puts norms into :class:`Context`: a stack of polar or of inner gauges.
Dresser = Hashable


@dataclass(eq=False)
class StackedParameter:
    """One role, played by the parameters of L layers, with their moments.

    ``exp_avg`` is None where there is nothing but a radial step (a gamma by itself).
    """

    role: Role
    names: list[str]
    params: list[Tensor]
    groups: list[int]
    dressed_by: tuple[Dresser, Tensor | None] | None = None
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.params[0])
        self.shards = shards_of(self.params[0])
        self.averaging = self.shards.averaging(self.role.averaging)
        self.compilable = is_compilable(self.params[0])

    def allocate(self) -> None:
        """Make the moments."""
        shape = (len(self.params), *self.shards.local(self.params[0]).shape)
        reduced = shape if self.averaging is None else self.averaging.reduced_shape(shape)
        device = self.params[0].device
        self.exp_avg = torch.zeros(shape, dtype=self.dtype, device=device)
        self.exp_avg_sq = torch.zeros(reduced, dtype=self.dtype, device=device)
        if isinstance(self.averaging, Averaging) and self.averaging.regular is None:
            self.averaging.indices(device)

    def state(self, layer: int) -> dict[str, Tensor]:
        """Views of one layer's moments."""
        if self.exp_avg is None or self.exp_avg_sq is None:
            return {}
        shape = self.params[0].shape
        reduced = (
            shape
            if self.role.averaging is None
            else self.role.averaging.reduced_shape((1, *shape))[1:]
        )
        return {
            "exp_avg": self.shards.state(self.exp_avg[layer], shape),
            "exp_avg_sq": self.shards.state(self.exp_avg_sq[layer], reduced),
        }

    def pairs(self, rows: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and gradients of these layers."""
        return local_weights(self.params[rows], self.shards), local_grads(
            self.params[rows], self.shards
        )

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """As :func:`stack_layers`."""
        return stack_layers(tensors, self.dtype)

    def gather(self, rows: slice, context: Context) -> Layers:
        """What a step reads of these layers, and where it writes."""
        before = after = relaxed = None
        if self.dressed_by is not None:
            stack, layers = self.dressed_by
            mine = rows if layers is None else layers[rows]
            before, after = (norm[mine] for norm in context.norms[stack])
            relaxed = context.relaxed[stack][mine] if stack in context.relaxed else None
        moments = None
        if self.exp_avg is not None and self.exp_avg_sq is not None:
            moments = self.exp_avg[rows], self.exp_avg_sq[rows]
        decay = context.decay(self)
        return Layers(*self.pairs(rows), moments, before, after, relaxed, decay)

    def centre(self, stacked: Tensor) -> Tensor:
        """Take the mean over the rows (the vocabulary) from a stacked tensor."""
        return stacked - self.shards.row_mean(stacked)

    def spread(self, per_unit: Tensor) -> Tensor:
        """Shape (L, U) to what broadcasts against the stacked parameter."""
        if self.role.axis is None:
            return per_layer(per_unit, self.params[0].unsqueeze(0))
        per_unit = self.shards.part(per_unit, 1, self.role.axis)
        if self.params[0].ndim == 1:
            return per_unit
        return per_unit.unsqueeze(2 if self.role.axis == 0 else 1)

    def unit_sum(self, stacked: Tensor) -> Tensor:
        """Sum over the entries of each unit, (L, U), as far as they are on this rank."""
        if self.role.axis is None:
            return stacked.flatten(1).sum(1, keepdim=True)
        sums = stacked if stacked.ndim == 2 else stacked.sum(2 if self.role.axis == 0 else 1)
        return self.shards.placed(sums, 1, self.role.axis)

    def factor(self, norm: Tensor | None) -> Tensor | None:
        """What norms (L, U) that dress this parameter multiply it by."""
        if norm is None:
            return None
        assert self.role.dressing is not None
        factor = norm if self.role.dressing.degree == 1 else norm**self.role.dressing.degree
        factor = self.shards.part(factor, 1, self.role.dressing.axis)
        if self.params[0].ndim == 1:
            return factor
        return factor.unsqueeze(2 if self.role.dressing.axis == 0 else 1)

    @property
    def units(self) -> int:
        """Units of one layer."""
        return 1 if self.role.axis is None else self.params[0].shape[self.role.axis]

    @property
    def unit_size(self) -> int:
        """Entries that one unit has in this parameter."""
        return self.params[0].numel() // self.units


#: A per-unit sum of one parameter, the i-th of those that hold a side:
#: :meth:`StackedParameter.unit_sum` of something.
Term = Callable[[StackedParameter, int], Tensor]


def unit_sums(parameters: Sequence[StackedParameter], *terms: Term) -> Sequence[Tensor]:
    """Each term summed over the parameters, and over all ranks that have parts of them, (L, U)."""
    sums = (
        functools.reduce(operator.add, (term(p, i) for i, p in enumerate(parameters)))
        for term in terms
    )
    return parameters[0].shards.reduced(*sums)


class Layers(NamedTuple):
    """What a step reads of a stacked parameter: of each layer the weights, which it writes too, and
    the gradients.

    ``moments`` are (L, *shape), or as averaging leaves them; ``before`` and ``after`` the norms
    that dress the parameter, before and after they have moved, ``relaxed`` what they were
    multiplied by by a frame that has relaxed, each (L, U); ``decay`` the factor of decoupled weight
    decay.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    moments: tuple[Tensor, Tensor] | None
    before: Tensor | None
    after: Tensor | None
    relaxed: Tensor | None
    decay: float | Tensor

    def write(self, stacked: Tensor) -> None:
        """Copy stacked weights into the layers'."""
        torch._foreach_copy_(self.weights, stacked.unbind())


def scaled(x: Tensor, factor: Tensor | float) -> Tensor:
    """The product, in place of x, which must be a copy of one's own; a compiler knows itself where
    to put it.
    """
    return x * factor if torch.compiler.is_compiling() else x.mul_(factor)


#: On a CPU, temporaries of more than a few megabytes leave the cache, and their pages are asked of
#: the system and cleared anew at every step, which costs many times the arithmetic: as many layers
#: at once as fit this.
CPU_CHUNK = 2**20


def layers_at_once(layers: int, layer_size: int, device: torch.device) -> int:
    """How many layers a step takes at once: all on an accelerator; on a CPU as many as fit, in
    equal chunks.
    """
    at_once = layers
    if device.type == "cpu":
        while at_once > 1 and (
            at_once * layer_size > CPU_CHUNK or layers % at_once
        ):  # equal chunks compile once
            at_once -= 1
    return at_once


class Rates(NamedTuple):
    """Rates of a param group: tensors where a step is compiled, which so holds for all."""

    lr: Number
    decay: Number

    @classmethod
    def of(cls, group: Group, compiled: bool) -> Rates:
        """Learning rate, and the factor of decoupled weight decay."""
        rates = group["lr"], 1 - group["lr"] * group["weight_decay"]
        return cls(*map(as_tensors, rates) if compiled else rates)


def as_tensors(value: Any) -> Any:
    """Numbers as tensors in float64, whose values a compiled step does not know; names and switches
    as they are.
    """
    if isinstance(value, tuple | list):
        return tuple(map(as_tensors, value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return torch.tensor(value, dtype=torch.float64) if number else value


@dataclass
class Context:
    """What the stacks of one step share: the param groups, and the norms that dress.

    ``norms`` holds, for each stack that has moved, the norms of its plus sides before and after,
    both (L, U); ``relaxed``, for each frame of hidden matrices that has relaxed, what its plus side
    was multiplied by, (L, U). ``log_forward``, ``log_backward`` and ``log_frames`` are, for each
    stack of frames, the logarithms of f, b and the frame that :class:`ddc.optim.hidden.FrameStack`
    defines, (G, U). With ``compiled``, each stack compiles a function of its own.
    """

    groups: list[Group]
    rates: list[Rates]
    compiled: bool = False
    norms: dict[Dresser, tuple[Tensor, Tensor]] = field(default_factory=dict)
    relaxed: dict[Dresser, Tensor] = field(default_factory=dict)
    log_forward: dict[Dresser, Tensor] = field(default_factory=dict)
    log_backward: dict[Dresser, Tensor] = field(default_factory=dict)
    log_frames: dict[Dresser, Tensor] = field(default_factory=dict)

    def hyper(self, parameter: StackedParameter) -> Hyper:
        """The hyperparameters of a parameter's group."""
        index = parameter.groups[0]
        return Hyper(self.rates[index].lr, *(self.groups[index][key] for key in Hyper._fields[1:]))

    def decay(self, parameter: StackedParameter) -> float | Tensor:
        """The factor of decoupled weight decay."""
        return self.rates[parameter.groups[0]].decay

    def compiles(self, parameter: StackedParameter | HiddenStack) -> bool:
        """Whether the arithmetic on a parameter is compiled."""
        return self.compiled and parameter.compilable

    def chunks(self, has_gradient: Sequence[bool], at_once: int) -> list[slice]:
        """Slices of the layers that have a gradient, each to be taken at once."""
        slices, start = [], 0
        for has, run in itertools.groupby(has_gradient):
            stop = start + len(list(run))
            if has:
                slices += [slice(i, min(i + at_once, stop)) for i in range(start, stop, at_once)]
            start = stop
        return slices


class Hyper(NamedTuple):
    """Hyperparameters of one step of a stack."""

    lr: Number
    betas: Betas
    eps: Number
    radial_rate: Number
    vertical: str
    step_scale: str
    retract: bool
    additive: bool


#: For a CPU, inductor fuses loops over rows with loops over columns, and works out what there is
#: one of per unit once per entry. Here it does less of both.
CPU_OPTIONS: dict[str, Any] = {"cpp.max_horizontal_fusion_size": 2, "realize_opcount_threshold": 6}


class Arithmetic:
    """A function of stacks and tensors, compiled when asked for; there is one of it for what it is
    compiled for.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device = function, device
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, compiled: bool, *arguments: Any) -> Any:
        if not compiled:
            return self.function(*arguments)
        # takes two seconds to import, and is here once a step is compiled
        from torch._dynamo.exc import FailOnRecompileLimitHit

        if self.compiled is None:
            options = CPU_OPTIONS if self.device.type == "cpu" else {}
            self.compiled = torch.compile(
                self.function,
                fullgraph=True,
                dynamic=False,
                options=options,
                **OWN_COMPILE_CACHE,
            )
        try:
            return self.compiled(*arguments)
        except FailOnRecompileLimitHit:
            log.warning(
                "a compiled step was compiled anew too often, and goes on uncompiled: numbers, such"
                " as learning rates and betas, may change from step to step, but not names and"
                " switches, such as vertical and retract"
            )
            self.compiled = self.function
            return self.function(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "compiled": None}


def safe_power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for a negative exponent; 0 where x is 0, or so near to it that this would not be a
    finite number.
    """
    limits = torch.finfo(x.dtype)
    smallest = max(limits.tiny, limits.max ** (1 / exponent))
    return torch.where(x >= smallest, x.reciprocal() if exponent == -1 else x.pow(exponent), 0.0)
