"""The gauges of the paper against the complete group as tables and a figure, from the records that
are there, with what is missing said.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ddc.report.claims import Claim
from ddc.report.figures import Drawing, nth_style, save_figure, subplots
from ddc.report.paired import interval, p_cell
from ddc.report.stages import Record, table
from ddc.report.statistics import holm, paired_p
from experiments import own
from experiments.ablation.plan import (
    COMPARISONS,
    EXPERIMENT,
    RESULTS,
    Comparison,
)
from experiments.output import Results
from experiments.search import last_loss

#: Last validation losses by gauges, and by seed.
Losses = dict[str, dict[int, float]]


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def losses_of(records: Sequence[Record], comparison: Comparison) -> Losses:
    """What the reported runs of a comparison end with; infinite where a run diverged."""
    found: Losses = {}
    for record in records:
        setting = record["stages"].get(comparison.reported)
        for gauges, name in comparison.optimizers.items():
            if setting in comparison.search.points(name):
                found.setdefault(gauges, {})[record["seed"]] = last_loss(record)
    return found


def differences(losses: Losses, gauges: str, baseline: str) -> list[float]:
    """By seed, of those on which both ran."""
    mine, theirs = losses.get(gauges, {}), losses.get(baseline, {})
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def ends_table(records: Sequence[Record]) -> str:
    """Where training ends: one row an optimizer and set of gauges."""
    rows = []
    for title, comparison in COMPARISONS.items():
        losses = losses_of(records, comparison)
        for gauges, name in comparison.optimizers.items():
            tried = comparison.search.recorded(records, name)
            point = comparison.search.choices(tried).get("last")
            if gauges not in losses or point is None:
                continue
            axes = comparison.search.axes[name].items()
            chosen = ", ".join(
                f"{key} {axis[i]:g}" for (key, axis), i in zip(axes, point, strict=True)
            )
            interior = not comparison.search.open_sides(name, point, tried)
            values = losses[gauges].values()
            rows.append(
                [
                    title,
                    gauges,
                    chosen + ("" if interior else " (not interior)"),
                    str(len(values)),
                    f"{statistics.mean(values):.4f}",
                    interval(differences(losses, gauges, "none"), ".4f")
                    if gauges != "none"
                    else "",
                ]
            )
    header = ["", "gauges", "setting", "seeds", "validation loss, last", "less none (95%)"]
    return table(header, rows, left=3) if rows else "No reported run is recorded yet."


def differences_table(records: Sequence[Record]) -> str:
    """Complete less paper: one row a comparison."""
    found = {
        title: differences(losses_of(records, each), "complete", "paper")
        for title, each in COMPARISONS.items()
    }
    found = {title: each for title, each in found.items() if each}
    adjusted = holm([paired_p(each) for each in found.values()])
    rows = [
        [title, str(len(each)), interval(each, ".4f"), p_cell(p), said(each, p)]
        for (title, each), p in zip(found.items(), adjusted, strict=True)
    ]
    header = ["", "seeds", "complete less paper (95%)", "p (Holm)", ""]
    return table(header, rows) if rows else "No pair is recorded yet."


def said(values: Sequence[float], p: float | None) -> str:
    """The rule of the plan."""
    if p is None:
        return "not tested"
    if p >= 0.05:
        return "no difference shown"
    return "complete is better" if statistics.mean(values) < 0 else "complete is worse"


def tuning_table(records: Sequence[Record]) -> str:
    """One row a setting that was tried; bold where it was chosen."""
    rows = []
    for title, comparison in COMPARISONS.items():
        for gauges, name in comparison.optimizers.items():
            tried = comparison.search.recorded(records, name)
            chosen = comparison.search.choices(tried).get("last")
            for point, record in sorted(tried.items()):
                optimizer = record["config"]["optimizer"]
                axes = comparison.search.axes[name]
                values = ", ".join(f"{key} {optimizer[key]:g}" for key in axes)
                mark = "**" if point == chosen else ""
                rows.append([title, gauges, f"{mark}{values}{mark}", f"{last_loss(record):.4f}"])
    header = ["", "gauges", "setting", "validation loss, last"]
    return table(header, rows, left=3) if rows else "No setting is recorded yet."


def plot(records: Sequence[Record], stem: Path) -> list[Path]:
    """The last validation loss less that without gauges: a panel a comparison, a line a seed."""
    figure, axes = subplots(1, len(COMPARISONS), figsize=(10, 3.2))
    for panel, (title, comparison) in zip(axes, COMPARISONS.items(), strict=True):
        losses = losses_of(records, comparison)
        shown = [gauges for gauges in comparison.optimizers if gauges in losses]
        for i, seed in enumerate(sorted(losses.get("none", {}))):
            ends = [losses[gauges].get(seed) for gauges in shown]
            if None not in ends:
                base = losses["none"][seed]
                panel.plot(
                    shown,
                    [end - base for end in ends if end is not None],
                    **nth_style(i, marker=True),
                )
        panel.set_title(title)
    axes[0].set_ylabel("validation loss less\nthat without gauges (nats)")
    return save_figure(figure, stem)


def markdown(records: Sequence[Record]) -> str:
    """All tables."""
    if not records:
        return "No run is recorded yet.\n"
    left = EXPERIMENT.missing()
    parts = [
        f"**Not complete.** {left}" if left else "All planned runs are recorded.",
        "## Where training ends",
        ends_table(records),
        (
            "Last validation loss in nats, mean over seeds; each set of gauges at what was tuned"
            " for it on another seed. *none* is the base optimizer; *paper* and *complete* are its"
            " lift. Differences are paired by seed (Student's t)."
        ),
        "## The complete group against the paper's gauges",
        differences_table(records),
        "Said to differ where p < 0.05, adjusted by Holm over these comparisons.",
        "## The tuning",
        tuning_table(records),
        "Seed 100. Bold: chosen.",
        own.runs_note(records),
    ]
    return "\n\n".join(parts) + "\n"


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables, and the figure where there is something to draw."""
    drawing = Drawing(
        partial(plot, records),
        "The last validation loss less that of the same base optimizer without gauges, under those"
        " of the paper and under the complete group, each tuned. A line a seed.",
    )
    there = any(losses_of(records, each) for each in COMPARISONS.values())
    tables = {"table": lambda: markdown(records)}
    return [Results(RESULTS, tables, {"ends": drawing} if there else {})]
