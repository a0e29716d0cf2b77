"""The numeric half of the proof: what the rules found is tried on the model itself, in float64;
what fails is dropped.

The rules of ``ddc.gauges.traced`` read one program, the one that the model runs in evaluation on
the example. What they cannot see (another path in training, another one for longer inputs, a rule
that is wrong) shows here: a random element of the group must change nothing that the model
computes.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ddc.gauges.affine import Shear, Translation
from ddc.gauges.base import (
    Gauge,
    Refusal,
    first_line,
    is_fake,
    is_split,
    named_parameters,
    place_of,
)
from ddc.gauges.double import InDouble, double
from ddc.gauges.gauge_set import GaugeSet
from ddc.gauges.trace import constant_tables, fill_caches, reachable, running

#: What a gauge may change, relative to what the same weights change when they are moved by as much
#: off the gauge. It leaves room for rounding, which is 1e-15 to 1e-10 of that; a false gauge
#: changes as much as any move.
TOLERANCE = 1e-6
#: What of an entry counts as rounding, however little the moves change it.
ROUNDING = 1e-10
#: A model of more parameters is tried on a narrow twin: a copy in float64 would take over 2 GiB.
LARGEST = 2**28
#: Positions to which sequences are lengthened, for what sets in behind the example's: the first
#: that the model takes.
LONGER = (32, 24, 16, 12, 8)
#: How many random numbers are drawn for a parameter at most, and repeated: a prime, so that no two
#: rows are the same.
DRAWN = 1_000_003


class NotTried(Exception):
    """Why a model cannot be tried, or not in all that it does."""


@dataclass(frozen=True)
class Change:
    """How much a move changes what a model computes, relative to another move by as much, and in
    which mode.
    """

    size: float
    training: bool = False

    def __str__(self) -> str:
        where = " in training mode" if self.training else ""
        return (
            f"a random element changes outputs by {self.size:.1e} of what any such move of its"
            f" weights does{where}"
        )


@dataclass(frozen=True)
class Case:
    """Inputs of a model, its mode, the seed of what it draws, and what it computes from them."""

    inputs: Any
    training: bool
    seed: int
    outputs: list[Tensor]


class Subject:
    """A model with generic weights in float64, run on a few inputs in evaluation and in training.

    Args:
        model: left as it is.
        args, kwargs: example inputs.
        weights: by parameter, in float64, what to run it with in place of generic ones.
        constants: names of parameters that keep their own values
            (:func:`ddc.gauges.trace.constant_tables`).

    Attributes:
        weights: stand-ins for the parameters, by their place in memory.
        cases: inputs, with what the model as it is computes from them.

    Raises:
        NotTried: the model does not run.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        weights: Mapping[str, Tensor] | None = None,
        constants: Collection[str] = (),
    ) -> None:
        self.model = model
        self.params = named_parameters(model)
        generator = torch.Generator().manual_seed(0)
        self.weights: dict[object, Tensor] = {}
        self.writes = False  # whether its forward pass changes weights
        for name, p in self.params.items():  # tied ones are one, however they are tied
            if place_of(p) not in self.weights:
                given = None if weights is None else weights[name]
                if given is None and name in constants:
                    given = double(p.detach()).clone()
                self.weights[place_of(p)] = (
                    generic(p.detach(), generator) if given is None else given
                )
        example = (tuple(args), dict(kwargs))
        self.cases = [
            self._case(example, training=False, seed=0),
            self._case(example, training=True, seed=0),
        ]
        self._try(another(example, generator), seed=1)
        any(self._try(longer, seed=2) for longer in lengthened(example))

    def _try(self, inputs: Any, seed: int) -> bool:
        """Take these inputs as a case, if the model takes them."""
        with contextlib.suppress(NotTried):
            self.cases.append(self._case(inputs, training=True, seed=seed))
            return True
        return False

    def _case(self, inputs: Any, training: bool, seed: int) -> Case:
        mode = "training" if training else "evaluation"
        fill_caches(self.model, inputs, training, seed)
        try:
            outputs = self.outputs(inputs, training, seed)
        except Exception as error:  # whatever a model of others may raise
            raise NotTried(f"the model does not run in {mode}: {first_line(error)}") from error
        return Case(tree_map(double, inputs), training, seed, outputs)

    def outputs(
        self, inputs: Any, training: bool, seed: int, weights: Mapping[object, Tensor] | None = None
    ) -> list[Tensor]:
        """What the model computes: its outputs, logits first, and all tensors that it keeps, in
        float64.
        """
        # weights in float64; those that the model writes to are copied first
        held = dict(self.weights if weights is None else weights)
        if self.writes:
            held = {place: weight.clone() for place, weight in held.items()}
        versions = {place: w._version for place, w in held.items()}
        with running(self.model, training, seed), torch.no_grad():
            # what else the model holds (buffers, lists, plain objects), in float64 too
            for tensor in tensors(reachable(self.model)):
                if (place := place_of(tensor)) is not None and place not in held:
                    held[place] = double(tensor.detach().clone())
            kept = [stand_in for place, stand_in in held.items() if place not in versions]
            # on the modules, which tells the model its type; what else holds them, InDouble sees
            for module in self.model.modules():
                for own in (module._parameters, module._buffers):
                    stand_ins: dict[str, Any] = {
                        k: held.get(place_of(x), x) for k, x in own.items() if x is not None
                    }
                    own.update(stand_ins)
            # the forward pass, and what it leaves on the model
            before = {id(tensor) for tensor in tensors(reachable(self.model))}
            with InDouble(held):
                given = self.model(*tree_map(double, inputs[0]), **tree_map(double, inputs[1]))
            left = [tensor for tensor in tensors(reachable(self.model)) if id(tensor) not in before]
        # it wrote to its weights: once more, on copies
        if not self.writes and any(
            held[place]._version != version for place, version in versions.items()
        ):
            self.writes = True
            return self.outputs(inputs, training, seed, weights)
        # logits first
        logits = (
            [given["logits"]]
            if isinstance(given, Mapping) and isinstance(given.get("logits"), Tensor)
            else []
        )
        found = [
            *logits,
            *(each for each in tensors([given]) if not any(each is first for first in logits)),
        ]
        if not found:
            raise NotTried("its outputs hold no tensor")
        # a model may give its weights
        return [double(each).clone() for each in [*found, *left, *kept]]

    def change(self, gauges: Sequence[Gauge]) -> Change:
        """The largest change under a random element of the product of these groups."""
        generator = torch.Generator().manual_seed(0)
        moved = self.weights | {
            place: self.weights[place].clone() for place in self._places(gauges)
        }
        by_name = {name: moved[place_of(p)] for name, p in self.params.items()}
        for gauge in gauges:
            try:
                gauge.act_(by_name, gauge.sample(by_name, generator))
            except (RuntimeError, IndexError):  # it does not fit what it names
                return Change(math.inf, training=False)
        return self._change_to(moved, gauges, generator)

    def change_to(self, params: Mapping[str, Tensor], gauges: Sequence[Gauge]) -> Change:
        """The largest change when some parameters, by name, take other values in float64 that the
        groups are to give them.
        """
        places = {*self._places(gauges)}
        moved = self.weights | {
            place_of(p): params[name].clone()
            for name, p in self.params.items()
            if place_of(p) in places
        }
        return self._change_to(moved, gauges, torch.Generator().manual_seed(0))

    def _change_to(
        self, moved: dict[object, Tensor], gauges: Sequence[Gauge], generator: torch.Generator
    ) -> Change:
        """The same of weights by place, which are changed in place."""
        after = self._run(moved)
        for place in self._places(gauges):  # now the same weights at random, by as much
            weight = self.weights[place]
            size = (moved[place] - weight).abs().square().mean().sqrt()
            moved[place].copy_(noise_like(weight, generator).mul_(size).add_(weight))
        control = self._run(moved)
        # softmax does not see what is added to all logits alike
        shifted = {count for gauge in gauges for count in self._shifted(gauge)}
        changes = [
            Change(difference(case.outputs, ours, others, shifted), case.training)
            for case, ours, others in zip(self.cases, after, control, strict=True)
        ]
        return max(changes, key=lambda change: change.size)

    def _shifted(self, gauge: Gauge) -> set[int]:
        """How many logits a gauge may add the same to: as a table has rows whose rows all move
        alike, which may be tied to the head.
        """
        if gauge.kind == "logit_shift":
            return {len(self.params[name]) for name in gauge.parameters}
        slots = gauge.slots if isinstance(gauge, Translation | Shear) else ()
        tables = [slot.parameter for slot in slots if slot.axis in (1, None) and not slot.places]
        return {len(self.params[name]) for name in tables if self.params[name].ndim == 2}

    def _places(self, gauges: Sequence[Gauge]) -> list[object]:
        """Where in memory the parameters under some gauges are."""
        return list(
            dict.fromkeys(
                place_of(self.params[name]) for gauge in gauges for name in gauge.parameters
            )
        )

    def _run(self, weights: Mapping[object, Tensor]) -> list[list[Tensor]]:
        """What the model computes in each case with other weights."""
        return [self.outputs(case.inputs, case.training, case.seed, weights) for case in self.cases]

    def failing(self, gauges: Sequence[Gauge]) -> dict[Gauge, Change]:
        """Those that are no symmetries, found by halves: where all are, one application of all at
        once shows it.

        Raises:
            NotTried: the model cannot be run, or does not compute the same twice.
        """
        change = self.change(gauges)
        if change.size <= TOLERANCE:
            return {}
        if len(gauges) == 1:
            return {gauges[0]: change}
        half = len(gauges) // 2
        failing = self.failing(gauges[:half]) | self.failing(gauges[half:])
        # together alone: which of them is not known
        return failing or dict.fromkeys(gauges, change)

    def require_repeatable(self) -> None:
        """Raise NotTried if the model does not compute the same twice, with the same random
        numbers.
        """
        for case, again in zip(self.cases, self._run(self.weights), strict=True):
            if len(again) != len(case.outputs) or not all(map(same, again, case.outputs)):
                raise NotTried("it does not compute the same twice")


def generic(param: Tensor, generator: torch.Generator) -> Tensor:
    """A parameter in float64, moved at random: weights at zero, or tiny, would hide what they
    multiply.
    """
    if not param.is_floating_point() and not param.is_complex():
        return param
    fan = (
        1
        if param.ndim < 2
        else max(param.shape[-2:])
        if param.ndim < 4
        else math.prod(param.shape[1:])
    )
    return noise_like(param, generator).mul_(0.3 if param.ndim < 2 else fan**-0.5).add_(param)


def noise_like(param: Tensor, generator: torch.Generator) -> Tensor:
    """Normal random numbers in the shape of a parameter, in double precision."""
    count = param.numel()
    drawn = torch.randn(min(count, DRAWN), generator=generator, dtype=double(param.dtype))
    return drawn.repeat(-(-count // DRAWN))[:count].view(param.shape).to(param.device)


def another(inputs: Any, generator: torch.Generator) -> Any:
    """Inputs of the same shapes: numbers drawn anew, integers and truth values in another order."""

    def redrawn(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.numel() > 1:
            noise = torch.randn(x.shape, generator=generator).to(x)
            # a mask of ones has no spread, and hides what it multiplies
            spread = x.std() if x.std() > 0 else 1
            return noise * spread + x.mean()
        return x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].view(
            x.shape
        )

    return tree_map_only(Tensor, redrawn, inputs)


def lengthened(inputs: Any) -> Iterator[Any]:
    """Inputs whose sequences, along axis 1, are repeated up to each of :data:`LONGER`, twice, and
    by one.
    """
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    lengths = [x.shape[1] for x in leaves if x.ndim in (2, 3)]
    own = next((length for length in lengths if length > 0), 0)

    def longer(x: Tensor, length: int) -> Tensor:
        if x.ndim < 2 or x.shape[1] != own:
            return x
        return x.repeat(1, -(-length // own), *[1] * (x.ndim - 2))[:, :length]

    for length in (*LONGER, 2 * own, own + 1):
        if 0 < own < length:
            yield tree_map_only(Tensor, partial(longer, length=length), inputs)


def tensors(values: Any) -> list[Tensor]:
    """All tensors in some values: in containers of any kind, and in the attributes of plain
    objects.
    """
    return [value for value in reachable(values) if isinstance(value, Tensor)]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, infinities and what is no number included."""
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def difference(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    control: Sequence[Tensor],
    shifted: Collection[int] = (),
) -> float:
    """The largest change of an output relative to that by another move; infinite where shapes are
    not the same.

    Entries that neither move changes (masked ones) do not count, however large they are.

    Args:
        before: what the model computes.
        after: the same after the move that is tried.
        control: the same after another move of the same weights.
        shifted: under a logit shift, the number of logits: the first output, if it has as many, is
            compared up to a constant, as softmax sees it.
    """
    if [x.shape for x in before] != [x.shape for x in after]:
        return math.inf
    largest = 0.0
    for i, (x, y, z) in enumerate(zip(before, after, control, strict=False)):
        if not x.is_floating_point() and not x.is_complex():
            largest = max(largest, math.inf if not torch.equal(x, y) else 0.0)
            continue
        change, other = (
            moved(x, each, centred=i == 0 and x.ndim > 0 and x.shape[-1] in shifted)
            for each in (y, z)
        )
        rounding = ROUNDING * x.abs().nan_to_num(0, 0, 0)
        beyond = change[change > rounding]
        if beyond.numel():
            size = other.max() if other.shape == change.shape else change.max()
            largest = max(largest, float(beyond.max() / size) if size > 0 else math.inf)
    return largest


def moved(x: Tensor, y: Tensor, centred: bool) -> Tensor:
    """By how much each entry changes; what is infinite, or no number, before and after does not,
    else without bound.
    """
    if x.shape != y.shape:
        return torch.zeros_like(x, dtype=torch.float64)
    change = y - x
    change = torch.where((x == y) | (x.isnan() & y.isnan()), torch.zeros_like(change), change)
    if centred:
        finite = change.isfinite()
        mean = torch.where(finite, change, 0).sum(-1, keepdim=True) / finite.sum(
            -1, keepdim=True
        ).clamp(min=1)
        change = torch.where((x == y) & ~x.isfinite(), change, change - mean)
    return change.abs().nan_to_num(math.inf)


def verified(
    gauges: GaugeSet, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> GaugeSet:
    """The same gauges without those that change what the model computes, which are refused.

    Args:
        gauges: found in the model.
        model: one that can be run (:func:`unfit`); left as it is.
        args: example inputs.
        kwargs: those that are given by name.
    """
    if not gauges.found:
        return gauges
    try:
        subject = Subject(model, args, kwargs, constants=constant_tables(model, args, kwargs))
        failing = subject.failing(gauges.found)
        if failing:
            subject.require_repeatable()
    except Exception as error:  # whatever a model of others may raise
        return unchecked(gauges, first_line(error))
    return refuse(gauges, {gauge: str(change) for gauge, change in failing.items()})


def verified_by_twin(gauges: GaugeSet, of_twin: GaugeSet) -> GaugeSet:
    """The same gauges, checked as far as they are found, or refused, in a narrow twin of the
    model.
    """

    def place(entry: Gauge | Refusal) -> tuple[str, str]:
        return entry.kind, entry.where

    def key(gauge: Gauge) -> tuple[object, ...]:
        return *place(gauge), gauge.parameters

    checked = Counter(key(gauge) for gauge in of_twin if gauge not in of_twin.unchecked)
    needed = Counter(map(key, gauges))
    reasons = {place(refusal): refusal.reason for refusal in of_twin.refused}
    others = [gauge for gauge in gauges if checked[key(gauge)] < needed[key(gauge)]]
    left = refuse(
        gauges, {gauge: reasons[place(gauge)] for gauge in others if place(gauge) in reasons}
    )
    missing = {
        gauge: "a narrow twin of the model does not have it" for gauge in left if gauge in others
    }
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
    if any(map(is_split, tensors)):
        return "its parameters are split over processes"
    if any(map(is_fake, tensors)):
        return "its weights have no values"
    count = sum(p.numel() for p in model.parameters())
    return f"it has {count:.1e} parameters" if count > LARGEST else ""
