"""``train.py --help``: which choices there are, and every key with its value and what it means."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from ddc.training.compose import choices_of, compose_config

HEAD = """\
Train one model:  python train.py [CHOICE ...] [KEY=VALUE ...]

  python train.py experiment=lm_overtrain optimizer=adamw seed=1 optimizer.weight_decay=0.3
  python train.py --multirun experiment=lm_overtrain optimizer=adamw,ddcadam seed=0,1,2

The same command goes on with a run that was stopped. --cfg job shows the composed configuration and
trains nothing, --multirun takes lists of values, --hydra-help has Hydra's own flags.
"""
#: Groups in the order in which they are told of; ``size`` goes by model and scale.
GROUPS = (
    *("experiment", "model", "data", "optimizer", "gauges", "scale", "slt", "launcher", "wandb"),
    "hydra/launcher",
)
#: Whether a word on the command line asks for help.
FLAGS = ("--help", "-h")


def help_text(overrides: Sequence[str]) -> str:
    """The help that goes with some overrides: their choices decide which keys there are.

    Raises:
        ValueError: overrides that cannot be.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    config = compose_config(overrides)
    lines = [HEAD, "Choices:"]
    for group in GROUPS:
        lines += entry(f"{group}=", ", ".join(choices_of(group)), width, 18)
    given = " ".join(overrides) or "no overrides"
    lines.append(f"\nKeys, with their values under {given} (other choices have other keys):")
    section = ""
    for key, value, words in keys(config):
        if (here := key.rpartition(".")[0]) != section:
            section = here
            lines.append("")
        lines += entry(f"{key}={shown(value)}", words, width, 38)
    return "\n".join(lines)


def keys(config: Any, place: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every key of a configuration with its value and its words; those of groups come last."""
    words, groups = explanations(type(config)), []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            groups.append((f"{place}{field.name}.", value))
        elif not (place and field.name == "name"):  # which its group chooses
            yield f"{place}{field.name}", value, words.get(field.name, "")
    for inner, value in groups:
        yield from keys(value, inner)


def explanations(schema: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of its fields, under ``Args``."""
    found: dict[str, str] = {}
    for each in reversed(schema.__mro__):
        _, _, arguments = inspect.cleandoc(each.__doc__ or "").partition("\nArgs:\n")
        arguments = re.split(r"\n(?=\S)", arguments)[0]
        for item in re.split(r"\n(?=    \S)", f"\n{arguments}"):
            names, colon, words = item.strip().partition(": ")
            if colon:
                plain = " ".join(re.sub(r"``|:\w+:`([\w.]*\.)?|`", "", words).split())
                found |= dict.fromkeys(names.split(", "), plain)
    return found


def entry(term: str, words: str, width: int, indent: int) -> list[str]:
    """A term and its explanation, in lines; a long term has one of its own."""
    wrapped = textwrap.wrap(words, width - indent - 2) or [""]
    if len(term) > indent - 2:
        wrapped.insert(0, "")
    rest = [f"  {'':{indent}}{line}" for line in wrapped[1:]]
    return [f"  {term:{indent}}{wrapped[0]}".rstrip(), *rest]


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return str(value)
