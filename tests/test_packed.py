"""Packed and stacked weights: gauges of parts of a parameter, of experts, of 1 + a parameter; and
optimizers under them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddc.compatibility import provide_torchvision_operators

provide_torchvision_operators()

import transformers  # noqa: E402

from ddc import DDCAdam, DDCMuon, audit, check, find_gauges, hidden_matrices  # noqa: E402
from ddc.gauges import (  # noqa: E402
    Axis,
    Gauge,
    GaugeSet,
    HiddenMatrix,
    Rescale,
    RotatedAxis,
    Rotation,
    named_parameters,
)
from ddc.gauges.double import InDouble  # noqa: E402
from ddc.gauges.verify import generic  # noqa: E402

transformers.logging.set_verbosity_error()
VOCABULARY = 37
TOKENS = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def text(name: str, config: str | None = None, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = getattr(transformers, config or f"{name}Config")(**(SIZES | options))
        return getattr(transformers, f"{name}ForCausalLM")(made)

    return make


EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Phi-3": text("Phi3", pad_token_id=0),
    "Mixtral": text("Mixtral", num_local_experts=3),
    "Qwen2-MoE": text("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=10),
    "Gemma": text("Gemma", head_dim=4),
}


def make(name: str) -> nn.Module:
    """A model in float64 at generic weights."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    if hasattr(model, "set_experts_implementation"):  # grouped products know no float64
        model.set_experts_implementation("batched_mm")
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = generic(p.detach(), generator)
    return model


def log_probs(model: nn.Module) -> Tensor:
    with InDouble():  # norms of transformers are in float32
        return F.log_softmax(model(input_ids=TOKENS, use_cache=False).logits, -1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    targets = torch.randint(VOCABULARY, TOKENS.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    F.nll_loss(log_probs(model).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()


def found(name: str) -> tuple[nn.Module, GaugeSet]:
    model = make(name)
    return model, find_gauges(model, inputs={"input_ids": TOKENS})


@pytest.mark.parametrize("name", MODELS)
def test_every_gauge_is_a_symmetry(name: str) -> None:
    model, gauges = found(name)
    assert {"gated_rescale", "norm_scale"} <= {gauge.kind for gauge in gauges}
    assert not [r for r in gauges.refused if r.kind in ("gated_rescale", "norm_scale")]
    assert max(check(model, gauges, log_probs, spread=0.7).values()) < 1e-12
    F.nll_loss(log_probs(model).flatten(0, 1), TOKENS.flatten()).backward()
    assert max(audit(model, gauges).values()) < 1e-8


OPTIMIZERS: dict[str, Callable[[nn.Module, GaugeSet], torch.optim.Optimizer]] = {
    "DDCAdam": lambda model, gauges: DDCAdam(
        model.named_parameters(), gauges, lr=3e-3, weight_decay=0.1
    ),
    "DDCMuon": lambda model, gauges: DDCMuon(
        model.named_parameters(),
        gauges,
        hidden_matrices(model, inputs={"input_ids": TOKENS}, apart=True),
        lr=0.02,
        adam_lr=3e-3,
        weight_decay=0.1,
        orthogonalizer="polar",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_stays_on_the_orbit(name: str, optimizer: str) -> None:
    model, gauges = found(name)
    copies = [model, copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(1), spread=0.7)
    start = log_probs(model).detach()
    assert (log_probs(copies[1]) - start).abs().max() < 1e-12
    optimizers = [OPTIMIZERS[optimizer](each, gauges) for each in copies]
    for i in range(100):
        for each, its in zip(copies, optimizers, strict=True):
            step(each, its, seed=i % 4)
    a, b = (log_probs(each).detach() for each in copies)
    assert (a - b).abs().max() < 1e-7
    assert (a - start).abs().max() > 1e-2


# ---- what is found, and what is refused


class Packed(nn.Module):
    """A norm, a packed gate, and what a variant does with it."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(5), nn.Linear(5, 12), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.fc1(self.norm(x))
        gate, up = h.chunk(2, -1)
        match self.variant:
            case "interleaved":
                gate, up = h[..., ::2], h[..., 1::2]
            case "reversed":
                gate, up = up, gate
            case "one for both":
                gate = up
            case "overlapping":
                gate = h[..., 3:9]
            case "activated":
                up = F.gelu(up)
            case "read elsewhere":
                return self.fc2(F.silu(gate) * up), up.tanh()
            case "in another order":
                up = up.flip(-1)
        return self.fc2(F.silu(gate) * up)


def rules_alone(model: nn.Module, *inputs: Tensor) -> GaugeSet:
    return find_gauges(model, inputs=inputs, verify=False).only(["gated_rescale", "norm_scale"])


@pytest.mark.parametrize(
    ("variant", "part"),
    [
        ("plain", "[6:12]"),
        ("interleaved", "[1:12:2]"),
        ("reversed", "[0:6]"),
        ("one for both", None),
        ("overlapping", None),
        ("activated", None),
        ("read elsewhere", None),
        ("in another order", None),
    ],
)
def test_the_part_of_a_packed_gate(variant: str, part: str | None) -> None:
    found = rules_alone(Packed(variant), torch.randn(2, 3, 5))
    gated = [gauge for gauge in found if gauge.kind == "gated_rescale"]
    assert [gauge.kind for gauge in found if gauge not in gated] == ["norm_scale"]
    if part is None:
        assert not gated
        return
    (gauge,) = gated
    assert gauge.plus == (Axis("fc1.weight" + part), Axis("fc1.bias" + part))
    assert gauge.minus == (Axis("fc2.weight", 1),)
    assert gauge.parameters == ("fc1.weight", "fc1.bias", "fc2.weight")


class Experts(nn.Module):
    """Two experts of three for each position, and what a variant does with them."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant, self.norm = variant, nn.RMSNorm(5)
        self.router = nn.Linear(5, 3, bias=False)
        self.up = nn.Parameter(torch.randn(3, 12, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        ids = chosen.flatten()
        h = torch.bmm(self.up[ids], x.repeat_interleave(2, 0)[..., None])[..., 0]
        gate, up = h.chunk(2, -1)
        h = F.silu(gate) * up
        other = ids.flip(0) if self.variant == "other experts" else ids
        if self.variant == "other positions":
            h = h.flip(0)
        y = torch.bmm(self.down[other], h[..., None])[..., 0]
        y = (y * weights.flatten()[:, None]).view(*chosen.shape, 5).sum(1)
        return (y, up.tanh()) if self.variant == "read elsewhere" else y


@pytest.mark.parametrize("variant", ["plain", "other experts", "other positions", "read elsewhere"])
def test_experts(variant: str) -> None:
    found = rules_alone(Experts(variant), torch.randn(4, 5))
    norm, *gated = sorted(found, key=lambda gauge: gauge.kind, reverse=True)
    assert {*norm.minus} == {Axis("router.weight", 1), Axis("up", 2)}
    if variant != "plain":
        assert not gated
        return
    (gauge,) = gated
    assert gauge.plus == (Axis("up[:,6:12]", (0, 1)),)
    assert gauge.minus == (Axis("down", (0, 2)),)
    assert gauge.dimension(named_parameters(Experts(variant))) == 18


def test_experts_as_one_product_of_groups_have_the_same_gauges() -> None:
    model = text("Mixtral", num_local_experts=3)()
    found = []
    for implementation in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        gauges = find_gauges(model, inputs={"input_ids": TOKENS[:1]}, verify=False)
        found.append([(gauge.kind, gauge.parameters) for gauge in gauges])
    assert found[0] == found[1]


class Spelt(nn.Module):
    """Attention as two products and a softmax, and what a variant does with it."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 2
        if self.variant == "capped":
            scores = torch.tanh(scores)
        if self.variant == "biased by keys":
            scores = scores + k.sum(-1)[..., None, :]
        weights = scores.softmax(-1)
        if self.variant == "weighted by values":
            weights = weights * v.sum(-1)[..., None, :]
        y = self.out((weights @ v).transpose(1, 2).flatten(2))
        return (y, v.norm()) if self.variant == "values are read" else y


@pytest.mark.parametrize(
    ("variant", "kinds"),
    [
        ("plain", {"value_rotation", "qk_rotation", "value_bias", "key_bias"}),
        ("capped", {"value_rotation", "qk_rotation", "value_bias"}),
        ("biased by keys", {"value_rotation", "value_bias"}),
        ("weighted by values", set()),  # what mixes them is not what the softmax gives
        ("values are read", {"qk_rotation", "key_bias"}),
    ],
)
def test_attention_that_is_spelt_out(variant: str, kinds: set[str]) -> None:
    wanted = ["value_rotation", "qk_rotation", "value_bias", "key_bias"]
    found = find_gauges(Spelt(variant), inputs=(torch.randn(2, 5, 8),), verify=False, kinds=wanted)
    assert {gauge.kind for gauge in found} == kinds
    tried = find_gauges(Spelt(variant), inputs=(torch.randn(2, 5, 8),), kinds=wanted)
    assert [*map(str, tried)] == [*map(str, found)]


def test_parts_of_packed_attention_are_hidden_matrices_of_their_own() -> None:
    names = [
        m.parameter
        for m in hidden_matrices(Spelt("plain"), inputs=(torch.randn(2, 5, 8),), apart=True)
    ]
    assert names == []  # they read the input as it is
    model = nn.Sequential(nn.Linear(8, 8), Spelt("plain"), nn.Linear(8, 3))
    names = [
        m.parameter for m in hidden_matrices(model, inputs=(torch.randn(2, 5, 8),), apart=True)
    ]
    assert names == [f"1.qkv.weight[{a}:{a + 8}]" for a in (0, 8, 16)] + ["1.out.weight"]


# ---- steps


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def five_steps(
    params: dict[str, Tensor],
    gauges: list[Gauge],
    hidden: list[HiddenMatrix],
    grads: list[dict[str, Tensor]],
) -> dict[str, Tensor]:
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    options = {"weight_decay": 0.1, "vertical": "balance"}
    optimizer: torch.optim.Optimizer = (
        DDCMuon(params.items(), gauges, hidden, orthogonalizer="polar", **options)
        if hidden
        else DDCAdam(params.items(), gauges, lr=1e-2, **options)
    )
    for each in grads:
        for name, p in params.items():
            p.grad = each[name].clone()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("hidden", [False, True])
def test_a_packed_weight_steps_as_its_parts_do(hidden: bool) -> None:
    shapes = {"gamma": (5,), "w": (12, 5), "b": (12,), "down": (5, 6)}
    whole = random_tensors(shapes, 0)
    grads = [random_tensors(shapes, 1 + i) for i in range(5)]

    def apart(of: dict[str, Tensor]) -> dict[str, Tensor]:
        w, b = of["w"].split(6), of["b"].split(6)
        return {"gamma": of["gamma"], "gate": w[0], "up": w[1], "c": b[0], "d": b[1]} | {
            "down": of["down"]
        }

    def gauges(gated: tuple[Axis, ...], reading: tuple[Axis, ...]) -> list[Gauge]:
        return [
            Rescale("gated_rescale", "mlp", gated, (Axis("down", 1),)),
            Rescale("norm_scale", "norm", (Axis("gamma"),), reading),
        ]

    ours = five_steps(
        whole,
        gauges((Axis("w[6:12]"), Axis("b[6:12]")), (Axis("w", 1),)),
        [HiddenMatrix("w"), HiddenMatrix("down")] * hidden,
        grads,
    )
    theirs = five_steps(
        apart(whole),
        gauges((Axis("up"), Axis("d")), (Axis("gate", 1), Axis("up", 1))),
        [HiddenMatrix(name) for name in ("gate", "up", "down")] * hidden,
        [apart(each) for each in grads],
    )
    for name, p in apart(ours).items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("hidden", [False, True])
def test_stacked_experts_step_as_single_ones_do(hidden: bool) -> None:
    shapes = {"up": (3, 6, 5), "down": (3, 5, 6)}
    whole, grads = random_tensors(shapes, 0), [random_tensors(shapes, 1 + i) for i in range(5)]

    def apart(of: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name}{e}": of[name][e] for name in ("up", "down") for e in range(3)}

    stacked = [Rescale("gated_rescale", "mlp", (Axis("up", (0, 1)),), (Axis("down", (0, 2)),))]
    single = [
        Rescale("gated_rescale", f"mlp.{e}", (Axis(f"up{e}"),), (Axis(f"down{e}", 1),))
        for e in range(3)
    ]
    ours = five_steps(whole, stacked, [HiddenMatrix(name) for name in shapes] * hidden, grads)
    names = [HiddenMatrix(name) for name in apart(whole)] * hidden
    theirs = five_steps(apart(whole), single, names, [apart(each) for each in grads])
    for name, p in apart(ours).items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-11, atol=1e-12)


def test_groups_that_disagree_over_a_part_are_told_the_gauge() -> None:
    params = random_tensors({"gamma": (5,), "w": (12, 5), "down": (5, 6)}, 0)
    gauges: list[Gauge] = [
        Rescale("gated_rescale", "mlp", (Axis("w[6:12]"),), (Axis("down", 1),)),
        Rescale("norm_scale", "norm", (Axis("gamma"),), (Axis("w", 1),)),
    ]
    named = [(name, p.requires_grad_()) for name, p in params.items()]
    groups = [{"params": named[:1], "lr": 0.1}, {"params": named[1:]}]
    with pytest.raises(ValueError, match=r"disagree in lr .* leave the gauge out \(norm_scale at"):
        DDCAdam(groups, gauges, lr=1e-3)


def test_one_more_than_a_parameter_steps_as_a_parameter_of_that() -> None:
    shapes = {"gamma": (5,), "w": (4, 5)}
    whole, grads = random_tensors(shapes, 0), [random_tensors(shapes, 1 + i) for i in range(5)]
    less = whole | {"gamma": whole["gamma"] - 1}
    ours, theirs = (
        five_steps(
            start, [Rescale("norm_scale", "n", (Axis("gamma", 0, by),), (Axis("w", 1),))], [], grads
        )
        for start, by in ((less, 1.0), (whole, 0.0))
    )
    torch.testing.assert_close(ours["gamma"] + 1, theirs["gamma"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["w"], theirs["w"], rtol=1e-12, atol=1e-12)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for i in steps:
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def packed_optimizer(model: nn.Module, name: str, **options: Any) -> torch.optim.Optimizer:
    gauges = rules_alone(model, torch.randn(2, 3, 5))
    if name == "DDCAdam":
        return DDCAdam(model.named_parameters(), gauges, **options)
    hidden = [HiddenMatrix("fc1.weight"), HiddenMatrix("fc2.weight")]
    return DDCMuon(model.named_parameters(), gauges, hidden, **options)


@pytest.mark.parametrize("variant", ["plain", "interleaved"])
@pytest.mark.parametrize("name", ["DDCAdam", "DDCMuon"])
def test_state_is_the_parameters_own_and_goes_round(name: str, variant: str) -> None:
    model = Packed(variant)
    optimizer = packed_optimizer(model, name)
    trained(model, optimizer, range(3))
    weight = model.fc1.weight
    entries = sum(v.numel() for k, v in optimizer.state[weight].items() if v.numel() > 12)
    assert entries <= (1 if name == "DDCMuon" else 2) * weight.numel()
    assert {*optimizer.state} <= {*model.parameters()}
    again = copy.deepcopy(model)
    other = packed_optimizer(again, name)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, its = copy.deepcopy((model, optimizer))
    expected = trained(model, optimizer, range(3, 6))
    for each, of in ((again, other), (copied, its)):
        assert all(map(torch.equal, trained(each, of, range(3, 6)), expected))


def test_parts_follow_their_parameter() -> None:
    """Weights may be put elsewhere between steps, and gradients are not held beyond one."""
    model = Packed("plain")
    moved = copy.deepcopy(model)
    optimizer, other = packed_optimizer(model, "DDCAdam"), packed_optimizer(moved, "DDCAdam")
    expected = trained(model, optimizer, range(4))
    trained(moved, other, range(2))
    for p in moved.parameters():
        p.data = p.data.clone()
    assert all(map(torch.equal, trained(moved, other, range(2, 4)), expected))
    assert all(
        p.grad is None
        for stack in other._stacks
        for q in stack.parameters
        for p in q.params
        if not isinstance(p, nn.Parameter)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDCAdam", "DDCMuon"])
def test_a_compiled_step_of_parts_is_the_eager_one(name: str) -> None:
    model = Packed("plain")
    compiled = copy.deepcopy(model)
    expected = trained(model, packed_optimizer(model, name), range(4))
    ours = trained(compiled, packed_optimizer(compiled, name, compiled=True), range(4))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_parts_that_do_not_fit_are_refused() -> None:
    params = {name: p.requires_grad_() for name, p in random_tensors({"w": (12, 5)}, 0).items()}
    params["v"] = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def gated(*parts: str) -> list[Gauge]:
        return [Rescale("gated_rescale", p, (Axis(p),), (Axis("v", 1),)) for p in parts]

    with pytest.raises(ValueError, match="cannot be cut into"):
        DDCAdam(params.items(), gated("w[0:6]", "w[3:9]"))
    with pytest.raises(ValueError, match="cannot be cut into"):
        DDCAdam(params.items(), gated("w[8:14]"))
    with pytest.raises(ValueError, match="cannot be cut into"):
        DDCAdam(params.items(), gated("w[6:6]"))
    with pytest.raises(ValueError, match=r"'u\[0:6\]' is not among the optimizer's"):
        DDCAdam(params.items(), gated("u[0:6]"))
    with pytest.raises(ValueError, match="one rate is for all of a parameter"):
        DDCMuon(params.items(), (), [HiddenMatrix("w[0:6]")])
    rows = Rescale("layer_scale", "all rows", (Axis("w"),), (Axis("v", 0),))
    with pytest.raises(ValueError, match="its units are those of all of 'w'"):
        DDCAdam(params.items(), [*gated("w[6:12]"), rows])
    slots = (RotatedAxis("w", 0, np.array([[[5, 6]]])),)
    with pytest.raises(ValueError, match="it turns indices of several parts of 'w'"):
        DDCAdam(params.items(), [*gated("w[6:12]"), Rotation("qk_rotation", "r", slots, True)])


# ---- convolutions


class Convolutions(nn.Module):
    """Convolution, batch norm, ReLU, and what reads that."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, groups=2 if variant == "groups" else 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        match self.variant:
            case "GELU":
                x = F.gelu(x)
            case "residual":
                return self.head((F.relu(x)[..., 2:, 2:] + self.second(F.relu(x))).mean((2, 3)))
            case "pooled":
                x = F.max_pool2d(F.relu(x), 2)
            case "read by a linear map":
                return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))
            case _:
                x = F.relu(x)
        return self.head(self.second(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("variant", "reader"),
    [
        ("plain", "second.weight"),
        ("pooled", "second.weight"),
        ("read by a linear map", "head.weight"),
        ("GELU", None),
        ("groups", None),
        ("residual", "second.weight"),
    ],
)
def test_channels_of_convolutions(variant: str, reader: str | None) -> None:
    model, x = Convolutions(variant), torch.randn(4, 3, 9, 9)
    found = find_gauges(model, inputs=(x,), kinds=["channel_scale"])
    if reader is None:
        assert not found
        assert found.refused
        return
    (gauge,) = found
    plus, minus = (Axis("norm.weight"), Axis("norm.bias")), (Axis(reader, 1),)
    if variant == "residual":  # the convolution reads the stream, and writes to it
        plus, minus = (
            (*plus, Axis(reader, 0), Axis("second.bias")),
            (*minus, Axis("head.weight", 1)),
        )
    assert (gauge.plus, gauge.minus) == (plus, minus)
    model.double()
    for p in model.parameters():
        p.data = generic(p.detach(), torch.Generator().manual_seed(p.numel()))
    if variant == "residual":
        with pytest.raises(ValueError, match="rescales dress each other in a circle"):
            DDCAdam(model.named_parameters(), found)
        return
    copies = [model, copy.deepcopy(model)]
    found.transform_(copies[1], torch.Generator().manual_seed(1))
    for each in copies:
        optimizer = DDCAdam(each.named_parameters(), found, lr=1e-2, weight_decay=0.1)
        for i in range(100):
            generator = torch.Generator().manual_seed(i % 4)
            targets = torch.randint(5, (4,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(each(x.double()), targets).backward()
            optimizer.step()
    a, b = (each(x.double()).log_softmax(-1).detach() for each in copies)
    assert (a - b).abs().max() < 1e-7
