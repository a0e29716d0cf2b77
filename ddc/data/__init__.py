"""Data sets: text as windows of tokens."""

from ddc.data.text import DataConfig, TextData, load_text

__all__ = ["DataConfig", "TextData", "load_text"]
