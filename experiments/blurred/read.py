"""Read finished runs of claim C2b: ``python experiments/blurred/read.py RUN_DIR ...``.

From the weights that a run kept: as they are, and moved to the balanced point of their orbit.
Writes blurred.json to the run folder; one that has it is left as it is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from ddc.gauges import GaugeSet, balance_, find_gauges, named_parameters
from ddc.models import GPT
from ddc.report.runs import Run
from ddc.slt.observables import categorical_score, observe
from ddc.slt.rates import RateRule, log_approach, read_cells, read_rate, safe_log, walk_counts
from ddc.slt.sample_gradients import sample_gradient_spectra, smallest_positive
from ddc.training.compose import restored
from ddc.training.display import print_plainly
from ddc.training.observer import PROBE_SEED, LossMeter, restore, snapshot_steps
from ddc.training.records import provenance, write_json
from ddc.training.setup import make_observer, prepare
from experiments.blurred.sites import linear_maps, sites

FILE = "blurred.json"
#: Smallest change of the logarithm of an observable, under a random element of all gauges, by which
#: a cell counts as moved by gauges.
MOVES = 1e-6
WALKS = 200
Probe = Sequence[tuple[Tensor, Tensor]]
Row = dict[str, Any]


def main() -> None:
    """Read the run folders of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    torch.set_num_threads(1)
    for folder in parser.parse_args().folders:
        if not (folder / FILE).exists():
            try:
                found = read_run(folder)
            except (FileNotFoundError, ValueError) as error:
                sys.exit(f"error: {error}")
            write_json(folder / FILE, found)
        print(folder / FILE)


def read_run(folder: Path) -> Row:
    """All cells of one run, raw and balanced.

    Raises:
        FileNotFoundError: the run has kept no weights.
        ValueError: no run, or of another model than a GPT.
    """
    began = time.perf_counter()
    config = restored(Run.read(folder).info["config"])
    setup = prepare(config)
    if not isinstance(setup.model, GPT):
        raise ValueError(f"{folder}: sites are those of a GPT, not {type(setup.model).__name__}")
    observer = make_observer(config, setup.device, setup.data, setup.model, folder / "snapshots")
    steps = snapshot_steps(observer.folder)
    if not steps:
        raise FileNotFoundError(f"no snapshots in {observer.folder}: train with slt=cells")
    model, rule = setup.model.double(), config.slt.rule
    gauges = find_gauges(model)
    rows: dict[str, list[Row]] = {"raw": [], "balanced": []}
    for step in track(steps, "snapshots"):
        restore(model, observer.folder, step)
        for name, row in read_both(model, gauges, observer.probe).items():
            rows[name].append({"step": step, **row})
    restore(model, observer.folder, steps[-1])
    moved = moved_cells(model, gauges, observer.probe)
    found = {name: cells_of(each, rule, moved) for name, each in rows.items()}
    return {**found, "seconds": time.perf_counter() - began, **provenance()}


def read_both(model: GPT, gauges: GaugeSet, probe: Probe) -> dict[str, Row]:
    """Readings of weights as they are, and at the balanced point of their orbit, where the model is
    left.
    """
    raw = reading(model, probe)
    balance_(named_parameters(model), gauges)
    return {"raw": raw, "balanced": reading(model, probe)}


def reading(model: GPT, probe: Probe) -> Row:
    """The five observables at all sites, and of each linear map the smallest positive eigenvalue of
    the Gram matrix of per-sample gradients, with its rank.
    """
    meter, layers, maps = LossMeter(categorical_score(PROBE_SEED)), sites(model), linear_maps(model)
    found = [each.record() for each in observe(model, layers, probe, meter)]
    spectra = sample_gradient_spectra(model, maps, probe, categorical_score(PROBE_SEED))
    grams = {
        layer.name: (smallest_positive(each), each.rank)
        for layer, each in zip(maps, spectra, strict=True)
    }
    return {"loss": meter.mean, "layers": found, "grams": grams}


def moved_cells(model: GPT, gauges: GaugeSet, probe: Probe) -> set[tuple[str, str]]:
    """The cells that a random element of all gauges changes: (layer, observable)."""
    before = reading(model, probe)
    gauges.transform_(model, torch.Generator().manual_seed(0))
    after = reading(model, probe)
    moved = {
        (a["layer"], name)
        for a, b in zip(before["layers"], after["layers"], strict=True)
        for name, value in a["values"].items()
        if changed(value, b["values"][name], name.endswith("volume"))
    }
    grams = {
        (layer, "gram_min")
        for layer, (value, _) in before["grams"].items()
        if changed(value, after["grams"][layer][0], False)
    }
    return moved | grams


def changed(before: float, after: float, is_log: bool) -> bool:
    """Whether an observable's logarithm has moved."""
    if is_log:
        return abs(after - before) > MOVES
    return bool(abs(safe_log(np.array(after)) - safe_log(np.array(before))) > MOVES)


def cells_of(rows: Sequence[Row], rule: RateRule, moved: set[tuple[str, str]]) -> Row:
    """Verdicts of all cells, those of the Gram matrices apart, and the null control."""
    cells = [each.record() for each in read_cells(rows, "excess_loss", rule)]
    for each in cells:
        each["moved"] = (each["layer"], each["observable"]) in moved
    x = log_approach(rows, "excess_loss")
    grams = []
    for layer in rows[0]["grams"]:
        values, ranks = (np.array([row["grams"][layer][i] for row in rows]) for i in (0, 1))
        # an eigenvalue that sinks below rounding leaves another one as the smallest
        y = np.where(ranks == ranks.max(), safe_log(values.astype(np.float64)), np.nan)
        rate = read_rate(x, y, rule)
        grams.append(
            {
                "layer": layer,
                "verdict": rate.verdict,
                "slope": None if rate.fit is None else rate.fit.slope,
                "moved": (layer, "gram_min") in moved,
            }
        )
    return {
        "cells": cells,
        "grams": grams,
        "loss": [row["loss"] for row in rows],
        "walks": walk_counts(rows, "excess_loss", rule, runs=WALKS, only=moved),
    }


if __name__ == "__main__":
    print_plainly()
    main()
