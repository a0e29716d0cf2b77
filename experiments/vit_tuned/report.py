"""Claims C3 and C4 with both optimizers tuned to interior settings, and capacity at equal decay and
equal train loss: as tables and figures, from the records that there are, with what is missing said.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ddc.report.claims import (
    FEW_SEEDS,
    Claim,
    Verdict,
    effect,
    not_complete,
    rule,
    tested,
    verdict,
    verdict_table,
)
from ddc.report.figures import Drawing, nth_style, plain_log_ticks, save_figure, subplots
from ddc.report.paired import (
    BASELINE,
    QUANTITY_NOTE,
    SUBJECT,
    Quantity,
    Runs,
    advantages,
    against_adamw,
    differences,
    from_summary,
    interval,
    is_enough,
    p_cell,
    quantity_table,
    seeds_cell,
    seeds_table,
)
from ddc.report.runs import TITLES
from ddc.report.stages import Record, commits, table
from ddc.report.statistics import holm, paired_p
from ddc.training.evaluate import learning_rate_factor
from ddc.training.schema import TrainingConfig
from experiments.output import Results
from experiments.vit_scratch.report import CAPACITY, HALVED, LAST_LOSS, LOSSES, SCALE, SPARE
from experiments.vit_scratch.report import exposure as exposure_note
from experiments.vit_tuned.plan import (
    DDCADAM,
    DECAYS,
    EXPERIMENT,
    FIT,
    LEVEL,
    OPTIMIZERS,
    RATE,
    RESULTS,
    SEARCH,
    SEEDS,
)

#: By claim, the figure beside the main table.
FIGURES = {"C3b": "grid", "C4b": "capacity"}
#: What chose a setting, in the words of tables.
QUESTION_TITLES = {
    "last": "last validation loss",
    "last_fit": "the same, of runs that fit",
    "best": "best validation loss",
}
#: The questions with a verdict, as the claims name them.
PROTOCOLS = {"last": "tuned", "last_fit": "tuned to fit"}
#: What is tested, by claim.
TESTS = {"C3b": (LAST_LOSS,), "C4b": (SPARE, HALVED)}
#: The protocol of C4b at equal train loss.
EQUAL_LOSS = f"equal decay {RATE * DECAYS[-1]:g}, train loss {LEVEL:g}"
#: Where capacity is measured, and after how much decay.
PLACES = (
    Quantity("step", lambda record: float(steps_of(record)), 0, ".0f"),
    Quantity("train loss there", lambda record: full_width(record, "train_loss"), 0, ".4f"),
    Quantity("validation loss there", lambda record: full_width(record, "validation_loss"), 0),
    Quantity("rate × decay, summed over the steps", lambda record: decayed(record), 0),
)
#: (runs by optimizer) of each comparison, by claim and protocol.
Compared = dict[tuple[str, str], dict[str, list[Record]]]


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def compared(records: Sequence[Record]) -> Compared:
    """The runs of each row of the claims by optimizer, in order of seeds; those that there are. A
    run's ``capacity`` is the one that the row compares, and missing where it has none.
    """
    found: Compared = {
        ("C3b", title): SEARCH.reported(records, question) for question, title in PROTOCOLS.items()
    }
    for decay in DECAYS:
        found["C4b", f"equal decay {RATE * decay:g}"] = at_equal_decay(records, decay)
    found["C4b", EQUAL_LOSS] = {
        name: [
            {key: value for key, value in run.items() if key != "capacity"}
            | ({"capacity": run["at_loss"]} if run["at_loss"]["step"] is not None else {})
            for run in runs
            if "equal_loss" in run["stages"]
        ]
        for name, runs in at_equal_decay(records, DECAYS[-1]).items()
    }
    found["C4b", PROTOCOLS["last_fit"]] = SEARCH.reported(records, "last_fit", "fitted")
    return found


def at_equal_decay(records: Sequence[Record], decay: float) -> dict[str, list[Record]]:
    """The runs at equal decay by optimizer, in order of seeds."""
    found: dict[str, list[Record]] = {name: [] for name in OPTIMIZERS}
    for run in sorted(records, key=lambda each: each["seed"]):
        optimizer = run["config"]["optimizer"]
        if "equal_decay" in run["stages"] and optimizer["weight_decay"] == decay:
            found[optimizer["name"]].append(run)
    return found


def runs_of(claim: str, found: Mapping[str, Sequence[Record]]) -> Runs:
    """Both optimizers on the seeds on which both have what a claim needs."""
    both = [
        [run for run in found.get(name, []) if claim == "C3b" or "capacity" in run]
        for name in (BASELINE, SUBJECT)
    ]
    return against_adamw(*both)


def is_complete(found: Mapping[str, Sequence[Record]]) -> bool:
    """Whether all seeds of both optimizers ran."""
    return all({run["seed"] for run in found.get(name, [])} >= {*SEEDS} for name in OPTIMIZERS)


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """Both claims by protocol, p-values adjusted over all that is tested of both."""
    rows = compared(records)
    complete = {key: runs_of(key[0], each) for key, each in rows.items() if is_complete(each)}
    tests = [(key, quantity) for key in complete for quantity in TESTS[key[0]]]
    adjusted = holm([paired_p(differences(complete[key], quantity)) for key, quantity in tests])
    p_values = dict(zip(tests, adjusted, strict=True))
    left, found = EXPERIMENT.missing(), []
    for key, runs in complete.items():
        claim, seeds = claims[key[0]], len(runs[SUBJECT])
        whole = seeds == len(SEEDS)
        ps = [p_values[key, quantity] for quantity in TESTS[claim.id]]
        shown = [
            effect(
                advantages(runs, quantity),
                p,
                claim.level,
                whole and (claim.id != "C3b" or is_enough(claim, runs, quantity)),
            )
            for quantity, p in zip(TESTS[claim.id], ps, strict=True)
        ]
        row = (", ".join(map(p_cell, ps)), seeds_cell(seeds, len(SEEDS)), tested(ps[0]), SCALE)
        notes = against(records, key, runs, left)
        found.append(Verdict(*key, ours(key[0], runs), *row, verdict(shown), notes))
    for each in ("C3b", "C4b"):
        waiting = [protocol for claim, protocol in rows.keys() - complete.keys() if claim == each]
        ordered = [protocol for protocol in claims[each].fixed if protocol in waiting]
        found += not_complete(claims[each], ordered, SCALE)
    return found


def ours(claim: str, runs: Runs) -> str:
    """What a row found, with its intervals."""
    if claim == "C3b":
        means = [mean_of(runs[name], LAST_LOSS) for name in (SUBJECT, BASELINE)]
        return f"{' against '.join(means)}: {interval(differences(runs, LAST_LOSS), '.3f')}"
    spare, half = (interval(differences(runs, each), each.form) for each in (SPARE, HALVED))
    return f"spare units {spare}; rise of the loss at half width {half}"


def mean_of(runs: Sequence[Record], quantity: Quantity) -> str:
    """The mean of a quantity over runs that have it; a dash where none has."""
    numbers = [value for run in runs if (value := quantity.of(run)) is not None]
    return f"{statistics.mean(numbers):{quantity.form}}" if numbers else "–"


def against(records: Sequence[Record], key: tuple[str, str], runs: Runs, incomplete: str) -> str:
    """What the same records hold against a verdict: runs that do not fit, train losses or decay
    that differ, edges, and a search that is not complete, by the words on what is missing.
    """
    claim, protocol = key
    notes = []
    if claim == "C3b":
        for name in (BASELINE, SUBJECT):
            unfit = sum(run["summary"]["train_loss"] > FIT for run in runs[name])
            if unfit:
                total = len(runs[name])
                notes.append(f"{unfit} of {total} runs of {TITLES[name]} end above {FIT:g}")
    elif runs[SUBJECT]:
        quantity = PLACES[3] if protocol == EQUAL_LOSS else PLACES[1]
        words = "the decay until there" if protocol == EQUAL_LOSS else "the train loss"
        means = [mean_of(runs[name], quantity) for name in (SUBJECT, BASELINE)]
        notes.append(f"{words} is {means[0]} (DDCAdam) against {means[1]} (AdamW)")
    asked = [question for question, title in PROTOCOLS.items() if title == protocol]
    if asked:
        if claim == "C4b" and runs[SUBJECT] and (note := exposure_note(runs)) != "–":
            notes.append(note)
        if edges := SEARCH.not_interior(records, asked):
            notes.append(f"not interior: {', '.join(TITLES[name] for name in edges)}")
        if any(f"{name} (" in incomplete for name in SEARCH.names):
            notes.append("the search is not complete")
    return "; ".join(notes) or "–"


def steps_of(record: Record) -> int:
    """After how many steps the capacity of a record is measured."""
    capacity = record["capacity"]
    return int(capacity.get("step", record["config"]["training"]["steps"]))


def full_width(record: Record, key: str) -> float:
    """A value of the model whose capacity is measured, before any unit goes."""
    return float(next(row[key] for row in record["capacity"]["pruning"] if row["keep"] == 1.0))


def decayed(record: Record) -> float:
    """Rate × decay, summed over the steps up to where capacity is measured: minus the logarithm of
    what decay alone leaves of a weight.
    """
    training, optimizer = (
        TrainingConfig(**record["config"]["training"]),
        record["config"]["optimizer"],
    )
    factors = sum(learning_rate_factor(training, step) for step in range(steps_of(record)))
    return float(optimizer["lr"] * optimizer["weight_decay"] * factors)


def setting_title(record: Record) -> str:
    """What the grids vary, in words."""
    optimizer = record["config"]["optimizer"]
    words = f"rate {optimizer['lr']:g}, decay {optimizer['weight_decay']:g}"
    is_ddcadam = optimizer["name"] == DDCADAM
    return f"{words}, radial {optimizer['radial_rate']:g}" if is_ddcadam else words


#: Where a run ends, in tables of settings.
ENDS = (
    Quantity("train loss, last", from_summary("train_loss"), 0, ".4f"),
    LAST_LOSS,
    Quantity("validation loss, best", from_summary("best_validation_loss"), -1),
)


def end_cells(runs: Sequence[Record]) -> list[str]:
    """Means of :data:`ENDS` over runs that did not diverge."""
    ended = [run for run in runs if not run["diverged"]]
    return [mean_of(ended, quantity) if ended else "diverged" for quantity in ENDS]


def chosen_table(records: Sequence[Record]) -> str:
    """What each question chose of each optimizer, whether it is interior, and where its runs
    end.
    """
    rows = []
    for question, title in QUESTION_TITLES.items():
        for name, runs in SEARCH.reported(records, question).items():
            count = len(SEARCH.open_at(records, name, question))
            interior = f"no, {count} sides are open" if count else "yes"
            ended = str(sum(not run["diverged"] for run in runs))
            words = [title, TITLES[name], setting_title(runs[0]), interior]
            rows.append([*words, ended, *end_cells(runs)])
    header = ["chosen by", "optimizer", "setting", "interior", "seeds", *(q.title for q in ENDS)]
    return table(header, rows, left=4) if rows else "No run of these is recorded yet."


def loss_sections(records: Sequence[Record]) -> list[str]:
    """The losses at what each question chose, where both optimizers have runs."""
    parts = []
    for question, title in QUESTION_TITLES.items():
        found = SEARCH.reported(records, question)
        runs = against_adamw(found.get(BASELINE, []), found.get(SUBJECT, []))
        if runs[SUBJECT]:
            parts += [f"### Chosen by: {title}", quantity_table(runs, LOSSES)]
    return parts or ["No pair of runs is recorded yet."]


def capacity_runs(records: Sequence[Record]) -> dict[str, Runs]:
    """The runs of each comparison of capacity that has any pair."""
    found = {
        protocol: runs_of(claim, each)
        for (claim, protocol), each in compared(records).items()
        if claim == "C4b"
    }
    return {protocol: runs for protocol, runs in found.items() if runs[SUBJECT]}


def capacity_sections(records: Sequence[Record]) -> list[str]:
    """Capacity in each comparison, and where it is measured."""
    parts = []
    for protocol, runs in capacity_runs(records).items():
        settings = "; ".join(f"{TITLES[n]}: {setting_title(each[0])}" for n, each in runs.items())
        parts += [
            f"### Capacity, {protocol}",
            f"{settings}.",
            quantity_table(runs, (*PLACES, *CAPACITY)),
        ]
    return parts or ["No pair of runs is recorded yet."]


def search_table(records: Sequence[Record]) -> str:
    """Every setting that was tried; bold what a question chose."""
    rows = []
    for name in OPTIMIZERS:
        tried = SEARCH.recorded(records, name)
        chosen = SEARCH.choices(tried)
        for point, run in sorted(tried.items()):
            asked = [each for each, where in chosen.items() if where == point]
            mark = "**" if asked else ""
            words = f"{mark}{setting_title(run)}{mark}"
            stage = str(SEARCH.stage_of(run))
            rows.append([TITLES[name], words, stage, ", ".join(asked) or "–", *end_cells([run])])
    header = ["optimizer", "setting", "stage", "chosen by", *(q.title for q in ENDS)]
    return table(header, rows, left=4) if rows else "No run of these is recorded yet."


def every_seed(records: Sequence[Record]) -> list[str]:
    """Losses of what is reported, and capacities, seed by seed."""
    reported = {
        question: against_adamw(found.get(BASELINE, []), found.get(SUBJECT, []))
        for question in QUESTION_TITLES
        for found in [SEARCH.reported(records, question)]
    }
    there = {question: runs for question, runs in reported.items() if runs[SUBJECT]}
    measured = capacity_runs(records)
    return [
        *([seeds_table(there, ENDS, setting_title)] if there else []),
        *([seeds_table(measured, (*PLACES, SPARE, HALVED), setting_title)] if measured else []),
    ]


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    mine = {name: claims[name] for name in TESTS}
    left = EXPERIMENT.missing()
    parts = [
        f"{SCALE}; otherwise as in `results/vit_scratch`, on the same seeds. A run *fits* if its"
        f" train loss at the end is at most {FIT:g}.",
        f"**Not complete.** {left}" if left else "All planned runs are recorded.",
        "## Claims C3b and C4b",
        verdict_table(mine, verdicts(records, claims)),
        *map(rule, mine.values()),
        FEW_SEEDS,
        "## What was chosen",
        chosen_table(records),
    ]
    if not records:
        return "\n\n".join(parts) + "\n"
    capacities = [
        run[key]
        for run in records
        for key in ("capacity", "at_loss")
        if "blocks" in run.get(key, {})
    ]
    hours = sum(run["seconds"] for run in records) / 3600
    spent = sum(each["capacity_seconds"] for each in capacities) / 3600
    parts += [
        "Means over seeds, of which none is the tuning's.",
        "## Losses",
        *loss_sections(records),
        "## Spare capacity",
        *capacity_sections(records),
        f"{QUANTITY_NOTE} Capacity: as in `results/vit_scratch`.",
        "## Every setting that was tried",
        search_table(records),
        "Seed 100. Bold: chosen.",
        "## Every seed",
        *every_seed(records),
        (
            f"{len(records)} runs, {sum(run['diverged'] for run in records)} diverged, {hours:.1f}"
            f" hours of one core in all, and {spent:.1f} to measure capacity. Commit of the runs"
            f" {commits(records)}, of the capacity {commits(capacities) or '–'}. Made by `make"
            " report` from `runs.jsonl` beside this file."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def plot_grid(records: Sequence[Record], stem: Path) -> list[Path]:
    """Last and best validation loss of every setting against its decay: a line a rate, a column an
    optimizer and radial rate; filled where the run fits, a star where a question chose it.
    """
    tried = {name: SEARCH.recorded(records, name) for name in OPTIMIZERS}
    columns: dict[tuple[str, float | None], list[tuple[Record, bool]]] = {}
    for name, each in tried.items():
        chosen = {*SEARCH.choices(each).values()}
        for point, run in sorted(each.items()):
            radial = run["config"]["optimizer"]["radial_rate"] if name == DDCADAM else None
            if not run["diverged"]:
                columns.setdefault((name, radial), []).append((run, point in chosen))
    shown = sorted(
        columns.items(), key=lambda item: (OPTIMIZERS.index(item[0][0]), item[0][1] or 0)
    )
    rates = sorted({run["config"]["optimizer"]["lr"] for _, each in shown for run, _ in each})
    figure, axes = subplots(
        2,
        len(shown),
        figsize=(3.4 * len(shown) + 1, 6.4),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for column, ((name, radial), runs) in zip(axes.T, shown, strict=True):
        column[0].set_title(TITLES[name] + ("" if radial is None else f", radial rate {radial:g}"))
        for panel, key in zip(column, ("validation_loss", "best_validation_loss"), strict=True):
            for i, rate in enumerate(rates):
                style = nth_style(i, marker=True) | {"markersize": 5}
                mine = [each for each in runs if each[0]["config"]["optimizer"]["lr"] == rate]
                x = [run["config"]["optimizer"]["weight_decay"] for run, _ in mine]
                y = [run["summary"][key] for run, _ in mine]
                panel.plot(x, y, **style | {"fillstyle": "none"}, label=f"rate {rate:g}")
                fits = [run["summary"]["train_loss"] <= FIT for run, _ in mine]
                stars = [is_chosen for _, is_chosen in mine]
                for marked, marker, size in ((fits, style["marker"], 5), (stars, "*", 13)):
                    there = [j for j, yes in enumerate(marked) if yes]
                    points = {"linestyle": "none", "marker": marker, "markersize": size}
                    points["color"] = style["color"]
                    panel.plot([x[j] for j in there], [y[j] for j in there], **points)
            panel.set_xscale("log")
        column[1].set_xlabel("decay")
        plain_log_ticks(column[1].xaxis)
    axes[0][0].set_ylabel("validation loss, last (nats)")
    axes[1][0].set_ylabel("validation loss, best (nats)")
    for row in axes:
        row[0].set_yscale("log")
        plain_log_ticks(row[0].yaxis)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5, frameon=False)
    return save_figure(figure, stem)


def plot_capacity(records: Sequence[Record], stem: Path) -> list[Path]:
    """Spare units, and the rise of the loss at half the width, against the train loss where they
    are measured: a panel column an equal decay, a point a run; a line joins those of one run.
    """
    figure, axes = subplots(
        2, len(DECAYS), figsize=(5 * len(DECAYS), 7), sharex=True, sharey="row", squeeze=False
    )
    found = compared(records)
    for column, decay in zip(axes.T, DECAYS, strict=True):
        protocol = f"equal decay {RATE * decay:g}"
        column[0].set_title(f"rate {RATE:g}, decay {decay:g}")
        places = [found["C4b", protocol], found["C4b", EQUAL_LOSS] if decay == DECAYS[-1] else {}]
        for i, name in enumerate(OPTIMIZERS):
            by_seed: dict[int, list[Record]] = {}
            for place in places:
                for run in place.get(name, []):
                    if "capacity" in run:
                        by_seed.setdefault(run["seed"], []).append(run)
            for panel, quantity in zip(column, (SPARE, HALVED), strict=True):
                for j, runs in enumerate(by_seed.values()):
                    label = None if j else f"{TITLES[name]} ({len(by_seed)} seeds)"
                    x = [full_width(run, "train_loss") for run in runs]
                    y = [quantity.of(run) for run in runs]
                    style = nth_style(i, marker=True) | {"linewidth": 0.8, "label": label}
                    panel.plot(x, y, **style)
        for panel in column:
            panel.set_xscale("log")
        column[1].set_xlabel("train loss where it is measured (nats)")
    axes[0][0].set_ylabel("spare units, to mean")
    axes[1][0].set_ylabel("rise of validation loss at half width (nats)")
    axes[0][-1].legend(frameon=False, fontsize="small")
    plain_log_ticks(axes[1][0].xaxis)
    return save_figure(figure, stem)


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables and figures."""
    grid = Drawing(
        partial(plot_grid, records),
        "Vision, both optimizers tuned: validation loss of every setting that was tried, on the"
        f" tuning seed. Filled: the train loss ends at {FIT:g} or below; star: chosen.",
    )
    capacity = Drawing(
        partial(plot_capacity, records),
        "Vision at equal rate and decay: spare units, and the rise of the validation loss at half"
        " the width, against the train loss where they are measured: at the end, and at the larger"
        f" decay also where the train loss first falls to {LEVEL:g}, joined by a line. A point a"
        " run.",
    )
    figures = {
        **({"grid": grid} if any(map(SEARCH.stage_of, records)) else {}),
        **({"capacity": capacity} if capacity_runs(records) else {}),
    }
    return [Results(RESULTS, {"table": partial(markdown, records, claims)}, figures)]
