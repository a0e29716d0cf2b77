"""Claim C5 under longer budgets, with Muon tuned until its choice is interior.

Written before the runs. In ``+experiment=grok_mlp`` Muon's chosen setting was the corner of its
grid, and 2,000 steps cut it off (a pilot of 4,000 steps on seed 3 groks at step 2,700). Here:

- Budgets of 2,000, 4,000 and 8,000 steps, each a run of its own: the rate is constant after the
  warm-up and falls linearly to zero over the last half. One long run at a constant rate, read at
  three places, would not do: in a pilot DDCMuon at rate 0.02, seed 100, stayed at validation
  accuracies of 0.82 to 0.91 from step 1,000 to 3,000, where the falling rate takes it past 0.95.
- For each budget and optimizer a search on seed 100 over Muon's rate, the rate of embedding and
  readout, and decay: eight settings each, then up to two rounds of at most four more, as many for
  each (:class:`experiments.search.Search`). It chooses by the step of the first evaluation with a
  validation accuracy of at least 0.95; a run that has none is worse than any that has, and the
  better the larger its best accuracy. Muon's grid holds the decays between 0.3 and 1.
- ``reported``: what is chosen, seeds 0 to 10. ``no_gauges``: DDCMuon's choices with
  ``gauges=none``. ``frozen``: both choices at 8,000 steps with embedding and readout held at their
  initialisation (``adam_lr=1e-12``), the control that arXiv:2608.07436 asks for.
- Times to grok are compared as survival curves by a log-rank test (a run that never groks is
  censored at the budget), counts by Fisher's exact test; both adjusted by Holm over the rows of the
  claim.

Cost, measured on one core that nothing else used: 20 ms a step of Muon, and of DDCMuon without
gauges, 27 ms of DDCMuon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ddc.report.stages import Record
from experiments.grok_mlp.plan import CURVE, best_accuracy, step_of
from experiments.protocols import ROOT, Experiment, Plan, product
from experiments.search import Search

RESULTS = ROOT / "results/grok_long"
SEEDS = range(11)
BUDGETS = (2000, 4000, 8000)
MUON, DDCMUON = "muon", "ddcmuon"
FROZEN = "optimizer.adam_lr=1e-12"

_AXES = {
    "lr": (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    "adam_lr": (0.001, 0.003, 0.01, 0.02, 0.04),
    "weight_decay": (0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5),
}


def time_to_grok(record: Record) -> float:
    """The step of grokking; of a run that does not grok one that is later than any, and later the
    less accurate it is.
    """
    step = step_of(record)
    if step is not None:
        return float(step)
    return float(record["config"]["training"]["steps"]) * (3 - best_accuracy(record))


def search(steps: int) -> Search:
    """The search under a budget."""
    return Search(
        axes={MUON: _AXES, DDCMUON: _AXES},
        first={
            MUON: ((0.01, 0.02), (0.02,), (0.3, 0.5, 0.7, 1.0)),
            DDCMUON: ((0.01, 0.02), (0.02,), (0.0, 0.1, 0.3, 0.5)),
        },
        questions={"groks": time_to_grok},
        rounds=2,
        most=4,
        shared=f"training.steps={steps}",
        suffix=f"_{steps}",
    )


SEARCHES = {steps: search(steps) for steps in BUDGETS}


def chosen(steps: int, optimizer: str, runs: str | None) -> str:
    """The setting that the search under a budget chooses."""
    (setting,) = SEARCHES[steps].chosen(EXPERIMENT, ["groks"], runs)[optimizer]
    return setting


def reported(steps: int, runs: str | None) -> Plan:
    """Both optimizers at their choices."""
    return product([chosen(steps, name, runs) for name in (MUON, DDCMUON)], SEEDS)


def no_gauges(steps: int, runs: str | None) -> Plan:
    """DDCMuon at its choice, told of no gauge."""
    return product([f"{chosen(steps, DDCMUON, runs)} gauges=none"], SEEDS)


def frozen(runs: str | None) -> Plan:
    """Both at their choices of the longest budget, with embedding and readout held still."""
    settings = [chosen(BUDGETS[-1], name, runs) for name in (MUON, DDCMUON)]
    held = [
        " ".join(part for part in each.split() if not part.startswith("optimizer.adam_lr="))
        for each in settings
    ]
    return product([f"{each} {FROZEN}" for each in held], SEEDS)


def stages(steps: int) -> dict[str, Callable[[str | None], Plan]]:
    """The stages of a budget."""
    return {
        **SEARCHES[steps].stages(lambda: EXPERIMENT),
        f"reported_{steps}": functools.partial(reported, steps),
        f"no_gauges_{steps}": functools.partial(no_gauges, steps),
    }


EXPERIMENT: Experiment = Experiment(
    overrides="+experiment=grok_long",
    seeds=SEEDS,
    curve=CURVE,
    results=RESULTS,
    more={name: plan for steps in BUDGETS for name, plan in stages(steps).items()}
    | {"frozen": frozen},
)
