"""Claim W3 as tables and a figure, from the records that are there, with what is missing said."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ddc.report.claims import Claim, Verdict
from ddc.report.figures import Drawing, nth_style, plain_log_ticks, save_figure, subplots
from ddc.report.paired import interval
from ddc.report.stages import Record, table
from experiments import own
from experiments.output import Results
from experiments.rate_range.plan import rate
from experiments.transfer.plan import (
    ADAMH,
    ADAMW,
    BASE,
    DDCADAM,
    DDCMUON,
    EXPERIMENT,
    LARGER,
    LATTICE,
    MUON,
    MUP,
    OPTIMIZERS,
    RESULTS,
    SEARCHES,
    SEEDS,
    SIZES,
    setting,
)

SCALE = "GPT of width 64 to 512 and 2 to 8 blocks, 26 kB of text seen once"
FIGURES = {"W3": "rates"}
#: Subject and baseline of each comparison.
COMPARED = {
    "against AdamW": (DDCADAM, ADAMW),
    "against AdamW, muP": (DDCADAM, MUP),
    "against AdamH": (DDCADAM, ADAMH),
    "DDCMuon against Muon": (DDCMUON, MUON),
}


class Outcome(NamedTuple):
    """Last validation losses of an optimizer at a size on one seed."""

    transferred: float
    tuned: float

    @property
    def regret(self) -> float:
        """Of the transferred rate."""
        return self.transferred - self.tuned


#: Outcomes by optimizer and size, and by seed.
Outcomes = Mapping[tuple[str, str], Mapping[int, Outcome]]


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def tuned_losses(records: Sequence[Record], optimizer: str, size: str) -> dict[int, float]:
    """The losses of the tuning by half decade of the rate."""
    tried = SEARCHES[size].recorded(records, optimizer)
    return {LATTICE[i]: own.loss_of(record) for (i,), record in sorted(tried.items())}


def choice(records: Sequence[Record], optimizer: str, size: str) -> int | None:
    """The half decade that the records of a tuning choose; None without any."""
    losses = tuned_losses(records, optimizer, size)
    return min(losses, key=lambda each: (losses[each], each)) if losses else None


def outcomes_of(records: Sequence[Record]) -> Outcomes:
    """All that can be read."""
    losses = {
        (record["stages"][stage], record["seed"]): own.loss_of(record)
        for record in records
        for size in SIZES
        if (stage := f"reported_{size}") in record["stages"]
    }
    found: dict[tuple[str, str], dict[int, Outcome]] = {}
    for name in OPTIMIZERS:
        transferred = choice(records, name, BASE)
        for size in SIZES:
            chosen, here = choice(records, name, size), found.setdefault((name, size), {})
            if transferred is None or chosen is None:
                continue
            settings = [setting(name, rate(each), size) for each in (transferred, chosen)]
            for seed in SEEDS:
                if all((each, seed) in losses for each in settings):
                    here[seed] = Outcome(*(losses[each, seed] for each in settings))
    return found


def means(outcomes: Outcomes, optimizer: str) -> dict[int, tuple[float, float]]:
    """Regret and loss at the transferred rate, means over the larger sizes, of the seeds that have
    them all.
    """
    sizes = [outcomes[optimizer, size] for size in LARGER]
    return {
        seed: (
            statistics.mean(each[seed].regret for each in sizes),
            statistics.mean(each[seed].transferred for each in sizes),
        )
        for seed in SEEDS
        if all(seed in each for each in sizes)
    }


EFFECTS = ("regret", "mean at transferred rates")


def differences(outcomes: Outcomes) -> dict[str, dict[str, list[float]]]:
    """By comparison and effect, subject less baseline."""
    found = {}
    for comparison, (subject, baseline) in COMPARED.items():
        mine, theirs = means(outcomes, subject), means(outcomes, baseline)
        seeds = sorted(mine.keys() & theirs.keys())
        found[comparison] = {
            title: [mine[seed][i] - theirs[seed][i] for seed in seeds]
            for i, title in enumerate(EFFECTS)
        }
    return found


def not_interior(records: Sequence[Record]) -> list[str]:
    """The choices with a neighbour that was not tried."""
    return [
        f"{name} at {titled(size)}"
        for size, search in SEARCHES.items()
        for name in search.not_interior(records)
    ]


def against(records: Sequence[Record]) -> str:
    """What the same records hold against every verdict."""
    notes = []
    if edges := not_interior(records):
        notes.append(f"not interior: {', '.join(edges)}")
    if EXPERIMENT.missing():
        notes.append("runs are missing")
    return "; ".join(notes) or "–"


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """One row a comparison."""
    found = differences(outcomes_of(records))
    return own.verdicts(claims["W3"], found, -1, SCALE, against(records), ".4f")


def titled(size: str) -> str:
    """A size in words."""
    width, layers = SIZES[size]
    return f"width {width}, {layers} blocks"


def means_table(outcomes: Outcomes) -> str:
    """One row an optimizer: regret and loss, means over the larger sizes."""
    rows = []
    for name in OPTIMIZERS:
        seeds = means(outcomes, name)
        if seeds:
            regrets, losses = zip(*seeds.values(), strict=True)
            base = [each.transferred for each in outcomes[name, BASE].values()]
            at_base = f"{statistics.mean(base):.4f}" if base else "–"
            cells = [interval(regrets, ".4f"), f"{statistics.mean(losses):.4f}", at_base]
            rows.append([name, str(len(seeds)), *cells])
    header = ["", "seeds", "regret (95%)", "loss at transferred rates", "loss at the base"]
    return table(header, rows) if rows else "No optimizer has run at every size yet."


def sizes_table(records: Sequence[Record], outcomes: Outcomes) -> str:
    """One row an optimizer and size: both rates, and the mean losses at them."""
    rows = []
    for name in OPTIMIZERS:
        for size in SIZES:
            transferred, chosen = choice(records, name, BASE), choice(records, name, size)
            seeds = outcomes[name, size].values()
            if not seeds or transferred is None or chosen is None:
                continue
            cells = [f"{rate(transferred):g}", f"{rate(chosen):g}", str(len(seeds))]
            cells += [f"{statistics.mean(losses):.4f}" for losses in zip(*seeds, strict=True)]
            regret = interval([each.regret for each in seeds], ".4f")
            rows.append([name, titled(size), *cells, regret])
    rates = ["transferred rate", "tuned rate", "seeds"]
    header = ["", "size", *rates, "loss, transferred", "loss, tuned", "regret (95%)"]
    return table(header, rows, left=2) if rows else "No size is complete yet."


def tuning_table(records: Sequence[Record]) -> str:
    """One row an optimizer and size: the rates that were tried, bold where one was chosen."""
    rows = []
    for name in OPTIMIZERS:
        for size in SIZES:
            chosen = choice(records, name, size)
            cells = [
                f"**{rate(each):g}**: {loss:.4f}"
                if each == chosen
                else f"{rate(each):g}: {loss:.4f}"
                for each, loss in tuned_losses(records, name, size).items()
            ]
            if cells:
                rows.append([name, titled(size), ", ".join(cells)])
    return table(["", "size", "rate: loss"], rows, left=3)


def plot(records: Sequence[Record], stem: Path) -> list[Path]:
    """The last validation loss of the tuning against the rate: a panel an optimizer, a line a size,
    and the transferred rate.
    """
    figure, axes = subplots(1, len(OPTIMIZERS), figsize=(15, 3.8), sharey=True)
    for panel, name in zip(axes, OPTIMIZERS, strict=True):
        for i, size in enumerate(SIZES):
            losses = tuned_losses(records, name, size)
            shown = {each: loss for each, loss in losses.items() if loss < own.IGNORANT}
            style = nth_style(i, marker=True) | {"label": titled(size)}
            panel.plot([rate(each) for each in shown], [*shown.values()], **style)
        if (transferred := choice(records, name, BASE)) is not None:
            panel.axvline(rate(transferred), color="0.6", linewidth=3, zorder=0)
        panel.set(xscale="log", xlabel="learning rate")
        panel.set_title(name)
    axes[0].set(yscale="log", ylabel="last validation loss (nats)")
    plain_log_ticks(axes[0].yaxis)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(SIZES), frameon=False)
    return save_figure(figure, stem)


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    if not records:
        return "No run is recorded yet.\n"
    claim, outcomes = claims["W3"], outcomes_of(records)
    parts = [
        *own.opening(claim, verdicts(records, claims), EXPERIMENT.missing()),
        "## Regret of the transferred rate",
        means_table(outcomes),
        (
            "Last validation loss in nats a byte. Means over width 128, 256 and 512 and over 4 and"
            " 8 blocks; the rate was tuned at width 64 with 2 blocks (the base), on another seed."
            " Regret: the loss at that rate less the loss at the size's own tuned rate; 95%"
            " (Student's t)."
        ),
        "## Differences",
        own.differences_table(differences(outcomes), ".4f"),
        "Paired by seed, 95% (Student's t); p unadjusted.",
        "## Size by size",
        sizes_table(records, outcomes),
        "## The tuning",
        tuning_table(records),
        "Seed 100. Bold: chosen.",
        own.runs_note(records),
    ]
    return "\n\n".join(parts) + "\n"


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables, and the figure where there is a line to draw."""
    drawing = Drawing(
        partial(plot, records),
        "The last validation loss against the learning rate at every size, on the seed of the"
        " tuning. Grey: the rate that was tuned at width 64 with two blocks, and used everywhere.",
    )
    tables = {"table": lambda: markdown(records, claims)}
    return [Results(RESULTS, tables, {"rates": drawing} if records else {})]
