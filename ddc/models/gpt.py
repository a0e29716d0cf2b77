"""A GPT-style language model in which every choice that makes or breaks a gauge is a config key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddc.models.config import NO_CHAIN, QK_NORM, ModelConfig

NORMS = ("rms", "layer")
MLPS = ("swiglu", "relu", "relu2", "gelu")
POSITIONS = ("rope", "partial_rope", "learned")


@dataclass
class GPTConfig(ModelConfig):
    """Architecture of :class:`GPT`.

    Args:
        context: tokens of a sequence.
        layers: blocks of attention and feed-forward.
        width: of the residual stream.
        heads: of a layer.
        kv_heads: heads of keys and values, each for as many heads of queries.
        hidden: units of a feed-forward block.
        norm: ``rms`` or ``layer``.
        mlp: feed-forward blocks: ``swiglu``, ``relu``, ``relu2`` or ``gelu``.
        positions: ``rope``, ``partial_rope`` (half of each head) or ``learned``.
        bias: biases of linear maps.
        tied_head: the head is the embedding; there is no logit shift then.
        qk_norm: norms of queries and keys; there is no query-key rotation then.

    Raises:
        ValueError: on construction, a choice that does not exist or sizes that do not fit together.
    """

    name: str = "gpt"
    context: int = 128
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 344
    norm: str = "rms"
    mlp: str = "swiglu"
    positions: str = "rope"
    bias: bool = False
    tied_head: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, choices in (("norm", NORMS), ("mlp", MLPS), ("positions", POSITIONS)):
            if (value := getattr(self, key)) not in choices:
                raise ValueError(
                    f"Invalid model.{key}={value!r}: expected one of {', '.join(choices)}"
                )
        for key in ("context", "layers", "width", "heads", "kv_heads", "hidden"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"Invalid model.{key}={value}: expected a positive integer")
        if self.width % self.heads:
            raise ValueError(
                f"Invalid model.heads={self.heads}: must divide model.width={self.width}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"Invalid model.kv_heads={self.kv_heads}: must divide model.heads={self.heads}"
            )
        if self.head_width < 2:
            raise ValueError(
                f"Invalid model.heads={self.heads}: heads of width 1 cannot turn; take fewer"
            )
        if self.rotated_width % 2:
            raise ValueError(
                f"Invalid model.heads={self.heads}: model.positions={self.positions} turns"
                f" {self.rotated_width} of {self.head_width} entries of a head (model.width /"
                " model.heads), which must be an even number; model.positions=learned turns none"
            )

    @property
    def absent_gauges(self) -> dict[str, str]:
        absent = {"chained_rescale": NO_CHAIN}
        if self.mlp not in ("relu", "relu2"):
            absent["relu_rescale"] = f"model.mlp={self.mlp} is not relu or relu2"
        if self.mlp != "swiglu":
            absent["gated_rescale"] = f"model.mlp={self.mlp} is not swiglu"
        if self.tied_head:
            absent["logit_shift"] = "model.tied_head=true ties the head to the embedding"
        if self.qk_norm:
            absent["qk_rotation"] = QK_NORM
        return absent

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def rotated_width(self) -> int:
        """How many leading entries of each query and key RoPE turns (entry i with i +
        rotated_width/2).
        """
        return {"rope": self.head_width, "partial_rope": self.head_width // 2, "learned": 0}[
            self.positions
        ]


class RotaryEmbedding(nn.Module):
    """RoPE on the first ``rotated`` entries of each head, half-split: entry i pairs with i +
    rotated/2.

    Source: Su et al., arXiv:2104.09864; the half-split pairing is that of GPT-NeoX and Llama.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rotated: int, context: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
        angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
        self.rotated = rotated
        self.register_buffer("cos", angle.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angle.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turn x of shape (batch, heads, time, head_width)."""
        time = x.shape[-2]
        cos, sin = self.cos[:time].to(x.dtype), self.sin[:time].to(x.dtype)
        a, b, rest = x.tensor_split((self.rotated // 2, self.rotated), dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with grouped-query heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        kv_width = config.kv_heads * config.head_width
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.query = nn.Linear(config.width, config.width, bias=config.bias)
        self.key = nn.Linear(config.width, kv_width, bias=config.bias)
        self.value = nn.Linear(config.width, kv_width, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)
        self.query_norm = nn.RMSNorm(config.head_width) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(config.head_width) if config.qk_norm else None
        self.rope = (
            RotaryEmbedding(config.rotated_width, config.context) if config.rotated_width else None
        )

    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.query(x), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(self.key(x), "b t (h d) -> b h t d", h=self.kv_heads)
        v = rearrange(self.value(x), "b t (h d) -> b h t d", h=self.kv_heads)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.output(rearrange(y, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """Feed-forward block; ``gate`` exists for SwiGLU only."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.mlp
        self.gate = (
            nn.Linear(config.width, config.hidden, bias=config.bias)
            if config.mlp == "swiglu"
            else None
        )
        self.up = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * up)
        match self.activation:
            case "relu":
                return self.down(F.relu(up))
            case "relu2":
                return self.down(F.relu(up).square())
            case _:
                return self.down(F.gelu(up))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Decoder-only transformer: tokens of shape (batch, time) to logits of shape (batch, time,
    vocab_size).

    Linear maps and embeddings start as N(0, 1/fan_in), at which the step scale of DDCAdam is 1 and
    a learning rate means the same as for AdamW; biases start at 0, norm scales at 1.
    """

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.position = (
            nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, vocab_size, bias=config.bias and not config.tied_head)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    def example_inputs(self) -> tuple[Tensor]:
        """Tokens of a small batch."""
        device = self.embedding.weight.device
        return (
            torch.arange(2 * min(self.config.context, 4), device=device).view(2, -1)
            % self.embedding.num_embeddings,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        if time > self.config.context:
            raise ValueError(f"{time} tokens do not fit into model.context={self.config.context}")
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position.weight[:time]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_norm(config: GPTConfig) -> nn.Module:
    """The norm of the config: RMSNorm, or LayerNorm with gamma and beta."""
    return (
        nn.RMSNorm(config.width, eps=1e-6) if config.norm == "rms" else nn.LayerNorm(config.width)
    )
