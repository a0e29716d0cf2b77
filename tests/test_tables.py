"""Rotary embeddings whose sines and cosines are the rows of a table that is not trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddc import find_gauges
from ddc.gauges import GaugeSet, named_parameters
from tests.test_false_gauges import HEADS, WIDTH, X

POSITIONS, ENTRIES = 40, WIDTH // HEADS


def sines() -> Tensor:
    """Sines, then cosines, of each position times each frequency."""
    angles = torch.arange(POSITIONS)[:, None] * torch.tensor([1.0, 0.3])
    return torch.cat([angles.sin(), angles.cos()], 1)


class Rotary(nn.Module):
    """Attention with a table of sines and cosines; pairs of neighbours are turned."""

    def __init__(self, table: Tensor, frozen: bool = True, what: str = "turn") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.table = nn.Embedding.from_pretrained(table, freeze=frozen)
        self.what = what

    def turned(self, x: Tensor, table: Tensor) -> Tensor:
        sin, cos = (torch.stack([each] * 2, -1).flatten(-2) for each in table.chunk(2, -1))
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape_as(x)
        return x * cos + other * sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        places = torch.arange(x.shape[1])
        if self.what == "chosen":
            places = (x[0, :, 0] > 0).long().cumsum(0)
        rows = self.table(places)
        if self.what == "scale":
            q, k = q * rows, k * rows
        else:
            q, k = self.turned(q, rows), self.turned(k, rows)
        v = self.turned(v, rows) if self.what == "values" else v
        weights = (q @ k.mT).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def rotations(gauges: GaugeSet) -> dict[str, tuple[int, int]]:
    return {g.kind: g.shape for g in gauges if g.kind in ("qk_rotation", "value_rotation")}


@torch.no_grad()
def change(model: nn.Module, inputs: dict[str, Any], gauges: GaugeSet) -> float:
    """How much random elements change what a model says, in float64, in evaluation and in
    training.
    """
    model = copy.deepcopy(model).double()
    params = named_parameters(model)
    largest = 0.0
    for gauge in gauges:
        for training in (False, True):
            model.train(training)
            said = []
            for _ in range(2):
                torch.manual_seed(1)
                outputs = model(**inputs)
                outputs = outputs if isinstance(outputs, Tensor) else outputs[0]
                said.append(outputs.log_softmax(-1))
                gauge.act_(params, gauge.sample(params, torch.Generator().manual_seed(2)))
            largest = max(largest, float((said[0] - said[1]).abs().max()))
    return largest


def test_planes_are_read_from_a_table_that_is_not_trained() -> None:
    model = Rotary(sines())
    gauges = find_gauges(model, inputs=(X,))
    planes = WIDTH // 2
    assert rotations(gauges) == {"qk_rotation": (planes, 2), "value_rotation": (HEADS, ENTRIES)}
    assert not next(g for g in gauges if g.kind == "qk_rotation").reflections
    assert change(model, {"x": X.double()}, gauges) < 1e-9
    assert rotations(find_gauges(model, inputs=(X,), verify=False)) == rotations(gauges)


@pytest.mark.parametrize(
    ("table", "options", "reason"),
    [
        (sines(), {"frozen": False}, "its queries pass through what is not linear"),
        (sines(), {"what": "chosen"}, "its queries pass through what is not linear"),
        (sines().flip(0) * torch.rand(POSITIONS, 1), {}, "are mixed in pairs, but not turned"),
        (torch.rand(POSITIONS, ENTRIES), {}, "are mixed in pairs, but not turned"),
        (torch.rand(POSITIONS, ENTRIES), {"what": "scale"}, "its queries are scaled by position"),
    ],
    ids=["trained", "rows that inputs choose", "stretched", "random", "scaled"],
)
def test_what_looks_like_it(table: Tensor, options: dict[str, Any], reason: str) -> None:
    gauges = find_gauges(Rotary(table, **options), inputs=(X,), verify=False)
    assert "qk_rotation" not in rotations(gauges)
    assert any(
        reason in refusal.reason for refusal in gauges.refused if refusal.kind == "qk_rotation"
    ), str(gauges)


def test_a_model_none_of_which_is_trained_has_no_constants() -> None:
    model = Rotary(sines()).requires_grad_(False)
    assert "qk_rotation" not in rotations(find_gauges(model, inputs=(X,)))


def test_values_that_are_turned() -> None:
    gauges = find_gauges(Rotary(sines(), what="values"), inputs=(X,))
    assert [*rotations(gauges)] == ["qk_rotation"]


def test_a_linear_map_of_the_same_table_is_a_weight() -> None:
    """What is also read otherwise than by position is no constant."""
    model = Rotary(sines())
    forward = model.forward
    model.forward = lambda x: forward(x) + (x[..., :ENTRIES] @ model.table.weight.mT).sum()
    assert "qk_rotation" not in rotations(find_gauges(model, inputs=(X,), verify=False))


def test_a_table_in_the_memory_of_a_weight_is_no_constant() -> None:
    """It changes with the weight, which is trained."""
    model = Rotary(sines())
    model.weight = nn.Parameter(torch.cat([sines(), torch.zeros(1, ENTRIES)]))
    model.table.weight = nn.Parameter(model.weight.data[:-1], requires_grad=False)
    forward = model.forward
    model.forward = lambda x: forward(x) + (x[..., :ENTRIES] * model.weight[: x.shape[1]]).sum()
    assert "qk_rotation" not in rotations(find_gauges(model, inputs=(X,), verify=False))


@pytest.mark.parametrize("rotary_value", [False, True])
def test_roformer(rotary_value: bool) -> None:
    transformers = pytest.importorskip("transformers")

    torch.manual_seed(0)
    config = transformers.RoFormerConfig(
        vocab_size=30,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        rotary_value=rotary_value,
    )
    model = transformers.RoFormerForMaskedLM(config)
    tokens = {"input_ids": torch.randint(30, (2, 6))}
    gauges = find_gauges(model, inputs=tokens)
    expected = {"qk_rotation": (8, 2)} | ({} if rotary_value else {"value_rotation": (2, 8)})
    assert rotations(gauges) == expected
    assert sum(gauge.kind == "qk_rotation" for gauge in gauges) == 2
    assert not gauges.unchecked
    assert change(model, tokens, gauges) < 1e-9


def test_weights_of_three_axes_are_named() -> None:
    transformers = pytest.importorskip("transformers")

    config = transformers.XLNetConfig(
        vocab_size=30, d_model=16, n_layer=2, n_head=2, d_inner=24, mem_len=None
    )
    model = transformers.XLNetLMHeadModel(config)
    gauges = find_gauges(model, inputs={"input_ids": torch.randint(30, (2, 6))})
    assert not rotations(gauges)
    reasons = {r.reason for r in gauges.refused if r.kind == "value_rotation"}
    assert reasons == {
        f"its values are a product with transformer.layer.{i}.rel_attn.v, a weight of three axes"
        for i in range(2)
    }


class Gated(nn.Module):
    """What a table at zero, whose rows tokens choose, hides while it stays so."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.gate = nn.Embedding(7, 4), nn.Embedding(7, 3)
        nn.init.zeros_(self.gate.weight)
        self.gate.requires_grad_(False)
        self.up, self.down, self.always = nn.Linear(4, 6), nn.Linear(6, 3), always

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(self.tokens(x))
        y = self.down(up.relu())
        if self.training or self.always:
            y = y + self.gate(x) * up[..., :3].square()
        return y


@pytest.mark.parametrize("always", [False, True])
def test_a_frozen_table_that_tokens_choose_is_moved_when_gauges_are_tried(always: bool) -> None:
    tokens = torch.arange(10).reshape(2, 5) % 7
    gauges = find_gauges(Gated(always), inputs=(tokens,))
    assert "relu_rescale" not in {gauge.kind for gauge in gauges}
