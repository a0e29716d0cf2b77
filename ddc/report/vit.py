"""The vision experiment as tables and figures, from its records alone.

A record has what :mod:`ddc.report.stages` needs, the ``config``, the ``curve`` (evaluations as columns, :data:`CURVE`),
the ``summary``, and, in the two protocols, the ``capacity`` of the trained model (:mod:`ddc.report.capacity`).

Positive differences are in the paper's direction throughout: AdamW's loss less DDCAdam's, DDCAdam's spare units less
AdamW's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddc.report.capacity import TOLERANCE, spare_share
from ddc.report.runs import COLOURS, TITLES, save_figure
from ddc.report.stages import PROTOCOLS, Record, is_shared, of_stage, only_setting, table
from ddc.report.statistics import holm, mean_interval, paired_p

CURVE = (
    "step",
    "train_loss",
    "validation_loss",
    "train_accuracy",
    "validation_accuracy",
    "validation_calibration_error",
)
BASELINE, SUBJECT = "adamw", "ddcadam"
PAPER_LOSSES = {SUBJECT: 1.71, BASELINE: 2.12}
#: Reproduced means at least this share of the paper's relative reduction of the loss.
ENOUGH = 0.5
LEVEL = 0.05
HALF = 0.5


@dataclass(frozen=True)
class Quantity:
    """A number that a run ends with.

    Attributes:
        title: in tables.
        of: the number of a record.
        sign: of the difference DDCAdam - AdamW that is in the paper's direction; 0 where it has none.
        form: of the number in tables.
    """

    title: str
    of: Callable[[Record], float | None]
    sign: int
    form: str = ".3f"


def from_summary(key: str) -> Callable[[Record], float | None]:
    return lambda record: record["summary"][key]


def gap_at(level: str) -> Callable[[Record], float | None]:
    return lambda record: record["summary"]["gap_at_train_loss"][level]


def pruned(keep: float, key: str, rise: bool = False) -> Callable[[Record], float]:
    """A value of the model with a share of its units; with ``rise``, less that of the whole model."""

    def value(record: Record) -> float:
        rows = {row["keep"]: row[key] for row in record["capacity"]["pruning"]}
        return float(rows[keep] - (rows[1.0] if rise else 0.0))

    return value


def mean_rank(kind: str, side: str) -> Callable[[Record], float]:
    return lambda record: statistics.mean(block[f"{kind}_rank"][side] for block in record["capacity"]["blocks"])


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
SPARE = Quantity(f"spare units, to mean (change < {TOLERANCE:g})", lambda record: spare_share(record["capacity"]), 1)
HALVED = Quantity("rise of validation loss at 50% width", pruned(HALF, "validation_loss", rise=True), -1)
CAPACITY = (
    SPARE,
    Quantity("spare units, to zero", lambda record: spare_share(record["capacity"], "zero"), 1),
    Quantity("rise of validation loss at 75% width", pruned(0.75, "validation_loss", rise=True), -1),
    HALVED,
    Quantity("rise of validation loss at 25% width", pruned(0.25, "validation_loss", rise=True), -1),
    Quantity("rise of train loss at 50% width", pruned(HALF, "train_loss", rise=True), -1),
    Quantity("rise of train loss at 25% width", pruned(0.25, "train_loss", rise=True), -1),
    Quantity("change of validation accuracy at 50% width", pruned(HALF, "validation_accuracy", rise=True), 1),
    Quantity("effective rank of W_up", mean_rank("effective", "up"), 0, ".2f"),
    Quantity("effective rank of W_down", mean_rank("effective", "down"), 0, ".2f"),
    Quantity("stable rank of W_up", mean_rank("stable", "up"), 0, ".2f"),
    Quantity("stable rank of W_down", mean_rank("stable", "down"), 0, ".2f"),
    Quantity("unit norms ρ_P ρ_M, 5th percentile", norm_quantile(0.05), 0),
    Quantity("unit norms ρ_P ρ_M, median", norm_quantile(0.5), 0),
    Quantity("unit norms ρ_P ρ_M, 95th percentile", norm_quantile(0.95), 0),
)


def protocol_runs(records: Sequence[Record], protocol: str) -> dict[str, list[Record]]:
    """The runs of a protocol by optimizer, in order of seeds, those that diverged left out with their partners."""
    runs = {name: only_setting(settings) for name, settings in of_stage(records, protocol).items()}
    gone = {record["seed"] for each in runs.values() for record in each if record["diverged"]}
    return {name: [record for record in each if record["seed"] not in gone] for name, each in runs.items()}


def values(records: Sequence[Record], quantity: Quantity) -> list[float | None]:
    return [quantity.of(record) for record in records]


def differences(runs: dict[str, list[Record]], quantity: Quantity) -> list[float]:
    """DDCAdam - AdamW by seed, where both have the number."""
    pairs = zip(values(runs[SUBJECT], quantity), values(runs[BASELINE], quantity), strict=True)
    return [a - b for a, b in pairs if a is not None and b is not None]


def advantage(runs: dict[str, list[Record]], quantity: Quantity) -> list[float]:
    """Differences by seed, positive in the paper's direction."""
    return [quantity.sign * each for each in differences(runs, quantity)]


def interval(differences: Sequence[float], form: str) -> str:
    """Mean and 95% interval."""
    if len(differences) < 2:
        return "–"
    low, high = mean_interval(differences)
    return f"{statistics.mean(differences):+{form}} ({low:+{form}} to {high:+{form}})"


def quantity_table(records: Sequence[Record], protocol: str, quantities: Sequence[Quantity]) -> str:
    """One row a quantity: means of both optimizers, paired difference with its interval, seeds."""
    runs = protocol_runs(records, protocol)
    rows = []
    for quantity in quantities:
        cells = []
        for name in (BASELINE, SUBJECT):
            there = [value for value in values(runs[name], quantity) if value is not None]
            cells.append(f"{statistics.mean(there):{quantity.form}}" if there else "never reached")
        found = differences(runs, quantity)
        rows.append([quantity.title, *cells, interval(found, quantity.form), str(len(found))])
    return table(["", TITLES[BASELINE], TITLES[SUBJECT], "DDCAdam - AdamW (95%)", "seeds"], rows)


def losses_verdict(runs: dict[str, list[Record]], p: float) -> str:
    """C3, whether the last validation loss shows the paper's 1.71 against 2.12.

    Reproduced: lower on the mean over paired seeds with p < 0.05, by at least half of the paper's relative reduction.
    Direction only: lower with p < 0.05.
    """
    found = advantage(runs, LAST_LOSS)
    if p >= LEVEL or statistics.mean(found) <= 0:
        return "not reproduced"
    baseline = statistics.mean(record["summary"]["validation_loss"] for record in runs[BASELINE])
    papers = 1 - PAPER_LOSSES[SUBJECT] / PAPER_LOSSES[BASELINE]
    return "reproduced" if statistics.mean(found) / baseline >= ENOUGH * papers else "direction only"


def capacity_verdict(runs: dict[str, list[Record]], p_spare: float, p_half: float) -> str:
    """C4, whether DDCAdam leaves more units to spare, and loses less at half the width.

    Reproduced: both, on the mean over paired seeds with p < 0.05. Direction only: one of them, and the other is not
    the other way round with p < 0.05.
    """
    signs = []
    for quantity, p in ((SPARE, p_spare), (HALVED, p_half)):
        mean = statistics.mean(advantage(runs, quantity))
        signs.append(0 if p >= LEVEL else 1 if mean > 0 else -1)
    if min(signs) < 0 or max(signs) <= 0:
        return "not reproduced"
    return "reproduced" if min(signs) > 0 else "direction only"


def verdict_table(records: Sequence[Record]) -> str:
    """Claims C3 and C4, one row a claim and protocol, p-values adjusted over all of them."""
    runs = {protocol: protocol_runs(records, protocol) for protocol in PROTOCOLS}
    tested = [(protocol, quantity) for protocol in PROTOCOLS for quantity in (LAST_LOSS, SPARE, HALVED)]
    raw = [paired_p(differences(runs[protocol], quantity)) for protocol, quantity in tested]
    p = {(protocol, quantity.title): each for (protocol, quantity), each in zip(tested, holm(raw), strict=True)}
    rows = []
    for protocol in PROTOCOLS:
        mine = runs[protocol]
        means = [statistics.mean(r["summary"]["validation_loss"] for r in mine[name]) for name in (SUBJECT, BASELINE)]
        ours = f"{means[0]:.3f} against {means[1]:.3f}"
        p_loss, p_spare, p_half = (p[protocol, quantity.title] for quantity in (LAST_LOSS, SPARE, HALVED))
        rows.append(
            ["C3: validation loss 1.71 against 2.12", protocol, ours, f"{p_loss:.2g}", losses_verdict(mine, p_loss)]
        )
        found = [interval(differences(mine, quantity), quantity.form) for quantity in (SPARE, HALVED)]
        rows.append(
            [
                "C4: compresses spare feed-forward capacity",
                protocol,
                f"spare units {found[0]}, loss at 50% {found[1]}",
                f"{p_spare:.2g}, {p_half:.2g}",
                capacity_verdict(mine, p_spare, p_half),
            ]
        )
    return table(["claim", "protocol", "ours: DDCAdam against AdamW", "p (Holm)", "verdict"], rows, left=3)


def setting_title(record: Record) -> str:
    """Rate and decay."""
    optimizer = record["config"]["optimizer"]
    return f"{optimizer['lr']:g}, {optimizer['weight_decay']:g}"


def seeds_table(records: Sequence[Record]) -> str:
    """The primary quantities of every seed."""
    rows = []
    for protocol in PROTOCOLS:
        for name, runs in protocol_runs(records, protocol).items():
            cells = [
                ", ".join(f"{value:.3f}" if value is not None else "–" for value in values(runs, quantity))
                for quantity in (LAST_LOSS, SPARE, HALVED)
            ]
            rows.append([protocol, TITLES[name], setting_title(runs[0]), *cells])
    header = ["protocol", "optimizer", "rate, decay", LAST_LOSS.title, SPARE.title, HALVED.title]
    return table(header, rows, left=6)


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
            losses = ", ".join("diverged" if run["diverged"] else f"{LAST_LOSS.of(run):.3f}" for run in runs)
            trained = ", ".join("–" if run["diverged"] else f"{run['summary']['train_loss']:.3f}" for run in runs)
            rows.append([TITLES[name], f"{mark}{setting_title(runs[0])}{mark}{beyond}", losses, trained])
    return table(["optimizer", "rate, decay", "last validation loss", "last train loss"], rows, left=4)


def markdown(records: Sequence[Record]) -> str:
    """All tables."""
    config = records[0]["config"]
    model, data, training = config["model"], config["data"], config["training"]
    commits = ", ".join(sorted({str(record["commit"]) for record in records}))
    hours = sum(record["seconds"] for record in records) / 3600
    examples = next(record["capacity"]["examples"] for record in records if "capacity" in record)
    measured = ", ".join(sorted({str(record["capacity"]["commit"]) for record in records if "capacity" in record}))
    validation = training["evaluation_batches"] * training["batch_size"]
    diverged = sum(record["diverged"] for record in records)
    same = [TITLES[name] for name in TITLES if is_shared(records, name)]
    parts = [
        f"Vision transformer of timm: {model['layers']} layers, width {model['width']}, {model['heads']} heads, "
        f"{model['hidden']} hidden units ({model['mlp']}), patches of {model['patch']} pixels. First "
        f"{data['train_images']:,} training images of {data['name']}, no augmentation, label smoothing or mixup; batch "
        f"{training['batch_size']}, {training['steps']} steps, cosine schedule. Losses in nats, on {validation:,} "
        "images spread over the test split, the same for all runs, tuning included. "
        "Seeds set initialisation and order; differences are paired by seed.",
        "## Claims C3 and C4",
        verdict_table(records),
        "C3, reproduced: the last validation loss is lower with p < 0.05, by at least half of the paper's 19%; "
        "direction only: lower with p < 0.05. C4, reproduced: more spare units and a smaller rise of the loss at half "
        "the width, each with p < 0.05; direction only: one of them, and the other not significantly the other way "
        "round. p: Student's t-test of paired differences, adjusted by Holm's method for all of this table.",
    ]
    for protocol in PROTOCOLS:
        parts += [f"## {protocol.capitalize()}", quantity_table(records, protocol, LOSSES)]
        parts += [quantity_table(records, protocol, CAPACITY)]
    parts += [
        "Means over seeds; intervals are Student's t. A unit is *spare* if its removal by itself changes the "
        f"validation loss, on {examples} images, by less than {TOLERANCE:g} nats, up or down. *Width*: hidden units "
        "kept in each block, by what they contribute to its output, without further training. Ranks are means over "
        "blocks, in coordinates that no gauge changes."
        + (f" The tuned setting of {' and '.join(same)} is the matched one: the same runs." if same else ""),
        "## Every seed",
        seeds_table(records),
        "## Tuning",
        tuning_table(records),
        "All settings ran on seed 100, the best two of each optimizer on 101 and 102 as well; the chosen one is bold. "
        "Both lay at the edge of the grid, so two settings each *beyond* it were run afterwards, on the same three "
        "seeds; no protocol reports them.",
        f"{len(records)} runs, {diverged} diverged, {hours:.1f} hours of one core in all. Commit of the runs "
        f"{commits}, of the capacity {measured}. Made by "
        "`make report` from `runs.jsonl` beside this file.",
    ]
    return "\n\n".join(parts) + "\n"


def plot_losses(records: Sequence[Record], folder: Path) -> list[Path]:
    """Losses against steps, and the gap against the train loss: a line a seed, a row a protocol."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained", sharex="col", sharey="col")
    for row, protocol in zip(axes, PROTOCOLS, strict=True):
        for i, (name, runs) in enumerate(protocol_runs(records, protocol).items()):
            label = f"{TITLES[name]} ({setting_title(runs[0])})"
            for j, run in enumerate(runs):
                curve = {key: np.array(column) for key, column in run["curve"].items()}
                style = {
                    "color": COLOURS[i],
                    "linestyle": ("-", "--")[i],
                    "linewidth": 1,
                    "label": label if not j else None,
                }
                row[0].plot(curve["step"], curve["validation_loss"], **style)
                row[1].plot(curve["step"], np.maximum(curve["train_loss"], 1e-4), **style)
                gap = curve["validation_loss"] - curve["train_loss"]
                row[2].plot(np.maximum(curve["train_loss"], 1e-4)[1:], gap[1:], **style)
        row[0].set(ylabel=f"{protocol}\nvalidation loss (nats)")
        row[1].set(ylabel="train loss (nats)", yscale="log")
        row[2].set(ylabel="validation - train loss (nats)", xscale="log")
        for panel in row:
            panel.grid(alpha=0.3)
        row[0].legend(frameon=False, fontsize="small", title="rate, decay")
    axes[1][2].invert_xaxis()
    for panel, label in zip(axes[1], ("step", "step", "train loss (nats), falling"), strict=True):
        panel.set_xlabel(label)
    return save_figure(figure, folder / "losses")


def plot_pruning(records: Sequence[Record], folder: Path) -> list[Path]:
    """Losses and accuracy against the share of hidden units kept: means and every seed; a row a protocol."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"validation_loss": "validation loss (nats)", "train_loss": "train loss (nats)"}
    shown["validation_accuracy"] = "validation accuracy"
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained", sharex=True, sharey="col")
    for row, protocol in zip(axes, PROTOCOLS, strict=True):
        for i, (name, runs) in enumerate(protocol_runs(records, protocol).items()):
            widths = [100 * each["keep"] for each in runs[0]["capacity"]["pruning"]]
            for panel, key in zip(row, shown, strict=True):
                lines = np.array([[each[key] for each in run["capacity"]["pruning"]] for run in runs])
                panel.plot(widths, lines.T, color=COLOURS[i], linewidth=0.6, alpha=0.5)
                style = {"color": COLOURS[i], "linestyle": ("-", "--")[i], "marker": "os"[i], "label": TITLES[name]}
                panel.plot(widths, lines.mean(0), **style)
        for panel, (key, title) in zip(row, shown.items(), strict=True):
            panel.set(ylabel=(f"{protocol}\n" if key == "validation_loss" else "") + title, xticks=widths)
            panel.grid(alpha=0.3)
        row[0].legend(frameon=False, title="mean and seeds", fontsize="small")
    axes[0][0].invert_xaxis()
    for panel in axes[1]:
        panel.set_xlabel("hidden units kept (%), no training after pruning")
    return save_figure(figure, folder / "pruning")


def plot_units(records: Sequence[Record], folder: Path) -> list[Path]:
    """Distributions of what single units do to the loss, and of their invariant norms; a row a protocol."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex="col", sharey=True)
    for row, protocol in zip(axes, PROTOCOLS, strict=True):
        for i, (name, runs) in enumerate(protocol_runs(records, protocol).items()):
            for j, run in enumerate(runs):
                style = {"color": COLOURS[i], "linestyle": ("-", "--")[i], "linewidth": 1}
                for panel, key in zip(row, ("removal_to_mean", "unit_norms"), strict=True):
                    numbers = np.sort(np.abs(np.concatenate([b[key] for b in run["capacity"]["blocks"]])))
                    shares = (np.arange(len(numbers)) + 1) / len(numbers)
                    panel.plot(numbers, shares, label=TITLES[name] if not j else None, **style)
        row[0].axvline(TOLERANCE, color="black", linestyle=":", linewidth=0.8, label="tolerance")
        for panel in row:
            panel.set_xscale("log")
        row[0].set(ylabel=f"{protocol}\nshare of units")
        for panel in row:
            panel.grid(alpha=0.3)
        row[0].legend(frameon=False, fontsize="small")
    axes[1][0].set_xlabel("|change of the validation loss| without one unit (nats)")
    axes[1][1].set_xlabel("invariant norm of a unit, ρ_P ρ_M")
    return save_figure(figure, folder / "units")
