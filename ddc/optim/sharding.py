"""Parameters of which each rank holds a part: DTensors, as ``torch.distributed.fsdp.fully_shard``
makes them.

The arithmetic of a step is elementwise but for sums: over the entries of a unit, over a vocabulary,
over the indices that a rotation turns. Each rank computes on its part, sums what it has of each
unit, and one all-reduce makes the sums whole. Whatever there is one of per unit (norms, their
gradients, modes) is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ddc.gauges import is_split, whole
from ddc.optim.averaging import Averaging

# takes two seconds to import, so each function that needs it imports it: whoever calls them has
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


class Whole:
    """A parameter that is whole on this rank. Every method does nothing: :class:`Shards` says what
    it is for.
    """

    #: What is equal for parameters that can share one stacked tensor, and for those that can share
    #: sums.
    layout: object = None
    group: object = None

    def local(self, tensor: Tensor) -> Tensor:
        return tensor

    def part(self, values: Tensor, dim: int, axis: int) -> Tensor:
        return values

    def placed(self, values: Tensor, dim: int, axis: int) -> Tensor:
        return values

    def reduced(self, *sums: Tensor) -> Sequence[Tensor]:
        return sums

    def row_mean(self, stacked: Tensor) -> Tensor:
        return stacked.mean(1, keepdim=True)

    def averaging(self, averaging: Averaging | None) -> Averaging | CutAveraging | None:
        return averaging

    def state(self, local: Tensor, shape: Sequence[int]) -> Tensor:
        return local

    def on_whole(self, function: Callable[[Tensor], Tensor], stacked: Tensor) -> Tensor:
        return function(stacked)

    def all_of(self, stacked: Tensor) -> Tensor:
        return stacked

    def mine_of(self, stacked: Tensor) -> Tensor:
        return stacked


class Pairs(Whole):
    """A complex parameter that is whole on this rank: pairs of real numbers, as to
    ``torch.optim.AdamW``.
    """

    def local(self, tensor: Tensor) -> Tensor:
        # a gradient may be a conjugated view, a weight may not
        return torch.view_as_real(tensor.resolve_conj())

    def state(self, local: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.view_as_complex(local)


class Shards(Whole):
    """A parameter that is split along one axis over the ranks of one dimension of a mesh, as
    ``torch.chunk`` splits.

    This rank holds ``start:stop`` of the axis, which may be nothing. Over the mesh's other
    dimensions it is replicated (hybrid sharding).

    Raises:
        ValueError: it is split along more than one dimension of its mesh, or in another way.
    """

    def __init__(self, param: DTensor) -> None:
        from torch.distributed.tensor import Shard

        self.mesh, self.placements, self.shape = param.device_mesh, param.placements, param.shape
        split = [
            (i, placement)
            for i, placement in enumerate(self.placements)
            if not placement.is_replicate()
        ]
        if len(split) != 1 or not isinstance(split[0][1], Shard):
            raise ValueError(
                f"a parameter of shape {tuple(self.shape)} has placements {self.placements}:"
                " expected one Shard, and Replicate over all other dimensions of the mesh, as"
                " fully_shard makes them"
            )
        self.mesh_dim, self.axis = split[0][0], split[0][1].dim
        self.group = self.mesh.get_group(self.mesh_dim)
        self.ranks, self.rank = (
            self.mesh.size(self.mesh_dim),
            self.mesh.get_local_rank(self.mesh_dim),
        )
        self.start, self.stop = chunk(self.shape[self.axis], self.ranks, self.rank)
        self.layout = self.mesh, self.placements

    def local(self, tensor: Tensor) -> Tensor:
        """Of a parameter or its gradient, the part that is on this rank."""
        return local_part(tensor)

    def part(self, values: Tensor, dim: int, axis: int) -> Tensor:
        """Of values along an axis of the parameter, which are dimension ``dim`` of a tensor, those
        that are here.
        """
        return (
            values.narrow(dim, self.start, self.stop - self.start) if axis == self.axis else values
        )

    def placed(self, values: Tensor, dim: int, axis: int) -> Tensor:
        """The inverse of :meth:`part`, with zeros for what is elsewhere."""
        if axis != self.axis:
            return values
        shape = list(values.shape)
        shape[dim] = self.shape[axis]
        placed = values.new_zeros(shape)
        placed.narrow(dim, self.start, self.stop - self.start).copy_(values)
        return placed

    def reduced(self, *sums: Tensor) -> Sequence[Tensor]:
        """Sums over all ranks, of tensors of one shape, in one collective."""
        together = torch.stack(sums)
        dist.all_reduce(together, group=self.group)
        return together.unbind()

    def row_mean(self, stacked: Tensor) -> Tensor:
        """Mean over the rows of a stacked tensor, (L, 1, ...)."""
        if self.axis != 0:
            return stacked.mean(1, keepdim=True)
        return self.reduced(stacked.sum(1, keepdim=True) / self.shape[0])[0]

    def averaging(self, averaging: Averaging | None) -> Averaging | CutAveraging | None:
        """What averages the parts of stacked second moments."""
        if averaging is None or averaging.dim - 1 != self.axis:
            return averaging
        if any(self._cuts(averaging, rank) for rank in range(self.ranks)):
            return CutAveraging(averaging, self)
        return averaging.part(self.start, self.stop)

    def _cuts(self, averaging: Averaging, rank: int) -> bool:
        """Whether a rank's indices are others than those of its share of the groups."""
        here = averaging.group_of[slice(*chunk(len(averaging.group_of), self.ranks, rank))]
        start, stop = chunk(averaging.groups, self.ranks, rank)
        mine = (averaging.group_of >= start) & (averaging.group_of < stop)
        return not (
            len(here) and len(here) == mine.sum() and bool(((here >= start) & (here < stop)).all())
        )

    def state(self, local: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of this shape, split like the parameter, of which ``local`` is this rank's part
        (and shared).
        """
        return self._assembled(local, self.placements, shape)

    def on_whole(self, function: Callable[[Tensor], Tensor], stacked: Tensor) -> Tensor:
        """A function of stacked whole tensors; each rank takes a share of the layers.

        Ranks exchange their parts so that each has whole layers, and exchange the results back.
        """
        shape = (stacked.shape[0], *self.shape)
        parts, layers = self._sharded(1 + self.axis), self._sharded(0)
        mine = self._assembled(stacked, parts, shape).redistribute(placements=layers).to_local()
        done = function(mine) if len(mine) else mine
        return self._assembled(done, layers, shape).redistribute(placements=parts).to_local()

    def all_of(self, stacked: Tensor) -> Tensor:
        """Whole stacked tensors, on every rank."""
        return self.gathered(stacked, 1 + self.axis, self.shape[self.axis])

    def mine_of(self, stacked: Tensor) -> Tensor:
        """The inverse of :meth:`all_of`."""
        return self.part(stacked, 1 + self.axis, self.axis)

    def scattered(self, partial: Tensor, dim: int) -> Tensor:
        """The sum over all ranks, split along ``dim``: this rank's part."""
        from torch.distributed.tensor import Partial

        summed = self._assembled(partial, self._placed(Partial()), partial.shape)
        return summed.redistribute(placements=self._sharded(dim)).to_local()

    def gathered(self, local: Tensor, dim: int, size: int) -> Tensor:
        """The whole of a tensor that is split along ``dim``, where it has ``size`` entries."""
        from torch.distributed.tensor import Replicate

        shape = (*local.shape[:dim], size, *local.shape[dim + 1 :])
        split = self._assembled(local, self._sharded(dim), shape)
        return split.redistribute(placements=self._placed(Replicate())).to_local()

    def _assembled(
        self, local: Tensor, placements: Sequence[Placement], shape: Sequence[int]
    ) -> DTensor:
        from torch.distributed.tensor import DTensor

        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, placements, shape=torch.Size(shape), stride=strides
        )

    def _sharded(self, dim: int) -> list[Placement]:
        from torch.distributed.tensor import Shard

        return self._placed(Shard(dim))

    def _placed(self, placement: Placement) -> list[Placement]:
        from torch.distributed.tensor import Replicate

        return [
            placement if i == self.mesh_dim else Replicate() for i in range(len(self.placements))
        ]


class CutAveraging:
    """An averaging along the axis that is split, where a shard cuts through what is averaged
    together.

    The second moments are split all the same: each rank has a share of the groups.
    """

    def __init__(self, averaging: Averaging, shards: Shards) -> None:
        self.averaging, self.shards = averaging, shards
        group_of = torch.from_numpy(averaging.group_of[shards.start : shards.stop])
        # once, for a copy waits for the device
        self.group_of = group_of.to(shards.mesh.device_type)
        start, stop = chunk(averaging.groups, shards.ranks, shards.rank)
        self.groups = stop - start

    def reduced_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """As of :class:`Averaging`."""
        reduced = list(shape)
        reduced[self.averaging.dim] = self.groups
        return tuple(reduced)

    def mean(self, x: Tensor) -> Tensor:
        """As of :class:`Averaging`."""
        placed = self.shards.placed(x, self.averaging.dim, self.shards.axis)
        return self.shards.scattered(self.averaging.mean(placed), self.averaging.dim)

    def mean_square(self, x: Tensor) -> Tensor:
        """As of :class:`Averaging`."""
        return self.mean(x.square())

    def divide(self, x: Tensor, divisor: Tensor) -> Tensor:
        """As of :class:`Averaging`."""
        divisor = self.shards.gathered(divisor, self.averaging.dim, self.averaging.groups)
        return x / divisor.index_select(self.averaging.dim, self.group_of)


WHOLE, PAIRS = Whole(), Pairs()


def shards_of(param: Tensor) -> Whole:
    """How a parameter is split over ranks; and whether it is complex.

    Raises:
        ValueError: in a way that is not supported.
    """
    if is_split(param):
        return Shards(param)
    return PAIRS if param.is_complex() else WHOLE


def check_split_alike(params: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError unless these parameters, which gauges link, are all whole or all split over
    the same ranks.
    """

    def how(param: Tensor) -> str:
        shards = shards_of(param)
        if isinstance(shards, Shards):
            return f"split over {shards.ranks} ranks"
        return "whole on each rank"

    (first, param), *others = params
    group = shards_of(param).group
    for name, other in others:
        if shards_of(other).group is not group:
            raise ValueError(
                f"{first!r} and {name!r} are linked by gauges, and not split over the same ranks:"
                f" {first!r} is {how(param)}, {name!r} is {how(other)}. Shard all parameters of a"
                " gauge over one mesh, or none of them, or leave the gauge out"
            )


def chunk(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Start and end of a rank's part, as ``torch.chunk`` has it."""
    most = -(-size // ranks)
    return min(rank * most, size), min((rank + 1) * most, size)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if is_split(tensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor, whole on all ranks or split in any way, split as another is."""
    if not is_split(like):
        return whole(tensor)
    if not is_split(tensor):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(
            tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return tensor.redistribute(placements=like.placements)


def restore_(state: Tensor, saved: Tensor) -> None:
    """Copy a saved tensor into a state, whichever of the two is split, and how."""
    local_part(state).copy_(local_part(split_like(saved, state)))
