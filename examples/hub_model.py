"""A GPT of this package as a model of the Hugging Face hub: saved as a folder, and made again from
it, or from a repository of that content (``push_to_hub``, ``from_pretrained("OWNER/NAME")``).

``python examples/hub_model.py FOLDER`` takes some seconds.
"""

import sys
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin

from ddc.data import TextConfig, load_text
from ddc.models import GPT, GPTConfig


class HubGPT(GPT, PyTorchModelHubMixin):
    """The hub keeps arguments as JSON, so the config is given as a dictionary."""

    def __init__(self, vocab_size: int, sizes: dict[str, Any]) -> None:
        super().__init__(GPTConfig(**sizes), vocab_size)


def main(folder: str) -> None:
    torch.manual_seed(0)
    data = load_text(TextConfig(), 32)
    model = HubGPT(data.vocab_size, {"context": 32, "layers": 2, "width": 32, "hidden": 86})
    model.save_pretrained(folder)
    again = HubGPT.from_pretrained(folder)
    inputs, _ = data.batch(0, 4, 0)
    with torch.no_grad():
        change = float((again(inputs) - model(inputs)).abs().max())
    print(f"saved to {folder}; made again, its logits differ by {change}")


if __name__ == "__main__":
    main(sys.argv[1])
