"""The kernel of each architecture's Jacobian beside the orbit of its gauges, and two runs from one
orbit (:mod:`experiments.completeness.steps`): ``python -m experiments.completeness.measure``. Run
again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from torch import nn

from ddc import find_gauges
from ddc.gauges.certificate import Jacobian
from ddc.report.runs import read_lines
from ddc.training.records import Records, provenance, write_atomically
from experiments.completeness import steps
from experiments.completeness.architectures import ARCHITECTURES
from experiments.completeness.report import RESULTS

#: What a record is of.
NAMES = ("model", "optimizer")


def measure(name: str) -> dict[str, Any]:
    """The record of one architecture."""
    torch.manual_seed(0)
    model, inputs = ARCHITECTURES[name]()
    model.train(is_trained(model))
    start = time.perf_counter()
    record: dict[str, Any] = {"model": name}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        paper, complete = (
            find_gauges(model, inputs=inputs, loss="cross_entropy", kinds=kinds)
            for kinds in ("paper", "complete")
        )
    record["dropped"] = [str(w.message) for w in heard if "no symmetry" in str(w.message)]
    record["found"] = Counter(gauge.kind for gauge in complete)
    record["refused"] = [[each.kind, each.where, each.reason] for each in complete.refused]
    record["mode"] = "training" if model.training else "evaluation"
    record["gauge_seconds"] = time.perf_counter() - start
    jacobian = Jacobian.of(model, inputs)
    for key, gauges in (("paper", paper), ("complete", complete)):
        certificate = jacobian.certificate(gauges)
        record[key] = {**vars(certificate), "unexplained": certificate.unexplained}
    return record | {"seconds": time.perf_counter() - start}


def is_trained(model: nn.Module) -> bool:
    """Whether a model is measured in training mode: where it has BatchNorms. In training the
    statistics of the batch are a part of the function; in evaluation each is one more linear map,
    with symmetries that no loss which is trained on has.
    """
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules())


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what has no record, or one of an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=tuple(ARCHITECTURES), help="some of them")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    chosen, output = options.only, options.output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    add_missing(output / "records.jsonl", measure, [(name,) for name in chosen])
    pairs = [(name, optimizer) for name in chosen for optimizer in steps.OPTIMIZERS]
    add_missing(output / "steps.jsonl", steps.measure, pairs)


def add_missing(
    path: Path, measure: Callable[..., dict[str, Any]], wanted: Sequence[tuple[str, ...]]
) -> None:
    """Append a record of each architecture, and optimizer, that has none, in the order of
    :data:`ARCHITECTURES`.
    """
    records, about = Records(path), provenance()
    kept = read_lines(records.path) if records.path.exists() else []
    kept = [each for each in kept if "error" not in each]
    done = {named(each) for each in kept}
    keep(records, kept)
    for names in track([each for each in wanted if each not in done], path.stem):
        try:
            record = measure(*names)
        except Exception as error:  # one that cannot be measured says why, and stops no other
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            record = {**dict(zip(NAMES, names, strict=False)), "error": line}
        records.append(record | about)
    order = [*ARCHITECTURES]
    keep(records, sorted(records.read(), key=lambda each: order.index(each["model"])))


def named(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What a record is of."""
    return tuple(record[key] for key in NAMES if key in record)


def keep(records: Records, kept: Sequence[Mapping[str, Any]]) -> None:
    """Have these records and no others."""
    write_atomically(records.path, "".join(json.dumps(each) + "\n" for each in kept).encode())


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
