"""A model whose parameters are split over processes (FSDP2), as one that can be traced."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ddc.gauges.base import is_split
from ddc.gauges.buffers import remember_values

#: Where a module keeps what is called around its forward and backward pass.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def unsplit(model: nn.Module) -> nn.Module:
    """The same architecture on the meta device, with whole parameters and without what
    ``fully_shard`` put around it; a model that is not split is returned as it is.

    Parameters have no values, and no process asks another for any. Buffers keep theirs
    (:func:`ddc.gauges.buffers.with_values`). The model itself is left as it is.
    """
    if not any(map(is_split, model.parameters())):
        return model
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        copies[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.to("meta")
    for module in model.modules():
        plain = _plain_class(type(module))
        copies[id(module)] = object.__new__(plain)
    for module in model.modules():
        own = {key: _copied(value, copies) for key, value in vars(module).items()}
        for key in HOOKS:
            own[key] = OrderedDict((k, h) for k, h in own[key].items() if not _is_torchs(h))
        copies[id(module)].__dict__.update(own)
    whole: nn.Module = copies[id(model)]
    remember_values(whole, dict(model.named_buffers()))
    return whole


def _plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of which ``fully_shard`` made one of its own, by the name FSDP and its name."""
    bases = kind.__mro__
    is_shards = len(bases) > 2 and bases[1].__name__ == "FSDPModule"
    return bases[2] if is_shards else kind


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A value with what it holds of the model replaced, also in lists, tuples and dicts."""
    if isinstance(value, nn.Module | Tensor):
        return copies.get(id(value), value)
    if isinstance(value, dict):
        filled = ((key, _copied(each, copies)) for key, each in value.items())
        return OrderedDict(filled) if isinstance(value, OrderedDict) else dict(filled)
    if type(value) in (list, tuple):
        return type(value)(_copied(each, copies) for each in value)
    return value


def _is_torchs(hook: Any) -> bool:
    """Whether a hook is one of torch.distributed's."""
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.startswith("torch.distributed")
