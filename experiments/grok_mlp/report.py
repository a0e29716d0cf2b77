"""Claim C5 as a table and two figures, from its records alone.

A record has the ``stages`` that it belongs to, each with the overrides of its setting, the
``config``, the ``curve`` (evaluations as columns) and whether it ``diverged``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ddc.report.claims import Claim, Effect, Verdict, rule, verdict, verdict_table
from ddc.report.figures import COLOURS, MARKERS, Drawing, save_figure, subplots
from ddc.report.runs import TITLES
from ddc.report.stages import PROTOCOLS, Record, commits, is_shared, of_stage, only_setting, table
from ddc.report.statistics import (
    fisher_p,
    holm,
    mean_interval,
    share_difference_interval,
    share_interval,
)
from experiments.grok_mlp.plan import EXPERIMENT, GROKS, best_accuracy, grokked, step_of
from experiments.output import Results

#: By claim, the figure beside the main table.
FIGURES = {"C5": "accuracy"}
LEVELS = (0.75, GROKS, 0.99)
#: A run fits if its last training accuracy is at least this.
FITS = 0.99
SUBJECT = "ddcmuon"


def load() -> list[Record]:
    """The committed records.

    Raises:
        ValueError: they are not complete.
    """
    return EXPERIMENT.committed()


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables and figures."""
    tables = {"table": partial(markdown, records, claims)}
    return [Results(EXPERIMENT.results, tables, drawings(records))]


def setting_title(record: Record) -> str:
    """Rates, decay and schedule."""
    optimizer, training = record["config"]["optimizer"], record["config"]["training"]
    schedule = {"wsd": "linear fall", "cosine": "cosine"}[training["schedule"]]
    rates = " / ".join(f"{optimizer[key]:g}" for key in ("lr", "adam_lr") if key in optimizer)
    return f"{rates}, {optimizer['weight_decay']:g}, {schedule}"


def setting_words(record: Record) -> str:
    """The same with the names of the numbers."""
    rates, decay, schedule = setting_title(record).split(", ")
    return f"{'rates' if '/' in rates else 'rate'} {rates}, decay {decay}, {schedule}"


def fit_step(record: Record) -> int | None:
    """The first evaluation with a training accuracy of at least :data:`FITS`."""
    curve = record["curve"]
    pairs = zip(curve["step"], curve["train_accuracy"], strict=True)
    return next((step for step, accuracy in pairs if accuracy >= FITS), None)


def median(values: Iterable[float | None]) -> str:
    """The median of the values that there are."""
    there = [value for value in values if value is not None]
    return f"{statistics.median(there):g}" if there else "–"


def delay(record: Record) -> int | None:
    """Steps from fitting to grokking, of a run that does both; negative where it generalises
    first.
    """
    fits, groks = fit_step(record), step_of(record)
    return None if fits is None or groks is None else groks - fits


def last(record: Record, key: str) -> float:
    """The last value of a curve; 0 for a run that diverged before it was evaluated."""
    return float([0.0, *record["curve"][key]][-1])


def fitted(records: Sequence[Record]) -> str:
    """How many of how many end with all training answers right but for one in a hundred."""
    return f"{sum(last(record, 'train_accuracy') >= FITS for record in records)} of {len(records)}"


def share(records: Sequence[Record], level: float = GROKS) -> str:
    """How many of how many reach an accuracy."""
    return f"{grokked(records, level)} of {len(records)}"


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables: protocols, tuning, ablations, depth."""
    config = records[0]["config"]
    data, model, training = config["data"], config["model"], config["training"]
    hours = sum(record["seconds"] for record in records) / 3600
    same = [TITLES[name] for name in TITLES if is_shared(records, name)]
    parts = [
        (
            f"{data['operation'].capitalize()} modulo {data['prime']}, {data['train_fraction']:g}"
            " of the questions for training; ReLU network without biases or norms, width"
            f" {model['width']}, depth {model['depth']} where nothing else is said; batch"
            f" {training['batch_size']}, {training['steps']} steps. A run *groks* if its validation"
            f" accuracy is at least {GROKS} at some evaluation; it *fits* if its last training"
            f" accuracy is at least {FITS}. Rates of the Muons: of hidden matrices / of all else."
        ),
        "## Claim C5",
        verdict_table(claims, verdicts(records, claims)),
        rule(claims["C5"]),
        "## Protocols",
        protocol_table(records),
        "*Fits at* and *groks at*: median step of the runs that do; *delay*: median of the steps"
        " from fitting to grokking, negative where a run generalises first. Intervals are"
        " nominally 95%: Clopper and Pearson's for shares, bias-corrected bootstrap for means (at"
        " eleven seeds it covers about 90%, less where seeds fall in two groups). p: Fisher's"
        f" exact test of *groks* against {TITLES[SUBJECT]} of the same protocol, adjusted by Holm's"
        " method for all comparisons in the table. s: median seconds of a run, two at a time on"
        " two cores."
        + (
            f" The tuned setting of {' and '.join(same)} is the matched one: the same runs."
            if same
            else ""
        ),
        "## Tuning",
        tuning_table(records),
        (
            "Best validation accuracy on each seed. All settings ran on the first seed, the best"
            " two of each optimizer on two more; the chosen one is bold. Among settings that never"
            " leave chance the order is noise. Task, size, the range of the grid and the matched"
            " rates were chosen in unrecorded pilot runs, in which DDCMuon should grok within the"
            " budget; some of DDCMuon's own design was as well, on the first of these seeds."
        ),
        "## Ablations of DDCMuon's matched setting",
        ablation_table(records),
        "## Depth, tuned settings",
        depth_table(records),
        (
            f"{len(records)} runs, {hours:.1f} hours of one core in all. Commit {commits(records)}."
            " Made by `make report` from `runs.jsonl` beside this file."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def protocol_groups(records: Sequence[Record]) -> list[tuple[str, str, list[Record]]]:
    """(protocol, optimizer, runs) of all rows of the main table."""
    return [
        (protocol, name, only_setting(settings))
        for protocol in PROTOCOLS
        for name, settings in of_stage(records, protocol).items()
    ]


def protocol_p_values(
    groups: Sequence[tuple[str, str, list[Record]]],
) -> dict[tuple[str, str], float]:
    """Fisher's p of each optimizer against the subject in its protocol, adjusted for all
    comparisons.
    """
    subject = {protocol: runs for protocol, name, runs in groups if name == SUBJECT}
    compared = [(protocol, name, runs) for protocol, name, runs in groups if name != SUBJECT]
    raw = [
        fisher_p((grokked(subject[protocol]), grokked(runs)), (len(subject[protocol]), len(runs)))
        for protocol, _, runs in compared
    ]
    adjusted = [p for p in holm(raw) if p is not None]  # counts are tested at any number of seeds
    return {(protocol, name): p for (protocol, name, _), p in zip(compared, adjusted, strict=True)}


def protocol_table(records: Sequence[Record]) -> str:
    """One row a protocol and optimizer."""
    groups = protocol_groups(records)
    p_values = protocol_p_values(groups)
    others = [level for level in LEVELS if level != GROKS]
    header = [
        "protocol",
        "optimizer",
        "rates, decay, schedule",
        "fits",
        "fits at",
        "groks",
        "interval",
    ]
    header += [
        *(f"≥ {x:g}" for x in others),
        "groks at",
        "delay",
        "final accuracy",
        "interval",
        "diverged",
        "p",
        "s",
    ]
    rows = []
    for protocol, name, runs in groups:
        final = [last(record, "validation_accuracy") for record in runs]
        low, high = mean_interval(final)
        p = p_values.get((protocol, name))
        rows.append(
            [
                protocol,
                TITLES[name],
                setting_title(runs[0]),
                fitted(runs),
                median(map(fit_step, runs)),
                share(runs),
                "{:.0%} to {:.0%}".format(*share_interval(grokked(runs), len(runs))),
                *(share(runs, level) for level in others),
                median(map(step_of, runs)),
                median(map(delay, runs)),
                f"{statistics.mean(final):.3f}",
                f"{low:.3f} to {high:.3f}",
                str(sum(record["diverged"] for record in runs)),
                "–" if p is None else f"{p:.2g}",
                f"{statistics.median(record['seconds'] for record in runs):.0f}",
            ]
        )
    return table(header, rows, left=3)


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """Claim C5 by protocol: seeds that grok, with the difference of the shares, Newcombe's interval
    and Fisher's p.
    """
    claim, groups = claims["C5"], protocol_groups(records)
    p_values = protocol_p_values(groups)
    runs = {(protocol, name): each for protocol, name, each in groups}
    found = []
    for protocol in PROTOCOLS:
        ours, plain = runs[protocol, SUBJECT], runs[protocol, "muon"]
        counts, p = (grokked(ours), grokked(plain)), p_values[protocol, "muon"]
        low, high = share_difference_interval(counts, (len(ours), len(plain)))
        a, b = counts[0] / len(ours), counts[1] / len(plain)
        shown = 0 if p >= claim.level or a == b else 1 if a > b else -1
        found.append(
            Verdict(
                claim.id,
                protocol,
                f"{share(ours)} against {share(plain)}: {a - b:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{p:.2g}",
                str(len(ours)),
                "yes",
                "ReLU network, depth 24, width 96, addition modulo 53",
                verdict([Effect(shown, enough=a >= claim.enough and 1 - b >= claim.enough)]),
                cut_off(records, protocol),
            )
        )
    return found


def cut_off(records: Sequence[Record], protocol: str) -> str:
    """What keeps plain Muon from a fair trial: rates that were never its own, or a choice at the
    corner of its grid.
    """
    runs = only_setting(of_stage(records, protocol)["muon"])
    if protocol == "matched":
        return f"the rates are DDCMuon's choice: Muon fits on {fitted(runs)}"
    tried = [
        run["config"]["optimizer"]
        for each in of_stage(records, "tuning").get("muon", {}).values()
        for run in each
    ]
    if not tried:
        return "–"
    chosen = runs[0]["config"]["optimizer"]
    at_end = [
        key
        for key in ("lr", "adam_lr", "weight_decay")
        if chosen[key] == max(each[key] for each in tried)
    ]
    place = "the corner" if len(at_end) == 3 else "the edge" if at_end else "the inside"
    left = [best_accuracy(run) for run in runs if step_of(run) is None]
    end = f"; the budget ends at accuracies up to {max(left):.2f}, not grokked" if left else ""
    wider = "; C5b has a wider one" if at_end else ""
    return f"Muon's setting is at {place} of its grid{end}{wider}"


def tuning_table(records: Sequence[Record]) -> str:
    """One row a setting, the chosen one in bold."""
    rows = []
    finals, chosen = of_stage(records, "finals"), of_stage(records, "tuned")
    for name, settings in of_stage(records, "tuning").items():
        for overrides, first in settings.items():
            runs = first + finals[name].get(overrides, [])
            mark = "**" if overrides in chosen[name] else ""
            accuracies = ", ".join(
                f"{best_accuracy(run):.3f}" + " (diverged)" * run["diverged"] for run in runs
            )
            rows.append([TITLES[name], f"{mark}{setting_title(runs[0])}{mark}", accuracies])
    return table(["optimizer", "rates, decay, schedule", "best accuracy"], rows, left=3)


def ablation_table(records: Sequence[Record]) -> str:
    """One row a change, the unchanged setting on the same seeds first."""
    changed = of_stage(records, "ablations")[SUBJECT]
    seeds = {record["seed"] for runs in changed.values() for record in runs}
    base = only_setting(of_stage(records, "matched")[SUBJECT])
    (overrides,) = of_stage(records, "matched")[SUBJECT]
    rows = {"nothing": [record for record in base if record["seed"] in seeds]}
    rows |= {
        f"`{setting.removeprefix(overrides).strip()}`": runs for setting, runs in changed.items()
    }
    return table(
        ["change", "fits", "groks", "median step", "best accuracies"],
        [
            [
                name,
                fitted(runs),
                share(runs),
                median(map(step_of, runs)),
                ", ".join(f"{best_accuracy(run):.3f}" for run in runs),
            ]
            for name, runs in rows.items()
        ],
    )


def by_depth(records: Sequence[Record]) -> dict[str, dict[int, list[Record]]]:
    """Runs of the tuned settings by optimizer and depth, on the seeds that every depth has."""
    groups: dict[str, dict[int, list[Record]]] = {}
    for name, settings in of_stage(records, "depth").items():
        runs = [run for each in settings.values() for run in each]
        seeds = {run["seed"] for run in runs}
        runs += [
            run for run in only_setting(of_stage(records, "tuned")[name]) if run["seed"] in seeds
        ]
        for run in sorted(runs, key=lambda each: each["config"]["model"]["depth"]):
            groups.setdefault(name, {}).setdefault(run["config"]["model"]["depth"], []).append(run)
    return groups


def depth_table(records: Sequence[Record]) -> str:
    """One row a depth."""
    groups = by_depth(records)
    header = ["depth"] + [
        f"{TITLES[name]}: {what}"
        for name in groups
        for what in ("groks", "median step", "accuracies")
    ]
    rows = []
    for depth in next(iter(groups.values())):
        cells = [str(depth)]
        for depths in groups.values():
            runs = depths[depth]
            cells += [
                share(runs),
                median(map(step_of, runs)),
                ", ".join(f"{best_accuracy(run):.3f}" for run in runs),
            ]
        rows.append(cells)
    return table(header, rows)


def drawings(records: Sequence[Record]) -> dict[str, Drawing]:
    """All figures of the experiment, by name."""
    return {
        "accuracy": Drawing(
            partial(plot_accuracy, records),
            "Grokking: validation accuracy against steps, a line a seed (11); training accuracy in"
            " grey; dotted, the 0.95 that counts. Two rates are those of hidden matrices and of all"
            " else.",
        ),
        "depth": Drawing(
            partial(plot_depth, records),
            "Grokking: share of three seeds that grok, and their best validation accuracy, against"
            " depth, at the tuned settings.",
        ),
    }


def plot_accuracy(records: Sequence[Record], stem: Path) -> list[Path]:
    """Validation accuracy against steps, a line a seed, a panel an optimizer and protocol."""
    columns = max(len(of_stage(records, protocol)) for protocol in PROTOCOLS)
    figure, axes = subplots(
        len(PROTOCOLS), columns, figsize=(12, 5.5), sharex=True, sharey=True, squeeze=False
    )
    for i, protocol in enumerate(PROTOCOLS):
        for j, (name, settings) in enumerate(of_stage(records, protocol).items()):
            runs, panel = only_setting(settings), axes[i][j]
            for run in runs:
                panel.plot(
                    run["curve"]["step"],
                    run["curve"]["train_accuracy"],
                    color="0.75",
                    linewidth=0.8,
                )
            for run in runs:
                panel.plot(
                    run["curve"]["step"],
                    run["curve"]["validation_accuracy"],
                    color=COLOURS[j],
                    linewidth=1,
                )
            panel.axhline(GROKS, color="black", linestyle=":", linewidth=0.8)
            panel.set_title(
                f"{TITLES[name]}, {protocol}: {share(runs)} grok\n{setting_words(runs[0])}",
                fontsize="small",
            )
    for panel in axes[-1]:
        panel.set_xlabel("step")
    for row in axes:
        row[0].set_ylabel("accuracy (grey: training)")
    return save_figure(figure, stem)


def plot_depth(records: Sequence[Record], stem: Path) -> list[Path]:
    """Share of runs that grok, and best validation accuracy of each, against depth."""
    figure, (shares, accuracies) = subplots(1, 2, figsize=(9, 3.6))
    for name, depths in by_depth(records).items():
        i = list(TITLES).index(name)
        style = {"color": COLOURS[i], "marker": MARKERS[i], "label": TITLES[name]}
        shares.plot(list(depths), [grokked(runs) / len(runs) for runs in depths.values()], **style)
        medians = [statistics.median(map(best_accuracy, runs)) for runs in depths.values()]
        accuracies.plot(list(depths), medians, **style)
        for depth, runs in depths.items():
            accuracies.plot(
                [depth] * len(runs),
                list(map(best_accuracy, runs)),
                style["marker"],
                color=COLOURS[i],
                alpha=0.4,
            )
    accuracies.axhline(GROKS, color="black", linestyle=":", linewidth=0.8)
    shares.set(xlabel="depth", ylabel=f"share of seeds with accuracy ≥ {GROKS}", ylim=(-0.05, 1.05))
    accuracies.set(
        xlabel="depth", ylabel="best validation accuracy: median and seeds", ylim=(-0.05, 1.05)
    )
    for panel in (shares, accuracies):
        panel.legend(frameon=False, fontsize="small")
    return save_figure(figure, stem)
