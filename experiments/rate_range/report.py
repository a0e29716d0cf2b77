"""Claim W2 as tables and a figure, from the records that are there, with what is missing said."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ddc.report.claims import Claim, Verdict
from ddc.report.figures import Drawing, nth_style, plain_log_ticks, save_figure, subplots
from ddc.report.stages import Record, table
from ddc.report.statistics import mean_interval
from experiments import own
from experiments.output import Results
from experiments.rate_range.plan import (
    EXPERIMENT,
    NEAR,
    OPTIMIZERS,
    RESULTS,
    SEEDS,
    SPREADS,
    rate,
)
from experiments.rate_range.ranges import Losses, Range, by_run, found_losses, range_of

MODEL = "GPT, 0.12M parameters"
FIGURES = {"W2": "losses"}
#: Subject and baseline of each comparison.
COMPARED = {
    "against AdamW": ("DDCAdam", "AdamW"),
    "against AdamW, balanced once": ("DDCAdam", "AdamW, balanced once"),
    "against AdamW, relative steps": ("DDCAdam", "AdamW, relative steps"),
    "DDCMuon against Muon": ("DDCMuon", "Muon"),
    "DDCMuon against Muon, balanced once": ("DDCMuon", "Muon, balanced once"),
}
#: Ranges by optimizer, start and seed.
Ranges = Mapping[tuple[str, float], Mapping[int, Range]]


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def ranges_of(records: Sequence[Record]) -> Ranges:
    """All that can be read."""
    runs = by_run(records)
    return {
        (name, spread): {
            seed: found
            for seed in SEEDS
            if (found := range_of(runs, name, spread, seed)) is not None
        }
        for name in OPTIMIZERS
        for spread in SPREADS
    }


def differences(ranges: Ranges) -> dict[str, dict[str, list[float]]]:
    """Of the lengths of ranges, by comparison and start."""
    return {
        comparison: {
            f"spread {spread}": [
                ranges[subject, spread][seed].decades - ranges[baseline, spread][seed].decades
                for seed in sorted(ranges[subject, spread].keys() & ranges[baseline, spread].keys())
            ]
            for spread in SPREADS
        }
        for comparison, (subject, baseline) in COMPARED.items()
    }


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """One row a comparison."""
    ranges = ranges_of(records)
    wide = sum(each.is_open for found in ranges.values() for each in found.values())
    notes = [f"{wide} ranges reach the end of the lattice"] if wide else []
    notes += [left] if (left := EXPERIMENT.missing()) else []
    against = "; ".join(notes) or "–"
    scale = own.scale(MODEL, records)
    return own.verdicts(claims["W2"], differences(ranges), 1, scale, against, ".2f")


def range_cell(found: Mapping[int, Range]) -> str:
    """Mean length with its interval; ``≥`` where a range reaches an end of the lattice."""
    decades = [each.decades for each in found.values()]
    if not decades:
        return "–"
    cell = f"{statistics.mean(decades):.2f}"
    if any(each.is_open for each in found.values()):
        cell = f"≥ {cell}"
    if len(decades) > 1:
        low, high = mean_interval(decades)
        cell += f" ({low:.2f} to {high:.2f})"
    return cell


def best_cell(found: Mapping[int, Range]) -> str:
    """Mean of the best losses."""
    return f"{statistics.mean(each.best for each in found.values()):.3f}" if found else "–"


def ranges_table(ranges: Ranges) -> str:
    """One row an optimizer: its range and its best loss at each start."""
    rows = [
        [
            name,
            "/".join(str(len(ranges[name, spread])) for spread in SPREADS),
            *(range_cell(ranges[name, spread]) for spread in SPREADS),
            *(best_cell(ranges[name, spread]) for spread in SPREADS),
        ]
        for name in OPTIMIZERS
    ]
    header = ["", "seeds", *(f"range, spread {each}" for each in SPREADS)]
    return table([*header, *(f"best, spread {each}" for each in SPREADS)], rows)


def curves(records: Sequence[Record]) -> dict[tuple[str, float], list[Losses]]:
    """The losses by optimizer and start, of each seed that has them."""
    runs = by_run(records)
    return {
        (name, spread): [
            found for seed in SEEDS if (found := found_losses(runs, name, spread, seed)) is not None
        ]
        for name in OPTIMIZERS
        for spread in SPREADS
    }


def plot(records: Sequence[Record], stem: Path) -> list[Path]:
    """The last validation loss against the rate, relative to the one that is best on the mean at
    the standard start: a column a start, a line a seed.
    """
    figure, axes = subplots(1, 3, figsize=(13, 4.4), sharex=True, sharey=True)
    found = curves(records)
    for i, name in enumerate(OPTIMIZERS):
        standard = found[name, 0]
        if not standard:
            continue
        shared = set.intersection(*({*each} for each in standard))
        best = min(shared, key=lambda each: statistics.mean(losses[each] for losses in standard))
        for panel, spread in zip(axes, SPREADS, strict=True):
            for j, losses in enumerate(found[name, spread]):
                points = [(each, loss) for each, loss in sorted(losses.items()) if loss < math.inf]
                style = nth_style(i) | {"linewidth": 1, "label": None if j else name}
                panel.plot(
                    [rate(each) / rate(best) for each, _ in points],
                    [loss for _, loss in points],
                    **style,
                )
    for panel, spread in zip(axes, SPREADS, strict=True):
        panel.set(xscale="log", yscale="log", xlabel="rate / best rate at spread 0")
        panel.set_title(f"scales of units spread by {spread}")
        plain_log_ticks(panel.yaxis)
    axes[0].set_ylabel("last validation loss (nats)")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(OPTIMIZERS), frameon=False)
    return save_figure(figure, stem)


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    if not records:
        return "No run is recorded yet.\n"
    claim, ranges = claims["W2"], ranges_of(records)
    parts = [
        *own.opening(claim, verdicts(records, claims), EXPERIMENT.missing()),
        "## Ranges of rates",
        ranges_table(ranges),
        (
            f"In decades: where the last validation loss is at most {NEAR:g} times the optimizer's"
            " own best from the standard start (spread 0). Mean over seeds, 95% (Student's t)."
            " Best: the lowest last validation loss on the lattice, in nats a byte."
        ),
        "## Differences",
        own.differences_table(differences(ranges), ".2f"),
        "Decades, paired by seed, 95% (Student's t); p unadjusted.",
        own.runs_note(records),
    ]
    return "\n\n".join(parts) + "\n"


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables, and the figure where there is a line to draw."""
    drawing = Drawing(
        partial(plot, records),
        "The last validation loss against the learning rate, relative to each optimizer's best rate"
        " from the standard start; starts on one gauge orbit, whose units are scaled log-normal."
        " A line a seed.",
    )
    there = any(curves(records).values())
    tables = {"table": lambda: markdown(records, claims)}
    return [Results(RESULTS, tables, {"losses": drawing} if there else {})]
