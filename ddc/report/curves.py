"""Loss curves of two optimizers, a line a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ddc.report.figures import nth_style, plain_log_ticks, save_figure, subplots
from ddc.report.paired import Runs
from ddc.report.runs import TITLES
from ddc.report.stages import Record

#: What is drawn of a curve.
CURVE = ("step", "train_loss", "validation_loss")


def plot_losses(
    runs: Mapping[str, Runs], setting: Callable[[Record], str], stem: Path
) -> list[Path]:
    """Validation and train loss against steps, and the gap against the train loss.

    Args:
        runs: a row of panels each, by the name of their stage.
        setting: of a run, in words.
        stem: of the paths of the figure.
    """
    figure, axes = subplots(
        len(runs), 3, figsize=(13, 3.5 * len(runs)), sharex="col", sharey="col", squeeze=False
    )
    for row, (stage, optimizers) in zip(axes, runs.items(), strict=True):
        for i, (name, records) in enumerate(optimizers.items()):
            label = f"{TITLES[name]} ({setting(records[0])}), {len(records)} seeds"
            for j, run in enumerate(records):
                steps, train, validation = (np.array(run["curve"][key]) for key in CURVE)
                style = nth_style(i) | {"linewidth": 1, "label": None if j else label}
                row[0].plot(steps, validation, **style)
                row[1].plot(steps, train, **style)
                row[2].plot(train[1:], (validation - train)[1:], **style)
        row[0].set(ylabel=f"{stage.replace('_', ' ')}\nvalidation loss (nats)")
        row[1].set(ylabel="train loss (nats)", yscale="log")
        row[2].set(ylabel="validation - train loss (nats)", xscale="log")
        row[0].legend(frameon=False, fontsize="small")
    axes[0][2].invert_xaxis()
    for panel, label in zip(axes[-1], ("step", "step", "train loss (nats), falling"), strict=True):
        panel.set_xlabel(label)
    plain_log_ticks(axes[0][1].yaxis)
    plain_log_ticks(axes[0][2].xaxis)
    return save_figure(figure, stem)
