"""scale=gpu, as far as it can be checked without a GPU: shapes, memory, and no value needed on the
host.
"""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir

from ddc.training.compose import resolve
from ddc.training.memory import estimate_memory
from ddc.training.schema import Config
from ddc.training.setup import load_data
from tests.test_training import ROOT


def config(*overrides: str) -> Config:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return resolve(compose("config", overrides=["+experiment=lm_overtrain", *overrides]))


@pytest.mark.slow
def test_the_gpu_scale_fits_a_24_gb_card() -> None:
    gpu = config("scale=gpu")
    assert (gpu.model.layers, gpu.model.norm, gpu.model.mlp, gpu.model.positions) == (
        12,
        "rms",
        "swiglu",
        "rope",
    )
    assert not gpu.model.tied_head
    assert gpu.training.precision == "bfloat16"
    ours = estimate_memory(gpu, load_data(gpu.data, gpu.model, 0))
    adamw = config("scale=gpu", "optimizer=adamw")
    plain = estimate_memory(adamw, load_data(adamw.data, adamw.model, 0))
    assert ours.parameters == plain.parameters == 75_909_888
    assert (
        ours.optimizer_state < plain.optimizer_state == pytest.approx(8 * ours.parameters, rel=1e-3)
    )
    assert plain.peak < 22e9
    assert ours.peak < 1.05 * plain.peak


def test_estimate_counts_what_is_there() -> None:
    cpu = config("scale=cpu", "training.batch_size=2", "optimizer=adamw")
    estimate = estimate_memory(cpu, load_data(cpu.data, cpu.model, 0))
    weights_gradients_and_state = (4 + 4 + 8) * estimate.parameters
    logits = 2 * 128 * 256 * 4
    assert estimate.peak > weights_gradients_and_state / 2 + logits
    assert estimate.peak < 2 * weights_gradients_and_state + 40 * logits


@pytest.mark.parametrize("optimizer", ["adamw", "ddcadam", "muon", "ddcmuon"])
def test_estimate_of_every_optimizer(optimizer: str) -> None:
    cpu = config("scale=cpu", "training.batch_size=2", f"optimizer={optimizer}")
    estimate = estimate_memory(cpu, load_data(cpu.data, cpu.model, 0))
    assert 3 * estimate.parameters < estimate.optimizer_state < 8.1 * estimate.parameters


@pytest.mark.slow
def test_bfloat16_autocast_trains(shakespeare) -> None:
    """Mixed precision as the GPU runs it, on the CPU: the loss falls as in float32."""
    from ddc import DDCAdam, find_gauges
    from ddc.models import GPT, GPTConfig, cross_entropy

    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(context=32, layers=2, width=32, hidden=64), 256)
        optimizer = DDCAdam(model.named_parameters(), find_gauges(model), lr=3e-3)
        for step in range(60):
            x, y = shakespeare.batch(step, 8, 0)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 3.5
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


def vit_config(*overrides: str) -> Config:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return resolve(
            compose("config", overrides=["+experiment=vit_scratch", "scale=gpu", *overrides])
        )


@pytest.mark.parametrize("optimizer", ["adamw", "ddcadam", "muon", "ddcmuon"])
def test_estimate_of_a_traced_model(optimizer: str) -> None:
    vit = vit_config("model.layers=2", f"optimizer={optimizer}")
    estimate = estimate_memory(vit, load_data(vit.data, vit.model, 0))
    assert 3 * estimate.parameters < estimate.optimizer_state < 8.1 * estimate.parameters


@pytest.mark.slow
def test_the_gpu_scale_of_vision_fits_a_24_gb_card() -> None:
    vit = vit_config()
    assert (vit.model.layers, vit.model.width, vit.training.device) == (12, 384, "cuda")
    estimate = estimate_memory(vit, load_data(vit.data, vit.model, 0))
    assert estimate.parameters > 21e6
    assert 1e9 < estimate.peak < 22e9
