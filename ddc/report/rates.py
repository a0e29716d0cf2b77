"""The cells of a run: counts, tables, heat maps, spectra; from readings, never from a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ddc.report.figures import save_figure, subplots
from ddc.report.runs import Run
from ddc.report.stages import Record
from ddc.slt.observables import OBSERVABLES
from ddc.slt.rates import Cell, RateRule, log_approach, noise_share, read_cells, shuffled_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

COLUMNS = {
    "activation_sigma_min": "σ_min(X)/√N",
    "gradient_lambda_min": "λ_min(G)",
    "activation_log_volume": "log det⁺ A",
    "gradient_log_volume": "log det⁺ G",
    "fisher_min": "λ_min(A)·λ_min(G)",
}
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
    image = heat_map(panel, records, largest_slope(records))
    read = sum(cell.rate.read for cell in cells)
    panel.set_title(f"{title}: {read} of {len(cells)} cells read", fontsize=10)
    figure.colorbar(image, label="slope, log observable against log approach")
    return save_figure(figure, stem)


def largest_slope(cells: Sequence[Record]) -> float:
    """The largest slope of the cells that are read; 1 where none is."""
    return max((cell["slope"] for cell in cells if cell["verdict"] == "read"), default=1.0)


def heat_map(panel: Axes, cells: Sequence[Record], top: float) -> AxesImage:
    """Draw the records of a grid's cells; colours go from slope 0 to ``top``."""
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    slopes = np.full((len(layers), len(OBSERVABLES)), np.nan)
    panel.set_facecolor("#e4e4e4")
    panel.grid(False)
    for cell in cells:
        i, j = layers.index(cell["layer"]), list(OBSERVABLES).index(cell["observable"])
        if cell["verdict"] == "read":
            slopes[i, j] = cell["slope"]
        dark = slopes[i, j] < top / 2  # nan is not
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
    return panel.imshow(
        np.ma.masked_invalid(slopes), cmap="cividis", vmin=0, vmax=top, aspect="auto"
    )


def plot_spectra(rows: Sequence[Mapping[str, Any]], title: str, stem: Path) -> list[Path]:
    """Order statistics of both second moments of every layer along training, as ``stem``.png and
    ``stem``.pdf.
    """
    from matplotlib import colormaps

    layers = [layer["layer"] for layer in rows[0]["layers"]]
    figure, grid = subplots(
        2,
        len(layers),
        figsize=(2.4 * len(layers) + 1, 5),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    steps = [row["step"] + 1 for row in rows]
    for j, layer in enumerate(layers):
        for i, side in enumerate(("activation", "gradient")):
            spectra = [row["layers"][j][side] for row in rows]
            size = max(len(s["spectrum"]) for s in spectra)
            for k in range(size):
                values = [
                    s["spectrum"][k] if k < len(s["spectrum"]) and s["spectrum"][k] > 0 else np.nan
                    for s in spectra
                ]
                grid[i, j].plot(
                    steps, values, color=colormaps["cividis"](k / max(1, size - 1)), linewidth=0.7
                )
            grid[i, j].plot(
                steps, [s["floor"] for s in spectra], color="black", linestyle=":", linewidth=1
            )
            grid[i, j].set(xscale="log", yscale="log")
        grid[0, j].set_title(layer, fontsize=9)
        grid[1, j].set_xlabel("step + 1")
    grid[0, 0].set_ylabel("eigenvalues of A = XᵀX/N")
    grid[1, 0].set_ylabel("eigenvalues of G = DᵀD/N")
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
