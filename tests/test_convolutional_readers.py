"""Norms over channels that convolutions read: scale, shift, rows and rotation, in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import canonicalise_, check, named_parameters
from ddc.gauges.certificate import certify
from ddc.optim import respected
from tests.helpers import off_tangents
from tests.test_complete import moved

KINDS = {"norm_scale", "norm_shift", "reader_shift", "stream_rotation", "stream_mean"}


class OverChannels(nn.Module):
    """A LayerNorm of the channels of (batch, channels, height, width)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class Net(nn.Module):
    """A stem, and two convolutions that read a norm each; ``twist`` changes one thing."""

    def __init__(self, twist: str = "", **options: object) -> None:
        super().__init__()
        self.twist = twist
        self.stem = nn.Conv2d(2, 4, 2)
        self.first = OverChannels(4)
        self.wide = nn.Conv2d(**({"in_channels": 4, "out_channels": 5, "kernel_size": 2} | options))
        self.second, self.narrow = OverChannels(5), nn.Conv2d(5, 5, 1)
        self.head = nn.Linear(5, 6)
        if twist == "no bias":
            self.wide.bias = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.stem(x))
        if self.twist == "padded apart":
            h = F.pad(h, (1, 1, 1, 1))
        if self.twist == "some":
            h = h[:, :3]
        if self.twist == "flipped":
            h = h.flip(1)
        if self.twist == "upside down":
            h = h.transpose(1, 2)[:, :4, :4]
        y = self.wide(h)
        if self.twist == "read twice":
            y = y + self.wide(h.relu())
        if self.twist == "read elsewhere":
            y = y + h.mean((1, 2, 3), keepdim=True)
        y = self.narrow(self.second(F.gelu(y)))
        logits: Tensor = self.head(F.gelu(y).mean((2, 3)))
        return logits

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0)),)


def made(twist: str = "", **options: object) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net(twist, **options)
    return model, model.example_inputs()[0].double()


def at(found: object, where: str) -> set[str]:
    return {gauge.kind for gauge in found if where in gauge.where}  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"padding": "valid"}])
def test_the_orbit_is_all_of_the_kernel(options: dict[str, object]) -> None:
    model, inputs = made(**options)
    gauges = find_gauges(model, kinds="complete")
    assert {gauge.kind for gauge in gauges} == KINDS | {"logit_shift"}
    certificate = certify(model, gauges)
    assert certificate.complete, certificate
    assert certificate.leak < 1e-12
    changes = check(moved(model), gauges, lambda m: m(inputs).log_softmax(-1))
    assert max(changes.values()) < 1e-11


def test_without_a_shift_padding_does_not_matter() -> None:
    model, inputs = made(kernel_size=3, padding=1)
    gauges = find_gauges(model, kinds="complete")
    assert at(gauges, "wide") == set()
    assert {each.reason for each in gauges.refused if each.where == "first.norm"} == {
        "wide reads zeros around what the norm gives"
    }
    assert "norm_scale" in at(gauges, "first.norm")
    model.first.norm.bias = None
    gauges = find_gauges(model, kinds="complete")
    assert at(gauges, "wide") == {"reader_shift"}
    (shift,) = [each for each in gauges if each.where == "wide"]
    assert shift.dimension(named_parameters(model)) == 5 * 9
    assert certify(model, gauges).complete
    changes = check(moved(model), gauges, lambda m: m(inputs).log_softmax(-1))
    assert max(changes.values()) < 1e-11


def test_tangents_audit_and_the_balanced_point() -> None:
    model, inputs = made()
    gauges = find_gauges(model, kinds="complete")
    model = moved(model).requires_grad_()
    F.cross_entropy(model(inputs), torch.arange(8) % 6).backward()
    params = {name: p.detach() for name, p in named_parameters(model).items()}
    grads = {name: p.grad for name, p in named_parameters(model).items() if p.grad is not None}
    false = {name: torch.randn_like(p) for name, p in params.items()}
    for gauge in gauges:
        assert gauge.audit(params, grads) < 1e-12, gauge
        assert gauge.audit(params, false) > 1e-4, gauge
        if gauge.kind == "stream_rotation":
            continue
        assert off_tangents(gauge, params) < 1e-4, gauge
    # least squares: no small element of a shift brings the weights nearer to zero
    before = model(inputs).log_softmax(-1).detach()
    canonicalise_(model, gauges)
    torch.testing.assert_close(model(inputs).log_softmax(-1).detach(), before)
    held = {name: p.detach() for name, p in named_parameters(model).items()}
    least = sum(float(p.square().sum()) for p in held.values())
    for gauge in gauges.only(["reader_shift"]):
        for seed in range(3):
            near = {name: p.clone() for name, p in held.items()}
            gauge.act_(near, gauge.sample(near, torch.Generator().manual_seed(seed), 0.01))
            assert sum(float(p.square().sum()) for p in near.values()) > least - 1e-9, gauge


@pytest.mark.parametrize("optimizer", ["DDCAdam", "DDCMuon"])
def test_optimizers_stay_on_one_trajectory(optimizer: str) -> None:
    model, inputs = made()
    found = find_gauges(model, kinds="complete")
    model = moved(model).requires_grad_()

    def make(params: object, gauges: object) -> torch.optim.Optimizer:
        if optimizer == "DDCAdam":
            return DDCAdam(params, gauges, lr=1e-2)  # type: ignore[arg-type]
        hidden = hidden_matrices(model, inputs=(inputs,))
        return DDCMuon(params, gauges, hidden, lr=0.02, adam_lr=1e-2)  # type: ignore[arg-type]

    gauges = respected(make, model.named_parameters(), found)
    assert len(gauges.found) == len(found.found)
    starts = [model, copy.deepcopy(model)]
    gauges.transform_(starts[1], torch.Generator().manual_seed(1), 1.0)
    before = model(inputs).detach().log_softmax(-1)
    ends = []
    for each in starts:
        step = make([*each.named_parameters()], gauges)
        for _ in range(40):
            step.zero_grad()
            F.cross_entropy(each(inputs), torch.arange(8) % 6).backward()
            step.step()
        ends.append(each(inputs).detach().log_softmax(-1))
    assert float((ends[0] - before).abs().max()) > 0.1
    assert float((ends[0] - ends[1]).abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("twist", "options", "kept"),
    [
        ("", {"padding": "same"}, {"norm_scale"}),
        ("", {"padding": (0, 1)}, {"norm_scale"}),
        ("padded apart", {}, None),
        ("some", {"in_channels": 3}, set()),
        ("flipped", {}, set()),
        ("upside down", {}, set()),
        ("read twice", {}, set()),
        ("read elsewhere", {}, set()),
        ("no bias", {}, {"norm_scale"}),
        ("", {"groups": 2, "out_channels": 4}, set()),
    ],
)
def test_what_is_no_symmetry_is_refused(
    twist: str, options: dict[str, object], kept: set[str] | None
) -> None:
    """By the rules, and none of those that are found is false."""
    if "out_channels" in options:
        model, inputs = made()
        model.wide = nn.Conv2d(4, 5 - 1, 2, groups=2)
        model.second, model.narrow = OverChannels(4), nn.Conv2d(4, 5, 1)
    else:
        model, inputs = made(twist, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left to the trial
        gauges = find_gauges(model, kinds="complete")
    changes = check(moved(model), gauges, lambda m: m(inputs).log_softmax(-1))
    assert all(change < 1e-9 for change in changes.values())
    if kept is not None:
        assert at(gauges, "first.norm") == kept


class Unbatched(nn.Module):
    """Convolutions that read (channels, places), whose second axis is as long as the first: nothing
    along it is a channel.
    """

    def __init__(self, norm: str, reader: str) -> None:
        super().__init__()
        self.reader = reader
        self.stem = nn.Conv1d(2, 4, 2)
        self.norm = nn.LayerNorm(4) if norm == "layer" else nn.RMSNorm(4)
        self.wide = nn.Conv1d(4, 5, 2) if reader == "convolution" else nn.Linear(4, 5)
        self.head = nn.Linear(3 if reader == "convolution" else 5, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.gelu(self.wide(self.norm(self.stem(x)))))
        return logits


@pytest.mark.parametrize("reader", ["convolution", "linear"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_what_reads_no_batch_has_no_channels_along_axis_one(norm: str, reader: str) -> None:
    torch.manual_seed(0)
    model, x = Unbatched(norm, reader), torch.randn(2, 5)
    for kinds in ("paper", "complete"):
        gauges = find_gauges(model, inputs=(x,), kinds=kinds, verify=False)
        changes = check(moved(model), gauges, lambda m: m(x.double()).log_softmax(-1))
        assert all(change < 1e-9 for change in changes.values()), changes


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["norm", "relu"])
def test_a_reader_of_some_entries_is_refused(kind: str, affine: bool) -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8, elementwise_affine=affine)
            self.wide, self.head = nn.Linear(4, 5), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.stem(x)) if kind == "norm" else F.relu(self.stem(x))
            logits: Tensor = self.head(F.gelu(self.wide(h[..., :4])))
            return logits

    torch.manual_seed(0)
    model, x = Some(), torch.randn(7, 5)
    gauges = find_gauges(model, inputs=(x,), kinds="complete", verify=False)
    assert not {each.kind for each in gauges} & {
        *("norm_scale", "norm_shift", "reader_shift", "relu_rescale", "stream_rotation")
    }
    changes = check(moved(model), gauges, lambda m: m(x.double()).log_softmax(-1))
    assert all(change < 1e-9 for change in changes.values()), changes
