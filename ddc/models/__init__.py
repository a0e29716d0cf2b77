"""Models in which the choices that make or break a gauge are configuration."""

from ddc.models.config import ModelConfig
from ddc.models.deep_mlp import DeepMLP, DeepMLPConfig
from ddc.models.gpt import GPT, GPTConfig
from ddc.models.loss import cross_entropy

__all__ = ["GPT", "DeepMLP", "DeepMLPConfig", "GPTConfig", "ModelConfig", "cross_entropy"]
