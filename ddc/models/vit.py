"""timm's vision transformer, with the feed-forward block as a choice: it decides whether there is a
rescale gauge.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ddc.compatibility import provide_torchvision_operators
from ddc.models.config import NO_CHAIN, QK_NORM, ModelConfig

FEED_FORWARDS = ("relu", "swiglu", "gelu")


@dataclass
class ViTConfig(ModelConfig):
    """Architecture of :func:`vision_transformer`.

    Args:
        patch: pixels along the side of a patch; must divide the sides of the images.
        layers: blocks of attention and feed-forward.
        width: of the residual stream.
        heads: of a layer.
        hidden: units of a feed-forward block.
        mlp: ``relu`` and ``swiglu`` have a rescale gauge; ``gelu``, the usual one, has none.
        class_token: the head reads a token of its own, instead of the mean over patches.
        qk_norm: norms of queries and keys; there is no query-key rotation then.

    Raises:
        ValueError: on construction, a choice that does not exist or sizes that do not fit together.
    """

    name: str = "vit"
    patch: int = 4
    layers: int = 4
    width: int = 64
    heads: int = 4
    hidden: int = 256
    mlp: str = "relu"
    class_token: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp not in FEED_FORWARDS:
            raise ValueError(
                f"Invalid model.mlp={self.mlp!r}: expected one of {', '.join(FEED_FORWARDS)}"
            )
        for key in ("patch", "layers", "width", "heads", "hidden"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"Invalid model.{key}={value}: expected a positive integer")
        if self.width % self.heads:
            raise ValueError(
                f"Invalid model.heads={self.heads}: must divide model.width={self.width}"
            )

    @property
    def absent_gauges(self) -> dict[str, str]:
        absent = {"chained_rescale": NO_CHAIN}
        for kind, mlp in (("relu_rescale", "relu"), ("gated_rescale", "swiglu")):
            if self.mlp != mlp:
                absent[kind] = f"model.mlp={self.mlp} is not {mlp}"
        if self.qk_norm:
            absent["qk_rotation"] = QK_NORM
        if self.width == self.heads:
            absent |= dict.fromkeys(
                ("value_rotation", "qk_rotation"), "heads of width 1 cannot turn"
            )
        return absent


def vision_transformer(config: ViTConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A ``VisionTransformer`` of timm: images ``(batch, *shape)`` to logits ``(batch, classes)``.

    Linear maps, the patch embedding among them, start as N(0, 1/fan_in), positions and class token
    as N(0, 1/width), at which a learning rate means the same for DDCAdam as for AdamW; biases start
    at 0, norm scales at 1. timm's own start, a standard deviation of 0.02 for linear maps, would
    make AdamW's relative steps several times larger.

    Raises:
        ValueError: patches that do not tile the images.
    """
    provide_torchvision_operators()
    from timm.layers import SwiGLU
    from timm.models import VisionTransformer

    channels, *size = shape
    if any(side % config.patch for side in size):
        raise ValueError(
            f"Invalid model.patch={config.patch}: must divide both sides of the images, {size[0]}"
            f" and {size[1]}"
        )
    model = VisionTransformer(
        img_size=tuple(size),
        patch_size=config.patch,
        in_chans=channels,
        num_classes=classes,
        global_pool="token" if config.class_token else "avg",
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=(config.hidden + 0.5) / config.width,  # timm rounds down
        class_token=config.class_token,
        qk_norm=config.qk_norm,
        act_layer={"relu": nn.ReLU, "gelu": nn.GELU, "swiglu": nn.SiLU}[config.mlp],
        **({"mlp_layer": SwiGLU} if config.mlp == "swiglu" else {}),
    )
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for vectors in (model.pos_embed, model.cls_token):
        if vectors is not None:
            nn.init.normal_(vectors, std=config.width**-0.5)
    return model
