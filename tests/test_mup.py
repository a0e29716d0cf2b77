"""AdamW under muP: AdamW at the base width, and changes of the function that do not grow with the
width elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddc.gauges import named_parameters
from ddc.models import GPT, cross_entropy
from ddc.training.compose import compose_alike
from ddc.training.loop import train
from ddc.training.setup import Setup, prepare
from tests.test_training import run

BASE = 32


def setup_of(folder: Path, width: int, *overrides: str) -> Setup:
    sizes = {"layers": 1, "width": width, "heads": width // 16, "kv_heads": width // 32}
    shape = [f"model.{key}={value}" for key, value in sizes.items()]
    fixed = ["+experiment=transfer", "gauges=none", f"runs={folder}"]
    return prepare(
        compose_alike([*fixed, *shape, f"model.hidden={2 * width}", "model.context=16", *overrides])
    )


def tokens() -> Tensor:
    return torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))


def change_of_logits(setup: Setup, steps: int) -> float:
    """Root mean square, after some steps on one batch, in float64."""
    model, optimizer, batch = setup.model.double(), setup.optimizer, tokens()
    assert isinstance(model, GPT)
    before = model(batch[:, :-1]).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(batch[:, :-1]), batch[:, 1:]).backward()
        optimizer.step()
    return float((model(batch[:, :-1]).detach() - before).square().mean().sqrt())


def test_at_the_base_width_it_is_adamw(tmp_path: Path) -> None:
    found = [
        run(tmp_path / str(i), "optimizer=adamw", "optimizer.lr=0.01", *more)
        for i, more in enumerate(([], ["optimizer.base_width=16", "model.width=16"]))
    ]
    assert found[0].config.run_id != found[1].config.run_id
    assert "base_width" not in found[0].config.identity["optimizer"]
    for each in found:
        train(each)
    pairs = zip(*(named_parameters(each.model).values() for each in found), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_the_change_of_logits_does_not_grow_with_the_width(tmp_path: Path) -> None:
    """The coordinate check of arXiv:2203.03466, appendix D.1, at 1 and 8 times the base width. It
    falls a little towards its limit, for examples disturb each other less in more dimensions.
    """
    changes = {
        optimizer: [
            change_of_logits(
                setup_of(tmp_path, width, "optimizer=adamw", "optimizer.lr=0.001", *more), 3
            )
            for width in (BASE, 8 * BASE)
        ]
        for optimizer, more in (("muP", [f"optimizer.base_width={BASE}"]), ("plain", []))
    }
    growth = {name: wide / narrow for name, (narrow, wide) in changes.items()}
    assert 0.2 < growth["muP"] < 1.1
    assert growth["plain"] > 2.5


def test_starts_rates_and_decay_are_those_of_table_3(tmp_path: Path) -> None:
    ratio = 4
    mup, plain = (
        setup_of(tmp_path, ratio * BASE, "optimizer=adamw", "optimizer.lr=0.01", *more)
        for more in ([f"optimizer.base_width={BASE}"], [])
    )
    scales = {"embedding.weight": ratio**0.5, "head.weight": ratio**-0.5}
    others = named_parameters(plain.model)
    for name, p in named_parameters(mup.model).items():
        torch.testing.assert_close(p, scales.get(name, 1.0) * others[name], rtol=1e-6, atol=0)
    groups = {id(p): group for group in mup.optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(others)
    for name, p in named_parameters(mup.model).items():
        slower = ratio if p.ndim > 1 and name != "embedding.weight" else 1
        decay = 0.1 * slower if p.ndim > 1 else 0.0
        assert groups[id(p)]["lr"] == pytest.approx(0.01 / slower)
        assert groups[id(p)]["weight_decay"] == pytest.approx(decay)


@pytest.mark.parametrize(
    "overrides", [["model=vit", "data=mnist_5k"], ["model=gpt", "model.tied_head=true"]], ids=str
)
def test_other_models_are_refused(overrides: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Invalid optimizer\.base_width=64: muP is for model=gpt"):
        compose_alike(["optimizer=adamw", "optimizer.base_width=64", *overrides])


def test_a_width_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"Invalid optimizer\.base_width=0"):
        compose_alike(["optimizer=adamw", "optimizer.base_width=0"])
