"""Readings in the trainer: they change no training number, survive a kill, and can be made again
from the weights.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddc.gauges import find_gauges, named_parameters, orbit_distance
from ddc.report.rates import draw_readings
from ddc.report.runs import Run
from ddc.slt.config import LearningCoefficientConfig, SLTConfig
from ddc.slt.observables import OBSERVABLES
from ddc.slt.zeros import MEAN_OF_STREAM
from ddc.training import loop
from ddc.training.compose import restored
from ddc.training.loop import train
from ddc.training.mirror import Mirror
from ddc.training.observer import load_snapshot, reading_steps, snapshot_steps
from ddc.training.records import Records
from tests.test_training import ROOT, assert_same_run, composed, run, train_py

READ = ["slt=cells", "slt.readings=9", "slt.sequences=8"]
LLC = [
    "slt.learning_coefficient.every=4",
    "slt.learning_coefficient.draws=8",
    "slt.learning_coefficient.burn_in=20",
    "slt.learning_coefficient.n_beta=0.01",
]


def readings(folder: Path) -> list[dict]:
    return Records(folder / "readings.jsonl").read()


def test_reading_steps_are_log_spaced_and_hold_both_ends() -> None:
    steps = reading_steps(20, 1000)
    assert steps[0] == 0
    assert steps[-1] == 1000
    assert len(steps) == len(set(steps)) <= 20
    late = np.diff(np.log(np.array(steps[8:]) + 1))
    assert late.max() / late.min() < 1.6
    assert reading_steps(0, 1000) == []
    assert reading_steps(48, 3) == [0, 1, 2, 3]


@pytest.mark.parametrize("optimizer", ["adamw", "ddcadam"])
def test_readings_change_no_training_number(tmp_path: Path, optimizer: str) -> None:
    plain = run(tmp_path / "plain", f"optimizer={optimizer}")
    observed = run(tmp_path / "observed", f"optimizer={optimizer}", *READ, *LLC)
    torch.manual_seed(1)
    train(plain)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    train(observed)
    assert torch.equal(after, torch.get_rng_state())
    assert_same_run(plain.folder, observed.folder)
    assert not (plain.folder / "readings.jsonl").exists()
    assert plain.folder.name != observed.folder.name
    rows = readings(observed.folder)
    assert [row["step"] for row in rows] == reading_steps(9, 12)
    assert ["learning_coefficient" in row for row in rows] == [
        i % 4 == (len(rows) - 1) % 4 for i in range(len(rows))
    ]
    assert {layer["layer"] for layer in rows[0]["layers"]} == {"embedding", "block 1"}
    assert all(set(layer["values"]) == set(OBSERVABLES) for row in rows for layer in row["layers"])
    assert rows[-1]["loss"] < rows[0]["loss"]
    summary = json.loads((observed.folder / "summary.json").read_text())
    assert 0 < summary["reading_seconds"] < summary["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["+experiment=vit_scratch"], ["embedding", "block 1"]),
        (
            ["+experiment=vit_scratch", "model.class_token=true", "optimizer=adamw"],
            ["embedding", "block 1"],
        ),
        (["+experiment=grok_mlp", "optimizer=ddcmuon"], ["layer 1", "layer 2", "head"]),
        (
            ["+experiment=grok_mlp", "model.residual=true", "optimizer=muon"],
            ["layer 1", "layer 2", "head"],
        ),
    ],
)
def test_other_models_are_read_and_train_as_without(
    tmp_path: Path, overrides: list[str], layers: list[str]
) -> None:
    plain, observed = (
        run(tmp_path / "plain", *overrides),
        run(tmp_path / "observed", *overrides, *READ, *LLC),
    )
    train(plain)
    train(observed)
    assert_same_run(plain.folder, observed.folder)
    rows = readings(observed.folder)
    assert [layer["layer"] for layer in rows[-1]["layers"]] == layers
    assert all(
        math.isfinite(rows[-1]["learning_coefficient"][key]) for key in ("value", "low", "high")
    )
    assert rows[-1]["arc_length"] > 0
    assert observed.observer is not None
    again = [row | {"layers": None} for row in observed.observer.read_again()]
    assert again == [
        {key: row[key] for key in ("step", "arc_length", "loss")} | {"layers": None} for row in rows
    ]
    others = list(observed.observer.read_untrained(rows[:2]))
    assert [row["step"] for row in others] == [row["step"] for row in rows[:2]]
    assert others[0]["layers"] != others[1]["layers"]
    figures = draw_readings(Run.read(observed.folder), tmp_path)
    assert {path.name for path in figures} == {
        "cells.png",
        "cells.pdf",
        "spectra.png",
        "spectra.pdf",
    }


def test_a_run_without_readings_keeps_its_name() -> None:
    assert composed("slt.sequences=8").run_id == composed().run_id
    assert composed(*READ).run_id != composed().run_id
    assert "slt" not in composed().identity


def test_the_arc_is_the_sum_of_orbit_distances(tmp_path: Path) -> None:
    setup = run(tmp_path, *READ)
    train(setup)
    rows = readings(setup.folder)
    folder, gauges = setup.folder / "snapshots", find_gauges(setup.model)
    length = 0.0
    assert rows[0]["arc_length"] == 0
    for before, row in itertools.pairwise(rows):
        a, b = (load_snapshot(folder, r["step"]) for r in (before, row))
        length += float(orbit_distance(a, b, gauges))
        assert row["arc_length"] == pytest.approx(length)
        straight = math.sqrt(sum(float((b[name] - a[name]).double().square().sum()) for name in a))
        assert 0 < row["arc_length"] - before["arc_length"] < 3 * straight
    final = {name: p.detach() for name, p in named_parameters(setup.model).items()}
    assert all(torch.equal(value, final[name]) for name, value in load_snapshot(folder, 12).items())


@pytest.mark.parametrize("keep", [True, False])
def test_resume_makes_the_same_readings(
    tmp_path: Path, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*READ, f"slt.keep_snapshots={keep}"]
    whole = run(tmp_path / "whole", *options)
    train(whole)

    class Killed(BaseException):
        pass

    original, steps = loop.train_step, 0

    def step_or_die(*arguments: object, **options: object) -> float | None:
        nonlocal steps
        steps += 1
        if steps % 5 == 0:
            raise Killed
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", step_or_die)
    attempts = 0
    while True:
        attempts += 1
        assert attempts < 20
        broken = run(tmp_path / "broken", *options)
        try:
            train(broken)
            break
        except Killed:
            continue
    assert attempts >= 3
    assert_same_run(whole.folder, broken.folder)
    assert (whole.folder / "readings.jsonl").read_bytes() == (
        broken.folder / "readings.jsonl"
    ).read_bytes()
    expected = reading_steps(9, 12) if keep else [12]
    assert (
        snapshot_steps(whole.folder / "snapshots")
        == snapshot_steps(broken.folder / "snapshots")
        == expected
    )


def test_a_restarted_run_drops_its_old_readings(tmp_path: Path) -> None:
    setup = run(tmp_path, *READ)
    train(setup)
    before = (setup.folder / "readings.jsonl").read_bytes()
    train(run(tmp_path, *READ, "training.resume=never"))
    assert (setup.folder / "readings.jsonl").read_bytes() == before


def test_diverging_chains_do_not_take_the_run_with_them(tmp_path: Path) -> None:
    setup = run(tmp_path, *READ, *LLC)
    assert setup.observer is not None

    def diverge() -> dict:
        raise RuntimeError("3 of 4 chains left the finite numbers")

    setup.observer.learning_coefficient = diverge  # type: ignore[method-assign]
    train(setup)
    assert readings(setup.folder)[-1]["learning_coefficient"] == {
        "error": "3 of 4 chains left the finite numbers"
    }


def test_the_configuration_of_a_run_is_restored(tmp_path: Path) -> None:
    setup = run(tmp_path, *READ, "optimizer=adamw", "slt.rule.kink=0.3", "seed=4")
    train(setup)
    info = json.loads((setup.folder / "run.json").read_text())
    assert restored(info["config"]) == setup.config
    info["config"]["training"]["epochs"] = 3
    with pytest.raises(ValueError, match="does not fit this version of the code"):
        restored(info["config"])


def test_wandb_gets_numbers_spectra_and_figures(tmp_path: Path) -> None:
    setup = run(tmp_path, *READ, *LLC)
    sent: list[dict] = []

    class Recorder:
        summary: dict = {}  # noqa: RUF012

        def log(self, values: dict, step: int | None = None) -> None:
            sent.append(values)

        def finish(self) -> None:
            pass

    mirror = Mirror(composed("wandb=disabled"), tmp_path)
    mirror._run = Recorder()
    train(setup, lambda folder: draw_readings(Run.read(folder), folder))
    figures = draw_readings(Run.read(setup.folder), setup.folder)
    for row in readings(setup.folder):
        mirror.log_reading(row)
    mirror.finish({"steps": 12}, draw=lambda: figures)
    assert mirror._run is not None
    assert "slt/block 1/gradient_lambda_min" in sent[0]
    assert type(sent[0]["slt/block 1/gradient_spectrum"]).__name__ == "Histogram"
    assert sent[-2]["slt/learning_coefficient/value"] > 0
    assert set(sent[-1]) == {"cells", "spectra"}
    assert {path.name for path in figures} == {
        "cells.png",
        "cells.pdf",
        "spectra.png",
        "spectra.pdf",
    }
    assert all(path.stat().st_size > 5_000 for path in figures)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "slt.readings=5",
            "Invalid slt.readings=5: expected 0, or at least slt.rule.min_checkpoints=8",
        ),
        ("slt.sequences=0", "Invalid slt.sequences=0"),
        ("slt.labels=random", "Invalid slt.labels=random: expected one of model, data"),
        (
            "slt.approach=time",
            "Invalid slt.approach=time: expected one of excess_loss, arc_length, step",
        ),
        ("slt.rule.min_r2=2", "Invalid slt.rule.min_r2=2"),
        ("slt.learning_coefficient.chains=1", "Invalid slt.learning_coefficient.chains=1"),
        ("slt.learning_coefficient.gamma=0", "Invalid slt.learning_coefficient.gamma=0"),
    ],
)
def test_bad_values_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        composed(override)
    assert SLTConfig().readings == LearningCoefficientConfig().every == 0


@pytest.mark.slow
def test_a_run_with_complete_gauges_is_read_as_another(tmp_path: Path) -> None:
    """The same zeros are removed of the same cells, at the start all values are the same, and what
    differs at the end is what was trained.
    """
    model = ["model.norm=layer", "model.bias=true", "model.mlp=relu", "model.positions=learned"]
    rows = {}
    for gauges in ("paper", "complete"):
        chosen = [*model, f"gauges={gauges}", "gauges.leave_out=true", "optimizer=ddcadam"]
        setup = run(tmp_path / gauges, *chosen, *READ)
        train(setup)
        rows[gauges] = readings(setup.folder)
    assert len(setup.gauges) > 20
    for paper, complete in zip(*rows.values(), strict=True):
        assert paper["step"] == complete["step"]
        for a, b in zip(paper["layers"], complete["layers"], strict=True):
            assert a["gradient"]["removed"] == b["gradient"]["removed"]
            assert MEAN_OF_STREAM in a["gradient"]["removed"]
            for side in ("activation", "gradient"):
                assert a[side]["removed"] == b[side]["removed"]
                assert a[side]["dimension"] == b[side]["dimension"]
            if paper["step"] == 0:
                assert a["values"] == b["values"]
    last = [each[-1]["layers"][-1]["values"] for each in rows.values()]
    assert last[0] != last[1]
    for key, value in last[0].items():  # the function is nearly the same, after a few steps
        assert last[1][key] == pytest.approx(value, rel=0.2), key


@pytest.mark.slow
def test_the_command_line_and_the_script(tmp_path: Path) -> None:
    longer = ["training.steps=60", "slt=cells", "slt.sequences=8", "slt.readings=20"]
    process = train_py("+experiment=lm_overtrain", *longer, f"runs={tmp_path / 'runs'}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "cells.png" in output
    assert "of it readings" in output
    folder = next((tmp_path / "runs").glob("*/*"))

    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "scripts/read_rates.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    again = script(str(folder), "--output", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    for words in (
        "DDCAdam, seed 0, against excess loss",
        "untrained model",
        "random walk",
        "λ_min(G)",
    ):
        assert words.replace(" ", "") in again.stdout.replace(" ", "").replace("\n", "")
    recorded = script(str(folder), "--output", str(tmp_path / "recorded"), "--recorded")
    assert recorded.returncode == 0, recorded.stderr
    reports = [
        json.loads((tmp_path / name / folder.name / "rates.json").read_text())
        for name in ("again", "recorded")
    ]
    # the same weights give the same readings, to the bit
    assert reports[0]["approaches"] == reports[1]["approaches"]
    found = reports[0]["approaches"]["excess_loss"]
    assert sum(found["counts"].values()) == found["total"] == 10
    assert set(found["null_controls"]) == {
        "untrained model",
        "shuffled checkpoints",
        "white noise",
        "random walk",
    }
    assert "| DDCAdam, seed 0 | excess loss |" in (tmp_path / "again" / "table.md").read_text()
    for name in ("rates.png", "rates.pdf", "rates-spectra.png"):
        assert (tmp_path / "again" / folder.name / name).stat().st_size > 0
    for path in (folder / "snapshots").iterdir():
        path.unlink()
    without = script(str(folder))
    assert without.returncode == 1
    assert (
        "slt.keep_snapshots=true, or read what was recorded during training with --recorded"
        in without.stderr
    )
    nothing = script(str(tmp_path))
    assert nothing.returncode == 1
    assert "holds no run" in nothing.stderr
