"""Sharpness and learning coefficient of finished runs: ``python experiments/geometry/at_the_end.py
RUN_DIR ...``.

From the weights of a run's last checkpoint and its training text. Writes geometry.json to the run
folder, part by part; parts that are there are left as they are, so it can be stopped and started
again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddc.gauges import GaugeSet, balance_, find_gauges, named_parameters
from ddc.models import cross_entropy
from ddc.report.runs import Run
from ddc.slt.learning_coefficient import (
    Loss,
    Params,
    Settings,
    estimate,
    minibatches,
    module_loss,
)
from ddc.slt.sharpness import hessian, largest_eigenvalue, trace
from ddc.training.display import print_plainly
from ddc.training.records import provenance, write_json
from ddc.training.setup import Setup, restore
from experiments.geometry.plan import BATCH_SIZE, COARSE, FILE, FINE, PROBES, TOLERANCE

Windows = tuple[Tensor, Tensor]
Part = Callable[[], dict[str, Any]]


def main() -> None:
    """Measure the run folders of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    torch.set_num_threads(1)
    for folder in parser.parse_args().folders:
        try:
            measure(folder)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"error: {error}")
        print(folder / FILE)


def measure(folder: Path) -> None:
    """All parts of one run that are not measured yet.

    Raises:
        FileNotFoundError: no run, or one without a checkpoint.
        ValueError: a run that has not ended.
    """
    if Run.read(folder).summary is None:
        raise ValueError(f"{folder} has not ended: the same command of train.py goes on with it")
    path = folder / FILE
    found = json.loads(path.read_text()) if path.exists() else {}
    missing = {name: part for name, part in parts(restore(folder)).items() if name not in found}
    for name, part in missing.items():
        began = time.perf_counter()
        values = part()
        found[name] = {**values, "seconds": time.perf_counter() - began, **provenance()}
        write_json(path, found)


def parts(setup: Setup) -> dict[str, Part]:
    """What is measured of a model, by name: as functions, each of which takes a minute or so."""
    sampled = module_loss(copy.deepcopy(setup.model).eval().float(), cross_entropy)
    model = setup.model.eval().double()
    windows, loss = training_windows(setup), module_loss(model, cross_entropy)
    raw = {name: p.detach().clone() for name, p in named_parameters(model).items()}
    points = {"raw": raw, "balanced": balanced(raw, find_gauges(model))}
    everywhere = balanced(raw, find_gauges(model, kinds="complete"))
    return {
        **{name: partial(sharpness, loss, at, windows, PROBES) for name, at in points.items()},
        "balanced_all": partial(sharpness, loss, everywhere, windows, 0),
        "coarse": partial(coefficient, sampled, points["balanced"], windows, COARSE),
        "fine": partial(coefficient, sampled, points["balanced"], windows, FINE),
    }


def training_windows(setup: Setup) -> Windows:
    """Inputs and targets of all windows of the training text, side by side."""
    every = setup.data.evaluation_batches("train", setup.data.train_units, 1)
    inputs, targets = (torch.cat(each).to(setup.device) for each in zip(*every, strict=True))
    return inputs, targets


def balanced(params: Params, gauges: GaugeSet) -> Params:
    """The balanced point of the orbit of these parameters, a copy."""
    point = {name: p.clone() for name, p in params.items()}
    balance_(point, gauges)
    return point


def sharpness(loss: Loss, point: Params, windows: Windows, probes: int) -> dict[str, Any]:
    """Largest eigenvalue of the Hessian at a point, and with any probes its trace; and the loss,
    which is the same at all points of an orbit.
    """
    with torch.no_grad():
        value = float(loss(point, *windows))
    product = hessian(loss, point, *windows)
    like = torch.cat([p.flatten() for p in point.values()])
    top = largest_eigenvalue(product, like, TOLERANCE)
    found: dict[str, Any] = {
        "loss": value,
        "norm": float(like.norm()),
        "eigenvalue": top._asdict(),
    }
    return found | ({"trace": trace(product, like, probes)._asdict()} if probes else {})


def coefficient(loss: Loss, point: Params, windows: Windows, settings: Settings) -> dict[str, Any]:
    """The learning coefficient at a point, with the state of its sampler; in float32."""
    predictions = windows[1].numel()
    at = {name: p.float() for name, p in point.items()}
    result = estimate(
        loss, at, predictions, 1 / math.log(predictions),
        batches=minibatches(windows, BATCH_SIZE, settings), settings=settings,
    )  # fmt: skip
    return {
        "value": result.value,
        "low": result.interval[0],
        "high": result.interval[1],
        "r_hat": result.r_hat,
        "ess": result.ess,
        "step_size": result.step_size,
        "bias": result.bias,
        "n_beta": result.n * result.beta,
        "gamma": result.gamma,
    }


if __name__ == "__main__":
    print_plainly()
    main()
