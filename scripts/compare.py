"""Compare finished runs: ``python scripts/compare.py RUN_DIR ... --output STEM``.

Prints a table and writes it with the curves to STEM.md, STEM.png and STEM.pdf; with ``--keep
FOLDER``, copies the records of the runs there, all but checkpoints, so that they can be committed
and compared again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console

from ddc.report.runs import RECORD_FILES, Run, markdown_table, plot_curves, summary_table
from ddc.training.display import print_plainly


def main() -> None:
    """Read the run folders of the command line, tabulate and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, default=Path("comparison"), metavar="STEM")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        runs = [Run.read(folder) for folder in arguments.folders]
    except FileNotFoundError as error:
        parser.error(str(error))
    Console().print(summary_table(runs))
    if arguments.keep:
        for run in runs:
            kept = arguments.keep / run.folder.name
            kept.mkdir(parents=True, exist_ok=True)
            for name in RECORD_FILES:
                if not (run.folder / name).exists():
                    continue
                shutil.copyfile(run.folder / name, kept / name)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    markdown = arguments.output.with_suffix(".md")
    markdown.write_text(markdown_table(runs), encoding="utf-8")
    for path in (markdown, *plot_curves(runs, arguments.output)):
        print(path)


if __name__ == "__main__":
    print_plainly()
    main()
