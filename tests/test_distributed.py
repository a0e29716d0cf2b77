"""Several processes give the trajectory of one: optimizers under DDP and FSDP2, checkpoints, the
trainer.

All that needs more than one process runs in three that are started once; the tests look at what
came of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ddc import DDCAdam, DDCMuon, find_gauges
from ddc.gauges import GaugeSet, Rotation, hidden_matrices, in_blocks, named_parameters, whole
from ddc.models import GPTConfig, cross_entropy
from ddc.models.deep_mlp import DeepMLP, DeepMLPConfig
from ddc.optim.drift import GaugeDrift
from ddc.optim.factory import make_optimizer
from ddc.training import loop
from ddc.training.checkpoint import read_checkpoint
from ddc.training.loop import train
from ddc.training.ranks import Ranks, join_ranks, leave_ranks
from ddc.training.records import Records
from ddc.training.schema import LauncherConfig
from ddc.training.setup import Setup, prepare
from experiments.equivariance.measure import random_model
from tests.test_training import TINY, composed

ROOT = Path(__file__).resolve().parents[1]
STEPS, VOCABULARY = 6, 19
# sizes that two ranks do not divide evenly: shards cut through heads, pairs of RoPE, and units of
# axis 1
SIZES = {"context": 12, "layers": 2, "width": 18, "heads": 3, "hidden": 11}
MODELS: dict[str, GPTConfig | DeepMLPConfig] = {
    "llama": GPTConfig(**SIZES, kv_heads=1),
    "layer": GPTConfig(
        **SIZES, kv_heads=3, norm="layer", mlp="relu", positions="learned", bias=True
    ),
    "partial": GPTConfig(
        **SIZES | {"width": 24}, kv_heads=3, mlp="relu2", positions="partial_rope"
    ),
    # the four rows of the only key-value head leave nothing for the third rank
    "empty": GPTConfig(**SIZES | {"width": 16, "heads": 4, "hidden": 10}, kv_heads=1),
    "mlp": DeepMLPConfig(depth=4, width=7),
}


@dataclass(frozen=True)
class Case:
    """An optimizer on a model, and how it is spread."""

    model: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    how: str = "fsdp"
    dtype: torch.dtype = torch.float64
    per_layer: bool = False
    blocks: bool = False
    transformed: bool = False

    def __str__(self) -> str:
        flags = [key for key in ("per_layer", "blocks", "transformed") if getattr(self, key)]
        options = [f"{key}={value}" for key, value in self.options.items()]
        return "-".join(
            [
                self.model,
                self.optimizer,
                *options,
                *flags,
                self.how,
                str(self.dtype).removeprefix("torch."),
            ]
        )


#: Lifts whose rules have hyperparameters of their own.
NEW = ("ddclion", "ddcsgd", "ddcshampoo")
PAPER = {"step_scale": "norm", "retract": False, "additive": True}
CASES = [
    Case("llama", "ddcadam", how="ddp"),
    Case("llama", "ddcadam"),
    Case("llama", "ddcadam", how="hybrid"),
    Case("llama", "ddcadam", transformed=True),
    Case("llama", "ddcadam", dtype=torch.float32),
    Case("llama", "ddcmuon", {"per_head": True, "vertical": "balance"}),
    Case("llama", "muon", {"orthogonalizer": "newton_schulz"}),
    Case("layer", "ddcadam", {"vertical": "adam", "step_scale": "norm", "retract": False}),
    Case("layer", "ddcmuon", {"vertical": "adam"}),
    Case("layer", "ddcadam_paper", PAPER | {"vertical": "balance"}, blocks=True),
    Case("llama", "ddcmuon", PAPER, blocks=True),
    Case("layer", "adamw_relative", {"adam_lr": 1e-3, "steps": {}}),
    Case("partial", "ddcadam"),
    Case("empty", "ddcadam", how="three"),
    Case("empty", "ddcmuon", {"per_head": True}, how="three"),
    Case("empty", "ddcadam", how="columns"),
    Case("empty", "ddcmuon", {"per_head": True}, how="columns"),
    Case("mlp", "ddcadam", {"vertical": "balance"}, per_layer=True),
    Case("mlp", "ddcmuon"),
    Case("llama", "ddclion"),
    Case("llama", "ddcsgd", {"nesterov": True}),
    Case("layer", "ddcshampoo"),
    Case("empty", "ddcshampoo", how="columns"),
]
#: Trainer runs that begin on one process and go on with two, and the reverse.
RUNS = {
    "adamw": ["+experiment=lm_overtrain", "optimizer=adamw", "launcher.parallel=fsdp"],
    "muon": [
        "+experiment=lm_overtrain",
        "optimizer=muon",
        "training.accumulation=2",
        "launcher.parallel=fsdp",
    ],
    "ddcadam": ["+experiment=grok_mlp", "optimizer=ddcadam", "launcher.parallel=fsdp"],
    "llama": ["+experiment=regauged_llama", "optimizer=ddcadam", "launcher.parallel=fsdp"],
    "ddcmuon": ["+experiment=grok_mlp", "optimizer=ddcmuon", "launcher.parallel=fsdp"],
    "slt": [
        "+experiment=lm_overtrain",
        "slt=cells",
        "slt.readings=8",
        "slt.sequences=4",
        "slt.keep_snapshots=false",
        "launcher.parallel=ddp",
    ],
}


# ------------------------------------------------------------------------------------------ what a
# process does


def make_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    config = MODELS[name]
    if isinstance(config, GPTConfig):
        return random_model(config, VOCABULARY, seed, dtype)
    torch.manual_seed(seed)
    return DeepMLP(config, tokens=5, classes=5).to(dtype)


def batch(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Twelve examples, which two and three ranks divide."""
    generator, config = torch.Generator().manual_seed(seed), MODELS[name]
    if isinstance(config, GPTConfig):
        tokens = torch.randint(VOCABULARY, (12, config.context + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    return torch.randint(5, (12, 2), generator=generator), torch.randint(
        5, (12,), generator=generator
    )


class Training:
    """A model and its optimizer on one process, or spread over the ranks of a mesh."""

    def __init__(self, case: Case, mesh: DeviceMesh | None = None, seed: int = 0) -> None:
        self.case, self.mesh = case, mesh
        self.model = make_model(case.model, case.dtype, seed)
        found = find_gauges(self.model, per_layer=case.per_layer)
        self.gauges: GaugeSet = in_blocks(found) if case.blocks else found
        if case.transformed:
            self.gauges.transform_(self.model, torch.Generator().manual_seed(1))
        adam = {"betas": (0.9, 0.99), "eps": 1e-8} if case.optimizer not in NEW else {}
        options = {"lr": 1e-2, **adam, **case.options}
        hidden = (
            hidden_matrices(self.model, options.pop("per_head", False))
            if "muon" in case.optimizer
            else ()
        )
        if hidden:
            options = (
                {"momentum": 0.9, "orthogonalizer": "polar", "adam_lr": 1e-2}
                | options
                | {"lr": 0.05}
            )
        if case.optimizer == "muon":
            options |= {"nesterov": True, "adjust_lr_fn": "original"}
        self.trained = self.model
        if mesh is not None:
            self.start = {
                name: p.detach().clone() for name, p in named_parameters(self.model).items()
            }
            if case.how == "ddp":
                self.trained = DistributedDataParallel(self.model, process_group=mesh.get_group())
            else:
                last = (lambda p: Shard(p.ndim - 1)) if case.how == "columns" else None
                for layer in self.model.get_submodule(
                    "layers" if case.model == "mlp" else "blocks"
                ).children():
                    fully_shard(layer, mesh=mesh, shard_placement_fn=last)
                fully_shard(
                    self.model, mesh=mesh, reshard_after_forward=True, shard_placement_fn=last
                )
        self.optimizer = make_optimizer(
            case.optimizer, self.model, self.gauges, 0.1, hidden, **options
        )
        self.losses: list[float] = []
        self.norms: list[float] = []

    def steps(self, first: int, last: int) -> Training:
        for seed in range(first, last):
            x, y = self.part(batch(self.case.model, seed))
            self.optimizer.zero_grad()
            loss = cross_entropy(self.trained(x), y)
            loss.backward()
            norm = loop.grad_norm(self.model, self.optimizer)
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, norm)
            self.optimizer.step()
            self.norms.append(float(whole(norm)))
        return self

    def part(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if self.mesh is None:
            return pair
        place = (
            self.mesh.get_rank()
            if self.mesh.ndim == 1
            else self.mesh.mesh.flatten().tolist().index(dist.get_rank())
        )
        return tuple(each.chunk(self.mesh.size())[place] for each in pair)

    def result(self) -> dict[str, Any]:
        """All that must not depend on how the training is spread."""
        with torch.no_grad():
            outputs = self.model(batch(self.case.model, 99)[0]).log_softmax(-1)
        params = named_parameters(self.model)
        state = {
            name: {key: whole(value).clone() for key, value in self.optimizer.state[p].items()}
            for name, p in params.items()
        }
        return {
            "weights": {name: whole(p.detach()).clone() for name, p in params.items()},
            "outputs": outputs,
            "norms": torch.tensor(self.norms),
            "state": state,
        }


def save_dcp(training: Training, path: Path) -> None:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    group = training.mesh and training.mesh.get_group()
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path, process_group=group)


def load_dcp(training: Training, path: Path) -> Training:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    state = {"model": model, "optimizer": optimizer}
    group = training.mesh and training.mesh.get_group()
    dcp.load(state, checkpoint_id=path, process_group=group)
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return training


DCP_CASES = [Case("llama", "ddcadam"), Case("llama", "ddcmuon", {"per_head": True})]


def low_precision(mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """bfloat16 weights under given gradients, with a layer that has none and a parameter that has
    none.
    """
    model = make_model("layer").bfloat16()
    gauges = find_gauges(model)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = DDCAdam(model.named_parameters(), gauges, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, p in model.named_parameters():
            gradient = torch.randn(p.shape, generator=generator).bfloat16()
            if name.startswith("blocks.1") or name == "blocks.0.mlp.up.bias":
                continue
            p.grad = (
                gradient
                if mesh is None
                else distribute_tensor(gradient, mesh, p.placements, src_data_rank=None)
            )
        optimizer.step()
    return {name: whole(p.detach()).float() for name, p in model.named_parameters()}


def refused(mesh: DeviceMesh, hybrid: DeviceMesh) -> dict[str, str]:
    """Messages of what cannot be split."""

    def message(function: Callable[[], object]) -> str:
        try:
            function()
        except ValueError as error:
            return str(error)
        return ""

    part, two_ways = make_model("llama"), make_model("llama")
    gauges = find_gauges(part)
    fully_shard(part.blocks[0].mlp.down, mesh=mesh)
    two_ways.head.weight = nn.Parameter(
        distribute_tensor(two_ways.head.weight, hybrid, [Shard(0), Shard(1)])
    )
    return {
        "part": message(lambda: DDCAdam(part.named_parameters(), gauges)),
        "part hidden": message(
            lambda: DDCMuon(part.named_parameters(), gauges, hidden_matrices(part))
        ),
        "two ways": message(lambda: DDCAdam(two_ways.named_parameters(), ())),
    }


@contextlib.contextmanager
def sigterm_after(step: int, rank: int = 0) -> Iterator[None]:
    """SIGTERM to one rank in the middle of a step."""
    original = loop.train_step

    def train_step(setup: Setup, at: int, *arguments: Any, **options: Any) -> float | None:
        if at == step - 1 and setup.ranks.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(setup, at, *arguments, **options)

    loop.train_step = train_step
    try:
        yield
    finally:
        loop.train_step = original


def trained(name: str, folder: Path, ranks: Ranks, stop_at: int | None = None) -> Path:
    """Train, or go on with, one of :data:`RUNS`; by a single process, or by some."""
    overrides = [each for each in RUNS[name] if ranks.size > 1 or not each.startswith("launcher")]
    launcher = ["launcher=torchrun"] if ranks.size > 1 else []
    setup = prepare(composed(*launcher, *overrides, f"runs={folder}"), ranks)
    if stop_at is None:
        train(setup)
    else:
        with (
            sigterm_after(stop_at, rank=ranks.size - 1),
            pytest.raises(KeyboardInterrupt, match=f"step {stop_at};"),
        ):
            train(setup)
    return setup.folder


def process(rank: int, folder: Path) -> None:
    """One of three ranks; most of the work is that of the first two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    meshes = {"fsdp": DeviceMesh("cpu", [0, 1]), "three": DeviceMesh("cpu", [0, 1, 2])}
    meshes["ddp"] = meshes["columns"] = meshes["fsdp"]
    meshes["hybrid"] = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("replicate", "shard"))
    results: dict[str, Any] = {}
    for case in CASES:
        if rank in meshes[case.how].mesh:
            training = Training(case, meshes[case.how]).steps(0, STEPS)
            results[str(case)] = training.result()
            if case == CASES[1]:
                results["drift"] = GaugeDrift(training.start, training.gauges).at(
                    named_parameters(training.model)
                )
                results["state is split"] = all(
                    isinstance(state["exp_avg"], DTensor)
                    and state["exp_avg"].placements == p.placements
                    for p, state in training.optimizer.state.items()
                    if "exp_avg" in state
                )
    for i, case in enumerate(DCP_CASES):
        if rank < 2:
            training = Training(case, meshes["fsdp"]).steps(0, 3)
            save_dcp(training, folder / f"of-two-{i}")
        dist.barrier()
        for mesh, source in (("three", "of-two"), ("fsdp", "of-one")):
            if rank in meshes[mesh].mesh:
                training = load_dcp(Training(case, meshes[mesh], seed=1), folder / f"{source}-{i}")
                results[f"{source}-{i}"] = training.steps(3, STEPS).result()
    if rank < 2:
        results["low precision"] = low_precision(meshes["fsdp"])
        results["refused"] = refused(meshes["fsdp"], meshes["hybrid"])
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()
    if rank < 2:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/trainer", rank=rank, world_size=2
        )
        for name, overrides in RUNS.items():
            ranks = Ranks(rank, 2, overrides[-1].removeprefix("launcher.parallel="))
            trained(name, folder / "one-then-two", ranks)
            trained(name, folder / "two-then-one", ranks, stop_at=7)
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which three processes have left what they did; once, however many processes
    test.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            for i, case in enumerate(DCP_CASES):
                save_dcp(Training(case).steps(0, 3), folder / f"of-one-{i}")
            for name in RUNS:
                trained(name, folder / "one-then-two", Ranks(), stop_at=7)
            mp.spawn(process, (folder,), nprocs=3)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="module")
def results(shared: Path) -> dict[str, Any]:
    return torch.load(shared / "results.pt")


# ------------------------------------------------------------------------------------------------
# the optimizers


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_trajectory_is_that_of_one_process(case: Case, results: dict[str, Any]) -> None:
    """In float64 to far less than a step of 1e-2; in float32 to rounding."""
    mine, one = results[str(case)], Training(case).steps(0, STEPS).result()
    double = case.dtype == torch.float64
    assert difference(mine["weights"], one["weights"]) < (1e-9 if double else 1e-4)
    assert (mine["outputs"] - one["outputs"]).abs().max() < (1e-11 if double else 1e-4)
    assert ((mine["norms"] - one["norms"]) / one["norms"]).abs().max() < (1e-10 if double else 1e-5)
    assert mine["state"].keys() == one["state"].keys()
    for name, state in one["state"].items():
        assert {key: value.shape for key, value in mine["state"][name].items()} == {
            k: v.shape for k, v in state.items()
        }
        assert difference(mine["state"][name], state) < (1e-10 if double else 1e-5)


@pytest.mark.slow
def test_it_is_equivariant(results: dict[str, Any]) -> None:
    case = next(case for case in CASES if case.transformed)
    transformed, plain = results[str(case)], results["llama-ddcadam-fsdp-float64"]
    assert difference(transformed["weights"], plain["weights"]) > 0.1
    assert (transformed["outputs"] - plain["outputs"]).abs().max() < 1e-10
    assert ((transformed["norms"] - plain["norms"]) / plain["norms"]).abs().max() < 1e-10


@pytest.mark.slow
def test_state_is_split_and_drift_is_read_across_ranks(results: dict[str, Any]) -> None:
    assert results["state is split"]
    training = Training(CASES[1])
    start = {name: p.detach().clone() for name, p in named_parameters(training.model).items()}
    training.steps(0, STEPS)
    expected = GaugeDrift(start, training.gauges).at(named_parameters(training.model))
    assert {
        gauge.kind for gauge in training.gauges if isinstance(gauge, Rotation)
    } < expected.keys()
    assert results["drift"] == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(DCP_CASES)), ids=lambda i: str(DCP_CASES[i]))
def test_a_distributed_checkpoint_is_for_any_number_of_ranks(
    i: int, shared: Path, results: dict[str, Any]
) -> None:
    """Saved by 1, gone on with by 2; saved by 2, gone on with by 3 and by 1: as if nothing had
    been.
    """
    unbroken = Training(DCP_CASES[i]).steps(0, STEPS).result()
    alone = (
        load_dcp(Training(DCP_CASES[i], seed=1), shared / f"of-two-{i}").steps(3, STEPS).result()
    )
    for restored in (results[f"of-one-{i}"], results[f"of-two-{i}"], alone):
        assert difference(restored["weights"], unbroken["weights"]) < 1e-10
        for name, state in unbroken["state"].items():
            assert difference(restored["state"][name], state) < 1e-10


@pytest.mark.slow
def test_low_precision_and_missing_gradients(results: dict[str, Any]) -> None:
    """Weights of eight bits differ by one rounding at most, and hardly ever."""
    mine, one = results["low precision"], low_precision()
    start = make_model("layer").bfloat16().float()
    moved = {
        name: p.detach() for name, p in start.named_parameters() if not name.startswith("blocks.1")
    }
    assert all((one[name] - p).abs().max() > 0 for name, p in moved.items())
    assert all(((mine[name] - one[name]).abs() <= one[name].abs() * 2**-7).all() for name in one)
    assert (
        sum(int((mine[name] != one[name]).sum()) for name in one)
        <= sum(p.numel() for p in one.values()) / 1000
    )


@pytest.mark.slow
def test_refused(results: dict[str, Any]) -> None:
    messages = results["refused"]
    assert "'blocks.0.mlp.up.weight' and 'blocks.0.mlp.down.weight' are linked" in messages["part"]
    assert (
        "'blocks.0.mlp.up.weight' and 'blocks.0.mlp.down.weight' are linked"
        in messages["part hidden"]
    )
    assert f"a parameter of shape ({VOCABULARY}, 18) has placements" in messages["two ways"]


# --------------------------------------------------------------------------------------------------
# the trainer


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return Records(folder / "records.jsonl").read()


def assert_same_to_rounding(folder: Path, one: Path) -> None:
    rows, expected = rows_of(folder), rows_of(one)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for key in (
            "epoch",
            "lr",
            "train_loss",
            "validation_loss",
            "train_accuracy",
            "validation_accuracy",
        ):
            assert row[key] == pytest.approx(other[key], rel=2e-5), (row["step"], key)
        assert (row["gauge_audit"] or 0) < 1e-4
        for key, values in (row["matrix_step"] or {}).items():
            assert values == pytest.approx(other["matrix_step"][key], rel=1e-3)
        assert row["gauge_drift"] == pytest.approx(other["gauge_drift"], rel=0.05, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_with_another_number_of_processes(
    name: str, shared: Path, tmp_path: Path
) -> None:
    """SIGTERM reaches one process; all stop after the same step, and the run ends as one process
    would have had it.
    """
    one = trained(name, tmp_path, Ranks())
    place = one.relative_to(tmp_path)
    assert [row["step"] for row in rows_of(shared / "two-then-one" / place)] == [0, 3, 6]
    trained(name, shared / "two-then-one", Ranks())
    for begun in ("one-then-two", "two-then-one"):
        assert_same_to_rounding(shared / begun / place, one)
        summary = json.loads((shared / begun / place / "summary.json").read_text())
        assert summary["parameters"] == json.loads((one / "summary.json").read_text())["parameters"]
        weights, expected = (
            read_checkpoint(folder)["model"] for folder in (shared / begun / place, one)
        )
        assert {key: w.shape for key, w in weights.items()} == {
            key: w.shape for key, w in expected.items()
        }
    assert json.loads((shared / "two-then-one" / place / "run.json").read_text())["processes"] == 2


def torchrun(*overrides: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "train.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *TINY, *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The real thing: one run by two processes, said once."""
    done = torchrun("launcher=torchrun", "training.device=cpu", f"runs={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step     12/12") == 1
    setup = prepare(composed("training.device=cpu", f"runs={tmp_path / 'one'}"))
    train(setup)
    folder = tmp_path / "two" / setup.folder.relative_to(tmp_path / "one")
    assert_same_to_rounding(folder, setup.folder)


def test_a_launcher_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match=r"launcher=local .* but torchrun started this process"):
        join_ranks(LauncherConfig())
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(ValueError, match="launcher=torchrun, but torchrun did not start"):
        join_ranks(LauncherConfig("torchrun", "ddp"))


def test_processes_stay_connected_until_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one process share the connection, and nothing that a run leaves outlives it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = {"TORCHELASTIC_RUN_ID": "one", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (started | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    config = LauncherConfig("torchrun", "ddp")
    assert join_ranks(config, "cpu") == join_ranks(config, "cpu") == Ranks(0, 1, "ddp")
    assert dist.is_initialized()
    leave_ranks()
    leave_ranks()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["launcher=torchrun", "launcher.parallel=tp"],
            "Invalid launcher.parallel=tp: expected one of ddp, fsdp",
        ),
        (["launcher.parallel=ddp"], "Invalid launcher.parallel=ddp with launcher=local"),
        (["launcher.name=mpi"], "Invalid launcher=mpi"),
    ],
)
def test_invalid_launchers(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composed(*overrides)


def test_what_the_ranks_cannot_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training.batch_size=4: 3 processes .* must divide it"):
        prepare(composed(f"runs={tmp_path}"), Ranks(0, 3, "ddp"))
    with pytest.raises(ValueError, match=r"slt.readings with launcher.parallel=fsdp"):
        prepare(composed(f"runs={tmp_path}", "slt=cells"), Ranks(0, 2, "fsdp"))


def test_the_run_id_does_not_know_the_launcher() -> None:
    assert composed("launcher=torchrun", "launcher.parallel=fsdp").run_id == composed().run_id
