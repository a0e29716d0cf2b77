"""A deep ReLU network without biases on pairs of tokens: every neuron, and so every layer, can be
rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc.models.config import ModelConfig


@dataclass
class DeepMLPConfig(ModelConfig):
    """Architecture of :class:`DeepMLP`.

    Args:
        depth: number of hidden matrices, width × width.
        width: neurons of a layer.
        residual: add the input of each two layers to their output; depth must be even.

    Raises:
        ValueError: on construction, sizes that cannot be.
    """

    name: str = "deep_mlp"
    depth: int = 24
    width: int = 128
    residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("depth", "width"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"Invalid model.{key}={value}: expected a positive integer")
        if self.residual and self.depth % 2:
            raise ValueError(
                f"Invalid model.depth={self.depth}: model.residual=true needs an even number of"
                " layers"
            )

    @property
    def absent_gauges(self) -> dict[str, str]:
        absent = dict.fromkeys(("value_rotation", "qk_rotation"), "it has no attention")
        absent |= {"gated_rescale": "it has no gates", "norm_scale": "it has no norms"}
        if self.residual:
            absent["chained_rescale"] = "with model.residual=true its layers are no chain"
        return absent


class DeepMLP(nn.Module):
    """Pairs of tokens, (batch, 2), to logits, (batch, classes).

    The two tokens have tables of their own, rows 0 to tokens - 1 and tokens to 2 · tokens - 1 of
    one embedding, whose sum is the input layer of a ReLU network; then ``depth`` hidden matrices
    and a linear head, all without biases. With ``residual``, h + W2 relu(W1 h) for each two of
    them, else relu(W h) for each.

    Hidden matrices start as N(0, 2/width), which keeps the size of activations from layer to layer
    (He et al., arXiv:1502.01852; the second of a residual pair at depth^-½ of that), embedding and
    head as N(0, 1/width).
    """

    def __init__(self, config: DeepMLPConfig, tokens: int, classes: int) -> None:
        super().__init__()
        self.config, self.tokens = config, tokens
        self.embedding = nn.Embedding(2 * tokens, config.width)
        self.layers = nn.ModuleList(
            nn.Linear(config.width, config.width, bias=False) for _ in range(config.depth)
        )
        self.head = nn.Linear(config.width, classes, bias=False)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)
        for i, layer in enumerate(self.layers):
            gain = config.depth**-0.5 if config.residual and i % 2 else 1.0
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=gain * (2 / config.width) ** 0.5)

    def example_inputs(self) -> tuple[Tensor]:
        """A batch of all pairs of the first tokens."""
        tokens = torch.arange(min(self.tokens, 5), device=self.embedding.weight.device)
        return (torch.cartesian_prod(tokens, tokens),)

    def forward(self, pairs: Tensor) -> Tensor:
        first, second = pairs.unbind(1)
        h = self.embedding(first) + self.embedding(second + self.tokens)
        if not self.config.residual:
            h = F.relu(h)
            for layer in self.layers:
                h = F.relu(layer(h))
            return self.head(h)
        for up, down in zip(self.layers[::2], self.layers[1::2], strict=True):
            h = h + down(F.relu(up(h)))
        return self.head(h)
