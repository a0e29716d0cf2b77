"""The nearest (semi-)orthogonal matrix, exactly and by Newton-Schulz iteration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Keller Jordan's quintic, https://kellerjordan.github.io/posts/muon: singular values end in about
#: [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
#: What is smaller counts as this small, as in ``torch.optim.Muon``: a vanishing momentum makes a
#: vanishing step.
SMALLEST_NORM = 1e-7


def newton_schulz(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Five iterations that bring all singular values near 1 and leave the singular vectors.

    Args:
        x: (..., rows, columns).
        dtype: of the arithmetic; None for that of x.

    Returns:
        Like x; zero where x is zero.
    """
    a, b, c = COEFFICIENTS
    y = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM)
    wide = x.shape[-2] <= x.shape[-1]
    y = (y if wide else y.mT).to(dtype or x.dtype).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y if wide else y.mT).reshape(x.shape).to(x.dtype)


def newton_schulz_bfloat16(x: Tensor) -> Tensor:
    """:func:`newton_schulz` in bfloat16, as ``torch.optim.Muon`` has it."""
    return newton_schulz(x, torch.bfloat16)


#: How far above the machine's precision a gradient that is zero in exact arithmetic may lie.
ROUNDINGS = 256


def polar_factor(x: Tensor) -> Tensor:
    """The polar factor U Vᵀ of x = U S Vᵀ; singular values that are rounding error count as zero:
    that of a backward pass, which is larger than that of a decomposition of small matrices.

    Rows and columns that are zero stay exactly zero, as under Newton-Schulz: rounding error in the
    row of a dead unit would wake it in a direction without meaning.

    Args:
        x: (..., rows, columns), float32 or float64.
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    rank = s > s[..., :1] * max(ROUNDINGS, *x.shape[-2:]) * torch.finfo(x.dtype).eps
    alive = (x != 0).any(-1, keepdim=True) & (x != 0).any(-2, keepdim=True)
    return torch.where(alive, (u * rank[..., None, :]) @ vh, 0.0)


#: Names of the orthogonalizers, as options have them.
ORTHOGONALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "newton_schulz_bfloat16": newton_schulz_bfloat16,
    "newton_schulz": newton_schulz,
    "polar": polar_factor,
}
