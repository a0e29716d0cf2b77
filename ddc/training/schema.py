"""The configuration of a run: typed, validated, and hashed to the run's name."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from omegaconf import MISSING

from ddc.data import DataConfig, ImageConfig, ModularConfig, TextConfig
from ddc.gauges import KINDS, paper_kinds
from ddc.gauges.granularity import GRANULARITIES
from ddc.models import GPTConfig, ModelConfig
from ddc.optim.decay import DECAY_ON
from ddc.optim.factory import LIFTS
from ddc.optim.lift import Lift
from ddc.optim.ranges import expected
from ddc.optim.rules import Adam, Rule
from ddc.slt.config import SLTConfig
from ddc.training.errors import WHO_READS_WHAT

#: No number of a configuration is larger: products of two of them are finite in float32.
LARGEST_FLOAT = 1e15
SCHEDULES = ("constant", "cosine", "wsd")
PRECISIONS = ("float32", "bfloat16", "float16")
WEIGHTS = ("float32", "bfloat16", "float8")
PARALLEL = ("ddp", "fsdp")
WANDB_MODES = ("auto", "offline", "online", "disabled")


@dataclass
class OptimizerConfig:
    """What all optimizers share.

    Args:
        lr: learning rate, at its peak.
        weight_decay: decoupled.
        decay_on: what decays (:mod:`ddc.optim.decay`): ``matrices``, not vectors; ``all``
            parameters; or ``consistent`` with the gauges of the group ``gauges``, which are the
            paper's then: matrices and norm scales by shares that move nothing along an orbit.
        canonicalise: move the weights to the balanced point of their gauge orbit
            (:func:`ddc.canonicalise_`, along the gauges of the group ``gauges``): ``start``, before
            the first step; a number, then and after every so many steps; null, never. The state of
            the optimizer stays as it is: moments of the coordinates before.
    """

    name: str = MISSING
    lr: float = 1e-3
    weight_decay: float = 0.1
    decay_on: str = "matrices"
    canonicalise: str | None = None

    def __post_init__(self) -> None:
        own = type(self).name
        require(
            "optimizer.name",
            self.name,
            self.name == own,
            f"{own}; optimizer=NAME chooses another optimizer",
        )
        for key, value in vars(self).items():
            if key in ("lr", "adam_lr"):  # a schedule may bring them to 0, but none begins there
                require(f"optimizer.{key}", value, value > 0, "a positive number")
            wanted = expected(key, value)
            require(f"optimizer.{key}", value, wanted is None, wanted or "")
        require_one_of("optimizer.decay_on", self.decay_on, DECAY_ON)
        when = self.canonicalise
        require(
            "optimizer.canonicalise",
            when,
            when in (None, "start") or (when.isdecimal() and int(when) >= 1),
            "start, a positive number of steps, or null",
        )

    @property
    def canonicalise_every(self) -> int | None:
        """After how many steps, each time."""
        return None if self.canonicalise in (None, "start") else int(self.canonicalise)

    def check_by(self, rule: Rule) -> None:
        """Raise ValueError, with the key, for what a rule does not take."""
        try:
            rule.check(vars(self))
        except ValueError as error:
            raise ValueError(str(error).replace("Invalid ", "Invalid optimizer.", 1)) from None


@dataclass
class AdamConfig(OptimizerConfig):
    """Adam's hyperparameters, of all that has Adam in it.

    Args:
        betas: Adam's.
        eps: Adam's.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_by(Adam())


@dataclass
class AdamWConfig(AdamConfig):
    """``torch.optim.AdamW``.

    Args:
        base_width: a width of the GPT at which ``lr`` is meant; at others rates, decay and start
            are those of muP (:mod:`ddc.optim.mup`). null: no muP.
    """

    name: str = "adamw"
    base_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "optimizer.base_width",
            self.base_width,
            self.base_width is None or self.base_width >= 1,
            "a positive integer or null",
        )
        if self.base_width is not None and self.decay_on != "matrices":
            raise ValueError(
                f"Invalid optimizer.decay_on={self.decay_on} with"
                f" optimizer.base_width={self.base_width}: the decay of muP is on matrices; set one"
                " of them back"
            )


@dataclass
class AdamHConfig(AdamConfig):
    """:class:`ddc.optim.relative_step.AdamH`: AdamW with matrices of constant norm (hyperball).

    Args:
        lr: ``|ΔW| / |W|`` of every matrix but embeddings, before it gets its norm back.
        weight_decay: of embeddings.
        adam_lr: AdamW's rate, for embeddings and vectors.
    """

    name: str = "adamh"
    lr: float = 0.01
    adam_lr: float = 0.01


@dataclass
class RelativeAdamWConfig(AdamConfig):
    """:class:`ddc.optim.relative_step.RelativeAdamW`: AdamW whose steps of matrices have a given
    length.

    Args:
        lr: ``|ΔW| / |W|`` of every matrix.
        adam_lr: AdamW's rate, for vectors.
        steps_of: the folder of a run; a matrix then takes ``lr`` times the length that its steps
            have in the records of that run: their median.
    """

    name: str = "adamw_relative"
    lr: float = 0.003
    adam_lr: float = 1e-3
    steps_of: str | None = None


@dataclass
class LiftConfig(OptimizerConfig):
    """What all lifts share; :class:`ddc.DDCAdam` says more of the keys.

    Args:
        radial_rate: the rate of norms, relative to that of directions; 0 freezes norms.
        vertical: the gauge coordinate: ``freeze`` leaves it, ``adam`` steps on its gradient,
            ``balance`` relaxes it to 0.
        step_scale: of directions: ``init``, √fan_in · rms(W), or ``norm``, the paper's.
        retract: keep norms under the step of directions.
        additive: the order of the paper's companion: decay, then the exponential on W alone.
        compiled: compile the step; null: on a CPU, from five million parameters on, where no
            kernels do its arithmetic.
    """

    radial_rate: float = 1.0
    vertical: str = "freeze"
    step_scale: str = "init"
    retract: bool = True
    additive: bool = False
    compiled: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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

    :class:`ddc.optim.muon.Muon` says more of the keys.

    Args:
        lr: Muon's.
        adam_lr: AdamW's.
        betas, eps: AdamW's.
        momentum: Muon's.
        nesterov: look ahead by the momentum.
        adjust_lr_fn: the scale of an update: ``original`` (√max(1, rows/columns)) or
            ``match_rms_adamw`` (0.2 √max(rows, columns), Moonlight's).
        orthogonalizer: ``newton_schulz``, ``newton_schulz_bfloat16`` or ``polar`` (exact).
    """

    name: str = "muon"
    lr: float = 0.02
    adam_lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    adjust_lr_fn: str = "original"
    orthogonalizer: str = "newton_schulz"


@dataclass
class DDCMuonConfig(DDCAdamConfig):
    """:class:`ddc.DDCMuon`, which says more of the keys.

    Args:
        lr: the angle in radians by which a hidden matrix turns in a step.
        adam_lr: DDCAdam's, for all else.
        momentum: of hidden matrices.
        nesterov: look ahead by the momentum.
        orthogonalizer: ``newton_schulz``, ``newton_schulz_bfloat16`` or ``polar`` (exact).
        per_head: attention matrices head by head, as :func:`ddc.hidden_matrices` has them.
    """

    name: str = "ddcmuon"
    lr: float = 0.02
    adam_lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    orthogonalizer: str = "newton_schulz"
    per_head: bool = False


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
        self.check_by(lift.rule)

    about = {"__post_init__": check, "__doc__": lift.__doc__, "__module__": __name__}
    fields: list[Any] = [("name", str, field(default=name)), *own]
    return make_dataclass(f"{lift.__name__}Config", fields, bases=(LiftConfig,), namespace=about)


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamWConfig,
    "adamw_relative": RelativeAdamWConfig,
    "adamh": AdamHConfig,
    "ddcadam": DDCAdamConfig,
    "ddcadam_paper": DDCAdamPaperConfig,
    "muon": MuonConfig,
    "ddcmuon": DDCMuonConfig,
}
OPTIMIZERS |= {
    name: lift_schema(name, lift) for name, lift in LIFTS.items() if name not in OPTIMIZERS
}
# runs of a sweep are pickled, and a class is found by its name
globals().update({schema.__name__: schema for schema in OPTIMIZERS.values()})
#: Kinds of gauge that are in every run's identity, wanted or not: those that there were when runs
#: got their names. Later ones are where they are wanted.
FIRST_KINDS = tuple(KINDS)[:7]
#: Which data a model reads.
DATA = {"gpt": TextConfig, "causal_lm": TextConfig, "vit": ImageConfig, "deep_mlp": ModularConfig}


if TYPE_CHECKING:

    class _Wanted:
        """A field for every kind of gauge, ``bool | None``, in the order of tables."""

else:
    _Wanted = make_dataclass("_Wanted", [(kind, bool | None, False) for kind in KINDS])


@dataclass
class GaugesConfig(_Wanted):
    """Which kinds of gauge the optimizer respects: a key for each of :data:`ddc.gauges.KINDS`.

    ``true``: the model must have the kind; ``null``: if the model has it; ``false``: not.
    ``gauges=all`` says null for all that are on by default, which are the paper's
    (``gauges=paper``), and ``gauges=complete`` for all there are.

    Args:
        logit_shift: one vector added to all rows of the head.
        relu_rescale: of each ReLU unit, in against out.
        chained_rescale: ``relu_rescale`` layer by layer instead of neuron by neuron: one of the
            two.
        gated_rescale: of each unit of a gated block, value against out.
        norm_scale: the scale of a norm against the matrices that read it.
        channel_scale: the scale of a batch norm against the convolutions that read it.
        value_rotation: of the values of a head, against its output.
        qk_rotation: of queries and keys of a head alike.
        factor_map: between two linear maps in a row, as of an adapter.
        factor_bias: of the first of two linear maps in a row, against that of the second.
        value_map: of the values of a head, against its output; contains ``value_rotation``.
        value_bias: of the values, against that of the output.
        qk_map: of keys against queries of a head; contains ``qk_rotation``.
        key_bias: added to all keys.
        qk_norm_scale: of normed queries against normed keys.
        stream_rotation: of the residual stream.
        stream_mean: added to all entries of what writes to a stream of LayerNorms.
        translation: of two tables, or biases, that are added.
        reader_shift: of what reads a LayerNorm.
        norm_shift: the shift of a norm against the biases of its readers.
        router_shift: one vector added to all rows of an expert router.
        score_shift: a number added to all relative positions' scores of a head.
        layer_scale: rows of a matrix against the vector that multiplies them.
        stream_scale, normed_scale, filter_scale: of what norms alone read; they hold at eps = 0
            alone, and need ``approximate``.
        approximate: take gauges that hold at eps = 0 alone, of kinds that are wanted.
        leave_out: go without the gauges that the optimizer refuses, and say which, in place of an
            error; not of kinds that are ``true``.
        granularity: of ReLU and gated rescales: ``unit``, a scale for each hidden unit, or
            ``block``, one for a pair of matrices, or for a layer of a chain
            (:func:`ddc.gauges.in_blocks`).
    """

    granularity: str = "unit"
    leave_out: bool = False
    approximate: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if KINDS[kind].approximate and not self.approximate:
                raise ValueError(
                    f"gauges.{kind}={str(getattr(self, kind) or 'null').lower()}: it is a symmetry"
                    " at eps = 0 alone. Set gauges.approximate=true to have the optimizer take it,"
                    f" or gauges.{kind}=false"
                )
        require_one_of("gauges.granularity", self.granularity, GRANULARITIES)
        if {"chained_rescale", "relu_rescale"} <= set(self.kinds):
            raise ValueError(
                "gauges.chained_rescale=true with gauges.relu_rescale=true: rescales of all neurons"
                " contain those of their layers; set one of them to false"
            )
        for kind in self.kinds:
            if (larger := KINDS[kind].within) in self.kinds:
                raise ValueError(
                    f"gauges.{kind}=true with gauges.{larger}=true: the second contains the first;"
                    " set one of them to false"
                )

    @property
    def kinds(self) -> list[str]:
        """All but those that are not wanted, in the order of tables."""
        return [kind for kind in KINDS if getattr(self, kind) is not False]

    @property
    def per_layer(self) -> bool:
        """As :func:`ddc.find_gauges` has it."""
        return "chained_rescale" in self.kinds


@dataclass
class TrainingConfig:
    """How long, how fast, on what.

    Args:
        steps: optimizer steps.
        batch_size: sequences, images or pairs a step, null for all training pairs.
        accumulation: equal parts in which a batch is taken.
        schedule: of the learning rate, after a linear warm-up: ``constant``, ``cosine``, or ``wsd``
            (constant, then linear).
        warmup: share of the steps.
        decay: share of the steps, the last, in which ``wsd`` falls.
        final_lr: at which ``cosine`` and ``wsd`` end, relative to the peak.
        max_grad_norm: clip to this norm (for DDCAdam the gauge-invariant one); null for none.
        evaluations: how many, evenly spread over the steps, besides the one before the first step.
        evaluation_batches: batches of each split that an evaluation reads.
        checkpoints: how many, evenly spread over the steps, the last at the end; null: one after
            each evaluation. Nothing of it changes the run or its id.
        gap_levels: train losses at which the summary gives the gap.
        accuracy_levels: validation accuracies of which the summary gives the first step that
            reaches them.
        resume: ``auto`` goes on from the last checkpoint, ``never`` starts over.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: of activations; weights stay in float32. Other than float32 on a GPU only.
        weights: what they are held in: after every step, and at the start, each is the nearest
            number of this format, and nothing finer is kept. ``bfloat16``; or ``float8``: e4m3 with
            a scale a matrix, vectors in bfloat16. All arithmetic, and the state of the optimizer,
            stay as they are (:mod:`ddc.training.formats`).
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
    checkpoints: int | None = None
    gap_levels: list[float] = field(default_factory=lambda: [1.5, 1.0, 0.5])
    accuracy_levels: list[float] = field(default_factory=list)
    resume: str = "auto"
    device: str = "auto"
    precision: str = "float32"
    weights: str = "float32"
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
            "training.checkpoints",
            self.checkpoints,
            self.checkpoints is None or self.checkpoints >= 1,
            "a positive integer or null",
        )
        require(
            "training.threads", self.threads, 1 <= self.threads <= 1024, "an integer from 1 to 1024"
        )
        for key, choices in (
            ("schedule", SCHEDULES),
            ("resume", ("auto", "never")),
            ("device", ("auto", "cpu", "cuda")),
            ("precision", PRECISIONS),
            ("weights", WEIGHTS),
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
class StartConfig:
    """Where the weights begin, if not at the model's initialisation.

    Args:
        weights: a folder of weights and configuration (:func:`ddc.models.save_model`; for
            ``model=causal_lm`` also one of transformers) of this architecture; null for the
            initialisation.
        spread: scales of every unit under a rescale gauge (of the group ``gauges``) are drawn
            log-normal with this standard deviation, and applied: another point of the same orbit,
            which computes the same. 0 for none.
    """

    weights: str | None = None
    spread: float = 0.0

    def __post_init__(self) -> None:
        require("start.spread", self.spread, 0 <= self.spread <= 5, "a number from 0 to 5")


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
        project: where the runs go.
        entity: whose project it is; null for one's own.
        group: of runs: the experiment; null for ``name``.
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
    """One run.

    Args:
        name: of the experiment, for the folder of its runs.
        seed: of weights, of the order of the data, and of what is drawn in training.
        runs: folder of all runs; a run's own is RUNS/NAME/OPTIMIZER-seedSEED-HASH.
    """

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    gauges: GaugesConfig = field(default_factory=GaugesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    start: StartConfig = field(default_factory=StartConfig)
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
        for key, given in (
            ("optimizer.canonicalise", self.optimizer.canonicalise),
            ("start.spread", self.start.spread),
        ):
            if given and not self.gauges.kinds:
                raise ValueError(
                    f"Invalid {key}={given} with gauges=none: there is no orbit to move on;"
                    " gauges=all takes all kinds of the model"
                )
        if self.optimizer.decay_on == "consistent" and (
            not self.gauges.kinds or {*self.gauges.kinds} - {*paper_kinds()}
        ):
            raise ValueError(
                "Invalid optimizer.decay_on=consistent with these gauges: it is consistent with"
                " those of the paper, and with one at least; set gauges=all"
            )
        if self.optimizer.canonicalise_every and self.launcher.parallel == "fsdp":
            raise ValueError(
                f"Invalid optimizer.canonicalise={self.optimizer.canonicalise} with"
                " launcher.parallel=fsdp: it moves whole tensors; use start, or ddp"
            )
        if self.training.weights != "float32" and self.launcher.parallel == "fsdp":
            raise ValueError(
                f"Invalid training.weights={self.training.weights} with launcher.parallel=fsdp: it"
                " rounds whole tensors; use float32, or ddp"
            )
        base_width = getattr(self.optimizer, "base_width", None)
        if base_width is not None and (
            not isinstance(self.model, GPTConfig) or self.model.tied_head
        ):
            raise ValueError(
                f"Invalid optimizer.base_width={base_width}: muP is for model=gpt with"
                " model.tied_head=false; set it to null"
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
        del values["training"]["checkpoints"]
        granularity = values["gauges"].pop("granularity")
        leave_out = values["gauges"].pop("leave_out")
        approximate = values["gauges"].pop("approximate")
        values["gauges"] = {
            kind: wanted is not False
            for kind, wanted in values["gauges"].items()
            if wanted is not False or kind in FIRST_KINDS
        }
        # keys that came later are left out where they say what had been so before: older runs keep
        # their names
        if granularity != "unit":
            values["gauges"]["granularity"] = granularity
        if leave_out:
            values["gauges"]["leave_out"] = leave_out
        if approximate:
            values["gauges"]["approximate"] = approximate
        if not values["optimizer"].get("additive", True):
            del values["optimizer"]["additive"]
        if values["optimizer"].get("base_width", 0) is None:
            del values["optimizer"]["base_width"]
        if not self.slt.readings:
            del values["slt"]
        if values["optimizer"].get("compiled", False) is None:
            del values["optimizer"]["compiled"]
        if values["optimizer"]["decay_on"] == "matrices":
            del values["optimizer"]["decay_on"]
        if values["optimizer"]["canonicalise"] is None:
            del values["optimizer"]["canonicalise"]
        if values["training"]["weights"] == "float32":
            del values["training"]["weights"]
        if self.start == StartConfig():
            del values["start"]
        if not values["data"].get("skip_tokens", True):
            del values["data"]["skip_tokens"]
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
