"""The grokking experiment: its plan follows from ended runs, its report from records alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddc.report.claims import load_claims
from ddc.report.figures import drawn
from ddc.report.runs import read_lines
from ddc.training.compose import compose_config
from ddc.training.records import provenance
from ddc.training.sweep import SweepRun
from experiments.grok_mlp.plan import EXPERIMENT, GRID, grid, grokked, step_of
from experiments.grok_mlp.report import (
    delay,
    drawings,
    fit_step,
    markdown,
    verdicts,
)
from experiments.protocols import EXPERIMENTS, FINALISTS, Experiment

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "results/grok_mlp/runs.jsonl"
CLAIMS = load_claims(EXPERIMENTS)
CONFIG = compose_config([])


def record(name: str, accuracies: list[float], train: list[float] | None = None, **more) -> dict:
    steps = [100 * i for i in range(len(accuracies))]
    train = train or [1.0] * len(accuracies)
    curve = {"step": steps, "train_loss": steps, "validation_loss": steps, "train_accuracy": train}
    return {
        "config": {"optimizer": {"name": name}},
        "curve": {**curve, "validation_accuracy": accuracies},
        **more,
    }


def test_steps_of_a_curve() -> None:
    late = record("muon", [0.0, 0.5, 0.94, 0.95, 0.9], [0.1, 0.99, 1.0, 1.0, 1.0])
    assert (fit_step(late), step_of(late), step_of(late, 0.75), step_of(late, 0.99)) == (
        100,
        300,
        200,
        None,
    )
    assert delay(late) == 200
    # generalises before it fits
    assert delay(record("muon", [0.0, 0.97, 0.98], [0.1, 0.95, 0.99])) == -100
    assert delay(record("muon", [0.0, 0.1], [0.1, 1.0])) is None
    diverged = record("muon", [])
    assert (step_of(diverged), grokked([late, diverged])) == (None, 1)


@pytest.mark.parametrize(
    ("ours", "plain", "expected"),
    [
        (10, 0, "reproduced"),
        (9, 2, "reproduced"),
        (4, 0, "not reproduced"),  # p = 0.09
        (7, 0, "direction only"),  # less than 80%
        (11, 4, "direction only"),  # Muon on more than 20%
        (0, 11, "not reproduced"),
    ],
)
def test_verdict_by_its_rule(ours: int, plain: int, expected: str) -> None:
    """Of eleven seeds."""
    stages = {"matched": "a", "tuned": "a"}
    records = [
        record(name, [0.96 if seed < groks else 0.5], seed=seed, stages=stages, diverged=False)
        for name, groks in (("ddcmuon", ours), ("muon", plain))
        for seed in range(11)
    ]
    found = verdicts(records, CLAIMS)
    assert [each.verdict for each in found] == [expected] * 2
    assert found[0].ours.startswith(
        f"{ours} of 11 against {plain} of 11: {(ours - plain) / 11:+.2f}"
    )


def test_a_fifth_is_still_few() -> None:
    stages = {"matched": "a", "tuned": "a"}
    counts = (("ddcmuon", 10), ("muon", 2))
    records = [
        record(name, [0.96 if seed < groks else 0.5], seed=seed, stages=stages, diverged=False)
        for name, groks in counts
        for seed in range(10)
    ]
    assert {each.verdict for each in verdicts(records, CLAIMS)} == {"reproduced"}


def test_every_optimizer_has_as_many_settings() -> None:
    assert {len(set(grid(optimizer))) for optimizer in GRID} == {12}


class Ended:
    """Ended runs whose accuracies a function of their overrides gives; writes what the plan
    reads.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, accuracy) -> None:
        def read(self, planned, runs: str) -> list[SweepRun]:
            found = []
            for overrides, seed in planned:
                run = SweepRun((overrides,), folder / f"{abs(hash((overrides, seed)))}", CONFIG)
                value = accuracy(overrides, seed)
                if value is not None:
                    run.folder.mkdir(exist_ok=True)
                    row = {
                        "step": 0,
                        "train_loss": 0.0,
                        "validation_loss": 0.0,
                        "train_accuracy": 1.0,
                    }
                    (run.folder / "records.jsonl").write_text(
                        json.dumps({**row, "validation_accuracy": value}) + "\n"
                    )
                    (run.folder / "run.json").write_text(json.dumps({"config": {}, **provenance()}))
                    (run.folder / "summary.json").write_text("{}")
                found.append(run)
            return found

        monkeypatch.setattr(Experiment, "sweep", read)


def test_the_choice_is_by_runs_that_grok_then_by_accuracy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    often, once = grid("muon")[3], grid("muon")[7]

    def accuracy(overrides: str, seed: int) -> float:
        if overrides == often:
            return 0.95  # on every seed
        if overrides == once:
            return 1.0 if seed == 100 else 0.92
        return 0.5

    Ended(monkeypatch, tmp_path, accuracy)
    finals = [overrides for overrides, _ in EXPERIMENT.plan("finals", "runs")]
    assert len(finals) == len(GRID) * FINALISTS * 2
    assert {often, once} <= set(finals)
    tuned = EXPERIMENT.plan("tuned", "runs")
    assert [overrides for overrides, seed in tuned if seed == 0 and "=muon" in overrides] == [often]
    assert len(tuned) == len(GRID) * 11
    assert len(EXPERIMENT.plan("depth", "runs")) == 4 * 2 * 3


def test_a_stage_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(EXPERIMENT.__dict__, "records", [])  # none committed
    Ended(monkeypatch, tmp_path, lambda overrides, seed: None if "adamw" in overrides else 0.5)
    with pytest.raises(ValueError, match="is missing: run the stages before"):
        EXPERIMENT.plan("finals", "runs")
    with pytest.raises(ValueError, match="stage='final'"):
        EXPERIMENT.plan("final", "runs")


@pytest.mark.slow
def test_a_plan_goes_on_from_committed_records() -> None:
    stages = EXPERIMENT.status("no-such-folder")
    assert [(each.needed, each.recorded) for each in stages] == [
        (44, 44),
        (48, 48),
        (16, 16),
        (44, 44),
        (21, 21),
        (24, 24),
    ]
    assert all(each.missing == 0 and each.seconds for each in stages)


def test_the_committed_table_is_what_its_records_make() -> None:
    assert (RECORDS.parent / "table.md").read_text() == markdown(read_lines(RECORDS), CLAIMS)


def test_figures_from_records(tmp_path: Path) -> None:
    figures = drawn(drawings(read_lines(RECORDS)), tmp_path)
    assert {path.name for path in figures} == {"accuracy.png", "depth.png"}
    assert all(
        path.stat().st_size > 10_000 for png in figures for path in (png, png.with_suffix(".pdf"))
    )


def test_a_run_that_diverged_at_once_is_counted() -> None:
    records = read_lines(RECORDS)
    index = next(
        i
        for i, r in enumerate(records)
        if "matched" in r["stages"] and r["stages"].keys() == {"matched"}
    )
    empty = {key: [] for key in records[index]["curve"]}
    changed = [
        *records[:index],
        {**records[index], "curve": empty, "diverged": True},
        *records[index + 1 :],
    ]
    assert markdown(changed, CLAIMS) != markdown(records, CLAIMS)
