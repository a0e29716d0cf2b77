"""Averages of second moments over the indices that a rotation gauge turns.

Adam divides each coordinate by its own second moment, which a rotation does not respect. Averaged
over the turned indices the second moment is invariant, and the quotient turns with the weights. The
averaged moment is also smaller: the d_head rows of a head share one row of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Averaging:
    """Averages along one dimension of a stacked tensor over the orbits of rotation gauges.

    Args:
        dim: the dimension of the stacked tensor along which the rotations act.
        blocks: integer arrays of shape (groups, k): the indices averaged together, none of them
            twice.
        size: length of that dimension; an index in no block stays by itself.
    """

    def __init__(self, dim: int, blocks: Sequence[np.ndarray], size: int) -> None:
        turned = np.concatenate([block.ravel() for block in blocks])
        rest = np.setdiff1d(np.arange(size), turned)
        blocks = [block[block.min(1).argsort()] for block in blocks] + (
            [rest[:, None]] if len(rest) else []
        )
        self.dim = dim
        self.blocks = blocks
        self.groups = sum(map(len, blocks))
        self.group_of = np.empty(size, dtype=np.int64)
        start = 0
        for block in blocks:
            self.group_of[block] = np.arange(start, start + len(block))[:, None]
            start += len(block)
        self.regular = _regular_shape(self.group_of)
        self._indices: dict[torch.device, list[Tensor]] = {}

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for parameters that can share one stacked tensor."""
        return self.dim, self.group_of.tobytes()

    def part(self, start: int, stop: int) -> Averaging:
        """The averaging of the indices from ``start`` to ``stop`` alone; no group may have others
        as well.
        """
        here = [
            block[(block[:, 0] >= start) & (block[:, 0] < stop)] - start for block in self.blocks
        ]
        return Averaging(self.dim, here, stop - start)

    def reduced_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the averaged second moment of a stacked tensor of this shape."""
        reduced = list(shape)
        reduced[self.dim] = self.groups
        return tuple(reduced)

    def indices(self, device: torch.device) -> list[Tensor]:
        """Each block's indices, and each index's group: copied to a device once, for a copy waits
        for it.
        """
        if device not in self._indices:
            arrays = [*(block.ravel() for block in self.blocks), self.group_of]
            self._indices[device] = [torch.from_numpy(array).to(device) for array in arrays]
        return self._indices[device]

    def mean(self, x: Tensor) -> Tensor:
        """Average x over each group of indices."""
        if self.regular is not None:
            return (
                x.unflatten(self.dim, self.regular)
                .mean(self.dim + 1)
                .flatten(self.dim, self.dim + 1)
            )
        means = [
            x.index_select(self.dim, index).unflatten(self.dim, block.shape).mean(self.dim + 1)
            for block, index in zip(self.blocks, self.indices(x.device)[:-1], strict=True)
        ]
        return torch.cat(means, self.dim)

    def mean_square(self, x: Tensor) -> Tensor:
        """Average of the squares of x over each group of indices."""
        return self.mean(x.square())

    def divide(self, x: Tensor, divisor: Tensor) -> Tensor:
        """X over an averaged ``divisor``, each index by its group's."""
        if self.regular is not None:
            outer, _, inner = self.regular
            divisor = divisor.unflatten(self.dim, (outer, inner)).unsqueeze(self.dim + 1)
            return (x.unflatten(self.dim, self.regular) / divisor).flatten(self.dim, self.dim + 2)
        return x / divisor.index_select(self.dim, self.indices(x.device)[-1])


def _regular_shape(group_of: np.ndarray) -> tuple[int, int, int] | None:
    """(outer, k, inner) if grouping is averaging the middle of that shape, which needs no index.

    Heads are (heads, d_head, 1); the planes of a half-split RoPE are (heads, 2, d_head / 2).
    """
    size, groups = len(group_of), int(group_of.max()) + 1
    members = np.flatnonzero(group_of == group_of[0])
    k, inner = len(members), int(members[1] - members[0]) if len(members) > 1 else 1
    if size != k * groups or size % (k * inner):
        return None
    shape = (size // (k * inner), k, inner)
    pattern = np.broadcast_to(np.arange(groups).reshape(shape[0], 1, inner), shape)
    return shape if np.array_equal(pattern.ravel(), group_of) else None
