"""Causal language models of transformers, from their configurations alone."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddc.compatibility import provide_torchvision_operators
from ddc.models.config import ModelConfig

#: Options that follow from other keys of the run.
DECIDED = {"vocab_size": "data.tokenizer", "max_position_embeddings": "model.context"}
#: All tokens are text: none is padding, whose embedding would not train.
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
#: Options by which a model draws at random in training.
RANDOM = re.compile("drop|jitter")
#: Options that no function depends on, or that shapes tell.
NOT_OF_FUNCTION = {
    *(*DECIDED, *NO_TOKENS, "n_positions", "initializer_range", "init_std", "use_cache"),
    *("pretraining_tp", "router_aux_loss_coef", "output_router_logits", "output_attentions"),
}
#: Rotary positions that do not depend on how many there are.
PLAIN_ROPE = ("default", "linear")
#: Of what a causal model says, rounding is less; relative to the largest logit.
ROUNDING = 1e-4


@dataclass
class CausalLMConfig(ModelConfig):
    """Architecture of :class:`CausalLM`.

    Args:
        architecture: as ``model_type`` of transformers has it: ``llama``, ``qwen2``, ``gpt_neox``
            and so on.
        context: tokens of a sequence.
        options: of its configuration class, by its own names (``hidden_size``,
            ``num_hidden_layers``). What is not named has its default there, but for dropout and
            jitter, which are 0: a run that is resumed would not draw the same.

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
            require_undecided(key, key)
            if RANDOM.search(key):
                raise ValueError(
                    f"Invalid model.options.{key}: models train without dropout and jitter here, so"
                    " that a resumed run is the same; leave it out"
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
        ValueError: an architecture that transformers does not have, or whose tokens see those after
            them; an option that its configuration does not have; or options that do not fit
            together.
        MemoryError: it does not fit into memory.
    """

    def __init__(self, config: CausalLMConfig, vocab_size: int) -> None:
        super().__init__()
        provide_torchvision_operators()  # before transformers, beside a torch without CUDA
        from transformers import AutoModelForCausalLM

        self.vocab_size, self.context = vocab_size, config.context
        options = options_of(config, vocab_size)
        try:
            self.model = AutoModelForCausalLM.from_config(options)
            causal = self.is_causal()
        except Exception as error:  # whatever a class of others raises for what does not fit
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise MemoryError(str(error)) from error
            raise misfit(config, error) from error
        if not causal:
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
        """Whether logits depend on no later token, but for rounding, tried on two short sequences;
        true without values (on the meta device).
        """
        (tokens,) = self.example_inputs()
        if tokens.is_meta:
            return True
        changed = tokens.clone()
        changed[:, -1] = (tokens[:, -1] + 1) % self.vocab_size
        before, after = self(tokens), self(changed)
        difference = (before - after)[:, :-1].abs()
        return not bool((difference > ROUNDING * before.abs().max()).any())

    def example_inputs(self) -> tuple[Tensor]:
        """Two short sequences, for a trace."""
        length, device = min(3, self.context), next(self.parameters()).device
        tokens = torch.arange(2 * length, device=device).remainder(self.vocab_size)
        return (tokens.view(2, length),)


def options_of(config: CausalLMConfig, vocab_size: int) -> Any:
    """The configuration of transformers.

    Raises:
        ValueError: as of :class:`CausalLM`.
    """
    from transformers import AutoConfig

    name = config.architecture
    try:
        known = AutoConfig.for_model(name)
    except ValueError:
        raise ValueError(
            f"Invalid model.architecture={name}: expected a model_type of transformers, such as"
            " llama, qwen2 or gpt_neox"
        ) from None
    called: dict[str, str] = getattr(known, "attribute_map", {})
    for key in config.options:
        if key not in {*own_options(known), *called}:
            raise ValueError(
                f"Invalid model.options.{key}: {type(known).__name__} has no such option; leave it"
                f" out by ~model.options.{key}"
            )
        for general, own in called.items():
            if own == key:
                require_undecided(key, general)
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": config.context}
    options: Any = None
    for tokens in (NO_TOKENS, {}):  # some classes must have them
        try:
            options = AutoConfig.for_model(name, **config.options, **sizes, **tokens)
            break
        except Exception as error:  # of many classes: types, ranges, fields that disagree
            if not tokens:
                raise misfit(config, error) from error
    if options.num_hidden_layers < 1:
        raise misfit(config, ValueError("a model must have layers"))
    for key, value in vars(options).items():
        if RANDOM.search(key) and isinstance(value, float):
            setattr(options, key, 0.0)
    return options


def own_options(options: Any) -> list[str]:
    """The fields of a configuration class of transformers that are no configuration's."""
    from transformers import PretrainedConfig

    shared = {each.name for each in dataclasses.fields(PretrainedConfig)}
    return [each.name for each in dataclasses.fields(options) if each.name not in shared]


def require_undecided(key: str, general: str) -> None:
    """Raise ValueError for an option that follows from another key, by its name and the general
    one.
    """
    if general in DECIDED:
        raise ValueError(
            f"Invalid model.options.{key}: it follows from {DECIDED[general]}; leave it out"
        )


def misfit(config: CausalLMConfig, error: Exception) -> ValueError:
    """What is said of options that an architecture does not take, or not together."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(
        f"Invalid model.architecture={config.architecture} with model.options={config.options}:"
        f" {reason}"
    )


def require_same_function(model: CausalLM, folder: Path) -> None:
    """Make sure that a folder of transformers describes the function that a model computes.

    Raises:
        ValueError: another architecture, or an option that differs.
    """
    from transformers import AutoConfig

    theirs, mine = AutoConfig.from_pretrained(str(folder)), model.model.config
    if theirs.model_type != mine.model_type:
        raise ValueError(f"there model.architecture={theirs.model_type}, here {mine.model_type}")
    rope = (getattr(mine, "rope_parameters", None) or {}).get("rope_type", "default")
    ignored = NOT_OF_FUNCTION - (set() if rope in PLAIN_ROPE else {"max_position_embeddings"})
    for key in own_options(mine):
        there, here = getattr(theirs, key, None), getattr(mine, key)
        if there != here and key not in ignored and not RANDOM.search(key):
            raise ValueError(f"there model.options.{key}={there}, here {here}")
