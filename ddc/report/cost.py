"""What a step costs in time and memory, as a table and a figure, from the records of the benchmarks alone."""

from __future__ import annotations

from pathlib import Path

from ddc.report.figures import COLOURS, Figures, save_figure, subplots
from ddc.report.runs import TITLES
from ddc.report.stages import Record, table

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
    figure, axes = subplots(1, 4, figsize=(15, 3.6))
    for panel, kind, title in ((axes[0], "step", "optimizer's step"), (axes[1], "whole", "whole training step")):
        models = list(steps["results"])
        names = list(steps["results"][models[0]][kind])
        for i, name in enumerate(names):
            values = [steps["results"][model][kind][name]["ratio to AdamW fused"] for model in models]
            places = [j + 0.2 * (i - (len(names) - 1) / 2) for j in range(len(models))]
            bars = panel.bar(places, values, 0.18, color=COLOURS[i], edgecolor="black", linewidth=0.5, label=name)
            panel.bar_label(bars, fmt="%.2f", fontsize=7)
        panel.set_xticks(range(len(models)), models)
        panel.set(ylabel="time / fused AdamW's", title=title)
    axes[0].legend(frameon=False, fontsize="small")
    models = list(dict.fromkeys(row["model"] for row in memory["rows"]))
    for panel, title, value in (
        (axes[2], "optimizer state (bytes a parameter)", lambda row: row["optimizer_state"] / row["parameters"]),
        (axes[3], "peak of a training step (GiB)", lambda row: row["peak"] / GIB),
    ):
        for i, name in enumerate(TITLES):
            rows = [row for row in memory["rows"] if row["optimizer"] == name]
            places = [models.index(row["model"]) + 0.2 * (i - 1.5) for row in rows]
            heights = [value(row) for row in rows]
            bars = panel.bar(places, heights, 0.18, color=COLOURS[i], edgecolor="black", linewidth=0.5)
            panel.bar_label(bars, labels=[f"{h:.2g}" for h in heights], fontsize=7)
            bars.set_label(TITLES[name])
        panel.set_xticks(range(len(models)), models, fontsize=8)
        panel.set(title=title)
    axes[3].set_yscale("log")
    axes[2].legend(frameon=False, fontsize="small", loc="lower right")
    return save_figure(figure, stem)
