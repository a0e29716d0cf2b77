"""Claim C5: which optimizers make a deep network grok (``make grok``).

python -m experiments.grokking plan STAGE      # the runs of a stage, for scripts/sweep.py
python -m experiments.grokking collect         # the records of all runs into results/grokking/runs.jsonl
python -m experiments.grokking report          # table and figures from there

Fixed before the runs: a run groks if its validation accuracy is at least 0.95 at some evaluation within the 2,000
steps of ``+experiment=grok_mlp``. Two protocols compare the optimizers on seeds 0 to 10:

- *matched*: Muon and DDCMuon at the same rates, AdamW and DDCAdam at the same rate, no decay;
- *tuned*: each optimizer at the best of its 12 settings of rates, decay and schedule. All 12 run on seed 100
  (``tuning``), the best two go on to seeds 101 and 102 (``finals``), the best of these is taken: by the number of
  runs that grok, then by the mean of their best validation accuracies.

Task, size, the range of the grid and the matched rates come from pilot runs, not recorded, of DDCMuon and Muon on
seeds 100, 200 and 201: they make a regime in which DDCMuon groks. Ablations change one thing in DDCMuon's matched
setting; the depth curves take the tuned settings, which were chosen at depth 24, to the other depths.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from ddc.report.grokking import CURVE, GROKS, best_accuracy, markdown, plot_accuracy, plot_depth
from ddc.report.runs import Run, read_lines
from ddc.training.sweep import SweepRun, parse_sweep, shown
from experiments.output import save_records, save_table

STAGES = ("matched", "tuning", "finals", "tuned", "ablations", "depth")
SEEDS, TUNING_SEED, FINAL_SEEDS, FEW_SEEDS = range(11), 100, (101, 102), range(3)
FINALISTS = 2
DEPTHS = (4, 8, 12, 36)
SCHEDULES = ("wsd", "cosine")
#: A Muon has two rates, of hidden matrices and of the rest; an Adam has one.
Rates = tuple[float, ...]
MUON_RATES: list[Rates] = [(0.01, 0.003), (0.01, 0.02), (0.02, 0.02)]
ADAM_RATES: list[Rates] = [(3e-4,), (1e-3,), (3e-3,)]
#: Rates and decays of the tuning grid. Decay acts as rate × decay × steps, so Adam's smaller rates get larger decays.
GRID: dict[str, tuple[list[Rates], tuple[float, float]]] = {
    "ddcmuon": (MUON_RATES, (0.0, 0.3)),
    "muon": (MUON_RATES, (0.0, 0.3)),
    "ddcadam": (ADAM_RATES, (0.0, 3.0)),
    "adamw": (ADAM_RATES, (0.0, 3.0)),
}
MATCHED: dict[str, Rates] = {"ddcmuon": (0.02, 0.02), "muon": (0.02, 0.02), "ddcadam": (1e-3,), "adamw": (1e-3,)}
#: What is taken away from, or changed in, DDCMuon's matched runs.
ABLATIONS = (
    "gauges.relu_rescale=false gauges.chained_rescale=true",  # no dressing: one scale a layer is all that is known
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
    parts = [f"optimizer={optimizer}", *(f"optimizer.{k}={rate:g}" for k, rate in zip(keys, rates, strict=True))]
    final = 0.0 if schedule == "wsd" else 0.01
    parts += [f"optimizer.weight_decay={decay:g}", f"training.schedule={schedule}", f"training.final_lr={final:g}"]
    return " ".join(parts)


def grid(optimizer: str) -> list[str]:
    """The 12 settings of an optimizer."""
    rates, decays = GRID[optimizer]
    return [setting(optimizer, *choice) for choice in itertools.product(rates, decays, SCHEDULES)]


def best(settings: Sequence[str], seeds: Sequence[int], runs: str) -> list[str]:
    """Settings by the number of seeds that grok, then by the mean of the best validation accuracies; best first.

    Raises:
        ValueError: a run that is needed has not ended.
    """

    def score(overrides: str) -> tuple[int, float]:
        accuracies = [best_accuracy(record(ended_run(run))) for run in sweep(product([overrides], seeds), runs)]
        return sum(accuracy >= GROKS for accuracy in accuracies), sum(accuracies)

    return sorted(settings, key=score, reverse=True)


def finalists(optimizer: str, runs: str) -> list[str]:
    """The settings that go on from the tuning."""
    return best(grid(optimizer), [TUNING_SEED], runs)[:FINALISTS]


def tuned(optimizer: str, runs: str) -> str:
    """The setting that the tuning chose."""
    return best(finalists(optimizer, runs), [TUNING_SEED, *FINAL_SEEDS], runs)[0]


def plan(stage: str, runs: str) -> list[tuple[str, int]]:
    """The runs of a stage, as overrides and seeds; those of finals, tuned and depth follow from ended runs.

    Args:
        stage: one of :data:`STAGES`.
        runs: the folder of the runs.

    Raises:
        ValueError: an unknown stage, or one that follows from runs that have not ended.
    """
    match stage:
        case "matched":
            return product([setting(*each) for each in MATCHED.items()], SEEDS)
        case "tuning":
            return product([each for optimizer in GRID for each in grid(optimizer)], [TUNING_SEED])
        case "finals":
            return product([each for optimizer in GRID for each in finalists(optimizer, runs)], FINAL_SEEDS)
        case "tuned":
            return product([tuned(optimizer, runs) for optimizer in GRID], SEEDS)
        case "ablations":
            base = setting("ddcmuon", MATCHED["ddcmuon"])
            return product([f"{base} {change}" for change in ABLATIONS], FEW_SEEDS)
        case "depth":
            both = [tuned(optimizer, runs) for optimizer in ("ddcmuon", "muon")]
            return product([f"{each} model.depth={depth}" for depth in DEPTHS for each in both], FEW_SEEDS)
    raise ValueError(f"Invalid stage={stage!r}: expected one of {', '.join(STAGES)}")


def product(settings: Iterable[str], seeds: Iterable[int]) -> list[tuple[str, int]]:
    """Settings on seeds, seed by seed: a sweep that is cut short has whole seeds."""
    return [(each, seed) for seed, each in itertools.product(seeds, list(settings))]


def lines(planned: Iterable[tuple[str, int]], runs: str) -> list[str]:
    """A plan as the lines of a sweep file."""
    return [f"+experiment=grok_mlp wandb=disabled runs={runs} seed={seed} {each}" for each, seed in planned]


def sweep(planned: Iterable[tuple[str, int]], runs: str) -> list[SweepRun]:
    """A plan as runs, in its order."""
    return parse_sweep(lines(planned, runs))


def ended_run(run: SweepRun) -> Run:
    """The records of a run.

    Raises:
        ValueError: it has not ended.
    """
    if not run.ended:
        raise ValueError(f"{shown(run.folder)} is {run.state}: run the stages before this one first")
    return Run.read(run.folder)


def collect(runs: str) -> list[dict[str, Any]]:
    """One record a run: its setting in each stage that it belongs to, its configuration, origin, curve and summary.

    Raises:
        ValueError: a run has not ended.
    """
    stages: dict[Path, dict[str, str]] = defaultdict(dict)
    records = {}
    for stage in track(STAGES, "collecting"):
        planned = plan(stage, runs)
        for (overrides, _), run in zip(planned, sweep(planned, runs), strict=True):
            stages[run.folder][stage] = overrides
            records[run.folder] = record(ended_run(run))
    return [{"stages": stages[folder], **each} for folder, each in records.items()]


def record(run: Run) -> dict[str, Any]:
    """What the report needs of a run, and where it comes from."""
    curve = {key: [row[key] for row in run.rows] for key in CURVE}
    seconds = sum(row["seconds"] for row in read_lines(run.folder / "timing.jsonl"))
    return {**run.info, "curve": curve, "seconds": seconds, "diverged": run.summary is None}


def main() -> None:
    """Plan, collect or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("plan").add_argument("stage", choices=STAGES)
    commands.add_parser("collect")
    commands.add_parser("report")
    for command in ("plan", "collect"):
        commands.choices[command].add_argument("--runs", default="runs", help="folder of the runs")
    for command in ("collect", "report"):
        commands.choices[command].add_argument("--output", type=Path, default=Path("results/grokking"))
    arguments = parser.parse_args()
    try:
        if arguments.command == "plan":
            print("\n".join(lines(plan(arguments.stage, arguments.runs), arguments.runs)))
        elif arguments.command == "collect":
            save_records(arguments.output / "runs.jsonl", collect(arguments.runs))
        else:
            records = read_lines(arguments.output / "runs.jsonl")
            save_table(arguments.output / "table.md", markdown(records))
            for path in (*plot_accuracy(records, arguments.output), *plot_depth(records, arguments.output)):
                print(path)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
