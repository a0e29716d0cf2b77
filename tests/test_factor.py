"""General linear maps between the sides of a product: adapters and any two linear maps in a row."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddc import DDCAdam, audit, certify, check, find_gauges
from ddc.compatibility import provide_torchvision_operators
from ddc.gauges import GaugeSet, named_parameters
from ddc.gauges.double import InDouble
from ddc.optim.lift import Lift
from ddc.optim.rules.lion import DDCLion
from ddc.optim.rules.sgd import DDCSGD
from ddc.optim.rules.shampoo import DDCShampoo

provide_torchvision_operators()

import peft  # noqa: E402
import transformers  # noqa: E402

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(5, (32,), generator=torch.Generator().manual_seed(1))
#: Singular values of a random map lie within a factor of 10 of 1: condition numbers up to 100.
SPREAD = math.log(10)


class Adapted(nn.Module):
    """Two frozen layers with adapters of one shape, and a third of another."""

    def __init__(self, rank: int = 3, zero: bool = True) -> None:
        super().__init__()
        sizes = [(6, 8), (8, 8), (8, 8), (8, 5)]
        self.base = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.a = nn.ModuleList(nn.Linear(n, rank, bias=False) for n, _ in sizes)
        self.b = nn.ModuleList(nn.Linear(rank, m, bias=False) for _, m in sizes)
        self.base.requires_grad_(False)
        if zero:
            for each in self.b:
                nn.init.zeros_(each.weight)

    def forward(self, x: Tensor) -> Tensor:
        for i, (base, a, b) in enumerate(zip(self.base, self.a, self.b, strict=True)):
            x = base(x) + 2 * b(a(x))
            x = x if i == 3 else F.gelu(x)
        return x


def adapted(**options: Any) -> tuple[nn.Module, GaugeSet]:
    torch.manual_seed(0)
    model = Adapted(**options).double()
    return model, find_gauges(model, inputs=(X,), kinds=["factor_map"])


def trained(
    model: nn.Module,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int = 100,
    clip: bool = False,
) -> Tensor:
    """Log-probabilities after training."""
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X.to(next(model.parameters()))), Y).backward()
        if clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, optimizer.grad_norm())
        optimizer.step()
    return F.log_softmax(model(X.to(next(model.parameters()))).detach(), -1)


def divergence(model: nn.Module, gauges: GaugeSet, make: Any, **options: Any) -> float:
    """The largest difference of log-probabilities, from two starts on one orbit."""
    other = copy.deepcopy(model)
    gauges.transform_(other, torch.Generator().manual_seed(0), SPREAD)
    before = trained(copy.deepcopy(model), make, steps=0)
    first = trained(model, make, **options)
    assert (first - before).abs().max() > 0.1
    return float((first - trained(other, make, **options)).abs().max())


def lift(kind: type[Lift], gauges: GaugeSet, **options: Any) -> Any:
    def make(model: nn.Module) -> Lift:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return kind(named, gauges, **options)

    return make


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    ("kind", "lr"), [(DDCAdam, 1e-2), (DDCLion, 3e-3), (DDCSGD, 0.03)], ids=lambda each: str(each)
)
def test_adapters_train_alike_from_any_start(kind: type[Lift], lr: float, zero: bool) -> None:
    model, gauges = adapted(zero=zero)
    assert divergence(model, gauges, lift(kind, gauges, lr=lr)) < 1e-7


def test_adamw_does_not() -> None:
    model, gauges = adapted(zero=False)
    make = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2)  # noqa: E731
    assert divergence(model, gauges, make) > 0.1


@pytest.mark.parametrize("options", [{"weight_decay": 1.0}, {"clip": True}, {"betas": (0.0, 0.9)}])
def test_with_decay_clipping_and_other_moments(options: dict[str, Any]) -> None:
    model, gauges = adapted(zero=False)
    clip = options.pop("clip", False)
    make = lift(DDCAdam, gauges, lr=1e-2, **options)
    steps = 50 if clip else 100  # which amplifies rounding: to 1e-9 or 3e-7 in 100, by the CPU
    assert divergence(model, gauges, make, clip=clip, steps=steps) < 1e-7


def test_the_step_is_the_one_that_is_written_down() -> None:
    """Pair by pair, with roots of matrices as scipy has them."""
    model, gauges = adapted(zero=False)
    lr, decay, (b1, b2), eps = 1e-2, 0.1, (0.9, 0.99), 1e-8
    reference = copy.deepcopy(model)
    trained(model, lift(DDCAdam, gauges, lr=lr, weight_decay=decay, betas=(b1, b2)), 20)

    def mean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """x # y."""
        root = scipy.linalg.sqrtm(x)
        inverse = np.linalg.inv(root)
        return root @ scipy.linalg.sqrtm(inverse @ y @ inverse) @ root

    moments = {i: [0.0, 0.0, 0.0, 0.0] for i in range(4)}
    for t in range(1, 21):
        reference.zero_grad()
        F.cross_entropy(reference(X), Y).backward()
        for i in range(4):
            pair = reference.a[i].weight, reference.b[i].weight
            (a, b), (ga, gb) = (
                [x.detach().numpy() for x in each] for each in (pair, [p.grad for p in pair])
            )
            inverse = np.linalg.inv(a @ a.T)
            s = mean(inverse, b.T @ b + 16 / 9 * inverse)
            va = (ga * np.linalg.solve(s, ga)).sum(0) / 3  # one number a column of A
            vb = ((gb @ s) * gb).sum(1, keepdims=True) / 3  # and a row of B
            now = [ga, gb, va, vb]
            rates = [b1, b1, b2, b2]
            moments[i] = [
                r * m + (1 - r) * x for r, m, x in zip(rates, moments[i], now, strict=True)
            ]
            ma, mb, va, vb = (m / (1 - r**t) for r, m in zip(rates, moments[i], strict=True))
            a = (1 - lr * decay) * a - lr * np.linalg.solve(s, ma / (np.sqrt(va) + eps))
            b = (1 - lr * decay) * b - lr * (mb / (np.sqrt(vb) + eps)) @ s
            pair[0].data.copy_(torch.from_numpy(a))
            pair[1].data.copy_(torch.from_numpy(b))
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-10


def test_state_is_smaller_than_adamws_and_all_pairs_of_a_shape_step_at_once() -> None:
    model, gauges = adapted()
    optimizer = lift(DDCAdam, gauges)(model)
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = sum(
        value.numel()
        for each in optimizer.state.values()
        for key, value in each.items()
        if key != "step"
    )
    assert state < 2 * entries
    assert len(optimizer._stacks) == 3  # of four pairs, two have one shape
    again = lift(DDCAdam, gauges)(copy.deepcopy(model))
    again.load_state_dict(optimizer.state_dict())


def test_nothing_is_frozen_but_the_gauge() -> None:
    model, gauges = adapted(zero=False)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tangents = torch.cat([gauge.tangents(params) for gauge in gauges])
    count = tangents.shape[1]
    assert len(tangents) == 4 * 9
    across = torch.linalg.qr(tangents.mT, mode="complete").Q[:, len(tangents) :].mT
    updates = []
    for gradient in across:
        copied = copy.deepcopy(model)
        optimizer = lift(DDCAdam, gauges, lr=1.0, eps=1e6, weight_decay=0.0)(copied)
        trainable = [p for p in copied.parameters() if p.requires_grad]
        for p, part in zip(trainable, gradient.split([p.numel() for p in trainable]), strict=True):
            p.grad = part.view_as(p)
        before = torch.cat([p.detach().flatten().clone() for p in trainable])
        optimizer.step()
        updates.append(torch.cat([p.detach().flatten() for p in trainable]) - before)
    values = torch.linalg.svdvals(torch.stack(updates))
    assert int((values > 1e-8 * values[0]).sum()) == count - len(tangents)


def test_in_single_precision() -> None:
    """As near to float64 as AdamW is, from a start of condition number 100 too."""
    model, gauges = adapted()
    make = lift(DDCAdam, gauges, lr=3e-3)
    exact = trained(copy.deepcopy(model), make, 30)
    single = copy.deepcopy(model).float()
    far = copy.deepcopy(single)
    gauges.transform_(far, torch.Generator().manual_seed(0), SPREAD)
    for each in (single, far):
        assert (trained(each, make, 30) - exact).abs().max() < 2e-4


def test_two_linear_maps_in_a_row() -> None:
    """With a bias between them, beside a rescale of the second one's outputs, which dresses it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 4), nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3, bias=False), nn.Linear(3, 5)
    ).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gauges = find_gauges(model, inputs=(X,), kinds=["factor_map", "relu_rescale"])
    kinds = [gauge.kind for gauge in gauges]
    assert kinds == ["relu_rescale", "factor_map", "factor_map"]
    assert [gauge.dimension(named_parameters(model)) for gauge in gauges] == [7, 16, 9]
    assert max(check(model, gauges, lambda m: m(X).log_softmax(-1)).values()) < 1e-10
    F.cross_entropy(model(X), Y).backward()
    assert max(audit(model, gauges).values()) < 1e-10
    maps = gauges.only(["factor_map"])
    assert divergence(copy.deepcopy(model), maps, lift(DDCAdam, maps, lr=1e-2)) < 1e-7
    one = GaugeSet(gauges.found[:2])  # the rescale is between two maps
    assert divergence(copy.deepcopy(model), one, lift(DDCAdam, one, lr=1e-2)) < 1e-7
    with pytest.raises(ValueError, match=r"relu_rescale at 1 scales outputs of what factor_map"):
        lift(DDCAdam, gauges)(model)


def test_a_chain_of_linear_maps_is_complete_and_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 5)).double()
    gauges = find_gauges(copy.deepcopy(model).float(), inputs=(X.float(),), kinds="complete")
    kinds = [gauge.kind for gauge in gauges]
    assert sorted(kinds) == ["factor_bias"] * 2 + ["factor_map"] * 2 + ["logit_shift"]
    assert certify(model, gauges, (X,)).complete
    first = GaugeSet(tuple(g for g in gauges if g.kind != "factor_map" or g.where == "0"))
    assert divergence(copy.deepcopy(model), first, lift(DDCAdam, first, lr=1e-2)) < 1e-7
    with pytest.raises(ValueError, match=r"'1.weight': .* turn two axes of it"):
        lift(DDCAdam, gauges)(model)


def test_a_scale_of_layers_dresses_what_a_map_mixes() -> None:
    """Its own entries decompose, the bias beside the mixed matrix is dressed and free."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 4), nn.Linear(4, 7), nn.Linear(7, 5)
            self.scale = nn.Parameter(torch.rand(7) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.gelu(self.second(self.first(x)) * self.scale))

    torch.manual_seed(0)
    model = Scaled()
    gauges = find_gauges(model, inputs=(X.float(),), kinds=["factor_map", "layer_scale"])
    assert [gauge.kind for gauge in gauges] == ["factor_map", "layer_scale"]
    assert divergence(model.double(), gauges, lift(DDCAdam, gauges, lr=1e-2)) < 1e-7


def test_an_embedding_and_its_projection() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 3), nn.Linear(3, 9, bias=False))
    tokens = (torch.arange(40).view(5, 8),)
    gauges = find_gauges(model, inputs=tokens, kinds="complete")
    assert {gauge.kind for gauge in gauges} == {"factor_map", "logit_shift"}
    assert certify(model, gauges, tokens).complete


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: F.dropout(x, 0.5, m.training),
        lambda m, x: x * m.fixed,
        lambda m, x: x * m.gate,
        lambda m, x: x.relu(),
        lambda m, x: x.flip(-1),
        lambda m, x: x + 1,
    ],
    ids=["dropout", "buffer", "gate", "relu", "flip", "constant"],
)
def test_what_is_done_between_the_maps_is_refused(between: Any) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 5)
            self.gate = nn.Parameter(torch.rand(4) + 0.5)
            self.register_buffer("fixed", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(between(self, self.first(x)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gauges = find_gauges(Between(), inputs=(X.float(),), kinds=["factor_map"])
    assert not gauges.found


def test_what_a_map_cannot_step_is_refused() -> None:
    model, gauges = adapted()
    with pytest.raises(ValueError, match="Shampoo respects rotations, and no general linear map"):
        lift(DDCShampoo, gauges)(model)
    nn.init.zeros_(model.a[0].weight)
    with pytest.raises(ValueError, match=r"'a.0.weight': all zero, and under factor_map at "):
        lift(DDCAdam, gauges)(model)


def test_a_gradient_that_is_no_number_stays_in_its_pair() -> None:
    model, gauges = adapted(zero=False)
    optimizer = lift(DDCAdam, gauges)(model)
    for step in range(2):
        F.cross_entropy(model(X), Y).backward()
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.nan_to_num()
        if not step:
            model.a[1].weight.grad[0, 0] = torch.nan
        optimizer.step()
    assert model.a[1].weight.isnan().any()
    assert model.a[2].weight.isfinite().all()


def adapters_of_peft(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", **options))


@pytest.mark.slow
def test_the_adapters_of_peft() -> None:
    model = adapters_of_peft(lora_dropout=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "find_gauges")
        gauges = find_gauges(model, kinds=["factor_map"])
    pairs = [{name.split(".lora_")[1][0] for name in gauge.parameters} for gauge in gauges]
    assert pairs == [{"A", "B"}] * 7
    assert gauges[0].where == "base_model.model.model.layers.0.self_attn.q_proj"
    model = model.double().eval()
    tokens = torch.randint(24, (4, 10), generator=torch.Generator().manual_seed(0))

    def run(spread: float) -> Tensor:
        here = copy.deepcopy(model)
        gauges.transform_(here, torch.Generator().manual_seed(0), spread)
        frozen = [p.clone() for p in here.parameters() if not p.requires_grad]
        optimizer = lift(DDCAdam, gauges, lr=1e-3)(here)
        for _ in range(100):
            optimizer.zero_grad()
            with InDouble():
                here(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        still = [p for p in here.parameters() if not p.requires_grad]
        assert all(map(torch.equal, frozen, still))
        with InDouble(), torch.no_grad():
            return here(input_ids=tokens).logits.log_softmax(-1)

    first = run(0.0)
    with InDouble(), torch.no_grad():
        before = model(input_ids=tokens).logits.log_softmax(-1)
    assert (first - before).abs().max() > 0.1
    assert (first - run(SPREAD)).abs().max() < 1e-7
