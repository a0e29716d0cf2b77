"""``make gpu`` as far as it shows without a GPU: every stage in its smallest form."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.record import NotHere, Place, Record, all_records, as_arguments, from_arguments
from benchmarks.gpu.report import summary
from ddc.training import records


def place(folder: Path, seconds: float = 60.0) -> Place:
    cpu = torch.device("cpu")
    return Place(cpu, True, folder / "results", folder / "runs", time.time() + seconds)


def parts_of(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "results/cpu" / f"{stage}.json").read_text())["parts"]


def set_commit(patch: pytest.MonkeyPatch, commit: str | None) -> None:
    for module in (records, gpu):
        patch.setattr(module, "commit", lambda: commit)
    patch.setattr("benchmarks.gpu.record.commit", lambda: commit)


@pytest.mark.slow
def test_every_stage_runs_in_its_smallest_form(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    gpu.main(["--device", "cpu", "--tiny", *options])
    said = capfd.readouterr().out
    found = {stage.name: parts_of(tmp_path, stage.name) for stage in gpu.STAGES}
    assert not [
        part["error"] for parts in found.values() for part in parts.values() if "error" in part
    ]
    checks = {name: part["holds"] for name, part in found["checks"].items() if "rows" in part}
    assert len(checks) == 6
    assert all(checks.values()), checks
    skipped = [
        name for parts in found.values() for name, part in parts.items() if "skipped" in part
    ]
    assert skipped == [
        "kernels as in torch",
        "nothing waits for the device",
        "step in a CUDA graph",
        "compiled step",
        "GPT, in a graph",
    ]
    for name in ("overtraining", "vision"):
        assert all(
            part["complete"] and part["summary"]["steps"] == 4 for part in found[name].values()
        )
    assert {*found["overtraining"]} == {
        f"{each}, seed 0" for each in ("adamw", "ddcadam", "ddcadam_paper")
    }
    assert (tmp_path / "results/summary.md").read_text() in said
    # the runs are recorded: the stage has nothing left to do
    before = (tmp_path / "results/cpu/vision.json").read_bytes()
    gpu.main(["--device", "cpu", "--tiny", "--stages", "vision", *options])
    assert "vision: adamw, seed 0 is recorded" in capfd.readouterr().out
    assert (tmp_path / "results/cpu/vision.json").read_bytes() == before


def test_without_a_gpu_it_says_so_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 1
    assert "torch finds no GPU here: --device cpu --tiny" in capsys.readouterr().err


def test_a_commit_is_asked_for_where_there_is_no_checkout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_commit(monkeypatch, None)
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--tiny"])
    assert "--commit is needed" in capsys.readouterr().err


def test_the_commit_that_is_handed_over_is_that_of_a_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DDC_COMMIT", "abc")
    assert records.commit() == "abc"  # git may have gone along from an earlier time
    monkeypatch.delenv("DDC_COMMIT")
    assert records.commit() != "abc"
    monkeypatch.setattr(records, "__file__", str(tmp_path / "a/b/c.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit() is None


def test_parts_are_made_once_for_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def good() -> dict[str, Any]:
        made.append("good")
        return {"value": 1}

    def bad() -> dict[str, Any]:
        made.append("bad")
        raise RuntimeError("no luck")

    def absent() -> dict[str, Any]:
        made.append("absent")
        raise NotHere("a GPU is needed")

    parts = {"good": good, "bad": bad, "absent": absent}

    def make() -> None:
        made.clear()
        Record(place(tmp_path), "checks").make(parts)

    set_commit(monkeypatch, "a")
    make()
    assert made == ["good", "bad", "absent"]
    recorded = parts_of(tmp_path, "checks")
    assert recorded["good"]["value"] == 1
    assert recorded["bad"]["error"] == "RuntimeError: no luck"
    assert recorded["absent"]["skipped"] == "a GPU is needed"
    make()
    assert made == ["bad"]
    set_commit(monkeypatch, "b")
    make()
    assert made == ["good", "bad", "absent"]
    set_commit(monkeypatch, "b+")  # which code that is nobody knows
    make()
    make()
    assert made == ["good", "bad", "absent"]
    assert not Record(place(tmp_path), "checks").is_done("good", ["seed=0"])
    Record(place(tmp_path), "overtraining").write("run", {"overrides": ["seed=0"]})
    assert Record(place(tmp_path), "overtraining").is_done("run", ["seed=0"])
    assert not Record(place(tmp_path), "overtraining").is_done("run", ["seed=1"])
    (tmp_path / "results/cpu/overtraining.json").unlink()
    assert "RuntimeError: no luck" in summary(all_records(tmp_path / "results"))


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    record = Record(place(tmp_path, seconds=-1), "checks")
    record.make({"part": lambda: pytest.fail("begun")})
    assert not record.path.exists()


def test_a_place_is_handed_to_the_process_of_a_stage(tmp_path: Path) -> None:
    assert from_arguments(as_arguments(here := place(tmp_path))) == here


def test_a_stage_that_overruns_is_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    began = time.time()
    gpu.watch(gpu.STAGES[0], place(tmp_path, seconds=1.2))  # its imports alone take longer
    assert time.time() - began < 30
    assert "stopped at the end of its time" in capfd.readouterr().out
    gpu.watch(gpu.STAGES[0], place(tmp_path, seconds=0.5))
    assert "checks: no time is left" in capfd.readouterr().out
