"""What a run needs, made and checked before anything is trained or written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
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
    KINDS,
    Gauge,
    GaugeSet,
    HiddenMatrix,
    Rescale,
    canonicalise_,
    find_gauges,
    hidden_matrices,
    in_blocks,
    named_parameters,
    paper_kinds,
)
from ddc.gauges.base import Params
from ddc.models import (
    GPT,
    CausalLM,
    CausalLMConfig,
    DeepMLPConfig,
    GPTConfig,
    ModelConfig,
    ViTConfig,
    build_model,
    check_fit,
)
from ddc.models.causal_lm import require_same_function
from ddc.models.saved import CONFIG, WEIGHTS
from ddc.optim import respected
from ddc.optim.factory import LIFTS, make_optimizer
from ddc.optim.mup import mup_start_
from ddc.training.allocator import keep_freed_memory
from ddc.training.checkpoint import read_checkpoint
from ddc.training.compose import restored
from ddc.training.formats import round_weights_
from ddc.training.observer import Observer, joined
from ddc.training.ranks import ALONE, Ranks
from ddc.training.records import read_lines
from ddc.training.run_folder import INFO, RECORDS, SNAPSHOTS
from ddc.training.schema import (
    AdamWConfig,
    Config,
    GaugesConfig,
    RelativeAdamWConfig,
    TrainingConfig,
)

Batch = tuple[Tensor, Tensor]
log = logging.getLogger(__name__)


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
                " training.accumulation, or a smaller model.width or depth (of model=causal_lm by"
                " model.options)"
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
    model = build_model(config.model, **data.sizes)
    if isinstance(model, GPT) and (ratio := width_ratio(config)) is not None:
        mup_start_(model, model.head, ratio)
    if config.start.weights is not None:
        load_weights(model, config.model, Path(config.start.weights))
    model = model.to(device)
    gauges = configured_gauges(config.gauges, model)
    if config.start.spread:
        scale_units_(named_parameters(model), gauges, config.start.spread, config.seed)
    if config.optimizer.canonicalise is not None:
        canonicalise_(model, gauges)
    round_weights_(model, config.training.weights)
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
        observer = make_observer(config, device, data, model, folder / SNAPSHOTS)
    trained = ranks.parallelized(model)
    gauges = taken_gauges(config, data, gauges, hidden)
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
    if not (folder / INFO).exists():
        raise FileNotFoundError(f"{folder} holds no run")
    state = read_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(f"{folder} holds a run without a checkpoint: train it first")
    config = restored(json.loads((folder / INFO).read_text())["config"])
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
        case TextConfig(), GPTConfig() | CausalLMConfig():
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
    kinds = config.kinds
    if config.leave_out:  # what takes the place of a larger kind, if that is left out
        kinds += [name for name, kind in KINDS.items() if kind.default and kind.within in kinds]
    if {*kinds} <= {*paper_kinds()}:
        gauges = find_gauges(model, config.per_layer, verify=verify).only(kinds)
    else:
        gauges = find_gauges(model, kinds=kinds, verify=verify)
    for kind in config.kinds:
        if getattr(config, kind) and not gauges.only([kind]).found:
            reasons = [each.reason for each in gauges.only([kind]).refused]
            why = reasons[0] if reasons else "nothing in it could have one"
            raise ValueError(
                f"Invalid gauges.{kind}=true: the model has no such gauge ({why}); set it to false,"
                " or to null for where there is one"
            )
    return in_blocks(gauges) if config.granularity == "block" else gauges


def taken_gauges(
    config: Config, data: Data, gauges: GaugeSet, hidden: Sequence[HiddenMatrix]
) -> GaugeSet:
    """The gauges without those that the optimizer refuses, which are said.

    Args:
        config: of the run.
        data: of the run, by which its model has its sizes.
        gauges: as found.
        hidden: of :func:`configured_hidden`.

    Raises:
        ValueError: it refuses one, and is not to leave it out, or one of a kind that is true.
    """

    def make(_: Any, some: Sequence[Gauge]) -> Optimizer:
        return configured_optimizer(config, model, GaugeSet(tuple(some)), hidden)

    if {gauge.kind for gauge in gauges} <= {*paper_kinds()}:
        return gauges  # which all optimizers take, or say themselves why not
    with torch.device("meta"):
        model = build_model(config.model, **data.sizes)
    kept = respected(make, model.named_parameters(), gauges)
    left_out = kept.refused[len(gauges.refused) :]
    for each in left_out:
        if not config.gauges.leave_out or getattr(config.gauges, each.kind):
            raise ValueError(
                f"optimizer={config.optimizer.name} refuses a gauge: {each.reason}. Set"
                f" gauges.{each.kind}=false, or gauges.leave_out=true to go without all such gauges"
            )
    for kind, count in Counter(each.kind for each in left_out).items():
        reason = next(each.reason for each in left_out if each.kind == kind)
        name = config.optimizer.name
        log.warning("left out: %d of %s, which optimizer=%s refuses: %s", count, kind, name, reason)
    return kept


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
    options.pop("canonicalise")  # is the loop's
    options.pop("per_head", None)  # is in ``hidden``
    if config.gauges.approximate and (name in LIFTS or name == "ddcmuon"):
        options["approximate"] = True
    if isinstance(config.optimizer, AdamWConfig):
        del options["base_width"]
        options["width_ratio"] = width_ratio(config)
    if isinstance(config.optimizer, RelativeAdamWConfig):
        folder = options.pop("steps_of")
        options["steps"] = {} if folder is None else recorded_steps(Path(folder))
    return make_optimizer(name, model, gauges, weight_decay, hidden, **options)


def width_ratio(config: Config) -> float | None:
    """The width of a GPT over the base width of muP; None without muP."""
    model, optimizer = config.model, config.optimizer
    if not isinstance(model, GPTConfig) or not isinstance(optimizer, AdamWConfig):
        return None
    return None if optimizer.base_width is None else model.width / optimizer.base_width


def recorded_steps(folder: Path) -> dict[str, float]:
    """The median length of the steps of each matrix, relative to it, in the records of a run.

    Raises:
        ValueError: there are none.
    """
    rows = read_lines(folder / RECORDS)
    steps = [row["matrix_step"]["relative"] for row in rows if row.get("matrix_step")]
    if not steps:
        raise ValueError(
            f"Invalid optimizer.steps_of={folder}: expected the folder of a run that recorded"
            " matrix_step"
        )
    lengths = {name: [step[name] for step in steps if step[name] is not None] for name in steps[0]}
    return {name: statistics.median(each) for name, each in lengths.items() if each}


def load_weights(model: nn.Module, config: ModelConfig, folder: Path) -> None:
    """Give a model the weights of ``start.weights``; a model of transformers also those of a folder
    that its ``save_pretrained`` wrote.

    Args:
        model: changed in place.
        config: of the model.
        folder: of the weights.

    Raises:
        ValueError: the folder holds none, or those of another architecture, by shapes or by what
            its configuration says.
    """
    own = model
    try:
        if isinstance(model, CausalLM) and (folder / "config.json").exists():
            require_same_function(model, folder)
            own = model.model
        elif (folder / CONFIG).exists():
            there = json.loads((folder / CONFIG).read_text())["model"]
            for key, here in dataclasses.asdict(config).items():
                if key != "context" and there.get(key, here) != here:
                    raise ValueError(f"there model.{key}={there[key]}, here {here}")
        safetensors.torch.load_model(own, str(folder / WEIGHTS))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Invalid start.weights={folder}: expected a folder with {WEIGHTS}, in one file, of"
            f" this architecture ({reason})"
        ) from error


@torch.no_grad()
def scale_units_(params: Params, gauges: GaugeSet, spread: float, seed: int) -> None:
    """Scale every unit under a rescale gauge by a random number, log-normal with this spread, as a
    seed draws it.
    """
    generator = torch.Generator().manual_seed(seed)
    for gauge in gauges:
        if isinstance(gauge, Rescale):
            drawn = torch.randn(gauge.units(params), generator=generator, dtype=torch.float64)
            gauge.act_(params, (spread * drawn).exp().to(params[gauge.parameters[0]]))


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
