"""What a step costs in time and memory, as a table and a figure, from the records of the benchmarks alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddc.report.figures import COLOURS, HATCHES, Figures, save_figure, subplots
from ddc.report.runs import TITLES
from ddc.report.stages import Record, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30


def memory_table(memory: Record) -> str:
    """One row a model and optimizer: parameters, bytes of state a parameter, peak of a step."""
    rows = [
        [
            row["model"],
            TITLES[row["optimizer"]],
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['optimizer_state'] / 2**20:.1f}",
            f"{row['optimizer_state'] / row['parameters']:.2f}",
            f"{row['peak'] / GIB:.2f}",
        ]
        for row in memory["rows"]
    ]
    header = ["model", "optimizer", "parameters", "state, MiB", "state, bytes a parameter", "peak of a step, GiB"]
    note = (
        "Tensors of one training step, counted on fake tensors: no allocator's fragmentation, no CUDA context. "
        f"Commit {memory['commit']}. Made by `make memory`."
    )
    return f"{table(header, rows, left=2)}\n\n{note}\n"


def draw(steps: Record, memory: Record, folder: Path) -> Figures:
    """All figures of the benchmarks, with their captions."""
    cost, *_ = plot(steps, memory, folder / "cost")
    return {
        cost: f"Cost: time of an optimizer's step and of a whole training step (medians of {steps['turns']} turns, one "
        f"thread of {steps['machine']['cpu']}), and state and peak memory of a training step. One machine, no seeds."
    }


def plot(steps: Record, memory: Record, stem: Path) -> list[Path]:
    """Times relative to AdamW's, state a parameter, peak memory."""
    figure, axes = subplots(1, 4, figsize=(16, 4))
    models = list(steps["results"])
    for panel, kind, title in ((axes[0], "step", "optimizer's step"), (axes[1], "whole", "whole training step")):
        names = list(steps["results"][models[0]][kind])
        ratios = {n: [steps["results"][m][kind][n]["ratio to AdamW fused"] for m in models] for n in names}
        grouped_bars(panel, models, ratios)
        panel.set(ylabel="time / fused AdamW's", title=title)
    rows = {(row["model"], row["optimizer"]): row for row in memory["rows"]}
    models = list(dict.fromkeys(model for model, _ in rows))
    state = {TITLES[n]: [rows[m, n]["optimizer_state"] / rows[m, n]["parameters"] for m in models] for n in TITLES}
    peak = {TITLES[n]: [rows[m, n]["peak"] / rows[m, "adamw"]["peak"] for m in models] for n in TITLES}
    grouped_bars(axes[2], models, state)
    grouped_bars(axes[3], models, peak)
    axes[2].set(title="optimizer state", ylabel="bytes a parameter")
    axes[3].set(title="peak memory of a training step", ylabel="memory / AdamW's")
    return save_figure(figure, stem)


def grouped_bars(panel: Axes, groups: Sequence[str], bars: Mapping[str, Sequence[float]]) -> None:
    """Bars side by side in each group, each with its number."""
    width = 0.8 / len(bars)
    for i, (name, heights) in enumerate(bars.items()):
        places = [j + width * (i - (len(bars) - 1) / 2) for j in range(len(groups))]
        style: dict[str, Any] = {"color": COLOURS[i], "hatch": HATCHES[i], "edgecolor": "white", "linewidth": 0.5}
        panel.bar_label(panel.bar(places, heights, width, label=name, **style), fmt="%.2f", fontsize=7)
    panel.set_xticks(range(len(groups)), groups, fontsize=8)
    panel.legend(frameon=False, fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.08))
