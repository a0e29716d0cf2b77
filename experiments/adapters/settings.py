"""Claim W4: adapters that go on from weights whose two factors were scaled against each other.

Written before the runs.

*Model.* A Llama of transformers of 0.13M parameters (2 layers, width 64), pretrained by AdamW on
the first half of the embedded text, one a seed. Adapters of peft on all seven linear maps of a
layer (LoRA; its scale α / r is 2 at every rank) then learn the second half with each letter the one
13 on in the alphabet, which is another text of the same kind; none in another language is at hand.
100 steps of 8 × 64 bytes, decay 0, cosine schedule after a warm-up of a tenth, the moments' decay
(0.9, 0.999). The last validation loss is of that text.

*Cases.* Ranks 2, 8 and 32, each from adapters that somebody has trained a little: 20 steps by AdamW
at rate 0.001, so that B is not zero and both factors have a scale. And rank 8 from LoRA's own
start, B = 0, where moves change A alone (``cold``).

*Starts.* Those adapters (``standard``); A times c and B over c, with c 1/30, 1/5, 5 and 30; and A
-> G A, B -> B G⁻¹ with a random G of condition number 100 for each adapter. All six compute the
same function.

*Optimizers.* AdamW; AdamW from the balanced point of the orbit (:func:`ddc.canonicalise_`: it makes
A Aᵀ = Bᵀ B, and leaves adapters whose B is zero as they are, so that the cold case does without);
LoRA+ (Hayou et al., arXiv:2402.12354: AdamW whose rate for B is so many times that for A);
LoRA-RITE (:mod:`experiments.adapters.rite`); DDCAdam under ``factor_map``.

*Tuning*, in each case, at the standard start of seed 100, by the last validation loss: six settings
each, rates half a decade apart, or three rates by two ratios for LoRA+; in up to three rounds the
untried neighbours of what is chosen, at most two each, as many for each
(:class:`experiments.search.Search`). What is at an edge then is said to be.

*Reported.* Each optimizer at its setting from all six starts, seeds 0 to 4: the last validation
loss (of a run that diverges, or ends above it, log 256); its *spread*, largest less smallest over
the starts; its mean over the five moved starts. A spread below 0.001 nats counts as 0.001: rounding
in float32 makes such differences, and they are worth nothing.

*Retuned.* At rank 8 AdamW is tuned as above at each moved start too, and reported there. That
decides nothing and stands beside each verdict.

*Verdicts*, at rank 8, of DDCAdam against each of the four: two effects, the spread and the mean
over moved starts, paired by seed, t-tests adjusted by Holm over all eight. The claim holds if both
are smaller with p < 0.05; direction only: one of them, and the other not significantly larger; else
it does not hold. LoRA-RITE is invariant as well: against it *holds* is out of reach, and the mean
is the question; at rank 32 its inverses of badly conditioned factors feel the rounding of float32
(0.03 nats between two starts of the tuning seed, DDCAdam 0.0001). The other cases are shown
beside, unadjusted.

Cost: some 850 runs of three seconds on one core, six bases of twenty, 45 minutes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from ddc.report.stages import Record
from experiments.own import IGNORANT
from experiments.protocols import ROOT, TUNING_SEED
from experiments.search import Point, Search

RESULTS = ROOT / "results/adapters"
SEEDS = range(5)
CONTEXT, BATCH = 64, 8
STEPS, WARMUP, BETAS = 100, 0.1, (0.9, 0.999)
#: A spread in nats that counts as none.
RESOLUTION = 1e-3

STANDARD, GENERAL, CONDITION = "standard", "general", 100.0
SCALES = {"1/30": 1 / 30, "1/5": 1 / 5, "5": 5.0, "30": 30.0}
MOVED = (*SCALES, GENERAL)
STARTS = (STANDARD, *MOVED)

ADAMW, RIVAL, LORA_PLUS, RITE, DDCADAM = "adamw", "balanced", "lora_plus", "rite", "ddcadam"
OPTIMIZERS = {
    ADAMW: "AdamW",
    RIVAL: "AdamW, balanced once",
    LORA_PLUS: "LoRA+",
    RITE: "LoRA-RITE",
    DDCADAM: "DDCAdam",
}


@dataclass(frozen=True)
class Case:
    """Adapters of one rank.

    Attributes:
        name: of it, and of the file of its records.
        rank: r.
        warm: they have been trained a little before; else B = 0.
        retuned: AdamW is tuned at the moved starts too.
    """

    name: str
    rank: int
    warm: bool = True
    retuned: bool = False

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Those that are compared; without the balanced point where there is none."""
        return tuple(name for name in OPTIMIZERS if self.warm or name != RIVAL)


MAIN = "rank8"
CASES = {
    case.name: case
    for case in (
        Case(MAIN, 8, retuned=True),
        Case("rank2", 2),
        Case("rank32", 32),
        Case("rank8_cold", 8, warm=False),
    )
}


@dataclass(frozen=True)
class Run:
    """One training of adapters; ``setting`` has the values of the optimizer's axes."""

    case: str
    optimizer: str
    start: str
    seed: int
    setting: tuple[float, ...]

    @classmethod
    def of(cls, record: Record) -> Run:
        """That a record is of."""
        case, optimizer, start = (str(record[key]) for key in ("case", "optimizer", "start"))
        setting = tuple(record["setting"].values())
        return cls(case, optimizer, start, int(record["seed"]), setting)

    @property
    def about(self) -> dict[str, Any]:
        """What its record says of it."""
        return asdict(self) | {
            "setting": dict(zip(AXES[self.optimizer], self.setting, strict=True))
        }


#: The records of runs that have ended.
Ended = Mapping[Run, Record]


def last_loss(record: Record) -> float:
    """The last validation loss, at most that of a model that knows nothing."""
    return IGNORANT if record["diverged"] else min(IGNORANT, float(record["loss"]))


_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
_ONE, _FIRST = {"lr": _RATES}, (_RATES[3:9],)
AXES: Mapping[str, Mapping[str, Sequence[float]]] = {
    name: {"lr": _RATES, "ratio": (1.0, 4.0, 16.0, 64.0)} if name == LORA_PLUS else _ONE
    for name in OPTIMIZERS
}


@cache
def search(names: tuple[str, ...]) -> Search:
    """The tuning of some optimizers."""
    return Search(
        axes={name: AXES[name] for name in names},
        first={
            name: ((1e-3, 3e-3, 1e-2), (4.0, 16.0)) if name == LORA_PLUS else _FIRST
            for name in names
        },
        questions={"last": last_loss},
        rounds=3,
        most=2,
    )


@dataclass(frozen=True)
class Tuning:
    """The search of some optimizers at a start of a case."""

    case: Case
    start: str
    optimizers: tuple[str, ...]

    @property
    def search(self) -> Search:
        """Its grids."""
        return search(self.optimizers)

    def run(self, name: str, point: Point) -> Run:
        """Of a point."""
        axes = AXES[name].values()
        setting = tuple(axis[i] for axis, i in zip(axes, point, strict=True))
        return Run(self.case.name, name, self.start, TUNING_SEED, setting)

    def tried(self, ended: Ended) -> tuple[dict[str, dict[Point, Record]], list[Run]]:
        """What each optimizer has tried in the rounds that are complete, and the runs that the next
        one lacks; none at the end.
        """
        lattice = self.search
        found: dict[str, dict[Point, Record]] = {name: {} for name in self.optimizers}
        points = {name: lattice.grid(name) for name in self.optimizers}
        for number in range(lattice.rounds + 1):
            runs = {(name, p): self.run(name, p) for name, each in points.items() for p in each}
            if missing := [run for run in runs.values() if run not in ended]:
                return found, missing
            for (name, point), run in runs.items():
                found[name][point] = ended[run]
            if number < lattice.rounds:
                points = lattice.widened(found)
        return found, []

    def chosen(self, ended: Ended) -> dict[str, tuple[float, ...]]:
        """The best setting of each, once the search has ended."""
        found, missing = self.tried(ended)
        if missing:
            return {}
        return {
            name: self.run(name, self.search.choices(each)["last"]).setting
            for name, each in found.items()
            if self.search.choices(each)
        }

    def open_sides(self, ended: Ended) -> list[str]:
        """The optimizers whose choice is not interior."""
        found, _ = self.tried(ended)
        return [
            name
            for name, each in found.items()
            for point in self.search.choices(each).values()
            if self.search.open_sides(name, point, each)
        ]


def tuning(case: Case) -> Tuning:
    """The one that is reported."""
    return Tuning(case, STANDARD, case.optimizers)


def retunings(case: Case) -> list[Tuning]:
    """AdamW's at moved starts."""
    return [Tuning(case, start, (ADAMW,)) for start in MOVED] if case.retuned else []


def reported(case: Case, ended: Ended) -> list[Run]:
    """All runs at chosen settings; none before the tuning has ended."""
    chosen = tuning(case).chosen(ended)
    return [
        Run(case.name, name, start, seed, setting)
        for seed in SEEDS
        for start in STARTS
        for name, setting in chosen.items()
    ]


def retuned(case: Case, ended: Ended) -> list[Run]:
    """AdamW's runs where it was tuned anew."""
    chosen = {each.start: each.chosen(ended) for each in retunings(case)}
    return [
        Run(case.name, name, start, seed, setting)
        for seed in SEEDS
        for start, settings in chosen.items()
        for name, setting in settings.items()
    ]


def missing(case: Case, ended: Ended) -> list[Run]:
    """The runs that can be made next, in order; none when the case is complete."""
    for step in (
        lambda: tuning(case).tried(ended)[1],
        lambda: reported(case, ended),
        lambda: [run for each in retunings(case) for run in each.tried(ended)[1]],
        lambda: retuned(case, ended),
    ):
        if found := [run for run in dict.fromkeys(step()) if run not in ended]:
            return found
    return []


def by_run(records: Iterable[Record]) -> dict[Run, Record]:
    """Records by what they are of."""
    return {Run.of(record): record for record in records}


def spread(losses: Mapping[str, float]) -> float:
    """Largest less smallest over the starts, and at least :data:`RESOLUTION`."""
    seen = [losses[start] for start in STARTS]
    return max(RESOLUTION, max(seen) - min(seen))


def mean_moved(losses: Mapping[str, float]) -> float:
    """Mean over the moved starts."""
    return statistics.mean(losses[start] for start in MOVED)


EFFECTS = {"spread": spread, "mean at moved starts": mean_moved}
