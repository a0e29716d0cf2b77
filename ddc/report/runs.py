"""Read runs from their folders, tabulate and plot them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ddc.report.figures import COLOURS, save_figure, subplots
from ddc.training.records import read_lines as read_lines
from ddc.training.run_folder import INFO, READINGS, RECORDS, complete_summary
from ddc.training.run_folder import RECORD_FILES as RECORD_FILES


class Titles(dict[str, str]):
    """By name; what has no other title is called by its name."""

    def __missing__(self, name: str) -> str:
        return name


#: How optimizers are called in tables and figures; their order is that of columns and colours.
TITLES = Titles(
    {
        "adamw": "AdamW",
        "ddcadam": "DDCAdam",
        "muon": "Muon",
        "ddcmuon": "DDCMuon",
        "ddclion": "DDCLion",
        "ddcsgd": "DDCSGD",
        "ddcshampoo": "DDCShampoo",
        "ddcadam_paper": "DDCAdam, the paper's step",
        "adamw_relative": "AdamW, relative steps",
        "adamh": "AdamH",
    }
)


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run, as its folder tells it."""

    folder: Path
    info: dict[str, Any]
    rows: list[dict[str, Any]]
    readings: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder.

        Raises:
            FileNotFoundError: the folder holds no run.
        """
        if not (folder / INFO).exists():
            raise FileNotFoundError(f"{folder} holds no run (no {INFO})")
        return cls(
            folder,
            json.loads((folder / INFO).read_text()),
            read_lines(folder / RECORDS),
            read_lines(folder / READINGS),
            complete_summary(folder),
        )

    @property
    def label(self) -> str:
        """Optimizer and seed."""
        config = self.info["config"]
        name = config["optimizer"]["name"]
        return f"{TITLES.get(name, name)}, seed {config['seed']}"


def summary_table(runs: Sequence[Run]) -> Table:
    """One column a run: losses in nats, the gap, the gap at equal train loss, wall time."""
    table = Table(title="loss in nats")
    table.add_column("")
    for run in runs:
        table.add_column(run.label, justify="right")
    for name, cells in summary_rows(runs):
        table.add_row(name, *cells)
    return table


def markdown_table(runs: Sequence[Run]) -> str:
    """The table of :func:`summary_table` in Markdown, with the commits that made the runs."""
    commits = ", ".join(sorted({str(run.info["commit"]) for run in runs}))
    lines = [
        "| | " + " | ".join(run.label for run in runs) + " |",
        "| --- |" + " ---: |" * len(runs),
    ]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in summary_rows(runs)]
    return "\n".join([*lines, "", f"Losses in nats. Commit {commits}."]) + "\n"


def summary_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Names and cells of a summary, for any kind of table."""
    summaries = [run.summary or {} for run in runs]

    def row(name: str, key: str, form: str = ".3f") -> tuple[str, list[str]]:
        return name, [format(s[key], form) if s.get(key) is not None else "–" for s in summaries]

    rows = [
        row("steps", "steps", "d"),
        row("train loss", "train_loss"),
        row("validation loss, last", "validation_loss"),
        row("validation loss, best", "best_validation_loss"),
        row("… at step", "best_validation_step", "d"),
        row("gap (validation - train)", "gap"),
    ]
    levels = sorted(
        {level for s in summaries for level in s.get("gap_at_train_loss", {})},
        key=float,
        reverse=True,
    )
    for level in levels:
        gaps = [s.get("gap_at_train_loss", {}).get(level) for s in summaries]
        rows.append(
            (
                f"gap at train loss {level}",
                ["never reached" if g is None else f"{g:.3f}" for g in gaps],
            )
        )
    if any("validation_accuracy" in s for s in summaries):
        rows.append(row("train accuracy", "train_accuracy"))
        rows.append(row("validation accuracy, last", "validation_accuracy"))
        rows.append(row("validation accuracy, best", "best_validation_accuracy"))
    if any("validation_calibration_error" in s for s in summaries):
        rows.append(row("validation calibration error, last", "validation_calibration_error"))
    reached = sorted(
        {level for s in summaries for level in s.get("step_of_accuracy", {})}, key=float
    )
    for level in reached:
        steps = [s.get("step_of_accuracy", {}).get(level) for s in summaries]
        rows.append(
            (
                f"step of accuracy {level}",
                ["never reached" if step is None else str(step) for step in steps],
            )
        )
    rows.append(row("wall time, s", "seconds", ".0f"))
    if any(s.get("reading_seconds") for s in summaries):
        rows.append(row("… of it readings", "reading_seconds", ".0f"))
    return rows


def plot_curves(runs: Sequence[Run], stem: Path) -> list[Path]:
    """Loss curves against epochs, and gap against train loss, as ``stem``.png and ``stem``.pdf."""
    figure, (losses, gaps) = subplots(1, 2, figsize=(10, 4))
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        epochs = [row["epoch"] for row in run.rows]
        for split, style in (("train", "--"), ("validation", "-")):
            values = [row[f"{split}_loss"] for row in run.rows]
            label = None if i else split
            losses.plot(epochs, values, color=colour, linestyle=style, label=label)
        trained = [row for row in run.rows if row["step"]]
        gaps.plot(
            [row["train_loss"] for row in trained],
            [row["gap"] for row in trained],
            color=colour,
            marker=".",
            markersize=4,
            label=run.label,
        )
    losses.set(xlabel="epochs", ylabel="loss (nats)", ylim=(0, None))
    gaps.set(xlabel="train loss (nats), falling", ylabel="validation - train loss (nats)")
    gaps.invert_xaxis()
    for handle in losses.legend(frameon=False, fontsize="small").legend_handles:
        handle.set_color("black")  # of all runs
    gaps.legend(frameon=False, fontsize="small")
    return save_figure(figure, stem)
