"""DDCAdam in the Trainer of transformers: a Llama with grouped queries learns to write like
Shakespeare, byte by byte.

``python examples/hf_trainer.py`` takes half a minute on one core. Killed, it goes on from its last
checkpoint with ``--resume``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ddc import DDCAdam, clip_grad_norm_, find_gauges
from ddc.compatibility import provide_torchvision_operators
from ddc.data import TextConfig, load_text
from ddc.gauges import check

# Needed only beside a torch without CUDA, where it must come before models of transformers are
# imported.
provide_torchvision_operators()
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

CONTEXT, BATCH, WIDTH, LR = 64, 16, 128, 3e-3


class ClipByInvariantNorm(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for us
    """What Trainer's ``max_grad_norm`` is for, by a norm that does not depend on where on their
    orbit the weights lie.

    Trainer clips by the Euclidean norm, which does. The norm that it logs remains the Euclidean
    one, before clipping.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Once a step, on gradients that are accumulated and unscaled; accelerate has wrapped the
        optimizer.
        """
        clip_grad_norm_(optimizer, self.max_norm)


def blocks(tokens: np.ndarray) -> Dataset:
    """A text as examples of equal length. Labels are the inputs: the model shifts them itself."""
    examples = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT).astype(np.int64)
    return Dataset.from_dict({"input_ids": examples, "labels": examples})


def main(arguments: Sequence[str] | None = None) -> None:
    """Find the gauges of a model, make sure of them, and train it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/hf_trainer", help="folder of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    # comes with the package shakespeare; nothing is downloaded
    data = load_text(TextConfig(), CONTEXT)
    validation = blocks(data.validation).shuffle(seed=0).select(range(4 * BATCH))
    config = LlamaConfig(
        vocab_size=data.vocab_size, hidden_size=WIDTH, intermediate_size=3 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        # 1/√fan_in, where a learning rate means what it means for AdamW
        initializer_range=WIDTH**-0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    gauges = find_gauges(model)
    print(gauges)
    inputs = torch.tensor(validation[:BATCH]["input_ids"])
    changes = check(model, gauges, lambda each: each(inputs).logits.log_softmax(-1))
    print(
        f"log-probabilities change by at most {max(changes.values()):.0e} along them (in float64)\n"
    )

    optimizer = DDCAdam(model.named_parameters(), gauges, lr=LR, weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    training = TrainingArguments(
        output_dir=options.output, seed=options.seed, max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        max_grad_norm=0,  # off: see ClipByInvariantNorm
        # shares of all steps
        logging_steps=0.1, eval_strategy="steps", eval_steps=0.1, save_steps=0.25,
        report_to="none", dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model, training, train_dataset=blocks(data.train), eval_dataset=validation,
        optimizers=(optimizer, scheduler), callbacks=[ClipByInvariantNorm(1.0)],
    )  # fmt: skip
    print(f"validation loss {trainer.evaluate()['eval_loss']:.3f} before")
    trainer.train(resume_from_checkpoint=options.resume)
    print(f"validation loss {trainer.evaluate()['eval_loss']:.3f} after")


if __name__ == "__main__":
    main()
