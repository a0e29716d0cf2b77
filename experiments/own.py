"""Verdicts on our own claims: several comparisons, each of several effects that are paired by seed,
with one adjustment over all tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ddc.report.claims import (
    Claim,
    Verdict,
    effect,
    not_complete,
    rule,
    tested,
    verdict,
    verdict_table,
)
from ddc.report.paired import interval, p_cell
from ddc.report.stages import Record, commits, table
from ddc.report.statistics import holm, paired_p
from experiments.search import last_loss

#: What a model loses that knows nothing of 256 bytes; no run of ours counts for more.
IGNORANT = math.log(256)
#: By comparison, in the words of the claim, and by effect: subject less baseline, seed by seed.
Differences = Mapping[str, Mapping[str, Sequence[float]]]


def loss_of(record: Record) -> float:
    """The last validation loss, at most that of a model that knows nothing, which a run that
    diverged has.
    """
    return min(last_loss(record), IGNORANT)


def verdicts(
    claim: Claim, differences: Differences, sign: int, scale: str, against: str, form: str
) -> list[Verdict]:
    """One row a comparison that any seed has; one for all others.

    Args:
        claim: whose rule asks for all effects of a comparison.
        differences: of the seeds that have both; no seed where runs are missing.
        sign: of a difference that is in the claim's direction.
        scale: model and data in a few words.
        against: what is known against every row.
        form: of the numbers.
    """
    tests = [(each, title) for each, effects in differences.items() for title in effects]
    adjusted = holm([paired_p(differences[each][title]) for each, title in tests])
    p_values = dict(zip(tests, adjusted, strict=True))
    found = []
    for comparison, effects in differences.items():
        seeds = min(map(len, effects.values()))
        if not seeds:
            continue
        ps = [p_values[comparison, title] for title in effects]
        shown = [
            effect([sign * d for d in each], p, claim.level)
            for each, p in zip(effects.values(), ps, strict=True)
        ]
        ours = "; ".join(f"{title} {interval(each, form)}" for title, each in effects.items())
        row = (ours, ", ".join(map(p_cell, ps)), str(seeds), tested(ps[0]), scale)
        found.append(Verdict(claim.id, comparison, *row, verdict(shown), against))
    waiting = [each for each in differences if each not in {row.protocol for row in found}]
    missing = not_complete(claim, waiting, scale)
    return [*found, *(replace(each, against=against) for each in missing)]


def scale(model: str, records: Sequence[Record]) -> str:
    """A model in a few words, how much text its runs train on, and how often they see it, as the
    configuration of the first of them has it; the model alone where there is none.
    """
    if not records:
        return model
    config = records[0]["config"]
    training, tokens = config["training"], config["data"]["train_tokens"]
    read = training["steps"] * training["batch_size"] * config["model"]["context"]
    return f"{model}, {tokens / 1000:.0f} kB of text, seen {read / tokens:.3g} times"


def opening(claim: Claim, rows: Sequence[Verdict], left: str) -> list[str]:
    """How a page of tables on a claim begins: what is missing, its verdicts, its rule.

    Args:
        claim: of ours.
        rows: its verdicts.
        left: which runs are missing, in words; empty where none is.
    """
    return [
        f"**Not complete.** {left}" if left else "All planned runs are recorded.",
        f"## Claim {claim.id}",
        verdict_table({claim.id: claim}, rows),
        rule(claim),
    ]


def paired(mine: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Mine less theirs, of the seeds that have both, in their order."""
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def differences_table(differences: Differences, form: str, corner: str = "") -> str:
    """One row a comparison that any seed has, by effect: the mean, its interval and its p-value,
    unadjusted.

    Args:
        differences: as for :func:`verdicts`.
        form: of the numbers.
        corner: what stands over the comparisons.
    """
    rows = [
        [
            comparison,
            *(f"{interval(each, form)}, p {p_cell(paired_p(each))}" for each in effects.values()),
        ]
        for comparison, effects in differences.items()
        if any(effects.values())
    ]
    named = [*dict.fromkeys(each for effects in differences.values() for each in effects)]
    return table([corner, *named], rows, left=1 + len(named)) if rows else ""


def runs_note(records: Sequence[Record]) -> str:
    """How many runs a table is of, and where they come from."""
    hours = sum(record["seconds"] for record in records) / 3600
    return (
        f"{len(records)} runs, {sum(record['diverged'] for record in records)} diverged,"
        f" {hours:.1f} hours. Commit {commits(records)}. Made by `make report` from `runs.jsonl`"
        " beside this file."
    )
