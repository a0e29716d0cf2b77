"""Claim W8: whether DDCMuon ends lower than Muon where both are tuned.

Written before the runs. W2 gave rise to it: there DDCMuon's best loss was the lowest of all, but of
its two rates and its decay one number was tried, and the others followed from it or stood at their
default. This asks it on runs of 1,000 steps, of the same model, which sees 41 kB of text 12.5
times. (Until its tuning was done, and before any reported run was looked at, this said 0.5 MB, seen
once: that ``scale=cpu`` cuts the text had been overlooked. No run was made anew.)

*Optimizers.* Muon; Muon from the balanced point of the orbit; DDCMuon; and DDCMuon that is told of
no gauge, whose steps are relative to the size of a matrix as DDCMuon's are: the difference of the
last two is the gauge.

*Tuning.* On seed 100, by the last validation loss: the rate of hidden matrices (``lr``), that of
all else (``adam_lr``), and the decay, half a decade a step. Twelve settings each; in up to three
rounds the untried neighbours of what is chosen, at most two an optimizer, as many for each
(:class:`experiments.search.Search`). What is at an edge then is said to be.

*Reported.* Each at its setting on seeds 0 to 4: the last validation loss, which for a run that
diverges, or ends higher, is log 256.

*Verdicts*, of DDCMuon against each of the others: the difference of the last validation loss,
paired by seed, t-tests adjusted by Holm over the three. The claim holds if it is below zero with p
< 0.05; else it does not.

Cost: some 92 runs of half a minute on one core, 50 minutes.
"""

from __future__ import annotations

from collections.abc import Callable

from experiments.own import loss_of
from experiments.protocols import ROOT, Experiment, Plan, product
from experiments.search import Search

RESULTS = ROOT / "results/tuned_muon"
SEEDS = range(5)
MUON, RIVAL, WITHOUT, DDCMUON = (
    "muon",
    "muon optimizer.canonicalise=start",
    "ddcmuon gauges=none",
    "ddcmuon",
)
OPTIMIZERS = {
    MUON: "Muon",
    RIVAL: "Muon, balanced once",
    WITHOUT: "DDCMuon without gauges",
    DDCMUON: "DDCMuon",
}
_AXES = {
    "lr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "adam_lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "weight_decay": (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
}
SEARCH = Search(
    axes=dict.fromkeys(OPTIMIZERS, _AXES),
    first=dict.fromkeys(OPTIMIZERS, ((1e-2, 3e-2, 1e-1), (3e-3, 1e-2), (0.1, 0.3))),
    questions={"last": loss_of},
    rounds=3,
    most=2,
)


def reported(runs: str | None) -> Plan:
    """Every optimizer at what was chosen."""
    chosen = SEARCH.chosen(EXPERIMENT, ["last"], runs)
    return product([each for settings in chosen.values() for each in settings], SEEDS)


_MORE: dict[str, Callable[[str | None], Plan]] = SEARCH.stages(lambda: EXPERIMENT)
EXPERIMENT: Experiment = Experiment(
    overrides="+experiment=tuned_muon",
    seeds=SEEDS,
    curve=("step", "train_loss", "validation_loss"),
    results=RESULTS,
    more={**_MORE, "reported": reported},
)
