"""Weights in formats of few bits: what is rounded, to what, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddc.gauges import named_parameters
from ddc.training import loop
from ddc.training.checkpoint import read_checkpoint
from ddc.training.formats import in_bfloat16, in_float8, round_weights_
from ddc.training.loop import train
from ddc.training.setup import Setup, restore
from tests.test_training import composed, run

FORMATS = ("bfloat16", "float8")
#: All finite numbers of e4m3, ascending.
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[E4M3.isfinite()].unique()


def matrix(seed: int, size: float = 1.0) -> torch.Tensor:
    """Entries over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(40, 30, generator=generator).pow(3)


def scale_of(weight: torch.Tensor) -> float:
    """The power of two that takes the largest entry to (224, 448], found by trying."""
    largest = float(weight.abs().max())
    return next(2.0**k for k in range(126, -127, -1) if largest * 2.0**k <= 448)


@pytest.mark.parametrize("size", [1.0, 448.0, 3e-30, 1e30, 2.0**-9])
@pytest.mark.parametrize("seed", range(3))
def test_float8_is_the_nearest_number_of_e4m3_at_one_scale(seed: int, size: float) -> None:
    weight = matrix(seed, size)
    rounded = in_float8(weight)
    scale = scale_of(weight)
    assert bool(torch.isin(rounded * scale, E4M3).all())
    nearest = (weight[..., None] * scale - E4M3).abs().amin(-1)
    assert torch.equal(((rounded - weight) * scale).abs(), nearest)
    assert torch.equal(in_float8(rounded), rounded)  # idempotent
    assert torch.equal(in_float8(-weight), -rounded)
    # where the scale is 1 it is torch's cast
    if scale == 1:
        assert torch.equal(rounded, weight.to(torch.float8_e4m3fn).float())


def test_float8_agrees_with_torch_where_no_scale_is_needed() -> None:
    for seed in range(20):
        weight = matrix(seed)
        weight[0, 0] = 448
        weight = weight.clamp(-448, 448)
        assert torch.equal(in_float8(weight), weight.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("largest", [224.0, 224.1, 447.9, 448.0, 448.1, 2.0**100, 2.0**-120])
def test_the_largest_entry_never_overflows(largest: float) -> None:
    weight = torch.tensor([[largest, -largest / 3, 0.0]])
    rounded = in_float8(weight)
    assert float(rounded[0, 0]) == pytest.approx(largest, rel=1 / 16)
    assert torch.equal(in_float8(rounded), rounded)


def test_entries_that_are_not_finite_stay_so_and_zeros_stay_zero() -> None:
    """So that a run that diverges is found to, by its weights."""
    for wrong in (float("nan"), float("inf")):
        assert not in_float8(torch.tensor([[wrong, 1.0]])).isfinite().all()
        assert not in_bfloat16(torch.tensor([wrong])).isfinite().all()
    assert torch.equal(in_float8(torch.zeros(2, 3)), torch.zeros(2, 3))


def is_rounded(weights: str, name: str, p: torch.Tensor) -> bool:
    """Whether a weight holds numbers of a format alone."""
    if weights == "float8" and p.ndim > 1:
        return bool(torch.isin(p * scale_of(p), E4M3).all())
    return torch.equal(p, p.bfloat16().float())


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "ddcadam", "ddcmuon"])
@pytest.mark.parametrize("weights", FORMATS)
def test_a_run_holds_numbers_of_its_format_alone(
    tmp_path: Path, optimizer: str, weights: str
) -> None:
    """At the start, in the checkpoint, and as it is restored, at a rate at which something moves:
    no optimizer keeps a finer copy that it would write back.
    """
    options = (f"optimizer={optimizer}", "optimizer.lr=0.05", f"training.weights={weights}")
    setup = run(tmp_path, *options, "optimizer.canonicalise=5")
    start = setup.start
    assert all(is_rounded(weights, name, p) for name, p in start.items())
    train(setup)
    saved = read_checkpoint(setup.folder)["model"]
    ended = named_parameters(restore(setup.folder).model)
    for name, p in named_parameters(setup.model).items():
        assert p.dtype == torch.float32
        assert is_rounded(weights, name, p.detach()), name
        assert torch.equal(p, saved[name])
        assert torch.equal(p, ended[name])
    moved = [name for name, p in ended.items() if not torch.equal(p.detach(), start[name])]
    assert len(moved) > len(start) / 2


@pytest.mark.parametrize("weights", FORMATS)
def test_steps_shorter_than_half_a_distance_are_lost(tmp_path: Path, weights: str) -> None:
    setup = run(tmp_path, "optimizer=adamw", "optimizer.lr=1e-7", f"training.weights={weights}")
    train(setup)
    ended = named_parameters(setup.model)
    same = [torch.equal(ended[name].detach(), p) for name, p in setup.start.items() if p.ndim > 1]
    exact = run(tmp_path, "optimizer=adamw", "optimizer.lr=1e-7")
    train(exact)
    params = named_parameters(exact.model)
    norms = [name for name, p in params.items() if p.ndim == 1]
    assert all(torch.equal(ended[name].detach(), setup.start[name]) for name in norms)
    assert all(not torch.equal(p.detach(), exact.start[name]) for name, p in params.items())
    assert weights == "bfloat16" or any(same)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("optimizer", ["adamw", "ddcmuon"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, weights: str
) -> None:
    options = (f"optimizer={optimizer}", "optimizer.lr=0.05", f"training.weights={weights}")
    whole, parts = run(tmp_path / "a", *options), run(tmp_path / "b", *options)
    train(whole)
    step_ = loop.train_step

    def interrupted(setup: Setup, step: int, *rest: Any, **more: Any) -> float | None:
        if step == 7:  # the last checkpoint is of step 6
            raise KeyboardInterrupt
        return step_(setup, step, *rest, **more)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    monkeypatch.undo()
    again = run(tmp_path / "b", *options)
    train(again)
    params = named_parameters(again.model)
    assert all(torch.equal(p, params[name]) for name, p in named_parameters(whole.model).items())
    records = [(each.folder / "records.jsonl").read_bytes() for each in (whole, again)]
    assert records[0] == records[1]


def test_float32_changes_nothing_and_is_no_part_of_the_id() -> None:
    plain = composed()
    assert plain.training.weights == "float32"
    assert "weights" not in plain.identity["training"]
    ids = {composed(f"training.weights={each}").run_id for each in ("float32", *FORMATS)}
    assert len(ids) == 3
    assert plain.run_id in ids
    layer = torch.nn.Linear(5, 5)
    before = layer.weight.detach().clone()
    round_weights_(layer, "float32")
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("weights", FORMATS)
def test_what_cannot_work_is_refused(weights: str) -> None:
    with pytest.raises(ValueError, match=rf"training\.weights={weights} with .*fsdp"):
        composed(f"training.weights={weights}", "launcher=torchrun", "launcher.parallel=fsdp")
    composed(f"training.weights={weights}", "launcher=torchrun", "launcher.parallel=ddp")
    with pytest.raises(ValueError, match=r"training\.weights=float16: expected one of float32"):
        composed("training.weights=float16")
