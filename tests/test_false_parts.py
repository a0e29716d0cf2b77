"""What looks like a gauge of heads, parts or experts to the rules alone, and is none: heads among
the examples, shared by some, written to in place, drawn at random, rounded.

Beside the false ones stands, of each spelling, a true one that is found.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import check, find_gauges
from ddc.gauges import GaugeSet
from tests.test_false_gauges import Of

X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Made = Callable[[], nn.Module]


def rules_alone(model: nn.Module, x: Tensor = X) -> GaugeSet:
    """What the rules find; all of it is a symmetry."""
    model = model.double().eval()
    gauges = find_gauges(model, inputs=(x,), verify=False, kinds="complete", loss="other")

    def outputs(each: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return each(x)

    changes = check(model, gauges, outputs, spread=0.7)
    assert max(changes.values(), default=0.0) < 1e-9, changes
    return gauges


def kinds(model: nn.Module, x: Tensor = X) -> set[str]:
    return {gauge.kind for gauge in rules_alone(model, x)}


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attention(forward: Callable[..., Tensor], queries: int = 8, keys: int = 8) -> nn.Module:
    parts = {"q": nn.Linear(8, queries), "k": nn.Linear(8, keys), "v": nn.Linear(8, 8)}
    return Of(forward, **parts, o=nn.Linear(8, 8))


def spelt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


ATTENTION = [F.scaled_dot_product_attention, spelt]
QK, VALUE = {"qk_map", "key_bias"}, {"value_map", "value_bias"}


@pytest.mark.parametrize("attend", ATTENTION)
def test_heads_among_the_examples(attend: Callable[..., Tensor]) -> None:
    def in_place(m: nn.Module, x: Tensor) -> Tensor:
        k = heads(m.k(x), 2).repeat_interleave(2, 1)
        return m.o(joined(attend(heads(m.q(x), 4), k, heads(m.v(x), 4))))

    def folded(m: nn.Module, x: Tensor) -> Tensor:
        k = heads(m.k(x), 2).repeat_interleave(2, 1)
        each = (t.flatten(0, 1)[:, None] for t in (heads(m.q(x), 4), k, heads(m.v(x), 4)))
        return m.o(joined(attend(*each).view(len(x), 4, -1, 2)))

    assert kinds(attention(in_place, keys=4)) == QK | VALUE
    assert not kinds(attention(folded, keys=4)) & QK
    assert not kinds(attention(folded, keys=4), X[:1]) & QK


@pytest.mark.parametrize("attend", ATTENTION)
def test_heads_that_share_some_entries(attend: Callable[..., Tensor]) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        k = m.k(x)
        common = k[:, None, :, 8:].expand(-1, 4, -1, -1)
        k = torch.cat([heads(k[..., :8], 4), common], -1)
        return m.o(joined(attend(heads(m.q(x), 4), k, heads(m.v(x), 4))))

    assert kinds(attention(forward, queries=16, keys=10)) == VALUE


def test_queries_that_are_fewer_than_keys_or_have_no_heads() -> None:
    def one_query(m: nn.Module, x: Tensor) -> Tensor:
        return m.o(joined(spelt(heads(m.q(x), 1), heads(m.k(x), 4), heads(m.v(x), 4))))

    def of_table(m: nn.Module, x: Tensor) -> Tensor:
        return m.o(joined(spelt(m.q(m.table), heads(m.k(x), 1), heads(m.v(x), 1))))

    assert kinds(attention(one_query, queries=2)) == VALUE
    model = attention(of_table)
    model.table = nn.Parameter(torch.randn(5, 8))
    assert kinds(model) == QK | VALUE


# ---- in place, at random, rounded


def scaled(how: str) -> Callable[..., Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        factor, q, v = torch.ones(2, dtype=x.dtype), m.q(x), m.v(x)
        if how == "a factor is written to":
            factor[0] = 2.0
        order = torch.randperm(8) if how == "in random order" else torch.arange(8)
        weights = (heads(q[..., order], 4) * factor @ heads(m.k(x), 4).mT).softmax(-1)
        if how == "weights are written to":
            weights[..., 0] = 0.0
        if how == "weights are changed as a whole":
            weights.mul_(2.0)
        return m.o(joined(weights @ (heads(v, 4))))

    return forward


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("plain", QK | VALUE),
        ("a factor is written to", VALUE),
        ("in random order", VALUE),
        ("weights are written to", set()),
        ("weights are changed as a whole", set()),
    ],
)
def test_what_is_written_in_place_around_attention(how: str, found: set[str]) -> None:
    assert kinds(attention(scaled(how))) == found


@pytest.mark.parametrize("whole", [False, True])
def test_a_mask_of_the_model_that_masks_a_row(whole: bool) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (heads(each(x), 4) for each in (m.q, m.k, m.v))
        return m.o(joined(F.scaled_dot_product_attention(q, k, v, m.mask)))

    for mask in (torch.ones(6, 6).tril(-1 if whole else 0).bool(), torch.zeros(6, 6)):
        model = attention(forward)
        if mask.dtype != torch.bool and whole:
            mask[2] = -torch.inf
        model.register_buffer("mask", mask)
        assert ("value_bias" in kinds(model)) is not whole


def gate(how: str) -> Callable[..., Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        gate, up = m.fc1(F.rms_norm(x, (8,), m.g)).chunk(2, -1)
        order, weight = torch.arange(4), m.fc2.weight
        if how == "order is written to":
            order[:2] = torch.tensor([1, 0])
        if how == "rounded":
            weight = weight.int().to(x.dtype)
        return F.linear(F.silu(gate) * up[..., order], weight)

    return forward


@pytest.mark.parametrize("how", ["plain", "order is written to", "rounded"])
def test_what_is_written_in_place_or_rounded_around_a_gate(how: str) -> None:
    model = Of(
        gate(how), g=nn.Parameter(torch.ones(8)), fc1=nn.Linear(8, 8), fc2=nn.Linear(4, 8, False)
    )
    assert ("gated_rescale" in kinds(model)) is (how == "plain")


@pytest.mark.parametrize("how", ["plain", "1 is added to a rounded one", "rounded with 1"])
def test_a_scale_that_is_rounded(how: str) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        match how:
            case "1 is added to a rounded one":
                scale = 1 + m.g.int()
            case "rounded with 1":
                scale = (1 + m.g).int()
            case _:
                scale = 1 + m.g
        return m.fc(F.rms_norm(x, (8,)) * scale)

    found = kinds(Of(forward, g=nn.Parameter(torch.linspace(-3, 3, 8)), fc=nn.Linear(8, 8)))
    assert ("norm_scale" in found) is (how == "plain")


@pytest.mark.parametrize("written", [False, True])
def test_experts_chosen_by_indices_that_are_written_to(written: bool) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        weights, chosen = m.router(x).softmax(-1).topk(1)
        chosen = chosen.flatten()
        h = torch.bmm(m.up[chosen], x[..., None])[..., 0]
        if written:
            chosen[::2] = 0
        h = torch.bmm(m.down[chosen], F.relu(h)[..., None])[..., 0]
        return weights.div_(2) * h  # of what is read here and nowhere else, no matter

    up, down = nn.Parameter(torch.randn(3, 5, 8)), nn.Parameter(torch.randn(3, 8, 5))
    model = Of(forward, up=up, down=down, router=nn.Linear(8, 3))
    assert ("relu_rescale" in kinds(model)) is not written
