"""The training loop: config in, records out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ddc.data import (
    Data,
    DataConfig,
    ImageConfig,
    ModularConfig,
    PairData,
    TextConfig,
    TextData,
    load_images,
    load_modular,
    load_text,
)
from ddc.gauges import (
    GaugeSet,
    HiddenMatrix,
    audit,
    find_gauges,
    hidden_matrices,
    in_blocks,
    named_parameters,
)
from ddc.gauges.trace import in_evaluation
from ddc.models import (
    DeepMLPConfig,
    GPTConfig,
    ModelConfig,
    ViTConfig,
    build_model,
    check_fit,
    cross_entropy,
)
from ddc.optim import DDCMuon, Lift
from ddc.optim.drift import gauge_drift
from ddc.optim.factory import make_optimizer
from ddc.optim.relative_step import copied_matrices, relative_steps
from ddc.optim.sharding import local_part
from ddc.training.allocator import keep_freed_memory
from ddc.training.calibration import calibration_error
from ddc.training.checkpoint import checkpoints, load_checkpoint, read_checkpoint, save_checkpoint
from ddc.training.config import (
    Config,
    GaugesConfig,
    RelativeAdamWConfig,
    TrainingConfig,
    WandbConfig,
    restored,
)
from ddc.training.display import Display
from ddc.training.lock import only_process_in
from ddc.training.mirror import Mirror
from ddc.training.observer import Observer, joined
from ddc.training.ranks import ALONE, Ranks
from ddc.training.records import Records, Row, provenance, summarize, write_json

Batch = tuple[Tensor, Tensor]
#: Below it, steps in float16 are skipped for ever; it is that of fairseq (``min_loss_scale``).
SMALLEST_LOSS_SCALE = 1e-4


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass
class Setup:
    """All that a run needs, made and checked before anything is trained or written.

    ``trained`` is the model as a training step calls it: under DDP, what wraps it.
    """

    config: Config
    ranks: Ranks
    device: torch.device
    data: Data
    model: nn.Module
    trained: nn.Module
    gauges: GaugeSet
    start: dict[str, Tensor]
    optimizer: Optimizer
    batch_size: int
    peak_lrs: list[float]
    observer: Observer | None
    folder: Path


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Say which keys to change where tensors do not fit into memory.

    Raises:
        MemoryError: they do not, on the host or on the GPU.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        signs = ("can't allocate memory", "Storage size calculation overflowed")
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            sign in str(error) for sign in signs
        ):
            raise MemoryError(
                "memory does not hold this run (python scripts/memory.py with the same overrides"
                " says what it needs): take a smaller training.batch_size, a larger"
                " training.accumulation, or a smaller model.width or depth"
            ) from error
        raise


@within_memory()
def prepare(config: Config, ranks: Ranks = ALONE) -> Setup:
    """Make data, model, gauges and optimizer.

    Args:
        config: of the run.
        ranks: the processes that train it together; each prepares the same, and ends with its part.

    Raises:
        ValueError: a value, a data set or a combination that cannot work; the message names the key
            and the fix.
        MemoryError: they do not fit into memory.
    """
    device = choose_device(config.training)
    data = load_data(config.data, config.model, config.seed)
    batch_size = config.training.batch_size or data.train_units
    if isinstance(data, PairData):
        check_batch(batch_size, data.train_units, config.training.accumulation)
    if batch_size % (ranks.size * config.training.accumulation):
        raise ValueError(
            f"Invalid training.batch_size={batch_size}: {ranks.size} processes (torchrun"
            f" --nproc-per-node) times training.accumulation={config.training.accumulation} must"
            " divide it"
        )
    torch.set_num_threads(config.training.threads)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    model = build_model(config.model, **data.sizes).to(device)
    gauges = configured_gauges(config.gauges, model)
    start = {name: p.detach().to("cpu", copy=True) for name, p in named_parameters(model).items()}
    hidden = configured_hidden(config, model)
    folder = Path(config.runs) / config.name / config.run_id
    observer = None
    if config.slt.readings:
        if ranks.parallel == "fsdp":
            raise ValueError(
                "slt.readings with launcher.parallel=fsdp: they read whole layers; use ddp, or"
                " slt=none"
            )
        observer = make_observer(config, device, data, model, folder / "snapshots")
    trained = ranks.parallelized(model)
    optimizer = configured_optimizer(config, model, gauges, hidden)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    return Setup(
        config,
        ranks,
        device,
        data,
        model,
        trained,
        gauges,
        start,
        optimizer,
        batch_size,
        peak_lrs,
        observer,
        folder,
    )


def restore(folder: Path) -> Setup:
    """What :func:`prepare` made for a run, with the weights of its last checkpoint.

    Raises:
        FileNotFoundError: the folder holds no run, or the run has no checkpoint.
        ValueError: the run was made by a version of the code with other keys, or on data that are
            not here; or its checkpoints are damaged, or of another architecture than its
            configuration.
    """
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"{folder} holds no run")
    state = read_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(f"{folder} holds a run without a checkpoint: train it first")
    config = restored(json.loads((folder / "run.json").read_text())["config"])
    if not torch.cuda.is_available():  # trained elsewhere, looked at here
        config.training.precision = "float32"
        if config.training.device == "cuda":
            config.training.device = "cpu"
    setup = dataclasses.replace(prepare(config), folder=folder)
    check_fit(setup.model.state_dict(), state["model"], f"the checkpoint in {folder}")
    setup.model.load_state_dict(state["model"])
    return setup


def check_batch(batch_size: int, pairs: int, accumulation: int) -> None:
    """Raise ValueError for a batch that the training pairs cannot give."""
    if batch_size > pairs:
        raise ValueError(
            f"Invalid training.batch_size={batch_size}: there are {pairs} training pairs; null"
            " takes them all"
        )
    if batch_size % accumulation:
        raise ValueError(
            f"Invalid training.accumulation={accumulation}: must divide the {batch_size} training"
            " pairs"
        )


def load_data(config: DataConfig, model: ModelConfig, seed: int) -> Data:
    """The data set of a config, in the form that the model reads.

    Raises:
        DataError: the data cannot be had, or are too few for the model.
    """
    match config, model:
        case TextConfig(), GPTConfig():
            return load_text(config, model.context)
        case ImageConfig(), ViTConfig():
            return load_images(config)
        case ModularConfig(), DeepMLPConfig():
            return load_modular(config, seed)
    raise TypeError(f"no model {type(model).__name__} reads a {type(config).__name__}")


def make_observer(
    config: Config, device: torch.device, data: Data, model: nn.Module, folder: Path
) -> Observer:
    """What reads singular structure along the run; its probe is taken evenly from the training
    split, of pairs all.
    """

    def samples(count: int, size: int) -> list[Batch]:
        return [
            (x.to(device), y.to(device)) for x, y in data.evaluation_batches("train", count, size)
        ]

    def whole() -> Batch:
        count = len(data.train) // data.context if isinstance(data, TextData) else data.train_units
        return joined(samples(count, 1))

    size = min(16, config.slt.sequences)
    probe = samples(-(-config.slt.sequences // size), size)
    return Observer(config.slt, model, probe, whole, config.training.steps, folder)


def configured_gauges(config: GaugesConfig, model: nn.Module, verify: bool = True) -> GaugeSet:
    """The gauges of a model that the optimizer is told of; ``verify`` as of
    :func:`ddc.find_gauges`.
    """
    gauges = find_gauges(model, config.per_layer, verify=verify).only(config.kinds)
    return in_blocks(gauges) if config.granularity == "block" else gauges


def configured_hidden(config: Config, model: nn.Module) -> Sequence[HiddenMatrix]:
    """The matrices that the optimizer of a config takes for hidden, read from the model while it is
    whole.

    Raises:
        ValueError: a Muon for a model whose hidden matrices cannot be read.
    """
    if config.optimizer.name not in ("muon", "ddcmuon"):
        return ()
    return hidden_matrices(model, getattr(config.optimizer, "per_head", False))


def configured_optimizer(
    config: Config, model: nn.Module, gauges: GaugeSet, hidden: Sequence[HiddenMatrix]
) -> Optimizer:
    """The optimizer of a config."""
    options = dataclasses.asdict(config.optimizer)
    name, weight_decay = options.pop("name"), options.pop("weight_decay")
    options.pop("per_head", None)  # is in ``hidden``
    if isinstance(config.optimizer, RelativeAdamWConfig):
        folder = options.pop("steps_of")
        options["steps"] = {} if folder is None else recorded_steps(Path(folder))
    return make_optimizer(name, model, gauges, weight_decay, hidden, **options)


def recorded_steps(folder: Path) -> dict[str, float]:
    """The median length of the steps of each matrix, relative to it, in the records of a run.

    Raises:
        ValueError: there are none.
    """
    rows = Records(folder / "records.jsonl").read()
    steps = [row["matrix_step"]["relative"] for row in rows if row.get("matrix_step")]
    if not steps:
        raise ValueError(
            f"Invalid optimizer.steps_of={folder}: expected the folder of a run that recorded"
            " matrix_step"
        )
    lengths = {name: [step[name] for step in steps if step[name] is not None] for name in steps[0]}
    return {name: statistics.median(each) for name, each in lengths.items() if each}


def choose_device(config: TrainingConfig) -> torch.device:
    """The device of the config.

    Raises:
        ValueError: a GPU is asked for and there is none, or a precision that needs one.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError(
            "training.device=cuda (the default of scale=gpu): torch finds no GPU here. Use"
            " scale=cpu, or training.device=cpu training.precision=float32 to run this scale on the"
            " CPU all the same"
        )
    device = torch.device("cuda" if available and config.device != "cpu" else "cpu")
    if device.type == "cpu" and config.precision != "float32":
        raise ValueError(
            f"training.precision={config.precision} needs a GPU: set training.precision=float32"
        )
    return device


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


def make_folder(setup: Setup) -> None:
    """Make the folder of a run.

    Raises:
        OSError: it cannot be made; the message names the key.
    """
    try:
        setup.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"Invalid runs={setup.config.runs}: the folder cannot be made ({error})"
        ) from error


def complete_summary(folder: Path) -> Row | None:
    """The summary of a run that is complete."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def _train(setup: Setup, draw: Callable[[Path], Sequence[Path]]) -> Row:
    config, training, folder, ranks = setup.config, setup.config.training, setup.folder, setup.ranks
    model, optimizer = setup.model, setup.optimizer
    scaler = GradScaler(setup.device.type, enabled=training.precision == "float16")
    records, timing, readings = (
        Records(folder / f"{name}.jsonl") for name in ("records", "timing", "readings")
    )
    last = (
        load_checkpoint(folder, model, optimizer, scaler, ranks)
        if training.resume == "auto"
        else None
    )
    rows, timed, read = ranks.on_first(lambda: begin(setup, last, (records, timing, readings)))
    start = last or 0
    elapsed, observing = (sum(row[key] for row in timed) for key in ("seconds", "reading_seconds"))
    observer, reading_steps = setup.observer, set(setup.observer.steps if setup.observer else ())
    evaluations = {
        round(i * training.steps / training.evaluations) for i in range(training.evaluations + 1)
    }
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
                    ranks.on_first(functools.partial(take_reading, observer, step, read, readings))
                )
                mirror.log_reading(read[-1])
                reading_seconds += time.perf_counter() - began
            if step in evaluations and not (rows and rows[-1]["step"] == step):
                row = {
                    **evaluate(setup, step, fixed),
                    "gauge_audit": gauge_audit,
                    "gauge_drift": gauge_drift(setup.start, named_parameters(model), setup.gauges),
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
                for table, entry in ((records, row), (timing, times)):
                    ranks.on_first(functools.partial(table.append, entry))
                save_checkpoint(folder, step, model, optimizer, scaler, ranks)
                if observer:
                    ranks.on_first(observer.forget)
                rows.append(row)
                mirror.log({**times, **row})
                display.evaluated(row, speed)
                elapsed, observing = elapsed + seconds, observing + reading_seconds
                clock, last_row_step, reading_seconds = time.perf_counter(), step, 0.0
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
            display.advance()

    summary = {
        **summarize(rows, training.gap_levels, training.accuracy_levels),
        "seconds": elapsed,
        "reading_seconds": observing,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    ranks.on_first(lambda: write_json(folder / "summary.json", summary))
    mirror.finish(summary, read, lambda: draw(folder))
    return summary


def begin(setup: Setup, last: int | None, tables: Sequence[Records]) -> list[list[Row]]:
    """The rows of each table up to the last checkpoint; the later ones go. Without one, the folder
    begins anew.
    """
    if last is None:
        start_folder(setup)
    for table in tables:
        table.truncate(last or 0)
    return [table.read() for table in tables]


def take_reading(observer: Observer, step: int, read: list[Row], readings: Records) -> Row:
    """Read singular structure, and record it."""
    row = observer.read(step, read[-1] if read else None)
    readings.append(row)
    return row


@contextlib.contextmanager
def noted(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Leave ``diverged.json`` in the folder of a run that diverges: a result, which a sweep need
    not ask for again.
    """
    marker = folder / "diverged.json"
    if ranks.first:
        marker.unlink(missing_ok=True)
    try:
        yield
    except DivergedError as error:
        if ranks.first:
            write_json(marker, {"message": str(error)})
        raise


def start_folder(setup: Setup) -> None:
    """Begin a run folder: an older run in it ends here, and what made this one is written down."""
    # killed in between, a run goes on only from a checkpoint whose records are all there
    for path in (
        *(setup.folder / name for name in ("summary.json", "capacity.json")),
        *checkpoints(setup.folder),
        *(setup.folder / name for name in ("records.jsonl", "timing.jsonl", "readings.jsonl")),
    ):
        path.unlink(missing_ok=True)
    shutil.rmtree(setup.folder / "snapshots", ignore_errors=True)
    write_json(
        setup.folder / "run.json",
        {
            "id": setup.config.run_id,
            "config": dataclasses.asdict(setup.config),
            "seed": setup.config.seed,
            "data": setup.data.source,
            "processes": setup.ranks.size,
            "compiled": getattr(setup.optimizer, "compiled", False),
            "gauges": str(setup.gauges).splitlines(),
            **(
                {"routing": setup.optimizer.routing().splitlines()}
                if isinstance(setup.optimizer, DDCMuon)
                else {}
            ),
            **provenance(),
        },
    )


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


def learning_rate_factor(training: TrainingConfig, step: int) -> float:
    """Learning rate of a step, relative to its peak."""
    warmup = max(1, round(training.warmup * training.steps))
    if step < warmup:
        return (step + 1) / warmup
    if training.schedule == "cosine":
        progress = (step - warmup) / max(1, training.steps - warmup)
        return training.final_lr + (1 - training.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    decay = round(training.decay * training.steps)
    if training.schedule == "wsd" and decay and step >= training.steps - decay:
        return training.final_lr + (1 - training.final_lr) * (training.steps - step) / decay
    return 1.0


def evaluation_batches(setup: Setup, split: str) -> list[Batch]:
    """The fixed batches of a split, this rank's part of each, on the device."""
    training, part = setup.config.training, setup.ranks.part
    batches = setup.data.evaluation_batches(split, training.evaluation_batches, setup.batch_size)
    return [(part(x).to(setup.device), part(y).to(setup.device)) for x, y in batches]


def evaluate(setup: Setup, step: int, batches: dict[str, list[Batch]]) -> Row:
    """What :func:`measure` finds on fixed batches of both splits; and the learning rates of the
    next step.

    Raises:
        DivergedError: a loss is not finite.
    """
    found = {split: measure(setup, each) for split, each in batches.items()}
    for split, values in found.items():
        if not math.isfinite(loss := values["loss"]):
            raise DivergedError(
                f"the {split} loss after step {step} is {loss}. {where_to_go_on(setup.folder)}"
            )
    factor = learning_rate_factor(setup.config.training, step)
    rates = {key: getattr(setup.config.optimizer, key, None) for key in ("lr", "adam_lr")}
    return {
        "step": step,
        "epoch": step * setup.batch_size * setup.data.units_per_example / setup.data.train_units,
        **{key: peak * factor for key, peak in rates.items() if peak is not None},
        "gap": found["validation"]["loss"] - found["train"]["loss"],
        **{
            f"{split}_{key}": value
            for split, values in found.items()
            for key, value in values.items()
        },
    }


@torch.no_grad()
def measure(setup: Setup, batches: list[Batch]) -> dict[str, float]:
    """Mean loss in nats, accuracy and calibration error over the batches of all ranks, in
    evaluation mode.
    """
    loss, confidences, hits = 0.0, [], []
    with in_evaluation(setup.model):
        for x, y in batches:
            with autocast(setup):
                logits = setup.model(x)
            loss += float(cross_entropy(logits, y)) * y.numel() if len(y) else 0.0
            logits = logits.float()
            largest, predicted = logits.max(-1)
            confidences.append((largest - logits.logsumexp(-1)).exp().flatten())
            hits.append((predicted == y).flatten())
    confidence, hit = (
        torch.cat(setup.ranks.of_all(torch.cat(each).cpu())) for each in (confidences, hits)
    )
    return {
        "loss": setup.ranks.total(loss) / len(hit),
        "accuracy": int(hit.sum()) / len(hit),
        "calibration_error": calibration_error(confidence, hit),
    }


def autocast(setup: Setup) -> contextlib.AbstractContextManager[object]:
    """Mixed precision as configured."""
    dtype = getattr(torch, setup.config.training.precision)
    return torch.autocast(setup.device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_finite(setup: Setup) -> None:
    """Raise DivergedError rather than save weights that are not finite."""
    finite = all(bool(local_part(p.detach()).isfinite().all()) for p in setup.model.parameters())
    if setup.ranks.total(not finite):
        raise DivergedError(
            f"the weights are not finite; they are not saved. {where_to_go_on(setup.folder)}"
        )


def where_to_go_on(folder: Path) -> str:
    last = next(iter(checkpoints(folder)), None)
    good = f"The last good checkpoint is {last}; a" if last else "There is no checkpoint yet; a"
    return f"{good} smaller optimizer.lr or training.max_grad_norm may help"


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
