"""The loss that all models are trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats; the log-softmax is taken in float32 or better.

    Args:
        logits: (..., classes).
        targets: classes, (...) int64, or their probabilities, (..., classes).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = targets.flatten(0, -2) if targets.is_floating_point() else targets.flatten()
    return F.cross_entropy(logits.flatten(0, -2), targets)
