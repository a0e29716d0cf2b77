"""Gauges and hidden matrices of models that others wrote: what is found is real, and DDC's steps
commute with it.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import Chain, Gauge, Rescale, Rotation, check
from ddc.gauges.trace import traced
from ddc.gauges.traced import gauges_of_trace
from ddc.models import DeepMLP, DeepMLPConfig, GPTConfig
from tests.helpers import batch, make_model
from tests.zoo import TOKENS, ZOO, logits, make

ALL = {"logit_shift", "norm_scale", "value_rotation", "qk_rotation"}
FOUND = {
    "GPT-2": {"norm_scale", "value_rotation", "qk_rotation"},
    "GPT-2, ReLU, head not tied": ALL | {"relu_rescale"},
    "Llama": ALL | {"gated_rescale"},
    "Mistral": ALL | {"gated_rescale"},
    "Qwen2": ALL | {"gated_rescale"},
    "Qwen3": {"logit_shift", "norm_scale", "value_rotation", "gated_rescale"},
    "GPT-NeoX": ALL,
    "GPT-J": ALL,
    "Gemma 2": {"gated_rescale", "norm_scale", "value_rotation", "qk_rotation"},
    "ViT (transformers)": ALL,
    "ViT": ALL,
    "ViT without class token": ALL,
    "ViT, layer scale": ALL,
    "ViT, QK-norm": ALL - {"qk_rotation"},
    "ViT, ReLU": ALL | {"relu_rescale"},
    "ViT, SwiGLU": ALL | {"gated_rescale"},
    "ViT, packed SwiGLU": ALL | {"gated_rescale"},
    "DeiT, distilled": ALL,
    "EVA-02 tiny": ALL | {"gated_rescale"},
    "EVA-02 base": ALL,
    "TransformerEncoderLayer, ReLU": {"relu_rescale", "value_rotation", "qk_rotation"},
    "TransformerEncoderLayer, pre-norm, GELU": {"norm_scale", "value_rotation", "qk_rotation"},
    "Sequential ReLU MLP": {"logit_shift", "relu_rescale"},
    "Sequential ReLU MLP without biases": {"logit_shift", "relu_rescale"},
}
REFUSED = {
    "GPT-2": {
        "logit_shift": "tied to the embedding",
        "relu_rescale": "NewGELUActivation is not homogeneous",
    },
    "Qwen3": {"qk_rotation": "QK-norm"},
    "Gemma 2": {"norm_scale": "its reader, add, is not", "logit_shift": "not a linear map"},
    "ViT": {"relu_rescale": "gelu is not homogeneous"},
    "ViT, layer scale": {"norm_scale": "its reader, add, is not a linear map"},
    "ViT, QK-norm": {"qk_rotation": "QK-norm", "norm_scale": "scaled_dot_product_attention"},
    "TransformerEncoderLayer, ReLU": {"norm_scale": "its reader, add, is not a linear map"},
}


@pytest.mark.parametrize("name", ZOO)
def test_found_refused_and_real(name: str) -> None:
    model, inputs = make(name)
    gauges = find_gauges(model, inputs=inputs)
    assert {gauge.kind for gauge in gauges} == FOUND[name], str(gauges)
    for kind, reason in REFUSED.get(name, {}).items():
        assert any(r.kind == kind and reason in r.reason for r in gauges.refused), str(gauges)
    changes = check(model, gauges, lambda each: logits(each, inputs).log_softmax(-1))
    assert max(changes.values()) < 1e-12


def test_examples_of_inputs_are_known() -> None:
    """The same gauges without an example, where the kind of model says what it takes."""
    for name in (
        "Llama",
        "ViT (transformers)",
        "ViT",
        "TransformerEncoderLayer, ReLU",
        "Sequential ReLU MLP",
    ):
        model, inputs = make(name)
        assert str(find_gauges(model)) == str(find_gauges(model, inputs=inputs)), name


def comparable(gauge: Gauge) -> tuple:
    match gauge:
        case Rotation():
            slots = {
                (slot.parameter, slot.axis, repr(slot.indices.tolist())) for slot in gauge.slots
            }
            return gauge.kind, gauge.where, gauge.reflections, frozenset(slots)
        case Rescale():
            return (
                gauge.kind,
                gauge.where,
                frozenset(gauge.plus),
                frozenset(gauge.minus),
                float(gauge.degree),
            )
        case _:
            return gauge.kind, gauge.where, gauge.parameters


def test_a_trace_finds_what_the_readers_of_our_models_do(config: GPTConfig) -> None:
    model = make_model(config)
    found = gauges_of_trace(traced(model, (batch(config, 0)[:1, :4],)))
    assert set(map(comparable, found)) == set(map(comparable, find_gauges(model)))
    hidden = hidden_matrices.dispatch(nn.Module)(model, inputs=(batch(config, 0)[:1, :4],))
    assert sorted(m.parameter for m in hidden) == sorted(
        m.parameter for m in hidden_matrices(model)
    )


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_trace_finds_the_chain_of_the_deep_mlp(per_layer: bool) -> None:
    model = DeepMLP(DeepMLPConfig(depth=4, width=8), 7, 7)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    found = gauges_of_trace(traced(model, (pairs,)), per_layer)
    ours = find_gauges(model, per_layer)
    assert {(g.kind, g.parameters) for g in found} == {(g.kind, g.parameters) for g in ours}
    assert any(isinstance(gauge, Chain) for gauge in found) == per_layer


def step(model: nn.Module, inputs, targets: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(logits(model, inputs).flatten(0, -2), targets.flatten()).backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("make_optimizer", [DDCAdam, DDCMuon])
@pytest.mark.parametrize("name", ZOO)
def test_equivariance_on_every_model(name: str, make_optimizer) -> None:
    model, inputs = make(name)
    gauges, hidden = find_gauges(model, inputs=inputs), hidden_matrices(model, inputs=inputs)
    shape = logits(model, inputs).shape
    targets = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(0))
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(1))
    muon = {"lr": 0.02, "adam_lr": 3e-3, "orthogonalizer": "polar"}
    optimizers = [
        (
            DDCMuon(each.named_parameters(), gauges, hidden, weight_decay=0.1, **muon)
            if make_optimizer is DDCMuon
            else DDCAdam(each.named_parameters(), gauges, lr=3e-3, weight_decay=0.1)
        )
        for each in copies
    ]
    for _ in range(50):
        for each, optimizer in zip(copies, optimizers, strict=True):
            step(each, inputs, targets, optimizer)
    with torch.no_grad():
        a, b = (logits(each, inputs).log_softmax(-1) for each in copies)
        moved = (a - logits(model, inputs).log_softmax(-1)).abs().max()
    # behind a QK-norm, gradients of queries have singular values of the size of rounding errors, of
    # which the polar factor makes ones: a start moved by 1e-15 instead of by the group ends as far
    # away
    bound = 1e-5 if name == "Qwen3" and make_optimizer is DDCMuon else 1e-7
    if name == "Gemma 2":  # its norms and softmax are in float32, and differ by 1e-7 at the start
        bound = 1e-4
    assert (a - b).abs().max() < bound
    assert moved > 1e-2


class Twice(nn.Module):
    """One weight read by two norms' outputs; a soft-capped head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(6), nn.LayerNorm(6)
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.norm(x)) + self.shared(self.other(x))
        return 5 * torch.tanh(self.head(x) / 5)


def test_what_is_shared_or_capped_is_refused() -> None:
    gauges = find_gauges(Twice(), inputs=(torch.randn(3, 6),))
    assert len(gauges) == 0
    reasons = {r.where: r.reason for r in gauges.refused}
    assert "used more than once" in reasons["norm"]
    assert "used more than once" in reasons["other"]
    assert "not a linear map" in reasons["output"]


def test_dropout_on_heads_breaks_their_rotation_alone() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
            return self.out(self.drop(y.transpose(1, 2).flatten(2)))

    gauges = find_gauges(Attention(), inputs=(torch.randn(2, 3, 8),))
    assert {gauge.kind for gauge in gauges} == {"qk_rotation", "logit_shift"}
    assert any("as it is" in r.reason for r in gauges.refused if r.kind == "value_rotation")


def test_an_unknown_model_needs_an_example() -> None:
    with pytest.raises(ValueError, match=r"pass an example, find_gauges\(model, inputs=\(x,\)\)"):
        find_gauges(Twice())
    with pytest.raises(ValueError, match="cannot be traced"):
        find_gauges(Twice(), inputs=(torch.randn(3, 5),))


def test_tracing_leaves_the_model_as_it_was() -> None:
    model, inputs = make("Llama")
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    find_gauges(model, inputs=inputs)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_llama_heads_share_their_group() -> None:
    """Four query heads on two key-value heads of width 8: planes pair entry i with i + 4."""
    model, inputs = make("Llama")
    gauges = find_gauges(model, inputs=inputs)
    planes = next(gauge for gauge in gauges if gauge.kind == "qk_rotation")
    query, key = planes.slots
    assert not planes.reflections
    assert key.indices[:, 0].tolist()[:4] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert query.indices[0].tolist() == [[0, 4], [8, 12]]
    assert TOKENS.shape[1] >= 3  # three positions tell planes from what is not turned


def test_the_shim_is_for_machines_that_need_it() -> None:
    """In a fresh process: torchvision imports after it; where its library loads, nothing is
    declared.
    """
    code = (
        "from ddc.compatibility import provide_torchvision_operators as p; print(p()); import"
        " torchvision, timm"
    )
    root = Path(__file__).resolve().parents[1]
    here = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert here.stdout.strip() == str(torch.version.cuda is None)
    loads = (
        "import ddc.compatibility as c; c._loads = lambda path: True;"
        " print(c.provide_torchvision_operators())"
    )
    there = subprocess.run(
        [sys.executable, "-c", loads], cwd=root, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == "False"
