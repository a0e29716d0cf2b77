"""Claim W4 as tables and a figure, from the records that are there, with what is missing said."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ddc.report.claims import Claim, Verdict, rule, verdict_table
from ddc.report.figures import Drawing, nth_style, plain_log_ticks, save_figure, subplots
from ddc.report.paired import interval
from ddc.report.runs import read_lines
from ddc.report.stages import Record, table
from experiments import own
from experiments.adapters.settings import (
    ADAMW,
    CASES,
    DDCADAM,
    EFFECTS,
    GENERAL,
    MAIN,
    MOVED,
    OPTIMIZERS,
    RESULTS,
    SCALES,
    STANDARD,
    STARTS,
    Case,
    Ended,
    Run,
    by_run,
    last_loss,
    mean_moved,
    missing,
    reported,
    retuned,
    retunings,
    tuning,
)
from experiments.output import Results

SCALE = "Llama, 0.13M parameters, adapters of rank 8, 0.05 MB of text"
FIGURES = {"W4": "starts"}
TITLES = {
    "rank8": "rank 8",
    "rank2": "rank 2",
    "rank32": "rank 32",
    "rank8_cold": "rank 8 from B = 0",
}
#: Last validation losses by optimizer and seed, and by start.
Losses = dict[tuple[str, int], dict[str, float]]


def load() -> list[Record]:
    """The committed records, complete or not."""
    return [record for name in CASES for record in read_lines(RESULTS / f"{name}_runs.jsonl")]


def losses_of(runs: Sequence[Run], ended: Ended) -> Losses:
    """What those of some runs end with that have ended."""
    found: Losses = {}
    for run in runs:
        if run in ended:
            found.setdefault((run.optimizer, run.seed), {})[run.start] = last_loss(ended[run])
    return found


def complete(losses: Losses, optimizer: str) -> dict[int, dict[str, float]]:
    """The seeds of an optimizer on which it ran from every start."""
    return {
        seed: each
        for (name, seed), each in sorted(losses.items())
        if name == optimizer and each.keys() >= {*STARTS}
    }


def differences(losses: Losses) -> dict[str, dict[str, list[float]]]:
    """DDCAdam less each other, by comparison and effect."""
    mine, found = complete(losses, DDCADAM), {}
    for name, title in OPTIMIZERS.items():
        theirs = complete(losses, name)
        seeds = sorted(mine.keys() & theirs.keys())
        if name != DDCADAM:
            found[f"against {title}"] = {
                effect: [of(mine[seed]) - of(theirs[seed]) for seed in seeds]
                for effect, of in EFFECTS.items()
            }
    return found


def gains_retuned(case: Case, ended: Ended) -> list[float]:
    """By how much AdamW's mean at the moved starts is lower where it was tuned at each, by seed."""
    plain, anew = losses_of(reported(case, ended), ended), losses_of(retuned(case, ended), ended)
    return [
        mean_moved(plain[key]) - mean_moved(each)
        for key, each in sorted(anew.items())
        if each.keys() >= {*MOVED} and plain.get(key, {}).keys() >= {*MOVED}
    ]


def left(ended: Ended) -> list[str]:
    """The cases that are not complete."""
    return [TITLES[name] for name, case in CASES.items() if missing(case, ended)]


def against(ended: Ended) -> str:
    """What the same records hold against every verdict."""
    case = CASES[MAIN]
    notes = []
    if edges := tuning(case).open_sides(ended):
        notes.append(f"not interior: {', '.join(OPTIMIZERS[name] for name in edges)}")
    if gains := gains_retuned(case, ended):
        notes.append(f"AdamW retuned there gains {interval(gains, '.4f')}")
    if missing(case, ended):
        notes.append("runs are missing")
    return "; ".join(notes) or "–"


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """One row a comparison."""
    ended = by_run(records)
    found = differences(losses_of(reported(CASES[MAIN], ended), ended))
    return own.verdicts(claims["W4"], found, -1, SCALE, against(ended), ".4f")


def starts_table(losses: Losses) -> str:
    """Mean losses by start, spread and mean over the moved ones: one row an optimizer."""
    rows = []
    for name, title in OPTIMIZERS.items():
        if seeds := complete(losses, name):
            means = [statistics.mean(each[start] for each in seeds.values()) for start in STARTS]
            effects = [
                f"{statistics.mean(of(each) for each in seeds.values()):.4f}"
                for of in EFFECTS.values()
            ]
            rows.append([title, str(len(seeds)), *(f"{each:.4f}" for each in means), *effects])
    header = ["", "seeds", *STARTS, *EFFECTS]
    return table(header, rows) if rows else "No optimizer has run from every start yet."


def retuned_table(ended: Ended) -> str:
    """AdamW tuned at each moved start of the main case: mean losses there."""
    case = CASES[MAIN]
    losses = losses_of(retuned(case, ended), ended)
    seeds = [each for each in losses.values() if each.keys() >= {*MOVED}]
    if not seeds:
        return "None of these is recorded yet."
    rates = [each.chosen(ended)[ADAMW] for each in retunings(case)]
    means = [statistics.mean(each[start] for each in seeds) for start in MOVED]
    gain = interval(gains_retuned(case, ended), ".4f")
    rows = [
        ["rate", "", *(f"{each:g}" for (each,) in rates), ""],
        ["loss", str(len(seeds)), *(f"{each:.4f}" for each in means), gain],
    ]
    return table(["", "seeds", *MOVED, "gain on average (95%)"], rows)


def tuning_table(ended: Ended) -> str:
    """One row an optimizer: by case, what was chosen at the standard start, and its loss there."""
    rows = []
    for name, title in OPTIMIZERS.items():
        cells = []
        for case in CASES.values():
            search = tuning(case)
            setting = search.chosen(ended).get(name)
            if setting is None:
                cells.append("–")
                continue
            words = " × ".join(f"{each:g}" for each in setting)
            edge = ", at an edge" if name in search.open_sides(ended) else ""
            count = len(search.tried(ended)[0][name])
            cells.append(f"{words}{edge} (of {count})")
        rows.append([title, *cells])
    return table(["", *TITLES.values()], rows)


def time_table(records: Sequence[Record]) -> str:
    """Milliseconds of a step: one row an optimizer, one column a case."""
    rows = []
    for name, title in OPTIMIZERS.items():
        cells = []
        for case in CASES:
            steps = [
                1000 * record["step_seconds"]
                for record in records
                if (record["case"], record["optimizer"]) == (case, name) and record["step_seconds"]
            ]
            cells.append(f"{statistics.median(steps):.1f}" if steps else "–")
        rows.append([title, *cells])
    return table(["", *TITLES.values()], rows)


def plot(losses: Mapping[str, Losses], stem: Path) -> list[Path]:
    """The last validation loss by what A was multiplied with: a panel a case, a line an optimizer;
    on the right of each panel, apart, the random map.
    """
    size = 4 * len(losses) + 1, 4.2
    figure, axes = subplots(1, len(losses), figsize=size, sharey=True, squeeze=False)
    scales = {**SCALES, STANDARD: 1.0}
    order = sorted(scales, key=scales.__getitem__)
    apart = 300.0
    for panel, (case, each) in zip(axes[0], losses.items(), strict=True):
        for i, (name, title) in enumerate(OPTIMIZERS.items()):
            if seeds := complete(each, name):
                means = {s: statistics.mean(e[s] for e in seeds.values()) for s in STARTS}
                style = nth_style(i, marker=True)
                panel.plot(
                    [scales[s] for s in order], [means[s] for s in order], label=title, **style
                )
                panel.plot([apart], [means[GENERAL]], **style)
        panel.set_xscale("log")
        plain_log_ticks(panel.xaxis)
        panel.set_xticks(
            [*(scales[s] for s in order), apart],
            [*("1" if s == STANDARD else s for s in order), "G"],
        )
        panel.set_title(TITLES[case])
        panel.set_xlabel("A times, B over")
    axes[0][0].set_ylabel("validation loss (nats a byte)")
    columns = 3 if len(losses) == 1 else len(OPTIMIZERS)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=columns, frameon=False)
    return save_figure(figure, stem)


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    if not records:
        return "No run is recorded yet.\n"
    claim, ended = claims["W4"], by_run(records)
    waiting = left(ended)
    parts = [
        f"**Not complete**: {', '.join(waiting)}." if waiting else "All planned runs are recorded.",
        "## Claim W4",
        verdict_table({claim.id: claim}, verdicts(records, claims)),
        rule(claim),
    ]
    for name, case in CASES.items():
        losses = losses_of(reported(case, ended), ended)
        parts += [f"## Where training ends, {TITLES[name]}", starts_table(losses)]
        parts += [
            text for text in (own.differences_table(differences(losses), ".4f", "DDCAdam"),) if text
        ]
    parts += [
        (
            "Last validation loss in nats a byte, mean over seeds, by what A was multiplied and B"
            " divided by; *general*: a random map of condition number 100. All at the rates that"
            " were tuned at the standard start of another seed. Differences are paired by seed,"
            " 95% (Student's t), p unadjusted: rank 8 alone decides."
        ),
        "## AdamW retuned at each moved start, rank 8",
        retuned_table(ended),
        "## The tuning",
        tuning_table(ended),
        (
            "Rate, of LoRA+ times its ratio, chosen at the standard start of seed 100, and of how"
            " many settings."
        ),
        "## Time of a step",
        time_table(records),
        (
            "Milliseconds of the optimizer alone on one thread, median over runs of the median over"
            " steps. Implementations differ: AdamW is torch's, of many tensors at once."
        ),
        own.runs_note(records).replace("`runs.jsonl`", "the records"),
    ]
    return "\n\n".join(parts) + "\n"


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables, and the figure of the cases in which an optimizer has run from every start."""
    ended = by_run(records)
    losses = {name: losses_of(reported(case, ended), ended) for name, case in CASES.items()}
    shown = {
        case: each for case, each in losses.items() if any(complete(each, o) for o in OPTIMIZERS)
    }
    drawing = Drawing(
        partial(plot, shown),
        "Adapters that go on from starts that compute the same: the last validation loss by what A"
        " was multiplied with and B divided by; G: a random map of condition number 100. Means over"
        " seeds.",
    )
    tables = {"table": lambda: markdown(records, claims)}
    return [Results(RESULTS, tables, {"starts": drawing} if shown else {})]
