"""Any model in float64: what a float64 copy alone does not do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ddc.gauges.base import place_of


class Untouched(TorchDispatchMode):
    """No operation writes to these tensors: what it would write is lost."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.storages = {place[1] for tensor in tensors if (place := place_of(tensor)) is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # of a batch norm the schema does not say that it keeps statistics
        if func._schema.is_mutable or "batch_norm" in func.name():
            args, kwargs = tree_map_only(Tensor, self._copy, (args, kwargs))
        return func(*args, **kwargs)

    def _copy(self, tensor: Tensor) -> Tensor:
        place = place_of(tensor)
        return tensor.clone() if place is not None and place[1] in self.storages else tensor


class InDouble(TorchDispatchMode):
    """Every floating-point operation in float64, also where the model asks for another type.

    Norms and rotary embeddings are computed in float32 by many models whatever the type of their
    weights; in this mode they are not, so that rounding stays at 1e-15. Kernels that know no
    float64 are replaced.

    Args:
        held: what stands in for tensors that exist already, by their place in memory
            (:func:`ddc.gauges.base.place_of`): weights, buffers, and all else that the model keeps.
            What is written to them is written to these.
    """

    def __init__(self, held: Mapping[object, Tensor] | None = None) -> None:
        super().__init__()
        self.held = held or {}

    def __enter__(self) -> InDouble:
        self._default = torch.get_default_dtype()
        # of what is made without a type; its limits are asked for in Python
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = each_of(self._stand_in, (args, kwargs or {}))
        return each_of(double, REPLACEMENTS.get(func.name(), func)(*args, **kwargs))

    def _stand_in(self, value: Any) -> Any:
        if self.held and isinstance(value, Tensor):
            value = self.held.get(place_of(value), value)
        return double(value)


def computing_device(device: torch.device) -> torch.device:
    """Where to compute what a model computes on a device: on the CPU what it has no values for."""
    return torch.device("cpu") if device.type == "meta" else device


def double(value: Any) -> Any:
    """The value as it is in double precision: tensors and types of lower one are replaced, and the
    meta device, where nothing is computed.
    """
    if isinstance(value, Tensor):
        precise = _PRECISE.get(value.dtype)
        return value if precise is None else value.detach().to(precise)
    if isinstance(value, torch.dtype):
        return _PRECISE.get(value, value)
    return computing_device(value) if isinstance(value, torch.device) else value


#: What stands in for a type of lower precision.
_PRECISE = {
    each: torch.complex128 if each.is_complex else torch.float64
    for each in vars(torch).values()
    if isinstance(each, torch.dtype)
    and (each.is_complex or each.is_floating_point)
    and each not in (torch.float64, torch.complex128)
}


def each_of(function: Callable[[Any], Any], value: Any) -> Any:
    """What a function makes of each argument or result of an operation, those in lists one by one:
    as ``tree_map`` does, in a tenth of its time, where all is tensors, numbers and their lists.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(each_of(function, each) for each in value)
    if kind is dict:
        return {key: each_of(function, each) for key, each in value.items()}
    return function(value)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor, *_: Any, **__: Any) -> Tensor:
    """Rows of ``x``, (rows, in), by the weights of their groups, (groups, in, out), which end at
    the rows ``ends``.
    """
    bounds = [0, *ends.tolist()]
    parts = [x[a:b] @ w for a, b, w in zip(bounds, bounds[1:], weight, strict=False)]
    rest = x.new_zeros(x.shape[0] - bounds[-1], weight.shape[-1])
    return torch.cat([*parts, rest])


#: What stands in for operations that have no kernel for float64, or mean nothing in it, by their
#: names.
REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "aten::_assert_tensor_metadata": lambda *_, **__: None,  # of the type and device before
    "aten::_grouped_mm": grouped_product,
    "transformers::grouped_mm_fallback": grouped_product,
}
