"""DDCMuon: equivariance, agreement with independent implementations, routing."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.data import TextData
from ddc.gauges import Axis, Chain, GaugeSet, HiddenMatrix, Rescale, check, in_blocks
from ddc.models import GPT, DeepMLP, DeepMLPConfig, GPTConfig, cross_entropy
from ddc.optim.decay import decay_groups
from ddc.optim.factory import make_muon
from ddc.optim.hidden import HiddenStack, modes_of
from ddc.optim.muon import Muon
from ddc.optim.orthogonal import newton_schulz, newton_schulz_bfloat16, polar_factor
from ddc.optim.stack import Context
from experiments.equivariance.measure import MODELS as TABLE_MODELS
from experiments.equivariance.measure import orbit_divergence, random_model
from tests.conftest import MODELS
from tests.helpers import VOCABULARY, backward, make_model, relu_mlp, relu_mlp_gauges

PRIME = 11


def ddcmuon(model: nn.Module, gauges: GaugeSet, per_head: bool = False, **options) -> DDCMuon:
    options = {
        "lr": 0.02,
        "adam_lr": 3e-3,
        "weight_decay": 0.1,
        "orthogonalizer": "polar",
        **options,
    }
    return DDCMuon(model.named_parameters(), gauges, hidden_matrices(model, per_head), **options)


def muon(model: nn.Module, gauges: GaugeSet, **options):
    options = {
        "lr": 0.02,
        "adam_lr": 3e-3,
        "momentum": 0.95,
        "nesterov": True,
        "adjust_lr_fn": "original",
        **options,
    }
    options.setdefault("orthogonalizer", "newton_schulz")
    groups = decay_groups(model, 0.1)
    return make_muon(groups, hidden_matrices(model), betas=(0.9, 0.999), eps=1e-8, **options)


def deep_mlp(seed: int = 0, depth: int = 4, width: int = 32, residual: bool = False) -> DeepMLP:
    torch.manual_seed(seed)
    return DeepMLP(
        DeepMLPConfig(depth=depth, width=width, residual=residual), PRIME, PRIME
    ).double()


def table() -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
    return pairs, pairs.sum(1) % PRIME


def mlp_gradients(model: nn.Module) -> float:
    x, y = table()
    model.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    return float(loss.detach())


def mlp_step(model: DeepMLP, optimizer: torch.optim.Optimizer) -> float:
    loss = mlp_gradients(model)
    optimizer.step()
    return loss


def mlp_divergence(
    make, per_layer: bool = False, residual: bool = False, steps: int = 100
) -> float:
    model = deep_mlp(residual=residual)
    gauges = find_gauges(model, per_layer)
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(1))
    optimizers = [make(each, gauges) for each in copies]
    largest = 0.0
    for _ in range(steps):
        for each, optimizer in zip(copies, optimizers, strict=True):
            mlp_step(each, optimizer)
        with torch.no_grad():
            a, b = (each(table()[0]).log_softmax(-1) for each in copies)
        largest = max(largest, float((a - b).abs().max()))
    return largest


# ----------------------------------------------------------------------------------------------
# equivariance


@pytest.mark.slow
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", TABLE_MODELS)
def test_whole_product_group(name: str, per_head: bool, shakespeare: TextData) -> None:
    model = random_model(TABLE_MODELS[name], shakespeare.vocab_size, 0, torch.float64)
    make = functools.partial(ddcmuon, per_head=per_head)
    assert orbit_divergence(model, find_gauges(model), make, shakespeare, max_grad_norm=1.0) < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("vertical", ["freeze", "adam", "balance"])
@pytest.mark.parametrize(
    "name", ["RMSNorm, SwiGLU, RoPE, GQA", "RMSNorm, ReLU², partial RoPE, GQA"]
)
def test_blocks(name: str, vertical: str, shakespeare: TextData) -> None:
    """With the paper's step for what is not hidden."""
    model = random_model(TABLE_MODELS[name], shakespeare.vocab_size, 0, torch.float64)
    make = functools.partial(
        ddcmuon, vertical=vertical, step_scale="norm", retract=False, additive=True
    )
    assert (
        orbit_divergence(model, in_blocks(find_gauges(model)), make, shakespeare, max_grad_norm=1.0)
        < 1e-7
    )


def test_blocks_of_hidden_matrices_keep_still_along_their_orbit() -> None:
    """Norms of a pair move alike, and no bias may share their scale."""
    model = make_model(MODELS["rms-swiglu-rope-gqa"])
    gauges = in_blocks(find_gauges(model)).only(["gated_rescale"])
    params = dict(model.named_parameters())
    optimizer = ddcmuon(model, gauges)
    before = [gauge.log_norms(params) for gauge in gauges]
    for seed in range(10):
        backward(model, seed)
        optimizer.step()
    for gauge, (plus, minus) in zip(gauges, before, strict=True):
        now_plus, now_minus = gauge.log_norms(params)
        assert (now_plus - plus).abs() > 1e-3
        torch.testing.assert_close(now_plus - plus, now_minus - minus, rtol=0, atol=1e-12)
    model = make_model(MODELS["layer-bias-swiglu-rope-mqa"])
    with pytest.raises(
        ValueError, match=r"'blocks\.0\.mlp\.up\.bias' is not hidden.*gauges\.granularity=unit"
    ):
        ddcmuon(model, in_blocks(find_gauges(model)))


@pytest.mark.slow
def test_plain_muon_is_invariant_under_rotations_alone(shakespeare: TextData) -> None:
    """But for what AdamW does to the rest: so without biases, which the rotations turn too."""
    model = random_model(
        TABLE_MODELS["RMSNorm, SwiGLU, RoPE, GQA"], shakespeare.vocab_size, 0, torch.float64
    )
    gauges = find_gauges(model)
    exact = functools.partial(muon, orthogonalizer="polar")
    for kind in ("gated_rescale", "norm_scale"):
        assert orbit_divergence(model, gauges.only([kind]), exact, shakespeare, steps=20) > 1e-2
    for kind in ("value_rotation", "qk_rotation"):
        assert orbit_divergence(model, gauges.only([kind]), exact, shakespeare) < 1e-7
        assert (
            orbit_divergence(model, gauges.only([kind]), plain_adamw, shakespeare, steps=20) > 1e-2
        )


def plain_adamw(model: nn.Module, gauges: GaugeSet) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


@pytest.mark.parametrize(
    "options", [{}, {"vertical": "adam"}, {"vertical": "balance"}, {"nesterov": False}]
)
@pytest.mark.parametrize("per_layer", [False, True])
def test_deep_mlp_under_its_whole_group(per_layer: bool, options) -> None:
    assert mlp_divergence(functools.partial(ddcmuon, **options), per_layer) < 1e-7


@pytest.mark.parametrize("make", [muon, functools.partial(ddcmuon, orthogonalizer="newton_schulz")])
def test_what_is_no_frame_is_not_equivariant(make) -> None:
    """Without gauges DDCMuon is not equivariant, nor is Muon: the test above can fail."""

    def blind(model: nn.Module, gauges: GaugeSet) -> torch.optim.Optimizer:
        return make(model, GaugeSet())

    assert mlp_divergence(blind, steps=20) > 1e-3


def test_residual_deep_mlp() -> None:
    assert mlp_divergence(ddcmuon, residual=True) < 1e-7


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("vertical", ["freeze", "adam", "balance"])
def test_ddcadam_on_the_deep_mlp(per_layer: bool, vertical: str) -> None:
    def make(model: nn.Module, gauges: GaugeSet) -> DDCAdam:
        return DDCAdam(model.named_parameters(), gauges, lr=3e-3, vertical=vertical)

    assert mlp_divergence(make, per_layer, steps=50) < 1e-7


@pytest.mark.parametrize("vertical", ["freeze", "adam", "balance"])
def test_biases_beside_hidden_matrices(vertical: str) -> None:
    """A chain with biases: hidden matrices, the biases on their side, and free input and output
    layers.
    """
    model = relu_mlp(depth=5, width=16)
    gauges = relu_mlp_gauges(model)
    hidden = [HiddenMatrix(f"{i}.weight") for i in (2, 4, 6)]
    x, y = torch.randn(64, 16, dtype=torch.float64), torch.randint(16, (64,))
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    GaugeSet(tuple(gauges)).transform_(copies[1], torch.Generator().manual_seed(1))
    options = {"lr": 0.02, "orthogonalizer": "polar", "vertical": vertical}
    optimizers = [DDCMuon(m.named_parameters(), gauges, hidden, **options) for m in copies]
    start = [p.detach().clone() for p in copies[0].parameters()]
    for _ in range(30):
        for each, optimizer in zip(copies, optimizers, strict=True):
            optimizer.zero_grad()
            cross_entropy(each(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        assert (copies[0](x) - copies[1](x)).abs().max() < 1e-7
    moved = [bool((p != q).any()) for p, q in zip(copies[0].parameters(), start, strict=True)]
    assert all(moved)


def test_balance_relaxes_frames_and_leaves_the_function() -> None:
    """Without gradients and decay, nothing moves but the gauge; biases go with their rows."""
    model = relu_mlp(depth=5, width=16)
    gauges = relu_mlp_gauges(model)
    GaugeSet(tuple(gauges)).transform_(model, torch.Generator().manual_seed(1))
    hidden = [HiddenMatrix(f"{i}.weight") for i in (2, 4, 6)]
    options = {"lr": 0.1, "weight_decay": 0.0, "orthogonalizer": "polar", "vertical": "balance"}
    optimizer = DDCMuon(model.named_parameters(), gauges, hidden, **options)
    x = torch.randn(64, 16, dtype=torch.float64)
    before, spread = model(x).detach(), [model[2].weight.detach().norm(dim=1).log().std()]
    for _ in range(50):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        spread.append(model[2].weight.detach().norm(dim=1).log().std())
    assert (model(x) - before).abs().max() < 1e-9
    assert spread[-1] < 0.5 * spread[0]


def test_linked_matrices_share_their_rate() -> None:
    model = deep_mlp()
    hidden = hidden_matrices(model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, p)], "lr": 0.02 if i else 0.1} for i, (n, p) in enumerate(named.items())
    ]
    groups[1]["lr"] = 0.05
    with pytest.raises(ValueError, match="disagree in lr"):
        DDCMuon(groups, find_gauges(model), hidden)
    DDCMuon(groups, find_gauges(model).only(["logit_shift"]), hidden)  # nothing links them


def test_a_group_has_a_rate_for_each_kind() -> None:
    model = deep_mlp()
    (muon_group, adam_group) = DDCMuon(
        [{"params": list(model.named_parameters()), "lr": 0.05, "adam_lr": 1e-4}],
        find_gauges(model),
        hidden_matrices(model), lr=0.01, adam_lr=0.01,
    ).param_groups  # fmt: skip
    assert (muon_group["lr"], adam_group["lr"]) == (0.05, 1e-4)


@pytest.mark.parametrize("make", [muon, functools.partial(ddcmuon, weight_decay=0.0, lr=1e-4)])
def test_a_gradient_that_vanishes_for_ever(make) -> None:
    """Momentum decays into the smallest numbers; weights stay finite."""
    model = deep_mlp(depth=2, width=8).float()
    optimizer = make(model, find_gauges(model), orthogonalizer="newton_schulz")
    for _ in range(10):
        mlp_step(model, optimizer)
    for _ in range(2500):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# ------------------------------------------------------------------------------------------- the
# step itself


def test_one_step_against_the_equations() -> None:
    """A single matrix without gauges, by hand."""
    torch.manual_seed(0)
    model = nn.Linear(5, 7, bias=False).double()
    w, eta, mu, r, decay = model.weight.detach().clone(), 0.03, 0.9, 0.5, 0.1
    optimizer = DDCMuon(model.named_parameters(), (), [HiddenMatrix("weight")], lr=eta,
    momentum=mu, radial_rate=r,
                        weight_decay=decay, orthogonalizer="polar")  # fmt: skip
    m = torch.zeros_like(w)
    first = second = 0.0
    for t in range(1, 6):
        g = torch.randn_like(w)
        model.weight.grad = g.clone()
        optimizer.step()
        rho = w.norm()
        ghat = (g * w).sum()
        x = rho * g - ghat / rho * w
        m = mu * m + (1 - mu) * x
        u, _, vh = torch.linalg.svd(mu * m + (1 - mu) * x, full_matrices=False)
        o = u @ vh
        o = o - (o * w).sum() * w / rho**2
        turned = w / rho - eta * o / o.norm()
        first, second = 0.9 * first + 0.1 * ghat, 0.999 * second + 0.001 * ghat**2
        adam = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        w = (1 - eta * decay) * math.exp(-eta * r * adam) * rho * turned / turned.norm()
        torch.testing.assert_close(model.weight.detach(), w, rtol=1e-12, atol=1e-14)


def test_freeze_moves_the_total_log_norm_alone() -> None:
    """Over a chain under its per-layer gauge, no ratio of norms changes, and the total does."""
    model = deep_mlp()
    gauges = find_gauges(model, per_layer=True)
    (chain,) = (gauge for gauge in gauges if isinstance(gauge, Chain))
    for make in (ddcmuon, lambda m, g, **o: DDCAdam(m.named_parameters(), g, lr=3e-3, **o)):
        each = copy.deepcopy(model)
        optimizer = make(each, gauges, weight_decay=0.0)
        params = dict(each.named_parameters())

        def norms(params=params) -> torch.Tensor:
            def centred(w: torch.Tensor) -> torch.Tensor:
                return w - w.mean(0) if len(w) == PRIME else w

            return torch.stack(
                [centred(params[name].detach()).norm().log() for name in chain.weights]
            )

        before = norms()
        for _ in range(10):
            mlp_step(each, optimizer)
        change = norms() - before
        moving = change[1:-1] if isinstance(optimizer, DDCMuon) else change
        torch.testing.assert_close(moving, moving.mean().expand_as(moving), rtol=0, atol=1e-12)
        assert change.sum().abs() > 1e-3
        if isinstance(
            optimizer, DDCMuon
        ):  # input and output layers, which are not hidden, keep theirs
            assert change[[0, -1]].abs().max() < 1e-12


def test_radial_rate_zero_keeps_norms() -> None:
    model = deep_mlp()
    optimizer = ddcmuon(model, GaugeSet(), radial_rate=0.0, weight_decay=0.0)
    before = [layer.weight.norm().item() for layer in model.layers]
    for _ in range(5):
        mlp_step(model, optimizer)
    assert [layer.weight.norm().item() for layer in model.layers] == pytest.approx(
        before, rel=1e-12
    )


def test_modes_are_orthonormal_and_perpendicular_to_the_gauges() -> None:
    basis, count = modes_of(6, [(0, 1, 1.0), (1, 2, 2.0), (4, 5, 1.0)], vertical=False)
    assert count == 3
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=basis.dtype))
    for p, m, k in ((0, 1, 1.0), (1, 2, 2.0), (4, 5, 1.0)):
        assert (basis[p] - k * basis[m]).abs().max() < 1e-12
    assert modes_of(6, [(0, 1, 1.0)], vertical=True)[1] == 6
    chain, _ = modes_of(4, [(0, 1, 1.0), (1, 2, 1.0), (2, 3, 1.0)], vertical=False)
    torch.testing.assert_close(chain, torch.full((4, 1), 0.5, dtype=chain.dtype))


#: torch has it from 2.9 on.
needs_torchs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with"
)


@needs_torchs_muon
def test_newton_schulz_is_torchs() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    for shape in ((16, 16), (8, 24), (24, 8)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        theirs = _zeropower_via_newtonschulz(x, (3.4445, -4.775, 2.0315), 5, 1e-7).float()
        assert (
            newton_schulz_bfloat16(x) - theirs
        ).norm() < 0.06 * theirs.norm()  # both round to bfloat16
        batch = newton_schulz(torch.stack((x, 3 * x)))
        torch.testing.assert_close(batch[0], batch[1])
        assert (batch[0] - theirs).norm() < 0.03 * theirs.norm()
        singular = torch.linalg.svdvals(batch[0])
        assert 0.6 < singular.min() <= singular.max() < 1.3
    assert not newton_schulz(torch.zeros(3, 3)).any()


@needs_torchs_muon
@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9, 1e-12, 1e-20, 1e-24, 1e-30])
def test_newton_schulz_of_small_matrices_is_torchs(scale: float) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = scale * torch.randn((8, 24), generator=torch.Generator().manual_seed(0))
    theirs = _zeropower_via_newtonschulz(x, (3.4445, -4.775, 2.0315), 5, 1e-7).float()
    ours = newton_schulz(x)
    assert bool(ours.isfinite().all())
    assert (ours - theirs).norm() <= 0.05 * theirs.norm() + 1e-20


def test_polar_factor_does_not_see_the_rounding_of_a_backward_pass() -> None:
    """A zero singular value comes out of one at some 1e-14 of the largest."""
    u, _, vh = torch.linalg.svd(torch.randn(8, 8, dtype=torch.float64))
    s = torch.cat([torch.linspace(1, 0.1, 7), torch.tensor([1e-14])]).double()
    torch.testing.assert_close(polar_factor((u * s) @ vh), u[:, :7] @ vh[:7])


def test_polar_factor_of_a_singular_matrix() -> None:
    x = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    u = polar_factor(x)
    torch.testing.assert_close(u @ u.T @ u, u)
    assert torch.linalg.matrix_rank(u) == 2
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    torch.testing.assert_close(polar_factor(q @ x), q @ u)


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("orthogonalizer", ["polar", "newton_schulz_bfloat16"])
@needs_torchs_muon
def test_the_baseline_is_torchs_muon_and_adamw(
    orthogonalizer: str, nesterov: bool, adjust_lr_fn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = orthogonalizer == "polar"
    # torch has Newton-Schulz alone: with the same exact factor in both, all else must agree exactly
    if exact:
        monkeypatch.setattr(
            "torch.optim._muon._zeropower_via_newtonschulz", lambda grad, *_: polar_factor(grad)
        )
    config = TABLE_MODELS["LayerNorm, biases, ReLU, learned positions"]
    dtype = torch.float64 if exact else torch.float32
    one, two = make_model(config, dtype=dtype), make_model(config, dtype=dtype)
    start = {name: p.detach().clone() for name, p in one.named_parameters()}
    ours = muon(
        one, GaugeSet(), nesterov=nesterov, adjust_lr_fn=adjust_lr_fn, orthogonalizer=orthogonalizer
    )
    hidden = {matrix.parameter for matrix in hidden_matrices(two)}
    named = dict(two.named_parameters())
    theirs = [
        torch.optim.Muon(
            [p for n, p in named.items() if n in hidden],
            0.02,
            0.1,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
        ),
        torch.optim.AdamW(
            [p for n, p in named.items() if n not in hidden and p.ndim > 1],
            3e-3,
            weight_decay=0.1,
            fused=True,
        ),
        torch.optim.AdamW(
            [p for n, p in named.items() if n not in hidden and p.ndim == 1],
            3e-3,
            weight_decay=0.0,
            fused=True,
        ),
    ]
    for seed in range(3 if exact else 1):
        for model, optimizers in ((one, [ours]), (two, theirs)):
            backward(model, seed)
            for optimizer in optimizers:
                optimizer.step()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        if exact:
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=name)
        elif name in hidden:  # two roundings to bfloat16
            assert (p - q).norm() < 0.15 * (q - start[name]).norm(), name
        else:
            assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_baseline_resumes_and_refuses(dtype: torch.dtype) -> None:
    weights = [torch.nn.Parameter(torch.randn(4, 6).to(dtype)) for _ in range(3)]
    twins = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    ours, other = Muon(weights[:2]), Muon(twins[:2])
    for params, optimizer in ((weights, ours), (twins, other)):
        optimizer.add_param_group({"params": params[2:], "lr": 0.1})
    for step in range(4):
        if step == 2:
            other.load_state_dict(copy.deepcopy(ours.state_dict()))
        for params, optimizer in ((weights, ours), (twins, other)):
            for param in params:
                param.grad = torch.sin(param.detach() * (step + 1))
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(weights, twins, strict=True))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="orthogonalizer='svd'"):
        Muon(weights, orthogonalizer="svd")
    with pytest.raises(ValueError, match="momentum=1"):
        Muon(weights, momentum=1.0)


# ----------------------------------------------------------------------------------------------
# routing


def test_every_parameter_has_one_route() -> None:
    model = make_model(TABLE_MODELS["RMSNorm, SwiGLU, RoPE, GQA"])
    optimizer = ddcmuon(model, find_gauges(model), per_head=True)
    lines = {line.split()[0]: line for line in optimizer.routing().splitlines()[2:]}
    assert set(lines) == {name for name, _ in model.named_parameters()}
    muons = {name for name, line in lines.items() if line.split()[1].startswith("Muon")}
    assert muons == {m.parameter for m in hidden_matrices(model)}
    assert "DDCAdam" in lines["head.weight"]
    assert "AdamW" in lines["embedding.weight"]
    assert "4 heads" in lines["blocks.0.attention.output.weight"]
    assert "gated_rescale" in lines["blocks.0.mlp.up.weight"]
    states = [set(optimizer.state[p]) for p in model.parameters()]
    assert all(
        "momentum_buffer" in s
        for (n, _), s in zip(model.named_parameters(), states, strict=True)
        if n in muons
    )
    elements = sum(v.numel() for s in optimizer.state.values() for v in s.values())
    assert elements < 2 * sum(p.numel() for p in model.parameters())


def test_roles_not_names_or_shapes_decide() -> None:
    model = GPT(
        GPTConfig(context=8, layers=1, width=VOCABULARY, heads=2, kv_heads=2, hidden=VOCABULARY),
        VOCABULARY,
    )
    # every matrix has the same shape
    hidden = {matrix.parameter for matrix in hidden_matrices(model)}
    assert {name for name, p in model.named_parameters() if p.ndim == 2} - hidden == {
        "embedding.weight",
        "head.weight",
    }
    assert {m.parameter for m in hidden_matrices(torch.compile(model))} == hidden
    with pytest.raises(ValueError, match="pass an example"):
        hidden_matrices(nn.Bilinear(2, 2, 2))
    assert hidden_matrices(nn.Linear(2, 2), per_head=True, inputs=(torch.randn(1, 2),)) == []


@pytest.mark.parametrize(
    ("hidden", "options", "words"),
    [
        ([HiddenMatrix("nothing")], {}, "'nothing' is not among"),
        ([HiddenMatrix("0.bias")], {}, "expected a matrix"),
        ([HiddenMatrix("0.weight", heads=4)], {}, "4 heads do not divide 6"),
        ([], {"orthogonalizer": "qr"}, "orthogonalizer='qr'"),
        ([], {"momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_what_cannot_work_is_refused(hidden, options, words: str) -> None:
    model = relu_mlp(depth=2)
    with pytest.raises(ValueError, match=words):
        DDCMuon(model.named_parameters(), (), hidden, **options)


def test_unnamed_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pass model.named_parameters"):
        DDCMuon(relu_mlp(depth=2).parameters(), (), [HiddenMatrix("0.weight")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip(dtype: torch.dtype) -> None:
    model = make_model(TABLE_MODELS["RMSNorm, SwiGLU, RoPE, GQA"], dtype=torch.float32).to(dtype)
    optimizer = ddcmuon(model, find_gauges(model), orthogonalizer="newton_schulz_bfloat16")
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
    twin = copy.deepcopy(model)
    other = ddcmuon(twin, find_gauges(twin), orthogonalizer="newton_schulz_bfloat16")
    other.load_state_dict(optimizer.state_dict())
    for each, its in ((model, optimizer), (twin, other)):
        backward(each, 7)
        its.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("chunked", [False, True])
def test_compiled_arithmetic_is_the_same_step(
    chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once for every rate: a deep MLP in one function, a GPT with its heads apart by
    chunks of its stacks.

    The latter without the compiler's last stage, which would take more than a minute.
    """
    if chunked:
        monkeypatch.setattr("ddc.optim.stack.CPU_CHUNK", 64)
        monkeypatch.setattr("ddc.optim.compiled.CPU_OPTIONS", {})
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        models = [
            make_model(GPTConfig(context=8, layers=2, width=8, heads=2, kv_heads=1, hidden=16))
            for _ in range(2)
        ]
    else:
        models = [deep_mlp(depth=3, width=8) for _ in range(2)]
    options = {"orthogonalizer": "newton_schulz", "vertical": "balance", "nesterov": not chunked}
    optimizers = [
        ddcmuon(m, find_gauges(m), chunked, compiled=m is models[1], **options) for m in models
    ]
    (hidden,) = (stack for stack in optimizers[1]._stacks if isinstance(stack, HiddenStack))
    assert hidden.single_chunk != chunked

    def step(i: int) -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + i)
            backward(model, i) if chunked else mlp_gradients(model)
            optimizer.step()

    step(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(1)
    assert bool(optimizers[1]._advance.compiled) != chunked
    assert all(bool(stack.move.compiled) == chunked for stack in hidden.matrices)
    norms = [optimizer.grad_norm() for optimizer in optimizers]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    same = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        same(a, b)
    same(*(optimizer.state_dict()["state"] for optimizer in optimizers))


def test_layers_with_gradients_are_taken_together() -> None:
    has_gradient = [True, True, False, True, True, True]
    taken = Context([]).chunks(has_gradient, 2)
    assert taken == [slice(0, 2), slice(3, 5), slice(5, 6)]


def test_a_copied_optimizer_routes_and_refuses_anothers_state() -> None:
    model = deep_mlp()
    optimizer = ddcmuon(model, find_gauges(model))
    assert copy.deepcopy(optimizer).routing() == optimizer.routing()
    baseline = muon(model, GaugeSet())
    # AdamW's come with its first step
    momenta = sum(v.numel() for s in baseline.state.values() for v in s.values())
    assert momenta == sum(p.numel() for p in model.layers.parameters())
    with pytest.raises(ValueError, match="combined optimizer"):
        baseline.load_state_dict(optimizer.state_dict())


def test_state_of_both_parts_can_be_read_and_is_left_as_it_is() -> None:
    model = deep_mlp()
    baseline = muon(model, GaugeSet())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    baseline.step()
    hidden = sum(p.numel() for p in model.layers.parameters())
    rest = sum(p.numel() for p in model.parameters()) - hidden
    tensors = [v for p in model.parameters() for v in baseline.state[p].values() if v.ndim]
    assert sum(v.numel() for v in tensors) == hidden + 2 * rest
    assert baseline.state_dict()["parts"][0]["state"].keys() == set(
        range(len(list(model.layers.parameters())))
    )
    with pytest.raises(KeyError):
        baseline.state[torch.zeros(1)]


# ----------------------------------------------------------------------------------------------
# gauges


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
def test_gauges_of_the_deep_mlp_are_real(residual: bool, per_layer: bool) -> None:
    model = deep_mlp(residual=residual)
    gauges = find_gauges(model, per_layer)
    changes = check(model, gauges, lambda m: m(table()[0]).log_softmax(-1))
    assert max(changes.values()) < 1e-12
    kinds = {gauge.kind for gauge in gauges}
    assert ("chained_rescale" in kinds) == (per_layer and not residual)
    if per_layer and not residual:
        assert gauges.dimension(model) == 5 + 32  # L - 1 for six layers, and the shift


def test_chain_and_rescale_together_are_refused() -> None:
    model = deep_mlp()
    both = [*find_gauges(model), *find_gauges(model, per_layer=True).only(["chained_rescale"])]
    with pytest.raises(ValueError, match="leave the chain out"):
        DDCAdam(model.named_parameters(), both)
    with pytest.raises(ValueError, match="expected two or more different"):
        Chain(("a", "a"))
    twice = [
        Rescale("relu_rescale", w, (Axis("layers.0.weight"),), (Axis("layers.1.weight", 1),))
        for w in "ab"
    ]
    with pytest.raises(ValueError, match=r"layers.0.weight"):
        DDCMuon(model.named_parameters(), twice, hidden_matrices(model))
