"""``find_gauges`` on random networks: no gauge is false, no error is torch's, and the model is left
as it was.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from ddc import DDCAdam, find_gauges
from ddc.gauges import Gauge, GaugeSet
from tests.random_networks import (
    MAY_BE_REFUSED,
    Built,
    Network,
    build,
    clean_networks,
    expected,
    networks,
    simplest,
)

FRESH_INPUTS = 3


@dataclass
class Examined:
    """What ``find_gauges`` made of one network.

    Attributes:
        found, refused: gauges and refusals by kind.
        false: gauges that change an output, with the largest relative change.
        error: the message of its ValueError, if it raised one.
        crash: any other exception, or an error that is not one line of ours.
        left: what differs on the model afterwards.
        unusable: what DDCAdam says of the gauges, if it refuses them without naming one.
        unchecked: gauges that it marks as not tried, though the weights have values.
        broken: the error of the network itself, which does not run: the fault of the generator.
        may_be_refused: whether an error is right: the network does what no trace can hold, or has
            no parameters.
    """

    found: Counter[str]
    refused: Counter[str]
    false: dict[str, float]
    error: str = ""
    crash: str = ""
    left: tuple[str, ...] = ()
    unusable: str = ""
    unchecked: str = ""
    broken: str = ""
    may_be_refused: bool = False

    @property
    def faults(self) -> list[str]:
        """Everything that must not be, in words."""
        found = [
            f"false: {gauge}, outputs change by {change:.1e}"
            for gauge, change in self.false.items()
        ]
        found += [f"left on the model: {what}" for what in self.left]
        found += [f"refused as a whole: {self.error}"] * (
            bool(self.error) and not self.may_be_refused
        )
        others = {
            "crash": self.crash,
            "not usable": self.unusable,
            "not checked": self.unchecked,
            "does not run": self.broken,
        }
        return found + [f"{name}: {text}" for name, text in others.items() if text]


def examine(network: Network) -> Examined:
    """Find the gauges of a network, and compare all that it computes before and after random
    elements of them.
    """
    try:
        built = build(network)
        observed(network, built, (), shifted=False)
    except Exception as error:
        return Examined(Counter(), Counter(), {}, broken=f"{type(error).__name__}: {error}")
    examined = Examined(
        Counter(),
        Counter(),
        {},
        may_be_refused=any(word in MAY_BE_REFUSED for word in network.words),
    )
    before = Snapshot(built.model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "find_gauges: ")  # of what it found and then left out
            gauges = found_in(built)
    except Exception as error:  # whatever it is, it is what we look for
        text = str(error)
        if type(error) is ValueError and is_ours(text):
            examined.error = text
        else:
            examined.crash = f"{type(error).__name__}: {text}"
        examined.left = tuple(before.differences(built.model))
        return examined
    examined.left = tuple(before.differences(built.model))
    examined.found.update(gauge.kind for gauge in gauges)
    examined.refused.update(refusal.kind for refusal in gauges.refused)
    examined.false = false_gauges(network, built, gauges)
    without_values = any(parameter.is_meta for parameter in built.model.parameters())
    if said := {
        str(gauge) for gauge in getattr(gauges, "unchecked", {})
    }:  # who is told so is not misled
        examined.false = {
            name: change for name, change in examined.false.items() if name not in said
        }
        examined.unchecked = "" if without_values else "; ".join(sorted(said))
    if gauges and not without_values:
        try:
            DDCAdam(built.model.named_parameters(), gauges)
        except ValueError as error:
            names = [name for gauge in gauges for name in (*gauge.parameters, str(gauge))]
            if not any(name in str(error) for name in names):
                examined.unusable = str(error)
    return examined


def found_in(built: Built) -> GaugeSet:
    """``find_gauges``, told of the loss what a user would tell."""
    given = {"per_layer": built.per_layer, "inputs": built.inputs}
    if "loss" not in inspect.signature(find_gauges).parameters:
        gauges = find_gauges(built.model, **given)
        return (
            gauges.only({gauge.kind for gauge in gauges} - {"logit_shift"})
            if built.loss == "other"
            else gauges
        )
    try:
        return find_gauges(built.model, **given, loss=built.loss)
    except ValueError as error:
        if "loss=" not in str(error) or not is_ours(str(error)):
            raise
    return find_gauges(built.model, **given, loss="cross_entropy" if built.softmax else "other")


def is_ours(message: str) -> bool:
    """Whether an error is one line and written by us."""
    foreign = (
        "torch._",
        "torch.fx",
        "Traceback",
        "pytree",
        "FakeTensor",
        "GuardOn",
        "aten.",
        "0x",
        "github.com",
    )
    return (
        0 < len(message) < 400
        and "\n" not in message
        and not any(word in message for word in foreign)
    )


# ---------------------------------------------------------------------------------------------- the
# check


@contextmanager
def doubles() -> Iterator[None]:
    """Makes float64 what torch makes where nothing else is said."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def generic(network: Network) -> nn.Module:
    """A network in float64 with weights of which none is special; each call makes the same."""
    if network.wrapper in ("meta device", "bfloat16"):
        network = replace(network, wrapper="none")
    with doubles():
        model = build(network).model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else 0.5 * parameter.shape[-1] ** -0.5
            parameter.add_(
                scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            )
    return model


@torch.no_grad()
def observed(
    network: Network,
    built: Built,
    gauges: Iterable[Gauge],
    shifted: bool,
    inputs: range = range(FRESH_INPUTS),
) -> dict[str, Tensor]:
    """All that a network computes after random elements of gauges, by name: outputs, and losses
    kept as attributes.

    In training mode and evaluation, on several inputs; if ``shifted``, the first output up to a
    shift of all logits.
    """
    model = generic(network)
    GaugeSet(tuple(gauges)).transform_(model, torch.Generator().manual_seed(2))
    values: dict[str, Tensor] = {}
    for training in (True, False):
        model.train(training)
        for seed in inputs:
            given_inputs = built.fresh(seed)
            torch.manual_seed(seed)
            with doubles():
                outputs = (
                    model(**given_inputs)
                    if isinstance(given_inputs, dict)
                    else model(*given_inputs)
                )
            mode = f"{'training' if training else 'evaluation'}, inputs {seed}"
            for i, value in enumerate(
                leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)
            ):
                logits = shifted and i == 0 and value.ndim and value.is_floating_point()
                values[f"output {i}, {mode}"] = (
                    value.log_softmax(1 if network.head == "classes first" else -1)
                    if logits
                    else value
                )
            for name, module in model.named_modules():
                for key, value in vars(module).items():
                    if isinstance(value, Tensor) and value.ndim == 0:
                        values[f"{name}.{key}, {mode}"] = value
    return values


def false_gauges(network: Network, built: Built, gauges: GaugeSet) -> dict[str, float]:
    """The gauges that change what a network computes, and by how much; "all together" if none does
    alone.
    """
    unshifted = [gauge for gauge in gauges if gauge.kind != "logit_shift"]
    shifts = [gauge for gauge in gauges if gauge.kind == "logit_shift"]

    @functools.cache  # a model may remember what it has seen, so it sees the same before and after
    def before(shifted: bool, inputs: range) -> dict[str, Tensor]:
        return observed(network, built, (), shifted, inputs)

    def change(group: list[Gauge], inputs: range = range(FRESH_INPUTS)) -> float:
        shifted = any(gauge in shifts for gauge in group)
        after = observed(network, built, group, shifted, inputs)
        changes = [
            largest_change(before(shifted, inputs)[key], value) for key, value in after.items()
        ]
        return max(changes, key=lambda each: math.inf if math.isnan(each) else each)

    def is_true(change: float) -> bool:
        return change <= built.tolerance

    false = {str(gauge): math.inf for gauge in shifts} if not built.softmax else {}
    together = [group for group in (unshifted, [*unshifted, *shifts]) if group]
    all_true = all(is_true(change(group)) for group in together)
    # alone: to find which is false, or for the case that two undo each other
    inputs = range(FRESH_INPUTS - 1, FRESH_INPUTS) if all_true else range(FRESH_INPUTS)
    alone = {str(gauge): change([gauge], inputs) for gauge in gauges}
    false |= {name: each for name, each in alone.items() if not is_true(each) and name not in false}
    return false if false or all_true else {"all together": change(list(gauges))}


def largest_change(before: Tensor, after: Tensor) -> float:
    """Of any entry, relative to the largest entry."""
    if before.shape != after.shape or not torch.equal(before.isfinite(), after.isfinite()):
        return float("nan")
    if not before.is_floating_point():
        return float((before != after).any())
    before, after = before.nan_to_num(), after.nan_to_num()  # the mean of no tokens, say
    return float((before - after).abs().max() / (1 + before.abs().max())) if before.numel() else 0.0


class Snapshot:
    """What must be the same of a model before and after."""

    def __init__(self, model: nn.Module) -> None:
        self.random = torch.get_rng_state()
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors_of(model)}
        self.facts = dict(facts_of(model))

    def differences(self, model: nn.Module) -> Iterator[str]:
        facts, tensors = dict(facts_of(model)), dict(tensors_of(model))
        yield from (
            f"{name} differs"
            for name in facts | self.facts
            if facts.get(name) != self.facts.get(name)
        )
        for name, before in self.tensors.items():
            after = tensors.get(name)
            if after is not None and not before.is_meta and not torch.equal(before, after.detach()):
                yield f"the value of {name} differs"
        if not torch.equal(self.random, torch.get_rng_state()):
            yield "the state of torch's random numbers differs"


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def facts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Training flags, and which objects the attributes of all modules are."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, dict):
                yield f"{path}.{name}", {key: id(each) for key, each in value.items()}
            elif isinstance(value, Tensor):
                yield f"{path}.{name}", (id(value), isinstance(value, FakeTensor))
            else:
                yield f"{path}.{name}", repr(value)
    for name, parameter in model.named_parameters():
        yield f"requires_grad or grad of {name}", (parameter.requires_grad, parameter.grad is None)


# ----------------------------------------------------------------------------------------------
# tests

SETTINGS = settings(
    derandomize=True, deadline=None, database=None, phases=[Phase.generate], print_blob=False
)


@pytest.mark.slow
@settings(SETTINGS, max_examples=100)
@given(networks)
def test_no_gauge_is_false_and_no_error_is_foreign(network: Network) -> None:
    if examine(network).faults:
        simple = simplest(network, lambda each: bool(examine(each).faults))
        pytest.fail(f"{simple}: {'; '.join(examine(simple).faults)}")


@pytest.mark.slow
@settings(SETTINGS, max_examples=20)
@given(clean_networks)
def test_all_gauges_of_clean_networks_are_found(network: Network) -> None:
    examined = examine(network)
    assert not examined.faults
    assert not examined.error
    assert examined.found == expected(network)
