"""Weights that are held in a format of fewer bits, without a copy in a finer one.

The tensors stay float32, and hold only what the format can: a step reads them, computes in float32,
and what it writes is rounded to nearest. So a step that is shorter than half the distance of two
numbers is lost, as it is where memory holds these bits alone. That is all that is modelled:
gradients, activations and the state of the optimizer keep their precision, the same for every
optimizer, and no kernel of low precision is run.

``float8`` is e4m3 (four bits of exponent, three of mantissa, the largest 448) with one scale a
matrix, which brings its largest entry near 448; vectors are bfloat16, as they are few. The scale is
a power of two, as in the microscaling formats (Open Compute Project, MX specification 1.0), so that
it rounds nothing by itself, and what was rounded once stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddc.gauges import named_parameters

#: Beyond them a power of two, or the inverse of one, is not a normal number of float32.
LARGEST_EXPONENT = 126


def in_bfloat16(weight: Tensor) -> Tensor:
    """The nearest numbers of bfloat16, in the dtype of the weight."""
    return weight.bfloat16().to(weight)


def in_float8(weight: Tensor) -> Tensor:
    """The nearest numbers of e4m3 times one power of two, the largest that takes no entry beyond
    448; in the dtype of the weight, of any shape. Entries that are not finite stay as they are.
    """
    mantissa, exponent = torch.frexp(weight.abs().amax())  # 448 is 0.875 times 2^9
    shift = 9 - exponent - (mantissa > 0.875).to(exponent)
    shift = shift.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    scale = torch.ldexp(torch.ones_like(mantissa), shift)
    rounded = (weight * scale).to(torch.float8_e4m3fn).to(weight) / scale
    # the cast takes an infinite entry to 448: a run that diverges would look sound
    return torch.where(weight.isfinite(), rounded, weight)


@torch.no_grad()
def round_weights_(model: nn.Module, weights: str) -> None:
    """Round all parameters in place to the format ``training.weights``.

    Args:
        model: whose parameters are whole, on any device.
        weights: ``float32`` leaves them as they are.
    """
    if weights == "float32":
        return
    for p in named_parameters(model).values():
        p.copy_(in_float8(p) if weights == "float8" and p.ndim > 1 else in_bfloat16(p))
