"""The certificate of every architecture of transformers and timm: ``python -m
experiments.completeness.zoo``. Run again, it goes on.

First each entry of :mod:`experiments.zoo.architectures` is made as narrow as it goes, and gets a
*signature*: the program that it computes. Entries of one signature are one narrow model, which is
certified once, the smallest models first. Each is made and certified in a process of its own with a
limit of time and of memory: what hangs costs one line that says so.
"""

from __future__ import annotations

import argparse
import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddc import find_gauges
from ddc.gauges.base import first_line
from ddc.gauges.certificate import Jacobian
from ddc.training.records import Records, provenance
from experiments.completeness.architectures import Alone
from experiments.completeness.measure import is_trained, keep
from experiments.completeness.report import RESULTS, ZOO, ZOO_MODELS, load, results
from experiments.zoo.architectures import Architecture, Made, architectures, narrowest
from experiments.zoo.measure import in_processes, output, shown, told, warm

Record = dict[str, Any]
Tell = Callable[[Record], None]
#: What a process may use of a core, in seconds: to make a narrow model, and to certify one.
NARROWING, CERTIFYING = 300.0, 1800.0
#: Positive numbers below this in a program are the eps of a norm: all alike.
EPS = 2e-3

# ----------------------------------------------------------------------------------------------
# which narrow models there are


class Program(TorchDispatchMode):
    """Writes down what a model computes: each operation, what it reads, and its numbers.

    Parameters are numbered as they are first read and are known by shape, so that neither their
    names and values nor the model's class matter; other tensors that the model holds count with
    what is in them.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.held: list[Tensor] = []  # an identity must not be given anew
        self.names: dict[int, str] = {}
        self.weights = {id(p) for p in model.parameters()}
        for x in inputs:
            self._name(x, f"input {x.dtype} {[*x.shape]}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [self._of(each) for each in tree_leaves((args, kwargs or {}))]
        result = func(*args, **(kwargs or {}))
        self.lines.append(f"{func}({', '.join(given)})")
        for i, each in enumerate(tree_leaves(result)):
            if isinstance(each, Tensor):
                self._name(each, f"{len(self.lines)}.{i}")
        return result

    def _name(self, tensor: Tensor, name: str) -> None:
        self.held.append(tensor)
        self.names[id(tensor)] = name

    def _of(self, value: Any) -> str:
        if isinstance(value, float) and 0 < value < EPS:
            return "eps"
        if not isinstance(value, Tensor):
            return repr(value)
        if id(value) not in self.names:
            if id(value) in self.weights:
                self._name(value, f"weight {len(self.held)} {[*value.shape]}")
            else:
                self._name(value, f"constant {digest(repr(value.tolist()))}")
        return self.names[id(value)]


def digest(text: str) -> str:
    """The beginning of a hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def signature(model: nn.Module, inputs: Mapping[str, Any] | tuple[Tensor, ...]) -> str:
    """What two models have in common that compute the same of parameters of the same shapes, tied
    alike, whatever their classes, names and weights; eps apart.
    """
    tensors = [each for each in tree_leaves(inputs) if isinstance(each, Tensor)]
    program = Program(model, tensors)
    with torch.no_grad(), program:
        result = output(model, inputs)
    unread = [[*p.shape] for p in model.parameters() if id(p) not in program.names]
    last = program.names.get(id(result), "")
    return digest("\n".join([*program.lines, last, str(sorted(unread)), str(is_trained(model))]))


def narrowed(architecture: Architecture, tell: Tell) -> Record:
    """The signature and size of an entry's narrow model, or why it has none."""
    start = time.process_time()
    record: Record = architecture.names
    try:
        made = narrowest(architecture)
        record |= {
            "class": type(made.model).__name__,
            "signature": signature(made.model, made.example),
            "parameters": sum(p.numel() for p in made.model.parameters()),
        }
    except Exception as error:
        record["refused"] = str(error) if isinstance(error, ValueError) else told(error)
    return record | {"seconds": round(time.process_time() - start, 2)}


# ----------------------------------------------------------------------------------------------
# certificates


def certified(architecture: Architecture, tell: Tell) -> Record:
    """The certificate of an entry's narrow model, or why there is none."""
    start = time.process_time()
    record: Record = architecture.names

    def at(stage: str) -> None:
        tell(record | {"stage": stage, "seconds": round(time.process_time() - start, 2)})

    try:
        made = narrowest(architecture)
        record |= certificate_of(made, at)
    except Exception as error:
        record["refused"] = first_line(error) if isinstance(error, ValueError) else told(error)
    return record | {"seconds": round(time.process_time() - start, 2)}


def certificate_of(made: Made, at: Callable[[str], None] = lambda stage: None) -> Record:
    """What a certificate says of a narrow model.

    Args:
        made: the model; its loss is taken to read its logits, or else its first output, alone.
        at: called before each stage.

    Raises:
        ValueError: as :func:`ddc.find_gauges` and :func:`ddc.gauges.certificate.certify` do.
    """
    logits = has_classes(made)
    model = Alone(made.model)
    model.train(is_trained(model))
    at("find_gauges")
    loss = "cross_entropy" if logits else "other"
    find = partial(find_gauges, model, inputs=made.example, loss=loss, kinds="complete")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        gauges = find()
    at("the Jacobian")
    jacobian = Jacobian.of(model, made.draw or made.example, centred=logits)
    at("its kernel")
    certificate = jacobian.certificate(gauges)
    record = {
        "mode": "training" if model.training else "evaluation",
        "loss": loss,
        "dropped": [str(w.message) for w in heard if "no symmetry" in str(w.message)],
        "found": Counter(gauge.kind for gauge in gauges),
        **{key: value for key, value in vars(certificate).items() if not hasattr(value, "keys")},
        "unexplained": certificate.unexplained,
        "complete": certificate.complete,
    }
    if certificate.unexplained > 0:
        at("what is unexplained")
        every = find(verify=False)
        record["closing"] = jacobian.closing(gauges, every)
        record["places"] = jacobian.places(gauges)
        record["missed"] = Counter(f"{each.kind}: {each.reason}" for each in gauges.refused)
    return record


@torch.no_grad()
def has_classes(made: Made) -> bool:
    """Whether softmax is taken of the last axis of what a model gives: logits that are no map of
    classes.
    """
    args, kwargs = ((), made.example) if isinstance(made.example, Mapping) else (made.example, {})
    result = made.model(*args, **kwargs)
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    return isinstance(logits, Tensor) and logits.ndim < 4


# ----------------------------------------------------------------------------------------------
# command


def ended_otherwise(record: Record) -> Record:
    """A record whose process did not end by itself, as a refusal."""
    if "outcome" not in record:
        return record
    kept = {key: value for key, value in record.items() if key not in ("outcome", "why", "stage")}
    return kept | {"refused": f"{record['outcome']}: {record['why']}"}


def run(
    folder: Path,
    every: Sequence[Architecture],
    limit: int | None = None,
    minutes: float | None = None,
    again: bool = False,
) -> None:
    """Make what is missing of the records of some entries.

    Args:
        folder: of the records.
        every: the entries.
        limit: at most how many certificates are made.
        minutes: after so many, nothing new is begun.
        again: try once more what was refused.
    """
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    about = provenance()
    models, certificates = Records(folder / ZOO_MODELS), Records(folder / ZOO)
    of_name = {(each.library, each.name): each for each in every}

    def until(waiting: Sequence[Architecture]) -> Iterator[Architecture]:
        for each in waiting:
            if time.monotonic() > end:
                return
            yield each

    # narrow models
    known = {named(each) for each in models.read() if not (again and "refused" in each)}
    waiting = [each for name, each in of_name.items() if name not in known]
    making = in_processes(until(waiting), about, NARROWING, work=narrowed)
    for record in shown(making, len(waiting)):
        put(models, ended_otherwise(record), named)
    narrow = models.read()
    share(certificates, narrow)
    # one certificate for each of them, the smallest first
    done = {each["signature"] for each in certificates.read() if not (again and "refused" in each)}
    asked = [each for each in narrow if named(each) in of_name and "signature" in each]
    first = {each["signature"]: each for each in reversed(asked) if each["signature"] not in done}
    chosen = sorted(first.values(), key=lambda each: each["parameters"])[:limit]
    of_entry = {named(each): each for each in chosen}
    making = in_processes(
        until([of_name[each] for each in of_entry]), about, CERTIFYING, work=certified
    )
    for record in shown(making, len(chosen)):
        of = of_entry[named(record)]
        same = [[*named(each)] for each in narrow if each.get("signature") == of["signature"]]
        head = {key: of[key] for key in ("signature", "class", "parameters")} | {"models": same}
        put(certificates, head | ended_otherwise(record), lambda each: each["signature"])


def put(records: Records, record: Record, key: Callable[[Record], object]) -> None:
    """Append a record; one of the same key goes."""
    every = records.read()
    others = [each for each in every if key(each) != key(record)]
    if len(others) < len(every):
        keep(records, others)
    records.append(record)


def share(certificates: Records, narrow: Sequence[Record]) -> None:
    """Tell each certificate which entries share it, of those that are known by now."""
    records = certificates.read()
    for each in records:
        same = [[*named(one)] for one in narrow if one.get("signature") == each["signature"]]
        each["models"] = same or each["models"]
    if records:
        keep(certificates, records)


def named(record: Mapping[str, Any]) -> tuple[str, str]:
    """Which entry a record is of."""
    return record["library"], record["model"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, help="at most how many certificates")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        help="names of models, families or libraries; of these what was refused is tried again",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    only = set(options.only)
    every = [
        each
        for each in architectures()
        if each.library != "named"  # those of the tests are of one size
        and (not only or only & {each.name, each.family, each.library})
    ]
    warm()
    run(options.output, every, options.limit, options.minutes, again=bool(only))
    if options.output == RESULTS:
        for made in results(load(), {}):
            if "zoo" in made.tables:
                made.table("zoo")


if __name__ == "__main__":
    main()
