"""What is installed: the library alone, which asks for nothing of the harness."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import BytesParser
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIBRARY = ("*.py", "capacity/**/*.py", "gauges/**/*.py", "optim/**/*.py", "slt/**/*.py")

#: All of the library is imported, and its main entries are used.
ALONE = """
import sys
import importlib, pkgutil
import torch
from torch import nn
import ddc
late = ("scipy", "torch.distributed.tensor", "torch._dynamo", "torch.export._trace", "sympy")
early = [name for name in late if name in sys.modules]
assert not early, f"import ddc takes longer than it must: {early}"
for module in pkgutil.walk_packages(ddc.__path__, "ddc."):
    if module.name != "ddc.optim.kernels":  # Triton comes with a torch for CUDA
        importlib.import_module(module.name)

from ddc import DDCAdam, DDCMuon, audit, check, find_gauges, hidden_matrices
from ddc.capacity import feed_forward_blocks
from ddc.slt import categorical_score, estimate, layers_of, module_loss, observe, read_rate

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
x, y = torch.randn(16, 4), torch.arange(16) % 3
gauges = find_gauges(model, inputs=(x,))
assert [gauge.kind for gauge in gauges].count("relu_rescale") == 2, gauges
assert max(check(model, gauges, lambda m: m(x.double()).log_softmax(-1)).values()) < 1e-9
hidden = hidden_matrices(model, inputs=(x,))
for make in (lambda p: DDCAdam(p, gauges), lambda p: DDCMuon(p, gauges, hidden)):
    optimizer = make(model.named_parameters())
    nn.functional.cross_entropy(model(x), y).backward()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all((p != q).any() for p, q in zip(model.parameters(), before))
print(audit(model, gauges))
assert len(feed_forward_blocks(nn.Sequential(model[0], model[1], model[4]), (x,))) == 1
assert len(observe(model, layers_of(model), [(x, y)], categorical_score(0))) == 3
loss = module_loss(model, nn.functional.cross_entropy)
found = estimate(lambda p: loss(p, x, y), dict(model.named_parameters()), 16, 0.1)
print(found.value, read_rate(torch.arange(24.0).numpy(), torch.arange(24.0).numpy() * 2))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing of earlier builds is in it."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "ddc", folder / "ddc", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "-w", str(folder), str(folder)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def required_by(requirements: list[str]) -> set[str]:
    """All distributions that some pull in, in the environment of the tests."""
    found: set[str] = set()
    pending = [Requirement(line) for line in requirements]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        pending += map(Requirement, importlib.metadata.requires(name) or ())
    return found


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name) for name in archive.namelist()]
        metadata_name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = BytesParser().parsebytes(archive.read(metadata_name))
    held = {str(name) for name in names if ".dist-info" not in str(name)}
    expected = {
        str(path.relative_to(ROOT)) for some in LIBRARY for path in (ROOT / "ddc").glob(some)
    }
    assert held == expected | {"ddc/py.typed", "ddc/optim/kernels.c"}
    assert metadata["Name"] == PROJECT["name"] != "ddc"
    plain = [
        requirement.name
        for requirement in map(Requirement, metadata.get_all("Requires-Dist"))
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    assert sorted(plain) == ["arviz-stats", "numpy", "scipy", "torch"]
    assert metadata["Requires-Python"] == ">=3.11"


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found |= {each.name for each in names}
            case ast.ImportFrom(module=str(module)):
                found.add(module)
    return found


def test_the_library_imports_its_requirements_alone() -> None:
    allowed = {"torch", "numpy", "scipy", "arviz_stats", *sys.stdlib_module_names}
    own = re.compile(r"ddc(\.(capacity|compatibility|gauges|optim|slt)\b.*)?")
    files = [path for some in LIBRARY for path in (ROOT / "ddc").glob(some)]
    assert len(files) > 50
    foreign = {
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in imported(path)
        if name.partition(".")[0] not in allowed and not own.fullmatch(name)
    }
    # comes with torch where there are GPUs, and is imported when kernels are launched
    kernels = "ddc/optim/kernels.py"
    assert foreign == {(kernels, "triton"), (kernels, "triton.language")}


@pytest.mark.slow
def test_the_library_works_where_only_its_requirements_are(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for name in required_by(PROJECT["dependencies"]):
        installed = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(Path(str(installed.locate_file(top))))
    assert {"torch", "scipy"} < {path.name for path in tmp_path.iterdir()}
    assert not any((tmp_path / name).exists() for name in ("omegaconf", "einops", "rich", "pandas"))
    command = [sys.executable, "-S", "-P", "-c", ALONE]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_lock_pins_what_the_metadata_name() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = chain.from_iterable(PROJECT["optional-dependencies"].values())
    for line in (*PROJECT["dependencies"], *extras):
        requirement = Requirement(line)
        # a torch for CUDA asks for one version of triton
        if requirement.name not in (PROJECT["name"], "triton"):
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), line
            assert re.fullmatch(r"[\w.]+", version), line
