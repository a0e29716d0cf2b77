"""Checkpoints that are whole or absent, and hold all that a run needs to go on bit for bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ddc.training.records import write_atomically


def save_checkpoint(path: Path, step: int, model: nn.Module, optimizer: Optimizer, scaler: GradScaler) -> None:
    """Write weights, optimizer, scaler and random state after ``step`` steps, atomically.

    The position in the data is the step: batches are a function of it.
    """
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, scaler: GradScaler, device: torch.device
) -> int:
    """Restore what :func:`save_checkpoint` wrote and return its step.

    Raises:
        ValueError: the checkpoint does not fit the model or the optimizer.
    """
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this run ({error}); start over with training.resume=never") from error
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"]["cpu"].cpu())
    if len(state["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([rng.cpu() for rng in state["rng"]["cuda"]])
    return int(state["step"])
