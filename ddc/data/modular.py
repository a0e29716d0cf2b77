"""Modular arithmetic: all pairs of residues, split into training and validation pairs that share no
question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddc.data.config import DataConfig, DataError
from ddc.data.order import hash_seed, shuffled

#: Results of the operations on residues a and b, modulo the prime; and whether swapping a and b
#: changes them.
OPERATIONS = {
    "addition": (lambda a, b: a + b, True),
    "subtraction": (lambda a, b: a - b, False),
    "multiplication": (lambda a, b: a * b, True),
    "squares": (lambda a, b: a * a + b * b, True),
}


@dataclass
class ModularConfig(DataConfig):
    """Which table, and how much of it.

    Args:
        operation: ``addition``, ``subtraction``, ``multiplication`` or ``squares`` (a² + b²),
            modulo the prime.
        prime: modulus, and number of tokens and of classes; below 1000, for all pairs are taken at
            once.
        train_fraction: share of the pairs in the training split.

    Raises:
        ValueError: on construction, a value out of range.
    """

    name: str = "modular"
    operation: str = "addition"
    prime: int = 53
    train_fraction: float = 0.75

    def __post_init__(self) -> None:
        if self.name != "modular":
            raise ValueError(
                f"Invalid data.name={self.name!r}: expected modular; data=NAME chooses other data"
            )
        if self.operation not in OPERATIONS:
            raise ValueError(
                f"Invalid data.operation={self.operation!r}: expected one of"
                f" {', '.join(OPERATIONS)}"
            )
        if not 3 <= self.prime < 1000 or any(
            self.prime % d == 0 for d in range(2, int(self.prime**0.5) + 1)
        ):
            raise ValueError(
                f"Invalid data.prime={self.prime}: expected a prime number from 3 to 997"
            )
        if not 0 < self.train_fraction < 1:
            raise ValueError(
                f"Invalid data.train_fraction={self.train_fraction}: expected a number in (0, 1)"
            )


@dataclass(frozen=True)
class PairData:
    """Pairs of residues with their result, in two splits.

    Attributes:
        train: (inputs, targets), of shapes (pairs, 2) and (pairs,), int64.
        validation: likewise.
        vocab_size: the prime.
        source: what it is, for the record.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    vocab_size: int
    source: str
    unit: str = "pair"
    units_per_example: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """What a model must know of the data, for :func:`ddc.models.build_model`."""
        return {"tokens": self.vocab_size, "classes": self.vocab_size}

    @property
    def train_units(self) -> int:
        """Size of the training split."""
        return len(self.train[1])

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one training step: (batch_size, 2) and (batch_size,).

        A pure function of its arguments. Each epoch goes through the split in a new random order; a
        batch as large as the split, or larger, is the whole split.
        """
        inputs, targets = self.train
        if batch_size >= len(targets):
            return inputs, targets
        chosen = shuffled(step, batch_size, len(targets), seed)
        return inputs[chosen], targets[chosen]

    def evaluation_batches(
        self, split: str, count: int, batch_size: int
    ) -> list[tuple[Tensor, Tensor]]:
        """The whole split, whatever the arguments say: it is small, and an accuracy of all pairs
        has no noise.
        """
        return [self.train if split == "train" else self.validation]


def load_modular(config: ModularConfig, seed: int) -> PairData:
    """All pairs, split at random by ``seed``.

    Where the operation is commutative, (a, b) and (b, a) are one question: both are on the same
    side of the split, so that no validation answer was seen in training. ``train_fraction`` is then
    the share of such questions.

    Raises:
        DataError: a split would be empty.
    """
    p = config.prime
    function, commutative = OPERATIONS[config.operation]
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).unbind(1)
    question = torch.minimum(a, b) * p + torch.maximum(a, b) if commutative else a * p + b
    questions = question.unique()
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(hash_seed(seed)))
    count = round(config.train_fraction * len(questions))
    if not 0 < count < len(questions):
        raise DataError(
            f"data.train_fraction={config.train_fraction} leaves a split of {len(questions)}"
            " questions empty: take a fraction farther from 0 and 1, or a larger data.prime"
        )
    chosen = torch.isin(question, questions[order[:count]])
    inputs, targets = torch.stack((a, b), 1), function(a, b) % p
    twins = "; (a, b) and (b, a) are on the same side of the split" if commutative else ""
    source = (
        f"{config.operation} modulo {p}, all {p * p} pairs, {int(chosen.sum())} of them for"
        f" training{twins}"
    )
    return PairData(
        (inputs[chosen], targets[chosen]), (inputs[~chosen], targets[~chosen]), p, source
    )
