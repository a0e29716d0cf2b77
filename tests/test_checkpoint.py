"""Checkpoints when things break: damaged, hostile, a full disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddc.training import loop
from ddc.training.checkpoint import (
    KEPT,
    CheckpointError,
    checkpoints,
    read_checkpoint,
    step_of,
    write_checkpoint,
)
from ddc.training.loop import train
from ddc.training.records import Records
from ddc.training.run_folder import start_folder
from ddc.training.setup import restore
from tests.test_training import assert_same_run, run, run_folder, train_py


def broken_off(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, *overrides: str, at: int = 9
) -> Path:
    """The folder of a run that was killed after the checkpoint of a step."""

    class Killed(BaseException):
        pass

    original = loop.save_checkpoint

    def save_then_die(folder: Path, step: int, *arguments: object) -> None:
        original(folder, step, *arguments)
        if step == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_then_die)
        setup = run(tmp_path / name, *overrides)
        with pytest.raises(Killed):
            train(setup)
    return setup.folder


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "one bit": flip,
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_known_and_the_one_before_is_taken(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole")
    train(whole)
    folder = broken_off(tmp_path, "broken", monkeypatch)
    assert len(checkpoints(folder)) == KEPT
    last = checkpoints(folder)[0]
    last.write_bytes(DAMAGE[damage](last.read_bytes()))
    with caplog.at_level(logging.WARNING):
        train(run(tmp_path / "broken"))
    assert f"{last} is damaged" in caplog.text
    assert_same_run(whole.folder, folder)
    steps = [row["step"] for row in Records(folder / "records.jsonl").read()]
    assert steps == [0, 3, 6, 9, 12]


def test_checkpoints_have_a_schedule_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 2, 5, 7, 10 and 12 steps, evaluations after 0, 3, 6, 9 and 12: broken off at either, a
    run ends with the same bytes.
    """
    whole = run(tmp_path / "whole")
    train(whole)
    saved: list[int] = []
    original = loop.save_checkpoint

    def save(folder: Path, step: int, *arguments: object) -> None:
        saved.append(step)
        original(folder, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        folder = broken_off(tmp_path, "broken", monkeypatch, "training.checkpoints=5", at=7)
        assert folder.name == whole.folder.name
        assert [step_of(path) for path in checkpoints(folder)] == [7, 5]
        train(run(tmp_path / "broken", "training.checkpoints=5"))
    assert saved == [2, 5, 7, 10, 12]
    assert_same_run(whole.folder, folder)
    # broken off with records that no checkpoint is behind, and gone on from with another schedule
    other = broken_off(tmp_path, "other", monkeypatch, "training.checkpoints=5", at=10)
    checkpoints(other)[0].unlink()
    assert [row["step"] for row in Records(other / "records.jsonl").read()] == [0, 3, 6, 9]
    train(run(tmp_path / "other"))
    assert_same_run(whole.folder, other)


def test_nothing_whole_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken_off(tmp_path, "broken", monkeypatch)
    for path in checkpoints(folder):
        path.write_bytes(b"")
    before = (folder / "records.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError,
        match=r"all 2 checkpoints .* are damaged; start over with training\.resume=never",
    ):
        train(run(tmp_path / "broken"))
    assert (folder / "records.jsonl").read_bytes() == before
    with pytest.raises(CheckpointError):
        restore(folder)
    train(run(tmp_path / "broken", "training.resume=never"))
    assert read_checkpoint(folder)["step"] == 12


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive")
def test_a_hostile_checkpoint_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what else may lie there under the right name end in a traceback."""
    folder = broken_off(tmp_path, "broken", monkeypatch)
    proof = tmp_path / "executed"

    def saved(content: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)), script)
    hostile = saved({"step": Hostile(proof)})
    for content in (
        script.getvalue(),
        b"",
        b"no archive",
        saved([1, 2]),
        saved({"model": {}}),
        hostile,
    ):
        for path in checkpoints(folder):
            path.unlink()
        (folder / f"checkpoint-{9:09d}-{hashlib.sha256(content).hexdigest()}.pt").write_bytes(
            content
        )
        for attempt in (lambda: train(run(tmp_path / "broken")), lambda: restore(folder)):
            with pytest.raises(CheckpointError, match="may be hostile: it is not loaded"):
                attempt()
            assert not proof.exists()
    torch.load(io.BytesIO(hostile), weights_only=False)  # the file is dangerous indeed
    assert proof.exists()


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 is damaged, so the run goes on from 6, and is stopped again after 7: 6 is still there, 9 no
    more.
    """
    folder = broken_off(tmp_path, "broken", monkeypatch)
    last, before = checkpoints(folder)
    last.write_bytes(b"")
    write_checkpoint(folder, step_of(before) + 1, read_checkpoint(folder))
    assert checkpoints(folder)[1:] == [before]
    assert step_of(checkpoints(folder)[0]) == step_of(before) + 1


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounts a tmpfs")
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    train(whole)
    size = sum(path.stat().st_size for path in whole.folder.iterdir())
    kilobytes = size // 1024 + 48  # two checkpoints fit, a third beside them does not
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        with pytest.raises(OSError, match="No space left on device"):
            train(run(disk))
        folder = next(disk.glob("gpt/*"))
        assert not list(folder.glob("*.tmp"))
        assert read_checkpoint(folder) is not None
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        train(run(disk))
        assert_same_run(whole.folder, folder)


def test_a_disk_that_is_full_within_a_record_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = "training.evaluations=12"
    whole = run(tmp_path / "whole", often)
    train(whole)
    page = os.sysconf("SC_PAGE_SIZE")
    with small_disk(tmp_path / "disk", 8192) as disk:
        filler, original = disk / "filler", loop.save_checkpoint

        def save_then_fill_the_disk(folder: Path, *arguments: object) -> None:
            original(folder, *arguments)
            rows = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
            if (
                len(rows) > 2 and sum(map(len, rows)) % page + len(rows[-1]) > page
            ):  # a part of the next one fits
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(page))

        with monkeypatch.context() as patch:
            patch.setattr(loop, "save_checkpoint", save_then_fill_the_disk)
            with pytest.raises(OSError, match="No space left on device"):
                train(run(disk, often))
        folder = next(disk.glob("gpt/*"))
        cut = (folder / "records.jsonl").read_bytes()
        assert not cut.endswith(b"\n")  # it was the record that did not fit
        with pytest.raises(OSError, match="No space left on device"):
            train(run(disk, often))
        assert (folder / "records.jsonl").read_bytes() == cut
        filler.unlink()
        train(run(disk, often))
        assert_same_run(whole.folder, folder)


def test_starting_over_may_be_killed_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the old run is gone on from without a gap, or not at all."""
    whole = run(tmp_path / "whole")
    train(whole)

    class Killed(BaseException):
        pass

    unlink, deaths = Path.unlink, 0
    for allowed in itertools.count():
        shutil.copytree(tmp_path / "whole", tmp_path / str(allowed))
        left = allowed

        def unlink_then_die(path: Path, **options: bool) -> None:
            nonlocal left
            if path.exists():
                if not left:
                    raise Killed
                left -= 1
            unlink(path, **options)

        again = run(tmp_path / str(allowed), "training.resume=never")
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(Path, "unlink", unlink_then_die)
            start_folder(again)
            break
        deaths += 1
        train(run(tmp_path / str(allowed)))
        assert_same_run(whole.folder, again.folder)
    assert deaths == 5  # summary, two checkpoints, records, timing


@pytest.mark.slow
def test_the_command_line_says_in_one_line_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = train_py(f"runs={tmp_path}", "training.steps=12")
    process.communicate(timeout=120)
    folder = run_folder(tmp_path)
    (folder / "summary.json").unlink()
    for path in checkpoints(folder):
        path.write_bytes(b"")
    process = train_py(f"runs={tmp_path}", "training.steps=12")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "stopped: all 2 checkpoints" in output
    assert "Traceback" not in output
