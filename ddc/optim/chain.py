"""A chain of layers under one scale each: the total log-norm steps, shared equally."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddc.optim.compiled import Arithmetic, Hyper
from ddc.optim.side import Block, Side
from ddc.optim.stack import Context, Stack, mode_step, states_of, zero_modes
from ddc.optim.stacked import Layers, StackedParameter


class ChainStack(Stack):
    """A chain of layers, each a block as a whole, alike ones stacked; the total log-norm steps,
    shared equally.

    Where other layers of the chain are hidden, and step elsewhere, the norms of these keep still.
    """

    def __init__(self, layers: list[StackedParameter], still: bool, vertical: bool) -> None:
        self.sides = [Side([layer]) for layer in layers]
        self.still, self.parameters = still, layers
        first, self.rule = layers[0], layers[0].rule
        self.step_count = torch.zeros(1, dtype=torch.float32, device=first.params[0].device)
        self.layers = [len(layer.params) for layer in layers]
        self.move = Arithmetic(ChainStack._move, first.params[0].device)
        sizes: dict[str, tuple[int, ...]] = {} if still else {"radial": (1,)}
        if vertical and not still:
            sizes["vertical"] = (sum(self.layers),)
        self.modes = zero_modes(self.rule, sizes, first)

    def tied(self) -> list[list[tuple[str, Tensor]]]:
        return [[each for p in self.parameters for each in zip(p.names, p.params, strict=True)]]

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """That of the chain's modes is with the first layer."""
        states = states_of(self.parameters, self.step_count)
        states[self.parameters[0].params[0]] |= self.modes
        return states

    def grad_norm_squared(self, context: Context) -> Tensor:
        step_scale = context.hyper(self.parameters[0])["step_scale"]
        blocks = [side.read(side.gather(slice(None), context)) for side in self.sides]
        return torch.stack(
            [block.grad_norm_squared(block.norm, step_scale) for block in blocks]
        ).sum()

    def step(self, context: Context) -> None:
        """Move all layers, if any has a gradient."""
        if all(param.grad is None for p in self.parameters for param in p.params):
            return
        self.step_count += 1
        layers = [side.gather(slice(None), context) for side in self.sides]
        hyper = context.hyper(self.parameters[0])
        self.move(
            context.compiles(self.parameters[0]), self, layers, self.modes, self.step_count, hyper
        )

    def _move(
        self,
        layers: Sequence[Sequence[Layers]],
        modes: dict[str, Tensor],
        step_count: Tensor,
        hyper: Hyper,
    ) -> None:
        clock = self.rule.clock(step_count, hyper, self.parameters[0].dtype)
        decayed = hyper["additive"]
        blocks = [side.read(each, decayed) for side, each in zip(self.sides, layers, strict=True)]
        radial = (
            each.unsqueeze(1).split(self.layers)
            for each in self._radial(blocks, modes, clock, hyper)
        )
        for block, change, relaxed in zip(blocks, *radial, strict=True):
            block.write(block.turn(block.norm, change, clock, hyper, relaxed))

    def _radial(
        self, blocks: list[Block], modes: dict[str, Tensor], clock: Any, hyper: Hyper
    ) -> tuple[Tensor, Tensor]:
        """Changes of the layers' log-norms, (L,), and of these, how far ``balance`` moves along the
        gauge.
        """
        log_norm_grads = torch.cat([block.log_norm_grad.flatten() for block in blocks])
        none = torch.zeros_like(log_norm_grads)
        if self.still:
            return none, none
        size = math.sqrt(sum(self.layers))
        total = log_norm_grads.sum(0, keepdim=True) / size
        shared = mode_step(self.rule, "radial", total, modes, clock, hyper) / size
        if hyper["vertical"] == "freeze":
            return shared.expand(sum(self.layers)), none
        if hyper["vertical"] == "adam":
            against = log_norm_grads - log_norm_grads.mean()
            vertical = mode_step(self.rule, "vertical", against, modes, clock, hyper)
            return shared + vertical - vertical.mean(), none
        log_norms = torch.cat([block.norm.flatten() for block in blocks]).log()
        gap = torch.where(log_norms.isfinite().all(), log_norms - log_norms.mean(), 0.0)
        relaxed = -hyper["lr"] * hyper["radial_rate"] * gap
        return shared + relaxed, relaxed
