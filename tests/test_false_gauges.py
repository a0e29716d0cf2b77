"""What looks like a gauge and is none is not granted: patterns of real code, each in several
spellings.

Beside every false gauge stands a true one, which must still be found: to refuse all would be no
proof.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import DDCAdam, find_gauges
from ddc.compatibility import provide_torchvision_operators
from ddc.gauges import GaugeSet, named_parameters

provide_torchvision_operators()
WIDTH, HEADS, CLASSES = 8, 2, 5
X = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(0))


def kinds(gauges: GaugeSet) -> set[str]:
    return {gauge.kind for gauge in gauges}


class Of(nn.Module):
    """A module of parts and a forward pass."""

    def __init__(
        self, forward: Callable[..., object], **parts: nn.Module | nn.Parameter | Tensor
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self._forward = forward

    def forward(self, *inputs: Tensor) -> object:
        return self._forward(self, *inputs)


def vector(start: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((WIDTH,), start))


def linear(out: int = WIDTH, bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, out, bias=bias)


# --------------------------------------------------------------------------------------------------
# norms

NORMS: dict[str, Callable[[], nn.Module]] = {
    "weight + 1": lambda: Of(
        lambda m, x: m.head(F.layer_norm(x, (WIDTH,), m.g + 1, m.b)),
        g=vector(0.0),
        b=vector(0.0),
        head=linear(CLASSES),
    ),
    "exp of the weight": lambda: Of(
        lambda m, x: m.head(F.layer_norm(x, (WIDTH,), m.g.exp(), m.b)),
        g=vector(0.0),
        b=vector(),
        head=linear(CLASSES),
    ),
    "scale is a buffer": lambda: Of(
        lambda m, x: m.head(F.layer_norm(x, (WIDTH,), m.g, m.b)),
        g=torch.ones(WIDTH),
        b=vector(),
        head=linear(CLASSES),
    ),
    "shift is a buffer": lambda: Of(
        lambda m, x: m.head(F.layer_norm(x, (WIDTH,), m.g, m.b)),
        g=vector(),
        b=torch.ones(WIDTH),
        head=linear(CLASSES),
    ),
    "shift is computed": lambda: Of(
        lambda m, x: m.head(F.layer_norm(x, (WIDTH,), m.g, 2 * m.b)),
        g=vector(),
        b=vector(),
        head=linear(CLASSES),
    ),
    "no scale": lambda: Of(
        lambda m, x: m.head(F.layer_norm(x, (WIDTH,), None, m.b)), b=vector(), head=linear(CLASSES)
    ),
    "by hand, shift is a buffer": lambda: Of(
        lambda m, x: m.head(F.rms_norm(x, (WIDTH,)) * m.g + m.b),
        g=vector(),
        b=torch.ones(WIDTH),
        head=linear(CLASSES),
    ),
    "by hand, 1 + twice the scale": lambda: Of(
        lambda m, x: m.head(F.rms_norm(x, (WIDTH,)) * (1 + 2 * m.g)),
        g=vector(0.0),
        head=linear(CLASSES),
    ),
    "scale is returned": lambda: Of(
        lambda m, x: (m.head(m.norm(x)), m.norm.weight.sum()),
        norm=nn.LayerNorm(WIDTH),
        head=linear(CLASSES),
    ),
    "read after rounding": lambda: Of(
        lambda m, x: m.head(m.norm(x).to(torch.int32).to(x.dtype)),
        norm=nn.LayerNorm(WIDTH),
        head=linear(CLASSES),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_whose_scale_is_no_parameter_as_it_stands(name: str) -> None:
    for verify in (False, True):
        gauges = find_gauges(NORMS[name](), inputs=(X,), verify=verify, loss="cross_entropy")
        assert kinds(gauges) == {"logit_shift"}, str(gauges)


def test_a_norm_with_plain_parameters_is_found_in_every_spelling() -> None:
    spellings = [
        lambda m, x: m.head(F.layer_norm(x, (WIDTH,), m.g, m.b)),
        lambda m, x: m.head(F.layer_norm(x, (WIDTH,)) * m.g + m.b),
        lambda m, x: m.head(m.g * F.layer_norm(x, (WIDTH,)) + m.b),
        lambda m, x: m.head((1 + m.g) * F.layer_norm(x, (WIDTH,)) + m.b),
        lambda m, x: m.head(
            (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * m.g + m.b
        ),
    ]
    for spelling in spellings:
        gauges = find_gauges(
            Of(spelling, g=vector(), b=vector(), head=linear(CLASSES)), inputs=(X,)
        )
        assert kinds(gauges) == {"norm_scale", "logit_shift"}, str(gauges)


# --------------------------------------------------------------------------------------------------
# attention


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return (
        F.scaled_dot_product_attention(heads(q), heads(k), heads(v), mask)
        .transpose(1, 2)
        .flatten(2)
    )


def attention(forward: Callable[..., object], **parts: nn.Module | nn.Parameter) -> nn.Module:
    parts = {
        "q": linear(),
        "k": linear(),
        "v": linear(),
        "o": linear(),
        "head": linear(CLASSES),
    } | parts
    return Of(forward, **parts)


def distances(m: nn.Module, q: Tensor) -> Tensor:
    """Relative positions that follow from queries."""
    return torch.einsum("bhtd,sd->bhts", heads(q), m.table)


def two_on_one_key(m: nn.Module, x: Tensor) -> Tensor:
    k = m.k(x)
    return m.head(m.o(attend(m.q(x), k, m.v(x))) + m.o2(attend(m.q2(x), k, m.v2(x))))


def values_mixed_later(m: nn.Module, x: Tensor) -> Tensor:
    v = m.v(x)
    x = x + m.o(attend(m.q(x), m.k(x), v))
    return m.head(x + m.o2(attend(m.q2(x), m.k2(x), 0.5 * m.v2(x) + 0.5 * v)))


def values_added(m: nn.Module, x: Tensor) -> Tensor:
    v = m.v(x)
    return m.head(m.o(attend(m.q(x), m.k(x), v)) + v)


def packed_values_added(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.head(m.o(attend(q, k, v)) + v)


def keys_returned(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    k = m.k(x)
    return m.head(m.o(attend(m.q(x), k, m.v(x)))), k


def packed_cache(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.head(m.o(attend(q, k, v))), heads(k), heads(v)


def mask_of_keys(m: nn.Module, x: Tensor) -> Tensor:
    k = m.k(x)
    return m.head(m.o(attend(m.q(x), k, m.v(x), heads(k).sum(-1)[:, :, None, :])))


def mask_of_queries(m: nn.Module, x: Tensor) -> Tensor:
    q = m.q(x)
    return m.head(m.o(attend(q, m.k(x), m.v(x), distances(m, q))))


def queries_are_keys(m: nn.Module, x: Tensor) -> Tensor:
    q = m.q(x)
    return m.head(m.o(attend(q, q, m.v(x))))


def squared(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(m.o(attend(m.q(x), m.k(x), m.v(x)).square()))


def signed_root(m: nn.Module, x: Tensor) -> Tensor:
    y = attend(m.q(x), m.k(x), m.v(x))
    return m.head(m.o((y * y) ** 0.5))


def scaled_values(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(m.o(attend(m.q(x), m.k(x), m.v(x) * m.scale)))


def shifted_queries(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(m.o(attend(m.q(x) + m.scale - 1, m.k(x), m.v(x))))


def inverse_values(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(m.o(attend(m.q(x), m.k(x), 1 / m.v(x))))


EXTRA = {"q2": linear(), "k2": linear(), "v2": linear(), "o2": linear()}
ONE_LAYER = {"v2": linear(), "q2": linear(), "o2": linear()}
ATTENTION: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "two attentions on one key map": (
        lambda: attention(two_on_one_key, **ONE_LAYER),
        {"value_rotation"},
    ),
    "values mixed into a later layer": (
        lambda: attention(values_mixed_later, **EXTRA),
        {"qk_rotation"},
    ),
    "values added": (lambda: attention(values_added), {"qk_rotation"}),
    "packed, values added": (
        lambda: attention(packed_values_added, qkv=linear(3 * WIDTH)),
        {"qk_rotation"},
    ),
    "keys returned": (lambda: attention(keys_returned), {"value_rotation"}),
    "packed, keys and values returned": (
        lambda: attention(packed_cache, qkv=linear(3 * WIDTH)),
        set(),
    ),
    "mask made of keys": (lambda: attention(mask_of_keys), {"value_rotation"}),
    "mask made of queries": (
        lambda: attention(mask_of_queries, table=nn.Parameter(torch.randn(6, WIDTH // HEADS))),
        {"value_rotation"},
    ),
    "queries are keys": (lambda: attention(queries_are_keys), {"value_rotation"}),
    "squared": (lambda: attention(squared), {"qk_rotation"}),
    "root of the square": (lambda: attention(signed_root), {"qk_rotation"}),
    "values scaled by a parameter of ones": (
        lambda: attention(scaled_values, scale=vector()),
        {"qk_rotation"},
    ),
    "queries shifted by a parameter of zeros": (
        lambda: attention(shifted_queries, scale=vector()),
        {"value_rotation"},
    ),
    "inverse values": (lambda: attention(inverse_values), {"qk_rotation"}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_that_go_elsewhere_as_well(name: str) -> None:
    make, expected = ATTENTION[name]
    for verify in (False, True):
        gauges = find_gauges(make(), inputs=(X,), verify=verify, loss="other")
        assert kinds(gauges) == expected, str(gauges)


def test_plain_heads_are_found_packed_and_not() -> None:
    def plain(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.o(attend(m.q(x), m.k(x), m.v(x))))

    def packed(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.o(attend(*m.qkv(x).chunk(3, -1))))

    def gated(m: nn.Module, x: Tensor) -> Tensor:  # by one number for each head and position
        q, k, v, gate = m.qkv(x).split([WIDTH, WIDTH, WIDTH, HEADS], -1)
        y = (
            F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
            * gate.sigmoid().mT[..., None]
        )
        return m.head(m.o(y.transpose(1, 2).reshape(*x.shape)))

    def gated_apart(m: nn.Module, x: Tensor) -> Tensor:  # entry by entry
        q, k, v, gate = m.qkv(x).chunk(4, -1)
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v)) * heads(gate).sigmoid()
        return m.head(m.o(y.transpose(1, 2).reshape(*x.shape)))

    for forward, rows in (
        (plain, 1),
        (packed, 3 * WIDTH),
        (gated, 3 * WIDTH + HEADS),
        (gated_apart, 4 * WIDTH),
    ):
        gauges = find_gauges(attention(forward, qkv=linear(rows)), inputs=(X,), loss="other")
        found = kinds(gauges)
        assert "qk_rotation" in found, str(gauges)
        assert ("value_rotation" in found) == (forward is not gated_apart), str(gauges)


@pytest.mark.parametrize("packed", [True, False])
def test_a_key_and_a_value_of_their_own_at_the_end(packed: bool) -> None:
    """``nn.MultiheadAttention(add_bias_kv=True)``: one position more, which no head turns; it has
    none as it stands.
    """
    sizes = {} if packed else {"kdim": WIDTH + 1, "vdim": WIDTH + 1}
    module = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, batch_first=True, **sizes)
    model = Of(
        lambda m, x, y: m.head(m.mha(x, y, y, need_weights=False)[0]),
        mha=module,
        head=linear(CLASSES),
    )
    y = X if packed else torch.randn(3, 9, WIDTH + 1)
    for verify in (False, True):
        assert kinds(find_gauges(model, inputs=(X, y), verify=verify)) == {"logit_shift"}
    plain = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    model = Of(
        lambda m, x: m.head(m.mha(x, x, x, need_weights=False)[0]), mha=plain, head=linear(CLASSES)
    )
    assert kinds(find_gauges(model, inputs=(X,))) == {
        "logit_shift",
        "value_rotation",
        "qk_rotation",
    }


def test_relative_positions_of_sam() -> None:
    import timm

    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 7,
    }
    model = timm.create_model(
        "samvit_base_patch16", global_attn_indexes=(1,), window_size=2, **options
    )
    for verify in (False, True):
        gauges = find_gauges(model, inputs=(torch.randn(2, 3, 32, 32),), verify=verify)
        assert "qk_rotation" not in kinds(gauges), str(gauges)
        assert {"norm_scale", "logit_shift"} <= kinds(gauges), str(gauges)


def late_rotary(m: nn.Module, x: Tensor) -> Tensor:
    """Queries and keys are turned at the positions from 8 on."""
    angle = (torch.arange(x.shape[1]) - 7).clamp(min=0)[:, None] * torch.tensor([1.0, 0.1])

    def turned(y: Tensor) -> Tensor:
        a, b = heads(y).chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    y = F.scaled_dot_product_attention(turned(m.q(x)), turned(m.k(x)), heads(m.v(x)))
    return m.head(m.o(y.transpose(1, 2).flatten(2)))


def branched_rotary(m: nn.Module, x: Tensor) -> Tensor:
    """Longer inputs take another path."""
    return late_rotary(m, x) if x.shape[1] > 8 else m.head(m.o(attend(m.q(x), m.k(x), m.v(x))))


@pytest.mark.parametrize("forward", [late_rotary, branched_rotary])
def test_a_rotary_embedding_that_sets_in_beyond_the_example(forward: Callable[..., Tensor]) -> None:
    """On the example heads turn as wholes; longer inputs, which are tried, show that they do
    not.
    """
    with pytest.warns(
        UserWarning, match="qk_rotation .* is no symmetry of the model and is left out"
    ):
        gauges = find_gauges(attention(forward), inputs=(X,))
    assert kinds(gauges) == {"logit_shift", "value_rotation"}
    assert any(r.kind == "qk_rotation" and "changes outputs" in r.reason for r in gauges.refused)
    long = torch.randn(2, 12, WIDTH)
    assert kinds(find_gauges(attention(forward), inputs=(long,))) == {
        "logit_shift",
        "value_rotation",
        "qk_rotation",
    }


# --------------------------------------------------------------------------------------------------
# the loss


def test_what_the_loss_is_is_asked_where_the_model_leaves_it_open() -> None:
    two_towers = Of(lambda m, x, y: (m.a(x), m.b(y)), a=linear(), b=linear())
    as_dict = Of(lambda m, x: {"embedding": m.a(x)}, a=linear())
    beside = Of(lambda m, x: {"logits": m.a(x), "quality": m.b(x)}, a=linear(CLASSES), b=linear(1))
    for model, inputs in ((two_towers, (X, X)), (as_dict, (X,)), (beside, (X,))):
        refused = find_gauges(model, inputs=inputs)
        assert not refused.found
        assert any(
            "find_gauges(model, loss='cross_entropy')" in refusal.reason
            for refusal in refused.refused
        )
        assert kinds(find_gauges(model, inputs=inputs, loss="cross_entropy")) == {"logit_shift"}
        assert not find_gauges(model, inputs=inputs, loss="other").found
    hidden = Of(
        lambda m, x: {"hidden": (h := m.a(x)), "logits": m.b(h)}, a=linear(), b=linear(CLASSES)
    )
    # what the logits are made of is no other output
    assert kinds(find_gauges(hidden, inputs=(X,))) == {"logit_shift"}


def test_one_output_is_no_softmax() -> None:
    for loss in (None, "cross_entropy"):
        assert not find_gauges(nn.Sequential(nn.Linear(WIDTH, 1)), loss=loss).found


def test_a_penalty_on_logits_is_seen() -> None:
    """The second output is no function of probabilities alone."""
    model = Of(lambda m, x: (y := m.a(x), y.logsumexp(-1).square().mean()), a=linear(CLASSES))
    with pytest.warns(UserWarning, match="logit_shift"):
        assert not find_gauges(model, inputs=(X,)).found
    model = Of(lambda m, x: (y := m.a(x), y.softmax(-1)), a=linear(CLASSES))
    assert kinds(find_gauges(model, inputs=(X,))) == {"logit_shift"}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"num_labels": 1}, False),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, False),
        ({"num_labels": 3, "problem_type": "regression"}, False),
        ({"num_labels": 3}, True),
    ],
)
def test_what_a_model_of_transformers_says_of_its_loss(
    options: dict[str, object], found: bool
) -> None:
    import transformers

    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    for key, value in options.items():
        setattr(config, key, value)
    gauges = find_gauges(transformers.ViTForImageClassification(config))
    assert ("logit_shift" in kinds(gauges)) == found, str(gauges)
    assert "norm_scale" in kinds(gauges)


def test_an_unknown_loss() -> None:
    with pytest.raises(
        ValueError, match="Invalid loss='bce': expected None or one of cross_entropy, other"
    ):
        find_gauges(nn.Sequential(nn.Linear(3, 2)), loss="bce")


# --------------------------------------------------------------------------------------------------
# wrappers


def inner_and_more() -> nn.Module:
    """A submodule that is called module, and what is not inside it: the norm is read outside as
    well.
    """
    inner = Of(lambda m, x: m.up(m.norm(x)).relu(), norm=nn.LayerNorm(WIDTH), up=linear())
    return Of(
        lambda m, x: m.head(m.module(x)) + m.skip(m.module.norm(x)),
        module=inner,
        head=linear(5),
        skip=linear(5),
    )


def test_a_submodule_called_module_is_no_wrapper() -> None:
    model = inner_and_more()
    gauges = find_gauges(model, inputs=(X,))
    names = {name for gauge in gauges for name in gauge.parameters}
    assert names <= {name for name, _ in model.named_parameters()}
    assert any(name.startswith("module.") for name in names)
    optimizer = DDCAdam(model.named_parameters(), gauges, weight_decay=0.0)
    model(X).sum().backward()
    optimizer.step()


def test_names_in_a_wrapper_around_a_submodule_called_module() -> None:
    """DDP puts ``module.`` before every name; the gauges know the names without it."""
    model = inner_and_more()
    wrapped = nn.DataParallel(model)
    gauges = find_gauges(wrapped, inputs=(X,))
    assert str(gauges) == str(find_gauges(model, inputs=(X,)))
    assert [*named_parameters(wrapped)] == [name for name, _ in model.named_parameters()]
    DDCAdam(wrapped.named_parameters(), gauges)


# --------------------------------------------------------------------------------------------------
# training mode


class Auxiliary(nn.Module):
    """A classifier that is used in training alone, whose loss is returned or kept."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.norm, self.head, self.extra = nn.LayerNorm(WIDTH), linear(CLASSES), linear(CLASSES)
        self.kept = kept
        self.loss = None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.norm(x)
        if not self.training:
            return self.head(h)
        extra = self.extra(h)
        if not self.kept:
            return self.head(h), extra
        self.loss = extra.square().mean()
        return self.head(h)


@pytest.mark.parametrize("kept", [False, True])
def test_a_head_of_training_alone_reads_a_norm_too(kept: bool) -> None:
    model = Auxiliary(kept)
    with pytest.warns(UserWarning, match="norm_scale at norm is no symmetry .* in training mode"):
        gauges = find_gauges(model, inputs=(X,))
    assert kinds(gauges) == {"logit_shift"}
    assert model.loss is None


class Balanced(nn.Module):
    """A loss kept as an attribute, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = linear(), linear(CLASSES)
        self.auxiliary_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        self.auxiliary_loss = h.square().mean()
        return self.head(h.relu())


def test_what_a_forward_pass_leaves_on_the_model_is_gone_and_was_seen() -> None:
    model = Balanced()
    before = {module: dict(vars(module)) for module in model.modules()}
    gauges = find_gauges(model, inputs=(X,))
    assert kinds(gauges) == {"logit_shift"}
    assert model.auxiliary_loss is None
    assert {module: dict(vars(module)) for module in model.modules()} == before
    copy.deepcopy(model)


# --------------------------------------------------------------------------------------------------
# ties


def tied_by_data(m: nn.Module) -> None:
    m.head.weight.data = m.embedding.weight.data


def tied_by_a_new_parameter(m: nn.Module) -> None:
    m.head.weight = nn.Parameter(m.embedding.weight.data)


def tied_to_a_buffer(m: nn.Module) -> None:
    m.register_buffer("table", m.head.weight.data)


def tied_in_a_list(m: nn.Module) -> None:
    m.hidden = [m.head.weight]


def tied_in_part(m: nn.Module) -> None:
    values = torch.randn(CLASSES + 1, WIDTH)
    m.head.weight, m.embedding.weight = nn.Parameter(values[:-1]), nn.Parameter(values[1:])


TIES = [tied_by_data, tied_by_a_new_parameter, tied_to_a_buffer, tied_in_a_list, tied_in_part]


@pytest.mark.parametrize("tie", TIES)
def test_weights_that_share_memory_are_tied(tie: Callable[[nn.Module], None]) -> None:
    def forward(m: nn.Module, tokens: Tensor) -> Tensor:
        table = m.hidden[0] if hasattr(m, "hidden") else getattr(m, "table", m.embedding.weight)
        return m.head(m.norm(F.embedding(tokens, table)))

    model = Of(
        forward,
        embedding=nn.Embedding(CLASSES, WIDTH),
        norm=nn.LayerNorm(WIDTH),
        head=linear(CLASSES),
    )
    tie(model)
    tokens = torch.arange(CLASSES)[None]
    for verify in (False, True):
        with warnings.catch_warnings():
            # the trial alone sees through a list
            warnings.simplefilter("ignore" if tie is tied_in_a_list else "error")
            gauges = find_gauges(model, inputs=(tokens,), verify=verify)
        if verify or tie is not tied_in_a_list:
            assert not gauges.found, str(gauges)


# --------------------------------------------------------------------------------------------------
# what hides


def extra(m: nn.Module, x: Tensor) -> Tensor:
    """What training computes in addition, which reads the norm otherwise than by a linear map."""
    return m.extra(m.norm(x)).tanh()


def masked(m: nn.Module, x: Tensor) -> Tensor:
    y = m.head(m.norm(x)) + (extra(m, x) if m.training else 0)
    return y.masked_fill(torch.arange(CLASSES) == 0, -1e9)


def infinite(m: nn.Module, x: Tensor) -> Tensor:
    y = m.head(m.norm(x)) + (extra(m, x) if m.training else 0)
    return y.masked_fill(torch.arange(CLASSES) == 0, -torch.inf)


def beside_a_large_constant(m: nn.Module, x: Tensor) -> Tensor:
    y = m.head(m.norm(x)) + (extra(m, x) if m.training else 0)
    return 1e-3 * y + torch.tensor([0.0, 0, 0, 0, 1e6])


def tiny(m: nn.Module, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    y = m.head(m.norm(x))
    return (y, 1 + 1e-7 * extra(m, x).mean()) if m.training else y


def in_a_list(m: nn.Module, x: Tensor) -> Tensor:
    if m.training:
        m.losses.append(extra(m, x).mean())
    return m.head(m.norm(x))


def in_a_buffer(m: nn.Module, x: Tensor) -> Tensor:
    if m.training:
        m.loss.copy_(extra(m, x).mean())
    return m.head(m.norm(x))


def in_an_object(m: nn.Module, x: Tensor) -> Tensor:
    if m.training:
        m.keeper.loss = extra(m, x).mean()
    return m.head(m.norm(x))


def returned_in_an_object(m: nn.Module, x: Tensor) -> object:
    y = m.head(m.norm(x))
    return Keeper(y + extra(m, x)) if m.training else y


class Keeper:
    def __init__(self, loss: Tensor | None = None) -> None:
        self.loss = loss


def drawn(m: nn.Module, x: Tensor) -> Tensor:
    y = m.head(m.norm(x))
    return y + extra(m, x) if m.training and torch.rand(()) > 0.5 else y


def written_to_an_attribute(m: nn.Module, x: Tensor) -> Tensor:
    y = m.head(m.norm(x))
    if m.training:
        m.space[: len(y)] = extra(m, x)[: len(m.space)].detach()
        y = y + m.space
    return y


HIDING = [
    masked,
    infinite,
    beside_a_large_constant,
    tiny,
    in_a_list,
    in_a_buffer,
    in_an_object,
    returned_in_an_object,
    drawn,
    written_to_an_attribute,
]


@pytest.mark.parametrize("forward", HIDING)
def test_nothing_hides_what_training_adds(forward: Callable[..., object]) -> None:
    norm, head, more = nn.LayerNorm(WIDTH), linear(CLASSES), linear(CLASSES)
    model = Of(forward, norm=norm, head=head, extra=more, loss=torch.zeros(()))
    model.losses, model.keeper = [], Keeper()
    model.space = torch.zeros(*X.shape[:2], CLASSES)
    with pytest.warns(UserWarning, match="norm_scale at norm is no symmetry"):
        gauges = find_gauges(model, inputs=(X,))
    assert kinds(gauges) <= {"logit_shift"}, str(gauges)
    assert model.losses == []
    assert model.keeper.loss is None
    assert not model.loss.any()
    assert not model.space.any()
    assert model.space.dtype == torch.float32


def test_what_cannot_be_tried_in_training_is_said() -> None:
    def forward(m: nn.Module, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if m.training and targets is None:
            raise ValueError("targets are needed")
        return m.head(m.norm(x))

    model = Of(forward, norm=nn.LayerNorm(WIDTH), head=linear(CLASSES))
    with pytest.warns(
        UserWarning, match="2 gauges .* the model does not run in training: targets are needed"
    ):
        assert set(find_gauges(model, inputs=(X,)).unchecked) == set(
            find_gauges(model, inputs=(X, X)).found
        )


def test_a_table_of_positions_that_ends_soon() -> None:
    """32 positions are too many for the model; 16 are not."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return late_rotary(m, x + m.table[: x.shape[1]])

    model = attention(forward, table=nn.Parameter(torch.randn(16, WIDTH)))
    with pytest.warns(UserWarning, match="qk_rotation"):
        assert "qk_rotation" not in kinds(find_gauges(model, inputs=(X,)))


CACHE: dict[int, Tensor] = {}


def test_what_is_computed_once_stays_real() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length not in CACHE:
            CACHE[length] = torch.linspace(0, 1, length)[:, None]
        return m.head(m.norm(x + CACHE[length]))

    model = Of(forward, norm=nn.LayerNorm(WIDTH), head=linear(CLASSES))
    assert kinds(find_gauges(model, inputs=(X,))) == {"norm_scale", "logit_shift"}
    assert {(type(each), each.dtype) for each in CACHE.values()} == {(Tensor, torch.float32)}
    model(X)


def test_random_numbers_of_numpy_do_not_cost_a_gauge() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        kept = torch.from_numpy(np.random.rand(*x.shape[:2]) > 0.5)  # noqa: NPY002  # as masks of spectra are drawn
        return m.head(m.norm(x * kept[..., None] if m.training else x))

    model = Of(forward, norm=nn.LayerNorm(WIDTH), head=linear(CLASSES))
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert kinds(find_gauges(model, inputs=(X,))) == {"norm_scale", "logit_shift"}
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    generator = torch.Generator()
    model = Of(
        lambda m, x: m.head(m.norm(x)) + torch.rand(CLASSES, generator=generator),
        norm=norm(),
        head=linear(CLASSES),
    )
    with pytest.warns(UserWarning, match="does not compute the same twice"):
        assert len(find_gauges(model, inputs=(X,)).unchecked) == 2


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH)


def test_rules_alone_see_factors_that_differ_within_a_head() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.o(attend(m.q(x), m.k(x), m.v(x)) * m.factor))

    model = attention(forward)
    model.register_buffer("factor", torch.ones(WIDTH))
    assert kinds(find_gauges(model, inputs=(X,), verify=False)) == {"logit_shift", "qk_rotation"}


def test_a_bias_is_one_number_a_row() -> None:
    for shape in ((), (1,), (1, WIDTH), (18, WIDTH)):
        model = Of(
            lambda m, x: m.head(torch.addmm(m.b, x.flatten(0, 1), m.w).relu()),
            b=nn.Parameter(torch.randn(shape)),
            w=nn.Parameter(torch.randn(WIDTH, WIDTH)),
            head=linear(CLASSES),
        )
        assert kinds(find_gauges(model, inputs=(X,))) == {"logit_shift"}, shape


def test_text_among_the_inputs() -> None:
    model = Of(
        lambda m, x, how: getattr(m.head(m.norm(x)), how)(1), norm=norm(), head=linear(CLASSES)
    )
    assert kinds(find_gauges(model, inputs=(X, "mean"), loss="other")) == {"norm_scale"}
    with pytest.raises(ValueError, match=r"inputs=\(x,\)"):
        find_gauges(model, inputs=X)


# --------------------------------------------------------------------------------------------------
# refusals


def test_models_that_cannot_be_read_end_in_one_line() -> None:
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    cases = {
        "no parameters": (nn.Sequential(nn.ReLU()), "has no parameters"),
        "quantised": (quantised, "parameter '0.weight' of Sequential is torch.int8, quantised"),
        "control flow": (
            Of(lambda m, x: m.a(x) if x.sum() > 0 else x, a=linear()),
            "cannot be traced",
        ),
    }
    for model, message in cases.values():
        with pytest.raises(ValueError, match=message) as caught:
            find_gauges(model, inputs=(X,))
        assert "\n" not in str(caught.value)


def test_a_model_without_values_is_read_by_rules_and_says_so() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.warns(
        UserWarning, match="2 gauges were proved by rules alone .* its weights have no values"
    ):
        gauges = find_gauges(model)
    assert kinds(gauges) == {"relu_rescale", "logit_shift"}
    assert set(gauges.unchecked) == set(gauges.found)
    assert "found, not checked: its weights have no values" in str(gauges)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not find_gauges(model, verify=False).unchecked


def llama() -> nn.Module:
    import transformers

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **sizes))


def test_what_is_too_large_is_tried_on_a_narrow_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    expected = find_gauges(model)
    monkeypatch.setattr("ddc.gauges.verify.LARGEST", sum(p.numel() for p in model.parameters()) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gauges = find_gauges(model)
    assert str(gauges) == str(expected)
    assert not gauges.unchecked
    with pytest.warns(
        UserWarning,
        match=r"gauges .* parameters, and Sequential has no config to build a narrow twin",
    ):
        assert find_gauges(
            nn.Sequential(*[each for _ in range(4) for each in (nn.Linear(300, 300), nn.ReLU())])
        ).unchecked


def test_weights_on_the_meta_device_are_tried_on_a_narrow_twin() -> None:
    with torch.device("meta"):
        model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gauges = find_gauges(model)
    assert str(gauges) == str(find_gauges(llama(), verify=False))
    assert not gauges.unchecked
    # where a buffer follows from nothing that is known, its values are not made up
    model.model.rotary_emb.config = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gauges = find_gauges(model)
    assert kinds(gauges) == {"logit_shift", "gated_rescale", "norm_scale", "value_rotation"}
    assert any(
        "inv_freq is on the meta device and has no values" in r.reason for r in gauges.refused
    )


def test_low_precision_does_not_hide_a_rotation() -> None:
    """Sines in bfloat16 are off by a hundredth; the rules read them in float64."""
    model = llama()
    expected = str(find_gauges(model))
    assert "qk_rotation" in expected
    assert str(find_gauges(model.bfloat16())) == expected
    tokens = torch.arange(6).view(2, 3)
    # no cache is asked for
    assert str(find_gauges(model, inputs={"input_ids": tokens})) == expected


def test_finding_draws_no_random_number() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 3))
    before = torch.get_rng_state()
    find_gauges(model)
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_positions_do_not_show_how_heads_turn() -> None:
    """At the first position a rotary embedding is the identity; of two, one angle is not seen to be
    one.
    """
    for length in (1, 2):
        for verify in (False, True):
            gauges = find_gauges(attention(late_rotary), inputs=(X[:, :length],), verify=verify)
            assert "qk_rotation" not in kinds(gauges)
            assert any("too few positions" in refusal.reason for refusal in gauges.refused)
