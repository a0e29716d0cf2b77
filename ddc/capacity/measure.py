"""What hidden units do: how large they are, what the loss is without them, and of which rank their
weights are.

Everything here is a function of the gauge orbit: a gauge transformation of the weights changes none
of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ddc.capacity.blocks import FeedForward
from ddc.gauges import Gauge, Rescale
from ddc.gauges.base import Params, unit_view
from ddc.gauges.parts import at
from ddc.gauges.trace import Trace, in_evaluation


@dataclass(frozen=True)
class UnitStatistics:
    """Values of a block's hidden units over data, each of shape (units,), float64: mean, and mean
    square.
    """

    mean: Tensor
    mean_square: Tensor

    @property
    def variance(self) -> Tensor:
        return (self.mean_square - self.mean**2).clamp(min=0)


@torch.no_grad()
def unit_statistics(
    model: nn.Module, blocks: Sequence[FeedForward], batches: Iterable[Tensor]
) -> dict[str, UnitStatistics]:
    """Means and mean squares of the hidden units of each block, by its place, over all positions of
    all batches.

    Args:
        model: called on each batch, in evaluation mode; left as it was.
        blocks: of the model.
        batches: inputs of the model; at least one.

    Raises:
        ValueError: no batch.
    """
    # hooks that add up what each block's last linear map reads
    sums = {block.where: torch.zeros(2, block.units, dtype=torch.float64) for block in blocks}
    counts = dict.fromkeys(sums, 0)

    def hook(where: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            hidden = args[0].flatten(0, -2).double().cpu()
            sums[where] += torch.stack((hidden.sum(0), hidden.square().sum(0)))
            counts[where] += len(hidden)

        return add

    handles = [
        model.get_submodule(block.reader).register_forward_pre_hook(hook(block.where))
        for block in blocks
    ]
    # one pass over the batches
    try:
        with in_evaluation(model):
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not all(counts.values()):
        raise ValueError("statistics of hidden units need at least one batch")
    return {where: UnitStatistics(*(sums[where] / counts[where])) for where in sums}


@dataclass(frozen=True)
class RemovalEffects:
    """Change of the loss, in nats, when one hidden unit of a block is removed, by unit: (units,)
    float64.

    Attributes:
        to_zero: the unit is 0 instead.
        to_mean: the unit is its mean over the training data instead.
    """

    to_zero: Tensor
    to_mean: Tensor


@torch.no_grad()
def removal_effects(
    model: nn.Module,
    blocks: Sequence[FeedForward],
    statistics: Mapping[str, UnitStatistics],
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, RemovalEffects]:
    """What the removal of each hidden unit by itself does to the loss, by place of the block.

    Exact: all that comes after the block is computed again for each unit, and nothing that comes
    before it.

    Args:
        model: in evaluation mode while it is traced; left as it was.
        blocks: of the model.
        statistics: of the units on training data, for their means.
        inputs: one batch, on which the loss is taken.
        loss: of the model's output on it.
        advance: called after each unit.
    """
    # one pass with all units, whose values are kept
    trace = Trace(model, (inputs,))
    output = trace.outputs[0]
    values: dict[Node, Any] = {}
    base = loss(trace.value(output, values))
    readers = {linear.weight: linear for linear in trace.linear_maps.values()}
    effects = {}
    for block in blocks:
        reader = readers[block.outward.parameter]
        # what is not after the block keeps its value, if anything after it reads that value
        later = trace.descendants(reader.node)
        before = {
            node: value
            for node, value in values.items()
            if node not in later and later & {*node.users}
        }
        # without a unit, y lacks what that unit adds: its value, or how far this is from its mean,
        # times its column
        hidden, y = values[reader.input], values[reader.node]
        columns = unit_view(trace.tensors[block.outward.parameter], block.outward.axis)
        mean = statistics[block.where].mean.to(hidden)
        changes = torch.zeros(2, block.units, dtype=torch.float64)
        for unit in range(block.units):
            for i, instead in enumerate((0.0, mean[unit])):
                without = y - (hidden[..., unit, None] - instead) * columns[unit]
                changes[i, unit] = (
                    loss(trace.value(output, {**before, reader.node: without})) - base
                )
            advance()
        effects[block.where] = RemovalEffects(*changes)
    return effects


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix, and what they say of its rank.

    Attributes:
        values: in falling order, float64.
    """

    values: Tensor

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
        shares = self.values / self.values.sum()
        return float(torch.special.entr(shares).sum().exp())

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm."""
        return float(self.values.square().sum() / self.values[0] ** 2)


def dressed(
    params: Params, gauges: Iterable[Gauge], block: FeedForward
) -> tuple[dict[str, Tensor], Rescale | None]:
    """Copies of the block's weights with the scales of the norms before it in them, and the block's
    rescale gauge.

    The columns of W_up (and W_gate) are multiplied by the size ρ of the (γ, β) that they read,
    which is then 1, as in DDCAdam's step: the only scales left are those of the hidden units.
    """
    rescales = [gauge for gauge in gauges if isinstance(gauge, Rescale)]
    mine = {axis.parameter for axis in (*block.inward, block.outward)}
    touching = [gauge for gauge in rescales if mine & set(gauge.parameters)]
    names = mine | {name for gauge in touching for name in gauge.parameters}
    copies = {name: params[name].detach().double().cpu().clone() for name in names}
    own = None
    for gauge in touching:
        if block.outward in gauge.minus:
            own = gauge
        else:
            gauge.act_(copies, scale(-gauge.log_norms(copies)[0]))
    return copies, own


@torch.no_grad()
def unit_norms(params: Params, gauges: Iterable[Gauge], block: FeedForward) -> Tensor:
    """Invariant norms of the hidden units, ρ_P^k ρ_M: of what gives a unit times what reads it,
    (units,) float64.

    ρ_P is the norm of the unit's row of W_up and its entry of the bias, dressed; with a gate, of
    the value branch alone (the gate's scale is no gauge). Without a rescale gauge (GELU), of all
    that gives the unit. k is the degree of the activation: 1, but 2 for ReLU².
    """
    copies, own = dressed(params, gauges, block)
    plus, degree = (own.plus, own.degree) if own else (block.inward, 1)
    squares = [unit_view(at(copies, name), axis).square().sum(1) for name, axis, _ in plus]
    reading = unit_view(copies[block.outward.parameter], block.outward.axis).norm(dim=1)
    return torch.stack(squares).sum(0).sqrt() ** degree * reading


@torch.no_grad()
def dressed_spectra(
    params: Params, gauges: Iterable[Gauge], block: FeedForward
) -> tuple[Spectrum, Spectrum]:
    """Spectra of W_up and W_down in coordinates that no gauge changes.

    Each unit's scale is put where it is looked at: into the rows of W_up (those of W_down have norm
    1 then), and into the columns of W_down (those of W_up have norm 1 then). Without a rescale
    gauge they are as they are.
    """
    copies, own = dressed(params, gauges, block)
    up, down = (own.plus[0] if own else block.inward[0]), block.outward
    others = {name: value.clone() for name, value in copies.items()}
    if own:
        log_plus, log_minus = own.log_norms(copies)
        own.act_(copies, scale(log_minus / own.degree))
        own.act_(others, scale(-log_plus))
    return Spectrum(torch.linalg.svdvals(copies[up.parameter])), Spectrum(
        torch.linalg.svdvals(others[down.parameter])
    )


def scale(log_scale: Tensor) -> Tensor:
    """Scales of units from their logarithms; 1 where a side of the unit is zero, which nothing can
    scale to 1.
    """
    return torch.where(log_scale.isfinite(), log_scale, 0.0).exp()
