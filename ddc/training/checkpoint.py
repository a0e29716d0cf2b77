"""Checkpoints that are whole or absent, and hold all that a run needs to go on bit for bit.

A file is named by its step and the SHA-256 of its bytes, so that a damaged one is known by its
name; the one before is kept, to go on from. Nothing in a file is executed when it is read
(``weights_only``). It holds whole tensors, however many processes trained: a run may go on with
another number.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ddc.gauges import whole
from ddc.models import check_fit
from ddc.optim.sharding import split_like
from ddc.training.ranks import Ranks
from ddc.training.records import write_atomically

#: How many are kept: the last, and the one before.
KEPT = 2
NAME = re.compile(r"checkpoint-(\d{9})-([0-9a-f]{64})\.pt")

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be gone on from: damaged, of another run, or hostile."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the last one first."""
    return sorted(
        (path for path in folder.glob("checkpoint-*.pt") if NAME.fullmatch(path.name)), reverse=True
    )


def step_of(path: Path) -> int:
    """After how many steps a checkpoint was written."""
    return int(path.name.split("-")[1])


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    ranks: Ranks,
) -> None:
    """Write weights, optimizer, scaler and random state after ``step`` steps, atomically; older
    ones go but for one.

    All ranks must call; the first writes. What a killed process left of one that it wrote goes
    first. The position in the data is the step: batches are a function of it.

    Raises:
        OSError: it cannot be written (a full disk, say); those before are left as they are.
    """
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    }
    if ranks.size > 1:
        state = gathered(state, ranks.first)
    ranks.on_first(lambda: write_checkpoint(folder, step, state))


def gathered(nest: Any, keep: bool) -> Any:
    """A nest of dicts and lists with its tensors whole, and on the CPU; ranks that are not to keep
    them get None.
    """
    if isinstance(nest, Tensor):
        tensor = whole(nest)
        return tensor.cpu() if keep else None
    if isinstance(nest, Mapping):
        return {key: gathered(value, keep) for key, value in nest.items()}
    return [gathered(value, keep) for value in nest] if isinstance(nest, list) else nest


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a state to the file that is named by its bytes, and delete all others but the one
    before.

    Those of later steps are damaged, or of a past that was given up with the damaged ones.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"checkpoint-{step:09d}-{hashlib.sha256(content).hexdigest()}.pt"
    for each in folder.glob("checkpoint-*.tmp"):
        each.unlink()
    write_atomically(path, content)
    others = [each for each in checkpoints(folder) if each != path]
    before = [each for each in others if step_of(each) < step]
    for each in set(others) - set(before[: KEPT - 1]):
        each.unlink()


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint that is whole, on the CPU; None if there is none at all.

    One that is damaged is reported, and the one before is taken.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    paths = checkpoints(folder)
    for path in paths:
        content = path.read_bytes()
        if path.stem.endswith(hashlib.sha256(content).hexdigest()):
            return unpacked(path, content)
        log.warning(
            "%s is damaged: its bytes are not those that were written. Trying the one before", path
        )
    if paths:
        raise CheckpointError(
            f"all {len(paths)} checkpoints in {folder} are damaged; start over with"
            " training.resume=never"
        )
    return None


def unpacked(path: Path, content: bytes) -> dict[str, Any]:
    """What a checkpoint holds.

    Raises:
        CheckpointError: it is something else, or holds more than tensors, numbers and text, and
            reading it would execute something.
    """
    wrong = f"{path} is no checkpoint of a run, and may be hostile: it is not loaded"
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(wrong) from error
    if (
        not isinstance(state, dict)
        or not {"step", "model", "optimizer", "scaler", "rng"} <= state.keys()
    ):
        raise CheckpointError(wrong)
    return state


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, scaler: GradScaler, ranks: Ranks
) -> int | None:
    """Restore what :func:`save_checkpoint` wrote and return its step; None where nothing was
    written.

    All ranks read the file, and take their parts.

    Raises:
        CheckpointError: the checkpoint does not fit the model or the optimizer, is hostile, or none
            is whole; or not all ranks see the same one.
    """
    state = read_checkpoint(folder)
    if len(steps := set(ranks.of_all(None if state is None else state["step"]))) > 1:
        raise CheckpointError(
            f"processes see different checkpoints in {folder} ({steps}): it must be a shared folder"
        )
    if state is None:
        return None
    try:
        own = model.state_dict()
        check_fit(own, state["model"], "the checkpoint")
        weights = {name: split_like(w, own[name]) for name, w in state["model"].items()}
        model.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} does not fit this run ({error}); start over with training.resume=never"
        ) from error
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"]["cpu"])
    if len(state["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    return int(state["step"])
