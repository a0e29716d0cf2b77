"""Claim W8 as tables and a figure, from the records that are there, with what is missing said."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ddc.report.claims import Claim, Verdict
from ddc.report.figures import Drawing, nth_style, points_and_mean, save_figure, subplots
from ddc.report.stages import Record, table
from ddc.report.statistics import mean_interval
from experiments import own
from experiments.output import Results
from experiments.tuned_muon.plan import (
    DDCMUON,
    EXPERIMENT,
    MUON,
    OPTIMIZERS,
    RESULTS,
    RIVAL,
    SEARCH,
    WITHOUT,
)

MODEL = "GPT, 0.12M parameters"
FIGURES = {"W8": "losses"}
COMPARED = {
    "against Muon": MUON,
    "against Muon, balanced once": RIVAL,
    "against DDCMuon without gauges": WITHOUT,
}
EFFECT = "last validation loss"
HYPERPARAMETERS = ("rate", "rate of all else", "decay")
#: Last validation losses by optimizer and seed.
Losses = Mapping[str, Mapping[int, float]]


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def reported(records: Sequence[Record], optimizer: str) -> dict[int, Record]:
    """The runs of an optimizer at what was chosen for it, by seed."""
    known = SEARCH.points(optimizer)
    found = {each["seed"]: each for each in records if each["stages"].get("reported") in known}
    return dict(sorted(found.items()))


def losses_of(records: Sequence[Record]) -> Losses:
    """What the reported runs end with."""
    return {
        name: {seed: own.loss_of(each) for seed, each in reported(records, name).items()}
        for name in OPTIMIZERS
    }


def differences(losses: Losses) -> dict[str, dict[str, list[float]]]:
    """DDCMuon less each of the others."""
    return {
        comparison: {EFFECT: own.paired(losses[DDCMUON], losses[baseline])}
        for comparison, baseline in COMPARED.items()
    }


def against(records: Sequence[Record]) -> str:
    """What the same records hold against every verdict."""
    edges = SEARCH.not_interior(records)
    notes = [f"not interior: {', '.join(OPTIMIZERS[each] for each in edges)}"] if edges else []
    notes += [left] if (left := EXPERIMENT.missing()) else []
    return "; ".join(notes) or "–"


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """One row a comparison."""
    found = differences(losses_of(records))
    scale = own.scale(MODEL, records)
    return own.verdicts(claims["W8"], found, -1, scale, against(records), ".4f")


def losses_table(records: Sequence[Record]) -> str:
    """One row an optimizer: its setting, and where it ends."""
    rows = []
    for name, title in OPTIMIZERS.items():
        if runs := [*reported(records, name).values()]:
            losses = [own.loss_of(each) for each in runs]
            cell = f"{statistics.mean(losses):.4f}"
            if len(losses) > 1:
                low, high = mean_interval(losses)
                cell += f" ({low:.4f} to {high:.4f})"
            rows.append([title, *setting_of(runs[0], name), str(len(losses)), cell])
    header = ["", *HYPERPARAMETERS, "seeds", f"{EFFECT} (95%)"]
    return table(header, rows) if rows else "No optimizer is tuned yet."


def setting_of(record: Record, optimizer: str) -> list[str]:
    """The values of :data:`HYPERPARAMETERS`."""
    return [f"{record['config']['optimizer'][key]:g}" for key in SEARCH.axes[optimizer]]


def tuning_table(records: Sequence[Record]) -> str:
    """One row a setting that was tried; bold where it was chosen."""
    rows = []
    for name, title in OPTIMIZERS.items():
        cells = SEARCH.recorded(records, name)
        chosen = SEARCH.choices(cells).get("last")
        for point, record in sorted(cells.items()):
            mark = "**" if point == chosen else ""
            setting = [f"{mark}{each}{mark}" for each in setting_of(record, name)]
            rows.append([title, *setting, f"{own.loss_of(record):.4f}"])
    header = ["optimizer", *HYPERPARAMETERS, EFFECT]
    return table(header, rows) if rows else "No setting is recorded yet."


def plot(losses: Losses, stem: Path) -> list[Path]:
    """The last validation loss: a point a seed, a line at their mean."""
    figure, panel = subplots(figsize=(6.4, 4))
    for i, name in enumerate(OPTIMIZERS):
        if losses[name]:
            points_and_mean(panel, i, [*losses[name].values()], 0.2, nth_style(i, marker=True))
    panel.set_xticks(range(len(OPTIMIZERS)), [*OPTIMIZERS.values()], rotation=15)
    panel.set_ylabel("last validation loss (nats)")
    return save_figure(figure, stem)


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    if not records:
        return "No run is recorded yet.\n"
    claim, losses = claims["W8"], losses_of(records)
    parts = [
        *own.opening(claim, verdicts(records, claims), EXPERIMENT.missing()),
        "## Where tuned runs end",
        losses_table(records),
        "In nats a byte, mean over seeds, 95% (Student's t).",
        "## Differences",
        own.differences_table(differences(losses), ".4f"),
        "Paired by seed, 95% (Student's t); p unadjusted.",
        "## The tuning",
        tuning_table(records),
        "Seed 100. Bold: chosen.",
        own.runs_note(records),
    ]
    return "\n\n".join(parts) + "\n"


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables, and the figure where an optimizer has been reported."""
    losses = losses_of(records)
    drawing = Drawing(
        partial(plot, losses),
        "The last validation loss of tuned runs: a point a seed, a line at their mean.",
    )
    tables = {"table": lambda: markdown(records, claims)}
    figures = {"losses": drawing} if any(losses.values()) else {}
    return [Results(RESULTS, tables, figures)]
