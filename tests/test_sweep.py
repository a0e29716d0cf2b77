"""Sweeps: what is complete is skipped, what stopped resumes, what crashes stops nothing else."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddc.training.checkpoint import checkpoints
from ddc.training.compose import compose_alike, compose_config
from ddc.training.lock import BusyError, only_process_in
from ddc.training.loop import train
from ddc.training.records import Records
from ddc.training.run_folder import OUTPUT
from ddc.training.schema import Config
from ddc.training.setup import prepare
from ddc.training.sweep import read_sweep, run_missing, summary
from tests.test_training import ROOT, TINY_GROK, composed


def sweep_file(folder: Path, *lines: str) -> Path:
    path = folder / "sweep.txt"
    start = " ".join(["+experiment=grok_mlp", *TINY_GROK, f"runs={folder}"])
    path.write_text("# a comment\n\n" + "".join(f"{start} {line}\n" for line in lines))
    return path


def sweep(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/sweep.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_crash_stops_nothing_and_the_summary_says_what_is_missing(tmp_path: Path) -> None:
    good = ["optimizer=ddcmuon seed=0", "optimizer=ddcmuon seed=1", "optimizer=muon"]
    crash = "optimizer=adamw training.device=cuda"  # valid, but not on a machine without a GPU
    path = sweep_file(tmp_path, good[0], crash, *good[1:])
    first = sweep("run", path, "--jobs", 2)
    assert first.returncode == 1
    assert "4 runs: 3 complete, 1 failed" in first.stdout
    assert "training.device=cuda" in first.stdout
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("grok_mlp/*/records.jsonl")}
    assert len(stamps) == 3
    again = sweep("run", sweep_file(tmp_path, *good), "--jobs", 2)
    assert again.returncode == 0
    assert "3 runs: 3 complete" in again.stdout
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.glob("grok_mlp/*/records.jsonl")}


LONGER = "training.steps=100 training.evaluations=4"
#: Ways to crash: what the line of the run adds, the signal that kills it or None, and what its
#: output says in the end.
CRASHES = (
    (LONGER, signal.SIGKILL, "100 steps, from step"),  # as the system does it when memory is out
    (LONGER, signal.SIGSEGV, "100 steps, from step"),  # as an extension does it that is wrong
    ("training.batch_size=1000", None, "error: Invalid training.batch_size=1000"),
    ("model.width=10000000", None, "memory"),
)


@pytest.mark.slow
def test_a_tenth_of_200_runs_crash(tmp_path: Path) -> None:
    crashes = {seed: CRASHES[seed // 10 % len(CRASHES)] for seed in range(7, 200, 10)}
    runs = read_sweep(sweep_file(tmp_path, *(
        f"optimizer={('adamw', 'muon')[seed // 2 % 2]} seed={seed} "
        "training.steps=2 training.evaluations=1 "
        + crashes.get(seed, [""])[0]
        for seed in range(200)
    )))  # fmt: skip
    victims = {
        runs[seed].folder.name: (runs[seed].folder, crash[1])
        for seed, crash in crashes.items()
        if crash[1]
    }
    assert (len(runs), len(crashes), len(victims)) == (200, 20, 10)

    def kill_them() -> None:
        """Each once, after its second checkpoint."""
        waiting = dict(victims)
        while not all_ended.wait(0.01):
            for process in multiprocessing.active_children():
                if process.name in waiting and len(checkpoints(waiting[process.name][0])) > 1:
                    os.kill(process.pid, waiting.pop(process.name)[1])

    all_ended = threading.Event()
    killer = threading.Thread(target=kill_them)
    killer.start()
    try:
        run_missing(runs, jobs=2)
    finally:
        all_ended.set()
        killer.join()
    first, *others = summary(runs).splitlines()
    assert first == "200 runs: 180 complete, 10 unfinished, 10 failed"
    assert len(others) == 20
    for (seed, (_, number, _)), line in zip(crashes.items(), others, strict=True):
        assert line.split()[0] == ("unfinished" if number else "failed")
        assert line.endswith(f"in {runs[seed].folder}")
    for seed in set(range(200)) - set(crashes):
        assert [row["step"] for row in Records(runs[seed].folder / "records.jsonl").read()] == [
            0,
            2,
        ]
    outputs = [(run.folder / "output.log").read_text() for run in runs]

    run_missing(runs, jobs=2)
    assert summary(runs).startswith("200 runs: 190 complete, 10 failed\n")
    for seed, (run, before) in enumerate(zip(runs, outputs, strict=True)):
        added = (run.folder / "output.log").read_text().removeprefix(before)
        assert crashes[seed][2] in added if seed in crashes else not added
    for run in (runs[seed] for seed in (0, 7, 17, 199)):  # two of which were killed
        alone = prepare(dataclasses.replace(run.config, runs=str(tmp_path / "alone")))
        train(alone)
        assert (run.folder / "records.jsonl").read_bytes() == (
            alone.folder / "records.jsonl"
        ).read_bytes()


@pytest.mark.slow
def test_a_run_that_diverged_is_a_result_and_is_not_run_again(tmp_path: Path) -> None:
    path = sweep_file(
        tmp_path, "optimizer=adamw optimizer.lr=1e15 training.warmup=1.0 training.decay=0.0"
    )
    assert "1 runs: 1 diverged" in sweep("run", path).stdout
    log = read_sweep(path)[0].folder / "output.log"
    before = log.read_bytes()
    again = sweep("run", path)
    assert again.returncode == 0
    assert "1 runs: 1 diverged" in again.stdout
    assert log.read_bytes() == before


@pytest.mark.slow
def test_a_task_of_an_array_is_the_same_run(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, "optimizer=muon", "optimizer=ddcmuon")
    assert sweep("task", path, 1).returncode == 0
    states = [run.state for run in read_sweep(path)]
    assert states == ["missing", "complete"]
    here = prepare(
        composed("+experiment=grok_mlp", "optimizer=ddcmuon", f"runs={tmp_path / 'here'}")
    )
    train(here)
    there = read_sweep(path)[1].folder
    assert there.name == here.folder.name
    assert (there / "records.jsonl").read_bytes() == (here.folder / "records.jsonl").read_bytes()
    outside = sweep("task", path, 2)
    assert outside.returncode == 1
    assert "INDEX=2" in outside.stderr


def test_bad_lines_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 4: .*model.depth=0"):
        read_sweep(sweep_file(tmp_path, "optimizer=muon", "model.depth=0"))
    with pytest.raises(ValueError, match="line 4: the same run as line 3"):
        read_sweep(sweep_file(tmp_path, "optimizer=muon", "optimizer=muon wandb=offline"))
    with pytest.raises(ValueError, match=r"line 3: .*nonsense"):
        read_sweep(sweep_file(tmp_path, "nonsense=1"))
    with pytest.raises(
        ValueError, match=r"line 3: .*optimizer.orthogonalizer=svd: expected one of newton_schulz"
    ):
        read_sweep(sweep_file(tmp_path, "optimizer=ddcmuon optimizer.orthogonalizer=svd"))
    with pytest.raises(ValueError, match=r"line 4: .*quot"):
        read_sweep(sweep_file(tmp_path, "optimizer=muon", "optimizer='muon"))
    assert summary(read_sweep(sweep_file(tmp_path, "seed=1"))).startswith("1 runs: 1 missing")


@pytest.mark.parametrize(
    "line",
    [
        "optimizer=muon seed=3 optimizer.lr=0.5 seed=4",
        (
            "+experiment=lm_overtrain 'gauges=[logit_shift,value_rotation]'"
            " optimizer.betas=[0.8,0.99] wandb.entity=null"
        ),
        "optimizer={lr: 0.1} optimizer=adamw ++seed=4 ~slt.rule.kink +slt.rule.kink=0.5",
        (
            "scale=gpu training.precision=float32 optimizer.weight_decay=${optimizer.lr}"
            " hydra.job.name=x"
        ),
        "optimizer=adamw name='a-b' runs=\"x y\"",
        "optimizer=adamw,muon",
        "seed=1,2",
        "seed@data=1",
        "training.epochs=3",
        "training.steps=1e3",
        "model.heads=3",
        "slt=false",
        "model=nonsense",
    ],
)
def test_a_line_is_what_the_command_line_makes_of_it(line: str) -> None:
    """Its choices are composed once for all lines, its values set on a copy: no line may tell."""

    def made(compose: Callable[[list[str]], Config]) -> Config | str:
        try:
            return compose(shlex.split(line))
        except ValueError as error:
            return str(error)

    assert made(compose_alike) == made(compose_alike) == made(compose_config)


def test_an_empty_file_has_nothing_to_submit(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("# nothing\n")
    submitted = subprocess.run(
        ["bash", "slurm/submit.sh", str(path)], cwd=ROOT, capture_output=True, text=True,
        check=False,
        env={**os.environ, "DDC_PYTHON": sys.executable},
    )  # fmt: skip
    assert submitted.returncode != 0
    assert "has no runs" in submitted.stderr


def test_folders_do_not_depend_on_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.txt"
    path.write_text("+experiment=grok_mlp runs=runs/here\n")
    here = read_sweep(path)[0].folder
    monkeypatch.chdir(tmp_path)
    assert read_sweep(path)[0].folder == here
    assert here.is_relative_to(ROOT / "runs/here")


LONG = "training.steps=2000 training.evaluations=40"


@pytest.mark.slow
def test_a_killed_run_resumes_and_two_processes_do_not_meet(tmp_path: Path) -> None:
    """SIGTERM to the sweep ends its run with a checkpoint; while it runs, nobody else can."""
    path = sweep_file(tmp_path, f"optimizer=muon {LONG}")
    (run,) = read_sweep(path)
    first = subprocess.Popen([sys.executable, "scripts/sweep.py", "run", path], cwd=ROOT)
    timing = run.folder / "timing.jsonl"
    wait_for(lambda: timing.exists() and len(timing.read_text().splitlines()) > 3)
    assert run.state == "running"
    with pytest.raises(BusyError, match="another process is at work"), only_process_in(run.folder):
        pass
    first.terminate()
    assert first.wait(timeout=120) == 1
    assert run.state == "unfinished"
    before = timing.read_text().splitlines()[:-1]
    again = subprocess.Popen([sys.executable, "scripts/sweep.py", "run", path], cwd=ROOT)
    wait_for(lambda: run.state == "running")
    again.kill()  # the sweep alone: its run goes on
    again.wait()
    wait_for(lambda: run.state != "running")
    assert run.state == "complete", (run.folder / OUTPUT).read_text()
    lines = timing.read_text().splitlines()
    assert lines[: len(before)] == before  # resumed, not started over
    rows = [
        json.loads(line)["step"] for line in (run.folder / "records.jsonl").read_text().splitlines()
    ]
    assert rows == list(range(0, 2001, 50))


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
