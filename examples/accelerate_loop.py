"""DDCAdam under accelerate, with gradients of two batches a step, clipped by the invariant norm: a
GPT of this package learns to write like Shakespeare, byte by byte.

``python examples/accelerate_loop.py [STEPS]`` takes half a minute on one core.
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn

from ddc import DDCAdam, clip_grad_norm_, find_gauges
from ddc.data import TextConfig, TextData, load_text
from ddc.models import GPT, GPTConfig, cross_entropy

CONTEXT, BATCH = 64, 8


@torch.no_grad()
def evaluate(model: nn.Module, data: TextData) -> float:
    batches = data.evaluation_batches("validation", count=8, batch_size=BATCH)
    return sum(float(cross_entropy(model(x), y)) for x, y in batches) / len(batches)


def main(steps: int = 200) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    data = load_text(TextConfig(), CONTEXT)
    plain = GPT(GPTConfig(context=CONTEXT, layers=2, width=64, hidden=172), data.vocab_size)
    # gauges are found before the model is wrapped
    made = DDCAdam(plain.named_parameters(), find_gauges(plain), lr=3e-3, weight_decay=0.1)
    model, optimizer = accelerator.prepare(plain, made)
    print(f"validation loss {evaluate(plain, data):.3f} before")
    for step in range(2 * steps):
        with accelerator.accumulate(model):
            inputs, targets = data.batch(step, BATCH, 0)
            accelerator.backward(cross_entropy(model(inputs), targets))
            if accelerator.sync_gradients:
                # in float16, accelerator.unscale_gradients(optimizer) comes first
                clip_grad_norm_(optimizer, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    print(f"validation loss {evaluate(plain, data):.3f} after")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
