"""Claim W2: how wide the range of learning rates is that end near the best, from well and from
badly scaled starts.

Written before the runs.

*Start.* The initialisation of the model, and two others on its gauge orbit, which compute the same:
the scale of every unit under a rescale gauge is drawn log-normal, standard deviation 1 and 2
(``start.spread``). The last evaluation is that of a run of 300 steps, in which the model sees the
first 41 kB of the text 3.75 times; cosine schedule after a warm-up of 30 steps, decay 0.1. (Until
after the runs this said 0.15 MB, once: that ``scale=cpu`` cuts the text had been overlooked.)

*Optimizers.* AdamW; AdamW that moves the weights to the balanced point of their orbit before the
first step (``optimizer.canonicalise=start``, the cheap rival); AdamW with steps of matrices of a
constant relative length; DDCAdam; Muon; Muon from the balanced point; DDCMuon. One rate each: that
of vectors (``adam_lr``) is the same under relative steps, and 1/20 under all Muons, as their
defaults are. All else is at its default. Muon from the balanced point was added when the verdicts
of all others were known, before its own runs.

*Lattice.* Seven rates each, half a decade apart: three decades. An optimizer whose loss at an end
of its lattice is within the range (below) on any seed at any start gets another rate there, on all
seeds and starts; up to two rounds (``widen_1``, ``widen_2``). Where the range reaches an end after
that, it is said to be longer than it is measured.

*Range.* The reference of an optimizer and seed is its lowest last validation loss from the standard
start. Its range at a start is the length, in decades of the rate, on which the last validation loss
is at most 1.02 times that reference, where the loss between two rates is linear in the logarithm of
the rate. Towards a rate at which the run diverged, or ends at a loss above log 256, nothing is
added: the range ends at the last good rate. So a start from which an optimizer never gets as far as
from the standard one has a range of 0.

*Verdicts*, in five comparisons (``claim.yaml``): paired differences of ranges by seed, at each of
the three starts; t-tests over five seeds, adjusted by Holm over all that were made. The claim holds
in a comparison if the range is wider with p < 0.05 at all three starts; direction only: at one or
two, and significantly narrower at none; else it does not hold. The best loss of each optimizer at
each start is reported beside: a wide range around a bad best is worth nothing.

Cost: 735 runs of some fifteen seconds on one core, three hours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ddc.report.stages import Record
from experiments.own import IGNORANT
from experiments.protocols import ROOT, Experiment, Plan

RESULTS = ROOT / "results/rate_range"
SEEDS = range(5)
SPREADS = (0, 1, 2)
ROUNDS = 2
#: What counts as near the best.
NEAR = 1.02
#: Overrides of each optimizer, but for its rates, and how many times smaller ``adam_lr`` is.
OPTIMIZERS: dict[str, tuple[str, float | None]] = {
    "AdamW": ("optimizer=adamw", None),
    "AdamW, balanced once": ("optimizer=adamw optimizer.canonicalise=start", None),
    "AdamW, relative steps": ("optimizer=adamw_relative", 1),
    "DDCAdam": ("optimizer=ddcadam", None),
    "Muon": ("optimizer=muon", 20),
    "Muon, balanced once": ("optimizer=muon optimizer.canonicalise=start", 20),
    "DDCMuon": ("optimizer=ddcmuon", 20),
}
#: The exponent, in half decades, of the lowest of the seven rates.
LOWEST = dict.fromkeys(OPTIMIZERS, -8) | {
    "AdamW, relative steps": -7,
    "Muon": -6,
    "Muon, balanced once": -6,
    "DDCMuon": -6,
}
COUNT = 7


def rate(half_decades: int) -> float:
    """Half a decade a step: 1, 3, 10 and so on."""
    decades, half = divmod(half_decades, 2)
    return float(f"{(3 if half else 1) * 10.0**decades:g}")


def setting(optimizer: str, spread: float, half_decades: int) -> str:
    """Overrides of a run."""
    overrides, ratio = OPTIMIZERS[optimizer]
    lr = rate(half_decades)
    rates = f"optimizer.lr={lr:g}" + ("" if ratio is None else f" optimizer.adam_lr={lr / ratio:g}")
    return f"{overrides} {rates} start.spread={spread:g}"


def first(optimizer: str) -> list[int]:
    """The lattice of the first round."""
    return [*range(LOWEST[optimizer], LOWEST[optimizer] + COUNT)]


def loss_of(record: Record) -> float:
    """The last validation loss; infinite where the model learnt nothing, or the run diverged."""
    if record["diverged"]:
        return math.inf
    loss = float(record["summary"]["validation_loss"])
    return loss if loss <= IGNORANT else math.inf


def losses(
    optimizer: str, lattice: list[int], seed: int, runs: str | None
) -> dict[int, dict[int, float]]:
    """The last validation loss by start and rate.

    Raises:
        ValueError: a run has not ended.
    """
    return {
        spread: {
            each: loss_of(EXPERIMENT.found(setting(optimizer, spread, each), seed, runs))
            for each in lattice
        }
        for spread in SPREADS
    }


def widened(optimizer: str, lattice: list[int], runs: str | None) -> list[int]:
    """The rates that a round adds beyond the ends of a lattice."""
    ends = {lattice[0]: lattice[0] - 1, lattice[-1]: lattice[-1] + 1}
    added = set()
    for seed in SEEDS:
        found = losses(optimizer, lattice, seed, runs)
        highest = NEAR * min(found[0].values())
        added |= {
            beyond
            for end, beyond in ends.items()
            if any(each[end] <= highest for each in found.values())
        }
    return sorted(added)


def lattices(optimizer: str, rounds: int, runs: str | None) -> Iterator[list[int]]:
    """The rates that each round adds, the first one's first."""
    lattice = first(optimizer)
    yield lattice
    for _ in range(rounds):
        added = widened(optimizer, lattice, runs)
        yield added
        lattice = sorted({*lattice, *added})


def stage(number: int, runs: str | None) -> Plan:
    """The runs of a round, seed by seed: a sweep that is cut short has whole seeds."""
    added = {name: [*lattices(name, number, runs)][-1] for name in OPTIMIZERS}
    return [
        (setting(name, spread, each), seed)
        for seed in SEEDS
        for spread in SPREADS
        for name, rates in added.items()
        for each in rates
    ]


EXPERIMENT: Experiment = Experiment(
    overrides="+experiment=rate_range",
    seeds=SEEDS,
    curve=("step", "train_loss", "validation_loss"),
    results=RESULTS,
    more={
        "grid": lambda runs: stage(0, runs),
        "widen_1": lambda runs: stage(1, runs),
        "widen_2": lambda runs: stage(2, runs),
    },
)
