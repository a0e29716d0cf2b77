"""Claims C3 and C4 as tables and figures, from its records alone.

A record has what :mod:`ddc.report.stages` needs, the ``config``, the ``curve`` (evaluations as
columns), the ``summary``, and, in the two protocols, the ``capacity`` of the trained
model (:mod:`ddc.report.capacity`).

Positive differences are in the paper's direction throughout: AdamW's loss less DDCAdam's, DDCAdam's
spare units less AdamW's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ddc.report.capacity import TOLERANCE, spare_share
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
from ddc.report.stages import PROTOCOLS, Record, commits, is_shared, of_stage, table
from ddc.report.statistics import holm, paired_p
from experiments.output import Results
from experiments.vit_scratch.plan import EXPERIMENT

#: By claim, the figure beside the main table.
FIGURES = {"C3": "losses", "C4": "pruning"}
HALF = 0.5
SCALE = "ViT, 0.2M parameters, 2,000 images of Fashion-MNIST"


def pruned(keep: float, key: str, rise: bool = False) -> Callable[[Record], float]:
    """A value of the model with a share of its units; with ``rise``, less that of the whole
    model.
    """

    def value(record: Record) -> float:
        rows = {row["keep"]: row[key] for row in record["capacity"]["pruning"]}
        return float(rows[keep] - (rows[1.0] if rise else 0.0))

    return value


def mean_rank(kind: str, side: str) -> Callable[[Record], float]:
    return lambda record: statistics.mean(
        block[f"{kind}_rank"][side] for block in record["capacity"]["blocks"]
    )


def norm_quantile(quantile: float) -> Callable[[Record], float]:
    def value(record: Record) -> float:
        norms = np.concatenate([block["unit_norms"] for block in record["capacity"]["blocks"]])
        return float(np.quantile(norms, quantile))

    return value


LAST_LOSS = Quantity("validation loss, last", from_summary("validation_loss"), -1)
LOSSES = (
    Quantity("train loss", from_summary("train_loss"), 0, ".4f"),
    LAST_LOSS,
    Quantity("validation loss, best", from_summary("best_validation_loss"), -1),
    Quantity("gap at train loss 0.3", gap_at("0.3"), -1),
    Quantity("gap at train loss 0.1", gap_at("0.1"), -1),
    Quantity("gap at train loss 0.03", gap_at("0.03"), -1),
    Quantity("validation accuracy, last", from_summary("validation_accuracy"), 1),
    Quantity("calibration error, last", from_summary("validation_calibration_error"), -1),
)
SPARE = Quantity(
    f"spare units, to mean (change < {TOLERANCE:g})",
    lambda record: spare_share(record["capacity"]),
    1,
)
HALVED = Quantity(
    "rise of validation loss at 50% width", pruned(HALF, "validation_loss", rise=True), -1
)
CAPACITY = (
    SPARE,
    Quantity("spare units, to zero", lambda record: spare_share(record["capacity"], "zero"), 1),
    Quantity(
        "rise of validation loss at 75% width", pruned(0.75, "validation_loss", rise=True), -1
    ),
    HALVED,
    Quantity(
        "rise of validation loss at 25% width", pruned(0.25, "validation_loss", rise=True), -1
    ),
    Quantity("rise of train loss at 50% width", pruned(HALF, "train_loss", rise=True), -1),
    Quantity("rise of train loss at 25% width", pruned(0.25, "train_loss", rise=True), -1),
    Quantity(
        "change of validation accuracy at 50% width",
        pruned(HALF, "validation_accuracy", rise=True),
        1,
    ),
    Quantity("effective rank of W_up", mean_rank("effective", "up"), 0, ".2f"),
    Quantity("effective rank of W_down", mean_rank("effective", "down"), 0, ".2f"),
    Quantity("stable rank of W_up", mean_rank("stable", "up"), 0, ".2f"),
    Quantity("stable rank of W_down", mean_rank("stable", "down"), 0, ".2f"),
    Quantity("unit norms ρ_P ρ_M, 5th percentile", norm_quantile(0.05), 0),
    Quantity("unit norms ρ_P ρ_M, median", norm_quantile(0.5), 0),
    Quantity("unit norms ρ_P ρ_M, 95th percentile", norm_quantile(0.95), 0),
)


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
    """Claims C3 and C4 by protocol, p-values adjusted over both claims and protocols.

    C3: the last validation loss. C4: spare units and the rise of the loss at half the width.
    """
    runs = {protocol: stage_runs(records, protocol) for protocol in PROTOCOLS}
    compared = [
        (protocol, quantity) for protocol in PROTOCOLS for quantity in (LAST_LOSS, SPARE, HALVED)
    ]
    adjusted = holm(
        [paired_p(differences(runs[protocol], quantity)) for protocol, quantity in compared]
    )
    p = {
        (protocol, quantity.title): each
        for (protocol, quantity), each in zip(compared, adjusted, strict=True)
    }
    found = []
    for protocol in PROTOCOLS:
        mine, ran = runs[protocol], seeds_that_ran(records, protocol)
        seeds, whole = seeds_cell(len(mine[SUBJECT]), ran), len(mine[SUBJECT]) == ran
        large = is_enough(claims["C3"], mine, LAST_LOSS)
        p_loss, p_spare, p_half = (
            p[protocol, quantity.title] for quantity in (LAST_LOSS, SPARE, HALVED)
        )
        means = [
            statistics.mean(r["summary"]["validation_loss"] for r in mine[name])
            for name in (SUBJECT, BASELINE)
        ]
        ours = (
            f"{means[0]:.3f} against {means[1]:.3f}:"
            f" {interval(differences(mine, LAST_LOSS), LAST_LOSS.form)}"
        )
        loss = effect(advantages(mine, LAST_LOSS), p_loss, claims["C3"].level, large and whole)
        against = beyond(records) if protocol == "tuned" else "–"
        found.append(
            Verdict(
                "C3",
                protocol,
                ours,
                p_cell(p_loss),
                seeds,
                tested(p_loss),
                SCALE,
                verdict([loss]),
                against,
            )
        )
        spare, half = (
            interval(differences(mine, quantity), quantity.form) for quantity in (SPARE, HALVED)
        )
        both = [
            effect(advantages(mine, quantity), each, claims["C4"].level, whole)
            for quantity, each in ((SPARE, p_spare), (HALVED, p_half))
        ]
        ours = f"spare units {spare}; rise of the loss at half width {half}"
        p_values = f"{p_cell(p_spare)}, {p_cell(p_half)}"
        found.append(
            Verdict(
                "C4",
                protocol,
                ours,
                p_values,
                seeds,
                tested(p_spare),
                SCALE,
                verdict(both),
                exposure(mine),
            )
        )
    return sorted(found, key=lambda each: each.claim)


def beyond(records: Sequence[Record]) -> str:
    """Where settings outside the grid change which optimizer ends lower, on the seeds of the
    tuning.
    """
    if not of_stage(records, "beyond"):
        return "–"
    tried = {name: dict[str, list[float]]() for name in (SUBJECT, BASELINE)}
    for stage in ("tuning", "finals", "beyond"):
        for name, settings in of_stage(records, stage).items():
            for overrides, runs in settings.items():
                losses = [run["summary"]["validation_loss"] for run in runs if not run["diverged"]]
                tried[name].setdefault(overrides, []).extend(losses)
    most = max(len(losses) for each in tried.values() for losses in each.values())
    best = {
        name: min(statistics.mean(losses) for losses in each.values() if len(losses) == most)
        for name, each in tried.items()
    }
    if best[SUBJECT] < best[BASELINE]:
        return "–"
    return (
        "not reproduced with settings beyond the grid, where the choices lay at its edge: on"
        f" {most} tuning seeds the best setting of each has {best[SUBJECT]:.3f} (DDCAdam) against"
        f" {best[BASELINE]:.3f} (AdamW)"
    )


def exposure(runs: Runs) -> str:
    """Whether the settings that are compared decay by different amounts: rate × decay."""
    products = {
        name: each[0]["config"]["optimizer"]["lr"] * each[0]["config"]["optimizer"]["weight_decay"]
        for name, each in runs.items()
    }
    ratio = products[BASELINE] / products[SUBJECT]
    if math.isclose(ratio, 1):
        return "–"
    return f"it compares exposures to decay: AdamW's rate × decay is {ratio:.3g} times DDCAdam's"


def setting_title(record: Record) -> str:
    """Rate and decay."""
    optimizer = record["config"]["optimizer"]
    return f"{optimizer['lr']:g}, {optimizer['weight_decay']:g}"


def setting_words(record: Record) -> str:
    """The same with the names of the numbers."""
    rate, decay = setting_title(record).split(", ")
    return f"rate {rate}, decay {decay}"


def tuning_table(records: Sequence[Record]) -> str:
    """One row a setting, the chosen one in bold."""
    finals, chosen = of_stage(records, "finals"), of_stage(records, "tuned")
    rows = []
    further = of_stage(records, "beyond")
    for name, settings in of_stage(records, "tuning").items():
        for overrides, first in {**settings, **further[name]}.items():
            beyond = " (beyond)" if overrides in further[name] else ""
            runs = first + finals[name].get(overrides, [])
            mark = "**" if overrides in chosen[name] else ""
            losses = ", ".join(
                "diverged" if run["diverged"] else f"{LAST_LOSS.of(run):.3f}" for run in runs
            )
            trained = ", ".join(
                "–" if run["diverged"] else f"{run['summary']['train_loss']:.3f}" for run in runs
            )
            rows.append(
                [TITLES[name], f"{mark}{setting_title(runs[0])}{mark}{beyond}", losses, trained]
            )
    return table(
        ["optimizer", "rate, decay", "last validation loss", "last train loss"], rows, left=4
    )


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    config = records[0]["config"]
    model, data, training = config["model"], config["data"], config["training"]
    hours = sum(record["seconds"] for record in records) / 3600
    examples = next(record["capacity"]["examples"] for record in records if "capacity" in record)
    measured = commits(record["capacity"] for record in records if "capacity" in record)
    validation = training["evaluation_batches"] * training["batch_size"]
    diverged = sum(record["diverged"] for record in records)
    same = [TITLES[name] for name in TITLES if is_shared(records, name)]
    parts = [
        (
            f"Vision transformer of timm: {model['layers']} layers, width {model['width']},"
            f" {model['heads']} heads, {model['hidden']} hidden units ({model['mlp']}), patches of"
            f" {model['patch']} pixels. First {data['train_images']:,} training images of"
            f" {data['name']}, no augmentation, label smoothing or mixup; batch"
            f" {training['batch_size']}, {training['steps']} steps, cosine schedule. Losses in"
            f" nats, on {validation:,} images spread over the test split, the same for all runs,"
            " tuning included. Seeds set initialisation and order; differences are paired by seed."
        ),
        "## Claims C3 and C4",
        verdict_table(claims, verdicts(records, claims)),
        *(rule(claims[name]) for name in ("C3", "C4")),
        (
            "p: Student's t-test of paired differences, adjusted by Holm's method for all of this"
            " table."
        ),
    ]
    runs = {protocol: stage_runs(records, protocol) for protocol in PROTOCOLS}
    for protocol in PROTOCOLS:
        parts += [f"## {protocol.capitalize()}", quantity_table(runs[protocol], LOSSES)]
        parts += [quantity_table(runs[protocol], CAPACITY)]
    parts += [
        f"{QUANTITY_NOTE} A unit is *spare* if its removal by itself changes the validation loss,"
        f" on {examples} images, by less than {TOLERANCE:g} nats, up or down. *Width*: hidden units"
        " kept in each block, by what they contribute to its output, without further training."
        " Ranks are means over blocks, in coordinates that no gauge changes."
        + (
            f" The tuned setting of {' and '.join(same)} is the matched one: the same runs."
            if same
            else ""
        ),
        "## Every seed",
        seeds_table(runs, (LAST_LOSS, SPARE, HALVED), setting_title),
        "## Tuning",
        tuning_table(records),
        (
            "All settings ran on seed 100, the best two of each optimizer on 101 and 102 as well;"
            " the chosen one is bold. Both lay at the edge of the grid, so two settings each"
            " *beyond* it were run afterwards, on the same three seeds; no protocol reports them."
        ),
        (
            f"{len(records)} runs, {diverged} diverged, {hours:.1f} hours of one core in all."
            f" Commit of the runs {commits(records)}, of the capacity {measured}. Made by `make"
            " report` from `runs.jsonl` beside this file."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def drawings(records: Sequence[Record]) -> dict[str, Drawing]:
    """All figures of the experiment, by name."""
    runs = {protocol: stage_runs(records, protocol) for protocol in PROTOCOLS}
    return {
        "losses": Drawing(
            partial(plot_losses, runs, setting_words),
            "Vision: losses against steps, and the gap against the train loss. A line a seed.",
        ),
        "pruning": Drawing(
            partial(plot_pruning, runs),
            "Vision: losses and accuracy when only part of the hidden units is kept, without"
            " training afterwards: mean and every seed.",
        ),
        "units": Drawing(
            partial(plot_units, runs),
            "Vision: distribution of what single hidden units do to the validation loss, and of"
            " their gauge-invariant norms. A line a seed.",
        ),
    }


def plot_pruning(runs: Mapping[str, Runs], stem: Path) -> list[Path]:
    """Losses and accuracy against the share of hidden units kept: means and every seed; a row a
    protocol.
    """
    shown = {"validation_loss": "validation loss (nats)", "train_loss": "train loss (nats)"}
    shown["validation_accuracy"] = "validation accuracy"
    figure, axes = subplots(len(runs), 3, figsize=(13, 7), sharex=True, sharey="col")
    for row, (protocol, optimizers) in zip(axes, runs.items(), strict=True):
        for i, (name, records) in enumerate(optimizers.items()):
            pruning = [record["capacity"]["pruning"] for record in records]
            widths = [100 * point["keep"] for point in pruning[0]]
            for panel, key in zip(row, shown, strict=True):
                lines = np.array([[point[key] for point in points] for points in pruning])
                panel.plot(widths, lines.T, linewidth=0.6, alpha=0.5, **nth_style(i))
                panel.plot(widths, lines.mean(0), label=TITLES[name], **nth_style(i, marker=True))
        for panel, (key, title) in zip(row, shown.items(), strict=True):
            panel.set(
                ylabel=(f"{protocol}\n" if key == "validation_loss" else "") + title, xticks=widths
            )
        row[0].legend(frameon=False, title=f"mean and {len(records)} seeds", fontsize="small")
    axes[0][0].invert_xaxis()
    for panel in axes[-1]:
        panel.set_xlabel("hidden units kept (%), no training after pruning")
    return save_figure(figure, stem)


def plot_units(runs: Mapping[str, Runs], stem: Path) -> list[Path]:
    """Distributions of what single units do to the loss, and of their invariant norms; a row a
    protocol.
    """
    figure, axes = subplots(len(runs), 2, figsize=(10, 7), sharex="col", sharey=True)
    for row, (protocol, optimizers) in zip(axes, runs.items(), strict=True):
        for i, (name, records) in enumerate(optimizers.items()):
            for j, record in enumerate(records):
                style = nth_style(i) | {
                    "linewidth": 1,
                    "label": None if j else f"{TITLES[name]}, {len(records)} seeds",
                }
                for panel, key in zip(row, ("removal_to_mean", "unit_norms"), strict=True):
                    numbers = np.sort(
                        np.abs(np.concatenate([b[key] for b in record["capacity"]["blocks"]]))
                    )
                    panel.plot(numbers, (np.arange(len(numbers)) + 1) / len(numbers), **style)
        row[0].axvline(TOLERANCE, color="black", linestyle=":", linewidth=0.8, label="tolerance")
        for panel in row:
            panel.set_xscale("log")
        row[0].set(ylabel=f"{protocol}\nshare of units")
        row[0].legend(frameon=False, fontsize="small")
    axes[-1][0].set_xlabel("|change of the validation loss| without one unit (nats)")
    axes[-1][1].set_xlabel("invariant norm of a unit, ρ_P ρ_M")
    return save_figure(figure, stem)
