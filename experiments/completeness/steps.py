"""Two runs from one orbit on every architecture, under all exact gauges that the optimizer takes.

At generic weights in float64. The second run begins where a random element of the whole product
group moves the first one's start; maps have condition numbers up to 100. A third begins at the
first one's start but for noise of the size of rounding: what training makes of that, it makes of
any rounding.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import Gauge, GaugeSet, complete_kinds, paper_kinds
from ddc.gauges.double import InDouble
from ddc.gauges.verify import generic
from ddc.optim import respected
from experiments.completeness.architectures import ARCHITECTURES
from experiments.completeness.report import STEPS

#: Scales, and singular values of maps, lie within a factor of ten of 1.
SPREAD = math.log(10)
#: Of the third start, relative.
ROUNDING = 1e-15
LR, MUON_LR, DECAY = 3e-3, 0.02, 0.1
Maker = Callable[[Any, Sequence[Gauge]], Optimizer]


def ddcadam(model: nn.Module, inputs: Any) -> Maker:
    """Makes DDCAdam of parameters and gauges."""
    return lambda named, gauges: DDCAdam(named, gauges, lr=LR, weight_decay=DECAY)


def ddcmuon(model: nn.Module, inputs: Any) -> Maker:
    """Makes DDCMuon."""
    hidden = hidden_matrices(model, inputs=inputs)
    return lambda named, gauges: DDCMuon(
        named,
        gauges,
        hidden,
        lr=MUON_LR,
        adam_lr=LR,
        weight_decay=DECAY,
    )


OPTIMIZERS: Mapping[str, Callable[[nn.Module, Any], Maker]] = {
    "DDCAdam": ddcadam,
    "DDCMuon": ddcmuon,
}


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """In float64, whatever the model casts to."""
    with InDouble():
        given = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
        return given if isinstance(given, Tensor) else given.logits


def trained(model: nn.Module, inputs: Any, optimizer: Optimizer, steps: int) -> Tensor:
    """Log-probabilities after some steps on drawn labels."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        with InDouble():
            logits = logits_of(model, inputs).flatten(0, -2)
            labels = torch.randint(logits.shape[-1], (len(logits),), generator=generator)
            F.cross_entropy(logits, labels).backward()
        optimizer.step()
    return logits_of(model, inputs).detach().log_softmax(-1)


def measure(name: str, optimizer: str) -> dict[str, Any]:
    """The record of an architecture under an optimizer."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model, inputs = ARCHITECTURES[name]()
    kinds = [*dict.fromkeys((*complete_kinds(), *paper_kinds()))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = find_gauges(model.eval(), inputs=inputs, loss="cross_entropy", kinds=kinds)
    make = OPTIMIZERS[optimizer](model, inputs)
    kept = respected(make, model.named_parameters(), found)
    refused = kept.refused[len(found.refused) :]
    inputs = tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = generic(parameter.detach(), generator)
    other = copy.deepcopy(model)
    GaugeSet(kept.found).transform_(other, torch.Generator().manual_seed(2), SPREAD)
    near = copy.deepcopy(model)
    for parameter in near.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data *= 1 + ROUNDING * noise
    at_start, moved = (logits_of(each, inputs).detach().log_softmax(-1) for each in (model, other))
    end, end_moved, end_near = (
        trained(each, inputs, make([*each.named_parameters()], kept.found), STEPS)
        for each in (model, other, near)
    )
    return {
        "model": name,
        "optimizer": optimizer,
        "taken": Counter(gauge.kind for gauge in kept),
        "left_out": {each.kind: each.reason for each in refused},
        "start": float((moved - at_start).abs().max()),
        "difference": float((end - end_moved).abs().max()),
        "near": float((end - end_near).abs().max()),
        "way": float((end - at_start).abs().max()),
        "seconds": time.perf_counter() - start,
    }
