"""Averages of second moments over the indices that a rotation gauge turns.

Adam divides each coordinate by its own second moment, which a rotation does not respect. Averaged over the
turned indices the second moment is invariant, and the quotient turns with the weights. The averaged moment is
also smaller: the d_head rows of a head share one row of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Averaging:
    """Averages along one dimension of a stacked tensor over the orbits of rotation gauges.

    Args:
        dim: the dimension of the stacked tensor along which the rotations act.
        blocks: int64 tensors of shape (groups, k): the indices averaged together.
        size: length of that dimension; an index in no block stays by itself.

    Raises:
        ValueError: an index in two blocks.
    """

    def __init__(self, dim: int, blocks: Sequence[Tensor], size: int) -> None:
        blocks = [block[block.min(1).values.argsort()].cpu() for block in blocks]
        turned = torch.cat([block.flatten() for block in blocks])
        if len(turned.unique()) != len(turned):
            raise ValueError("two rotation gauges turn the same index")
        rest = torch.ones(size, dtype=torch.bool)
        rest[turned] = False
        if rest.any():
            blocks.append(rest.nonzero())
        self.dim = dim
        self.blocks = blocks
        self.group_of = torch.empty(size, dtype=torch.int64)
        groups = torch.arange(sum(map(len, blocks))).split([len(block) for block in blocks])
        for block, numbers in zip(blocks, groups, strict=True):
            self.group_of[block] = numbers[:, None]
        self.regular = _regular_shape(self.group_of)

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for parameters that can share one stacked tensor."""
        return self.dim, tuple(self.group_of.tolist())

    def reduced_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the averaged second moment of a stacked tensor of this shape."""
        reduced = list(shape)
        reduced[self.dim] = sum(map(len, self.blocks))
        return tuple(reduced)

    def mean(self, x: Tensor) -> Tensor:
        """Average x over each group of indices."""
        if self.regular is not None:
            return x.unflatten(self.dim, self.regular).mean(self.dim + 1).flatten(self.dim, self.dim + 1)
        means = [
            x.index_select(self.dim, block.to(x.device).flatten())
            .unflatten(self.dim, tuple(block.shape))
            .mean(self.dim + 1)
            for block in self.blocks
        ]
        return torch.cat(means, self.dim)

    def divide(self, x: Tensor, divisor: Tensor) -> Tensor:
        """X over an averaged ``divisor``, each index by its group's."""
        if self.regular is not None:
            outer, _, inner = self.regular
            divisor = divisor.unflatten(self.dim, (outer, inner)).unsqueeze(self.dim + 1)
            return (x.unflatten(self.dim, self.regular) / divisor).flatten(self.dim, self.dim + 2)
        return x / divisor.index_select(self.dim, self.group_of.to(x.device))


def _regular_shape(group_of: Tensor) -> tuple[int, int, int] | None:
    """(outer, k, inner) if grouping is averaging the middle of that shape, which needs no index.

    Heads are (heads, d_head, 1); the planes of a half-split RoPE are (heads, 2, d_head / 2).
    """
    size, groups = len(group_of), int(group_of.max()) + 1
    members = (group_of == group_of[0]).nonzero().flatten()
    k, inner = len(members), int(members[1] - members[0]) if len(members) > 1 else 1
    if size != k * groups or size % (k * inner):
        return None
    shape = (size // (k * inner), k, inner)
    pattern = torch.arange(groups).view(shape[0], 1, inner).expand(shape)
    return shape if torch.equal(pattern.flatten(), group_of) else None
