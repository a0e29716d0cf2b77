"""Cells at sites that a gauge can blur: what balancing does to them, and the report."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddc.gauges import find_gauges
from ddc.models import GPTConfig
from ddc.report.claims import load_claims
from ddc.slt.observables import Layer, categorical_score, fisher_block, gaussian_score
from ddc.slt.sample_gradients import sample_gradient_spectra, smallest_positive
from ddc.training.loop import train
from experiments.blurred import read, report
from experiments.blurred.plan import SETTINGS
from experiments.protocols import EXPERIMENTS
from tests.helpers import make_model
from tests.test_observables import probe
from tests.test_training import run


def numbers(row: dict[str, Any], moved: set[tuple[str, str]] | None = None) -> torch.Tensor:
    """Logarithms of all observables of a reading, or of the moved ones."""
    found = []
    for layer in row["layers"]:
        for name, value in layer["values"].items():
            if moved is None or (layer["layer"], name) in moved:
                found.append(value if name.endswith("volume") else torch.tensor(value).log())
    return torch.tensor(found, dtype=torch.float64)


def test_balanced_readings_are_functions_of_the_orbit(config: GPTConfig) -> None:
    """A random element of all gauges moves the raw cells and leaves the balanced ones."""
    model = make_model(config)
    gauges, batches = find_gauges(model), probe(config)
    twin = copy.deepcopy(model)
    gauges.transform_(twin, torch.Generator().manual_seed(3))
    moved = read.moved_cells(copy.deepcopy(twin), gauges, batches)
    here, there = (read.read_both(each, gauges, batches) for each in (model, twin))
    assert moved
    change = (numbers(here["raw"], moved) - numbers(there["raw"], moved)).abs()
    assert change.max() > 0.1
    torch.testing.assert_close(
        numbers(here["balanced"]), numbers(there["balanced"]), atol=1e-6, rtol=0, equal_nan=True
    )
    for name, (value, rank) in here["balanced"]["grams"].items():
        assert there["balanced"]["grams"][name] == (pytest.approx(value, rel=1e-6), rank)


def test_which_cells_gauges_move() -> None:
    """Norms and hidden units; of values nothing, since rotations change no eigenvalue."""
    config = GPTConfig(context=8, layers=1, width=16, heads=2, hidden=24)
    model = make_model(config)
    moved = read.moved_cells(model, find_gauges(model), probe(config))
    layers = {layer for layer, observable in moved if observable != "gram_min"}
    assert layers == {
        "blocks.0.attention_norm", "blocks.0.mlp_norm", "blocks.0.mlp.up", "blocks.0.mlp.down",
        "norm",
    }  # fmt: skip
    assert ("blocks.0.mlp.down", "gradient_lambda_min") not in moved  # after the rescale's readers


def test_gram_matrix_against_the_fisher_block() -> None:
    """Its eigenvalues other than zero are those of the exact block, one sample a row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    model.double()
    x, y = torch.randn(6, 1, 3, dtype=torch.float64), torch.zeros(6, 1, 2)
    layers = [Layer("first", "0", reads="input"), Layer("second", "2", reads="input")]
    score = gaussian_score(5)
    signs = score(model(x).detach(), y, 0)
    for layer, found in zip(
        layers, sample_gradient_spectra(model, layers, [(x, y)], score), strict=True
    ):
        exact = fisher_block(
            model, [f"{layer.module}.weight"], x, signs, lambda out, sign: (out * sign).sum()
        )
        expected = torch.linalg.eigvalsh(exact)[-found.rank :]
        torch.testing.assert_close(found.values[found.values > 0], expected, rtol=1e-8, atol=0)
        assert smallest_positive(found) == pytest.approx(float(expected[0]), rel=1e-8)


def test_gram_matrix_refuses_what_is_no_linear_map() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    for layer in (Layer("tanh", "1", reads="input"), Layer("output", "0")):
        with pytest.raises(ValueError, match=f"layer {layer.name}: expected a linear map"):
            sample_gradient_spectra(model, [layer], [], categorical_score(0))


@pytest.mark.slow
def test_a_real_run_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, read, collect: the record has both readings, and the loss is the same in both."""
    setup = run(tmp_path, "+experiment=blurred", "optimizer=ddcadam")
    train(setup)
    found = read.read_run(setup.folder)
    (setup.folder / read.FILE).write_text(json.dumps(found))
    raw, balanced = found["raw"], found["balanced"]
    assert raw["loss"] == pytest.approx(balanced["loss"], abs=1e-9)
    assert len(raw["cells"]) == len(balanced["cells"]) > 20
    assert any(c["moved"] for c in raw["cells"])
    assert len(raw["walks"]) == read.WALKS
    with pytest.raises(FileNotFoundError, match="train with slt=cells"):
        read.read_run(plain_run(tmp_path))


def plain_run(tmp_path: Path) -> Path:
    """One without snapshots."""
    setup = run(tmp_path, "+experiment=blurred", "optimizer=adamw", "slt=none")
    train(setup)
    return setup.folder


def made_up(raw: tuple[int, int], balanced: tuple[int, int], seed: int) -> list[dict[str, Any]]:
    """Records of AdamW and DDCAdam with so many of twelve cells read, and a few by chance."""

    def reading(count: int) -> dict[str, Any]:
        cells = [
            {"layer": "norm", "observable": f"o{i}", "moved": True,
             "verdict": "read" if i < count else "noise"}
            for i in range(12)
        ]  # fmt: skip
        return {"cells": cells, "grams": [], "loss": [1.0], "walks": [0, 1, 2]}

    about = {"commit": "c", "seconds": 1.0}
    return [
        {
            "stages": {"runs": setting}, "seed": seed, "diverged": False, **about,
            "config": {"optimizer": {"name": name}},
            "read": {
                "raw": reading(a + noise[seed]), "balanced": reading(b + noise[seed - 1]), **about
            },
        }
        for name, setting, a, b, noise in zip(
            report.OPTIMIZERS, SETTINGS, raw, balanced, ((0, 1, 2, 0, 1), (1, 0, 0, 2, 1)),
            strict=True,
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "balanced", "expected"),
    [
        ((2, 7), (7, 7), "reproduced"),
        ((2, 7), (2, 7), "direction only"),
        ((5, 5), (5, 5), "not reproduced"),
        ((7, 2), (7, 7), "not reproduced"),
    ],
)
def test_verdict(
    raw: tuple[int, int], balanced: tuple[int, int], expected: str, tmp_path: Path
) -> None:
    records = [each for seed in range(5) for each in made_up(raw, balanced, seed)]
    (found,) = report.verdicts(records, load_claims(EXPERIMENTS))
    assert found.verdict == expected
    assert "cells that gauges move" in report.markdown(records, load_claims(EXPERIMENTS))
    assert all(path.stat().st_size > 1000 for path in report.plot(records, tmp_path / "cells"))


def test_missing_runs_are_not_tested() -> None:
    (found,) = report.verdicts([], load_claims(EXPERIMENTS))
    assert found.verdict == "not tested"
