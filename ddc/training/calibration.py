"""How far a model's confidence is from its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_error(confidence: Tensor, hit: Tensor) -> float:
    """Expected calibration error: mean over predictions of |accuracy - confidence| of the bin that
    each falls in.

    Args:
        confidence: probability of the predicted class, (n,), floating point.
        hit: whether the prediction is right, (n,), bool.

    Source: Guo et al., arXiv:1706.04599, equation 5, with :data:`BINS` bins of equal width.
    """
    which = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    excess = torch.zeros(BINS, dtype=torch.float64, device=confidence.device)
    excess.index_add_(0, which, hit.double() - confidence.double())
    return float(excess.abs().sum()) / len(hit)
