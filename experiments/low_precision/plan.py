"""Claim W5: what training loses where weights are held in bfloat16 or in float8 and nothing finer
is kept, from a balanced and from an unbalanced start; and what 4-bit rounding at its end loses.

Written before the runs.

*Formats.* ``training.weights``: float32; bfloat16; float8, which is e4m3 with one scale a matrix
and vectors in bfloat16. After every step, and at the start, each weight is the nearest number of
its format (:mod:`ddc.training.formats`). All arithmetic and the state of all optimizers are in
float32: a difference is due to the weights alone, not to moments that one optimizer would keep in
bfloat16 and another would not. (A whole model in bfloat16 takes three times as long a step on a
CPU.)

*Starts.* The initialisation of the model, and another on its gauge orbit that computes the same:
scales of units under rescale gauges drawn log-normal, standard deviation 1 (``start.spread``).
300 steps, in which the model sees the first 41 kB of the text 3.75 times; cosine schedule after a
warm-up of 30, decay 0.1. (Until after the runs this said 0.15 MB, once: that ``scale=cpu`` cuts the
text had been overlooked.)

*Optimizers.* AdamW; AdamW that moves the weights to the balanced point of their orbit before the
first step (``optimizer.canonicalise=start``, the cheap rival); DDCAdam; Muon; DDCMuon. One rate
each: that of vectors (``adam_lr``) is 1/20 under both Muons, as their defaults are. All else is at
its default.

*Tuning*, in each format anew, for a step that is shorter than half the distance of two numbers is
lost and the best rate may be larger: five rates each, half a decade apart, on seed 100 from the
standard start, by the last validation loss. In up to two rounds the next rate is tried where a
choice is at an end, as many for each (:class:`experiments.search.Search`). What is at an end then
is said to be.

*Loss of precision.* The last validation loss in a format less that in float32 of the same
optimizer, start and seed, each at the rate of its own format, on seeds 0 to 4. A run that diverges,
or ends above it, has the loss log 256 of a model that knows nothing.

*Verdicts*, of DDCAdam against AdamW, and against AdamW balanced once, and of DDCMuon against Muon:
two effects, the loss of precision in bfloat16 and that in float8, mean over the two starts, paired
by seed, t-tests over five seeds adjusted by Holm over all six. The claim holds if both are smaller
with p < 0.05; direction only: one of them, and the other not significantly larger; else it does not
hold. An optimizer that is bad in float32 has little to lose: differences of the last losses
themselves stand beside each verdict.

*Reported beside, deciding nothing* (``measure.py``): of the float32 runs at their end, the kurtosis
of activations, and the validation loss after 4-bit rounding to nearest of all matrices less that
before it; both as trained, and after the weights were moved to the balanced point of their orbit,
which is what anybody can do to the weights of any optimizer.

Cost: 75 runs of tuning, 30 more at most, and 150 that are reported, of seven to ten seconds on one
core that is free: 35 minutes; some three seconds for each of 50 checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

from experiments.protocols import ROOT, Experiment, Plan
from experiments.search import Search, last_loss

RESULTS = ROOT / "results/low_precision"
SEEDS = range(5)
SPREADS = (0, 1)
FLOAT32 = "float32"
#: With fewer bits than the reference.
FORMATS = ("bfloat16", "float8")
ADAMW, RIVAL, DDCADAM, MUON, DDCMUON = (
    "adamw",
    "adamw optimizer.canonicalise=start",
    "ddcadam",
    "muon",
    "ddcmuon",
)
OPTIMIZERS = {
    ADAMW: "AdamW",
    RIVAL: "AdamW, balanced once",
    DDCADAM: "DDCAdam",
    MUON: "Muon",
    DDCMUON: "DDCMuon",
}
_MUONS = (MUON, DDCMUON)
_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


def search(weights: str) -> Search:
    """The tuning of all optimizers in a format."""
    is_reference = weights == FLOAT32
    return Search(
        axes={each: {"lr": _RATES} for each in OPTIMIZERS},
        first={each: (_RATES[3:8] if each in _MUONS else _RATES[2:7],) for each in OPTIMIZERS},
        questions={"last": last_loss},
        rounds=2,
        most=1,
        shared="" if is_reference else f"training.weights={weights}",
        suffix="" if is_reference else f"_{weights}",
        tied={each: {"adam_lr": 0.05} for each in _MUONS},
    )


SEARCHES = {each: search(each) for each in (FLOAT32, *FORMATS)}


def at(setting: str, spread: float) -> str:
    """A setting that was chosen, at a start."""
    return f"{setting} start.spread={spread:g}" if spread else setting


def reported(runs: str | None, formats: tuple[str, ...] = tuple(SEARCHES)) -> Plan:
    """Every optimizer in every format at what was chosen for both, from both starts."""
    chosen = [SEARCHES[each].chosen(EXPERIMENT, ["last"], runs) for each in formats]
    return [
        (at(setting, spread), seed)
        for seed in SEEDS
        for spread in SPREADS
        for found in chosen
        for settings in found.values()
        for setting in settings
    ]


def stages() -> dict[str, Callable[[str | None], Plan]]:
    """All stages, in an order in which they can run."""
    found: dict[str, Callable[[str | None], Plan]] = {}
    for each in SEARCHES.values():
        found |= each.stages(lambda: EXPERIMENT)
    return found | {"reported": reported}


EXPERIMENT: Experiment = Experiment(
    overrides="+experiment=low_precision",
    seeds=SEEDS,
    curve=("step", "train_loss", "validation_loss"),
    results=RESULTS,
    more=stages(),
)
