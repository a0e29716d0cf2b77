"""Claim C1 far past the point of fit as tables and figures, from records alone: from those that are
there, and with what is missing said.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from ddc.report.claims import (
    Claim,
    Effect,
    Verdict,
    effect,
    not_complete,
    rule,
    tested,
    verdict,
    verdict_table,
)
from ddc.report.figures import Drawing
from ddc.report.paired import (
    Quantity,
    Runs,
    advantages,
    against_adamw,
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
from experiments import own
from experiments.output import Results
from experiments.past_fit import figures, specification
from experiments.past_fit.plan import EXPERIMENT, FAST, RATE, RESULTS, SEEDS
from experiments.past_fit.records import (
    AUTHORS_STEP,
    GAUGES_ALONE,
    LENGTH_ALONE,
    chosen_runs,
    mechanism_runs,
    median_lengths,
    without_diverged,
)
from experiments.past_fit.settings import ADAMW, AUTHOR, DDCADAM, FIT, OPTIMIZERS, SEARCH

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
#: The same as the claim names it.
PROTOCOL_NAMES = {
    "matched": "matched",
    "last": "tuned",
    "last_fit": "tuned to fit",
    "equal_loss": "tuned by gap",
    "best": "tuned by best loss",
}
#: Stages of the mechanism by rate.
MECHANISM_STAGES = {
    RATE: ("mechanism", "same_lengths"),
    FAST: ("mechanism_fast", "same_lengths_fast"),
}
#: Lengths of steps that the table of the mechanism shows.
MEASURED = (("relative", True), ("relative", False), ("angle", True), ("angle", False))
SCALE = "GPT, 0.12M parameters, 4 kB of text"


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def protocols(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """The runs of each protocol by optimizer: matched, and what each question chose."""
    variants = mechanism_runs(records, MECHANISM_STAGES[RATE])
    titles = {ADAMW: "AdamW", DDCADAM: "DDCAdam", AUTHOR: AUTHORS_STEP}
    matched = {name: variants[title] for name, title in titles.items() if title in variants}
    return {"matched": matched, **{each: chosen_runs(records, each) for each in SEARCH.questions}}


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """Both claims, each with its p-values adjusted over all its rows."""
    return [*gap_verdicts(records, claims["C1b"]), *unstopped_verdicts(records, claims["W7"])]


def unstopped_verdicts(records: Sequence[Record], claim: Claim) -> list[Verdict]:
    """Our own claim, of DDCAdam and of the author's step."""
    return own.verdicts(claim, unstopped(records), -1, SCALE, "–", ".3f")


def gap_verdicts(records: Sequence[Record], claim: Claim) -> list[Verdict]:
    """The paper's claim by protocol, of DDCAdam and of the author's step."""
    compared = {
        (protocol, name): (runs.get(ADAMW, []), runs.get(name, []))
        for protocol, runs in protocols(records).items()
        for name in (DDCADAM, AUTHOR)
    }
    pairs = {
        key: against_adamw(*both)
        for key, both in compared.items()
        if all({run["seed"] for run in each} >= {*SEEDS} for each in both)
    }
    left = EXPERIMENT.missing()
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
        theirs, mine = ([run["summary"]["gap"] for run in each] for each in runs.values())
        shown = f"{statistics.mean(mine):.2f}, AdamW {statistics.mean(theirs):.2f}" if mine else "–"
        ours = (
            f"at the end {shown}: {interval(differences(runs, GAP), '.2f')}; at train loss 0.5"
            f" {interval(differences(runs, EQUAL), '.2f')}"
        )
        found.append(
            Verdict(
                claim.id,
                PROTOCOL_NAMES[protocol] + ("" if name == DDCADAM else ", the paper's step"),
                ours,
                ", ".join(map(p_cell, ps)),
                seeds_cell(seeds, ran),
                tested(ps[0]),
                SCALE,
                verdict([ends, equal]),
                against(records, protocol, runs, left),
            )
        )
    waiting = [
        PROTOCOL_NAMES[each]
        for each in protocols(records)
        if not any(each == key for key, _ in pairs)
    ]
    return [*found, *not_complete(claim, waiting, SCALE)]


def against(records: Sequence[Record], protocol: str, runs: Runs, incomplete: str) -> str:
    """What the same records hold against a verdict: runs that do not fit, edges, and a search that
    is not complete.
    """
    notes = []
    unfit = sum(run["summary"]["train_loss"] > FIT for run in runs[DDCADAM])
    if unfit:
        notes.append(f"{unfit} of {len(runs[DDCADAM])} runs end above train loss {FIT:g}")
    if protocol in SEARCH.questions:
        edges = [TITLES[name] for name in SEARCH.not_interior(records, [protocol])]
        if edges:
            notes.append(f"not interior: {', '.join(edges)}")
        if any(f"{name} (" in incomplete for name in SEARCH.names):
            notes.append("the search is not complete")
    return "; ".join(notes) or "–"


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
    has_radial = "radial_rate" in SEARCH.axes[optimizer["name"]]
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


def number_by_seed(runs: Sequence[Record], key: str) -> dict[int, float]:
    """A number of the summary of each run that did not diverge."""
    return {run["seed"]: run["summary"][key] for run in without_diverged(runs)}


def unstopped(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Where a run that nobody stops ends, less where AdamW ends, and less AdamW stopped at its
    best: by optimizer and comparison, seed by seed.
    """
    runs = chosen_runs(records, "last")
    baselines = {
        "AdamW's last": number_by_seed(runs.get(ADAMW, []), "validation_loss"),
        "AdamW's best, stopped there": number_by_seed(
            chosen_runs(records, "best").get(ADAMW, []), "best_validation_loss"
        ),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name in (DDCADAM, AUTHOR):
        mine = number_by_seed(runs.get(name, []), "validation_loss")
        found[TITLES[name]] = {
            title: own.paired(mine, theirs) for title, theirs in baselines.items()
        }
    return found


def usefulness(records: Sequence[Record]) -> str:
    """Whether a run that nobody stops ends better than AdamW ends, and than AdamW stopped at its
    best: one row an optimizer.
    """
    runs = chosen_runs(records, "last")
    compared = unstopped(records)
    rows = []
    for name in (DDCADAM, AUTHOR):
        ends = [*number_by_seed(runs.get(name, []), "validation_loss").values()]
        effects = compared[TITLES[name]].values()
        cells = (f"{interval(each, '.3f')}, p {p_cell(paired_p(each))}" for each in effects)
        rows.append([TITLES[name], mean_cell(ends, ".3f"), *cells])
    titles = next(iter(compared.values()))
    header = ["", "last validation loss", *(f"less {each} (95%)" for each in titles)]
    return table(header, rows, left=4)


def mechanism_table(records: Sequence[Record], rate: float) -> str:
    """What carries the effect: one row a variant, with the relative length of its steps."""
    rows = []
    for title, runs in mechanism_runs(records, MECHANISM_STAGES[rate]).items():
        there = without_diverged(runs)
        ends = [
            statistics.mean(median_lengths(run, key, in_blocks)[-1] for run in there)
            for key, in_blocks in MEASURED
            if there
        ]
        rows.append([title, str(len(runs)), *cells_of(runs), *(f"{each:.4f}" for each in ends)])
    measured = [
        f"{what} of {which}" for what in ("step", "angle") for which in ("W_up, W_down", "others")
    ]
    header = ["", "seeds", *(q.title for q in QUANTITIES), *measured]
    return table(header, rows) if rows else "No run of these is recorded yet."


def carrier(records: Sequence[Record], rate: float) -> str:
    """Which of length and gauges carries the effect on the last gap, by the rule of the plan."""
    runs = mechanism_runs(records, MECHANISM_STAGES[rate])
    gaps = [
        number_by_seed(runs.get(title, []), "gap")
        for title in ("AdamW", AUTHORS_STEP, GAUGES_ALONE, LENGTH_ALONE)
    ]
    seeds = set.intersection(*({*each} for each in gaps))
    if not seeds:
        return f"Rate {rate:g}: runs are missing, or diverged."
    adamw, author, gauges, length = (statistics.mean(each[s] for s in seeds) for each in gaps)
    by_length = abs(length - author) < abs(length - adamw)
    not_by_gauges = abs(gauges - adamw) < abs(gauges - author)
    words = {(True, True): "length carries the effect", (False, False): "gauges carry the effect"}
    carried = words.get((by_length, not_by_gauges), "both have a part in the effect")
    return (
        f"Rate {rate:g}, {len(seeds)} of {len(SEEDS)} seeds: {carried} (last gap: AdamW"
        f" {adamw:.2f}, the paper's step {author:.2f}, its lengths without gauges {length:.2f}, its"
        f" gauges at AdamW's length {gauges:.2f})."
    )


def mechanism_section(records: Sequence[Record], rate: float) -> tuple[str, str, str]:
    """Heading, verdict and table of the mechanism at a rate."""
    return f"### Rate {rate:g}", carrier(records, rate), mechanism_table(records, rate)


def grid_table(records: Sequence[Record]) -> str:
    """One row a setting that was tried; bold where a question chose it."""
    rows = []
    for name in OPTIMIZERS:
        cells = SEARCH.recorded(records, name)
        chosen = SEARCH.choices(cells) if cells else {}
        for point, run in sorted(cells.items()):
            asked = [each for each, where in chosen.items() if where == point]
            stage = str(SEARCH.stage_of(run))
            mark = "**" if asked else ""
            words = f"{mark}{setting_title(run)}{mark}"
            rows.append([TITLES[name], words, stage, ", ".join(asked) or "–", *cells_of([run])])
    header = ["optimizer", "setting", "stage", "chosen by", *(q.title for q in QUANTITIES)]
    return table(header, rows, left=4)


def edges(records: Sequence[Record]) -> str:
    """Which chosen settings are interior, in words."""
    parts = []
    for name in OPTIMIZERS:
        cells = SEARCH.recorded(records, name)
        if not cells:
            continue
        for question in SEARCH.questions:
            if question not in SEARCH.choices(cells):
                parts.append(f"- {TITLES[name]}, {question}: no setting qualifies.")
            elif open_at := SEARCH.open_at(records, name, question):
                parts.append(
                    f"- {TITLES[name]}, {question}: not interior, {len(open_at)} sides are open."
                )
    counts = ", ".join(f"{TITLES[n]} {len(SEARCH.recorded(records, n))}" for n in OPTIMIZERS)
    text = "\n".join(parts) or "Every chosen setting is interior."
    return f"Settings tried: {counts}.\n\n{text}"


def seeds_rows(records: Sequence[Record]) -> str:
    """Every seed of what is reported and of the mechanism."""
    rows: list[list[str]] = []

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


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    if not records:
        return "No run is recorded yet.\n"
    claim, useful = claims["C1b"], claims["W7"]
    config = records[0]["config"]
    model, data, training = config["model"], config["data"], config["training"]
    hours = sum(record["seconds"] for record in records) / 3600
    diverged = sum(record["diverged"] for record in records)
    left = EXPERIMENT.missing()
    parts = [
        (
            f"GPT with {model['layers']} layers, width {model['width']}, hidden"
            f" {model['hidden']}, context {model['context']}; the first {data['train_tokens']:,}"
            f" bytes of Shakespeare, batch {training['batch_size']} × {model['context']},"
            f" {training['steps']:,} steps, constant rate after warm-up. Losses in nats a byte;"
            " regret is the last less the best validation loss."
        ),
        f"**Not complete.** {left}" if left else "All planned runs are recorded.",
        "## Claim C1 where AdamW's gap is the paper's",
        verdict_table({claim.id: claim}, gap_verdicts(records, claim)),
        rule(claim),
        "## Where the runs end",
        ends_table(records),
        "Means over seeds; in brackets how many seeds have the number, where not all have.",
        "## Differences from AdamW",
        differences_table(records),
        "Paired by seed, 95% (Student's t); p unadjusted.",
        "## Claim W7",
        verdict_table({useful.id: useful}, unstopped_verdicts(records, useful)),
        rule(useful),
        "## Is it useful?",
        usefulness(records),
        (
            "Each at the setting that the last validation loss chose; AdamW stopped is at the"
            " setting that the best validation loss chose, at its best evaluation."
        ),
        "## The mechanism",
        *(text for rate in (RATE, FAST) for text in mechanism_section(records, rate)),
        (
            "Decay 0.1. *Step* (its length over the matrix's) and *angle* (radians), of the"
            " step before the last evaluation: median over the matrices under the block rescale"
            " (W_up and W_down), and over the others; mean over seeds."
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
        name: [run for each in SEARCH.questions for run in chosen_runs(records, each).get(name, [])]
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
            "Far past the point of fit: relative length of the steps, of the matrices under the"
            " block rescale and of the others, and losses along training, decay 0.1. The paper's"
            " step, its gauges at AdamW's length of step, and AdamW at the length of the paper's"
            " steps without a gauge."
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
        "frontier": any(map(SEARCH.stage_of, records)),
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
