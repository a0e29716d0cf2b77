"""Claim C5: which optimizers make a deep network grok. ``python -m experiments.grokking plan STAGE`` lists the runs.

Fixed before the runs: a run groks if its validation accuracy is at least 0.95 at some evaluation within the 2,000
steps of ``+experiment=grok_mlp``. (Task, size and the rate of DDCMuon come from pilot runs on other seeds.) Two
protocols compare the optimizers on seeds 0 to 10:

- *matched*: Muon and DDCMuon at one rate for all parameters, AdamW and DDCAdam at one rate, no decay;
- *tuned*: each optimizer at the best of twelve settings of rate, decay and schedule (``tuning``), chosen on seeds 100
  to 102 by the number of runs that grok, then by the mean of their best validation accuracies.
"""

from __future__ import annotations

import argparse
import itertools

SEEDS = range(11)
TUNING_SEEDS = (100, 101, 102)
FEW_SEEDS = range(3)
DEPTHS = (4, 8, 12, 36)
SCHEDULES = ("wsd", "cosine")
#: Rates and decays of the tuning grid. Decay acts as rate × decay × steps, so Adam's smaller rates get larger decays.
GRID = {
    "ddcmuon": ((0.005, 0.01, 0.02), (0.0, 0.3)),
    "muon": ((0.005, 0.01, 0.02), (0.0, 0.3)),
    "ddcadam": ((3e-4, 1e-3, 3e-3), (0.0, 3.0)),
    "adamw": ((3e-4, 1e-3, 3e-3), (0.0, 3.0)),
}
MATCHED_RATE = {"ddcmuon": 0.02, "muon": 0.02, "ddcadam": 1e-3, "adamw": 1e-3}
#: What is taken away from, or changed in, DDCMuon's matched runs.
ABLATIONS = {
    "no dressing": "gauges.relu_rescale=false gauges.chained_rescale=true",
    "no gauges": "gauges=none",
    "radial rate 0": "optimizer.radial_rate=0",
    "vertical: adam": "optimizer.vertical=adam",
    "vertical: balance": "optimizer.vertical=balance",
    "decay 0.3": "optimizer.weight_decay=0.3",
}


def settings(optimizer: str, rate: float, decay: float, schedule: str = "wsd") -> str:
    """Overrides of one setting; a Muon has the one rate for all its parameters."""
    parts = [f"optimizer={optimizer}", f"optimizer.lr={rate:g}", f"optimizer.weight_decay={decay:g}"]
    if optimizer.endswith("muon"):
        parts.append(f"optimizer.adam_lr={rate:g}")
    final = 0.0 if schedule == "wsd" else 0.01
    return " ".join([*parts, f"training.schedule={schedule}", f"training.final_lr={final:g}"])


def plan(stage: str) -> list[str]:
    """The runs of a stage, as overrides of ``train.py``.

    Raises:
        ValueError: an unknown stage.
    """
    match stage:
        case "matched":
            lines = [
                f"{settings(optimizer, rate, 0.0)} seed={seed}"
                for seed, (optimizer, rate) in itertools.product(SEEDS, MATCHED_RATE.items())
            ]
        case "tuning":
            lines = [
                f"{settings(optimizer, rate, decay, schedule)} seed={seed}"
                for seed in TUNING_SEEDS
                for optimizer, (rates, decays) in GRID.items()
                for rate, decay, schedule in itertools.product(rates, decays, SCHEDULES)
            ]
        case "depth":
            lines = [
                f"{settings(optimizer, MATCHED_RATE[optimizer], 0.0)} model.depth={depth} seed={seed}"
                for depth, seed, optimizer in itertools.product(DEPTHS, FEW_SEEDS, ("ddcmuon", "muon"))
            ]
        case "ablations":
            lines = [
                f"{settings('ddcmuon', MATCHED_RATE['ddcmuon'], 0.0)} {change} seed={seed}"
                for seed, change in itertools.product(FEW_SEEDS, ABLATIONS.values())
            ]
        case _:
            raise ValueError(f"Invalid stage={stage!r}: expected matched, tuning, depth or ablations")
    return [f"+experiment=grok_mlp wandb=disabled {line}" for line in lines]


def main() -> None:
    """Print the runs of a stage, for scripts/sweep.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["plan"])
    parser.add_argument("stage", choices=["matched", "tuning", "depth", "ablations"])
    print("\n".join(plan(parser.parse_args().stage)))


if __name__ == "__main__":
    main()
