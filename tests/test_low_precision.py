"""Claim W5: what is run, what is read from it, and by which rule it is decided."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ddc.gauges import find_gauges, named_parameters
from ddc.models import GPTConfig
from ddc.report.claims import load_claims
from ddc.training.compose import compose_alike
from experiments import own
from experiments.low_precision import measure, plan, report
from experiments.protocols import EXPERIMENTS
from experiments.regauged.starts import difference
from tests.helpers import make_model

CLAIM = load_claims(EXPERIMENTS)
Record = dict[str, Any]


def record_of(setting: str, seed: int, stage: str) -> Record:
    """The record of a run that was never made, with the best rate that any optimizer has at 0.01
    or 0.03.
    """
    pairs = dict(each.split("=", 1) for each in setting.split())
    lr = float(pairs["optimizer.lr"])
    return {
        "id": f"{setting} {seed}",
        "seed": seed,
        "stages": {stage: setting},
        "config": {
            "optimizer": {
                "name": pairs["optimizer"],
                "lr": lr,
                "canonicalise": pairs.get("optimizer.canonicalise"),
            },
            "training": {
                "weights": pairs.get("training.weights", "float32"),
                "steps": 300,
                "batch_size": 8,
            },
            "data": {"train_tokens": 40960},
            "model": {"context": 64},
            "start": {"weights": None, "spread": float(pairs.get("start.spread", 0))},
        },
        "commit": "0" * 40,
        "summary": {"validation_loss": 2 + 0.01 * seed + 0.05 * abs(math.log10(lr) + 1.75)},
        "diverged": False,
        "seconds": 5.0,
    }


def made_up(monkeypatch: pytest.MonkeyPatch, gain: float) -> list[Record]:
    """Records of all stages; all but DDC's lose ``gain`` more by few bits."""
    records: list[Record] = []
    monkeypatch.setitem(vars(plan.EXPERIMENT), "records", records)
    for stage in plan.EXPERIMENT.stages:
        for setting, seed in plan.EXPERIMENT.plan(stage, None):
            if known := plan.EXPERIMENT.recorded(setting, seed):
                known["stages"][stage] = setting
                continue
            record = record_of(setting, seed, stage)
            config = record["config"]
            if config["training"]["weights"] != "float32":
                others = not config["optimizer"]["name"].startswith("ddc")
                record["summary"]["validation_loss"] += 0.1 + others * gain * (1 + 0.1 * seed)
            records.append(record)
    return records


def test_settings_are_valid_and_grids_equal() -> None:
    for search in plan.SEARCHES.values():
        assert {len({*search.grid(name)}) for name in search.axes} == {5}
    ids = {
        compose_alike(["+experiment=low_precision", *setting.split()]).run_id
        for stage in ("grid", "grid_bfloat16", "grid_float8")
        for setting, _ in plan.EXPERIMENT.plan(stage, None)
    }
    assert len(ids) == 3 * 5 * 5
    setting = plan.SEARCHES["float8"].setting("muon", 0.03)
    config = compose_alike(["+experiment=low_precision", *setting.split()])
    assert (config.optimizer.lr, config.optimizer.adam_lr) == (0.03, 0.0015)
    assert config.training.weights == "float8"


def test_every_format_and_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, 0.0)
    planned = plan.EXPERIMENT.plan("reported", None)
    assert len(planned) == len({*planned}) == 5 * 3 * 2 * 5
    assert len(plan.reported(None, (plan.FLOAT32,))) == 50


def test_w5_holds_where_others_lose_more_and_its_report_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = made_up(monkeypatch, 0.05)
    found = report.verdicts(records, CLAIM)
    assert [row.protocol for row in found] == list(CLAIM["W5"].fixed)
    assert {row.verdict for row in found} == {"reproduced"}
    assert "last loss itself: bfloat16 -0.06" in found[0].against
    text = report.markdown(records, [], CLAIM)
    assert "All planned runs are recorded." in text
    assert "**holds**" in text
    assert "No run is measured yet." in text
    (results,) = report.results(records, CLAIM)
    assert all(path.exists() for path in results.figures["precision"].plot(tmp_path / "figure"))


def test_w5_does_not_hold_where_nothing_differs_or_others_lose_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for gain in (0.0, -0.05):
        found = report.verdicts(made_up(monkeypatch, gain), CLAIM)
        assert {row.verdict for row in found} == {"not reproduced"}
    records = made_up(monkeypatch, 0.05)
    few = [each for each in records if each["seed"] not in (1, 2, 3)]
    monkeypatch.setitem(vars(plan.EXPERIMENT), "records", few)
    found = report.verdicts(few, CLAIM)
    assert {row.verdict for row in found} == {"not tested"}
    assert "reported (60 of 150)" in found[0].against
    nothing = [each for each in records if "reported" not in each["stages"]]
    monkeypatch.setitem(vars(plan.EXPERIMENT), "records", nothing)
    (row,) = report.verdicts(nothing, CLAIM)
    assert row.verdict == "not tested"
    assert report.markdown([], [], CLAIM) == "No run is recorded yet.\n"


def test_a_run_that_diverged_knows_nothing() -> None:
    record = record_of("optimizer=adamw optimizer.lr=0.01", 0, "reported")
    assert own.loss_of({**record, "diverged": True, "summary": None}) == math.log(256)
    record["summary"]["validation_loss"] = 7.0
    assert own.loss_of(record) == math.log(256)


# ----------------------------------------------------------------------------------------------
# what is measured at the end


def test_kurtosis_is_three_of_a_normal_distribution_and_grows_with_an_outlier() -> None:
    entries = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    assert measure.kurtosis(entries) == pytest.approx(3, abs=0.05)
    assert measure.kurtosis(5 + 7 * entries) == pytest.approx(measure.kurtosis(entries), rel=1e-5)
    entries[0, 0] = 200
    assert measure.kurtosis(entries) > 30


def test_quantised_copies_have_sixteen_values_a_row_and_balanced_ones_compute_the_same() -> None:
    model = make_model(GPTConfig(context=16, layers=2, width=16, heads=4, kv_heads=2, hidden=12))
    params = named_parameters(model)
    before = copy.deepcopy(params)
    for name, p in named_parameters(measure.quantised(model)).items():
        if p.ndim == 2:
            assert all(len(row.unique()) <= 16 for row in p)
            assert not torch.equal(p, params[name])
        else:
            assert torch.equal(p, params[name])
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    tokens = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(1))
    moved = measure.balanced(model)
    assert difference(model, moved, tokens) < 1e-9
    assert not torch.equal(*(m.blocks[0].mlp.up.weight for m in (model, moved)))
    # so all points of an orbit are quantised alike, once balanced; not before
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for gauge in find_gauges(model, kinds=("gated_rescale", "norm_scale"), verify=False):
        gauge.act_(named_parameters(other), gauge.sample(named_parameters(other), generator))
    first, second = (
        [measure.quantised(each(m)) for m in (model, other)]
        for each in (measure.balanced, lambda m: m)
    )
    assert difference(first[0], first[1], tokens) < 1e-2 * difference(second[0], second[1], tokens)
    found = measure.outliers(moved, [tokens])
    assert found.keys() == {*report.KURTOSES}
    assert all(value > 1 for value in found.values())


def test_ends_are_measured_once_and_a_line_that_was_cut_short_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = compose_alike(["+experiment=low_precision", f"runs={tmp_path}"])
    measured: list[str] = []

    class Run:
        state = "complete"

        def __init__(self, name: str) -> None:
            self.folder = tmp_path / name

    class Restored:
        def __init__(self) -> None:
            self.config = config

    def end_of(setup: Restored) -> Record:
        measured.append("one")
        return {"as_trained": {"loss": 2.0}}

    unended = Run("unended")
    unended.state = "unfinished"
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "reported", lambda runs, formats: [])
    monkeypatch.setattr(type(plan.EXPERIMENT), "sweep", lambda *_: [Run("a"), Run("b"), unended])
    monkeypatch.setattr(measure, "restore", lambda folder: Restored())
    monkeypatch.setattr(measure, "end_of", end_of)
    measure.main([])
    lines = (tmp_path / measure.ENDS).read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b"]
    measure.main([])
    assert len(measured) == 2
    (tmp_path / measure.ENDS).write_text(lines[0] + "\n" + lines[1][:20])
    measure.main([])
    assert len(measured) == 3
    assert (tmp_path / measure.ENDS).read_text().splitlines() == lines
