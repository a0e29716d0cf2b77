"""The examples, run as a user would; and DDCAdam in the Trainer of transformers is what it is in a
plain loop.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from ddc import DDCAdam, find_gauges
from ddc.data import TextData
from examples import hf_trainer
from examples.hf_trainer import ClipByInvariantNorm, Trainer, TrainingArguments, blocks
from tests.zoo import VOCABULARY, logits, make

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 20, 4
ADAM = {"lr": 3e-3, "weight_decay": 0.1}
MAX_NORM = 0.1  # less than the norm of every gradient in these tests


@pytest.mark.slow
@pytest.mark.parametrize("script", ["plain_loop.py", "hf_trainer.py"])
def test_an_example_learns(script: str, tmp_path: Path) -> None:
    """From a random guess (ln 256 = 5.5 nats) to less than the frequencies of bytes alone would
    reach (3.3 nats).
    """
    command = [sys.executable, ROOT / "examples" / script, "--steps=100"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first, *_, last = map(float, re.findall(r"validation loss (\d+\.\d+)", run.stdout))
    assert first > 5.5
    assert last < 2.8


@pytest.mark.slow
def test_adapters_learn_the_same_from_any_start(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples/lora.py", "--steps=60"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, *after = map(float, re.findall(r"validation loss (\d+\.\d+)", run.stdout))
    assert before < 2.9
    assert max(after) < 3.2
    assert abs(after[0] - after[1]) < 0.005


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The loss in the precision of the model: that of transformers rounds logits to float32."""
    targets = labels[:, 1:].flatten()
    loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    return loss / (len(targets) if num_items_in_batch is None else num_items_in_batch)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def make_optimizer(kind: type[Optimizer], model: nn.Module) -> tuple[Optimizer, CosineAnnealingLR]:
    gauges = (find_gauges(model),) if kind is DDCAdam else ()
    optimizer = kind(model.named_parameters(), *gauges, **ADAM)
    return optimizer, CosineAnnealingLR(optimizer, STEPS)


def train(
    kind: type[Optimizer],
    model: nn.Module,
    data: Dataset,
    folder: Path,
    clip: bool = False,
    **options: Any,
) -> None:
    """Trainer, without a clipping of its own unless options say so."""
    training = TrainingArguments(
        str(folder), max_steps=STEPS, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True,
        **{"per_device_train_batch_size": BATCH, "max_grad_norm": 0, **options},
    )  # fmt: skip
    Trainer(
        model, training, train_dataset=data, optimizers=make_optimizer(kind, model),
        compute_loss_func=loss_of,
        callbacks=[ClipByInvariantNorm(MAX_NORM)] if clip else [],
    ).train()  # fmt: skip


@pytest.fixture(scope="module")
def data(shakespeare: TextData) -> Dataset:
    return blocks(shakespeare.train[: STEPS * BATCH * hf_trainer.CONTEXT] % VOCABULARY)


@pytest.mark.parametrize(
    ("kind", "options", "same"),
    [
        (DDCAdam, {}, True),
        (DDCAdam, {"clip": True}, True),
        (DDCAdam, {"max_grad_norm": MAX_NORM}, False),
        (DDCAdam, {"max_grad_norm": 1.0}, False),  # Trainer's default
        (AdamW, {}, False),
    ],
)
def test_equivariance(
    kind: type[Optimizer], options: dict, same: bool, data: Dataset, tmp_path: Path
) -> None:
    """Two starts on one gauge orbit stay one function; under AdamW, or clipped by the Euclidean
    norm, they do not.
    """
    model, inputs = make("Llama")
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    find_gauges(model).transform_(copies[1], torch.Generator().manual_seed(1))
    for each in copies:
        train(kind, each, data, tmp_path, **options)
    before, a, b = (logits(each, inputs).log_softmax(-1) for each in (model, *copies))
    assert distance(a, b) < 1e-7 if same else distance(a, b) > 1e-3
    assert distance(a, before) > 0.1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_does_what_a_plain_loop_does(
    accumulation: int, data: Dataset, tmp_path: Path
) -> None:
    """Same batches, same schedule, same clipping: same weights."""
    model, _ = make("Llama")
    start, plain = copy.deepcopy(model), copy.deepcopy(model).train()
    train(
        DDCAdam, model, data, tmp_path, clip=True, train_sampling_strategy="sequential",
        per_device_train_batch_size=BATCH // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    optimizer, scheduler = make_optimizer(DDCAdam, plain)
    for step in range(STEPS):
        tokens = torch.tensor(data[step * BATCH : (step + 1) * BATCH]["input_ids"])
        optimizer.zero_grad()
        loss_of(plain(tokens), tokens).backward()
        norm = optimizer.grad_norm()
        assert norm > MAX_NORM
        clip_grads_with_norm_(plain.parameters(), MAX_NORM, norm)
        optimizer.step()
        scheduler.step()
    for (name, a), b, before in zip(
        model.named_parameters(), plain.parameters(), start.parameters(), strict=True
    ):
        assert distance(a, b) < 1e-10, name
        assert distance(a, before) > 1e-3, name


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bytes_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    grad_norm = DDCAdam.grad_norm

    def counted(optimizer: DDCAdam) -> Tensor:
        nonlocal steps
        steps += 1
        return grad_norm(optimizer)

    # called once a step, by the callback that clips
    monkeypatch.setattr(DDCAdam, "grad_norm", counted)
    hf_trainer.main(["--steps=20", f"--output={tmp_path / 'unbroken'}"])
    assert steps == 20
    shutil.copytree(tmp_path / "unbroken/checkpoint-10", tmp_path / "resumed/checkpoint-10")
    hf_trainer.main(["--steps=20", f"--output={tmp_path / 'resumed'}", "--resume"])
    assert steps == 30
    halfway, unbroken, resumed = (
        (tmp_path / folder / "model.safetensors").read_bytes()
        for folder in ("unbroken/checkpoint-10", "unbroken/checkpoint-20", "resumed/checkpoint-20")
    )
    assert unbroken == resumed
    assert unbroken != halfway
