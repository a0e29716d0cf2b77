"""The step of a :class:`ddc.optim.polar.PolarStack` by the kernel ``polar`` of ``kernels.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddc.gauges.base import axes_of
from ddc.optim.averaging import Averaging
from ddc.optim.compiled import Hyper
from ddc.optim.fused import Kernels, cdiv, in_c, kernels_of, moved
from ddc.optim.native import run_polar
from ddc.optim.rules.adam import Adam
from ddc.optim.side import Side
from ddc.optim.stacked import Layers, Pairs, StackedParameter

#: Bytes of weights, gradients and moments that a program of rows goes over, which stay in the cache
#: of a core. One of columns takes whole rows, which are read faster than strips.
TILE_BYTES = 2**19
#: Units of a program: a multiple of a line of the cache; at most so many, a row of which is read as
#: fast as a wider one; and with no more entries than this, 16 MB, for each of which there is room.
LINE, MOST, ROOM = 16, 2048, 2**22
MODES = ("freeze", "adam", "balance")


class CMatrix(ctypes.Structure):
    """``Matrix`` of ``kernels.c``, which explains it."""

    _fields_ = (
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("weights", "grads")),
        *((name, ctypes.c_void_p) for name in ("exp_avg", "exp_avg_sq")),
        *((name, ctypes.c_void_p) for name in ("before", "after", "order", "starts")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups", "unit", "axis")),
        *((name, ctypes.c_int64) for name in ("centred", "averaged")),
        *((name, ctypes.c_float) for name in ("degree", "offset", "decay")),
    )


class CSide(ctypes.Structure):
    """``Side``."""

    _fields_ = (
        ("matrices", ctypes.POINTER(CMatrix)),
        ("count", ctypes.c_int64),
        ("unit_size", ctypes.c_int64),
        ("init_scale", ctypes.c_float),
    )


#: State of a gauge's units, as the kernel calls it, by its name in ``PolarStack.modes``.
STATE = {
    "radial": "radial_exp_avg",
    "radial_sq": "radial_exp_avg_sq",
    "vertical": "vertical_exp_avg",
    "vertical_sq": "vertical_exp_avg_sq",
    "plus_waking": "plus_waking",
    "minus_waking": "minus_waking",
}


class CPolar(ctypes.Structure):
    """``Polar``."""

    _fields_ = (
        *((name, CSide) for name in ("plus", "minus", "dressed")),
        *((name, ctypes.c_void_p) for name in STATE),
        *((name, ctypes.c_void_p) for name in ("before", "after", "squares", "steps")),
        *((name, ctypes.c_int64) for name in ("units", "block", "measure")),
        *((name, ctypes.c_int64) for name in ("mode", "by_norm", "retract")),
        *((name, ctypes.c_double) for name in ("first", "second", "first_rest", "second_rest")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("lr", "radial_rate", "degree")),
    )


class PolarInC:
    """A polar stack, as the kernel sees it.

    What stays from step to step is filled in once; weights, gradients and hyperparameters at each.
    """

    def __init__(
        self, plus: Side, minus: Side | None, dressed: list[StackedParameter], degree: float
    ) -> None:
        self.sides = plus.parameters, [] if minus is None else minus.parameters, dressed
        self.given = CPolar(
            plus=self._side(self.sides[0], plus),
            minus=self._side(self.sides[1], minus),
            dressed=self._side(dressed, None),
            units=plus.parameters[0].units,
            degree=degree,
        )
        stepped = [*self.sides[0], *self.sides[1]]
        self.has_columns = any(kernels_of(p).unit == 1 for p in (*stepped, *dressed))
        self.of_unit = sum(p.unit_size for p in stepped)

    @classmethod
    def of(
        cls, plus: Side, minus: Side | None, dressed: list[StackedParameter], degree: float
    ) -> PolarInC | None:
        """That of a gauge, if the kernel takes all of its parameters: sides, and what the plus side
        dresses.
        """
        taken = (
            in_c(plus.parameters[0].params[0].device)
            and all(fits(p, plus.unit_size > 1) for p in plus.parameters)
            and (minus is None or all(fits(p, minus.unit_size > 1) for p in minus.parameters))
            and all(fits(p, turns=False) and not p.role.offset for p in dressed)
        )
        return cls(plus, minus, dressed, degree) if taken else None

    @staticmethod
    def _side(parameters: Sequence[StackedParameter], side: Side | None) -> CSide:
        matrices = (CMatrix * max(len(parameters), 1))()
        for matrix, p in zip(matrices, parameters, strict=False):
            k = kernels_of(p)
            matrix.unit, matrix.rows, matrix.columns = k.unit, k.rows, k.columns
            if is_row(k):
                matrix.unit, matrix.rows, matrix.columns = 1, 1, k.rows
            matrix.groups, matrix.averaged = k.groups, k.averaged == 0
            matrix.order, matrix.starts = k.order.data_ptr(), k.starts.data_ptr()
            matrix.centred, matrix.offset, matrix.axis = p.role.centred, p.role.offset, -1
            if side is not None and p.dressed is not None:
                (axis,) = axes_of(p.dressed.axis)
                matrix.axis = 1 - axis if is_row(k) else axis
                matrix.degree = p.dressed.degree
        return CSide(
            matrices=matrices,
            count=len(parameters),
            unit_size=0 if side is None else side.unit_size,
            init_scale=0 if side is None else side.init_scale,
        )

    def takes(self, layers: Sequence[Layers | Pairs]) -> bool:
        """Whether weights and gradients lie as the kernel takes them: of the plus side, the
        minus side and, in a step, of what the first dresses.
        """
        shapes = (kernels_of(p).shape for side in self.sides for p in side)
        return all(
            weight.shape == shape
            and weight.is_contiguous()
            and grad.shape == shape
            and grad.dtype == torch.float32
            for each, shape in zip(layers, shapes, strict=False)
            for weight, grad in zip(each.weights, each.grads, strict=True)
        )

    def run(
        self,
        layers: Sequence[Sequence[Layers | Pairs]],
        modes: Mapping[str, Tensor],
        hyper: Hyper,
        step_count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Move both sides, or, without ``step_count``, measure the gradient.

        Returns:
            The plus norms before and after; or these, and for each unit the squared norm of its
            gradients. Each (L, U).
        """
        given = self.given
        count = len(layers[0][0].weights)
        before, after = torch.empty((2, count, given.units), dtype=torch.float32, device="cpu")
        alive: list[Any] = []  # until the kernel has run
        given.dressed.count = len(layers[2])  # a measure does without
        for side, each in zip((given.plus, given.minus, given.dressed), layers, strict=True):
            for i, of in enumerate(each):
                alive += self._fill(side.matrices[i], of)
        for name, key in STATE.items():
            if layers[1] and (not name.startswith("vertical") or hyper["vertical"] == "adam"):
                setattr(given, name, modes[key].data_ptr())
        given.before, given.after = before.data_ptr(), after.data_ptr()
        given.squares, given.measure = after.data_ptr(), step_count is None
        given.by_norm = hyper["step_scale"] == "norm"
        if step_count is not None:
            given.steps = step_count.data_ptr()
            first, second = map(float, hyper["betas"])
            given.first, given.second = first, second
            given.first_rest, given.second_rest = 1 - first, 1 - second
            given.eps, given.lr = float(hyper["eps"]), float(hyper["lr"])
            given.radial_rate = float(hyper["radial_rate"])
            given.mode, given.retract = MODES.index(hyper["vertical"]), hyper["retract"]
        given.block = self._block(count)
        entries = count * given.units * self.of_unit
        run_polar(given, count * cdiv(given.units, given.block), entries)
        if step_count is not None:
            for each in layers[:2]:
                for of in each:
                    moved(of)
        return before, after

    def _block(self, layers: int) -> int:
        """Units of a program, so many that each thread has work; results do not depend on it."""
        units = cdiv(self.given.units, cdiv(torch.get_num_threads(), layers))
        if not self.has_columns:
            units = min(units, TILE_BYTES // (16 * self.of_unit))
        units = min(units, MOST, ROOM // self.of_unit)
        return max(cdiv(units, LINE), 1) * LINE

    @staticmethod
    def _fill(matrix: CMatrix, of: Layers | Pairs) -> list[Any]:
        """Say where all is; what is returned must live until the kernel has run."""
        grads = [grad.resolve_neg().contiguous() for grad in of.grads]
        matrix.weights, matrix.grads = addresses(of.weights), addresses(grads)
        alive: list[Any] = [grads]
        if isinstance(of, Pairs):
            return alive
        matrix.decay = float(of.decay)
        if of.moments:
            matrix.exp_avg = of.moments["exp_avg"].data_ptr()
            matrix.exp_avg_sq = of.moments["exp_avg_sq"].data_ptr()
        if of.before is not None and of.after is not None:
            norms = of.before.contiguous(), of.after.contiguous()
            matrix.before, matrix.after = (norm.data_ptr() for norm in norms)
            alive.append(norms)
        return alive


def addresses(tensors: Sequence[Tensor]) -> Any:
    """Where tensors lie, as C takes it."""
    return (ctypes.c_int64 * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def fits(p: StackedParameter, turns: bool) -> bool:
    """Whether the kernel takes a parameter, as part of a side that has directions or of another."""
    axes, dressed = axes_of(p.role.axis), () if p.dressed is None else axes_of(p.dressed.axis)
    matrix = p.params[0].ndim == 2
    return (
        Kernels.whole(p)
        and (axes == (0,) or (axes == (1,) and matrix))
        and (p.dressed is None or dressed == (0,) or (dressed == (1,) and matrix))
        and (axes == (1,) or not p.role.centred)
        and (not turns or isinstance(p.rule, Adam))
        and (not turns or p.averaging is None or (axes == (1,) and averages_rows(p)))
    )


def averages_rows(p: StackedParameter) -> bool:
    """Whether groups of rows share a second moment."""
    return isinstance(p.averaging, Averaging) and p.averaging.dim == 1


def is_row(k: Kernels) -> bool:
    """Whether all entries lie along units: to the kernel these are one row."""
    return k.unit == 0 and k.columns == 1
