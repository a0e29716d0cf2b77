"""DDCAdam under the complete gauge group: heads, shifts of biases, norms and tables."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import Axis, Gauge, GaugeSet, General, Rescale, RotatedAxis, complete_kinds
from ddc.gauges.affine import Shear, Translated, Translation
from ddc.gauges.certificate import rank, tangents_of
from ddc.gauges.double import InDouble
from ddc.optim import respected
from ddc.optim.drift import GaugeDrift
from ddc.optim.rules.lion import DDCLion
from ddc.optim.sections import Sections
from tests.test_complete import LAYER_NORM, MODELS, TOKENS, VOCABULARY, gpt, moved, text

TARGETS = torch.randint(VOCABULARY, TOKENS.shape, generator=torch.Generator().manual_seed(1))
#: Singular values of maps, and scales, lie within a factor of ten of 1: condition numbers up to
#: 100.
SPREAD = math.log(10)
#: By model, what is beyond the paper's kinds and respected.
RESPECTED = {
    "GPT, RMSNorm, SwiGLU, RoPE, grouped heads": {"value_map", "qk_map"},
    "GPT, LayerNorm, biases, ReLU": {
        "value_map", "value_bias", "qk_map", "key_bias", "stream_mean", "translation",
        "reader_shift", "norm_shift",
    },
    "GPT, partly turned positions": {"value_map", "qk_map"},
    "Qwen3": {"value_map", "qk_norm_scale"},
    "Gemma 3": {"value_map", "qk_norm_scale"},
}  # fmt: skip
#: Of a model that amplifies rounding along its training at the others' rate, as it does under
#: AdamW: from weights that differ by 1e-15, to 6e-3 in a hundred steps.
LOWER = {"Gemma 3": {"lr": 1e-3}}


@functools.cache
def made(name: str) -> tuple[nn.Module, tuple[Gauge, ...]]:
    """A model, and all of its gauges but the residual rotation."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    gauges = find_gauges(model.eval(), inputs=inputs, kinds="complete", verify=False)
    return model, tuple(gauge for gauge in gauges if gauge.kind != "stream_rotation")


def logits(model: nn.Module) -> Tensor:
    with InDouble():
        given = model(TOKENS)
        return given if isinstance(given, Tensor) else given.logits


def backward(model: nn.Module) -> None:
    model.zero_grad()
    with InDouble():
        F.cross_entropy(logits(model).flatten(0, 1), TARGETS.flatten()).backward()


def trained(
    name: str, moves: tuple[Gauge, ...], steps: int, make: Any = DDCAdam, **options: Any
) -> Tensor:
    """Log-probabilities after training, from a point of the orbit of some gauges."""
    model, gauges = made(name)
    here, clip = moved(model), options.pop("clip", None)
    known = options.pop("known", gauges)
    GaugeSet(moves).transform_(here, torch.Generator().manual_seed(1), SPREAD)
    optimizer = make(here.named_parameters(), known, **{"lr": 3e-3, "weight_decay": 0.1} | options)
    for _ in range(steps):
        backward(here)
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(here.parameters(), clip, optimizer.grad_norm())
        optimizer.step()
    return logits(here).detach().log_softmax(-1)


def difference(
    name: str, steps: int, moves: tuple[Gauge, ...] | None = None, **options: Any
) -> float:
    moves = made(name)[1] if moves is None else moves
    first = trained(name, (), steps, **options)
    assert (first - trained(name, (), 0, **options)).abs().max() > 0.1
    return float((first - trained(name, moves, steps, **options)).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", RESPECTED)
def test_the_whole_group_at_once(name: str) -> None:
    _, gauges = made(name)
    assert {gauge.kind for gauge in gauges} >= RESPECTED[name]
    assert difference(name, 100, **LOWER.get(name, {})) < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(RESPECTED["GPT, LayerNorm, biases, ReLU"]))
def test_each_kind_alone(kind: str) -> None:
    """Not only what all of them leave."""
    name = "GPT, LayerNorm, biases, ReLU"
    alone = tuple(gauge for gauge in made(name)[1] if gauge.kind == kind)
    assert difference(name, 12, alone, known=alone) < 1e-9
    if kind not in ("translation", "key_bias"):  # which AdamW does not see, but for decay
        paper = [
            g for g in made(name)[1] if g.kind in ("relu_rescale", "norm_scale", "logit_shift")
        ]
        assert difference(name, 12, alone, known=paper) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.1, "vertical": "balance"},
        {"retract": False, "additive": True, "step_scale": "norm", "lr": 1e-3},
        {"make": DDCLion, "lr": 3e-4},
    ],
    ids=str,
)
def test_every_mode(options: dict[str, Any]) -> None:
    assert difference("GPT, LayerNorm, biases, ReLU", 20, **options) < 1e-9


def test_the_norm_of_the_gradient_does_not_depend_on_the_gauge() -> None:
    model, gauges = made("GPT, LayerNorm, biases, ReLU")
    norms = []
    for moves in ((), gauges):
        here = moved(model)
        GaugeSet(moves).transform_(here, torch.Generator().manual_seed(1), SPREAD)
        before = [p.detach().clone() for p in here.parameters()]
        optimizer = DDCAdam(here.named_parameters(), gauges)
        backward(here)
        norms.append(float(optimizer.grad_norm()))
        assert all(map(torch.equal, before, here.parameters()))  # bit by bit
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


@pytest.mark.slow
def test_nothing_is_frozen_but_the_gauge() -> None:
    """First updates from gradients across the orbit, for a step that is linear in them."""
    model, gauges = made("GPT, LayerNorm, biases, ReLU")
    here = moved(model)
    params = dict(here.named_parameters())
    tangents = tangents_of(gauges, params)
    values, basis = torch.linalg.svd(tangents, full_matrices=True)[1:]
    orbit = int((values > 1e-9 * values[0]).sum())
    assert orbit == rank(tangents)
    updates = []
    for gradient in basis[orbit:]:
        copied = copy.deepcopy(here)
        optimizer = DDCAdam(copied.named_parameters(), gauges, lr=1.0, eps=1e6, weight_decay=0.0)
        parts = gradient.split([p.numel() for p in params.values()])
        for p, part in zip(copied.parameters(), parts, strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in copied.parameters()])
        updates.append(after - torch.cat([p.detach().flatten() for p in params.values()]))
    spread = torch.linalg.svdvals(torch.stack(updates))
    spread = spread / spread[0]
    count = len(basis) - orbit
    assert spread[count - 1] > 1e-7, spread[count - 5 :]


def test_drift_along_orbits_is_measured() -> None:
    """By what an element of a gauge that adds moves them; maps have no measure."""
    model, gauges = made("GPT, LayerNorm, biases, ReLU")
    start = {name: p.detach() for name, p in moved(model).named_parameters()}
    drift = GaugeDrift(start, gauges)
    assert max(drift.at({name: p.clone() for name, p in start.items()}).values()) == 0
    for kind in ("norm_shift", "value_bias", "key_bias", "translation", "reader_shift"):
        now = {name: p.clone() for name, p in start.items()}
        sizes = []
        for gauge in gauges:
            if gauge.kind == kind:
                element = gauge.sample(now, torch.Generator().manual_seed(0))
                gauge.act_(now, element)
                sizes.append(element)
        found = drift.at(now)[kind]
        # a mean over the width is stream_mean's as well, and counted there
        rel = 0.1 if kind == "translation" else 1e-6
        assert found == pytest.approx(float(torch.cat(sizes).square().mean().sqrt()), rel=rel)
    assert "value_map" not in drift.at(now)


def test_state_is_no_larger_than_adamws() -> None:
    for name in RESPECTED:
        model, gauges = made(name)
        optimizer = DDCAdam(moved(model).named_parameters(), gauges)
        held = [
            each for state in optimizer.state.values() for k, each in state.items() if k != "step"
        ]
        assert sum(each.numel() for each in held) <= 2 * sum(p.numel() for p in model.parameters())


def test_a_step_goes_on_from_its_state() -> None:
    name = "GPT, LayerNorm, biases, ReLU"
    model, gauges = made(name)
    models = [moved(model), moved(model)]
    optimizers = [DDCAdam(each.named_parameters(), gauges) for each in models]
    for step in range(4):
        backward(models[0])
        optimizers[0].step()
        if step == 1:
            models[1].load_state_dict(models[0].state_dict())
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        if step > 1:
            backward(models[1])
            copy.copy(optimizers[1]).step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("name", ["head.bias", "blocks.0.attention.output.bias", "position.weight"])
def test_what_takes_up_a_shift_cannot_be_frozen_later(name: str) -> None:
    model, gauges = made("GPT, LayerNorm, biases, ReLU")
    here = moved(model)
    optimizer = DDCAdam(here.named_parameters(), gauges)
    dict(here.named_parameters())[name].requires_grad_(False)
    backward(here)
    before = [p.detach().clone() for p in here.parameters()]
    with pytest.raises(ValueError, match=rf"'{name}' was frozen after the optimizer was made"):
        optimizer.step()
    assert all(map(torch.equal, before, here.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3", "Gemma 3"])
def test_muon_scales_queries_against_keys(name: str) -> None:
    """Of their norms, also where what is scaled is 1 + γ."""
    model, gauges = made(name)
    known = tuple(gauge for gauge in gauges if gauge.kind != "value_map")  # of hidden matrices
    scales = tuple(gauge for gauge in gauges if gauge.kind == "qk_norm_scale")
    hidden = hidden_matrices(model, inputs=(TOKENS,))

    def make(params: Any, gauges: Any, **options: Any) -> DDCMuon:
        return DDCMuon(params, gauges, hidden, **options | {"orthogonalizer": "polar"})

    # at 0.02 both models amplify rounding: weights that differ by 1e-15, to 5e-5
    assert difference(name, 100, known, known=known, make=make, lr=0.005) < 1e-7
    others = tuple(gauge for gauge in known if gauge not in scales)
    assert difference(name, 8, scales, known=others, make=make, lr=0.02) > 1e-4


def test_a_map_of_sums_goes_with_nothing_else() -> None:
    params = {name: torch.rand(4, 4).requires_grad_() for name in ("a", "b", "c")}
    slots = [(RotatedAxis(name, 0, np.arange(4)[:, None, None]),) for name in params]
    maps = [General("qk_norm_scale", "x", a, b, "scale", 1.0) for a, b in pairwise(slots)]
    DDCAdam(params.items(), maps)
    with pytest.raises(ValueError, match=r"of 'b' 0 more is scaled, and 1 more by another"):
        DDCAdam(params.items(), [maps[0], replace(maps[1], offset=0.0)])
    scale = Rescale("norm_scale", "y", (Axis("c", 1),), (Axis("a", 1),))
    with pytest.raises(ValueError, match=r"'a': .* do not combine: .* as it stands"):
        DDCAdam(params.items(), [maps[0], scale])
    DDCAdam(params.items(), [replace(maps[0], offset=0.0), scale])
    shifted = replace(scale, minus=(Axis("a", 1, 1.0),))
    with pytest.raises(ValueError, match=r"'a': .* do not combine: .* as it stands"):
        DDCAdam(params.items(), [replace(maps[0], offset=0.0), shifted])


def test_muon_moves_to_sections_too() -> None:
    name = "GPT, LayerNorm, biases, ReLU"
    model, gauges = made(name)
    left_out = ("value_map", "qk_map", "stream_mean")
    known = tuple(gauge for gauge in gauges if gauge.kind not in left_out)
    hidden = hidden_matrices(model, inputs=(TOKENS,))

    def make(params: Any, gauges: Any, **options: Any) -> DDCMuon:
        return DDCMuon(params, gauges, hidden, **options | {"orthogonalizer": "polar"})

    assert difference(name, 8, known, known=known, make=make, lr=0.02) < 1e-9
    with pytest.raises(ValueError, match=r"value_map at .*: 'blocks.0.* is a hidden matrix"):
        make(model.named_parameters(), [g for g in gauges if g.kind != "stream_mean"])


STREAMS = {
    "GPT, RMSNorm, SwiGLU, RoPE, grouped heads": (),
    "GPT, LayerNorm, biases, ReLU": ("stream_mean",),  # of hidden matrices
}


def turning(name: str, *left_out: str, heads: bool) -> tuple[Gauge, ...]:
    """Gauges with the rotation of the stream, and of heads in the place of their maps."""
    model, inputs = MODELS[name]()
    maps = ("value_map", "qk_map", *left_out)
    kinds = [kind for kind in complete_kinds() if kind not in maps]
    kinds += ["value_rotation", "qk_rotation"] if heads else []
    gauges = find_gauges(model.eval(), inputs=inputs, kinds=kinds, verify=False)
    assert "stream_rotation" in {gauge.kind for gauge in gauges}
    return tuple(gauges)


@pytest.mark.parametrize("name", STREAMS)
def test_muon_turns_with_the_stream(name: str) -> None:
    gauges = turning(name, *STREAMS[name], heads=True)
    hidden = hidden_matrices(made(name)[0], inputs=(TOKENS,))

    def make(params: Any, gauges: Any, **options: Any) -> DDCMuon:
        return DDCMuon(params, gauges, hidden, **options | {"orthogonalizer": "polar"})

    options = {"make": make, "lr": 0.02, "adam_lr": 3e-3, "known": gauges}
    assert difference(name, 8, gauges, **options) < 1e-9
    (rotation,) = [gauge for gauge in gauges if gauge.kind == "stream_rotation"]
    options["known"] = tuple(gauge for gauge in gauges if gauge is not rotation)
    assert difference(name, 8, (rotation,), **options) > 1e-3


def test_drift_is_measured_beside_a_stream_that_turns() -> None:
    """Also of heads that turn, which DDCMuon takes together with it and DDCAdam does not."""
    name = "GPT, RMSNorm, SwiGLU, RoPE, grouped heads"
    gauges = turning(name, heads=True)
    start = {key: p.detach() for key, p in made(name)[0].named_parameters()}
    drift = GaugeDrift(start, gauges).at(start)
    assert drift["norm_scale"] == 0
    assert drift["value_rotation"] < 1e-3
    assert "stream_rotation" not in drift


@pytest.mark.parametrize("name", STREAMS)
def test_adam_turns_with_the_stream_where_heads_do_not(name: str) -> None:
    gauges = turning(name, heads=False)
    assert difference(name, 8, gauges, known=gauges) < 1e-9
    both = turning(name, heads=True)
    with pytest.raises(ValueError, match=r"stream_rotation at .* turn two axes of it"):
        DDCAdam(made(name)[0].named_parameters(), both)
    left = [gauge for gauge in gauges if gauge.kind != "norm_shift"]
    if len(left) < len(gauges):
        with pytest.raises(ValueError, match="add the norm_shift of that norm"):
            DDCAdam(made(name)[0].named_parameters(), left)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.bfloat16(), "is torch.bfloat16, and moved along the gauge and back"),
        (lambda model: model, ""),
    ],
)
def test_what_has_no_section_is_refused(change: Callable[..., nn.Module], message: str) -> None:
    model, inputs = gpt(**LAYER_NORM)()
    kinds = ["norm_shift", "reader_shift"]
    gauges = find_gauges(model, inputs=inputs, kinds=kinds, verify=False)
    optimizer = functools.partial(DDCAdam, change(copy.deepcopy(model)).named_parameters(), gauges)
    if message:
        with pytest.raises(ValueError, match=message):
            optimizer()
    else:
        optimizer()


def test_a_reader_without_a_bias_has_no_section() -> None:
    slot = Translated("1.bias", 0)
    model = nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8), nn.Linear(8, 9, bias=False))
    gauges = find_gauges(model, inputs=(torch.randn(4, 9),), kinds=["norm_shift"])
    assert isinstance(gauges[0], Shear)
    assert gauges[0].slots == (slot,)
    with pytest.raises(ValueError, match=r"norm_shift at 1: a reader without a bias"):
        DDCAdam(model.named_parameters(), gauges)


def test_an_optimizer_says_what_it_takes() -> None:
    """Of a kind, gauge by gauge."""
    model, inputs = text("GPTNeoX", num_attention_heads=2)()
    gauges = find_gauges(model.eval(), inputs=inputs, kinds="complete", verify=False)
    kept = respected(DDCAdam, model.named_parameters(), gauges)
    left_out = [str(gauge) for gauge in gauges if gauge not in kept.found]
    assert left_out == [
        "stream_rotation at gpt_neox.embed_in",
        "norm_shift at gpt_neox.final_layer_norm",
    ]
    assert len(kept.only(["norm_shift"])) == 2
    reasons = {each.where: each.reason for each in kept.refused if each.kind == "norm_shift"}
    assert "a reader without a bias" in reasons["gpt_neox.final_layer_norm"]
    assert "leave" not in reasons["gpt_neox.final_layer_norm"]
    DDCAdam(model.named_parameters(), kept)
    hidden = hidden_matrices(model, inputs=inputs)
    muon = respected(
        lambda params, some: DDCMuon(params, some, hidden), model.named_parameters(), gauges
    )
    assert {"value_map", "qk_map"} & {gauge.kind for gauge in muon} == set()
    DDCMuon(model.named_parameters(), muon, hidden)


def test_what_needs_others_is_tried_beside_them() -> None:
    """A rotation of the stream turns with the shifts of norms, which are of a later kind."""
    name = "GPT, LayerNorm, biases, ReLU"
    model, hidden = made(name)[0], hidden_matrices(made(name)[0], inputs=(TOKENS,))
    gauges = GaugeSet(turning(name, heads=True))
    kept = respected(
        lambda params, some: DDCMuon(params, some, hidden), model.named_parameters(), gauges
    )
    assert {"stream_rotation", "norm_shift"} <= {gauge.kind for gauge in kept}
    assert {each.kind for each in kept.refused} == {"stream_mean"}  # of hidden matrices


def test_shifts_go_one_way() -> None:
    params = {name: torch.zeros(3, 2) for name in "abc"}
    first, second, third = (
        Translation("translation", x, (Translated(x, 1), Translated(y, 1, -1.0)))
        for x, y in ("ab", "bc", "ca")
    )
    assert Sections([second, first], params).gauges == [first, second]
    with pytest.raises(ValueError, match="take up each other's shifts in a circle"):
        Sections([second, first, third], params)


def test_a_section_is_one_point_of_an_orbit() -> None:
    """And gradients there are those of the loss there."""
    model, gauges = made("GPT, LayerNorm, biases, ReLU")
    seen = []
    for seed in (None, 1, 2):
        here = moved(model)
        params = dict(here.named_parameters())
        sections = Sections(gauges, params)
        if seed is not None:
            moves = GaugeSet(tuple(sections.gauges))
            moves.transform_(here, torch.Generator().manual_seed(seed), SPREAD)
        backward(here)
        grads: dict[Tensor, Tensor] = {}
        with sections.entered(grads):
            seen.append([p.detach().clone() for p in here.parameters()])
            pulled = [grads.get(p, p.grad).clone() for p in here.parameters()]
            if seed == 1:
                still = {
                    g.slots[0].parameter for g in gauges if g.kind in ("norm_shift", "value_bias")
                }
                backward(here)
                for (name, p), mine in zip(here.named_parameters(), pulled, strict=True):
                    if name not in still:
                        assert (p.grad - mine).abs().max() < 1e-9, name
    for other in seen[1:]:
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(seen[0], other, strict=True))
