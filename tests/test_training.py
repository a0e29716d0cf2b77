"""The trainer: records, exact resume, and what happens when things go wrong."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from torch import nn

from ddc.models import GPT, GPTConfig
from ddc.optim.factory import compiled_step
from ddc.training import loop
from ddc.training.checkpoint import load_checkpoint, read_checkpoint
from ddc.training.compose import choices_of, experiments, register_schemas, resolve
from ddc.training.display import Display
from ddc.training.evaluate import learning_rate_factor
from ddc.training.loop import train
from ddc.training.mirror import Mirror
from ddc.training.ranks import ALONE
from ddc.training.records import Records, gap_at, summarize
from ddc.training.run_folder import DivergedError
from ddc.training.schema import Config, TrainingConfig
from ddc.training.setup import Setup, prepare

ROOT = Path(__file__).resolve().parents[1]
register_schemas()
TINY = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.kv_heads=1",
    "model.hidden=16",
    "model.context=16",
    "training.batch_size=4",
    "training.steps=12",
    "training.evaluations=4",
    "training.evaluation_batches=2",
    "data.train_tokens=2000",
    "wandb=disabled",
]
TINY_LLAMA = [
    "model.context=16",
    "model.options.hidden_size=16",
    "model.options.intermediate_size=12",
    "model.options.num_hidden_layers=1",
    "model.options.num_attention_heads=2",
    "model.options.num_key_value_heads=1",
    *TINY[6:],
]
TINY_GROK = [
    "model.depth=2",
    "model.width=16",
    "data.prime=7",
    "training.batch_size=16",
    "training.steps=12",
    "training.evaluations=4",
    "wandb=disabled",
]
TINY_VIT = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.hidden=16",
    "training.batch_size=4",
    "training.steps=12",
    "training.evaluations=4",
    "training.evaluation_batches=2",
    "wandb=disabled",
]


def composed(*overrides: str) -> Config:
    small = {
        "+experiment=grok_mlp": TINY_GROK,
        "+experiment=grok_long": TINY_GROK,
        "+experiment=regauged_llama": TINY_LLAMA,
        "+experiment=vit_scratch": TINY_VIT,
    }
    tiny = next((small[each] for each in overrides if each in small), TINY)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return resolve(compose("config", overrides=[*tiny, *overrides]))


def run(tmp_path: Path, *overrides: str) -> Setup:
    return prepare(composed(f"runs={tmp_path}", *overrides))


EXPERIMENTS = sorted(experiments())


OPTIMIZERS = choices_of("optimizer")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains(tmp_path: Path, experiment: str, optimizer: str) -> None:
    setup = run(tmp_path, f"+experiment={experiment}", f"optimizer={optimizer}")
    summary = train(setup)
    assert summary["steps"] == 12
    rows = Records(setup.folder / "records.jsonl").read()
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[0]["gauge_audit"] is None
    assert all(row["gauge_audit"] < 1e-4 for row in rows[1:])
    assert all(row["gap"] == row["validation_loss"] - row["train_loss"] for row in rows)
    info = json.loads((setup.folder / "run.json").read_text())
    assert info["config"]["optimizer"]["name"] == optimizer
    assert info["seed"] == 0
    assert {"commit", "versions", "machine", "gauges", "data"} <= set(info)
    assert info["versions"]["torch"].startswith("2.13.0")


def test_records_say_what_a_hand_written_loop_gets(tmp_path: Path) -> None:
    """The trainer against the few lines that it stands for."""
    setup = run(
        tmp_path / "a",
        "optimizer=adamw",
        "training.max_grad_norm=null",
        "training.schedule=constant",
        "training.warmup=0.0",
    )
    other = run(tmp_path / "b", "optimizer=adamw")
    train(setup)
    rows = Records(setup.folder / "records.jsonl").read()
    model = other.model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        1e-3,
        (0.9, 0.99),
    )
    for step in range(12):
        x, y = other.data.batch(step, 4, 0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    x, y = map(torch.cat, zip(*other.data.evaluation_batches("validation", 2, 4), strict=True))
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    assert rows[-1]["validation_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    losses = [train(run(tmp_path, f"training.accumulation={n}"))["train_loss"] for n in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_complete_run_is_not_run_again(tmp_path: Path) -> None:
    first = train(run(tmp_path))
    setup = run(tmp_path)
    stamp = (setup.folder / "records.jsonl").stat().st_mtime_ns
    assert train(setup) == {**first, "already_complete": True}
    assert (setup.folder / "records.jsonl").stat().st_mtime_ns == stamp
    again = train(run(tmp_path, "training.resume=never"))
    assert (setup.folder / "records.jsonl").stat().st_mtime_ns != stamp
    assert again["train_loss"] == first["train_loss"]


def test_the_run_id_knows_what_decides_the_numbers() -> None:
    ids = {
        composed(*o).run_id
        for o in ([], ["seed=1"], ["optimizer.lr=1e-4"], ["gauges=none"], ["optimizer=adamw"])
    }
    assert len(ids) == 5
    same = {
        composed(*o).run_id
        for o in ([], ["wandb=offline"], ["runs=/elsewhere"], ["training.resume=never"])
    }
    assert len(same) == 1
    # ids of runs before there was the key
    assert "compiled" not in composed().identity["optimizer"]
    assert composed("optimizer.compiled=true").identity["optimizer"]["compiled"]


def test_a_step_is_compiled_where_it_pays(tmp_path: Path, monkeypatch) -> None:
    with torch.device("meta"):
        small, large = GPT(GPTConfig(layers=1), 256), GPT(GPTConfig(layers=1), 100_000)

    def chosen(model: GPT, by_kernels: bool = False) -> list[bool]:
        return [compiled_step(wanted, model, by_kernels) for wanted in (None, False, True)]

    assert chosen(small) == chosen(large) == [False, False, True]
    large = large.to_empty(device="cpu")
    assert chosen(large) == [True, False, True]
    assert chosen(large, by_kernels=True) == [False, False, True]
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert not compiled_step(None, large, by_kernels=False)
    with pytest.raises(ValueError, match=r"optimizer\.compiled=true: there is no C\+\+ compiler"):
        prepare(composed("optimizer.compiled=true"))


@pytest.mark.slow
def test_a_run_with_compiled_steps(tmp_path: Path) -> None:
    setups = [run(tmp_path, f"optimizer.compiled={compiled}") for compiled in ("true", "false")]
    for setup in setups:
        train(setup)
    compiled, eager = (
        [row["train_loss"] for row in Records(s.folder / "records.jsonl").read()] for s in setups
    )
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert [bool(setup.optimizer._advance.compiled) for setup in setups] == [True, False]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder)["model"]


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "records.jsonl").read_bytes() == (b / "records.jsonl").read_bytes()
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_from_any_evaluation_is_bit_exact(
    tmp_path: Path, optimizer: str, monkeypatch
) -> None:
    whole = run(tmp_path / "whole", f"optimizer={optimizer}")
    train(whole)
    saves = 0

    class Killed(BaseException):
        pass

    original = loop.save_checkpoint

    def save_then_die(*arguments: object) -> None:
        nonlocal saves
        saves += 1
        if saves % 2:  # between the record and its checkpoint: the row must be written again
            raise Killed
        original(*arguments)

    monkeypatch.setattr(loop, "save_checkpoint", save_then_die)
    attempts = 0
    while True:
        attempts += 1
        assert attempts < 20
        try:
            broken = run(tmp_path / "broken", f"optimizer={optimizer}")
            train(broken)
            break
        except Killed:
            continue
    assert attempts > 3
    assert_same_run(whole.folder, broken.folder)


def train_py(*overrides: str, **options: object) -> subprocess.Popen[str]:
    flags = [o for o in overrides if o.startswith("--")]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *flags,
        *TINY,
        *(o for o in overrides if o not in flags),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **(pipes | options))  # type: ignore[call-overload]


def run_folder(root: Path) -> Path:
    return next(root.glob("gpt/*"))


LONG = ["training.steps=300", "training.evaluations=60"]


def start_and_wait_for_rows(root: Path, rows: int) -> subprocess.Popen[str]:
    process = train_py(*LONG, f"runs={root}")
    deadline = time.time() + 120
    while (
        not list(root.glob("gpt/*"))
        or len(Records(run_folder(root) / "records.jsonl").read()) < rows
    ):
        assert time.time() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_killed_and_restarted_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = train_py(*LONG, f"runs={tmp_path / 'whole'}")
    for rows in (3, 12, 31):
        process = start_and_wait_for_rows(tmp_path / "killed", rows)
        process.kill()
        process.wait()
        assert not (run_folder(tmp_path / "killed") / "summary.json").exists()
    last = train_py(*LONG, f"runs={tmp_path / 'killed'}")
    for process in (whole, last):
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    assert_same_run(run_folder(tmp_path / "whole"), run_folder(tmp_path / "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path, number: int) -> None:
    process = start_and_wait_for_rows(tmp_path, 4)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == os.EX_TEMPFAIL
    assert "stopped after step" in output
    assert "Traceback" not in output
    folder = run_folder(tmp_path)
    saved = read_checkpoint(folder)["step"]
    assert saved == int(output.split("stopped after step ")[1].split(";")[0])
    assert saved >= Records(folder / "records.jsonl").read()[-1]["step"]
    second = train_py(*LONG, f"runs={tmp_path}")
    output = second.communicate(timeout=300)[0]
    assert second.returncode == 0, output
    assert f"from step {saved}" in output
    assert [row["step"] for row in Records(folder / "records.jsonl").read()] == list(
        range(0, 301, 5)
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    setup = run(
        tmp_path,
        "optimizer=adamw",
        "optimizer.lr=1e15",
        "training.warmup=1.0",
        "training.decay=0.0",
        "training.max_grad_norm=null",
        "training.evaluations=12",
    )
    with pytest.raises(
        DivergedError, match=r"checkpoint-\d+-[0-9a-f]+\.pt; a smaller optimizer\.lr"
    ):
        train(setup)
    assert all(torch.isfinite(value).all() for value in weights(setup.folder).values())
    rows = Records(setup.folder / "records.jsonl").read()
    assert rows
    assert all(math.isfinite(row["train_loss"]) for row in rows)
    assert not (setup.folder / "summary.json").exists()
    assert re.search(r"loss .* is (nan|inf)", (setup.folder / "diverged.json").read_text())


def spoil_gradients(setup: Setup, index: tuple[int, int], steps: range) -> None:
    """One entry of the embedding's gradient is nan at these steps, beside a loss that is finite."""
    count = itertools.count()

    def spoiled(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        if next(count) in steps:
            gradient[index] = math.nan
        return gradient

    setup.model.embedding.weight.register_hook(spoiled)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_no_number_stops_the_run_at_the_next_loss(
    tmp_path: Path, optimizer: str
) -> None:
    setup = run(tmp_path, f"optimizer={optimizer}")
    spoil_gradients(setup, (0, 0), range(4, 5))
    with pytest.raises(DivergedError, match=r"the loss of step 5 is nan.* last good checkpoint"):
        train(setup)
    assert [row["step"] for row in Records(setup.folder / "records.jsonl").read()] == [0, 3]
    assert all(torch.isfinite(value).all() for value in weights(setup.folder).values())
    assert "step 5 is nan" in (setup.folder / "diverged.json").read_text()


def test_weights_that_are_no_numbers_are_not_saved_though_the_loss_is_finite(
    tmp_path: Path,
) -> None:
    """The embedding of a token that no batch has."""
    setup = run(tmp_path, "training.max_grad_norm=null")
    spoil_gradients(setup, (1, 0), range(4, 5))
    with pytest.raises(DivergedError, match="the weights are not finite; they are not saved"):
        train(setup)
    assert [row["step"] for row in Records(setup.folder / "records.jsonl").read()] == [0, 3]
    assert all(torch.isfinite(value).all() for value in weights(setup.folder).values())


def test_float16_skips_what_overflows_and_stops_where_all_does(tmp_path: Path) -> None:
    """On the CPU, which a config may not ask for: the path is that of a GPU."""
    losses = {}
    for bad in (0, 1, 40):
        setup = run(tmp_path / str(bad), "training.steps=40")
        setup.config.training.precision = "float16"
        spoil_gradients(setup, (0, 0), range(4, 4 + bad))
        if bad < 40:
            losses[bad] = train(setup)["train_loss"]
            rows = Records(setup.folder / "records.jsonl").read()
            assert [row["loss_scale"] for row in rows] == [2.0**16] + [2.0 ** (16 - bad)] * 4
        else:
            with pytest.raises(
                DivergedError,
                match=r"gradients of step 33 .* overflow, down to a loss scale of 6e-05",
            ):
                train(setup)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    setup, other = run(tmp_path), run(tmp_path, "model.width=32")
    train(setup)
    with pytest.raises(ValueError, match=r"(?s)does not fit this run .* training.resume=never"):
        load_checkpoint(
            setup.folder, other.model, other.optimizer, torch.amp.GradScaler("cpu"), ALONE
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.steps=0"], "Invalid training.steps=0: expected a positive integer"),
        (
            ["training.schedule=linear"],
            "Invalid training.schedule=linear: expected one of constant, cosine, wsd",
        ),
        (
            ["training.accumulation=3"],
            "Invalid training.accumulation=3: must divide training.batch_size=4",
        ),
        (["training.warmup=0.9", "training.decay=0.2"], "Invalid training.warmup"),
        (["training.max_grad_norm=0"], "Invalid training.max_grad_norm=0"),
        (["optimizer.lr=0"], "Invalid optimizer.lr=0"),
        (["optimizer.betas=[0.9,1.0]"], "Invalid optimizer.betas"),
        (["optimizer.vertical=up"], "Invalid optimizer.vertical=up"),
        (["model.mlp=tanh"], "Invalid model.mlp='tanh'"),
        (["model.heads=3"], "Invalid model.heads=3: must divide model.width=16"),
        (["model.kv_heads=3"], "Invalid model.kv_heads=3"),
        (["model.width=6", "model.heads=2"], "an even number"),
        (["model.context=100000"], "too few for model.context=100000"),
        (["training.device=cuda"], "training.device=cuda .* no GPU"),
        (["training.precision=bfloat16"], "training.precision=bfloat16 needs a GPU"),
        (["wandb.mode=loud"], "Invalid wandb.mode=loud"),
        (["data=file"], "data=file needs data.path"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *overrides)
    assert not list(tmp_path.iterdir())


def test_foreign_keys_are_errors() -> None:
    for overrides in (
        ["optimizer=adamw", "optimizer.radial_rate=1"],
        ["training.epochs=3"],
        ["gauges.spin=true"],
    ):
        with pytest.raises(Exception, match="Could not override"):
            composed(*overrides)


def test_the_gauges_group_selects_kinds(tmp_path: Path) -> None:
    def kinds(*overrides: str) -> set[str]:
        return {gauge.kind for gauge in run(tmp_path, *overrides).gauges}

    everything = kinds()
    assert len(everything) == 5
    assert kinds("gauges=none") == set()
    assert kinds("gauges=[logit_shift,norm_scale]") == {"logit_shift", "norm_scale"}
    assert kinds("gauges.norm_scale=false") == everything - {"norm_scale"}


def test_gauges_none_is_adamw(tmp_path: Path) -> None:
    ours = train(run(tmp_path, "gauges=none"))
    plain = train(run(tmp_path, "gauges=none", "optimizer=adamw"))
    assert ours["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_schedules(schedule: str) -> None:
    config = TrainingConfig(steps=100, schedule=schedule, warmup=0.1, decay=0.2, final_lr=0.1)
    factors = [learning_rate_factor(config, step) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert factors[79] == 1.0 if schedule != "cosine" else factors[79] < 0.3
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(factors[10:]))


def test_gap_at_equal_train_loss() -> None:
    rows = [
        {"step": i, "train_loss": t, "validation_loss": v, "gap": v - t}
        for i, (t, v) in enumerate([(3.0, 3.0), (2.0, 2.4), (1.0, 2.6), (1.2, 2.5), (0.5, 3.5)])
    ]
    assert gap_at(rows, 1.5) == pytest.approx(1.0)
    assert gap_at(rows, 1.0) == pytest.approx(1.6)
    assert gap_at(rows, 0.1) is None
    summary = summarize(rows, [1.5, 0.1])
    assert summary["best_validation_loss"] == 2.4
    assert summary["best_validation_step"] == 1
    assert summary["gap_at_train_loss"] == {"1.5": pytest.approx(1.0), "0.1": None}


def test_records_survive_a_cut_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = Records(tmp_path / "records.jsonl")
    for step in range(3):
        records.append({"step": step})
    with records.path.open("a") as file:
        file.write('{"step": 3, "tr')
    assert [row["step"] for row in records.read()] == [0, 1, 2]
    assert "records.jsonl is cut short: it is left out" in caplog.text
    records.truncate(1)
    records.append({"step": 2})
    assert records.path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "key"), [("offline", None), ("auto", None), ("online", None), ("auto", "0" * 40)]
)
def test_wandb_never_takes_the_run_with_it(
    tmp_path: Path, mode: str, key: str | None, monkeypatch
) -> None:
    """Nor does a key without a network, or no key where one is needed: what cannot be sent is kept
    for wandb sync.
    """
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    # nobody listens: refused here, as on a train
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    setup = run(tmp_path, f"wandb={mode}")
    summary = train(setup)
    assert summary["steps"] == 12
    assert list(setup.folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_wandb_error_in_the_middle_is_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, *arguments: object, **options: object) -> None:
            raise OSError("no space left on device")

    mirror = Mirror(composed("wandb=disabled"), tmp_path)
    mirror._run = Broken()
    mirror.log({"step": 0})
    mirror.log({"step": 1})
    mirror.finish({})
    assert caplog.text.count("no space left on device") == 1


def test_wandb_gets_what_was_held_back_when_a_run_stops(tmp_path: Path) -> None:
    statuses: list[int] = []

    class Recorder:
        summary: dict = {}  # noqa: RUF012

        def finish(self, exit_code: int) -> None:
            statuses.append(exit_code)

    mirror = Mirror(composed("wandb=disabled"), tmp_path)
    mirror._run = Recorder()
    with pytest.raises(KeyboardInterrupt), mirror:
        raise KeyboardInterrupt
    assert statuses == [1]


@pytest.mark.slow
def test_multirun(tmp_path: Path) -> None:
    process = train_py("--multirun", "optimizer=adamw,ddcadam", "seed=0,1", f"runs={tmp_path}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert sorted(f.name.rsplit("-", 1)[0] for f in (tmp_path / "gpt").iterdir()) == [
        "adamw-seed0",
        "adamw-seed1",
        "ddcadam-seed0",
        "ddcadam-seed1",
    ]
    assert not (ROOT / "multirun").exists()
    assert not (ROOT / "outputs").exists()


@pytest.mark.slow
def test_the_command_line_ends_with_summary_and_plots(tmp_path: Path) -> None:
    process = train_py("+experiment=lm_overtrain", "optimizer=ddcadam", f"runs={tmp_path}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    for words in (
        "train loss",
        "validation loss, best",
        "gap at train loss 1.0",
        "wall time",
        "tokens/s",
    ):
        assert words in output
    for line in output.splitlines()[-4:]:
        assert (ROOT / line.strip()).stat().st_size > 0
    again = train_py("+experiment=lm_overtrain", "optimizer=ddcadam", f"runs={tmp_path}")
    assert "complete already" in again.communicate(timeout=300)[0]


def test_a_narrow_terminal_shows_step_and_time_left_whole() -> None:
    steps = 12_000_000
    display = Display(steps, 0, "")
    numbers = {"train_loss": 12.3456, "validation_loss": 12.3456, "gap": -10.5}
    row = {"step": 0, **numbers, "validation_accuracy": 0.5}
    display.progress.update(display.task, completed=steps // 2)
    for value, speed in ((0.0, ""), (1234567.8, "1,234,568 tokens/s"), (0.1234, "0.123 tokens/s")):
        display.evaluated(row, {"tokens_per_second": value})
        for width in (80, 200):
            console = Console(width=width, file=io.StringIO(), force_terminal=True)
            with console.capture() as capture:
                console.print(display.progress.make_tasks_table(display.progress.tasks))
            (line,) = re.sub(r"\x1b\[[0-9;]*m", "", capture.get()).splitlines()
            assert re.search(
                r" 6000000/12000000 +(\d+:\d\d|-):(\d\d|--):(\d\d|--) train 12.346 ", line
            )
            assert "\u2026" not in line
        assert line.rstrip().endswith(f"acc 0.500 {speed}".rstrip())


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_a_terminal_in_ascii_gets_a_table_in_ascii(tmp_path: Path, locale: dict[str, str]) -> None:
    environment = os.environ | locale | {"COLUMNS": "40"}
    process = train_py("model.context=8", f"runs={tmp_path}", env=environment)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert output.isascii()
    table = [line for line in output.splitlines() if line[:1] in ("|", "+")]
    assert any(". at step" in line for line in table)
    assert len({len(line) for line in table}) == 1


@pytest.mark.slow
def test_the_command_line_refuses_in_one_line(tmp_path: Path) -> None:
    process = train_py("data=file", "data.path=/no/such/file", f"runs={tmp_path}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert (
        output.strip().splitlines()[-1] == "error: data.path=/no/such/file: there is no such file"
    )
    assert "Traceback" not in output


@pytest.mark.slow
def test_the_compare_script(tmp_path: Path) -> None:
    setups = [run(tmp_path, f"optimizer={name}") for name in ("adamw", "ddcadam")]
    for setup in setups:
        train(setup)
    command = [
        sys.executable,
        "scripts/compare.py",
        *(str(s.folder) for s in setups),
        "--output",
        str(tmp_path / "c"),
        "--keep",
        str(tmp_path / "kept"),
    ]
    environment = os.environ | {"COLUMNS": "120"}
    output = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "AdamW, seed 0" in output
    assert "DDCAdam, seed 0" in output
    assert (tmp_path / "c.png").stat().st_size > 10_000
    assert "| validation loss, best |" in (tmp_path / "c.md").read_text()
    kept = [tmp_path / "kept" / s.folder.name for s in setups]
    command[2:4] = [str(folder) for folder in kept]
    again = subprocess.run(
        command[:6], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert again == output
    wrong = subprocess.run(
        [*command[:2], str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "holds no run" in wrong.stderr
