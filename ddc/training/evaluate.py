"""What a model does on the fixed batches of both splits."""

from __future__ import annotations

import contextlib
import math

import torch

from ddc.gauges.trace import in_evaluation
from ddc.models import cross_entropy
from ddc.optim.sharding import local_part
from ddc.training.calibration import calibration_error
from ddc.training.records import Row
from ddc.training.run_folder import DivergedError, where_to_go_on
from ddc.training.schema import TrainingConfig
from ddc.training.setup import Batch, Setup


def learning_rate_factor(training: TrainingConfig, step: int) -> float:
    """Learning rate of a step, relative to its peak."""
    warmup = max(1, round(training.warmup * training.steps))
    if step < warmup:
        return (step + 1) / warmup
    if training.schedule == "cosine":
        progress = (step - warmup) / max(1, training.steps - warmup)
        return training.final_lr + (1 - training.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    decay = round(training.decay * training.steps)
    if training.schedule == "wsd" and decay and step >= training.steps - decay:
        return training.final_lr + (1 - training.final_lr) * (training.steps - step) / decay
    return 1.0


def evaluation_batches(setup: Setup, split: str) -> list[Batch]:
    """The fixed batches of a split, this rank's part of each, on the device."""
    training, part = setup.config.training, setup.ranks.part
    batches = setup.data.evaluation_batches(split, training.evaluation_batches, setup.batch_size)
    return [(part(x).to(setup.device), part(y).to(setup.device)) for x, y in batches]


def evaluate(setup: Setup, step: int, batches: dict[str, list[Batch]]) -> Row:
    """What :func:`measure` finds on fixed batches of both splits; and the learning rates of the
    next step.

    Raises:
        DivergedError: a loss is not finite.
    """
    found = {split: measure(setup, each) for split, each in batches.items()}
    for split, values in found.items():
        if not math.isfinite(loss := values["loss"]):
            raise DivergedError(
                f"the {split} loss after step {step} is {loss}. {where_to_go_on(setup.folder)}"
            )
    factor = learning_rate_factor(setup.config.training, step)
    rates = {key: getattr(setup.config.optimizer, key, None) for key in ("lr", "adam_lr")}
    return {
        "step": step,
        "epoch": step * setup.batch_size * setup.data.units_per_example / setup.data.train_units,
        **{key: peak * factor for key, peak in rates.items() if peak is not None},
        "gap": found["validation"]["loss"] - found["train"]["loss"],
        **{
            f"{split}_{key}": value
            for split, values in found.items()
            for key, value in values.items()
        },
    }


@torch.no_grad()
def measure(setup: Setup, batches: list[Batch]) -> dict[str, float]:
    """Mean loss in nats, accuracy and calibration error over the batches of all ranks, in
    evaluation mode.
    """
    loss, confidences, hits = 0.0, [], []
    with in_evaluation(setup.model):
        for x, y in batches:
            with autocast(setup):
                logits = setup.model(x)
            loss += float(cross_entropy(logits, y)) * y.numel() if len(y) else 0.0
            logits = logits.float()
            largest, predicted = logits.max(-1)
            confidences.append((largest - logits.logsumexp(-1)).exp().flatten())
            hits.append((predicted == y).flatten())
    confidence, hit = (
        torch.cat(setup.ranks.of_all(torch.cat(each).cpu())) for each in (confidences, hits)
    )
    return {
        "loss": setup.ranks.total(loss) / len(hit),
        "accuracy": int(hit.sum()) / len(hit),
        "calibration_error": calibration_error(confidence, hit),
    }


def autocast(setup: Setup) -> contextlib.AbstractContextManager[object]:
    """Mixed precision as configured."""
    dtype = getattr(torch, setup.config.training.precision)
    return torch.autocast(setup.device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_finite(setup: Setup) -> None:
    """Raise DivergedError rather than save weights that are not finite."""
    finite = all(bool(local_part(p.detach()).isfinite().all()) for p in setup.model.parameters())
    if setup.ranks.total(not finite):
        raise DivergedError(
            f"the weights are not finite; they are not saved. {where_to_go_on(setup.folder)}"
        )
