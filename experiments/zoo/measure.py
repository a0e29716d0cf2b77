"""All architectures of transformers and timm, small and at random: which gauges are found, and
whether they are real.

``python -m experiments.zoo.measure``. Of every model of :mod:`experiments.zoo.architectures`, in a
process of its own with a limit of time and of memory:

- ``find_gauges`` on an example, with what it found, refused, and could not check;
- each gauge by itself applied at random to a float64 copy, on other and longer inputs than it was
  traced on, in evaluation and in training mode: the largest change of a log-probability, relative
  to the largest logit. A model whose output is no vector of logits (an encoder) is compared as it
  is. A gauge is *false* where this exceeds :data:`LIMIT`;
- ten steps of DDCAdam and of DDCMuon in float32.

One record a model in ``results/zoo/records.jsonl``, appended as it ends: an interrupted zoo goes
on. ``docs/zoo.md`` is made of the records.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.gauges import Gauge, GaugeSet, check, paper_kinds
from ddc.gauges.base import first_line
from ddc.gauges.double import double
from ddc.gauges.trace import example
from ddc.gauges.verify import verified
from ddc.training.records import Records, provenance, write_atomically
from experiments.zoo.architectures import Architecture, Inputs, Made, architectures
from experiments.zoo.document import document

#: Relative change of what a model says from which on a gauge is false.
LIMIT = 1e-9
STEPS, LR, MUON_LR = 10, 1e-3, 0.01
#: What a process may use: seconds of processor time (and four times that by the clock), bytes of
#: memory.
SECONDS, BYTES = 120.0, 4 << 30
Record = dict[str, Any]
#: Makes the record of a model, and tells of each stage before it.
Work = Callable[[Architecture, Callable[[Record], None]], Record]

# ---------------------------------------------------------------------------------------------- one
# model


def examine(architecture: Architecture, tell: Callable[[Record], None]) -> Record:
    """All that the zoo says of one model.

    Args:
        architecture: the model.
        tell: called before each stage with what is known so far, for the case that the process does
            not survive it.
    """
    record: Record = {**architecture.names, "outcome": ""}
    start = time.process_time()

    def at(stage: str) -> None:
        tell(record | {"stage": stage, "seconds": round(time.process_time() - start, 2)})

    def done(outcome: str, why: str = "") -> Record:
        return record | {
            "outcome": outcome,
            "why": why,
            "seconds": round(time.process_time() - start, 2),
        }

    torch.manual_seed(0)
    try:
        made = architecture.make()
        randomize_(made.model)
        for inputs in (made.example, made.others):
            output(made.model.eval(), inputs)
    except Exception as error:
        return done("not built", told(error))
    record["parameters"] = sum(parameter.numel() for parameter in made.model.parameters())

    at("find_gauges")
    try:
        before = time.process_time()
        gauges = find_gauges(made.model, inputs=made.example)
    except ValueError as error:  # what cannot be traced is refused in one line
        return done("refused" if "\n" not in str(error).strip() else "crashed", str(error))
    except Exception as error:
        return done("crashed", told(error))
    record["find_seconds"] = round(time.process_time() - before, 2)
    before = time.process_time()
    verified(gauges, made.model, *example(made.model, made.example))
    record["trial_seconds"] = round(time.process_time() - before, 2)
    record |= findings(gauges)

    at("check")
    try:
        record |= verdicts(made, gauges)
    except Exception as error:
        return done("not checked", told(error))
    for name in ("DDCAdam", "DDCMuon"):
        at(name)
        record[name] = ten_steps(name, made, gauges)
    return done("checked")


def told(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {first_line(error)}"


def findings(gauges: GaugeSet) -> Record:
    """What was found by kind, and what was refused and not checked by kind and reason."""
    refused = Counter((refusal.kind, refusal.reason) for refusal in gauges.refused)
    unchecked = Counter(
        (gauge.kind, why) for gauge, why in getattr(gauges, "unchecked", {}).items()
    )
    return {
        "found": Counter(gauge.kind for gauge in gauges),
        "refused": [[*each, count] for each, count in refused.items()],
        "unchecked": [[*each, count] for each, count in unchecked.items()],
    }


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Norm scales, biases and small matrices at random, so that no symmetry holds because something
    is zero or one.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.ndim < 2:
            parameter.add_(0.2 * noise)
        else:
            inputs = parameter.shape[-1] if "expert" in name else parameter[0].numel()
            scale = inputs**-0.5
            if parameter.std() < scale and parameter.mean().abs() < scale:
                parameter.copy_(scale * noise)


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits of a model, or the first tensor that it gives."""
    result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    logits = getattr(result, "logits", None)
    return logits if isinstance(logits, Tensor) else next(tensors(result))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an output, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)


def has_logits(model: nn.Module, inputs: Inputs) -> bool:
    """Whether what a model gives is called logits, or is all that it gives, as in timm."""
    result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return isinstance(result, Tensor) or isinstance(getattr(result, "logits", None), Tensor)


@torch.no_grad()
def verdicts(made: Made, gauges: GaugeSet) -> Record:
    """How far each gauge, applied at random, moves what the model says, relative to the largest
    value (or one).
    """
    model, inputs, notes = made.model.eval(), tree_map(double, [made.example, made.others]), []
    logits = has_logits(model, made.others)

    def says(each: nn.Module, training: bool) -> Tensor:
        torch.manual_seed(0)
        each.train(training)
        values = [output(each, x) for x in inputs]
        values = [(value.log_softmax(-1) if logits else value).flatten() for value in values]
        # what is masked is as masked
        return torch.cat([value.masked_fill(value == -torch.inf, 0.0) for value in values])

    changes: dict[Gauge, float] = dict.fromkeys(gauges, 0.0)
    scale = max(1.0, float(output(model, made.others).abs().max()))
    for training in (False, True):
        try:
            moved = check(model, gauges, partial(says, training=training))
        except Exception as error:
            if not training:
                raise
            notes.append(f"does not compute in training mode: {first_line(error)}")
            continue
        for gauge, change in moved.items():
            changes[gauge] = max(
                changes[gauge], float("inf") if math.isnan(change) else change / scale
            )
    return {
        "compared": "log-probabilities" if logits else "output",
        "largest_change": max(changes.values(), default=None),
        "largest_change_by_kind": {
            kind: max(change for gauge, change in changes.items() if gauge.kind == kind)
            for kind in paper_kinds()
            if any(gauge.kind == kind for gauge in changes)
        },
        "false": [
            [gauge.kind, gauge.where, change] for gauge, change in changes.items() if change > LIMIT
        ],
        "notes": notes,
    }


def ten_steps(name: str, made: Made, gauges: GaugeSet) -> Record:
    """First and last loss of ten steps on random targets, or why there were none."""
    model = copy.deepcopy(made.model).train()
    try:
        if name == "DDCAdam":
            optimizer: torch.optim.Optimizer = DDCAdam(model.named_parameters(), gauges, lr=LR)
        else:
            hidden = hidden_matrices(made.model, inputs=made.example)
            optimizer = DDCMuon(model.named_parameters(), gauges, hidden, lr=MUON_LR, adam_lr=LR)
    except Exception as error:
        return {"error": told(error)}
    losses = []
    try:
        for _ in range(STEPS + 1):
            torch.manual_seed(0)
            loss = objective(output(model, made.others))
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    except Exception as error:
        return {"error": f"in a step: {told(error)}"}
    sound = all(map(math.isfinite, losses)) and losses[-1] < losses[0] + 0.5
    return {"first": losses[0], "last": losses[-1], "sound": sound}


def objective(values: Tensor) -> Tensor:
    """Cross-entropy against random classes."""
    values = values.float().flatten(0, -2)
    targets = torch.randint(
        values.shape[-1], values.shape[:1], generator=torch.Generator().manual_seed(0)
    )
    return F.cross_entropy(values, targets)


# ----------------------------------------------------------------------------------------------
# processes


def in_processes(
    models: Iterable[Architecture],
    about: Record,
    seconds: float = SECONDS,
    memory: int = BYTES,
    work: Work = examine,
) -> Iterator[Record]:
    """The record of each model, each made by a process of its own; one that ends otherwise says
    how, as the ``outcome`` and ``why``.

    The processes are forked from this one, which has imported all that they need and must not have
    computed gradients (a fork has none of the threads that these leave behind).
    """
    context = multiprocessing.get_context("fork")
    for architecture in models:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(work, architecture, theirs), daemon=True)
        process.start()
        theirs.close()
        yield {**architecture.names, **_watch(process, ours, seconds, memory), **about}
        ours.close()


def _watch(process: Any, ours: Connection, seconds: float, memory: int) -> Record:
    """The last record that a process sent; where the process did not end by itself, with how it
    did.
    """
    start, record = time.perf_counter(), Record()
    while True:
        try:
            while ours.poll(0.05):
                record = ours.recv()
            used, resident = _use(process.pid)
            clock = time.perf_counter() - start
            ended = (
                "out of time"
                if used > seconds or clock > 4 * seconds
                else "out of memory"
                if resident > memory
                else ""
            )
            if not ended:
                continue
            process.kill()
        except EOFError:
            ended = "crashed"
        process.join()
        if process.exitcode == 0:
            return record
        how = {"crashed": f"exit status {process.exitcode}", "out of time": f"{seconds:.0f} s"}
        why = f"{how.get(ended, f'{memory >> 20} MiB')} in {record.get('stage', 'building')}"
        return record | {"outcome": ended, "why": why}


def _use(pid: int) -> tuple[float, int]:
    """Seconds of processor time that a process has used, and bytes of memory that it holds; zero
    once it is gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0
    ticks = int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def _child(work: Work, architecture: Architecture, theirs: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    theirs.send(work(architecture, theirs.send))
    theirs.close()


def warm() -> None:
    """What every process needs, computed once before they are forked."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    find_gauges(model, inputs=(torch.randn(2, 3),))


# ----------------------------------------------------------------------------------------------
# command


def version(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a record depends on beside its model."""
    return record["commit"], *(
        record["versions"][name] for name in ("torch", "transformers", "timm")
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Examine the models that have no record of this version, make the document, then try random
    networks.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/zoo"))
    parser.add_argument("--document", type=Path, default=Path("docs/zoo.md"))
    parser.add_argument("--fresh", action="store_true", help="make all records anew")
    parser.add_argument(
        "--only", nargs="*", default=(), help="names of models, families or libraries; no document"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="only make the document, from the records that there are",
    )
    options = parser.parse_args(arguments)
    records = Records(options.output / "records.jsonl")
    if not options.report:
        options.output.mkdir(parents=True, exist_ok=True)
        run(records, options.fresh, options.only)
    if not options.only:
        text = document(
            records.read(),
            [each.name for each in architectures()],
            f"{SECONDS:.0f} s",
            f"{BYTES >> 30} GiB",
        )
        write_atomically(options.document, text.encode())
        print(options.document)
    if not options.report and not options.only:
        from experiments.zoo import random_networks  # imports tests

        random_networks.main([])


def run(records: Records, fresh: bool = False, only: Sequence[str] = ()) -> None:
    """Append a record of each model that has none of this version; older ones are dropped."""
    torch.set_num_threads(1)
    about = provenance()
    kept = [] if fresh else [each for each in records.read() if version(each) == version(about)]
    write_atomically(records.path, "".join(json.dumps(each) + "\n" for each in kept).encode())
    done = {(each["library"], each["model"]) for each in kept}
    waiting = [
        each
        for each in architectures()
        if (each.library, each.name) not in done
        and (not only or {each.name, each.family, each.library} & set(only))
    ]
    warm()
    for record in shown(in_processes(waiting, about), len(waiting)):
        records.append(record)


def shown(made: Iterable[Record], total: int) -> Iterator[Record]:
    """Records of models as they come, with a bar that says how far they are."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, auto_refresh=False) as progress:  # no thread beside the forks
        task = progress.add_task("zoo", total=total)
        for record in made:
            yield record
            progress.update(task, advance=1, description=record["model"][:40])
            progress.refresh()


if __name__ == "__main__":
    main()
