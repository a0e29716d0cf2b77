"""How the kernels in C are made, kept and run; what they compute is in test_fused.py."""

from __future__ import annotations

import copy
import pickle
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ddc import DDCAdam, find_gauges
from ddc.gauges import Gauge, RotatedAxis, Rotation
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
            p.grad = torch.randn(p.shape, generator=draw).to(p)
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
    first = native.fingerprint(["cc"])
    changed = tmp_path / "kernels.c"
    changed.write_text(native.SOURCE.read_text() + "\n")
    monkeypatch.setattr(native, "SOURCE", changed)
    assert native.fingerprint(["cc"]) != first


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_torch_steps(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not fused.available(CPU)
    assert not caplog.text
    model = nn.Linear(4, 3)
    assert all(map(torch.equal, steps(model), steps(model, fused=False)))


def test_a_compiler_may_have_arguments_and_one_that_is_missing_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "cc -pipe")
    assert fused.available(CPU)
    native.library.cache_clear()
    fused.available.cache_clear()
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    assert not fused.available(CPU)
    assert "there-is-no-such-compiler" in caplog.text


def test_nothing_is_compiled_where_torch_is_to_step(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*_: object) -> None:
        pytest.fail("compiled")

    monkeypatch.setattr(native, "compiled", compiled)
    steps(nn.Linear(4, 3), fused=False)
    steps(nn.Linear(4, 3).double())


def test_a_pickled_optimizer_goes_on_where_there_is_no_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 3)
    optimizer = DDCAdam(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    pickled = pickle.dumps((model, optimizer))
    optimizer.step()
    for each in (native.library, native.kernel_of, fused.available):
        each.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    other, again = pickle.loads(pickled)
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    again.step()
    torch.testing.assert_close(model.weight, other.weight)


def test_a_compiler_that_fails_is_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "cc", "echo no such header >&2; exit 1"))
    assert not fused.available(CPU)
    assert "no such header" in caplog.text
    assert "fused=False" in caplog.text


def test_what_others_may_write_is_not_run(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    assert not fused.available(CPU)
    assert f"others may write to {cache}" in caplog.text


def test_a_user_without_a_home_is_no_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert not fused.available(CPU)
    assert "home directory" in caplog.text


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


def one_step(parameters: list[nn.Parameter], gauges: Sequence[Gauge] = (), **options: Any) -> None:
    """Of named parameters that have their gradients."""
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    DDCAdam(named, gauges, **{"lr": 0.01, **options}).step()


@pytest.mark.parametrize("columns", [8192, 8320])
def test_a_matrix_of_many_columns_under_a_rotation(columns: int) -> None:
    """The tables of ones end at 8,192."""
    indices = np.arange(columns).reshape(-1, 1, 64)
    slots = RotatedAxis("p0", 1, indices), RotatedAxis("p1", 0, indices)
    gauge = Rotation("value_rotation", "attention", slots, reflections=True)
    found = []
    for by_kernels in (True, False):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(*shape)) for shape in ((4, columns), (columns, 3))]
        for p in parameters:
            p.grad = torch.randn_like(p)
        one_step(parameters, [gauge], fused=by_kernels)
        found.append(parameters)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
def test_parameters_without_entries(shape: tuple[int, ...]) -> None:
    empty, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(3))
    for p in (empty, other):
        p.grad = torch.ones_like(p)
    one_step([empty, other])
    assert (other < 1).all()


@pytest.mark.parametrize("name", ["lr", "weight_decay", "radial_rate", "eps"])
def test_hyperparameters_that_are_tensors_of_another_dtype(name: str) -> None:
    value = {"lr": 0.01, "weight_decay": 0.1, "radial_rate": 0.5, "eps": 1e-4}[name]
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=8, layers=1, width=32, heads=2, kv_heads=1, hidden=44), 13)
    gauges, found = find_gauges(model), []
    for given in (value, torch.tensor([value], dtype=torch.float64)):
        own = copy.deepcopy(model)
        for p in own.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        DDCAdam(own.named_parameters(), gauges, **{name: given}).step()
        found.append(own)
    for p, q in zip(*(each.parameters() for each in found), strict=True):
        torch.testing.assert_close(p, q)


def test_a_weight_that_shrank_is_no_business_of_kernels() -> None:
    """They would write beyond it."""
    model, room = nn.Linear(64, 512, bias=False), torch.zeros(512, 64)
    optimizer = DDCAdam(model.named_parameters(), lr=0.01)
    model.weight.data = room[:4]
    model.weight.grad = torch.ones(4, 64)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert not room[4:].any()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has none")
def test_gradients_of_another_dtype_are_left_to_torch() -> None:
    found = []
    for by_kernels in (True, False):
        p = nn.Parameter(torch.ones(40, 30))
        p.grad_dtype = None
        p.grad = torch.randn(
            40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        one_step([p], fused=by_kernels)
        found.append(p)
    assert torch.equal(*found)
