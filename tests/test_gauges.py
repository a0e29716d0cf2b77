"""The gauges are symmetries, find_gauges finds all and only those, and the evidence tells true from
false.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddc import find_gauges
from ddc.gauges import (
    KINDS,
    Axis,
    Chain,
    GaugeSet,
    Refusal,
    Rescale,
    RotatedAxis,
    Rotation,
    Shift,
    audit,
    check,
    in_blocks,
)
from ddc.gauges import named_parameters as params_of
from ddc.models import GPT, DeepMLP, DeepMLPConfig, GPTConfig
from tests.conftest import MODELS, SIZES
from tests.helpers import VOCABULARY, backward, batch, make_model, relu_mlp, relu_mlp_gauges


def log_probs(tokens: torch.Tensor):
    return lambda model: model(tokens[:, :-1]).log_softmax(-1)


def test_every_gauge_found_is_a_symmetry(config: GPTConfig) -> None:
    model = make_model(config)
    units = find_gauges(model)
    changes = check(model, {*units, *in_blocks(units)}, log_probs(batch(config, 0)))
    assert changes
    assert max(changes.values()) < 1e-12


def test_every_gauge_moves_the_weights(config: GPTConfig) -> None:
    model = make_model(config)
    units = find_gauges(model)
    for gauge in {*units, *in_blocks(units)}:
        moved = copy.deepcopy(model)
        GaugeSet((gauge,)).transform_(moved, torch.Generator().manual_seed(0))
        for name, p in params_of(moved).items():
            changed = not torch.equal(p, params_of(model)[name])
            assert changed == (name in gauge.parameters), (str(gauge), name)


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(["rms", "layer"]),
    mlp=st.sampled_from(["swiglu", "relu", "relu2", "gelu"]),
    positions=st.sampled_from(["rope", "partial_rope", "learned"]),
    heads=st.sampled_from([(4, 4), (4, 2), (2, 1), (1, 1)]),
    bias=st.booleans(),
    tied=st.booleans(),
    qk_norm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_whole_group_is_a_symmetry_of_any_config(
    norm, mlp, positions, heads, bias, tied, qk_norm, seed
) -> None:
    config = GPTConfig(
        context=8, layers=1, width=16, heads=heads[0], kv_heads=heads[1], hidden=10, norm=norm,
        mlp=mlp,
        positions=positions, bias=bias, tied_head=tied, qk_norm=qk_norm,
    )  # fmt: skip
    model = make_model(config, seed % 1000)
    probe = log_probs(batch(config, 1))
    before = probe(model)
    find_gauges(model).transform_(model, torch.Generator().manual_seed(seed))
    assert (probe(model) - before).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("changes", "found", "refused"),
    [
        ({}, {"logit_shift", "gated_rescale", "norm_scale", "value_rotation", "qk_rotation"}, {}),
        ({"mlp": "relu"}, {"relu_rescale"}, {}),
        ({"mlp": "relu2"}, {"relu_rescale"}, {}),
        ({"mlp": "gelu"}, {"norm_scale"}, {"relu_rescale": "GELU"}),
        ({"tied_head": True}, {"norm_scale"}, {"logit_shift": "tied", "norm_scale": "tied"}),
        (
            {"qk_norm": True},
            {"value_rotation"},
            {"qk_rotation": "QK-norm", "norm_scale": "not a linear map"},
        ),
    ],
)
def test_found_and_refused(changes: dict, found: set[str], refused: dict[str, str]) -> None:
    gauges = find_gauges(GPT(GPTConfig(**(SIZES | {"kv_heads": 2} | changes)), VOCABULARY))
    assert found <= {gauge.kind for gauge in gauges}
    for kind, reason in refused.items():
        assert any(r.kind == kind and reason in r.reason for r in gauges.refused), str(gauges)
    text = str(gauges)
    assert all(reason in text for reason in refused.values())
    assert "found" in text


def test_a_norm_without_scale_is_refused() -> None:
    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    model.blocks[0].mlp_norm = nn.RMSNorm(SIZES["width"], elementwise_affine=False)
    gauges = find_gauges(model)
    assert Refusal("norm_scale", "blocks.0.mlp_norm", "the norm has no scale") in gauges.refused
    assert sum(gauge.kind == "norm_scale" for gauge in gauges) == 4


def test_a_reader_that_is_not_linear_is_refused() -> None:
    class Squared(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).square()

    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    model.blocks[1].attention.key = Squared(SIZES["width"], SIZES["width"] // 2, bias=False)
    with pytest.warns(UserWarning, match="qk_rotation at blocks.1.attention is no symmetry"):
        gauges = find_gauges(model)
    refusals = [r for r in gauges.refused if r.where == "blocks.1.attention_norm"]
    assert len(refusals) == 1
    assert "blocks.1.attention.key is not a linear map" in refusals[0].reason


def test_printed_as_a_table() -> None:
    lines = str(find_gauges(make_model(MODELS["rms-gelu-tied"]))).splitlines()
    assert lines[0].split() == ["gauge", "where", "verdict"]
    assert any("blocks.*.mlp_norm (2×)" in line and line.endswith("found") for line in lines)
    assert any(line.endswith("refused: the head is tied to the embedding") for line in lines)
    assert str(GaugeSet()) == "no gauges"
    refused = [Refusal("qk_map", f"blocks.{i}", f"'blocks.{i}.key' is no map") for i in range(2)]
    (line,) = str(GaugeSet((), tuple(refused))).splitlines()[2:]
    assert line.split("  ") == ["qk_map", "blocks.* (2×)", "refused: 'blocks.*.key' is no map"]


def test_only() -> None:
    gauges = find_gauges(make_model(MODELS["rms-swiglu-rope-gqa"]))
    assert {g.kind for g in gauges.only(["norm_scale"])} == {"norm_scale"}
    assert len(gauges.only(KINDS)) == len(gauges)
    assert len(gauges.only([])) == 0
    with pytest.raises(ValueError, match="kind='no_such'"):
        gauges.only(["no_such"])


def test_dimension_counts_the_orbit(config: GPTConfig) -> None:
    """The tangent vectors of the action, found by small group elements, span as many dimensions as
    claimed.
    """
    model = make_model(config)
    units = find_gauges(model)
    for gauges in (units, in_blocks(units)):
        tangents = orbit_tangents(model, gauges)
        assert (
            torch.linalg.matrix_rank(tangents, rtol=1e-9)
            == len(tangents)
            == gauges.dimension(model)
        )


def test_blocks_are_subgroups(config: GPTConfig) -> None:
    """Their orbits lie in those of the units, and what is not between linear maps is as it was."""
    model = make_model(config)
    units = find_gauges(model)
    blocks = in_blocks(units)
    both = torch.cat([orbit_tangents(model, units), orbit_tangents(model, blocks)])
    assert torch.linalg.matrix_rank(both, rtol=1e-9) == units.dimension(model)
    hidden = {"relu_rescale", "gated_rescale"}
    assert [g for g in units if g.kind not in hidden] == [g for g in blocks if g.kind not in hidden]
    pairs = [g for g in units if g.kind in hidden]
    assert blocks.dimension(model) == units.dimension(model) - len(pairs) * (config.hidden - 1)
    assert in_blocks(blocks) == blocks


def test_blocks_of_units_that_were_not_tried_are_not_either() -> None:
    units = find_gauges(make_model(MODELS["rms-swiglu-rope-gqa"]))
    gated, norm = (units.only([kind])[0] for kind in ("gated_rescale", "norm_scale"))
    blocks = in_blocks(GaugeSet(units.found, (), {gated: "no float64", norm: "no time"}))
    block = next(
        gauge for gauge in blocks if gauge.where == gated.where and gauge.kind == gated.kind
    )
    assert blocks.unchecked == {block: "no float64", norm: "no time"}
    assert block != gated


def test_a_chain_in_blocks_is_the_chained_rescale() -> None:
    model = DeepMLP(DeepMLPConfig(depth=4, width=8), 7, 7)
    (chain,) = (gauge for gauge in in_blocks(find_gauges(model)) if isinstance(gauge, Chain))
    (ours,) = (gauge for gauge in find_gauges(model, per_layer=True) if isinstance(gauge, Chain))
    assert chain.weights == ours.weights
    residual = DeepMLP(DeepMLPConfig(depth=4, width=8, residual=True), 7, 7)
    assert [g.block for g in in_blocks(find_gauges(residual)) if isinstance(g, Rescale)] == [
        True,
        True,
    ]


def test_layers_that_cannot_have_one_scale_each_are_refused() -> None:
    model = relu_mlp(bias=False)
    gauges = relu_mlp_gauges(model)
    norm = Rescale("norm_scale", "norm", (Axis("gamma"),), (Axis("0.weight", 1),))
    squared = [Rescale(g.kind, g.where, g.plus, g.minus, degree=2) for g in gauges]
    for refused, reason in (
        (relu_mlp_gauges(relu_mlp(bias=True)), "without biases"),
        (squared, "degree 1 between them, here it is 2"),
        ([*gauges, norm], "0.weight is under one"),
    ):
        blocks = in_blocks(GaugeSet(tuple(refused)))
        assert [gauge for gauge in blocks if gauge.kind == "relu_rescale"] == []
        assert [refusal.where for refusal in blocks.refused] == ["0-2", "2-4", "4-6"]
        assert all(reason in refusal.reason for refusal in blocks.refused)
    assert len(in_blocks(GaugeSet(tuple(gauges[::2])))) == 2  # which share no layer


def orbit_tangents(model: GPT, gauges: GaugeSet) -> torch.Tensor:
    """Derivative of the action at the identity: (dimension, parameters), by forward-mode
    differentiation.
    """
    params = {name: p.detach() for name, p in params_of(model).items()}
    sizes = [p.numel() for p in params.values()]
    rows = []
    for gauge in gauges:
        for generator in generators(gauge, params):
            moved = {name: torch.zeros_like(p) for name, p in params.items()}
            moved.update(generator)
            rows.append(torch.cat([m.flatten() for m in moved.values()]))
    assert all(len(row) == sum(sizes) for row in rows)
    return torch.stack(rows)


def generators(gauge, params):
    """Infinitesimal actions, written down by hand for each class."""
    match gauge:
        case Shift():
            for j in range(params[gauge.weight].shape[1]):
                tangent = torch.zeros_like(params[gauge.weight])
                tangent[:, j] = 1
                yield {gauge.weight: tangent}
            if gauge.bias is not None:
                yield {gauge.bias: torch.ones_like(params[gauge.bias])}
        case Rescale(block=True):
            sides = ((gauge.plus, 1), (gauge.minus, -gauge.degree))
            yield {name: sign * params[name] for side, sign in sides for name, *_ in side}
        case Rescale():
            for unit in range(gauge.units(params)):
                tangents = {}
                for side, sign in ((gauge.plus, 1), (gauge.minus, -gauge.degree)):
                    for name, axis, _ in side:
                        tangents[name] = torch.zeros_like(params[name])
                        tangents[name].movedim(axis, 0)[unit] = (
                            sign * params[name].movedim(axis, 0)[unit]
                        )
                yield tangents
        case Rotation():
            units, k = gauge.shape
            for unit in range(units):
                for i in range(k):
                    for j in range(i):
                        tangents = {}
                        for name, axis, index in gauge.slots:
                            tangent = tangents.setdefault(name, torch.zeros_like(params[name]))
                            rows, out = params[name].movedim(axis, 0), tangent.movedim(axis, 0)
                            for copy_ in index[unit]:
                                out[copy_[i]] += rows[copy_[j]]
                                out[copy_[j]] -= rows[copy_[i]]
                        yield tangents


def test_the_action_is_a_homomorphism() -> None:
    """Acting twice is acting by the product: scales and shifts compose, rotations multiply."""
    model = make_model(MODELS["layer-bias-relu-learned"])
    generator = torch.Generator().manual_seed(0)
    for gauge in find_gauges(model):
        params = {name: p.detach().clone() for name, p in params_of(model).items()}
        twice = {name: p.clone() for name, p in params.items()}
        a, b = gauge.sample(params, generator), gauge.sample(params, generator)
        product = {Shift: a + b, Rescale: a * b, Rotation: b @ a if a.ndim == 3 else None}[
            type(gauge)
        ]
        gauge.act_(twice, a)
        gauge.act_(twice, b)
        gauge.act_(params, product)
        for name in params:
            torch.testing.assert_close(twice[name], params[name], rtol=1e-12, atol=1e-12)


def test_a_rotation_of_one_head_turns_that_head_alone() -> None:
    config = MODELS["rms-swiglu-rope-gqa"]  # 4 query heads of width 4, 2 key-value heads
    model = make_model(config)
    rotation = find_gauges(model).only(["value_rotation"])[0]
    element = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    element[1] = rotation.sample(params_of(model), torch.Generator().manual_seed(0))[1]
    moved = copy.deepcopy(model)
    rotation.act_(params_of(moved), element)
    value, output = (getattr(moved.blocks[0].attention,
    n).weight - getattr(model.blocks[0].attention, n).weight
                     for n in ("value", "output"))  # fmt: skip
    assert value[:4].abs().max() == 0
    assert value[4:].abs().min() > 0
    assert output[:, :8].abs().max() == 0
    assert output[:, 8:].abs().min() > 0


def test_rope_planes_are_half_split() -> None:
    model = make_model(MODELS["rms-relu2-partial-gqa"])  # heads of width 4, of which RoPE turns 2
    planes, rest = [g for g in find_gauges(model) if g.kind == "qk_rotation"][:2]
    assert planes.slots[0].indices.tolist() == [[[0, 1], [4, 5]], [[8, 9], [12, 13]]]
    assert rest.slots[0].indices.tolist() == [[[2, 3], [6, 7]], [[10, 11], [14, 15]]]
    assert not planes.reflections
    assert rest.reflections
    full = find_gauges(make_model(MODELS["rms-swiglu-rope-gqa"])).only(["qk_rotation"])[0]
    assert full.slots[1].indices[:, 0].tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_samples_are_uniform_in_spread_and_orthogonal() -> None:
    model = make_model(MODELS["layer-bias-relu-learned"])
    params = params_of(model)
    signs = []
    for seed in range(30):
        for gauge in find_gauges(model):
            element = gauge.sample(params, torch.Generator().manual_seed(seed), spread=0.5)
            if isinstance(gauge, Rescale):
                assert element.log().abs().max() <= 0.5
            if isinstance(gauge, Rotation):
                torch.testing.assert_close(
                    element @ element.mT, torch.eye(4, dtype=torch.float64).expand_as(element)
                )
                signs += torch.linalg.det(element).round().tolist()
    assert set(signs) == {-1.0, 1.0}


def test_audit_is_rounding_for_true_gauges(config: GPTConfig) -> None:
    model = make_model(config)
    backward(model, 0)
    for gauges in (find_gauges(model), in_blocks(find_gauges(model))):
        assert max(audit(model, gauges).values()) < 1e-12


def test_audit_and_check_tell_false_gauges() -> None:
    model = make_model(MODELS["rms-gelu-tied"])
    backward(model, 0)
    up, down = Axis("blocks.0.mlp.up.weight"), Axis("blocks.0.mlp.down.weight", 1)
    heads = np.arange(16).reshape(4, 1, 4)
    false = [
        Rescale("relu_rescale", "a GELU", (up,), (down,)),
        Rescale("relu_rescale", "wrong degree", (up,), (down,), degree=2),
        Rescale("relu_rescale", "a GELU as one block", (up,), (down,), block=True),
        Rescale("norm_scale", "one reader forgotten", (Axis("blocks.0.attention_norm.weight"),),
                (Axis("blocks.0.attention.query.weight", 1),)),
        Shift("embedding.weight", where="a tied head"),
        Rotation("value_rotation", "values alone", (RotatedAxis("blocks.0.attention.value.weight",
        0, heads),), True),
        Rotation("qk_rotation", "heads under RoPE", (
            RotatedAxis("blocks.0.attention.query.weight", 0, heads),
            RotatedAxis("blocks.0.attention.key.weight", 0, heads)), True),
    ]  # fmt: skip
    readings = audit(model, false)
    changes = check(model, false, log_probs(batch(model.config, 0)))
    for gauge in false:
        assert readings[gauge] > 1e-3, str(gauge)
        assert changes[gauge] > 1e-3, str(gauge)


def test_audit_without_gradients_is_an_error() -> None:
    model = make_model(MODELS["rms-gelu-tied"])
    with pytest.raises(ValueError, match=r"no gradient on .* after backward"):
        audit(model, find_gauges(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rescale("relu", "x", (Axis("a"),), (Axis("b", 1),)), "Invalid kind='relu'"),
        (lambda: Rescale("relu_rescale", "x", (), (Axis("b", 1),)), "both sides"),
        (lambda: Rescale("relu_rescale", "x", (Axis("a"),), (Axis("b", 1),), degree=0), "degree=0"),
        (lambda: Rotation("value_rotation", "x", (RotatedAxis("a", 0, np.zeros((1, 1, 2),
        dtype=np.int64)),
                          RotatedAxis("b", 0, np.zeros((1, 1, 3), dtype=np.int64))), True),
                          "slots must agree"),
    ],
)  # fmt: skip
def test_bad_declarations(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_check_and_audit_say_what_is_wrong_with_their_input() -> None:
    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    gauges, other = find_gauges(model), Rescale("relu_rescale", "x", (Axis("a"),), (Axis("b", 1),))
    log_probs = lambda m: m(batch(m.config, 0)[:, :-1]).log_softmax(-1)  # noqa: E731
    for call in (lambda each: check(model, each, log_probs), lambda each: audit(model, each)):
        with pytest.raises(TypeError, match=r"expected several gauges, got one: pass \[gauge\]"):
            call(other)
        with pytest.raises(TypeError, match="expected gauges as find_gauges returns them, got str"):
            call(["logit_shift"])
        with pytest.raises(ValueError, match="relu_rescale at x: the model has no parameter 'a'"):
            call([other])
    with pytest.raises(ValueError, match="log_probs gave a tuple: it must give a tensor"):
        check(model, gauges, lambda m: (log_probs(m),))
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'weight' is on the meta device and has no values"):
        check(empty, [], lambda m: m)
