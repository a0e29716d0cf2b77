"""Models by their configuration, and as a folder of weights and configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from ddc.models.config import ModelConfig
from ddc.models.deep_mlp import DeepMLP, DeepMLPConfig
from ddc.models.gpt import GPT, GPTConfig
from ddc.models.vit import ViTConfig, vision_transformer

#: Configurations of all models by name.
MODELS: dict[str, type[ModelConfig]] = {"gpt": GPTConfig, "vit": ViTConfig, "deep_mlp": DeepMLPConfig}
WEIGHTS, CONFIG = "model.safetensors", "model.json"


def build_model(config: ModelConfig, **sizes: Any) -> nn.Module:
    """The model of a config, at its initialisation.

    Args:
        config: the architecture.
        sizes: what the data decides: ``vocab_size`` of a GPT, ``shape`` of the images and ``classes`` of a vision
            transformer, ``tokens`` and ``classes`` of a deep MLP.

    Raises:
        ValueError: sizes that do not fit the architecture.
    """
    match config:
        case GPTConfig():
            return GPT(config, **sizes)
        case ViTConfig():
            return vision_transformer(config, **sizes)
        case DeepMLPConfig():
            return DeepMLP(config, **sizes)
    raise TypeError(f"no model has the configuration {type(config).__name__}")


def save_model(folder: Path, model: nn.Module, config: ModelConfig, sizes: dict[str, Any], **about: Any) -> None:
    """Write ``model.safetensors`` and ``model.json`` to a folder, for :func:`load_model`.

    Args:
        folder: made if need be.
        model: the weights.
        config: as for :func:`build_model`.
        sizes: likewise.
        about: whatever else a reader should know, for ``model.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_model(model, str(folder / WEIGHTS))  # keeps one name of a weight that has two
    (folder / CONFIG).write_text(json.dumps({"model": dataclasses.asdict(config), "sizes": sizes, **about}, indent=1))


def load_model(folder: Path | str) -> nn.Module:
    """The model that :func:`save_model` wrote, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: its weights do not fit its configuration.
    """
    folder = Path(folder)
    about = json.loads((folder / CONFIG).read_text())
    config = MODELS[about["model"]["name"]](**about["model"])
    model = build_model(config, **about["sizes"])
    try:
        safetensors.torch.load_model(model, str(folder / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {error}") from error
    return model.eval()
