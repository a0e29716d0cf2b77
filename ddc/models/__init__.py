"""Models in which the choices that make or break a gauge are configuration."""

from ddc.models.gpt import GPT, GPTConfig, cross_entropy

__all__ = ["GPT", "GPTConfig", "cross_entropy"]
