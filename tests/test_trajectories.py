"""Every optimizer and option goes where it went when tests/trajectories.json was made.

A restructuring of the optimizers must not change a step. So weights after 1, 3, 10 and 20 steps,
projected onto two fixed vectors, are compared with recorded ones, and so is the invariant norm of
the gradient. Weights and gradients are made of uniform numbers, which are the same to the last bit
on every machine; gradients depend on the weights, smoothly, and are those of no loss: where the
gradient of a loss is zero (along gauges, of key biases), Adam makes full steps of rounding error.

``python -m tests.test_trajectories`` makes the file anew, which is right only where a change of a
step is meant; ``python -m tests.test_trajectories NAME`` adds those that are not in it yet, of
optimizers whose name begins with NAME.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddc.gauges import GaugeSet, HiddenMatrix, find_gauges, hidden_matrices, in_blocks
from ddc.models import GPT, DeepMLP, DeepMLPConfig, ViTConfig, vision_transformer
from ddc.optim.factory import make_optimizer
from tests.conftest import MODELS
from tests.helpers import relu_mlp, relu_mlp_gauges

RECORDS = Path(__file__).with_name("trajectories.json")
STEPS, RECORDED = 20, (1, 3, 10, 20)
#: What a test may differ by, relative to the norm of all weights or to the gradient's.
TOLERANCE = 1e-12

ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
LIFT = {
    "radial_rate": 1.0,
    "vertical": "freeze",
    "step_scale": "init",
    "retract": True,
    "additive": False,
    "compiled": False,
}
OURS = {**ADAM, **LIFT}
PAPER = {**OURS, "step_scale": "norm", "retract": False, "additive": True}
MUON = {
    **ADAM,
    "lr": 0.02,
    "adam_lr": 0.01,
    "momentum": 0.9,
    "nesterov": True,
    "orthogonalizer": "newton_schulz",
}
MATRICES = {**OURS, **MUON}

#: Optimizer, its options, and the variants of them, by name. ``blocks``, ``per_head`` and
#: ``missing`` (gradients) are of this file.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", ADAM),
    "adamw_relative": ("adamw_relative", {**ADAM, "adam_lr": 0.02, "steps": {}}),
    "ddcadam": ("ddcadam", OURS),
    "ddcadam vertical=adam": ("ddcadam", {**OURS, "vertical": "adam"}),
    "ddcadam vertical=balance": ("ddcadam", {**OURS, "vertical": "balance", "radial_rate": 0.3}),
    "ddcadam step_scale=norm": ("ddcadam", {**OURS, "step_scale": "norm"}),
    "ddcadam retract=false": ("ddcadam", {**OURS, "retract": False}),
    "ddcadam radial_rate=0": ("ddcadam", {**OURS, "radial_rate": 0.0}),
    "ddcadam betas=0": ("ddcadam", {**OURS, "betas": (0.0, 0.5), "eps": 1e-3}),
    "ddcadam additive": ("ddcadam", {**OURS, "retract": False, "additive": True}),
    "ddcadam missing": ("ddcadam", {**OURS, "missing": True}),
    "ddcadam blocks": ("ddcadam", {**OURS, "blocks": True}),
    "ddcadam_paper": ("ddcadam_paper", {**PAPER, "blocks": True}),
    "ddcadam_paper vertical=adam": (
        "ddcadam_paper",
        {**PAPER, "vertical": "adam", "blocks": True},
    ),
    "ddcadam_paper vertical=balance": (
        "ddcadam_paper",
        {**PAPER, "vertical": "balance", "blocks": True},
    ),
    "muon": ("muon", {**MUON, "adjust_lr_fn": "original"}),
    "muon nesterov=false": (
        "muon",
        {**MUON, "adjust_lr_fn": "match_rms_adamw", "nesterov": False},
    ),
    "ddcmuon": ("ddcmuon", MATRICES),
    "ddcmuon vertical=adam": ("ddcmuon", {**MATRICES, "vertical": "adam"}),
    "ddcmuon vertical=balance": ("ddcmuon", {**MATRICES, "vertical": "balance"}),
    "ddcmuon per_head": ("ddcmuon", {**MATRICES, "per_head": True}),
    "ddcmuon polar": ("ddcmuon", {**MATRICES, "orthogonalizer": "polar", "nesterov": False}),
    "ddcmuon missing": ("ddcmuon", {**MATRICES, "missing": True}),
    "ddcmuon additive": (
        "ddcmuon",
        {**MATRICES, "step_scale": "norm", "retract": False, "additive": True},
    ),
    "ddclion": ("ddclion", {**LIFT, "lr": 0.001, "betas": (0.9, 0.99)}),
    "ddcsgd": ("ddcsgd", {**LIFT, "lr": 0.01, "momentum": 0.9, "nesterov": False}),
    "ddcshampoo": ("ddcshampoo", {**LIFT, "lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4}),
}


def deep_mlp(residual: bool = False) -> nn.Module:
    return DeepMLP(DeepMLPConfig(depth=4, width=12, residual=residual), 5, 5)


def vit() -> nn.Module:
    config = ViTConfig(patch=4, layers=1, width=16, heads=2, hidden=12)
    return vision_transformer(config, (1, 8, 8), classes=5)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    **{name: functools.partial(GPT, config, 20) for name, config in MODELS.items()},
    "deep-mlp": deep_mlp,
    "deep-mlp-per-layer": deep_mlp,
    "deep-mlp-residual": functools.partial(deep_mlp, residual=True),
    "relu-mlp": functools.partial(relu_mlp, depth=5, width=8),
    "vit": vit,
}


@functools.cache
def case(architecture: str) -> tuple[nn.Module, GaugeSet, dict[bool, list[HiddenMatrix]]]:
    """A model, its gauges, and its hidden matrices whole and by heads: found once, which takes
    longer than the steps.
    """
    model = ARCHITECTURES[architecture]().double()
    if architecture == "relu-mlp":  # known by hand
        hidden = [HiddenMatrix(f"{i}.weight") for i in (2, 4, 6)]
        return model, GaugeSet(tuple(relu_mlp_gauges(model))), {False: hidden, True: hidden}
    gauges = find_gauges(model, per_layer=architecture == "deep-mlp-per-layer")
    by_heads = isinstance(model, GPT)
    return (
        model,
        gauges,
        {per_head: hidden_matrices(model, per_head) for per_head in (False, by_heads)},
    )


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in [-1, 1): multiples of 2^-52, so that no machine rounds them."""
    return 2 * torch.rand(like.shape, generator=generator, dtype=torch.float64) - 1


def trajectory(architecture: str, variant: str) -> list[list[float]]:
    """Norm of all weights, two projections of them and the gradient's invariant norm (if the
    optimizer has one), at each of the recorded steps.
    """
    model, gauges, hidden = case(architecture)
    name, options = VARIANTS[variant][0], dict(VARIANTS[variant][1])
    blocks, missing = options.pop("blocks", False), options.pop("missing", False)
    per_head = options.pop("per_head", False)
    generator = torch.Generator().manual_seed(0)
    params = dict(model.named_parameters())
    for p in params.values():
        u = uniform(p, generator)
        p.data.copy_(u * math.sqrt(3 / p.shape[1]) if p.ndim > 1 else 1 + u / 2)
    projections = [[uniform(p, generator) for p in params.values()] for _ in range(2)]
    optimizer = make_optimizer(
        name,
        model,
        in_blocks(gauges) if blocks else gauges,
        weight_decay=0.1,
        hidden=hidden[per_head],
        **options,
    )
    rows = []
    for step in range(1, STEPS + 1):
        for i, (key, p) in enumerate(params.items()):
            p.grad = uniform(p, generator) + p.detach() / (1 + p.detach().square())
            if missing and step % 3 == 2 and (i == 0 or key.startswith("blocks.0.")):
                p.grad = None
        norm = grad_norm(optimizer) if step in RECORDED else 0.0
        optimizer.step()
        if step in RECORDED:
            weights = [p.detach() for p in params.values()]
            inner = [
                sum((w * each).sum() for w, each in zip(weights, along, strict=True))
                for along in (weights, *projections)
            ]
            rows.append([math.sqrt(inner[0]), *(float(x) for x in inner[1:]), norm])
    return rows


def grad_norm(optimizer: Optimizer) -> float:
    measure = getattr(optimizer, "grad_norm", None)
    return float(measure()) if measure else 0.0


def applies(architecture: str, variant: str) -> bool:
    """Only a GPT's hidden matrices have heads that are known."""
    return architecture in MODELS or "per_head" not in VARIANTS[variant][1]


def cases() -> Iterator[tuple[str, str]]:
    for architecture in ARCHITECTURES:
        for variant in VARIANTS:
            if applies(architecture, variant):
                yield architecture, variant


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[list[float]]]:
    return json.loads(RECORDS.read_text())


@pytest.mark.parametrize(("architecture", "variant"), list(cases()))
def test_it_goes_where_it_went(
    architecture: str, variant: str, recorded: dict[str, list[list[float]]]
) -> None:
    now = trajectory(architecture, variant)
    then = recorded[f"{architecture}: {variant}"]
    for step, (*weights, norm), (*weights_then, norm_then) in zip(RECORDED, now, then, strict=True):
        scale = weights_then[0]
        assert weights == pytest.approx(weights_then, rel=0, abs=TOLERANCE * scale), step
        assert norm == pytest.approx(norm_then, rel=TOLERANCE), step


def main(prefix: str | None) -> None:
    """Make the file of records, or add to it those of optimizers of this prefix."""
    records = {} if prefix is None else json.loads(RECORDS.read_text())
    for architecture, variant in cases():
        key = f"{architecture}: {variant}"
        if prefix is None or (key not in records and variant.startswith(prefix)):
            records[key] = trajectory(architecture, variant)
    lines = (f"{json.dumps(key)}: {json.dumps(rows)}" for key, rows in records.items())
    RECORDS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1] if len(sys.argv) > 1 else None)
