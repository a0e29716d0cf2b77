"""The configuration of a run: typed, validated, and hashed to the run's name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddc.data import DataConfig, ImageConfig, ModularConfig, TextConfig
from ddc.gauges import KINDS
from ddc.gauges.granularity import GRANULARITIES
from ddc.models import MODELS, GPTConfig, ModelConfig
from ddc.optim.factory import LIFTS
from ddc.optim.lift import STEP_SCALES, VERTICAL_MODES, Lift
from ddc.optim.muon import ADJUSTMENTS
from ddc.optim.orthogonal import ORTHOGONALIZERS
from ddc.slt.config import SLTConfig
from ddc.training.errors import WHO_READS_WHAT, explained, unknown_key

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: No number of a configuration is larger: products of two of them are finite in float32, integers
#: are torch's.
LARGEST_FLOAT, LARGEST_INTEGER = 1e15, 2**31 - 1
MISFIT = "the run's configuration does not fit this version of the code"
SCHEDULES = ("constant", "cosine", "wsd")
PRECISIONS = ("float32", "bfloat16", "float16")
PARALLEL = ("ddp", "fsdp")
WANDB_MODES = ("auto", "offline", "online", "disabled")


@dataclass
class OptimizerConfig:
    """What all optimizers share. Weight decay is decoupled and applies to matrices, not to
    vectors.
    """

    name: str = MISSING
    lr: float = 1e-3
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        own = type(self).name
        require(
            "optimizer.name",
            self.name,
            self.name == own,
            f"{own}; optimizer=NAME chooses another optimizer",
        )
        require("optimizer.lr", self.lr, self.lr > 0, "a positive number")
        require(
            "optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "a number >= 0"
        )


@dataclass
class AdamConfig(OptimizerConfig):
    """Adam's hyperparameters, of all that has Adam in it."""

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        require("optimizer.eps", self.eps, self.eps >= 0, "a number >= 0")
        valid = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require("optimizer.betas", self.betas, valid, "two numbers in [0, 1)")


@dataclass
class AdamWConfig(AdamConfig):
    """``torch.optim.AdamW``."""

    name: str = "adamw"


@dataclass
class RelativeAdamWConfig(AdamConfig):
    """:class:`ddc.optim.relative_step.RelativeAdamW`: AdamW whose steps of matrices have a given
    length.

    ``lr`` is ``|ΔW| / |W|`` of every matrix, ``adam_lr`` AdamW's rate for vectors. With
    ``steps_of``, the folder of a run, a matrix takes ``lr`` times the length that its steps have in
    the records of that run: their median.
    """

    name: str = "adamw_relative"
    lr: float = 0.003
    adam_lr: float = 1e-3
    steps_of: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require("optimizer.adam_lr", self.adam_lr, self.adam_lr > 0, "a positive number")


@dataclass
class LiftConfig(OptimizerConfig):
    """What all lifts share; :class:`ddc.DDCAdam` documents the keys. ``compiled=null``: on a CPU,
    from five million parameters on.
    """

    radial_rate: float = 1.0
    vertical: str = "freeze"
    step_scale: str = "init"
    retract: bool = True
    additive: bool = False
    compiled: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require("optimizer.radial_rate", self.radial_rate, self.radial_rate >= 0, "a number >= 0")
        require_one_of("optimizer.vertical", self.vertical, VERTICAL_MODES)
        require_one_of("optimizer.step_scale", self.step_scale, STEP_SCALES)
        if self.additive and self.retract:
            raise ValueError(
                "Invalid optimizer.retract=true with optimizer.additive=true: set one of them to"
                " false"
            )


@dataclass
class DDCAdamConfig(AdamConfig, LiftConfig):
    """:class:`ddc.DDCAdam`, which documents the keys."""

    name: str = "ddcadam"


@dataclass
class DDCAdamPaperConfig(DDCAdamConfig):
    """:class:`ddc.DDCAdam` with the step of the paper's companion, in place of ours.

    ``optimizer=ddcadam_paper`` sets ``gauges.granularity=block`` as well, which belongs to that
    step.
    """

    name: str = "ddcadam_paper"
    step_scale: str = "norm"
    retract: bool = False
    additive: bool = True


@dataclass
class MuonConfig(AdamConfig):
    """Muon for hidden matrices, ``torch.optim.AdamW`` for the rest.

    ``lr`` and ``momentum`` are Muon's, ``adam_lr``, ``betas`` and ``eps`` AdamW's. ``adjust_lr_fn``
    is the scale of an update: ``original`` (√max(1, rows/columns)) or ``match_rms_adamw`` (0.2
    √max(rows, columns), Moonlight's). :class:`ddc.optim.muon.Muon` documents all keys.
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
    """:class:`ddc.DDCMuon`, which documents the keys; ``per_head`` is of
    :func:`ddc.hidden_matrices`.
    """

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


def lift_schema(name: str, lift: type[Lift]) -> type[LiftConfig]:
    """The schema of a lift, read from its signature: what is its own, with its defaults, is added
    to what all lifts share; its rule checks what the rule reads.
    """
    hints = get_type_hints(lift.__init__) | {"lr": float}
    own = [
        (key, hints[key], field(default=parameter.default))
        for key, parameter in inspect.signature(lift).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key != "weight_decay"
    ]

    def check(self: LiftConfig) -> None:
        LiftConfig.__post_init__(self)
        try:
            lift.rule.check(vars(self))
        except ValueError as error:
            raise ValueError(str(error).replace("Invalid ", "Invalid optimizer.", 1)) from None

    about = {"__post_init__": check, "__doc__": lift.__doc__, "__module__": __name__}
    fields: list[Any] = [("name", str, field(default=name)), *own]
    return make_dataclass(f"{lift.__name__}Config", fields, bases=(LiftConfig,), namespace=about)


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamWConfig,
    "adamw_relative": RelativeAdamWConfig,
    "ddcadam": DDCAdamConfig,
    "ddcadam_paper": DDCAdamPaperConfig,
    "muon": MuonConfig,
    "ddcmuon": DDCMuonConfig,
}
OPTIMIZERS |= {
    name: lift_schema(name, lift) for name, lift in LIFTS.items() if name not in OPTIMIZERS
}
#: Which data a model reads.
DATA = {"gpt": TextConfig, "vit": ImageConfig, "deep_mlp": ModularConfig}


@dataclass
class GaugesConfig:
    """Which kinds of gauge the optimizer respects.

    ``true``: the model must have the kind; ``null``: if the model has it; ``false``: not.
    ``chained_rescale`` is ``relu_rescale`` layer by layer instead of neuron by neuron: one of the
    two.

    ``granularity`` is that of ReLU and gated rescales: ``unit``, a scale for each hidden unit, or
    ``block``, one for a pair of matrices, or for a layer of a chain (:func:`ddc.gauges.in_blocks`).
    """

    logit_shift: bool | None = False
    relu_rescale: bool | None = False
    chained_rescale: bool | None = False
    gated_rescale: bool | None = False
    norm_scale: bool | None = False
    value_rotation: bool | None = False
    qk_rotation: bool | None = False
    granularity: str = "unit"

    def __post_init__(self) -> None:
        require_one_of("gauges.granularity", self.granularity, GRANULARITIES)
        if {"chained_rescale", "relu_rescale"} <= set(self.kinds):
            raise ValueError(
                "gauges.chained_rescale=true with gauges.relu_rescale=true: rescales of all neurons"
                " contain those of their layers; set one of them to false"
            )

    @property
    def kinds(self) -> list[str]:
        """All but those that are not wanted, in the order of tables."""
        return [kind for kind in KINDS if getattr(self, kind) is not False]

    @property
    def per_layer(self) -> bool:
        """As :func:`ddc.find_gauges` has it."""
        return self.chained_rescale is not False


@dataclass
class TrainingConfig:
    """How long, how fast, on what.

    Args:
        steps: optimizer steps.
        batch_size: sequences, images or pairs a step, null for all training pairs; with
            ``accumulation`` > 1, taken in so many equal parts.
        schedule: of the learning rate, after a linear warm-up over ``warmup`` of the steps:
            ``constant``, ``cosine``, or ``wsd`` (constant, then linear over the last ``decay`` of
            the steps). Both of the latter end at ``final_lr`` times the peak.
        max_grad_norm: clip to this norm (for DDCAdam the gauge-invariant one); null for none.
        evaluations: how many, evenly spread over the steps, besides the one before the first step.
            Each is followed by a checkpoint.
        evaluation_batches: batches of each split that an evaluation reads.
        gap_levels: train losses at which the summary gives the gap.
        accuracy_levels: validation accuracies of which the summary gives the first step that
            reaches them.
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
            require(
                "training.batch_size",
                self.batch_size,
                self.batch_size >= 1,
                "a positive integer or null",
            )
        for key in ("steps", "accumulation", "evaluations", "evaluation_batches"):
            require(
                f"training.{key}", getattr(self, key), getattr(self, key) >= 1, "a positive integer"
            )
        require(
            "training.threads", self.threads, 1 <= self.threads <= 1024, "an integer from 1 to 1024"
        )
        for key, choices in (
            ("schedule", SCHEDULES),
            ("resume", ("auto", "never")),
            ("device", ("auto", "cpu", "cuda")),
            ("precision", PRECISIONS),
        ):
            require(
                f"training.{key}",
                getattr(self, key),
                getattr(self, key) in choices,
                f"one of {', '.join(choices)}",
            )
        for key in ("warmup", "decay", "final_lr"):
            require(
                f"training.{key}",
                getattr(self, key),
                0 <= getattr(self, key) <= 1,
                "a number in [0, 1]",
            )
        require(
            "training.warmup + training.decay",
            self.warmup + self.decay,
            self.warmup + self.decay <= 1,
            "at most 1",
        )
        if self.max_grad_norm is not None:
            require(
                "training.max_grad_norm",
                self.max_grad_norm,
                self.max_grad_norm > 0,
                "a positive number or null",
            )
        for key, highest in (("gap_levels", LARGEST_FLOAT), ("accuracy_levels", 1.0)):
            levels = getattr(self, key)
            expected = "numbers in (0, 1]" if highest == 1 else "positive numbers"
            require(
                f"training.{key}", levels, all(0 < level <= highest for level in levels), expected
            )
        if self.batch_size is not None and self.batch_size % self.accumulation:
            raise ValueError(
                f"Invalid training.accumulation={self.accumulation}: must divide"
                f" training.batch_size={self.batch_size}"
            )


@dataclass
class LauncherConfig:
    """How the processes of one run are started.

    Args:
        name: ``local`` is one process, ``torchrun`` as many as torchrun starts, on one machine or
            several.
        parallel: with torchrun, ``ddp`` (each has the whole model) or ``fsdp`` (each has a part of
            every parameter).

    The global batch is split over them, and what they compute is that of one process up to
    rounding, so the run's id does not depend on it: a run may go on with another number of
    processes.
    """

    name: str = "local"
    parallel: str | None = None

    def __post_init__(self) -> None:
        require_one_of("launcher", self.name, ("local", "torchrun"))
        if self.name == "local" and self.parallel is not None:
            raise ValueError(
                f"Invalid launcher.parallel={self.parallel} with launcher=local: it is for"
                " launcher=torchrun"
            )
        if self.name == "torchrun":
            require(
                "launcher.parallel",
                self.parallel,
                self.parallel in PARALLEL,
                f"one of {', '.join(PARALLEL)}",
            )


@dataclass
class WandbConfig:
    """Where Weights & Biases mirrors a run; the run's own records are the truth.

    Nothing of it changes the run or its id.

    Args:
        mode: ``offline`` writes to the run's folder, for ``wandb sync``; ``auto`` is online where a
            key is configured and offline where none is.
        project, entity: where the runs go.
        group: of runs: the experiment; null: ``name``.
        job_type: what the run is for: the stage of the experiment.
        tags: claims and protocol.
    """

    mode: str = "offline"
    project: str = "ddc"
    entity: str | None = None
    group: str | None = None
    job_type: str = "train"
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(
            "wandb.mode", self.mode, self.mode in WANDB_MODES, f"one of {', '.join(WANDB_MODES)}"
        )
        for key, name, longest in (("group", self.group, 128), ("job_type", self.job_type, 64)):
            require(
                f"wandb.{key}",
                name,
                name is None or 0 < len(name) <= longest,
                f"1 to {longest} characters",
            )
        fits = all(0 < len(tag) <= 64 for tag in self.tags) and len({*self.tags}) == len(self.tags)
        require("wandb.tags", self.tags, fits, "different tags of 1 to 64 characters")


@dataclass
class Config:
    """One run. ``name`` groups the runs of an experiment, ``runs`` is the folder for all of
    them.
    """

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

    def __post_init__(self) -> None:
        require("seed", self.seed, self.seed >= 0, "an integer >= 0")
        valid = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", self.name) is not None
        require(
            "name",
            repr(self.name),
            valid,
            "1 to 100 letters, digits and any of . _ -, for it names a folder",
        )
        model, data = self.model.name, self.data
        if not isinstance(data, DATA[model]):
            raise ValueError(f"Invalid data={data.name} with model={model}: {WHO_READS_WHAT}")
        for kind, reason in self.model.absent_gauges.items():
            if getattr(self.gauges, kind):
                raise ValueError(
                    f"Invalid gauges.{kind}=true: model={model} has no such gauge, for {reason}."
                    f" Set gauges.{kind}=false, or gauges=all for those that it has"
                )
        if self.training.batch_size is None and not isinstance(data, ModularConfig):
            raise ValueError(
                "training.batch_size=null takes the whole training split, which only data=modular"
                " allows"
            )
        by_heads = isinstance(self.optimizer, DDCMuonConfig) and self.optimizer.per_head
        if by_heads and not isinstance(self.model, GPTConfig):
            raise ValueError(
                "Invalid optimizer.per_head=true: only model=gpt is taken by heads; set it to false"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the records of the run, and nothing else."""
        values = dataclasses.asdict(self)
        del values["launcher"], values["wandb"], values["runs"], values["training"]["resume"]
        granularity = values["gauges"].pop("granularity")
        values["gauges"] = {kind: wanted is not False for kind, wanted in values["gauges"].items()}
        # keys that came later are left out where they say what had been so before: older runs keep
        # their names
        if granularity != "unit":
            values["gauges"]["granularity"] = granularity
        if not values["optimizer"].get("additive", True):
            del values["optimizer"]["additive"]
        if not self.slt.readings:
            del values["slt"]
        if values["optimizer"].get("compiled", False) is None:
            del values["optimizer"]["compiled"]
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
    """Raise a ValueError that names the config key and the choices, unless ``value`` is one of
    them.
    """
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


def compose_config(overrides: Sequence[str]) -> Config:
    """The configuration that ``train.py`` makes of these overrides.

    Raises:
        ValueError: an override that cannot be, in itself or beside the others; the message names
            the key.
    """
    register_schemas()
    try:
        check_choices(overrides)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explained(error)) from error
    return resolve(composed)


def compose_alike(overrides: Sequence[str]) -> Config:
    """As :func:`compose_config`, faster for many that differ in values: equal choices of groups are
    composed once.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        choices = [
            each
            for each in parsed
            if (CONFIGS / each.key_or_group).is_dir() or not sets_a_value(each)
        ]
        config = copy.deepcopy(chosen(tuple(str(each.input_line) for each in choices)))
        for each in parsed:
            if each not in choices:
                OmegaConf.update(config, each.key_or_group, each.value())
        return resolve(config)
    except (HydraException, OmegaConfBaseException, ValueError):
        return compose_config(overrides)  # which says what is wrong


def sets_a_value(override: Override) -> bool:
    """Whether an override is KEY=VALUE, and neither adds, deletes, sweeps nor moves anything."""
    return (
        override.type is OverrideType.CHANGE
        and override.package is None
        and not override.is_sweep_override()
    )


@functools.cache
def chosen(choices: tuple[str, ...]) -> DictConfig:
    """What Hydra composes of these choices."""
    register_schemas()
    check_choices(choices)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=list(choices))


def check_choices(arguments: Sequence[str]) -> None:
    """What Hydra does not say in its own words: that ``slt=false`` is no choice of the group slt.

    Args:
        arguments: of the command line; flags are left out.

    Raises:
        HydraException: an override that cannot be read, or a group that is given a number, a
            boolean or null.
    """
    overrides = [each for each in arguments if "=" in each and not each.startswith("-")]
    for override in OverridesParser.create().parse_overrides(overrides):
        group, value = override.key_or_group, override.value()
        choices = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        if choices and (value is None or isinstance(value, int | float)):
            written = override.get_value_string()
            raise ConfigCompositionException(
                f"Invalid {group}={written}: expected one of {', '.join(choices)}"
            )


def resolve(config: DictConfig) -> Config:
    """The typed, validated configuration of a composed one.

    Raises:
        ValueError: a key that does not exist, or a value out of range; the message names the key.
    """
    try:
        check_entries(config)
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(explained(error)) from error
    assert isinstance(resolved, Config)
    return resolved


def check_entries(config: DictConfig, place: str = "") -> None:
    """What no schema says for itself: keys that were appended (``+training.epochs=3``), and numbers
    of any key.

    Raises:
        ValueError: an unknown key, a number that is not finite or larger than any use.
    """
    schema = OmegaConf.get_type(config)
    assert schema is not None
    known = {each.name for each in dataclasses.fields(schema)}
    for name, value in config.items():
        key = f"{place}{name!s}"
        if name not in known:
            raise ValueError(unknown_key(key, schema))
        if isinstance(value, DictConfig):
            check_entries(value, f"{key}.")
        for number in value if isinstance(value, ListConfig) else [value]:
            if isinstance(number, float):
                require(
                    key,
                    value,
                    abs(number) <= LARGEST_FLOAT,
                    f"finite, and at most {LARGEST_FLOAT:g} in size",
                )
            elif isinstance(number, int):
                require(
                    key, value, abs(number) <= LARGEST_INTEGER, f"at most {LARGEST_INTEGER} in size"
                )


def restored(values: dict[str, Any]) -> Config:
    """The configuration that a run's ``run.json`` holds, for one process.

    A gauge that was on is one if the model has it: in older files that is all that ``true`` says.

    Raises:
        ValueError: the run was made by a version of the code with other keys, or the file was
            edited since.
    """
    schema, model = OmegaConf.structured(Config), values["model"].get("name", "gpt")
    try:
        schema.optimizer = OmegaConf.structured(OPTIMIZERS[values["optimizer"]["name"]])
        schema.model, schema.data = (
            OmegaConf.structured(MODELS[model]),
            OmegaConf.structured(DATA[model]),
        )
        merged = OmegaConf.merge(
            schema, {key: value for key, value in values.items() if key != "launcher"}
        )
        for kind in KINDS:
            merged.gauges[kind] = None if merged.gauges[kind] else merged.gauges[kind]
    except OmegaConfBaseException as error:
        raise ValueError(f"{MISFIT}: {explained(error)}") from error
    except KeyError as error:
        raise ValueError(f"{MISFIT}: there is no {error}") from error
    assert isinstance(merged, DictConfig)
    return resolve(merged)
