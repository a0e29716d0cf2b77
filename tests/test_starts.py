"""Where a run begins: other weights, other points of a gauge orbit, and the balanced one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddc.compatibility import provide_torchvision_operators
from ddc.gauges import Rescale, find_gauges, named_parameters
from ddc.models import GPT, GPTConfig, load_model, save_model
from ddc.training.loop import train
from ddc.training.records import Records
from ddc.training.setup import Setup
from scripts import canonicalise
from tests.helpers import make_model
from tests.test_training import composed, run


def imbalance(setup: Setup) -> float:
    """The largest logarithm of a scale between the sides of a unit."""
    params = named_parameters(setup.model)
    sides = [gauge.log_norms(params) for gauge in setup.gauges if isinstance(gauge, Rescale)]
    return max(float((plus - minus).abs().max()) for plus, minus in sides)


def log_probs(setup: Setup) -> torch.Tensor:
    with torch.no_grad():
        return setup.model(torch.arange(16)[None]).log_softmax(-1)


def test_a_spread_moves_units_and_nothing_that_is_computed(tmp_path: Path) -> None:
    plain, moved = run(tmp_path), run(tmp_path, "start.spread=2")
    torch.testing.assert_close(log_probs(plain), log_probs(moved), rtol=0, atol=1e-3)
    assert imbalance(moved) > 4 > imbalance(plain)
    again, other = run(tmp_path, "start.spread=2"), run(tmp_path, "start.spread=2", "seed=1")
    name = "blocks.0.mlp_norm.weight"
    weights = [named_parameters(each.model)[name] for each in (moved, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])
    # log-normal, of units that start at 1: standard deviation 2
    assert 1 < float(weights[0].detach().log().std()) < 3.5


def test_the_balanced_start_forgets_the_scales(tmp_path: Path) -> None:
    """AdamW from the balanced point of an orbit: the same run, wherever on it the start was."""
    ends = {}
    for spread in (0, 2):
        for when in ("start", "null"):
            overrides = [f"start.spread={spread}", f"optimizer.canonicalise={when}"]
            setup = run(tmp_path, "optimizer=adamw", "optimizer.lr=0.01", *overrides)
            if when == "start":
                assert imbalance(setup) < 1e-5
            ends[spread, when] = train(setup)["validation_loss"]
    assert ends[0, "start"] == pytest.approx(ends[2, "start"], abs=1e-3)
    assert abs(ends[0, "null"] - ends[2, "null"]) > 0.02


def test_every_so_many_steps_the_weights_are_balanced_again(tmp_path: Path) -> None:
    overrides = ["optimizer=adamw", "optimizer.lr=0.01", "training.evaluations=12"]
    often = run(tmp_path, *overrides, "optimizer.canonicalise=4")
    once = run(tmp_path, *overrides, "optimizer.canonicalise=start")
    for setup in (often, once):
        train(setup)
    assert imbalance(often) < 1e-5 < 1e-3 < imbalance(once)
    losses = [
        [row["validation_loss"] for row in Records(each.folder / "records.jsonl").read()]
        for each in (often, once)
    ]
    assert losses[0][:4] == losses[1][:4]
    # after four steps the weights are elsewhere and compute the same
    assert losses[0][4] == pytest.approx(losses[1][4], abs=1e-4)
    assert losses[0][6:] != losses[1][6:]


def test_a_run_begins_with_the_weights_of_a_folder(tmp_path: Path) -> None:
    first = run(tmp_path, "seed=3")
    save_model(tmp_path / "a", first.model, first.config.model, first.data.sizes)
    second = run(tmp_path, "seed=4", f"start.weights={tmp_path}/a")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    info = json.loads((train(second) and second.folder / "run.json").read_text())
    assert info["config"]["start"]["weights"] == f"{tmp_path}/a"


def test_what_cannot_be_begun_with_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Invalid start\.weights=.*model\.safetensors"):
        run(tmp_path, f"start.weights={tmp_path}/nothing")
    first = run(tmp_path, "model.hidden=12")
    save_model(tmp_path / "a", first.model, first.config.model, first.data.sizes)
    with pytest.raises(ValueError, match=r"Invalid start\.weights=.*of this architecture"):
        run(tmp_path, f"start.weights={tmp_path}/a")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.canonicalise=0"], "optimizer.canonicalise=0"),
        (["optimizer.canonicalise=always"], "optimizer.canonicalise=always"),
        (["optimizer.canonicalise=start", "gauges=none"], "gauges=none"),
        (["start.spread=1", "gauges=none"], "start.spread=1.0 with gauges=none"),
        (["start.spread=-1"], "start.spread=-1"),
        (["data.skip_tokens=-1"], "data.skip_tokens=-1"),
        (
            ["optimizer.canonicalise=5", "launcher=torchrun", "launcher.parallel=fsdp"],
            "launcher.parallel=fsdp",
        ),
    ],
)
def test_wrong_values_name_their_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composed(*overrides)


def test_only_what_is_set_is_in_the_name_of_a_run() -> None:
    plain = composed()
    keys = {"start", "canonicalise", "skip_tokens"}
    assert not keys & {*plain.identity, *plain.identity["optimizer"], *plain.identity["data"]}
    others = [
        composed(each).run_id
        for each in ("start.spread=1", "optimizer.canonicalise=start", "data.skip_tokens=9")
    ]
    assert len({plain.run_id, *others}) == 4


def test_skipped_tokens_are_those_at_the_beginning(tmp_path: Path) -> None:
    whole, rest = run(tmp_path), run(tmp_path, "data.skip_tokens=500", "data.train_tokens=1500")
    assert bytes(rest.data.train) == bytes(whole.data.train[500:])
    assert bytes(rest.data.validation) == bytes(whole.data.validation)


# ----------------------------------------------------------------------------------------------
# scripts/canonicalise.py


def test_the_script_moves_a_saved_model(tmp_path: Path) -> None:
    config = GPTConfig(context=16, layers=1, width=16, heads=4, kv_heads=2, hidden=12)
    model = make_model(config, dtype=torch.float32)
    find_gauges(model).transform_(model, torch.Generator().manual_seed(0))
    save_model(tmp_path / "a", model, config, {"vocab_size": 20}, note="kept")
    (tmp_path / "a/notes.txt").write_text("of mine")
    table = canonicalise.canonicalised(tmp_path / "a", tmp_path / "b", "complete")
    assert table.row_count == len(list(model.parameters())) + 1
    after = load_model(tmp_path / "b")
    assert isinstance(after, GPT)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(
        after(tokens).log_softmax(-1), model(tokens).log_softmax(-1), rtol=0, atol=1e-4
    )
    norms = [
        sum(float(p.detach().square().sum()) for p in each.parameters()) for each in (after, model)
    ]
    assert norms[0] < 0.9 * norms[1]
    assert (tmp_path / "b/notes.txt").read_text() == "of mine"
    assert json.loads((tmp_path / "b/model.json").read_text())["note"] == "kept"


@pytest.mark.slow
def test_the_script_moves_a_folder_of_transformers(tmp_path: Path) -> None:
    provide_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    canonicalise.canonicalised(tmp_path / "a", tmp_path / "b", "paper")
    after = LlamaForCausalLM.from_pretrained(tmp_path / "b").eval()
    tokens = torch.arange(8)[None]
    before_probs, after_probs = (each(tokens).logits.log_softmax(-1) for each in (model, after))
    torch.testing.assert_close(after_probs, before_probs, rtol=0, atol=1e-4)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(model.state_dict()[name], after.state_dict()[name], atol=1e-3)
    assert (tmp_path / "b/tokenizer.json").exists()


def test_the_script_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model"):
        canonicalise.canonicalised(tmp_path, tmp_path / "b", "paper")
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(ValueError, match="NoSuchModel"):
        canonicalise.canonicalised(tmp_path, tmp_path / "b", "paper")
    with pytest.raises(ValueError, match="is there already"):
        canonicalise.canonicalised(tmp_path, tmp_path, "paper")
