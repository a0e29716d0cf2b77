"""Optimizers by configuration."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ddc.gauges import Gauge, GaugeSet, HiddenMatrix, Rescale, is_split, plain_name
from ddc.optim import rules
from ddc.optim.combined import CombinedOptimizer
from ddc.optim.ddcadam import DDCAdam
from ddc.optim.ddcmuon import DDCMuon
from ddc.optim.decay import decay_groups
from ddc.optim.fused import available
from ddc.optim.lift import Lift
from ddc.optim.muon import Muon
from ddc.optim.mup import embeddings, mup_groups
from ddc.optim.parameters import listed
from ddc.optim.relative_step import AdamH, RelativeAdamW
from ddc.optim.saved import check_shapes, in_own_order, parameter_names, saved_ids
from ddc.optim.sharding import split_like

#: A step takes long to compile; what that saves in a smaller model does not make up for that in a
#: run.
COMPILED_FROM = 5_000_000


def lifts() -> dict[str, type[Lift]]:
    """Lifts by the name that configurations have, which is that of their class in small letters:
    DDCAdam, also for the paper's step, and those that stand beside their rules in
    ``ddc/optim/rules``, found by looking.
    """
    found: dict[str, type[Lift]] = {"ddcadam": DDCAdam, "ddcadam_paper": DDCAdam}
    for file in pkgutil.iter_modules(rules.__path__):
        module = importlib.import_module(f"{rules.__name__}.{file.name}")
        for each in vars(module).values():
            if isinstance(each, type) and issubclass(each, Lift) and each is not Lift:
                found[each.__name__.lower()] = each
    return found


#: All of them; the schema of a configuration is read from the class.
LIFTS = lifts()


def make_muon(
    groups: list[dict[str, Any]],
    matrices: Sequence[HiddenMatrix],
    *,
    lr: float,
    adam_lr: float,
    momentum: float,
    nesterov: bool,
    adjust_lr_fn: str,
    orthogonalizer: str,
    betas: tuple[float, float],
    eps: float,
) -> CombinedOptimizer:
    """The baseline: Muon for hidden matrices, ``torch.optim.AdamW`` for the rest; of groups as of
    :func:`ddc.optim.decay.decay_groups`.
    """
    names = {matrix.parameter for matrix in matrices}

    def those(are_hidden: bool) -> list[dict[str, Any]]:
        mine = []
        for group in groups:
            params = [(n, p) for n, p in group["params"] if (plain_name(n) in names) == are_hidden]
            mine += [{**group, "params": params}] if params else []
        return mine

    muon = Muon(
        those(True),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        adjust_lr_fn=adjust_lr_fn,
        orthogonalizer=orthogonalizer,
    )
    adamw = make_adamw(those(False), lr=adam_lr, betas=betas, eps=eps)
    return CombinedOptimizer((muon, adamw))


def make_adamw(groups: list[dict[str, Any]], **options: Any) -> AdamW:
    """``torch.optim.AdamW``; like our own optimizers, it loads states by name, and of whole tensors
    where it has parts.

    Raises:
        ValueError: in ``load_state_dict``, a state of other parameters or of another optimizer.
    """
    optimizer = AdamW(listed(groups, AdamW.__name__), fused=True, **options)
    optimizer.register_load_state_dict_pre_hook(fitted_state)
    return optimizer


def make_relative_adamw(
    model: nn.Module,
    decaying: list[dict[str, Any]],
    *,
    lr: float,
    adam_lr: float,
    steps: Mapping[str, float],
    **options: Any,
) -> RelativeAdamW:
    """AdamW whose step of each matrix has the length ``lr`` relative to it, times that of ``steps``
    if these name it; of groups as of :func:`ddc.optim.decay.decay_groups`.

    Raises:
        ValueError: ``steps`` are given, and not of all matrices.
    """
    groups = [
        {
            **group,
            "params": [(name, param)],
            "lr": lr * steps.get(plain_name(name), 1.0) if param.ndim >= 2 else adam_lr,
        }
        for group in decaying
        for name, param in group["params"]
    ]
    matrices = {plain_name(name) for name, param in model.named_parameters() if param.ndim >= 2}
    if steps and (missing := matrices - set(steps)):
        raise ValueError(
            f"Invalid optimizer.steps_of: that run has no matrix {min(missing)}; take one of this"
            " model"
        )
    optimizer = RelativeAdamW(groups, fused=True, **options)
    optimizer.register_load_state_dict_pre_hook(fitted_state)
    return optimizer


def make_adamh(
    model: nn.Module, decaying: list[dict[str, Any]], *, lr: float, adam_lr: float, **options: Any
) -> AdamH:
    """Matrices of constant norm, but for embeddings, which take AdamW's step with vectors.

    The groups ``decaying`` are as of :func:`ddc.optim.decay.decay_groups`.
    """
    tables = embeddings(model)
    groups: list[dict[str, Any]] = [
        {**group, "params": [(name, param)]}
        | (
            {"lr": lr, "weight_decay": 0.0, "hold_norm": True}
            if param.ndim >= 2 and plain_name(name) not in tables
            else {"lr": adam_lr, "hold_norm": False}
        )
        for group in decaying
        for name, param in group["params"]
    ]
    optimizer = AdamH(groups, fused=True, **options)
    optimizer.register_load_state_dict_pre_hook(fitted_state)
    return optimizer


def fitted_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict in the optimizer's order, with tensors of a parameter's shape split as the
    parameter is.
    """
    state_dict = in_own_order(optimizer, state_dict)
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    param_of = dict(zip(saved_ids(state_dict["param_groups"]), params, strict=True))
    for name, (i, param) in zip(parameter_names(optimizer), param_of.items(), strict=True):
        if saved := state_dict["state"].get(i):  # it has none before its first step
            check_shapes(
                name, saved, {"step": (), "exp_avg": param.shape, "exp_avg_sq": param.shape}
            )

    def split(value: Any, param: Tensor) -> Any:
        return (
            split_like(value, param)
            if isinstance(value, Tensor) and value.shape == param.shape
            else value
        )

    state = {
        i: {key: split(value, param_of[i]) for key, value in values.items()}
        for i, values in state_dict["state"].items()
        if i in param_of
    }
    return {**state_dict, "state": state}


def require_no_offset(gauges: Iterable[Gauge], optimizer: str) -> None:
    """Raise ValueError for a gauge that scales a parameter plus a number, which an optimizer that
    decays the parameter itself moves along its orbit.
    """
    for gauge in gauges:
        if isinstance(gauge, Rescale) and any(axis.offset for axis in gauge.plus + gauge.minus):
            raise ValueError(
                f"optimizer.decay_on=consistent: {gauge} scales 1 + a parameter, which the decay of"
                f" {optimizer} does not; take optimizer.decay_on=matrices, or a DDC optimizer"
            )


def make_optimizer(
    name: str,
    model: nn.Module,
    gauges: GaugeSet,
    weight_decay: float,
    hidden: Sequence[HiddenMatrix] = (),
    decay_on: str = "matrices",
    **options: Any,
) -> Optimizer:
    """The optimizer of this name over the model's parameters.

    Args:
        name: one of ``ddc.training.schema.OPTIMIZERS``.
        model: whole or split over ranks; gauges and hidden matrices are found before it is split.
        gauges: for the optimizers that respect any, and for a decay that is consistent with them.
        weight_decay: of what decays.
        hidden: :func:`ddc.hidden_matrices`, for Muon and DDCMuon.
        decay_on: as of :func:`ddc.optim.decay.decay_groups`; muP has its own.
        options: the optimizer's own; ``width_ratio`` of AdamW is that of muP
            (:func:`ddc.optim.mup.mup_groups`); ``compiled=None`` compiles the step of a model of
            :data:`COMPILED_FROM` parameters or more on a CPU, where there is a compiler and kernels
            do not step it.

    Raises:
        ValueError: an unknown name, a hyperparameter out of range, or no compiler where one is
            needed.
    """
    if decay_on == "consistent" and name not in (*LIFTS, "ddcmuon"):
        require_no_offset(gauges, name)
    groups = decay_groups(model, weight_decay, decay_on, gauges)
    if "compiled" in options:
        by_kernels = name == "ddcadam" and not options.get("additive")
        options["compiled"] = compiled_step(options["compiled"], model, by_kernels)
    if name in LIFTS:
        lift: Callable[..., Lift] = LIFTS[name]
        return lift(groups, gauges, **options)
    match name:
        case "adamw":
            ratio = options.pop("width_ratio", None)
            if ratio is not None:
                groups = mup_groups(model, weight_decay, options["lr"], ratio)
            return make_adamw(groups, **options)
        case "adamh":
            return make_adamh(model, groups, **options)
        case "adamw_relative":
            return make_relative_adamw(model, groups, **options)
        case "muon":
            return make_muon(groups, hidden, **options)
        case "ddcmuon":
            return DDCMuon(groups, gauges, hidden, **options)
    names = ", ".join(("adamw", "adamw_relative", "adamh", "muon", "ddcmuon", *LIFTS))
    raise ValueError(f"Invalid optimizer.name={name!r}: expected one of {names}")


def compiled_step(wanted: bool | None, model: nn.Module, by_kernels: bool) -> bool:
    """Whether to compile the step: see :func:`make_optimizer`.

    Args:
        wanted: None leaves it to the model.
        model: whose step it is.
        by_kernels: whether kernels step it where there are any.
    """
    parameters = listed(model.parameters(), "an optimizer")
    if any(map(is_split, parameters)):
        if wanted:
            raise ValueError(
                "Invalid optimizer.compiled=true: a step on parameters that are split over"
                " processes (launcher.parallel=fsdp) is not compiled; set it to null"
            )
        return False
    on_cpu = parameters[0].device.type == "cpu"
    # torch's own choice
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    there = shutil.which(compiler) is not None
    if wanted is None:  # elsewhere nobody has tried
        large = sum(p.numel() for p in parameters) >= COMPILED_FROM
        return on_cpu and there and large and not (by_kernels and available(parameters[0].device))
    if wanted and on_cpu and not there:
        raise ValueError(
            f"Invalid optimizer.compiled=true: there is no C++ compiler {compiler!r}. Install one,"
            " name another in the environment variable CXX, or set optimizer.compiled=false"
        )
    return wanted
