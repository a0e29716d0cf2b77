"""Hidden matrices: the step of a matrix rule in dressed coordinates.

Shapes: L matrices in a stack, H heads (1 where matrices are taken whole), B = L · H blocks of one
stack or of all. Matrices may be split over ranks (:mod:`ddc.optim.sharding`); only the rule has to
see whole ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddc.gauges.base import axes_of
from ddc.optim.compiled import Arithmetic, Hyper, Number, safe_power, scaled
from ddc.optim.frames import Frames, log_norm
from ddc.optim.rules import Rule
from ddc.optim.stack import Context, Stack, layers_at_once, mode_step, waking_none, zero_modes
from ddc.optim.stacked import Dressed, Layers, StackedParameter

#: State of all blocks: 1 for those that grow from zero, 0 for all others.
WAKING = "waking"

#: Logarithms of what stacked matrices are multiplied by: along rows, (L, rows, 1), and columns, (L,
#: 1, columns); of experts, (L, experts, ...).
LogFactors = tuple[Tensor, Tensor]


@dataclass
class Read:
    """What dresses matrices, and what their dressed weights and gradients sum to for each block,
    (L, H).
    """

    log_factors: LogFactors | None
    norm: Tensor
    log_norm_grad: Tensor


class Undressing(NamedTuple):
    """What undresses stacked matrices along rows and columns, and which of these nothing dead
    dresses.
    """

    rows: Tensor
    columns: Tensor
    alive_rows: Tensor
    alive_columns: Tensor


class Matrices:
    """Alike hidden matrices: of one role, shape and param group, with what dresses each.

    A unit of them is a block: a head, or a matrix as a whole.
    """

    def __init__(self, parameter: StackedParameter, dressed: list[tuple[Dressed, ...]]) -> None:
        self.parameter, self.dressed_by = parameter, dressed
        parameter.allocate()
        params, first = parameter.params, parameter.params[0]
        # else ranks share the layers out, as many at once as there are
        whole = parameter.shards.layout is None
        self.at_once = (
            layers_at_once(len(params), first.numel(), first.device) if whole else len(params)
        )
        self.single_chunk = self.at_once == len(params)
        functions = Matrices._move, Matrices._sum_up, Matrices._measure
        self.move, self.sum_up, self.measure = (Arithmetic(f, first.device) for f in functions)

    @property
    def blocks(self) -> int:
        """Number of blocks, B."""
        return len(self.parameter.params) * self.parameter.units

    def sums(self, *stacked: Tensor) -> Sequence[Tensor]:
        """The sum of each block, (L, H), of stacked tensors."""
        return self.parameter.shards.reduced(*map(self.parameter.unit_sum, stacked))

    def log_factors(self, context: Context, after: bool, inner: bool = False) -> LogFactors | None:
        """What dresses the matrices, before or after it has moved; with ``inner``, the frames' part
        of it alone.
        """
        if not any(self.dressed_by):
            return None
        p = self.parameter
        *experts, rows, columns = p.params[0].shape

        def along(axis: int) -> Tensor:
            size = (rows, columns)[axis]
            none = torch.zeros((*experts, size), dtype=p.dtype, device=p.params[0].device)
            logs = []
            for dressings in self.dressed_by:
                mine = [
                    each
                    for each in dressings
                    if axes_of(each.axis)[-1] == len(experts) + axis
                    and (isinstance(each.source, Frames) or not inner)
                ]
                # (experts · size) where each has its own, else (size,)
                log = mine[0].degree * log_norm(mine[0], context, after) if mine else none
                logs.append(log.view(-1, size).expand(*experts, size) if experts else log)
            stacked = torch.stack(logs)
            return p.shards.part(stacked, stacked.ndim - 1, len(experts) + axis).unsqueeze(
                stacked.ndim - axis
            )

        return along(0), along(1)

    @staticmethod
    def rows_of(log_factors: LogFactors | None, rows: slice) -> LogFactors | None:
        """Those of some layers."""
        return None if log_factors is None else (log_factors[0][rows], log_factors[1][rows])

    def dressed(self, layers: Layers, log_factors: LogFactors | None) -> tuple[Tensor, Tensor]:
        """Copies of weights and gradients in dressed coordinates."""
        weight, grad = (self.parameter.stack(each) for each in (layers.weights, layers.grads))
        for log in log_factors or ():
            factor = log.exp()
            weight, grad = scaled(weight, factor), scaled(grad, safe_power(factor, -1))
        return weight, grad

    def read(self, context: Context) -> Read:
        """Norms of the blocks, and the gradients of their logarithms."""
        log_factors, p = self.log_factors(context, after=False), self.parameter
        compiled = context.compiles(p)
        parts = [
            self.sum_up(compiled, self, context.gather(p, rows), self.rows_of(log_factors, rows))
            for rows in context.chunks([True] * len(p.params), self.at_once)
        ]
        return Read(log_factors, *map(torch.cat, zip(*parts, strict=True)))

    def _sum_up(self, layers: Layers, log_factors: LogFactors | None) -> tuple[Tensor, Tensor]:
        """The norm of each block and the gradient of its logarithm, (L, H)."""
        weight, grad = self.dressed(layers, log_factors)
        squares, log_norm_grad = self.sums(weight.square(), weight * grad)
        return squares.sqrt(), log_norm_grad

    def norms(self, context: Context) -> tuple[Tensor, Tensor]:
        """The norm of each block, and the square of that of its gradient, (L, H)."""
        log_factors, p = self.log_factors(context, after=False), self.parameter
        compiled = context.compiles(p)
        measured = [
            self.measure(compiled, self, context.gather(p, rows), self.rows_of(log_factors, rows))
            for rows in context.chunks([True] * len(p.params), self.at_once)
        ]
        norms, grads = map(torch.cat, zip(*measured, strict=True))
        return norms, grads

    def _measure(self, layers: Layers, log_factors: LogFactors | None) -> tuple[Tensor, Tensor]:
        weight, grad = self.dressed(layers, log_factors)
        squares, grads = self.sums(weight.square(), grad.square())
        return squares.sqrt(), grads

    @property
    def rows(self) -> int:
        """Rows of a block."""
        p = self.parameter
        return p.params[0].shape[-2] // (p.role.heads if p.role.heads and p.role.axis == 0 else 1)

    @property
    def usual_norm(self) -> float:
        """The norm of a block at the 1/√fan_in initialisation."""
        p = self.parameter
        *experts, rows, _ = p.params[0].shape
        return math.sqrt(math.prod(experts) * rows / p.units)

    def step(
        self,
        read: Read,
        scale: Tensor,
        waking: Tensor,
        log_change: Tensor,
        step_count: Tensor,
        context: Context,
    ) -> None:
        """Turn the directions by the angle lr, multiply the norms by exp(log_change), (L, H),
        decay, undress and store. A block that is waking moves by lr · ``scale`` instead.
        """
        p = self.parameter
        undress = None if read.log_factors is None else self._undressing(read.log_factors, context)
        has_gradient = [param.grad is not None for param in p.params]
        compiled = context.compiles(p) and all(has_gradient)
        for rows in context.chunks(has_gradient, self.at_once):
            by_block = (
                scale[rows],
                waking[rows],
                read.log_norm_grad[rows],
                log_change[rows],
            )
            mine = None if undress is None else Undressing(*(each[rows] for each in undress))
            self.move(
                compiled,
                self,
                context.gather(p, rows),
                self.rows_of(read.log_factors, rows),
                *by_block,
                mine,
                step_count,
                context.hyper(p),
            )

    def _move(
        self,
        layers: Layers,
        log_factors: LogFactors | None,
        scale: Tensor,
        waking: Tensor,
        log_norm_grad: Tensor,
        log_change: Tensor,
        undress: Undressing | None,
        step_count: Tensor,
        hyper: Hyper,
    ) -> None:
        # the tangential input, in dressed coordinates
        p = self.parameter
        weight, grad = self.dressed(layers, log_factors)
        unit = scaled(weight, p.spread(safe_power(scale, -1)))
        leaning = torch.where(waking, 0.0, log_norm_grad)
        x = scaled(grad, p.spread(scale)).addcmul_(unit, p.spread(leaning), value=-1)
        # the rule's direction, projected again
        clock = p.rule.clock(step_count, hyper, p.dtype)
        o = p.rule.direction(x, layers.moments, clock, hyper, p).u
        along = torch.where(waking, 0.0, self.sums(o * unit)[0])
        o = o.addcmul_(unit, p.spread(along), value=-1)
        # turn by the angle lr, unless the norm is to grow by that; norm and decay
        inverse = safe_power(self.sums(o.square())[0].sqrt(), -1)
        turned = unit.addcmul_(o, p.spread(hyper["lr"] * inverse), value=-1)
        length = safe_power(self.sums(turned.square())[0].sqrt(), -1)
        growth = log_change.exp() * scale * torch.where(waking, 1.0, length)
        moved = scaled(turned, p.spread(growth * hyper["decay"]))
        # back in the weights' own coordinates
        if undress is not None:
            moved = scaled(scaled(moved, undress.rows), undress.columns)
            # what a dead factor dresses has no effect, and stays as it is
            alive = undress.alive_rows & undress.alive_columns
            moved = torch.where(alive, moved, p.stack(layers.weights))
        layers.write(moved)

    def _undressing(self, before: LogFactors, context: Context) -> Undressing:
        """What undresses the moved matrices; in ``balance``, with their frames relaxed towards
        1.
        """
        after = self.log_factors(context, after=True)
        assert after is not None
        rows, columns = ((-log).exp() for log in after)
        if (
            context.relaxed
            and (inner := self.log_factors(context, after=True, inner=True)) is not None
        ):
            rate = relaxation(context.hyper(self.parameter))
            rows, columns = (
                f * (rate * log).exp() for f, log in zip((rows, columns), inner, strict=True)
            )
        return Undressing(rows, columns, before[0].isfinite(), before[1].isfinite())


def relaxation(hyper: Hyper) -> Number:
    """How far ``balance`` relaxes the logarithm of a frame in a step."""
    rate: Number = hyper["lr"] * hyper["radial_rate"]
    return rate


class HiddenStack(Stack):
    """All hidden matrices of an optimizer: frames first, then radial modes, then the matrices.

    The log-norms of B blocks have as many *radial* coordinates as gauges leave them: an orthonormal
    basis of what is perpendicular to the *vertical* ones, along which inner gauges and chains move
    norms against each other.

    Args:
        rule: of the radial modes; the matrices have their own.
        frames: by level.
        matrices: alike ones together.
        linked: (P, M, k): blocks whose norms a gauge moves against each other, by c and c^-k.
        moved: those of them that a block links, which dresses nothing: their dressed norms move.
        vertical: whether the vertical modes step too.
    """

    def __init__(
        self,
        rule: Rule,
        frames: list[Frames],
        matrices: list[Matrices],
        linked: Sequence[tuple[str, str, float]],
        moved: Sequence[tuple[str, str, float]],
        vertical: bool,
    ) -> None:
        self.rule, self.frames, self.matrices = rule, frames, matrices
        self.linked, self.moved = bool(linked), bool(moved)
        self.parameters = [each.parameter for each in matrices]
        self.single_chunk = all(each.single_chunk for each in matrices)
        units = {name: p.units for p in self.parameters for name in p.names}
        start = dict(zip(units, itertools.accumulate(units.values(), initial=0), strict=False))
        first = self.parameters[0]
        blocks = sum(units.values())
        pairs, pairs_moved = (
            [(start[p] + i, start[m] + i, k) for p, m, k in each for i in range(units[p])]
            for each in (linked, moved)
        )
        self.basis, modes = modes_of(blocks, pairs, vertical)
        powers = powers_of(blocks, pairs_moved)
        usual = torch.tensor([each.usual_norm for each in matrices for _ in range(each.blocks)])
        self.basis, self.powers, self.usual_norms = (
            each.to(device=first.params[0].device, dtype=first.dtype)
            for each in (self.basis, powers, usual)
        )
        self.step_count = torch.zeros(1, dtype=torch.float32, device=first.params[0].device)
        self.modes = zero_modes(rule, {"radial": (modes,)}, first)
        self.modes[WAKING] = waking_none((blocks,), first)

    @property
    def shared(self) -> tuple[str, ...]:
        """Matrices whose norms a gauge links share their radial step, and so its rate."""
        rate = ("lr",) if self.linked else ()
        return (*self.rule.settings, "radial_rate", "vertical", *rate)

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """That of the radial modes is with the first matrix."""
        states = {param: p.state(i) for p in self.parameters for i, param in enumerate(p.params)}
        states[self.parameters[0].params[0]] |= {"step": self.step_count, **self.modes}
        return states

    def grad_norm_squared(self, context: Context) -> Tensor:
        self._sweep(context)
        norms, grads = zip(*(each.norms(context) for each in self.matrices), strict=True)
        terms = [
            (grad * scale.square() / each.rows).sum()
            for each, grad, scale in zip(self.matrices, grads, self._scales(norms)[0], strict=True)
        ]
        return torch.stack(terms).sum()

    def step(self, context: Context) -> None:
        # frames: what they dress may move even where the matrices do not
        self._sweep(context)
        if all(param.grad is None for p in self.parameters for param in p.params):
            return
        hyper = context.hyper(self.parameters[0])
        # what shares a side with a hidden matrix goes with it; and all of it or nothing, or the
        # function would change
        if hyper["vertical"] == "balance" and all(
            p.grad is not None for frame in self.frames for p in frame.params
        ):
            for frame in self.frames:
                log_frame = context.log_frames[frame]
                context.relaxed[frame] = (-relaxation(hyper) * log_frame).exp()
        # norms, then the matrices
        reads = [each.read(context) for each in self.matrices]
        scales, waking = self._scales([read.norm for read in reads])
        self.modes[WAKING].copy_(torch.cat([each.flatten() for each in waking]))
        changes = self._radial(torch.cat([read.log_norm_grad.flatten() for read in reads]), context)
        for each, read, scale, wakes, change in zip(
            self.matrices, reads, scales, waking, changes, strict=True
        ):
            change = change.view_as(read.norm)
            each.step(read, scale, wakes, change, self.step_count, context)

    def _scales(self, norms: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What is rho in the step of each block, and which blocks are waking, as ``norms``, (L, H)
        of each of the matrices.

        A block that is zero has no direction, and its norm, which moves by multiplication, would
        take for ever to grow. Until it has its usual norm it moves by steps of that length, scaled
        as the norms say of the blocks that a gauge links with it.
        """
        flat, usual = torch.cat([norm.flatten() for norm in norms]), self.usual_norms
        if self.moved:
            away = torch.where(flat > 0, (flat / usual).log(), 0.0)
            usual = usual * mode_sums(self.powers, away).exp()
        waking = (flat == 0) | ((self.modes[WAKING] > 0) & (flat < usual))
        scales, sizes = torch.where(waking, usual, flat), [norm.numel() for norm in norms]
        return tuple(  # type: ignore[return-value]
            [part.view_as(norm) for part, norm in zip(each.split(sizes), norms, strict=True)]
            for each in (scales, waking)
        )

    def _sweep(self, context: Context) -> None:
        for frame in self.frames:
            frame.sweep_forward(context)
        for frame in reversed(self.frames):
            frame.sweep_backward(context)

    def _radial(self, log_norm_grads: Tensor, context: Context) -> list[Tensor]:
        """Changes of the log-norms of the blocks, for each of the matrices, (B,)."""
        hyper = context.hyper(self.parameters[0])
        self.step_count += 1
        clock = self.rule.clock(self.step_count, hyper, log_norm_grads.dtype)
        coordinates = mode_sums(self.basis.mT, log_norm_grads)
        # each matrix has its own rate
        unit_rate = {**hyper, "lr": 1.0, "radial_rate": 1.0}
        change = mode_sums(
            self.basis, mode_step(self.rule, "radial", coordinates, self.modes, clock, unit_rate)
        )
        return [
            part * relaxation(context.hyper(p))
            for part, p in zip(
                change.split([each.blocks for each in self.matrices]), self.parameters, strict=True
            )
        ]


def mode_sums(matrix: Tensor, vector: Tensor) -> Tensor:
    """Their product; but what is not finite stays within its modes, where 0 · nan would make all of
    them nan.
    """
    return torch.where(matrix == 0, 0.0, matrix * vector).sum(1)


def powers_of(total: int, moved: Sequence[tuple[int, int, float]]) -> Tensor:
    """For each block, the powers of the norms of all others whose product moves with its own norm,
    whatever gauges move: (B, B), zeros in the rows of blocks that no gauge moves.
    """
    gauges = np.zeros((len(moved), total))
    for row, (p, m, k) in zip(gauges, moved, strict=True):
        row[p], row[m] = 1.0, -k
    powers = np.zeros((total, total))
    for i in np.flatnonzero(gauges.any(0)):
        others = gauges.copy()
        others[:, i] = 0
        powers[i] = np.linalg.lstsq(others, gauges[:, i], rcond=1e-9)[0]
    return torch.from_numpy(powers)


def modes_of(
    total: int, linked: Sequence[tuple[int, int, float]], vertical: bool
) -> tuple[Tensor, int]:
    """Orthonormal modes of log-norms, as columns, and how many.

    Blocks that no gauge links are modes by themselves; of those that gauges link, the modes are
    what is perpendicular to the gauges' directions, and with ``vertical`` the rest as well.
    """
    parent = list(range(total))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for p, m, _ in linked:
        parent[root(m)] = root(p)
    columns = []
    for r in sorted({root(i) for i in range(total)}):
        members = [i for i in range(total) if root(i) == r]
        here = [(p, m, k) for p, m, k in linked if root(p) == r]
        gauges = np.zeros((len(here), total))
        for row, (p, m, k) in zip(gauges, here, strict=True):
            row[p], row[m] = 1.0, -k
        _, s, modes = np.linalg.svd(gauges[:, members], full_matrices=True)
        modes = modes if vertical else modes[(s > 1e-9).sum() :]
        # a sign that does not depend on the SVD's
        modes = modes * np.where(modes.sum(1, keepdims=True) < 0, -1.0, 1.0)
        mine = np.zeros((total, len(modes)))
        mine[members] = modes.T
        columns.append(mine)
    basis = torch.from_numpy(np.concatenate(columns, 1))
    return basis, basis.shape[1]
