"""Structured pruning: a feed-forward block with fewer hidden units, as smaller weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddc.capacity.blocks import FeedForward
from ddc.capacity.measure import UnitStatistics
from ddc.gauges.base import Params, unit_view


@torch.no_grad()
def contributions(params: Params, block: FeedForward, statistics: UnitStatistics) -> Tensor:
    """How much the removal of each hidden unit changes what the block puts out: (units,) float64,
    no gauge changes it.

    The norm of the unit's column of W_down times the standard deviation of the unit over the data,
    for what it contributes on the average goes into the bias of W_down; times its root mean square
    where there is no bias.
    """
    spread = statistics.mean_square if block.outward_bias is None else statistics.variance
    columns = unit_view(params[block.outward.parameter], block.outward.axis)
    return columns.double().cpu().norm(dim=1) * spread.sqrt()


def kept_units(
    params: Params, block: FeedForward, statistics: UnitStatistics, keep: float
) -> Tensor:
    """Indices, in their order, of the units with the largest :func:`contributions`; at least one.

    Raises:
        ValueError: a share that is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"Invalid keep={keep}: expected a share in (0, 1]")
    count = max(1, round(keep * block.units))
    return contributions(params, block, statistics).topk(count).indices.sort().values


@torch.no_grad()
def pruned_parameters(
    params: Params,
    blocks: Sequence[FeedForward],
    statistics: Mapping[str, UnitStatistics],
    keep: float,
) -> dict[str, Tensor]:
    """All parameters that a model without the other units has in place of its own, with no training
    after it.

    Args:
        params: the model's parameters by name.
        blocks: of the model.
        statistics: of the units on training data.
        keep: share of the units to keep in each block.

    Returns:
        The weights and biases that change. Where W_down has a bias, it takes over the means of the
            removed units.

    Raises:
        ValueError: a share that is not in (0, 1].
    """
    changed = {}
    for block in blocks:
        kept = kept_units(params, block, statistics[block.where], keep)
        for name, axis, _ in (*block.inward, block.outward):
            assert isinstance(axis, int)  # blocks are of matrices
            changed[name] = params[name].detach().index_select(axis, kept.to(params[name].device))
        if block.outward_bias is not None:
            gone = torch.ones(block.units, dtype=torch.bool).index_fill(0, kept, False)
            columns = unit_view(params[block.outward.parameter], block.outward.axis)
            mean = statistics[block.where].mean.to(columns)
            gone = gone.to(columns.device)
            changed[block.outward_bias] = (
                params[block.outward_bias].detach() + mean[gone] @ columns[gone]
            )
    return changed
