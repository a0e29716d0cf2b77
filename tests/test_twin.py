"""Narrow twins: the parameters of a model by name, small widths, and the same symmetries."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ddc.compatibility import provide_torchvision_operators
from ddc.gauges import GaugeSet, Rotation, find_gauges
from ddc.gauges.signature import signature
from ddc.gauges.trace import operation, traced
from ddc.gauges.twin import narrow_config, narrow_twin

provide_torchvision_operators()

import transformers  # noqa: E402

transformers.logging.set_verbosity_error()


def default(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of a default config, which is that of a large one."""
    model = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    config = f"{name}TextConfig" if name.startswith("Gemma") else f"{name}Config"
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


LARGE: dict[str, Callable[[], nn.Module]] = {
    "heads of a width of their own, grouped": default("Qwen3"),
    "names of its own": default("GPT2"),
    "long RoPE": default("Phi3", rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
    }, max_position_embeddings=131072),
    "heads that differ by layer": default("Gemma4"),
    "shared keys and values": default("Gemma3n"),
    "latent attention, experts": default("DeepseekV3"),
    "linear attention beside attention": default("Qwen3Next"),
    "a state space beside attention": default("Jamba"),
    "encoder and decoder": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config()),
    "vision": lambda: transformers.ViTForImageClassification(transformers.ViTConfig()),
    "stages": lambda: transformers.SwinForImageClassification(transformers.SwinConfig()),
    "vision and text": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig()
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_a_twin_has_the_names_and_ties_of_its_model(kind: str) -> None:
    with torch.device("meta"):
        model = LARGE[kind]()
        twin = type(model)(narrow_config(model.config))
        cut = type(model)(narrow_config(model.config, layers=2, vocabulary=160))
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    assert shapes.keys() == dict(twin.named_parameters(remove_duplicate=False)).keys()
    small = sum(p.numel() for p in twin.parameters())
    assert small < 0.15 * sum(p.numel() for p in model.parameters())
    for name, p in twin.named_parameters():
        assert p.ndim == len(shapes[name]), name
        assert all(a <= b for a, b in zip(p.shape, shapes[name], strict=True)), name
    kinds = [
        {re.sub(r"\d+", "*", name) for name in names}
        for names in (dict(cut.named_parameters()), shapes)
    ]
    assert kinds[0] <= kinds[1]
    assert sum(p.numel() for p in cut.parameters()) < 3e6


def test_a_twin_has_the_gauges_of_its_model() -> None:
    sizes = {"vocab_size": 67, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    for name in ("Llama", "Qwen3"):
        config = getattr(transformers, f"{name}Config")(**sizes, **heads)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        assert str(find_gauges(narrow_twin(model))) == str(find_gauges(model))


def test_a_twin_of_a_model_on_the_meta_device_computes_on_its_inputs() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=3)).eval()
    before = torch.random.get_rng_state()
    twin = narrow_twin(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not twin.training
    assert {p.device.type for p in twin.parameters()} == {"cpu"}
    logits = twin(torch.tensor([[0, 5, model.config.vocab_size - 1]])).logits
    assert logits.shape == (1, 3, model.config.vocab_size)
    assert logits.isfinite().all()
    assert model.config.hidden_size == 4096  # left as it was


def test_there_is_no_twin_without_a_config_that_builds_the_model() -> None:
    with pytest.raises(ValueError, match="Linear has no config to build a narrow twin from"):
        narrow_twin(nn.Linear(3, 3))
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=1
    )
    model = transformers.LlamaForCausalLM(config)
    model.adapter = nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match=r"has other parameters than its config builds \(adapter.bias, for one\)"
    ):
        narrow_twin(model)

    class Headed(transformers.LlamaForCausalLM):
        def __init__(self, config: transformers.LlamaConfig, labels: int) -> None:
            super().__init__(config)

    with pytest.raises(
        ValueError, match=r"cannot be built from its config with small widths: .*labels"
    ):
        narrow_twin(Headed(config, 3))


def names(gauges: GaugeSet) -> set[tuple[str, str, tuple[str, ...]]]:
    return {(gauge.kind, gauge.where, gauge.parameters) for gauge in gauges}


@pytest.mark.slow
def test_a_wide_model_without_values_has_the_gauges_of_the_narrow_one() -> None:
    """Those of a 70B-parameter Llama of two layers, from its config, and in less memory than a
    layer's weights take.
    """
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    gauges = find_gauges(model, verify=False)
    assert names(gauges) == names(find_gauges(narrow_twin(model), verify=False))
    assert {gauge.kind for gauge in gauges} == {
        "logit_shift", "gated_rescale", "norm_scale", "value_rotation", "qk_rotation",
    }  # fmt: skip


def test_rotations_are_those_of_a_model_with_values() -> None:
    sizes = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    found = [
        [gauge for gauge in find_gauges(each, verify=False) if isinstance(gauge, Rotation)]
        for each in (model, empty)
    ]
    assert len(found[0]) == 4
    for a, b in zip(*found, strict=True):
        assert (a.kind, a.where) == (b.kind, b.where)
        for one, other in zip(a.slots, b.slots, strict=True):
            assert one[:2] == other[:2]
            assert (one[2] == other[2]).all()


class Attention(nn.Module):
    """Heads whose queries and keys are turned by position, next to each other or half a head
    apart.
    """

    def __init__(self, heads: int, near: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(16, 16) for _ in range(4))
        self.heads, self.near = heads, near

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.3])
        a, b = (x[..., ::2], x[..., 1::2]) if self.near else (x[..., :2], x[..., 2:])
        c, s = angles.cos(), angles.sin()
        pair = (a * c - b * s, a * s + b * c)
        return torch.stack(pair, -1).flatten(-2) if self.near else torch.cat(pair, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            each(x).unflatten(-1, (-1, 4)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        given = nn.functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return x + self.output(given.transpose(1, 2).flatten(-2))


def test_layers_that_differ_are_not_taken_for_each_other() -> None:
    """The way into attention is read once for layers that do the same; these two do not."""
    model = nn.Sequential(Attention(4, near=True), Attention(4, near=False))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    gauges = find_gauges(model, inputs=(x,))  # and tries them
    turned = [gauge.slots[0][2] for gauge in gauges if gauge.kind == "qk_rotation"]
    assert [planes[:2, 0].tolist() for planes in turned] == [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    assert not gauges.unchecked

    def signatures(*layers: Attention) -> list[str]:
        trace = traced(nn.Sequential(*layers), (x,))
        nodes = [n for n in trace.graph.nodes if operation(n) == "scaled_dot_product_attention"]
        maps = [*trace.linear_maps.values()]
        return [signature(trace, maps[4 * i].output, n.args[0]) for i, n in enumerate(nodes)]

    alike, other = Attention(4, near=True), Attention(4, near=False)
    first, second, third = signatures(alike, copy.deepcopy(alike), other)
    assert first == second != third
