"""Claims C1 and C8 as tables and figures, from records alone.

A record has what :mod:`ddc.report.stages` needs, the ``config``, the ``curve`` (evaluations as
columns), the ``summary`` and whether it ``diverged``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ddc.gauges import KINDS
from ddc.report.claims import Claim, Verdict, effect, rule, tested, verdict, verdict_table
from ddc.report.curves import plot_losses
from ddc.report.figures import Drawing, nth_style, save_figure, subplots
from ddc.report.paired import (
    BASELINE,
    QUANTITY_NOTE,
    SUBJECT,
    Quantity,
    Runs,
    advantages,
    differences,
    from_summary,
    gap_at,
    interval,
    is_enough,
    p_cell,
    quantity_table,
    seeds_cell,
    seeds_table,
    seeds_that_ran,
    stage_runs,
)
from ddc.report.runs import TITLES
from ddc.report.stages import PROTOCOLS, Record, commits, of_stage, table
from ddc.report.statistics import holm, paired_p
from experiments.lm_overtrain import drift
from experiments.lm_overtrain.plan import BEST, EQUAL, EXPERIMENT, LAST, number
from experiments.output import Results

TRAIN = Quantity("train loss, last", from_summary("train_loss"), 0)
GAP = Quantity("gap, last", from_summary("gap"), -1)
QUANTITIES = (
    TRAIN,
    LAST,
    BEST,
    GAP,
    Quantity("gap at train loss 1.5", gap_at("1.5"), -1),
    Quantity("gap at train loss 1.0", gap_at("1.0"), -1),
    EQUAL,
)
#: By claim, the figure beside the main table.
FIGURES = {"C1": "losses", "C8": "drift"}
#: The stages whose settings were chosen on the grid, one a question.
QUESTIONS = ("tuned", "equal_loss", "early")
STAGE_TITLES = {
    "matched": "Matched",
    "tuned": "Tuned by the last validation loss, of settings that fit",
    "equal_loss": "Tuned by the gap at train loss 0.5",
    "early": "Tuned by the best validation loss",
}


def setting_title(record: Record) -> str:
    """What the grid varies: rate and decay of AdamW, radial rate and decay of DDCAdam."""
    optimizer = record["config"]["optimizer"]
    first = (
        f"radial {optimizer['radial_rate']:g}"
        if "radial_rate" in optimizer
        else f"rate {optimizer['lr']:g}"
    )
    return f"{first}, decay {optimizer['weight_decay']:g}"


def load() -> list[Record]:
    """The committed records.

    Raises:
        ValueError: they are not complete.
    """
    return EXPERIMENT.committed()


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables and figures."""
    tables = {"table": partial(markdown, records, claims)}
    return [Results(EXPERIMENT.results, tables, drawings(records))]


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """Claims C1 and C8."""
    return [
        *gap_verdicts(records, claims["C1"]),
        *drift.verdicts(records, claims["C8"], kinds_of(records)),
    ]


def gap_verdicts(records: Sequence[Record], claim: Claim) -> list[Verdict]:
    """Claim C1 by protocol, p-values adjusted over both: the gap where the train loss first falls
    to 0.5.
    """
    runs = {protocol: stage_runs(records, protocol) for protocol in PROTOCOLS}
    p_values = holm([paired_p(differences(runs[protocol], EQUAL)) for protocol in PROTOCOLS])
    found = []
    for protocol, p in zip(PROTOCOLS, p_values, strict=True):
        mine, ran = runs[protocol], seeds_that_ran(records, protocol)
        found_on = differences(mine, EQUAL)
        enough = is_enough(claim, mine, EQUAL) and len(found_on) == ran
        shown = effect(advantages(mine, EQUAL), p, claim.level, enough)
        ends = [
            statistics.mean(record["summary"]["gap"] for record in mine[name])
            for name in (SUBJECT, BASELINE)
        ]
        ours = (
            f"gap at equal train loss {interval(found_on, EQUAL.form)}; at the end {ends[0]:.2f}"
            f" against {ends[1]:.2f}"
        )
        scale = "GPT, 0.8M parameters, 40 kB of text"
        seeds = seeds_cell(len(found_on), ran)
        against = untuned_rate(records) if protocol == "tuned" else "–"
        found.append(
            Verdict(
                claim.id,
                protocol,
                ours,
                p_cell(p),
                seeds,
                tested(p),
                scale,
                verdict([shown]),
                against,
            )
        )
    return found


def untuned_rate(records: Sequence[Record]) -> str:
    """Whether the tuning left an optimizer's learning rate alone."""
    rates = {
        name: {run["config"]["optimizer"]["lr"] for runs in settings.values() for run in runs}
        for name, settings in of_stage(records, "tuning").items()
    }
    alone = {name: min(each) for name, each in rates.items() if len(each) == 1}
    return (
        "; ".join(
            f"{TITLES[name]}'s learning rate was not tuned ({rate:g})"
            for name, rate in alone.items()
        )
        or "–"
    )


def grid(records: Sequence[Record], name: str) -> dict[tuple[float, float], Record]:
    """The runs of the tuning seed, by (rate or radial rate, decay): the grid, and what ran without
    decay.
    """
    key = "radial_rate" if name == SUBJECT else "lr"
    cells = {}
    for stage in ("tuning", "no_decay"):
        for (record,) in of_stage(records, stage).get(name, {}).values():
            optimizer = record["config"]["optimizer"]
            cells[optimizer[key], optimizer["weight_decay"]] = record
    return cells


def cell(value: float | None) -> str:
    """A number with three decimals, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def tuning_table(records: Sequence[Record]) -> str:
    """One row a setting of the grid; bold where one of the three questions chose it."""
    chosen = {
        (name, setting)
        for stage in QUESTIONS
        for name, settings in of_stage(records, stage).items()
        for setting in settings
    }
    shown = (TRAIN, LAST, BEST, EQUAL)
    rows = []
    for name in (BASELINE, SUBJECT):
        for run in grid(records, name).values():
            setting = run["stages"].get("tuning", "")
            mark = "**" if (name, setting) in chosen else ""
            columns = [cell(number(run, quantity)) for quantity in shown]
            rows.append([TITLES[name], f"{mark}{setting_title(run)}{mark}", *columns])
    return table(["optimizer", "setting", *(quantity.title for quantity in shown)], rows, left=2)


def kinds_of(records: Iterable[Record]) -> list[str]:
    """The kinds of gauges that the model has."""
    drifting = {kind for record in records for kind in record["curve"]["gauge_drift"][0]}
    return [kind for kind in KINDS if kind in drifting]


def gauge_set_title(record: Record, kinds: Sequence[str]) -> str:
    """Those of the kinds that the optimizer was told of."""
    told = [KINDS[kind].title for kind in kinds if record["config"]["gauges"][kind] is not False]
    return "all" if len(told) == len(kinds) else " + ".join(told) or "none"


def gauge_sets(records: Sequence[Record]) -> Iterator[tuple[str, float, Record]]:
    """(gauges, radial rate, run) at one decay and seed: parts of the gauges, all of them, and none,
    which is AdamW.
    """
    decay, kinds = 0.1, kinds_of(records)
    yield "none (AdamW)", float("nan"), grid(records, BASELINE)[1e-3, decay]
    for settings in of_stage(records, "gauge_sets").values():
        for (record,) in settings.values():
            title = gauge_set_title(record, kinds)
            yield title, record["config"]["optimizer"]["radial_rate"], record
    for radial in (0.0, 1.0):
        yield "all", radial, grid(records, SUBJECT)[radial, decay]


def gauge_set_table(records: Sequence[Record]) -> str:
    """One row a set of gauges and radial rate."""
    shown = (TRAIN, LAST, BEST, EQUAL)
    rows = [
        [
            title,
            "–" if radial != radial else f"{radial:g}",
            *(cell(number(record, quantity)) for quantity in shown),
        ]
        for title, radial, record in gauge_sets(records)
    ]
    return table(["gauges", "radial rate", *(quantity.title for quantity in shown)], rows)


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    config = records[0]["config"]
    model, data, training = config["model"], config["data"], config["training"]
    hours = sum(record["seconds"] for record in records) / 3600
    diverged = sum(record["diverged"] for record in records)
    stages = {stage: stage_runs(records, stage) for stage in STAGE_TITLES}
    parts = [
        (
            f"GPT with {model['layers']} layers, width {model['width']}, RMSNorm, SwiGLU, RoPE; the"
            f" first {data['train_tokens']:,} bytes of Shakespeare, batch {training['batch_size']}"
            f" × {model['context']}, {training['steps']} steps, constant rate after warm-up. Losses"
            " in nats a byte. Seeds set initialisation and order; differences are paired by seed."
        ),
        "## Claims C1 and C8",
        verdict_table(claims, verdicts(records, claims)),
        rule(claims["C1"]),
        rule(claims["C8"]),
    ]
    for stage, title in STAGE_TITLES.items():
        settings = "; ".join(
            f"{TITLES[name]}: {setting_title(runs[0])}" for name, runs in stages[stage].items()
        )
        parts += [f"## {title}", f"{settings}.", quantity_table(stages[stage], QUANTITIES)]
    parts += [
        QUANTITY_NOTE,
        *drift.section(stages, kinds_of(records)),
        "## Every seed",
        seeds_table(stages, (TRAIN, LAST, BEST, EQUAL), setting_title),
        "## The grid: radial rate × decay for DDCAdam, rate × decay for AdamW",
        tuning_table(records),
        (
            "Seed 100. Bold: chosen by one of the three questions. The settings without decay were"
            " no part of the choice."
        ),
        "## Gauge sets",
        gauge_set_table(records),
        (
            "DDCAdam told of part of the gauges; rate 0.001, decay 0.1, seed 100. One seed:"
            " description, no test."
        ),
        (
            f"{len(records)} runs, {diverged} diverged, {hours:.1f} hours of one core in all."
            f" Commit {commits(records)}. Made by `make report` from `runs.jsonl` beside this file."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def drawings(records: Sequence[Record]) -> dict[str, Drawing]:
    """All figures of the experiment, by name."""
    runs = {stage: stage_runs(records, stage) for stage in STAGE_TITLES}
    return {
        "losses": Drawing(
            partial(plot_losses, {name: runs[name] for name in PROTOCOLS}, setting_title),
            "Language model: losses against steps, and the gap against the train loss: on one"
            " vertical the train loss is equal. A line a seed.",
        ),
        "grid": Drawing(
            partial(plot_grid, records),
            "Language model: the grid, seed 100. Above DDCAdam, radial rate × decay; below AdamW,"
            " rate × decay. Small: the train loss at the end, for a low validation loss may be one"
            " of a model that does not fit. Grey: never reached. Framed: chosen by this question;"
            " the middle one among settings that fit (train loss at most 0.5).",
        ),
        "frontier": Drawing(
            partial(plot_frontier, records),
            "Language model: where each setting of the grid ends (seed 100), and the decisive"
            " settings on their own seeds. The validation loss at the end, and the best one,"
            " against the train loss at the end.",
        ),
        "gauge_sets": Drawing(
            partial(plot_gauge_sets, records),
            "Language model: DDCAdam told of part of the gauges, at radial rates 0 and 1 (rate"
            " 0.001, decay 0.1, seed 100). Without gauges it is AdamW.",
        ),
        "drift": Drawing(
            partial(plot_drift, runs["matched"]),
            "Language model, matched: how far the weights have moved along their gauge orbits,"
            " where no loss sees them. Root mean square over units, a line a seed. Of rescales the"
            " change of log ρ_P - log ρ_M; DDCAdam holds it still, but for decay, which acts on"
            " matrices and not on vectors (norm scale); rotations it does not hold.",
        ),
    }


#: What the rows of each optimizer's grid are.
ROWS = {SUBJECT: "radial rate", BASELINE: "learning rate"}


def plot_grid(records: Sequence[Record], stem: Path) -> list[Path]:
    """Three heat maps an optimizer."""
    from matplotlib.patches import Rectangle

    shown = {"equal_loss": EQUAL, "tuned": LAST, "early": BEST}
    figure, axes = subplots(2, 3, figsize=(12, 7.5))
    grids = {name: grid(records, name) for name in ROWS}
    for column, (stage, quantity) in zip(axes.T, shown.items(), strict=True):
        there = [number(run, quantity) for cells in grids.values() for run in cells.values()]
        low, high = min(v for v in there if v is not None), max(v for v in there if v is not None)
        for panel, (name, cells) in zip(column, grids.items(), strict=True):
            rates, decays = (sorted({key[i] for key in cells}) for i in (0, 1))
            found = [[number(cells[rate, decay], quantity) for decay in decays] for rate in rates]
            values = np.array([[np.nan if v is None else v for v in row] for row in found])
            panel.set_facecolor("#e4e4e4")
            panel.grid(False)
            image = panel.imshow(
                np.ma.masked_invalid(values), cmap="cividis", vmin=low, vmax=high, aspect="auto"
            )
            for i, j in np.ndindex(values.shape):
                dark = np.isfinite(values[i, j]) and values[i, j] < (low + high) / 2
                style = {"ha": "center", "color": "white" if dark else "black"}
                run = cells[rates[i], decays[j]]
                panel.text(j, i, cell(found[i][j]), va="bottom", fontsize=9, **style)
                panel.text(j, i + 0.1, cell(number(run, TRAIN)), va="top", fontsize=7, **style)
                if run["stages"].get("tuning") in of_stage(records, stage)[name]:
                    corner = (j - 0.48, i - 0.48)
                    panel.add_patch(
                        Rectangle(corner, 0.96, 0.96, fill=False, edgecolor="black", linewidth=3)
                    )
            panel.set_xticks(range(len(decays)), [f"{each:g}" for each in decays])
            panel.set_yticks(range(len(rates)), [f"{each:g}" for each in rates])
            panel.set(xlabel="decay")
        column[0].set_title(f"chosen by: {quantity.title}")
        figure.colorbar(
            image, ax=column, location="bottom", aspect=30, label=f"{quantity.title} (nats)"
        )
    for row, (name, rate) in zip(axes, ROWS.items(), strict=True):
        row[0].set_ylabel(f"{TITLES[name]}\n{rate}")
    return save_figure(figure, stem)


def plot_frontier(records: Sequence[Record], stem: Path) -> list[Path]:
    """Validation against train loss at the end of every run of the grid and of the decisive
    settings.
    """
    figure, axes = subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for i, name in enumerate((BASELINE, SUBJECT)):
        tried = [run for run in grid(records, name).values() if not run["diverged"]]
        decisive = {
            (run["stages"][stage], run["seed"]): run
            for stage in STAGE_TITLES
            for run in stage_runs(records, stage)[name]
        }
        for panel, quantity in zip(axes, (LAST, BEST), strict=True):
            for runs, fill, label in (
                (tried, "none", "grid"),
                (list(decisive.values()), "full", "decisive settings"),
            ):
                x, y = ([each.of(run) for run in runs] for each in (TRAIN, quantity))
                style = nth_style(i, marker=True) | {"linestyle": "none", "fillstyle": fill}
                panel.plot(x, y, label=f"{TITLES[name]}, {label} ({len(runs)} runs)", **style)
            panel.set(xlabel="train loss at the end (nats)", ylabel=f"{quantity.title} (nats)")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    return save_figure(figure, stem)


def plot_gauge_sets(records: Sequence[Record], stem: Path) -> list[Path]:
    """A row a set of gauges, a marker a radial rate."""
    found = list(gauge_sets(records))
    titles = list(dict.fromkeys(title for title, _, _ in found))
    figure, axes = subplots(1, 3, figsize=(12, 0.55 * len(titles) + 1.5), sharey=True)
    for panel, quantity in zip(axes, (EQUAL, LAST, BEST), strict=True):
        for i, radial in enumerate((None, 0.0, 1.0)):
            rows = [(t, run) for t, r, run in found if (r != r if radial is None else r == radial)]
            style = nth_style(i, marker=True) | {"linestyle": "none"}
            label = "AdamW" if radial is None else f"radial rate {radial:g}"
            there = [
                (value, titles.index(t))
                for t, run in rows
                if (value := number(run, quantity)) is not None
            ]
            panel.plot([x for x, _ in there], [y for _, y in there], label=label, **style)
        panel.set(xlabel=f"{quantity.title} (nats)")
    axes[0].set_yticks(range(len(titles)), [title.replace(" + ", " +\n") for title in titles])
    axes[0].invert_yaxis()
    axes[2].legend(frameon=False, fontsize="small")
    return save_figure(figure, stem)


def plot_drift(runs: Runs, stem: Path) -> list[Path]:
    """A panel a kind of gauge."""
    kinds = kinds_of(runs[SUBJECT])
    figure, axes = subplots(1, len(kinds), figsize=(14, 3.2))
    for panel, kind in zip(axes, kinds, strict=True):
        for i, (name, records) in enumerate(runs.items()):
            for j, run in enumerate(records):
                drifts = [each[kind] for each in run["curve"]["gauge_drift"]]
                label = None if j else f"{TITLES[name]}, {len(records)} seeds"
                panel.plot(run["curve"]["step"], drifts, **nth_style(i), linewidth=1, label=label)
        panel.set(title=KINDS[kind].title, xlabel="step")
        panel.set_ylim(-0.03 * panel.get_ylim()[1])  # what stays at 0 is seen
    axes[0].set_ylabel("drift along the orbit since the start\n(rotations: radians)")
    axes[0].legend(frameon=False, fontsize="small")
    return save_figure(figure, stem)
