from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which reads it then
    os.environ["TRITON_INTERPRET"] = "1"

from ddc.data import TextConfig, TextData, load_text
from ddc.models import GPTConfig

torch.set_num_threads(1)

SIZES = {"context": 16, "layers": 2, "width": 16, "heads": 4, "hidden": 12}
MODELS = {
    "rms-swiglu-rope-gqa": GPTConfig(**SIZES, kv_heads=2),
    "layer-bias-relu-learned": GPTConfig(
        **SIZES, kv_heads=4, norm="layer", mlp="relu", positions="learned", bias=True
    ),
    "rms-relu2-partial-gqa": GPTConfig(**SIZES, kv_heads=2, mlp="relu2", positions="partial_rope"),
    "layer-bias-swiglu-rope-mqa": GPTConfig(**SIZES, kv_heads=1, norm="layer", bias=True),
    "rms-gelu-tied": GPTConfig(**SIZES, kv_heads=4, mlp="gelu", tied_head=True),
    "rms-qknorm-bias": GPTConfig(**SIZES, kv_heads=2, qk_norm=True, bias=True),
}


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest) -> GPTConfig:
    return MODELS[request.param]


@pytest.fixture(scope="session")
def shakespeare() -> TextData:
    return load_text(TextConfig(), 32)
