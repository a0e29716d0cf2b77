"""Roles of parameters, told by what is done with them, and param groups for any Muon."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim import AdamW, Muon

from ddc import DDCMuon, find_gauges, hidden_matrices, param_groups, parameter_roles
from ddc.gauges import ROLES
from ddc.gauges.parts import whole_name
from tests.conftest import MODELS
from tests.helpers import VOCABULARY, backward, make_model
from tests.zoo import GROUPED, TOKENS, logits, make, timm, transformers


class Renamed(nn.Module):
    """A model whose names and classes say the wrong thing."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Parameter(torch.randn(11, 8))
        self.embedding = nn.Linear(8, 12)
        self.router = nn.Linear(12, 8, bias=False)
        self.bias = nn.Parameter(torch.randn(8))
        self.norm = nn.Parameter(torch.randn(8))
        self.conv = nn.Linear(8, 11)
        self.gate = nn.Linear(8, 2)
        self.spare = nn.Parameter(torch.randn(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.lm_head)
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.bias)
        share, which = self.gate(h).softmax(-1).topk(1)
        h = self.router(F.gelu(self.embedding(h))) * share * (1 + which)
        x = x + h * self.norm
        return 30 * torch.tanh(self.conv(x) / 30)


def gpt() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return make_model(MODELS["rms-swiglu-rope-gqa"]), (torch.arange(8).view(2, 4) % VOCABULARY,)


def mixtral() -> tuple[nn.Module, Mapping[str, Any]]:
    config = transformers.MixtralConfig(
        vocab_size=67, num_local_experts=4, experts_implementation="batched_mm", **GROUPED
    )
    model = transformers.MixtralForCausalLM(config).eval()
    return model, {"input_ids": TOKENS, "use_cache": False}


def resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return timm.create_model("test_resnet", num_classes=5).eval(), (torch.randn(2, 3, 64, 64),)


def parametrised() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), weight_norm(nn.Linear(8, 8)), nn.ReLU(),
        spectral_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1),
    )  # fmt: skip
    return model, (torch.randn(4, 5),)


def renamed() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Renamed(), (torch.arange(8).view(2, 4),)


MAKE = {
    "GPT": gpt, "Mixtral": mixtral, "ResNet": resnet, "parametrised": parametrised,
    "renamed": renamed,
}  # fmt: skip
LAYER, BLOCK, H = "model.layers.0.", "blocks.0.", "transformer.h.0."
EXPECTED: dict[str, dict[str, str]] = {
    "GPT": {
        "embedding.weight": "embedding",
        f"{BLOCK}attention.query.weight": "hidden, 4 heads of rows",
        f"{BLOCK}attention.value.weight": "hidden, 2 heads of rows",
        f"{BLOCK}attention.output.weight": "hidden, 4 heads of columns",
        f"{BLOCK}mlp.down.weight": "hidden",
        f"{BLOCK}mlp_norm.weight": "norm",
        "head.weight": "head",
    },
    "Mixtral": {
        "model.embed_tokens.weight": "embedding",
        f"{LAYER}self_attn.k_proj.weight": "hidden, 2 heads of rows",
        f"{LAYER}mlp.gate.weight": "router",
        f"{LAYER}mlp.experts.gate_up_proj": "experts",
        f"{LAYER}mlp.experts.down_proj": "experts",
        f"{LAYER}input_layernorm.weight": "norm",
        "lm_head.weight": "head",
    },
    "ResNet": {
        "conv1.0.weight": "input",
        "conv1.3.weight": "convolution",
        "bn1.weight": "norm",
        "bn1.bias": "norm",
        "fc.weight": "head",
        "fc.bias": "bias",
    },
    "parametrised": {
        "0.weight": "input",
        "2.bias": "bias",
        "2.parametrizations.weight.original0": "other",
        "2.parametrizations.weight.original1": "other",
        "4.parametrizations.weight.original": "other",
        "6.weight": "head",
    },
    "renamed": {
        "lm_head": "embedding",
        "bias": "norm",
        "embedding.weight": "hidden",
        "embedding.bias": "bias",
        "router.weight": "hidden",
        "gate.weight": "router",
        "norm": "scale",
        "conv.weight": "head",
        "spare": "unused",
    },
    "GPT-2": {
        "transformer.wte.weight": "embedding, and the head",
        "transformer.wpe.weight": "embedding",
        f"{H}attn.c_attn.weight": "hidden, 12 heads of columns",
        f"{H}attn.c_proj.weight": "hidden, 4 heads of rows",
        f"{H}attn.c_attn.bias": "bias",
    },
    "GPT-NeoX": {"gpt_neox.layers.0.attention.query_key_value.weight": "hidden, 12 heads of rows"},
    "Qwen3": {
        f"{LAYER}self_attn.q_proj.weight": "hidden, 4 heads of rows",
        f"{LAYER}self_attn.k_proj.weight": "hidden, 2 heads of rows",
        f"{LAYER}self_attn.q_norm.weight": "norm",
    },
    "Gemma 2": {
        "model.embed_tokens.weight": "embedding, and the head",
        f"{LAYER}self_attn.q_proj.weight": "hidden",  # its attention is spelt out
        "model.norm.weight": "norm",
    },
    "ViT, layer scale": {
        "cls_token": "embedding",
        "pos_embed": "embedding",
        "patch_embed.proj.weight": "input",
        "patch_embed.proj.bias": "bias",
        f"{BLOCK}attn.qkv.weight": "hidden, 12 heads of rows",
        f"{BLOCK}ls1.gamma": "scale",
        "head.bias": "bias",
    },
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Any]:
    return MAKE[name]() if name in MAKE else make(name)


SLOW = ("Mixtral", "Gemma 2", "Qwen3", "GPT-NeoX", "GPT-2")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in EXPECTED]
)
def test_roles(name: str) -> None:
    model, inputs = made(name)
    roles = parameter_roles(model, inputs)
    assert [each.parameter for each in roles] == [n for n, _ in model.named_parameters()]
    found = {each.parameter: str(each) for each in roles}
    assert {key: found[key] for key in EXPECTED[name]} == EXPECTED[name]
    assert all(each.role in ROLES for each in roles)
    # the same matrices as Muon's, which names parts of some
    hidden = {whole_name(each.parameter) for each in hidden_matrices(model, inputs=inputs)}
    assert hidden == {*roles.of("hidden"), *roles.of("router"), *roles.of("experts")}
    assert {line.split("  ")[0] for line in str(roles).splitlines()[2:]}  # and a table


def test_a_table_that_a_person_can_read() -> None:
    assert str(parameter_roles(*made("Sequential ReLU MLP"))).splitlines() == [
        "parameter    role    shape",
        "--------------------------",
        "0.weight     input   8 × 5",
        "*.bias (2×)  bias    8",
        "2.weight     hidden  8 × 8",
        "4.weight     head    3 × 8",
        "4.bias       bias    3",
    ]


class Wrapped(nn.Module):
    """Hides what a model is, so that it is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(tokens)


@pytest.mark.parametrize("name", ["rms-swiglu-rope-gqa", "layer-bias-relu-learned"])
def test_heads_that_are_traced_are_those_of_the_config(name: str) -> None:
    model = make_model(MODELS[name])
    known = hidden_matrices(model, per_head=True)
    tokens = torch.arange(8).view(2, 4) % VOCABULARY
    traced = hidden_matrices(Wrapped(model), per_head=True, inputs=(tokens,))
    assert sorted((m.parameter, m.heads, m.axis if m.heads > 1 else 0) for m in known) == sorted(
        (m.parameter.removeprefix("model."), m.heads, m.axis) for m in traced
    )


@pytest.mark.slow
def test_a_model_of_others_is_orthogonalised_by_heads() -> None:
    """And stays on its orbit: a norm for each head is equivariant too."""
    model, inputs = make("GPT-NeoX")
    gauges, hidden = find_gauges(model), hidden_matrices(model, per_head=True)
    assert {matrix.heads for matrix in hidden} == {1, 4, 12}
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(1))
    for each in copies:
        optimizer = DDCMuon(each.named_parameters(), gauges, hidden, orthogonalizer="polar")
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(logits(each, inputs).flatten(0, 1), TOKENS.flatten()).backward()
            optimizer.step()
    a, b = (logits(each, inputs).log_softmax(-1).detach() for each in copies)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert (a - logits(model, inputs).log_softmax(-1)).abs().max() > 1e-2


def test_per_head_needs_values() -> None:
    with torch.device("meta"):
        model = transformers.GPTNeoXForCausalLM(make("GPT-NeoX")[0].config)
    assert any(matrix.heads > 1 for matrix in hidden_matrices(model, per_head=True))
    model.gpt_neox.rotary_emb.config = None  # by which its angles are known
    with pytest.raises(ValueError, match=r"per_head=True: which outputs .* not known"):
        hidden_matrices(model, per_head=True)


# ---- groups


def test_groups_for_any_muon() -> None:
    """torch's Muon for hidden matrices, AdamW for the rest; every parameter once, none frozen."""
    model, _ = gpt()
    model.embedding.weight.requires_grad_(False)
    hidden, vectors, rest = param_groups(
        model,
        {"hidden": {"lr": 0.02}, "norm": {"lr": 1e-3, "weight_decay": 0.0}, "rest": {"lr": 1e-3}},
    )
    assert [name for name, _ in rest["params"]] == ["head.weight"]
    assert vectors["weight_decay"] == 0
    named = [pair for group in (hidden, vectors, rest) for pair in group["params"]]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(named) == len(trainable)
    assert all(trainable[name] is p for name, p in named)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = [Muon([hidden]), AdamW([vectors, rest])]
    backward(model, 0)
    for optimizer in optimizers:
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable)


def test_what_groups_refuse() -> None:
    model, _ = gpt()
    with pytest.raises(ValueError, match=r"nothing is said of 'embedding.weight', .*'embedding'"):
        param_groups(model, {"hidden": {}})
    with pytest.raises(ValueError, match=r"Invalid role 'matrix': expected one of embedding, head"):
        param_groups(model, {"matrix": {}, "rest": {}})
    with pytest.raises(ValueError, match="Invalid role 'matrix'"):
        parameter_roles(model).of("matrix")
