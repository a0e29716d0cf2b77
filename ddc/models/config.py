"""What the configurations of all models share."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """Base of the architectures; ``name`` says which one."""

    name: str = MISSING
