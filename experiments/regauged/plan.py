"""Claim W1: fine-tuning of checkpoints that tools of deployment have moved along their gauge
orbits.

Written before the runs, but after those of a first design (``first_design.jsonl`` beside the
records), which fine-tuned on the second half of the text that the model was pretrained on: there
the lowest of nine rates, 1e-5, was best for every optimizer, so that there was nothing to learn,
and the choice lay at the edge of the grid. The text was changed, and nothing else but how often
runs are evaluated.

*Checkpoints.* A GPT of 0.12M parameters, pretrained by AdamW (rate 0.003, decay 0.1) for 2,000
steps on the first half of the training text, one a seed (``pretrain``). Four tools then move its
weights and leave its function as it is (``starts.py``, by their published formulas): SmoothQuant,
QuaRot, AWQ, and rows divided by their absolute maximum, as LLM.int8() has them before it rounds.
What these tools round to, and rotations that are computed at run time, are left out: they are no
gauges.

*Fine-tuning.* 500 steps on the second half with each letter the one 13 on in the alphabet
(:mod:`experiments.texts`), cosine schedule after a warm-up, by AdamW, by AdamW that moves the
weights to the balanced point of their orbit before the first step
(``optimizer.canonicalise=start``, the cheap rival), Muon, DDCAdam and DDCMuon. Decay 0.1, all else
at its default.

*Tuning.* Six settings each on the original checkpoint of seed 100, by the last validation loss:
rates half a decade apart, or three rates by two of vectors (``adam_lr``) where there are two. In up
to three rounds the untried neighbours of what is chosen are tried, at most two an optimizer, as
many for each (:class:`experiments.search.Search`). What is at an edge then is said to be.

*Reported.* Each optimizer at its setting, from the original and from the four re-gauged checkpoints
of seeds 0 to 4, paired by seed: the last validation loss; its *spread*, largest less smallest over
the five starts; and its *regret*, the mean over the four re-gauged starts less AdamW's loss from
the original, where AdamW was tuned.

*Retuned.* What somebody could do who knows that the checkpoint was moved: AdamW and Muon tuned as
above at each of the re-gauged checkpoints of seed 100 (``grid_smoothquant`` and so on), and
reported there. It decides no verdict, and stands beside each.

*Verdicts*, of DDCAdam against AdamW, and against AdamW balanced once, and of DDCMuon against Muon:
two effects, the spread, and the mean loss at the four re-gauged starts, paired by seed, t-tests
adjusted by Holm over all that were made. The claim holds if both are smaller with p < 0.05;
direction only: one of them, and the other not significantly larger; else it does not hold. A run
that diverges has the loss log 256.

Under the kinds of the paper, which these runs have, DDCAdam and the balanced point know neither
rotations of the residual stream (QuaRot) nor scales of values (the absolute maximum), and the
balanced point undoes no rotation: an exact spread of 0 is expected of none.

The checkpoints lie in ``RUNS/regauged/starts``, the text in ``RUNS/regauged/shifted.txt``; on a
machine without them the stage ``pretrain`` comes first, with ``starts.py`` for each of its runs, as
``make regauged`` does it.

Cost: about 300 runs of some twelve seconds on one core, an hour.
"""

from __future__ import annotations

from collections.abc import Callable

from experiments.own import loss_of
from experiments.protocols import ROOT, TUNING_SEED, Experiment, Plan
from experiments.search import Search

RESULTS = ROOT / "results/regauged"
SEEDS = range(5)
ORIGINAL = "original"
TOOLS = ("smoothquant", "quarot", "awq", "absmax")
STARTS = (ORIGINAL, *TOOLS)
ADAMW, RIVAL, MUON, DDCADAM, DDCMUON = (
    "adamw",
    "adamw optimizer.canonicalise=start",
    "muon",
    "ddcadam",
    "ddcmuon",
)
OPTIMIZERS = {
    ADAMW: "AdamW",
    RIVAL: "AdamW, balanced once",
    MUON: "Muon",
    DDCADAM: "DDCAdam",
    DDCMUON: "DDCMuon",
}
RETUNED = (ADAMW, MUON)
PRETRAINED = (
    "optimizer=adamw optimizer.lr=0.003 data.skip_tokens=0 data.train_tokens=2277000"
    " training.steps=2000"
)
#: What models are fine-tuned on, in the folder of all runs of this question.
TEXT = "shifted.txt"
FINE_TUNED = (
    f"data=file data.path={{runs}}/regauged/{TEXT} data.skip_tokens=0 training.evaluations=1"
)
_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_ONE = {"lr": _RATES}
_TWO = {"lr": (6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1, 6e-1), "adam_lr": _RATES}
_FIRST_ONE = (_RATES[1:7],)
_FIRST_TWO = ((2e-3, 6e-3, 2e-2), (3e-4, 1e-3))


def start(name: str, seed: int) -> str:
    """Overrides that begin at a checkpoint of a seed."""
    return f"start.weights={{runs}}/regauged/starts/seed{seed}/{name}"


def search(name: str, optimizers: tuple[str, ...], suffix: str) -> Search:
    """The tuning of some optimizers at a start."""
    two = (MUON, DDCMUON)
    return Search(
        axes={each: _TWO if each in two else _ONE for each in optimizers},
        first={each: _FIRST_TWO if each in two else _FIRST_ONE for each in optimizers},
        questions={"last": loss_of},
        rounds=3,
        most=2,
        shared=f"{FINE_TUNED} {start(name, TUNING_SEED)}",
        suffix=suffix,
    )


SEARCH = search(ORIGINAL, tuple(OPTIMIZERS), "")
SEARCHES = {name: search(name, RETUNED, f"_{name}") for name in TOOLS}


def at(setting: str, name: str, seed: int) -> str:
    """A setting that was chosen, at another start."""
    rates = " ".join(each for each in setting.split() if not each.startswith("start.weights="))
    return f"{rates} {start(name, seed)}"


def pretrain(runs: str | None) -> Plan:
    """One checkpoint a seed."""
    return [(PRETRAINED, seed) for seed in (TUNING_SEED, *SEEDS)]


def reported(runs: str | None) -> Plan:
    """Every optimizer at what was chosen at the original checkpoint, from all starts."""
    chosen = SEARCH.chosen(EXPERIMENT, ["last"], runs)
    return [
        (at(setting, name, seed), seed)
        for seed in SEEDS
        for name in STARTS
        for settings in chosen.values()
        for setting in settings
    ]


def retuned(runs: str | None) -> Plan:
    """AdamW and Muon at what was chosen at each re-gauged checkpoint, from there."""
    chosen = {name: each.chosen(EXPERIMENT, ["last"], runs) for name, each in SEARCHES.items()}
    return [
        (at(setting, name, seed), seed)
        for seed in SEEDS
        for name, optimizers in chosen.items()
        for settings in optimizers.values()
        for setting in settings
    ]


def stages() -> dict[str, Callable[[str | None], Plan]]:
    """All stages, in an order in which they can run."""
    found: dict[str, Callable[[str | None], Plan]] = {"pretrain": pretrain}
    found |= SEARCH.stages(lambda: EXPERIMENT)
    found |= {"reported": reported}
    for each in SEARCHES.values():
        found |= each.stages(lambda: EXPERIMENT)
    return found | {"retuned": retuned}


EXPERIMENT: Experiment = Experiment(
    overrides="+experiment=regauged",
    seeds=SEEDS,
    curve=("step", "train_loss", "validation_loss"),
    results=RESULTS,
    more=stages(),
    scripts={"pretrain": "experiments/regauged/starts.py"},
)
