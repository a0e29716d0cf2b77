"""Values of buffers on the meta device, where what they follow from is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

#: What is known of buffers of models that were put on the meta device here.
_KNOWN: WeakKeyDictionary[nn.Module, Mapping[str, Tensor]] = WeakKeyDictionary()


def remember_values(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Keep the values of buffers, by name, for a model on the meta device."""
    _KNOWN[model] = {name: buffer.detach().cpu() for name, buffer in buffers.items()}


def with_values(model: nn.Module, name: str, buffer: Any) -> Any:
    """A buffer with its values, where the model is on the meta device and has none.

    It is the one that is remembered; else a module without parameters that is made from its config
    alone, as the rotary embeddings of transformers are, is made anew on the CPU, and the buffer
    taken from there, unless it is saved with the weights, which may bring other
    values. Where that cannot be done, or gives another shape or type, the buffer is returned as it
    is, without values.

    Args:
        model: the buffer's.
        name: of the buffer, as in ``model.named_buffers()``.
        buffer: the buffer, or anything else, which is returned as it is.
    """
    if not isinstance(buffer, Tensor) or not buffer.is_meta:
        return buffer
    if (known := _KNOWN.get(model, {}).get(name)) is not None:
        return known
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    config = getattr(module, "config", None)
    saved = own not in module._non_persistent_buffers_set
    if config is None or saved or any(True for _ in module.parameters()):
        return buffer
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            made = dict(type(module)(config).named_buffers()).get(own)
    except Exception:  # a class of others, made in another way
        return buffer
    alike = made is not None and (made.shape, made.dtype) == (buffer.shape, buffer.dtype)
    return made if alike and not made.is_meta else buffer  # type: ignore[union-attr]
