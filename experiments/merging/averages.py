"""Averages of models of one architecture, as they are, and after all were moved to one gauge."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ddc.gauges import GaugeSet, align_, canonicalise_, find_gauges, named_parameters

TURNED = ("value_rotation", "qk_rotation")
#: Weight of each next model in the exponential average.
NEXT = 0.3


class Moves(NamedTuple):
    """Gauges of one architecture: those that are balanced, and rotations of heads."""

    balanced: GaugeSet
    turned: GaugeSet

    @classmethod
    def of(cls, model: nn.Module) -> Moves:
        """All that there are."""
        return cls(*(find_gauges(model, kinds=kinds) for kinds in ("complete", TURNED)))


def moved_together(models: Sequence[nn.Module], moves: Moves) -> list[nn.Module]:
    """Copies of models at the balanced points of their orbits, the heads of all others turned onto
    those of the first, in float64.
    """
    moved = [copy.deepcopy(each).double() for each in models]
    for each in moved:
        canonicalise_(each, moves.balanced, verify=False)
        align_(named_parameters(each), named_parameters(moved[0]), moves.turned)
    return moved


@torch.no_grad()
def average(one: nn.Module, other: nn.Module, weight: float = 0.5) -> nn.Module:
    """The mean of the weights of two models, in their precision; ``weight`` is the other's."""
    mean = copy.deepcopy(one)
    theirs = named_parameters(other)
    for name, p in named_parameters(mean).items():
        p.lerp_(theirs[name], weight)
    return mean


def even(models: Sequence[nn.Module]) -> nn.Module:
    """The even average (SWA)."""
    mean = models[0]
    for i, each in enumerate(models[1:], 2):
        mean = average(mean, each, 1 / i)
    return mean


def exponential(models: Sequence[nn.Module]) -> nn.Module:
    """The exponential average (EMA), from the first to the last."""
    mean = models[0]
    for each in models[1:]:
        mean = average(mean, each, NEXT)
    return mean
