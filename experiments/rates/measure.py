"""How many cells random walks read that move as the cells of a run do together: ``python -m
experiments.rates.measure``.

For each committed run that was read, against its primary approach parameter: 500 grids of walks
with the cells' own correlation of increments, and 500 of independent ones. Into
results/rates/walks.jsonl; the report shows it beside the counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import track

from ddc.report.rates import settings
from ddc.slt.rates import increment_correlation, log_observables, walk_counts
from ddc.training.records import provenance
from experiments.output import save_records
from experiments.rates.plan import EXPERIMENT
from experiments.rates.report import Reading, load

GRIDS = 500
VOLUME = "activation_log_volume"


def measure() -> Iterator[dict[str, Any]]:
    """One record a run."""
    about = provenance()
    for each in track(load().readings, "walking"):
        rule, approach, floor = settings(each.run)
        began = time.perf_counter()
        counts = {
            name: walk_counts(each.run.readings, approach, rule, floor, GRIDS, correlated)
            for name, correlated in (("correlated", True), ("independent", False))
        }
        yield {
            "run": each.run.info["id"],
            "cells": each.primary["total"],
            "read": each.read,
            "approach": approach,
            **counts,
            "block_correlation": volumes(each),
            "seconds": time.perf_counter() - began,
            **about,
        }


def volumes(reading: Reading) -> list[float]:
    """Correlation of the increments of the log-volume of activations, of all pairs of blocks (no
    embedding), sorted.
    """
    keys = list(log_observables(reading.run.readings))
    chosen = [
        i
        for i, (layer, observable) in enumerate(keys)
        if observable == VOLUME and layer != "embedding"
    ]
    found = increment_correlation(reading.run.readings)[np.ix_(chosen, chosen)]
    return sorted(found[np.triu_indices(len(chosen), 1)].tolist())


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, and write the records."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    save_records(EXPERIMENT.results / "walks.jsonl", list(measure()))


if __name__ == "__main__":
    main()
