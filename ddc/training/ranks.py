"""Several processes that train one model together, by DDP or FSDP2, started by torchrun.

Batches are those of one process, each rank takes its part; records, checkpoints and W&B are the
first rank's. Where that one may fail (a full disk, a folder that is busy), all ranks fail alike.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddc.training.schema import LauncherConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A process among those that train one model; by default there is one, and nothing is
    exchanged.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        parallel: ``ddp``, ``fsdp``, or None for one process.
    """

    rank: int = 0
    size: int = 1
    parallel: str | None = None

    @property
    def first(self) -> bool:
        """Whether this process keeps the records."""
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """What a function returns, or raises, that the first rank alone calls: on all ranks."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except Exception as error:  # whatever it is, the other ranks must not wait for ever
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        result, raised = outcome
        if raised is not None:
            try:
                raise raised
            finally:
                del outcome, raised  # which would keep all that its traceback holds
        return result

    def of_all(self, value: T) -> list[T]:
        """The values of all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def total(self, value: float) -> float:
        """The sum over all ranks."""
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(summed)
        return float(summed)

    def part(self, batch: Tensor) -> Tensor:
        """The part of a batch that this rank takes; there may be more ranks than parts, and it is
        empty.
        """
        return batch.tensor_split(self.size)[self.rank]

    def parallelized(self, model: nn.Module) -> nn.Module:
        """The model as a training step calls it.

        DDP wraps it, and leaves its parameters as they are. FSDP2 changes it in place: parameters
        become DTensors, the layers of each list or sequence of modules are gathered one at a time,
        and what is left with the model.
        """
        device = next(model.parameters()).device
        match self.parallel:
            case "ddp":
                return DistributedDataParallel(model)
            case "fsdp":
                # takes a second to import, which a run by one process would wait for
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                mesh = init_device_mesh(device.type, (self.size,))
                for layer in layers_of_stacks(model):
                    fully_shard(layer, mesh=mesh)
                # else an evaluation leaves it gathered
                fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model


def layers_of_stacks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists and sequences of modules."""
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from child
        else:
            yield from layers_of_stacks(child)


#: One process.
ALONE = Ranks()


def join_ranks(config: LauncherConfig, device: str = "auto") -> Ranks:
    """Connect to the processes that train a run, until this one ends; ``device`` is
    ``training.device``.

    Raises:
        ValueError: the launcher of the config is not what started this process.
    """
    started_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if config.name == "local":
        if started_by_torchrun:
            raise ValueError(
                "launcher=local (the default), but torchrun started this process: add"
                " launcher=torchrun, so that the processes train one model together"
            )
        return ALONE
    if not started_by_torchrun:
        raise ValueError(
            "launcher=torchrun, but torchrun did not start this process: torchrun"
            " --nproc-per-node=2 train.py launcher=torchrun ..., or leave launcher=torchrun out"
        )
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(
                f"torchrun --nproc-per-node is more than the {gpus} GPUs of this machine: at most"
                f" {gpus}, or training.device=cpu"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():  # runs of a Hydra multirun share one process
        dist.init_process_group(backend)
        atexit.register(leave_ranks)
    return Ranks(dist.get_rank(), dist.get_world_size(), config.parallel)


def leave_ranks() -> None:
    """Disconnect, once the model is gone: of both, DDP must not be the last to hold the group.

    It would destroy the group while it holds the GIL, for which a thread of gloo may wait, for
    ever.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
