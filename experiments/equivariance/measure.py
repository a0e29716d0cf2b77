"""Claim C6: the update is gauge-equivariant (``python -m experiments.equivariance.measure``).

Two copies of a model start from weights that differ by a random element of a gauge group, and see
the same batches of real data. An equivariant optimizer keeps them the same function. The measure is
the largest absolute difference of their log-probabilities on held-out data, at any of ten checks
over 100 steps.

In float64 both Muons orthogonalise by the exact polar factor; in float32 by Newton-Schulz
iteration, Muon in bfloat16 as torch's does.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.optim import AdamW, Optimizer

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices
from ddc.data import ModularConfig, PairData, TextConfig, TextData, load_modular, load_text
from ddc.gauges import GaugeSet, paper_kinds
from ddc.models import GPT, DeepMLP, DeepMLPConfig, GPTConfig, cross_entropy
from ddc.optim import Lift
from ddc.optim.decay import decay_groups
from ddc.optim.factory import make_muon
from ddc.report.runs import read_lines
from ddc.training.records import provenance
from experiments.output import save_records
from experiments.protocols import ROOT, Stage

RESULTS, SEEDS = ROOT / "results/equivariance", (0, 1, 2)
CONTEXT, BATCH, STEPS, LR, MUON_LR, WEIGHT_DECAY = 32, 8, 100, 3e-3, 0.02, 0.1
SIZES: dict[str, Any] = {"context": CONTEXT, "layers": 2, "width": 32, "heads": 4, "hidden": 48}
MODELS = {
    "RMSNorm, SwiGLU, RoPE, GQA": GPTConfig(**SIZES, kv_heads=2),
    "LayerNorm, biases, ReLU, learned positions": GPTConfig(
        **SIZES, kv_heads=4, norm="layer", mlp="relu", positions="learned", bias=True
    ),
    "RMSNorm, ReLU², partial RoPE, GQA": GPTConfig(
        **SIZES, kv_heads=2, mlp="relu2", positions="partial_rope"
    ),
    "LayerNorm, biases, SwiGLU, RoPE, MQA": GPTConfig(**SIZES, kv_heads=1, norm="layer", bias=True),
    "RMSNorm, GELU, RoPE, tied head": GPTConfig(**SIZES, kv_heads=4, mlp="gelu", tied_head=True),
}
DEEP, DEEP_BATCH = DeepMLPConfig(depth=8, width=64), 512
OptimizerMaker = Callable[[nn.Module, GaugeSet], Optimizer]


def adamw(model: nn.Module, gauges: GaugeSet, **options: Any) -> Optimizer:
    """The baseline."""
    return AdamW(model.parameters(), **{"lr": LR, "weight_decay": WEIGHT_DECAY, **options})


def ddcadam(model: nn.Module, gauges: GaugeSet, **options: Any) -> DDCAdam:
    """The optimizer under test, with the baseline's hyperparameters."""
    return DDCAdam(
        model.named_parameters(), gauges, **{"lr": LR, "weight_decay": WEIGHT_DECAY, **options}
    )


def orthogonalizer(model: nn.Module, single: str) -> str:
    """The exact one in float64, else ``single``."""
    return "polar" if next(model.parameters()).dtype == torch.float64 else single


def muon(model: nn.Module, gauges: GaugeSet, **options: Any) -> Optimizer:
    """The baseline of DDCMuon: Muon for hidden matrices, AdamW for the rest."""
    options = {"orthogonalizer": orthogonalizer(model, "newton_schulz_bfloat16"), **options}
    groups = decay_groups(model, WEIGHT_DECAY)
    return make_muon(
        groups, hidden_matrices(model), lr=MUON_LR, adam_lr=LR, momentum=0.95,
        nesterov=True,
        adjust_lr_fn="original", betas=(0.9, 0.999), eps=1e-8, **options,
    )  # fmt: skip


def ddcmuon(model: nn.Module, gauges: GaugeSet, **options: Any) -> DDCMuon:
    """Muon's lift, with the baseline's hyperparameters."""
    options = {"orthogonalizer": orthogonalizer(model, "newton_schulz"), **options}
    return DDCMuon(
        model.named_parameters(), gauges, hidden_matrices(model), lr=MUON_LR, adam_lr=LR,
        weight_decay=WEIGHT_DECAY,
        **options,
    )  # fmt: skip


OPTIMIZERS: tuple[OptimizerMaker, ...] = (ddcadam, adamw, ddcmuon, muon)


def random_model(
    config: GPTConfig | DeepMLPConfig, vocab_size: int, seed: int, dtype: torch.dtype
) -> GPT | DeepMLP:
    """A model at its initialisation, but with random norm scales and biases: 1 and 0 would test too
    little.
    """
    torch.manual_seed(seed)
    model = (
        GPT(config, vocab_size)
        if isinstance(config, GPTConfig)
        else DeepMLP(config, vocab_size, vocab_size)
    )
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def orbit_divergence(
    model: nn.Module,
    gauges: GaugeSet,
    make_optimizer: OptimizerMaker,
    data: TextData | PairData,
    *,
    batch_size: int = BATCH,
    seed: int = 0,
    spread: float = 1.0,
    steps: int = STEPS,
    max_grad_norm: float | None = None,
) -> float:
    """Largest difference of log-probabilities between two trainings from one gauge orbit.

    Args:
        model: the first start; the second is moved by a random element of the gauges.
        gauges: the group that moves, and that the optimizer is told of.
        make_optimizer: from a model and its gauges.
        data: both copies see the same batches.
        batch_size: sequences, or pairs, of a step.
        seed: of the group element and the batches.
        spread: scales of the element lie in e^±spread.
        steps: optimizer steps.
        max_grad_norm: clip to this norm: the optimizer's own ``grad_norm`` where it has one, else
            the Euclidean.
    """
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(seed), spread)
    optimizers = [make_optimizer(each, gauges) for each in copies]
    probe = torch.cat([x for x, _ in data.evaluation_batches("validation", 2, batch_size)])
    largest = 0.0
    for step in range(steps):
        x, y = data.batch(step, batch_size, seed)
        for each, optimizer in zip(copies, optimizers, strict=True):
            optimizer.zero_grad()
            cross_entropy(each(x), y).backward()
            if max_grad_norm is not None:
                parameters = list(each.parameters())
                norm = (
                    optimizer.grad_norm()
                    if isinstance(optimizer, Lift)
                    else torch.nn.utils.get_total_norm(
                        [p.grad for p in parameters if p.grad is not None]
                    )
                )
                torch.nn.utils.clip_grads_with_norm_(
                    parameters, max_norm=max_grad_norm, total_norm=norm
                )
            optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            with torch.no_grad():
                a, b = (each(probe).log_softmax(-1) for each in copies)
            largest = max(largest, float((a - b).abs().max()))
    return largest


@dataclass(frozen=True)
class Case:
    """A row of the table: a model on its data, and the kinds of gauges that move."""

    model: str
    config: GPTConfig | DeepMLPConfig
    data: TextData | PairData
    batch_size: int
    gauges: str
    kinds: tuple[str, ...]


def cases() -> list[Case]:
    """Every model with its whole group, and the first two with each gauge alone."""
    text, pairs = load_text(TextConfig(), CONTEXT), load_modular(ModularConfig(), seed=0)
    found = []
    for i, (name, config) in enumerate(MODELS.items()):
        found.append(Case(name, config, text, BATCH, "all", paper_kinds()))
        if i < 2:
            kinds = {gauge.kind for gauge in find_gauges(GPT(config, text.vocab_size))}
            found += [
                Case(name, config, text, BATCH, kind, (kind,))
                for kind in paper_kinds()
                if kind in kinds
            ]
    return [
        *found,
        Case("ReLU network without biases, depth 8", DEEP, pairs, DEEP_BATCH, "all", paper_kinds()),
    ]


def measure(seeds: Iterable[int]) -> list[dict[str, Any]]:
    """All cells of the table."""
    about = provenance()
    records = []
    todo = list(itertools.product(seeds, cases(), (torch.float64, torch.float32), OPTIMIZERS))
    for seed, case, dtype, make in track(todo, "measuring"):
        model = random_model(case.config, case.data.vocab_size, seed, dtype)
        gauges = find_gauges(model).only(case.kinds)
        start = time.perf_counter()
        divergence = orbit_divergence(
            model, gauges, make, case.data, batch_size=case.batch_size, seed=seed
        )
        muon_lr = {"muon_lr": MUON_LR} if "muon" in make.__name__ else {}
        options = {
            "steps": STEPS,
            "batch": case.batch_size,
            "lr": LR,
            **muon_lr,
            "weight_decay": WEIGHT_DECAY,
        }
        records.append(
            {
                "model": case.model,
                "gauges": case.gauges,
                "optimizer": make.__name__,
                "dtype": str(dtype).removeprefix("torch."),
                "seed": seed,
                "divergence": divergence,
                "seconds": time.perf_counter() - start,
                "config": asdict(case.config) | options,
                "data": case.data.source,
                **about,
            }
        )
    return records


def needed() -> int:
    """How many cells the table has."""
    return len(SEEDS) * len(cases()) * 2 * len(OPTIMIZERS)


def status(runs: str) -> list[Stage]:
    """How many cells are recorded; nothing of it is in the folder of the runs."""
    records = read_lines(RESULTS / "records.jsonl")
    seconds = statistics.mean(record["seconds"] for record in records) if records else None
    return [Stage("cells", needed(), len(records), 0, seconds)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the records."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    save_records(RESULTS / "records.jsonl", measure(SEEDS))


if __name__ == "__main__":
    main()
