"""The arithmetic of hidden matrices: frames of inner gauges, and Muon's step in dressed coordinates.

Shapes: G inner gauges in a frame, U units; L matrices in a stack, B blocks (heads, or whole matrices) of all of them.
Matrices may be split over ranks (:mod:`ddc.optim.sharding`); only the orthogonaliser has to see whole ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddc.gauges.roles import HiddenMatrix
from ddc.optim.orthogonal import ORTHOGONALIZERS
from ddc.optim.plan import compute_dtype
from ddc.optim.sharding import shards_of
from ddc.optim.stacked import (
    CPU_CHUNK,
    Bias,
    Context,
    Group,
    adam_,
    local_grads,
    local_weights,
    safe_power,
    stack_layers,
)
from ddc.optim.stacks import PolarStack


class Factor(NamedTuple):
    """A matrix is multiplied, along ``axis``, by the ``degree``-th power of the norms of layer ``layer`` of a stack."""

    source: PolarStack | FrameStack
    layer: int
    axis: int
    degree: float

    def log_norm(self, context: Context, after: bool = False) -> Tensor:
        """Logarithm of the norms, (U,), before or after their stack has moved."""
        if isinstance(self.source, FrameStack):
            return self.source.log_frame[self.layer]
        return context.norms[self.source][after][self.layer].log()


class Member(NamedTuple):
    """A hidden matrix on one side of an inner gauge, with what dresses its other axis."""

    param: Tensor
    axis: int
    other: Factor | None


class FrameStack:
    r"""Frames of alike inner gauges: per unit, a number that scales with the gauge.

    The forward norm f of a unit is that of its plus side dressed by what comes before, the backward norm b that of
    its minus side dressed by what comes after; along a chain :math:`f^2` and :math:`b^2` sum the squared products of
    weights over all paths to and from the unit. The frame :math:`(f / b)^{1 / (1 + k)}` divides the plus side and
    multiplies (to the power k) the minus side, after which both have path norms in balance. A unit that is dead on one
    side goes by the other, one that is dead on both has frame 1. ``params`` are all that the gauges scale, biases too.
    """

    def __init__(
        self, degree: float, plus: list[list[Member]], minus: list[list[Member]], params: list[Tensor]
    ) -> None:
        self.degree, self.plus, self.minus, self.params = degree, plus, minus, params
        self.log_forward = self.log_backward = self.log_frame = torch.empty(0)

    def sweep_forward(self, context: Context) -> None:
        """Forward norms, given those of earlier levels."""
        self.log_forward = self._log_norms(self.plus, context, forward=True)
        forward = self.log_forward.exp()
        context.norms[self] = (forward, forward)

    def sweep_backward(self, context: Context) -> None:
        """Backward norms, given those of later levels; and the frame."""
        self.log_backward = self._log_norms(self.minus, context, forward=False)
        f, b, k = self.log_forward, self.log_backward, self.degree
        one_sided = torch.where(f.isfinite(), f, torch.where(b.isfinite(), -b / k, 0.0))
        self.log_frame = torch.where(f.isfinite() & b.isfinite(), (f - b) / (1 + k), one_sided)

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
                    log = other.source.log_forward if forward else other.source.log_backward
                    # a forward norm dresses by its power k; a backward norm, which scales as c^-k, by its power 1/k
                    factor = log[other.layer] * (other.degree if forward else 1 / other.source.degree)
                else:
                    factor = other.log_norm(context) * other.degree
                shift = factor.max().nan_to_num(neginf=0.0)
                square = rows.square() @ shards.part((2 * (factor - shift)).exp(), 0, other.axis)
            squares.append(shards.placed(square, 0, axis))
            shifts.append(shift)
        (summed,) = shards.reduced(torch.stack(squares))
        logs = (summed.log() / 2 + torch.stack(shifts)[:, None]).unflatten(0, (len(side), -1))
        return torch.logsumexp(2 * logs, 1) / 2 if logs.shape[1] > 1 else logs[:, 0]


#: Logarithms of what stacked matrices are multiplied by: along rows, (L, rows, 1), and columns, (L, 1, columns).
LogFactors = tuple[Tensor, Tensor]


@dataclass
class Read:
    """What dresses a stack, and what its dressed weights and gradients sum to for each block, (B,)."""

    log_factors: LogFactors | None
    norm: Tensor
    log_norm_grad: Tensor


class Undressing(NamedTuple):
    """What undresses stacked matrices along rows and columns, and which entries nothing dead dresses."""

    rows: Tensor
    columns: Tensor
    alive: Tensor


class HiddenStack:
    """Hidden matrices of one shape, one param group and equal heads, L of them."""

    def __init__(
        self, matrices: list[HiddenMatrix], params: list[Tensor], group: int, factors: list[tuple[Factor, ...]]
    ) -> None:
        self.matrices, self.params, self.groups, self.factors = matrices, params, [group] * len(params), factors
        self.names = [matrix.parameter for matrix in matrices]
        self.heads, self.axis = matrices[0].heads, matrices[0].axis
        self.dtype = compute_dtype(params[0])
        self.shards = shards_of(params[0])
        shape = (len(params), *self.shards.local(params[0]).shape)
        self.momentum_buffer = torch.zeros(shape, dtype=self.dtype, device=params[0].device)

    @property
    def blocks(self) -> int:
        """Number of blocks, B."""
        return len(self.params) * self.heads

    def blocked(self, stacked: Tensor) -> Tensor:
        """(L, rows, columns) to (B, rows, columns) of the heads."""
        if self.heads == 1:
            return stacked
        return stacked.unflatten(1 + self.axis, (self.heads, -1)).movedim(1 + self.axis, 1).flatten(0, 1)

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
        """What dresses the matrices, before or after it has moved; with ``inner``, the frames' part of it alone."""
        if not any(self.factors):
            return None

        def along(axis: int) -> Tensor:
            none = torch.zeros(self.params[0].shape[axis], dtype=self.dtype, device=self.params[0].device)
            logs = []
            for factors in self.factors:
                mine = [f for f in factors if f.axis == axis and not (inner and isinstance(f.source, PolarStack))]
                logs.append(mine[0].degree * mine[0].log_norm(context, after) if mine else none)
            return self.shards.part(torch.stack(logs), 1, axis).unsqueeze(2 - axis)

        return along(0), along(1)

    def dressed(self, rows: slice, log_factors: LogFactors | None) -> tuple[Tensor, Tensor]:
        """Copies of weights and gradients in dressed coordinates; a missing gradient is zero."""
        weight = stack_layers(local_weights(self.params[rows], self.shards), self.dtype)
        grad = stack_layers(local_grads(self.params[rows], self.shards), self.dtype)
        for log in log_factors or ():
            factor = log[rows].exp()
            weight.mul_(factor)
            grad.mul_(safe_power(factor, -1))
        return weight, grad

    def chunks(self) -> list[slice]:
        """Slices of the layers, each to be taken at once; all where they are split, for ranks share the layers out."""
        layers = at_once = len(self.params)
        if self.momentum_buffer.device.type == "cpu" and self.shards.layout is None:
            at_once = max(1, CPU_CHUNK // self.params[0].numel())
        return [slice(i, i + at_once) for i in range(0, layers, at_once)]

    def dressed_sums(
        self, log_factors: LogFactors | None, *terms: Callable[[Tensor, Tensor], Tensor]
    ) -> Sequence[Tensor]:
        """The sum of each block, (B,), of functions of dressed weights and gradients."""
        parts = []
        for rows in self.chunks():
            weight, grad = self.dressed(rows, log_factors)
            parts.append(self.sums(*(term(weight, grad) for term in terms)))
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def read(self, context: Context) -> Read:
        """Norms of the blocks, and the gradients of their logarithms."""
        log_factors = self.log_factors(context, after=False)
        squares, log_norm_grad = self.dressed_sums(log_factors, lambda w, _: w.square(), lambda w, g: w * g)
        return Read(log_factors, squares.sqrt(), log_norm_grad)

    def move(self, read: Read, log_change: Tensor, group: Group, context: Context) -> None:
        """Turn the directions by the angle lr, multiply the norms by exp(log_change), decay, undress and store."""
        undress = None if read.log_factors is None else self._undressing(read.log_factors, group, context)
        for rows in self.chunks():
            self._move(rows, read, log_change, undress, group)

    def _move(self, rows: slice, read: Read, log_change: Tensor, undress: Undressing | None, group: Group) -> None:
        blocks = slice(rows.start * self.heads, rows.stop * self.heads)
        norm = read.norm[blocks]
        weight, grad = self.dressed(rows, read.log_factors)
        direction = weight.mul_(self.spread(safe_power(norm, -1)))
        x = grad.mul_(self.spread(norm)).addcmul_(direction, self.spread(read.log_norm_grad[blocks]), value=-1)
        momentum = self.momentum_buffer[rows].lerp(x, 1 - group["momentum"])
        mixed = x.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        o = self.shards.on_whole(lambda matrices: self._orthogonal(matrices, group["orthogonalizer"]), mixed)
        o = o.addcmul_(direction, self.spread(self.sums(o * direction)[0]), value=-1)
        inverse = safe_power(self.sums(o.square())[0].sqrt(), -1)
        turned = direction.addcmul_(o, self.spread(group["lr"] * inverse), value=-1)
        growth = log_change[blocks].exp() * norm * safe_power(self.sums(turned.square())[0].sqrt(), -1)
        moved = turned.mul_(self.spread(growth * (1 - group["lr"] * group["weight_decay"])))
        if undress is not None:
            moved.mul_(undress.rows[rows]).mul_(undress.columns[rows])
            # what a dead factor dresses has no effect, and stays as it is
            originals = stack_layers(local_weights(self.params[rows], self.shards), self.dtype)
            moved = torch.where(undress.alive[rows], moved, originals)
        for i, param in enumerate(self.params[rows]):
            if param.grad is not None:
                self.momentum_buffer[rows][i].copy_(momentum[i])
                self.shards.local(param).copy_(moved[i])

    def _orthogonal(self, matrices: Tensor, orthogonalizer: str) -> Tensor:
        """Stacked whole matrices, orthogonalised block by block."""
        blocks = self.blocked(matrices)
        # the angle of a step does not depend on the size of the gradient, as long as that is a normal number
        size = blocks.abs().amax((1, 2), keepdim=True)
        size = torch.where(size >= torch.finfo(size.dtype).tiny, size, 0.0)
        return self.joined(ORTHOGONALIZERS[orthogonalizer](blocks * safe_power(size, -1)))

    def _undressing(self, before: LogFactors, group: Group, context: Context) -> Undressing:
        """What undresses the moved matrices; in ``balance``, with their frames relaxed towards 1."""
        after = self.log_factors(context, after=True)
        assert after is not None
        rows, columns = ((-log).exp() for log in after)
        if context.relaxed and (inner := self.log_factors(context, after=True, inner=True)) is not None:
            rows, columns = (f * (relaxation(group) * log).exp() for f, log in zip((rows, columns), inner, strict=True))
        return Undressing(rows, columns, before[0].isfinite() & before[1].isfinite())


def relaxation(group: Group) -> Any:
    """How far ``balance`` relaxes the logarithm of a frame in a step."""
    return group["lr"] * group["radial_rate"]


class HiddenMatrices:
    """All hidden matrices of an optimizer: frames first, then radial modes, then each stack.

    The log-norms of B blocks have as many *radial* coordinates as gauges leave them: an orthonormal basis of what is
    perpendicular to the *vertical* ones, along which inner gauges and chains move norms against each other.

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
        index = {name: i for i, name in enumerate(name for s in stacks for name in s.names for _ in range(s.heads))}
        total = sum(stack.blocks for stack in stacks)
        device, dtype = stacks[0].params[0].device, stacks[0].dtype
        self.basis, modes = modes_of(total, [(index[p], index[m], k) for p, m, k in linked], vertical)
        self.basis = self.basis.to(device=device, dtype=dtype)
        self.step_count = torch.zeros(1, device=device)
        self.radial = {key: torch.zeros(modes, device=device, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}

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
        terms = []
        for stack in self.stacks:
            log_factors = stack.log_factors(context, after=False)
            squares, grads = stack.dressed_sums(log_factors, lambda w, _: w.square(), lambda _, g: g.square())
            terms.append((grads * squares / stack.block_rows).sum())
        return torch.stack(terms).sum()

    def step(self, context: Context) -> None:
        """Move all matrices that have a gradient."""
        self._sweep(context)  # what frames dress may move even where the matrices do not
        if all(param.grad is None for stack in self.stacks for param in stack.params):
            return
        group = context.groups[self.stacks[0].groups[0]]
        # what shares a side with a hidden matrix goes with it; and all of it or nothing, or the function would change
        if group["vertical"] == "balance" and all(p.grad is not None for frame in self.frames for p in frame.params):
            for frame in self.frames:
                context.relaxed[frame] = (-relaxation(group) * frame.log_frame).exp()
        reads = [stack.read(context) for stack in self.stacks]
        changes = self._radial(torch.cat([read.log_norm_grad for read in reads]), context)
        for stack, read, change in zip(self.stacks, reads, changes, strict=True):
            stack.move(read, change, context.groups[stack.groups[0]], context)

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
        u = adam_(mode_sums(self.basis.mT, log_norm_grads), moments, bias, group["betas"], group["eps"])
        change = mode_sums(self.basis, u * (bias.root_second / bias.first))
        parts = change.split([stack.blocks for stack in self.stacks])
        groups = [context.groups[stack.groups[0]] for stack in self.stacks]
        return [part * (-g["lr"] * g["radial_rate"]) for part, g in zip(parts, groups, strict=True)]


def mode_sums(matrix: Tensor, vector: Tensor) -> Tensor:
    """Their product; but what is not finite stays within its modes, where 0 · nan would make all of them nan."""
    return torch.where(matrix == 0, 0.0, matrix * vector).sum(1)


def modes_of(total: int, linked: Sequence[tuple[int, int, float]], vertical: bool) -> tuple[Tensor, int]:
    """Orthonormal modes of log-norms, as columns, and how many.

    Blocks that no gauge links are modes by themselves; of those that gauges link, the modes are what is perpendicular
    to the gauges' directions, and with ``vertical`` the rest as well.
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
        modes = modes * np.where(modes.sum(1, keepdims=True) < 0, -1.0, 1.0)  # a sign that does not depend on the SVD's
        mine = np.zeros((total, len(modes)))
        mine[members] = modes.T
        columns.append(mine)
    basis = torch.from_numpy(np.concatenate(columns, 1))
    return basis, basis.shape[1]
