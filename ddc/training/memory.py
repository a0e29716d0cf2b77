"""What a run will need, found without a GPU: on the host, no more than the weights is allocated."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from ddc.data import Data
from ddc.models import build_model, cross_entropy
from ddc.training.schema import Config, LiftConfig
from ddc.training.setup import (
    configured_gauges,
    configured_hidden,
    configured_optimizer,
    taken_gauges,
)


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step, and the number of parameters.

    ``peak`` counts tensors: what an allocator adds by fragmentation, and a CUDA context (about 0.5
    GB), come on top.
    """

    parameters: int
    optimizer_state: int
    peak: int


def estimate_memory(config: Config, data: Data) -> MemoryEstimate:
    """Take a training step on fake tensors, which have shapes and dtypes but no data.

    That checks every shape of model, loss and optimizer step, and that the step never needs a value
    on the host.
    """
    fake, training = FakeTensorMode(), config.training
    if isinstance(config.optimizer, LiftConfig):  # what is fake cannot be compiled for
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, compiled=False)
        )
    real = build_model(config.model, **data.sizes)  # what is traced must have values
    gauges = configured_gauges(config.gauges, real, verify=False)
    with FakeCopyMode(fake):
        model = copy.deepcopy(real)
    hidden = configured_hidden(config, real)
    gauges = taken_gauges(config, data, gauges, hidden)
    del real
    precision = getattr(torch, training.precision)
    batch = data.batch(
        0, (training.batch_size or data.train_units) // training.accumulation, config.seed
    )
    with fake:
        optimizer = configured_optimizer(config, model, gauges, hidden)
        for (
            parameter
        ) in model.parameters():  # some optimizers allocate their state in the first step
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        inputs, targets = (torch.zeros(each.shape, dtype=each.dtype) for each in batch)
        with tracker:
            with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
                loss = cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
    (peak,) = (by_kind["Total"] for by_kind in tracker.get_tracker_snapshot("peak").values())
    state = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    return MemoryEstimate(sum(p.numel() for p in model.parameters()), state, peak)
