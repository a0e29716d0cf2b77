"""What no rescale decomposes: the base optimizer itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ddc.optim.compiled import Arithmetic, Hyper, per_layer, safe_power, scaled
from ddc.optim.fused import ALONE, fuses, step_free
from ddc.optim.stack import Context, Stack, layers_at_once, states_of
from ddc.optim.stacked import Layers, StackedParameter


class FreeStack(Stack):
    """Parameters that no rescale decomposes: the base optimizer, with decoupled decay; rows centred
    and dressed by role.
    """

    def __init__(self, parameter: StackedParameter) -> None:
        self.parameter, self.rule = parameter, parameter.rule
        self.parameters = [parameter]
        parameter.allocate()
        self.step_count = torch.zeros(
            len(parameter.params), dtype=torch.float32, device=parameter.params[0].device
        )
        first = parameter.params[0]
        self.at_once = layers_at_once(len(parameter.params), first.numel(), first.device)
        self.single_chunk = self.at_once == len(parameter.params)
        self.move, self.measure = (
            Arithmetic(f, first.device) for f in (FreeStack._move, FreeStack._measure)
        )

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        return states_of(self.parameters, self.step_count)

    def grad_norm_squared(self, context: Context) -> Tensor:
        """|g|², of the centred or dressed gradient where the role says so."""
        p = self.parameter
        chunks = (
            context.gather(p, rows) for rows in context.chunks([True] * len(p.params), self.at_once)
        )
        return torch.stack(
            [self.measure(context.compiles(p), self, layers) for layers in chunks]
        ).sum()

    def _measure(self, layers: Layers) -> Tensor:
        return self.parameter.shards.reduced(self._gradient(layers).square().sum())[0]

    def _gradient(self, layers: Layers) -> Tensor:
        p, gradient = self.parameter, self.parameter.stack(layers.grads)
        if (factor := p.factor(layers.before)) is not None:
            gradient = scaled(gradient, safe_power(factor, -1))
        return p.centre(gradient) if p.role.centred else gradient

    def step(self, context: Context) -> None:
        p = self.parameter
        hyper = context.hyper(p)
        has_gradient = [param.grad is not None for param in p.params]
        for rows in context.chunks(has_gradient, self.at_once):
            self.step_count[rows] += 1
            compiled = all(has_gradient) and context.compiles(p)
            self.move(compiled, self, context.gather(p, rows), self.step_count[rows], hyper)

    def _move(self, layers: Layers, step_count: Tensor, hyper: Hyper) -> None:
        p = self.parameter
        clock = self.rule.clock(step_count, hyper, p.dtype)
        if layers.fused and fuses(p, layers, ALONE):
            step_free(p, layers, clock, hyper)
            return
        # the rule's direction
        weight = p.stack(layers.weights)
        u, ratio = self.rule.direction(self._gradient(layers), layers.moments, clock, hyper, p)
        if p.role.centred:
            u = p.centre(u)
        u = scaled(u, per_layer(-hyper["lr"] * ratio, u))
        # decay and move, back in the weights' own coordinates
        if (factor := p.factor(layers.after)) is not None:
            u = scaled(u, safe_power(factor, -1))
        if p.role.centred:  # the mean row is gauge: decay leaves it
            u = u + p.shards.row_mean(weight) * (1 - layers.decay)
        moved = scaled(weight, layers.decay).add_(u)
        factor = p.factor(layers.relaxed)
        layers.write(moved if factor is None else moved / factor)
