"""Which parameter is what, for any Muon: torch's own here, with AdamW for the rest. A GPT-2 of
transformers learns to write like Shakespeare, byte by byte.

``python examples/muon_groups.py [STEPS]`` takes half a minute on one core.
"""

import sys

import torch
from torch.optim import AdamW, Muon

from ddc import param_groups, parameter_roles
from ddc.compatibility import provide_torchvision_operators
from ddc.data import TextConfig, load_text

provide_torchvision_operators()  # needed only beside a torch without CUDA
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

CONTEXT, BATCH = 64, 16


def main(steps: int = 200) -> None:
    torch.manual_seed(0)
    data = load_text(TextConfig(), CONTEXT)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=data.vocab_size, **sizes))
    print(parameter_roles(model))
    undecayed = {"lr": 3e-3, "weight_decay": 0.0}
    hidden, *rest = param_groups(
        model,
        {
            "hidden": {"lr": 0.02, "adjust_lr_fn": "original"},
            "norm": undecayed,
            "bias": undecayed,
            "rest": {"lr": 3e-3},
        },
    )
    optimizers = Muon([hidden]), AdamW(rest)
    validation = data.evaluation_batches("validation", count=4, batch_size=BATCH)
    for step in range(steps + 1):
        if step in (0, steps):
            with torch.no_grad():
                losses = [float(model(input_ids=x, labels=x).loss) for x, _ in validation]
            print(f"validation loss {sum(losses) / len(losses):.3f} after {step} steps")
        inputs, _ = data.batch(step, BATCH, 0)
        model.zero_grad()
        model(input_ids=inputs, labels=inputs).loss.backward()
        for optimizer in optimizers:
            optimizer.step()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
