"""Claim C8: how far weights move along their gauge orbits, from the records of claim C1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ddc.gauges import KINDS
from ddc.report.claims import Claim, Verdict, effect, tested, verdict
from ddc.report.paired import (
    BASELINE,
    SUBJECT,
    Quantity,
    Runs,
    advantages,
    differences,
    p_cell,
    quantity_table,
    seeds_cell,
    seeds_that_ran,
    stage_runs,
    values,
)
from ddc.report.stages import PROTOCOLS, Record
from ddc.report.statistics import holm, paired_p


def last_drift(kind: str) -> Callable[[Record], float | None]:
    """Drift along the orbits of a kind from the start to the end of a run."""
    return lambda record: record["curve"]["gauge_drift"][-1][kind]


def quantities(kinds: Sequence[str]) -> list[Quantity]:
    """The drift of each kind, as a quantity."""
    return [Quantity(KINDS[kind].title, last_drift(kind), -1, ".2g") for kind in kinds]


def verdicts(records: Sequence[Record], claim: Claim, kinds: Sequence[str]) -> list[Verdict]:
    """By protocol, p-values adjusted over protocols and kinds."""
    drifts = quantities(kinds)
    runs = {protocol: stage_runs(records, protocol) for protocol in PROTOCOLS}
    keys = [(protocol, each.title) for protocol in PROTOCOLS for each in drifts]
    raw = [paired_p(differences(runs[protocol], each)) for protocol in PROTOCOLS for each in drifts]
    p = dict(zip(keys, holm(raw), strict=True))
    found = []
    for protocol, mine in runs.items():
        whole = len(mine[SUBJECT]) == seeds_that_ran(records, protocol)
        shown = [
            effect(
                advantages(mine, each),
                p[protocol, each.title],
                claim.level,
                whole and mean(mine, SUBJECT, each) <= claim.enough * mean(mine, BASELINE, each),
            )
            for each in drifts
        ]
        ours = "; ".join(
            f"{each.title} {mean(mine, SUBJECT, each):.2g} against {mean(mine, BASELINE, each):.2g}"
            for each in drifts
        )
        found.append(
            Verdict(
                claim.id,
                protocol,
                ours,
                ", ".join(p_cell(p[protocol, each.title]) for each in drifts),
                seeds_cell(len(mine[SUBJECT]), seeds_that_ran(records, protocol)),
                tested(raw[0]),
                "GPT, 0.8M parameters, 40 kB of text",
                verdict(shown),
                "readers of a norm decay and its scale does not, which is a move along the orbit",
            )
        )
    return found


def mean(runs: Runs, optimizer: str, drift: Quantity) -> float:
    """Over the seeds."""
    found = [each for each in values(runs[optimizer], drift) if each is not None]
    return sum(found) / len(found)


def section(runs: Mapping[str, Runs], kinds: Sequence[str]) -> list[str]:
    """A table a protocol."""
    parts = []
    for protocol in PROTOCOLS:
        parts += [
            f"## Drift along orbits, {protocol}",
            quantity_table(runs[protocol], quantities(kinds)),
        ]
    note = (
        "Root mean square over units of the change from the start to the end: of a rescale, of"
        " log ρ_P - log ρ_M; of the logit shift, of the mean row of the head; of a rotation, the"
        " angle in radians."
    )
    return [*parts, note]
