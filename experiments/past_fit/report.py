"""Claim C1 far past the point of fit as tables and figures, from records alone: from those that are
there, and with what is missing said.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from ddc.report.claims import Claim, Effect, Verdict, effect, rule, tested, verdict, verdict_table
from ddc.report.figures import Drawing
from ddc.report.paired import (
    Quantity,
    Runs,
    advantages,
    differences,
    from_summary,
    gap_at,
    interval,
    is_enough,
    mean_cell,
    p_cell,
    seeds_cell,
)
from ddc.report.runs import TITLES
from ddc.report.stages import Record, commits, table
from ddc.report.statistics import TESTED_FROM, holm, paired_p
from experiments.output import Results
from experiments.past_fit import figures, specification
from experiments.past_fit.plan import EXPERIMENT, FAST, RATE, RESULTS
from experiments.past_fit.records import (
    ADAMW,
    AUTHOR,
    AUTHORS_STEP,
    DDCADAM,
    GAUGES_ALONE,
    LENGTH_ALONE,
    OPTIMIZERS,
    chosen_runs,
    mechanism_runs,
    median_lengths,
    searched,
    tried,
    without_diverged,
)
from experiments.past_fit.settings import AXES, FIT, QUESTIONS, Point, choices, untried

TRAIN = Quantity("train loss, last", from_summary("train_loss"), 0)
LAST = Quantity("validation loss, last", from_summary("validation_loss"), -1)
BEST = Quantity("validation loss, best", from_summary("best_validation_loss"), -1)
#: What not stopping early costs: the last less the best validation loss.
REGRET = Quantity(
    "regret",
    lambda record: record["summary"]["validation_loss"] - record["summary"]["best_validation_loss"],
    -1,
)
GAP = Quantity("gap, last", from_summary("gap"), -1)
EQUAL = Quantity("gap at train loss 0.5", gap_at(str(FIT)), -1)
QUANTITIES = (TRAIN, LAST, BEST, REGRET, GAP, EQUAL)
#: What chose a setting, in the words of tables.
PROTOCOL_TITLES = {
    "matched": "matched",
    "last": "last validation loss",
    "last_fit": "the same, of runs that fit",
    "equal_loss": "gap at train loss 0.5",
    "best": "best validation loss",
}
#: Stages of the mechanism by rate.
MECHANISM_STAGES = {
    RATE: ("mechanism", "same_lengths"),
    FAST: ("mechanism_fast", "same_lengths_fast"),
}
SCALE = "GPT, 0.12M parameters, 4 kB of text"


def load() -> list[Record]:
    """The committed records, complete or not.

    Raises:
        ValueError: there are none.
    """
    if not EXPERIMENT.records:
        raise ValueError(f"{RESULTS / 'runs.jsonl'} has no records: run and collect them first")
    return EXPERIMENT.records


def missing(records: Sequence[Record]) -> list[tuple[str, int, int | None]]:
    """Stages that are not complete: name, recorded runs, planned runs (None: not planned yet)."""
    found = []
    for stage in EXPERIMENT.stages:
        there = {(r["stages"][stage], r["seed"]) for r in records if stage in r["stages"]}
        try:
            planned = EXPERIMENT.plan(stage, None)
        except ValueError:  # follows from runs that are missing
            found.append((stage, len(there), None))
            continue
        if left := [each for each in planned if each not in there]:
            found.append((stage, len(planned) - len(left), len(planned)))
    return found


def against_adamw(baseline: Sequence[Record], subject: Sequence[Record]) -> Runs:
    """Both on the seeds on which both ran and neither diverged, as :mod:`ddc.report.paired` has
    them.
    """
    ended = [{run["seed"]: run for run in without_diverged(each)} for each in (baseline, subject)]
    seeds = sorted(ended[0].keys() & ended[1].keys())
    return dict(zip((ADAMW, DDCADAM), ([each[s] for s in seeds] for each in ended), strict=True))


def protocols(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """The runs of each protocol by optimizer: matched, and what each question chose."""
    variants = mechanism_runs(records, MECHANISM_STAGES[RATE])
    titles = {ADAMW: "AdamW", DDCADAM: "DDCAdam", AUTHOR: AUTHORS_STEP}
    matched = {name: variants[title] for name, title in titles.items() if title in variants}
    return {"matched": matched, **{each: chosen_runs(records, each) for each in QUESTIONS}}


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """The claim by protocol, of DDCAdam and of the author's step; p-values adjusted over all."""
    claim = claims["C1b"]
    compared = {
        (protocol, name): (runs.get(ADAMW, []), runs.get(name, []))
        for protocol, runs in protocols(records).items()
        for name in (DDCADAM, AUTHOR)
    }
    pairs = {key: against_adamw(*both) for key, both in compared.items()}
    left = [stage for stage, *_ in missing(records)]
    tests = [(key, quantity) for key in pairs for quantity in (GAP, EQUAL)]
    adjusted = holm([paired_p(differences(pairs[key], quantity)) for key, quantity in tests])
    p_values = dict(zip(tests, adjusted, strict=True))
    found = []
    for (protocol, name), runs in pairs.items():
        key = (protocol, name)
        ps = [p_values[key, quantity] for quantity in (GAP, EQUAL)]
        seeds, ran = len(runs[ADAMW]), len({r["seed"] for r in compared[key][1]})
        ends = effect(advantages(runs, GAP), ps[0], claim.level, is_enough(claim, runs, GAP))
        equal = effect(advantages(runs, EQUAL), ps[1], claim.level)
        if ps[1] is None:  # fewer than five seeds get there: nothing is shown
            equal = Effect(0, enough=False)
        if seeds < TESTED_FROM:
            ends = Effect(None, enough=False)
        at_end = [statistics.mean(map(GAP.of, each)) if each else None for each in runs.values()]
        shown = "–" if None in at_end else f"{at_end[1]:.2f} against {at_end[0]:.2f}"
        ours = (
            f"at the end {shown}, {interval(differences(runs, GAP), '.2f')}; at train loss 0.5"
            f" {interval(differences(runs, EQUAL), '.2f')}"
        )
        found.append(
            Verdict(
                claim.id,
                protocol if name == DDCADAM else f"{protocol}, the paper's step",
                ours,
                ", ".join(map(p_cell, ps)),
                seeds_cell(seeds, ran),
                tested(ps[0]),
                SCALE,
                verdict([ends, equal]),
                against(records, protocol, runs, left),
            )
        )
    return found


def against(records: Sequence[Record], protocol: str, runs: Runs, incomplete: Sequence[str]) -> str:
    """What the same records hold against a verdict: runs that do not fit, edges, and a search that
    is not complete.
    """
    notes = []
    unfit = sum(TRAIN.of(run) > 0.5 for run in runs[DDCADAM])
    if unfit:
        notes.append(f"{unfit} of {len(runs[DDCADAM])} runs end above train loss 0.5")
    if protocol in QUESTIONS:
        edges = [
            TITLES[name]
            for name in OPTIMIZERS
            if protocol in choices(tried(records, name)) and open_sides(records, name, protocol)
        ]
        if edges:
            notes.append(f"not interior: {', '.join(edges)}")
        if any(stage.startswith(("grid", "widen")) for stage in incomplete):
            notes.append("the search is not complete")
    return "; ".join(notes) or "–"


def open_sides(records: Sequence[Record], name: str, question: str) -> list[Point]:
    """Neighbours of the chosen point that were not tried, or that the lattice does not have."""
    cells = tried(records, name)
    point = choices(cells)[question]
    axes = list(AXES[name].values())
    ends = [
        point
        for i, axis in zip(point, axes, strict=True)
        if (i == 0 and axis[0] != 0) or i == len(axis) - 1
    ]
    return [*untried(name, [point], cells), *ends]


def cells_of(runs: Sequence[Record], quantities: Sequence[Quantity] = QUANTITIES) -> list[str]:
    """Means of quantities over the runs that have them; of how many, where not of all."""
    columns = []
    for quantity in quantities:
        values = [quantity.of(run) for run in without_diverged(runs)]
        numbers = [value for value in values if value is not None]
        nothing = "never" if values else "diverged"
        cell = f"{statistics.mean(numbers):.3f}" if numbers else nothing
        columns.append(cell if len(numbers) in (0, len(runs)) else f"{cell} ({len(numbers)})")
    return columns


def setting_title(record: Record) -> str:
    """What the grids vary, in words."""
    optimizer = record["config"]["optimizer"]
    words = f"rate {optimizer['lr']:g}, decay {optimizer['weight_decay']:g}"
    has_radial = "radial_rate" in AXES[optimizer["name"]]
    return f"{words}, radial {optimizer['radial_rate']:g}" if has_radial else words


def ends_table(records: Sequence[Record]) -> str:
    """Where the runs end: one row a protocol and optimizer."""
    rows = []
    for protocol, optimizers in protocols(records).items():
        for name, runs in optimizers.items():
            if runs:
                words = [PROTOCOL_TITLES[protocol], TITLES[name], setting_title(runs[0])]
                rows.append([*words, str(len(runs)), *cells_of(runs)])
    header = ["chosen by", "optimizer", "setting", "seeds", *(q.title for q in QUANTITIES)]
    return table(header, rows, left=3) if rows else "No run of these is recorded yet."


def differences_table(records: Sequence[Record]) -> str:
    """Paired differences from AdamW: one row a protocol and optimizer."""
    rows = []
    shown = (LAST, BEST, REGRET, GAP, EQUAL)
    for protocol, optimizers in protocols(records).items():
        for name in (DDCADAM, AUTHOR):
            runs = against_adamw(optimizers.get(ADAMW, []), optimizers.get(name, []))
            if runs[ADAMW]:
                cells = []
                for quantity in shown:
                    found = differences(runs, quantity)
                    cells.append(f"{interval(found, '.3f')}, p {p_cell(paired_p(found))}")
                rows.append([PROTOCOL_TITLES[protocol], TITLES[name], *cells])
    header = ["chosen by", "optimizer - AdamW", *(quantity.title for quantity in shown)]
    return table(header, rows, left=len(header)) if rows else "No pair of runs is recorded yet."


def usefulness(records: Sequence[Record]) -> str:
    """Whether a run that nobody stops ends better than AdamW ends, and than AdamW stopped at its
    best: one row an optimizer.
    """
    unstopped = chosen_runs(records, "last")
    ends, stopped = unstopped.get(ADAMW, []), chosen_runs(records, "best").get(ADAMW, [])
    rows = []
    for name in (DDCADAM, AUTHOR):
        mine = {run["seed"]: LAST.of(run) for run in without_diverged(unstopped.get(name, []))}
        cells = []
        for others, quantity in ((ends, LAST), (stopped, BEST)):
            theirs = {run["seed"]: quantity.of(run) for run in without_diverged(others)}
            found = [mine[s] - theirs[s] for s in sorted(mine.keys() & theirs.keys())]
            cells.append(f"{interval(found, '.3f')}, p {p_cell(paired_p(found))}")
        rows.append([TITLES[name], mean_cell(list(mine.values()), ".3f"), *cells])
    header = [
        "",
        "last validation loss",
        "less AdamW's last (95%)",
        "less AdamW's best, stopped there (95%)",
    ]
    return table(header, rows, left=4)


def mechanism_table(records: Sequence[Record], rate: float) -> str:
    """What carries the effect: one row a variant, with the relative length of its steps."""
    rows = []
    for title, runs in mechanism_runs(records, MECHANISM_STAGES[rate]).items():
        there = without_diverged(runs)
        steps, turns = (
            [median_lengths(run, key)[-1] for run in there] for key in ("relative", "angle")
        )
        rows.append(
            [title, str(len(runs)), *cells_of(runs)]
            + [f"{statistics.mean(each):.4f}" if each else "–" for each in (steps, turns)]
        )
    header = ["", "seeds", *(q.title for q in QUANTITIES), "relative step", "angle"]
    return table(header, rows) if rows else "No run of these is recorded yet."


def carrier(records: Sequence[Record], rate: float) -> str:
    """Which of length and gauges carries the effect on the last gap, by the rule of the plan."""
    runs = mechanism_runs(records, MECHANISM_STAGES[rate])
    compared = [
        without_diverged(runs.get(title, []))
        for title in ("AdamW", AUTHORS_STEP, GAUGES_ALONE, LENGTH_ALONE)
    ]
    if not all(compared):
        return f"Rate {rate:g}: runs are missing, or all of them diverged."
    adamw, author, gauges, length = (
        statistics.mean(run["summary"]["gap"] for run in each) for each in compared
    )
    by_length = abs(length - author) < abs(length - adamw)
    not_by_gauges = abs(gauges - adamw) < abs(gauges - author)
    words = {(True, True): "length carries the effect", (False, False): "gauges carry the effect"}
    carried = words.get((by_length, not_by_gauges), "both have a part in the effect")
    return (
        f"Rate {rate:g}: {carried} (last gap: AdamW {adamw:.2f}, the paper's step {author:.2f}, its"
        f" lengths without gauges {length:.2f}, its gauges at AdamW's length {gauges:.2f})."
    )


def mechanism_section(records: Sequence[Record], rate: float) -> tuple[str, str, str]:
    """Heading, verdict and table of the mechanism at a rate."""
    return f"### Rate {rate:g}", carrier(records, rate), mechanism_table(records, rate)


def grid_table(records: Sequence[Record]) -> str:
    """One row a setting that was tried; bold where a question chose it."""
    rows = []
    for name in OPTIMIZERS:
        cells = tried(records, name)
        chosen = choices(cells) if cells else {}
        for point, run in sorted(cells.items()):
            asked = [each for each, where in chosen.items() if where == point]
            stage = str(searched(run))
            mark = "**" if asked else ""
            words = f"{mark}{setting_title(run)}{mark}"
            rows.append([TITLES[name], words, stage, ", ".join(asked) or "–", *cells_of([run])])
    header = ["optimizer", "setting", "stage", "chosen by", *(q.title for q in QUANTITIES)]
    return table(header, rows, left=4)


def edges(records: Sequence[Record]) -> str:
    """Which chosen settings are interior, in words."""
    parts = []
    for name in OPTIMIZERS:
        cells = tried(records, name)
        if not cells:
            continue
        for question in QUESTIONS:
            if question not in choices(cells):
                parts.append(f"- {TITLES[name]}, {question}: no setting qualifies.")
            elif open_sides(records, name, question):
                count = len(open_sides(records, name, question))
                parts.append(f"- {TITLES[name]}, {question}: not interior, {count} sides are open.")
    counts = ", ".join(f"{TITLES[n]} {len(tried(records, n))}" for n in OPTIMIZERS)
    text = "\n".join(parts) or "Every chosen setting is interior."
    return f"Settings tried: {counts}.\n\n{text}"


def seeds_rows(records: Sequence[Record]) -> str:
    """Every seed of what is reported and of the mechanism."""
    rows = []

    def add(label: str, title: str, runs: Sequence[Record]) -> None:
        rows.extend([label, title, str(run["seed"]), *cells_of([run])] for run in runs)

    for protocol, optimizers in protocols(records).items():
        if protocol != "matched":
            for name, runs in optimizers.items():
                add(protocol, TITLES[name], runs)
    for rate in (RATE, FAST):
        for title, runs in mechanism_runs(records, MECHANISM_STAGES[rate]).items():
            add(f"rate {rate:g}", title, runs)
    header = ["", "optimizer", "seed", *(quantity.title for quantity in QUANTITIES)]
    return table(header, rows, left=3)


def progress(records: Sequence[Record]) -> str:
    """What is missing, in words; or that nothing is."""
    left = missing(records)
    if not left:
        return "All planned runs are recorded."
    words = [
        f"{stage} ({there} of {'a number not known yet' if planned is None else planned})"
        for stage, there, planned in left
    ]
    return f"**Not complete.** Stages with missing runs: {', '.join(words)}."


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    claim = claims["C1b"]
    config = records[0]["config"]
    model, data, training = config["model"], config["data"], config["training"]
    hours = sum(record["seconds"] for record in records) / 3600
    diverged = sum(record["diverged"] for record in records)
    parts = [
        (
            f"GPT with {model['layers']} layers, width {model['width']}, hidden"
            f" {model['hidden']}, context {model['context']}; the first {data['train_tokens']:,}"
            f" bytes of Shakespeare, batch {training['batch_size']} × {model['context']},"
            f" {training['steps']:,} steps, constant rate after warm-up. Losses in nats a byte;"
            " regret is the last less the best validation loss."
        ),
        progress(records),
        "## Claim C1 where AdamW's gap is the paper's",
        verdict_table({claim.id: claim}, verdicts(records, claims)),
        rule(claim),
        "## Where the runs end",
        ends_table(records),
        "Means over seeds; in brackets how many seeds have the number, where not all have.",
        "## Differences from AdamW",
        differences_table(records),
        "Paired by seed, 95% (Student's t); p unadjusted.",
        "## Is it useful?",
        usefulness(records),
        (
            "Each at the setting that the last validation loss chose; AdamW stopped is at the"
            " setting that the best validation loss chose, at its best evaluation."
        ),
        "## The mechanism",
        *(text for rate in (RATE, FAST) for text in mechanism_section(records, rate)),
        (
            "Decay 0.1. *Relative step* and *angle* (radians): of the last step before the last"
            " evaluation, median over matrices, mean over seeds."
        ),
        "## Readings of the abstract",
        specification.summary(records),
        "## Every setting that was tried",
        edges(records),
        grid_table(records),
        "Seed 100. Bold: chosen.",
        "## Every seed",
        seeds_rows(records),
        (
            f"{len(records)} runs, {diverged} diverged, {hours:.1f} hours of one core in all."
            f" Commit {commits(records)}. Made by `make report` from `runs.jsonl` beside this file."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def drawings(records: Sequence[Record]) -> dict[str, Drawing]:
    """All figures, by name."""
    curves = {
        PROTOCOL_TITLES[protocol]: runs for protocol, runs in protocols(records).items() if runs
    }
    rates = {
        f"rate {rate:g}": runs
        for rate, stages in MECHANISM_STAGES.items()
        if (runs := mechanism_runs(records, stages))
    }
    chosen = {
        name: [run for each in QUESTIONS for run in chosen_runs(records, each).get(name, [])]
        for name in OPTIMIZERS
    }
    found = {
        "losses": Drawing(
            partial(figures.plot_curves, curves),
            "Far past the point of fit: losses and gap along training, and the gap against the"
            " train loss, where on one vertical the train loss is equal. A row for what chose the"
            " settings, a line a seed.",
        ),
        "mechanism": Drawing(
            partial(figures.plot_mechanism, rates),
            "Far past the point of fit: relative length and angle of the steps (median of the"
            " matrices) and losses along training, decay 0.1. The paper's step, its gauges at"
            " AdamW's length of step, and AdamW at the length of the paper's steps without a gauge."
            " A line a seed.",
        ),
        "frontier": Drawing(
            partial(figures.plot_frontier, records, chosen),
            "Far past the point of fit: where each setting that was tried ends (seed 100), and the"
            " chosen ones on their own seeds.",
        ),
        "specification": Drawing(
            partial(figures.plot_specification, records),
            "Far past the point of fit: all readings of the abstract by difference in gap, coloured"
            " by the train loss. Below, the choices that each is made of.",
        ),
    }
    there = {
        "losses": curves,
        "mechanism": rates,
        "frontier": any(map(searched, records)),
        "specification": any(True for _ in specification.readings(records)),
    }
    return {name: drawing for name, drawing in found.items() if there[name]}


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables and figures."""
    tables = {
        "table": lambda: markdown(records, claims),
        "specification": lambda: specification.markdown(records),
    }
    return [Results(RESULTS, tables, drawings(records))]
