"""Data sets: text as windows of tokens, modular arithmetic as pairs of residues."""

from ddc.data.config import DataConfig, DataError
from ddc.data.modular import ModularConfig, PairData, load_modular
from ddc.data.text import TextConfig, TextData, load_text

Data = TextData | PairData

__all__ = [
    "Data",
    "DataConfig",
    "DataError",
    "ModularConfig",
    "PairData",
    "TextConfig",
    "TextData",
    "load_modular",
    "load_text",
]
