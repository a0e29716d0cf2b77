"""Curvature by products with the Hessian, and what the question on minima makes of it."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddc.gauges import balance_, find_gauges, named_parameters
from ddc.models import GPT, GPTConfig, cross_entropy
from ddc.report.claims import load_claims
from ddc.slt.learning_coefficient import Params, module_loss
from ddc.slt.sharpness import hessian, largest_eigenvalue, trace
from ddc.training.compose import compose_alike, compose_config
from ddc.training.loop import train
from ddc.training.setup import prepare
from experiments.geometry import at_the_end, report
from experiments.geometry.plan import EXPERIMENT, FILE, SEEDS
from experiments.past_fit.settings import ADAMW, AUTHOR, DDCADAM
from experiments.protocols import EXPERIMENTS

TOKENS = torch.arange(24).view(4, 6) * 5 % 11


def small() -> tuple[GPT, Params]:
    torch.manual_seed(0)
    config = GPTConfig(context=6, layers=1, width=8, heads=2, kv_heads=1, hidden=6)
    model = GPT(config, 11).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, {name: p.detach().clone() for name, p in named_parameters(model).items()}


def flat(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def whole_hessian(model: GPT, params: Params) -> Tensor:
    """Every entry, by torch alone, of the loss as a function of one vector."""
    sizes = [p.numel() for p in params.values()]

    def loss(vector: Tensor) -> Tensor:
        parts = zip(params.items(), vector.split(sizes), strict=True)
        named = {name: part.view(p.shape) for (name, p), part in parts}
        logits = torch.func.functional_call(model, named, (TOKENS,))
        return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat(params))


def test_eigenvalue_and_trace_are_those_of_the_whole_hessian() -> None:
    model, params = small()
    product = hessian(module_loss(model, cross_entropy), params, TOKENS, TOKENS)
    matrix = whole_hessian(model, params)
    vector = torch.randn(len(matrix), dtype=torch.float64)
    assert torch.allclose(product(vector), matrix @ vector, rtol=0, atol=1e-12)
    wanted = float(torch.linalg.eigvalsh(matrix)[-1])
    for tolerance in (1e-3, 1e-8):
        found = largest_eigenvalue(product, vector, tolerance)
        assert found.value == pytest.approx(wanted, rel=tolerance)
        assert found.residual <= tolerance * found.value
        assert found.products < len(matrix)
    estimated = trace(product, vector, 400)
    assert abs(estimated.value - float(matrix.trace())) < 4 * estimated.standard_error
    off = (matrix - torch.diag(matrix.diagonal())).square().sum()
    assert estimated.standard_error == pytest.approx(math.sqrt(2 * float(off) / 400), rel=0.2)


def test_the_largest_is_found_among_negative_and_repeated_ones() -> None:
    torch.manual_seed(1)
    for values in ([-5.0, -1, 0, 2, 2, 2], [-3.0, -2, -1], [0.0, 0, 0, 7], [4.0]):
        basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
        matrix = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
        found = largest_eigenvalue(lambda v, m=matrix: m @ v, matrix[0], 1e-10)  # type: ignore[misc]
        assert found.value == pytest.approx(max(values), abs=1e-9)


def test_what_does_not_converge_is_said() -> None:
    values = torch.linspace(1, 1.001, 300, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="after 3 products"):
        largest_eigenvalue(lambda v: values * v, values, 1e-9, most=3)
    with pytest.raises(ValueError, match="two at least"):
        trace(lambda v: v, values, 1)
    with pytest.raises(ValueError, match="the loss there is nan"):
        hessian(lambda p: p["w"].log().sum(), {"w": torch.tensor([-1.0])})


def test_sharpness_depends_on_the_gauge_and_at_the_balanced_point_not() -> None:
    model, params = small()
    moved = copy.deepcopy(model)
    find_gauges(model).transform_(moved, torch.Generator().manual_seed(0))
    elsewhere = {name: p.detach().clone() for name, p in named_parameters(moved).items()}
    loss = module_loss(model, cross_entropy)

    def largest(point: Params) -> float:
        return largest_eigenvalue(hessian(loss, point, TOKENS, TOKENS), flat(point), 1e-9).value

    assert abs(largest(params) / largest(elsewhere) - 1) > 0.1
    for kinds in ("paper", "complete"):
        gauges = find_gauges(model, kinds=kinds)
        here, there = (at_the_end.balanced(each, gauges) for each in (params, elsewhere))
        assert largest(here) == pytest.approx(largest(there), rel=1e-7)
        if kinds == "paper":
            first, second = (float(whole_hessian(model, each).trace()) for each in (here, there))
            assert first == pytest.approx(second, rel=1e-7)


def test_balancing_does_not_change_what_it_is_given() -> None:
    model, params = small()
    before = flat(params)
    at_the_end.balanced(params, find_gauges(model))
    assert torch.equal(flat(params), before)
    assert torch.equal(flat(named_parameters(model)), before)
    balance_(params, find_gauges(model))
    assert not torch.equal(flat(params), before)


def record_of(name: str, seed: int, **changes: float) -> dict[str, Any]:
    """A made-up record; ``changes`` are added to what all have."""
    noise = 0.01 * (seed * len(name) % 7)
    numbers = {"raw": 20.0, "balanced": 18.0, "coarse": 900.0, "fine": 850.0}
    for key, change in changes.items():
        numbers[key] += change
    part = {"seconds": 1.0, "commit": "0" * 40}

    def curved(value: float) -> dict[str, Any]:
        top = {"value": value + noise, "residual": 0.01, "products": 9}
        whole = {"value": 70 * value, "standard_error": 10.0}
        return {**part, "loss": 0.1, "norm": 9.0, "eigenvalue": top, "trace": whole}

    def sampled(value: float, step: float) -> dict[str, Any]:
        state = {"r_hat": 1.02, "ess": 90.0, "step_size": step, "bias": 0.03, "n_beta": 485.0}
        value += noise
        return {
            **part,
            **state,
            "value": value,
            "low": value - 20,
            "high": value + 20,
            "gamma": 1e3,
        }

    geometry = {key: curved(numbers[key]) for key in ("raw", "balanced")}
    geometry |= {"balanced_all": curved(numbers["balanced"] - 3)}
    geometry |= {"coarse": sampled(numbers["coarse"], 4e-5), "fine": sampled(numbers["fine"], 2e-5)}
    setting = next(s for s, _ in EXPERIMENT.plan("runs", None) if f"optimizer={name} " in f"{s} ")
    config = {"optimizer": {"name": name}}
    return {
        "id": f"{name}{seed}", "seed": seed, "stages": {"runs": setting}, "config": config,
        "commit": "1" * 40, "seconds": 9.0, "diverged": False, "geometry": geometry,
    }  # fmt: skip


def records_of(**changes: float) -> list[dict[str, Any]]:
    """All runs, with the given changes under DDCAdam and the author's step."""
    return [
        record_of(name, seed, **({} if name == ADAMW else changes))
        for seed in SEEDS
        for name in (ADAMW, DDCADAM, AUTHOR)
    ]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"raw": 3, "balanced": 2, "coarse": -90, "fine": -80}, ("reproduced", "reproduced")),
        ({"raw": 3, "balanced": 0, "coarse": -90}, ("direction only", "direction only")),
        ({"raw": 3, "balanced": -2, "coarse": -90, "fine": 90}, ("not reproduced",) * 2),
        ({"raw": -3, "balanced": -2, "coarse": 9, "fine": 9}, ("not reproduced",) * 2),
    ],
)
def test_verdicts_follow_the_rule(changes: dict[str, float], wanted: tuple[str, str]) -> None:
    claims = load_claims(EXPERIMENTS)
    found = report.verdicts(records_of(**changes), claims)
    assert [(v.claim, v.verdict) for v in found] == [
        (claim, word) for claim, word in zip(("C9", "C9b"), wanted, strict=True) for _ in range(2)
    ]
    assert {v.protocol for v in found} == {*claims["C9"].fixed} == {*claims["C9b"].fixed}


def test_a_part_of_the_runs_is_said_and_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    claims = load_claims(EXPERIMENTS)
    for records in ([], records_of()[:4], records_of()):
        monkeypatch.setitem(vars(EXPERIMENT), "records", records)
        (made,) = report.results(report.load(), claims)
        text = made.tables["table"]()
        whole = len(records) == 15
        assert ("**Not complete.**" in text) != whole
        assert ("**not tested**" in text) != whole
        for name, drawing in made.figures.items():
            assert all(path.stat().st_size > 10_000 for path in drawing.plot(tmp_path / name))
    assert "the two step sizes disagree in 10 of 10 runs" in text  # 900 ± 20 and 850 ± 20


def test_runs_are_those_of_past_fit() -> None:
    plan = EXPERIMENT.plan("runs", None)
    assert len(plan) == 15
    configs = [compose_alike(["+experiment=past_fit", *s.split()]) for s, _ in plan[:3]]
    assert [each.optimizer.name for each in configs] == [ADAMW, DDCADAM, AUTHOR]
    assert {(c.optimizer.lr, c.optimizer.weight_decay, c.name) for c in configs} == {
        (1e-3, 0.1, "past_fit")
    }
    recorded = (EXPERIMENTS.parent / "results/past_fit/runs.jsonl").read_text()
    assert all(f'"{each.run_id}"' in recorded for each in configs)


def test_a_run_is_measured_part_by_part_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        "+experiment=past_fit", "optimizer=adamw", "training.steps=2", "training.evaluations=1",
        "training.batch_size=2", "training.evaluation_batches=1", "wandb=disabled",
        f"runs={tmp_path}", "model.layers=1", "model.width=16", "model.hidden=8", "model.context=8",
        "data.train_tokens=200",
    ]  # fmt: skip
    train(prepare(compose_config(overrides)))
    (folder,) = (tmp_path / "past_fit").iterdir()
    short = {"chains": 2, "draws": 4, "burn_in": 2, "step_size": 1e-5}
    for name in ("COARSE", "FINE"):
        monkeypatch.setattr(at_the_end, name, at_the_end.Settings(**short))
    at_the_end.measure(folder)
    found = json.loads((folder / FILE).read_text())
    assert [*found] == ["raw", "balanced", "balanced_all", "coarse", "fine"]
    assert len({round(found[point]["loss"], 9) for point in report.POINTS}) == 1
    assert found["balanced_all"]["norm"] <= found["balanced"]["norm"] <= found["raw"]["norm"]
    assert all(part["seconds"] > 0 and part["versions"] for part in found.values())

    del found["fine"]
    found["raw"]["loss"] = 7.0  # shows that it is not measured again
    (folder / FILE).write_text(json.dumps(found))
    at_the_end.measure(folder)
    again = json.loads((folder / FILE).read_text())
    assert again["raw"]["loss"] == 7.0
    assert "fine" in again

    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match="has not ended"):
        at_the_end.measure(folder)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        at_the_end.measure(tmp_path / "nothing")
