"""Claim C5 under longer budgets: what is planned, what is chosen, and the tests of times."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddc.report.claims import load_claims
from ddc.training.compose import compose_alike
from experiments.grok_long import report
from experiments.grok_long.plan import (
    BUDGETS,
    DDCMUON,
    EXPERIMENT,
    MUON,
    SEARCHES,
    SEEDS,
    time_to_grok,
)
from experiments.protocols import EXPERIMENTS

CLAIM = load_claims(EXPERIMENTS)
Record = dict[str, Any]


def run(setting: str, seed: int, stage: str, groks: int | None, best: float = 0.5) -> Record:
    """A made-up record that groks at a step, or never."""
    pairs = dict(each.split("=", 1) for each in setting.split())
    steps = int(pairs["training.steps"])
    there = [steps * i // 40 for i in range(41)]
    accuracy = [0.99 if groks is not None and step >= groks else best for step in there]
    optimizer = {
        "name": pairs["optimizer"],
        **{key: float(pairs[f"optimizer.{key}"]) for key in ("lr", "adam_lr", "weight_decay")},
    }
    return {
        "id": f"{stage}-{seed}-{setting}",
        "seed": seed,
        "stages": {stage: setting},
        "config": {"optimizer": optimizer, "training": {"steps": steps}},
        "curve": {"step": there, "validation_accuracy": accuracy},
        "seconds": 100.0,
        "commit": "0" * 40,
        "diverged": False,
    }


def of_stages(stages: list[str], groks: Any) -> list[Record]:
    """Records of stages, each planned from those before it."""
    records: list[Record] = []
    vars(EXPERIMENT)["records"] = records
    for stage in stages:
        for setting, seed in EXPERIMENT.plan(stage, None):
            if known := EXPERIMENT.recorded(setting, seed):
                known["stages"][stage] = setting
            else:
                records.append(run(setting, seed, stage, groks(stage, setting, seed)))
    return records


@pytest.fixture(autouse=True)
def _no_records_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(EXPERIMENT), "records", [])


def test_grids_are_equal_and_hold_muons_decays_between_03_and_1() -> None:
    for steps, search in SEARCHES.items():
        assert {len(search.grid(name)) for name in (MUON, DDCMUON)} == {8}
        decays = set()
        for setting, seed in EXPERIMENT.plan(f"grid_{steps}", None):
            config = compose_alike(["+experiment=grok_long", *setting.split()])
            assert (config.training.steps, config.training.schedule, seed) == (steps, "wsd", 100)
            if config.optimizer.name == MUON:
                decays.add(config.optimizer.weight_decay)
        assert {0.5, 0.7} < decays


def test_sooner_is_better_then_more_accurate() -> None:
    setting = "optimizer=muon optimizer.lr=1 optimizer.adam_lr=1 optimizer.weight_decay=0"
    ranked = [
        run(f"{setting} training.steps=4000", 0, "grid", *each)
        for each in ((1000,), (4000,), (None, 0.9), (None, 0.1))
    ]
    values = [time_to_grok(each) for each in ranked]
    assert values == sorted(values)
    assert all(a < b for a, b in itertools.pairwise(values))


def by_optimizer(stage: str, setting: str, seed: int) -> int | None:
    """DDCMuon groks early, later without gauges; Muon on one seed."""
    if "gauges=none" in setting:
        return 1800 if seed % 2 else None
    if f"optimizer={DDCMUON} " in setting:
        return 600 + 20 * (seed % 5)
    return 1800 if seed == 3 else None


def test_verdicts_count_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [*SEARCHES[2000].names, "reported_2000", "no_gauges_2000"]
    records = of_stages(stages, by_optimizer)
    found = {each.protocol: each for each in report.verdicts(records, CLAIM)}
    waiting = found.pop("–")
    assert waiting.verdict == "not tested"
    named = waiting.ours.removeprefix("the runs are not complete: ").split("; ")
    assert {*found, *named} == {*CLAIM["C5b"].fixed}
    assert found["2000 steps"].verdict == "reproduced"
    assert found["2000 steps"].ours.startswith("11 against 1:")
    assert found["2000 steps, without gauges"].verdict == "direction only"
    text = report.markdown(records, CLAIM)
    assert "**Not complete.**" in text
    assert "reported_4000 (not planned yet)" in text


def test_nothing_is_shown_where_both_do_alike() -> None:
    stages = [*SEARCHES[2000].names, "reported_2000"]
    records = of_stages(stages, lambda stage, setting, seed: 600 + 100 * (seed % 5))
    (found,) = (e for e in report.verdicts(records, CLAIM) if e.protocol == "2000 steps")
    assert found.verdict == "not reproduced"


def test_sooner_by_the_log_rank_test_is_direction_only() -> None:
    stages = [*SEARCHES[2000].names, "reported_2000"]
    records = of_stages(
        stages, lambda stage, setting, seed: 600 if f"={DDCMUON} " in setting else 1500
    )
    (found,) = (e for e in report.verdicts(records, CLAIM) if e.protocol == "2000 steps")
    assert found.verdict == "direction only"


def test_log_rank_is_the_textbook_statistic() -> None:
    """Observed less expected, over the hypergeometric variance, summed over the times."""
    setting = "optimizer=muon optimizer.lr=1 optimizer.adam_lr=1 optimizer.weight_decay=0"
    times = [[500, 700, 1000, None, 1500], [900, None, 1500, None, None]]
    groups = [
        [run(f"{setting} training.steps=2000", i, "x", t) for i, t in enumerate(each)]
        for each in times
    ]
    excess = variance = 0.0
    for time in sorted({t for each in times for t in each if t}):
        at_risk = [sum(t is None or t >= time for t in each) for each in times]
        events = [sum(t == time for t in each) for each in times]
        n, d = sum(at_risk), sum(events)
        excess += events[0] - d * at_risk[0] / n
        variance += d * (at_risk[0] / n) * (at_risk[1] / n) * (n - d) / (n - 1)
    from scipy.stats import chi2

    assert report.log_rank_p(*groups) == pytest.approx(chi2.sf(excess**2 / variance, 1))
    never = [run(f"{setting} training.steps=2000", 0, "x", None)]
    assert report.log_rank_p(never, never) is None
    assert report.log_rank_p([], groups[0]) is None


def test_frozen_runs_hold_embedding_and_readout_still() -> None:
    stages = [*SEARCHES[BUDGETS[-1]].names]
    records = of_stages(stages, by_optimizer)
    vars(EXPERIMENT)["records"] = records
    planned = EXPERIMENT.plan("frozen", None)
    assert len(planned) == 2 * len(SEEDS)
    for setting, _ in planned:
        assert re.findall(r"adam_lr=\S+", setting) == ["adam_lr=1e-12"]
        config = compose_alike(["+experiment=grok_long", *setting.split()])
        assert config.training.steps == BUDGETS[-1]
        assert np.isclose(config.optimizer.adam_lr, 1e-12)


def test_survival_curves_are_drawn(tmp_path: Path) -> None:
    records = of_stages([*SEARCHES[2000].names, "reported_2000"], by_optimizer)
    (made,) = report.results(records, CLAIM)
    for path in made.figures["survival"].plot(tmp_path / "survival"):
        assert path.stat().st_size > 5_000
    (nothing,) = report.results([], CLAIM)
    assert not nothing.figures
    assert "not tested" in nothing.tables["table"]()
