"""Causal language models of transformers in the harness (``ddc/models/causal_lm.py``)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ddc import find_gauges
from ddc.data import TextData
from ddc.models import CausalLM, CausalLMConfig, load_model, save_model
from ddc.slt import layers_of
from ddc.training.loop import train
from ddc.training.setup import Setup, prepare, restore
from experiments.equivariance.measure import ddcadam, orbit_divergence
from tests.test_training import composed

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4}
MIXTRAL = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
SIZES = {"llama": LLAMA, "qwen2": LLAMA, "gpt2": GPT2, "mixtral": MIXTRAL}


def model_of(architecture: str, vocabulary: int = 20) -> CausalLM:
    torch.manual_seed(0)
    options = SIZES[architecture]
    return CausalLM(CausalLMConfig("causal_lm", architecture, 16, options), vocabulary)


def run(folder: Path, *overrides: str) -> Setup:
    return prepare(composed("+experiment=regauged_llama", f"runs={folder}", *overrides))


@pytest.mark.parametrize("architecture", SIZES)
def test_logits_are_those_of_transformers_and_causal(architecture: str) -> None:
    model = model_of(architecture)
    tokens = torch.randint(20, (3, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens), model.model(input_ids=tokens).logits)
    assert model.is_causal()
    dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(dropouts)
    assert model.train()(tokens).equal(model(tokens))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gauges_and_layers_are_found_without_an_example(architecture: str) -> None:
    model = model_of(architecture)
    kinds = {gauge.kind for gauge in find_gauges(model)}
    assert kinds >= {"norm_scale", "value_rotation", "qk_rotation"} - (
        {"norm_scale"} if architecture == "gpt2" else set()
    )
    layers = layers_of(model)
    assert [each.name for each in layers] == ["embedding", "block 1", "block 2"]
    centred = [each.gradient_ones is not None for each in layers]
    assert centred == [architecture == "gpt2"] * 3  # LayerNorm subtracts a mean, RMSNorm does not


def test_ddcadam_stays_on_one_trajectory(shakespeare: TextData) -> None:
    model = model_of("llama", shakespeare.vocab_size).double()
    assert orbit_divergence(model, find_gauges(model), ddcadam, shakespeare, steps=30) < 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "nonsense"}, r"Invalid model\.architecture=nonsense"),
        ({"architecture": "t5", "options": {"num_layers": 1}}, "Invalid model.architecture=t5"),
        ({"architecture": "bert", "options": LLAMA}, "num_key_value_heads: BertConfig has no such"),
        ({"architecture": "bert", "options": {"hidden_size": 24}}, "tokens see those after them"),
        ({"options": {"hiden_size": 16}}, r"Invalid model\.options\.hiden_size.*has no such"),
        ({"options": {**LLAMA, "hidden_size": 18}}, "not a multiple of the number of attention"),
        ({"options": {**LLAMA, "hidden_size": "x"}}, "expected int"),
        ({"options": {"vocab_size": 9}}, r"vocab_size: it follows from data\.tokenizer"),
        ({"options": {"attention_dropout": 0.1}}, "without dropout"),
        ({"architecture": "gpt2", "options": {"n_positions": 4}}, "n_positions: it follows from"),
        ({"options": {**LLAMA, "hidden_act": "foo"}}, "with model.options=.*foo"),
        ({"options": {**LLAMA, "num_key_value_heads": 3}}, "with model.options="),
        ({"options": {**LLAMA, "num_attention_heads": 0}}, "with model.options="),
        ({"options": {**LLAMA, "num_hidden_layers": 0}}, "a model must have layers"),
        ({"options": {**LLAMA, "to_dict": 3}}, "has no such option"),
        ({"options": {**LLAMA, "dtype": "bfloat16"}}, "has no such option"),
        ({"context": 0}, r"Invalid model\.context=0"),
    ],
)
def test_what_cannot_be_built_names_its_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLM(CausalLMConfig(**options), 20)


def test_a_run_ends_is_restored_and_begun_from(tmp_path: Path) -> None:
    setup = run(tmp_path, "optimizer=ddcadam")
    train(setup)
    again = restore(setup.folder)
    weights = [p.clone() for p in setup.model.parameters()]
    assert all(map(torch.equal, again.model.parameters(), weights))
    # from a folder of ours, and of transformers
    save_model(tmp_path / "ours", setup.model, setup.config.model, setup.data.sizes)
    assert isinstance(setup.model, CausalLM)
    setup.model.model.save_pretrained(tmp_path / "theirs")
    assert all(map(torch.equal, load_model(tmp_path / "ours").parameters(), weights))
    for name in ("ours", "theirs"):
        begun = run(tmp_path, "seed=5", f"start.weights={tmp_path / name}")
        assert all(map(torch.equal, begun.model.parameters(), weights)), name


@pytest.mark.parametrize("length", [1, 2])
def test_a_short_context_is_enough(length: int) -> None:
    model = CausalLM(CausalLMConfig("causal_lm", "gpt2", length, GPT2), 20)
    assert model(*model.example_inputs()).shape == (2, length, 20)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {"rms_norm_eps": 0.1},
        {"hidden_act": "relu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ],
    ids=str,
)
def test_weights_of_another_function_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Of the same shapes, in a folder of ours and of transformers."""
    setup = run(tmp_path)
    assert isinstance(setup.config.model, CausalLMConfig)
    options = {**setup.config.model.options, **change}
    options |= {"num_key_value_heads": options["num_attention_heads"] // 2}
    other = dataclasses.replace(setup.config.model, options=options)
    model = CausalLM(other, **setup.data.sizes)
    save_model(tmp_path / "ours", model, other, setup.data.sizes)
    model.model.save_pretrained(tmp_path / "theirs")
    key = next(iter(change))
    with pytest.raises(ValueError, match=r"Invalid start\.weights=.*there model\.options="):
        run(tmp_path, f"start.weights={tmp_path}/ours")
    with pytest.raises(ValueError, match=rf"Invalid start\.weights=.*there model\.options\.{key}="):
        run(tmp_path, f"start.weights={tmp_path}/theirs")


def test_two_runs_of_one_configuration_end_alike(tmp_path: Path) -> None:
    ends = [run(tmp_path / str(i), "optimizer=ddcmuon") for i in range(2)]
    for each in ends:
        train(each)
    assert all(map(torch.equal, *(each.model.parameters() for each in ends)))
