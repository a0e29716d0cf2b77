"""Compare finished runs: ``python scripts/compare.py RUN_DIR ... --output STEM`` prints a table and plots curves."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ddc.report.runs import Run, plot_curves, summary_table


def main() -> None:
    """Read the run folders of the command line, tabulate and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="plots go to OUTPUT.png and OUTPUT.pdf")
    arguments = parser.parse_args()
    try:
        runs = [Run.read(folder) for folder in arguments.folders]
    except FileNotFoundError as error:
        parser.error(str(error))
    Console().print(summary_table(runs))
    for path in plot_curves(runs, arguments.output):
        print(path)


if __name__ == "__main__":
    main()
