"""DDCAdam in a plain PyTorch loop: a GPT-NeoX of transformers learns to write like Shakespeare,
byte by byte.

``python examples/plain_loop.py`` takes half a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from ddc import DDCAdam, find_gauges
from ddc.compatibility import provide_torchvision_operators
from ddc.data import TextConfig, load_text
from ddc.gauges import check

# Needed only beside a torch without CUDA, where it must come before models of transformers are
# imported.
provide_torchvision_operators()
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # noqa: E402

CONTEXT, BATCH, WIDTH, LR = 64, 16, 128, 3e-3


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    return sum(float(cross_entropy(model, *batch)) for batch in batches) / len(batches)


def main(arguments: Sequence[str] | None = None) -> None:
    """Find the gauges of a model, make sure of them, and train it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    # comes with the package shakespeare; nothing is downloaded
    data = load_text(TextConfig(), CONTEXT)
    validation = data.evaluation_batches("validation", count=4, batch_size=BATCH)
    config = GPTNeoXConfig(
        vocab_size=data.vocab_size, hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=CONTEXT,
        # 1/√fan_in, where a learning rate means what it means for AdamW
        initializer_range=WIDTH**-0.5,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)

    gauges = find_gauges(model)
    print(gauges)
    changes = check(model, gauges, lambda each: each(validation[0][0]).logits.log_softmax(-1))
    print(
        f"log-probabilities change by at most {max(changes.values()):.0e} along them (in float64)\n"
    )

    optimizer = DDCAdam(model.named_parameters(), gauges, lr=LR, weight_decay=0.1)
    scheduler = OneCycleLR(optimizer, LR, total_steps=options.steps, cycle_momentum=False)
    print(f"step    0: validation loss {evaluate(model, validation):.3f}")
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        cross_entropy(model, *data.batch(step - 1, BATCH, options.seed)).backward()
        # not clip_grad_norm_: the Euclidean norm depends on where on their orbit the weights lie
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, optimizer.grad_norm())
        optimizer.step()
        scheduler.step()
        if step % 25 == 0 or step == options.steps:
            print(f"step {step:4d}: validation loss {evaluate(model, validation):.3f}", flush=True)


if __name__ == "__main__":
    main()
