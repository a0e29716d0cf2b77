"""The zoo: forty architectures of transformers and timm, and that the zoo sees what is wrong."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddc import find_gauges
from ddc.gauges import Axis, GaugeSet, Rescale
from ddc.training.records import Records, provenance
from experiments.zoo.architectures import Architecture, Made, architectures
from experiments.zoo.document import document, general
from experiments.zoo.measure import findings, in_processes, run, verdicts

ROOT = Path(__file__).resolve().parents[1]
#: Chosen for what differs: norms, gates, positions, shared maps, state spaces, experts, stages,
#: towers, losses.
FORTY = """
    GPT2LMHeadModel LlamaForCausalLM Qwen3ForCausalLM Gemma3ForCausalLM GPTNeoXForCausalLM
    NemotronForCausalLM
    DogeForCausalLM DiffLlamaForCausalLM BloomForCausalLM FalconForCausalLM MptForCausalLM
    OPTForCausalLM
    MambaForCausalLM MixtralForCausalLM GptOssForCausalLM PhiForCausalLM Olmo2ForCausalLM
    StableLmForCausalLM
    BertForMaskedLM DebertaV2ForMaskedLM AlbertForMaskedLM ModernBertForMaskedLM
    T5ForConditionalGeneration BartForConditionalGeneration LlamaForSequenceClassification
    ViTForImageClassification SwinForImageClassification ConvNextForImageClassification CLIPModel
    Wav2Vec2ForCTC
    test_vit vit_srelpos_small_patch16_224 samvit_base_patch16 eva02_tiny_patch14_224
    xcit_nano_12_p16_224 resnet18
    convnext_atto poolformer_s12 test_mambaout levit_128s
""".split()  # noqa: SIM905


@pytest.mark.slow
# over two minutes of a core, and several times that where others use it too
@pytest.mark.timeout(1800)
def test_forty_architectures(tmp_path: Path) -> None:
    """What is found is real, what is not is refused in one line, and both optimizers train on
    it.
    """
    assert len(FORTY) == 40
    command = [
        sys.executable,
        "-m",
        "experiments.zoo.measure",
        "--output",
        str(tmp_path),
        "--only",
        *FORTY,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {record["model"] for record in records} == set(FORTY)
    wrong = {record["model"]: record for record in records if not is_sound(record)}
    assert not wrong, json.dumps(wrong, indent=1)
    assert sum(sum(record.get("found", {}).values()) for record in records) > 300
    text = document(records, FORTY, "", "")
    assert all(
        f"\n| {record['model']} | {record['family']} |" in text
        for record in records
        if "found" in record
    )


def is_sound(record: dict[str, Any]) -> bool:
    """Refused in words, or checked: no false gauge, ten steps of both optimizers."""
    if record["outcome"] == "refused":
        return bool(record["why"])
    steps = (record.get(name, {}).get("sound") for name in ("DDCAdam", "DDCMuon"))
    return record["outcome"] == "checked" and not record["false"] and all(steps)


def test_a_false_gauge_is_seen() -> None:
    """One that rescales the neurons of a GELU, and one that is right in evaluation mode alone."""
    gauge = Rescale("relu_rescale", "0", (Axis("0.weight"), Axis("0.bias")), (Axis("2.weight", 1),))
    x, y = torch.randn(2, 4, 3)

    class Trained(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + (
                self[0](x).sum(-1, keepdim=True) * torch.arange(5) if self.training else 0
            )

    for activation, kind, false in (
        (nn.ReLU, nn.Sequential, 0),
        (nn.GELU, nn.Sequential, 1),
        (nn.ReLU, Trained, 1),
    ):
        made = Made(kind(nn.Linear(3, 4), activation(), nn.Linear(4, 5)), (x,), (y,))
        seen = verdicts(made, GaugeSet((gauge,)))
        assert len(seen["false"]) == false
        assert (seen["largest_change"] > 1e-3) == bool(false)


def sleep() -> Made:
    while True:
        pass


def grow() -> Made:
    held = []
    while True:
        held.append(torch.ones(1 << 26))


def abort() -> Made:
    faulthandler.disable()  # pytest's would tell of it
    os.abort()


def fail() -> Made:
    raise RuntimeError("no such width\nand more")


def test_a_model_that_ends_otherwise_stops_no_other() -> None:
    bad = [Architecture("named", "bad", make.__name__, make) for make in (sleep, grow, abort, fail)]
    # Only the first is to run into the limit of time: on a busy machine two seconds may not fill
    # the memory.
    limits = (2.0, 120.0, 120.0, 120.0)
    records = [
        record
        for each, seconds in zip(bad, limits, strict=True)
        for record in in_processes([each], {"commit": "c"}, seconds=seconds, memory=2 << 30)
    ]
    assert [(record["model"], record["outcome"], record["commit"]) for record in records] == [
        ("sleep", "out of time", "c"),
        ("grow", "out of memory", "c"),
        ("abort", "crashed", "c"),
        ("fail", "not built", "c"),
    ]
    assert records[2]["why"] == "exit status -6 in building"
    assert records[3]["why"] == "RuntimeError: no such width"


def test_models_with_a_record_of_this_version_are_skipped(tmp_path: Path) -> None:
    records, about = Records(tmp_path / "records.jsonl"), provenance()
    records.append({"library": "named", "family": "named", "model": "Llama", **about})
    records.append(
        {"library": "named", "family": "named", "model": "GPT-2", **about, "commit": "another"}
    )
    run(records, only=["Llama"])
    assert [record["model"] for record in records.read()] == ["Llama"]


def test_every_architecture_has_a_name_of_its_own() -> None:
    every = architectures()
    assert len({each.name for each in every}) == len(every) > 500
    assert set(FORTY) < {each.name for each in every}


def test_findings_count_kinds_and_reasons() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3))
    found = findings(find_gauges(model))
    assert found["found"] == {"norm_scale": 1, "logit_shift": 1}
    assert [(kind, count) for kind, _, count in found["refused"]] == [("relu_rescale", 1)]


@pytest.mark.parametrize(
    ("reason", "without"),
    [
        ("its reader, add, is not a linear map", "its reader, …, is not a linear map"),
        ("its reader, the output of the model, is not a linear map",) * 2,
        (
            "mul, which gives the output, is not a linear map",
            "…, which gives the output, is not a linear map",
        ),
        ("wte is tied to another parameter", "… is tied to another parameter"),
        ("the head is tied to the embedding",) * 2,
        ("its values are read by new_empty as well", "its values are read by … as well"),
        (
            "a random element changes outputs by 1.2e-01 of what",
            "a random element changes outputs by … of what",
        ),
    ],
)
def test_reasons_are_counted_without_names(reason: str, without: str) -> None:
    assert general(reason) == without
