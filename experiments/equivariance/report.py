"""How far two trainings from one gauge orbit drift apart, as a table and a figure, from records
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ddc.gauges import KINDS
from ddc.report.claims import Claim, Effect, Verdict, rule, verdict, verdict_table
from ddc.report.figures import Drawing, nth_style, save_figure, subplots
from ddc.report.runs import TITLES, read_lines
from ddc.report.stages import Record, table
from experiments.output import Results
from experiments.protocols import ROOT

#: By claim, the figure beside the main table.
FIGURES = {"C6": "divergence"}
RESULTS = ROOT / "results/equivariance"

#: Each optimizer, and the plain one that it is compared with.
PAIRS = {"ddcadam": "adamw", "ddcmuon": "muon"}
OPTIMIZERS = ("ddcadam", "adamw", "ddcmuon", "muon")
DTYPES = ("float64", "float32")


def load() -> list[Record]:
    """The committed records."""
    return read_lines(RESULTS / "records.jsonl")


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Table and figure."""
    tables = {"table": partial(markdown, records, claims)}
    return [Results(RESULTS, tables, drawings(records, claims["C6"]))]


def largest(records: Iterable[Record], optimizer: str, dtype: str) -> dict[tuple[str, str], float]:
    """The largest divergence over seeds, by model and gauges."""
    found: dict[tuple[str, str], float] = {}
    for record in records:
        if record["optimizer"] == optimizer and record["dtype"] == dtype:
            key = record["model"], record["gauges"]
            found[key] = max(found.get(key, 0.0), record["divergence"])
    return found


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """Claim C6 for both optimizers: how many rows stay under the bound in float64, and where the
    plain one goes.
    """
    claim, found = claims["C6"], []
    for name, plain in PAIRS.items():
        ours, theirs = largest(records, name, "float64"), largest(records, plain, "float64")
        under = [value < claim.level for value in ours.values()]
        leaves = [value for (_, gauges), value in theirs.items() if gauges == "all"]
        distinct = min(leaves) > claim.enough
        turned = [
            max(v for (_, gauges), v in each.items() if gauges.endswith("rotation"))
            for each in (ours, theirs)
        ]
        still = min(
            ((gauges, value) for (_, gauges), value in theirs.items()), key=lambda each: each[1]
        )
        found.append(
            Verdict(
                claim.id,
                TITLES[name],
                f"at most {max(ours.values()):.1e} in {len(ours)} rows, {turned[0]:.1e} under"
                f" rotations alone; {TITLES[plain]} at least {min(leaves):.1f} on whole groups, up"
                f" to {turned[1]:.1f} under rotations",
                "–",
                str(len({record["seed"] for record in records})),
                "no: a bound",
                f"{len(leaves)} architectures, {records[0]['config']['steps']} steps, float64",
                verdict([Effect(int(any(under)), enough=all(under) and distinct)]),
                f"plain {TITLES[plain]} stays within {still[1]:.1e} under"
                f" {still[0].replace('_', ' ')}, too",
            )
        )
    return found


def markdown(records: Sequence[Record], claims: Mapping[str, Claim]) -> str:
    """The largest divergence over the seeds for each model, gauges, dtype and optimizer."""
    columns = [(optimizer, dtype) for dtype in DTYPES for optimizer in OPTIMIZERS]
    cells = [largest(records, *column) for column in columns]
    header = [
        "model",
        "gauges moved",
        *(f"{TITLES[optimizer]} {dtype}" for optimizer, dtype in columns),
    ]
    rows = [[*key, *(f"{cell[key]:.1e}" for cell in cells)] for key in cells[0]]
    config = records[0]["config"]
    muon_lr = next(r["config"]["muon_lr"] for r in records if "muon_lr" in r["config"])
    seeds = len({record["seed"] for record in records})
    parts = [
        verdict_table(claims, verdicts(records, claims)),
        rule(claims["C6"]),
        table(header, rows, left=2),
        (
            f"Largest absolute difference of log-probabilities over {config['steps']} steps from"
            f" two starts on one gauge orbit, largest of {seeds} seeds; learning rate"
            f" {config['lr']}, of hidden matrices under the two Muons {muon_lr}, weight decay"
            f" {config['weight_decay']}, scales moved by e^±1. In float64 both Muons use the exact"
            " polar factor, in float32 Newton-Schulz, Muon in bfloat16. Commit"
            f" {records[0]['commit']}. Made by `make equivariance` from `records.jsonl` beside this"
            " file."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def drawings(records: Sequence[Record], claim: Claim) -> dict[str, Drawing]:
    """All figures of the experiment, by name."""
    seeds = len({record["seed"] for record in records})
    return {
        "divergence": Drawing(
            partial(plot, records, claim.level),
            "Equivariance: largest difference of log-probabilities within 100 steps from two"
            f" starts on one gauge orbit, by optimizer and dtype; largest of {seeds} seeds. Dotted:"
            " the bound of the claim's rule.",
        )
    }


def plot(records: Sequence[Record], bound: float, stem: Path) -> list[Path]:
    """A row a model and gauge set, a panel a dtype, a marker an optimizer; the bound as a dotted
    line.
    """
    keys = list(largest(records, OPTIMIZERS[0], DTYPES[0]))
    figure, axes = subplots(1, 2, figsize=(13, 0.32 * len(keys) + 1.6), sharey=True, sharex=True)
    for panel, dtype in zip(axes, DTYPES, strict=True):
        for i, optimizer in enumerate(OPTIMIZERS):
            cells = largest(records, optimizer, dtype)
            style = nth_style(list(TITLES).index(optimizer), marker=True)
            style |= {"linestyle": "none", "fillstyle": "none" if i % 2 else "full"}
            panel.plot(
                [cells[key] for key in keys], range(len(keys)), label=TITLES[optimizer], **style
            )
        panel.set(title=dtype, xscale="log", xlabel="largest |difference of log-probabilities|")
    axes[0].axvline(bound, color="black", linestyle=":", linewidth=0.8)
    titles = [f"{model}: {KINDS[g].title if g in KINDS else g}" for model, g in keys]
    axes[0].set_yticks(range(len(keys)), titles, fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, fontsize="small", loc="upper left")
    return save_figure(figure, stem)
