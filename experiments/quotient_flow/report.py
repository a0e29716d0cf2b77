"""How close trainings stay to a flow on the quotient: a table and a figure, of records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddc.report.claims import Claim, Effect, Verdict, rule, verdict, verdict_table
from ddc.report.figures import Drawing, nth_style, plain_log_ticks, save_figure, subplots
from ddc.report.runs import TITLES, read_lines
from ddc.report.stages import Record, commits, table
from experiments.output import Results
from experiments.protocols import ROOT

#: By claim, the figure beside the main table.
FIGURES = {"C7": "flow"}
RESULTS = ROOT / "results/quotient_flow"


class Approach(NamedTuple):
    """What was found along one sequence of learning rates: a model, an optimizer, a seed."""

    model: str
    optimizer: str
    seed: int
    lr: list[float]
    to_flow: list[float]
    apart: list[float]
    reference_error: float | None

    @property
    def power(self) -> float:
        """Of the learning rate, with which the distance to the flow falls."""
        return float(np.polyfit(np.log(self.lr), np.log(self.to_flow), 1)[0])


def load() -> list[Record]:
    """The committed records."""
    return read_lines(RESULTS / "records.jsonl")


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Table and figure."""
    tables = {"table": partial(markdown, records, claims)}
    caption = (
        "As the learning rate goes to zero at a fixed time of training: distance of orbits to the"
        " flow (left; dotted: proportional to the learning rate), and between two trainings from"
        " one orbit (right; dotted: the bound of the claim's rule). A line a seed."
    )
    drawing = Drawing(partial(plot, approaches(records), claims["C7"].level), caption)
    return [Results(RESULTS, tables, {"flow": drawing} if records else {})]


def approaches(records: Iterable[Record]) -> list[Approach]:
    """The records of each model, optimizer and seed, from the largest learning rate down."""
    grouped: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        key = record["model"], record["optimizer"], record["seed"]
        grouped.setdefault(key, []).append(record)
    found = []
    for key, members in grouped.items():
        members = sorted(members, key=lambda each: -each["lr"])
        lr, to_flow, apart = (
            [each[name] for each in members] for name in ("lr", "to_flow", "apart")
        )
        found.append(Approach(*key, lr, to_flow, apart, members[0]["reference_error"]))
    return found


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """Claim C7: whether starts on one orbit stay together, and the steps approach a flow."""
    claim = claims["C7"]
    if not records:
        nothing = verdict([Effect(None)])
        return [Verdict(claim.id, "DDCAdam", "not measured yet", "–", "–", "–", "–", nothing)]
    found = approaches(records)
    ours, theirs = (
        [each for each in found if each.optimizer == name] for name in ("ddcadam", "adamw")
    )
    apart = [max(max(each.apart) for each in some) for some in (ours, theirs)]
    powers = [each.power for each in ours]
    together = apart[0] < claim.level
    follows = all(abs(power - 1) <= claim.enough for power in powers)
    last = [min(each.apart[-1] for each in theirs), max(each.apart[-1] for each in theirs)]
    return [
        Verdict(
            claim.id,
            TITLES["ddcadam"],
            f"starts on one orbit at most {apart[0]:.1e} apart, {TITLES['adamw']}'s"
            f" {last[0]:.2f} to {last[1]:.2f} at the smallest step; distance to the flow falls by"
            f" the power {min(powers):.2f} to {max(powers):.2f}",
            "–",
            str(len({record["seed"] for record in records})),
            "no: a bound",
            f"{' and '.join(dict.fromkeys(each.model for each in found))}, float64, whole batches",
            verdict([Effect(int(together or follows), enough=together and follows)]),
        )
    ]


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """The largest over the seeds for each model, optimizer and learning rate."""
    head = [verdict_table(claims, verdicts(records, claims)), rule(claims["C7"])]
    if not records:
        return "\n\n".join(head) + "\n"
    found = approaches(records)
    rows = []
    for model, optimizer in dict.fromkeys((each.model, each.optimizer) for each in found):
        some = [each for each in found if (each.model, each.optimizer) == (model, optimizer)]
        powers = [each.power for each in some]
        for i, lr in enumerate(some[0].lr):
            rows.append(
                [
                    model,
                    TITLES[optimizer],
                    f"{lr:.3g}",
                    f"{max(each.to_flow[i] for each in some):.1e}",
                    f"{max(each.apart[i] for each in some):.1e}",
                    f"{min(powers):.2f} to {max(powers):.2f}" if i == 0 else "",
                ]
            )
    header = ["model", "optimizer", "learning rate", "to the flow", "apart", "power"]
    config = records[0]["config"]
    error = max(each.reference_error for each in found if each.reference_error is not None)
    note = (
        "Distances of gauge orbits over the length of the way, largest of"
        f" {len({record['seed'] for record in records})} seeds: to the flow (of the GPT: to the"
        " same at half the learning rate), and between two starts on one orbit. *Power*: of the"
        " learning rate, with which the distance to the flow falls. Time of training (steps times"
        f" learning rate) {config['time']:g}, memories of the moments"
        f" {config['memories'][0]:g} and {config['memories'][1]:g} in the same unit, decay"
        f" {config['decay']:g}. The flow of the ReLU² network by the Runge-Kutta method in"
        f" {config['reference_steps']} steps; half as many end {error:.1e} away."
        f" Commit {commits(records)}. Made by `make quotient_flow` from `records.jsonl` beside this"
        " file."
    )
    return "\n\n".join([*head, table(header, rows, left=2), note]) + "\n"


def plot(found: Sequence[Approach], bound: float, stem: Path) -> list[Path]:
    """A column a quantity, a colour an optimizer, a marker a model, a line a seed."""
    figure, axes = subplots(1, 2, figsize=(9.5, 3.6))
    pairs = [*dict.fromkeys((each.model, each.optimizer) for each in found)]
    for each in found:
        style = nth_style(pairs.index((each.model, each.optimizer)), marker=True)
        label = f"{each.model}, {TITLES[each.optimizer]}"
        seen = axes[0].get_legend_handles_labels()[1]
        style |= {"linewidth": 1, "markersize": 4, "label": "_" if label in seen else label}
        for panel, values in zip(axes, (each.to_flow, each.apart), strict=True):
            panel.plot(each.lr, values, **style)
    rates = found[0].lr
    middle = max(max(each.to_flow) for each in found) / max(rates)
    axes[0].plot(rates, [2 * middle * lr for lr in rates], color="black", linestyle=":")
    axes[1].axhline(bound, color="black", linestyle=":", linewidth=0.8)
    for panel, label in zip(axes, ("distance to the flow", "distance of two starts"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="learning rate", ylabel=label)
        plain_log_ticks(panel.xaxis)
    axes[0].legend(frameon=False, fontsize="small")
    return save_figure(figure, stem)
