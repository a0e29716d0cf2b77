"""How many rates are read where gauges act, raw and balanced: tables and a figure of records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ddc.report.claims import (
    FEW_SEEDS,
    Claim,
    Verdict,
    effect,
    not_complete,
    rule,
    tested,
    verdict,
    verdict_table,
)
from ddc.report.figures import Drawing, nth_style, save_figure, subplots
from ddc.report.paired import interval, mean_cell, p_cell, stage_runs
from ddc.report.runs import TITLES
from ddc.report.stages import Record, commits, table
from ddc.report.statistics import holm, paired_p
from experiments.blurred.plan import EXPERIMENT, OPTIMIZERS, RESULTS, SEEDS
from experiments.output import Results

#: By claim, the figure beside the main table.
FIGURES = {"C2b": "cells"}
BASELINE, SUBJECT = OPTIMIZERS
READINGS = ("raw", "balanced")
SCALE = "GPT, 0.12M parameters, 4 kB of text"
Count = Callable[[Record, str], int]


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables and figure."""
    drawing = Drawing(
        partial(plot, records),
        "Cells read at sites that gauges move: a line a run, from the weights as they are (raw) to"
        " the balanced point of their orbit. Grey: the 95th percentile of random walks that move"
        " together as the cells do, the mean over runs.",
    )
    figures = {"cells": drawing} if stage_runs(records, "runs") else {}
    return [Results(RESULTS, {"table": partial(markdown, records, claims)}, figures)]


def cells_read(record: Record, reading: str) -> int:
    """How many of the cells that gauges move are read."""
    return sum(c["verdict"] == "read" for c in record["read"][reading]["cells"] if c["moved"])


def orders_read(record: Record, reading: str) -> int:
    """How many of these are single eigenvalues, whose slope is the order of a direction."""
    return sum(
        c["verdict"] == "read" and not c["observable"].endswith("log_volume")
        for c in record["read"][reading]["cells"]
        if c["moved"]
    )


def grams_read(record: Record, reading: str) -> int:
    """How many smallest positive eigenvalues of per-sample gradients are read."""
    return sum(c["verdict"] == "read" for c in record["read"][reading]["grams"])


def still_read(record: Record, reading: str) -> int:
    """How many of the cells at these sites that no gauge moves are read."""
    return sum(c["verdict"] == "read" for c in record["read"][reading]["cells"] if not c["moved"])


COUNTS: dict[str, Count] = {
    "cells that gauges move": cells_read,
    "of these, single eigenvalues": orders_read,
    "per-sample Gram matrices": grams_read,
    "cells that no gauge moves": still_read,
}


def gains(runs: Mapping[str, Sequence[Record]], count: Count) -> tuple[list[float], list[float]]:
    """By seed: DDCAdam - AdamW as the weights are; and what balancing adds, AdamW - DDCAdam."""
    pairs = [*zip(runs[BASELINE], runs[SUBJECT], strict=True)]
    raw = [float(count(b, "raw") - count(a, "raw")) for a, b in pairs]
    added = [
        float(count(a, "balanced") - count(a, "raw") - count(b, "balanced") + count(b, "raw"))
        for a, b in pairs
    ]
    return raw, added


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """Claim C2b: both effects, p-values adjusted over them."""
    claim, runs = claims["C2b"], stage_runs(records, "runs")
    if not runs or len(runs[BASELINE]) < len(SEEDS):
        return not_complete(claim, ("matched",), SCALE)
    effects = gains(runs, cells_read)
    p_values = holm([paired_p(each) for each in effects])
    means = {
        name: [statistics.mean(cells_read(each, r) for each in mine) for r in READINGS]
        for name, mine in runs.items()
    }
    words = "; ".join(
        f"{TITLES[name]} {means[name][0]:.1f} raw, {means[name][1]:.1f} balanced"
        for name in (SUBJECT, BASELINE)
    )
    ours = (
        f"{words}; raw {interval(effects[0], '.1f')}, added by balancing"
        f" {interval(effects[1], '.1f')}"
    )
    shown = [effect(e, p, claim.level) for e, p in zip(effects, p_values, strict=True)]
    return [
        Verdict(
            claim.id,
            "matched",
            ours,
            ", ".join(p_cell(p) for p in p_values),
            str(len(runs[BASELINE])),
            tested(p_values[0]),
            SCALE,
            verdict(shown),
            chance(runs),
        )
    ]


def chance(runs: Mapping[str, Sequence[Record]]) -> str:
    """How often walks that move as the cells do read as many."""
    parts = []
    for name in (SUBJECT, BASELINE):
        shares = [
            float(np.mean(np.array(each["read"]["raw"]["walks"]) >= cells_read(each, "raw")))
            for each in runs[name]
        ]
        parts.append(f"{TITLES[name]}'s with probability {min(shares):.2f} to {max(shares):.2f}")
    return f"correlated walks read as many raw cells as {' and '.join(parts)}"


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    claim, runs = claims["C2b"], stage_runs(records, "runs")
    parts = [
        "A *cell* is one site by one observable, read or refused by one rule for all runs"
        " (docs/measurement.md). *Raw*: of the weights as they are; *balanced*: moved to the"
        " balanced point of their orbit.",
        "## Claim C2b",
        verdict_table(claims, verdicts(records, claims)),
        f"{rule(claim)} {FEW_SEEDS}",
    ]
    if missing := EXPERIMENT.missing():
        parts.insert(1, f"**Not complete.** {missing}")
    if not runs:
        return "\n\n".join(parts) + "\n"
    parts += ["## Cells read", counts_table(runs), "## Cells read, by site", sites_table(runs)]
    made = [each["read"] for mine in runs.values() for each in mine]
    hours = sum(each["seconds"] for mine in runs.values() for each in mine) / 3600
    reading = sum(each["seconds"] for each in made) / 3600
    parts.append(
        f"{sum(map(len, runs.values()))} runs, {hours:.1f} hours of one core, and {reading:.1f} to"
        f" read them. Commit of the runs {commits(records)}, of the readings {commits(made)}. Made"
        " by `make blurred` from `runs.jsonl` beside this file."
    )
    return "\n\n".join(parts) + "\n"


def counts_table(runs: Mapping[str, Sequence[Record]]) -> str:
    """One row a count: means over seeds, raw and balanced, and both effects."""
    rows = []
    for title, count in COUNTS.items():
        cells = [
            mean_cell([float(count(each, reading)) for each in runs[name]], ".1f")
            for name in (SUBJECT, BASELINE)
            for reading in READINGS
        ]
        effects = (interval(each, ".1f") for each in gains(runs, count))
        rows.append([title, str(total(runs[SUBJECT][0], count)), *cells, *effects])
    walks = [
        mean_cell([float(np.mean(each["read"][r]["walks"])) for each in runs[name]], ".1f")
        for name in (SUBJECT, BASELINE)
        for r in READINGS
    ]
    rows.append(["the first, of random walks", rows[0][1], *walks, "–", "–"])
    header = ["", "there are"]
    header += [f"{TITLES[name]}, {reading}" for name in (SUBJECT, BASELINE) for reading in READINGS]
    header += ["raw: DDCAdam - AdamW (95%)", "added by balancing: AdamW - DDCAdam (95%)"]
    return table(header, rows)


def total(record: Record, count: Count) -> int:
    """How many cells a count could come to."""
    raw = record["read"]["raw"]
    everything = {
        key: [{**cell, "verdict": "read"} for cell in raw[key]] for key in ("cells", "grams")
    }
    return count({"read": {"raw": everything}}, "raw")


def sites_table(runs: Mapping[str, Sequence[Record]]) -> str:
    """One row a site: cells read over all seeds and observables, and of how many."""
    layers = dict.fromkeys(c["layer"] for c in runs[SUBJECT][0]["read"]["raw"]["cells"])

    def read(name: str, reading: str, layer: str) -> str:
        cells = [
            c for each in runs[name] for c in each["read"][reading]["cells"] if c["layer"] == layer
        ]
        return f"{sum(c['verdict'] == 'read' for c in cells)} of {len(cells)}"

    columns = [(name, reading) for name in (SUBJECT, BASELINE) for reading in READINGS]
    rows = [[layer, *(read(*column, layer) for column in columns)] for layer in layers]
    return table(["site", *(f"{TITLES[name]}, {reading}" for name, reading in columns)], rows)


def plot(records: Sequence[Record], stem: Path) -> list[Path]:
    """A panel an optimizer, a line a seed."""
    runs = stage_runs(records, "runs")
    figure, axes = subplots(1, 2, figsize=(7.5, 3.4), sharey=True)
    for i, (panel, name) in enumerate(zip(axes, (SUBJECT, BASELINE), strict=True)):
        for record in runs[name]:
            style = nth_style(i, marker=True) | {"linewidth": 1, "alpha": 0.7}
            panel.plot(READINGS, [cells_read(record, each) for each in READINGS], **style)
        bound = [
            statistics.mean(np.quantile(r["read"][each]["walks"], 0.95) for r in runs[name])
            for each in READINGS
        ]
        panel.plot(READINGS, bound, color="grey", linestyle=":")
        panel.set(title=TITLES[name], xlim=(-0.3, 1.3), ylim=(0, None))
    axes[0].set_ylabel("cells read")
    return save_figure(figure, stem)
