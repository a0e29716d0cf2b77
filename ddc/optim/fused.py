"""Adam's step by kernels, in Triton on a GPU and in C on a CPU: what :mod:`ddc.optim.free` does in
torch, in one pass over the weights, and on a GPU what :mod:`ddc.optim.side` does, in three: sums
over units, the direction (with the moments), and the new weights. On a CPU all of a rescale is one
kernel: :mod:`ddc.optim.polar_in_c`.

On a GPU nothing of the size of the weights is written but weights and moments.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddc.gauges.base import axes_of, is_fake
from ddc.optim.averaging import Averaging
from ddc.optim.compiled import Hyper, safe_power
from ddc.optim.native import launch as launch_in_c
from ddc.optim.native import library
from ddc.optim.rules.adam import Adam, Bias
from ddc.optim.stacked import Layers, Pairs, StackedParameter

log = logging.getLogger(__name__)

#: Entries of a tile, and the most that registers hold.
TILE, LARGEST = 1024, 8192
#: Rows whose sums a program adds up.
ROWS_PER_PART = 32
#: Entries of which weights, gradients and rows should be multiples.
ALIGNED = 16
#: Tables of offsets that are kept: gradients that are made anew mostly lie where others did.
KNOWN = 8
#: What kernels do with a parameter: step it alone, or as part of a side, or sum over its units.
ALONE, OF_SIDE, SUMS = range(3)
#: The first compute capability of NVIDIA that Triton compiles for.
OLDEST = (7, 0)
#: For tests: whether Triton interprets kernels on a CPU, for which ``TRITON_INTERPRET=1`` must be
#: set before Triton is first imported.
interpreted = False
#: Of weights and gradients; in C, the first alone.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether there are kernels for a device: a GPU of NVIDIA or AMD with a Triton that works, or a
    CPU with a C compiler.
    """
    if in_c(device):
        return library() is not None
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return True
    return device.type == "cuda" and torch.cuda.is_available() and works(device)


def in_c(device: torch.device) -> bool:
    """Whether a device's kernels are those in C."""
    return device.type == "cpu" and not interpreted


def dtypes_on(device: torch.device) -> tuple[torch.dtype, ...]:
    """Of weights, and of gradients, that the kernels of a device take."""
    return DTYPES[:1] if in_c(device) else DTYPES


def works(device: torch.device) -> bool:
    """Whether Triton can compile for a GPU: not for one of NVIDIA before Volta, nor without a C
    compiler, which images of containers may lack.
    """
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:
        log.warning(
            "Triton does not work here, so steps are taken by torch's operations, which are"
            " slower (fused=False does so without this warning): %s",
            error,
        )
        return False
    return True


def capturing(device: torch.device) -> bool:
    """Whether what is launched goes to a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Kernels:
    """The kernels for one stacked parameter: its shape, what each program has of it, and where its
    layers lie.
    """

    def __init__(self, p: StackedParameter) -> None:
        self.shape, self.device = p.params[0].shape, p.params[0].device
        self.in_c = in_c(self.device)
        self.rows, self.columns = int(self.shape[0]), int(np.prod(self.shape[1:], dtype=int))
        self.unit = next(iter(axes_of(p.role.axis)), 0)
        averaging = p.averaging
        self.averaged = -1 if averaging is None else averaging.dim - 1  # type: ignore[union-attr]
        self.groups, largest = self.rows, 0
        self.order = self.starts = torch.zeros(1, dtype=torch.int32, device=self.device)
        if isinstance(averaging, Averaging):
            counts = np.bincount(averaging.group_of, minlength=averaging.groups)
            tables = averaging.group_of.argsort(kind="stable"), np.append(0, counts.cumsum())
            self.order, self.starts = (
                torch.from_numpy(table.astype(np.int32)).to(self.device) for table in tables
            )
            self.groups, largest = averaging.groups, int(counts.max())
        self.known: dict[tuple[int, ...], Tensor] = {}
        self.captured: list[Tensor] = []
        self.br, self.bc = self._tile(largest)

    def _tile(self, largest: int) -> tuple[int, int]:
        """Rows and columns of a tile; it has the largest group whole."""
        tile = LARGEST if self.in_c else TILE  # rows of a tile in C are read one by one
        if self.averaged == 0:
            rows = power_of_two(largest)
            return rows, min(power_of_two(self.columns), max(tile // rows, 64))
        if self.averaged == 1:
            columns = power_of_two(largest)
            return 8 if self.in_c else max(tile // columns, 16), columns
        widest = 1024 if self.in_c else 128 if self.unit == 1 else 256
        columns = min(power_of_two(self.columns), widest)
        return min(power_of_two(self.rows), tile // columns), columns

    @staticmethod
    def read(p: StackedParameter) -> bool:
        """Whether there are kernels that go over a parameter."""
        if not Kernels.whole(p) or p.role.offset:
            return False
        if not (p.averaging is None or isinstance(p.averaging, Averaging)):
            return False
        kernels = kernels_of(p)
        whole_rows = kernels.in_c and kernels.averaged == 1
        return max(kernels.br * kernels.bc, kernels.columns * whole_rows) <= LARGEST

    @staticmethod
    def whole(p: StackedParameter) -> bool:
        """Whether a parameter lies, whole, where kernels are, in a dtype that they read."""
        first = p.params[0]
        return bool(
            not is_fake(first)
            and p.dtype == torch.float32
            and p.shards.layout is None
            and not p.role.heads
            and first.ndim
            and first.numel()
            and all(param.dtype == first.dtype for param in p.params)
            and first.dtype in dtypes_on(first.device)
            and available(first.device)  # which may ask a compiler
        )

    @staticmethod
    def sum(p: StackedParameter) -> bool:
        """Whether there are kernels that sum over the units of a parameter: rows or columns."""
        axes = axes_of(p.role.axis)
        return Kernels.read(p) and (axes == (0,) or (axes == (1,) and p.params[0].ndim == 2))

    @staticmethod
    def fit(p: StackedParameter, of_side: bool) -> bool:
        """Whether there are kernels that step a parameter: alone, or as part of a side."""
        first, averaging = p.params[0], p.averaging
        dressed = axes_of(p.dressed.axis) if p.dressed is not None else ()
        if not (
            Kernels.read(p)
            and isinstance(p.rule, Adam)
            and "exp_avg" in p.moments
            and p.moments["exp_avg"].shape[1:] == first.shape
            and (averaging is None or first.ndim <= 2)
            and (p.dressed is None or dressed == (0,) or (dressed == (1,) and first.ndim == 2))
        ):
            return False
        if not of_side:
            return not p.role.centred
        if kernels_of(p).unit == 1:
            return Kernels.sum(p) and kernels_of(p).averaged != 1
        return Kernels.sum(p) and averaging is None and not p.role.centred

    # ------------------------------------------------------------------------------------------

    def offsets(self, tensors: list[Tensor]) -> Tensor:
        """How many entries after the first layer's those of each begin, (L,), on the device.

        A CUDA graph reads the same memory at every replay, so what it reads stays.
        """
        first, size, device = tensors[0].data_ptr(), tensors[0].element_size(), tensors[0].device
        key = tuple((tensor.data_ptr() - first) // size for tensor in tensors)
        if capturing(device):
            if key in self.known:
                self.captured.append(self.known[key])
                return self.known[key]
            # no copy, which would read the host's memory again at every replay
            return torch.cat(
                [torch.full((1,), each, dtype=torch.int64, device=device) for each in key]
            )
        if key not in self.known:
            if len(self.known) >= KNOWN:
                self.known.clear()
            table = torch.tensor(key, dtype=torch.int64, pin_memory=device.type == "cuda")
            self.known[key] = table.to(device, non_blocking=True)
        return self.known[key]

    @property
    def row_tiles(self) -> int:
        """Tiles down the rows in order, whatever is averaged."""
        return cdiv(self.rows, self.br)

    @property
    def row_groups(self) -> int:
        """The same, but groups of rows in their place where these are averaged."""
        return self.groups if self.averaged == 0 else self.row_tiles

    def parts(self, pieces: int) -> tuple[int, int, int]:
        """Blocks of units, parts of each, and steps of a part, where units are summed over: in so
        many pieces of columns.
        """
        if self.unit == 0:
            return self.row_tiles, 1, cdiv(self.columns, self.bc)
        steps = min(pieces, max(1, ROWS_PER_PART // self.br))
        return cdiv(self.columns, self.bc), cdiv(pieces, steps), steps

    @property
    def tiles(self) -> int:
        """Tiles of a layer: those of groups in the place of what is averaged."""
        if self.averaged == 1:
            return self.row_tiles * self.groups
        return cdiv(self.columns, self.bc) * self.row_groups

    def launch(self, name: str, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch a kernel, on the device of the weights, whichever is the current one."""
        if self.in_c:
            size = self.rows * self.columns * grid[1]
            launch_in_c(name, grid, size, *arguments, self.br, self.bc)
            return
        kernels = importlib.import_module("ddc.optim.kernels")  # with Triton, if that is there

        warps = 8 if self.br * self.bc > 4096 else 4
        with torch.cuda.device_of(self.order):
            getattr(kernels, name)[grid](*arguments, BR=self.br, BC=self.bc, num_warps=warps)

    def sums(self, layers: int, parts: int, kinds: int) -> Tensor:
        """Room for the sums of all programs."""
        units = self.columns if self.unit == 1 else self.rows
        return torch.empty(
            (kinds, layers, parts, units), dtype=torch.float32, device=self.order.device
        )


def kernels_of(p: StackedParameter) -> Kernels:
    """Made once, and anew where a parameter was copied."""
    if p.kernels is None:
        p.kernels = Kernels(p)
    found: Kernels = p.kernels
    return found


def fuses(p: StackedParameter, layers: Layers | Pairs, use: int) -> bool:
    """Whether kernels go over these layers, for a use: :data:`ALONE`, :data:`OF_SIDE` or
    :data:`SUMS`. A compiler of the step makes its own.
    """
    if torch.compiler.is_compiling():
        return False
    if p.fit is None:
        p.fit = fit(p)
    if not p.fit[use]:
        return False
    k, dtype = kernels_of(p), layers.grads[0].dtype
    return (
        all(x.shape == k.shape and x.is_contiguous() for x in layers.weights)
        and all(x.shape == k.shape and x.dtype == dtype for x in layers.grads)
        and dtype in dtypes_on(k.device)
    )


def fit(p: StackedParameter) -> tuple[bool, bool, bool]:
    """Which kernels there are for a parameter by itself, by use."""
    alone = Kernels.fit(p, of_side=False)
    if in_c(p.params[0].device):  # a rescale is one kernel: ddc.optim.polar_in_c
        return alone, False, False
    return alone, Kernels.fit(p, of_side=True), Kernels.sum(p)


class Places:
    """Where weights and gradients lie, as kernels are told.

    Attributes:
        weights: those of the first layer, and offsets.
        both: likewise, and of the gradients, which are alive as long as this is.
        aligned: what all offsets are a multiple of.
    """

    def __init__(self, p: StackedParameter, layers: Layers | Pairs) -> None:
        grads = [grad.resolve_neg().contiguous() for grad in layers.grads]
        k = kernels_of(p)
        offsets = k.offsets
        self.weights = layers.weights[0], offsets(layers.weights)
        self.both = *self.weights, grads[0], offsets(grads)
        self.alive = grads
        tensors = *layers.weights, *grads
        multiple = all(tensor.data_ptr() % (ALIGNED * 4) == 0 for tensor in tensors)
        self.aligned = ALIGNED if multiple and k.columns % ALIGNED == 0 else 1


class FusedPart:
    """One parameter of a side at one step: as :class:`ddc.optim.side.Part`."""

    def __init__(self, p: StackedParameter, layers: Layers) -> None:
        self.p, self.layers, self.kernels = p, layers, kernels_of(p)
        self.count = len(layers.weights)
        self.places = Places(p, layers)
        nothing = self.kernels.order
        self.factor = self.inverse = self.means = self.mean_u = nothing
        self.factor_axis = -1
        if layers.before is not None:
            assert p.dressed is not None
            self.factor_axis = axes_of(p.dressed.axis)[0]
            self.factor, self.inverse = factors(p, layers.before)
        if p.role.centred:
            self.means = self._column_sums() / self.kernels.rows
        self._sums = self._unit_sums()

    def _column_sums(self) -> Tensor:
        k = self.kernels
        blocks, parts, steps = k.parts(k.row_tiles)
        sums = k.sums(self.count, parts, 2)
        k.launch(
            "column_sums", (blocks, self.count, parts),
            *self.places.both, sums, self.count, parts, k.rows, k.columns, steps,
            self.places.aligned,
        )  # fmt: skip
        return sums.sum(2)

    def _unit_sums(self) -> Tensor:
        given = self.factor, self.inverse, self.means, self.factor_axis, self.p.role.centred
        return unit_sums(self.kernels, self.places, self.count, *given)

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Squares of the weights, and their products with the gradients, (L, U) each."""
        return self._sums[0], self._sums[1]

    @property
    def mean_squares(self) -> Tensor:
        """Squares of what centring takes off, (L, U); zero where it takes nothing."""
        if not self.p.role.centred:
            return self._sums.new_zeros(())
        squares = self.means[0].square()
        if self.factor_axis == 0:
            return squares * self.factor.square().sum(1, keepdim=True)
        if self.factor_axis == 1:
            squares = squares * self.factor.square()
        return squares * self.kernels.rows

    @property
    def grad_squares(self) -> Tensor:
        """Squares of the gradients, (L, U)."""
        return self._sums[2]

    def direct(
        self, norm: Tensor, leaning: Tensor, clock: Bias, hyper: Hyper
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rule's direction of norm g - leaning w: its products with the weights, its squares,
        and its factor.
        """
        k, moments = self.kernels, self.layers.moments
        blocks, parts, steps = k.parts(k.row_groups)
        sums = k.sums(self.count, parts, 3)
        first, second = map(float, hyper["betas"])
        self.floor = floor(clock, hyper, self.count)
        k.launch(
            "direct", (blocks, self.count, parts),
            *self.places.both, self.factor, self.inverse, self.means, moments["exp_avg"],
            moments["exp_avg_sq"], norm.contiguous(), leaning.contiguous(), self.floor, sums,
            k.order, k.starts, k.groups, 1 - first, second, 1 - second, self.count, parts, k.rows,
            k.columns, steps, self.places.aligned, k.unit, self.factor_axis, self.p.role.centred,
            k.averaged,
        )  # fmt: skip
        products, squares, total = sums.sum(2)
        if self.p.role.centred:
            self.mean_u = total / k.rows
            squares = (squares - k.rows * self.mean_u.square()).clamp_(min=0)
        return products, squares, clock.root_second / clock.first

    def write(self, keep: Tensor, turn: Tensor | None) -> None:
        """The weights after the step, undressed by what dresses them now."""
        assert turn is not None
        k, moments, p, undress = self.kernels, self.layers.moments, self.p, self.kernels.order
        if self.layers.after is not None:
            undress = factors(p, self.layers.after)[1]
        k.launch(
            "write", (k.tiles, self.count),
            *self.places.weights, self.factor, undress, self.means, moments["exp_avg"],
            moments["exp_avg_sq"], keep.contiguous(), turn.contiguous(), self.floor, self.mean_u,
            k.order, k.starts, k.groups, k.rows, k.columns, self.places.aligned, k.unit,
            self.factor_axis, p.role.centred, k.averaged,
        )  # fmt: skip
        moved(self.layers)


def unit_sums(
    k: Kernels,
    places: Places,
    layers: int,
    factor: Tensor,
    inverse: Tensor,
    means: Tensor,
    factor_axis: int,
    centred: bool,
) -> Tensor:
    """Sums of w², w g and g² over each unit, (3, L, U)."""
    blocks, parts, steps = k.parts(k.row_tiles)
    sums = k.sums(layers, parts, 3)
    k.launch(
        "unit_sums", (blocks, layers, parts),
        *places.both, factor, inverse, means, sums, layers, parts, k.rows, k.columns, steps,
        places.aligned, k.unit, factor_axis, centred,
    )  # fmt: skip
    return sums.sum(2)


def products(p: StackedParameter, pairs: Pairs) -> Tensor:
    """Sums of w g over each unit, of weights as they are, (L, U)."""
    k = kernels_of(p)
    nothing = k.order, k.order, k.order
    return unit_sums(k, Places(p, pairs), len(pairs.weights), *nothing, -1, False)[1]


def step_free(p: StackedParameter, layers: Layers, clock: Bias, hyper: Hyper) -> None:
    """All of the step of what no gauge scales: as ``FreeStack._move``."""
    k, count = kernels_of(p), len(layers.weights)
    places = Places(p, layers)
    nothing, axis, relaxed_axis = k.order, -1, -1
    inverse = undress = relaxed = nothing
    if p.dressed is not None:
        dressed_axis = axes_of(p.dressed.axis)[0]
        if layers.before is not None and layers.after is not None:
            axis = dressed_axis
            inverse, undress = factors(p, layers.before)[1], factors(p, layers.after)[1]
        if layers.relaxed is not None:
            relaxed_axis, relaxed = dressed_axis, factors(p, layers.relaxed)[0]
    first, second = map(float, hyper["betas"])
    turn = hyper["lr"] * clock.root_second / clock.first
    keep = torch.ones_like(turn).expand(count) * layers.decay
    k.launch(
        "free", (k.tiles, count),
        *places.both, inverse, undress, relaxed,
        layers.moments["exp_avg"], layers.moments["exp_avg_sq"], keep.contiguous(),
        turn.expand(count).contiguous(), floor(clock, hyper, count), k.order, k.starts, k.groups,
        1 - first, second, 1 - second, k.rows, k.columns, places.aligned, axis, relaxed_axis,
        k.averaged,
    )  # fmt: skip
    moved(layers)


def moved(layers: Layers | Pairs) -> None:
    """Tell autograd that the weights have moved."""
    for weight in layers.weights:  # torch 2.6 takes one at a time
        torch.autograd.graph.increment_version(weight)


def floor(clock: Bias, hyper: Hyper, layers: int) -> Tensor:
    """What is added to the root of the second moment, (L,)."""
    return (hyper["eps"] * clock.root_second).expand(layers).contiguous()


def factors(p: StackedParameter, norm: Tensor) -> tuple[Tensor, Tensor]:
    """What norms that dress a parameter multiply it by along their axis, and one over that."""
    assert p.dressed is not None
    factor = norm if p.dressed.degree == 1 else norm**p.dressed.degree
    return factor.contiguous(), safe_power(factor, -1).contiguous()


def power_of_two(n: int) -> int:
    """The smallest that is not less."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Their quotient, rounded up."""
    return -(-a // b)
