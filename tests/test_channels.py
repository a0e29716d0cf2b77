"""The scale of a channel that several BatchNorms write to one stream, as in a ResNet."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import DDCAdam, DDCMuon, check, find_gauges, hidden_matrices
from ddc.gauges import GaugeSet, Rescale, named_parameters
from ddc.gauges.certificate import Jacobian
from ddc.gauges.verify import generic

WIDTH = 3
IMAGES = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
Change = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


def conv(inputs: int, outputs: int = WIDTH, side: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False, **options)  # type: ignore[arg-type]


class Residual(nn.Module):
    """A stem, a block whose shortcut is what came, and one whose shortcut is a convolution, a
    BatchNorm behind it.

    Args:
        shortcut: what is done to what came, before the first block adds to it.
        stream: what is done to the first sum.
        in_place: sums and ReLUs write to what they read.
    """

    def __init__(self, shortcut: Change = same, stream: Change = F.relu, in_place: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.shortcut, self.stream, self.in_place = shortcut, stream, in_place
        self.stem, self.a, self.b = conv(2), conv(WIDTH), conv(WIDTH)
        self.c, self.d, self.e = conv(WIDTH), conv(WIDTH), conv(WIDTH, side=1)
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(WIDTH) for name in "sabcde"})
        self.head = nn.Linear(WIDTH, 5)

    def add(self, x: Tensor, shortcut: Tensor) -> Tensor:
        if not self.in_place:
            return x + shortcut
        x += shortcut
        return x

    def forward(self, x: Tensor) -> Tensor:
        norms = self.norms
        x = norms["s"](self.stem(x)).relu()
        inner = norms["a"](self.a(x))
        inner = norms["b"](self.b(inner.relu_() if self.in_place else inner.relu()))
        x = self.stream(self.add(inner, self.shortcut(x)))
        inner = norms["d"](self.d(norms["c"](self.c(x)).relu()))
        x = self.add(inner, norms["e"](self.e(F.avg_pool2d(x, 3, 1, 1)))).relu()
        return self.head(x.mean((2, 3)))


def found(model: nn.Module, **options: object) -> GaugeSet:
    kinds = options.pop("kinds", ["channel_scale"])
    images = IMAGES.to(next(model.parameters()))
    return find_gauges(model, inputs=(images,), loss="cross_entropy", kinds=kinds, **options)  # type: ignore[arg-type]


def log_probs(model: nn.Module) -> Tensor:
    return model(IMAGES.double()).log_softmax(-1)


def parameters(gauge: object) -> tuple[set[str], set[str]]:
    assert isinstance(gauge, Rescale)
    return {axis.parameter for axis in gauge.plus}, {axis.parameter for axis in gauge.minus}


def of(*norms: str) -> set[str]:
    return {f"norms.{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}


@pytest.mark.parametrize("in_place", [False, True])
def test_all_that_add_to_a_stream_share_its_channels(in_place: bool) -> None:
    model = Residual(in_place=in_place).double()
    gauges = found(model)
    assert [parameters(gauge) for gauge in gauges] == [
        (of("s", "b"), {"a.weight", "c.weight", "e.weight"}),
        (of("a"), {"b.weight"}),
        (of("c"), {"d.weight"}),
        (of("d", "e"), {"head.weight"}),
    ]
    for training in (True, False):
        changes = check(model.train(training), gauges, log_probs)
        assert max(changes.values()) < 1e-12, changes
    # in training mode they close what is left of the kernel
    model.train()
    complete = found(model, kinds="complete")
    certificate = Jacobian.of(model, (IMAGES,)).certificate(complete)
    assert certificate.complete, certificate


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two terms of one sign, one not", {"shortcut": lambda x: -1.0 + x}),
        ("bounded", {"stream": torch.sigmoid}),
        ("bounded before the sum", {"shortcut": torch.tanh}),
        ("other channels", {"shortcut": lambda x: x.flip(1)}),
        ("to a power", {"shortcut": lambda x: x.square()}),
        ("over channels", {"stream": lambda x: F.max_pool3d(x.relu(), (3, 1, 1), 1, (1, 0, 0))}),
        ("what the model is given", {"shortcut": lambda x: x + IMAGES.to(x).mean(1, True)}),
    ],
)
def test_a_sum_that_does_not_scale(name: str, options: dict[str, Change]) -> None:
    gauges = found(Residual(**options), verify=False)  # type: ignore[arg-type]
    assert [parameters(gauge)[0] for gauge in gauges] == [of("a"), of("c"), of("d", "e")], name
    assert "norms.s" in {each.where for each in gauges.refused}


@pytest.mark.parametrize("change", [lambda x: 0.5 * x, lambda x: -x, lambda x: F.dropout(x, 0.0)])
def test_a_term_may_be_scaled_before_it_is_added(change: Change) -> None:
    gauges = found(Residual(shortcut=change).double())
    assert parameters(gauges.found[0])[0] == of("s", "b")


def test_a_sum_of_many_blocks_is_walked_once() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.other = conv(2), nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.norm(x)
            for _ in range(40):  # each of which has what came twice
                y = F.relu(y) + F.max_pool2d(y, 3, 1, 1)
            return self.head((y + self.other(x)).mean((2, 3)))

    (gauge,) = found(Deep())
    assert parameters(gauge)[0] == {
        f"{n}.{k}" for n in ("norm", "other") for k in ("weight", "bias")
    }


def test_a_convolution_adds_to_a_stream_as_a_batch_norm_does() -> None:
    class Plain(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Conv2d(WIDTH, WIDTH, 1)
            self.norms["e"] = nn.Identity()

    model = Plain().double()
    gauges = found(model)
    assert (of("d") | {"e.weight", "e.bias"}, {"head.weight"}) in map(parameters, gauges)
    assert max(check(model, gauges, log_probs).values()) < 1e-12


@pytest.mark.parametrize("lift", ["ddcadam", "ddcmuon"])
def test_optimizers_are_equivariant_under_them(lift: str) -> None:
    model = Residual().double()
    for p in model.parameters():
        p.data = generic(p.detach(), torch.Generator().manual_seed(p.numel()))
    targets = torch.randint(5, (len(IMAGES),), generator=torch.Generator().manual_seed(1))

    def make(model: nn.Module) -> torch.optim.Optimizer:
        named = named_parameters(model)
        if lift == "ddcadam":
            return DDCAdam(named.items(), gauges, lr=1e-2, weight_decay=0.1)
        hidden = hidden_matrices(model, inputs=(IMAGES.double(),))
        return DDCMuon(named.items(), gauges, hidden, lr=1e-2, adam_lr=1e-2)

    gauges = found(model)
    copies = [model, copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(1))
    for each in copies:
        optimizer = make(each)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(each(IMAGES.double()), targets).backward()
            optimizer.step()
    start, *ends = (log_probs(each).detach() for each in (Residual().double(), *copies))
    assert (ends[0] - ends[1]).abs().max() < 1e-7
    assert (ends[0] - start).abs().max() > 0.1
