"""Scales of what a norm alone reads, which divides by them again: symmetries at eps = 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddc.gauges.actions import ratio
from ddc.gauges.base import Gauge, Params, check_kind


class Scaled(NamedTuple):
    """A parameter and the indices, along one of its axes, that each unit scales.

    ``indices`` is an int64 array of shape (units, k); None scales all of it, as one unit.
    """

    parameter: str
    axis: int = 0
    indices: np.ndarray | None = None

    def spread(self, values: Tensor, tensor: Tensor, other: float = 1.0) -> Tensor:
        """A value for each unit, (units,), as what broadcasts against the tensor; ``other`` where
        no unit is.
        """
        if self.indices is None:
            return values
        along = values.new_full((tensor.shape[self.axis],), other)
        index = torch.from_numpy(self.indices).to(values.device)
        along[index] = values[:, None].expand(index.shape)
        return along.view([-1 if i == self.axis else 1 for i in range(tensor.ndim)])

    def unit_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the entries of each unit, (units,)."""
        if self.indices is None:
            return tensor.sum().view(1)
        along = tensor.movedim(self.axis, 0).flatten(1).sum(1) if tensor.ndim > 1 else tensor
        return along[torch.from_numpy(self.indices).to(tensor.device)].sum(1)


@dataclass(frozen=True, eq=False)
class Scale(Gauge):
    """Per unit, the same factor c > 0 on the named indices of several parameters, and on nothing
    else. The group is R+ per unit.

    Args:
        slots: what is scaled; all must agree in the number of units.
        training: it is none in evaluation, where a batch norm reads running statistics.

    Raises:
        ValueError: an unknown kind, no slots, or slots that disagree.
    """

    kind: str
    where: str
    slots: tuple[Scaled, ...]
    training: bool = False

    def __post_init__(self) -> None:
        check_kind(self.kind)
        units = {1 if slot.indices is None else len(slot.indices) for slot in self.slots}
        if len(units) != 1:
            raise ValueError(f"{self}: slots must agree in units, got {sorted(units)}")

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(slot.parameter for slot in self.slots))

    @property
    def units(self) -> int:
        """Number of units."""
        indices = self.slots[0].indices
        return 1 if indices is None else len(indices)

    def dimension(self, params: Params) -> int:
        return self.units

    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        uniform = torch.rand(self.units, generator=generator, dtype=torch.float64)
        return ((2 * uniform - 1) * spread).exp().to(params[self.parameters[0]])

    @torch.no_grad()
    def act_(self, params: Params, element: Tensor) -> None:
        for slot in self.slots:
            tensor = params[slot.parameter]
            tensor.mul_(slot.spread(element, tensor))

    @torch.no_grad()
    def velocities(self, params: Params) -> dict[str, Tensor]:
        moved: dict[str, Tensor] = {}
        for slot in self.slots:
            weight = params[slot.parameter].double()
            units = torch.eye(self.units, dtype=torch.float64, device=weight.device)
            each = torch.stack([weight * slot.spread(unit, weight, 0.0) for unit in units])
            moved[slot.parameter] = moved.get(slot.parameter, 0) + each
        return moved

    @torch.no_grad()
    def audit(self, params: Params, grads: Params) -> float:
        """The gradient along the orbit, relative to the longest that it could be."""
        along = weights = felt = torch.zeros(self.units, dtype=torch.float64)
        for slot in self.slots:
            w, g = (tensors[slot.parameter].double() for tensors in (params, grads))
            along = along + slot.unit_sum(w * g).cpu()
            weights = weights + slot.unit_sum(w.square()).cpu()
            felt = felt + slot.unit_sum(g.square()).cpu()
        return ratio(float(along.square().sum()), float((weights * felt).sum()))
