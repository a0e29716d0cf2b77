"""Claim C5 under longer budgets as a table and survival curves, from the records that there are,
with what is missing said.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from scipy import stats

from ddc.report.claims import Claim, Effect, Verdict, not_complete, rule, verdict, verdict_table
from ddc.report.figures import Drawing, nth_style, save_figure, subplots
from ddc.report.paired import p_cell
from ddc.report.runs import TITLES
from ddc.report.stages import Record, commits, table
from ddc.report.statistics import fisher_p, holm, share_difference_interval
from experiments.grok_long.plan import (
    BUDGETS,
    DDCMUON,
    EXPERIMENT,
    MUON,
    RESULTS,
    SEARCHES,
    SEEDS,
)
from experiments.grok_mlp.plan import GROKS, best_accuracy, grokked, step_of
from experiments.output import Results

SCALE = "ReLU network, depth 24, width 96, addition modulo 53"
#: What is compared under a budget: stage and optimizer, in the words of tables.
VARIANTS = {
    "Muon": ("reported", MUON),
    "DDCMuon": ("reported", DDCMUON),
    "DDCMuon, without gauges": ("no_gauges", DDCMUON),
}
FROZEN = {"Muon": ("frozen", MUON), "DDCMuon": ("frozen", DDCMUON)}


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def groups(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """The runs of each comparison by variant, in order of seeds: of each budget, and frozen."""

    def of(stage: str, name: str) -> list[Record]:
        found = [
            each
            for each in records
            if stage in each["stages"] and each["config"]["optimizer"]["name"] == name
        ]
        return sorted(found, key=lambda each: each["seed"])

    found = {
        f"{steps} steps": {
            title: of(f"{stage}_{steps}", name) for title, (stage, name) in VARIANTS.items()
        }
        for steps in BUDGETS
    }
    frozen = {title: of(stage, name) for title, (stage, name) in FROZEN.items()}
    return {**found, f"{BUDGETS[-1]} steps, frozen": frozen}


def log_rank_p(a: Sequence[Record], b: Sequence[Record]) -> float | None:
    """Two-sided p-value that two groups grok at the same times, by the log-rank test; None where no
    run of them groks, or one of them has no runs.
    """
    if not a or not b or not any(step_of(run) for run in (*a, *b)):
        return None
    samples = [
        stats.CensoredData(
            uncensored=[step for run in runs if (step := step_of(run)) is not None],
            right=[run["config"]["training"]["steps"] for run in runs if step_of(run) is None],
        )
        for runs in (a, b)
    ]
    return float(stats.logrank(*samples).pvalue)


def compared(records: Sequence[Record]) -> dict[str, tuple[list[Record], list[Record]]]:
    """(DDCMuon's runs, the other's) of each row of the claim."""
    found = {}
    for name, runs in groups(records).items():
        found[name] = (runs["DDCMuon"], runs["Muon"])
        if "DDCMuon, without gauges" in runs:
            found[f"{name}, without gauges"] = (runs["DDCMuon"], runs["DDCMuon, without gauges"])
    return found


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """The claim by budget, against Muon and against DDCMuon without gauges."""
    claim, rows = claims["C5b"], compared(records)
    complete = {key for key, pair in rows.items() if all(len(each) == len(SEEDS) for each in pair)}
    counted = {
        key: fisher_p((grokked(a), grokked(b)), (len(a), len(b))) if key in complete else None
        for key, (a, b) in rows.items()
    }
    timed = {key: log_rank_p(*pair) if key in complete else None for key, pair in rows.items()}
    adjusted = holm([*counted.values(), *timed.values()])
    found = []
    for i, (key, (ours, theirs)) in enumerate(rows.items()):
        p, p_time = adjusted[i], adjusted[i + len(rows)]
        if p is None:
            continue
        a, b = grokked(ours) / len(ours), grokked(theirs) / len(theirs)
        low, high = share_difference_interval(
            (grokked(ours), grokked(theirs)), (len(ours), len(theirs))
        )
        counts_differ = p < claim.level
        sooner = p_time is not None and p_time < claim.level and median(ours) < median(theirs)
        direction = (1 if a > b else -1) if counts_differ else int(sooner and a >= b)
        enough = counts_differ and a >= claim.enough and 1 - b >= claim.enough
        found.append(
            Verdict(
                claim.id,
                key,
                f"{grokked(ours)} against {grokked(theirs)}: {a - b:+.2f} ({low:+.2f} to"
                f" {high:+.2f})",
                f"{p_cell(p)}, times {p_cell(p_time)}",
                str(len(ours)),
                "yes",
                SCALE,
                verdict([Effect(direction, enough)]),
                edges(records, key),
            )
        )
    return [*found, *not_complete(claim, [each for each in rows if each not in complete], SCALE)]


def median(runs: Sequence[Record]) -> float:
    """The median step of grokking; infinite where half of the runs do not."""
    return statistics.median(step_of(run) or math.inf for run in runs)


def edges(records: Sequence[Record], key: str) -> str:
    """Which of the settings that a row compares are not interior."""
    search = SEARCHES[int(key.split()[0])]
    open_at = [TITLES[name] for name in search.not_interior(records)]
    return f"not interior: {', '.join(open_at)}" if open_at else "–"


def group_table(records: Sequence[Record]) -> str:
    """One row a comparison and variant."""
    rows = []
    for key, variants in groups(records).items():
        for title, runs in variants.items():
            if runs:
                times = [step for run in runs if (step := step_of(run)) is not None]
                last = [
                    run["curve"]["validation_accuracy"][-1] for run in runs if not run["diverged"]
                ]
                rows.append(
                    [
                        key,
                        title,
                        setting_title(runs[0]),
                        f"{grokked(runs)} of {len(runs)}",
                        f"{statistics.median(times):g}" if times else "–",
                        f"{statistics.mean(map(best_accuracy, runs)):.3f}",
                        f"{statistics.mean(last):.3f}" if last else "–",
                    ]
                )
    header = ["budget", "optimizer", "rates, decay", "groks", "at step", "best accuracy", "last"]
    return table(header, rows, left=3) if rows else "No run of these is recorded yet."


def setting_title(record: Record) -> str:
    """Rates of hidden matrices and of the rest, and decay."""
    optimizer = record["config"]["optimizer"]
    return f"{optimizer['lr']:g} / {optimizer['adam_lr']:g}, {optimizer['weight_decay']:g}"


def search_table(records: Sequence[Record]) -> str:
    """Every setting that was tried; bold what is chosen."""
    rows = []
    for steps, search in SEARCHES.items():
        for name in (MUON, DDCMUON):
            cells = search.recorded(records, name)
            chosen = search.choices(cells).values()
            for point, run in sorted(cells.items()):
                mark = "**" if point in chosen else ""
                step = step_of(run)
                rows.append(
                    [
                        str(steps),
                        TITLES[name],
                        f"{mark}{setting_title(run)}{mark}",
                        str(search.stage_of(run)).removesuffix(search.suffix),
                        "–" if step is None else str(step),
                        f"{best_accuracy(run):.3f}",
                    ]
                )
    header = ["budget", "optimizer", "rates, decay", "stage", "groks at", "best accuracy"]
    return table(header, rows, left=4) if rows else "No run of these is recorded yet."


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    hours = sum(record["seconds"] for record in records) / 3600
    claim, left = claims["C5b"], EXPERIMENT.missing()
    parts = [
        f"{SCALE}. A run groks if its validation accuracy is at least {GROKS} at some evaluation.",
        "All planned runs are recorded." if not left else f"**Not complete.** {left}",
        "## Claim C5 under longer budgets",
        verdict_table({claim.id: claim}, verdicts(records, claims)),
        rule(claim),
        "## What was chosen",
        group_table(records),
        "Rates: of hidden matrices / of embedding and readout.",
        "## Every setting that was tried",
        search_table(records),
        (
            f"{len(records)} runs, {hours:.1f} hours of one core in all. Commit {commits(records)}."
            " Made by `make report` from `runs.jsonl` beside this file."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def plot_survival(records: Sequence[Record], stem: Path) -> list[Path]:
    """The share of runs that have not grokked yet, by step: a panel a comparison."""
    there = {
        key: {title: runs for title, runs in variants.items() if runs}
        for key, variants in groups(records).items()
        if any(variants.values())
    }
    figure, axes = subplots(
        1, len(there), figsize=(4.2 * len(there), 3.6), sharey=True, squeeze=False
    )
    for panel, (key, variants) in zip(axes[0], there.items(), strict=True):
        for i, (title, runs) in enumerate(variants.items()):
            end = runs[0]["config"]["training"]["steps"]
            times = sorted(step for run in runs if (step := step_of(run)) is not None)
            left = [1 - j / len(runs) for j in range(len(times) + 1)]
            label = f"{title} ({len(runs)} seeds)"
            panel.step(
                [0, *times, end], [*left, left[-1]], where="post", label=label, **nth_style(i)
            )
        panel.set(title=key, xlabel="step", ylim=(-0.03, 1.03))
        panel.legend(frameon=False, fontsize="small")
    axes[0][0].set_ylabel("share that has not grokked")
    return save_figure(figure, stem)


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables and figures."""
    survival = Drawing(
        partial(plot_survival, records),
        "Grokking under longer budgets: the share of runs that have not grokked by a step. Runs"
        " that never do are censored at the budget.",
    )
    figures = (
        {"survival": survival} if any(any(v.values()) for v in groups(records).values()) else {}
    )
    return [Results(RESULTS, {"table": partial(markdown, records, claims)}, figures)]
