"""Estimated against known learning coefficients (``python -m
experiments.learning_coefficients.measure``).

Each known case is estimated once a seed, and compared with ``truth``, the coefficient in closed
form. ``expected`` is what the sampler is to find: at one temperature of a normal crossing of
multiplicity over 1 the exact energy at that temperature, which falls short of the coefficient,
everywhere else the coefficient itself. The settings were chosen on seeds 0, 1, 7, 11, 21, 41 and
42.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ddc.slt.known_coefficients import (
    Coefficient,
    aoyagi_watanabe,
    normal_crossing,
    normal_crossing_energy,
    normal_crossing_loss,
    origin,
    quadratic_loss,
    reduced_rank_data,
    reduced_rank_loss,
    reduced_rank_minimum,
    reduced_rank_potential,
    regular,
)
from ddc.slt.learning_coefficient import (
    Estimate,
    Settings,
    TemperatureFit,
    estimate,
    fit_temperatures,
    minibatches,
)
from ddc.training.records import provenance
from experiments.output import save_records
from experiments.protocols import ROOT

#: Six factors of 3.2. Below, the neglected powers of 1/τ (1/τ at k = 1, τ^-½ at k = 2) exceed the
#: errors; above, the trajectories are too short to go along the arms of the posterior, of which the
#: narrowest are √τ longer than wide.
FIRST_TEMPERATURE = {1: 1e2, 2: 1e3}
SAMPLES, BATCH, NOISE = 5000, 100, 0.1
RESULTS = ROOT / "results/learning_coefficients"


@dataclass(frozen=True)
class Case:
    """One row of the table: what is estimated, by which method, with the truth."""

    family: str
    name: str
    method: str
    truth: Coefficient
    expected: float
    run: Callable[[int], Estimate | TemperatureFit]


def regular_case(name: str, curvatures: Tensor, steps: int) -> Case:
    settings = Settings(chains=64, draws=300, burn_in=50, steps=steps)

    def run(seed: int) -> Estimate:
        loss, start = quadratic_loss(curvatures), origin(len(curvatures))
        return estimate(loss, start, 1e4, 1.0, settings=replace(settings, seed=seed))

    truth = regular(len(curvatures))
    return Case("regular", name, "HMC, τ = 1e4", truth, float(truth[0]), run)


def crossing_case(powers: tuple[int, ...]) -> Case:
    truth = normal_crossing(powers)
    # where the next pole is near, the asymptotic value takes a larger τ, and longer trajectories
    tau, chains, steps = (1e5, 2000, 80) if truth[1] == 1 < len(powers) else (1e4, 500, 25)
    settings = Settings(chains=chains, draws=150, burn_in=40, steps=steps)

    def run(seed: int) -> Estimate:
        loss, start = normal_crossing_loss(powers), origin(len(powers))
        return estimate(loss, start, tau, 1.0, settings=replace(settings, seed=seed))

    expected = float(truth[0]) if truth[1] == 1 else normal_crossing_energy(powers, tau)
    return Case(
        "normal crossing",
        crossing_name(powers),
        f"HMC, τ = {tau:.0e}".replace("+0", ""),
        truth,
        expected,
        run,
    )


def crossing_fit_case(powers: tuple[int, ...]) -> Case:
    settings = Settings(chains=2000 * len(powers), draws=80, burn_in=40, steps=30)

    def run(seed: int) -> TemperatureFit:
        loss, start = normal_crossing_loss(powers), origin(len(powers))
        return fit_temperatures(
            loss,
            start,
            ladder(FIRST_TEMPERATURE[max(powers)]),
            settings=replace(settings, seed=1000 * seed),
        )

    truth = normal_crossing(powers)
    return Case(
        "normal crossing", crossing_name(powers), "HMC, fit over τ", truth, float(truth[0]), run
    )


def reduced_rank_case(shape: tuple[int, int, int, int]) -> Case:
    settings = Settings(chains=100, draws=200, burn_in=40, steps=30, gamma=10.0)

    def run(seed: int) -> Estimate:
        start = reduced_rank_minimum(*shape)
        return estimate(
            reduced_rank_potential(start), start, 1e6, 1.0, settings=replace(settings, seed=seed)
        )

    truth = aoyagi_watanabe(*shape)
    return Case("reduced rank", rank_name(shape), "HMC, τ = 1e6", truth, float(truth[0]), run)


def reduced_rank_fit_case(shape: tuple[int, int, int, int]) -> Case:
    settings = Settings(chains=1600, draws=100, burn_in=40, steps=30, gamma=10.0)

    def run(seed: int) -> TemperatureFit:
        start = reduced_rank_minimum(*shape)
        loss = reduced_rank_potential(start)
        # with γ = 10 in place of 1, a τ counts for τ/γ² in the surplus
        return fit_temperatures(
            loss, start, ladder(1e4), settings=replace(settings, seed=1000 * seed)
        )

    truth = aoyagi_watanabe(*shape)
    return Case("reduced rank", rank_name(shape), "HMC, fit over τ", truth, float(truth[0]), run)


def reduced_rank_data_case(shape: tuple[int, int, int, int]) -> Case:
    def run(seed: int) -> Estimate:
        start = reduced_rank_minimum(*shape)
        settings = Settings(chains=32, draws=300, burn_in=200, steps=5, seed=seed)
        batches = minibatches(reduced_rank_data(start, SAMPLES, NOISE, seed), BATCH, settings)
        return estimate(reduced_rank_loss, start, SAMPLES, batches=batches, settings=settings)

    truth = aoyagi_watanabe(*shape)
    return Case("reduced rank", rank_name(shape), "SGLD, data", truth, float(truth[0]), run)


def ladder(first: float) -> list[float]:
    return [first * 10 ** (i / 2) for i in range(6)]


def crossing_name(powers: tuple[int, ...]) -> str:
    return " ".join(f"w{i}^{2 * power}" for i, power in enumerate(powers, 1))


def rank_name(shape: tuple[int, int, int, int]) -> str:
    return "M={}, H={}, N={}, r={}".format(*shape)


CASES = [
    regular_case("d=3, curvature 1", torch.ones(3, dtype=torch.float64), 10),
    regular_case("d=20, curvature 1", torch.ones(20, dtype=torch.float64), 10),
    regular_case("d=20, curvatures 1 to 1000", torch.logspace(0, 3, 20, dtype=torch.float64), 40),
    *(crossing_case(powers) for powers in [(1,), (2,), (1, 1), (2, 2), (1, 2), (1, 3), (1, 1, 1)]),
    *(crossing_fit_case(powers) for powers in [(1, 1), (2, 2), (1, 1, 1), (1, 2)]),
    *(
        reduced_rank_case(shape)
        for shape in [
            (2, 2, 2, 0),
            (2, 4, 2, 0),
            (1, 2, 4, 0),
            (3, 3, 3, 1),
            (3, 2, 4, 1),
            (5, 3, 2, 1),
            (4, 2, 3, 2),
            (6, 4, 5, 3),
            (2, 2, 2, 1),
        ]
    ),
    reduced_rank_fit_case((1, 1, 1, 0)),
    reduced_rank_fit_case((2, 2, 2, 1)),
    *(reduced_rank_data_case(shape) for shape in [(3, 2, 4, 2), (4, 2, 3, 1), (3, 2, 3, 1)]),
]


def measure(seeds: Iterable[int]) -> list[dict[str, Any]]:
    """One record a case and seed."""
    about = provenance()
    return [
        {
            "family": case.family,
            "case": case.name,
            "method": case.method,
            "truth": float(case.truth[0]),
            "truth_multiplicity": case.truth[1],
            "expected": case.expected,
            "seed": seed,
            **describe(case.run(seed)),
            **about,
        }
        for seed, case in track([(seed, case) for seed in seeds for case in CASES], "estimates")
    ]


def describe(result: Estimate | TemperatureFit) -> dict[str, Any]:
    """The result without its traces."""
    if isinstance(result, TemperatureFit):
        runs = [describe(each) for each in result.estimates]
        summary = {name: value for name, value in vars(result).items() if name != "estimates"}
        return summary | {
            "r_hat": max(run["r_hat"] for run in runs),
            "ess": min(run["ess"] for run in runs),
            "seconds": sum(run["seconds"] for run in runs),
            "temperatures": runs,
        }
    return {name: value for name, value in vars(result).items() if name != "trace"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[8])
    seeds = parser.parse_args(arguments).seeds
    torch.set_num_threads(1)
    save_records(RESULTS / "records.jsonl", measure(seeds))


if __name__ == "__main__":
    main()
