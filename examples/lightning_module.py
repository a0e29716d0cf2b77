"""DDCMuon in Lightning, whose ``gradient_clip_val`` goes by the invariant norm here: a GPT of this
package learns to write like Shakespeare, byte by byte.

``python examples/lightning_module.py [STEPS]`` takes half a minute on one core.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from ddc import DDCMuon, InvariantClipping, find_gauges, hidden_matrices
from ddc.compatibility import provide_torchvision_operators
from ddc.data import TextConfig, load_text
from ddc.models import GPT, GPTConfig, cross_entropy

provide_torchvision_operators()  # needed only beside a torch without CUDA
import lightning  # noqa: E402

CONTEXT, BATCH = 64, 16


class Writer(InvariantClipping, lightning.LightningModule):  # type: ignore[misc]
    """The mixin comes first, so that its ``configure_gradient_clipping`` counts."""

    def __init__(self, vocab_size: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        config = GPTConfig(context=CONTEXT, layers=2, width=64, hidden=172)
        self.model = GPT(config, vocab_size)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("validation loss", cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> dict[str, Any]:
        # names are those of the model whose gauges were found
        named, gauges = self.model.named_parameters(), find_gauges(self.model)
        optimizer = DDCMuon(named, gauges, hidden_matrices(self.model), adam_lr=3e-3)
        # a rate for each group; it cycles betas, and leaves the momentum of hidden matrices
        rates = [group["lr"] for group in optimizer.param_groups]
        schedule = OneCycleLR(optimizer, rates, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batches: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def main(steps: int = 200) -> None:
    torch.manual_seed(0)
    data = load_text(TextConfig(), CONTEXT)
    batches = loader([data.batch(step, BATCH, 0) for step in range(steps)])
    held = loader(data.evaluation_batches("validation", count=4, batch_size=BATCH))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=steps, gradient_clip_val=1.0, devices=1, **quiet)
    writer = Writer(data.vocab_size, steps)
    print("before", trainer.validate(writer, held, verbose=False))
    trainer.fit(writer, batches)
    print("after", trainer.validate(writer, held, verbose=False))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
