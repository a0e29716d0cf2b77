"""The norm to clip by, whatever a training tool has put around the optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddc.optim.lift import Lift


def grad_norm(optimizer: Any) -> Tensor:
    """:meth:`DDCAdam.grad_norm` of an optimizer, or of what accelerate or Lightning made of it.

    These keep what they were given as an ``optimizer`` of theirs. Gradients must be unscaled: with
    accelerate in float16, call ``accelerator.unscale_gradients(optimizer)`` first. Use with
    ``torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, ddc.grad_norm(optimizer))``
    in the place of ``accelerator.clip_grad_norm_``, which goes by the Euclidean norm.

    Raises:
        TypeError: it is, and holds, no :class:`ddc.DDCAdam` or :class:`ddc.DDCMuon`.
    """
    inner, seen = optimizer, [optimizer]
    while not isinstance(inner, Lift):
        inner = getattr(inner, "optimizer", None)
        if inner is None or any(inner is each for each in seen):
            raise TypeError(
                f"a {type(optimizer).__name__} is not a DDCAdam or DDCMuon, and holds none as its"
                " optimizer, so has no gauge-invariant norm: clip by"
                " torch.nn.utils.clip_grad_norm_"
            )
        seen.append(inner)
    return inner.grad_norm()
