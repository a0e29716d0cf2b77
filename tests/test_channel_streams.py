"""Streams whose vectors lie along channels, as in a ConvNeXt: layer scales and means of what
convolutions write to them, their rotation, and what breaks these.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import GaugeSet, approximate_kinds, check, named_parameters
from ddc.gauges.affine import ScaledShift, StreamRotation, Translation
from ddc.gauges.certificate import certify
from ddc.optim import respected
from tests.helpers import off_tangents
from tests.test_complete import moved
from tests.test_convolutional_readers import OverChannels

WIDTH = 4
#: Channels, rows and columns of the stream are as many, so that shapes tell no axis.
INPUTS = (8, 2, 2 * WIDTH, 2 * WIDTH)
CLASSES = 5


class Block(nn.Module):
    """A block of a ConvNeXt: depthwise perhaps, norm, two convolutions or linear maps, scale."""

    def __init__(self, depthwise: bool, linear: bool, down: nn.Module | None) -> None:
        super().__init__()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH) if depthwise else None
        self.norm, self.linear = OverChannels(WIDTH), linear
        self.up = nn.Linear(WIDTH, 6) if linear else nn.Conv2d(WIDTH, 6, 1)
        self.down = down or (nn.Linear(6, WIDTH) if linear else nn.Conv2d(6, WIDTH, 1))
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x if self.mix is None else self.mix(x))
        if self.linear:
            return self.down(F.gelu(self.up(y.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        written: Tensor = self.down(F.gelu(self.up(y)))
        return written


class Net(nn.Module):
    """A stem, two blocks and a head, with one thing changed."""

    def __init__(
        self,
        twist: str = "",
        depthwise: bool = True,
        linear: bool = False,
        down: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.twist = twist
        self.stem = nn.Conv2d(2, WIDTH, 2, stride=2)
        self.blocks = nn.ModuleList(Block(depthwise, linear, down) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, CLASSES)
        self.batch_norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, twist = self.stem(x), self.twist
        also = torch.zeros(len(x), 1)
        if twist == "shared view":
            shared = self.blocks[0].scale.reshape(1, -1, 1, 1)
        for block in self.blocks:
            written = block(h)
            if twist == "activated":
                written = F.gelu(written)
            if twist == "dropped":
                written = F.dropout(written, 0.5, self.training)
            if twist == "dropped channels":
                written = F.dropout2d(written, 0.5, self.training)
            if twist == "flipped":
                written = written.flip(1)
            scale = block.scale.reshape(1, -1, 1, 1)
            if twist == "shared":
                scale = self.blocks[0].scale.reshape(1, -1, 1, 1)
            if twist == "shared view":
                scale = shared
            if twist == "along columns":
                scale = block.scale
            if twist == "along rows":
                scale = block.scale[:, None]
            if twist == "squared":
                scale = block.scale.square()[:, None, None]
            product = written * scale
            if twist == "dropped paths" and self.training:
                product = product * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.5)) * 2
            if twist == "read before the scale":
                also = also + written.square().mean((1, 2, 3))[:, None] * torch.arange(CLASSES)
            if twist == "turned":
                product = product.transpose(1, 2)
            h = h + product
        if twist == "read before the norm":
            also = also + h[:, 0].mean((1, 2))[:, None] * torch.arange(CLASSES)
        if twist == "square":
            h = h + h.transpose(1, 3)
        if twist == "mean of channels":
            h = h + h.mean(1, keepdim=True)
        if twist == "gated by channel":
            h = h * h.mean((2, 3), keepdim=True).sigmoid()
        if twist == "gated by place":
            h = h * h.mean(1, keepdim=True).sigmoid()
        if twist == "batch norm":
            h = self.batch_norm(h)
        if twist == "shuffled":
            h = torch.cat([h[:, 2:], h[:, :2]], 1)
        if twist == "parts":
            h = torch.cat([h[:, :2], h[:, 2:]], 1)
        if twist == "greatest":
            h = F.max_pool2d(h, 2)
        if twist == "averaged":
            h = F.avg_pool2d(h, 3, stride=2, padding=1)
        if twist == "other axis":
            h = h.mean(2).transpose(1, 2)
            return self.head(self.norm(h.transpose(1, 2)).mean(1)) + also
        return self.head(self.norm(h.mean((2, 3)))) + also

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.randn(INPUTS, generator=torch.Generator().manual_seed(0)),)


def made(twist: str = "", **options: object) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net(twist, **options)  # type: ignore[arg-type]
    return model, model.example_inputs()[0].double()


def by_rules(model: Net) -> GaugeSet:
    """What is found, and nothing is left to the trial."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return find_gauges(model, kinds="complete", loss="cross_entropy")


def largest_change(model: Net, gauges: GaugeSet, x: Tensor) -> float:
    """Under each gauge, in evaluation and in training, where what is drawn is drawn alike."""
    other, largest = moved(model), 0.0

    def of(each: nn.Module) -> Tensor:
        torch.manual_seed(0)
        out: Tensor = each(x).log_softmax(-1)
        return out

    for training in (False, True):
        other.train(training)
        largest = max(largest, *check(other, gauges, of).values())
    return largest


def means(gauges: GaugeSet) -> set[str]:
    return {each.parameters[0] for each in gauges.only(["stream_mean"])}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("depthwise", [False, True])
def test_the_orbit_is_all_of_the_kernel(depthwise: bool, linear: bool) -> None:
    model, x = made(depthwise=depthwise, linear=linear)
    del model.batch_norm
    gauges = by_rules(model)
    assert len(gauges.only(["layer_scale"]).found) == 2
    assert len(gauges.only(["stream_rotation"]).found) == (not depthwise)
    # behind the last block nothing but the norm reads the stream; where maps of channels by
    # themselves read it, what the first one writes has no mean
    assert ("blocks.0.down.weight" in means(gauges)) != depthwise
    assert ("blocks.0.mix.bias" in means(gauges)) == depthwise
    assert "blocks.1.down.bias" in means(gauges)
    certificate = certify(model, gauges)
    assert certificate.complete, certificate
    assert certificate.leak < 1e-12
    assert largest_change(model, gauges, x) < 1e-11
    if depthwise:
        without = [each for each in gauges if each.kind not in ("layer_scale", "stream_mean")]
        # two scales, rows of six columns and a bias, biases of two depthwise convolutions
        assert certify(model, without).unexplained == 2 * WIDTH + 7 + 2


def test_the_rotation_turns_what_lies_along_channels() -> None:
    model, x = made(depthwise=False)
    (rotation,) = by_rules(model).only(["stream_rotation"])
    assert isinstance(rotation, StreamRotation)
    assert {(each.weight, each.scale) for each in rotation.writers} == {
        ("stem.weight", None),
        ("stem.bias", None),
        *(
            (f"blocks.{i}.down.{n}", f"blocks.{i}.scale")
            for i in (0, 1)
            for n in ("weight", "bias")
        ),
    }
    other = moved(model)
    assert max(check(other, [rotation], lambda m: m(x).log_softmax(-1)).values()) < 1e-11


def test_tangents_and_audit() -> None:
    model, x = made()
    gauges = by_rules(model).only(["layer_scale", "stream_mean"])
    model = moved(model).requires_grad_()
    F.cross_entropy(model(x), torch.arange(8) % CLASSES).backward()
    params = {name: p.detach() for name, p in named_parameters(model).items()}
    grads = {name: p.grad for name, p in named_parameters(model).items() if p.grad is not None}
    false = {name: torch.randn_like(p) for name, p in params.items()}
    assert len(gauges.found) == 6
    for gauge in gauges:
        assert gauge.audit(params, grads) < 1e-12, gauge
        assert gauge.audit(params, false) > 1e-4, gauge
        assert off_tangents(gauge, params) < 1e-4, gauge


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("optimizer", ["DDCAdam", "DDCMuon"])
def test_optimizers_stay_on_one_trajectory(optimizer: str, depthwise: bool) -> None:
    model, x = made(depthwise=depthwise, linear=not depthwise)
    del model.batch_norm
    found = by_rules(model)
    model = moved(model).requires_grad_()

    def make(params: object, gauges: object) -> torch.optim.Optimizer:
        if optimizer == "DDCAdam":
            return DDCAdam(params, gauges, lr=1e-2, weight_decay=0.1)  # type: ignore[arg-type]
        hidden = hidden_matrices(model, inputs=(x,))
        return DDCMuon(params, gauges, hidden, lr=0.02, adam_lr=1e-2)  # type: ignore[arg-type]

    gauges = respected(make, model.named_parameters(), found)
    left_out = {each.kind for each in gauges.refused[len(found.refused) :]}
    rotated = not depthwise and optimizer == "DDCAdam"
    assert left_out == ({"stream_rotation"} if rotated else set())
    starts = [model, copy.deepcopy(model)]
    gauges.transform_(starts[1], torch.Generator().manual_seed(1), 1.0)
    before = model(x).detach().log_softmax(-1)
    ends = []
    for each in starts:
        step = make([*each.named_parameters()], gauges)
        for _ in range(100):
            step.zero_grad()
            F.cross_entropy(each(x), torch.arange(8) % CLASSES).backward()
            step.step()
        ends.append(each(x).detach().log_softmax(-1))
    assert float((ends[0] - before).abs().max()) > 0.1
    assert float((ends[0] - ends[1]).abs().max()) < 1e-7


def test_a_scale_at_zero_is_refused_where_one_divides_by_it() -> None:
    model, _ = made()
    gauges = by_rules(model)
    with torch.no_grad():
        model.blocks[1].scale[2] = 0
    with pytest.raises(ValueError, match=r"divides by 'blocks\.1\.scale', of which an entry is ze"):
        DDCAdam(model.named_parameters(), gauges)
    kept = respected(DDCAdam, model.named_parameters(), gauges)
    refused = kept.refused[len(gauges.refused) :]
    assert {each.kind for each in refused} == {"stream_mean"}
    DDCAdam(model.named_parameters(), kept)


BOTH = {"blocks.0.scale", "blocks.1.scale"}
WRITTEN = {"blocks.1.down.weight", "blocks.1.down.bias"}


@pytest.mark.parametrize(
    ("twist", "scales", "written"),
    [
        ("", BOTH, WRITTEN),
        ("averaged", BOTH, WRITTEN),
        ("gated by place", BOTH, set()),
        ("parts", BOTH, set()),
        ("dropped paths", BOTH, WRITTEN),
        ("activated", set(), set()),
        ("dropped", set(), set()),
        ("dropped channels", set(), set()),
        ("flipped", set(), set()),
        ("shared", set(), set()),
        ("shared view", set(), set()),
        ("along columns", set(), set()),
        ("along rows", set(), set()),
        ("squared", set(), set()),
        ("read before the scale", set(), set()),
        ("turned", BOTH, set()),
        ("read before the norm", BOTH, set()),
        ("square", BOTH, set()),
        ("mean of channels", BOTH, set()),
        ("gated by channel", BOTH, set()),
        ("batch norm", BOTH, set()),
        ("shuffled", BOTH, set()),
        ("greatest", BOTH, set()),
        ("other axis", BOTH, set()),
    ],
)
def test_what_is_no_symmetry_is_refused(twist: str, scales: set[str], written: set[str]) -> None:
    """By the rules, and none of those that are found is false."""
    model, x = made(twist, depthwise=False)
    gauges = by_rules(model)
    assert {each.parameters[-1] for each in gauges.only(["layer_scale"])} == scales
    behind = {
        each.weight
        for each in gauges.only(["stream_mean"])
        if isinstance(each, ScaledShift) and each.scale == "blocks.1.scale"
    }
    assert behind == written
    # a vector along another axis is one number for each vector of the stream, whose mean it keeps
    kept = ("", "averaged", "dropped paths", "along columns", "along rows")
    assert bool(gauges.only(["stream_rotation"]).found) == (twist in kept)
    assert largest_change(model, gauges, x) < 1e-9


def test_filters_in_groups_have_the_mean_of_their_biases_alone() -> None:
    model, x = made(depthwise=False, down=nn.Conv2d(6, WIDTH, 1, groups=2))
    model.blocks[0].down = nn.Conv2d(6, WIDTH, 1, groups=2)
    gauges = by_rules(model)
    assert means(gauges) == {"stem.weight", "stem.bias", "blocks.0.down.bias", "blocks.1.down.bias"}
    assert not gauges.only(["stream_rotation"]).found
    (refusal,) = [each for each in gauges.refused if each.kind == "stream_rotation"]
    assert refusal.reason == "conv2d, which writes to it, has groups of channels"
    assert len(gauges.only(["layer_scale"]).found) == 2
    assert largest_change(model, gauges, x) < 1e-11


def test_a_bias_of_channels_moves_against_another() -> None:
    """Of two convolutions, and of a table, that meet in a sum which a norm of channels reads."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3, bias=True)
            self.table = nn.Parameter(torch.randn(1, 4, 6, 6))
            self.norm, self.head = OverChannels(4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x) + self.second(x.flip(-1)) + self.table
            logits: Tensor = self.head(F.gelu(self.norm(h)).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    model, x = Sum(), torch.randn(6, 2, 8, 8)
    gauges = find_gauges(model, inputs=(x,), kinds="complete", verify=False)
    pairs = [each.parameters for each in gauges.only(["translation"])]
    assert {name for pair in pairs for name in pair} == {"first.bias", "second.bias", "table"}
    (table,) = [each for each in gauges.only(["stream_mean"]) if each.parameters == ("table",)]
    assert isinstance(table, Translation)
    changes = check(moved(model), gauges, lambda m: m(x.double()).log_softmax(-1))
    assert max(changes.values()) < 1e-11


def test_at_eps_zero_a_stream_of_channels_has_a_scale() -> None:
    model, _ = made()
    found = find_gauges(model, kinds=approximate_kinds())
    scales = [each.parameters for each in found.only(["stream_scale"])]
    assert ("blocks.0.mix.weight", "blocks.0.mix.bias") in scales
    assert all(0 < found.sizes[each] < 1e-2 for each in found.only(["stream_scale"]))
