"""Read the dead-direction rates of finished runs: ``python scripts/read_rates.py RUN_DIR ...``.

Every cell (layer × observable) is read, or refused for a reason, by the rule in the run's own
configuration. The weights that the run kept at its readings are observed again; ``--recorded``
takes what was recorded during training instead. Prints the grid, the counts and refusals, and
beside them the share of cells that the same rule reads in null controls: the untrained model,
shuffled checkpoints, white noise, a random walk.

Writes rates.json, and heat map and spectra as PNG and PDF, to the run folders or to OUTPUT/<run
id>/; and with OUTPUT, the table of all runs to OUTPUT/table.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ddc.report.rates import (
    counts,
    grid_table,
    markdown,
    null_controls,
    plot_cells,
    plot_spectra,
    settings,
    titled,
)
from ddc.report.runs import Run
from ddc.slt.rates import APPROACHES, read_cells
from ddc.training.compose import restored
from ddc.training.display import print_plainly
from ddc.training.observer import Observer
from ddc.training.records import provenance, write_atomically, write_json
from ddc.training.setup import make_observer, prepare


def main() -> None:
    """Read the run folders of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--recorded", action="store_true", help="take the readings made during training"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    console, reports = Console(), []
    for folder in arguments.folders:
        output = arguments.output / folder.resolve().name if arguments.output else folder
        try:
            reports.append(read_run(folder, arguments.recorded, output, console))
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"error: {error}")
        write_json(output / "rates.json", reports[-1])
        console.print(output / "rates.json")
    table = markdown(reports)
    print(table)
    if arguments.output:
        write_atomically(arguments.output / "table.md", table.encode())
        print(arguments.output / "table.md")


def read_run(folder: Path, recorded: bool, output: Path, console: Console) -> dict[str, Any]:
    """Read one run, print and draw it, and return all that was found."""
    run = Run.read(folder)
    rule, primary, loss_floor = settings(run)
    if recorded and not run.readings:
        raise ValueError(f"{folder} holds no readings.jsonl: train with slt=cells")

    def progress(rows: Iterator[dict[str, Any]], what: str) -> list[dict[str, Any]]:
        return list(track(rows, what, len(run.readings), console=console))

    rows = (
        run.readings if recorded else progress(observer_of(run, folder).read_again(), "snapshots")
    )
    untrained = progress(observer_of(run, folder).read_untrained(rows), "untrained model")
    report: dict[str, Any] = {
        "run": run.info["id"],
        "label": run.label,
        "source": "readings recorded during training" if recorded else "snapshots of the weights",
        "primary": primary,
        "rule": vars(rule),
        "loss_floor": loss_floor,
        "run_commit": run.info["commit"],
        **provenance(),
        "approaches": {},
    }
    for approach in (primary, *(other for other in APPROACHES if other != primary)):
        cells = read_cells(rows, approach, rule, loss_floor)
        report["approaches"][approach] = {
            "counts": counts(cells),
            "total": len(cells),
            "null_controls": null_controls(rows, untrained, approach, rule, loss_floor),
            "cells": [cell.record() for cell in cells],
        }
        title = titled(run, approach)
        console.print(grid_table(cells, title))
        if approach == primary:
            output.mkdir(parents=True, exist_ok=True)
            for path in [
                *plot_cells(cells, title, output / "rates"),
                *plot_spectra(rows, run.label, output / "rates-spectra"),
            ]:
                console.print(path)
    return report


def observer_of(run: Run, folder: Path) -> Observer:
    """What observed the run, with a model at its initialisation."""
    config = restored(run.info["config"])
    setup = prepare(config)
    return make_observer(config, setup.device, setup.data, setup.model, folder / "snapshots")


if __name__ == "__main__":
    print_plainly()
    main()
