"""The cells of a run: counts, tables, heat maps, spectra; from readings, never from a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ddc.report.figures import plain_log_ticks, save_figure, subplots
from ddc.report.runs import Run
from ddc.report.stages import Record
from ddc.slt.observables import OBSERVABLES
from ddc.slt.rates import Cell, RateRule, log_approach, noise_share, read_cells, shuffled_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLUMNS = {
    "activation_sigma_min": "σ_min(X)/√N",
    "gradient_lambda_min": "λ_min(G)",
    "activation_log_volume": "log det⁺ A",
    "gradient_log_volume": "log det⁺ G",
    "fisher_min": "λ_min(A)·λ_min(G)",
}
#: Layers beside each other in a figure of spectra.
MOST_COLUMNS = 7
#: Slopes at the ends of the colour scale. It is logarithmic, so that a single steep one leaves the
#: others their colours.
SLOPES = (0.1, 30.0)
APPROACH_TITLES = {
    "excess_loss": "excess loss",
    "arc_length": "arc length to the end",
    "step": "1/step",
}


def settings(run: Run) -> tuple[RateRule, str, float]:
    """Rule, approach parameter and loss floor that the run was configured with, before it ran."""
    slt = run.info["config"]["slt"]
    return RateRule(**slt["rule"]), slt["approach"], slt["loss_floor"]


def counts(cells: Sequence[Cell]) -> dict[str, int]:
    """How many cells are read, and how many refused for which reason."""
    return dict(Counter(cell.rate.verdict for cell in cells).most_common())


def null_controls(
    rows: Sequence[Mapping[str, Any]],
    untrained: Sequence[Mapping[str, Any]],
    approach: str,
    rule: RateRule,
    loss_floor: float,
) -> dict[str, float]:
    """Share of cells that the same rule reads where there is nothing to read."""
    log_t = log_approach(rows, approach, loss_floor)
    return {
        "untrained model": float(
            np.mean([c.rate.read for c in read_cells(untrained, approach, rule, loss_floor)])
        ),
        "shuffled checkpoints": shuffled_share(rows, approach, rule, loss_floor),
        "white noise": noise_share(log_t, rule, walk=False),
        "random walk": noise_share(log_t, rule, walk=True),
    }


def grid_table(cells: Sequence[Cell], title: str) -> Table:
    """Layers by observables: the slope with its interval, or the word of the refusal."""
    table = Table(title=title)
    table.add_column("layer")
    for observable in OBSERVABLES:
        table.add_column(COLUMNS[observable], justify="right")
    for layer, row in by_layer(cells).items():
        table.add_row(layer, *(describe(row[observable]) for observable in OBSERVABLES))
    return table


def by_layer(cells: Sequence[Cell]) -> dict[str, dict[str, Cell]]:
    """Cells by layer and observable."""
    grid: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        grid.setdefault(cell.layer, {})[cell.observable] = cell
    return grid


def describe(cell: Cell) -> str:
    """A cell in a few characters."""
    return described(cell.record())


def described(cell: Record) -> str:
    """The record of a cell in a few characters."""
    if cell["verdict"] != "read":
        return str(cell["verdict"])
    return f"{cell['slope']:.2f} ± {cell['high'] - cell['slope']:.2f}"


def plot_cells(cells: Sequence[Cell], title: str, stem: Path) -> list[Path]:
    """The grid as a heat map of slopes; refused cells are grey and name the reason. ``stem``.png
    and ``stem``.pdf.
    """
    records = [cell.record() for cell in cells]
    figure, panel = subplots(figsize=(9, 1.2 + 0.42 * len(by_layer(cells))))
    image = heat_map(panel, records)
    read = sum(cell.rate.read for cell in cells)
    panel.set_title(f"{title}: {read} of {len(cells)} cells read", fontsize=10)
    slope_bar(figure, image, panel)
    return save_figure(figure, stem)


def heat_map(panel: Axes, cells: Sequence[Record]) -> AxesImage:
    """Draw the records of a grid's cells; colours are slopes, on the scale of :data:`SLOPES`."""
    from matplotlib.colors import LogNorm

    colour = LogNorm(*SLOPES, clip=True)
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    slopes = np.full((len(layers), len(OBSERVABLES)), np.nan)
    panel.set_facecolor("#e4e4e4")
    panel.grid(False)
    for cell in cells:
        i, j = layers.index(cell["layer"]), list(OBSERVABLES).index(cell["observable"])
        if cell["verdict"] == "read":
            slopes[i, j] = cell["slope"]
        dark = np.isfinite(slopes[i, j]) and colour(slopes[i, j]) < 0.5
        panel.text(
            j,
            i,
            described(cell),
            ha="center",
            va="center",
            color="white" if dark else "black",
            fontsize=7.5,
        )
    panel.set_xticks(range(len(OBSERVABLES)), [COLUMNS[o] for o in OBSERVABLES], fontsize=8)
    panel.set_yticks(range(len(layers)), layers, fontsize=8)
    return panel.imshow(np.ma.masked_invalid(slopes), cmap="cividis", norm=colour, aspect="auto")


def slope_bar(figure: Figure, image: AxesImage, panels: Any) -> None:
    """The colour scale of heat maps, beside their panels."""
    label = "slope, log observable\nagainst log approach"
    bar = figure.colorbar(image, ax=panels, label=label, extend="both", aspect=30)
    plain_log_ticks(bar.ax.yaxis)


def plot_spectra(rows: Sequence[Mapping[str, Any]], title: str, stem: Path) -> list[Path]:
    """Order statistics of both second moments of every layer along training, as ``stem``.png and
    ``stem``.pdf.
    """
    from matplotlib import colormaps

    layers = [layer["layer"] for layer in rows[0]["layers"]]
    bands = math.ceil(len(layers) / MOST_COLUMNS)
    columns = math.ceil(len(layers) / bands)
    figure, panels = subplots(
        2 * bands,
        columns,
        figsize=(min(2.4 * columns + 1, 15), 2.5 * 2 * bands),
        sharex=True,
        squeeze=False,
    )
    # by layer, the panel of its activations over that of its gradients
    grid = panels.reshape(bands, 2, columns).transpose(1, 0, 2).reshape(2, -1)
    steps = [row["step"] + 1 for row in rows]
    for i, side in enumerate(("activation", "gradient")):
        for j, layer in enumerate(layers):
            panel = grid[i, j]
            panel.sharey(grid[i, 0])
            spectra = [row["layers"][j][side] for row in rows]
            size = max(len(s["spectrum"]) for s in spectra)
            for k in range(size):
                values = [
                    s["spectrum"][k] if k < len(s["spectrum"]) and s["spectrum"][k] > 0 else np.nan
                    for s in spectra
                ]
                colour = colormaps["cividis"](k / max(1, size - 1))
                panel.plot(steps, values, color=colour, linewidth=0.7)
            floor = [s["floor"] for s in spectra]
            panel.plot(steps, floor, color="black", linestyle=":", linewidth=1)
            panel.set(xscale="log", yscale="log")
            panel.set_title(layer if i == 0 else "", fontsize=9)
            panel.tick_params(labelleft=j % columns == 0, labelsize=8)
        for spare in grid[i, len(layers) :]:
            spare.set_axis_off()
    for row, (first, *_) in enumerate(panels):
        first.set_ylabel("eigenvalues of G = DᵀD/N" if row % 2 else "eigenvalues of A = XᵀX/N")
    for panel in panels[-1]:
        panel.set_xlabel("step + 1")
    figure.suptitle(f"{title}: dotted, the rounding floor", fontsize=10)
    return save_figure(figure, stem)


def cells_of(run: Run) -> list[Cell]:
    """The cells of a run's own readings, against the approach parameter that was fixed before it
    ran.
    """
    rule, approach, loss_floor = settings(run)
    return read_cells(run.readings, approach, rule, loss_floor)


def titled(run: Run, approach: str) -> str:
    """The title of a run's grid of cells."""
    return f"{run.label}, against {APPROACH_TITLES[approach]}"


def draw_readings(run: Run, folder: Path) -> list[Path]:
    """Heat map and spectra of a run's own readings, as ``cells`` and ``spectra`` in a folder; none
    without readings.
    """
    if not run.readings:
        return []
    _, approach, _ = settings(run)
    cells = plot_cells(cells_of(run), titled(run, approach), folder / "cells")
    return [*cells, *plot_spectra(run.readings, run.label, folder / "spectra")]


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """Counts, refusals and null controls of runs, by approach parameter."""
    controls = list(next(iter(reports[0]["approaches"].values()))["null_controls"])
    lines = [
        "| run | approach parameter | cells read | refused | " + " | ".join(controls) + " |",
        "| --- | --- | ---: | --- |" + " ---: |" * len(controls),
    ]
    for approach in reports[0]["approaches"]:
        for report in reports:
            found = report["approaches"][approach]
            refused = (
                ", ".join(
                    f"{word} {count}" for word, count in found["counts"].items() if word != "read"
                )
                or "–"
            )
            shares = " | ".join(f"{100 * found['null_controls'][name]:.1f}%" for name in controls)
            read = f"{found['counts'].get('read', 0)} of {found['total']}"
            lines.append(
                f"| {report['label']} | {APPROACH_TITLES[approach]} | {read} | {refused} |"
                f" {shares} |"
            )
    sources = ", ".join(sorted({report["source"] for report in reports}))
    lines += [
        "",
        (
            f"From {sources}. On the right, the share of cells that the same rule reads in null"
            " controls."
        ),
    ]
    return "\n".join(lines) + "\n"
