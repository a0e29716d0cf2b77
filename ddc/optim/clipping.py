"""Clipping by the invariant norm, whatever a training tool has put around the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddc.gauges import is_split
from ddc.optim.lift import Lift


def lift_of(optimizer: Any) -> Lift:
    """The optimizer of this package that a training tool has wrapped, or that this one is.

    Raises:
        TypeError: it is, and holds, none.
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
    return inner


def grad_norm(optimizer: Any) -> Tensor:
    """:meth:`DDCAdam.grad_norm` of an optimizer, or of what accelerate or Lightning made of it.

    These keep what they were given as an ``optimizer`` of theirs. Gradients must be unscaled: with
    accelerate in float16, call ``accelerator.unscale_gradients(optimizer)`` first.

    Raises:
        TypeError: it is, and holds, no :class:`ddc.DDCAdam` or :class:`ddc.DDCMuon`.
    """
    return lift_of(optimizer).grad_norm()


def clip_grad_norm_(optimizer: Any, max_norm: float) -> Tensor:
    """Scale the gradients of all parameters of an optimizer, in place, so that their
    :func:`invariant norm <grad_norm>` is at most ``max_norm``; returns the norm before.

    It stands for ``torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)`` and for
    ``accelerator.clip_grad_norm_``, which go by the Euclidean norm.

    Raises:
        TypeError: as :func:`grad_norm`.
    """
    lift = lift_of(optimizer)
    norm = lift.grad_norm()
    # torch scales no list of whole parameters and split ones, or of several meshes
    alike: dict[object, list[Tensor]] = {}
    for group in lift.param_groups:
        for param in group["params"]:
            mesh = param.device_mesh if is_split(param) else None
            alike.setdefault(mesh, []).append(param)
    for params in alike.values():
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


class InvariantClipping:
    """For a ``LightningModule``, before it among the bases: ``Trainer(gradient_clip_val=...)``,
    which goes by the Euclidean norm, then goes by the invariant one.
    """

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """What Lightning calls once a step, on unscaled gradients.

        Raises:
            ValueError: clipping by value, which depends on the gauge however it is done.
            TypeError: as :func:`grad_norm`.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(
                f"Invalid gradient_clip_algorithm={str(gradient_clip_algorithm)!r}: entries of a"
                " gradient depend on the gauge; leave it out, or take 'norm'"
            )
        if gradient_clip_val:
            clip_grad_norm_(optimizer, gradient_clip_val)
