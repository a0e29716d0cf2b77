"""Claim C5: which optimizers make a deep network grok.

Fixed before the runs: a run groks if its validation accuracy is at least 0.95 at some evaluation
within the 2,000 steps of ``+experiment=grok_mlp``. Two protocols compare the optimizers on seeds 0
to 10:

- *matched*: Muon and DDCMuon at the same rates, AdamW and DDCAdam at the same rate, no decay;
- *tuned*: each optimizer at the best of its 12 settings of rates, decay and schedule. All 12 run on
  seed 100 (``tuning``), the best two go on to seeds 101 and 102 (``finals``), the best of these is
  taken: by the number of runs that grok, then by the mean of their best validation accuracies.

Task, size, the range of the grid and the matched rates come from pilot runs, not recorded, of
DDCMuon and Muon on seeds 100, 200 and 201: they make a regime in which DDCMuon groks. Ablations
change one thing in DDCMuon's matched setting; the depth curves take the tuned settings, which were
chosen at depth 24, to the other depths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from ddc.report.stages import Record
from experiments.protocols import ROOT, Experiment, Plan, product

RESULTS = ROOT / "results/grok_mlp"
#: Keys of the evaluations that a record keeps.
CURVE = ("step", "train_loss", "validation_loss", "train_accuracy", "validation_accuracy")
#: A run groks if its validation accuracy is at least this at some evaluation.
GROKS = 0.95
SEEDS, FEW_SEEDS = range(11), range(3)
DEPTHS = (4, 8, 12, 36)
SCHEDULES = ("wsd", "cosine")
#: A Muon has two rates, of hidden matrices and of the rest; an Adam has one.
Rates = tuple[float, ...]
MUON_RATES: list[Rates] = [(0.01, 0.003), (0.01, 0.02), (0.02, 0.02)]
ADAM_RATES: list[Rates] = [(3e-4,), (1e-3,), (3e-3,)]
#: Rates and decays of the tuning grid. Decay acts as rate × decay × steps, so Adam's smaller rates
#: get larger decays.
GRID: dict[str, tuple[list[Rates], tuple[float, float]]] = {
    "ddcmuon": (MUON_RATES, (0.0, 0.3)),
    "muon": (MUON_RATES, (0.0, 0.3)),
    "ddcadam": (ADAM_RATES, (0.0, 3.0)),
    "adamw": (ADAM_RATES, (0.0, 3.0)),
}
MATCHED: dict[str, Rates] = {
    "ddcmuon": (0.02, 0.02),
    "muon": (0.02, 0.02),
    "ddcadam": (1e-3,),
    "adamw": (1e-3,),
}
#: What is taken away from, or changed in, DDCMuon's matched runs.
ABLATIONS = (
    # no dressing: one scale a layer is all that is known
    "gauges.relu_rescale=false gauges.chained_rescale=true",
    "gauges=none",
    "optimizer.radial_rate=0",
    "optimizer.vertical=adam",
    "optimizer.vertical=balance",
    "optimizer.weight_decay=0.3",
    "optimizer.adam_lr=0.003",
)


def setting(optimizer: str, rates: Rates, decay: float = 0.0, schedule: str = "wsd") -> str:
    """Overrides of one setting."""
    keys = ("lr", "adam_lr")[: len(rates)]
    parts = [
        f"optimizer={optimizer}",
        *(f"optimizer.{k}={rate:g}" for k, rate in zip(keys, rates, strict=True)),
    ]
    final = 0.0 if schedule == "wsd" else 0.01
    parts += [
        f"optimizer.weight_decay={decay:g}",
        f"training.schedule={schedule}",
        f"training.final_lr={final:g}",
    ]
    return " ".join(parts)


def grid(optimizer: str) -> list[str]:
    """The 12 settings of an optimizer."""
    rates, decays = GRID[optimizer]
    return [setting(optimizer, *choice) for choice in itertools.product(rates, decays, SCHEDULES)]


def best_accuracy(record: Record) -> float:
    """The largest validation accuracy of a run; 0 for one that diverged before it was evaluated."""
    return float(max(record["curve"]["validation_accuracy"], default=0.0))


def step_of(record: Record, level: float = GROKS) -> int | None:
    """The first evaluation with at least this validation accuracy."""
    curve = record["curve"]
    pairs = zip(curve["step"], curve["validation_accuracy"], strict=True)
    return next((step for step, accuracy in pairs if accuracy >= level), None)


def grokked(records: Iterable[Record], level: float = GROKS) -> int:
    """How many of the runs reach a validation accuracy."""
    return sum(step_of(record, level) is not None for record in records)


def score(records: Sequence[Record]) -> tuple[int, float]:
    """The number of runs that grok, then the sum of the best validation accuracies."""
    accuracies = [best_accuracy(record) for record in records]
    return sum(accuracy >= GROKS for accuracy in accuracies), sum(accuracies)


def ablations(runs: str | None) -> Plan:
    """One change each to DDCMuon's matched setting."""
    base = setting("ddcmuon", MATCHED["ddcmuon"])
    return product([f"{base} {change}" for change in ABLATIONS], FEW_SEEDS)


def depths(runs: str | None) -> Plan:
    """The tuned settings of both Muons at other depths."""
    both = [EXPERIMENT.tuned(optimizer, runs) for optimizer in ("ddcmuon", "muon")]
    return product([f"{each} model.depth={depth}" for depth in DEPTHS for each in both], FEW_SEEDS)


EXPERIMENT = Experiment(
    overrides="+experiment=grok_mlp",
    seeds=SEEDS,
    matched=[setting(*each) for each in MATCHED.items()],
    grid={optimizer: grid(optimizer) for optimizer in GRID},
    score=score,
    curve=CURVE,
    results=RESULTS,
    more={"ablations": ablations, "depth": depths},
)
