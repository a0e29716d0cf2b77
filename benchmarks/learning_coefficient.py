"""Our estimator and devinterp's on the same loss, data and budget: ``python -m
benchmarks.learning_coefficient``.

devinterp 2.0.1 samples language models alone: rows of token numbers, and a loss per token. A
regression fits in as rows (i, 0), with a loss that looks sample i up. Both sample by SGLD with the
same step size (ours, calibrated), nβ, γ, batch size, chains and draws, and take turns in one
process. devinterp averages over burn-in as well, so it is given none; ours gets none here either.
Both values are then too low by the same burn-in.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from benchmarks.report import sampling_table
from ddc.gauges import named_parameters
from ddc.models import GPT, GPTConfig, cross_entropy
from ddc.slt.known_coefficients import aoyagi_watanabe, reduced_rank_data, reduced_rank_minimum
from ddc.slt.learning_coefficient import Settings, estimate, minibatches, module_loss
from ddc.training.records import provenance, write_atomically

try:
    from datasets import Dataset, disable_progress_bars
    from devinterp.slt.llc import llc
except ImportError as error:
    raise ImportError(
        "this benchmark needs devinterp: pip install -c requirements.lock devinterp"
    ) from error

SAMPLES, BATCH, VOCABULARY = 5000, 100, 20
SHAPE = (3, 2, 4, 2)
GPT_CONFIG = GPTConfig(context=16, layers=2, width=32, heads=4, kv_heads=2, hidden=48)


@dataclass(frozen=True)
class Problem:
    """One loss, told to both packages."""

    model: nn.Module
    data: tuple[Tensor, ...]
    criterion: Callable[[Tensor, Tensor], Tensor]
    rows: Tensor
    per_token: Callable[[nn.Module, Tensor], Tensor]
    truth: float | None
    settings: Settings


class Linear2(nn.Module):
    """B A x."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(weights["A"].float()), nn.Parameter(weights["B"].float())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.A.mT @ self.B.mT


def regression() -> Problem:
    """Reduced-rank regression at its true parameter, with a known coefficient."""
    truth = reduced_rank_minimum(*SHAPE)
    x, y = (tensor.float() for tensor in reduced_rank_data(truth, SAMPLES, 0.1, 0))
    return Problem(
        model=Linear2(truth),
        data=(x, y),
        criterion=lambda output, target: (output - target).square().sum(-1).mean() / 2,
        rows=torch.stack([torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64)], 1),
        per_token=lambda model, row: (
            (model(x[row[:, 0]]) - y[row[:, 0]]).square().sum(-1, keepdim=True) / 2
        ),
        truth=float(aoyagi_watanabe(*SHAPE)[0]),
        settings=Settings(chains=8, draws=1000, burn_in=200),
    )


def language_model() -> Problem:
    """A small GPT, trained for a moment on a text whose next token is the sum of the last two or a
    random one.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCABULARY, (SAMPLES, GPT_CONFIG.context + 1), generator=generator)
    for i in range(2, rows.shape[1]):
        ruled = torch.rand(SAMPLES, generator=generator) < 0.8
        rows[:, i] = torch.where(ruled, (rows[:, i - 1] + rows[:, i - 2]) % VOCABULARY, rows[:, i])
    torch.manual_seed(0)
    model = GPT(GPT_CONFIG, VOCABULARY)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(1500):
        batch = rows[torch.randint(SAMPLES, (64,), generator=generator)]
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 1500)
        optimizer.zero_grad()
        cross_entropy(model(batch[:, :-1]), batch[:, 1:]).backward()
        optimizer.step()

    def per_token(model: nn.Module, row: Tensor) -> Tensor:
        return F.cross_entropy(model(row[:, :-1]).mT, row[:, 1:], reduction="none")

    return Problem(
        model=model,
        data=(rows[:, :-1], rows[:, 1:]),
        criterion=cross_entropy,
        rows=rows,
        per_token=per_token,
        truth=None,
        settings=Settings(chains=8, draws=100, burn_in=100, gamma=100.0),
    )


def ours(problem: Problem, beta: float, settings: Settings) -> dict[str, float]:
    batches = minibatches(problem.data, BATCH, settings)
    loss = module_loss(problem.model, problem.criterion)
    params = named_parameters(problem.model)
    start = time.perf_counter()
    found = estimate(loss, params, SAMPLES, beta, batches=batches, settings=settings)
    seconds = time.perf_counter() - start
    return {
        "value": found.value,
        "error": found.standard_error,
        "seconds": seconds,
        "step_size": found.step_size,
    }


def devinterp(problem: Problem, beta: float, settings: Settings) -> dict[str, float]:
    assert settings.step_size is not None
    dataset = Dataset.from_dict({"input_ids": problem.rows.tolist()}).with_format("torch")
    start = time.perf_counter()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        found = llc(
            model=problem.model,
            dataset=dataset,
            observables={},
            loss_fn=problem.per_token,
            lr=settings.step_size,
            n_beta=SAMPLES * beta,
            localization=settings.gamma,
            num_chains=settings.chains,
            num_draws=settings.draws,
            batch_size=BATCH,
            num_init_loss_batches=SAMPLES // BATCH,
            init_seed=settings.seed,
            match_sampling_input_ids_across_chains=False,
            device="cpu",
        )
        per_chain = found["llc_per_chain"].values
    seconds = time.perf_counter() - start
    error = float(per_chain.std(ddof=1)) / math.sqrt(settings.chains)
    return {"value": float(found["llc_mean"]), "error": error, "seconds": seconds}


def measure(name: str, problem: Problem, turns: int) -> dict[str, Any]:
    """Both in turn, on fresh seeds, at the step size that our calibration finds on another seed."""
    # the inverse temperature of WBIC for the regression; a language model's minibatches ask for a
    # higher one
    beta = 1 / math.log(SAMPLES) if problem.truth is not None else 30 / SAMPLES
    step_size = ours(problem, beta, replace(problem.settings, draws=4, seed=99))["step_size"]
    results: dict[str, list[dict[str, float]]] = {"ddc": [], "devinterp": []}
    for turn in track(range(turns), name):
        settings = replace(problem.settings, burn_in=0, step_size=step_size, seed=turn)
        results["ddc"].append(ours(problem, beta, settings))
        results["devinterp"].append(devinterp(problem, beta, settings))
    budget = {
        "chains": problem.settings.chains,
        "draws": problem.settings.draws,
        "batch": BATCH,
        "burn_in": 0,
    }
    where = {"n_beta": SAMPLES * beta, "gamma": problem.settings.gamma, "step_size": step_size}
    return {"truth": problem.truth, **budget, **where, **results}


def main() -> None:
    """Measure, and write the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    problems = {
        "reduced rank M={}, H={}, N={}, r={}".format(*SHAPE): regression(),
        "GPT, 2 layers": language_model(),
    }
    results = {name: measure(name, problem, arguments.turns) for name, problem in problems.items()}
    about = provenance()
    about["versions"]["devinterp"] = importlib.metadata.version("devinterp")
    record = {"results": results, "turns": arguments.turns, **about}
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_atomically(
        arguments.output / "learning_coefficient.json",
        (json.dumps(record, indent=2) + "\n").encode(),
    )
    write_atomically(arguments.output / "learning_coefficient.md", sampling_table(record).encode())
    print(sampling_table(record))


if __name__ == "__main__":
    main()
