"""Queries and keys that a LayerNorm norms head by head, and kinds of tokens that share a table."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import DDCAdam, find_gauges
from ddc.gauges import Gauge, GaugeSet
from ddc.gauges.verify import generic

WIDTH, HEADS, TOKENS = 8, 2, 5
X = torch.randn(6, TOKENS, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 4


class Attention(nn.Module):
    """One block on a class token and projected inputs.

    Args:
        what: how it differs from one whose gauges are known.
    """

    def __init__(self, what: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what, size = what, WIDTH // HEADS
        self.embed, self.token = nn.Linear(3, WIDTH), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.place = nn.Parameter(torch.randn(1, TOKENS + 1, WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.norm, self.last, self.head = (
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4),
        )

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2])[:, None] * 0.3
        first, second = x.chunk(2, -1)
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                first * angle.sin() + second * angle.cos(),
            ],
            -1,
        )

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), embedded], 1)
        place = self.place.flip(1) if self.what == "other order" else self.place
        h = tokens + place
        if self.what == "place again":
            h = h + self.place.square()
        qkv = self.qkv(self.norm(h)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        raw, _, v = qkv.unbind(0)
        q, k = self.q_norm(raw), self.k_norm(qkv[1])
        if self.what == "rope":
            q, k = self.turned(q), self.turned(k)
        if self.what == "keys are values":
            v = v + k
        y = (q @ k.mT / 2).softmax(-1) @ v
        if self.what == "not softmax":
            y = (q @ k.mT / 2).sigmoid() @ v
        if self.what == "queries again":
            y = y + raw.square().mean(-1, keepdim=True)
        h = h + self.out(y.transpose(1, 2).flatten(2))
        if self.what == "tokens again":
            h = h + tokens.square().mean(-1, keepdim=True) * torch.arange(WIDTH)
        return self.head(self.last(h)[:, 0])


KINDS = ["key_bias", "qk_norm_scale", "stream_mean", "translation"]


def found(
    what: str = "", kinds: list[str] = KINDS, verify: bool = False
) -> tuple[nn.Module, GaugeSet]:
    model = Attention(what)
    return model, find_gauges(model, inputs=(X,), kinds=kinds, verify=verify)


def at_generic(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = generic(p.detach(), generator)
    return model


@torch.no_grad()
def change(model: nn.Module, gauge: Gauge) -> float:
    """Of log-probabilities, under a random element, at generic weights in float64."""
    model = at_generic(model)
    before = model(X.double()).log_softmax(-1)
    GaugeSet((gauge,)).transform_(model, torch.Generator().manual_seed(1))
    return float((model(X.double()).log_softmax(-1) - before).abs().max())


def of(gauges: GaugeSet, kind: str, *names: str) -> list[Gauge]:
    """The gauges of a kind that act on some of these parameters."""
    return [g for g in gauges if g.kind == kind and (not names or {*names} & {*g.parameters})]


def test_all_are_found_and_hold() -> None:
    model, gauges = found(verify=True)
    (scale,) = of(gauges, "qk_norm_scale")
    assert {*scale.parameters} == {
        f"{norm}.{name}" for norm in ("q_norm", "k_norm") for name in ("weight", "bias")
    }
    (shift,) = of(gauges, "key_bias")
    assert shift.parameters == ("k_norm.bias",)
    # rows and biases of the queries and keys of each head, of values none
    assert len(of(gauges, "stream_mean", "qkv.weight")) == 2 * HEADS
    assert len(of(gauges, "stream_mean", "qkv.bias")) == 2 * HEADS
    assert {g.parameters for g in of(gauges, "translation")} == {
        ("token", "place"),
        ("embed.bias", "place"),
    }
    assert max(change(model, gauge) for gauge in gauges) < 1e-12


@pytest.mark.parametrize(
    ("what", "kind", "names"),
    [
        ("rope", "key_bias", ()),
        ("not softmax", "key_bias", ()),
        ("keys are values", "key_bias", ()),
        ("keys are values", "qk_norm_scale", ()),
        ("place again", "translation", ("place",)),
        ("tokens again", "translation", ("place",)),
        ("other order", "translation", ("token",)),
    ],
)
def test_what_is_no_gauge_is_not_found(what: str, kind: str, names: tuple[str, ...]) -> None:
    _, gauges = found(what)
    assert not of(gauges, kind, *names)


def test_queries_that_are_read_elsewhere_keep_their_mean() -> None:
    _, gauges = found("queries again")
    assert len(of(gauges, "stream_mean", "qkv.weight")) == HEADS  # of the keys alone


@pytest.mark.parametrize("what", ["", "rope", "keys are values", "queries again", "tokens again"])
def test_what_is_found_holds(what: str) -> None:
    model, gauges = found(what)
    assert gauges.found
    assert max(change(model, gauge) for gauge in gauges) < 1e-12


def train(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Tensor:
    optimizer = make(model)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(X.double()), LABELS).backward()
        optimizer.step()
    return model(X.double()).log_softmax(-1)


def test_ddcadam_trains_alike_from_anywhere_on_the_orbit() -> None:
    model, gauges = found()
    model = at_generic(model)
    other = copy.deepcopy(model)
    gauges.transform_(other, torch.Generator().manual_seed(2))
    ends = [
        train(each, lambda m: DDCAdam(m.named_parameters(), gauges, lr=1e-2, weight_decay=0.1))
        for each in (model, other)
    ]
    assert (ends[0] - ends[1]).abs().max() < 1e-10
