"""Claim W6 as tables and a figure, from the pairs that were measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ddc.report.claims import Claim, Verdict, rule, verdict_table
from ddc.report.figures import Drawing, nth_style, points_and_mean, save_figure, subplots
from ddc.report.paired import interval
from ddc.report.runs import read_lines
from ddc.report.stages import Record, commits, table
from experiments import own
from experiments.merging.plan import EXPERIMENT, OPTIMIZERS, RESULTS
from experiments.output import Results
from experiments.regauged.plan import ORIGINAL, STARTS

MODEL = "GPT, 0.12M parameters, fine-tuned on another text"
FIGURES = {"W6": "barriers"}
#: The starts of the second run in each effect; QuaRot's is in none.
EFFECTS = {"original": (ORIGINAL,), "re-gauged": ("smoothquant", "awq", "absmax")}


#: Averages along one run, by key of its records.
AVERAGES = {"swa": "SWA", "ema": "EMA"}


def load() -> list[Record]:
    """The pairs that were measured."""
    return read_lines(RESULTS / "pairs.jsonl")


def barriers(records: Sequence[Record], key: str) -> dict[tuple[str, str], dict[int, float]]:
    """Of the average ``as_is`` or ``moved``, by optimizer and start of the second run, and seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        value = record[key] - (record["first"] + record["second"]) / 2
        found.setdefault((record["optimizer"], record["start"]), {})[record["seed"]] = value
    return found


def differences(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Barriers moved less as they are, by optimizer and effect, of the seeds that have all."""
    plain, moved = barriers(records, "as_is"), barriers(records, "moved")
    found: dict[str, dict[str, list[float]]] = {}
    for name in OPTIMIZERS.values():
        all_starts = [each for starts in EFFECTS.values() for each in starts]
        seeds = set.intersection(*({*plain.get((name, each), {})} for each in all_starts))
        found[name] = {
            title: [
                statistics.mean(
                    moved[name, each][seed] - plain[name, each][seed] for each in starts
                )
                for seed in sorted(seeds)
            ]
            for title, starts in EFFECTS.items()
        }
    return found


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """One row an optimizer."""
    scale = own.scale(MODEL, EXPERIMENT.records)
    return own.verdicts(claims["W6"], differences(records), -1, scale, "–", ".3f")


def along_table(records: Sequence[Record]) -> str:
    """Averages along one run, less its own end: one row an optimizer and average."""
    rows = []
    for name in OPTIMIZERS.values():
        seeds = [each for each in records if each["optimizer"] == name]
        for key, title in AVERAGES.items() if seeds else ():
            columns = [
                [each[a] - each[b] for each in seeds]
                for a, b in ((key, "last"), (f"{key}_moved", "last"), (f"{key}_moved", key))
            ]
            cells = [interval(each, ".4f") for each in columns]
            rows.append([name, title, str(len(seeds)), *cells])
    header = ["optimizer", "average", "seeds", "as they are", "moved", "moved - as they are"]
    return table(header, rows, left=2) if rows else "None of these is recorded yet."


def plot(records: Sequence[Record], stem: Path) -> list[Path]:
    """The barrier by start of the second run: a panel an optimizer, a point a seed, and a line at
    their mean; as they are and moved.
    """
    found = {"as they are": barriers(records, "as_is"), "moved": barriers(records, "moved")}
    shown = [each for starts in EFFECTS.values() for each in starts]
    figure, axes = subplots(1, len(OPTIMIZERS), figsize=(9, 3.6), sharey=True)
    for panel, name in zip(axes, OPTIMIZERS.values(), strict=True):
        for i, (title, each) in enumerate(found.items()):
            style = nth_style(i, marker=True)
            for j, start in enumerate(shown):
                values = [*each.get((name, start), {}).values()]
                if values:
                    x = j + (i - 0.5) * 0.25
                    points_and_mean(panel, x, values, 0.1, style | {"label": None if j else title})
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xticks(range(len(shown)), shown, rotation=30)
        panel.set_title(name)
    axes[0].set_ylabel("barrier (nats)")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False)
    return save_figure(figure, stem)


def markdown(
    records: Sequence[Record], along: Sequence[Record], claims: Mapping[str, Claim]
) -> str:
    """All tables."""
    if not records:
        return "No pair is measured yet.\n"
    claim = claims["W6"]
    plain, moved = barriers(records, "as_is"), barriers(records, "moved")
    rows = [
        [
            name,
            start,
            str(len(plain[name, start])),
            interval([*plain[name, start].values()], ".3f"),
            interval([*moved[name, start].values()], ".3f"),
        ]
        for name in OPTIMIZERS.values()
        for start in STARTS
        if (name, start) in plain
    ]
    header = ["optimizer", "second run from", "seeds", "barrier, as they are", "barrier, moved"]
    parts = [
        "## Claim W6",
        verdict_table({claim.id: claim}, verdicts(records, claims)),
        rule(claim),
        "## Barriers",
        table(header, rows, left=2),
        (
            "Validation loss of the average of two runs less the mean of theirs, in nats a byte;"
            " mean over seeds, 95% (Student's t)."
        ),
        "## Averages along one run",
        along_table(along),
        (
            "Validation loss of the average of ten snapshots of the second half of a run, less that"
            " of the last weights, in nats a byte; the rate is constant. It decides no verdict."
        ),
        (
            f"{len(records)} pairs. Commit {commits(records)}. Made from `pairs.jsonl`"
            + (f" and, commit {commits(along)}, `along.jsonl`." if along else ".")
        ),
    ]
    return "\n\n".join(parts) + "\n"


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """The tables, and the figure where there is a pair."""
    drawing = Drawing(
        partial(plot, records),
        "The validation loss of the average of two runs less the mean of theirs, by the start of"
        " the second run: of the weights as they are, and of both moved to one gauge first. A point"
        " a seed, a line at their mean. QuaRot, whose barriers are larger, is in the table alone.",
    )
    along = read_lines(RESULTS / "along.jsonl")
    tables = {"table": lambda: markdown(records, along, claims)}
    return [Results(RESULTS, tables, {"barriers": drawing} if records else {})]
