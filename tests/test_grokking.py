"""The grokking experiment: its plan follows from ended runs, its report from records alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddc.report.grokking import delay, fit_step, grokked, markdown, step_of, verdict
from ddc.report.runs import read_lines
from ddc.training.records import provenance
from ddc.training.sweep import SweepRun
from experiments.grokking import EXPERIMENT, GRID, grid
from experiments.protocols import FINALISTS, Experiment

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "results/grokking/runs.jsonl"


def record(name: str, accuracies: list[float], train: list[float] | None = None, **more) -> dict:
    steps = [100 * i for i in range(len(accuracies))]
    train = train or [1.0] * len(accuracies)
    curve = {"step": steps, "train_loss": steps, "validation_loss": steps, "train_accuracy": train}
    return {"config": {"optimizer": {"name": name}}, "curve": {**curve, "validation_accuracy": accuracies}, **more}


def test_steps_of_a_curve() -> None:
    late = record("muon", [0.0, 0.5, 0.94, 0.95, 0.9], [0.1, 0.99, 1.0, 1.0, 1.0])
    assert (fit_step(late), step_of(late), step_of(late, 0.75), step_of(late, 0.99)) == (100, 300, 200, None)
    assert delay(late) == 200
    assert delay(record("muon", [0.0, 0.97, 0.98], [0.1, 0.95, 0.99])) == -100  # generalises before it fits
    assert delay(record("muon", [0.0, 0.1], [0.1, 1.0])) is None
    diverged = record("muon", [])
    assert (step_of(diverged), grokked([late, diverged])) == (None, 1)


def test_verdict_by_its_rule() -> None:
    yes, no = record("ddcmuon", [0.96]), record("muon", [0.5])
    assert verdict([yes] * 10 + [no], [no] * 11, 1e-4) == "reproduced"
    assert verdict([yes] * 10 + [no], [no] * 11, 0.05) == "not reproduced"
    assert verdict([yes] * 7 + [no] * 4, [no] * 11, 1e-2) == "direction only"
    assert verdict([yes] * 11, [yes] * 4 + [no] * 7, 1e-2) == "direction only"
    assert verdict([no] * 11, [yes] * 11, 1e-4) == "not reproduced"


def test_every_optimizer_has_as_many_settings() -> None:
    assert {len(set(grid(optimizer))) for optimizer in GRID} == {12}


class Ended:
    """Ended runs whose accuracies a function of their overrides gives; writes what the plan reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, accuracy) -> None:
        def read(self, planned, runs: str) -> list[SweepRun]:
            found = []
            for overrides, seed in planned:
                run = SweepRun((overrides,), folder / f"{abs(hash((overrides, seed)))}")
                value = accuracy(overrides, seed)
                if value is not None:
                    run.folder.mkdir(exist_ok=True)
                    row = {"step": 0, "train_loss": 0.0, "validation_loss": 0.0, "train_accuracy": 1.0}
                    (run.folder / "records.jsonl").write_text(json.dumps({**row, "validation_accuracy": value}) + "\n")
                    (run.folder / "run.json").write_text(json.dumps({"config": {}, **provenance()}))
                    (run.folder / "summary.json").write_text("{}")
                found.append(run)
            return found

        monkeypatch.setattr(Experiment, "sweep", read)


def test_the_choice_is_by_runs_that_grok_then_by_accuracy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    Ended(monkeypatch, tmp_path, lambda overrides, seed: None if "adamw" in overrides else 0.5)
    with pytest.raises(ValueError, match="is missing: run the stages before"):
        EXPERIMENT.plan("finals", "runs")
    with pytest.raises(ValueError, match="stage='final'"):
        EXPERIMENT.plan("final", "runs")


def test_the_committed_table_is_what_its_records_make() -> None:
    assert (RECORDS.parent / "table.md").read_text() == markdown(read_lines(RECORDS))


def test_figures_from_records(tmp_path: Path) -> None:
    from ddc.report.grokking import plot_accuracy, plot_depth

    records = read_lines(RECORDS)
    paths = [*plot_accuracy(records, tmp_path), *plot_depth(records, tmp_path)]
    assert {path.name for path in paths} == {"accuracy.png", "accuracy.pdf", "depth.png", "depth.pdf"}
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_a_run_that_diverged_at_once_is_counted() -> None:
    records = read_lines(RECORDS)
    index = next(i for i, r in enumerate(records) if "matched" in r["stages"] and r["stages"].keys() == {"matched"})
    empty = {key: [] for key in records[index]["curve"]}
    changed = [*records[:index], {**records[index], "curve": empty, "diverged": True}, *records[index + 1 :]]
    assert markdown(changed) != markdown(records)
