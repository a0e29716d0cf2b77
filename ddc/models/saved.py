"""Models by their configuration, and as a folder of weights and configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor, nn

from ddc.models.causal_lm import CausalLM, CausalLMConfig
from ddc.models.config import ModelConfig
from ddc.models.deep_mlp import DeepMLP, DeepMLPConfig
from ddc.models.gpt import GPT, GPTConfig
from ddc.models.vit import ViTConfig, vision_transformer

#: Configurations of all models by name.
MODELS: dict[str, type[ModelConfig]] = {
    "gpt": GPTConfig,
    "causal_lm": CausalLMConfig,
    "vit": ViTConfig,
    "deep_mlp": DeepMLPConfig,
}
WEIGHTS, CONFIG = "model.safetensors", "model.json"


def build_model(config: ModelConfig, **sizes: Any) -> nn.Module:
    """The model of a config, at its initialisation.

    Args:
        config: the architecture.
        sizes: what the data decides: ``vocab_size`` of a language model, ``shape`` of the images
            and ``classes`` of a vision transformer, ``tokens`` and ``classes`` of a deep MLP.

    Raises:
        ValueError: sizes that do not fit the architecture.
    """
    match config:
        case GPTConfig():
            return GPT(config, **sizes)
        case CausalLMConfig():
            return CausalLM(config, **sizes)
        case ViTConfig():
            return vision_transformer(config, **sizes)
        case DeepMLPConfig():
            return DeepMLP(config, **sizes)
    raise TypeError(f"no model has the configuration {type(config).__name__}")


def save_model(
    folder: Path, model: nn.Module, config: ModelConfig, sizes: dict[str, Any], **about: Any
) -> None:
    """Write ``model.safetensors`` and ``model.json`` to a folder, for :func:`load_model`.

    Args:
        folder: made if need be.
        model: the weights.
        config: as for :func:`build_model`.
        sizes: likewise.
        about: whatever else a reader should know, for ``model.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # keeps one name of a weight that has two
    safetensors.torch.save_model(model, str(folder / WEIGHTS))
    (folder / CONFIG).write_text(
        json.dumps({"model": dataclasses.asdict(config), "sizes": sizes, **about}, indent=1)
    )


def load_model(folder: Path | str) -> nn.Module:
    """The model that :func:`save_model` wrote, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: its configuration is none, or its weights do not fit it.
    """
    folder = Path(folder)
    text = (folder / CONFIG).read_text()
    try:
        about = json.loads(text)
        schema = OmegaConf.structured(MODELS[about["model"]["name"]])
        config = OmegaConf.to_object(OmegaConf.merge(schema, about["model"]))
        assert isinstance(config, ModelConfig)
        model = build_model(config, **about["sizes"])
    except (OmegaConfBaseException, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{folder / CONFIG} describes no model ({reason})") from error
    try:
        safetensors.torch.load_model(model, str(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {error}") from error
    return model.eval()


def check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: object) -> None:
    """Make sure that weights are those of a model, by names and shapes.

    Args:
        own: the model's, by name.
        given: what is to take their place.
        source: where that is from, for the message.

    Raises:
        ValueError: they are of another architecture; the message has the first difference.
    """
    for name in (*own, *given):
        shapes = [tuple(each[name].shape) if name in each else None for each in (given, own)]
        if shapes[0] != shapes[1]:
            theirs, mine = (
                "no such parameter" if shape is None else str(shape) for shape in shapes
            )
            raise ValueError(
                f"{source} is of another architecture: {name} is {theirs} there, {mine} in this"
                " model"
            )
