"""What a gauge is: a group that acts on named parameters and leaves the loss of every batch
unchanged.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of gauge; configurations, titles and tables follow from its record.

    Attributes:
        name: in code, configurations and records.
        title: in figures and text.
        default: whether it is among those of ``gauges=all``.
        further: whether it is beyond the paper's: found where it is asked for, by its name or as
            one of ``kinds="complete"``.
        within: the kind whose group contains this one's, beside which it has nothing to add.
        approximate: whether it is a symmetry at eps = 0 alone: found where its name asks for it,
            with its measured size, and in no set of kinds but :func:`approximate_kinds`.
    """

    name: str
    title: str
    default: bool = True
    further: bool = False
    within: str | None = None
    approximate: bool = False


#: Every kind of gauge the package knows by name, in the order in which tables list them.
KINDS: dict[str, Kind] = {}


def add_kind(kind: Kind) -> None:
    """Make a kind known, after those that there are.

    Raises:
        ValueError: its name is taken.
    """
    if kind.name in KINDS:
        raise ValueError(f"Invalid kind={kind.name!r}: there is one of that name already")
    KINDS[kind.name] = kind


for _kind in (
    Kind("logit_shift", "logit shift"),
    Kind("relu_rescale", "ReLU rescale"),
    Kind("chained_rescale", "chained rescale", default=False, within="relu_rescale"),
    Kind("gated_rescale", "gated rescale"),
    Kind("norm_scale", "norm scale"),
    Kind("value_rotation", "value rotation", within="value_map"),
    Kind("qk_rotation", "query-key rotation", within="qk_map"),
    # with these they are all continuous symmetries of a transformer
    Kind("factor_map", "factor map", default=False, further=True),
    Kind("factor_bias", "factor bias", default=False, further=True),
    Kind("value_map", "value map", default=False, further=True),
    Kind("value_bias", "value bias", default=False, further=True),
    Kind("qk_map", "query-key map", default=False, further=True),
    Kind("key_bias", "key bias", default=False, further=True),
    Kind("qk_norm_scale", "query-key norm scale", default=False, further=True),
    Kind("stream_rotation", "stream rotation", default=False, further=True),
    Kind("stream_mean", "stream mean", default=False, further=True),
    Kind("translation", "translation", default=False, further=True),
    Kind("reader_shift", "reader shift", default=False, further=True),
    Kind("norm_shift", "norm shift", default=False, further=True),
    Kind("router_shift", "router shift", default=False, further=True),
    Kind("score_shift", "score shift", default=False, further=True),
    Kind("layer_scale", "layer scale", default=False, further=True),
    Kind("channel_scale", "channel scale", default=False, further=True),
    # these the eps of a norm breaks
    Kind("stream_scale", "stream scale", default=False, further=True, approximate=True),
    Kind("normed_scale", "normed scale", default=False, further=True, approximate=True),
    Kind("filter_scale", "filter scale", default=False, further=True, approximate=True),
):
    add_kind(_kind)


def paper_kinds() -> tuple[str, ...]:
    """Names of the kinds that are not further ones: the paper's, and those that extensions add."""
    return tuple(name for name, kind in KINDS.items() if not kind.further)


def complete_kinds() -> tuple[str, ...]:
    """Names of all kinds that are exact, but those whose group another's contains."""
    return tuple(
        name for name, kind in KINDS.items() if kind.within is None and not kind.approximate
    )


def approximate_kinds() -> tuple[str, ...]:
    """Names of the kinds that are symmetries at eps = 0 alone."""
    return tuple(name for name, kind in KINDS.items() if kind.approximate)


class Gauge(ABC):
    """A continuous symmetry of the loss, acting on a few named parameters.

    A *unit* is one index of the group: a neuron, a channel, a head, a frequency plane; or a whole
    layer, a *block*. All units of one layer form one gauge, so that everything that reads a gauge
    can be batched over its units.

    Attributes:
        kind: one of :data:`KINDS`.
        where: the place in the model, in the model's own names, for tables and messages.
    """

    kind: str
    where: str

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters it acts on."""

    @abstractmethod
    def dimension(self, params: Params) -> int:
        """Dimension of the group."""

    @abstractmethod
    def sample(self, params: Params, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        """A random group element.

        Args:
            params: the model's parameters by name (for shapes, dtype and device).
            generator: a CPU generator, so that a seed gives the same element on every device.
            spread: size of the element: scales lie in e^±spread, shifts have standard deviation
                ``spread``; rotations are always uniform.
        """

    @abstractmethod
    def act_(self, params: Params, element: Tensor) -> None:
        """Transform the parameters in place by ``element`` (as returned by :meth:`sample`)."""

    @abstractmethod
    def audit(self, params: Params, grads: Params) -> float:
        """Size of the gradient along the orbit, relative to the gradient across it.

        Zero up to rounding if and only if the loss that made the gradients is stationary along the
        orbit, as a true symmetry makes it; of order 1 for a gauge declared by mistake.
        """

    @abstractmethod
    def velocities(self, params: Params) -> dict[str, Tensor]:
        """How fast each parameter moves along a basis of the group, at the identity.

        Returns:
            By parameter, a tensor in float64: dimension first, then the shape of the parameter.
        """

    def balancing(self, params: Params) -> tuple[Tensor, float] | None:
        """The element that takes the parameters to the least norm that this group alone can give
        them, with its distance from the identity: the largest logarithm of a scale, or the root
        mean square of what is added.

        None where there is neither a closed form nor a convex problem, and where the norm does not
        change along the orbit: rotations.
        """
        return None

    @torch.no_grad()
    def tangents(self, params: Params) -> Tensor:
        """The directions along which the group moves the weights.

        Args:
            params: all parameters of the model by name, in the order of ``named_parameters``.

        Returns:
            (dimension, entries of all parameters), in float64: a row a one-parameter subgroup.
        """
        moved = self.velocities(params)
        rows = self.dimension(params)
        parts = [
            moved[name].reshape(rows, p.numel()).cpu()
            if name in moved
            else torch.zeros(rows, p.numel(), dtype=torch.float64)
            for name, p in params.items()
        ]
        return torch.cat(parts, dim=1)

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}"


@dataclass(frozen=True)
class Refusal:
    """A gauge of this kind was looked for at this place and not granted, with the reason in
    words.
    """

    kind: str
    where: str
    reason: str

    def __post_init__(self) -> None:
        check_kind(self.kind)


def check_kind(kind: str) -> None:
    """Raise ValueError unless ``kind`` is one of :data:`KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"Invalid {kind=}: expected one of {', '.join(KINDS)}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile``, DDP or DataParallel wraps, or the model itself."""
    if _is_a(model, "torch._dynamo.eval_frame", "OptimizedModule"):
        inner = model._orig_mod
        assert isinstance(inner, nn.Module)
        return unwrapped(inner)
    return (
        unwrapped(model.module)
        if isinstance(model, DistributedDataParallel | DataParallel)
        else model
    )


def is_split(tensor: object) -> TypeGuard[DTensor]:
    """Whether ranks hold parts of a tensor: a DTensor, as ``fully_shard`` makes them."""
    return _is_a(tensor, "torch.distributed.tensor", "DTensor")


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no values."""
    return tensor.is_meta or _is_a(tensor, "torch._subclasses.fake_tensor", "FakeTensor")


def _is_a(instance: object, module: str, name: str) -> bool:
    """``isinstance`` for a class of a module that takes a second to import, and is there if the
    class has an instance.
    """
    return isinstance(instance, getattr(sys.modules.get(module), name, ()))


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, without the prefixes that ``torch.compile`` and DDP put before them."""
    return {plain_name(name): parameter for name, parameter in unwrapped(model).named_parameters()}


def frozen_tables(model: nn.Module) -> set[str]:
    """Names of the weights of ``nn.Embedding`` that are not trained in a model that is: the sines
    and cosines of RoFormer and Marian. While they stay so they are constants, like buffers.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return set()
    return {
        f"{plain_name(path)}.weight".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not module.weight.requires_grad
    }


def plain_name(name: str) -> str:
    """A parameter's name without the mark of ``torch.compile`` on the modules that it compiled one
    by one.
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain_names(names: Sequence[str], known: Collection[str] | None = None) -> list[str]:
    """Names of parameters as the unwrapped model has them.

    Args:
        names: of all parameters, of a model that ``torch.compile`` or DDP may have wrapped.
        known: some names of the unwrapped model, by which the prefix ``module.`` that DDP puts
            before all names is told from a submodule of that name; None takes what all names begin
            with for DDP's.
    """
    plain = [plain_name(name) for name in names]
    wrapped = all(name.startswith("module.") for name in plain)
    if known is not None and {*known} <= {*plain}:
        wrapped = False
    return [name.removeprefix("module.") for name in plain] if wrapped else plain


def place_of(tensor: Tensor) -> tuple[object, ...] | None:
    """Where the values of a tensor lie in memory, and in which shape; None for what has none, or
    none of its own.
    """
    if is_fake(tensor) or is_split(tensor) or tensor.layout != torch.strided or not tensor.numel():
        return None
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
    )


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which ranks hold parts (a DTensor, for which all ranks must ask), or the
    tensor itself.
    """
    return tensor.full_tensor() if is_split(tensor) else tensor


#: Along which axis, or axes jointly, the units of a gauge lie; None for a single unit.
UnitAxis = int | tuple[int, ...] | None


def axes_of(axis: UnitAxis) -> tuple[int, ...]:
    """The axes of the units, none for a single unit."""
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, int) else axis


def unit_view(tensor: Tensor, axis: UnitAxis) -> Tensor:
    """View a tensor as (units, entries of the unit); of more than two axes it may be a copy."""
    if axis is None:
        return tensor.reshape(1, -1)
    if tensor.ndim == 1:
        return tensor.unsqueeze(1)
    if tensor.ndim == 2 and isinstance(axis, int):
        return tensor if axis == 0 else tensor.mT
    axes = axes_of(axis)
    units = tensor.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
    return units.reshape(len(units), -1)


def spread_units(values: Tensor, tensor: Tensor, axis: UnitAxis) -> Tensor:
    """A value for each unit, (units,), as what broadcasts against the tensor."""
    axes = axes_of(axis)
    return values.view([size if i in axes else 1 for i, size in enumerate(tensor.shape)])
