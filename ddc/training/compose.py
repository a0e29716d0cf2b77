"""From overrides to the configuration of a run, by Hydra."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddc.data import ImageConfig, ModularConfig, TextConfig
from ddc.gauges import KINDS, complete_kinds
from ddc.models import MODELS
from ddc.training.errors import explained, unknown_key
from ddc.training.schema import DATA, LARGEST_FLOAT, OPTIMIZERS, Config, require

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: The group ``experiment`` is ``run.yaml`` of each folder here.
EXPERIMENTS = CONFIGS.parent / "experiments"
#: No integer of a configuration is larger: torch's are not.
LARGEST_INTEGER = 2**31 - 1
MISFIT = "the run's configuration does not fit this version of the code"


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
    for group, choices in made_choices().items():
        for name, node in choices.items():
            package = "_global_" if group == "experiment" else None
            store.store(group=group, name=name, node=node, package=package)


@functools.cache
def made_choices() -> dict[str, dict[str, Any]]:
    """Choices that are made here, and not of files in ``configs``: ``experiment``, of ``run.yaml``
    in each folder of experiments, which is global and holds model, data and training only;
    ``gauges``, of the kinds; and ``optimizer``, of the schemas, where there is no file.
    """
    optimizers = [name for name in OPTIMIZERS if not (CONFIGS / f"optimizer/{name}.yaml").exists()]
    defaults = {name: None for name, kind in KINDS.items() if kind.default}
    return {
        "experiment": {name: OmegaConf.load(path) for name, path in experiments().items()},
        "gauges": {
            **dict.fromkeys(("all", "paper"), defaults),
            "complete": dict.fromkeys(complete_kinds()),
            "none": {},
            **{kind: {kind: True} for kind in KINDS},
        },
        "optimizer": {
            name: OmegaConf.create({"defaults": [f"schema_{name}", "_self_"]})
            for name in optimizers
        },
    }


def experiments() -> dict[str, Path]:
    """``run.yaml`` of experiments by name."""
    return {path.parent.name: path for path in sorted(EXPERIMENTS.glob("*/run.yaml"))}


def compose_config(overrides: Sequence[str]) -> Config:
    """The configuration that ``train.py`` makes of these overrides.

    Raises:
        ValueError: an override that cannot be, in itself or beside the others; the message names
            the key.
    """
    register_schemas()
    overrides = spelled_out(overrides)
    try:
        check_choices(overrides)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explained(error)) from error
    return resolve(composed)


def compose_alike(overrides: Sequence[str]) -> Config:
    """As :func:`compose_config`, faster for many that differ in values: equal choices of groups are
    composed once.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(spelled_out(overrides))
        choices = [
            each for each in parsed if choices_of(each.key_or_group) or not sets_a_value(each)
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


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Arguments in Hydra's words: what is in no defaults list, as no experiment is, is added by a
    plus.
    """
    return [f"+{each}" if each.startswith("experiment=") else each for each in arguments]


def choices_of(group: str) -> list[str]:
    """What may be chosen of a group of configurations; nothing if there is no such group."""
    files = (path.stem for path in (CONFIGS / group).glob("*.yaml"))
    return sorted({*files, *made_choices().get(group, ())})


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
        choices = choices_of(group)
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
    typed = schema if dataclasses.is_dataclass(schema) else None  # else a dict, of any keys
    known = {each.name for each in dataclasses.fields(typed)} if typed else set()
    for name, value in config.items():
        key = f"{place}{name!s}"
        if typed and name not in known:
            raise ValueError(unknown_key(key, typed))
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
