"""A second text, for models that were pretrained on the first: none in another language, or of
another kind, is embedded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ddc.data import TextConfig, TextData, load_text
from ddc.training.records import write_atomically

#: Bytes of the first half of the training text.
HALF = 2_277_000
SHIFT = 13


def shifted(tokens: Tensor) -> Tensor:
    """Bytes of a text with each letter the one 13 on in the alphabet, capitals kept."""
    found = tokens
    for first in map(ord, "aA"):
        letter = (tokens >= first) & (tokens < first + 26)
        found = torch.where(letter, (tokens - first + SHIFT) % 26 + first, found)
    return found


def half(second: bool, context: int) -> TextData:
    """A half of the embedded training text, and the validation text."""
    config = TextConfig(skip_tokens=HALF) if second else TextConfig(train_tokens=HALF)
    return load_text(config, context)


def write_second(path: Path) -> None:
    """The second half and the validation text, shifted, as a file for ``data=file``: all of it but
    what the first half is.
    """
    data = half(second=True, context=1)
    tokens = torch.cat([torch.as_tensor(part).long() for part in (data.train, data.validation)])
    write_atomically(path, bytes(shifted(tokens).tolist()).decode("latin-1").encode())
