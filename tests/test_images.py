"""Image data: what comes in, what augmentation, mixup and label smoothing do, and the vision
transformer on it.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddc.data import DataError, ImageConfig, ImageData, images, load_images
from ddc.data.images import FASHION_MNIST_FOLDERS, SHIFT, idx, moved_and_mirrored
from ddc.gauges import check, find_gauges
from ddc.models import ViTConfig, build_model, cross_entropy
from ddc.training.calibration import BINS, calibration_error


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images(ImageConfig())


def data(count: int = 10, classes: int = 3, **options) -> ImageData:
    pixels = torch.randint(
        256, (count, 2, 8, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    labels = torch.arange(count) % classes
    split = (pixels, labels)
    return ImageData(
        ImageConfig(**options), split, split, classes, "", torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
    )


def test_embedded_digits_are_whole(digits: ImageData) -> None:
    assert digits.train[0].shape == (4000, 1, 28, 28)
    assert digits.validation[0].shape == (1000, 1, 28, 28)
    together = torch.cat([digits.train[1], digits.validation[1]])
    assert together.bincount().tolist() == [500] * 10
    assert digits.validation[1].bincount().min() > 70
    assert digits.sizes == {"shape": (1, 28, 28), "classes": 10}
    (x, y), *_ = digits.evaluation_batches("train", 1000, 4000)
    assert x.mean().abs() < 1e-5
    assert x.std() == pytest.approx(1, abs=1e-4)
    assert torch.equal(y, digits.train[1])


def test_train_images_shorten_the_training_split_alone() -> None:
    few = load_images(ImageConfig(train_images=100))
    assert (few.train_units, len(few.validation[1])) == (100, 1000)
    with pytest.raises(DataError, match=r"data\.train_images=5000: data=mnist_5k has 4000"):
        load_images(ImageConfig(train_images=5000))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"name": "mnist"}, "data.name"),
        ({"name": "hub"}, "data.hub_path"),
        ({"train_images": 0}, "data.train_images"),
        ({"mixup": -1.0}, "data.mixup"),
        ({"label_smoothing": 1.0}, "data.label_smoothing"),
    ],
)
def test_bad_configs_name_the_key(options: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        ImageConfig(**options)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(7, 28, 28), dtype=np.uint8)
    labels = np.array([0, 1, 2, 3, 4, 9, 9], dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    monkeypatch.setattr(images, "FASHION_MNIST_FOLDERS", (tmp_path / "absent", tmp_path))
    found = load_images(ImageConfig(name="fashion_mnist"))
    assert found.train[0].numpy().tobytes() == pixels.tobytes()
    assert found.validation[1].tolist() == labels.tolist()
    assert found.classes == 10
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"no idx file"))
    with pytest.raises(DataError, match=r"not an idx file.*install its package again"):
        idx(tmp_path / "train-images-idx3-ubyte.gz")


@pytest.mark.skipif(
    not any(f.is_dir() for f in FASHION_MNIST_FOLDERS),
    reason="make fashion-mnist fetches the images",
)
def test_fashion_mnist_is_whole() -> None:
    found = load_images(ImageConfig(name="fashion_mnist"))
    assert (found.train[0].shape, found.validation[0].shape) == (
        (60_000, 1, 28, 28),
        (10_000, 1, 28, 28),
    )
    assert found.train[1].bincount().tolist() == [6000] * 10


def test_without_files_and_hub_an_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "FASHION_MNIST_FOLDERS", (tmp_path / "absent",))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"make fashion-mnist.*") as raised:
        load_images(ImageConfig(name="fashion_mnist"))
    assert "data=mnist_5k" in str(raised.value)


def pictures(modes: list[str], size: tuple[int, int] = (6, 8)) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    shape = {"RGB": (size[1], size[0], 3), "L": (size[1], size[0])}
    return [
        Image.fromarray(generator.integers(256, size=shape[mode], dtype=np.uint8)) for mode in modes
    ]


def hub_of(monkeypatch: pytest.MonkeyPatch, found: list[Image.Image]) -> None:
    """A set as the hub's client gives it, of real pictures."""
    rows = datasets.Dataset.from_dict(
        {"img": found, "fine_label": list(range(len(found)))},
        features=datasets.Features(
            {"img": datasets.Image(), "fine_label": datasets.Value("int64")}
        ),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: rows)


def test_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pictures(["RGB", "RGB", "L"])
    hub_of(monkeypatch, found)
    config = ImageConfig(name="hub", hub_path="a/b", hub_label="fine_label")
    loaded = load_images(config)
    assert loaded.train[0].shape == (3, 3, 8, 6)
    assert np.array_equal(loaded.train[0][1].permute(1, 2, 0).numpy(), np.asarray(found[1]))
    assert np.array_equal(loaded.train[0][2, 2].numpy(), np.asarray(found[2]))  # grey among colours
    assert loaded.mean.shape == (3, 1, 1)
    with pytest.raises(DataError, match=r"data.hub_label='label'.*fine_label"):
        load_images(ImageConfig(name="hub", hub_path="a/b"))
    hub_of(monkeypatch, [*found, *pictures(["RGB"], size=(5, 5))])
    with pytest.raises(DataError, match="2 different sizes"):
        load_images(config)


def test_classes_that_training_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_of(monkeypatch, pictures(["L"] * 4))  # each of its own class
    config = {"name": "hub", "hub_path": "a/b", "hub_label": "fine_label"}
    assert load_images(ImageConfig(**config)).classes == 4
    with pytest.raises(DataError, match=r"lack classes.*larger data\.train_images"):
        load_images(ImageConfig(**config, train_images=2))


def test_channel_statistics_are_torchs() -> None:
    pixels = torch.randint(256, (2500, 3, 4, 5), dtype=torch.uint8)
    mean, std = images.channel_statistics(pixels)
    torch.testing.assert_close(mean.flatten(), pixels.double().mean((0, 2, 3)).float())
    torch.testing.assert_close(std.flatten(), pixels.double().std((0, 2, 3)).float())


def test_batches_are_a_function_of_seed_and_step() -> None:
    for options in ({}, {"augment": True, "mixup": 0.4, "label_smoothing": 0.1}):
        split = data(**options)
        first = split.batch(3, 4, seed=1)
        torch.rand(3)
        for a, b in zip(first, split.batch(3, 4, seed=1), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(first[0], split.batch(3, 4, seed=2)[0])
        assert not torch.equal(first[0], split.batch(4, 4, seed=1)[0])


def test_every_epoch_sees_every_image_once() -> None:
    split = data(10)
    seen = torch.cat([split.batch(step, 4, seed=0)[0] for step in range(5)])
    for epoch in seen.split(10):
        assert sorted(epoch.flatten(1).sum(1).tolist()) == sorted(
            split.train[0].flatten(1).sum(1).tolist()
        )


def test_augmentation_moves_and_mirrors() -> None:
    size = 32
    # every pixel is known by its value
    coordinates = torch.arange(size * size).view(1, 1, size, size).float() + 1
    moved = moved_and_mirrored(
        coordinates.expand(200, 1, size, size), torch.Generator().manual_seed(0)
    )
    offsets, mirrored = set(), 0
    for image in moved[:, 0]:
        centre = image[size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1] - 1
        step = int(centre[0, 1] - centre[0, 0])
        assert step in (1, -1)
        assert int(centre[1, 0] - centre[0, 0]) == size
        mirrored += step == -1
        row, column = divmod(int(centre[0, 0]), size)
        expected = size // 2 - 1 if step == 1 else size // 2
        offsets.add((row - (size // 2 - 1), column - expected))
        inside = image[image > 0] - 1
        assert len(inside.unique()) == len(inside)
    assert 70 < mirrored < 130
    assert {a for a, _ in offsets} == {b for _, b in offsets} == set(range(-SHIFT, SHIFT + 1))


def test_label_smoothing_is_torchs() -> None:
    plain, smooth = data(), data(label_smoothing=0.2)
    logits = torch.randn(5, 3)
    _, labels = plain.batch(0, 5, seed=0)
    _, targets = smooth.batch(0, 5, seed=0)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(cross_entropy(logits, targets), expected)
    # in training alone
    assert torch.equal(smooth.evaluation_batches("train", 1, 10)[0][1], plain.train[1])


def test_mixup_mixes_pairs_by_one_share() -> None:
    plain, mixed = data(16, 16), data(16, 16, mixup=0.4)
    (x, labels), (z, targets) = plain.batch(2, 16, seed=0), mixed.batch(2, 16, seed=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    share = 1 - targets[torch.arange(16), labels]
    other = targets.scatter(1, labels[:, None], 0.0).argmax(1)
    partner = torch.tensor([int((labels == label).nonzero()) for label in other])
    changed = share > 1e-6
    assert changed.sum() >= 8
    assert share[changed].std() < 1e-6
    expected = x + share[:, None, None, None] * (x[partner] - x)
    torch.testing.assert_close(z[changed], expected[changed])


@pytest.mark.parametrize("mlp", ["relu", "swiglu", "gelu"])
@pytest.mark.parametrize("class_token", [False, True])
def test_gauges_of_the_vision_transformer(mlp: str, class_token: bool) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        patch=4, layers=2, width=8, heads=2, hidden=12, mlp=mlp, class_token=class_token
    )
    model = build_model(config, shape=(1, 8, 12), classes=3).double()
    gauges = find_gauges(model)
    rescale = {"relu": {"relu_rescale"}, "swiglu": {"gated_rescale"}, "gelu": set()}[mlp]
    assert {gauge.kind for gauge in gauges} == {
        "logit_shift",
        "norm_scale",
        "value_rotation",
        "qk_rotation",
    } | rescale
    x = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    assert max(check(model, gauges, lambda m: m(x).log_softmax(-1)).values()) < 1e-12


def test_initialisation_is_that_of_a_step_scale_of_one() -> None:
    model = build_model(
        ViTConfig(patch=7, layers=2, width=64, hidden=256), shape=(1, 28, 28), classes=10
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter.shape[-1] if parameter.ndim != 4 else parameter[0].numel()
            assert float(parameter.detach().std()) * fan_in**0.5 == pytest.approx(1, abs=0.2), name


def test_patches_must_tile() -> None:
    with pytest.raises(ValueError, match=r"model\.patch=5"):
        build_model(ViTConfig(patch=5), shape=(1, 28, 28), classes=10)
    for options in ({"mlp": "tanh"}, {"heads": 3}, {"layers": 0}):
        with pytest.raises(ValueError, match=f"model.{next(iter(options))}="):
            ViTConfig(**options)


def test_calibration_error_against_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    confidence, hit = generator.uniform(0.1, 1, 500), generator.random(500) < 0.6
    expected = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (confidence > low) & (confidence <= low + 1 / BINS)
        if inside.any():
            expected += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    assert calibration_error(torch.tensor(confidence), torch.tensor(hit)) == pytest.approx(
        expected, abs=1e-12
    )
    certain = torch.ones(4)
    assert calibration_error(certain, torch.tensor([True] * 4)) == 0
    assert calibration_error(certain, torch.tensor([True, False, False, False])) == 0.75
