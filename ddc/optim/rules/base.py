"""What a base optimizer is to a lift: a rule that turns an invariant input into a direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ddc.optim.compiled import Hyper, Number, per_layer

Moments = dict[str, Tensor]


class Direction(NamedTuple):
    """A direction like the input, but for a factor: one number, or one a layer, (L,).

    The factor (of Adam, the bias corrections) is apart so that whoever scales the direction anyway
    needs no pass of its own for it.
    """

    u: Tensor
    factor: Number = 1.0

    def times(self, rate: Number) -> Tensor:
        """The direction times a rate."""
        return self.u * per_layer(rate * self.factor, self.u)


class Averages(Protocol):
    """Averages over the indices that a gauge mixes."""

    def mean_square(self, x: Tensor) -> Tensor:
        """Average of the squares of x over each group of indices, in which the gauge leaves it as
        it is.
        """

    def divide(self, x: Tensor, divisor: Tensor) -> Tensor:
        """X over an averaged ``divisor``, each index by its group's."""


class Subject(Protocol):
    """What an input belongs to: a stacked parameter, or numbers that stand each for itself."""

    @property
    def averaging(self) -> Averages | None:
        """Averages over the indices that a rotation gauge, or a map, mixes; None where none
        does.
        """

    def on_whole(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function of whole matrices, (B, rows, columns), of x, which may be split by heads and
        over ranks.
        """

    def gathered(self, x: Tensor) -> Tensor:
        """All of x, on every rank."""

    def part(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`gathered`."""


class Rule(ABC):
    """A base optimizer, as a lift needs it: its state, and the direction that it makes of an input.

    The lift decomposes the weights and hands the rule an input x that no scale and no shift
    changes, and that turns with the weights where a rotation gauge acts. So the step is equivariant
    if the direction is a function of inputs and state alone that turns with them, u(Rx) = R u(x);
    ``of.averaging`` says which indices turn together. All tensors are stacked over L layers. A rule
    has no state of its own: hyperparameters are in param groups, moments with the parameters.
    """

    #: Hyperparameters that the rule reads, besides the rate, which is not its business.
    settings: ClassVar[tuple[str, ...]] = ()
    #: Moments of the shape of the input.
    moments: ClassVar[tuple[str, ...]] = ()
    #: Moments of the input's shape with the turned indices averaged.
    averaged: ClassVar[tuple[str, ...]] = ()
    #: Whether a general linear map, which moves x by its inverse transpose, moves the direction
    #: alike, given averages in its metric: not of what reads x in any other way.
    takes_maps: ClassVar[bool] = True
    #: Whether a compiler takes it.
    compilable: ClassVar[bool] = True

    def others(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what else is kept of one parameter of this shape: the same on all
        ranks.
        """
        return {}

    def moments_of_numbers(self) -> tuple[str, ...]:
        """Names of what :meth:`of_numbers` keeps, each of the shape of its input."""
        return self.moments + self.averaged

    @abstractmethod
    def check(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for one of :attr:`settings` that is out of range."""

    def clock(self, step: Tensor, hyper: Hyper, dtype: torch.dtype) -> Any:
        """What depends on step counts, (L,), alone: worked out once for all tensors of a stack."""
        return None

    @abstractmethod
    def direction(
        self, x: Tensor, moments: Moments, clock: Any, hyper: Hyper, of: Subject
    ) -> Direction:
        """Take x, of shape ``(L, *shape)``, into the moments in place, and return the direction; x
        may be used up.
        """

    def of_numbers(self, x: Tensor, moments: Moments, clock: Any, hyper: Hyper) -> Direction:
        """The same for numbers that stand each for itself, (L, U): the coordinates of norms."""
        return self.direction(x, moments, clock, hyper, NUMBERS)


class Numbers:
    """The :class:`Subject` of numbers: nothing turns them, and they are whole on every rank."""

    averaging: Averages | None = None

    def on_whole(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        raise TypeError("numbers are no matrices")

    def gathered(self, x: Tensor) -> Tensor:
        return x

    def part(self, x: Tensor) -> Tensor:
        return x


NUMBERS = Numbers()


def check_betas(betas: Any, sums: bool = False) -> None:
    """Raise ValueError unless these are two numbers in [0, 1); with ``sums`` the second may be
    1.
    """
    valid = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    if not valid and not (sums and len(betas) == 2 and 0 <= betas[0] < 1 == betas[1]):
        but = ", or 1 for the second" if sums else ""
        raise ValueError(f"Invalid betas={betas}: expected two numbers in [0, 1){but}")
