"""The configuration of a run: typed, validated, and hashed to the run's name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddc.data import DataConfig
from ddc.gauges import KINDS
from ddc.models import GPTConfig
from ddc.slt.config import SLTConfig

SCHEDULES = ("constant", "cosine", "wsd")
PRECISIONS = ("float32", "bfloat16", "float16")
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


@dataclass
class GaugesConfig:
    """Which kinds of gauge the optimizer respects, of those that the model has."""

    logit_shift: bool = False
    relu_rescale: bool = False
    gated_rescale: bool = False
    norm_scale: bool = False
    value_rotation: bool = False
    qk_rotation: bool = False

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if getattr(self, kind)]


@dataclass
class TrainingConfig:
    """How long, how fast, on what.

    Args:
        steps: optimizer steps.
        batch_size: sequences a step; with ``accumulation`` > 1, taken in so many equal parts.
        schedule: of the learning rate, after a linear warm-up over ``warmup`` of the steps: ``constant``,
            ``cosine``, or ``wsd`` (constant, then linear over the last ``decay`` of the steps). Both of the
            latter end at ``final_lr`` times the peak.
        max_grad_norm: clip to this norm (for DDCAdam the gauge-invariant one); null for none.
        evaluations: how many, evenly spread over the steps, besides the one before the first step. Each
            is followed by a checkpoint.
        evaluation_batches: batches of each split that an evaluation reads.
        gap_levels: train losses at which the summary gives the gap.
        resume: ``auto`` goes on from the last checkpoint, ``never`` starts over.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: of activations; weights stay in float32. Other than float32 on a GPU only.
        threads: CPU threads.
    """

    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final_lr: float = 0.1
    max_grad_norm: float | None = 1.0
    evaluations: int = 40
    evaluation_batches: int = 8
    gap_levels: list[float] = field(default_factory=lambda: [1.5, 1.0, 0.5])
    resume: str = "auto"
    device: str = "auto"
    precision: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulation", "evaluations", "evaluation_batches", "threads"):
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
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"Invalid training.accumulation={self.accumulation}: must divide training.batch_size={self.batch_size}"
            )


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

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = MISSING
    gauges: GaugesConfig = field(default_factory=GaugesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    slt: SLTConfig = field(default_factory=SLTConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    name: str = "gpt"
    seed: int = 0
    runs: str = "runs"

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the records of the run, and nothing else."""
        values = dataclasses.asdict(self)
        del values["wandb"], values["runs"], values["training"]["resume"]
        if not self.slt.readings:
            del values["slt"]
        return values

    @property
    def run_id(self) -> str:
        """Stable name of the run: optimizer, seed, and a hash of :attr:`identity`."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return f"{self.optimizer.name}-seed{self.seed}-{digest[:8]}"


def require(key: str, value: object, holds: bool, expected: str) -> None:
    """Raise a ValueError that names the config key, unless ``holds``."""
    if not holds:
        raise ValueError(f"Invalid {key}={value}: expected {expected}")


def register_schemas() -> None:
    """Make the typed schemas known to Hydra, so that unknown keys and wrong types are errors."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="optimizer", name="schema_adamw", node=AdamWConfig)
    store.store(group="optimizer", name="schema_ddcadam", node=DDCAdamConfig)


def resolve(config: DictConfig) -> Config:
    """The typed, validated configuration of a composed one.

    Raises:
        ValueError: a value out of range; the message names the key.
    """
    resolved = OmegaConf.to_object(config)
    assert isinstance(resolved, Config)
    return resolved


def restored(values: dict[str, Any]) -> Config:
    """The configuration that a run's ``run.json`` holds.

    Raises:
        ValueError: the run was made by a version of the code with other keys.
    """
    optimizers = {"adamw": AdamWConfig, "ddcadam": DDCAdamConfig}
    schema = OmegaConf.structured(Config)
    schema.optimizer = OmegaConf.structured(optimizers[values["optimizer"]["name"]])
    try:
        merged = OmegaConf.merge(schema, values)
    except OmegaConfBaseException as error:
        raise ValueError(f"the run's configuration does not fit this version of the code: {error}") from error
    assert isinstance(merged, DictConfig)
    return resolve(merged)
