"""Spare capacity: what is measured is exact, does not depend on the gauge, and pruning does what it
says.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc.capacity import (
    Spectrum,
    contributions,
    dressed_spectra,
    feed_forward_blocks,
    kept_units,
    pruned_parameters,
    removal_effects,
    unit_norms,
    unit_statistics,
)
from ddc.gauges import find_gauges, named_parameters
from ddc.models import (
    GPT,
    DeepMLP,
    DeepMLPConfig,
    GPTConfig,
    ViTConfig,
    build_model,
    cross_entropy,
    load_model,
    save_model,
)
from ddc.models.vit import FEED_FORWARDS
from ddc.report.capacity import spare_share
from tests import zoo

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(6) % 3
TOKENS = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
LIVELY = 4  # a unit that no model below has dead
Made = tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]


def shaken(model: nn.Module) -> nn.Module:
    """In float64, with norm scales and biases that are not those of the initialisation."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def vit(mlp: str) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(0)
        config = ViTConfig(patch=4, layers=2, width=8, heads=2, hidden=12, mlp=mlp)
        model = shaken(build_model(config, shape=(1, 8, 8), classes=3))
        return model, IMAGES, lambda logits: cross_entropy(logits, LABELS)

    return make


def gpt(mlp: str, bias: bool = False) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(0)
        config = GPTConfig(
            layers=2, width=8, heads=2, kv_heads=1, hidden=12, mlp=mlp, bias=bias, context=8
        )
        return shaken(GPT(config, 11)), TOKENS, lambda logits: cross_entropy(logits, TOKENS)

    return make


MODELS = {
    **{f"ViT, {mlp}": vit(mlp) for mlp in FEED_FORWARDS},
    "GPT, SwiGLU": gpt("swiglu"),
    "GPT, ReLU², biases": gpt("relu2", bias=True),
}
WITHOUT_BLOCKS = {"ViT, packed SwiGLU", "EVA-02 tiny", "EVA-02 base"}


def measured(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All that is said of the units of a model."""
    blocks, gauges, parameters = (
        feed_forward_blocks(model, (x,)),
        find_gauges(model, inputs=(x,)),
        named_parameters(model),
    )
    statistics = unit_statistics(model, blocks, [x])
    effects = removal_effects(model, blocks, statistics, x, loss)
    found = {}
    for block in blocks:
        up, down = dressed_spectra(parameters, gauges, block)
        found[f"{block.where}: to zero"] = effects[block.where].to_zero
        found[f"{block.where}: to mean"] = effects[block.where].to_mean
        found[f"{block.where}: norms"] = unit_norms(parameters, gauges, block)
        found[f"{block.where}: contributions"] = contributions(
            parameters, block, statistics[block.where]
        )
        found[f"{block.where}: up"], found[f"{block.where}: down"] = up.values, down.values
    return found


@pytest.mark.parametrize("name", zoo.ZOO)
def test_blocks_of_models_that_others_wrote(name: str) -> None:
    model, inputs = zoo.make(name)
    blocks = feed_forward_blocks(model, inputs)
    expected = (
        0 if name in WITHOUT_BLOCKS or "Sequential" in name else 1 if "EncoderLayer" in name else 2
    )
    assert len(blocks) == expected
    parameters = named_parameters(model)
    for block in blocks:
        sizes = {
            parameters[axis.parameter].shape[axis.axis] for axis in (*block.inward, block.outward)
        }
        assert sizes == {block.units}
    assert len({block.where for block in blocks}) == len(blocks)
    if blocks:
        half = torch.arange(blocks[0].units // 2)
        with torch.no_grad():
            before = zoo.logits(model, inputs)
            for axis in blocks[0].inward:
                parameters[axis.parameter].index_fill_(axis.axis, half, 0.7)
            between = zoo.logits(model, inputs)
            parameters[blocks[0].outward.parameter].index_fill_(blocks[0].outward.axis, half, 0.0)
            after = zoo.logits(model, inputs)
            for axis in blocks[0].inward:
                parameters[axis.parameter].index_fill_(axis.axis, half, -0.3)
            assert (before - between).abs().max() > 1e-6
            assert (between - after).abs().max() > 1e-6
            assert torch.equal(after, zoo.logits(model, inputs))  # nothing else reads these units


@pytest.mark.parametrize("name", MODELS)
def test_nothing_depends_on_the_gauge(name: str) -> None:
    model, x, loss = MODELS[name]()
    before = measured(model, x, loss)
    find_gauges(model, inputs=(x,)).transform_(model, torch.Generator().manual_seed(1))
    after = measured(model, x, loss)
    assert len(before) == 2 * 6
    for key, values in before.items():
        torch.testing.assert_close(
            after[key], values, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_removal_of_a_unit_is_what_it_says(name: str) -> None:
    model, x, loss = MODELS[name]()
    blocks = feed_forward_blocks(model, (x,))
    statistics = unit_statistics(model, blocks, [x])
    effects = removal_effects(model, blocks, statistics, x, loss)
    base, unit = loss(model(x)), torch.tensor([LIVELY])
    for block in blocks:
        reader = model.get_submodule(block.reader)
        for mode, instead in (("to_zero", 0.0), ("to_mean", statistics[block.where].mean[unit])):

            def hold(module: nn.Module, args: tuple[Tensor], instead=instead) -> tuple[Tensor]:
                return (args[0].index_fill(-1, unit, float(instead)),)

            handle = reader.register_forward_pre_hook(hold)
            expected = float((loss(model(x)) - base).detach())
            handle.remove()
            assert float(getattr(effects[block.where], mode)[unit]) == pytest.approx(
                expected, abs=1e-12
            )
            assert abs(expected) > 1e-9


def test_statistics_are_over_all_positions_of_all_batches() -> None:
    model, x, _ = MODELS["ViT, relu"]()
    block = feed_forward_blocks(model, (x,))[1]
    seen = []
    handle = model.get_submodule(block.reader).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    model.train()
    statistics = unit_statistics(model, [block], [x[:2], x[2:]])[block.where]
    handle.remove()
    assert model.training
    hidden = torch.cat(seen).flatten(0, -2)
    torch.testing.assert_close(statistics.mean, hidden.mean(0))
    torch.testing.assert_close(statistics.variance, hidden.var(0, correction=0))


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_is_the_whole_one_with_units_held(
    name: str, keep: float, tmp_path: Path
) -> None:
    model, x, _ = MODELS[name]()
    blocks = feed_forward_blocks(model, (x,))
    statistics, parameters = unit_statistics(model, blocks, [x]), named_parameters(model)
    changed = pruned_parameters(parameters, blocks, statistics, keep)
    small = torch.func.functional_call(model, changed, (x,))
    whole = copy.deepcopy(model)
    for block in blocks:
        kept = kept_units(parameters, block, statistics[block.where], keep)
        assert len(kept) == round(keep * block.units)
        instead = (
            statistics[block.where].mean
            if block.outward_bias
            else torch.zeros(block.units, dtype=torch.float64)
        )

        def hold(
            module: nn.Module, args: tuple[Tensor], kept=kept, instead=instead
        ) -> tuple[Tensor]:
            held = instead.expand_as(args[0]).clone()
            held[..., kept] = args[0][..., kept]
            return (held,)

        whole.get_submodule(block.reader).register_forward_pre_hook(hold)
    torch.testing.assert_close(small, whole(x), rtol=1e-11, atol=1e-11)
    assert torch.equal(small, model(x)) if keep == 1 else (small - model(x)).abs().max() > 1e-3


def test_units_that_do_nothing_go_first() -> None:
    model, x, loss = MODELS["ViT, relu"]()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[2] = 0.0  # constant: its mean is all that it gives
        model.blocks[0].mlp.fc1.bias[2] = 5.0
        model.blocks[0].mlp.fc2.weight[:, 7] = 0.0  # nobody reads it
        model.blocks[0].mlp.fc1.weight[9] = 0.0  # dead
        model.blocks[0].mlp.fc1.bias[9] = -1.0
    blocks = feed_forward_blocks(model, (x,))
    statistics = unit_statistics(model, blocks, [x])
    effects = removal_effects(model, blocks, statistics, x, loss)[blocks[0].where]
    idle = [2, 7, 9]
    assert effects.to_mean[idle].abs().max() < 1e-12
    assert effects.to_zero[2].abs() > 1e-3
    kept = kept_units(named_parameters(model), blocks[0], statistics[blocks[0].where], 9 / 12)
    assert not set(idle) & set(kept.tolist())
    norms = unit_norms(named_parameters(model), find_gauges(model), blocks[0])
    up, down = dressed_spectra(named_parameters(model), find_gauges(model), blocks[0])
    assert norms[7] == 0
    assert norms.isfinite().all()
    assert up.values.isfinite().all()
    assert down.values.isfinite().all()


def test_spare_share_counts_by_size() -> None:
    blocks = [{"removal_to_zero": [0.0, -5e-4, 2e-3], "removal_to_mean": [0.0, 0.0, 9e-4]}]
    blocks += [{"removal_to_zero": [-2e-3], "removal_to_mean": [1.0]}]
    assert [spare_share({"blocks": blocks}, removal) for removal in ("zero", "mean")] == [0.5, 0.75]
    assert spare_share({"blocks": blocks}, "zero", 1e-2) == 1


def test_ranks_of_known_matrices() -> None:
    assert Spectrum(torch.ones(5)).effective_rank == pytest.approx(5)
    assert Spectrum(torch.ones(5)).stable_rank == pytest.approx(5)
    one = Spectrum(torch.tensor([3.0, 0.0, 0.0]))
    assert (one.effective_rank, one.stable_rank) == pytest.approx((1, 1))
    half = Spectrum(torch.tensor([2.0, 1.0], dtype=torch.float64))  # entropy of (2/3, 1/3)
    assert half.effective_rank == pytest.approx(3 / 2 ** (2 / 3))
    assert half.stable_rank == pytest.approx(5 / 4)


def test_a_share_that_cannot_be_is_refused() -> None:
    model, x, _ = MODELS["ViT, relu"]()
    blocks = feed_forward_blocks(model, (x,))
    statistics = unit_statistics(model, blocks, [x])
    for keep in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="keep="):
            pruned_parameters(named_parameters(model), blocks, statistics, keep)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (
            GPTConfig(layers=1, width=8, heads=2, kv_heads=1, hidden=5, tied_head=True),
            {"vocab_size": 11},
        ),
        (
            ViTConfig(patch=4, layers=1, width=8, heads=2, hidden=5, class_token=True),
            {"shape": (1, 8, 8), "classes": 3},
        ),
        (DeepMLPConfig(depth=2, width=4), {"tokens": 5, "classes": 5}),
    ],
)
def test_saved_models_come_back(config, sizes: dict, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = build_model(config, **sizes)
    save_model(tmp_path, model, config, sizes, note="here")
    back = load_model(tmp_path)
    assert isinstance(back, type(model))
    assert not back.training
    for (name, a), (other, b) in zip(
        model.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    assert json.loads((tmp_path / "model.json").read_text())["note"] == "here"
    broken = json.loads((tmp_path / "model.json").read_text())
    broken["model"]["width"] = 16
    (tmp_path / "model.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="does not fit"):
        load_model(tmp_path)


class Block(nn.Module):
    """A block of 8 units and a head, in ways of which most make its units no units of their own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.up, self.down = (
            how,
            nn.Linear(4, 4),
            nn.Linear(4, 8),
            nn.Linear(8, 4),
        )
        self.narrow, self.back, self.head = nn.Linear(4, 1), nn.Linear(4, 4), nn.Linear(4, 4)
        if how == "shared bias":
            self.head.bias = self.down.bias

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        match self.how:
            case "read by a linear map":
                return self.head(torch.relu(h + self.back(h)))
            case "narrow gate":
                return self.down(torch.relu(self.up(h)) * self.narrow(h))
            case "no module":
                return F.linear(torch.relu(self.up(h)), self.down.weight)
            case "in place":
                h = h.sin()
                h += self.down(torch.relu(self.up(h)))
                h.mul_(2)
                return self.head(h)
        return self.head((h + self.down(torch.relu(self.up(h)))).sin())


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("read by a linear map", 0),
        ("narrow gate", 0),
        ("no module", 0),
        ("shared bias", 0),
        ("in place", 1),
        ("", 1),
    ],
)
def test_units_that_are_not_their_own_are_no_block(how: str, count: int) -> None:
    assert len(feed_forward_blocks(Block(how), (torch.randn(2, 4),))) == count


def test_removal_in_a_model_that_computes_in_place() -> None:
    torch.manual_seed(0)
    model, x = Block("in place").double(), torch.randn(5, 4, dtype=torch.float64)
    blocks = feed_forward_blocks(model, (x,))
    effects = removal_effects(
        model, blocks, unit_statistics(model, blocks, [x]), x, torch.Tensor.sum
    )
    for unit in range(8):
        less = copy.deepcopy(model)
        with torch.no_grad():
            less.down.weight[:, unit] = 0.0
            expected = float(less(x).sum() - model(x).sum())
        assert float(effects[blocks[0].where].to_zero[unit]) == pytest.approx(expected, abs=1e-12)


def test_measured_without_dropout_and_modes_kept() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    model.dropout1.eval()
    x = torch.randn(3, 4, 8)
    blocks = feed_forward_blocks(model, (x,))
    first, second = (unit_statistics(model, blocks, [x])[blocks[0].where] for _ in range(2))
    assert torch.equal(first.mean, second.mean)
    assert model.training
    assert not model.dropout1.training
    with pytest.raises(ValueError, match="at least one batch"):
        unit_statistics(model, blocks, [])


def test_layers_of_a_chain_are_no_blocks() -> None:
    pairs = torch.zeros(2, 2, dtype=torch.int64)
    assert feed_forward_blocks(DeepMLP(DeepMLPConfig(depth=4, width=4), 5, 5), (pairs,)) == []
    residual = DeepMLP(DeepMLPConfig(depth=4, width=4, residual=True), 5, 5)
    assert [block.where for block in feed_forward_blocks(residual, (pairs,))] == [
        "layers.1",
        "layers.3",
    ]
