"""The training loop: config in, records out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ddc.gauges import audit, canonicalise_, named_parameters
from ddc.models import cross_entropy
from ddc.optim import Lift
from ddc.optim.drift import GaugeDrift
from ddc.optim.relative_step import copied_matrices, relative_steps
from ddc.training.checkpoint import load_checkpoint, save_checkpoint
from ddc.training.display import Display
from ddc.training.evaluate import (
    autocast,
    check_finite,
    evaluate,
    evaluation_batches,
    learning_rate_factor,
)
from ddc.training.formats import round_weights_
from ddc.training.lock import only_process_in
from ddc.training.mirror import Mirror
from ddc.training.observer import Observer
from ddc.training.records import Records, Row, summarize, write_json
from ddc.training.run_folder import (
    SUMMARY,
    DivergedError,
    Tables,
    begin,
    complete_summary,
    make_folder,
    noted,
    where_to_go_on,
)
from ddc.training.schema import WandbConfig
from ddc.training.setup import Setup, within_memory

#: Below it, steps in float16 are skipped for ever; it is that of fairseq (``min_loss_scale``).
SMALLEST_LOSS_SCALE = 1e-4


def no_figures(folder: Path) -> list[Path]:
    return []


def train(setup: Setup, draw: Callable[[Path], Sequence[Path]] = no_figures) -> Row:
    """Train to the end, or from the last checkpoint to the end, and return the summary.

    Args:
        setup: what :func:`prepare` made.
        draw: makes figures from the records of the complete run and returns their paths, for W&B to
            show.

    Raises:
        DivergedError: the loss is not finite; the last good checkpoint is kept, ``diverged.json``
            says what happened.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        BusyError: another process trains this run.
        MemoryError: it does not fit into memory.
        OSError: the folder of the run cannot be made or written to.
    """
    if setup.config.training.resume == "auto":
        complete = setup.ranks.on_first(lambda: complete_summary(setup.folder))
        if complete is not None:
            return {**complete, "already_complete": True}
    with within_memory(), contextlib.ExitStack() as held:
        setup.ranks.on_first(lambda: make_folder(setup))
        setup.ranks.on_first(lambda: held.enter_context(only_process_in(setup.folder)))
        return _train(setup, draw)


def _train(setup: Setup, draw: Callable[[Path], Sequence[Path]]) -> Row:
    config, training, folder, ranks = setup.config, setup.config.training, setup.folder, setup.ranks
    model, optimizer = setup.model, setup.optimizer
    scaler = GradScaler(setup.device.type, enabled=training.precision == "float16")
    tables = Tables.of(folder)
    last = (
        load_checkpoint(folder, model, optimizer, scaler, ranks)
        if training.resume == "auto"
        else None
    )
    rows, timed, read = ranks.on_first(lambda: begin(setup, last, tables))
    start = last or 0
    elapsed, observing = (sum(row[key] for row in timed) for key in ("seconds", "reading_seconds"))
    every = config.optimizer.canonicalise_every
    observer, reading_steps = setup.observer, set(setup.observer.steps if setup.observer else ())
    evaluations = {0, *spread(training.evaluations, training.steps)}
    saves = (
        evaluations
        if training.checkpoints is None
        else spread(training.checkpoints, training.steps)
    )
    drift = GaugeDrift(setup.start, setup.gauges)
    fixed = {split: evaluation_batches(setup, split) for split in ("train", "validation")}
    if not ranks.first:
        config = dataclasses.replace(config, wandb=WandbConfig("disabled"))
    mirror, stop = Mirror(config, folder), StopSignal()
    display = Display(
        training.steps, start, f"{config.name}/{config.run_id}", quiet=not ranks.first
    )

    with display, stop, mirror, noted(folder, ranks):
        mirror.catch_up([{**times, **row} for times, row in zip(timed, rows, strict=False)], read)
        clock, last_row_step, reading_seconds = time.perf_counter(), start, 0.0
        gauge_audit, matrix_step = None, None
        for step in range(start, training.steps + 1):
            if observer and step in reading_steps and not (read and read[-1]["step"] == step):
                check_finite(setup)
                began = time.perf_counter()
                read.append(
                    ranks.on_first(
                        functools.partial(take_reading, observer, step, read, tables.readings)
                    )
                )
                mirror.log_reading(read[-1])
                reading_seconds += time.perf_counter() - began
            if step in evaluations and not (rows and rows[-1]["step"] == step):
                row = {
                    **evaluate(setup, step, fixed),
                    "gauge_audit": gauge_audit,
                    "gauge_drift": drift.at(named_parameters(model)),
                    "matrix_step": matrix_step,
                    **({"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}),
                }
                # an entry that the fixed batches do not read may be nan beside a good loss
                check_finite(setup)
                seconds = time.perf_counter() - clock
                units = (step - last_row_step) * setup.batch_size * setup.data.units_per_example
                speed = {f"{setup.data.unit}s_per_second": units / (seconds - reading_seconds)}
                times = {
                    "step": step,
                    "seconds": seconds,
                    "reading_seconds": reading_seconds,
                    **speed,
                }
                for table, entry in ((tables.records, row), (tables.timing, times)):
                    ranks.on_first(functools.partial(table.append, entry))
                rows.append(row)
                mirror.log({**times, **row})
                display.evaluated(row, speed)
                elapsed, observing = elapsed + seconds, observing + reading_seconds
                clock, last_row_step, reading_seconds = time.perf_counter(), step, 0.0
            if step in saves and step != last:
                check_finite(setup)
                save_checkpoint(folder, step, model, optimizer, scaler, ranks)
                if observer:
                    ranks.on_first(observer.forget)
            if step == training.steps:
                break
            if ranks.total(stop.requested):
                check_finite(setup)
                save_checkpoint(folder, step, model, optimizer, scaler, ranks)
                raise KeyboardInterrupt(
                    f"stopped after step {step}; the same command goes on from there"
                )
            if step + 1 in evaluations:
                before = copied_matrices(named_parameters(model))
                gauge_audit = train_step(setup, step, scaler, audited=True)
                matrix_step = relative_steps(before, named_parameters(model))
            else:
                train_step(setup, step, scaler, audited=False)
            if every and (step + 1) % every == 0:
                canonicalise_(model, setup.gauges, verify=False)
                round_weights_(model, training.weights)
            display.advance()

    summary = {
        **summarize(rows, training.gap_levels, training.accuracy_levels),
        "seconds": elapsed,
        "reading_seconds": observing,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    ranks.on_first(lambda: write_json(folder / SUMMARY, summary))
    mirror.finish(summary, read, lambda: draw(folder))
    return summary


def spread(count: int, steps: int) -> set[int]:
    """``count`` steps up to the last, evenly spaced."""
    return {round(i * steps / count) for i in range(1, count + 1)}


def take_reading(observer: Observer, step: int, read: list[Row], readings: Records) -> Row:
    """Read singular structure, and record it."""
    row = observer.read(step, read[-1] if read else None)
    readings.append(row)
    return row


def train_step(setup: Setup, step: int, scaler: GradScaler, audited: bool) -> float | None:
    """One optimizer step; where ``audited``, returns the largest reading of the gauges' audit.

    A gradient that is not finite beside a finite loss: in float16 the scaler skips the step and
    halves its scale; else the weights take it, and the next loss, evaluation or checkpoint finds it
    there.

    Raises:
        DivergedError: a loss that is not finite, or gradients that overflow at every loss scale.
            Weights are as before the step.
    """
    training, model, optimizer = setup.config.training, setup.model, setup.optimizer
    factor = learning_rate_factor(training, step)
    for group, peak in zip(optimizer.param_groups, setup.peak_lrs, strict=True):
        group["lr"] = peak * factor
    optimizer.zero_grad()
    inputs, targets = map(
        setup.ranks.part, setup.data.batch(step, setup.batch_size, setup.config.seed)
    )
    losses = []
    for x, y in zip(
        inputs.chunk(training.accumulation), targets.chunk(training.accumulation), strict=True
    ):
        with autocast(setup):
            loss = (
                cross_entropy(setup.trained(x.to(setup.device)), y.to(setup.device))
                / training.accumulation
            )
        scaler.scale(loss).backward()
        losses.append(loss.detach())
    if not math.isfinite(
        loss_value := setup.ranks.total(float(torch.stack(losses).sum())) / setup.ranks.size
    ):
        raise DivergedError(
            f"the loss of step {step} is {loss_value}. {where_to_go_on(setup.folder)}"
        )
    reading = max(audit(model, setup.gauges).values(), default=None) if audited else None
    if training.max_grad_norm is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grads_with_norm_(
            model.parameters(), training.max_grad_norm, grad_norm(model, optimizer)
        )
    scaler.step(optimizer)
    scaler.update()
    round_weights_(model, training.weights)
    if scaler.is_enabled() and (scale := scaler.get_scale()) < SMALLEST_LOSS_SCALE:
        raise DivergedError(
            f"the gradients of step {step} and those before overflow, down to a loss scale of"
            f" {scale:.0e}. " + where_to_go_on(setup.folder)
        )
    return reading


def grad_norm(model: nn.Module, optimizer: Optimizer) -> Tensor:
    """The norm that clipping goes by: the gauge-invariant one where the optimizer has gauges."""
    if isinstance(optimizer, Lift):
        return optimizer.grad_norm()
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a request that the loop answers between two steps; a second
    Ctrl-C kills.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
