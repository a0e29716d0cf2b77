"""Parts of a parameter: some of its indices along one axis, under a name of their own.

What packs several linear maps into one weight (queries, keys and values; gate and up) stacks their
rows. A gauge that acts on some of these acts on a *part*, which is named as Python slices it,
``mlp.gate_up_proj.weight[64:128]`` or, along axis 1, ``weight[:,0:8]``, and is a view of the
parameter. So whatever takes a tensor by its name takes a part of it too: :func:`at` finds both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from torch import Tensor

_NAME = re.compile(r"(?P<parameter>.+)\[(?P<before>(?::,)*)(\d+):(\d+)(?::(\d+))?\]")


class Part(NamedTuple):
    """The indices from ``start`` to ``stop``, every ``step``-th, of one axis of a parameter."""

    parameter: str
    axis: int
    start: int
    stop: int
    step: int = 1

    @property
    def indices(self) -> range:
        """The indices, in the parameter."""
        return range(self.start, self.stop, self.step)

    @property
    def name(self) -> str:
        """What the part is called."""
        step = f":{self.step}" if self.step > 1 else ""
        return f"{self.parameter}[{':,' * self.axis}{self.start}:{self.stop}{step}]"

    def of(self, tensor: Tensor, first: int = 0) -> Tensor:
        """A view of the part in the parameter's tensor, whose own axes begin at ``first``.

        Raises:
            IndexError: the tensor has not all of the indices.
        """
        axis = first + self.axis
        if axis >= tensor.ndim or self.stop > tensor.shape[axis]:
            raise IndexError(f"{self.name!r} is no part of a tensor of {tuple(tensor.shape)}")
        return tensor[(*(slice(None),) * axis, slice(self.start, self.stop, self.step))]


@cache
def part_named(name: str) -> Part | None:
    """The part of this name; None for the name of a whole parameter."""
    if (match := _NAME.fullmatch(name)) is None:
        return None
    _, _, start, stop, step = match.groups()
    axis = len(match["before"]) // 2
    return Part(match["parameter"], axis, int(start), int(stop), int(step or 1))


def whole_name(name: str) -> str:
    """Name of the parameter of which a name names a part, or all."""
    part = part_named(name)
    return name if part is None else part.parameter


def at(tensors: Mapping[str, Tensor], name: str, first: int = 0) -> Tensor:
    """The tensor of this name, or a view of the part of one.

    Args:
        tensors: by name of the parameter, or of the part.
        name: of a parameter or a part.
        first: axis of the tensors at which those of the parameter begin.

    Raises:
        KeyError: there is none.
        IndexError: it has not the indices of the part.
    """
    part = None if name in tensors else part_named(name)
    return tensors[name] if part is None else part.of(tensors[part.parameter], first)


def named_part(parameter: str, axis: int, indices: Sequence[int], size: int) -> str:
    """The name of these indices, of ``size``, along an axis: the parameter's own for all of them.

    Raises:
        ValueError: they are no range, in their order.
    """
    first, last, count = int(indices[0]), int(indices[-1]), len(indices)
    step = int(indices[1]) - first if count > 1 else 1
    if step < 1 or list(indices) != [*range(first, first + count * step, step)]:
        raise ValueError(f"the indices of {parameter!r} are no range: {list(indices)}")
    if count == size:
        return parameter
    return Part(parameter, axis, first, last + 1, step).name
