"""The documentation: its snippets run, its links lead somewhere, what it derives holds, and the
site builds.
"""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ddc
from ddc import find_gauges
from ddc.gauges import named_parameters
from ddc.models import GPT, GPTConfig
from tests.conftest import MODELS, SIZES
from tests.helpers import backward, make_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
#: Snippets that must be among those that run: a rule that found none would pass.
RUNNING = {
    "README.md": 1,
    "docs/usage.md": 2,
    "docs/index.md": 1,
    "docs/gauges.md": 1,
    "docs/extending.md": 1,
}


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def free_names(block: str) -> set[str]:
    """Names that a block reads and does not make, wherever in it; those of functions and lambdas
    count as made.
    """
    tree = ast.parse(block)
    read, made = set(), set(dir(builtins))
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                read.add(name)
            case (
                ast.Name(id=name)
                | ast.arg(arg=name)
                | ast.FunctionDef(name=name)
                | ast.ClassDef(name=name)
            ):
                made.add(name)
            case ast.alias(name=name, asname=asname):
                made.add((asname or name).partition(".")[0])
    return read - made


def snippets(given: set[str]) -> dict[str, list[str]]:
    """By page, the blocks that need nothing but what is given."""
    return {
        relative(page): [b for b in python_blocks(page) if free_names(b) <= given] for page in PAGES
    }


@pytest.mark.parametrize("page", RUNNING)
def test_snippets_run(page: str) -> None:
    """Blocks that need no name but ``model``, which is a small GPT."""
    blocks = snippets({"model"})[page]
    assert len(blocks) >= RUNNING[page]
    for block in blocks:
        torch.manual_seed(0)
        names: dict[str, Any] = {"__name__": "snippet", "model": GPT(GPTConfig(**SIZES), 20)}
        exec(compile(block, page, "exec"), names)
        if page == "docs/index.md":  # the ten lines train
            assert float(names["loss"].detach()) < 1.2
            assert str(names["gauges"]) in (ROOT / page).read_text()


def targets(page: Path) -> list[str]:
    """What a page links to, code apart, without addresses and anchors."""
    text = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [each.partition("#")[0] for each in found if not re.match(r"\w+:|#", each)]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_to_files(page: Path) -> None:
    missing = [target for target in targets(page) if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_lines_are_short_and_links_have_titles(page: Path) -> None:
    """At most 100 columns, but for rows of tables and what says where a table comes from."""
    lines = page.read_text().splitlines()
    assert not [x for x in lines if len(x) > 100 and not x.startswith(("|", "<!-- table: "))]
    assert not re.findall(r"\[[\w/.-]+\.md\]\(", page.read_text())


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 12_000


def test_one_version() -> None:
    assert f"\nversion: {ddc.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{ddc.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def is_zero(x: torch.Tensor, beside: torch.Tensor) -> bool:
    return bool(x.abs().max() < 1e-12 * beside.abs().max())


def test_identities_of_the_gradient(config: GPTConfig) -> None:
    """The identities of docs/gauges.md, written out by hand for our GPT and not by the package's
    gauges.
    """
    model = make_model(config)
    backward(model, 0)
    w = named_parameters(model)
    g = {name: p.grad for name, p in w.items() if p.grad is not None}
    kinds = {gauge.kind for gauge in find_gauges(model)}
    block, k = "blocks.1", 2 if config.mlp == "relu2" else 1
    if "logit_shift" in kinds:
        for name in ("head.weight", *(["head.bias"] if config.bias else [])):
            assert is_zero(g[name].sum(0), g[name])

    def rows(name: str) -> torch.Tensor:
        """<g, W> by row, the bias included."""
        both = [f"{name}.weight", *([f"{name}.bias"] if config.bias or "norm" in name else [])]
        return sum((g[n] * w[n]).reshape(len(w[n]), -1).sum(1) for n in both if n in w)

    def columns(name: str) -> torch.Tensor:
        return (g[f"{name}.weight"] * w[f"{name}.weight"]).sum(0)

    if kinds & {"relu_rescale", "gated_rescale"}:
        plus = rows(f"{block}.mlp.up")
        assert is_zero(plus - k * columns(f"{block}.mlp.down"), plus)
    plus = rows(f"{block}.attention_norm")
    assert is_zero(
        plus - sum(columns(f"{block}.attention.{n}") for n in ("query", "key", "value")), plus
    )

    def moment(name: str, axis: int, head: slice) -> torch.Tensor:
        """G Wᵀ of the rows (the columns, transposed) of one head; with the bias."""
        grad, weight = (
            t[f"{block}.attention.{name}.weight"].movedim(axis, 0)[head] for t in (g, w)
        )
        found = grad @ weight.mT
        if axis == 0 and config.bias:
            found = found + torch.outer(
                *(t[f"{block}.attention.{name}.bias"][head] for t in (g, w))
            )
        return found

    d, group = config.head_width, config.heads // config.kv_heads
    heads = [slice(i * d, (i + 1) * d) for i in range(config.heads)]
    a = moment("value", 0, heads[1 % config.kv_heads])
    members = range((1 % config.kv_heads) * group, (1 % config.kv_heads + 1) * group)
    a = a + sum(moment("output", 1, heads[h]) for h in members)
    assert is_zero(a - a.mT, a)
    if "qk_rotation" in kinds:
        a = moment("key", 0, heads[1 % config.kv_heads]) + sum(
            moment("query", 0, heads[h]) for h in members
        )
        turned = config.rotated_width
        for i in range(turned // 2):  # a plane: entry i and entry i + turned / 2
            assert is_zero(a[i, i + turned // 2] - a[i + turned // 2, i], a)
        rest = a[turned:, turned:]
        assert not rest.numel() or is_zero(rest - rest.mT, a)
        if turned > 2:  # and only that: RoPE does not let planes mix
            assert not is_zero(a[0, 1] - a[1, 0], a)


def test_gradients_transform_against_the_weights() -> None:
    """g(Tθ) = T^-T g(θ): what is multiplied by c has its gradient divided by c."""
    config = MODELS["rms-relu2-partial-gqa"]
    before, after = make_model(config), make_model(config)
    gauge = find_gauges(after).only(["relu_rescale"])[0]
    params = named_parameters(after)
    c = gauge.sample(params, torch.Generator().manual_seed(0))
    gauge.act_(params, c)
    for model in (before, after):
        backward(model, 0)
    up, down = (before.blocks[0].mlp.up.weight.grad, before.blocks[0].mlp.down.weight.grad)
    torch.testing.assert_close(after.blocks[0].mlp.up.weight.grad, up / c[:, None])
    torch.testing.assert_close(after.blocks[0].mlp.down.weight.grad, down * c**2)


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        str(ROOT / "docs"),
        str(tmp_path / "site"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "find_gauges" in (tmp_path / "site/api/ddc.html").read_text()
    # read without a network: formulas are MathML, and no script, style or font is elsewhere
    assert (tmp_path / "site/method.html").read_text().count("<math") > 100
    for made in (tmp_path / "site").rglob("*.html"):
        assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=.https?:", made.read_text()), made
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?https?:", style.read_text()), style
