"""Feed-forward capacity of a run as a table and a figure, from its record alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.table import Table

from ddc.report.figures import COLOURS, save_figure, subplots
from ddc.report.stages import Record

#: A unit is spare if its removal changes the validation loss by less than this, in nats.
TOLERANCE = 1e-3
REMOVALS = ("zero", "mean")


def spare_share(capacity: Record, removal: str = "mean", tolerance: float = TOLERANCE) -> float:
    """Share of all hidden units whose removal changes the loss by less than a tolerance."""
    changes = np.concatenate([block[f"removal_to_{removal}"] for block in capacity["blocks"]])
    return float((np.abs(changes) < tolerance).mean())


def capacity_table(capacity: Record, title: str) -> Table:
    """One row a block: spare units, ranks of W_up and W_down (effective, stable), quantiles of the
    unit norms.
    """
    table = Table(title=f"{title}: hidden units of the feed-forward blocks")
    table.add_column("block", no_wrap=True)
    for name in (
        "units (active)",
        "spare: zero, mean",
        "up rank",
        "down rank",
        "norms: 5, 50, 95%",
    ):
        table.add_column(name, justify="right")
    for block in capacity["blocks"]:
        spare = [spare_share({"blocks": [block]}, removal) for removal in REMOVALS]
        norms = np.quantile(block["unit_norms"], (0.05, 0.5, 0.95))
        table.add_row(
            block["where"],
            f"{block['units']} ({block['active']})",
            " ".join(f"{share:.3f}" for share in spare),
            *(
                f"{block['effective_rank'][side]:.1f} {block['stable_rank'][side]:.1f}"
                for side in ("up", "down")
            ),
            " ".join(f"{norm:.2f}" for norm in norms),
        )
    table.caption = "spare: share of units; ranks: effective, stable"
    return table


def plot_capacity(capacity: Record, title: str, stem: Path) -> list[Path]:
    """What units do when they go, how large they are, and what is left without the least of
    them.
    """
    figure, (removals, norms, pruning) = subplots(1, 3, figsize=(13, 4))
    for i, block in enumerate(capacity["blocks"]):
        style = {"color": COLOURS[i % len(COLOURS)], "label": block["where"]}
        shares = (np.arange(block["units"]) + 1) / block["units"]
        removals.plot(np.sort(np.abs(block["removal_to_mean"])), shares, **style)
        norms.plot(np.sort(block["unit_norms"]), shares, **style)
    removals.axvline(TOLERANCE, color="black", linestyle=":", label="tolerance")
    removals.set(
        xlabel="|change of the validation loss| without a unit (nats)", ylabel="share of units"
    )
    removals.set_xscale("symlog", linthresh=1e-5)
    norms.set(xlabel="invariant norm of a unit, ρ_P ρ_M", ylabel="share of units")
    widths = [100 * row["keep"] for row in capacity["pruning"]]
    for split, line in (("train", "--"), ("validation", "-")):
        losses = [row[f"{split}_loss"] for row in capacity["pruning"]]
        pruning.plot(widths, losses, "k" + line, marker=".", label=split)
    pruning.set(
        xlabel="hidden units kept (%)", ylabel="loss (nats)", title="no training after pruning"
    )
    pruning.invert_xaxis()
    for axes in (removals, norms, pruning):
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    return save_figure(figure, stem)
