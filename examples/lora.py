"""LoRA by peft: a Llama that writes like Shakespeare learns to write in capitals. Under DDCAdam it
does not matter how the two factors of its adapters are scaled, under AdamW it does. It takes a
minute on one core.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ddc import DDCAdam, find_gauges
from ddc.compatibility import provide_torchvision_operators
from ddc.data import TextConfig, load_text

provide_torchvision_operators()  # needed only beside a torch without CUDA
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

DATA, BATCH = load_text(TextConfig(), 64), 16
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def loss_of(model: nn.Module, x: Tensor, capitals: bool) -> Tensor:
    x = torch.where((x >= ord("a")) & (x <= ord("z")) & capitals, x - 32, x)
    return model(input_ids=x, labels=x).loss


def train(model: nn.Module, optimizer: Optimizer, steps: int, capitals: bool) -> float:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, DATA.batch(step, BATCH, 0)[0], capitals).backward()
        optimizer.step()
    batches = DATA.evaluation_batches("validation", 4, BATCH)
    with torch.no_grad():
        return sum(float(loss_of(model, x, capitals)) for x, _ in batches) / 4


def main(steps: int) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **SIZES))
    train(base, AdamW(base.parameters(), lr=3e-3), steps, capitals=False)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    gauges = find_gauges(model, kinds=["factor_map"])  # A -> G A, B -> B G⁻¹ of each adapter
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    for c in (1, 1 / 30, 30):
        for kind, more in ((AdamW, {}), (DDCAdam, {"gauges": gauges})):
            for name, p in trained.items():
                p.data = start[name] * (c if "lora_A" in name else 1 / c)
            optimizer = kind(trained.items(), lr=3e-3, **more)  # type: ignore[arg-type]
            loss = train(model, optimizer, steps, capitals=True)
            print(f"{kind.__name__}, A times {c:.2g}: validation loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
