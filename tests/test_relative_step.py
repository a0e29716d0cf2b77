"""How long the steps of matrices are: measured in any run, and set in AdamW's."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddc.gauges import GaugeSet, named_parameters
from ddc.models import GPTConfig
from ddc.optim.factory import make_optimizer
from ddc.optim.relative_step import RelativeAdamW, copied_matrices, relative_steps
from ddc.training.loop import train
from ddc.training.records import Records, Row
from tests.conftest import MODELS
from tests.helpers import backward, make_model
from tests.test_training import run

SHORT = ("training.schedule=constant", "training.warmup=0.0")


def rows_of(folder: Path) -> list[Row]:
    return Records(folder / "records.jsonl").read()


@pytest.mark.parametrize("angle", [1e-9, 1e-3, 1.0, 3.0])
def test_length_and_angle_of_a_turn(angle: float) -> None:
    """A turn with a growth, both known: the length by the law of cosines."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 2, dtype=torch.float64)).Q.mT.reshape(2, 3, 4)
    growth = 1.25 if angle > 1e-6 else 1.0
    start = {"w": 7.0 * basis[0], "v": torch.ones(3), "zero": torch.zeros(2, 2)}
    turned = 7.0 * growth * (math.cos(angle) * basis[0] + math.sin(angle) * basis[1])
    found = relative_steps(copied_matrices(start), {**start, "w": turned})
    length = math.hypot(growth * math.cos(angle) - 1, growth * math.sin(angle))
    assert found["relative"] == {"w": pytest.approx(length, rel=1e-6), "zero": None}
    assert found["angle"] == {"w": pytest.approx(angle, rel=1e-6), "zero": None}


def relative_adamw(model: nn.Module, **options: Any) -> RelativeAdamW:
    options = {
        "lr": 0.02,
        "adam_lr": 1e-3,
        "steps": {},
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        **options,
    }
    optimizer = make_optimizer("adamw_relative", model, GaugeSet(), 0.1, **options)
    assert isinstance(optimizer, RelativeAdamW)
    return optimizer


def test_steps_have_the_given_lengths_and_the_direction_of_adamw(config: GPTConfig) -> None:
    """Against AdamW written down, step by step."""
    model = make_model(config)
    ours = relative_adamw(model)
    moments = {
        name: (torch.zeros_like(p), torch.zeros_like(p))
        for name, p in named_parameters(model).items()
    }
    for step in range(1, 4):
        backward(model, step)
        before = {name: p.detach().clone() for name, p in named_parameters(model).items()}
        ours.step()
        steps = relative_steps(copied_matrices(before), named_parameters(model))["relative"]
        assert list(steps.values()) == pytest.approx([0.02] * len(steps), rel=1e-12)
        for name, p in named_parameters(model).items():
            m, v = moments[name]
            m.lerp_(p.grad, 0.1)
            v.lerp_(p.grad.square(), 0.01)
            u = m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
            if p.ndim > 1:
                u = u + 0.1 * before[name]
                u = u * 0.02 * before[name].norm() / u.norm()
            else:
                u = 1e-3 * u
            torch.testing.assert_close(p.detach(), before[name] - u, rtol=1e-10, atol=1e-12)


def test_matrices_without_gradient_and_matrices_that_are_zero_stay() -> None:
    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.zero_()
    optimizer = relative_adamw(model)
    backward(model, 0)
    model.head.weight.grad = None
    head = model.head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.head.weight, head)
    assert not model.blocks[0].mlp.down.weight.any()
    assert all(p.isfinite().all() for p in model.parameters())


def test_state_survives_a_copy_and_a_state_dict() -> None:
    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    optimizer = relative_adamw(model)
    backward(model, 0)
    optimizer.step()
    twin = copy.deepcopy(model)
    restored = relative_adamw(twin)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pairs = [(model, optimizer), copy.deepcopy((model, optimizer)), (twin, restored)]
    for each, its in pairs:
        backward(each, 1)
        its.step()
    for other, _ in pairs[1:]:
        assert all(
            torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
        )


def test_records_have_the_steps_before_each_evaluation(tmp_path: Path) -> None:
    """Of every matrix; and looking at them changes nothing, for a run that looks once ends
    alike.
    """
    setup = run(tmp_path / "often", "optimizer=adamw_relative", "optimizer.lr=0.01", *SHORT)
    train(setup)
    rows = rows_of(setup.folder)
    assert rows[0]["matrix_step"] is None
    matrices = {name for name, p in named_parameters(setup.model).items() if p.ndim > 1}
    for row in rows[1:]:
        assert row["matrix_step"]["relative"] == {
            name: pytest.approx(0.01, rel=1e-4) for name in matrices
        }
        assert all(0 < angle < 0.0101 for angle in row["matrix_step"]["angle"].values())
    once = run(
        tmp_path / "once",
        "optimizer=adamw_relative",
        "optimizer.lr=0.01",
        "training.evaluations=1",
        *SHORT,
    )
    train(once)
    assert rows_of(once.folder)[-1] == rows[-1]


def test_steps_may_be_those_of_another_run(tmp_path: Path) -> None:
    first = run(tmp_path, "optimizer=ddcadam_paper", *SHORT)
    train(first)
    rows = rows_of(first.folder)
    options = ("optimizer=adamw_relative", f"optimizer.steps_of={first.folder}", *SHORT)
    second = run(tmp_path, *options, "optimizer.lr=0.5")
    train(second)
    for name, step in rows_of(second.folder)[-1]["matrix_step"]["relative"].items():
        median = statistics.median(row["matrix_step"]["relative"][name] for row in rows[1:])
        assert step == pytest.approx(0.5 * median, rel=1e-4)
    with pytest.raises(
        ValueError, match=r"optimizer\.steps_of: that run has no matrix blocks\.1\."
    ):
        run(tmp_path, *options, "model.layers=2")
    for row in rows:  # as older runs have it
        del row["matrix_step"]
    (first.folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError,
        match=r"Invalid optimizer\.steps_of=.*: expected the folder of a run that recorded",
    ):
        run(tmp_path, *options)


def test_matrices_of_constant_norm(config: GPTConfig) -> None:
    """AdamH against its formula, step by step: norms stay, embeddings and vectors take AdamW's
    step.
    """
    model = make_model(config)
    options = {"lr": 0.02, "adam_lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
    ours = make_optimizer("adamh", model, GaugeSet(), 0.1, **options)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    start = {name: p.detach().norm() for name, p in named_parameters(model).items()}
    moments = {
        name: (torch.zeros_like(p), torch.zeros_like(p))
        for name, p in named_parameters(model).items()
    }
    for step in range(1, 4):
        backward(model, step)
        before = {name: p.detach().clone() for name, p in named_parameters(model).items()}
        ours.step()
        for name, p in named_parameters(model).items():
            m, v = moments[name]
            m.lerp_(p.grad, 0.1)
            v.lerp_(p.grad.square(), 0.01)
            u = m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
            if p.ndim > 1 and id(p) not in tables:
                moved = before[name] - 0.02 * before[name].norm() * u / u.norm()
                wanted = moved * before[name].norm() / moved.norm()
                assert float(p.detach().norm() / start[name]) == pytest.approx(1, rel=1e-12)
            else:
                wanted = before[name] * (1 - 1e-4 * (p.ndim > 1)) - 1e-3 * u
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-10, atol=1e-12)


def test_a_zero_matrix_of_constant_norm_stays() -> None:
    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.zero_()
    options = {"lr": 0.02, "adam_lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
    optimizer = make_optimizer("adamh", model, GaugeSet(), 0.1, **options)
    backward(model, 0)
    model.head.weight.grad = None
    head = model.head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.head.weight, head)
    assert not model.blocks[0].mlp.down.weight.any()
    assert all(p.isfinite().all() for p in model.parameters())
