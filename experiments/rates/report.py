"""Claim C2 as tables and figures: cells, refusals, fits, learning coefficients.

From records alone: the folder of each run with its readings, and in it the ``rates.json`` that
``scripts/read_rates.py`` made; and ``walks.jsonl`` of :mod:`experiments.rates.measure`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddc.report.claims import (
    FEW_SEEDS,
    Claim,
    Verdict,
    effect,
    rule,
    tested,
    verdict,
    verdict_table,
)
from ddc.report.figures import (
    COLOURS,
    HATCHES,
    Drawing,
    nth_style,
    plain_log_ticks,
    save_figure,
    subplots,
)
from ddc.report.paired import BASELINE, SUBJECT, interval, p_cell
from ddc.report.rates import (
    APPROACH_TITLES,
    COLUMNS,
    cells_of,
    heat_map,
    plot_cells,
    plot_spectra,
    settings,
    slope_bar,
    titled,
)
from ddc.report.rates import markdown as cells_table
from ddc.report.runs import TITLES, Run, markdown_table, plot_curves, read_lines
from ddc.report.stages import Record, commits, table
from ddc.report.statistics import combined_p, holm, paired_p
from ddc.slt.rates import log_approach, log_observables
from experiments.output import Results
from experiments.rates.plan import EXPERIMENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPTIMIZERS = (BASELINE, SUBJECT)
#: By claim, the figure beside the main table.
FIGURES = {"C2": "refusals"}
FITS_SHOWN = 4


@dataclass(frozen=True)
class Reading:
    """A run with what was read of it."""

    run: Run
    rates: Record

    @property
    def optimizer(self) -> str:
        """Name of its optimizer."""
        return str(self.run.info["config"]["optimizer"]["name"])

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.run.info["seed"])

    @property
    def primary(self) -> Record:
        """What was found against the approach parameter that was fixed before the run."""
        return self.rates["approaches"][self.rates["primary"]]

    @property
    def read(self) -> int:
        """How many cells are read against it."""
        return int(self.primary["counts"].get("read", 0))


@dataclass(frozen=True)
class Committed:
    """All that is committed of the claim.

    Attributes:
        readings: of both grids.
        walks: what :mod:`experiments.rates.measure` made of them; may be empty.
        estimated: runs with estimates of the learning coefficient.
    """

    readings: Sequence[Reading]
    walks: Sequence[Record] = ()
    estimated: Sequence[Run] = ()


def read_folder(folder: Path) -> list[Reading]:
    """All readings in a folder, by seed and optimizer; runs that diverged have none."""
    paths = sorted(folder.glob("*/rates.json"))
    found = [Reading(Run.read(path.parent), json.loads(path.read_text())) for path in paths]
    return sorted(found, key=lambda each: (each.seed, each.optimizer))


def load() -> Committed:
    """What is committed; the report shows the readings that there are.

    Raises:
        ValueError: there are none.
    """
    results = EXPERIMENT.results
    readings = [each for stage in EXPERIMENT.read for each in read_folder(results / stage)]
    if not readings:
        raise ValueError(f"{results} has no readings: run and collect them first")
    estimated = [Run.read(p.parent) for p in sorted(results.glob("coefficients/*/run.json"))]
    return Committed(readings, read_lines(results / "walks.jsonl"), estimated)


def results(committed: Committed, claims: Mapping[str, Claim]) -> list[Results]:
    """Tables and figures of all runs together, then the figures of each that was read."""
    readings = committed.readings
    small = [each.run for each in readings if each.run.folder.parent.name == "small"]
    small.sort(key=lambda run: str(run.info["id"]))
    tables = {
        "table": partial(markdown, committed, claims),
        "comparison": partial(markdown_table, small),
    }
    figures = drawings(committed)
    figures["comparison"] = Drawing(
        partial(plot_curves, small),
        "The runs of the 5 × 5 grid: loss curves, and the gap against the train loss, a line a"
        " run.",
    )
    return [
        Results(EXPERIMENT.results, tables, figures),
        *(results_of_run(each.run) for each in readings),
    ]


def results_of_run(run: Run) -> Results:
    """The figures of one run, as ``scripts/read_rates.py`` draws them."""
    _, primary, _ = settings(run)
    cells = Drawing(partial(plot_cells, cells_of(run), titled(run, primary)), "Cells of the run.")
    spectra = Drawing(partial(plot_spectra, run.readings, run.label), "Spectra along the run.")
    return Results(run.folder, figures={"rates": cells, "rates-spectra": spectra})


def grids(readings: Sequence[Reading]) -> dict[str, dict[int, dict[str, Reading]]]:
    """Readings by grid (``5 × 5``), seed and optimizer, of the seeds that both optimizers have."""
    found: dict[str, dict[int, dict[str, Reading]]] = {}
    for each in readings:
        columns = len(COLUMNS)
        grid = found.setdefault(f"{each.primary['total'] // columns} × {columns}", {})
        grid.setdefault(each.seed, {})[each.optimizer] = each
    return {
        name: {seed: pair for seed, pair in seeds.items() if pair.keys() == {*OPTIMIZERS}}
        for name, seeds in found.items()
    }


def verdicts(committed: Committed, claims: Mapping[str, Claim]) -> list[Verdict]:
    """Claim C2 by grid: cells read, DDCAdam - AdamW, paired by seed; p-values adjusted over the
    grids.

    What is known against the verdict takes its numbers of the walks.
    """
    claim, found, by_grid = claims["C2"], [], grids(committed.readings)
    gains = {
        name: [float(pair[SUBJECT].read - pair[BASELINE].read) for pair in seeds.values()]
        for name, seeds in by_grid.items()
    }
    p_values = dict(zip(gains, holm([paired_p(each) for each in gains.values()]), strict=True))
    for name, seeds in by_grid.items():
        counts = {o: [pair[o].read for pair in seeds.values()] for o in OPTIMIZERS}
        means = {o: statistics.mean(each) for o, each in counts.items()}
        factor = claim.values[SUBJECT] / claim.values[BASELINE]
        enough = means[SUBJECT] >= claim.enough * factor * means[BASELINE]
        config = next(iter(seeds.values()))[SUBJECT].run.info["config"]
        ours = "; ".join(
            f"{TITLES[o]} {', '.join(map(str, counts[o]))}" for o in reversed(OPTIMIZERS)
        )
        found.append(
            Verdict(
                claim.id,
                f"matched, {name} cells",
                f"{ours}: {interval(gains[name], '.1f')}",
                p_cell(p_values[name]),
                str(len(seeds)),
                tested(p_values[name]),
                f"GPT, {config['model']['layers']} layers, width {config['model']['width']}, 40 kB"
                " of text",
                verdict([effect(gains[name], p_values[name], claim.level, enough)]),
                invariant(seeds, committed.walks),
            )
        )
    return found


def invariant(seeds: Mapping[int, Mapping[str, Reading]], walks: Sequence[Record]) -> str:
    """What the counted cells are, and how often walks that move as they do together read as
    many.
    """
    pairs = [pair[optimizer] for pair in seeds.values() for optimizer in OPTIMIZERS]
    read = [cell for each in pairs for cell in each.primary["cells"] if cell["verdict"] == "read"]
    volumes = sum(cell["observable"] == "activation_log_volume" for cell in read)
    text = (
        f"all cells are gauge-invariant, so drift along orbits cannot blur them; {volumes} of the"
        f" {len(read)} cells read are log-volumes of activations, which move together"
    )
    by_run = {record["run"]: record for record in walks}
    chances = [
        np.mean(np.array(by_run[each.run.info["id"]]["correlated"]) >= each.read)
        for each in pairs
        if each.optimizer == SUBJECT and each.run.info["id"] in by_run
    ]
    if chances:
        span = " to ".join(
            dict.fromkeys(f"{chance:.2f}" for chance in (min(chances), max(chances)))
        )
        text += f": correlated walks read as many as DDCAdam's runs with probability {span}"
    return text


def walk_table(readings: Sequence[Reading], walks: Sequence[Record]) -> str:
    """One row a run: cells read, and what walks read, independent or with the cells' own
    correlation.
    """
    by_run = {record["run"]: record for record in walks}
    rows = []
    for each in readings:
        if (record := by_run.get(each.run.info["id"])) is None:
            continue
        correlated, independent = (np.array(record[key]) for key in ("correlated", "independent"))
        rows.append(
            [
                f"{each.run.label}, {each.primary['total']} cells",
                str(each.read),
                f"{statistics.median(record['block_correlation']):.2f}",
                *(
                    f"{counts.mean():.1f}, {np.quantile(counts, 0.95):.0f}"
                    for counts in (independent, correlated)
                ),
                *(f"{np.mean(counts >= each.read):.3f}" for counts in (independent, correlated)),
            ]
        )
    header = [
        "run",
        "cells read",
        "correlation of log-volumes",
        "independent walks: mean, 95th percentile",
    ]
    header += ["correlated walks: mean, 95th percentile", "p, independent", "p, correlated"]
    return table(header, rows)


def together(readings: Sequence[Reading], walks: Sequence[Record]) -> str:
    """What the p-values of correlated walks come to over the seeds of each grid and optimizer, by
    Fisher's method.
    """
    by_run = {record["run"]: record for record in walks}
    parts = []
    for name, seeds in grids(readings).items():
        for optimizer in OPTIMIZERS:
            mine = [
                pair[optimizer]
                for pair in seeds.values()
                if pair[optimizer].run.info["id"] in by_run
            ]
            counts = [np.array(by_run[each.run.info["id"]]["correlated"]) for each in mine]
            p = [
                (np.sum(c >= each.read) + 1) / (len(c) + 1)
                for c, each in zip(counts, mine, strict=True)
            ]
            if len(p) > 1:
                parts.append(
                    f"{TITLES[optimizer]}, {name} cells, {len(p)} seeds: {combined_p(p):.2g}"
                )
    return (
        "Over seeds together, by Fisher's method, against correlated walks:"
        f" {'; '.join(parts) or '–'}."
    )


def markdown(committed: Committed, claims: Mapping[str, Claim]) -> str:
    """All tables."""
    readings, walks = committed.readings, committed.walks
    parts = [
        (
            "A *cell* is one layer by one observable. It is read, or refused for a reason, by one"
            " rule for all runs (docs/measurement.md)."
        ),
        "## Claim C2",
        verdict_table(claims, verdicts(committed, claims)),
        f"{rule(claims['C2'])} {FEW_SEEDS}",
        "## Random walks that move as the cells do",
        walk_table(readings, walks),
        together(readings, walks),
        (
            f"Of {len(walks[0]['correlated'])} grids of random walks each, against the primary"
            " approach parameter: independent ones, and ones whose increments correlate as those"
            " of the run's own cells. Correlation: median over pairs of blocks, of the increments"
            " of the log-volume of activations. p: share of the grids in which at least as many"
            " cells are read as in the run. Layers that move together are read together, so"
            f" independent walks are too easy a null. Commit {commits(walks)}. Made by `make"
            " rates`."
        ),
    ]
    for name, seeds in grids(readings).items():
        reports = [pair[optimizer].rates for optimizer in OPTIMIZERS for pair in seeds.values()]
        parts += [
            f"## Cells of the {name} grid",
            cells_table(reports).rstrip("\n"),
            (
                f"Commit of the runs {commits(reports, 'run_commit')}, of the readings"
                f" {commits(reports)}."
            ),
        ]
    parts.append("Made by `make report` from the runs' folders beside this file.")
    return "\n\n".join(parts) + "\n"


def drawings(committed: Committed) -> dict[str, Drawing]:
    """All figures of the experiment, by name."""
    readings = committed.readings
    cells = {
        f"cells-{name.replace(' × ', 'x')}": Drawing(
            partial(plot_grids, seeds),
            f"Cells of the {name} grid, AdamW left, DDCAdam right, a row a seed ({len(seeds)}"
            " seeds). Numbers are slopes with half their interval; a word is the reason of a"
            " refusal.",
        )
        for name, seeds in grids(readings).items()
    }
    return cells | {
        "refusals": Drawing(
            partial(plot_refusals, readings),
            "Cells read and refused by reason, each run; and the share of cells that the same rule"
            " reads in null controls, against excess loss.",
        ),
        "fits": Drawing(
            partial(plot_fits, readings),
            "Single cells that are read, at most the first four of each optimizer, first seed: the"
            " observable against excess loss, the points of the window filled, the fitted power as"
            " a line.",
        ),
        "arc_length": Drawing(
            partial(plot_arc_length, readings),
            "Distance travelled across gauge orbits: arc length in the invariant metric since the"
            " start, a line a run. A function of orbits, unlike the drift along them.",
        ),
        "learning_coefficient": Drawing(
            partial(plot_coefficients, committed.estimated),
            "Estimates of the learning coefficient over training, with intervals over chains, one"
            " setting for all; one seed.",
        ),
    }


def plot_grids(seeds: Mapping[int, Mapping[str, Reading]], stem: Path) -> list[Path]:
    """Heat maps of slopes: a row a seed, a column an optimizer."""
    pairs = [pair[optimizer] for pair in seeds.values() for optimizer in OPTIMIZERS]
    layers = pairs[0].primary["total"] // len(COLUMNS)
    size = (15, len(seeds) * (0.9 + 0.32 * layers))
    figure, axes = subplots(len(seeds), 2, figsize=size, squeeze=False, sharey=True)
    for panel, each in zip(axes.flat, pairs, strict=True):
        image = heat_map(panel, each.primary["cells"])
        title = f"{each.run.label}, against {APPROACH_TITLES[each.rates['primary']]}"
        panel.set_title(f"{title}: {each.read} of {each.primary['total']} read", fontsize=9)
    slope_bar(figure, image, axes)
    return save_figure(figure, stem)


def plot_refusals(readings: Sequence[Reading], stem: Path) -> list[Path]:
    """Verdicts of each run as stacked bars, null controls beside them."""
    words = list(dict.fromkeys(word for each in readings for word in each.primary["counts"]))
    words = ["read", *(word for word in words if word != "read")]
    titles = [f"{each.run.label}, {each.primary['total']} cells" for each in readings]
    figure, (bars, controls) = subplots(1, 2, figsize=(13, 0.35 * len(readings) + 1.8), sharey=True)
    left = np.zeros(len(readings))
    for i, word in enumerate(words):
        shares = np.array(
            [each.primary["counts"].get(word, 0) / each.primary["total"] for each in readings]
        )
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "hatch": HATCHES[(i + i // len(COLOURS)) % len(HATCHES)],
            "edgecolor": "white",
        }
        bars.barh(
            range(len(readings)), 100 * shares, left=100 * left, label=word, linewidth=0.5, **style
        )
        left += shares
    bars.set_yticks(range(len(readings)), titles, fontsize=8)
    bars.invert_yaxis()
    bars.set(xlabel="cells (%)")
    bars.legend(
        frameon=False,
        fontsize="small",
        ncols=len(words),
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
    )
    for i, name in enumerate(readings[0].primary["null_controls"]):
        controlled = [100 * each.primary["null_controls"][name] for each in readings]
        style = nth_style(i, marker=True) | {"linestyle": "none"}
        controls.plot(controlled, range(len(readings)), label=name, **style)
    read = [100 * each.read / each.primary["total"] for each in readings]
    controls.plot(read, range(len(readings)), "k*", label="the run itself")
    controls.set(xlabel="cells read (%)")
    controls.legend(
        frameon=False, fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    return save_figure(figure, stem)


def plot_fits(readings: Sequence[Reading], stem: Path) -> list[Path]:
    """Single read cells of the first seed of the smallest grid."""
    pair = next(iter(next(iter(grids(readings).values())).values()))
    shown = [
        (pair[optimizer], cell)
        for optimizer in OPTIMIZERS
        for cell in [c for c in pair[optimizer].primary["cells"] if c["verdict"] == "read"][
            :FITS_SHOWN
        ]
    ]
    columns = min(3, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure, axes = subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False)
    for panel, (each, cell) in zip(axes.flat, shown, strict=False):
        plot_fit(panel, each, cell)
    for panel in axes.flat[len(shown) :]:
        panel.set_axis_off()
    return save_figure(figure, stem)


def plot_fit(panel: Axes, reading: Reading, cell: Record) -> None:
    """One cell that is read: its points, those of the window filled, and the fitted power."""
    _, approach, loss_floor = settings(reading.run)
    x = log_approach(reading.run.readings, approach, loss_floor) / np.log(10)
    series = log_observables(reading.run.readings)
    y = series[cell["layer"], cell["observable"]] / np.log(10)
    there = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    window = there[np.argsort(x[there])][: cell["checkpoints"]]
    style: dict[str, Any] = {
        "color": COLOURS[OPTIMIZERS.index(reading.optimizer)],
        "marker": "o",
        "linestyle": "none",
        "markersize": 4,
    }
    panel.plot(x[there], y[there], fillstyle="none", **style)
    panel.plot(x[window], y[window], **style)
    line = cell["slope"] * (x[window] - x[window].mean()) + y[window].mean()
    panel.plot(x[window], line, "k-", linewidth=1)
    slope = f"slope {cell['slope']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"
    title = f"{reading.run.label}: {cell['layer']}, {COLUMNS[cell['observable']]}"
    panel.set_title(f"{title}\n{slope}, R² {cell['r2']:.2f}", fontsize=8)
    panel.set(xlabel="log10 excess loss", ylabel="log10 observable")


def plot_arc_length(readings: Sequence[Reading], stem: Path) -> list[Path]:
    """Arc length since the start against steps, a panel a grid."""
    by_grid = grids(readings)
    figure, axes = subplots(1, len(by_grid), figsize=(5.5 * len(by_grid), 3.6), squeeze=False)
    for panel, (name, seeds) in zip(axes[0], by_grid.items(), strict=True):
        for i, optimizer in enumerate(OPTIMIZERS):
            for j, pair in enumerate(seeds.values()):
                rows = pair[optimizer].run.readings
                label = None if j else f"{TITLES[optimizer]}, seeds: {len(seeds)}"
                steps, lengths = ([row[key] for row in rows] for key in ("step", "arc_length"))
                panel.plot(steps, lengths, label=label, **nth_style(i))
        panel.set(
            title=f"runs of the {name} grid", xlabel="step", ylabel="arc length across orbits"
        )
        panel.legend(frameon=False, fontsize="small")
    return save_figure(figure, stem)


def coefficients(run: Run) -> list[tuple[int, dict[str, Any]]]:
    """(step, estimate) of the readings that have one."""
    return [
        (row["step"], row["learning_coefficient"])
        for row in run.readings
        if row.get("learning_coefficient")
    ]


def plot_coefficients(runs: Sequence[Run], stem: Path) -> list[Path]:
    """Estimates with intervals against steps, a line a run."""
    figure, panel = subplots(figsize=(6, 4))
    for i, run in enumerate(runs):
        found = [(step, each) for step, each in coefficients(run) if "value" in each]
        values, low, high = (
            np.array([each[key] for _, each in found]) for key in ("value", "low", "high")
        )
        style = nth_style(i, marker=True) | {"capsize": 3, "label": run.label}
        panel.errorbar([step for step, _ in found], values, (values - low, high - values), **style)
    panel.set(
        xscale="log", yscale="log", xlabel="step", ylabel="estimate of the learning coefficient"
    )
    plain_log_ticks(panel.yaxis)
    panel.legend(frameon=False, fontsize="small")
    return save_figure(figure, stem)
