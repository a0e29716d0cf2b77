"""Many runs from a file, one a line, as overrides of ``train.py``; ended ones are skipped, stopped
ones resume.

python scripts/sweep.py run SWEEP_FILE --jobs 2  # here; exit status 1 if a run has not ended
python scripts/sweep.py status SWEEP_FILE        # complete, diverged, running, unfinished, failed
python scripts/sweep.py count SWEEP_FILE            # how many there are
python scripts/sweep.py folders SWEEP_FILE          # where they are, for other scripts
python scripts/sweep.py task SWEEP_FILE INDEX    # one of them, from 0: for array jobs (slurm/)
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ddc.training.display import print_plainly
from ddc.training.sweep import ROOT, read_sweep, run_missing, summary


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "status", "count", "folders", "task"):
        commands.add_parser(name).add_argument("file", type=Path, metavar="SWEEP_FILE")
    commands.choices["run"].add_argument("--jobs", type=int, default=1, help="runs at a time")
    commands.choices["task"].add_argument("index", type=int, metavar="INDEX")
    arguments = parser.parse_args()
    try:
        runs = read_sweep(arguments.file)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if not runs:
        sys.exit(f"error: {arguments.file} has no runs: one a line, as overrides of train.py")
    if arguments.command == "count":
        print(len(runs))
        return
    if arguments.command == "folders":
        print(*(run.folder for run in runs), sep="\n")
        return
    if arguments.command == "task":
        if not 0 <= arguments.index < len(runs):
            sys.exit(
                f"error: INDEX={arguments.index}: {arguments.file} has runs 0 to {len(runs) - 1}"
            )
        run = runs[arguments.index]
        if run.ended:
            print(f"{run.folder} is {run.state}")
            return
        os.chdir(ROOT)
        command = run.command()
        os.execv(command[0], command)  # signals of the scheduler reach the run itself
    if arguments.command == "run":
        run_missing(runs, arguments.jobs)
    print(summary(runs))
    sys.exit(any(not run.ended for run in runs))


if __name__ == "__main__":
    print_plainly()
    main()
