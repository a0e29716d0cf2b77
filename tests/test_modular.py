"""Modular arithmetic: what is asked, and that no answer leaks."""

from __future__ import annotations

import pytest
import torch

from ddc.data import DataError, ModularConfig, load_modular


def pairs(data, split: str) -> dict[tuple[int, int], int]:
    inputs, targets = data.train if split == "train" else data.validation
    return {
        tuple(pair): target for pair, target in zip(inputs.tolist(), targets.tolist(), strict=True)
    }


@pytest.mark.parametrize(
    ("operation", "result", "commutative"),
    [
        ("addition", lambda a, b: (a + b) % 11, True),
        ("subtraction", lambda a, b: (a - b) % 11, False),
        ("multiplication", lambda a, b: a * b % 11, True),
        ("squares", lambda a, b: (a**2 + b**2) % 11, True),
    ],
)
def test_all_pairs_once_with_the_right_answer_and_no_leak(
    operation: str, result, commutative: bool
) -> None:
    data = load_modular(ModularConfig(operation=operation, prime=11, train_fraction=0.6), seed=3)
    train, validation = pairs(data, "train"), pairs(data, "validation")
    assert len(data.train[1]) + len(data.validation[1]) == 121
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == {(a, b) for a in range(11) for b in range(11)}
    assert all(target == result(a, b) for (a, b), target in {**train, **validation}.items())
    assert len(train) / 121 == pytest.approx(0.6, abs=0.1)
    leaks = sum((b, a) in train for a, b in validation)
    assert leaks == 0 if commutative else leaks > 0
    assert ("same side" in data.source) == commutative


def test_the_split_is_a_function_of_the_seed() -> None:
    first, again, other = (
        pairs(load_modular(ModularConfig(), seed), "train") for seed in (0, 0, 1)
    )
    assert first == again != other


def test_an_epoch_sees_every_pair_once() -> None:
    data = load_modular(ModularConfig(prime=7), seed=0)
    size = data.train_units
    seen = torch.cat([data.batch(step, 5, 1)[0] for step in range(-(-3 * size // 5))])[: 3 * size]
    for epoch in seen.split(size):
        assert len({tuple(pair) for pair in epoch.tolist()}) == size
    assert torch.equal(data.batch(4, 5, 1)[0], data.batch(4, 5, 1)[0])
    assert not torch.equal(data.batch(4, 5, 1)[0], data.batch(4, 5, 2)[0])
    assert torch.equal(data.batch(4, size, 1)[0], data.train[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prime": 12}, "data.prime=12"),
        ({"operation": "division"}, "data.operation='division'"),
        ({"train_fraction": 1.0}, "data.train_fraction=1.0"),
    ],
)
def test_bad_values_are_refused(options, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModularConfig(**options)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="train_fraction"):
        load_modular(ModularConfig(prime=3, train_fraction=0.01), 0)
