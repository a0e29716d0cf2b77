"""How the kernels in C are made, kept and run; what they compute is in test_fused.py."""

from __future__ import annotations

import copy
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ddc import DDCAdam, find_gauges
from ddc.models import GPT, GPTConfig
from ddc.optim import fused, native

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def forget() -> None:
        for each in (native.library, native.kernel_of, fused.available):
            each.cache_clear()

    forget()
    yield tmp_path / "ddc"
    forget()


def steps(model: nn.Module, **options: bool) -> list[torch.Tensor]:
    """The weights after three steps of a copy."""
    own = copy.deepcopy(model)
    optimizer = DDCAdam(own.named_parameters(), find_gauges(own), lr=0.01, **options)
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        for p in own.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
    return [p.detach() for p in own.parameters()]


def test_they_are_compiled_once_for_nobody_else_to_write_to(cache: Path) -> None:
    assert native.library() is not None
    (made,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    before = made.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [*cache.iterdir()] == [made]
    assert made.stat().st_mtime_ns == before


def test_another_processor_or_source_has_its_own(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = native.fingerprint("cc")
    changed = tmp_path / "kernels.c"
    changed.write_text(native.SOURCE.read_text() + "\n")
    monkeypatch.setattr(native, "SOURCE", changed)
    assert native.fingerprint("cc") != first


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_torch_steps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    assert not fused.available(CPU)
    model = nn.Linear(4, 3)
    assert all(map(torch.equal, steps(model), steps(model, fused=False)))


def test_a_compiler_that_fails_is_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "cc", "echo no such header >&2; exit 1"))
    assert not fused.available(CPU)
    assert "no such header" in caplog.text
    assert "fused=False" in caplog.text


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not fused.available(CPU)
    assert "does not make kernels" in caplog.text


def test_a_compiler_without_march_is_asked_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = 'case "$*" in *-march=native*) exit 1;; esac\nexec cc "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "cc", real))
    assert native.library() is not None


def test_any_number_of_threads_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WORTH_A_THREAD", 1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=8, layers=2, width=32, heads=2, kv_heads=1, hidden=44), 13)
    one = steps(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = steps(model)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, one, three))
