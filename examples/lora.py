"""LoRA by peft under DDCAdam: a Llama that writes like Shakespeare learns to write in capitals, and
it does not matter how its adapters start.

``python examples/lora.py`` takes a minute on one core.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ddc import DDCAdam, find_gauges
from ddc.compatibility import provide_torchvision_operators
from ddc.data import TextConfig, load_text

provide_torchvision_operators()  # needed only beside a torch without CUDA
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

CONTEXT, BATCH, WIDTH = 64, 16, 64
Text = Callable[[Tensor], Tensor]
DATA = load_text(TextConfig(), CONTEXT)


def capitals(bytes_: Tensor) -> Tensor:
    return torch.where((bytes_ >= ord("a")) & (bytes_ <= ord("z")), bytes_ - 32, bytes_)


def train(model: nn.Module, optimizer: Optimizer, steps: int, text: Text) -> float:
    for step in range(steps):
        optimizer.zero_grad()
        tokens = text(DATA.batch(step, BATCH, 0)[0])
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    with torch.no_grad():
        batches = [text(x) for x, _ in DATA.evaluation_batches("validation", 4, BATCH)]
        return sum(float(model(input_ids=x, labels=x).loss) for x in batches) / len(batches)


def main(steps: int) -> None:
    """Pretrain, then adapt from two starts of one function."""
    torch.manual_seed(0)
    sizes = {"vocab_size": DATA.vocab_size, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))
    loss = train(base, AdamW(base.parameters(), lr=3e-3), steps, lambda x: x)
    print(f"as Shakespeare wrote: validation loss {loss:.3f}")
    model: PeftModel = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    gauges = find_gauges(model, kinds=["factor_map"])  # A -> G A, B -> B G⁻¹ of each adapter
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for how, spread in (("as peft starts them", 0.0), ("moved by random maps", math.log(10))):
        model.load_state_dict(start)
        gauges.transform_(model, torch.Generator().manual_seed(0), spread)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        loss = train(model, DDCAdam(trained, gauges, lr=3e-3), steps, capitals)
        print(f"in capitals, adapters {how}: validation loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
