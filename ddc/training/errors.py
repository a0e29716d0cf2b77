"""What Hydra and OmegaConf find wrong with a configuration, in one line that names the key."""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

#: Which data a model reads, as said where they do not fit together.
WHO_READS_WHAT = (
    "model=gpt and model=causal_lm read text (data=shakespeare), model=vit images (data=mnist_5k),"
    " model=deep_mlp pairs (data=modular)"
)


def explained(error: HydraException | OmegaConfBaseException) -> str:
    """The error in one line: which key, what is wrong, what is expected."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = [each for each in error.options or () if not each.startswith("schema_")]
        expected = f"one of {', '.join(options)}" if options else "one that train.py --help lists"
        return f"Invalid {group}={choice}: expected {expected}"
    if isinstance(error, OverrideParseException):
        return (
            f"Invalid override {error.override!r}: expected KEY=VALUE, both as Hydra's grammar has"
            " them"
        )
    cause = (
        error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    )
    schema: Any = getattr(cause, "object_type", None)
    typed = isinstance(schema, type) and dataclasses.is_dataclass(schema)
    match cause:
        case InterpolationKeyError(full_key="_dummy_"):  # what the name of the size refers to
            group = str(cause).split("'")[1]
            return f"Invalid {group}: expected one choice, {group}=NAME"
        case ConfigAttributeError() | ConfigKeyError() if typed:
            return unknown_key(str(cause.full_key), schema)
        case MissingMandatoryValue():
            return f"Missing {cause.full_key}: give it by {cause.full_key}=VALUE"
        case OmegaConfBaseException() if typed and cause.full_key:
            kinds = [
                f"; expected {field.type}"
                for field in dataclasses.fields(schema)
                if field.name == cause.key
            ]
            return f"Invalid {cause.full_key}: {str(cause).splitlines()[0]}" + "".join(kinds)
    return " ".join(str(error).split())


def unknown_key(key: str, schema: type) -> str:
    """What is said of a key that a schema does not have."""
    known = ", ".join(field.name for field in dataclasses.fields(schema))
    fix = f". {WHO_READS_WHAT}" if key.startswith("data.") else ""
    return f"Unknown key {key}: {schema.__name__} has {known}{fix}"
