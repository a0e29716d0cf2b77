"""Softmax attention that is spelt out: products as einsum, bmm and baddbmm, heads in an axis of
their own or folded among the examples.

Every spelling has the gauges that the same attention has as one operation; what only looks like
attention has none that is no symmetry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc.gauges import Gauge
from tests.test_false_gauges import Of
from tests.test_false_parts import QK, VALUE, X, rules_alone

HEADS = 4


def split(x: Tensor, count: int = HEADS) -> Tensor:
    """Heads as (examples, positions, heads, entries)."""
    return x.unflatten(-1, (count, -1))


def inner(x: Tensor) -> Tensor:
    """Heads folded among the examples: those of an example follow each other."""
    return split(x).transpose(1, 2).flatten(0, 1)


def outer(x: Tensor) -> Tensor:
    """The same with the examples of a head after each other."""
    return split(x).permute(2, 0, 1, 3).flatten(0, 1)


def joined(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(*(split(each).transpose(1, 2) for each in (q, k, v)))
    return y.transpose(1, 2).flatten(2)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bihd,bjhd->bhij", split(q), split(k)).div(2**0.5).softmax(-1)
    return torch.einsum("bhij, bjhd -> bihd", weights, split(v)).flatten(2)


def einsum_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bjhd,bihd->bijh", split(k), split(q))
    return torch.einsum("bjhd,bijh->bihd", split(v), scores.softmax(2)).flatten(2)


def einsum_positions_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (split(each.transpose(0, 1)) for each in (q, k, v))
    weights = torch.einsum("ibnd,jbnd->bnij", q, k).softmax(3)
    return torch.einsum("bnij,jbnd->ibnd", weights, v).flatten(2).transpose(0, 1)


def einsum_of_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("nid,njd->nij", inner(q), inner(k)).softmax(-1)
    return joined(torch.einsum("nij,njd->nid", weights, inner(v)))


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(torch.bmm(torch.bmm(inner(q), inner(k).mT).softmax(-1), inner(v)))


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    count, (examples, length, _) = HEADS, q.shape
    bias = torch.linspace(-1, 1, count, dtype=q.dtype).repeat(examples)[:, None, None]
    bias = bias * torch.arange(length)
    scores = torch.baddbmm(bias, inner(q), inner(k).mT, beta=0.5, alpha=0.7)
    # as Bloom has it: heads apart for the softmax alone
    weights = F.dropout(scores.view(examples, count, length, length).softmax(-1), 0.0, False)
    return joined(torch.bmm(weights.view(examples * count, length, length), inner(v)))


def heads_outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = torch.bmm(torch.bmm(outer(q), outer(k).mT).softmax(-1), outer(v))
    return y.unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2)


def one_operation_of_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(F.scaled_dot_product_attention(inner(q), inner(k), inner(v)))


SPELLINGS = [
    einsum,
    einsum_keys_first,
    einsum_positions_first,
    einsum_of_folded,
    bmm,
    baddbmm,
    heads_outside,
    one_operation_of_folded,
]


def model(attend: Callable[..., Any], keys: int = 8, outputs: int = 8) -> nn.Module:
    """Attention of four heads of width 2, with what a function does of queries, keys and values."""
    torch.manual_seed(0)

    def forward(m: nn.Module, x: Tensor) -> Any:
        given = attend(m.q(x), m.k(x), m.v(x))
        given, *others = given if isinstance(given, tuple) else (given,)
        return torch.cat([each.flatten() for each in (m.o(given), *others)])

    parts = {"q": nn.Linear(8, 8), "k": nn.Linear(8, keys), "v": nn.Linear(8, keys)}
    return Of(forward, **parts, o=nn.Linear(outputs, 8))


def kinds(attend: Callable[..., Any], x: Tensor = X, keys: int = 8, outputs: int = 8) -> set[str]:
    return {gauge.kind for gauge in rules_alone(model(attend, keys, outputs), x)}


def dimensions(attend: Callable[..., Any], keys: int = 8) -> dict[str, int]:
    made = model(attend, keys)
    gauges: list[Gauge] = [*rules_alone(made)]
    return {gauge.kind: gauge.dimension(dict(made.named_parameters())) for gauge in gauges}


@pytest.mark.parametrize("attend", SPELLINGS)
def test_each_spelling_has_the_gauges_of_one_operation(attend: Callable[..., Tensor]) -> None:
    assert dimensions(attend) == dimensions(sdpa)
    assert {*dimensions(attend)} == QK | VALUE


@pytest.mark.parametrize("attend", [einsum, bmm, baddbmm, heads_outside])
@pytest.mark.parametrize("repeated", [Tensor.repeat_interleave, Tensor.repeat])
def test_query_heads_that_share_keys(attend: Callable[..., Tensor], repeated: Any) -> None:
    """Each key head is turned once, with all its query heads, whichever these are."""

    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeated is Tensor.repeat:
            k, v = (split(each, 2).repeat(1, 1, 2, 1).flatten(2) for each in (k, v))
        else:
            k, v = (split(each, 2).repeat_interleave(2, 2).flatten(2) for each in (k, v))
        return attend(q, k, v)

    found = dimensions(shared, keys=4)
    assert found["qk_map"] == found["value_map"] == 2 * 2**2
    assert found["key_bias"] == found["value_bias"] == 2 * 2


# ---- heads that are confused with something else


def test_a_batch_of_one_does_not_tell_heads_from_examples() -> None:
    """What is a symmetry of one example alone would be none of two."""

    def crossed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joined(torch.bmm(torch.bmm(inner(q), outer(k).mT).softmax(-1), inner(v)))

    assert not kinds(bmm, X[:1]) & (QK | VALUE)
    assert not kinds(crossed, X[:1]) & QK
    assert kinds(crossed) == VALUE
    assert kinds(einsum, X[:1]) == QK | VALUE


def test_values_folded_otherwise_than_they_are_read() -> None:
    def crossed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joined(torch.bmm(torch.bmm(inner(q), inner(k).mT).softmax(-1), outer(v)))

    assert kinds(crossed) == QK


def test_heads_that_are_folded_without_being_moved() -> None:
    """A head would be made of other outputs at each position."""

    def fold(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.bmm(torch.bmm(fold(q), fold(k).mT).softmax(-1), fold(v))
        return y.reshape(q.shape)

    assert not kinds(attend) & (QK | VALUE)


@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("by", [1, HEADS])
def test_blocks_that_are_rolled(which: str, by: int) -> None:
    """By one, heads meet others, in the neighbouring example too; by as many as there are heads,
    the same of another example. What is found is a symmetry, which ``rules_alone`` tries.
    """

    def attend(*given: Tensor) -> Tensor:
        q, k, v = (
            inner(each).roll(by, 0) if name == which else inner(each)
            for name, each in zip("qkv", given, strict=True)
        )
        return joined(torch.bmm(torch.bmm(q, k.mT).softmax(-1), v))

    assert "qk_map" in kinds(attend)
    assert "value_map" in kinds(attend)


def test_heads_that_overlap() -> None:
    """The entries of one are in part those of the next."""

    def windows(x: Tensor) -> Tensor:
        return torch.stack([x[..., i : i + 2] for i in range(HEADS)], 1).flatten(0, 1)

    def queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joined(torch.bmm(torch.bmm(windows(q), inner(k).mT).softmax(-1), inner(v)))

    def keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joined(torch.bmm(torch.bmm(inner(q), windows(k).mT).softmax(-1), inner(v)))

    def one_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        common = inner(k).unflatten(0, (-1, HEADS))[:, :1].expand(-1, HEADS, -1, -1)
        scores = torch.bmm(windows(q), common.flatten(0, 1).mT)
        return joined(torch.bmm(scores.softmax(-1), inner(v)))

    def values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joined(torch.bmm(torch.bmm(inner(q), inner(k).mT).softmax(-1), windows(v)))

    assert kinds(queries) == kinds(keys) == kinds(one_key) == VALUE
    assert kinds(values) == QK


@pytest.mark.parametrize(
    "equation",
    [
        "bihd,bjhd->bij",  # over heads too
        "bihd,bjgd->bhgij",  # each head with each
        "bihd,bjhe->bhij",  # the sum of entries of each by itself
        "bihd,bihd->bhi",  # no product
        "bihd,bjhd->bhij, of one entry",
    ],
)
def test_equations_that_are_no_attention_of_heads(equation: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = split(k)[..., :1] if "," in equation[9:] else split(k)
        scores = torch.einsum(equation.removesuffix(", of one entry"), split(q), keys)
        match scores.ndim:
            case 3 if equation.endswith("bij"):
                scores = scores[:, None].expand(-1, HEADS, -1, -1)
            case 3:
                scores = scores[..., None].expand(-1, -1, -1, v.shape[1])
            case 5:
                scores = scores.sum(2)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), split(v)).flatten(2)

    assert not kinds(attend) & QK


def test_heads_that_are_averaged_are_refused_and_averages_of_positions_are_not() -> None:
    """Columns of the output map that all heads share could turn with all of them alone."""

    def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return split(einsum(q, k, v)).mean(2)

    def over_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return einsum(q, k, v).mean(1)

    assert kinds(over_heads, outputs=2) == QK
    assert kinds(over_positions) == QK | VALUE


# ---- what else reads, or is read


@pytest.mark.parametrize("spelt", ["einsum", "bmm"])
@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("plain", QK | VALUE),
        ("weights are returned", QK | VALUE),
        ("scores are returned", VALUE | {"qk_map"}),
        ("queries are returned", VALUE),
        ("values are returned", QK),
        ("added to themselves", VALUE | {"qk_map"}),
        ("softmax over queries", QK | {"value_map"}),
        ("a sink", {"qk_map", "value_map"}),
        ("a weight is left out", QK | {"value_map"}),
        ("masked", {"qk_map"} | VALUE),
        ("bias of keys", VALUE),
        ("weighted by values", set()),
        ("a query is written to", VALUE),
        ("a value is written to", QK),
        ("scores are written to", {"qk_map"} | VALUE),
        ("weights are written to", set()),
        ("weights are written to, then kept", QK | {"value_map"}),
        ("values are gated", QK),
    ],
)
def test_what_is_done_around_the_products(spelt: str, how: str, found: set[str]) -> None:
    def product(equation: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(equation, a, b) if spelt == "einsum" else torch.bmm(a, b)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = inner(q), inner(k), inner(v)
        returned = {"queries are returned": [q], "values are returned": [v]}.get(how, [])
        if how == "a query is written to":
            q = q.clone()
            q[:, :, 0] *= 2.0
            q = q + 0.0
        if how == "a value is written to":
            v = v.clone()
            v[:, 0] = 0.0
        scores = product("nid,ndj->nij", q, k.mT)
        if how == "scores are returned":
            returned = [scores]
        if how == "added to themselves":
            scores = scores + scores.mT
        if how == "bias of keys":
            scores = scores + k.sum(-1)[:, None]
        if how == "masked":
            scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -1e4)
        if how == "scores are written to":
            scores[..., 0] = 0.0
        if how == "a sink":
            sinks = torch.zeros(len(q), 6, 1, dtype=q.dtype)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-2 if how == "softmax over queries" else -1)
        if how == "weights are returned":
            returned = [weights]
        if how == "a weight is left out":
            weights, v = weights[..., 1:], v[:, 1:]
        if how == "weighted by values":
            weights = weights * v.sum(-1)[:, None]
        if how.startswith("weights are written to"):
            weights[..., 0] = 0.0
        if how == "weights are written to, then kept":
            weights = F.dropout(weights, 0.0)
        y = joined(product("nij,njd->nid", weights, v))
        return (y * y.sigmoid() if how == "values are gated" else y, *returned)

    assert kinds(attend) == found
