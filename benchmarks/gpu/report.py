"""What the records say, as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu.training import GAP
from benchmarks.report import GIB
from ddc.report.stages import table
from ddc.slt.rates import RateRule, read_cells

Parts = Mapping[str, Mapping[str, Any]]


def summary(records: Iterable[Mapping[str, Any]]) -> str:
    """All records, card by card."""
    makers = {
        "checks": checks_table,
        "speed": speed_table,
        "overtraining": runs_table,
        "vision": runs_table,
    }
    pieces = []
    for record in records:
        pieces += [
            f"## {record['card']}: {record['stage']}",
            makers[record["stage"]](record["parts"]),
            notes(record["parts"]),
        ]
    text = "\n\n".join(piece for piece in pieces if piece)
    return f"# On a GPU\n\n{text or 'Nothing is recorded.'}\n"


def notes(parts: Parts) -> str:
    """What failed or was left out, and the commits."""
    lines = [
        f"- {name}: {part.get('error') or 'left out: ' + part['skipped']}"
        for name, part in parts.items()
        if "error" in part or "skipped" in part
    ]
    commits = ", ".join(sorted({str(part["commit"])[:10] for part in parts.values()}))
    torch = ", ".join(sorted({part["versions"]["torch"] for part in parts.values()}))
    return "\n".join([*lines, f"\nCommit {commits}; torch {torch}."]).strip()


def checks_table(parts: Parts) -> str:
    rows = [
        [
            name,
            each["case"],
            f"{each['value']:.3g}",
            f"{'≥' if each['at_least'] else '≤'} {each['bound']:.3g}",
            "yes" if each["holds"] else "**no**",
        ]
        for name, part in parts.items()
        for each in part.get("rows", ())
    ]
    return table(["check", "case", "value", "bound", "holds"], rows) if rows else ""


def speed_table(parts: Parts) -> str:
    """One row an optimizer and part; ratios to what it is compared to in the same turns.

    A step alone may wait for the processor that launches its kernels; in a whole step that goes on
    while the device is busy with the backward pass. What the kernels themselves take is apart.
    """
    rows = []
    for name, part in parts.items():
        for optimizer, one in part.get("optimizers", {}).items():
            step = one["step"]["ms"]
            device = one.get("device_ms", step)
            least = 1e3 * one["least_bytes"] / part["copy_bandwidth"]
            base = "torch.optim.Muon" if "Muon" in optimizer else "AdamW fused"
            rows.append(
                [
                    name,
                    optimizer,
                    f"{step:.3g}",
                    ratio(one["step"], base),
                    f"{one['whole']['ms']:.4g}",
                    ratio(one["whole"], base),
                    f"{device:.3g}",
                    f"{least / device:.0%}",
                    str(one.get("launches", f"{one.get('operations', '–')} operations")),
                    f"{one['peak_bytes'] / GIB:.1f}" if "peak_bytes" in one else "–",
                ]
            )
    header = ["model", "optimizer", "step, ms", "/ base", "whole step, ms", "/ base"]
    header += ["kernels, ms", "of the bandwidth", "launches", "peak, GiB"]
    return table(header, rows) if rows else ""


def ratio(times: Mapping[str, float], base: str) -> str:
    value = times.get(f"ratio to {base}")
    return "–" if value is None else f"{value:.3f}"


def runs_table(parts: Parts) -> str:
    """One row a run: how far it came, its losses, and where its gap passes the paper's."""
    rows = []
    for name, part in parts.items():
        if not part.get("curve", {}).get("step"):
            continue
        curve, config = part["curve"], part["config"]
        passed = next(
            (step for step, gap in zip(curve["step"], curve["gap"], strict=True) if gap >= GAP),
            None,
        )
        rows.append(
            [
                name,
                f"{curve['step'][-1]} of {config['training']['steps']}"
                + (", diverged" if part["diverged"] else ""),
                f"{curve['train_loss'][-1]:.3f}",
                f"{curve['validation_loss'][-1]:.3f}",
                f"{min(curve['validation_loss']):.3f}",
                f"{curve['gap'][-1]:.3f}",
                "–" if passed is None else str(passed),
                cells(part),
                f"{part['seconds']:.0f}",
            ]
        )
    header = ["run", "steps", "train loss", "validation loss", "best", "gap"]
    header += [f"gap ≥ {GAP} from step", "cells", "seconds"]
    return table(header, rows) if rows else ""


def cells(part: Mapping[str, Any]) -> str:
    """How many cells of a complete run show a rate, of how many."""
    if not part.get("readings") or not part.get("complete"):
        return "–"
    slt = part["config"]["slt"]
    found = read_cells(
        part["readings"], slt["approach"], RateRule(**slt["rule"]), slt["loss_floor"]
    )
    return f"{sum(each.rate.read for each in found)} of {len(found)}"
