"""Streams to which linear maps write behind a layer scale: their rotation, their means, and what
breaks these.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import canonicalise_, check, named_parameters
from ddc.gauges.affine import ScaledShift, StreamRotation
from ddc.gauges.certificate import certify
from ddc.optim import respected
from ddc.slt.zeros import zeros_of_gauge
from tests.helpers import off_tangents
from tests.test_complete import moved

WIDTH, INPUTS = 8, (64, 9)
KINDS = (
    "logit_shift",
    "norm_scale",
    "layer_scale",
    "stream_rotation",
    "stream_mean",
    "translation",
    "reader_shift",
    "norm_shift",
)


class Scaled(nn.Module):
    """Two blocks that write behind a scale each, with one thing changed."""

    def __init__(self, norm: str = "layer", twist: str = "", bias: bool = True) -> None:
        super().__init__()
        self.twist = twist
        kind = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.first = nn.Linear(INPUTS[1], WIDTH)
        self.norms = nn.ModuleList(kind(WIDTH, eps=1e-5) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 6) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(6, WIDTH, bias=bias) for _ in range(2))
        self.scales = nn.ParameterList(torch.rand(WIDTH) + 0.5 for _ in range(2))
        self.head = nn.Linear(WIDTH, 9)
        if twist == "one output":
            self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for i, (norm, up, down) in enumerate(zip(self.norms, self.ups, self.downs, strict=False)):
            scale = self.scales[0 if self.twist == "shared" else i]
            if self.twist == "squared":
                scale = scale.square()
            written = down(F.gelu(up(norm(h))))
            if self.twist == "reversed":
                written = written.flip(-1)
            if self.twist == "shifted":
                written = written + scale
            product = written * scale
            if self.twist == "one output":
                product = product.mean(-1, keepdim=True) + self.gate(norm(h)) * scale
            if self.twist == "activated":
                product = F.relu(product)
            h = h + product
            if self.twist == "read before":
                h = h + written.mean(-1, keepdim=True) * x[:, :1]
            if self.twist == "read after":
                h = h * product.square().mean(-1, keepdim=True).add(1)
        logits: Tensor = self.head(self.norms[2](h))
        return logits

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.ones(INPUTS),)


def made(**options: Any) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Scaled(**options), (torch.randn(INPUTS),)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_orbit_is_all_of_the_kernel(norm: str, bias: bool) -> None:
    model, inputs = made(norm=norm, bias=bias)
    gauges = find_gauges(model, inputs=inputs, kinds="complete")
    (rotation,) = gauges.only(["stream_rotation"])
    assert isinstance(rotation, StreamRotation)
    scales = [each.scale for each in rotation.writers]
    assert sorted(map(str, scales)) == (
        ["None"] * 2 + ["scales.0"] * (1 + bias) + ["scales.1"] * (1 + bias)
    )
    means = [each for each in gauges if isinstance(each, ScaledShift) and each.scale == "scales.0"]
    assert len(means) == (0 if norm == "rms" else 1 + bias)
    certificate = certify(model, gauges, inputs)
    assert certificate.complete, certificate
    assert certificate.leak < 1e-12
    without = [each for each in gauges if each.kind not in ("stream_rotation", "stream_mean")]
    assert certify(model, without, inputs).unexplained >= (28 if norm == "rms" else 21 + 12)


def test_every_gauge_is_a_symmetry_and_moves_along_its_tangents() -> None:
    model, inputs = made()
    gauges = find_gauges(model, inputs=inputs, kinds="complete")
    double = inputs[0].double()
    changes = check(moved(model), gauges, lambda m: m(double).log_softmax(-1))
    assert max(changes.values()) < 1e-11
    params = {name: p.detach() for name, p in named_parameters(moved(model)).items()}
    model = moved(model).requires_grad_()
    F.cross_entropy(model(double), torch.arange(64) % 9).backward()
    grads = {name: p.grad for name, p in named_parameters(model).items() if p.grad is not None}
    false = {name: torch.randn_like(p) for name, p in params.items()}
    for gauge in gauges:
        assert gauge.audit(params, grads) < 1e-12, gauge
        assert gauge.audit(params, false) > 1e-3, gauge
        # the derivative of the action, by a small element
        if gauge.kind == "stream_rotation":
            continue
        assert off_tangents(gauge, params) < 1e-4, gauge


@pytest.mark.parametrize("optimizer", ["DDCAdam", "DDCMuon"])
def test_optimizers_stay_on_one_trajectory(optimizer: str) -> None:
    """Under the means and the scales of what writes to a stream, all at once, and DDCMuon under its
    rotation too.
    """
    model, inputs = made()
    kinds = [kind for kind in KINDS if (kind, optimizer) != ("stream_rotation", "DDCAdam")]
    gauges = find_gauges(model, inputs=inputs, kinds=kinds)
    assert {gauge.kind for gauge in gauges} == {*kinds} - {"translation"}
    first = moved(model).requires_grad_()
    second = copy.deepcopy(first)
    gauges.transform_(second, torch.Generator().manual_seed(1), 1.0)
    double, targets = inputs[0].double(), torch.arange(64) % 9
    before = first(double).detach().log_softmax(-1)
    ends = []
    for each in (first, second):
        if optimizer == "DDCAdam":
            step = DDCAdam(each.named_parameters(), gauges, lr=1e-2, weight_decay=0.1)
        else:
            hidden = hidden_matrices(each, inputs=inputs)
            assert "downs.0.weight" in {str(one.parameter) for one in hidden}
            step = DDCMuon(each.named_parameters(), gauges, hidden, lr=0.02, adam_lr=1e-2)
        for _ in range(50):
            step.zero_grad()
            F.cross_entropy(each(double), targets).backward()
            step.step()
        ends.append(each(double).detach().log_softmax(-1))
    assert float((ends[0] - before).abs().max()) > 0.1
    assert float((ends[0] - ends[1]).abs().max()) < 1e-9


def test_what_an_optimizer_cannot_respect_is_refused() -> None:
    model, inputs = made()
    gauges = find_gauges(model, inputs=inputs, kinds=KINDS)
    with pytest.raises(ValueError, match=r"'downs\.\d\.weight' writes to it behind the scale"):
        DDCAdam(model.named_parameters(), gauges)
    kept = respected(DDCAdam, model.named_parameters(), gauges)
    assert [each.kind for each in kept.refused[len(gauges.refused) :]] == ["stream_rotation"]
    DDCAdam(model.named_parameters(), kept)
    # the step of a mean behind a scale divides by it
    without = [gauge for gauge in kept if gauge.kind != "layer_scale"]
    with pytest.raises(ValueError, match=r"divides by 'scales\.\d', which nothing keeps from zero"):
        DDCAdam(model.named_parameters(), without)
    with torch.no_grad():
        model.scales[0][3] = 0
    with pytest.raises(ValueError, match=r"divides by 'scales\.0', of which an entry is zero"):
        DDCAdam(model.named_parameters(), kept)
    with pytest.raises(ValueError, match=r"divides by 'scales\.0', of which an entry is zero"):
        gauges.transform_(model, torch.Generator().manual_seed(0))
    left = respected(DDCAdam, model.named_parameters(), gauges)
    step = DDCAdam(model.named_parameters(), left)
    for _ in range(3):
        step.zero_grad()
        F.cross_entropy(model(inputs[0]), torch.arange(64) % 9).backward()
        step.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mlp", ["relu", "swiglu"])
def test_scales_of_units_and_of_outputs_go_together(mlp: str) -> None:
    """The columns of a map under one rescale, its rows under a layer scale."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.gate = nn.RMSNorm(8), nn.Linear(8, 6), nn.Linear(8, 6)
            self.down, self.scale = nn.Linear(6, 8), nn.Parameter(torch.rand(8) + 0.5)
            self.head = nn.Linear(8, 9)

        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.up(self.norm(x)), self.gate(self.norm(x))
            hidden = F.relu(up) if mlp == "relu" else up * F.silu(gate)
            logits: Tensor = self.head(x + self.down(hidden) * self.scale)
            return logits

    torch.manual_seed(0)
    x = torch.randn(64, 8).double()
    model = moved(Block()).requires_grad_()
    gauges = find_gauges(
        model, inputs=(x,), kinds=["layer_scale", f"{mlp}_rescale".replace("swiglu", "gated")]
    )
    assert len(gauges) == 2
    starts = [model, copy.deepcopy(model)]
    gauges.transform_(starts[1], torch.Generator().manual_seed(1), 1.0)
    ends = []
    for each in starts:
        step = DDCAdam(each.named_parameters(), gauges, lr=1e-2)
        for _ in range(20):
            step.zero_grad()
            F.cross_entropy(each(x), torch.arange(64) % 9).backward()
            step.step()
        ends.append(each(x).detach().log_softmax(-1))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-10


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(
    "twist",
    [
        "shared",
        "squared",
        "reversed",
        "shifted",
        "activated",
        "read before",
        "read after",
        "one output",
    ],
)
def test_what_breaks_it_is_refused(twist: str, norm: str) -> None:
    """By the rules, and none of those that are found is false."""
    model, inputs = made(norm=norm, twist=twist)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left to the trial
        gauges = find_gauges(model, inputs=inputs, kinds="complete")
    assert not gauges.only(["stream_rotation"]).found
    double = inputs[0].double()
    changes = check(moved(model), gauges, lambda m: m(double).log_softmax(-1))
    assert all(change < 1e-9 for change in changes.values())


def test_the_balanced_point_and_the_zeros_of_gradients() -> None:
    model, inputs = made()
    gauges = find_gauges(model, inputs=inputs, kinds="complete")
    model = moved(model)
    before = model(inputs[0].double()).log_softmax(-1)
    canonicalise_(model, gauges)
    torch.testing.assert_close(model(inputs[0].double()).log_softmax(-1), before)
    # gradients with respect to what a writer gives have 1/λ for a null vector
    params = named_parameters(model)
    found = {nulls.weight: nulls for gauge in gauges if (nulls := zeros_of_gauge(gauge, params))}
    (zero,) = found["downs.1.weight"].gradient
    felt: list[Tensor] = []
    model.downs[1].register_full_backward_hook(lambda m, i, o: felt.append(o[0]))
    F.cross_entropy(model(inputs[0].double()), torch.arange(64) % 9).backward()
    assert zero.vector is not None
    assert float((felt[0] @ zero.vector).abs().max()) < 1e-12 * float(felt[0].abs().max()) * 64
