"""How far a step moves a matrix in proportion to its size: to measure it in any run, and to set it
in one of AdamW.

A step that respects gauges may also have another length, which is one explanation of what it does.
:func:`relative_steps` says how long the steps of a run are, :class:`RelativeAdamW` makes AdamW's of
a given length, :class:`AdamH` keeps the norms as well. A matrix is here any parameter of two
dimensions or more, as where weight decay is concerned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import AdamW

from ddc.optim.sharding import local_part, shards_of


def copied_matrices(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the matrices among parameters, as far as they are on this rank."""
    return {name: local_part(p.detach()).clone() for name, p in params.items() if p.ndim >= 2}


@torch.no_grad()
def relative_steps(
    before: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """Of each matrix, the length of its step and the angle by which it turned.

    Args:
        before: what :func:`copied_matrices` gave before the step.
        params: parameters by name, after it. Where they are split over ranks, all ranks must call.

    Returns:
        ``relative``, ``|ΔW| / |W|`` by name, and ``angle``, between W before and after, in radians:
            both with the
        Frobenius norm, of W before the step, and None where it is zero.
    """
    sums = []
    for name, old in before.items():
        old = old.double()
        step = local_part(params[name]).double() - old
        shards = shards_of(params[name])
        sums.append(
            torch.stack(
                list(shards.reduced(old.square().sum(), step.square().sum(), (old * step).sum()))
            )
        )
    found: dict[str, dict[str, float | None]] = {"relative": {}, "angle": {}}
    for name, (size, length, along) in zip(
        before, torch.stack(sums).tolist() if sums else (), strict=True
    ):
        across = math.sqrt(max(0.0, size * length - along**2))  # times |W|
        found["relative"][name] = math.sqrt(length / size) if size else None
        found["angle"][name] = math.atan2(across, size + along) if size else None
    return found


class RelativeAdamW(AdamW):
    r"""AdamW whose step of every matrix has a given length in proportion to it, and no gauge.

    With u Adam's direction, decay :math:`\lambda` and learning rate :math:`\eta`, a matrix takes

    .. math::
        W \leftarrow W - \eta\, |W|\, (u + \lambda W) / |u + \lambda W|

    in Frobenius norms, so that :math:`|\Delta W| / |W| = \eta`; what is no matrix takes AdamW's
    step. A matrix that is all zero stays so. Arguments, state and errors are those of
    ``torch.optim.AdamW``.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the loss of ``closure`` where there is one."""
        matrices = [
            (p, group["lr"]) for group in self.param_groups for p in group["params"] if p.ndim >= 2
        ]
        before = [local_part(p).clone() for p, _ in matrices]
        loss = super().step(closure)
        for (p, lr), old in zip(matrices, before, strict=True):
            relative_(p, old, lr)
        return loss


class AdamH(AdamW):
    r"""AdamW whose matrices keep their norms, and turn by steps of a given length: AdamH of the
    hyperball optimizers (arXiv:2606.16899).

    With u Adam's direction and learning rate :math:`\eta`, a matrix of a param group with
    ``hold_norm`` takes

    .. math::
        W \leftarrow |W|\, V / |V|, \qquad V = W - \eta\, |W|\, u / |u|

    in Frobenius norms, so that it keeps the norm it began with; all else takes AdamW's step. A
    matrix that is all zero stays so. Arguments, state and errors are those of
    ``torch.optim.AdamW``; the weight decay of groups with ``hold_norm`` should be 0, for it has no
    part in that step.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the loss of ``closure`` where there is one."""
        held = [
            (p, group["lr"])
            for group in self.param_groups
            for p in group["params"]
            if group.get("hold_norm")
        ]
        before = [local_part(p).clone() for p, _ in held]
        loss = super().step(closure)
        for (p, lr), old in zip(held, before, strict=True):
            relative_(p, old, lr)
            size, now = shards_of(p).reduced(old.square().sum(), local_part(p).square().sum())
            local_part(p).mul_(torch.where(now > 0, (size / now).sqrt(), 1.0))
        return loss


def relative_(param: Tensor, old: Tensor, length: float) -> None:
    """Give the step that a matrix took from ``old``, its part on this rank, this length in
    proportion to the norm it had.
    """
    weight = local_part(param)
    step = weight - old
    size, taken = shards_of(param).reduced(old.square().sum(), step.square().sum())
    scale = torch.where(taken > 0, (size / taken).sqrt() * length, 0.0)
    weight.copy_(old + scale * step)
