"""Claim W6 as a table, from the pairs that were measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ddc.report.claims import Claim, Verdict, rule, verdict_table
from ddc.report.paired import interval
from ddc.report.runs import read_lines
from ddc.report.stages import Record, commits, table
from experiments import own
from experiments.merging.plan import OPTIMIZERS, RESULTS
from experiments.output import Results
from experiments.regauged.plan import ORIGINAL, STARTS

SCALE = "GPT, 0.12M parameters, fine-tuned on 0.26 MB of text"
#: The starts of the second run in each effect; QuaRot's is in none.
EFFECTS = {"original": (ORIGINAL,), "re-gauged": ("smoothquant", "awq", "absmax")}


def load() -> list[Record]:
    """The pairs that were measured."""
    return read_lines(RESULTS / "pairs.jsonl")


def barriers(records: Sequence[Record], key: str) -> dict[tuple[str, str], dict[int, float]]:
    """Of the average ``as_is`` or ``moved``, by optimizer and start of the second run, and seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        value = record[key] - (record["first"] + record["second"]) / 2
        found.setdefault((record["optimizer"], record["start"]), {})[record["seed"]] = value
    return found


def differences(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Barriers moved less as they are, by optimizer and effect, of the seeds that have all."""
    plain, moved = barriers(records, "as_is"), barriers(records, "moved")
    found: dict[str, dict[str, list[float]]] = {}
    for name in OPTIMIZERS.values():
        all_starts = [each for starts in EFFECTS.values() for each in starts]
        seeds = set.intersection(*({*plain.get((name, each), {})} for each in all_starts))
        found[name] = {
            title: [
                statistics.mean(
                    moved[name, each][seed] - plain[name, each][seed] for each in starts
                )
                for seed in sorted(seeds)
            ]
            for title, starts in EFFECTS.items()
        }
    return found


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """One row an optimizer."""
    return own.verdicts(claims["W6"], differences(records), -1, SCALE, "–", ".3f")


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    if not records:
        return "No pair is measured yet.\n"
    claim = claims["W6"]
    plain, moved = barriers(records, "as_is"), barriers(records, "moved")
    rows = [
        [
            name,
            start,
            str(len(plain[name, start])),
            interval([*plain[name, start].values()], ".3f"),
            interval([*moved[name, start].values()], ".3f"),
        ]
        for name in OPTIMIZERS.values()
        for start in STARTS
        if (name, start) in plain
    ]
    header = ["optimizer", "second run from", "seeds", "barrier, as they are", "barrier, moved"]
    parts = [
        "## Claim W6",
        verdict_table({claim.id: claim}, verdicts(records, claims)),
        rule(claim),
        "## Barriers",
        table(header, rows, left=2),
        (
            "Validation loss of the average of two runs less the mean of theirs, in nats a byte;"
            " mean over seeds, 95% (Student's t)."
        ),
        f"{len(records)} pairs. Commit {commits(records)}. Made from `pairs.jsonl`.",
    ]
    return "\n\n".join(parts) + "\n"


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """The table."""
    return [Results(RESULTS, {"table": lambda: markdown(records, claims)})]
