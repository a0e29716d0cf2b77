"""A small pretrained Llama, adapters of peft on all its linear maps, and the starts of these."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from ddc.compatibility import provide_torchvision_operators
from ddc.data import TextData
from ddc.data.order import hash_seed
from ddc.gauges import GaugeSet, find_gauges
from ddc.gauges.base import Params
from experiments.adapters.settings import BATCH, CONDITION, CONTEXT, GENERAL, SCALES, STANDARD, Case
from experiments.texts import HALF, half, shifted

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
PRETRAINING = {"steps": 1000, "batch": 8, "lr": 3e-3}
#: An adapter that somebody has trained a little.
WARMING = {"steps": 20, "lr": 1e-3}
#: Batches, and examples of each.
EVALUATION = (8, 32)


@cache
def text(second: bool) -> TextData:
    """The half of the training text that the base learns, or the second, which adapters learn
    shifted.
    """
    return half(second, CONTEXT)


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats a byte."""
    return F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), targets.flatten())


def untrained(seed: int) -> nn.Module:
    """The base before anything."""
    provide_torchvision_operators()  # before transformers, beside a torch without CUDA
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=text(False).vocab_size, **SIZES))


def base_of(seed: int, folder: Path) -> nn.Module:
    """The pretrained base of a seed, from a folder, or trained and left there."""
    made_by = hashlib.sha256(json.dumps([SIZES, PRETRAINING, HALF]).encode()).hexdigest()[:8]
    model, path = untrained(seed), folder / f"base-seed{seed}-{made_by}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    steps, batch, lr = (PRETRAINING[key] for key in ("steps", "batch", "lr"))
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=int(steps) + 1)
    for step in range(int(steps)):
        optimizer.zero_grad()
        loss_of(model, *text(False).batch(step, int(batch), seed)).backward()
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")  # another process may make the same
    torch.save(model.state_dict(), temporary)
    temporary.replace(path)
    return model


@dataclass(frozen=True, eq=False)
class Adapted:
    """A base with adapters, and where these start.

    Attributes:
        model: of peft; its adapters are what trains.
        gauges: A -> G A, B -> B G⁻¹ of each.
        start: the adapters' weights, by name.
    """

    model: nn.Module
    gauges: GaugeSet
    start: Params

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The adapters' weights, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A and B of each adapter."""
        trained = self.trained
        return [
            (p, trained[name.replace("lora_A", "lora_B")])
            for name, p in trained.items()
            if "lora_A" in name
        ]

    @torch.no_grad()
    def begin(self, start: str, seed: int) -> None:
        """Set the adapters to one of the starts; the moved ones compute what the standard one does,
        as far as the weights' dtype goes.
        """
        moved = moved_to(self.start, self.gauges, start, seed)
        for name, p in self.trained.items():
            p.copy_(moved[name])


def moved_to(weights: Params, gauges: GaugeSet, start: str, seed: int) -> Params:
    """Adapters at a start, in float64: A times c and B over c, or a random G for each."""
    moved = {name: p.detach().double().clone() for name, p in weights.items()}
    generator = torch.Generator().manual_seed(hash_seed(seed, 1))
    for gauge in gauges if start != STANDARD else ():
        units, k = gauge.shape  # type: ignore[attr-defined]
        one = torch.eye(k, dtype=torch.float64).expand(units, k, k)
        element = general(units, k, generator) if start == GENERAL else SCALES[start] * one
        first = gauge.plus[0].parameter  # type: ignore[attr-defined]
        gauge.act_(moved, element if "lora_A" in first else torch.linalg.inv(element).mT)
    return moved


def general(units: int, k: int, generator: torch.Generator) -> Tensor:
    """Random maps, (units, k, k), whose singular values run from the root of their condition number
    down to its inverse.
    """
    turns = torch.randn(2, units, k, k, generator=generator, dtype=torch.float64)
    u, v = torch.linalg.qr(turns).Q
    end = math.log10(CONDITION) / 2
    return u * torch.logspace(end, -end, k, dtype=torch.float64) @ v.mT


@lru_cache(maxsize=1)
def adapted(case: Case, seed: int, folder: Path) -> Adapted:
    """The base of a seed with adapters at their standard start."""
    base = base_of(seed, folder)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    options = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear")
    model = get_peft_model(base, options)
    found = Adapted(model, find_gauges(model, kinds=["factor_map"]), {})
    if case.warm:
        optimizer = AdamW(found.trained.values(), lr=WARMING["lr"], weight_decay=0.0)
        for step in range(int(WARMING["steps"])):
            optimizer.zero_grad()
            loss_of(model, *batch(step, hash_seed(seed, 2))).backward()
            optimizer.step()
    start = {name: p.detach().clone() for name, p in found.trained.items()}
    return replace(found, start=start)


def batch(step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of the text that adapters learn."""
    tokens, targets = text(True).batch(step, BATCH, seed)
    return shifted(tokens), shifted(targets)


@torch.no_grad()
def validation_loss(model: nn.Module) -> float:
    """Of the text that adapters learn, in nats a byte."""
    batches = text(True).evaluation_batches("validation", *EVALUATION)
    losses = [float(loss_of(model, shifted(x), shifted(y))) for x, y in batches]
    return sum(losses) / len(losses)
