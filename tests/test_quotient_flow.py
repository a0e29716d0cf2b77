"""The flow of DDCAdam on the quotient: the independent integration, and the experiment's report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddc.gauges import find_gauges, orbit_distance
from ddc.report.claims import load_claims
from experiments.protocols import EXPERIMENTS
from experiments.quotient_flow import flow, measure, report
from experiments.quotient_flow.flow import Clock, Field, adamw, ddcadam, gradients, integrate

Problem = tuple[tuple[Tensor, ...], Tensor, Tensor]


@pytest.fixture
def problem() -> Problem:
    """Weights of a network with 3 inputs, 5 hidden units and 4 classes; inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 3), (5,), (4, 5), (4,)
    weights = tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return weights, x, torch.arange(12) % 4


def test_integration_agrees_with_a_closed_form(problem: Problem) -> None:
    """Decay alone: weights fall by e^(-decay t), whatever the gradient is."""

    def decay_alone(weights, grads):  # type: ignore[no-untyped-def]
        return [], lambda u: [-0.7 * w for w in weights]

    weights, x, y = problem
    found = integrate(weights, decay_alone, x, y, Clock(2.0, (1.0, 1.0), 0.7, 1e-8), 40)
    for w, after in zip(weights, found, strict=True):
        torch.testing.assert_close(
            after, w * torch.tensor(-1.4, dtype=w.dtype).exp(), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("name", ["ddcadam", "adamw"])
def test_velocity_at_the_start_is_that_of_one_small_step(problem: Problem, name: str) -> None:
    """The first step of the package's optimizer, over its learning rate, tends to the velocity."""
    weights, x, y = problem
    layers = torch.nn.Linear(3, 5), measure.SquaredReLU(), torch.nn.Linear(5, 4)
    model = torch.nn.Sequential(*layers).double()
    start = dict(zip(measure.point(model), weights, strict=True))
    model.load_state_dict(start)
    field: Field = (ddcadam if name == "ddcadam" else adamw)(measure.CLOCK.decay)
    grads = gradients(weights, x, y)
    inputs, velocities = field(weights, grads)
    expected = velocities([each / (each.abs() + measure.CLOCK.eps) for each in inputs])
    gauges = find_gauges(model, inputs=(x,))
    assert {gauge.kind for gauge in gauges} == {"relu_rescale", "logit_shift"}
    steps = 10**7
    lr = measure.CLOCK.time / steps
    optimizer = measure.optimizer(name, model, gauges, steps)
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    for before, after, velocity in zip(weights, model.parameters(), expected, strict=True):
        torch.testing.assert_close((after - before) / lr, velocity, atol=1e-5, rtol=1e-5)


def test_steps_approach_the_flow(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the learning rate, half the distance, for the whole measurement on the small network."""
    weights, x, y = problem
    clock = Clock(0.05, (0.01, 0.1), 0.1, 1e-8)
    monkeypatch.setattr(measure, "CLOCK", clock)
    layers = torch.nn.Linear(3, 5), measure.SquaredReLU(), torch.nn.Linear(5, 4)
    model = torch.nn.Sequential(*layers).double()
    model.load_state_dict(dict(zip(measure.point(model), weights, strict=True)))
    gauges = find_gauges(model, inputs=(x,))
    limit = integrate(weights, ddcadam(clock.decay), x, y, clock, 200)
    limit_point = dict(zip(measure.point(model), limit, strict=True))

    def loss(m: torch.nn.Module) -> Tensor:
        return torch.nn.functional.cross_entropy(m(x), y)

    ends = [measure.end("ddcadam", model, gauges, loss, n) for n in (100, 200)]
    far, near = (float(orbit_distance(each, limit_point, gauges)) for each in ends)
    assert near < 0.55 * far
    assert far < 0.05


def made_up(to_flow: float, apart: float, power: float) -> list[dict[str, object]]:
    """Records of both optimizers, with a distance to the flow at the largest learning rate."""
    return [
        {
            "model": model, "optimizer": name, "seed": seed, "steps": n, "lr": 0.1 / n,
            "to_flow": to_flow * (100 / n) ** power, "apart": apart if name == "ddcadam" else 0.3,
            "length": 1.0, "reference_error": None if model == "GPT" else 1e-6, "commit": "c",
            "config": dataclasses.asdict(measure.CLOCK) | {"reference_steps": 8},
        }
        for model in measure.MODELS for name in measure.OPTIMIZERS for seed in (0, 1)
        for n in (100, 200, 400)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("apart", "power", "expected"),
    [
        (1e-12, 1.0, "reproduced"),
        (1e-12, 0.5, "direction only"),
        (1e-3, 1.0, "direction only"),
        (1e-3, 0.5, "not reproduced"),
    ],
)
def test_verdict(apart: float, power: float, expected: str, tmp_path: Path) -> None:
    """Each condition of the rule by itself."""
    records, claims = made_up(0.02, apart, power), load_claims(EXPERIMENTS)
    (found,) = report.verdicts(records, claims)
    assert found.verdict == expected
    assert f"{power:.2f}" in report.markdown(records, claims)
    paths = report.plot(report.approaches(records), 1e-7, tmp_path / "flow")
    assert all(path.stat().st_size > 1000 for path in paths)


def test_nothing_measured_is_not_tested() -> None:
    """No record: the row says so."""
    (found,) = report.verdicts([], load_claims(EXPERIMENTS))
    assert found.verdict == "not tested"


def test_the_integration_shares_nothing_with_the_package() -> None:
    """It could not disagree otherwise."""
    source = Path(flow.__file__).read_text()
    assert not [line for line in source.splitlines() if line.startswith(("from ddc", "import ddc"))]
