"""The examples, run as a user would; and DDCAdam in the Trainer of transformers is what it is in a
plain loop.
"""

from __future__ import annotations

import copy
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import ddc
from ddc import DDCAdam, find_gauges
from ddc.data import TextData
from ddc.training.compose import compose_config
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
@pytest.mark.filterwarnings("ignore")  # see below
@pytest.mark.parametrize(
    ("example", "steps", "by"),
    [
        ("accelerate_loop", 40, 1.5),
        ("lightning_module", 40, 1.5),
        ("muon_groups", 40, 1.5),
        ("timm_factory", 80, 0.2),
        ("trainer_factory", 40, 1.5),
    ],
)
def test_an_example_of_a_tool_learns(
    example: str,
    steps: int,
    by: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    importlib.import_module(f"examples.{example}").main(steps)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"validation loss'?:? (\d+\.\d+)", printed)]
    assert len(losses) == 2
    assert losses[1] < losses[0] - by


def test_examples_are_short() -> None:
    """Of tools: what one reads in one go."""
    for each in (ROOT / "examples").glob("*.py"):
        if each.name not in ("plain_loop.py", "hf_trainer.py", "__init__.py"):
            assert len(each.read_text().splitlines()) < 70, each.name


def test_a_model_comes_back_from_the_hubs_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("examples.hub_model").main(str(tmp_path / "model"))
    assert "its logits differ by 0.0" in capsys.readouterr().out
    assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "model").iterdir()}


def test_the_sweep_is_one_of_runs_that_there_are() -> None:
    """Every key and value makes a configuration; what is minimised is in a run's rows."""
    sweep = yaml.safe_load((ROOT / "examples/sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).exists()
    assert set(sweep) <= {"program", "method", "metric", "early_terminate", "command", "parameters"}
    recorded = (ROOT / "results/lm_overtrain/runs.jsonl").read_text()
    assert f'"{sweep["metric"]["name"]}"' in recorded
    fixed = [each for each in sweep["command"] if not each.startswith("${")]
    choices = {}
    for key, says in sweep["parameters"].items():
        choices[key] = [says["value"]] if "value" in says else says.get("values")
        choices[key] = choices[key] or [says["min"], says["max"]]
    for i in range(max(map(len, choices.values()))):
        overrides = [f"{key}={values[i % len(values)]}" for key, values in choices.items()]
        config = compose_config([*fixed, *overrides])
        assert config.optimizer.lr == choices["optimizer.lr"][i % 2]


# A warning of Lightning's own class would have each process of the tests import Lightning.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mixin", "same"), [(True, True), (False, False)])
def test_lightning_clips_by_the_invariant_norm(
    mixin: bool, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From two starts on one orbit the same function, but not where Lightning clips by itself."""
    monkeypatch.chdir(tmp_path)
    lightning = importlib.import_module("examples.lightning_module").lightning
    model, inputs = make("Sequential ReLU MLP")
    gauges = find_gauges(model)
    targets = torch.arange(4) % 3

    bases = [*[ddc.InvariantClipping] * mixin, lightning.LightningModule]

    class Trained(*bases):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return DDCAdam(self.model.named_parameters(), gauges, lr=1e-2)

    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader([(inputs[0] * i, targets) for i in (1, 9, 2, 8)], None)
    for each in copies:
        lightning.Trainer(
            max_steps=4, gradient_clip_val=0.05, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(Trained(each), loader)  # fmt: skip
    a, b, before = (each(inputs[0]).log_softmax(-1) for each in (*copies, model))
    assert (distance(a, b) < 1e-10) == same
    assert distance(a, before) > 1e-3


def test_timms_own_groups_are_refused_where_gauges_need_names() -> None:
    timm_factory = importlib.import_module("examples.timm_factory")
    model, inputs = make("ViT, ReLU")
    gauges = find_gauges(model, inputs=inputs)
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        timm_factory.create_optimizer_v2(model, "ddcadam", gauges=gauges)
    groups = timm_factory.named_groups
    made = timm_factory.create_optimizer_v2(
        model, "ddcadam", lr=1e-3, gauges=gauges, param_group_fn=groups
    )
    assert isinstance(made, DDCAdam)
    assert [group["weight_decay"] for group in made.param_groups] == [timm_factory.DECAY, 0]


@pytest.mark.slow
def test_adapters_learn_the_same_from_any_start(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples/lora.py", "--steps=60"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = re.findall(r"(\w+), A times .*: validation loss (\d+\.\d+)", run.stdout)
    adamw, ddcadam = (
        [float(loss) for each, loss in found if each == name] for name in ("AdamW", "DDCAdam")
    )
    assert len(adamw) == len(ddcadam) == 3
    assert max(ddcadam) < 3.2
    assert max(ddcadam) - min(ddcadam) < 0.005
    assert max(adamw) - min(adamw) > 0.03


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
