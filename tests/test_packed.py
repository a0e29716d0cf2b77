"""Packed and stacked weights: gauges of parts of a parameter, of experts, of 1 + a parameter; and
optimizers under them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddc.compatibility import provide_torchvision_operators

provide_torchvision_operators()

import transformers  # noqa: E402

from ddc import DDCAdam, DDCMuon, audit, check, find_gauges, hidden_matrices  # noqa: E402
from ddc.gauges import Axis, GaugeSet, Rescale, named_parameters  # noqa: E402
from ddc.gauges.double import InDouble  # noqa: E402
from ddc.gauges.verify import generic  # noqa: E402

transformers.logging.set_verbosity_error()
VOCABULARY = 37
TOKENS = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def text(name: str, config: str | None = None, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = getattr(transformers, config or f"{name}Config")(**(SIZES | options))
        return getattr(transformers, f"{name}ForCausalLM")(made)

    return make


EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Phi-3": text("Phi3", pad_token_id=0),
    "Mixtral": text("Mixtral", num_local_experts=3),
    "Qwen2-MoE": text("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=10),
    "Gemma": text("Gemma", head_dim=4),
}


def make(name: str) -> nn.Module:
    """A model in float64 at generic weights."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    if hasattr(model, "set_experts_implementation"):  # grouped products know no float64
        model.set_experts_implementation("batched_mm")
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = generic(p.detach(), generator)
    return model


def log_probs(model: nn.Module) -> Tensor:
    with InDouble():  # norms of transformers are in float32
        return F.log_softmax(model(input_ids=TOKENS, use_cache=False).logits, -1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    targets = torch.randint(VOCABULARY, TOKENS.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    F.nll_loss(log_probs(model).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()


def found(name: str) -> tuple[nn.Module, GaugeSet]:
    model = make(name)
    return model, find_gauges(model, inputs={"input_ids": TOKENS})


@pytest.mark.parametrize("name", MODELS)
def test_every_gauge_is_a_symmetry(name: str) -> None:
    model, gauges = found(name)
    assert {"gated_rescale", "norm_scale"} <= {gauge.kind for gauge in gauges}
    assert not [r for r in gauges.refused if r.kind in ("gated_rescale", "norm_scale")]
    assert max(check(model, gauges, log_probs, spread=0.7).values()) < 1e-12
    F.nll_loss(log_probs(model).flatten(0, 1), TOKENS.flatten()).backward()
    assert max(audit(model, gauges).values()) < 1e-8


OPTIMIZERS: dict[str, Callable[[nn.Module, GaugeSet], torch.optim.Optimizer]] = {
    "DDCAdam": lambda model, gauges: DDCAdam(
        model.named_parameters(), gauges, lr=3e-3, weight_decay=0.1
    ),
    "DDCMuon": lambda model, gauges: DDCMuon(
        model.named_parameters(),
        gauges,
        hidden_matrices(model, inputs={"input_ids": TOKENS}),
        lr=0.02,
        adam_lr=3e-3,
        weight_decay=0.1,
        orthogonalizer="polar",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_stays_on_the_orbit(name: str, optimizer: str) -> None:
    model, gauges = found(name)
    copies = [model, copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(1), spread=0.7)
    start = log_probs(model).detach()
    assert (log_probs(copies[1]) - start).abs().max() < 1e-12
    optimizers = [OPTIMIZERS[optimizer](each, gauges) for each in copies]
    for i in range(100):
        for each, its in zip(copies, optimizers, strict=True):
            step(each, its, seed=i % 4)
    a, b = (log_probs(each).detach() for each in copies)
    assert (a - b).abs().max() < 1e-7
    assert (a - start).abs().max() > 1e-2
