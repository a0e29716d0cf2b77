"""Claim W1 as tables and a figure, from the records that are there, with what is missing said."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ddc.report.claims import Claim, Verdict
from ddc.report.figures import Drawing, nth_style, save_figure, subplots
from ddc.report.paired import interval
from ddc.report.stages import Record, table
from experiments import own
from experiments.output import Results
from experiments.regauged.plan import (
    ADAMW,
    DDCADAM,
    DDCMUON,
    FINE_TUNING,
    MUON,
    OPTIMIZERS,
    ORIGINAL,
    RIVAL,
    STARTS,
    TOOLS,
    FineTuning,
)
from experiments.search import Search

FIGURES = {"W1": "starts"}
COMPARED = {
    "against AdamW": (DDCADAM, ADAMW),
    "against AdamW, balanced once": (DDCADAM, RIVAL),
    "DDCMuon against Muon": (DDCMUON, MUON),
}
#: Last validation losses by optimizer and seed, and by start.
Losses = dict[tuple[str, int], dict[str, float]]


def load() -> list[Record]:
    """The committed records, complete or not."""
    return FINE_TUNING.experiment.records


def optimizer_of(record: Record) -> str:
    """One of :data:`OPTIMIZERS`."""
    optimizer = record["config"]["optimizer"]
    return RIVAL if optimizer.get("canonicalise") else str(optimizer["name"])


def losses_of(records: Sequence[Record], stage: str) -> Losses:
    """What the runs of a stage end with."""
    found: Losses = {}
    for record in records:
        if stage in record["stages"]:
            start = Path(record["config"]["start"]["weights"]).name
            found.setdefault((optimizer_of(record), record["seed"]), {})[start] = own.loss_of(
                record
            )
    return found


def complete(losses: Losses, optimizer: str) -> dict[int, dict[str, float]]:
    """The seeds of an optimizer on which it ran from every start."""
    return {
        seed: each
        for (name, seed), each in sorted(losses.items())
        if name == optimizer and each.keys() >= {*STARTS}
    }


def spread(losses: Mapping[str, float]) -> float:
    """Largest less smallest over the starts."""
    return max(losses[each] for each in STARTS) - min(losses[each] for each in STARTS)


def mean_regauged(losses: Mapping[str, float]) -> float:
    """Mean over the re-gauged starts."""
    return statistics.mean(losses[each] for each in TOOLS)


EFFECTS = {"spread": spread, "mean at re-gauged starts": mean_regauged}


def differences(losses: Losses) -> dict[str, dict[str, list[float]]]:
    """By comparison and effect, subject less baseline."""
    found = {}
    for comparison, (subject, baseline) in COMPARED.items():
        mine, theirs = complete(losses, subject), complete(losses, baseline)
        seeds = sorted(mine.keys() & theirs.keys())
        found[comparison] = {
            title: [of(mine[seed]) - of(theirs[seed]) for seed in seeds]
            for title, of in EFFECTS.items()
        }
    return found


def regrets(losses: Losses, optimizer: str) -> list[float]:
    """Mean over the re-gauged starts less AdamW's loss from the original, by seed."""
    tuned = {
        seed: each[ORIGINAL]
        for (name, seed), each in losses.items()
        if name == ADAMW and ORIGINAL in each
    }
    mine = complete(losses, optimizer)
    return [mean_regauged(mine[seed]) - tuned[seed] for seed in sorted(mine.keys() & tuned.keys())]


def against(records: Sequence[Record], runs: FineTuning) -> str:
    """What the same records hold against every verdict."""
    notes = []
    if edges := runs.search.not_interior(records):
        notes.append(f"not interior: {', '.join(OPTIMIZERS[name] for name in edges)}")
    retuned, reported = losses_of(records, "retuned"), losses_of(records, "reported")
    for name in runs.retuned:
        gains = [
            mean_regauged(reported[key]) - mean_regauged(each)
            for key, each in retuned.items()
            if key[0] == name
            and each.keys() >= {*TOOLS}
            and reported.get(key, {}).keys() >= {*TOOLS}
        ]
        if gains:
            notes.append(f"{OPTIMIZERS[name]} retuned there gains {interval(gains, '.4f')}")
    if left := runs.experiment.missing():
        notes.append(left)
    return "; ".join(notes) or "–"


def verdicts(
    records: Sequence[Record], claims: Mapping[str, Claim], runs: FineTuning = FINE_TUNING
) -> list[Verdict]:
    """One row a comparison."""
    found, claim = differences(losses_of(records, "reported")), claims[runs.claim]
    tuned = [each for each in records if "reported" in each["stages"]]
    scale = own.scale(runs.model, tuned)
    return own.verdicts(claim, found, -1, scale, against(records, runs), ".4f")


def starts_table(losses: Losses) -> str:
    """Mean losses by start, spread and regret: one row an optimizer."""
    rows = []
    for name, title in OPTIMIZERS.items():
        seeds = complete(losses, name)
        if seeds:
            means = [statistics.mean(each[start] for each in seeds.values()) for start in STARTS]
            spreads = [spread(each) for each in seeds.values()]
            shown = [interval(spreads, ".4f"), interval(regrets(losses, name), ".4f")]
            rows.append([title, str(len(seeds)), *(f"{each:.4f}" for each in means), *shown])
    header = ["", "seeds", *STARTS, "spread (95%)", "regret (95%)"]
    return table(header, rows) if rows else "No optimizer has run from every start yet."


def retuned_table(records: Sequence[Record], runs: FineTuning) -> str:
    """Those that are tuned at each re-gauged start: mean losses there."""
    losses = losses_of(records, "retuned")
    rows = []
    for name in runs.retuned:
        seeds = [each for (other, _), each in losses.items() if other == name]
        columns = [[each[tool] for each in seeds if tool in each] for tool in TOOLS]
        if seeds:
            cells = [f"{statistics.mean(each):.4f}" if each else "–" for each in columns]
            rows.append([OPTIMIZERS[name], str(len(seeds)), *cells])
    return table(["", "seeds", *TOOLS], rows) if rows else "None of these is recorded yet."


def tuning_table(records: Sequence[Record], search: Search) -> str:
    """One row a setting that was tried at the original checkpoint; bold where it was chosen."""
    rows = []
    for name, title in OPTIMIZERS.items():
        cells = search.recorded(records, name)
        chosen = search.choices(cells).get("last")
        for point, record in sorted(cells.items()):
            optimizer = record["config"]["optimizer"]
            rates = ", ".join(f"{key} {optimizer[key]:g}" for key in search.axes[name])
            mark = "**" if point == chosen else ""
            rows.append([title, f"{mark}{rates}{mark}", f"{own.loss_of(record):.4f}"])
    header = ["optimizer", "setting", "validation loss, last"]
    return table(header, rows, left=2) if rows else "No setting is recorded yet."


def plot(losses: Losses, stem: Path) -> list[Path]:
    """The last validation loss by start, less AdamW's from the original: a panel an optimizer, a
    line a seed.
    """
    figure, axes = subplots(1, len(OPTIMIZERS), figsize=(14, 3.6), sharey=True)
    for i, (panel, (name, title)) in enumerate(zip(axes, OPTIMIZERS.items(), strict=True)):
        for seed, each in complete(losses, name).items():
            tuned = losses.get((ADAMW, seed), {}).get(ORIGINAL)
            if tuned is not None:
                panel.plot(
                    STARTS, [each[start] - tuned for start in STARTS], **nth_style(i, marker=True)
                )
        panel.set_title(title)
        panel.tick_params(axis="x", rotation=40)
    axes[0].set_ylabel("loss less AdamW's\nfrom the original (nats)")
    return save_figure(figure, stem)


def markdown(
    records: Sequence[Record], claims: Mapping[str, Claim], runs: FineTuning = FINE_TUNING
) -> str:
    """All tables."""
    if not records:
        return "No run is recorded yet.\n"
    claim, losses = claims[runs.claim], losses_of(records, "reported")
    retuned = ["## Retuned at each re-gauged checkpoint", retuned_table(records, runs)]
    parts = [
        *own.opening(claim, verdicts(records, claims, runs), runs.experiment.missing()),
        "## Where fine-tuning ends",
        starts_table(losses),
        (
            "Last validation loss in nats a byte, mean over seeds. Spread: largest less smallest"
            " over the five starts; regret: mean over the four re-gauged ones less AdamW's from the"
            " original. All at the rates that were tuned on the original checkpoint of another"
            " seed."
        ),
        "## Differences",
        own.differences_table(differences(losses), ".4f"),
        "Paired by seed, 95% (Student's t); p unadjusted.",
        *(retuned if runs.retuned else []),
        "## The tuning",
        tuning_table(records, runs.search),
        "Seed 100, at the original checkpoint. Bold: chosen.",
        own.runs_note(records),
    ]
    return "\n\n".join(parts) + "\n"


def results(
    records: Sequence[Record], claims: Mapping[str, Claim], runs: FineTuning = FINE_TUNING
) -> list[Results]:
    """Tables, and the figure where an optimizer has run from every start."""
    losses = losses_of(records, "reported")
    drawing = Drawing(
        partial(plot, losses),
        "Fine-tuning from a checkpoint and from four that compute the same, re-gauged as tools of"
        " deployment do: the last validation loss less AdamW's from the original. A line a seed.",
    )
    there = any(complete(losses, name) for name in OPTIMIZERS)
    tables = {"table": lambda: markdown(records, claims, runs)}
    return [Results(runs.experiment.results, tables, {"starts": drawing} if there else {})]
