"""Models that others wrote, small and at random: name, and how to make the model and an example of
its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddc.compatibility import provide_torchvision_operators

provide_torchvision_operators()

import timm  # noqa: E402
import transformers  # noqa: E402
from timm.layers import SwiGLU, SwiGLUPacked  # noqa: E402

transformers.logging.set_verbosity_error()

Made = tuple[nn.Module, Mapping[str, Any] | tuple[Tensor, ...]]
#: More different tokens than a model is wide: gradients of full rank, whose polar factor is stable.
VOCABULARY = 67
TOKENS = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
VIT_SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 7,
}


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def text(model: str, config: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        made = getattr(transformers, model)(
            getattr(transformers, config)(vocab_size=VOCABULARY, **options)
        )
        return made, {"input_ids": TOKENS, "use_cache": False}

    return make


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> Callable[[], Made]:
    return lambda: (timm.create_model(name, **{**VIT_SIZES, **options}), (images(),))


def hf_vit() -> Made:
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=7, **SIZES)
    return transformers.ViTForImageClassification(config), {"pixel_values": images()}


def encoder(**options: Any) -> Callable[[], Made]:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    return lambda: (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options), (x,))


def mlp(bias: bool = True) -> Made:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    sizes = [(5, 8), (8, 8), (8, 3)]
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), (x,)


ZOO: dict[str, Callable[[], Made]] = {
    "GPT-2": text("GPT2LMHeadModel", "GPT2Config", **GPT2_SIZES),
    "GPT-2, ReLU, head not tied": text(
        "GPT2LMHeadModel",
        "GPT2Config",
        **GPT2_SIZES,
        tie_word_embeddings=False,
        activation_function="relu",
    ),
    "Llama": text("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "Mistral": text("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=3),
    "Qwen2": text("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "Qwen3": text("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8),
    "GPT-NeoX": text("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES, rotary_pct=0.5),
    "GPT-J": text("GPTJForCausalLM", "GPTJConfig", **GPT2_SIZES, rotary_dim=4),
    "Gemma 2": text("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8),
    "ViT (transformers)": hf_vit,
    "ViT": vit(),
    "ViT without class token": vit(class_token=False, global_pool="avg"),
    "ViT, layer scale": vit(init_values=0.1),
    "ViT, QK-norm": vit(qk_norm=True),
    "ViT, ReLU": vit(act_layer=nn.ReLU),
    "ViT, SwiGLU": vit(mlp_layer=SwiGLU),
    "ViT, packed SwiGLU": vit(mlp_layer=SwiGLUPacked),
    "DeiT, distilled": vit("deit_tiny_distilled_patch16_224"),
    "EVA-02 tiny": vit("eva02_tiny_patch14_224"),
    "EVA-02 base": vit("eva02_base_patch14_224"),
    "TransformerEncoderLayer, ReLU": encoder(),
    "TransformerEncoderLayer, pre-norm, GELU": encoder(norm_first=True, activation="gelu"),
    "Sequential ReLU MLP": mlp,
    "Sequential ReLU MLP without biases": lambda: mlp(bias=False),
}


def make(name: str, seed: int = 0) -> Made:
    """A model in float64, in evaluation mode, with random norm scales and biases, and inputs for
    it.
    """
    torch.manual_seed(seed)
    model, inputs = ZOO[name]()
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))

    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    if isinstance(inputs, Mapping):
        return model, {key: double(x) for key, x in inputs.items()}
    return model, tuple(double(x) for x in inputs)


def logits(model: nn.Module, inputs: Mapping[str, Any] | tuple[Tensor, ...]) -> Tensor:
    """What a model gives on its inputs."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return getattr(output, "logits", output)
