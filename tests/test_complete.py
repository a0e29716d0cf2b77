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

from ddc import DDCAdam, DDCMuon, certify, check, find_gauges, hidden_matrices  # noqa: E402
from ddc.gauges import FURTHER, KINDS, Gauge, GaugeSet, Shift, named_parameters  # noqa: E402
from ddc.gauges.certificate import Jacobian, rank, tangents_of  # noqa: E402
from ddc.gauges.verify import generic  # noqa: E402
from ddc.models import GPT, GPTConfig  # noqa: E402

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


def text(name: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        config = getattr(transformers, f"{name}Config")(**(GROUPED | options))
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
    size = 1e-6
    for gauge in gauges:
        if gauge.kind in ("stream_rotation", "qk_map", "value_map"):
            continue
        params = {name: p.detach() for name, p in named_parameters(moved(model)).items()}
        before = torch.cat([p.flatten() for p in params.values()])
        tangents = gauge.tangents(params)
        assert tangents.shape == (gauge.dimension(params), len(before))
        element = gauge.sample(params, torch.Generator().manual_seed(0), size)
        gauge.act_(params, element)
        change = (torch.cat([p.flatten() for p in params.values()]) - before) / size
        rest = change - torch.linalg.lstsq(tangents.T, change[:, None]).solution.T[0] @ tangents
        assert rest.norm() < 1e-4 * change.norm(), gauge


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


def test_kinds_are_the_papers_unless_asked() -> None:
    model, inputs = MODELS["GPT, LayerNorm, biases, ReLU"]()
    assert {gauge.kind for gauge in find_gauges(model, inputs=inputs)} <= {*KINDS}
    some = find_gauges(model, inputs=inputs, kinds=["key_bias", "norm_scale"])
    assert {gauge.kind for gauge in some} == {"key_bias", "norm_scale"}
    assert {gauge.kind for gauge in find_gauges(model, kinds="complete")} <= {*KINDS, *FURTHER}
    with pytest.raises(ValueError, match=r"Invalid kinds='all': expected paper, complete"):
        find_gauges(model, kinds="all")
    with pytest.raises(ValueError, match=r"Invalid kind='spin'"):
        find_gauges(model, kinds=["spin"])


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
    with pytest.raises(TypeError, match=r"stream_rotation at model\.embed_tokens: no optimizer"):
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
