"""Where a GPT is read: places whose activations or gradients a gauge changes."""

from __future__ import annotations

from torch import nn

from ddc.models import GPT
from ddc.slt.observables import Layer


def sites(model: GPT) -> list[Layer]:
    """After each norm's scale, at the value branch and the hidden units of each feed-forward block,
    and at the values of the heads.

    A norm scale by c multiplies a channel of the first by c and its gradient by 1/c, and so does a
    gated or ReLU rescale with a unit of the second. Values are read for control: rotations turn
    them, which changes no eigenvalue.
    """
    found = []
    for i, block in enumerate(model.blocks):
        path = f"blocks.{i}"
        norms = [name for name, _ in block.named_children() if name.endswith("norm")]
        found += [Layer(f"{path}.{name}", f"{path}.{name}") for name in norms]
        up = model.get_submodule(f"{path}.mlp.up")
        assert isinstance(up, nn.Linear)
        rank = up.in_features + (up.bias is not None)
        found += [
            Layer(f"{path}.mlp.up", f"{path}.mlp.up", activation_rank=rank),
            Layer(f"{path}.mlp.down", f"{path}.mlp.down", reads="input"),
            Layer(f"{path}.attention.value", f"{path}.attention.value"),
        ]
    return [*found, Layer("norm", "norm")]


def linear_maps(model: nn.Module) -> list[Layer]:
    """All linear maps, as their gradients need them: read at the input."""
    return [
        Layer(name, name, reads="input")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
