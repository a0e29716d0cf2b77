"""Data sets: text as windows of tokens, images with labels, modular arithmetic as pairs of
residues.
"""

from ddc.data.config import DataConfig, DataError
from ddc.data.images import ImageConfig, ImageData, load_images
from ddc.data.modular import ModularConfig, PairData, load_modular
from ddc.data.text import TextConfig, TextData, load_text

Data = TextData | ImageData | PairData

__all__ = [
    "Data",
    "DataConfig",
    "DataError",
    "ImageConfig",
    "ImageData",
    "ModularConfig",
    "PairData",
    "TextConfig",
    "TextData",
    "load_images",
    "load_modular",
    "load_text",
]
