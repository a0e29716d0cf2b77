"""The configuration of a run: typed, validated, and hashed to the run's name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddc.data import DataConfig, ImageConfig, ModularConfig, TextConfig
from ddc.gauges import KINDS
from ddc.models import MODELS, ModelConfig
from ddc.optim.ddcadam import STEP_SCALES, VERTICAL_MODES
from ddc.optim.muon import ADJUSTMENTS
from ddc.optim.orthogonal import ORTHOGONALIZERS
from ddc.slt.config import SLTConfig

SCHEDULES = ("constant", "cosine", "wsd")
PRECISIONS = ("float32", "bfloat16", "float16")
PARALLEL = ("ddp", "fsdp")
WANDB_MODES = ("auto", "offline", "online", "disabled")


@dataclass
class OptimizerConfig:
    """What all optimizers share. Weight decay is decoupled and applies to matrices, not to vectors."""

    name: str = MISSING
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        require("optimizer.lr", self.lr, self.lr > 0, "a positive number")
        require("optimizer.eps", self.eps, self.eps >= 0, "a number >= 0")
        require("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "a number >= 0")
        require("optimizer.betas", self.betas, all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")


@dataclass
class AdamWConfig(OptimizerConfig):
    """``torch.optim.AdamW``."""

    name: str = "adamw"


@dataclass
class DDCAdamConfig(OptimizerConfig):
    """:class:`ddc.DDCAdam`, which documents the keys."""

    name: str = "ddcadam"
    radial_rate: float = 1.0
    vertical: str = "freeze"
    step_scale: str = "init"
    retract: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require("optimizer.radial_rate", self.radial_rate, self.radial_rate >= 0, "a number >= 0")
        require_one_of("optimizer.vertical", self.vertical, VERTICAL_MODES)
        require_one_of("optimizer.step_scale", self.step_scale, STEP_SCALES)


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon for hidden matrices, ``torch.optim.AdamW`` for the rest.

    ``lr`` and ``momentum`` are Muon's, ``adam_lr``, ``betas`` and ``eps`` AdamW's. ``adjust_lr_fn`` is the scale of an
    update: ``original`` (√max(1, rows/columns)) or ``match_rms_adamw`` (0.2 √max(rows, columns), Moonlight's).
    :class:`ddc.optim.muon.Muon` documents all keys.
    """

    name: str = "muon"
    lr: float = 0.02
    adam_lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    adjust_lr_fn: str = "original"
    orthogonalizer: str = "newton_schulz"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("optimizer.adam_lr", self.adam_lr, self.adam_lr > 0, "a positive number")
        require("optimizer.momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)")
        require_one_of("optimizer.adjust_lr_fn", self.adjust_lr_fn, ADJUSTMENTS)
        require_one_of("optimizer.orthogonalizer", self.orthogonalizer, ORTHOGONALIZERS)


@dataclass
class DDCMuonConfig(DDCAdamConfig):
    """:class:`ddc.DDCMuon`, which documents the keys; ``per_head`` is of :func:`ddc.hidden_matrices`."""

    name: str = "ddcmuon"
    lr: float = 0.02
    adam_lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    orthogonalizer: str = "newton_schulz"
    per_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require("optimizer.adam_lr", self.adam_lr, self.adam_lr > 0, "a positive number")
        require("optimizer.momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)")
        require_one_of("optimizer.orthogonalizer", self.orthogonalizer, ORTHOGONALIZERS)


OPTIMIZERS = {"adamw": AdamWConfig, "ddcadam": DDCAdamConfig, "muon": MuonConfig, "ddcmuon": DDCMuonConfig}
#: Which data a model reads.
DATA = {"gpt": TextConfig, "vit": ImageConfig, "deep_mlp": ModularConfig}


@dataclass
class GaugesConfig:
    """Which kinds of gauge the optimizer respects, of those that the model has.

    ``chained_rescale`` is ``relu_rescale`` layer by layer instead of neuron by neuron: one of the two.
    """

    logit_shift: bool = False
    relu_rescale: bool = False
    chained_rescale: bool = False
    gated_rescale: bool = False
    norm_scale: bool = False
    value_rotation: bool = False
    qk_rotation: bool = False

    def __post_init__(self) -> None:
        if self.chained_rescale and self.relu_rescale:
            raise ValueError(
                "gauges.chained_rescale=true with gauges.relu_rescale=true: rescales of all neurons contain those of "
                "their layers; set one of them to false"
            )

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if getattr(self, kind)]


@dataclass
class TrainingConfig:
    """How long, how fast, on what.

    Args:
        steps: optimizer steps.
        batch_size: sequences, images or pairs a step, null for all training pairs; with ``accumulation`` > 1, taken in
            so many equal parts.
        schedule: of the learning rate, after a linear warm-up over ``warmup`` of the steps: ``constant``,
            ``cosine``, or ``wsd`` (constant, then linear over the last ``decay`` of the steps). Both of the
            latter end at ``final_lr`` times the peak.
        max_grad_norm: clip to this norm (for DDCAdam the gauge-invariant one); null for none.
        evaluations: how many, evenly spread over the steps, besides the one before the first step. Each
            is followed by a checkpoint.
        evaluation_batches: batches of each split that an evaluation reads.
        gap_levels: train losses at which the summary gives the gap.
        accuracy_levels: validation accuracies of which the summary gives the first step that reaches them.
        resume: ``auto`` goes on from the last checkpoint, ``never`` starts over.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: of activations; weights stay in float32. Other than float32 on a GPU only.
        threads: CPU threads.
    """

    steps: int = 1000
    batch_size: int | None = 16
    accumulation: int = 1
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final_lr: float = 0.1
    max_grad_norm: float | None = 1.0
    evaluations: int = 40
    evaluation_batches: int = 8
    gap_levels: list[float] = field(default_factory=lambda: [1.5, 1.0, 0.5])
    accuracy_levels: list[float] = field(default_factory=list)
    resume: str = "auto"
    device: str = "auto"
    precision: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            require("training.batch_size", self.batch_size, self.batch_size >= 1, "a positive integer or null")
        for key in ("steps", "accumulation", "evaluations", "evaluation_batches", "threads"):
            require(f"training.{key}", getattr(self, key), getattr(self, key) >= 1, "a positive integer")
        for key, choices in (
            ("schedule", SCHEDULES),
            ("resume", ("auto", "never")),
            ("device", ("auto", "cpu", "cuda")),
            ("precision", PRECISIONS),
        ):
            require(
                f"training.{key}", getattr(self, key), getattr(self, key) in choices, f"one of {', '.join(choices)}"
            )
        for key in ("warmup", "decay", "final_lr"):
            require(f"training.{key}", getattr(self, key), 0 <= getattr(self, key) <= 1, "a number in [0, 1]")
        require(
            "training.warmup + training.decay", self.warmup + self.decay, self.warmup + self.decay <= 1, "at most 1"
        )
        if self.max_grad_norm is not None:
            require("training.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "a positive number or null")
        if self.batch_size is not None and self.batch_size % self.accumulation:
            raise ValueError(
                f"Invalid training.accumulation={self.accumulation}: must divide training.batch_size={self.batch_size}"
            )


@dataclass
class LauncherConfig:
    """How the processes of one run are started.

    Args:
        name: ``local`` is one process, ``torchrun`` as many as torchrun starts, on one machine or several.
        parallel: with torchrun, ``ddp`` (each has the whole model) or ``fsdp`` (each has a part of every parameter).

    The global batch is split over them, and what they compute is that of one process up to rounding, so the run's id
    does not depend on it: a run may go on with another number of processes.
    """

    name: str = "local"
    parallel: str | None = None

    def __post_init__(self) -> None:
        require_one_of("launcher", self.name, ("local", "torchrun"))
        if self.name == "local" and self.parallel is not None:
            raise ValueError(
                f"Invalid launcher.parallel={self.parallel} with launcher=local: it is for launcher=torchrun"
            )
        if self.name == "torchrun":
            require("launcher.parallel", self.parallel, self.parallel in PARALLEL, f"one of {', '.join(PARALLEL)}")


@dataclass
class WandbConfig:
    """Where Weights & Biases mirrors a run; the run's own records are the truth.

    ``auto`` is online where a key is configured and offline where none is.
    """

    mode: str = "auto"
    project: str = "ddc"
    entity: str | None = None

    def __post_init__(self) -> None:
        require("wandb.mode", self.mode, self.mode in WANDB_MODES, f"one of {', '.join(WANDB_MODES)}")


@dataclass
class Config:
    """One run. ``name`` groups the runs of an experiment, ``runs`` is the folder for all of them."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    gauges: GaugesConfig = field(default_factory=GaugesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    slt: SLTConfig = field(default_factory=SLTConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    name: str = "gpt"
    seed: int = 0
    runs: str = "runs"

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the records of the run, and nothing else."""
        values = dataclasses.asdict(self)
        del values["launcher"], values["wandb"], values["runs"], values["training"]["resume"]
        if not self.slt.readings:
            del values["slt"]
        return values

    @property
    def run_id(self) -> str:
        """Stable name of the run, of its optimizer, its seed, and a hash of :attr:`identity`."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return f"{self.optimizer.name}-seed{self.seed}-{digest[:8]}"


def require(key: str, value: object, holds: bool, expected: str) -> None:
    """Raise a ValueError that names the config key, unless ``holds``."""
    if not holds:
        raise ValueError(f"Invalid {key}={value}: expected {expected}")


def require_one_of(key: str, value: str, choices: Collection[str]) -> None:
    """Raise a ValueError that names the config key and the choices, unless ``value`` is one of them."""
    require(key, value, value in choices, f"one of {', '.join(choices)}")


def register_schemas() -> None:
    """Make the typed schemas known to Hydra, so that unknown keys and wrong types are errors."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, schemas in (
        ("optimizer", OPTIMIZERS),
        ("model", MODELS),
        ("data", {"text": TextConfig, "images": ImageConfig, "modular": ModularConfig}),
    ):
        for name, schema in schemas.items():
            store.store(group=group, name=f"schema_{name}", node=schema)


def resolve(config: DictConfig) -> Config:
    """The typed, validated configuration of a composed one.

    Raises:
        ValueError: a value out of range; the message names the key.
    """
    resolved = OmegaConf.to_object(config)
    assert isinstance(resolved, Config)
    return resolved


def restored(values: dict[str, Any]) -> Config:
    """The configuration that a run's ``run.json`` holds, for one process.

    Raises:
        ValueError: the run was made by a version of the code with other keys.
    """
    schema = OmegaConf.structured(Config)
    schema.optimizer = OmegaConf.structured(OPTIMIZERS[values["optimizer"]["name"]])
    model = values["model"].get("name", "gpt")
    schema.model, schema.data = OmegaConf.structured(MODELS[model]), OmegaConf.structured(DATA[model])
    try:
        merged = OmegaConf.merge(schema, {key: value for key, value in values.items() if key != "launcher"})
    except OmegaConfBaseException as error:
        raise ValueError(f"the run's configuration does not fit this version of the code: {error}") from error
    assert isinstance(merged, DictConfig)
    return resolve(merged)
