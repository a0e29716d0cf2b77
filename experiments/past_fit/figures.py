"""Figures of claim C1 far past the point of fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ddc.report.figures import nth_style, plain_log_ticks, save_figure, subplots
from ddc.report.runs import TITLES
from ddc.report.stages import Record
from experiments.past_fit.records import median_lengths, without_diverged
from experiments.past_fit.settings import OPTIMIZERS, SEARCH
from experiments.past_fit.specification import CHOICES, PAPERS_RATIO, readings


def plot_curves(rows: Mapping[str, Mapping[str, Sequence[Record]]], stem: Path) -> list[Path]:
    """Losses and gap along training, and the gap against the train loss: a row a protocol, a line a
    seed.
    """
    figure, axes = subplots(
        len(rows), 4, figsize=(15, 3.2 * len(rows)), sharex="col", sharey="col", squeeze=False
    )
    for row, (title, optimizers) in zip(axes, rows.items(), strict=True):
        for i, name in enumerate(OPTIMIZERS):
            runs = without_diverged(optimizers.get(name, []))
            for j, run in enumerate(runs):
                curve = run["curve"]
                losses = list(zip(curve["train_loss"], curve["validation_loss"], strict=True))
                gap = [validation - train for train, validation in losses]
                label = None if j else f"{TITLES[name]} ({len(runs)} seeds)"
                style = nth_style(i) | {"linewidth": 1, "label": label}
                row[0].plot(curve["step"], curve["train_loss"], **style)
                row[1].plot(curve["step"], curve["validation_loss"], **style)
                row[2].plot(curve["step"], gap, **style)
                row[3].plot(curve["train_loss"][1:], gap[1:], **style)
        row[0].set(ylabel=f"{title}\ntrain loss (nats)", yscale="log")
        row[1].set(ylabel="validation loss (nats)")
        row[2].set(ylabel="validation - train loss (nats)")
        row[3].set(ylabel="validation - train loss (nats)", xscale="log")
        row[1].legend(frameon=False, fontsize="small")
    axes[0][3].invert_xaxis()
    for panel in axes[-1][:3]:
        panel.set_xlabel("step")
    axes[-1][3].set_xlabel("train loss (nats), falling")
    plain_log_ticks(axes[0][0].yaxis)
    plain_log_ticks(axes[0][3].xaxis)
    return save_figure(figure, stem)


def plot_mechanism(rows: Mapping[str, Mapping[str, Sequence[Record]]], stem: Path) -> list[Path]:
    """Relative length of the steps, of matrices under a block rescale and of others, train and
    validation loss along training: a row a rate, a line a seed.
    """
    figure, axes = subplots(
        len(rows), 4, figsize=(15, 3.4 * len(rows)), sharex=True, sharey="col", squeeze=False
    )
    axes[0][1].sharey(axes[0][0])
    for row, (title, variants) in zip(axes, rows.items(), strict=True):
        for i, (name, all_runs) in enumerate(variants.items()):
            runs = without_diverged(all_runs)
            for j, run in enumerate(runs):
                curve = run["curve"]
                label = None if j else f"{name} ({len(runs)} seeds)"
                style = nth_style(i) | {"linewidth": 1, "label": label}
                for panel, in_blocks in zip(row, (True, False), strict=False):
                    lengths = median_lengths(run, "relative", in_blocks)
                    panel.plot(curve["step"][-len(lengths) :], lengths, **style)
                row[2].plot(curve["step"], curve["train_loss"], **style)
                row[3].plot(curve["step"], curve["validation_loss"], **style)
        row[0].set(ylabel=f"{title}\n|ΔW| / |W|: W_up, W_down", yscale="log")
        row[1].set(ylabel="|ΔW| / |W|: other matrices", yscale="log")
        row[2].set(ylabel="train loss (nats)", yscale="log")
        row[3].set(ylabel="validation loss (nats)")
    for panel in axes[-1]:
        panel.set_xlabel("step")
    for panel in axes[0][:3]:
        plain_log_ticks(panel.yaxis)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5, frameon=False)
    return save_figure(figure, stem)


def plot_frontier(
    records: Sequence[Record], chosen: Mapping[str, Sequence[Record]], stem: Path
) -> list[Path]:
    """Last and best validation loss, and the gap at the end, against the train loss at the end, of
    every setting that was tried and of the chosen ones.

    Args:
        records: of the search.
        chosen: runs that report what the questions chose, by optimizer.
        stem: of the paths of the figure.
    """
    figure, axes = subplots(1, 3, figsize=(14, 4.6), sharex=True)
    keys = {
        "validation_loss": "validation loss, last",
        "best_validation_loss": "validation loss, best",
        "gap": "gap, last",
    }
    for i, name in enumerate(OPTIMIZERS):
        grid = without_diverged(list(SEARCH.recorded(records, name).values()))
        best = without_diverged(chosen.get(name, []))
        for panel, (key, title) in zip(axes, keys.items(), strict=True):
            for runs, fill, label in ((grid, "none", "tried"), (best, "full", "chosen")):
                x = [run["summary"]["train_loss"] for run in runs]
                y = [run["summary"][key] for run in runs]
                style = nth_style(i, marker=True) | {"linestyle": "none", "fillstyle": fill}
                panel.plot(x, y, label=f"{TITLES[name]}, {label} ({len(runs)} runs)", **style)
            panel.set(xlabel="train loss at the end (nats)", ylabel=f"{title} (nats)", xscale="log")
    plain_log_ticks(axes[0].xaxis)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    return save_figure(figure, stem)


def plot_specification(records: Sequence[Record], stem: Path) -> list[Path]:
    """All readings by difference in gap: difference, ratio, and which choices each is made of."""
    from matplotlib.colors import LogNorm

    found = sorted(readings(records), key=lambda each: each.difference)
    kinds = [sorted({each.choices[i] for each in found}) for i in range(len(CHOICES))]
    lines = [(i, value) for i, values in enumerate(kinds) for value in values]
    figure, axes = subplots(
        3, 1, figsize=(13, 12), sharex=True, height_ratios=(3, 2, 0.2 * len(lines) + 0.1)
    )
    x = range(len(found))
    trains = [each.train_loss for each in found]
    norm = LogNorm(min(trains, default=0.1), max(trains, default=1.0))
    for panel, y in zip(
        axes, ([e.difference for e in found], [e.ratio for e in found]), strict=False
    ):
        image = panel.scatter(x, y, c=trains, norm=norm, cmap="cividis", s=9)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel("gap of DDCAdam - AdamW's (nats)")
    axes[1].axhline(1, color="black", linewidth=0.8)
    axes[1].axhline(PAPERS_RATIO, color="#D55E00", linestyle="--")
    axes[1].annotate(
        f"the paper's ratio, 0.67 / 5.88 = {PAPERS_RATIO:.3f}",
        (1, PAPERS_RATIO),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="#D55E00",
    )
    axes[1].set_ylabel("gap / AdamW's")
    axes[1].set_yscale("log")  # tuned AdamW's gap may be small
    plain_log_ticks(axes[1].yaxis)
    for row, (i, value) in enumerate(lines):
        there = [j for j, each in enumerate(found) if each.choices[i] == value]
        axes[2].plot(there, [row] * len(there), "|", color="#0072B2", markersize=5)
    axes[2].set_yticks(range(len(lines)), [f"{CHOICES[i]}: {value}" for i, value in lines])
    axes[2].tick_params(axis="y", labelsize="small")
    axes[2].invert_yaxis()
    for i in range(1, len(CHOICES)):
        first = next(row for row, (kind, _) in enumerate(lines) if kind == i)
        axes[2].axhline(first - 0.5, color="grey", linewidth=0.5)
    axes[2].set_xlabel(f"{len(found)} readings, by difference in gap")
    bar = figure.colorbar(image, ax=list(axes[:2]), label="train loss of DDCAdam (nats)")
    plain_log_ticks(bar.ax.yaxis)
    return save_figure(figure, stem)
