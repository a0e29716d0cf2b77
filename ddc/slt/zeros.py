"""Exact zeros of a layer's second moments that are gauges: told by the gauges of the model, as a
certificate counts them.
"""

from __future__ import annotations

import copy

from torch import nn

from ddc.gauges import find_gauges

#: Why nothing sees the mean of a stream.
MEAN_OF_STREAM = "read by LayerNorms only, which subtract the mean"


def mean_of_stream(model: nn.Module, writer: str) -> str | None:
    """Why the gradients of a residual stream have the all-ones vector for an exact zero, if they
    do: where ``stream_mean`` is a gauge, what writes to the stream may move along that vector, and
    no log-probability sees it.

    Args:
        model: one whose example :func:`ddc.find_gauges` knows; read in evaluation, without dropout.
        writer: name of the weight of a linear map that writes to the stream.

    Raises:
        ValueError: it cannot be traced.
    """
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    gauges = find_gauges(model, kinds=["stream_mean"], verify=False)
    unseen = any(writer in gauge.parameters for gauge in gauges)
    return MEAN_OF_STREAM if unseen else None
