"""Claim W1: fine-tuning of checkpoints that tools of deployment have moved along their gauge
orbits.

Written before the runs, but after those of a first design (``first_design.jsonl`` beside the
records), which fine-tuned on the second half of the text that the model was pretrained on: there
the lowest of nine rates, 1e-5, was best for every optimizer, for higher ones overfitted the 41 kB
that are taken of it, and the choice lay at the edge of the grid. The text was changed, and nothing
else but how often runs are evaluated.

*Checkpoints.* A GPT of 0.12M parameters (W1), or a Llama of transformers of the same sizes (W1b,
``experiments/regauged_llama``, which was added when the verdicts of W1 were known, before its own
runs), pretrained by AdamW (rate 0.003, decay 0.1) for 2,000 steps on the first half of the training
text, one a seed (``pretrain``). Four tools then move its weights and leave its function as it is
(``starts.py``, by their published formulas): SmoothQuant, QuaRot, AWQ, and rows divided by their
absolute maximum, as LLM.int8() has them before it rounds. What these tools round to, and rotations
that are computed at run time, are left out: they are no gauges.

*Fine-tuning.* 500 steps on the second half with each letter the one 13 on in the alphabet
(:mod:`experiments.texts`), or rather on its first 41 kB, 6.25 times (until after the runs of W1
this did not say so: that ``scale=cpu`` cuts the text had been overlooked), cosine schedule after a
warm-up, by AdamW, by AdamW that moves the weights to the balanced point of their orbit before the
first step (``optimizer.canonicalise=start``, the cheap rival), Muon, DDCAdam and DDCMuon. Decay
0.1, all else at its default.

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
reported there. It decides no verdict, and stands beside each. Of the GPT alone.

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
``make regauged`` does it. Those of the Llama lie in ``RUNS/regauged_llama``.

Cost: about 300 runs of some twelve seconds on one core, an hour; of the Llama 180, as long each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from experiments.own import loss_of
from experiments.protocols import ROOT, TUNING_SEED, Experiment, Plan
from experiments.search import Search

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
PRETRAINED = (
    "optimizer=adamw optimizer.lr=0.003 data.skip_tokens=0 data.train_tokens=2277000"
    " training.steps=2000"
)
#: What models are fine-tuned on, in the folder of all runs of one kind of model.
TEXT = "shifted.txt"
_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_ONE = {"lr": _RATES}
_TWO = {"lr": (6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1, 6e-1), "adam_lr": _RATES}
_FIRST_ONE = (_RATES[1:7],)
_FIRST_TWO = ((2e-3, 6e-3, 2e-2), (3e-4, 1e-3))


@dataclass(frozen=True, eq=False)
class FineTuning:
    """The runs on one kind of model.

    Attributes:
        name: of the experiment, whose ``run.yaml`` has the model.
        claim: that they test.
        model: what is fine-tuned, in a few words.
        retuned: optimizers that are tuned at each re-gauged checkpoint as well.
    """

    name: str
    claim: str
    model: str
    retuned: tuple[str, ...] = ()

    def start(self, name: str, seed: int) -> str:
        """Overrides that begin at a checkpoint of a seed."""
        return f"start.weights={{runs}}/{self.name}/starts/seed{seed}/{name}"

    def at(self, setting: str, name: str, seed: int) -> str:
        """A setting that was chosen, at another start."""
        rates = " ".join(each for each in setting.split() if not each.startswith("start.weights="))
        return f"{rates} {self.start(name, seed)}"

    def _search(self, name: str, optimizers: tuple[str, ...], suffix: str) -> Search:
        """The tuning of some optimizers at a start."""
        two = (MUON, DDCMUON)
        text = (
            f"data=file data.path={{runs}}/{self.name}/{TEXT} data.skip_tokens=0"
            " training.evaluations=1"
        )
        return Search(
            axes={each: _TWO if each in two else _ONE for each in optimizers},
            first={each: _FIRST_TWO if each in two else _FIRST_ONE for each in optimizers},
            questions={"last": loss_of},
            rounds=3,
            most=2,
            shared=f"{text} {self.start(name, TUNING_SEED)}",
            suffix=suffix,
        )

    @cached_property
    def search(self) -> Search:
        """The tuning at the original checkpoint."""
        return self._search(ORIGINAL, tuple(OPTIMIZERS), "")

    @cached_property
    def searches(self) -> dict[str, Search]:
        """The tuning at each re-gauged checkpoint."""
        tools = TOOLS if self.retuned else ()
        return {name: self._search(name, self.retuned, f"_{name}") for name in tools}

    def pretrain_plan(self, runs: str | None) -> Plan:
        """One checkpoint a seed."""
        return [(PRETRAINED, seed) for seed in (TUNING_SEED, *SEEDS)]

    def reported_plan(self, runs: str | None) -> Plan:
        """Every optimizer at what was chosen at the original checkpoint, from all starts."""
        chosen = self.search.chosen(self.experiment, ["last"], runs)
        return [
            (self.at(setting, name, seed), seed)
            for seed in SEEDS
            for name in STARTS
            for settings in chosen.values()
            for setting in settings
        ]

    def retuned_plan(self, runs: str | None) -> Plan:
        """Those that are tuned at each re-gauged checkpoint, from there."""
        chosen = {
            name: each.chosen(self.experiment, ["last"], runs)
            for name, each in self.searches.items()
        }
        return [
            (self.at(setting, name, seed), seed)
            for seed in SEEDS
            for name, optimizers in chosen.items()
            for settings in optimizers.values()
            for setting in settings
        ]

    def _stages(self) -> dict[str, Callable[[str | None], Plan]]:
        """All stages, in an order in which they can run."""
        found: dict[str, Callable[[str | None], Plan]] = {"pretrain": self.pretrain_plan}
        found |= self.search.stages(lambda: self.experiment)
        found["reported"] = self.reported_plan
        for each in self.searches.values():
            found |= each.stages(lambda: self.experiment)
        return found | ({"retuned": self.retuned_plan} if self.searches else {})

    @cached_property
    def experiment(self) -> Experiment:
        """Of the runs."""
        return Experiment(
            overrides=f"+experiment={self.name}",
            seeds=SEEDS,
            curve=("step", "train_loss", "validation_loss"),
            results=ROOT / "results" / self.name,
            more=self._stages(),
            scripts={"pretrain": "experiments/regauged/starts.py"},
        )


FINE_TUNING = FineTuning(
    "regauged", "W1", "GPT, 0.12M parameters, fine-tuned on another text", (ADAMW, MUON)
)
EXPERIMENT = FINE_TUNING.experiment
