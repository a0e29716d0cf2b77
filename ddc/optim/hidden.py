"""The arithmetic of hidden matrices: frames of inner gauges, and Muon's step in dressed
coordinates.

Shapes: G inner gauges in a frame, U units; L matrices in a stack, B blocks (heads, or whole
matrices) of all of them. Matrices may be split over ranks (:mod:`ddc.optim.sharding`); only the
orthogonaliser has to see whole ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddc.gauges.roles import HiddenMatrix
from ddc.optim.orthogonal import ORTHOGONALIZERS
from ddc.optim.plan import compute_dtype
from ddc.optim.sharding import shards_of
from ddc.optim.stacked import (
    Arithmetic,
    Bias,
    Context,
    Number,
    adam_,
    approach_,
    is_compilable,
    layers_at_once,
    local_grads,
    local_weights,
    safe_power,
    scaled,
    stack_layers,
)
from ddc.optim.stacks import PolarStack


class Factor(NamedTuple):
    """A matrix is multiplied, along ``axis``, by the ``degree``-th power of the norms of layer
    ``layer`` of a stack.
    """

    source: PolarStack | FrameStack
    layer: int
    axis: int
    degree: float

    def log_norm(self, context: Context, after: bool = False) -> Tensor:
        """Logarithm of the norms, (U,), before or after their stack has moved."""
        if isinstance(self.source, FrameStack):
            return context.log_frames[self.source][self.layer]
        return context.norms[self.source][after][self.layer].log()


class Member(NamedTuple):
    """A hidden matrix on one side of an inner gauge, with what dresses its other axis."""

    param: Tensor
    axis: int
    other: Factor | None


class FrameStack:
    r"""Frames of alike inner gauges: per unit, a number that scales with the gauge.

    The forward norm f of a unit is that of its plus side dressed by what comes before, the backward
    norm b that of its minus side dressed by what comes after; along a chain :math:`f^2` and
    :math:`b^2` sum the squared products of weights over all paths to and from the unit. The frame
    :math:`(f / b)^{1 / (1 + k)}` divides the plus side and multiplies (to the power k) the minus
    side, after which both have path norms in balance. A unit that is dead on one side goes by the
    other, one that is dead on both has frame 1. ``params`` are all that the gauges scale, biases
    too.
    """

    def __init__(
        self,
        degree: float,
        plus: list[list[Member]],
        minus: list[list[Member]],
        params: list[Tensor],
    ) -> None:
        self.degree, self.plus, self.minus, self.params = degree, plus, minus, params

    def sweep_forward(self, context: Context) -> None:
        """Forward norms, given those of earlier levels."""
        context.log_forward[self] = self._log_norms(self.plus, context, forward=True)
        forward = context.log_forward[self].exp()
        context.norms[self] = (forward, forward)

    def sweep_backward(self, context: Context) -> None:
        """Backward norms, given those of later levels; and the frame."""
        f, b, k = (
            context.log_forward[self],
            self._log_norms(self.minus, context, forward=False),
            self.degree,
        )
        context.log_backward[self] = b
        one_sided = torch.where(f.isfinite(), f, torch.where(b.isfinite(), -b / k, 0.0))
        context.log_frames[self] = torch.where(
            f.isfinite() & b.isfinite(), (f - b) / (1 + k), one_sided
        )

    @staticmethod
    def _log_norms(side: list[list[Member]], context: Context, forward: bool) -> Tensor:
        """Logarithm of the norms of each unit's members together, (G, U)."""
        squares, shifts = [], []
        for param, axis, other in itertools.chain.from_iterable(side):
            shards = shards_of(param)
            weight = shards.local(param).to(compute_dtype(param))
            rows = weight if axis == 0 else weight.mT
            shift = rows.new_zeros(())
            if other is None:
                square = rows.square().sum(1)
            else:
                if isinstance(other.source, FrameStack):
                    log = (context.log_forward if forward else context.log_backward)[other.source]
                    # a forward norm dresses by its power k; a backward norm, which scales as c^-k,
                    # by its power 1/k
                    factor = log[other.layer] * (
                        other.degree if forward else 1 / other.source.degree
                    )
                else:
                    factor = other.log_norm(context) * other.degree
                shift = factor.max().nan_to_num(neginf=0.0)
                square = rows.square() @ shards.part((2 * (factor - shift)).exp(), 0, other.axis)
            squares.append(shards.placed(square, 0, axis))
            shifts.append(shift)
        (summed,) = shards.reduced(torch.stack(squares))
        logs = (summed.log() / 2 + torch.stack(shifts)[:, None]).unflatten(0, (len(side), -1))
        return torch.logsumexp(2 * logs, 1) / 2 if logs.shape[1] > 1 else logs[:, 0]


#: Logarithms of what stacked matrices are multiplied by: along rows, (L, rows, 1), and columns, (L,
#: 1, columns).
LogFactors = tuple[Tensor, Tensor]


@dataclass
class Read:
    """What dresses a stack, and what its dressed weights and gradients sum to for each block,
    (B,).
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


class HiddenLayers(NamedTuple):
    """What a step reads of some layers of a stack: weights and momentum, which it writes too,
    gradients, and dressing.

    ``momentum`` is (L, *shape).
    """

    weights: list[Tensor]
    grads: list[Tensor]
    momentum: Tensor
    log_factors: LogFactors | None


class MuonHyper(NamedTuple):
    """Hyperparameters of one step of a stack."""

    lr: Number
    decay: Number
    momentum: Number
    nesterov: bool
    orthogonalizer: str


class HiddenStack:
    """Hidden matrices of one shape, one param group and equal heads, L of them."""

    def __init__(
        self,
        matrices: list[HiddenMatrix],
        params: list[Tensor],
        group: int,
        factors: list[tuple[Factor, ...]],
    ) -> None:
        self.matrices, self.params, self.groups, self.factors = (
            matrices,
            params,
            [group] * len(params),
            factors,
        )
        self.names = [matrix.parameter for matrix in matrices]
        self.heads, self.axis = matrices[0].heads, matrices[0].axis
        self.dtype = compute_dtype(params[0])
        self.shards = shards_of(params[0])
        shape = (len(params), *self.shards.local(params[0]).shape)
        device = params[0].device
        self.momentum_buffer = torch.zeros(shape, dtype=self.dtype, device=device)
        # else ranks share the layers out, as many at once as there are
        whole = self.shards.layout is None
        self.at_once = (
            layers_at_once(len(params), params[0].numel(), device) if whole else len(params)
        )
        self.single_chunk = self.at_once == len(params)
        self.compilable = is_compilable(params[0])
        functions = HiddenStack._move, HiddenStack._sum_up, HiddenStack._measure
        self.move, self.sum_up, self.measure = (Arithmetic(f, device) for f in functions)

    @property
    def blocks(self) -> int:
        """Number of blocks, B."""
        return len(self.params) * self.heads

    def blocked(self, stacked: Tensor) -> Tensor:
        """(L, rows, columns) to (B, rows, columns) of the heads."""
        if self.heads == 1:
            return stacked
        return (
            stacked.unflatten(1 + self.axis, (self.heads, -1))
            .movedim(1 + self.axis, 1)
            .flatten(0, 1)
        )

    def joined(self, blocks: Tensor) -> Tensor:
        """The inverse of :meth:`blocked`."""
        if self.heads == 1:
            return blocks
        apart = blocks.unflatten(0, (-1, self.heads)).movedim(1, 1 + self.axis)
        return apart.flatten(1 + self.axis, 2 + self.axis)

    def sums(self, *stacked: Tensor) -> Sequence[Tensor]:
        """The sum of each block, (B,), of stacked tensors."""
        return self.shards.reduced(*map(self._block_sums, stacked))

    def _block_sums(self, stacked: Tensor) -> Tensor:
        if self.heads == 1:
            return stacked.sum((1, 2))
        lines = self.shards.placed(stacked.sum(2 - self.axis), 1, self.axis)
        return lines.unflatten(1, (self.heads, -1)).sum(2).flatten()

    def spread(self, per_block: Tensor) -> Tensor:
        """Shape (B,) to what broadcasts against a stacked tensor."""
        if self.heads == 1:
            return per_block[:, None, None]
        size = self.params[0].shape[self.axis] // self.heads
        lines = per_block.view(-1, self.heads, 1).expand(-1, -1, size).flatten(1)
        return self.shards.part(lines, 1, self.axis).unsqueeze(2 - self.axis)

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return self.params[0].shape[0] // (self.heads if self.axis == 0 else 1)

    def log_factors(self, context: Context, after: bool, inner: bool = False) -> LogFactors | None:
        """What dresses the matrices, before or after it has moved; with ``inner``, the frames' part
        of it alone.
        """
        if not any(self.factors):
            return None

        def along(axis: int) -> Tensor:
            none = torch.zeros(
                self.params[0].shape[axis], dtype=self.dtype, device=self.params[0].device
            )
            logs = []
            for factors in self.factors:
                mine = [
                    f
                    for f in factors
                    if f.axis == axis and not (inner and isinstance(f.source, PolarStack))
                ]
                logs.append(mine[0].degree * mine[0].log_norm(context, after) if mine else none)
            return self.shards.part(torch.stack(logs), 1, axis).unsqueeze(2 - axis)

        return along(0), along(1)

    def gather(self, rows: slice, log_factors: LogFactors | None) -> HiddenLayers:
        """What a step reads of these layers, and where it writes."""
        weights, grads = (
            local_weights(self.params[rows], self.shards),
            local_grads(self.params[rows], self.shards),
        )
        mine = None if log_factors is None else (log_factors[0][rows], log_factors[1][rows])
        return HiddenLayers(weights, grads, self.momentum_buffer[rows], mine)

    def dressed(self, layers: HiddenLayers) -> tuple[Tensor, Tensor]:
        """Copies of weights and gradients in dressed coordinates."""
        weight, grad = (stack_layers(each, self.dtype) for each in (layers.weights, layers.grads))
        for log in layers.log_factors or ():
            factor = log.exp()
            weight, grad = scaled(weight, factor), scaled(grad, safe_power(factor, -1))
        return weight, grad

    def read(self, context: Context) -> Read:
        """Norms of the blocks, and the gradients of their logarithms."""
        log_factors = self.log_factors(context, after=False)
        chunks = context.chunks([True] * len(self.params), self.at_once)
        parts = [
            self.sum_up(context.compiles(self), self, self.gather(rows, log_factors))
            for rows in chunks
        ]
        return Read(log_factors, *map(torch.cat, zip(*parts, strict=True)))

    def _sum_up(self, layers: HiddenLayers) -> tuple[Tensor, Tensor]:
        """The norm of each block and the gradient of its logarithm, (B,)."""
        weight, grad = self.dressed(layers)
        squares, log_norm_grad = self.sums(weight.square(), weight * grad)
        return squares.sqrt(), log_norm_grad

    def grad_norm_squared(self, context: Context) -> Tensor:
        """Squared norm of the gradient in the invariant metric."""
        log_factors = self.log_factors(context, after=False)
        chunks = context.chunks([True] * len(self.params), self.at_once)
        measured = [
            self.measure(context.compiles(self), self, self.gather(rows, log_factors))
            for rows in chunks
        ]
        return torch.stack(measured).sum()

    def _measure(self, layers: HiddenLayers) -> Tensor:
        weight, grad = self.dressed(layers)
        squares, grads = self.sums(weight.square(), grad.square())
        return (grads * squares / self.block_rows).sum()

    def step(self, read: Read, log_change: Tensor, context: Context) -> None:
        """Turn the directions by the angle lr, multiply the norms by exp(log_change), decay,
        undress and store.
        """
        group, rates = context.groups[self.groups[0]], context.rates[self.groups[0]]
        undress = None if read.log_factors is None else self._undressing(read.log_factors, context)
        hyper = MuonHyper(*rates, group["momentum"], group["nesterov"], group["orthogonalizer"])
        has_gradient = [param.grad is not None for param in self.params]
        compiled = context.compiles(self) and all(has_gradient)
        for rows in context.chunks(has_gradient, self.at_once):
            blocks = slice(rows.start * self.heads, rows.stop * self.heads)
            by_block = read.norm[blocks], read.log_norm_grad[blocks], log_change[blocks]
            mine = None if undress is None else Undressing(*(each[rows] for each in undress))
            self.move(compiled, self, self.gather(rows, read.log_factors), *by_block, mine, hyper)

    def _move(
        self,
        layers: HiddenLayers,
        norm: Tensor,
        log_norm_grad: Tensor,
        log_change: Tensor,
        undress: Undressing | None,
        hyper: MuonHyper,
    ) -> None:
        weight, grad = self.dressed(layers)
        direction = scaled(weight, self.spread(safe_power(norm, -1)))
        x = scaled(grad, self.spread(norm)).addcmul_(
            direction, self.spread(log_norm_grad), value=-1
        )
        momentum = approach_(layers.momentum, x, 1 - hyper.momentum)
        mixed = approach_(x, momentum, hyper.momentum) if hyper.nesterov else momentum
        o = self.shards.on_whole(
            lambda matrices: self._orthogonal(matrices, hyper.orthogonalizer), mixed
        )
        o = o.addcmul_(direction, self.spread(self.sums(o * direction)[0]), value=-1)
        inverse = safe_power(self.sums(o.square())[0].sqrt(), -1)
        turned = direction.addcmul_(o, self.spread(hyper.lr * inverse), value=-1)
        growth = log_change.exp() * norm * safe_power(self.sums(turned.square())[0].sqrt(), -1)
        moved = scaled(turned, self.spread(growth * hyper.decay))
        if undress is not None:
            moved = scaled(scaled(moved, undress.rows), undress.columns)
            # what a dead factor dresses has no effect, and stays as it is
            alive = undress.alive_rows & undress.alive_columns
            moved = torch.where(alive, moved, stack_layers(layers.weights, self.dtype))
        torch._foreach_copy_(layers.weights, moved.unbind())

    def _orthogonal(self, matrices: Tensor, orthogonalizer: str) -> Tensor:
        """Stacked whole matrices, orthogonalised block by block."""
        blocks = self.blocked(matrices)
        # the angle of a step does not depend on the size of the gradient, as long as that is a
        # normal number
        size = blocks.abs().amax((1, 2), keepdim=True)
        size = torch.where(size >= torch.finfo(size.dtype).tiny, size, 0.0)
        return self.joined(ORTHOGONALIZERS[orthogonalizer](blocks * safe_power(size, -1)))

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
            rate = relaxation(context, self.groups[0])
            rows, columns = (
                f * (rate * log).exp() for f, log in zip((rows, columns), inner, strict=True)
            )
        return Undressing(rows, columns, before[0].isfinite(), before[1].isfinite())


def relaxation(context: Context, group: int) -> float | Tensor:
    """How far ``balance`` relaxes the logarithm of a frame in a step."""
    return context.rates[group].lr * context.groups[group]["radial_rate"]


class HiddenMatrices:
    """All hidden matrices of an optimizer: frames first, then radial modes, then each stack.

    The log-norms of B blocks have as many *radial* coordinates as gauges leave them: an orthonormal
    basis of what is perpendicular to the *vertical* ones, along which inner gauges and chains move
    norms against each other.

    Args:
        frames: by level.
        stacks: of the matrices.
        linked: (P, M, k): blocks whose norms a gauge moves against each other, by c and c^-k.
        vertical: whether the vertical modes step too.
    """

    def __init__(
        self,
        frames: list[FrameStack],
        stacks: list[HiddenStack],
        linked: Sequence[tuple[str, str, float]],
        vertical: bool,
    ) -> None:
        self.frames, self.stacks = frames, stacks
        # matrices whose norms a gauge links share their radial step, and so its rate
        self.shared = ("betas", "eps", "radial_rate", "vertical", *(("lr",) if linked else ()))
        index = {
            name: i
            for i, name in enumerate(
                name for s in stacks for name in s.names for _ in range(s.heads)
            )
        }
        total = sum(stack.blocks for stack in stacks)
        device, dtype = stacks[0].params[0].device, stacks[0].dtype
        self.basis, modes = modes_of(
            total, [(index[p], index[m], k) for p, m, k in linked], vertical
        )
        self.basis = self.basis.to(device=device, dtype=dtype)
        self.step_count = torch.zeros(1, device=device)
        self.radial = {
            key: torch.zeros(modes, device=device, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")
        }

    @property
    def single_chunk(self) -> bool:
        """Whether each stack is taken at once."""
        return all(stack.single_chunk for stack in self.stacks)

    @property
    def parameters(self) -> list[HiddenStack]:
        """The stacks, which have the names, params and groups that stacks of parameters have."""
        return self.stacks

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """State by parameter; that of the radial modes is with the first."""
        states = {
            param: {"momentum_buffer": stack.shards.state(stack.momentum_buffer[i], param.shape)}
            for stack in self.stacks
            for i, param in enumerate(stack.params)
        }
        radial = {f"radial_{key}": value for key, value in self.radial.items()}
        states[self.stacks[0].params[0]] |= {"step": self.step_count, **radial}
        return states

    def grad_norm_squared(self, context: Context) -> Tensor:
        """Squared norm of the gradient in the invariant metric."""
        self._sweep(context)
        return torch.stack([stack.grad_norm_squared(context) for stack in self.stacks]).sum()

    def step(self, context: Context) -> None:
        """Move all matrices that have a gradient."""
        self._sweep(context)  # what frames dress may move even where the matrices do not
        if all(param.grad is None for stack in self.stacks for param in stack.params):
            return
        group = context.groups[self.stacks[0].groups[0]]
        # what shares a side with a hidden matrix goes with it; and all of it or nothing, or the
        # function would change
        if group["vertical"] == "balance" and all(
            p.grad is not None for frame in self.frames for p in frame.params
        ):
            rate = relaxation(context, self.stacks[0].groups[0])
            for frame in self.frames:
                context.relaxed[frame] = (-rate * context.log_frames[frame]).exp()
        reads = [stack.read(context) for stack in self.stacks]
        changes = self._radial(torch.cat([read.log_norm_grad for read in reads]), context)
        for stack, read, change in zip(self.stacks, reads, changes, strict=True):
            stack.step(read, change, context)

    def _sweep(self, context: Context) -> None:
        for frame in self.frames:
            frame.sweep_forward(context)
        for frame in reversed(self.frames):
            frame.sweep_backward(context)

    def _radial(self, log_norm_grads: Tensor, context: Context) -> list[Tensor]:
        """Changes of the log-norms of each stack's blocks."""
        group = context.groups[self.stacks[0].groups[0]]
        self.step_count += 1
        bias = Bias.at(self.step_count, group["betas"], log_norm_grads.dtype)
        moments = self.radial["exp_avg"], self.radial["exp_avg_sq"]
        u = adam_(
            mode_sums(self.basis.mT, log_norm_grads), moments, bias, group["betas"], group["eps"]
        )
        change = mode_sums(self.basis, u * (bias.root_second / bias.first))
        parts = change.split([stack.blocks for stack in self.stacks])
        return [
            part * -relaxation(context, stack.groups[0])
            for part, stack in zip(parts, self.stacks, strict=True)
        ]


def mode_sums(matrix: Tensor, vector: Tensor) -> Tensor:
    """Their product; but what is not finite stays within its modes, where 0 · nan would make all of
    them nan.
    """
    return torch.where(matrix == 0, 0.0, matrix * vector).sum(1)


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
