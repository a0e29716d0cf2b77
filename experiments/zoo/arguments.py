"""Models of timm made narrow: the arguments of their classes, and the configs among these, are read
by their names, as the configs of transformers are (:mod:`ddc.gauges.twin`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from timm.models._builder import build_model_with_cfg

#: What an argument counts, by its name; the first that fits decides. Depths and heads come before
#: the widths that depend on them.
MEANINGS = {
    "rate": r"drop\w*$",
    "other": (
        r"^in_ch|^in_dim|img|image|kernel|stride|classes|pool|freq|temperature|dilation|eps$|^out_ind"
        r"|^rd_|^br$|^s$|norm_dim"
    ),
    "depth": (
        r"^(depths?|layers|num_layers|num_blocks|d|block_config|stages|(serial_|parallel_)?depths?|depth_\w+"
        r"|block_layers_num|num_modules|repeats?|cls_attn_layers|block_repeats?|k_sec)$"
    ),
    "heads": r"(^|_)(num_)?heads$",
    "head width": r"^(dim_head|head_dim|key_dim|head_dims|qk_dim|v_dim)$",
    "groups": r"^(cardinality|groups)$",
    "width of a group": r"^(group_size|group_width|gs)$",
    "base width": r"^base_width$",
    "patch": r"^patch_size$",
    "window": r"^window_sizes?$",
    "expansion": r"^(exp_ratio|expand_ratio|expansion|conv_ratio|mbconv_expand_ratio)$",
    "hidden": r"^mlp_ratios?$",
    "multiplier": r"^(width_mult|width_factor|channel_multiplier|multiplier|alpha)$",
    "rounding": r"^round_chs_fn$",
    "width": (
        r"(dims?|chs|channels|widths?|features|planes|filters|hidden_size|stem_size|growth_rate"
        r"|stem_hidden_dim)$|^(c|w0|cfg|inc_sec|k_r)$"
    ),
}
#: What of a depth or a ratio is left.
DEPTH, HEADS, HEAD_WIDTH, PATCH, WINDOW, EXPANSION, HIDDEN = 2, 2, 4, 4, 4, 2.0, 1.0
#: By what a factor of all widths is divided.
MULTIPLIED = 32


def meaning(key: str) -> str:
    """What an argument of this name counts; empty where that has nothing to do with a width."""
    return next((each for each, pattern in MEANINGS.items() if re.search(pattern, key)), "")


@contextlib.contextmanager
def narrow_arguments(width: int, only: Collection[str] | None = None) -> Iterator[dict[str, None]]:
    """While it lasts timm builds narrow models; gives the names of the arguments that are narrowed,
    as models are built.

    Args:
        width: of the narrowest part. Widths that differ remain different where one follows the
            other in size: they become this and twice this in turn.
        only: names of arguments that are narrowed; None for all.
    """
    names: dict[str, None] = {}

    def build(model_cls: Any, variant: str, pretrained: bool, **arguments: Any) -> Any:
        given = {**defaults(model_cls), **arguments}
        width_of = alternating(given, width)
        for key, value in given.items():
            narrow = narrowed(key, value, width_of)
            if narrow is value or narrow == value:
                continue
            names[key] = None
            if only is None or key in only:
                arguments[key] = narrow
        return build_model_with_cfg(model_cls, variant, pretrained, **arguments)

    here = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("timm.models.")
        and name != "timm.models._builder"
        and getattr(module, "build_model_with_cfg", None) is build_model_with_cfg
    ]
    for module in here:
        module.build_model_with_cfg = build  # type: ignore[attr-defined]
    try:
        yield names
    finally:
        for module in here:
            module.build_model_with_cfg = build_model_with_cfg  # type: ignore[attr-defined]


def defaults(made: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a class that have a value of their own and a meaning."""
    parameters = inspect.signature(made).parameters.values()
    return {
        each.name: each.default
        for each in parameters
        if each.default is not each.empty and meaning(each.name)
    }


def alternating(arguments: Mapping[str, Any], width: int) -> Callable[[int], int]:
    """What becomes of a width, from all widths that there are."""
    every = sorted({value for key, each in arguments.items() for value in _widths(key, each)})
    narrow = {value: min(value, width * (1 + i % 2)) for i, value in enumerate(every)}
    return lambda value: narrow.get(value, value)


def _widths(key: str, value: Any) -> Iterator[int]:
    """The widths in an argument."""
    for inner, each in _parts(key, value):
        yield from _widths(inner, each)
    if type(value) is int and value > 1 and meaning(key) == "width":
        yield value


def _parts(key: str, value: Any) -> list[tuple[str, Any]]:
    """What an argument holds, by name."""
    if isinstance(value, Mapping):
        return [(str(name), each) for name, each in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return list(vars(value).items())
    if isinstance(value, list | tuple):
        return [(key, each) for each in value]
    return []


def narrowed(key: str, value: Any, width_of: Callable[[int], int], inside: bool = False) -> Any:
    """An argument after narrowing; ``inside`` a list."""
    if isinstance(value, Mapping):
        parts = {name: narrowed(str(name), each, width_of) for name, each in value.items()}
        return parts if parts != value else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {name: narrowed(name, each, width_of) for name, each in vars(value).items()}
        return dataclasses.replace(value, **changed) if changed != vars(value) else value
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        # blocks of a stage that are spelt out
        spelt = inside and len(value) > 1 and all(isinstance(each, dict) for each in value)
        items = [narrowed(key, each, width_of, True) for each in (value[:1] if spelt else value)]
        return type(value)(items) if items != list(value) else value
    kind = meaning(key)
    if kind == "rounding":
        return _as_it_is
    if type(value) is float and (kind == "multiplier" or key == "width"):
        return value / MULTIPLIED
    if kind == "rate":
        return 0.0 if type(value) is float else value
    if type(value) not in (int, float) or value <= 1:
        return value
    match kind:
        case "depth":
            return min(int(value), 1 if inside or key == "d" else DEPTH)
        case "heads":
            return min(value, HEADS)
        case "head width" | "width of a group":
            return min(value, HEAD_WIDTH)
        case "groups":
            return min(value, HEADS)
        case "base width":  # filters of a group are so many of 64
            return max(value, 64 // HEADS)
        case "patch":
            return PATCH if value >= 2 * PATCH and not inside else value
        case "window":
            return min(value, WINDOW)
        case "expansion":
            return min(value, EXPANSION if type(value) is float else int(EXPANSION))
        case "hidden":
            return type(value)(HIDDEN)
        case "width" if type(value) is int:
            return width_of(value)
    return value


def _as_it_is(channels: int, *_: Any, **__: Any) -> int:
    """Channels that are not rounded."""
    return channels
