"""What W&B gets: a claim's table follows from it alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ddc.report.claims import load_claims, verdict_table
from ddc.report.rates import by_layer, settings
from ddc.report.runs import Run, read_lines
from ddc.slt.rates import APPROACHES, read_cells
from ddc.training import loop
from ddc.training.loop import train
from ddc.training.mirror import CELL_COLUMNS, Mirror
from ddc.training.records import summarize
from ddc.training.run_folder import DivergedError
from ddc.training.schema import Config
from ddc.training.sweep import parse_sweep
from experiments.lm_overtrain import plan as c1_plan
from experiments.lm_overtrain import report as c1
from experiments.protocols import EXPERIMENTS, ROOT
from experiments.rates import plan as c2_plan
from experiments.rates import report as c2
from tests.test_readings import LLC, READ
from tests.test_training import composed, run
from tests.wandb_files import Sent, sent

CLAIM = load_claims(EXPERIMENTS)
TABLES = ("cells", "grid")
NAMES = ["wandb.group=lm_overtrain", "wandb.job_type=tuned", "wandb.tags=[C1,tuned]"]


def without_time(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a history without times, readings and tables, and without what W&B adds."""
    return [
        {
            k: v
            for k, v in row.items()
            if not k.startswith(("_", "slt/")) and "second" not in k and k not in TABLES
        }
        for row in rows
    ]


def test_wandb_gets_every_record_and_every_cell(tmp_path: Path) -> None:
    setup = run(tmp_path, "wandb=offline", *NAMES, *READ, *LLC)
    summary = train(setup)
    found, here = sent(setup.folder), Run.read(setup.folder)
    assert (found.id, found.group, found.job_type, found.tags) == (
        setup.config.run_id, "lm_overtrain", "tuned", ["C1", "tuned"]
    )  # fmt: skip
    identity = json.loads(json.dumps(setup.config.identity))
    assert found.config == {
        **identity,
        "commit": here.info["commit"],
        "_wandb": found.config["_wandb"],
    }
    assert without_time(found.rows("gap")) == here.rows
    timing = read_lines(setup.folder / "timing.jsonl")
    assert [row["tokens_per_second"] for row in found.rows("gap")] == [
        row["tokens_per_second"] for row in timing
    ]
    assert {key: found.summary[key] for key in summary} == summary
    assert found.exit_code == 0
    for mine, row in zip(here.readings, found.rows("slt/loss"), strict=True):
        assert (row["slt/loss"], row["slt/arc_length"]) == (mine["loss"], mine["arc_length"])
        for layer in mine["layers"]:
            assert {name: row[f"slt/{layer['layer']}/{name}"] for name in layer["values"]} == layer[
                "values"
            ]
        for key, value in mine.get("learning_coefficient", {}).items():
            assert row[f"slt/learning_coefficient/{key}"] == value
    rule, primary, floor = settings(here)
    cells = {each: read_cells(here.readings, each, rule, floor) for each in APPROACHES}
    everything = [cell.record() for each in cells.values() for cell in each]
    assert found.tables["cells"] == [
        {key: each.get(key) for key in CELL_COLUMNS} for each in everything
    ]
    assert [row["layer"] for row in found.tables["grid"]] == list(by_layer(cells[primary]))
    for cell in cells[primary]:
        assert found.summary[f"cell/{cell.layer}/{cell.observable}"] == cell.record()
    for approach, each in cells.items():
        assert found.summary[f"cells/{approach}/total"] == len(each)
        assert found.summary[f"cells/{approach}/read"] == sum(cell.rate.read for cell in each)


def test_offline_the_last_file_of_a_run_that_went_on_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = loop.train_step, 0

    def stop_once(*arguments: Any, **options: Any) -> float | None:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", stop_once)
    with pytest.raises(KeyboardInterrupt):
        train(run(tmp_path, "wandb=offline", *READ))
    setup = run(tmp_path, "wandb=offline", *READ)
    first = sent(setup.folder)
    assert (first.exit_code, first.summary["stopped_by"]) == (1, "KeyboardInterrupt")
    train(setup)
    found, here = sent(setup.folder), Run.read(setup.folder)
    assert found.exit_code == 0
    assert without_time(found.rows("gap")) == here.rows
    assert [row["slt/loss"] for row in found.rows("slt/loss")] == [
        row["loss"] for row in here.readings
    ]


def test_wandb_knows_a_run_that_diverged(tmp_path: Path) -> None:
    setup = run(
        tmp_path,
        "wandb=offline",
        "optimizer=adamw",
        "optimizer.lr=1e12",
        "training.max_grad_norm=null",
    )
    with pytest.raises(DivergedError):
        train(setup)
    assert sent(setup.folder).summary["stopped_by"] == "DivergedError"


def test_names_in_wandb_leave_the_run_as_it_is() -> None:
    assert composed(*NAMES).run_id == composed().run_id
    for key, value in (
        ("tags", "[a,a]"),
        ("tags", "['']"),
        ("job_type", "''"),
        ("group", "x" * 129),
    ):
        with pytest.raises(ValueError, match=rf"Invalid wandb\.{key}="):
            composed(f"wandb.{key}={value}")


def mirrored(
    config: Config, folder: Path, rows: list[dict], readings: list[dict], summary: dict
) -> Sent:
    """A run that has been, sent to W&B by what sends a run that is; and what came of it."""
    mirror = Mirror(config, folder)
    mirror.catch_up(rows, readings)
    mirror.finish(summary, readings)
    assert mirror._run is not None, "W&B failed"
    return sent(folder)


def sweep_of(lines: list[str]) -> dict[str, Config]:
    """Configurations by run id."""
    return {each.config.run_id: each.config for each in parse_sweep(lines)}


@pytest.mark.slow
def test_the_table_of_c1_follows_from_wandb(tmp_path: Path) -> None:
    committed = {record["id"]: record for record in c1_plan.EXPERIMENT.records}
    rebuilt = []
    for stage in ("matched", "tuned"):
        for name, config in sweep_of(c1_plan.EXPERIMENT.plan_lines(stage, str(tmp_path))).items():
            record = committed[name]
            curve = record["curve"]
            rows = [
                dict(zip(curve, values, strict=True))
                for values in zip(*curve.values(), strict=True)
            ]
            rows = [{**row, "gap": row["validation_loss"] - row["train_loss"]} for row in rows]
            found = mirrored(config, tmp_path / name, rows, [], record["summary"])
            assert found.group == "lm_overtrain"
            assert found.tags == ["C1", "C8", stage]
            levels = found.config["training"]["gap_levels"]
            rebuilt.append(
                {
                    "stages": {found.job_type: json.dumps(found.config["optimizer"])},
                    "config": found.config,
                    "seed": found.config["seed"],
                    "diverged": "stopped_by" in found.summary,
                    "summary": summarize(found.rows("gap"), levels),
                }
            )
    assert len(rebuilt) == 20
    protocols = [
        record for record in committed.values() if {"matched", "tuned"} & {*record["stages"]}
    ]
    expected = c1.gap_verdicts(protocols, CLAIM["C1"])
    found_again = c1.gap_verdicts(rebuilt, CLAIM["C1"])
    assert verdict_table(CLAIM, found_again) == verdict_table(CLAIM, expected)


@pytest.mark.slow
def test_the_table_of_c2_follows_from_wandb(tmp_path: Path) -> None:
    committed = {each.run.folder: each for each in c2.read_folder(ROOT / "results/rates/small")}
    rebuilt = []
    for folder, planned in c2_plan.EXPERIMENT.sweep("small", str(tmp_path)).items():
        run = committed[folder].run
        found = mirrored(
            planned.config, tmp_path / folder.name, run.rows, run.readings, run.summary or {}
        )
        assert (found.group, found.job_type, found.tags) == ("rates", "small", ["C2", "matched"])
        primary = found.config["slt"]["approach"]
        cells = [row for row in found.tables["cells"] if row["approach"] == primary]
        counts = {"read": sum(cell["verdict"] == "read" for cell in cells)}
        approaches = {primary: {"total": len(cells), "counts": counts, "cells": cells}}
        info = {"id": found.id, "config": found.config, "seed": found.config["seed"]}
        rebuilt.append(
            c2.Reading(
                Run(tmp_path, info, [], [], None), {"primary": primary, "approaches": approaches}
            )
        )
        recorded = committed[folder].primary["cells"]
        for mine, cell in zip(cells, recorded, strict=True):
            assert mine == pytest.approx({key: cell.get(key) for key in CELL_COLUMNS})
    assert len(rebuilt) == 6
    expected = c2.verdicts(c2.Committed([*committed.values()]), CLAIM)
    assert verdict_table(CLAIM, c2.verdicts(c2.Committed(rebuilt), CLAIM)) == verdict_table(
        CLAIM, expected
    )
