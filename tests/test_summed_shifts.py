"""Shifts of BatchNorms and biases of convolutions that meet in a sum."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import DDCAdam, find_gauges
from ddc.gauges import GaugeSet
from ddc.gauges.verify import generic

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 5


class Block(nn.Module):
    """A block of a ResNet whose shortcut has a norm of its own.

    Args:
        shortcut: makes the other term of the sum.
        read: what else is made of the first term, added to the logits.
    """

    def __init__(
        self,
        shortcut: Callable[[], nn.Module] = lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        ),
        read: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.shortcut, self.read, self.head = shortcut(), read, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        also = y.square().mean((2, 3)).sum(1, keepdim=True) * torch.arange(5) if self.read else 0
        y = F.relu(y + self.shortcut(x))
        return self.head(y.mean((2, 3))) + also


def found(model: nn.Module, verify: bool = False) -> GaugeSet:
    return find_gauges(model, inputs=(IMAGES,), kinds=["translation"], verify=verify)


def change(model: nn.Module, training: bool) -> float:
    """Of log-probabilities under a random element, at generic weights in float64."""
    gauges, model = found(model), copy.deepcopy(model).double().train(training)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = generic(p.detach(), generator)
    with torch.no_grad():
        before = model(IMAGES.double()).log_softmax(-1)
        gauges.transform_(model, generator)
        return float((model(IMAGES.double()).log_softmax(-1) - before).abs().max())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_shifts_of_two_norms_or_of_a_convolution(training: bool, bias: bool) -> None:
    model = Block(lambda: nn.Conv2d(3, 4, 1)) if bias else Block()
    (gauge,) = found(model, verify=True)
    other = "shortcut.bias" if bias else "shortcut.1.bias"
    assert {*gauge.parameters} == {"norm.bias", other}
    assert change(model, training) < 1e-12


class Again(nn.Module):
    """Whose shift a sum reads twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.conv2d(x.flip(-1), self.conv.weight, self.conv.bias)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Block(read=True),
        lambda: Block(lambda: nn.Conv2d(3, 4, 1, bias=False)),
        lambda: Block(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())),
        lambda: Block(lambda: nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1))),
        lambda: Block(Again),
        lambda: Block(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5))),
    ],
    ids=["read elsewhere", "no shift", "relu", "broadcast", "used twice", "dropout"],
)
def test_what_is_no_gauge_is_not_found(model: Callable[[], nn.Module]) -> None:
    assert not found(model()).found


def test_ddcadam_trains_alike_from_either() -> None:
    model = Block()
    gauges = find_gauges(model, inputs=(IMAGES,), loss="cross_entropy", kinds="complete")
    model.double()
    assert {"translation", "logit_shift"} <= {gauge.kind for gauge in gauges}
    other = copy.deepcopy(model)
    gauges.transform_(other, torch.Generator().manual_seed(1))
    ends = []
    for each in (model, other):
        optimizer = DDCAdam(each.named_parameters(), gauges, lr=1e-2, weight_decay=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(each(IMAGES.double()), LABELS).backward()
            optimizer.step()
        ends.append(each.eval()(IMAGES.double()).log_softmax(-1))
    assert (ends[0] - ends[1]).abs().max() < 1e-10
