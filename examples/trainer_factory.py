"""DDCMuon in the Trainer of transformers, made by a factory that Trainer hands the model to: so it
is made where Trainer has put the model. A Qwen2 learns to write like Shakespeare, byte by byte.

``python examples/trainer_factory.py [STEPS]`` takes half a minute on one core.
"""

import sys
from typing import Any

import torch
from torch import nn

from ddc import DDCMuon, clip_grad_norm_, find_gauges, hidden_matrices
from ddc.compatibility import provide_torchvision_operators
from ddc.data import TextConfig, load_text

provide_torchvision_operators()  # needed only beside a torch without CUDA
import transformers  # noqa: E402

CONTEXT, BATCH, WIDTH = 64, 16, 64


class Factory:
    """Made without arguments, and called with the model and the keyword arguments beside it."""

    def __call__(self, model: nn.Module, **options: Any) -> DDCMuon:
        gauges, hidden = find_gauges(model), hidden_matrices(model)
        return DDCMuon(model.named_parameters(), gauges, hidden, **options)


class Clip(transformers.TrainerCallback):  # type: ignore[misc]
    """In the place of ``max_grad_norm``, which goes by the Euclidean norm."""

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        clip_grad_norm_(optimizer, 1.0)


def main(steps: int = 200) -> None:
    torch.manual_seed(0)
    data = load_text(TextConfig(), CONTEXT)
    config = transformers.Qwen2Config(
        vocab_size=data.vocab_size, hidden_size=WIDTH, intermediate_size=3 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=WIDTH**-0.5,
    )  # fmt: skip
    train, held = (
        [
            {"input_ids": x, "labels": x}
            for x in torch.tensor(text[: n * CONTEXT]).long().view(n, -1)
        ]
        for text, n in ((data.train, 4000), (data.validation, 64))
    )
    trainer = transformers.Trainer(
        transformers.Qwen2ForCausalLM(config),
        transformers.TrainingArguments(
            "runs/trainer_factory", max_steps=steps, per_device_train_batch_size=BATCH,
            max_grad_norm=0, save_strategy="no", report_to="none",
        ),
        train_dataset=train, eval_dataset=held, callbacks=[Clip()],
        optimizer_cls_and_kwargs=(Factory, {"lr": 0.02, "adam_lr": 3e-3}),
    )  # fmt: skip
    print(f"validation loss {trainer.evaluate()['eval_loss']:.3f} before")
    trainer.train()
    print(f"validation loss {trainer.evaluate()['eval_loss']:.3f} after")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
