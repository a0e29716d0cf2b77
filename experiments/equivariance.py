"""Claim C6: the update is gauge-equivariant. ``python -m experiments.equivariance`` (``make equivariance``).

Two copies of a model start from weights that differ by a random element of a gauge group, and see the same
batches of real text. An equivariant optimizer keeps them the same function. The measure is the largest absolute
difference of their log-probabilities on held-out text, at any of ten checks over 100 steps.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.optim import AdamW, Optimizer

from ddc import DDCAdam, find_gauges
from ddc.data import TextConfig, load_text
from ddc.data.text import TextData
from ddc.gauges import KINDS, GaugeSet
from ddc.models import GPT, GPTConfig, cross_entropy
from ddc.report.runs import TITLES
from ddc.training.records import provenance
from experiments.output import save

CONTEXT, BATCH, STEPS, LR, WEIGHT_DECAY = 32, 8, 100, 3e-3, 0.1
SIZES: dict[str, Any] = {"context": CONTEXT, "layers": 2, "width": 32, "heads": 4, "hidden": 48}
MODELS = {
    "RMSNorm, SwiGLU, RoPE, GQA": GPTConfig(**SIZES, kv_heads=2),
    "LayerNorm, biases, ReLU, learned positions": GPTConfig(
        **SIZES, kv_heads=4, norm="layer", mlp="relu", positions="learned", bias=True
    ),
    "RMSNorm, ReLU², partial RoPE, GQA": GPTConfig(**SIZES, kv_heads=2, mlp="relu2", positions="partial_rope"),
    "LayerNorm, biases, SwiGLU, RoPE, MQA": GPTConfig(**SIZES, kv_heads=1, norm="layer", bias=True),
    "RMSNorm, GELU, RoPE, tied head": GPTConfig(**SIZES, kv_heads=4, mlp="gelu", tied_head=True),
}
OptimizerMaker = Callable[[nn.Module, GaugeSet], Optimizer]


def adamw(model: nn.Module, gauges: GaugeSet, **options: Any) -> Optimizer:
    """The baseline."""
    return AdamW(model.parameters(), **{"lr": LR, "weight_decay": WEIGHT_DECAY, **options})


def ddcadam(model: nn.Module, gauges: GaugeSet, **options: Any) -> DDCAdam:
    """The optimizer under test, with the baseline's hyperparameters."""
    return DDCAdam(model.named_parameters(), gauges, **{"lr": LR, "weight_decay": WEIGHT_DECAY, **options})


def random_model(config: GPTConfig, vocab_size: int, seed: int, dtype: torch.dtype) -> GPT:
    """A model at its initialisation, but with random norm scales and biases: 1 and 0 would test too little."""
    torch.manual_seed(seed)
    model = GPT(config, vocab_size).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def orbit_divergence(
    model: GPT,
    gauges: GaugeSet,
    make_optimizer: OptimizerMaker,
    data: TextData,
    *,
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
        data: text; both copies see the same batches.
        seed: of the group element and the batches.
        spread: scales of the element lie in e^±spread.
        steps: optimizer steps.
        max_grad_norm: clip to this norm: the optimizer's own ``grad_norm`` where it has one, else the Euclidean.
    """
    copies = [copy.deepcopy(model), copy.deepcopy(model)]
    gauges.transform_(copies[1], torch.Generator().manual_seed(seed), spread)
    optimizers = [make_optimizer(each, gauges) for each in copies]
    probe = torch.cat([x for x, _ in data.evaluation_batches("validation", 2, BATCH)])
    largest = 0.0
    for step in range(steps):
        x, y = data.batch(step, BATCH, seed)
        for each, optimizer in zip(copies, optimizers, strict=True):
            optimizer.zero_grad()
            cross_entropy(each(x), y).backward()
            if max_grad_norm is not None:
                parameters = list(each.parameters())
                norm = (
                    optimizer.grad_norm()
                    if isinstance(optimizer, DDCAdam)
                    else torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                )
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm=max_grad_norm, total_norm=norm)
            optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            with torch.no_grad():
                a, b = (each(probe).log_softmax(-1) for each in copies)
            largest = max(largest, float((a - b).abs().max()))
    return largest


def measure(seeds: Iterable[int]) -> list[dict[str, Any]]:
    """All cells of the table: every model with its whole group, and the first two with each gauge alone."""
    data = load_text(TextConfig(), CONTEXT)
    about = provenance()
    cells = []
    for name, config in MODELS.items():
        kinds = {gauge.kind for gauge in find_gauges(GPT(config, data.vocab_size))}
        choices: list[tuple[str, tuple[str, ...]]] = [("all", KINDS)]
        if name in list(MODELS)[:2]:
            choices += [(kind, (kind,)) for kind in KINDS if kind in kinds]
        cells += [(name, config, choice, only) for choice, only in choices]
    records = []
    for seed in seeds:
        for name, config, choice, only in track(cells, f"seed {seed}"):
            for dtype in (torch.float64, torch.float32):
                for make in (ddcadam, adamw):
                    model = random_model(config, data.vocab_size, seed, dtype)
                    start = time.perf_counter()
                    divergence = orbit_divergence(model, find_gauges(model).only(only), make, data, seed=seed)
                    records.append(
                        {
                            "model": name,
                            "gauges": choice,
                            "optimizer": make.__name__,
                            "dtype": str(dtype).removeprefix("torch."),
                            "seed": seed,
                            "divergence": divergence,
                            "seconds": time.perf_counter() - start,
                            "config": asdict(config)
                            | {"steps": STEPS, "batch": BATCH, "lr": LR, "weight_decay": WEIGHT_DECAY},
                            "data": data.source,
                            **about,
                        }
                    )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: the largest divergence over the seeds for each model, gauges, dtype and optimizer."""
    columns = [(o, d) for d in ("float64", "float32") for o in ("ddcadam", "adamw")]
    rows: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for r in records:
        cell = rows.setdefault((r["model"], r["gauges"]), {})
        column = (r["optimizer"], r["dtype"])
        cell[column] = max(cell.get(column, 0.0), r["divergence"])
    lines = [
        "| model | gauges moved | " + " | ".join(f"{TITLES[o]} {d}" for o, d in columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for (model, gauges), cell in rows.items():
        lines.append(f"| {model} | {gauges} | " + " | ".join(f"{cell[column]:.1e}" for column in columns) + " |")
    seeds = sorted({r["seed"] for r in records})
    lines += [
        "",
        f"Largest absolute difference of log-probabilities over {STEPS} steps from two starts on one gauge orbit, "
        f"largest of {len(seeds)} seeds; learning rate {LR}, weight decay {WEIGHT_DECAY}, scales moved by e^±1. "
        f"Commit {records[0]['commit']}. Made by `make equivariance` from `records.jsonl` beside this file.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the records and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("results/equivariance"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = measure(arguments.seeds)
    save(arguments.output, records, table(records))


if __name__ == "__main__":
    main()
