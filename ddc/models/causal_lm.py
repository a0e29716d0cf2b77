"""Causal language models of transformers, from their configurations alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddc.compatibility import provide_torchvision_operators
from ddc.models.config import ModelConfig

#: Options that follow from other keys of the run.
DECIDED = {"vocab_size": "data.tokenizer", "max_position_embeddings": "model.context"}
#: All tokens are text: none is padding, whose embedding would not train.
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


@dataclass
class CausalLMConfig(ModelConfig):
    """Architecture of :class:`CausalLM`.

    Args:
        architecture: as ``model_type`` of transformers has it: ``llama``, ``qwen2``, ``gpt_neox``
            and so on.
        context: tokens of a sequence.
        options: of its configuration class, by its own names (``hidden_size``,
            ``num_hidden_layers``). What is not named has its default there, but for dropout, which
            is 0: a run that is resumed would not draw the same.

    Raises:
        ValueError: on construction, a context below 1, or an option that follows from another key.
    """

    name: str = "causal_lm"
    architecture: str = "llama"
    context: int = 128
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 1:
            raise ValueError(f"Invalid model.context={self.context}: expected a positive integer")
        for key in self.options:
            if key in DECIDED:
                raise ValueError(
                    f"Invalid model.options.{key}: it follows from {DECIDED[key]}; leave it out"
                )
            if "drop" in key:
                raise ValueError(
                    f"Invalid model.options.{key}: models train without dropout here, so that a"
                    " resumed run is the same; leave it out"
                )

    @property
    def absent_gauges(self) -> dict[str, str]:
        return {}  # found out by the trace of the model


class CausalLM(nn.Module):
    """A causal language model of transformers, at the start that its class gives it.

    Args:
        config: the architecture.
        vocab_size: of the tokens.

    Attributes:
        model: of transformers, such as ``LlamaForCausalLM``.

    Raises:
        ValueError: an architecture that transformers does not have, an option that its
            configuration does not have, or options that do not fit together.
    """

    def __init__(self, config: CausalLMConfig, vocab_size: int) -> None:
        super().__init__()
        provide_torchvision_operators()  # before transformers, beside a torch without CUDA
        from transformers import AutoModelForCausalLM

        self.vocab_size = vocab_size
        options = options_of(config, vocab_size)
        try:
            self.model = AutoModelForCausalLM.from_config(options)
        except (ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"Invalid model.architecture={config.architecture} with"
                f" model.options={config.options}: {reason}"
            ) from error
        if not self.is_causal():
            raise ValueError(
                f"Invalid model.architecture={config.architecture}: tokens see those after them;"
                " expected a causal language model"
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) of tokens (batch, time), int64."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    @torch.no_grad()
    def is_causal(self) -> bool:
        """Whether logits depend on no later token, tried on two short sequences; true without
        values (on the meta device).
        """
        (tokens,) = self.example_inputs()
        if tokens.is_meta:
            return True
        changed = tokens.clone()
        changed[:, -1] = (tokens[:, -1] + 1) % self.vocab_size
        return torch.equal(self(tokens)[:, :-1], self(changed)[:, :-1])

    def example_inputs(self) -> tuple[Tensor]:
        """Two short sequences, for a trace."""
        device = next(self.parameters()).device
        return (torch.arange(6, device=device).remainder(self.vocab_size).view(2, 3),)


def options_of(config: CausalLMConfig, vocab_size: int) -> Any:
    """The configuration of transformers.

    Raises:
        ValueError: as of :class:`CausalLM`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    name = config.architecture
    try:
        known = AutoConfig.for_model(name)
    except ValueError:
        raise ValueError(
            f"Invalid model.architecture={name}: expected a model_type of transformers, such as"
            " llama, qwen2 or gpt_neox"
        ) from None
    for key in config.options:
        if not hasattr(known, key):
            raise ValueError(
                f"Invalid model.options.{key}: {type(known).__name__} has no such option; leave it"
                f" out by ~model.options.{key}"
            )
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": config.context}
    try:
        options = AutoConfig.for_model(name, **config.options, **sizes, **NO_TOKENS)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Invalid model.options={config.options}: {reason}") from error
    for key, value in vars(options).items():
        if "drop" in key and isinstance(value, float):
            setattr(options, key, 0.0)
    return options
