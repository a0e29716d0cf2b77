"""What docs/extending.md says is enough: a toy kind of gauge, a toy base optimizer and a toy
experiment, in a copy of the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = {
    "__init__.py": '"""A toy."""\n',
    "run.yaml": """\
defaults:
  - override /model: deep_mlp
  - override /data: modular

name: toy
model: {depth: 2, width: 8}
data: {prime: 7}
training: {steps: 4, batch_size: 8, evaluations: 2, evaluation_batches: 1, gap_levels: []}
""",
    "claim.yaml": """\
T1:
  title: a toy
  paper: nothing
  values: {}
  where: nowhere
  metric: the last train loss
  comparison: none
  protocols: {matched: as it comes}
  reproduced: never
  direction_only: never
  level: 0.05
  fixed: {matched: before the runs}
""",
    "plan.py": """\
from experiments.protocols import ROOT, Experiment

SETTINGS = {name: [f"optimizer={name}"] for name in ("adamw", "ddcrmsprop")}
EXPERIMENT = Experiment(
    overrides="+experiment=toy",
    seeds=range(1),
    matched=[each for settings in SETTINGS.values() for each in settings],
    grid=SETTINGS,
    score=lambda records: -records[0]["summary"]["train_loss"],
    curve=("step", "train_loss"),
    results=ROOT / "results/toy",
    final_seeds=(),
    more={},
)
""",
    "report.py": """\
from ddc.report.claims import Verdict
from ddc.report.runs import TITLES
from ddc.report.stages import of_stage, table
from experiments.output import Results
from experiments.toy.plan import EXPERIMENT


def load():
    return EXPERIMENT.committed()


def results(records, claims):
    def losses():
        runs = of_stage(records, "tuned")
        rows = [[TITLES[name], *each] for name, each in runs.items()]
        return table(["optimizer", "setting"], rows) + "\\n"

    return [Results(EXPERIMENT.results, {"table": losses})]


def verdicts(records, claims):
    return [Verdict("T1", "matched", "–", "–", "1", "no", "tiny", "not tested")]
""",
}
#: On a model with the toy gauge: it is found and real, and the toy optimizer stays on one orbit.
EQUIVARIANCE = """
import copy
import torch
from torch import nn
from ddc import find_gauges
from ddc.gauges import KINDS, check
from ddc.optim.factory import LIFTS
from ddc.training.compose import compose_config


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x) * self.gamma))


torch.manual_seed(0)
model = Net().double()
x, y = torch.randn(32, 4, dtype=torch.float64), torch.randint(3, (32,))
gauges = find_gauges(model, inputs=(x,))
assert [gauge.kind for gauge in gauges.only(["output_scale"])] == ["output_scale"]
assert max(check(model, gauges, lambda m: m(x).log_softmax(-1)).values()) < 1e-12
models = [model, copy.deepcopy(model)]
gauges.transform_(models[1], torch.Generator().manual_seed(0))
for each in models:
    before = each(x).log_softmax(-1)
    optimizer = LIFTS["ddcrmsprop"](each.named_parameters(), gauges, lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(each(x), y).backward()
        optimizer.step()
    assert (each(x).log_softmax(-1) - before).abs().max() > 0.1
a, b = (each(x).log_softmax(-1) for each in models)
assert (a - b).abs().max() < 1e-7, (a - b).abs().max()
assert KINDS["output_scale"].title == "output scale"
config = compose_config(["optimizer=ddcrmsprop", "optimizer.alpha=0.5", "gauges=output_scale"])
assert config.gauges.output_scale is True
try:
    compose_config(["optimizer=ddcrmsprop", "optimizer.alpha=2"])
except ValueError as error:
    assert "optimizer.alpha" in str(error)
else:
    raise AssertionError("alpha=2")
"""


def block(word: str) -> str:
    """The one code block of the page that has a word."""
    text = (ROOT / "docs/extending.md").read_text()
    fence = r"^```(?:python|{code-block} python)\n(.*?)^```"
    blocks = re.findall(fence, text, re.DOTALL | re.MULTILINE)
    (found,) = [each for each in blocks if word in each]
    return found


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line + "\n")


@pytest.mark.slow
def test_a_toy_of_each(tmp_path: Path) -> None:
    for name in ("ddc", "experiments", "benchmarks", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train.py", "Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "ddc/gauges/output_scale.py").write_text(block("output_scale"))
    append(
        tmp_path / "ddc/gauges/__init__.py", "from ddc.gauges import output_scale as output_scale"
    )
    rule, _ = block("DDCRMSProp").split("\n\noptimizer = ")  # which has a model
    (tmp_path / "ddc/optim/rules/rmsprop.py").write_text(rule + "\n")
    folder = tmp_path / "experiments/toy"
    folder.mkdir()
    for name, text in EXPERIMENT.items():
        (folder / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-c", EQUIVARIANCE)
    assert re.search(r"^toy +A toy$", run("make", "--no-print-directory", "help"), re.MULTILINE)
    assert "-m experiments run toy" in run("make", "-n", "toy")
    run(sys.executable, "-m", "experiments", "run", "toy", "--jobs", "1")
    table = (tmp_path / "results/toy/table.md").read_text()
    assert "| AdamW | optimizer=adamw |" in table
    assert "| ddcrmsprop | optimizer=ddcrmsprop |" in table
    assert len((tmp_path / "results/toy/runs.jsonl").read_text().splitlines()) == 4
    again = run(sys.executable, "-m", "experiments", "status")
    assert re.search(r"T1 +toy +matched +2 +2 +0 +0", again), again
    assert len([*(tmp_path / "runs/toy").glob("*/summary.json")]) == 4
