"""A narrow twin of a model: the same architecture and parameter names, from the same config with
small widths.

A gauge is a statement about operations, not about widths: a model and its twin have the same, by
kind, place and parameters. So a model that is too large to compute with, or whose weights are
nowhere (the meta device), can be checked on its twin.

Configs are those of transformers in form: objects with ``to_dict`` whose attributes are sizes. They
are read by the names of these attributes, so that no class is imported or named here; a twin that
comes out otherwise than its model (other parameters, other ties between them) is refused.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddc.gauges.base import first_line

#: At most how many parameters a twin has.
LARGEST = 300_000_000


@dataclass(frozen=True)
class Narrow:
    """How narrow a config becomes.

    Attributes:
        width: of the residual stream.
        heads: at most how many.
        head_width: of one.
        multiple: widths that are not the residual stream's are multiples of this.
        widest: at most how wide these are; None lets them keep their ratio to the stream.
        positions: at most how many positions have a place in a table; None keeps all.
        patch: at most the side of a patch of an image; None keeps it.
        channels: of images; None keeps them.
        bands: of sound; None keeps them.
    """

    width: int = 64
    heads: int = 4
    head_width: int = 16
    multiple: int = 8
    widest: int | None = None
    positions: int | None = None
    patch: int | None = None
    channels: int | None = None
    bands: int | None = None


#: Of a twin.
TWIN = Narrow()

#: What a number in a config counts, by its name; the first that fits decides.
MEANINGS = {
    "vocabulary": r"vocab_size",
    "positions": (
        r"^(max_(\w+_)?position_embeddings|n_positions|max_position(s|al_embeddings)?|max_seq_len"
        r"|num_position_embeddings|num_conv_pos_embeddings)$"
    ),
    "patch": r"^patch_size$",
    "channels of images": r"^(num|in|input|image)_channels$",
    "bands of sound": r"^num_mel_bins$",
    "width of a head for classes": r"^classifier_proj_size$",
    "token": r"token_(id|index)$",
    "layers": (
        r"(^|_)(n_?layers?|num_(hidden_|decoder_|encoder_)?layers|(en|de)coder_layers|depths?|num_blocks)$"
        r"|(period|_interval|every_n_layers|layer_group_size|window_pattern|max_window_layers)$"
    ),
    "first layers": r"(first_k_dense_replace|num_dense_layers|num_kv_shared_layers|layer_offset)$",
    "experts": r"(^|_)(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)$",
    "experts used": r"(per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|topk)$",
    "groups of experts": r"(^n_group|topk_group|num_expert_group)$",
    "inputs": (
        r"(num|in|audio|image|input|mask_input|patch_embed_input)_channels$|token|mel|_id$|label|class|^chunk"
        r"|spatial_merge|max_|image_size|patch_size|kernel|stride|window_size|_index|positions|num_frames|input_dim"
        r"|input_feat|cross_attention_dim$|bins?$"
    ),
    "heads": r"(^|_)(n_?heads?|(num_)?(attention_|key_value_|kv_|key_|value_)?heads)$",
    "width of a head": (
        r"(^|_)(head_?dim|d_kv|d_head|dim_head|head_size|kv_channels|rotary_dim|head_v_dim)$"
    ),
    "groups": r"groups$",
    "places of layers": r"(layer_ids|_layers)$",
    "width": (
        r"(size|dims?|width|rank|channels|units|filters|inner|embd|d_model|d_ff|dff|planes|d_ssm|emb)s?$"
        r"|hidden_size|hidden_dim|embed_dim|intermediate|d_model|n_embd|_dims?_|^hidden$"
    ),
}


def meaning(key: str) -> str:
    """What a number of this name counts; empty where that has nothing to do with a width."""
    return next((each for each, pattern in MEANINGS.items() if re.search(pattern, key)), "")


def narrow_twin(model: nn.Module) -> nn.Module:
    """A model of the same class and parameter names with small widths, on the CPU, in float32,
    weights at random.

    What inputs show of a model stays: vocabulary, positions, images, labels. So inputs of the model
    are inputs of its twin, but for those that are hidden states. The random state of torch is left
    as it was.

    Args:
        model: one that has a config in the manner of transformers. Only its parameters' names are
            read.

    Raises:
        ValueError: there is no such config, or what it builds, narrowed, does not have the
            parameters of the model; the message is a reason in words.
    """
    config = getattr(model, "config", None)
    name = type(model).__name__
    if not _is_config(config):
        raise ValueError(f"{name} has no config to build a narrow twin from")
    try:
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                twin = type(model)(narrow_config(config))
            if (size := sum(parameter.numel() for parameter in twin.parameters())) <= LARGEST:
                with torch.device("cpu"):
                    twin = type(model)(narrow_config(config))
    except Exception as error:
        raise ValueError(
            f"{name} cannot be built from its config with small widths: {first_line(error)}"
        ) from error
    if size > LARGEST:
        raise ValueError(f"{name} has {size:,} parameters even where its config is narrowed")
    if other := sorted(_ties(model) ^ _ties(twin)):
        raise ValueError(
            f"{name} has other parameters than its config builds ({', '.join(other[0])}, for one)"
        )
    return twin.train(model.training)


def narrow_config(
    config: Any, layers: int | None = None, vocabulary: int | None = None, sizes: Narrow = TWIN
) -> Any:
    """A config of the same architecture with small widths.

    Args:
        config: left as it is.
        layers: how many layers each stack of them keeps, where it has more: one of each kind first.
            Experts are cut to four then. None keeps all, and with them every parameter's name.
        vocabulary: at most how many tokens the twin knows; special tokens beyond become its last.
            None keeps all.
        sizes: how narrow.
    """
    config = copy.deepcopy(config)
    tree = list(_configs(config))
    streams = {width for each in tree for width in _streams(each)}
    for each in tree:
        _Narrowing(each, streams, layers, vocabulary, sizes).apply()
    return config


class _Narrowing:
    """Sizes of one config, before and after."""

    def __init__(
        self,
        config: Any,
        streams: set[int],
        layers: int | None,
        vocabulary: int | None,
        sizes: Narrow,
    ) -> None:
        self.config, self.streams, self.layers, self.vocabulary = (
            config,
            streams,
            layers,
            vocabulary,
        )
        self.sizes = sizes
        width, self.heads = (
            max(_streams(config), default=None),
            _size(config, "num_attention_heads"),
        )
        self.factor = self.sizes.width / (width or 16 * self.sizes.width)
        of_heads = width // self.heads if width and self.heads else None
        self.head_width = _size(config, "head_dim") or of_heads
        #: Widths of state spaces, which their heads must fill exactly, by what they are before.
        self.inner = {
            expand * width: expand * self.sizes.width
            for name in ("expand", "mamba_expand")
            if (expand := _size(config, name)) and width
        }
        if inner := _size(config, "mamba_d_ssm"):
            self.inner[inner] = self.of_width(inner)
        # of some configs it is the number of stages
        is_depth = meaning(_key(config, "num_hidden_layers")) == "layers"
        self.depth = _size(config, "num_hidden_layers") if is_depth else None
        self.kept = list(range(self.depth or 0)) if layers is None else self.kinds_of_layers(layers)

    def kinds_of_layers(self, count: int) -> list[int]:
        """Which layers are kept: ``count`` of them, of as many kinds as there are."""
        attributes = vars(self.config).items()
        lists = [value for _, value in attributes if self.is_by_layer(value)]
        places = [value for key, value in attributes if self.is_of_layers(key, value)]
        kinds = [
            repr([[each[i] for each in lists], [i in each for each in places]])
            for i in range(self.depth or 0)
        ]
        sources = len(kinds) - (_size(self.config, "num_kv_shared_layers") or 0)
        # the last layers share the keys and values of earlier ones of their type
        if 0 < sources < len(kinds):
            types = self.config.layer_types
            kept = first_of_each(types[:sources], count - count // 2)
            return kept + [sources + types[sources:].index(types[i]) for i in kept][: count // 2]
        return first_of_each(kinds, count)

    def is_by_layer(self, value: object) -> bool:
        return isinstance(value, list | tuple) and len(value) == self.depth and self.depth > 1

    def is_of_layers(self, key: str, value: object) -> bool:
        """Whether a value is a list of indices of layers."""
        return (
            meaning(key) == "places of layers"
            and isinstance(value, list | tuple)
            and not self.is_by_layer(value)
            and all(type(i) is int and 0 <= i < (self.depth or 0) for i in value)
        )

    def apply(self) -> None:
        for key, value in list(vars(self.config).items()):
            if key.startswith("rope") and isinstance(value, dict):
                setattr(self.config, key, self.rope(value))
            elif key == "_heterogeneity_spec":
                layers = {
                    place: value.per_layer_overrides.get(i, {}) for place, i in enumerate(self.kept)
                }
                value.per_layer_overrides = {
                    place: {name: self.of(name, each) for name, each in own.items()}
                    for place, own in layers.items()
                }
            elif not key.startswith("_") and (narrow := self.of(key, value)) is not value:
                setattr(self.config, key, narrow)

    def of(self, key: str, value: Any) -> Any:
        """The value of an attribute after narrowing."""
        if isinstance(value, list | tuple) and value:
            return self.of_list(key, value)
        if type(value) is not int or value <= 0:
            return value
        cut = self.layers
        match meaning(key):
            case "vocabulary":
                return value if self.vocabulary is None else min(value, self.vocabulary)
            case "positions":
                return min(value, self.sizes.positions or value)
            case "patch":
                return min(value, self.sizes.patch or value)
            case "channels of images":
                return min(value, self.sizes.channels or value)
            case "bands of sound":
                return min(value, self.sizes.bands or value)
            case "token":
                return value if self.vocabulary is None else min(value, self.vocabulary - 1)
            case "layers":
                return value if cut is None else min(value, cut)
            case "first layers":
                return value if cut is None else min(value, cut // 2)
            case "experts":
                return value if cut is None else min(value, 4)
            case "experts used":
                return value if cut is None else min(value, 2)
            case "groups of experts":
                return value if cut is None else 1
            case "heads":
                return self.of_heads(value)
            case "width of a head":
                return self.of_head_width(value)
            case "groups":
                return (
                    self.sizes.width if value in self.streams else min(value, self.sizes.multiple)
                )
            case "width" | "width of a head for classes":
                return self.of_width(value)
        return value

    def of_head_width(self, value: int) -> int:
        return max(2, 2 * round(value * self.sizes.head_width / (self.head_width or value) / 2))

    def of_heads(self, value: int) -> int:
        for key, width in vars(self.config).items():
            if (
                meaning(key) == "width of a head"
                and type(width) is int
                and (inner := self.inner.get(value * width))
            ):
                return inner // self.of_head_width(width)
        if self.heads is None or value >= self.heads:
            return min(self.sizes.heads, 2 ** int(math.log2(value)))
        return 1 if value == 1 else self.sizes.heads // 2

    def of_width(self, value: int) -> int:
        """Widths of residual streams become one width; others keep their ratio to it, and stay
        different from it.
        """
        if value in self.streams:
            return self.sizes.width
        multiple, widest = self.sizes.multiple, self.sizes.widest
        narrow = max(1, round(value * self.factor / multiple)) * multiple
        if widest is not None and value not in self.inner:
            narrow = min(narrow, widest)
        return min(value, narrow + multiple * (narrow == self.sizes.width))

    def of_list(self, key: str, values: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        kind = type(values)
        if self.is_of_layers(key, values):
            return kind(place for place, i in enumerate(self.kept) if i in values)
        if self.is_by_layer(values):
            values = kind(values[i] for i in self.kept)
        if not all(type(value) is int for value in values):
            return values
        if meaning(key) == "heads":
            common = math.gcd(*values)
            return kind(value // common for value in values)
        lists = [each for each in vars(self.config).items() if isinstance(each[1], list | tuple)]
        heads = next((each for name, each in lists if meaning(name) == "heads"), ())
        if len(heads) == len(values) and meaning(key) == "width":  # stages, each of its own heads
            return kind(self.sizes.multiple * value for value in self.of_list("heads", heads))
        return kind(self.of(key, value) for value in values)

    def rope(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Frequencies are as many as planes: lists of numbers of them, or by them, are narrowed."""
        planes = self.sizes.head_width * parameters.get("partial_rotary_factor", 1.0) / 2
        narrow = {}
        for key, value in parameters.items():
            if isinstance(value, dict):
                value = self.rope(value)
            elif key.endswith("section") and value:
                value = sections(value, int(planes))
            elif key in ("short_factor", "long_factor") and value:
                value = value[: int(planes)]
            narrow[key] = value
        return narrow


def first_of_each(kinds: list[str], count: int) -> list[int]:
    """``count`` indices of a list, in their order, of as many kinds as there are."""
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:count]
    others = [i for i in range(len(kinds)) if i not in firsts]
    return sorted(firsts + others[: max(0, count - len(firsts))])


def sections(values: list[int], total: int) -> list[int]:
    """A split of ``total`` in the proportions of ``values``."""
    ends = [round(total * sum(values[: i + 1]) / sum(values)) for i in range(len(values))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _configs(config: Any) -> Iterator[Any]:
    """A config and those that it holds, in their order."""
    yield config
    for value in list(vars(config).values()):
        if _is_config(value):
            yield from _configs(value)


def _streams(config: Any) -> set[int]:
    """Widths of residual streams in a config."""
    sizes = {_size(config, name) for name in ("hidden_size", "d_model", "n_embd")}
    return {size for size in sizes if size}


def _key(config: Any, name: str) -> str:
    """What a config calls the attribute of a common name."""
    return getattr(config, "attribute_map", {}).get(name, name)


def _size(config: Any, name: str) -> int | None:
    """A number of a config, by its common name, if it is one."""
    value = vars(config).get(_key(config, name))
    return value if type(value) is int and value > 0 else None


def _ties(model: nn.Module) -> set[tuple[str, ...]]:
    """The names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(each) for each in names.values()}
