"""Observables against explicit loops, algebraic zeros against exact ones, and what observing must
not touch.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddc.gauges import GaugeSet, find_gauges
from ddc.models import GPTConfig
from ddc.models.deep_mlp import DeepMLP, DeepMLPConfig
from ddc.models.vit import ViTConfig, vision_transformer
from ddc.slt.observables import (
    OBSERVABLES,
    Layer,
    Zeros,
    accumulate,
    categorical_score,
    fisher_block,
    gaussian_score,
    label_score,
    layers_of,
    named_layers,
    observe,
    spectrum,
)
from ddc.slt.zeros import MEAN_OF_LOGITS, MEAN_OF_STREAM, MEANS, zeros_of_gauge
from tests.conftest import MODELS
from tests.helpers import VOCABULARY, make_model, relu_mlp


def probe(
    config: GPTConfig, batches: int = 3, size: int = 4
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (batches, size, config.context + 1), generator=generator)
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


def test_moments_against_a_loop_over_samples(config: GPTConfig) -> None:
    """Each sequence by itself, its gradients by retain_grad, its labels drawn one by one."""
    model = make_model(config)
    batches = probe(config)
    score = categorical_score(7)
    moments = accumulate(model, layers_of(model), batches, score)
    modules = [model.embedding, *model.blocks]
    for module, m in zip(modules, moments, strict=True):
        a, g, rows = torch.zeros_like(m.activation), torch.zeros_like(m.gradient), 0
        for index, (x, y) in enumerate(batches):
            gradient = score(model(x).detach(), y, index)
            for i in range(len(x)):
                kept: list[torch.Tensor] = []
                handle = module.register_forward_hook(
                    lambda _m, _a, out, kept=kept: kept.append(out)
                )
                logits = model(x[i : i + 1])
                handle.remove()
                kept[0].retain_grad()
                (logits * gradient[i : i + 1]).sum().backward()
                for h, d in zip(kept[0][0].detach(), kept[0].grad[0], strict=True):
                    a += torch.outer(h, h)
                    g += torch.outer(d, d)
                    rows += 1
        assert rows == m.rows == 12 * config.context
        torch.testing.assert_close(m.activation, a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(m.gradient, g, rtol=1e-10, atol=1e-12)


def test_the_score_is_the_gradient_of_the_log_likelihood() -> None:
    logits = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(6, (50,))
    loss = F.cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(label_score(logits.detach(), targets, 0), -gradient)


def test_labels_follow_the_model() -> None:
    """Second moment of the score = the Fisher information of a categorical, diag(p) - p pᵀ; the
    mean is 0.
    """
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64).expand(200_000, 4)
    score = categorical_score(0)(logits, torch.zeros(200_000, dtype=torch.long), 0)
    p = logits[0].softmax(-1)
    fisher = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(score.T @ score / len(score), fisher, rtol=0, atol=5e-3)
    torch.testing.assert_close(
        score.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=5e-3
    )
    assert torch.equal(
        score, categorical_score(0)(logits, torch.zeros(200_000, dtype=torch.long), 0)
    )
    assert not torch.equal(
        score, categorical_score(0)(logits, torch.zeros(200_000, dtype=torch.long), 1)
    )


def test_readings_are_what_linear_algebra_says(config: GPTConfig) -> None:
    model = make_model(config)
    batches = probe(config, batches=6)
    for layer, reading in zip(
        layers_of(model),
        observe(model, layers_of(model), batches, categorical_score(1)),
        strict=True,
    ):
        m = accumulate(model, [layer], batches, categorical_score(1))[0]
        a, g = (
            torch.linalg.eigvalsh(m.activation / m.rows),
            torch.linalg.eigvalsh(m.gradient / m.rows),
        )
        if config.norm == "layer":
            assert g[0] < 1e-12 * g[-1]
            g = g[1:]
        assert reading.values["activation_sigma_min"] == pytest.approx(math.sqrt(a[0]), rel=1e-5)
        assert reading.values["gradient_lambda_min"] == pytest.approx(float(g[0]), rel=1e-5)
        assert reading.values["activation_log_volume"] == pytest.approx(
            float(a.log().sum()), rel=1e-6
        )
        assert reading.values["gradient_log_volume"] == pytest.approx(
            float(g.log().sum()), rel=1e-6
        )
        assert reading.values["fisher_min"] == pytest.approx(float(a[0] * g[0]), rel=1e-5)
        assert set(reading.values) == set(OBSERVABLES)


def test_the_fisher_eigenvalue_is_that_of_the_exact_block() -> None:
    """For one linear map under a Gaussian model, K-FAC is the exact Fisher block (all signs of
    noise, each input).
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False)).double()
    x = torch.randn(10, 3, dtype=torch.float64).repeat_interleave(16, 0)
    signs = torch.tensor(
        list(itertools.product((1.0, -1.0), repeat=4)), dtype=torch.float64
    ).repeat(10, 1)
    reading = observe(
        model, layers_of(model), [(x, signs)], lambda outputs, targets, index: targets
    )[0]
    exact = fisher_block(model, ["0.weight"], x, signs, lambda output, sign: (output * sign).sum())
    torch.testing.assert_close(exact, torch.kron(torch.eye(4, dtype=torch.float64), x.T @ x / 160))
    assert reading.values["fisher_min"] == pytest.approx(
        float(torch.linalg.eigvalsh(exact)[0]), rel=1e-9
    )


def test_the_fisher_block_against_a_loop() -> None:
    model = relu_mlp(bias=True)
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(6, (20,))
    names = ["2.weight", "2.bias"]
    block = fisher_block(model, names, x, y, lambda output, label: -F.cross_entropy(output, label))
    expected = torch.zeros_like(block)
    for i in range(20):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        g = torch.cat([dict(model.named_parameters())[name].grad.flatten() for name in names])
        expected += torch.outer(g, g) / 20
    torch.testing.assert_close(block, expected)
    with pytest.raises(ValueError, match=r"no parameter 9\.weight in Sequential"):
        fisher_block(model, ["9.weight"], x, y, lambda output, label: output.sum())


# --- algebraic zeros
# -------------------------------------------------------------------------------------------------


def transformer_like() -> nn.Sequential:
    """LayerNorm with beta read by a linear map, then the logits."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[1].weight.normal_()
        model[1].bias.normal_()
    return model


def test_gamma_inverse_is_removed_after_a_layer_norm_also_with_beta() -> None:
    model = transformer_like()
    x = torch.randn(200, 5, dtype=torch.float64)
    layers = named_layers(model, ["1", "2"])
    assert [layer.reads for layer in layers] == ["output", "input"]
    for reading in observe(model, layers, [(x, x)], categorical_score(0)):
        assert reading.activation.removed == {"gamma^-1 after a LayerNorm": 1}
        assert reading.activation.rank == len(reading.activation.values) == 5
        assert reading.activation.smallest > 1e-6
    normed = model[1](model[0](x)).detach() - model[1].bias.detach()
    assert float((normed @ (1 / model[1].weight.detach())).abs().max()) < 1e-12


def test_no_zero_after_an_rms_norm() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6), nn.Linear(6, 4)).double()
    x = torch.randn(200, 5, dtype=torch.float64)
    assert (
        observe(model, named_layers(model, ["1"]), [(x, x)], categorical_score(0))[
            0
        ].activation.removed
        == {}
    )


def test_a_dead_gamma_is_removed_instead() -> None:
    model = transformer_like()
    with torch.no_grad():
        model[1].weight[2] = 0
    x = torch.randn(200, 5, dtype=torch.float64)
    reading = observe(model, named_layers(model, ["1"]), [(x, x)], categorical_score(0))[0]
    assert reading.activation.removed == {"a gamma at zero": 1}


def test_the_ones_direction_is_removed_from_logits_and_from_streams_of_layer_norms() -> None:
    model = transformer_like()
    x = torch.randn(200, 5, dtype=torch.float64)
    logits = observe(model, named_layers(model, ["2"]), [(x, x)], categorical_score(0))[0]
    assert logits.gradient.removed == {"softmax does not see the mean of the logits": 1}
    residuals = observe(model, named_layers(model, ["2"]), [(x, x)], gaussian_score(0))[0]
    assert residuals.gradient.removed == {}  # a Gaussian model sees the mean of its outputs
    config = GPTConfig(
        context=16, layers=2, width=8, heads=2, kv_heads=2, hidden=12, norm="layer", bias=True
    )
    gpt = make_model(config)
    for m in accumulate(gpt, layers_of(gpt), probe(config), categorical_score(0)):
        ones = torch.ones(8, dtype=torch.float64)
        assert float(ones @ m.gradient @ ones) < 1e-12 * float(m.gradient.trace())
    for reading in observe(gpt, layers_of(gpt), probe(config), categorical_score(0)):
        assert sum(reading.gradient.removed.values()) == 1


def test_null_vectors_are_those_of_gauges() -> None:
    """Each is the direction in which the tangents of gauges move the weights of a layer: outputs
    for gradients, inputs for activations; and where there is no such gauge, nothing is removed.
    """
    sizes = {"context": 8, "layers": 1, "width": 8, "heads": 2, "kv_heads": 2, "hidden": 12}
    config = GPTConfig(**sizes, norm="layer", bias=True)  # type: ignore[arg-type]
    model = make_model(config)
    params = dict(model.named_parameters())
    gauges = find_gauges(model, kinds=["stream_mean", "reader_shift", "logit_shift"], verify=False)
    moved = {
        (gauge.kind, name): move
        for gauge in gauges
        for name, move in gauge.velocities(params).items()
        if name.startswith(("blocks", "head")) and name.endswith("weight")
    }
    names = ["head", *(f"blocks.0.attention.{each}" for each in ("query", "key", "value"))]
    names += ["blocks.0.mlp.gate", "blocks.0.mlp.up"]
    layers = named_layers(model, names)
    found = observe(model, layers, probe(config), categorical_score(0))
    readers = {reading.layer: reading for reading in found}
    norms = {"attention": "blocks.0.attention_norm", "mlp": "blocks.0.mlp_norm", "head": "norm"}
    for name, reading in readers.items():
        tangents = moved["reader_shift", f"{name}.weight"]
        norm = norms[next(each for each in norms if each in name)]
        inverse = 1 / params[f"{norm}.weight"].detach()
        # every row may move along 1/γ, and along nothing else
        assert torch.linalg.matrix_rank(tangents.flatten(1)) == len(params[f"{name}.weight"])
        across = tangents - (tangents @ inverse / inverse.square().sum())[..., None] * inverse
        assert across.abs().max() < 1e-12
        assert reading.activation.removed == {"gamma^-1 after a LayerNorm": 1}
    # outputs may move along the ones
    for kind, name in (("logit_shift", "head"), ("stream_mean", "blocks.0.mlp.down")):
        tangents = moved[kind, f"{name}.weight"]
        assert (tangents - tangents.mean(1, keepdim=True)).abs().max() == 0
    assert readers["head"].gradient.removed == {"softmax does not see the mean of the logits": 1}
    assert {layer.gradient_ones for layer in layers_of(model)} == {MEAN_OF_STREAM}
    # a stream of RMSNorms is seen whole
    model = make_model(GPTConfig(**sizes))  # type: ignore[arg-type]
    assert {layer.gradient_ones for layer in layers_of(model)} == {None}


OF_MODELS: dict[str, Callable[[], tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]]] = {
    "GPT, LayerNorm": lambda: of_gpt("layer-bias-relu-learned"),
    "GPT, RMSNorm": lambda: of_gpt("rms-swiglu-rope-gqa"),
    "vision transformer": lambda: vision(),
    "deep MLP": lambda: deep(),
}


def all_gauges(model: nn.Module, x: torch.Tensor) -> GaugeSet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_gauges(model, inputs=(x,), kinds="complete", verify=False)


@pytest.mark.parametrize("name", OF_MODELS)
def test_what_gauges_say_are_their_tangents(name: str) -> None:
    """Those that move one matrix, and its bias, by all a nᵀ or all u nᵀ are those that say so."""
    model, batches = OF_MODELS[name]()
    params = dict(model.named_parameters())
    rank, said = torch.linalg.matrix_rank, 0
    for gauge in all_gauges(model, batches[0][0]):
        if gauge.kind == "stream_rotation":
            continue
        moved = {n: move for n, move in gauge.velocities(params).items() if move.any()}
        matrices = [n for n in moved if params[n].ndim == 2]
        if len(matrices) != 1 or len(moved) > 2:
            assert zeros_of_gauge(gauge, params) is None
            continue
        (weight,) = matrices
        move = moved[weight]  # (dimension, outputs, inputs)
        _, outputs, inputs = move.shape
        directions = move.flatten(0, 1), move.mT.flatten(0, 1)  # of inputs, of outputs
        count = [int(rank(each)) for each in directions]
        whole = int(rank(move.flatten(1)))
        reads = [whole == outputs * count[0], whole == inputs * count[1]]
        nulls = zeros_of_gauge(gauge, params)
        if gauge.kind == "logit_shift":  # the score says, not the model
            assert nulls is None
            assert reads == [False, True]
            continue
        if nulls is None:
            assert not any(reads), gauge
            continue
        assert nulls.weight == weight
        sides = (nulls.activation, nulls.gradient)
        if isinstance(model.get_submodule(weight.rpartition(".")[0]), nn.Embedding):
            move, reads = move.mT, reads[::-1]  # whose outputs are columns
            directions = directions[::-1]
        for mine, told, each in zip(reads, sides, directions, strict=True):
            assert [mine] * len(told) == [True] * len(told)
            assert mine == bool(told)
            for zero in told:
                assert zero.vector is not None
                assert rank(torch.cat([each, zero.vector[None]])) == len(told)
        said += 1
    assert (said > 0) == (name in ("GPT, LayerNorm", "vision transformer"))


@pytest.mark.parametrize("name", OF_MODELS)
def test_zeros_of_maps_and_tables_are_null_spaces(name: str) -> None:
    """All that is removed of every linear map and embedding is zero, and all that is zero is
    removed; without gauges, but for the means of what is written to a stream.
    """
    model, batches = OF_MODELS[name]()
    kinds = (nn.Linear, nn.Embedding)
    names = [n for n, each in model.named_modules() if isinstance(each, kinds)]
    names = [n for n in names if n != "position"]  # whose weight is read without it
    score = categorical_score(0)
    told = named_layers(model, names, all_gauges(model, batches[0][0]))
    untold = named_layers(model, names)
    readings = observe(model, told, batches, score)
    others = observe(model, untold, batches, score)
    for layer, moments, mine, other in zip(
        told, accumulate(model, told, batches, score), readings, others, strict=True
    ):
        sides = (
            (moments.activation, moments.activation_zeros, mine.activation),
            (moments.gradient, moments.gradient_zeros, mine.gradient),
        )
        for moment, zeros, found in sides:
            for zero in zeros:
                assert zero.vector is not None
                v = zero.vector / zero.vector.norm()
                assert (moment @ v).norm() < 1e-12 * moment.trace(), (layer, zero.reason)
            values = torch.linalg.eigvalsh(moment)
            assert int((values > 1e-12 * values[-1]).sum()) <= len(found.values)
        assert mine.activation.removed == other.activation.removed
        means = {r: n for r, n in mine.gradient.removed.items() if r in MEANS.values()}
        if not means:
            assert mine.values == other.values
        elif not any("samples" in reason for reason in other.gradient.removed):
            assert other.gradient.removed == {}
            assert other.values["gradient_lambda_min"] == 0  # a zero that is no dead direction
            assert len(mine.gradient.values) == len(other.gradient.values) - 1
            assert mine.gradient.rank == other.gradient.rank
    if name == "GPT, LayerNorm":
        ends = ("embedding", "output", "down")
        seen = {r.layer for r in readings if MEAN_OF_STREAM in r.gradient.removed}
        assert seen == {n for n in names if n.split(".")[-1] in ends}
        assert all(r.values["gradient_lambda_min"] > 0 for r in readings if r.layer in seen)


class Centred(nn.Module):
    """A LayerNorm of a class of its own, as nanoGPT's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (6,), self.weight, self.bias)


def test_gauges_tell_of_a_norm_that_no_hook_knows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Centred(), nn.Linear(6, 4)).double()
    x = torch.randn(200, 5, dtype=torch.float64)
    gauges = find_gauges(model, inputs=(x,), kinds="complete", verify=False)
    ways = (named_layers(model, ["2"]), named_layers(model, ["2"], gauges))
    seen, removed = (observe(model, each, [(x, x)], categorical_score(0))[0] for each in ways)
    assert seen.activation.removed == {}
    assert removed.activation.removed == {"gamma^-1 after a LayerNorm": 1}
    assert removed.activation.smallest > 1e-6
    with torch.no_grad():
        model[1].weight[2] = 0  # no gauge, and a null vector all the same
    reading = observe(model, ways[1], [(x, x)], categorical_score(0))[0]
    assert reading.activation.removed == {"a gamma at zero": 1}


class Routed(nn.Module):
    """Two maps, mixed by what a router says."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.maps = nn.Linear(5, 3), nn.ModuleList(nn.Linear(5, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = torch.stack([each(x) for each in self.maps], -1)
        return (outputs * self.router(x).softmax(-1)[..., None, :]).sum(-1)


def test_the_mean_of_a_routers_outputs_is_removed() -> None:
    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(200, 5, dtype=torch.float64)
    gauges = find_gauges(model, inputs=(x,), kinds=["router_shift"], verify=False)
    (reading,) = observe(
        model, named_layers(model, ["router"], gauges), [(x, x)], gaussian_score(0)
    )
    assert reading.gradient.removed == {MEANS["router_shift"]: 1}
    assert reading.gradient.smallest > 1e-6


class Averaged(nn.Module):
    """Two heads, whose logits are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a(x) + self.b(x.tanh())) / 2


def test_the_mean_of_heads_that_are_averaged_is_removed_where_the_score_is_of_a_softmax() -> None:
    torch.manual_seed(0)
    model, x = Averaged().double(), torch.randn(200, 5, dtype=torch.float64)
    gauges = find_gauges(model, inputs=(x,), kinds=["logit_shift"], verify=False)
    layers = named_layers(model, ["a", "b"], gauges)
    for reading in observe(model, layers, [(x, x)], categorical_score(0)):
        assert reading.gradient.removed == {MEAN_OF_LOGITS: 1}
        assert reading.gradient.smallest > 1e-6
    for reading in observe(model, layers, [(x, x)], gaussian_score(0)):
        assert reading.gradient.removed == {}


def test_zeros_that_are_no_gauge_are_removed_all_the_same() -> None:
    """A head that is tied has no shift, and one without a bias no shift of its rows: the moments
    have their null vectors, and no model need be traced.
    """
    sizes = {"context": 8, "layers": 1, "width": 8, "heads": 2, "kv_heads": 2, "hidden": 12}
    config = GPTConfig(**sizes, norm="layer", bias=True, tied_head=True)  # type: ignore[arg-type]
    model = make_model(config)
    gauges = all_gauges(model, probe(config)[0][0])
    assert not [g for g in gauges if "head.weight" in g.parameters and g.kind == "logit_shift"]
    for given in ((), gauges):
        (head,) = observe(
            model, named_layers(model, ["head"], given), probe(config), categorical_score(0)
        )
        assert head.gradient.removed == {MEAN_OF_LOGITS: 1}
        assert head.gradient.smallest > 0
    model = transformer_like()
    model[2] = nn.Linear(6, 4, bias=False).double()
    x = torch.randn(200, 5, dtype=torch.float64)
    gauges = find_gauges(model, inputs=(x,), kinds=["reader_shift"], verify=False)
    assert gauges.found == ()
    assert "has no bias of its own" in gauges.refused[0].reason
    (reading,) = observe(model, named_layers(model, ["2"]), [(x, x)], categorical_score(0))
    assert reading.activation.removed == {"gamma^-1 after a LayerNorm": 1}
    assert reading.activation.smallest > 1e-6


def test_rank_limits() -> None:
    config = GPTConfig(context=8, layers=1, width=16, heads=2, kv_heads=2, hidden=12)
    model = make_model(config)
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    embedding, block = observe(model, layers_of(model), [(tokens, tokens)], categorical_score(0))
    assert embedding.activation.removed == {"only 3 different tokens": 13}
    assert len(embedding.activation.values) == embedding.activation.rank == 3
    assert block.activation.removed == block.gradient.removed == {"only 8 samples": 8}
    # narrow maps in a row without a nonlinearity pass on no more than their width, in either
    # direction
    chain = nn.Sequential(
        nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False), nn.Linear(6, 6, bias=False)
    ).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    first, _, third = observe(chain, layers_of(chain), [(x, x)], gaussian_score(0))
    assert third.activation.removed == {"at most 2 directions come in": 4}
    assert len(first.gradient.values) == 2
    with_relu = nn.Sequential(
        nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()
    assert [layer.activation_rank for layer in layers_of(with_relu)] == [6, 2, 6]
    assert [layer.gradient_rank for layer in layers_of(with_relu)] == [2, 6, 3]


def test_eigenvalues_at_rounding_level_are_zero_and_the_rest_are_right() -> None:
    """A float32 matrix of rank 5 in 8 dimensions: three eigenvalues are rounding, whatever the
    scale.
    """
    torch.manual_seed(0)
    basis = torch.randn(8, 5, dtype=torch.float64)
    z = torch.randn(4000, 5, dtype=torch.float64) * torch.tensor([1, 0.3, 0.1, 0.03, 1e-3])
    for scale in (1.0, 1e6, 1e-6):
        x = (z.float() @ basis.T.float() * scale).double()
        found = spectrum(x.T @ x / 4000, [], torch.finfo(torch.float32).eps)
        assert found.rank == 5
        assert found.smallest == 0
        exact = (
            torch.linalg.eigvals(basis.T @ basis @ (z.T @ z / 4000)).real.sort().values * scale**2
        )
        torch.testing.assert_close(found.values[3:], exact, rtol=1e-3, atol=0)
        assert found.log_volume == pytest.approx(float(found.values[3:].log().sum()))
    with_zero = spectrum(torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64)), [])
    assert with_zero.values.tolist() == [0, 1, 4]
    first = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    without = spectrum(
        torch.diag(torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64)),
        [Zeros("first", vector=first)],
    )
    assert without.values.tolist() == pytest.approx([0.5, 1])
    assert without.removed == {"first": 1}


# --- any model, nothing changed
# --------------------------------------------------------------------------------------


def test_any_model_by_the_names_of_its_modules() -> None:
    """A vision transformer of torch's own modules: patches, class token, encoder layers."""

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 12, 4, 4)
            layer = nn.TransformerEncoderLayer(
                12, 3, 24, dropout=0.1, batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(12, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(self.patches(images).flatten(2).mT).mean(1))

    torch.manual_seed(0)
    model = Vision()
    layers = named_layers(
        model, ["encoder.layers.0", "encoder.layers.1", "encoder.layers.1.linear2", "head"]
    )
    images = torch.randn(20, 1, 16, 16)
    readings = observe(
        model, layers, [(images, torch.zeros(20, dtype=torch.long))], categorical_score(0)
    )
    assert [reading.rows for reading in readings] == [320, 320, 320, 20]
    assert [len(reading.activation.values) for reading in readings] == [12, 12, 24, 12]
    assert readings[3].gradient.removed == {"softmax does not see the mean of the logits": 1}
    assert model.training


def vision(**options: object) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A small vision transformer in float64, and a probe of six images."""
    config = ViTConfig(layers=2, width=16, heads=2, hidden=12, patch=2, **options)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = vision_transformer(config, (1, 4, 4), 5).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, mean=float(p.ndim == 1))
    images = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    return model, [(images[:3], torch.zeros(3).long()), (images[3:], torch.zeros(3).long())]


def deep(**options: object) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A small deep MLP in float64, and all pairs."""
    torch.manual_seed(0)
    model = DeepMLP(DeepMLPConfig(depth=4, width=16, **options), tokens=5, classes=5).double()  # type: ignore[arg-type]
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    return model, [(pairs, pairs.sum(1) % 5)]


def of_gpt(name: str) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    return make_model(MODELS[name]), probe(MODELS[name])


def changes(
    model: nn.Module,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    kinds: str | tuple[str, ...] = "paper",
) -> list[float]:
    """Largest relative change of each layer's observables under a random element of all gauges."""
    turned = copy.deepcopy(model)
    gauges = find_gauges(model, inputs=(batches[0][0],), kinds=kinds)
    gauges.transform_(turned, torch.Generator().manual_seed(3))
    assert len(gauges) > 1
    readings = [
        observe(each, layers_of(each), batches, categorical_score(0)) for each in (model, turned)
    ]
    return [
        max(
            abs(after.values[key] - value) / abs(value)
            for key, value in before.values.items()
            if value
        )
        for before, after in zip(*readings, strict=True)
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: of_gpt("rms-swiglu-rope-gqa"),
        lambda: of_gpt("layer-bias-relu-learned"),
        vision,
        lambda: vision(class_token=True, mlp="swiglu"),
    ],
)
def test_every_cell_of_a_residual_stream_is_gauge_invariant(
    make: Callable[[], tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]],
) -> None:
    """So drift along an orbit cannot blur one, whatever the optimizer."""
    assert max(changes(*make())) < 1e-9


def test_cells_and_the_complete_group() -> None:
    """No gauge changes a cell of a model with RMSNorms; the mean of a LayerNorm's stream does."""
    assert max(changes(*of_gpt("rms-swiglu-rope-gqa"), "complete")) < 1e-9
    assert min(changes(*of_gpt("layer-bias-relu-learned"), ("stream_mean",))) > 0.01


def test_cells_of_a_deep_mlp_are_read_at_hidden_units_which_rescale() -> None:
    assert min(changes(*deep())) > 0.01


@pytest.mark.parametrize(
    ("make", "removed"),
    [
        (vision, {"embedding": (8, 1), "block 1": (0, 1), "block 2": (0, 10)}),
        (
            lambda: vision(class_token=True),
            {"embedding": (7, 1), "block 1": (0, 1), "block 2": (0, 10)},
        ),
        (lambda: deep(residual=True), {"layer 1": (7, 0), "layer 4": (0, 12), "head": (0, 1)}),
    ],
)
def test_algebraic_zeros_of_other_models_are_all_there_are(
    make: Callable[[], tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]],
    removed: dict[str, tuple[int, int]],
) -> None:
    """What is removed is zero, of every layer; and of these layers nothing else is."""
    model, batches = make()
    layers = layers_of(model)
    moments = accumulate(model, layers, batches, categorical_score(0))
    readings = observe(model, layers, batches, categorical_score(0))
    for layer, moment, reading in zip(layers, moments, readings, strict=True):
        sides = ((moment.activation, reading.activation), (moment.gradient, reading.gradient))
        for i, (matrix, found) in enumerate(sides):
            values = torch.linalg.eigvalsh(matrix)
            zeros = int((values < 1e-12 * values[-1]).sum())
            assert zeros >= sum(found.removed.values())
            if layer.name in removed:
                assert zeros == sum(found.removed.values()) == removed[layer.name][i]


def test_observing_changes_nothing(config: GPTConfig) -> None:
    model = make_model(config)
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    for p in list(model.parameters())[1:]:
        p.grad = torch.ones_like(p)
    flags = [p.requires_grad for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        observe(model, layers_of(model), probe(config), categorical_score(0))
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.grad is None or bool((p.grad == 1).all()) for p in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_more_batches_are_the_same_as_larger_ones_for_given_labels() -> None:
    config = GPTConfig(context=8, layers=1, width=8, heads=2, kv_heads=2, hidden=12)
    model = make_model(config)
    batches = probe(config, batches=4)
    whole = [tuple(map(torch.cat, zip(*batches, strict=True)))]
    split = accumulate(model, layers_of(model), batches, label_score)
    joined = accumulate(model, layers_of(model), whole, label_score)
    for a, b in zip(split, joined, strict=True):
        torch.testing.assert_close(a.activation, b.activation)
        torch.testing.assert_close(a.gradient, b.gradient)


def test_half_precision_is_accumulated_in_double() -> None:
    model = relu_mlp(bias=True, dtype=torch.bfloat16)
    x = torch.randn(64, 6, dtype=torch.bfloat16)
    moments = accumulate(model, layers_of(model), [(x, x)], gaussian_score(0))
    assert moments[0].activation.dtype == torch.float64
    torch.testing.assert_close(moments[0].activation, x.double().T @ x.double())
    assert moments[0].epsilon == 2.0**-7


@pytest.mark.parametrize(
    ("names", "message"),
    [(["blocks.7"], "no module 'blocks.7' in GPT"), (["embeding"], "no module 'embeding'")],
)
def test_names_that_are_none(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_layers(
            make_model(GPTConfig(context=8, layers=1, width=8, heads=2, kv_heads=2, hidden=8)),
            names,
        )


def test_what_cannot_be_observed_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.unused = nn.Linear(3, 3)
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"layer unused: module 'unused' does not run"):
        observe(model, named_layers(model, ["unused"]), [(x, x)], gaussian_score(0))
    with pytest.raises(ValueError, match="the probe has no batches"):
        observe(model, named_layers(model, ["0"]), [], gaussian_score(0))
    with pytest.raises(TypeError, match=r"no default layers for Linear.*named_layers"):
        layers_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Invalid reads='both'"):
        Layer("a", "0", "both")
    detached = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    detached.forward = lambda x: detached[1](x) + detached[0](x).detach()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="do not depend on its output"):
        observe(detached, named_layers(detached, ["0", "1"]), [(x, x)], gaussian_score(0))


def test_what_is_changed_in_place_or_not_finite_is_refused() -> None:
    x = torch.randn(4, 3)
    inplace = nn.Sequential(
        nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)
    )
    with pytest.raises(
        ValueError, match=r"layer 1: the model changes the activations of module '1' in place"
    ):
        observe(inplace, named_layers(inplace, ["0", "1"]), [(x, x)], gaussian_score(0))
    inplace[2].inplace = False
    observe(inplace, named_layers(inplace, ["0", "1"]), [(x, x)], gaussian_score(0))
    with torch.no_grad():
        inplace[1].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 3: activations or gradients are not finite"):
        observe(inplace, named_layers(inplace, ["3"]), [(x, x)], gaussian_score(0))
