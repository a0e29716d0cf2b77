"""Exact null vectors of a layer's second moments, and what says that they are there: a gauge of the
model, as a certificate counts them, or one operation that the layer is seen to stand beside.

A gauge that moves a weight (and its bias) by a nᵀ for every a is one since n is orthogonal to all
that the weight reads; one that moves it by u nᵀ for every n, since nothing that reads its outputs
sees u (:func:`zeros_of_gauge`). Two such zeros need no gauge and hold without it, where it is
refused: a head that is tied to the embedding has no ``logit_shift``, and a reader without a bias no
``reader_shift`` behind a norm with a shift, but the moments have their zeros. They are told by the
operation itself (:func:`after_layer_norm`, :func:`sums_to_zero`), without a trace of the model.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddc.gauges import Gauge, Shift, find_gauges
from ddc.gauges.affine import ScaledShift, Translation
from ddc.gauges.base import Params

#: Why nothing sees the mean of a stream.
MEAN_OF_STREAM = "read by LayerNorms only, which subtract the mean"
#: Why nothing sees the mean of logits.
MEAN_OF_LOGITS = "softmax does not see the mean of the logits"
#: Why outputs of a map or a table may all move alike, by kind of gauge. The head's may where the
#: score sums to zero, which the probe tells.
MEANS = {
    "stream_mean": MEAN_OF_STREAM,
    "router_shift": "read by a softmax only, which does not see the mean",
}


class Zeros(NamedTuple):
    """Exact zeros of a second moment: a null vector, or a bound on its rank, with the reason in
    words.
    """

    reason: str
    vector: Tensor | None = None
    rank: int | None = None


class Nulls(NamedTuple):
    """What a gauge says about one weight's moments.

    Attributes:
        weight: its name.
        activation, gradient: null vectors, of the inputs less ``shift`` and of output gradients.
        shift: of the norm before, (inputs,); None for 0.
    """

    weight: str
    activation: list[Zeros]
    gradient: list[Zeros]
    shift: Tensor | None = None


def zeros_of_gauge(gauge: Gauge, params: Params) -> Nulls | None:
    """The null vectors that a gauge says a layer has, at these weights; None if it says none.

    Args:
        gauge: of the model, of any kind.
        params: the model's parameters by name.
    """
    match gauge:
        case Shift(kind=kind, weight=name) if kind in MEANS:
            ones = params[name].new_ones(len(params[name]), dtype=torch.float64)
            return Nulls(name, [], [Zeros(MEANS[kind], vector=ones)])
        case Translation(kind="stream_mean", slots=(slot,)):
            table = params[slot.parameter]
            if table.ndim != 2 or slot.axis != 0:  # the same number in all entries of a row
                return None
            ones = table.new_ones(table.shape[1], dtype=torch.float64)
            return Nulls(slot.parameter, [], [Zeros(MEAN_OF_STREAM, vector=ones)])
        case ScaledShift(kind="stream_mean"):
            weight = params[gauge.weight]
            if weight.ndim != 2 or gauge.axis != 1:
                return None
            assert gauge.scale is not None
            behind = params[gauge.scale].detach()
            if not behind.all():
                return None  # no vector of its inverses
            vector = 1 / behind.double()
            return Nulls(gauge.weight, [], [Zeros(MEAN_OF_STREAM, vector=vector)])
        case ScaledShift():
            weight = params[gauge.weight]
            if weight.ndim > 2:  # what a convolution reads is no vector a row
                return None
            scale, shift = (
                None if name is None else params[name].detach().double()
                for name in (gauge.scale, gauge.shift)
            )
            inputs = weight.shape[1 - gauge.axis]
            return Nulls(gauge.weight, after_layer_norm(scale, weight, inputs), [], shift)
    return None


def mean_of_stream(model: nn.Module, writer: str) -> str | None:
    """Why the gradients of a residual stream have the all-ones vector for an exact zero, if they
    do: where ``stream_mean`` is a gauge, what writes to the stream may move along that vector, and
    no log-probability sees it.

    Args:
        model: one whose example :func:`ddc.find_gauges` knows; read in evaluation, without dropout.
        writer: name of the weight of a linear map that writes to the stream, or how the names of
            several begin, of which one does.

    Raises:
        ValueError: it cannot be traced.
    """
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    gauges = find_gauges(model, kinds=["stream_mean"], verify=False)
    unseen = any(
        name.startswith(writer)
        for gauge in gauges
        if not (isinstance(gauge, Translation) and gauge.slots[0].places)  # of queries or keys
        for name in gauge.parameters
    )
    return MEAN_OF_STREAM if unseen else None


def after_layer_norm(scale: Tensor | None, like: Tensor, size: int) -> list[Zeros]:
    """1/γ is an exact null vector of a LayerNorm's output less β, which is γ times what has mean
    zero.

    (An RMSNorm subtracts no mean and has none.) A γ with zeros has other null vectors, which are no
    gauge: the channels at zero.

    Args:
        scale: γ, or None for a norm without one.
        like: a tensor on the device of the vectors, which are float64.
        size: entries of the output.
    """
    if scale is None:
        ones = torch.ones(size, dtype=torch.float64, device=like.device)
        return [Zeros("LayerNorm subtracts the mean", vector=ones)]
    gamma = scale.detach().double()
    dead = gamma == 0
    if dead.any():
        units = torch.eye(len(gamma), dtype=torch.float64, device=gamma.device)[dead]
        return [Zeros("a gamma at zero", vector=unit) for unit in units]
    return [Zeros("gamma^-1 after a LayerNorm", vector=1 / gamma)]


def sums_to_zero(gradient: Tensor) -> bool:
    """Every row of a score sums to zero up to rounding: so it is with a softmax, blind to the mean
    of its logits.
    """
    rounding = 16 * torch.finfo(gradient.dtype).eps * gradient.abs().sum(-1)
    return bool((gradient.sum(-1).abs() <= rounding).all())
