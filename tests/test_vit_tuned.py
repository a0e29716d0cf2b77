"""Claims C3 and C4 at interior settings: what is planned, what is chosen, capacity at equal train
loss, and the verdicts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ddc.report.claims import load_claims
from ddc.training.capacity import capacity_of
from ddc.training.compose import compose_alike, compose_config
from ddc.training.loop import train
from ddc.training.records import read_lines
from ddc.training.setup import restore
from experiments.protocols import EXPERIMENTS, TUNING_SEED
from experiments.vit_tuned import at_equal_loss, report
from experiments.vit_tuned.plan import (
    ADAMW,
    DDCADAM,
    DECAYS,
    EXPERIMENT,
    FIT,
    LEVEL,
    OPTIMIZERS,
    RATE,
    SEARCH,
    SEEDS,
    measured,
)
from tests.test_training import run

ROOT = Path(__file__).resolve().parents[1]
CLAIM = load_claims(EXPERIMENTS)
Record = dict[str, Any]


@functools.cache
def training_config() -> Record:
    return dataclasses.asdict(compose_config(["+experiment=vit_scratch"]).training)


def capacity(spare: float, rise: float, train: float, loss: float) -> Record:
    """Made-up capacity with a share of spare units."""
    blocks = [
        {
            "removal_to_mean": [0.0 if i < 100 * spare else 1.0 for i in range(100)],
            "removal_to_zero": [1.0] * 100,
            "unit_norms": [1.0] * 100,
            "effective_rank": {"up": 9.0, "down": 9.0},
            "stable_rank": {"up": 3.0, "down": 3.0},
        }
    ]
    keys = ("train_loss", "validation_loss", "validation_accuracy")
    pruning = [
        {"keep": keep, **dict(zip(keys, (train + more, loss + more, 0.7), strict=True))}
        for keep, more in ((1.0, 0.0), (0.75, rise / 2), (0.5, rise), (0.25, 2 * rise))
    ]
    about = {"examples": 512, "capacity_seconds": 80.0, "commit": "1" * 40}
    return {"blocks": blocks, "pruning": pruning, **about}


#: Where the made-up losses are lowest: log10 of the rate, of the decay, and the radial rate.
LOWEST = {ADAMW: (-2.4, 0.6, 1.0), DDCADAM: (-3.3, 0.3, 1.0)}


def made_up(setting: str, seed: int, stage: str, lower: float) -> Record:
    """The record of a run that was never made: smooth in its hyperparameters, another by seed.
    DDCAdam's last loss is lower by a share.
    """
    pairs = dict(each.split("=", 1) for each in setting.split())
    name = pairs["optimizer"]
    optimizer: Record = {"name": name, "radial_rate": 1.0}
    optimizer |= {key[10:]: float(value) for key, value in pairs.items() if key != "optimizer"}
    here = (math.log10(optimizer["lr"]), math.log10(optimizer["weight_decay"]))
    far = sum((a - b) ** 2 for a, b in zip(here, LOWEST[name][:2], strict=True))
    far += (optimizer["radial_rate"] - 1) ** 2 / 10
    noise = 0.001 * ((seed * (3 if name == ADAMW else 7)) % 5)
    last = (0.7 + 0.3 * far + noise) * (1 - lower * (name == DDCADAM))
    train = 10 ** (here[0] + here[1] + (0.2 if name == ADAMW else 1.5))
    is_ours = name == DDCADAM
    found: Record = {
        "id": f"{stage}-{seed}-{setting}",
        "seed": seed,
        "stages": {stage: setting},
        "config": {"optimizer": optimizer, "training": training_config()},
        "commit": "0" * 40,
        "curve": {"step": [0, 1200], "train_loss": [2.3, train]},
        "summary": {
            "train_loss": train,
            "validation_loss": last,
            "best_validation_loss": last - 0.05,
            "gap_at_train_loss": {"0.3": 0.4, "0.1": 0.8, "0.03": None},
            "validation_accuracy": 0.78,
            "validation_calibration_error": 0.1,
        },
        "seconds": 65.0,
        "diverged": False,
        "capacity": capacity(
            0.5 + 0.1 * is_ours + noise * 10, 0.1 - 0.02 * is_ours + noise, train, last
        ),
    }
    found["at_loss"] = {
        "level": LEVEL,
        "step": 400 + 100 * is_ours,
        **capacity(0.4 + noise * 20, 0.1 + noise, LEVEL, 0.8),
    }
    return found


@functools.cache
def all_stages(lower: float) -> str:
    """Made-up records of all stages, each planned from those before it, as JSON."""
    records: list[Record] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(vars(EXPERIMENT), "records", records)
        for stage in EXPERIMENT.stages:
            for setting, seed in EXPERIMENT.plan(stage, None):
                if known := EXPERIMENT.recorded(setting, seed):
                    known["stages"][stage] = setting
                else:
                    records.append(made_up(setting, seed, stage, lower))
    return json.dumps(records)


def of_stages(lower: float = 0.3) -> list[Record]:
    """The records of all stages, committed; DDCAdam's last loss is lower by a share."""
    records: list[Record] = json.loads(all_stages(lower))
    vars(EXPERIMENT)["records"] = records
    return records


@pytest.fixture(autouse=True)
def _no_records_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(EXPERIMENT), "records", [])


# ----------------------------------------------------------------------------------------------
# the plan


def test_grids_are_equal_and_hold_what_they_say() -> None:
    assert {name: len({*SEARCH.grid(name)}) for name in OPTIMIZERS} == {ADAMW: 12, DDCADAM: 12}
    assert SEARCH.axes[ADAMW]["lr"] == SEARCH.axes[DDCADAM]["lr"]
    rates, decays = (SEARCH.axes[ADAMW][key] for key in ("lr", "weight_decay"))
    assert {2.5e-4, 8e-3} < {*rates}
    assert min(decays) <= 0.1
    assert max(decays) >= 30
    for axis in (rates, decays):  # about half a decade or finer
        assert all(b / a < 3.4 for a, b in itertools.pairwise(axis))
    planned = EXPERIMENT.plan("grid", None)
    assert len(planned) == 24
    for setting, seed in planned:
        config = compose_alike(["+experiment=vit_scratch", *setting.split()])
        assert (seed, config.training.schedule) == (TUNING_SEED, "cosine")
        assert f"optimizer.lr={config.optimizer.lr:g} " in setting + " "


def test_equal_decay_is_equal_and_equal_loss_is_part_of_it() -> None:
    planned = EXPERIMENT.plan("equal_decay", None)
    assert len(planned) == 2 * len(DECAYS) * len(SEEDS)
    exposures = {}
    for setting, seed in planned:
        optimizer = compose_alike(["+experiment=vit_scratch", *setting.split()]).optimizer
        assert optimizer.lr == RATE
        exposures.setdefault((seed, optimizer.weight_decay), set()).add(optimizer.name)
    assert all(names == {*OPTIMIZERS} for names in exposures.values())
    assert {*EXPERIMENT.plan("equal_loss", None)} < {*planned}
    assert {*EXPERIMENT.scripts} == {"equal_decay", "equal_loss", "fitted"}
    assert all((ROOT / script).exists() for script in EXPERIMENT.scripts.values())


def test_the_search_ends_at_interior_settings_and_fits_where_it_must() -> None:
    records = of_stages()
    assert SEARCH.not_interior(records) == []
    tried = {name: SEARCH.recorded(records, name) for name in OPTIMIZERS}
    assert len({len(each) for each in tried.values()}) == 1  # as many for each
    for name, each in tried.items():
        points = SEARCH.choices(each)
        assert each[points["last_fit"]]["summary"]["train_loss"] <= FIT
        lowest = min(run["summary"]["validation_loss"] for run in each.values())
        assert each[points["last"]]["summary"]["validation_loss"] == lowest
        assert SEARCH.neighbours(name, points["last"])
    fitted, reported = ({*EXPERIMENT.plan(each, None)} for each in ("fitted", "reported"))
    assert fitted <= reported
    assert len(fitted) == 2 * len(SEEDS)


def test_a_stage_without_its_measurement_is_not_collected(tmp_path: Path) -> None:
    assert measured(tmp_path, {"reported"}) == {}
    for stage, script in (("fitted", "capacity"), ("equal_loss", "at_equal_loss")):
        with pytest.raises(ValueError, match=rf"is missing: python \S+{script}\.py"):
            measured(tmp_path, {stage})
    (tmp_path / "capacity.json").write_text('{"a": 1}')
    assert measured(tmp_path, {"equal_decay"}) == {"capacity": {"a": 1}}


# ----------------------------------------------------------------------------------------------
# capacity at equal train loss


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in OPTIMIZERS:
        setup = run(tmp_path_factory.mktemp("runs"), "+experiment=vit_scratch", f"optimizer={name}")
        train(setup)
        folders[name] = setup.folder
    return folders


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_that_are_made_again_are_those_of_the_run(
    name: str, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made again to the end, the capacity is that of the run's last checkpoint, to the bit."""
    folder = trained[name]
    rows = read_lines(folder / "records.jsonl")
    losses = [row["train_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    monkeypatch.setattr(at_equal_loss, "EVERY", 3)  # as far apart as the evaluations
    found = at_equal_loss.at_level(folder, losses[-1], 8)
    assert found["step"] == rows[-1]["step"]
    end = capacity_of(restore(folder), 8, at_equal_loss.Console(quiet=True))
    assert [found[key] for key in ("blocks", "pruning")] == [end[k] for k in ("blocks", "pruning")]
    between = at_equal_loss.at_level(folder, losses[2], 8)
    assert (between["step"], between["pruning"][0]["train_loss"]) == (rows[2]["step"], losses[2])
    monkeypatch.setattr(at_equal_loss, "EVERY", 1)
    finer = at_equal_loss.at_level(folder, (losses[1] + losses[2]) / 2, 8)
    assert rows[1]["step"] < finer["step"] <= rows[2]["step"]
    assert finer["pruning"][0]["train_loss"] <= (losses[1] + losses[2]) / 2
    assert at_equal_loss.at_level(folder, losses[-1] / 2, 8) == {
        "level": losses[-1] / 2,
        "step": None,
    }


def test_a_run_that_is_another_when_made_again_is_refused(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained[ADAMW]
    rows = read_lines(folder / "records.jsonl")
    for name in ("run.json", "summary.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    rows[1]["train_loss"] += 1e-4
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="after 3 steps made again"):
        at_equal_loss.at_level(tmp_path, rows[2]["train_loss"], 8)
    (tmp_path / "summary.json").unlink()
    monkeypatch.setattr(sys, "argv", ["at_equal_loss.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="has not ended"):
        at_equal_loss.main()


def test_the_last_evaluation_above_a_level() -> None:
    rows = [{"step": 10 * i, "train_loss": x} for i, x in enumerate((2.0, 0.5, 0.2, 0.6, 0.1))]
    found = [at_equal_loss.last_above(rows, level) for level in (1.0, 0.2, 0.15, 0.05, 3.0)]
    assert [None if each is None else each["step"] for each in found] == [0, 10, 30, None, None]


# ----------------------------------------------------------------------------------------------
# the report


@pytest.mark.parametrize(
    ("lower", "losses"),
    [(0.3, "reproduced"), (0.05, "direction only"), (0.0, "not reproduced")],
)
def test_verdicts_by_their_rules(lower: float, losses: str) -> None:
    records = of_stages(lower)
    found = {(each.claim, each.protocol): each for each in report.verdicts(records, CLAIM)}
    assert [*found] == [(name, each) for name in ("C3b", "C4b") for each in CLAIM[name].fixed]
    assert found["C3b", "tuned"].verdict == losses
    # at equal decay and in what fits more spare units, and a smaller rise; at equal loss neither
    for protocol in ("equal decay 0.001", "equal decay 0.002", "tuned to fit"):
        assert found["C4b", protocol].verdict == "reproduced"
    equal_loss = found["C4b", report.EQUAL_LOSS]
    assert equal_loss.verdict == "not reproduced"
    assert equal_loss.against.startswith("the decay until there is ")
    assert "the train loss is 0.0316 (DDCAdam) against 0.0016" in (
        found["C4b", "equal decay 0.001"].against
    )
    assert "rate × decay" in found["C4b", "tuned to fit"].against


def test_decay_is_summed_along_the_schedule() -> None:
    """The warm-up, of 60 steps, and the cosine are half of their peak each, and half a step."""
    record = made_up(SEARCH.setting(ADAMW, RATE, 2.0), 0, "equal_decay", 0.0)
    steps = record["config"]["training"]["steps"]
    assert report.decayed(record) == pytest.approx(RATE * 2 * (steps / 2 + 1))
    record["capacity"]["step"] = 60
    assert report.decayed(record) == pytest.approx(RATE * 2 * 30.5)


def test_runs_that_do_not_fit_and_open_sides_speak_against_a_verdict() -> None:
    records = of_stages()
    for record in records:
        if "reported" in record["stages"] and record["seed"] == 3:
            record["summary"]["train_loss"] = 0.4
    records = [each for each in records if "widen_1" not in each["stages"]]
    vars(EXPERIMENT)["records"] = records
    found = {each.protocol: each for each in report.verdicts(records, CLAIM) if each.claim == "C3b"}
    assert re.search(r"1 of 5 runs of AdamW end above 0\.1", found["tuned to fit"].against)
    assert "the search is not complete" in report.verdicts(records, CLAIM)[0].against


def test_a_run_that_diverged_or_never_gets_there_is_left_out_with_its_partner() -> None:
    records = of_stages()
    for record in records:
        if record["config"]["optimizer"]["name"] == DDCADAM and record["seed"] == 2:
            if "reported" in record["stages"]:
                record |= {"diverged": True, "summary": None}
            record["at_loss"] = {"level": LEVEL, "step": None}
    vars(EXPERIMENT)["records"] = records
    found = {(each.claim, each.protocol): each for each in report.verdicts(records, CLAIM)}
    tuned, equal_loss = found["C3b", "tuned"], found["C4b", report.EQUAL_LOSS]
    assert (tuned.seeds, equal_loss.seeds) == ("4 of 5", "4 of 5")
    assert tuned.verdict == "direction only"  # four seeds that agree are never enough
    diverged = sum(record["diverged"] for record in records)
    assert f"{diverged} diverged" in report.markdown(records, CLAIM)


def test_nothing_is_reported_of_no_records(tmp_path: Path) -> None:
    (nothing,) = report.results([], CLAIM)
    assert not nothing.figures
    text = nothing.tables["table"]()
    assert "**Not complete.** Stages with missing runs: grid (0 of 24)" in text
    assert text.count("**not tested**") == 2
    assert "reported (not planned yet)" in text


def test_tables_and_figures_are_made(tmp_path: Path) -> None:
    records = of_stages()
    (made,) = report.results(records, CLAIM)
    text = made.tables["table"]()
    assert "All planned runs are recorded." in text
    for heading in ("What was chosen", "Losses", "Spare capacity", "Every seed"):
        assert f"## {heading}\n" in text
    assert text.count("### Capacity, ") == 4
    assert text.count("### Chosen by: ") == 3
    assert {*made.figures} == {*report.FIGURES.values()}
    for name, drawing in made.figures.items():
        for path in drawing.plot(tmp_path / name):
            assert path.stat().st_size > 8_000


def test_the_committed_table_is_what_its_records_make(monkeypatch: pytest.MonkeyPatch) -> None:
    records = read_lines(EXPERIMENT.results / "runs.jsonl")
    monkeypatch.setitem(vars(EXPERIMENT), "records", records)
    assert (EXPERIMENT.results / "table.md").read_text() == report.markdown(records, CLAIM)
