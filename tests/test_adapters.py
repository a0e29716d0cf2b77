"""Claim W4: LoRA-RITE beside its algorithm in plain loops, starts of one function, and what is run,
read and decided.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from ddc import find_gauges
from ddc.gauges.double import InDouble
from ddc.report.claims import load_claims
from experiments import texts
from experiments.adapters import measure, model, report, settings
from experiments.adapters.rite import LoRARite, escaped_mass
from experiments.adapters.settings import (
    CASES,
    DDCADAM,
    GENERAL,
    MAIN,
    OPTIMIZERS,
    RITE,
    STANDARD,
    STARTS,
    Case,
    Run,
    by_run,
    missing,
)
from experiments.protocols import EXPERIMENTS

CLAIM = load_claims(EXPERIMENTS)
LR, BETAS, EPS = 0.02, (0.9, 0.95), 1e-6
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Factors(nn.Module):
    """Two adapters in a row, of one shape and of another."""

    def __init__(self, rank: int, zero: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        sizes = [(6, 6), (6, 6), (6, 5)]
        self.a = nn.ParameterList(
            torch.randn(rank, n, generator=draw, dtype=torch.float64) for n, _ in sizes
        )
        self.b = nn.ParameterList(
            0.3 * (not zero) * torch.randn(m, rank, generator=draw, dtype=torch.float64)
            for _, m in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            x = (x + x @ a.mT @ b.mT).tanh() if i < 2 else x[:, :5] + x @ a.mT @ b.mT
        return x

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.a, self.b, strict=True))


def loss_of(factors: nn.Module) -> Tensor:
    return (factors(X) - Y).square().mean()


def trained(factors: Factors, optimizer: torch.optim.Optimizer, steps: int = 25) -> Factors:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(factors).backward()
        optimizer.step()
    return factors


class PlainRite:
    """Algorithm 1 of arXiv:2410.20625 as it is printed, one adapter and one side at a time, with
    the polar decomposition for its bases and Adam's averages for its sums.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs, self.t = pairs, 0
        self.state: dict[tuple[int, str], Any] = {}

    def zero_grad(self) -> None:
        for p in (each for pair in self.pairs for each in pair):
            p.grad = None

    def side(self, key: tuple[int, str], grad: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The direction of A (n, r), given its gradient and B (m, r)."""
        n, r = grad.shape
        u, p = scipy.linalg.polar(other)
        inverse = np.linalg.pinv(p)
        g = grad @ inverse
        if key not in self.state:
            self.state[key] = (u, np.zeros((r, r)), 0.0, np.zeros((n, r)))
        u_before, v_before, rho, m = self.state[key]
        turn = u.T @ u_before
        v_moved = turn @ v_before @ turn.T
        eigenvalues = np.linalg.eigvalsh(v_before) - np.linalg.eigvalsh(v_moved)
        rho += max(0.0, min(max(eigenvalues), np.trace(v_before) - np.trace(v_moved)))
        keep = [beta * (1 - beta ** (self.t - 1)) / (1 - beta**self.t) for beta in BETAS]
        v = keep[1] * v_moved + (1 - keep[1]) * sum(np.outer(row, row) for row in g) / n
        rho *= keep[1]
        values, axes = np.linalg.eigh(v + rho * np.eye(r))
        root = axes @ np.diag(np.sqrt(np.maximum(values, 0))) @ axes.T
        s = g @ np.linalg.inv(root + EPS * np.eye(r))
        m = keep[0] * m @ turn.T + (1 - keep[0]) * s
        self.state[key] = (u, v, rho, m)
        return m @ inverse.T

    def step(self) -> None:
        self.t += 1
        for i, (a, b) in enumerate(self.pairs):
            old = a.detach().numpy().T.copy(), b.detach().numpy().copy()
            assert a.grad is not None
            assert b.grad is not None
            change_a = self.side((i, "A"), a.grad.numpy().T, old[1])
            change_b = self.side((i, "B"), b.grad.numpy(), old[0])
            a.data -= LR * torch.from_numpy(change_a.T)
            b.data -= LR * torch.from_numpy(change_b)


def rite(factors: Factors) -> LoRARite:
    return LoRARite(factors.pairs(), LR, BETAS, EPS)


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "B = 0"])
def test_lora_rite_is_its_algorithm(zero: bool) -> None:
    ours, plain = Factors(3, zero), Factors(3, zero)
    start = float(loss_of(ours).detach())
    trained(ours, rite(ours))
    trained(plain, PlainRite(plain.pairs()))  # type: ignore[arg-type]
    assert float(loss_of(ours).detach()) < 0.9 * start
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-8


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "B = 0"])
def test_lora_rite_is_invariant_and_adamw_is_not(zero: bool) -> None:
    def change(make: Callable[[Factors], torch.optim.Optimizer]) -> float:
        outputs = []
        for moved in (False, True):
            factors = Factors(3, zero)
            if moved:
                g = model.general(3, 3, torch.Generator().manual_seed(3))
                for (a, b), each in zip(factors.pairs(), g, strict=True):
                    a.data, b.data = each @ a.data, b.data @ torch.linalg.inv(each)
            outputs.append(trained(factors, make(factors))(X))
        return float((outputs[0] - outputs[1]).detach().abs().max())

    assert change(rite) < 1e-8
    assert change(lambda f: torch.optim.AdamW(f.parameters(), lr=LR, weight_decay=0)) > 0.01


def test_lora_rite_refuses_what_is_no_adapter() -> None:
    a, b = torch.zeros(3, 8), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="no adapter"):
        LoRARite([(a, b)])
    with pytest.raises(ValueError, match="no adapter"):
        LoRARite([(torch.zeros(9, 8), torch.zeros(9, 9))])
    with pytest.raises(ValueError, match="no gradient"):
        LoRARite([(a, torch.zeros(5, 3))]).step()


def test_mass_escapes_where_a_basis_turns_away() -> None:
    before, after = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[0.5, 2.0], [1.1, 2.0]])
    assert escaped_mass(before, after).tolist() == [0.5, 0.0]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> model.Adapted:
    """A small Llama that nobody trained, with adapters whose B is not zero, in float64."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    monkeypatch.setattr(model, "SIZES", model.SIZES | size)
    base = model.untrained(0)
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    adapted = get_peft_model(base, options)  # type: ignore[arg-type]
    gauges = find_gauges(adapted, kinds=["factor_map"])
    found = model.Adapted(adapted.double(), gauges, {})
    torch.manual_seed(1)
    for p in found.trained.values():
        p.data.normal_(std=0.3)
    start = {name: p.detach().clone() for name, p in found.trained.items()}
    return model.Adapted(found.model, gauges, start)


def test_all_starts_compute_the_same_and_optimizers_move_from_them(small: model.Adapted) -> None:
    tokens = torch.randint(97, 122, (2, 20), generator=torch.Generator().manual_seed(0))
    assert len(small.gauges) == 7

    def outputs() -> Tensor:
        with InDouble(), torch.no_grad():
            return small.model(input_ids=tokens).logits.log_softmax(-1)

    small.begin(STANDARD, 0)
    expected = outputs()
    for start in settings.MOVED:
        small.begin(start, 0)
        a, b = small.pairs[0]
        names = list(small.trained)
        moved = [(p - small.start[n]).norm() / p.norm() for n, p in small.trained.items()]
        assert len(names) == 14
        assert min(moved) > 0.3
        assert (outputs() - expected).abs().max() < 1e-10
        assert a.shape[0] == b.shape[1] == 3
    for name, make in measure.MAKERS.items():
        small.begin(GENERAL, 0)
        optimizer = make(small, 0.01, *([4.0] if name == settings.LORA_PLUS else []))
        assert (outputs() - expected).abs().max() < 1e-10  # also at the balanced point
        model.loss_of(small.model, tokens, tokens).backward()
        optimizer.step()
        assert (outputs() - expected).abs().max() > 1e-4


def test_lora_plus_has_a_rate_for_each_side(small: model.Adapted) -> None:
    groups = measure.MAKERS[settings.LORA_PLUS](small, 0.01, 4.0).param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.04]
    assert {p.shape[0] for p in groups[0]["params"]} == {3} == {
        p.shape[1] for p in groups[1]["params"]
    }  # fmt: skip


def test_random_maps_have_their_condition_number() -> None:
    for k in (2, 8, 32):
        g = model.general(4, k, torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(g)
        assert torch.allclose(values.amax(1) / values.amin(1), torch.tensor(100.0).double())


def test_the_shifted_text_is_the_text_again_when_it_is_shifted_twice() -> None:
    text = torch.tensor([*b"Now, by Apollo, King; zZ9"])
    assert bytes(texts.shifted(text).tolist()) == b"Abj, ol Ncbyyb, Xvat; mM9"
    assert torch.equal(texts.shifted(texts.shifted(text)), text)


# ----------------------------------------------------------------------------------------------
# what is run, and what is read


def made_up(run: Run, penalty: float) -> dict[str, Any]:
    """The record of a run that was never made: best at one rate, worse away from the standard start
    by ``penalty`` and more, but for the two that are invariant.
    """
    loss = 2.7 + 0.01 * (math.log10(run.setting[0]) + 2.5) ** 2 + 0.01 * run.seed
    if run.optimizer not in (DDCADAM, RITE):
        loss += penalty * STARTS.index(run.start) * (1 + 0.1 * run.seed)
    loss -= 0.02 * (1 + 0.1 * run.seed) * (run.optimizer == DDCADAM)
    times = {"seconds": 3.0, "step_seconds": 0.002, "gradient_seconds": 0.02}
    return {**run.about, "loss": loss, "diverged": False, "commit": "0" * 40, **times}


def all_records(case: Case, penalty: float) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    while runs := missing(case, by_run(records)):
        records += [made_up(run, penalty) for run in runs]
    return records


def test_every_optimizer_gets_as_many_settings_and_all_starts() -> None:
    records = all_records(CASES[MAIN], 0.1)
    ended = by_run(records)
    assert len(ended) == len(records)
    tuned = [r for r in records if r["seed"] == settings.TUNING_SEED and r["start"] == STANDARD]
    counts = {name: sum(r["optimizer"] == name for r in tuned) for name in OPTIMIZERS}
    assert len({*counts.values()}) == 1
    reported = settings.reported(CASES[MAIN], ended)
    assert len(reported) == 5 * 6 * 5
    assert {run.seed for run in reported} == {*range(5)}
    assert len(settings.retuned(CASES[MAIN], ended)) == 5 * 5


def test_no_balanced_point_where_b_is_zero() -> None:
    case = CASES["rank8_cold"]
    assert {r["optimizer"] for r in all_records(case, 0.1)} == {*OPTIMIZERS} - {settings.RIVAL}


def test_w4_holds_where_others_lose_and_its_report_is_made(tmp_path: Path) -> None:
    records = [r for case in CASES.values() for r in all_records(case, 0.05)]
    found = {row.protocol: row.verdict for row in report.verdicts(records, CLAIM)}
    assert found.pop("against LoRA-RITE") == "direction only"  # as invariant, and less good
    assert {*found.values()} == {"reproduced"}
    assert {*found} < {*CLAIM["W4"].fixed}
    text = report.markdown(records, CLAIM)
    assert "All planned runs are recorded." in text
    assert "AdamW retuned there gains" in text
    (results,) = report.results(records, CLAIM)
    assert all(path.exists() for path in results.figures["starts"].plot(tmp_path / "starts"))


def test_w4_is_not_tested_before_its_runs() -> None:
    assert [row.verdict for row in report.verdicts([], CLAIM)] == ["not tested"]
    assert report.markdown([], CLAIM) == "No run is recorded yet.\n"
    some = all_records(CASES["rank2"], 0.05)
    assert "**Not complete**" in report.markdown(some, CLAIM)
    assert [row.verdict for row in report.verdicts(some, CLAIM)] == ["not tested"]


def test_what_diverges_counts_as_knowing_nothing_and_rounding_as_none() -> None:
    record = made_up(Run(MAIN, DDCADAM, STANDARD, 0, (0.01,)), 0.0)
    assert settings.last_loss(record | {"diverged": True, "loss": None}) == settings.IGNORANT
    assert settings.last_loss(record | {"loss": 90.0}) == settings.IGNORANT
    losses = dict.fromkeys(STARTS, 2.0) | {GENERAL: 2.0 + 1e-6}
    assert settings.spread(losses) == settings.RESOLUTION


def test_a_measurement_goes_on_where_it_was_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Run] = []

    def train(run: Run, folder: Path) -> dict[str, Any]:
        if len(made) == 40:
            raise KeyboardInterrupt
        made.append(run)
        return made_up(run, 0.1)

    monkeypatch.setattr(measure, "train", train)
    case = copy.copy(CASES["rank2"])
    with pytest.raises(KeyboardInterrupt):
        measure.measure(case, tmp_path, tmp_path)
    limit = len(made)
    monkeypatch.setattr(measure, "train", lambda run, _: made.append(run) or made_up(run, 0.1))
    measure.measure(case, tmp_path, tmp_path)
    assert len(made) == len({*made}) > limit
    ended = by_run(measure.read_lines(tmp_path / "rank2_runs.jsonl"))
    assert not missing(case, ended)
    assert {*ended} == {*made}
