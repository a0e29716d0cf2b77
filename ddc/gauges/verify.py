"""The numeric half of the proof: what the rules found is tried on the model itself, in float64; what fails is dropped.

The rules of ``ddc.gauges.traced`` read one program, the one that the model runs in evaluation on the example. What they
cannot see (another path in training, another one for longer inputs, a rule that is wrong) shows here: a random element
of the group must change no output.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ddc.gauges.actions import Shift
from ddc.gauges.base import Gauge, Refusal, first_line, plain_name
from ddc.gauges.double import InDouble, double
from ddc.gauges.gauge_set import GaugeSet
from ddc.gauges.trace import preserved

#: Outputs that change by more than this, relative to the largest entry, are not the same. Rounding in float64 moves
#: them by 1e-15 to 1e-10, a false gauge by 1e-3 and more.
TOLERANCE = 1e-6
#: A model of more parameters is tried on a narrow twin: a copy in float64 would take over 2 GiB.
LARGEST = 2**28
#: To how many positions a sequence is lengthened, for what sets in only behind the example's.
LONG = 32
#: How many random numbers are drawn for a parameter at most, and repeated: a prime, so that no two rows are the same.
DRAWN = 1_000_003


@dataclass(frozen=True)
class Change:
    """How much outputs change at most, relative to their largest entry, and in which mode of the model."""

    size: float
    training: bool = False

    def __str__(self) -> str:
        where = " in training mode" if self.training else ""
        return f"outputs change by {self.size:.1e} of their size under a random element{where}"


@dataclass(frozen=True)
class Case:
    """Inputs of a model, its mode, and what it gives on them."""

    inputs: Any
    training: bool
    outputs: list[Tensor]


class Subject:
    """A model with generic weights in float64, run on a few inputs in evaluation and in training.

    Args:
        model: left as it is.
        args, kwargs: example inputs.

    Attributes:
        params: parameters by name, which :meth:`outputs` reads.
        cases: inputs, with the outputs of the model as it is.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.params = {name: generic(p.detach(), generator) for name, p in model.named_parameters()}
        self._buffers = {name: double(b) for name, b in model.named_buffers()}
        example = tree_map(double, (tuple(args), dict(kwargs)))
        self.cases = [Case(example, False, self.outputs(example, training=False))]
        # what cannot run in training on the example (a batch norm on a batch of one, say) is tried in evaluation alone
        self._try(example, training=True)
        training = len(self.cases) > 1
        for inputs in (another(example, generator), lengthened(example)):
            if inputs is not None:
                self._try(inputs, training)

    def _try(self, inputs: Any, training: bool) -> None:
        """Take these inputs as a case, if the model can be run on them."""
        with contextlib.suppress(Exception):  # whatever a model of others may raise
            outputs = self.outputs(inputs, training)
            if all(bool(each.isfinite().all()) for each in outputs):
                self.cases.append(Case(inputs, training, outputs))

    @torch.no_grad()
    def outputs(self, inputs: Any, training: bool) -> list[Tensor]:
        """All tensors that the model gives, in order, and those that it leaves on its modules, in float64."""
        generators = torch.get_rng_state(), random.getstate()
        modes = {module: module.training for module in self.model.modules()}
        held = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        state = self.params | {name: b.clone() for name, b in self._buffers.items()}
        in_place_of = {id(tensor): state[name] for name, tensor in held.items()}
        with preserved(self.model):
            before = {id(value) for module in modes for value in vars(module).values()}
            try:
                torch.manual_seed(0)
                random.seed(0)
                for module in modes:
                    module.training = training
                    for tensors_of in (module._parameters, module._buffers):
                        tensors_of.update({key: in_place_of.get(id(x), x) for key, x in tensors_of.items()})
                with InDouble():
                    given = self.model(*inputs[0], **inputs[1])
                left = [v for module in modes for v in vars(module).values() if id(v) not in before]
            finally:
                torch.set_rng_state(generators[0])
                random.setstate(generators[1])
                for module, mode in modes.items():
                    module.training = mode
        return [double(each) for each in [*tensors(given), *tensors(left)]]

    def change(self, gauges: Sequence[Gauge]) -> Change:
        """The largest change of an output under a random element of the product of these groups."""
        original = self.params
        params = {plain_name(name): p for name, p in original.items()}
        moving = {name for gauge in gauges for name in gauge.parameters}
        params |= {name: params[name].clone() for name in moving}
        generator = torch.Generator().manual_seed(0)
        for gauge in gauges:
            gauge.act_(params, gauge.sample(params, generator))
        shifted = {len(params[gauge.weight]) for gauge in gauges if isinstance(gauge, Shift)}
        self.params = {name: params[plain_name(name)] for name in original}
        try:
            changes = [
                Change(difference(case.outputs, self.outputs(case.inputs, case.training), shifted), case.training)
                for case in self.cases
            ]
        finally:
            self.params = original
        return max(changes, key=lambda change: change.size)

    def failing(self, gauges: Sequence[Gauge]) -> dict[Gauge, Change]:
        """Those that are no symmetries, found by halves: where all are, one application of all at once shows it."""
        change = self.change(gauges) if gauges else Change(0.0)
        if change.size <= TOLERANCE:
            return {}
        if len(gauges) == 1:
            return {gauges[0]: change}
        half = len(gauges) // 2
        return self.failing(gauges[:half]) | self.failing(gauges[half:])


def generic(param: Tensor, generator: torch.Generator) -> Tensor:
    """A parameter in float64, moved at random: weights at zero, or tiny, would hide what they multiply."""
    if not param.is_floating_point() and not param.is_complex():
        return param
    shape = param.shape
    fan = 1 if param.ndim < 2 else max(shape[-2:]) if param.ndim < 4 else math.prod(shape[1:])
    noise = torch.randn(min(param.numel(), DRAWN), generator=generator, dtype=double(param.dtype))
    noise = noise.repeat(-(-param.numel() // DRAWN))[: param.numel()].view(shape).to(param.device)
    return noise.mul_(0.3 if param.ndim < 2 else fan**-0.5).add_(param)


def another(inputs: Any, generator: torch.Generator) -> Any:
    """Inputs of the same shapes: numbers drawn anew, integers and truth values in another order."""

    def redrawn(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.numel() > 1:
            noise = torch.randn(x.shape, generator=generator).to(x)
            return noise * x.std() + x.mean()
        return x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].view(x.shape)

    return tree_map_only(Tensor, redrawn, inputs)


def lengthened(inputs: Any) -> Any:
    """Inputs whose sequences, along axis 1, are repeated up to :data:`LONG` positions; None if there are none."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    lengths = [x.shape[1] for x in leaves if x.ndim == 3 or (x.ndim == 2 and not x.is_floating_point())]
    if not lengths or not 0 < lengths[0] < LONG:
        return None
    times = -(-LONG // lengths[0])

    def longer(x: Tensor) -> Tensor:
        fits = x.ndim > 1 and x.shape[1] == lengths[0]
        return x.repeat(1, times, *[1] * (x.ndim - 2)) if fits else x

    return tree_map_only(Tensor, longer, inputs)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a value: in containers, in dataclasses, and in the attributes of other objects (caches)."""
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def difference(before: Sequence[Tensor], after: Sequence[Tensor], shifted: Collection[int] = ()) -> float:
    """The largest change of an output relative to its largest entry; infinite where not even shapes are the same.

    Args:
        before: outputs.
        after: the same outputs of the moved model.
        shifted: under a logit shift, the number of logits: the first output of that width is compared up to a
            constant, as softmax sees it.
    """
    if [x.shape for x in before] != [x.shape for x in after]:
        return math.inf
    logits = next((i for i, x in enumerate(before) if x.ndim and x.shape[-1] in shifted), None)
    largest = 0.0
    for i, (x, y) in enumerate(zip(before, after, strict=True)):
        if not x.numel():
            continue
        if not x.is_floating_point() and not x.is_complex():
            change, size = float(not torch.equal(x, y)), 1.0
        else:
            moved = y - x
            if i == logits:
                moved = moved - moved.mean(-1, keepdim=True)
            change, size = float(moved.abs().max()), float(x.abs().max())
        largest = max(largest, math.inf if math.isnan(change) else change / size if change else 0.0)
    return largest


def verified(gauges: GaugeSet, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GaugeSet:
    """The same gauges without those that change the outputs of the model, which are refused.

    Args:
        gauges: found in the model.
        model: one that can be run (:func:`unfit`); left as it is.
        args: example inputs.
        kwargs: those that are given by name.
    """
    if not gauges.found:
        return gauges
    try:
        subject = Subject(model, args, kwargs)
    except Exception as error:  # whatever a model of others may raise
        return unchecked(gauges, f"the model does not run in float64: {first_line(error)}")
    if not all(bool(x.isfinite().all()) for x in subject.cases[0].outputs):
        return unchecked(gauges, "the model gives inf or nan on the example")
    failing = subject.failing(gauges.found)
    return refuse(gauges, {gauge: str(change) for gauge, change in failing.items()})


def verified_by_twin(gauges: GaugeSet, of_twin: GaugeSet) -> GaugeSet:
    """The same gauges, checked as far as they are found, or refused, in a narrow twin of the model."""

    def place(entry: Gauge | Refusal) -> tuple[str, str]:
        return entry.kind, entry.where

    checked = {(place(gauge), gauge.parameters) for gauge in of_twin if gauge not in of_twin.unchecked}
    reasons = {place(refusal): refusal.reason for refusal in of_twin.refused}
    others = [gauge for gauge in gauges if (place(gauge), gauge.parameters) not in checked]
    left = refuse(gauges, {gauge: reasons[place(gauge)] for gauge in others if place(gauge) in reasons})
    missing = {gauge: "a narrow twin of the model does not have it" for gauge in left if gauge in others}
    return replace(left, unchecked=missing)


def refuse(gauges: GaugeSet, reasons: Mapping[Gauge, str]) -> GaugeSet:
    """The same gauges, of which some are refused."""
    refused = [Refusal(gauge.kind, gauge.where, reason) for gauge, reason in reasons.items()]
    found = tuple(gauge for gauge in gauges if gauge not in reasons)
    return replace(gauges, found=found, refused=(*gauges.refused, *refused))


def unchecked(gauges: GaugeSet, reason: str) -> GaugeSet:
    """The same gauges, marked as not checked."""
    return replace(gauges, unchecked=dict.fromkeys(gauges.found, reason))


def unfit(model: nn.Module) -> str:
    """Why a model cannot be run by itself; empty if it can."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(isinstance(x, DTensor) for x in tensors):
        return "its parameters are split over processes"
    if any(x.is_meta or isinstance(x, FakeTensor) for x in tensors):
        return "its weights have no values"
    count = sum(p.numel() for p in model.parameters())
    return f"it has {count:.1e} parameters" if count > LARGEST else ""
