"""All continuous symmetries of a network: each is one, together they are the kernel of its
Jacobian, and what is none is refused.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddc.compatibility import provide_torchvision_operators

provide_torchvision_operators()

import transformers  # noqa: E402

from ddc import (  # noqa: E402
    DDCAdam,
    DDCMuon,
    audit,
    certify,
    check,
    find_gauges,
    hidden_matrices,
)
from ddc.gauges import (  # noqa: E402
    Axis,
    Gauge,
    GaugeSet,
    Rescale,
    Shift,
    complete_kinds,
    named_parameters,
    paper_kinds,
)
from ddc.gauges.affine import Translated, Translation  # noqa: E402
from ddc.gauges.certificate import Jacobian, rank, tangents_of  # noqa: E402
from ddc.gauges.verify import generic, verified  # noqa: E402
from ddc.models import GPT, GPTConfig  # noqa: E402
from tests.helpers import off_tangents  # noqa: E402

transformers.logging.set_verbosity_error()
VOCABULARY = 17
TOKENS = torch.randint(VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
    "tie_word_embeddings": False,
}
GROUPED = SIZES | {"num_key_value_heads": 1}
Made = tuple[nn.Module, Any]


def gpt(**options: Any) -> Callable[[], Made]:
    sizes = {"context": 6, "layers": 1, "width": 8, "heads": 2, "kv_heads": 1, "hidden": 5}
    return lambda: (GPT(GPTConfig(**(sizes | options)), VOCABULARY), (TOKENS,))


def text(name: str, config_name: str = "", **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        kind = getattr(transformers, f"{config_name or name}Config")
        config = kind(**(GROUPED | options))
        return getattr(transformers, f"{name}ForCausalLM")(config), {"input_ids": TOKENS}

    return make


LAYER_NORM = {"norm": "layer", "bias": True, "mlp": "relu", "positions": "learned", "kv_heads": 2}
MODELS: dict[str, Callable[[], Made]] = {
    "GPT, RMSNorm, SwiGLU, RoPE, grouped heads": gpt(),
    "GPT, LayerNorm, biases, ReLU": gpt(**LAYER_NORM),
    "GPT, LayerNorm, biases, GELU, tied head": gpt(
        **(LAYER_NORM | {"mlp": "gelu", "tied_head": True})
    ),
    "GPT, partly turned positions": gpt(positions="partial_rope", kv_heads=2),
    "Llama": text("Llama"),
    "Qwen2": text("Qwen2"),
    "Qwen3": text("Qwen3", head_dim=4),
    "Gemma 3": text("Gemma3", "Gemma3Text", head_dim=4, layer_types=["full_attention"]),
}


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy at generic weights in float64."""
    model = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = generic(p.detach(), generator)
    return model


def log_probs(inputs: Any) -> Callable[[nn.Module], Tensor]:
    def of(model: nn.Module) -> Tensor:
        given = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
        logits = given if isinstance(given, Tensor) else given.logits
        return F.log_softmax(logits, -1)

    return of


@pytest.fixture(scope="module", params=MODELS)
def found(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, GaugeSet]:
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    return model, inputs, find_gauges(model.eval(), inputs=inputs, kinds="complete")


def test_every_gauge_is_a_symmetry(found: tuple[nn.Module, Any, GaugeSet]) -> None:
    model, inputs, gauges = found
    changes = check(moved(model), gauges, log_probs(inputs), seed=1)
    assert {str(gauge): change for gauge, change in changes.items() if change > 1e-8} == {}


def test_the_orbit_is_all_of_the_kernel(found: tuple[nn.Module, Any, GaugeSet]) -> None:
    model, inputs, gauges = found
    jacobian = Jacobian.of(model, inputs)
    certificate = jacobian.certificate(gauges)
    assert certificate.complete, certificate
    assert certificate.leak < 1e-12
    of_paper = jacobian.certificate(find_gauges(model, inputs=inputs))
    assert of_paper.kernel == certificate.kernel
    assert 0 < of_paper.orbit < of_paper.kernel - of_paper.dead


def test_small_elements_move_along_the_tangents(found: tuple[nn.Module, Any, GaugeSet]) -> None:
    """But for those whose elements are large: rotations, and signs."""
    model, _, gauges = found
    for gauge in gauges:
        if gauge.kind in ("stream_rotation", "qk_map", "value_map"):
            continue
        params = {name: p.detach() for name, p in named_parameters(moved(model)).items()}
        assert off_tangents(gauge, params) < 1e-4, gauge


def test_the_gradient_vanishes_along_every_orbit(found: tuple[nn.Module, Any, GaugeSet]) -> None:
    model, inputs, gauges = found
    model = moved(model)
    targets = torch.randint(VOCABULARY, TOKENS.shape)
    F.nll_loss(log_probs(inputs)(model).flatten(0, 1), targets.flatten()).backward()
    params = {name: p.detach() for name, p in named_parameters(model).items()}
    grads = {name: p.grad for name, p in named_parameters(model).items() if p.grad is not None}
    for gauge in gauges:
        # transformers' norms compute in float32
        assert gauge.audit(params, grads) < 1e-4, gauge
    false = {name: torch.randn_like(p) for name, p in params.items()}
    assert all(gauge.audit(params, false) > 1e-3 for gauge in gauges)


def test_a_certificate_explains_what_is_missing() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 7)), (torch.randn(20, 6),)
    gauges = find_gauges(model, inputs=inputs)
    assert [gauge.kind for gauge in gauges] == ["logit_shift"]
    certificate = certify(model, gauges, inputs, explain=True)
    assert certificate.closing == {"factor_map": 16, "factor_bias": 4}
    assert "20 unexplained, closed: 16 by factor_map, 4 by factor_bias" in str(certificate)
    assert certify(model, gauges, inputs).closing == {}
    complete = find_gauges(model, inputs=inputs, kinds="complete")
    assert certify(model, complete, inputs, explain=True).complete


def test_kinds_are_the_papers_unless_asked() -> None:
    model, inputs = MODELS["GPT, LayerNorm, biases, ReLU"]()
    assert {gauge.kind for gauge in find_gauges(model, inputs=inputs)} <= {*paper_kinds()}
    some = find_gauges(model, inputs=inputs, kinds=["key_bias", "norm_scale"])
    assert {gauge.kind for gauge in some} == {"key_bias", "norm_scale"}
    assert {gauge.kind for gauge in find_gauges(model, kinds="complete")} <= {*complete_kinds()}
    with pytest.raises(ValueError, match=r"Invalid kinds='all': expected paper, complete"):
        find_gauges(model, kinds="all")
    with pytest.raises(ValueError, match=r"Invalid kind='spin'"):
        find_gauges(model, kinds=["spin"])
    with pytest.raises(ValueError, match=r"Invalid per_layer=True: it goes with kinds='paper'"):
        find_gauges(model, per_layer=True, kinds="complete")


class Stream(nn.Module):
    """Two writers and one reader of a stream, behind a norm of one kind, with one thing added."""

    def __init__(self, twist: str = "", norm: str = "rms") -> None:
        super().__init__()
        self.twist = twist
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 8)
        kind = nn.RMSNorm if norm == "rms" else nn.LayerNorm
        self.norm, self.last = kind(8), kind(8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 9)
        self.other = nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        step = F.gelu(self.second(self.norm(h)))
        if self.twist == "activation":
            h = h + step
        step = F.linear(step, self.other.weight[:8])
        if self.twist == "scaled":
            step = step * self.scale
        if self.twist == "gated":
            step = step * torch.sigmoid(h)
        h = h + step
        if self.twist == "dropped":
            h = F.dropout(h, 0.5, self.training)
        logits = self.head(self.last(h))
        if self.twist == "read":
            logits = logits + self.other(h)
        if self.twist == "squared":
            logits = logits + h.square().sum(-1, keepdim=True) * torch.arange(9)
        if self.twist == "clipped":
            logits = logits + self.head(self.last(h.clamp(min=0)))
        return logits


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(
    "twist", ["activation", "scaled", "gated", "dropped", "read", "squared", "clipped"]
)
def test_what_breaks_a_stream_is_refused(twist: str, norm: str) -> None:
    """By the rules, and none of those that are found is false."""
    torch.manual_seed(0)
    model, inputs = Stream(twist, norm), (torch.randn(4, 5),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left to the trial
        gauges = find_gauges(model, inputs=inputs, kinds="complete")
    assert not gauges.only(["stream_rotation"]).found
    model = moved(model)
    changes = check(model, gauges, lambda m: m(inputs[0].double()).log_softmax(-1))
    assert all(change < 1e-9 for change in changes.values())


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_plain_stream_turns(norm: str) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = partial(nn.RMSNorm if norm == "rms" else nn.LayerNorm, eps=1e-5)
            self.first, self.up, self.down = nn.Linear(9, 8), nn.Linear(8, 6), nn.Linear(6, 8)
            self.norm, self.last, self.head = kind(8), kind(8), nn.Linear(8, 9)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = h + self.down(F.gelu(self.up(self.norm(h))))
            return self.head(self.last(h))

    torch.manual_seed(0)
    model, inputs = Plain(), (torch.randn(64, 9),)  # as wide as the stream, or it is not full
    gauges = find_gauges(model, inputs=inputs, kinds="complete")
    (rotation,) = gauges.only(["stream_rotation"])
    assert rotation.dimension(named_parameters(model)) == (28 if norm == "rms" else 21)
    assert certify(model, gauges, inputs).complete


def test_dead_entries_are_told_from_symmetries() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5))
    tokens = torch.arange(3).repeat(4, 1)
    gauges = find_gauges(model, inputs=(tokens,))
    draw = lambda generator: (torch.randint(3, (4, 3), generator=generator),)  # noqa: E731
    certificate = certify(model, gauges, draw)
    assert certificate.dead == 24  # six rows that are never read
    # three tokens: their logits do not tell four columns and a bias from one another
    assert certificate.unexplained > 0
    assert "24 dead" in str(certificate)


def test_certify_says_what_it_needs() -> None:
    model, inputs = gpt(width=64, hidden=64)()
    with pytest.raises(ValueError, match=r"certify takes at most 6,000: pass a narrow model"):
        certify(model, (), inputs)
    small, inputs = gpt()()
    with pytest.raises(ValueError, match=r"no parameter .0\.weight."):
        certify(small, find_gauges(nn.Sequential(nn.Linear(3, 3))), inputs)
    with pytest.raises(ValueError, match="the model does not run"):
        certify(small, (), (torch.zeros(2, 3),))


def test_rank_counts_overlaps_once() -> None:
    model, inputs = MODELS["Llama"]()
    gauges = find_gauges(model, inputs=inputs, kinds="complete")
    tangents = tangents_of(gauges, named_parameters(model))
    assert rank(torch.cat([tangents, 3 * tangents])) == rank(tangents)
    assert rank(torch.zeros(2, 3)) == 0


def test_optimizers_refuse_what_they_cannot_respect() -> None:
    model, inputs = MODELS["Llama"]()
    gauges = find_gauges(model, inputs=inputs, kinds=["stream_rotation"])
    with pytest.raises(ValueError, match=r"stream_rotation at .* behind the scale 'model\.layers"):
        DDCAdam(model.named_parameters(), gauges)


def test_ddcadam_is_equivariant_under_the_mean_of_what_writes_to_a_stream() -> None:
    """What AdamW has by itself, and DDCAdam only if it knows: unit norms count a row's mean."""
    model, inputs = gpt(**LAYER_NORM)()
    paper = find_gauges(model, inputs=inputs)
    means = [
        gauge
        for gauge in find_gauges(model, inputs=inputs, kinds=["stream_mean"])
        if isinstance(gauge, Shift)
    ]
    assert [gauge.weight for gauge in means] == [
        "blocks.0.mlp.down.weight",
        "blocks.0.attention.output.weight",
    ]
    targets = torch.randint(VOCABULARY, TOKENS.shape).flatten()

    def trained(known: list[Gauge], start: list[Gauge]) -> Tensor:
        here = moved(model)
        GaugeSet(tuple(start)).transform_(here, torch.Generator().manual_seed(1), 0.5)
        optimizer = DDCAdam(here.named_parameters(), known, lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(here(TOKENS).flatten(0, 1), targets).backward()
            optimizer.step()
        return F.log_softmax(here(TOKENS), -1).detach()

    known = [*paper, *means]
    assert (trained(known, []) - trained(known, known)).abs().max() < 1e-8
    assert (trained([*paper], []) - trained([*paper], means)).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"hidden matrix, whose step is not centred"):
        DDCMuon(model.named_parameters(), known, hidden_matrices(model, inputs=inputs), lr=0.02)


def test_patches_write_to_a_stream() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.position = nn.Conv2d(2, 6, 2, 2), nn.Parameter(torch.randn(1, 4, 6))
            self.token = nn.Parameter(torch.randn(1, 1, 6))
            self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
            self.norm, self.last, self.head = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 7)

        def forward(self, x: Tensor) -> Tensor:
            h = self.cut(x).flatten(2).transpose(1, 2) + self.position
            h = torch.cat([self.token.expand(len(x), -1, -1), h], 1)
            h = h + self.down(F.gelu(self.up(self.norm(h))))
            return self.head(self.last(h[:, :3]))

    torch.manual_seed(0)
    model, inputs = Patches(), (torch.randn(8, 2, 4, 4),)
    gauges = find_gauges(model, inputs=inputs, kinds="complete")
    assert {"stream_rotation", "stream_mean", "translation"} <= {gauge.kind for gauge in gauges}
    changes = check(moved(model), gauges, lambda m: m(inputs[0].double()).log_softmax(-1))
    assert all(change < 1e-9 for change in changes.values())
    assert certify(model, gauges, inputs).complete


class Behind(nn.Module):
    """A stream, a norm, and a reader, with one thing done to what the norm gives or is."""

    def __init__(self, between: Callable[..., Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.head, self.between = nn.Linear(9, 8), nn.Linear(8, 9), between
        self.norm = nn.LayerNorm(8) if norm is None else norm
        self.gate = nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("fixed", torch.rand(8) + 0.5)

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        return self.head(self.between(self, self.norm(self.first(x)), *mask))


class Gemma(nn.Module):
    """RMSNorm whose scale is 1 + weight, as one operation or spelt out."""

    def __init__(self, one: bool) -> None:
        super().__init__()
        self.one, self.weight = one, nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.one:
            return F.rms_norm(x, (8,), 1 + self.weight, 1e-6)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


BETWEEN: dict[str, Callable[..., Tensor]] = {
    "number": lambda m, x: 2 * x,
    "sign": lambda m, x: -x,
    "buffer": lambda m, x: x * m.fixed,
    "gate": lambda m, x: x * m.gate.sigmoid(),
    "sum": lambda m, x: x.sum(1),
    "dropout": lambda m, x: F.dropout(x, 0.5, m.training),
}
X = torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(0))


def by_rules(model: nn.Module, inputs: Any, **options: Any) -> set[str]:
    """Kinds that the rules grant; none of them may wait for the trial to be refused."""
    gauges = find_gauges(model, inputs=inputs, kinds="complete", verify=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_gauges(model, inputs=inputs, kinds="complete", **options)) == len(gauges)
    return {gauge.kind for gauge in gauges}


@pytest.mark.parametrize("what", BETWEEN)
def test_what_changes_the_output_of_a_norm_is_refused_by_rule(what: str) -> None:
    found = find_gauges(Behind(BETWEEN[what]), inputs=(X,), kinds="complete", verify=False)
    assert not {gauge.kind for gauge in found if gauge.where != "first"} & {
        "norm_shift",
        "reader_shift",
        "stream_rotation",
    }
    assert not found.only(["stream_rotation"]).found


def test_a_mean_over_positions_leaves_shifts() -> None:
    assert by_rules(Behind(lambda m, x: x.mean(1)), (X,)) >= {
        "norm_shift",
        "reader_shift",
        "stream_rotation",
    }


def test_a_mask_of_ones_proves_nothing() -> None:
    """The trial cannot see it: the mask of the example has no zeros."""
    masked = Behind(lambda m, x, mask: x * mask[..., None])
    assert by_rules(masked, (X, torch.ones(4, 5))) == {"logit_shift", "norm_scale", "stream_mean"}


def test_a_scale_of_one_plus_weight_is_read_where_it_is_spelt_out() -> None:
    """As one operation it is no scale; spelt out, the rotation goes through 1 + weight."""
    assert "stream_rotation" not in by_rules(Behind(lambda m, x: x, Gemma(True)), (X,))
    model = Behind(lambda m, x: x, Gemma(False)).double()
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(-0.5, 0.5, 8))
    inputs = X.double()
    found = find_gauges(model, inputs=(inputs,), kinds="complete", verify=False)
    assert {"norm_scale", "stream_rotation"} <= {gauge.kind for gauge in found}
    changes = check(model, found, lambda m: m(inputs).log_softmax(-1))
    assert max(changes.values()) < 1e-12


class Normed(nn.Module):
    """Attention of normed queries and keys, whose scales are what is made of parameters."""

    def __init__(self, *scales: Callable[[Tensor], Any], one: bool = False) -> None:
        super().__init__()
        self.scales, self.one = scales, one
        self.query, self.key, self.value = (nn.Linear(9, 8) for _ in range(3))
        self.gammas = nn.ParameterList(torch.rand(4) + 0.5 for _ in range(2))
        self.head = nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Tensor:
        maps = (self.query, self.key, self.value)
        q, k, v = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in maps)
        gammas = (scale(gamma) for scale, gamma in zip(self.scales, self.gammas, strict=True))
        if self.one:
            q, k = (F.rms_norm(y, (4,), g, 1e-6) for y, g in zip((q, k), gammas, strict=True))
        else:
            q, k = (F.rms_norm(y, (4,)) * g for y, g in zip((q, k), gammas, strict=True))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_scales_of_queries_and_keys_may_be_sums() -> None:
    one = (lambda g: 1 + g, lambda g: g.double() + 1)
    for model in (Normed(*one), Normed(*one, one=True)):
        found = find_gauges(model.double(), inputs=(X.double(),), kinds=["qk_norm_scale"])
        assert [gauge.offset for gauge in found] == [1.0]  # type: ignore[attr-defined]
        assert [gauge.dimension(dict(model.named_parameters())) for gauge in found] == [4]
        changes = check(model, found, lambda m: m(X.double()).log_softmax(-1))
        assert max(changes.values()) < 1e-12
    (gauge,) = find_gauges(Normed(lambda g: g, lambda g: g), inputs=(X,), kinds=["qk_norm_scale"])
    assert gauge.offset == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ((lambda g: 1 + g, lambda g: g), "different numbers are added"),
        ((lambda g: 1 + g, lambda g: 2 + g), "different numbers are added"),
        ((lambda g: 1 - g, lambda g: 1 - g), ""),  # not looked for
        ((lambda g: (1 + g).abs(), lambda g: 1 + g), ""),
        ((lambda g: 1 + g.abs(), lambda g: 1 + g.abs()), ""),
    ],
    ids=["one of them", "another number", "minus", "absolute", "of what is made of it"],
)
def test_other_scales_of_queries_and_keys_are_none(scales: Any, reason: str) -> None:
    found = find_gauges(Normed(*scales), inputs=(X,), kinds=["qk_norm_scale"], verify=False)
    assert found.found == ()
    assert [each.reason.startswith(reason) for each in found.refused] == [True] * bool(reason)


class Attention(nn.Module):
    """Two heads of four, with one thing done to keys, values, or what attention gives."""

    def __init__(self, where: str, change: Callable[..., Tensor]) -> None:
        super().__init__()
        self.where, self.change = where, change
        self.query, self.key, self.value = (nn.Linear(9, 8) for _ in range(3))
        self.output, self.head = nn.Linear(8, 8), nn.Linear(8, 9)

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        def at(where: str, y: Tensor) -> Tensor:
            return self.change(y, *mask) if self.where == where else y

        q, k, v = self.query(x), at("key", self.key(x)), at("value", self.value(x))
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in (q, k, v))
        given = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.gelu(self.output(at("output", given))))


@pytest.mark.parametrize(
    ("where", "lost"), [("key", "key_bias"), ("value", "value_bias"), ("output", "value_bias")]
)
def test_biases_of_heads_are_not_shifted_under_a_mask(where: str, lost: str) -> None:
    kinds = {"key_bias", "value_bias", "value_map", "qk_map"}
    assert by_rules(Attention("", lambda y: y), (X,)) >= kinds
    masked = Attention(where, lambda y, mask: y * mask[..., None])
    assert by_rules(masked, (X, torch.ones(4, 5))) & kinds == kinds - {lost}
    halved = Attention("output", lambda y: y / 2)
    assert "value_bias" not in by_rules(halved, (X,))


class Tables(nn.Module):
    """Tokens and positions, and a head, tied or not."""

    def __init__(self, tied: bool, twice: bool = False) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(9, 8), nn.Parameter(torch.randn(5, 8))
        self.norm, self.head, self.twice = nn.LayerNorm(8), nn.Linear(8, 9, bias=False), twice
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.positions
        return self.head(self.norm(h + self.embedding(tokens.flip(1)) if self.twice else h))


def test_a_tied_table_moves_under_softmax_alone() -> None:
    tokens = (TOKENS[:, :5] % 9,)
    assert "translation" in by_rules(Tables(tied=True), tokens)
    assert "translation" not in by_rules(Tables(tied=True), tokens, loss="other")
    assert "translation" in by_rules(Tables(tied=False), tokens, loss="other")


@pytest.mark.parametrize("scale", [lambda h: 3.0 * h, lambda h: h * 1.0, lambda h: h / 4])
def test_a_tied_table_that_a_number_scales(scale: Callable[[Tensor], Tensor]) -> None:
    """Its rows move with those of positions, by as much less as it is scaled; and all of it by one
    number, which the norm takes off and the softmax does not see.
    """

    class Scaled(Tables):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.norm(scale(self.embedding(tokens)) + self.positions))

    tokens = (TOKENS[:, :5] % 9,)
    model = moved(Scaled(tied=True))
    gauges = find_gauges(model, inputs=tokens, kinds="complete", loss="cross_entropy")
    assert max(check(model, gauges, log_probs(tokens), seed=1).values()) < 1e-12
    certificate = Jacobian.of(model, tokens).certificate(gauges)
    assert certificate.complete, certificate
    (whole,) = [gauge for gauge in gauges if gauge.parameters == ("embedding.weight",)]
    assert whole.kind == "stream_mean"
    assert whole.dimension(dict(model.named_parameters())) == 1
    assert "stream_mean" not in {
        gauge.kind
        for gauge in find_gauges(model, inputs=tokens, kinds="complete", loss="other")
        if "embedding.weight" in gauge.parameters
    }


def test_a_term_that_is_added_to_itself_is_none() -> None:
    class Twice(Tables):
        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embedding(tokens)
            return self.head(self.norm((h + h) + self.positions))

    assert "translation" not in by_rules(Twice(tied=False), (TOKENS[:, :5] % 9,))


def test_shifts_of_batch_norms_that_meet_in_a_stream() -> None:
    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.ModuleList(nn.Conv2d(2, 4, 1) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norms[0](self.maps[0](x)) + self.norms[1](self.maps[1](x))
            return self.head(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))

    assert "translation" in by_rules(Meeting(), (torch.randn(3, 2, 5, 5),))


def test_a_table_that_is_looked_up_by_columns_is_none() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.reader = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.reader(F.embedding(tokens % 8, self.table.t()))

    assert by_rules(Transposed(), (TOKENS,)) == {"logit_shift"}


def test_few_independent_outputs_take_more_inputs() -> None:
    class Alike(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, None].expand(-1, 64, -1)  # at all places the same

    model = Alike(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 2))
    inputs = (torch.randn(1, 12),)
    gauges = find_gauges(model, inputs=inputs, kinds="complete", loss="cross_entropy")
    certificate = Jacobian.of(model, inputs).certificate(gauges)
    assert certificate.kernel == certificate.orbit == 21, certificate  # of 302, more than 256


class Spelt(nn.Module):
    """A LayerNorm without a shift as Cohere spells it, or nearly.

    Args:
        changed: "", or what is done otherwise: "another axis", "not centred", "twice the mean".
    """

    def __init__(self, width: int, changed: str = "") -> None:
        super().__init__()
        self.weight, self.changed = nn.Parameter(torch.rand(width) + 0.5), changed

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1 if self.changed == "another axis" else -1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        factor = 2.0 if self.changed == "twice the mean" else 1.0
        above = (
            x if self.changed == "not centred" else x - factor * mean if factor > 1 else x - mean
        )
        return self.weight * (above * torch.rsqrt(variance + 1e-5))


class BehindNorms(nn.Module):
    """One feed-forward block behind a norm, and a head behind one.

    Args:
        norm: of a width.
    """

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.table, self.norms = nn.Embedding(30, 8), nn.ModuleList(norm(8) for _ in range(2))
        self.up, self.down, self.head = nn.Linear(8, 5), nn.Linear(5, 8), nn.Linear(8, 30)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens % 30) + self.table(tokens.flip(1) % 30)
        x = x + self.down(F.gelu(self.up(self.norms[0](x))))
        return self.head(self.norms[1](x))


def test_a_layer_norm_that_is_spelt_out_is_one() -> None:
    spelt, whole = (
        find_gauges(BehindNorms(norm), inputs=(TOKENS,), kinds="complete", loss="cross_entropy")
        for norm in (Spelt, partial(nn.LayerNorm, bias=False))
    )
    assert {"stream_rotation", "stream_mean", "reader_shift"} <= {gauge.kind for gauge in spelt}
    assert [*map(str, spelt)] == [*map(str, whole)]
    model = moved(BehindNorms(Spelt))
    assert max(check(model, spelt, log_probs((TOKENS,))).values()) < 1e-10


@pytest.mark.parametrize("changed", ["another axis", "not centred", "twice the mean"])
def test_what_is_nearly_a_layer_norm_is_none(changed: str) -> None:
    model = BehindNorms(partial(Spelt, changed=changed))
    gauges = find_gauges(
        model, inputs=(TOKENS,), kinds="complete", loss="cross_entropy", verify=False
    )
    of_stream = {"stream_rotation", "stream_mean", "reader_shift", "norm_shift"}
    assert not {gauge.kind for gauge in gauges} & of_stream


def test_a_stream_of_width_two_has_no_rotation_that_leaves_its_mean() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 2), nn.LayerNorm(2, bias=False)
            self.head = nn.Linear(2, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.norm(self.table(tokens % 9)))

    model = Narrow()
    params = dict(model.named_parameters())
    gauges = find_gauges(model, inputs=(TOKENS,), kinds="complete", loss="cross_entropy")
    (rotation,) = [gauge for gauge in gauges if gauge.kind == "stream_rotation"]
    assert rotation.tangents(params).shape == (0, sum(p.numel() for p in params.values()))


def test_queries_of_a_convolution_in_float32() -> None:
    """Their values are computed in float64, of weights that are not."""
    sizes = {
        "hidden_size": 8,
        "embedding_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    groups = {f"{each}_groups": 2 for each in ("q", "k", "v", "intermediate", "output")}
    config = transformers.SqueezeBertConfig(
        vocab_size=VOCABULARY, intermediate_size=8, post_attention_groups=1, **sizes, **groups
    )
    model = transformers.SqueezeBertForMaskedLM(config).eval()
    inputs = {"input_ids": TOKENS}
    gauges = find_gauges(model, inputs=inputs, kinds="complete")
    assert max(check(model, gauges, log_probs(inputs)).values()) < 1e-10


@pytest.mark.parametrize(("rate", "kept"), [(0.0, True), (0.3, False)])
def test_a_term_that_is_dropped_at_random_is_no_term(rate: float, kept: bool) -> None:
    class Dropped(Tables):
        def forward(self, tokens: Tensor) -> Tensor:
            h = F.dropout(self.embedding(tokens), rate, self.training) + self.positions
            return self.head(self.norm(h))

    found = by_rules(Dropped(tied=False), (TOKENS[:, :5] % 9,))
    assert ("translation" in found) == kept


def test_a_table_that_is_looked_up_twice_turns_once() -> None:
    assert "stream_rotation" in by_rules(Tables(tied=False, twice=True), (TOKENS[:, :5] % 9,))


def test_a_part_of_a_table_elsewhere_keeps_it_where_it_is() -> None:
    class Shared(Tables):
        def __init__(self) -> None:
            super().__init__(tied=False)
            self.register_buffer("rows", self.embedding.weight.data[:2])

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) + self.rows.sum()

    assert not by_rules(Shared(), (TOKENS[:, :5] % 9,)) & {"stream_rotation", "translation"}


class Scores(nn.Module):
    """A linear map, one thing done to its outputs, and a reader of values."""

    def __init__(self, outputs: int, change: Callable[..., Tensor], scale: int = 8) -> None:
        super().__init__()
        self.scores, self.values = nn.Linear(9, outputs), nn.Linear(9, 7)
        self.scale, self.change = nn.Parameter(torch.rand(scale) + 0.5), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.scores(x), self.values(x))


@pytest.mark.parametrize(
    ("outputs", "change", "found"),
    [
        (4, lambda m, s, v: s.softmax(-1)[..., :1] * v, True),
        (1, lambda m, s, v: s.squeeze(-1).softmax(-1)[:, None] @ v, False),  # over positions
        (4, lambda m, s, v: s.transpose(1, 2).softmax(-1) @ v, False),
    ],
)
def test_a_router_is_a_softmax_over_outputs(outputs: int, change: Any, found: bool) -> None:
    assert ("router_shift" in by_rules(Scores(outputs, change), (X,))) == found


@pytest.mark.parametrize(
    ("change", "scale", "found"),
    [
        (lambda m, s, v: (s * m.scale).sin(), 8, True),
        (lambda m, s, v: (s.flip(-1) * m.scale).sin(), 8, False),
        (lambda m, s, v: (s.unflatten(-1, (2, 4)) * m.scale).sin(), 4, False),  # heads share it
    ],
)
def test_a_layer_scale_has_an_entry_an_output(change: Any, scale: int, found: bool) -> None:
    assert ("layer_scale" in by_rules(Scores(8, change, scale), (X,))) == found


class Patches(nn.Module):
    def __init__(self, groups: int = 1, side: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 8, side, stride=side, groups=groups, bias=bias)
        self.positions = nn.Parameter(torch.randn(1, (4 // side) ** 2, 8))
        self.norm, self.head = nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(h).mean(1))


def test_patches_turn_in_one_group_and_in_any_memory_format() -> None:
    images = (torch.randn(3, 4, 4, 4),)
    assert "stream_rotation" not in by_rules(Patches(groups=2), images)
    assert "stream_rotation" in by_rules(Patches(side=1, bias=False), images)
    model = Patches().to(memory_format=torch.channels_last)
    gauges = find_gauges(model, inputs=images, kinds=["stream_rotation"])
    changes = check(model, gauges, lambda m: m(images[0].double()).log_softmax(-1))
    assert len(changes) == 1
    assert max(changes.values()) < 1e-10


def test_a_certificate_of_false_gauges_is_none() -> None:
    model, inputs = nn.Sequential(nn.Linear(3, 4)), (torch.randn(6, 3),)
    assert certify(model, find_gauges(model, inputs=inputs), inputs).complete
    false = Translation("translation", "0", (Translated("0.weight", 0),))
    certificate = certify(model, [false], inputs)  # of as many dimensions as the kernel
    assert certificate.unexplained == 0
    assert not certificate.complete
    assert "not all gauges are symmetries" in str(certificate)


def test_certify_refuses_what_it_would_count_wrongly() -> None:
    x = (torch.randn(6, 3),)
    with pytest.raises(ValueError, match="one output"):
        certify(nn.Linear(3, 1), (), x)
    with pytest.raises(ValueError, match=r"'weight' has no values"):
        certify(nn.Linear(3, 4, device="meta"), (), x)
    with pytest.raises(ValueError, match="counts real numbers alone"):
        certify(nn.Linear(3, 4, dtype=torch.complex64), (), x)
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    two[1].weight = nn.Parameter(two[0].weight.data)
    with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' share their memory"):
        certify(two, (), x)


def test_a_norm_without_shift_yet_has_an_audit() -> None:
    """At β = 0 the group's element divides by zero; its direction does not."""
    model = nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8), nn.Linear(8, 9, bias=False)).double()
    x = X.double()
    gauges = find_gauges(copy.deepcopy(model).float(), inputs=(X,), kinds=["norm_shift"])
    F.cross_entropy(model(x).flatten(0, 1), torch.arange(20) % 9).backward()
    assert len(gauges) == 1
    assert max(audit(model, gauges).values()) < 1e-10
    params = {name: p.detach() for name, p in named_parameters(model).items()}
    assert gauges[0].tangents(params).isfinite().all()


def test_the_trial_draws_constant_inputs_anew() -> None:
    """Queries and keys are scaled entry by entry by an input that is one in the example."""
    scaled = Attention("key", lambda y, scale: y * scale[:, None])
    with pytest.warns(UserWarning, match="qk_map at attention is no symmetry"):
        gauges = find_gauges(scaled, inputs=(X, torch.ones(4, 8)), kinds=["qk_map", "value_map"])
    assert [gauge.kind for gauge in gauges] == ["value_map"]


def test_behind_a_mask_that_is_given_no_constant_passes_through_attention() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (each(x)[:, None] for each in (self.query, self.key, self.value))
            return self.out(F.scaled_dot_product_attention(q, k, v, mask)[:, 0])

    torch.manual_seed(0)
    inputs = (torch.randn(2, 5, 6), torch.ones(2, 1, 5, 5, dtype=torch.bool))
    gauges = find_gauges(Masked(), inputs=inputs, loss="other", kinds="complete")
    assert not gauges.only(["value_bias"]).found
    (refusal,) = gauges.only(["value_bias"]).refused
    assert "may mask a whole row" in refusal.reason


def test_a_gauge_that_does_not_fit_is_refused_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    (fits,) = find_gauges(model).only(["relu_rescale"])
    false = Rescale("layer_scale", "0", (Axis("0.weight"),), (Axis("2.bias"),))
    left = verified(GaugeSet((fits, false)), model, (torch.randn(3, 4),), {})
    assert [*left] == [fits]
    assert not left.unchecked


class Relative(nn.Module):
    """Attention whose scores take a number of each head from a table of relative positions."""

    def __init__(self, change: Callable[..., Tensor], heads_first: bool = False) -> None:
        super().__init__()
        self.change, self.heads_first = change, heads_first
        self.table = nn.Parameter(torch.randn((2, 9) if heads_first else (9, 2)))
        positions = torch.arange(5)
        self.register_buffer("distances", positions[:, None] - positions + 4)
        self.queries, self.keys, self.values = (nn.Linear(9, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            each(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for each in (self.queries, self.keys, self.values)
        )
        if self.heads_first:
            bias = self.table[:, self.distances]
        else:
            bias = self.table[self.distances.view(-1)].view(5, 5, 2).permute(2, 0, 1)
        return self.change(queries, keys, values, bias[None])


CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda q, k, v, b: (q @ k.mT + b).softmax(-1) @ v, True),
        (lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, b), True),
        (lambda q, k, v, b: (q @ k.mT + b.masked_fill(~CAUSAL, -1e30)).softmax(-1) @ v, True),
        (
            lambda q, k, v, b: F.scaled_dot_product_attention(
                q, k, v, torch.where(CAUSAL, b, -torch.inf).contiguous()
            ),
            True,
        ),
        (lambda q, k, v, b: (q @ k.mT + b).softmax(-2) @ v, True),  # of a head, all alike
        (lambda q, k, v, b: torch.where(~CAUSAL, -torch.inf, q @ k.mT - b).softmax(-1) @ v, False),
        (lambda q, k, v, b: torch.where(~CAUSAL, -torch.inf, b - q @ k.mT).softmax(-1) @ v, True),
        (
            lambda q, k, v, b: (
                torch.baddbmm(
                    b.expand(3, -1, -1, -1).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT
                )
                .view(3, 2, 5, 5)
                .softmax(-1)
                @ v
            ),
            True,
        ),
        (lambda q, k, v, b: (q @ k.mT + b.masked_fill(~CAUSAL, -1e9)).softmax(-1) @ v, False),
        (
            lambda q, k, v, b: (
                (q @ k.mT + b.double().view(torch.int64).view(torch.double)).softmax(-1).float() @ v
            ),
            False,
        ),
        (lambda q, k, v, b: (q @ k.mT + b).softmax(1) @ v, False),  # over heads
        (lambda q, k, v, b: (q @ k.mT + b.masked_fill(~CAUSAL, 0.0)).softmax(-1) @ v, False),
        (lambda q, k, v, b: ((q @ k.mT + b).softmax(-1) + b) @ v, False),
        (lambda q, k, v, b: (q @ k.mT * b).softmax(-1) @ v, False),
        (lambda q, k, v, b: (q @ k.mT + b).sigmoid() @ v, False),
        (lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v + b[..., :4], b), False),
    ],
)
def test_scores_of_relative_positions_may_all_move(
    change: Any, found: bool, heads_first: bool
) -> None:
    model = Relative(change, heads_first)
    assert ("score_shift" in by_rules(model, (torch.randn(3, 5, 9),))) == found
    gauges = find_gauges(model, inputs=(torch.randn(3, 5, 9),), kinds=["score_shift"])
    assert len(gauges.found) == found
    if found:
        assert gauges.found[0].dimension(dict(model.named_parameters())) == 2


def test_a_dropout_that_drops_nothing_shares_what_is_written_to_later() -> None:
    def change(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        scores = q @ k.mT
        kept = F.dropout(scores, 0.1, training=False)
        scores.add_(b)
        return scores.softmax(-1) @ v + kept.sigmoid().sum()

    assert "score_shift" not in by_rules(Relative(change), (torch.randn(3, 5, 9),))


def test_a_hidden_score_may_be_all_that_a_query_sees() -> None:
    """Behind a mask of padding, scores that are low but finite are the only ones of a query."""

    class Padded(Relative):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            self.change = lambda q, k, v, b: (
                (
                    q @ k.mT
                    + b.masked_fill(~CAUSAL, self.low)
                    + (1 - mask[:, None, None].to(q.dtype)) * self.low
                ).softmax(-1)
                @ v
            )
            return super().forward(x)

    mask = torch.ones(3, 5, dtype=torch.long)
    padded = torch.ones(3, 5, dtype=torch.long)
    padded[0, :2] = 0
    for low, found in ((-1e9, False), (torch.finfo(torch.float32).min, True)):
        model = Padded(lambda *scores: scores[0])
        model.low = low
        x = torch.randn(3, 5, 9)
        gauges = find_gauges(model, inputs=(x, mask), kinds=["score_shift"])
        assert len(gauges.found) == found
        if found:
            change = check(model, gauges, lambda m, x=x: m(x.double(), padded))
            assert max(change.values()) < 1e-10


def test_what_is_added_to_itself_many_times_is_followed_once() -> None:
    def rolled(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        for _ in range(40):
            b = b + b.roll(1, -1)
        return (q @ k.mT + b).softmax(-1) @ v

    assert "score_shift" in by_rules(Relative(rolled), (torch.randn(3, 5, 9),))


def test_scores_of_a_table_that_is_read_elsewhere_stay() -> None:
    class Also(Relative):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.table.sum()

    model = Also(lambda q, k, v, b: (q @ k.mT + b).softmax(-1) @ v)
    gauges = find_gauges(model, inputs=(torch.randn(3, 5, 9),), kinds=["score_shift"])
    assert not gauges.found
    assert [each.reason for each in gauges.refused] == ["sum reads its table"]
