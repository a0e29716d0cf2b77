"""What a step costs in time and memory, as a table and a figure, from the records of the benchmarks
alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddc.report.figures import (
    COLOURS,
    HATCHES,
    MARKERS,
    Drawing,
    nth_style,
    plain_log_ticks,
    save_figure,
    subplots,
)
from ddc.report.runs import TITLES
from ddc.report.stages import Record, table
from experiments.output import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parents[1] / "results/benchmark"
GIB = 2**30
#: Optimizers to which times are compared: AdamW, as torch has it, and Muon, torch's and this
#: package's baseline.
BASES = ("AdamW foreach", "AdamW fused", "torch.optim.Muon", "Muon")
WHOLE_BASES = ("AdamW fused", "Muon")
RATIOS = tuple(f"ratio to {base}" for base in BASES)


def results() -> Results:
    """Tables and figures of the committed records."""
    makers: dict[str, Callable[[Record], str]] = {
        "speed": speed_table,
        "memory": memory_table,
        "mirror": mirror_table,
        "probe": reading_table,
        "learning_coefficient": sampling_table,
        "discovery": discovery_table,
    }
    records = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in makers}
    tables = {name: partial(make, records[name]) for name, make in makers.items()}
    return Results(RESULTS, tables, drawings(records["speed"], records["memory"]))


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
    header = [
        "model",
        "optimizer",
        "parameters",
        "state, MiB",
        "state, bytes a parameter",
        "peak of a step, GiB",
    ]
    note = (
        "Tensors of one training step, counted on fake tensors: no allocator's fragmentation, no"
        f" CUDA context. Commit {memory['commit']}. Made by `make memory`."
    )
    return f"{table(header, rows, left=2)}\n\n{note}\n"


def mirror_table(mirror: Record) -> str:
    """One row a run: what its offline mirror to W&B takes, and the share of the run that this
    is.
    """
    rows = []
    for row in mirror["rows"]:
        parts = [row[key] for key in ("start", "rows_and_readings", "figures", "end", "service")]
        rows.append(
            [
                row["run"],
                f"{row['rows']}, {row['readings']}",
                *(f"{part:.2f}" for part in parts),
                f"{row['bytes'] / 2**20:.2f}",
                f"{row['run_seconds']:.0f}",
                f"{100 * sum(parts) / row['run_seconds']:.1f}%",
            ]
        )
    header = [
        "offline mirror to W&B",
        "rows, readings",
        "start",
        "rows and readings",
        "figures",
        "end",
    ]
    header += ["W&B's process", "MiB on disk", "run, s", "share of it"]
    note = (
        "Seconds of the processor: committed runs, sent again in a process of their own, from the"
        f" import of wandb until the file is whole. Medians of {mirror['turns']} turns,"
        f" {mirror['machine']['cpu']}, commit {mirror['commit']}. Made by `python -m"
        " benchmarks.mirror`."
    )
    return f"{table(header, rows)}\n\n{note}\n"


def sampling_table(record: Record) -> str:
    """Two rows a problem: what ddc and devinterp estimate, and their times."""
    lines = [
        (
            "| problem | truth | package | estimate (standard error) of each turn | median seconds"
            " | devinterp / ddc |"
        ),
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, result in record["results"].items():
        seconds = {
            p: statistics.median(run["seconds"] for run in result[p]) for p in ("ddc", "devinterp")
        }
        for package in ("ddc", "devinterp"):
            values = ", ".join(
                f"{run['value']:.2f} ({run['error']:.2f})" for run in result[package]
            )
            ratio = f"{seconds['devinterp'] / seconds['ddc']:.1f}" if package == "ddc" else ""
            truth = "unknown" if result["truth"] is None else f"{result['truth']:g}"
            lines.append(
                f"| {name} | {truth} | {package} | {values} | {seconds[package]:.2f} | {ratio} |"
            )
    machine = record["machine"]
    lines += [
        "",
        (
            "Same model, data, loss, step size, nβ, γ, batch size, chains and draws, without"
            " burn-in, which lowers both. ddc runs its chains in one batch and takes L(w*) on each"
            " draw's own batch; devinterp runs them in turn, takes L(w*) once, over all samples,"
            " and writes every loss to a zarr store, which its seconds include. One thread of"
            f" {machine['cpu']}, float32. Commit {record['commit']}. Made by `python -m"
            " benchmarks.learning_coefficient`."
        ),
    ]
    return "\n".join(lines) + "\n"


def reading_table(probe: Record) -> str:
    """One row a size of the probe and number of threads: what a reading takes."""
    rows = [
        [str(r["sequences"]), str(r["threads"]), f"{r['seconds']:.2f}", f"{r['grown_mib']:.0f}"]
        for r in probe["rows"]
    ]
    header = ["sequences of 128", "threads", "seconds", "memory grown, MiB"]
    return (
        f"{table(header, rows, left=0)}\n\nGPT of scale=cpu, embedding and 4 blocks. Commit"
        f" {probe['commit']}.\n"
    )


def discovery_table(discovery: Record) -> str:
    """One row a model: what finding its gauges takes, by rules alone and with the trial."""
    rows = [
        [
            r["model"],
            f"{r['parameters'] / 1e9:.2f}B",
            "tried" if r["verify"] else "by rules",
            f"{r['cpu_seconds']:.1f}",
            f"{r['grown_gib']:.2f}",
            f"{r['peak_gib']:.2f}",
            str(sum(r["gauges"].values())),
            str(r["unchecked"]),
        ]
        for r in discovery["rows"]
    ]
    header = ["model", "parameters", "gauges", "CPU seconds", "memory grown, GiB"]
    header += ["peak, GiB", "found", "not tried"]
    commits = ", ".join(sorted({str(r["commit"]) for r in discovery["rows"]}))
    return (
        f"{table(header, rows)}\n\nOne thread; the model itself is in the peak. Commit {commits}."
        " Made by `python -m benchmarks.discovery`.\n"
    )


def speed_table(speed: Record) -> str:
    """Times, then memory and traffic, one row a model and optimizer; then slopes. What was not
    measured is a dash.
    """
    rows = [
        (model, part, name, one)
        for model, part in speed["models"].items()
        for name, one in part["optimizers"].items()
    ]
    measured = [row for row in rows if "step" in row[3]]
    times = [
        [
            model,
            name,
            *(number(one["step"], key, 2) for key in ("ms", "mean ms", *RATIOS)),
            number(one["whole"], "ms", 1),
            *(number(one["whole"], f"ratio to {base}", 3) for base in WHOLE_BASES),
        ]
        for model, _, name, one in measured
    ]
    ratios = [f"/ {base}" for base in BASES]
    header = [
        "model",
        "optimizer",
        "step, ms",
        "mean, ms",
        *ratios,
        "whole, ms",
        *(f"whole / {base}" for base in WHOLE_BASES),
    ]
    parts = [table(header, times, left=2)]
    counted = [row for row in measured if "state_bytes" in row[3]]
    if counted:
        header = [
            "model",
            "optimizer",
            "state, MiB",
            "/ AdamW's",
            "least traffic, bytes a parameter",
            "share of it",
        ]
        parts.append(table(header, [traffic_row(*row) for row in counted], left=2))
    if "scaling" in speed:
        parts.append(slope_table(speed["scaling"]))
    notes = [
        f"- {conditions(part, model)} Whole training step: {part['batch']}."
        for model, part in speed["models"].items()
    ]
    notes += [
        f"- {model}: {name} left out: {one['skipped']}."
        for model, _, name, one in rows
        if "skipped" in one
    ]
    if "scaling" in speed:
        notes.append(f"- {conditions(speed['scaling'], 'Slopes')}")
    note = (
        "Step: the optimizer's alone. Whole: forward, backward, clipping and step. Medians over"
        " turns; ratios are medians of the ratios of one turn, to the same column of the optimizer"
        " named. How to read it: docs/speed.md. Made by `make benchmark`."
    )
    return "\n\n".join([*parts, note, "\n".join(notes)]) + "\n"


def number(values: Mapping[str, float], key: str, digits: int) -> str:
    """A number of a record, or a dash where it has none."""
    return f"{values[key]:.{digits}f}" if key in values else "–"


def traffic_row(model: str, part: Record, name: str, one: Record) -> list[str]:
    """State, least traffic, and the share of the machine's copy bandwidth that the step makes of
    it.
    """
    rate = one["least_bytes"] / (one["step"]["ms"] / 1e3)
    return [
        model,
        name,
        f"{one['state_bytes'] / 2**20:.1f}",
        f"{one['state_bytes'] / part['optimizers']['AdamW fused']['state_bytes']:.2f}",
        f"{one['least_bytes'] / part['parameters']:.1f}",
        f"{100 * rate / part['copy_bandwidth']:.0f}%",
    ]


def conditions(part: Record, title: str) -> str:
    """Under which a part of the record was measured."""
    machine = part["machine"]
    where = (
        machine["gpu"] if part.get("device", "cpu") != "cpu" else f"one thread of {machine['cpu']}"
    )
    copies = (
        f", which copies {part['copy_bandwidth'] / 1e9:.1f} GB/s (read and written)"
        if "copy_bandwidth" in part
        else ""
    )
    return f"{title}: {part['turns']} turns, {where}{copies}, float32, commit {part['commit']}."


def slopes(along: Record) -> dict[str, tuple[float, float]]:
    """By optimizer, the slopes of log time, and of log time relative to fused AdamW's, against log
    size.
    """
    sizes = np.log(along["sizes"])
    return {
        name: tuple(
            float(np.polyfit(sizes, np.log([one[key] for one in times]), 1)[0])
            for key in ("ms", RATIOS[1])
        )  # type: ignore[misc]
        for name, times in along["optimizers"].items()
    }


def slope_table(scaling: Record) -> str:
    """One row an axis and optimizer: times at both ends and slopes."""
    rows = []
    for axis, along in scaling["along"].items():
        sizes, parameters = np.log(along["sizes"]), np.log(along["parameters"])
        ends = f"{axis}, {along['sizes'][0]} to {along['sizes'][-1]}"
        growth = np.polyfit(sizes, parameters, 1)[0]
        for name, (slope, relative) in slopes(along).items():
            times = [one["ms"] for one in along["optimizers"][name]]
            rows.append(
                [
                    ends,
                    name,
                    f"{times[0]:.2f}",
                    f"{times[-1]:.2f}",
                    f"{growth:.2f}",
                    f"{slope:.2f}",
                    f"{relative:.2f}",
                ]
            )
    header = [
        "along",
        "optimizer",
        "first, ms",
        "last, ms",
        "slope of parameters",
        "slope of time",
        "slope of time / AdamW fused",
    ]
    return table(header, rows, left=2)


def drawings(speed: Record, memory: Record) -> dict[str, Drawing]:
    """All figures of the benchmarks, by name."""
    machines = ", ".join(dict.fromkeys(part["machine"]["cpu"] for part in speed["models"].values()))
    found = {
        "cost": Drawing(
            partial(plot, speed, memory),
            "Cost: time of an optimizer's step and of a whole training step (medians of turns,"
            f" {machines}), and state and peak memory of a training step. One machine, no seeds.",
        )
    }
    if "scaling" in speed:
        found["scaling"] = Drawing(
            partial(plot_scaling, speed["scaling"]),
            "Time of an optimizer's step along width, depth and number of heads of a GPT; log-log"
            " slopes.",
        )
    return found


def plot(speed: Record, memory: Record, stem: Path) -> list[Path]:
    """Times relative to AdamW's, state a parameter, peak memory."""
    figure, axes = subplots(2, 2, figsize=(12, 9.5), height_ratios=(3, 2))
    times, memories = axes
    # what the complete group costs stands in the table: a colour a model would not do
    models = {m: part for m, part in speed["models"].items() if not m.endswith("complete group")}
    for panel, kind, title in (
        (times[0], "step", "optimizer's step"),
        (times[1], "whole", "whole training step"),
    ):
        ratio_dots(panel, models, kind)
        panel.set(xlabel="time / fused AdamW's", title=title)
    times[1].tick_params(labelleft=False)
    figure.legend(
        *times[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    rows = {(row["model"], row["optimizer"]): row for row in memory["rows"]}
    measured = list(dict.fromkeys(model for model, _ in rows))
    names = [n for n in TITLES if all((m, n) in rows for m in measured)]
    state = {
        TITLES[n]: [rows[m, n]["optimizer_state"] / rows[m, n]["parameters"] for m in measured]
        for n in names
    }
    peak = {
        TITLES[n]: [rows[m, n]["peak"] / rows[m, "adamw"]["peak"] for m in measured] for n in names
    }
    grouped_bars(memories[0], measured, state)
    grouped_bars(memories[1], measured, peak)
    memories[0].set(title="optimizer state", ylabel="bytes a parameter")
    memories[1].set(title="peak memory of a training step", ylabel="memory / AdamW's")
    figure.legend(
        *memories[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    return save_figure(figure, stem)


def ratio_dots(panel: Axes, models: Record, kind: str) -> None:
    """One line an optimizer, one marker a model."""
    names = list(
        dict.fromkeys(
            name
            for part in models.values()
            for name, one in part["optimizers"].items()
            if kind in one
        )
    )
    for i, (model, part) in enumerate(models.items()):
        ratios = {
            name: one[kind][RATIOS[1]] for name, one in part["optimizers"].items() if kind in one
        }
        style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "none"}
        # beside each other where they have the same time
        shift = 0.6 * ((i + 0.5) / len(models) - 0.5)
        heights = [names.index(name) + shift for name in ratios]
        panel.plot([*ratios.values()], heights, label=model, markersize=5, **style)
    panel.set_xscale("log")
    plain_log_ticks(panel.xaxis)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()


def plot_scaling(scaling: Record, stem: Path) -> list[Path]:
    """Milliseconds of a step against each size, with slopes."""
    figure, axes = subplots(1, len(scaling["along"]), figsize=(13, 4), sharey=True)
    for panel, (axis, along) in zip(axes, scaling["along"].items(), strict=True):
        for i, (name, (slope, _)) in enumerate(slopes(along).items()):
            times = [one["ms"] for one in along["optimizers"][name]]
            panel.plot(
                along["sizes"], times, label=f"{name}, {slope:.2f}", **nth_style(i, marker=True)
            )
        panel.set(xscale="log", yscale="log", xlabel=axis)
        plain_log_ticks(panel.xaxis)
        panel.legend(frameon=False, fontsize="small", title="optimizer, slope")
    axes[0].set(ylabel="milliseconds of a step")
    return save_figure(figure, stem)


def grouped_bars(panel: Axes, groups: Sequence[str], bars: Mapping[str, Sequence[float]]) -> None:
    """Bars side by side in each group, each with its number."""
    width = 0.8 / len(bars)
    for i, (name, heights) in enumerate(bars.items()):
        places = [j + width * (i - (len(bars) - 1) / 2) for j in range(len(groups))]
        style: dict[str, Any] = {
            "color": COLOURS[i],
            "hatch": HATCHES[i],
            "edgecolor": "white",
            "linewidth": 0.5,
        }
        panel.bar_label(
            panel.bar(places, heights, width, label=name, **style), fmt="%.2f", fontsize=7
        )
    panel.set_xticks(range(len(groups)), groups)
    panel.margins(y=0.1)
