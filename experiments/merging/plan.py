"""Claim W6: averaging two fine-tuned runs, with and without moving both to one gauge.

Written before the runs.

*Runs.* From the checkpoints of claim W1 (``experiments/regauged``), at the rates that its tuning
chose, by AdamW and by DDCAdam, seeds 0 to 4: the first run of a pair from the original checkpoint
of the seed; the second, which sees the text in another order (the seed of its run is 50 more), from
the original checkpoint, or from one that a tool has re-gauged, so that both began at the same
function.

*Average.* Of all weights, half and half: *as they are*; and *moved*: both at the balanced point of
their orbit under all kinds that are known (:func:`ddc.canonicalise_`), the values, queries and keys
of the second turned onto those of the first (:func:`ddc.gauges.align_`). The *barrier* is the
validation loss of the average less the mean of the two runs' own; below zero where averaging helps.

*Left out of the rule*, and reported: QuaRot, whose rotation of the residual stream neither the
balanced point nor the turn undoes.

*Verdicts*, for AdamW and for DDCAdam: two effects, the barrier moved less as it is, from the
original checkpoint, and on the mean of SmoothQuant, AWQ and the absolute maximum; paired by seed,
t-tests over five seeds adjusted by Holm over all four. The claim holds for an optimizer if both are
below zero with p < 0.05; direction only: one of them, and the other not significantly above zero;
else it does not hold.

*Beside*, deciding nothing (written after the runs of the pairs and before its own):
averages along one run from the original checkpoint, at the same rate, held constant after the
warm-up. Ten snapshots, one each 25 steps of the second half, are averaged evenly (SWA), and
exponentially, each next one with weight 0.3 (EMA): as they are, and after all were moved as above,
each turned onto the last.

Cost: 60 runs of some eight seconds on one core, and a few seconds a pair.
"""

from __future__ import annotations

from experiments.protocols import ROOT, Experiment, Plan
from experiments.regauged import plan as regauged

RESULTS = ROOT / "results/merging"
SEEDS = range(5)
#: The second run of a pair has the seed of the first and so much more.
ANOTHER = 50
OPTIMIZERS = {regauged.ADAMW: "AdamW", regauged.DDCADAM: "DDCAdam"}


def settings(runs: str | None) -> dict[str, str]:
    """By optimizer, what the tuning of claim W1 chose.

    Raises:
        ValueError: it has not ended.
    """
    chosen = regauged.FINE_TUNING.search.chosen(regauged.EXPERIMENT, ["last"], runs)
    return {name: chosen[name][0] for name in OPTIMIZERS}


def first(setting: str, seed: int) -> tuple[str, int]:
    """The first run of every pair of a seed."""
    return regauged.FINE_TUNING.at(setting, regauged.ORIGINAL, seed), seed


def second(setting: str, start: str, seed: int) -> tuple[str, int]:
    """The second run of a pair."""
    return regauged.FINE_TUNING.at(setting, start, seed), seed + ANOTHER


def pairs(runs: str | None) -> Plan:
    """All runs, seed by seed."""
    chosen = settings(runs).values()
    return [
        run
        for seed in SEEDS
        for setting in chosen
        for run in (
            first(setting, seed),
            *(second(setting, start, seed) for start in regauged.STARTS),
        )
    ]


EXPERIMENT: Experiment = Experiment(
    overrides="+experiment=merging",
    seeds=SEEDS,
    curve=("step", "train_loss", "validation_loss"),
    results=RESULTS,
    more={"pairs": pairs},
)
