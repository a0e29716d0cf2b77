"""``find_gauges``: which gauges a model has, which it does not, and why."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection
from functools import singledispatch
from itertools import pairwise

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ddc.gauges.actions import Axis, Chain, Rescale, RotatedAxis, Rotation, Shift
from ddc.gauges.base import COMPLETE, KINDS, Gauge, Refusal, check_kind, place_of, unwrapped
from ddc.gauges.further import gauges_of_kinds
from ddc.gauges.gauge_set import GaugeSet
from ddc.gauges.trace import Inputs, example, traced
from ddc.gauges.traced import gauges_of_trace
from ddc.gauges.twin import narrow_twin
from ddc.gauges.verify import refuse, unchecked, unfit, verified, verified_by_twin
from ddc.models import DeepMLP
from ddc.models.gpt import GPT, MLP, Attention

#: What may be said of a loss.
LOSSES = ("cross_entropy", "other")
#: Sets of kinds that have a name.
KIND_SETS = {"paper": KINDS, "complete": COMPLETE}


def find_gauges(
    model: nn.Module,
    per_layer: bool = False,
    inputs: Inputs | None = None,
    *,
    loss: str | None = None,
    verify: bool = True,
    kinds: str | Collection[str] = "paper",
) -> GaugeSet:
    """Read the gauges of a model: what was found, and what was refused with the reason. Never
    guesses.

    The model is traced on an example, and gauges are proved on the operations that it makes
    (``ddc.gauges.traced``). Then they are tried: a random element of all groups at once must change
    nothing that the model computes, with random weights in float64, on the example in evaluation
    and in training, and on other and longer ones (``ddc.gauges.verify``). What fails is refused,
    with a warning; what cannot be tried is marked in :attr:`GaugeSet.unchecked`, with another.

    Args:
        model: any model that ``torch.export`` traces; left as it is.
        per_layer: where a chain of ReLU layers can be rescaled neuron by neuron, take the smaller
            group that rescales it layer by layer instead (the chained rescale).
        inputs: an example of what the model takes, as a tuple or, by keyword, a mapping: three
            positions or more, where there are positions. Not needed for models of transformers and
            timm, nor for ``nn.Sequential`` of linear maps and torch's encoder layers, nor where
            ``model.example_inputs()`` gives a tuple.
        loss: ``"cross_entropy"`` if the model is trained by softmax cross-entropy of its output
            ``logits``, or of its first; ``"other"`` if by anything else: the logit shift is a gauge
            of the former alone. None assumes the former, but refuses the shift where the model
            speaks against it (one output, several, ``config.problem_type``).
        verify: whether to try the gauges. It takes copies of the weights in float64, and some
            fifteen forward passes.
        kinds: ``"paper"``, those of :data:`ddc.gauges.KINDS`; ``"complete"``, all that are known,
            :data:`ddc.gauges.COMPLETE`; or names of kinds.

    Raises:
        ValueError: the model cannot be traced, ``inputs`` are needed, or an unknown ``loss`` or
            kind.
    """
    if loss is not None and loss not in LOSSES:
        raise ValueError(f"Invalid {loss=}: expected None or one of {', '.join(LOSSES)}")
    wanted = kinds_named(kinds)
    gauges, checked = _found(unwrapped(model), per_layer, inputs, loss, verify, wanted)
    reason_of = {(refusal.kind, refusal.where): refusal.reason for refusal in checked.refused}
    for gauge in gauges:
        if gauge not in checked.found:
            reason = reason_of[gauge.kind, gauge.where]
            warnings.warn(
                f"find_gauges: {gauge} is no symmetry of the model and is left out: {reason}",
                stacklevel=2,
            )
    for reason, count in Counter(checked.unchecked.values()).items():
        what = (
            "gauges were proved by rules alone" if count > 1 else "gauge was proved by rules alone"
        )
        warnings.warn(f"find_gauges: {count} {what} and not tried: {reason}", stacklevel=2)
    return checked


def kinds_named(kinds: str | Collection[str]) -> tuple[str, ...]:
    """Kinds of gauges by name, or by the name of a set of them.

    Raises:
        ValueError: an unknown one.
    """
    if isinstance(kinds, str):
        if kinds not in KIND_SETS:
            raise ValueError(
                f"Invalid {kinds=}: expected one of {', '.join(KIND_SETS)}, or a list of kinds"
            )
        return KIND_SETS[kinds]
    for kind in kinds:
        check_kind(kind)
    return tuple(kinds)


def _found(
    model: nn.Module,
    per_layer: bool,
    inputs: Inputs | None,
    loss: str | None,
    verify: bool,
    kinds: tuple[str, ...],
) -> tuple[GaugeSet, GaugeSet]:
    """The gauges that rules find, and what is left of them after they were tried, if they are to
    be.
    """
    if {*kinds} <= {*KINDS}:
        gauges = read_gauges(model, per_layer, inputs, loss)
        gauges = gauges if kinds == KINDS else gauges.only(kinds)
    else:
        gauges = gauges_of_kinds(traced(model, inputs), kinds, loss)
    if loss == "other":
        shifts = [gauge for gauge in gauges if gauge.kind == "logit_shift"]
        gauges = refuse(gauges, dict.fromkeys(shifts, "the loss is not softmax cross-entropy"))
    if not verify:
        return gauges, gauges
    return gauges, _checked(model, gauges, per_layer, inputs, loss, kinds)


def _checked(
    model: nn.Module,
    gauges: GaugeSet,
    per_layer: bool,
    inputs: Inputs | None,
    loss: str | None,
    kinds: tuple[str, ...],
) -> GaugeSet:
    """The gauges that a random element leaves without effect, on the model or, where it cannot be
    run, on a twin.
    """
    try:
        if not (reason := unfit(model)):
            return verified(gauges, model, *example(model, inputs))
        twin = narrow_twin(model)
        if still := unfit(twin):
            return unchecked(gauges, f"{reason}, and of its narrow twin: {still}")
        _, of_twin = _found(
            twin, per_layer, tree_map_only(Tensor, Tensor.cpu, inputs), loss, True, kinds
        )
    except ValueError as error:
        return unchecked(gauges, f"{reason}, and {error}" if reason else str(error))
    return verified_by_twin(gauges, of_twin)


@singledispatch
def read_gauges(
    model: nn.Module, per_layer: bool, inputs: Inputs | None, loss: str | None
) -> GaugeSet:
    """The gauges of a model by rules alone; arguments as for :func:`find_gauges`.

    A family of models whose gauges can be told without a trace, as those of this package, has a
    reader of its own, registered with ``read_gauges.register``, which gives the same and takes no
    time.
    """
    return gauges_of_trace(traced(model, inputs), per_layer, loss)


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
