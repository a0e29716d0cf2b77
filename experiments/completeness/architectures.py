"""Architectures of transformers, timm and this package in their narrowest form, with a vocabulary
wider than the model, since a finite domain has kernels that are no symmetry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddc.compatibility import provide_torchvision_operators

provide_torchvision_operators()

import timm  # noqa: E402
import transformers  # noqa: E402

from ddc.models import GPT, DeepMLP, DeepMLPConfig, GPTConfig  # noqa: E402
from experiments.zoo.measure import output  # noqa: E402

VOCABULARY, POSITIONS, WIDTH = 29, 6, 8
TOKENS = torch.arange(8 * POSITIONS).reshape(8, POSITIONS) % VOCABULARY
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "resid_pdrop": 0.0,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 4}
EXPERTS = {
    **GROUPED,
    "num_local_experts": 3,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 4,
    "experts_implementation": "batched_mm",
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 6,
    "n_positions": POSITIONS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "tie_word_embeddings": False,
}
SEQUENCES = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 4,
    "d_ff": 6,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
LAYER_NORM = {"norm": "layer", "bias": True, "mlp": "relu", "positions": "learned", "kv_heads": 2}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
Made = tuple[nn.Module, Any]


def gpt(**options: Any) -> Callable[[], Made]:
    """The GPT of this package."""
    sizes = {"context": POSITIONS, "layers": 2, "width": WIDTH, "heads": 2, "hidden": 6}
    config = {"kv_heads": 1, **sizes, **options}
    return lambda: (GPT(GPTConfig(**config), VOCABULARY), (TOKENS,))


class Alone(nn.Module):
    """A model of which a loss reads the logits, or else the first output, and not what it gives
    beside them (the state of an encoder, say).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        return output(self.model, inputs or args)


def text(model: str, sizes: Mapping[str, Any], **options: Any) -> Callable[[], Made]:
    """A language model of transformers."""
    family = re.split("For|LMHead", model)[0].replace("Gemma3", "Gemma3Text")

    def make() -> Made:
        config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
        inputs = {"input_ids": TOKENS}
        made = getattr(transformers, model)(config)
        if family in ("T5", "Bart"):
            inputs["decoder_input_ids"] = (TOKENS * 5 + 3) % VOCABULARY
            made = Alone(made)
        return made, inputs

    return make


def image(name: str, side: int = 32, **options: Any) -> Callable[[], Made]:
    """A vision model of timm, on grey images of this side, 16 of 32 or as many pixels."""
    shape = (16 * 32**2 // side**2, 1, side, side)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return lambda: (timm.create_model(name, num_classes=11, in_chans=1, **options), (images,))


def deep_mlp() -> Made:
    """The grokking network of this package, narrow."""
    model = DeepMLP(DeepMLPConfig(depth=2, width=8), 11, 11)
    pairs = torch.cartesian_prod(torch.arange(11), torch.arange(11))
    return model, (pairs,)


def feed_forward() -> Made:
    """A plain ReLU network."""
    layers = (nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    return nn.Sequential(*layers), (torch.randn(64, 6),)


ARCHITECTURES: dict[str, Callable[[], Made]] = {
    "GPT (RMSNorm, SwiGLU, RoPE, grouped heads)": gpt(),
    "GPT (LayerNorm, biases, ReLU, learned positions)": gpt(**LAYER_NORM),
    "deep MLP": deep_mlp,
    "ReLU network": feed_forward,
    "Llama": text("LlamaForCausalLM", GROUPED),
    "Qwen2": text("Qwen2ForCausalLM", GROUPED),
    "Qwen3 (QK-norm)": text("Qwen3ForCausalLM", GROUPED),
    "Gemma 2": text("Gemma2ForCausalLM", GROUPED),
    "Gemma 3": text("Gemma3ForCausalLM", GROUPED, layer_types=["full_attention"] * 2),
    "OLMo 2": text("Olmo2ForCausalLM", GROUPED),
    "Phi-3 (packed)": text("Phi3ForCausalLM", GROUPED, pad_token_id=0),
    "Phi": text("PhiForCausalLM", SIZES),
    "GPT-NeoX (interleaved)": text("GPTNeoXForCausalLM", SIZES, hidden_act="gelu"),
    "OPT": text("OPTForCausalLM", SIZES, ffn_dim=6, word_embed_proj_dim=8, dropout=0.0),
    "GPT-2": text("GPT2LMHeadModel", GPT2),
    "GPT-2, tied": text("GPT2LMHeadModel", GPT2, tie_word_embeddings=True),
    # an eps of 1e-12, its own, would break what holds at 0 by less than float64 can tell
    "BERT": text("BertForMaskedLM", SIZES, layer_norm_eps=1e-5),
    "T5": text("T5ForConditionalGeneration", SEQUENCES),
    "Mixtral": text("MixtralForCausalLM", EXPERTS),
    "Qwen2-MoE": text("Qwen2MoeForCausalLM", EXPERTS),
    "ViT": image("vit_tiny_patch16_224", **VIT, mlp_ratio=1),
    "ViT, ReLU": image("vit_tiny_patch16_224", **VIT, mlp_ratio=1, act_layer=nn.ReLU),
    "ViT, layer scale": image("vit_tiny_patch16_224", **VIT, mlp_ratio=1, init_values=0.5),
    "ViT, QK-norm": image("vit_tiny_patch16_224", **VIT, mlp_ratio=1, qk_norm=True),
    "ResNet": image(
        "resnet10t", channels=(4, 4, 4, 4), stem_width=2, stem_type="deep", replace_stem_pool=False
    ),
    # of images of 32 its last stage would see one place, where a depthwise convolution is a scale
    "ConvNeXt": image("convnext_atto", side=64, depths=(1, 1, 1, 1), dims=(4, 6, 6, 6)),
}
