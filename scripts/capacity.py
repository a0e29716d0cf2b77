"""How much feed-forward capacity finished runs use: ``python scripts/capacity.py RUN_DIR ...``.

For each feed-forward block of the trained model: what the removal of each hidden unit by itself, to
zero and to its mean, does to the validation loss; invariant norms of the units; effective and
stable rank of W_up and W_down in coordinates that no gauge changes. For the model: losses and
accuracies with 75, 50 and 25% of the units, without further training. Writes capacity.json and
capacity.png to the run folder; one that has them is shown as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from ddc.report.capacity import capacity_table, plot_capacity
from ddc.report.runs import Run
from ddc.training.capacity import PREDICTIONS, capacity_of
from ddc.training.display import print_plainly
from ddc.training.records import write_json
from ddc.training.run_folder import CAPACITY
from ddc.training.setup import restore


def main() -> None:
    """Measure the run folders of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--predictions",
        type=int,
        default=PREDICTIONS,
        help="of validation, for the removal of units",
    )
    arguments = parser.parse_args()
    console = Console()
    for folder in arguments.folders:
        path = folder / CAPACITY
        try:
            run = Run.read(folder)
            if run.summary is None:
                raise ValueError(
                    f"{folder} has not ended: the same command of train.py goes on with it"
                )
            if (
                not path.exists()
                or json.loads(path.read_text()).get("predictions") != arguments.predictions
            ):
                write_json(path, capacity_of(restore(folder), arguments.predictions, console))
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"error: {error}")
        record = json.loads(path.read_text())
        console.print(capacity_table(record, run.label))
        for figure in (path, *plot_capacity(record, run.label, folder / "capacity")):
            print(figure)


if __name__ == "__main__":
    print_plainly()
    main()
