"""What a step reads and writes: parameters of equal role and shape, stacked over the layers of a
model.

Shapes: L layers, U units of a gauge. A stacked parameter is (L, *shape), a quantity per unit is
(L, U). Where parameters are split over ranks (:mod:`ddc.optim.sharding`), a stacked parameter is
this rank's part of it, and a quantity per unit is whole.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddc.gauges.base import UnitAxis, axes_of
from ddc.optim.averaging import Averaging
from ddc.optim.parameters import compute_dtype
from ddc.optim.plan import Role
from ddc.optim.rules import Rule
from ddc.optim.sharding import Whole, shards_of


def local_weights(params: Sequence[Tensor], shards: Whole) -> list[Tensor]:
    """The weights themselves, as far as they are on this rank."""
    return [shards.local(p) for p in params]


def local_grads(
    params: Sequence[Tensor], shards: Whole, grads: Mapping[Tensor, Tensor]
) -> list[Tensor]:
    """The same of their gradients, or of what ``grads`` has in their place; a missing one is
    zero.
    """
    # a compiler knows no tensors as keys; where a step is compiled as a whole there are none
    found = [grads.get(p, p.grad) if grads else p.grad for p in params]
    return [
        shards.local(torch.zeros_like(p) if grad is None else grad)
        for p, grad in zip(params, found, strict=True)
    ]


class Dressed(NamedTuple):
    """A :class:`ddc.optim.plan.Dressing` as a step finds it: the ``degree``-th power of the norms
    of a layer (or of one layer for each; None for all in order) of a stack, along ``axis``. The
    ``source`` is whatever puts these norms into the context of a step: a stack of a rescale, or
    frames.
    """

    source: Hashable
    layer: int | Tensor | None
    axis: int | tuple[int, ...]
    degree: float


@dataclass(eq=False)
class StackedParameter:
    """One role, played by the parameters of L layers, with their moments.

    ``moments`` is empty where there is nothing but a radial step (a gamma by itself).
    """

    role: Role
    names: list[str]
    params: list[Tensor]
    groups: list[int]
    rule: Rule
    dressed: Dressed | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)
    #: What :mod:`ddc.optim.fused` knows of it, from when it is first asked.
    fit: tuple[bool, bool, bool] | None = None
    kernels: Any = None

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.params[0])
        self.shards = shards_of(self.params[0])
        self.averaging = self.shards.averaging(self.role.averaging)
        #: not where it is split over ranks; nor where it is rounded to a lower precision, which
        #: compilers leave out
        self.compilable = (
            self.rule.compilable
            and self.shards.layout is None
            and self.params[0].dtype == self.dtype
        )

    def allocate(self) -> None:
        """Make the moments."""
        layers, device = len(self.params), self.params[0].device
        shape = (layers, *self.shards.local(self.params[0]).shape)
        reduced = shape if self.averaging is None else self.averaging.reduced_shape(shape)
        whole = shape[1:] if self.shards.layout is None else tuple(self.params[0].shape)
        shapes = {
            **dict.fromkeys(self.rule.moments, shape),
            **dict.fromkeys(self.rule.averaged, reduced),
            **{key: (layers, *each) for key, each in self.rule.others(whole).items()},
        }
        self.moments = {
            key: torch.zeros(each, dtype=self.dtype, device=device) for key, each in shapes.items()
        }
        if isinstance(self.averaging, Averaging) and self.averaging.regular is None:
            self.averaging.indices(device)

    def state(self, layer: int) -> dict[str, Tensor]:
        """Views of one layer's moments."""
        shape, averaging = self.params[0].shape, self.role.averaging
        reduced = shape if averaging is None else averaging.reduced_shape((1, *shape))[1:]
        shapes = dict.fromkeys(self.rule.moments, shape) | dict.fromkeys(
            self.rule.averaged, reduced
        )
        return {
            key: self.shards.state(value[layer], shapes[key]) if key in shapes else value[layer]
            for key, value in self.moments.items()
        }

    def pairs(
        self, rows: slice, grads: Mapping[Tensor, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Weights of these layers, and their gradients or what ``grads`` has in their place."""
        params = self.params[rows]
        return local_weights(params, self.shards), local_grads(params, self.shards, grads)

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of one tensor a layer, stacked, in the dtype of the arithmetic."""
        return torch.stack(list(tensors)).to(self.dtype)

    def read(self, layers: Layers) -> Tensor:
        """A copy of the weights, stacked: what steps of them."""
        weights = self.stack(layers.weights)
        return weights + self.role.offset if self.role.offset else weights

    def write(self, layers: Layers, stacked: Tensor) -> None:
        """The inverse of :meth:`read`: copy what has stepped into the weights."""
        layers.write(stacked - self.role.offset if self.role.offset else stacked)

    def centre(self, stacked: Tensor) -> Tensor:
        """Take the mean over the rows (the vocabulary) from a stacked tensor."""
        return stacked - self.shards.row_mean(stacked)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kernels": None, "fit": None}

    # ---- units: the whole parameter, the indices of one axis or of several, or the heads along it

    @property
    def units(self) -> int:
        """Units of one layer."""
        return self.role.heads or self._count(self.role.axis)

    def _count(self, axis: UnitAxis) -> int:
        """Number of units along axes."""
        count = 1  # in a loop, which compilers take
        for each in axes_of(axis):
            count *= self.params[0].shape[each]
        return count

    @property
    def unit_size(self) -> int:
        """Entries that one unit has in this parameter."""
        return self.params[0].numel() // self.units

    @property
    def fan_in(self) -> int:
        """Inputs of one output of the matrix, of stacked experts, or of the convolution."""
        shape, axes = self.params[0].shape, axes_of(self.role.axis)
        experts = len(shape) == 3 and (len(axes) > 1 or axes == (2,))
        return shape[-1] if experts else shape[1:].numel()

    def spread(self, per_unit: Tensor) -> Tensor:
        """Shape (L, U) to what broadcasts against the stacked parameter."""
        axis = self.role.axis
        if self.role.heads:
            size = self._count(axis) // self.role.heads
            per_unit = per_unit.unsqueeze(2).expand(-1, -1, size).flatten(1)
        return self.along(per_unit, axis)

    def along(self, values: Tensor, axis: UnitAxis) -> Tensor:
        """Values along axes of the parameter, (L, units), as far as they are on this rank, to what
        broadcasts against it.
        """
        axes, shape = axes_of(axis), self.params[0].shape
        if len(axes) > 1:
            values = values.unflatten(1, [shape[each] for each in axes])
        for dim, each in enumerate(axes):
            values = self.shards.part(values, 1 + dim, each)
        sizes = iter(values.shape[1:])
        return values.view(
            -1, *(next(sizes) if each in axes else 1 for each in range(self.params[0].ndim))
        )

    def unit_sum(self, stacked: Tensor) -> Tensor:
        """Sum over the entries of each unit, (L, U), as far as they are on this rank."""
        axes = axes_of(self.role.axis)
        if not axes:
            return stacked.flatten(1).sum(1, keepdim=True)
        others = [dim for dim in range(1, stacked.ndim) if dim - 1 not in axes]
        sums = stacked.sum(others) if others else stacked
        for dim, each in enumerate(axes):
            sums = self.shards.placed(sums, 1 + dim, each)
        sums = sums.flatten(1)
        return sums.unflatten(1, (self.role.heads, -1)).sum(2) if self.role.heads else sums

    def factor(self, norm: Tensor | None) -> Tensor | None:
        """What norms (L, U) that dress this parameter multiply it by."""
        if norm is None:
            return None
        assert self.dressed is not None
        degree = self.dressed.degree
        return self.along(norm if degree == 1 else norm**degree, self.dressed.axis)

    # ---- what a rule sees of it

    def on_whole(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function of whole matrices, (B, rows, columns), of a stacked one: of each head, of each
        of stacked experts, and of all ranks' parts together.
        """
        axis, heads = self.role.axis, self.role.heads

        def by_heads(matrices: Tensor) -> Tensor:
            if matrices.ndim > 3:  # experts
                return function(matrices.flatten(0, -3)).view(matrices.shape)
            if not heads or not isinstance(axis, int):
                return function(matrices)
            apart = matrices.unflatten(1 + axis, (heads, -1)).movedim(1 + axis, 1)
            done = function(apart.flatten(0, 1)).unflatten(0, (-1, heads))
            return done.movedim(1, 1 + axis).flatten(1 + axis, 2 + axis)

        return self.shards.on_whole(by_heads, x)

    def gathered(self, x: Tensor) -> Tensor:
        """All of a stacked tensor, on every rank."""
        return self.shards.all_of(x)

    def part(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`gathered`."""
        return self.shards.mine_of(x)


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

    ``moments`` are the rule's; ``before`` and ``after`` the norms that dress the parameter, before
    and after they have moved, ``relaxed`` what they were multiplied by by a frame that has relaxed,
    each (L, U); ``decay`` the factor of decoupled weight decay; ``fused`` whether kernels may step
    them.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    moments: dict[str, Tensor]
    before: Tensor | None
    after: Tensor | None
    relaxed: Tensor | None
    decay: float | Tensor
    fused: bool = False

    def write(self, stacked: Tensor) -> None:
        """Copy stacked weights into the layers'."""
        torch._foreach_copy_(self.weights, stacked.unbind())


class Pairs(NamedTuple):
    """Weights and gradients of some layers, the factor of decoupled weight decay, and whether
    kernels may go over them.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    decay: float | Tensor
    fused: bool
