"""What gauges, hidden matrices and layers the models of this package have, told from their
configuration: what :mod:`ddc.gauges` and :mod:`ddc.slt` would otherwise trace or ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from torch import Tensor, nn

from ddc.gauges import (
    Axis,
    Chain,
    Gauge,
    GaugeSet,
    HiddenMatrix,
    Refusal,
    Rescale,
    RotatedAxis,
    Rotation,
    Shift,
    hidden_matrices,
    read_gauges,
)
from ddc.gauges.base import place_of
from ddc.gauges.trace import Inputs
from ddc.models.causal_lm import CausalLM
from ddc.models.deep_mlp import DeepMLP
from ddc.models.gpt import GPT, MLP, Attention
from ddc.slt.observables import Layer, layers_of
from ddc.slt.zeros import mean_of_stream


@read_gauges.register
def _(model: DeepMLP, per_layer: bool, inputs: Inputs | None, loss: str | None) -> GaugeSet:
    layers = [f"layers.{i}.weight" for i in range(len(model.layers))]
    shift = Shift("head.weight")
    if model.config.residual:
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        rescales = [
            Rescale("relu_rescale", f"blocks.{i}", (Axis(a),), (Axis(b, 1),))
            for i, (a, b) in enumerate(pairs)
        ]
        reason = "the input of a residual block is read by more than one layer"
        return GaugeSet((shift, *rescales), (Refusal("chained_rescale", "layers", reason),))
    chain = ["embedding.weight", *layers, "head.weight"]
    if per_layer:
        reason = "rescales per layer were asked for; those per neuron contain them"
        return GaugeSet((shift, Chain(tuple(chain))), (Refusal("relu_rescale", "layers", reason),))
    # a neuron of the input layer is a column of the embedding, which is a table of rows
    first = Rescale("relu_rescale", "embedding", (Axis(chain[0], 1),), (Axis(chain[1], 1),))
    pairs = list(pairwise(chain[1:]))
    rescales = [
        Rescale("relu_rescale", f"layers.{i}", (Axis(a),), (Axis(b, 1),))
        for i, (a, b) in enumerate(pairs)
    ]
    reason = (
        "the rescales of all neurons contain it; find_gauges(model, per_layer=True) finds it in"
        " their place"
    )
    return GaugeSet((shift, first, *rescales), (Refusal("chained_rescale", "layers", reason),))


@read_gauges.register
def _(model: GPT, per_layer: bool, inputs: Inputs | None, loss: str | None) -> GaugeSet:
    finding = _Finding(model)
    for i, _block in enumerate(model.blocks):
        place = f"blocks.{i}"
        attention = f"{place}.attention"
        finding.norm(
            f"{place}.attention_norm", [f"{attention}.{name}" for name in ("query", "key", "value")]
        )
        finding.value_rotation(attention)
        finding.query_key_rotation(attention)
        mlp = f"{place}.mlp"
        finding.norm(
            f"{place}.mlp_norm",
            [f"{mlp}.{name}" for name in ("gate", "up") if finding.has(f"{mlp}.{name}")],
        )
        finding.feed_forward(mlp)
    finding.norm("norm", ["head"])
    finding.logit_shift("head")
    return GaugeSet(tuple(finding.found), tuple(finding.refused))


class _Finding:
    """Collects what is found and refused in one model, by the names of its modules."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        uses = [place_of(p) or id(p) for _, p in model.named_parameters(remove_duplicate=False)]
        self.tied = {id_ for id_ in uses if uses.count(id_) > 1}
        self.found: list[Gauge] = []
        self.refused: list[Refusal] = []

    def has(self, name: str) -> bool:
        return self.modules.get(name) is not None

    def refuse(self, kind: str, where: str, reason: str) -> None:
        self.refused.append(Refusal(kind, where, reason))

    def parameter(self, module: str, name: str) -> str | None:
        """The full name of a module's parameter, if it has one."""
        return (
            f"{module}.{name}"
            if isinstance(getattr(self.modules[module], name, None), Tensor)
            else None
        )

    def affine(self, module: str, axis: int = 0) -> tuple[Axis, ...]:
        """Weight and, for rows, bias of a module as one side of a rescale."""
        names = (
            self.parameter(module, "weight"),
            self.parameter(module, "bias") if axis == 0 else None,
        )
        return tuple(Axis(name, axis) for name in names if name is not None)

    def is_tied(self, module: str) -> bool:
        weight = self.modules[module].weight
        return (place_of(weight) or id(weight)) in self.tied

    def norm(self, norm: str, readers: list[str]) -> None:
        """Norm scale: gamma (and beta) against the columns of every linear map that reads the
        norm.
        """
        if not isinstance(self.modules[norm], nn.LayerNorm | nn.RMSNorm):
            self.refuse(
                "norm_scale",
                norm,
                f"{type(self.modules[norm]).__name__} is not a LayerNorm or RMSNorm",
            )
        elif self.parameter(norm, "weight") is None:
            self.refuse("norm_scale", norm, "the norm has no scale")
        elif not_linear := [name for name in readers if type(self.modules[name]) is not nn.Linear]:
            self.refuse("norm_scale", norm, f"its reader {not_linear[0]} is not a linear map")
        elif tied := [name for name in readers if self.is_tied(name)]:
            self.refuse("norm_scale", norm, f"its reader {tied[0]} is tied to another parameter")
        else:
            minus = tuple(axis for name in readers for axis in self.affine(name, axis=1))
            self.found.append(Rescale("norm_scale", norm, plus=self.affine(norm), minus=minus))

    def logit_shift(self, head: str) -> None:
        """The same vector added to every row of the head."""
        if self.is_tied(head):
            self.refuse("logit_shift", head, "the head is tied to the embedding")
        else:
            weight, bias = self.parameter(head, "weight"), self.parameter(head, "bias")
            assert weight is not None
            self.found.append(Shift(weight, bias, where=head))

    def feed_forward(self, place: str) -> None:
        """ReLU, ReLU² or gated rescale: rows of ``up`` against columns of ``down``."""
        mlp = self.modules[place]
        assert isinstance(mlp, MLP)
        kind, degree = {
            "swiglu": ("gated_rescale", 1),
            "relu": ("relu_rescale", 1),
            "relu2": ("relu_rescale", 2),
        }.get(mlp.activation, ("", 0))
        if not degree:
            self.refuse("relu_rescale", place, f"{mlp.activation.upper()} is not homogeneous")
            return
        plus, minus = self.affine(f"{place}.up"), self.affine(f"{place}.down", axis=1)
        self.found.append(Rescale(kind, place, plus, minus, degree))

    def value_rotation(self, place: str) -> None:
        """Rows of W_V by R, columns of W_O by R^T, for each key-value head and the query heads that
        read it.
        """
        attention = self.modules[place]
        assert isinstance(attention, Attention)
        value, output = head_indices(attention)
        slots = [RotatedAxis(name, 0, value) for name in self._rows(place, "value")]
        slots.append(RotatedAxis(f"{place}.output.weight", 1, output))
        self.found.append(Rotation("value_rotation", place, tuple(slots), reflections=True))

    def query_key_rotation(self, place: str) -> None:
        """Rows of W_Q and W_K by the same R: per head without RoPE; with it, per frequency plane
        and the rest.
        """
        attention = self.modules[place]
        assert isinstance(attention, Attention)
        for name in ("query_norm", "key_norm"):
            if getattr(attention, name) is not None:
                self.refuse(
                    "norm_scale",
                    f"{place}.{name}",
                    "its reader, the attention product, is not a linear map",
                )
        if attention.query_norm is not None or attention.key_norm is not None:
            self.refuse(
                "qk_rotation",
                place,
                "QK-norm has a scale of its own, which does not commute with rotations",
            )
            return
        key, query = head_indices(attention)
        rotated = attention.rope.rotated if attention.rope is not None else 0
        if rotated:
            self._rotate_queries_and_keys(
                place, planes(query, rotated), planes(key, rotated), reflections=False
            )
        if key.shape[-1] - rotated > 1:
            self._rotate_queries_and_keys(
                place, query[..., rotated:], key[..., rotated:], reflections=True
            )

    def _rotate_queries_and_keys(
        self, place: str, query: np.ndarray, key: np.ndarray, reflections: bool
    ) -> None:
        slots = [
            RotatedAxis(name, 0, indices)
            for linear, indices in (("query", query), ("key", key))
            for name in self._rows(place, linear)
        ]
        self.found.append(Rotation("qk_rotation", place, tuple(slots), reflections))

    def _rows(self, place: str, linear: str) -> list[str]:
        return [axis.parameter for axis in self.affine(f"{place}.{linear}")]


def head_indices(attention: Attention) -> tuple[np.ndarray, np.ndarray]:
    """Indices of key-value heads, (kv_heads, 1, d_head), and of their query heads, (kv_heads,
    group, d_head).
    """
    kv_heads, group = attention.kv_heads, attention.heads // attention.kv_heads
    keys = np.arange(attention.key.out_features).reshape(kv_heads, 1, -1)
    return keys, np.arange(attention.query.out_features).reshape(kv_heads, group, -1)


def planes(heads: np.ndarray, rotated: int) -> np.ndarray:
    """Split (kv_heads, copies, d_head) into the planes of a half-split RoPE: (kv_heads · planes,
    copies, 2).
    """
    pairs = np.stack((heads[..., : rotated // 2], heads[..., rotated // 2 : rotated]), axis=-1)
    return pairs.swapaxes(1, 2).reshape(-1, heads.shape[1], 2)


@hidden_matrices.register
def _(
    model: GPT, per_head: bool = False, inputs: Inputs | None = None, apart: bool = False
) -> Sequence[HiddenMatrix]:
    heads, kv_heads = (model.config.heads, model.config.kv_heads) if per_head else (1, 1)
    matrices = []
    for i in range(len(model.blocks)):
        attention, mlp = f"blocks.{i}.attention", f"blocks.{i}.mlp"
        matrices += [
            HiddenMatrix(f"{attention}.query.weight", heads),
            HiddenMatrix(f"{attention}.key.weight", kv_heads),
            HiddenMatrix(f"{attention}.value.weight", kv_heads),
            HiddenMatrix(f"{attention}.output.weight", heads, axis=1),
        ]
        names = ("gate", "up", "down") if model.config.mlp == "swiglu" else ("up", "down")
        matrices += [HiddenMatrix(f"{mlp}.{name}.weight") for name in names]
    return matrices


@hidden_matrices.register
def _(
    model: DeepMLP, per_head: bool = False, inputs: Inputs | None = None, apart: bool = False
) -> Sequence[HiddenMatrix]:
    return [HiddenMatrix(f"layers.{i}.weight") for i in range(len(model.layers))]


@layers_of.register
def _(model: GPT) -> list[Layer]:
    ones = mean_of_stream(model, "blocks.0.mlp.down.weight")
    names = [
        ("embedding", "embedding"),
        *((f"block {i + 1}", f"blocks.{i}") for i in range(len(model.blocks))),
    ]
    return [Layer(name, module, gradient_ones=ones) for name, module in names]


@layers_of.register
def _(model: CausalLM) -> list[Layer]:
    names = {module: name for name, module in model.named_modules()}
    embedding = names[model.model.get_input_embeddings()]
    depth = model.model.config.num_hidden_layers
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"slt.readings with model.architecture={model.model.config.model_type}: its blocks are"
            " not told; use slt=none"
        )
    ones = mean_of_stream(model, f"{names[stacks[0][0]]}.")
    blocks = [(f"block {i + 1}", names[block]) for i, block in enumerate(stacks[0])]
    return [
        Layer(name, module, gradient_ones=ones)
        for name, module in (("embedding", embedding), *blocks)
    ]


@layers_of.register
def _(model: DeepMLP) -> list[Layer]:
    names = [(f"layer {i + 1}", f"layers.{i}") for i in range(len(model.layers))]
    layers = [Layer(name, module, "input") for name, module in (*names, ("head", "head"))]
    if (
        model.config.residual
    ):  # the stream is a sum of two tables at first, and the head reads it as it is at last
        layers[0] = replace(layers[0], activation_rank=2 * model.tokens - 1)
        layers[-2] = replace(layers[-2], gradient_rank=model.head.out_features - 1)
    return layers
