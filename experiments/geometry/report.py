"""How sharp and how singular minima are at the end of training: tables and a figure of records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from ddc.report.figures import Drawing, nth_style, save_figure, subplots
from ddc.report.paired import interval, mean_cell, p_cell
from ddc.report.runs import TITLES
from ddc.report.stages import Record, commits, table
from ddc.report.statistics import holm, paired_p
from experiments import own
from experiments.geometry.plan import EXPERIMENT, RESULTS, SEEDS
from experiments.output import Results
from experiments.past_fit.settings import ADAMW, AUTHOR, DDCADAM, OPTIMIZERS

#: By claim, the figure beside the main table.
FIGURES = {"C9": "minima"}
POINTS = ("raw", "balanced", "balanced_all")
STEPS = ("coarse", "fine")
#: An R-hat above it, and a bound on the bias above it, are said beside the verdict.
MIXED, BIASED = 1.1, 0.05
SCALE = "GPT, 0.12M parameters, 4 kB of text"
Number = Callable[[Record], float]


def eigenvalue(point: str) -> Number:
    """The largest one of the Hessian at a point."""
    return lambda record: float(record["geometry"][point]["eigenvalue"]["value"])


def hessian_trace(point: str) -> Number:
    """The trace of the Hessian at a point."""
    return lambda record: float(record["geometry"][point]["trace"]["value"])


def coefficient(step: str) -> Number:
    """The learning coefficient at a step size of the sampler."""
    return lambda record: float(record["geometry"][step]["value"])


#: What is tested: by claim, what sign of the difference is the paper's, and the two quantities.
TESTS: dict[str, tuple[int, dict[str, Number]]] = {
    "C9": (1, {"raw": eigenvalue("raw"), "balanced": eigenvalue("balanced")}),
    "C9b": (-1, {"coarse": coefficient("coarse"), "fine": coefficient("fine")}),
}
#: What tables show, with the form of the number.
SHOWN: dict[str, tuple[Number, str]] = {
    "train loss": (lambda record: float(record["geometry"]["raw"]["loss"]), ".3f"),
    "largest eigenvalue, raw": (eigenvalue("raw"), ".2f"),
    "balanced": (eigenvalue("balanced"), ".2f"),
    "balanced under all symmetries": (eigenvalue("balanced_all"), ".2f"),
    "trace, raw": (hessian_trace("raw"), ".0f"),
    "trace, balanced": (hessian_trace("balanced"), ".0f"),
    "learning coefficient, coarse": (coefficient("coarse"), ".0f"),
    "learning coefficient, fine": (coefficient("fine"), ".0f"),
}


def load() -> list[Record]:
    """The committed records, complete or not."""
    return EXPERIMENT.records


def runs_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs by optimizer, in order of seeds; without those that diverged."""
    ended = sorted((r for r in records if not r["diverged"]), key=lambda each: each["seed"])
    found = {
        name: [each for each in ended if each["config"]["optimizer"]["name"] == name]
        for name in OPTIMIZERS
    }
    return {name: runs for name, runs in found.items() if runs}


def differences(runs: Mapping[str, Sequence[Record]], name: str, number: Number) -> list[float]:
    """An optimizer less AdamW, on the seeds that both have."""
    mine, theirs = (
        {each["seed"]: number(each) for each in runs.get(key, ())} for key in (name, ADAMW)
    )
    return own.paired(mine, theirs)


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """Both claims, of DDCAdam and of the author's step, p-values adjusted over all tests."""
    runs = runs_of(records)
    if len(records) < len(OPTIMIZERS) * len(SEEDS) or len(runs) < len(OPTIMIZERS):
        mine = [claims[each] for each in TESTS]
        return [v for claim in mine for v in not_complete(claim, tuple(claim.fixed), SCALE)]
    keys = [
        (claim, name, where)
        for claim, (_, numbers) in TESTS.items()
        for name in (DDCADAM, AUTHOR)
        for where in numbers
    ]
    raw = [paired_p(differences(runs, name, TESTS[c][1][where])) for c, name, where in keys]
    adjusted = dict(zip(keys, holm(raw), strict=True))
    found = []
    for each, (sign, numbers) in TESTS.items():
        for name in (DDCADAM, AUTHOR):
            by_where = {w: differences(runs, name, number) for w, number in numbers.items()}
            ps = [adjusted[each, name, where] for where in numbers]
            effects = [
                effect([sign * d for d in found_there], p, claims[each].level)
                for found_there, p in zip(by_where.values(), ps, strict=True)
            ]
            form = ".2f" if each == "C9" else ".0f"
            words = [
                f"{where} {mean_cell([numbers[where](r) for r in runs[name]], form)}, AdamW"
                f" {mean_cell([numbers[where](r) for r in runs[ADAMW]], form)}:"
                f" {interval(found_there, form)}"
                for where, found_there in by_where.items()
            ]
            found.append(
                Verdict(
                    each,
                    "matched" + ("" if name == DDCADAM else ", the paper's step"),
                    "; ".join(words),
                    ", ".join(map(p_cell, ps)),
                    str(len(runs[name])),
                    tested(ps[0]),
                    SCALE,
                    verdict(effects),
                    against(records, runs, name, each),
                )
            )
    return found


def against(
    records: Sequence[Record], runs: Mapping[str, Sequence[Record]], name: str, claim: str
) -> str:
    """What the same records hold against a verdict: the train loss, on which both depend; the
    difference of curvature where nothing is left of any symmetry; or the state of the sampler.
    """
    train_loss, form = SHOWN["train loss"]
    notes = [f"train loss {interval(differences(runs, name, train_loss), form)}"]
    if claim == "C9":
        left = interval(differences(runs, name, eigenvalue("balanced_all")), ".2f")
        notes.append(f"balanced under all symmetries {left}")
    else:
        notes.append(of_sampler([*runs[name], *runs[ADAMW]]))
    if diverged := sum(record["diverged"] for record in records):
        notes.append(f"{diverged} runs diverged")
    return "; ".join(notes)


def of_sampler(runs: Sequence[Record]) -> str:
    """What the state of the sampler holds against a verdict on the learning coefficient."""
    apart = sum(map(disagrees, runs))
    sampled = [run["geometry"][step] for run in runs for step in STEPS]
    unmixed = sum(each["r_hat"] > MIXED for each in sampled)
    biased = sum(each["bias"] > BIASED for each in sampled)
    notes = [f"the two step sizes disagree in {apart} of {len(runs)} runs"] if apart else []
    notes += [f"{unmixed} of {len(sampled)} estimates are not mixed"] if unmixed else []
    notes += [f"{biased} may be more than {BIASED:.0%} too high"] if biased else []
    return "; ".join(["at one temperature and localisation", *notes])


def disagrees(run: Record) -> bool:
    """Whether the intervals of the two step sizes do not overlap."""
    coarse, fine = (run["geometry"][step] for step in STEPS)
    return bool(coarse["low"] > fine["high"] or fine["low"] > coarse["high"])


def means_table(runs: Mapping[str, Sequence[Record]]) -> str:
    """One row a quantity: means over seeds, and differences from AdamW."""
    rows = []
    for title, (number, form) in SHOWN.items():
        means = [mean_cell([number(each) for each in mine], form) for mine in runs.values()]
        gaps = [
            f"{interval(found, form)}, p {p_cell(paired_p(found))}"
            for name in runs
            if name != ADAMW
            for found in [differences(runs, name, number)]
        ]
        rows.append([title, *means, *gaps])
    less = [f"{TITLES[name]} - AdamW (95%)" for name in runs if name != ADAMW]
    return table(["", *(TITLES[name] for name in runs), *less], rows)


def sampler_table(runs: Mapping[str, Sequence[Record]]) -> str:
    """One row an optimizer and step size: how the chains went."""
    rows = []
    for name, mine in runs.items():
        for step in STEPS:
            found = [each["geometry"][step] for each in mine]
            rows.append(
                [
                    TITLES[name],
                    step,
                    f"{found[0]['step_size']:g}",
                    f"{max(each['r_hat'] for each in found):.3f}",
                    f"{min(each['ess'] for each in found):.0f}",
                    f"{max(each['bias'] for each in found):.1%}",
                    f"{sum(map(disagrees, mine))} of {len(mine)}",
                ]
            )
    header = ["", "", "step size", "largest R-hat", "smallest ESS", "largest bound on the bias"]
    return table([*header, "the two disagree in"], rows, left=2)


def seeds_table(runs: Mapping[str, Sequence[Record]]) -> str:
    """Every run."""
    rows = [
        [TITLES[name], str(each["seed"]), *(f"{n(each):{form}}" for n, form in SHOWN.values())]
        for name, mine in runs.items()
        for each in mine
    ]
    return table(["", "seed", *SHOWN], rows, left=2)


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """All tables."""
    mine = {name: claims[name] for name in TESTS}
    runs = runs_of(records)
    parts = [
        "*Raw*: of the weights as they are; *balanced*: at the balanced point of their orbit under"
        " the paper's gauges. *Coarse*, *fine*: the step size of the sampler.",
        "## Claims C9 and C9b",
        verdict_table(mine, verdicts(records, claims)),
        *map(rule, mine.values()),
        FEW_SEEDS,
    ]
    if missing := EXPERIMENT.missing():
        parts.insert(1, f"**Not complete.** {missing}")
    if not runs:
        return "\n\n".join(parts) + "\n"
    made = [part for each in records for part in each["geometry"].values()]
    error = max(
        part["trace"]["standard_error"] / abs(part["trace"]["value"])
        for part in made
        if "trace" in part
    )
    (one, *_) = runs.values()
    sampler = one[0]["geometry"]["coarse"]
    parts += [
        "## At the end of training",
        means_table(runs),
        (
            "Means over seeds, in brackets interquartile means; differences paired by seed, p"
            f" unadjusted. Standard errors of the traces, by Hutchinson's estimator: at most"
            f" {error:.1%}."
        ),
        "## The sampler",
        sampler_table(runs),
        (
            f"nβ = {sampler['n_beta']:.0f}, γ = {sampler['gamma']:g}. They *disagree* where their"
            " 95% intervals over chains do not overlap."
        ),
        "## Every seed",
        seeds_table(runs),
        (
            f"{len(records)} runs, {sum(r['seconds'] for r in records) / 3600:.1f} hours of one"
            f" core, and {sum(part['seconds'] for part in made) / 3600:.1f} to measure them. Commit"
            f" of the runs {commits(records)}, of the measurements {commits(made)}. Made by `make"
            " geometry` from `runs.jsonl` beside this file."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def plot(records: Sequence[Record], stem: Path) -> list[Path]:
    """Largest eigenvalue at the three points, trace at two, learning coefficient at both step
    sizes: a line a run.
    """
    figure, axes = subplots(1, 3, figsize=(12, 3.6))
    panels = (
        ("largest eigenvalue of the Hessian", {point: eigenvalue(point) for point in POINTS}),
        ("trace of the Hessian", {point: hessian_trace(point) for point in POINTS[:2]}),
        ("learning coefficient", {step: coefficient(step) for step in STEPS}),
    )
    for i, (name, runs) in enumerate(runs_of(records).items()):
        for panel, (title, numbers) in zip(axes, panels, strict=True):
            for j, run in enumerate(runs):
                # moved aside a little, so that intervals do not hide each other
                x = [place + 0.06 * (i - 1) for place in range(len(numbers))]
                label = None if j else f"{TITLES[name]} ({len(runs)} seeds)"
                style = nth_style(i, marker=True) | {"linewidth": 1, "label": label}
                y = [number(run) for number in numbers.values()]
                panel.errorbar(x, y, [half_width(run, each) for each in numbers], **style)
            panel.set_xticks(range(len(numbers)), [each.replace("_", ",\n") for each in numbers])
            panel.set(ylabel=title, xlim=(-0.4, len(numbers) - 0.6))
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    return save_figure(figure, stem)


def half_width(run: Record, part: str) -> float:
    """Half of the 95% interval of an estimate over chains; nan of what has none."""
    found = run["geometry"][part]
    return (found["high"] - found["low"]) / 2 if part in STEPS else math.nan


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables and figure."""
    drawing = Drawing(
        partial(plot, records),
        "Minima at the end of training far past the point of fit: largest eigenvalue and trace of"
        " the Hessian of the train loss, of the weights as they are (raw), at the balanced point of"
        " their orbit, and at that under all symmetries; and the learning coefficient at two step"
        " sizes of its sampler, with 95% intervals over chains. A line a run.",
    )
    figures = {"minima": drawing} if runs_of(records) else {}
    return [Results(RESULTS, {"table": partial(markdown, records, claims)}, figures)]
