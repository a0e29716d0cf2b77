"""Models in which the choices that make or break a gauge are configuration."""

from ddc.models import structure  # registers what gauges and layers the models have
from ddc.models.causal_lm import CausalLM, CausalLMConfig
from ddc.models.config import ModelConfig
from ddc.models.deep_mlp import DeepMLP, DeepMLPConfig
from ddc.models.gpt import GPT, GPTConfig
from ddc.models.loss import cross_entropy
from ddc.models.saved import MODELS, build_model, check_fit, load_model, save_model
from ddc.models.vit import ViTConfig, vision_transformer

__all__ = [
    "GPT",
    "MODELS",
    "CausalLM",
    "CausalLMConfig",
    "DeepMLP",
    "DeepMLPConfig",
    "GPTConfig",
    "ModelConfig",
    "ViTConfig",
    "build_model",
    "check_fit",
    "cross_entropy",
    "load_model",
    "save_model",
    "structure",
    "vision_transformer",
]
