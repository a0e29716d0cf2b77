"""What low precision costs an optimizer, as tables, from records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from ddc.report.claims import Claim
from ddc.report.runs import TITLES, read_lines
from ddc.report.stages import Record, commits, table
from experiments.equivariance.measure import LR, MUON_LR, SEEDS, STEPS, WEIGHT_DECAY
from experiments.output import Results
from experiments.precision.measure import CONFIGS, OPTIMIZERS, PRECISIONS, READ_AT, RESULTS


def load() -> list[Record]:
    """The committed records."""
    return read_lines(RESULTS / "records.jsonl")


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """The tables."""
    return [Results(RESULTS, {"table": partial(document, records)})]


def document(records: Sequence[Record]) -> str:
    """Tables in Markdown, the largest of the seeds in each cell."""

    def largest(model: str, precision: str, name: str, key: str, step: int) -> float:
        chosen = {"model": model, "precision": precision, "optimizer": name}
        return max(r[key][str(step)] for r in records if chosen.items() <= r.items())

    lower = [precision.name for precision in PRECISIONS[1:]]
    names = list(OPTIMIZERS)

    def rows(precisions: Sequence[str], key: str, *steps: int) -> str:
        return table(
            ["model", "precision", *(TITLES[name] for name in names)],
            [
                [
                    m,
                    p,
                    *(
                        " / ".join(f"{largest(m, p, name, key, step):.1e}" for step in steps)
                        for name in names
                    ),
                ]
                for m in CONFIGS
                for p in precisions
            ],
            left=2,
        )

    parts = [
        "# Precision",
        (
            f"Runs of {STEPS} steps at learning rate {LR}, of hidden matrices under the two Muons"
            f" {MUON_LR}, weight decay {WEIGHT_DECAY}; largest of {len(SEEDS)} seeds. *Mixed*:"
            " weights and state in float32, forward and backward pass under autocast, in float16"
            " with a loss scaler (no step was skipped). *bfloat16 weights*: weights and gradients"
            " in bfloat16; the state is in float32 under DDCAdam, DDCMuon and Muon, in bfloat16"
            " where it is that of torch's AdamW. Both Muons orthogonalise by Newton-Schulz in the"
            " precision of their state. Weights are read in float64."
        ),
        "## Error against float64",
        (
            "Root mean square difference of log-probabilities from the float64 run, after"
            f" {READ_AT[1]} / {STEPS} steps:"
        ),
        rows(lower, "error", *READ_AT[1:]),
        (
            "Distance of the weights from the float64 run's, over the length of its way, after"
            f" {STEPS} steps:"
        ),
        rows(lower, "weights", STEPS),
        "## Equivariance",
        (
            "Root mean square difference of log-probabilities between two runs from one gauge"
            f" orbit, at the start (the rounding of the start alone) / after {STEPS} steps:"
        ),
        rows([precision.name for precision in PRECISIONS], "orbit", 0, STEPS),
        (
            f"Commit {commits(records)}. Made by `make precision` from `records.jsonl` beside this"
            " file."
        ),
    ]
    return "\n\n".join(parts) + "\n"
