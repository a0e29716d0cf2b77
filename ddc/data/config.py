"""What the configurations of all data sets share."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


class DataError(ValueError):
    """The data cannot be had or used; the message says which config key to change."""


@dataclass
class DataConfig:
    """Base of the data sets; ``name`` says which one."""

    name: str = MISSING
