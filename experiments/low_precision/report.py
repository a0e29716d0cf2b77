"""Claim W5 as tables and a figure, from the records that are there, with what is missing said."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ddc.report.claims import Claim, Verdict
from ddc.report.figures import Drawing, nth_style, points_and_mean, save_figure, subplots
from ddc.report.paired import interval
from ddc.report.runs import read_lines
from ddc.report.stages import Record, commits, table
from experiments import own
from experiments.low_precision.plan import (
    ADAMW,
    DDCADAM,
    DDCMUON,
    EXPERIMENT,
    FLOAT32,
    FORMATS,
    MUON,
    OPTIMIZERS,
    RESULTS,
    RIVAL,
    SEARCHES,
    SPREADS,
)
from experiments.output import Results
from experiments.search import last_loss

MODEL = "GPT, 0.12M parameters"
FIGURES = {"W5": "precision"}
COMPARED = {
    "against AdamW": (DDCADAM, ADAMW),
    "against AdamW, balanced once": (DDCADAM, RIVAL),
    "DDCMuon against Muon": (DDCMUON, MUON),
}
#: Of the records of ``ends.jsonl``: the weights that were read, by title.
POINTS = {"as_trained": "as trained", "balanced": "balanced at the end"}
KURTOSES = ("stream", "hidden", "inputs")
#: Last validation losses by optimizer, format and start, and by seed.
Losses = dict[tuple[str, str, float], dict[int, float]]


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def losses_of(records: Sequence[Record]) -> Losses:
    """What the runs that are reported end with."""
    found: Losses = {}
    for record in records:
        if "reported" in record["stages"]:
            config = record["config"]
            optimizer = config["optimizer"]
            name = RIVAL if optimizer["canonicalise"] else str(optimizer["name"])
            key = (name, config["training"]["weights"], config["start"]["spread"])
            found.setdefault(key, {})[record["seed"]] = own.loss_of(record)
    return found


def lost(losses: Losses, optimizer: str, weights: str, spread: float) -> dict[int, float]:
    """The loss of precision at a start, by seed."""
    here, exact = (losses.get((optimizer, each, spread), {}) for each in (weights, FLOAT32))
    return {seed: here[seed] - exact[seed] for seed in sorted(here.keys() & exact.keys())}


def over_starts(of: Callable[[float], Mapping[int, float]]) -> dict[int, float]:
    """The mean over the starts, of the seeds that have all."""
    found = [of(spread) for spread in SPREADS]
    seeds = sorted(set.intersection(*({*each} for each in found)))
    return {seed: statistics.mean(each[seed] for each in found) for seed in seeds}


def mean_lost(losses: Losses, optimizer: str, weights: str) -> dict[int, float]:
    """The loss of precision, mean over the starts."""
    return over_starts(lambda spread: lost(losses, optimizer, weights, spread))


def mean_last(losses: Losses, optimizer: str, weights: str) -> dict[int, float]:
    """The last validation loss, mean over the starts."""
    return over_starts(lambda spread: losses.get((optimizer, weights, spread), {}))


def differences(
    losses: Losses, of: Callable[[Losses, str, str], Mapping[int, float]] = mean_lost
) -> dict[str, dict[str, list[float]]]:
    """By comparison and format, subject less baseline."""
    found: dict[str, dict[str, list[float]]] = {}
    for comparison, (subject, baseline) in COMPARED.items():
        found[comparison] = {}
        for weights in FORMATS:
            both = (of(losses, each, weights) for each in (subject, baseline))
            found[comparison][weights] = own.paired(*both)
    return found


def not_interior(records: Sequence[Record]) -> list[str]:
    """The choices that lie at an end of what was tried, in words."""
    return [
        f"{OPTIMIZERS[name]} in {weights}"
        for weights, search in SEARCHES.items()
        for name in search.not_interior(records)
    ]


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """One row a comparison; beside it how the last losses themselves differ."""
    losses = losses_of(records)
    notes = [f"not interior: {', '.join(edges)}"] if (edges := not_interior(records)) else []
    notes += [left] if (left := EXPERIMENT.missing()) else []
    found = []
    scale = own.scale(MODEL, records)
    last = differences(losses, mean_last)
    for row in own.verdicts(claims["W5"], differences(losses), -1, scale, "–", ".3f"):
        effects = last.get(row.protocol, {})
        shown = [f"{each} {interval(d, '.3f')}" for each, d in effects.items() if d]
        own_notes = [f"last loss itself: {', '.join(shown)}"] if shown else []
        found.append(replace(row, against="; ".join([*own_notes, *notes]) or "–"))
    return found


def losses_table(losses: Losses) -> str:
    """One row an optimizer and start: its loss in float32, and what each format adds."""
    rows = []
    for name, title in OPTIMIZERS.items():
        for spread in SPREADS:
            exact = losses.get((name, FLOAT32, spread), {})
            if exact:
                added = [[*lost(losses, name, each, spread).values()] for each in FORMATS]
                cells = [f"{statistics.mean(exact.values()):.3f}"]
                cells += [interval(each, ".3f") for each in added]
                rows.append([title, f"{spread:g}", str(len(exact)), *cells])
    header = ["", "spread", "seeds", FLOAT32, *FORMATS]
    return table(header, rows) if rows else "None of these is recorded yet."


def differences_table(losses: Losses) -> str:
    """One row a comparison: of the loss of precision, and of the last loss itself."""
    quantities = {"loss of precision": mean_lost, "last loss": mean_last}
    both = {title: differences(losses, of) for title, of in quantities.items()}
    merged = {
        comparison: {
            f"{title}, {weights}": found[comparison][weights]
            for title, found in both.items()
            for weights in FORMATS
        }
        for comparison in COMPARED
    }
    return own.differences_table(merged, ".3f")


def ends_table(ends: Sequence[Record]) -> str:
    """One row an optimizer, a start and a point of its orbit: what 4-bit rounding adds, and
    outliers.
    """
    rows = []
    for name, title in OPTIMIZERS.items():
        for spread in SPREADS:
            here = [
                each
                for each in ends
                if (RIVAL if each["canonicalise"] else each["optimizer"]) == name
                and each["spread"] == spread
            ]
            for point, words in POINTS.items():
                of = [each[point] for each in here]
                if of:
                    added = [each["quantised"] - each["loss"] for each in of]
                    kurtoses = [[each["kurtosis"][key] for each in of] for key in KURTOSES]
                    cells = [str(len(of)), interval(added, ".3f")]
                    cells += [f"{statistics.mean(each):.1f}" for each in kurtoses]
                    rows.append([title, f"{spread:g}", words, *cells])
    header = ["", "spread", "weights", "seeds", "4 bits add", *(f"kurtosis, {k}" for k in KURTOSES)]
    return table(header, rows, left=3) if rows else "No run is measured yet."


def tuning_table(records: Sequence[Record]) -> str:
    """One row an optimizer and format: each rate that was tried, bold where it was chosen."""
    rows = []
    for name, title in OPTIMIZERS.items():
        for weights, search in SEARCHES.items():
            tried = search.recorded(records, name)
            chosen = search.choices(tried).get("last")
            cells = []
            for point, record in sorted(tried.items()):
                mark = "**" if point == chosen else ""
                lr = record["config"]["optimizer"]["lr"]
                cells.append(f"{mark}{lr:g}: {last_loss(record):.3f}{mark}")
            if cells:
                rows.append([title, weights, ", ".join(cells)])
    header = ["optimizer", "weights", "rate: validation loss, last"]
    return table(header, rows, left=3) if rows else "No setting is recorded yet."


def plot(losses: Losses, stem: Path) -> list[Path]:
    """The loss of precision: a panel a format, a group of points a start, a colour an optimizer, a
    point a seed and a line at their mean.
    """
    figure, axes = subplots(1, len(FORMATS), figsize=(11, 3.8))
    for panel, weights in zip(axes, FORMATS, strict=True):
        for i, (name, title) in enumerate(OPTIMIZERS.items()):
            style = nth_style(i, marker=True)
            for j, spread in enumerate(SPREADS):
                found = [*lost(losses, name, weights, spread).values()]
                if found:
                    x = j + (i - 2) * 0.15
                    points_and_mean(panel, x, found, 0.06, style | {"label": None if j else title})
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xticks(range(len(SPREADS)), [f"spread {each:g}" for each in SPREADS])
        panel.set_title(weights)
    axes[0].set_ylabel("last validation loss\nless that in float32 (nats)")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5, frameon=False)
    return save_figure(figure, stem)


def markdown(records: Sequence[Record], ends: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    if not records:
        return "No run is recorded yet.\n"
    claim, losses = claims["W5"], losses_of(records)
    parts = [
        *own.opening(claim, verdicts(records, claims), EXPERIMENT.missing()),
        "## Loss of precision",
        losses_table(losses),
        (
            "Last validation loss in float32, mean over seeds, and what it is more with weights in"
            " a format, paired by seed, 95% (Student's t); nats a byte, each at the rate that was"
            " tuned in its format. Spread: of the scales of units at the start."
        ),
        "## Differences",
        differences_table(losses),
        "Mean over both starts, paired by seed, 95% (Student's t); p unadjusted.",
        "## Outliers and 4-bit rounding at the end",
        ends_table(ends),
        (
            "Of the float32 runs; it decides no verdict. 4 bits add: the validation loss after all"
            " matrices were rounded to nearest, each row to 16 values, less that before, mean over"
            " seeds, 95%. Balanced at the end: after the weights were moved to the balanced point"
            " of their orbit under all kinds that are known. Kurtosis of the entries of the"
            " residual stream, of the hidden units of feed-forward blocks, and of what linear maps"
            " get, mean over layers and seeds; 3 of a normal distribution."
            + (f" Commit {commits(ends)}." if ends else "")
        ),
        "## The tuning",
        tuning_table(records),
        "Seed 100, from the standard start. Bold: chosen.",
        own.runs_note(records),
    ]
    return "\n\n".join(parts) + "\n"


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables, and the figure where a loss of precision is known."""
    losses = losses_of(records)
    drawing = Drawing(
        partial(plot, losses),
        "What training ends with where weights are held in a format of few bits, and nothing finer"
        " is kept, less what it ends with in float32; from the standard start (spread 0) and from"
        " one on its orbit. A point a seed, a line at their mean.",
    )
    there = any(mean_lost(losses, name, each) for name in OPTIMIZERS for each in FORMATS)
    ends = read_lines(RESULTS / "ends.jsonl")
    tables = {"table": lambda: markdown(records, ends, claims)}
    return [Results(RESULTS, tables, {"precision": drawing} if there else {})]
