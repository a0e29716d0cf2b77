"""The contract of a stack, and what the stacks of one step share."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddc.optim.compiled import Hyper
from ddc.optim.rules import Rule
from ddc.optim.stacked import Layers, StackedParameter

#: Hyperparameters of a lift, whatever the rule.
LIFT = ("radial_rate", "vertical", "step_scale", "retract", "additive")


class Stack(ABC):
    """Parameters that a step moves at once: alike ones of several layers, and what gauges tie to
    them.

    ``parameters`` are the stacked parameters, ``rule`` what gives their directions, and
    ``single_chunk`` says whether all layers are taken at once; a step is compiled as one function
    where all stacks do.
    """

    parameters: list[StackedParameter]
    rule: Rule
    single_chunk: bool = True

    @property
    def shared(self) -> tuple[str, ...]:
        """Hyperparameters in which all of its parameters must agree; weight decay is each one's
        own.
        """
        return ("lr", *self.rule.settings, *LIFT)

    def tied(self) -> list[list[tuple[str, Tensor]]]:
        """Parameters, with their names, that gauges move together: all of them or none."""
        return []

    @abstractmethod
    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """State by parameter, complete from construction, as views of the stacked tensors."""

    @abstractmethod
    def step(self, context: Context) -> None:
        """Move all layers that have a gradient. Afterwards ``context`` has the norms of what this
        stack dresses others by.
        """

    @abstractmethod
    def grad_norm_squared(self, context: Context) -> Tensor:
        """Squared norm of the gradient in the invariant metric, all layers together; and the norms
        go to ``context``, as in :meth:`step`.
        """


@dataclass
class Context:
    """What the stacks of one step share: the param groups, and the norms that dress.

    ``groups`` has, of each param group, its settings, its rate ``lr`` and the factor ``decay`` of
    decoupled weight decay; all numbers are tensors where a step is compiled. ``norms`` holds, for
    each stack that has moved, the norms of its plus sides before and after, both (L, U);
    ``relaxed``, for each of the frames of hidden matrices that has relaxed, what its plus side was
    multiplied by, (L, U). ``log_forward``, ``log_backward`` and ``log_frames`` are the logarithms
    of f, b and the frame that :class:`ddc.optim.frames.Frames` defines, (G, U). ``grads`` has what
    stands for the gradients of some parameters. With ``compiled``, each stack compiles a function
    of its own; with ``fused``, kernels step what there are kernels for.
    """

    groups: list[Hyper]
    compiled: bool = False
    fused: bool = False
    grads: dict[Tensor, Tensor] = field(default_factory=dict)
    norms: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict)
    relaxed: dict[Hashable, Tensor] = field(default_factory=dict)
    log_forward: dict[Hashable, Tensor] = field(default_factory=dict)
    log_backward: dict[Hashable, Tensor] = field(default_factory=dict)
    log_frames: dict[Hashable, Tensor] = field(default_factory=dict)

    def hyper(self, parameter: StackedParameter) -> Hyper:
        """The hyperparameters of a parameter's group."""
        return self.groups[parameter.groups[0]]

    def decay(self, parameter: StackedParameter) -> Any:
        """The factor of decoupled weight decay."""
        return self.hyper(parameter)["decay"]

    def gather(self, parameter: StackedParameter, rows: slice) -> Layers:
        """What a step reads of these layers of a parameter, and where it writes."""
        before = after = relaxed = None
        if (dressed := parameter.dressed) is not None:
            layers = rows if dressed.layer is None else dressed.layer[rows]  # type: ignore[index]
            before, after = (norm[layers] for norm in self.norms[dressed.source])
            relaxed = self.relaxed.get(dressed.source)
            relaxed = None if relaxed is None else relaxed[layers]
        moments = of_layers(parameter.moments, rows)
        decay = self.decay(parameter)
        return Layers(
            *parameter.pairs(rows, self.grads), moments, before, after, relaxed, decay, self.fused
        )

    def compiles(self, parameter: StackedParameter) -> bool:
        """Whether the arithmetic on a parameter is compiled."""
        return self.compiled and parameter.compilable

    def chunks(self, has_gradient: Sequence[bool], at_once: int) -> list[slice]:
        """Slices of the layers that have a gradient, each to be taken at once."""
        slices, start = [], 0
        for has, run in itertools.groupby(has_gradient):
            stop = start + len(list(run))
            if has:
                slices += [slice(i, min(i + at_once, stop)) for i in range(start, stop, at_once)]
            start = stop
        return slices


def of_layers(state: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """What a state has of these layers: views."""
    if all(rows == slice(0, len(value)) for value in state.values()):
        return state
    return {key: value[rows] for key, value in state.items()}


#: Entries, 16 MB. On a CPU, larger temporaries leave the cache, and where the system takes their
#: pages back they are cleared anew at every step; fewer layers at once ask for more launches of
#: small operations, which is most of the time of a step by kernels.
CPU_CHUNK = 2**22


def layers_at_once(layers: int, layer_size: int, device: torch.device) -> int:
    """How many layers a step takes at once: all on an accelerator; on a CPU as many as fit, in
    equal chunks.
    """
    at_once = layers
    if device.type == "cpu":
        while at_once > 1 and (
            at_once * layer_size > CPU_CHUNK or layers % at_once
        ):  # equal chunks compile once
            at_once -= 1
    return at_once


def states_of(
    parameters: Iterable[StackedParameter], step_count: Tensor
) -> dict[Tensor, dict[str, Tensor]]:
    """State by parameter: moments, and the steps that its layer has made, of (L,) or one for
    all.
    """
    return {
        param: {"step": step_count[min(i, len(step_count) - 1)], **p.state(i)}
        for p in parameters
        for i, param in enumerate(p.params)
    }


# ---- modes: the coordinates of norms, numbers that step by the same rule


def zero_modes(
    rule: Rule, sizes: dict[str, tuple[int, ...]], like: StackedParameter
) -> dict[str, Tensor]:
    """What the rule keeps of modes of these names and shapes."""
    return {
        f"{mode}_{moment}": torch.zeros(shape, dtype=like.dtype, device=like.params[0].device)
        for mode, shape in sizes.items()
        for moment in rule.moments_of_numbers()
    }


def waking_none(shape: tuple[int, ...], like: StackedParameter) -> Tensor:
    """State of units that may grow from zero: 0 for those that do not, which are all at first."""
    return torch.zeros(shape, dtype=like.dtype, device=like.params[0].device)


def mode_step(
    rule: Rule, mode: str, gradient: Tensor, modes: dict[str, Tensor], clock: Any, hyper: Hyper
) -> Tensor:
    """The step of a radial or vertical mode, whose moments are in ``modes``; like the gradient."""
    moments = {key: modes[f"{mode}_{key}"] for key in rule.moments_of_numbers()}
    direction = rule.of_numbers(gradient, moments, clock, hyper)
    return direction.times(-hyper["lr"] * hyper["radial_rate"])
