"""One rescale gauge: the norms of its sides and their directions step apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddc.optim.compiled import Arithmetic, Hyper, safe_power
from ddc.optim.fused import SUMS, fuses, products
from ddc.optim.polar_in_c import PolarInC
from ddc.optim.sharding import check_split_alike
from ddc.optim.side import Block, Side
from ddc.optim.stack import (
    Context,
    Stack,
    layers_at_once,
    mode_step,
    of_layers,
    states_of,
    waking_none,
    zero_modes,
)
from ddc.optim.stacked import Layers, Pairs, StackedParameter, unit_sums

#: State of the two sides of a gauge: 1 for units that grow from zero, 0 for all others.
WAKING = ("plus_waking", "minus_waking")


class PolarStack(Stack):
    """One rescale gauge in L layers: norms and directions of its sides step apart."""

    def __init__(
        self,
        degree: float,
        plus: list[StackedParameter],
        minus: list[StackedParameter],
        dressed: list[StackedParameter],
        vertical: bool,
    ) -> None:
        self.degree, self.dressed = degree, dressed
        self.plus, self.minus = Side(plus), Side(minus) if minus else None
        check_split_alike((p.names[0], p.params[0]) for p in (*plus, *minus, *dressed))
        self.parameters = [*plus, *minus]
        first, self.rule = plus[0], plus[0].rule
        self.layers = len(first.params)
        self.step_count = torch.zeros(
            self.layers, dtype=torch.float32, device=first.params[0].device
        )
        modes = (("radial",) + (("vertical",) if vertical else ())) if minus else ()
        shape = self.layers, first.units
        self.modes = zero_modes(self.rule, dict.fromkeys(modes, shape), first)
        if minus:
            self.modes |= {key: waking_none(shape, first) for key in WAKING}
        layer_size = sum(p.params[0].numel() for p in self.parameters)
        self.at_once = layers_at_once(self.layers, layer_size, first.params[0].device)
        self.single_chunk = self.at_once == self.layers
        functions = PolarStack._move, PolarStack._measure
        self.move, self.measure = (Arithmetic(f, first.params[0].device) for f in functions)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "in_c"}

    @functools.cached_property
    def in_c(self) -> PolarInC | None:
        """The kernel in C, if it takes all parameters; asked for once, which may ask a compiler."""
        return PolarInC.of(self.plus, self.minus, self.dressed, self.degree)

    def kernel(self, context: Context) -> PolarInC | None:
        """That kernel, which takes all layers at once, where it may be used."""
        if not context.fused or torch.compiler.is_compiling():
            return None
        return None if context.hyper(self.plus.parameters[0])["additive"] else self.in_c

    def tied(self) -> list[list[tuple[str, Tensor]]]:
        named = [zip(p.names, p.params, strict=True) for p in self.parameters]
        return [list(layer) for layer in zip(*named, strict=True)]

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """That of the gauge's modes is with the first parameter of each layer."""
        states = states_of(self.parameters, self.step_count)
        for i, param in enumerate(self.plus.parameters[0].params):
            states[param] |= {key: value[i] for key, value in self.modes.items()}
        return states

    def grad_norm_squared(self, context: Context) -> Tensor:
        first, measured, kernel = self.plus.parameters[0], [], self.kernel(context)
        hyper, at_once = context.hyper(first), self.at_once if kernel is None else self.layers
        for rows in context.chunks([True] * self.layers, at_once):
            minus = self.minus.gather(rows, context) if self.minus is not None else []
            layers = self.plus.gather(rows, context), minus
            modes = of_layers(self.modes, rows)
            if kernel is not None and kernel.takes((*layers[0], *minus)):
                norm, of_units = kernel.run((*layers, []), modes, hyper)
                measured.append((norm, of_units.sum()))
                continue
            compiled, step_scale = context.compiles(first), hyper["step_scale"]
            measured.append(self.measure(compiled, self, *layers, modes, step_scale))
        norms, squares = zip(*measured, strict=True)
        context.norms[self] = (torch.cat(norms),) * 2
        return torch.stack(squares).sum()

    def _measure(
        self,
        plus_layers: Sequence[Layers],
        minus_layers: Sequence[Layers],
        modes: dict[str, Tensor],
        step_scale: str,
    ) -> tuple[Tensor, Tensor]:
        """The plus norms, and the squared norm of the gradient."""
        plus = self.plus.read(plus_layers)
        if self.minus is None:
            return plus.norm, plus.grad_norm_squared(plus.norm, step_scale)
        minus = self.minus.read(minus_layers)
        scales = (scale for scale, _ in self._scales(plus.norm, minus.norm, modes))
        squares = [
            block.grad_norm_squared(scale, step_scale)
            for block, scale in zip((plus, minus), scales, strict=True)
        ]
        return plus.norm, squares[0] + squares[1]

    def _scales(
        self, plus: Tensor, minus: Tensor, modes: dict[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each side, what is rho in its step, and which units are waking, (L, U).

        A side that is zero has no direction, and its norm, which moves by multiplication, would
        take for ever to grow. Until it is as long as the other side asks for, so that both together
        are as at the 1/√fan_in initialisation, it steps in that length, which scales with the gauge
        as its own norm does.
        """
        assert self.minus is not None
        usual = 1 / self.plus.init_scale, 1 / self.minus.init_scale
        instead = (
            usual[0] * safe_power(minus / usual[1], -1 / self.degree),
            usual[1] * safe_power(plus / usual[0], -self.degree),
        )
        scales = []
        for norm, length, key in zip((plus, minus), instead, WAKING, strict=True):
            waking = (norm == 0) | ((modes[key] > 0) & (norm < length))
            scales.append((torch.where(waking, length, norm), waking))
        return scales

    def step(self, context: Context) -> None:
        has_gradient = [
            any(p.params[i].grad is not None for p in self.parameters) for i in range(self.layers)
        ]
        kernel = self.kernel(context)
        at_once = self.at_once if kernel is None else self.layers
        chunks = context.chunks(has_gradient, at_once)
        if all(has_gradient):
            compiled = context.compiles(self.plus.parameters[0])
            norms = [self._step(rows, context, kernel, compiled) for rows in chunks]
            old, new = norms[0] if len(norms) == 1 else map(torch.cat, zip(*norms, strict=True))
        else:  # the layers left alone may still dress others
            old = self.plus.read(self.plus.gather(slice(None), context)).norm
            new = old.clone()
            for rows in chunks:
                old[rows], new[rows] = self._step(rows, context, kernel, compiled=False)
        context.norms[self] = (old, new)

    def _step(
        self, rows: slice, context: Context, kernel: PolarInC | None, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        """One step of the given layers; returns the plus norms before and after, decay apart where
        it comes last.
        """
        steps = self.step_count[rows]
        steps += 1
        plus = self.plus.gather(rows, context)
        minus = self.minus.gather(rows, context) if self.minus is not None else []
        dressed = [
            Pairs(*p.pairs(rows, context.grads), context.decay(p), context.fused)
            for p in self.dressed
        ]
        modes = of_layers(self.modes, rows)
        hyper = context.hyper(self.plus.parameters[0])
        if kernel is not None and kernel.takes((*plus, *minus, *dressed)):
            return kernel.run((plus, minus, dressed), modes, hyper, steps)
        old, new = self.move(compiled, self, plus, minus, dressed, modes, steps, hyper)
        return old, new

    def _move(
        self,
        plus_layers: Sequence[Layers],
        minus_layers: Sequence[Layers],
        dressed: Sequence[Pairs],
        modes: dict[str, Tensor],
        step_count: Tensor,
        hyper: Hyper,
    ) -> tuple[Tensor, Tensor]:
        """Move both sides; the plus norms before and after."""
        first = self.plus.parameters[0]
        clock = self.rule.clock(step_count, hyper, first.dtype)
        plus = self.plus.read(plus_layers, hyper["additive"])
        old = plus.norm
        if self.minus is None:  # the plus norm is the gauge coordinate: it keeps still
            turn = plus.turn(old, torch.zeros_like(old), clock, hyper)
        else:
            minus = self.minus.read(minus_layers, hyper["additive"])
            plus_change, minus_change, relaxed = self._radial(
                plus, minus, dressed, modes, clock, hyper
            )
            (plus_scale, plus_waking), (minus_scale, minus_waking) = self._scales(
                old, minus.norm, modes
            )
            for key, waking in zip(WAKING, (plus_waking, minus_waking), strict=True):
                modes[key].copy_(waking)
            turn = plus.turn(plus_scale, plus_change, clock, hyper, relaxed, plus_waking)
            along = -self.degree * relaxed
            minus.write(minus.turn(minus_scale, minus_change, clock, hyper, along, minus_waking))
        plus.write(turn)
        rounded = first.params[0].dtype != first.dtype
        return old, self.plus.rounded_norm(plus_layers, hyper["additive"]) if rounded else turn.norm

    def _radial(
        self,
        plus: Block,
        minus: Block,
        dressed: Sequence[Pairs],
        modes: dict[str, Tensor],
        clock: Any,
        hyper: Hyper,
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Changes of log rho_P and log rho_M: the shared radial step and the vertical mode.

        The third is how far ``balance`` moves along the gauge, as log rho_P has it, which is in the
        first two as well.
        """
        k, size = self.degree, math.sqrt(1 + self.degree**2)

        # What the plus side dresses is undressed by its new norms, so it does not feel the plus
        # side's move.
        plus_grad = plus.log_norm_grad
        if self.dressed:

            def log_norm_grad(p: StackedParameter, i: int) -> Tensor:
                pairs = dressed[i]
                if pairs.fused and fuses(p, pairs, SUMS):
                    felt = products(p, pairs)
                else:
                    felt = p.unit_sum(p.stack(pairs.weights) * p.stack(pairs.grads))
                return felt * pairs.decay if hyper["additive"] else felt

            plus_grad = plus_grad - k * unit_sums(self.dressed, log_norm_grad)[0]
        shared = (k * plus_grad + minus.log_norm_grad) / size
        radial = mode_step(self.rule, "radial", shared, modes, clock, hyper)
        if hyper["vertical"] == "freeze":
            return radial * (k / size), radial / size, 0.0
        relaxed: Tensor | float = 0.0
        if hyper["vertical"] == "adam":
            against = (plus_grad - k * minus.log_norm_grad) / size
            vertical = mode_step(self.rule, "vertical", against, modes, clock, hyper)
        else:
            gap = plus.norm.log() - k * minus.norm.log()
            rate = -hyper["lr"] * hyper["radial_rate"]
            vertical = torch.where(gap.isfinite(), rate * gap / size, 0.0)
            relaxed = vertical / size
        return (k * radial + vertical) / size, (radial - k * vertical) / size, relaxed
