"""States that are loaded: by name where there are names; and what is refused leaves the optimizer
as it was.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_leaves

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.models import GPT
from ddc.optim.combined import CombinedOptimizer
from ddc.optim.factory import make_adamw
from ddc.optim.muon import Muon
from tests.conftest import MODELS
from tests.helpers import backward, make_model

CONFIG = MODELS["layer-bias-relu-learned"]
Named = list[tuple[str, nn.Parameter]]
Groups = list[dict[str, Any]]


def matrices(groups: Groups) -> Groups:
    return [{**g, "params": [(n, p) for n, p in g["params"] if p.ndim == 2]} for g in groups]


def vectors(groups: Groups) -> Groups:
    rest = [{**g, "params": [(n, p) for n, p in g["params"] if p.ndim != 2]} for g in groups]
    return [g for g in rest if g["params"]]


def combined(model: GPT, groups: Groups) -> CombinedOptimizer:
    return CombinedOptimizer([Muon(matrices(groups)), make_adamw(vectors(groups))])


def combined_with_gauges(model: GPT, groups: Groups) -> CombinedOptimizer:
    """The first part writes its state in place."""
    return CombinedOptimizer([DDCAdam(matrices(groups)), DDCAdam(vectors(groups))])


MAKERS: dict[str, Callable[[GPT, Groups], Optimizer]] = {
    "DDCAdam": lambda model, groups: DDCAdam(groups, find_gauges(model), vertical="adam"),
    "DDCMuon": lambda model, groups: DDCMuon(groups, find_gauges(model), hidden_matrices(model)),
    "Muon": lambda model, groups: Muon(matrices(groups)),
    "AdamW": lambda model, groups: make_adamw(groups),
    "Combined": combined,
    "CombinedDDC": combined_with_gauges,
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
OWN = [maker for name, maker in MAKERS.items() if name in ("DDCAdam", "DDCMuon", "Muon")]
own = pytest.mark.parametrize("make", OWN, ids=["DDCAdam", "DDCMuon", "Muon"])


def one_group(model: nn.Module) -> Groups:
    return [{"params": list(model.named_parameters())}]


def train(model: GPT, optimizer: Optimizer, seeds: Iterable[int]) -> None:
    for seed in seeds:
        backward(model, seed)
        optimizer.step()


def trained(make: Callable[[GPT, Groups], Optimizer], steps: int = 2) -> tuple[GPT, Optimizer]:
    model = make_model(CONFIG)
    optimizer = make(model, one_group(model))
    train(model, optimizer, range(steps))
    return model, optimizer


def assert_equal(a: Any, b: Any) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


def part_of(saved: dict[str, Any]) -> dict[str, Any]:
    """The last part of a state."""
    return saved["parts"][-1] if "parts" in saved else saved


def last_shape(saved: dict[str, Any]) -> None:
    state = list(part_of(saved)["state"].values())[-1]
    state[list(state)[-1]] = torch.zeros(99)


def no_state(saved: dict[str, Any]) -> None:
    part = part_of(saved)
    state = part["state"][max(part["state"])]
    del state[list(state)[-1]]


def no_number(saved: dict[str, Any]) -> None:
    part = part_of(saved)
    state = part["state"][max(part["state"])]
    state[list(state)[-1]] = None


def other_name(saved: dict[str, Any]) -> None:
    part_of(saved)["param_groups"][-1]["param_names"][-1] = "no.such"


def fewer(saved: dict[str, Any]) -> None:
    group = part_of(saved)["param_groups"][-1]
    group["param_names"].pop()
    group["params"].pop()


def unnamed_and_fewer(saved: dict[str, Any]) -> None:
    group = part_of(saved)["param_groups"][-1]
    del group["param_names"]
    group["params"].pop()


def nothing(saved: dict[str, Any]) -> None:
    part_of(saved).clear()


@pytest.mark.parametrize(
    "damage",
    [last_shape, no_state, no_number, other_name, fewer, unnamed_and_fewer, nothing],
    ids=lambda f: f.__name__,
)
@every
def test_a_refused_state_leaves_the_optimizer_as_it_was(make, damage) -> None:
    _, other = trained(make, steps=3)
    saved = copy.deepcopy(other.state_dict())
    for part in saved.get("parts", [saved]):
        for group in part["param_groups"]:
            group["lr"] = 7.0
    damage(saved)
    model, optimizer = trained(make)
    before, groups = (
        copy.deepcopy(optimizer.state_dict()),
        [dict(group) for group in optimizer.param_groups],
    )
    with pytest.raises(ValueError, match=r"[a-z]"):
        optimizer.load_state_dict(saved)
    assert_equal(optimizer.state_dict(), before)
    assert [dict(group) for group in optimizer.param_groups] == groups
    twin, its = trained(make)
    for each in ((model, optimizer), (twin, its)):
        train(*each, range(5, 7))
    assert_equal(list(model.parameters()), list(twin.parameters()))


@own
def test_so_do_hyperparameters_that_cannot_be(make) -> None:
    for key, value in (("lr", -1.0), ("weight_decay", math.nan)):
        _, optimizer = trained(make)
        before = copy.deepcopy(optimizer.state_dict())
        saved = copy.deepcopy(before)
        saved["param_groups"][0][key] = value
        for state in saved["state"].values():
            for each in state.values():
                each += 1
        with pytest.raises(ValueError, match=f"Invalid {key}={value}"):
            optimizer.load_state_dict(saved)
        assert_equal(optimizer.state_dict(), before)


def test_so_do_groups_that_disagree_under_a_gauge() -> None:
    model = make_model(CONFIG)
    named = list(model.named_parameters())
    optimizer = DDCAdam([{"params": named[:5]}, {"params": named[5:]}], find_gauges(model))
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    saved["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"disagree in lr .* leave the gauge out \(norm_scale at"):
        optimizer.load_state_dict(saved)
    assert_equal(optimizer.state_dict(), before)


def shuffled(model: nn.Module, seed: int) -> Groups:
    """Two groups, of matrices and of the rest, with a decay of their own; in an order of their
    own.
    """
    named = list(model.named_parameters())
    order = torch.randperm(len(named), generator=torch.Generator().manual_seed(seed)).tolist()
    named = [named[i] for i in order]
    groups: Groups = [
        {"params": [(n, p) for n, p in named if p.ndim == 2], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.ndim != 2], "weight_decay": 0.0},
    ]
    return groups[::-1] if seed % 2 else groups


@every
def test_states_are_matched_by_name(make) -> None:
    """Parameters, and groups, in any order; under the prefixes that wrappers put before names."""
    model = make_model(CONFIG)
    optimizer = make(model, shuffled(model, 0))
    train(model, optimizer, range(3))
    for seed in (1, 2):
        twin = copy.deepcopy(model)
        groups = shuffled(twin, seed)
        for group in groups:
            group["params"] = [(f"_orig_mod.{name}", p) for name, p in group["params"]]
            group["lr"] = 0.5
        other = make(twin, groups)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        decays = {p: group["weight_decay"] for group in other.param_groups for p in group["params"]}
        assert all(decay == (0.1 if p.ndim == 2 else 0.0) for p, decay in decays.items())
        here = copy.deepcopy(model), None
        kept = make(here[0], shuffled(here[0], 0))
        kept.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each in ((here[0], kept), (twin, other)):
            train(*each, range(5, 7))
        for a, b in zip(here[0].parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_what_is_missing_and_unknown_is_named() -> None:
    model = make_model(CONFIG)
    named = list(model.named_parameters())
    saved = DDCAdam([*named[1:], ("old.weight", named[0][1])]).state_dict()
    optimizer = DDCAdam(named)
    with pytest.raises(
        ValueError,
        match=rf"it lacks '{named[0][0]}'; it has 'old.weight', which this optimizer has not",
    ):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"and \d+ more"):
        optimizer.load_state_dict(DDCAdam(named[:3]).state_dict())


def test_groups_that_are_split_or_joined_must_agree() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    named = list(model.named_parameters())

    def optimizer(*rates: float) -> DDCAdam:
        size = len(named) // len(rates)
        return DDCAdam(
            [{"params": named[i * size : (i + 1) * size], "lr": lr} for i, lr in enumerate(rates)]
        )

    for before, after in itertools.product([(0.3,), (0.3, 0.3)], [(0.1,), (0.1, 0.1)]):
        its = optimizer(*after)
        its.load_state_dict(optimizer(*before).state_dict())
        assert all(group["lr"] == 0.3 for group in its.param_groups)
    for before, after in (((0.3, 0.2), (0.1,)), ((0.3,), (0.1, 0.2))):
        its = optimizer(*after)
        with pytest.raises(ValueError, match=r"'0.weight', .*differ in lr \(0\.\d, 0\.\d\)"):
            its.load_state_dict(optimizer(*before).state_dict())
        assert [group["lr"] for group in its.param_groups] == list(after)


def test_hidden_matrices_in_another_order_are_refused() -> None:
    """The norms of all have one state, by position."""
    model, optimizer = trained(MAKERS["DDCMuon"])
    hidden = hidden_matrices(model)
    other = DDCMuon(model.named_parameters(), find_gauges(model), hidden[::-1])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"hidden matrices are in the order .* pass the same matrices as hidden"
    ):
        other.load_state_dict(optimizer.state_dict())
    assert_equal(other.state_dict(), before)
    order = optimizer.state_dict()["hidden"]
    again = sorted(hidden, key=lambda matrix: order.index(matrix.parameter))
    DDCMuon(model.named_parameters(), find_gauges(model), again).load_state_dict(
        optimizer.state_dict()
    )


def test_without_gauges_the_state_of_adamw_is_gone_on_from() -> None:
    """What a saved group does not have, such as ``radial_rate``, stays."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    twin = copy.deepcopy(model)
    plain, ours = AdamW(model.named_parameters(), lr=0.01), DDCAdam(twin.named_parameters(), lr=0.5)
    for step in range(4):
        if step == 2:
            twin.load_state_dict(model.state_dict())
            ours.load_state_dict(plain.state_dict())
        for each, optimizer in ((model, plain), (twin, ours)):
            optimizer.zero_grad()
            each(torch.ones(1, 3).double() + step).square().sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
