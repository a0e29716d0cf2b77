"""Whether all that is proved on a CPU holds on the device: one part a property, a row a case, each
with its value, its bound, and whether that holds.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from benchmarks.gpu.graph import InGraph
from benchmarks.gpu.record import NotHere, Place, Record
from benchmarks.speed import bytes_of
from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.data import TextConfig, TextData, load_text
from ddc.gauges import GaugeSet
from ddc.models import GPT, GPTConfig, cross_entropy
from ddc.training.loop import grad_norm
from experiments.equivariance.measure import CONTEXT, MODELS, OptimizerMaker, random_model
from experiments.precision.measure import OPTIMIZERS, PRECISIONS, Precision, compare, run

Row = dict[str, Any]

#: Differences in float64, relative to the way that weights have gone: rounding alone.
EXACT = 1e-9
#: Between two orders of the same sums in float32.
ROUNDED = 1e-4
#: How many times its own error against float64 a precision may put two starts of one orbit apart.
OWN_ERROR = 20.0
SEED, CONFIG = 0, next(iter(MODELS.values()))
MINE = ("ddcadam", "ddcmuon")
FLOAT64, FLOAT32 = PRECISIONS[:2]
TF32 = Precision("float32, TF32", torch.float32, products="high")


def row(case: str, value: float, bound: float, at_least: bool = False) -> Row:
    """A case; with ``at_least`` its value must not be below the bound."""
    holds = value >= bound if at_least else value <= bound
    return {"case": case, "value": value, "bound": bound, "at_least": at_least, "holds": holds}


class Checks:
    """The parts, on one device."""

    def __init__(self, place: Place) -> None:
        self.place, self.device = place, place.device
        self.data: TextData = load_text(TextConfig(), CONTEXT)
        self.steps = 2 if place.tiny else 20

    def start(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return random_model(CONFIG, self.data.vocab_size, SEED, dtype).to(self.device)

    @functools.cached_property
    def gauges(self) -> GaugeSet:
        """Found, and tried, on the device."""
        return find_gauges(self.start())

    def backward(self, model: nn.Module, seed: int, scaler: GradScaler | None = None) -> None:
        """Gradients of a fixed batch."""
        device = next(model.parameters()).device
        x, y = (each.to(device) for each in self.data.batch(seed, 8, SEED))
        model.zero_grad()
        loss: Tensor = cross_entropy(model(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()

    # ------------------------------------------------------------------------------------------
    # the parts

    def gauges_found(self) -> Iterable[Row]:
        """The trial of ``find_gauges`` refuses nothing here."""
        on_cpu = find_gauges(self.start().cpu())
        yield row("other gauges than on the CPU", str(self.gauges) != str(on_cpu), 0)
        yield row("gauges not tried", len(self.gauges.unchecked), 0)

    def equivariance(self) -> Iterable[Row]:
        """Two starts of one orbit, in every precision; AdamW, which leaves the orbit, beside."""
        float64, float32, *low = PRECISIONS
        precisions = (float64, float32, TF32, *low)
        for name in ("adamw", *MINE):
            for each in compare(
                CONFIG, name, self.data, SEED, (0, self.steps), precisions, self.device
            ):
                case = f"{name}, {each['precision']}"
                end = str(self.steps)
                apart, error = each["orbit"][end], each["error"][end]
                if name == "adamw":
                    yield row(case, apart, 1e-3, at_least=True)
                elif each["precision"] == float64.name:
                    yield row(case, apart, EXACT)
                else:
                    yield row(case, apart, OWN_ERROR * max(error, each["orbit"]["0"]))

    def trajectory(self) -> Iterable[Row]:
        """Weights after some steps, against those on the CPU."""
        for name in MINE:
            here, there = (
                self.trained(start, OPTIMIZERS[name])
                for start in (self.start(), self.start().cpu())
            )
            yield row(name, distance(here, there, self.start()), EXACT)

    def compiled(self) -> Iterable[Row]:
        """Weights after some compiled steps, against eager ones."""
        if self.place.tiny:
            raise NotHere("it takes a compiler longer than all the rest of the smallest form")
        for name in MINE:
            here, there = (
                self.trained(self.start(), with_options(OPTIMIZERS[name], compiled=compiled))
                for compiled in (True, False)
            )
            yield row(name, distance(here, there, self.start()), EXACT)

    def kernels(self) -> Iterable[Row]:
        """Weights after some steps by kernels in float32 are as near to float64 as those of steps
        in torch.
        """
        self.need_cuda("for kernels in Triton")
        for name in MINE:
            exact = self.trained(self.start(), OPTIMIZERS[name])
            by_kernels, in_torch = (
                distance(
                    self.trained(
                        self.start(torch.float32),
                        with_options(OPTIMIZERS[name], fused=fused),
                        FLOAT32,
                    ),
                    exact,
                    self.start(),
                )
                for fused in (True, False)
            )
            yield row(name, by_kernels, 3 * in_torch)

    def no_waiting(self) -> Iterable[Row]:
        """A step, the invariant norm and clipping never wait for the device."""
        self.need_cuda("to see what waits for the device")
        for name in MINE:
            model = self.start(torch.float32)
            optimizer = OPTIMIZERS[name](model, self.gauges)
            for seed in range(3):
                self.backward(model, seed)
                torch.cuda.set_sync_debug_mode("error" if seed == 2 else "default")
                try:
                    torch.nn.utils.clip_grads_with_norm_(
                        model.parameters(), 1.0, grad_norm(model, optimizer)
                    )
                    optimizer.step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            yield row(f"{name}: waits", 0, 0)

    def loss_scaler(self) -> Iterable[Row]:
        """A step whose gradient overflows is skipped, and the next one is taken."""
        for name in MINE:
            model = self.start(torch.float32)
            optimizer = OPTIMIZERS[name](model, self.gauges)
            scaler = GradScaler(self.device.type, init_scale=1024.0)
            self.scaled_step(model, optimizer, scaler, 0)
            before, scale = snapshot(model, optimizer), scaler.get_scale()
            self.scaled_step(model, optimizer, scaler, 1, overflow=True)
            yield row(f"{name}: changed by a skipped step", changed(before, model, optimizer), 0)
            yield row(f"{name}: loss scale after it", scaler.get_scale(), scale / 2)
            self.scaled_step(model, optimizer, scaler, 2)
            yield row(f"{name}: moved after", changed(before, model, optimizer), 1, at_least=True)

    def scaled_step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: GradScaler,
        seed: int,
        overflow: bool = False,
    ) -> None:
        self.backward(model, seed, scaler)
        if overflow:
            first = next(p.grad for p in model.parameters() if p.grad is not None)
            first.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    def state_moves(self) -> Iterable[Row]:
        """A state made on the CPU goes on on the device, and back, as if it had stayed."""
        for name in MINE:
            stayed, moved = self.start(), self.start()
            optimizer = OPTIMIZERS[name](stayed, self.gauges)
            state: dict[str, Any] | None = None
            for seed, device in enumerate((torch.device("cpu"), self.device, torch.device("cpu"))):
                self.backward(stayed, seed)
                optimizer.step()
                moved = copy.deepcopy(moved).to(device)
                other = OPTIMIZERS[name](moved, self.gauges)
                if state is not None:
                    other.load_state_dict(state)
                self.backward(moved, seed)
                other.step()
                state = copy.deepcopy(other.state_dict())
                states = [value for each in other.state.values() for value in each.values()]
                elsewhere = sum(value.device.type != device.type for value in states)
                yield row(f"{name}: states not on {device.type}, step {seed}", elsewhere, 0)
            yield row(name, distance(weights(moved), weights(stayed), self.start()), EXACT)

    def memory_of_state(self) -> Iterable[Row]:
        """Bytes of state, as allocated where the device counts them, against AdamW's."""
        large = GPTConfig(layers=12, width=768, heads=12, kv_heads=4, hidden=2048)
        model = GPT(GPTConfig() if self.place.tiny else large, 256).to(self.device)
        adamw = 8 * sum(p.numel() for p in model.parameters())
        gauges = find_gauges(model, verify=False)
        hidden = hidden_matrices(model)
        makers: dict[str, Callable[[], Optimizer]] = {
            "ddcadam": lambda: DDCAdam(model.named_parameters(), gauges),
            "ddcmuon": lambda: DDCMuon(model.named_parameters(), gauges, hidden),
        }
        for name, make in makers.items():
            before = self.allocated()
            optimizer = make()
            counted = bytes_of([*map(dict, optimizer.state.values())])
            allocated = self.allocated() - before
            yield row(f"{name}: state, bytes of AdamW's", counted / adamw, 1.0)
            if self.device.type == "cuda":
                yield row(f"{name}: allocated, bytes of AdamW's", allocated / adamw, 1.02)
            del optimizer

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def in_a_graph(self) -> Iterable[Row]:
        """Replays of a captured step, against as many eager steps on the same gradients."""
        self.need_cuda("for CUDA graphs")
        for name in MINE:
            eager = self.start(torch.float32)
            self.backward(eager, 0)
            captured = copy.deepcopy(eager)
            graph = InGraph(OPTIMIZERS[name](captured, self.gauges))
            optimizer = OPTIMIZERS[name](eager, self.gauges)
            for _ in range(InGraph.WARM + 5):
                optimizer.step()
            for _ in range(5):
                graph.step()
            torch.cuda.synchronize()
            yield row(name, distance(weights(captured), weights(eager), self.start()), ROUNDED)

    # ------------------------------------------------------------------------------------------

    def need_cuda(self, why: str) -> None:
        if self.device.type != "cuda":
            raise NotHere(f"a GPU is needed {why}")

    def trained(
        self, start: nn.Module, make: OptimizerMaker, precision: Precision = FLOAT64
    ) -> Tensor:
        """All weights after some steps, on the CPU."""
        read = run(start, self.gauges, make, self.data, precision, SEED, (self.steps,))
        return read[self.steps].weights.cpu()


def with_options(make: Callable[..., Optimizer], **options: Any) -> OptimizerMaker:
    """What makes an optimizer, with more of its arguments."""
    return functools.partial(make, **options)


def weights(model: nn.Module) -> Tensor:
    """All of them in float64, on the CPU."""
    return torch.cat([p.detach().double().flatten().cpu() for p in model.parameters()])


def distance(a: Tensor, b: Tensor, start: nn.Module) -> float:
    """Of two ends, relative to the way from the start."""
    return float((a - b).norm() / (b - weights(start)).norm())


def snapshot(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Copies of weights and state."""
    states = [value for each in optimizer.state.values() for value in each.values()]
    return [x.detach().clone() for x in (*model.parameters(), *states)]


def changed(before: list[Tensor], model: nn.Module, optimizer: Optimizer) -> int:
    """How many tensors are others than they were."""
    now = snapshot(model, optimizer)
    return sum(not torch.equal(a, b) for a, b in zip(before, now, strict=True))


#: In the order of worth; what may leave the device unusable comes last.
PARTS: Mapping[str, Callable[[Checks], Iterable[Row]]] = {
    "gauges are found": Checks.gauges_found,
    "equivariance": Checks.equivariance,
    "trajectory as on the CPU": Checks.trajectory,
    "kernels as in torch": Checks.kernels,
    "nothing waits for the device": Checks.no_waiting,
    "loss scaler": Checks.loss_scaler,
    "state from CPU to device and back": Checks.state_moves,
    "memory of state": Checks.memory_of_state,
    "step in a CUDA graph": Checks.in_a_graph,
    "compiled step": Checks.compiled,
}


def stage(place: Place) -> None:
    """Make the record of the checks."""
    checks = Checks(place)

    def make(check: Callable[[Checks], Iterable[Row]]) -> dict[str, Any]:
        rows = list(check(checks))
        return {"rows": rows, "holds": all(each["holds"] for each in rows)}

    Record(place, "checks").make({n: functools.partial(make, c) for n, c in PARTS.items()})
