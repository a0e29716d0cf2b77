"""Every configuration trains, or is refused by a message that names a key, before anything is
written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddc.data import ImageConfig, ModularConfig, TextConfig
from ddc.gauges import KINDS, complete_kinds, find_gauges, paper_kinds
from ddc.models import (
    MODELS,
    DeepMLPConfig,
    GPTConfig,
    ModelConfig,
    ViTConfig,
    build_model,
    load_model,
    save_model,
)
from ddc.training.command import STOPS
from ddc.training.compose import compose_alike, compose_config, restored
from ddc.training.help import explanations, help_text, keys, shown
from ddc.training.loop import train
from ddc.training.ranks import join_ranks
from ddc.training.schema import DATA, OPTIMIZERS, Config
from ddc.training.setup import prepare, restore
from experiments.refused.measure import REFUSED, page
from tests.test_training import ROOT, composed, run, train_py

#: Values on the command line by type: right ones, and after the bar wrong ones.
BY_TYPE: dict[Any, str] = {
    bool: "true false | maybe null [] 1.5",
    bool | None: "true false null | maybe [] 1.5",
    int: (
        "1 2 3 4 5 8 16 | 0 -1 2147483648 1000000000000000000000000000000 1.5 nan true many"
        " null [1]"
    ),
    float: "1 0.5 0.1 0.01 1e-30 | 0 -1 2 1e15 1e300 inf -inf nan true many null [0.5]",
    str: "| nonsense '' null [a] 5 a/b ???",
    list[float]: "[] [0.5] [1,0.1] | [0] [nan] [inf] [-1] [a] 1 null [[1]]",
    tuple[
        float, float
    ]: "[0.9,0.99] [0,0] | [0.9] [] [0.9,0.9,0.9] [1,1] [nan,0] [-1,0] 0.9 null [a,b]",
}
#: Values of single keys, in place of those of their type.
OF_KEY = {
    "model.width": "8 16 12 24 6 4 2 1 | 0 -8 15 1e3",
    "model.heads": "1 2 4 | 0 3 -1 16",
    "model.kv_heads": "1 2 4 | 0 3 -1",
    "model.norm": "rms layer | batch null",
    "model.mlp": "swiglu relu relu2 gelu | tanh null",
    "model.positions": "rope partial_rope learned | alibi null",
    "model.context": "1 2 8 16 | 0 -1 5000 100000000 1.5",
    "model.patch": "4 7 14 28 | 0 5 -1 56",
    "model.name": "gpt vit deep_mlp | mlp null ???",
    "optimizer.steps_of": "null | FOLDER FOLDER/absent",
    "optimizer.name": f"{' '.join(OPTIMIZERS)} | sgd null ???",
    "optimizer.vertical": "freeze adam balance | up null",
    "optimizer.step_scale": "init norm | rho",
    "optimizer.decay_on": "matrices all consistent | vectors null",
    "optimizer.compiled": "null false | 3",  # to compile takes half a minute
    "optimizer.adjust_lr_fn": "original match_rms_adamw | none",
    "optimizer.orthogonalizer": "newton_schulz newton_schulz_bfloat16 polar | svd",
    "data.name": "shakespeare mnist_5k modular | nonsense null ???",
    "data.path": (
        "FOLDER/text FOLDER/short | FOLDER/empty FOLDER FOLDER/absent '' FOLDER/blank null"
    ),
    "data.hub_path": "| no/such nonsense ''",
    "data.tokenizer": "bytes | no/such '' FOLDER FOLDER/text gpt2",
    "data.train_tokens": "null 2000 50 17 9 | 1 0 -1",
    "data.validation_fraction": "0.1 0.5 0.9 | 0 1 -1 nan 1e-9 0.999999999",
    "data.train_images": "null 100 200 | 1 0 -1 5 100000",
    "data.operation": "addition subtraction multiplication squares | division null",
    "data.prime": "3 5 7 11 | 2 1 0 -7 9 1009 1000000007",
    "data.train_fraction": "0.5 0.75 0.1 | 0 1 1e-9 0.999999 nan -1",
    "training.steps": "1 2 3 | 0 -1 1.5 nan true null",
    "training.batch_size": "null 1 2 4 5 16 | 0 -1 100",
    "training.threads": "1 2 | 0 -1 1000000 2147483648",
    "training.schedule": "constant cosine wsd | linear null",
    "training.device": "auto cpu | cuda tpu",
    "training.precision": "float32 | bfloat16 float16 float64 half",
    "training.weights": "float32 bfloat16 float8 | float16 float8_e4m3fn null",
    "training.resume": "auto never | always",
    "training.max_grad_norm": "null 1 1e-3 | 0 -1 inf nan",
    "training.warmup": "0 0.05 0.5 1 | -0.1 1.1 nan inf",
    "training.decay": "0 0.2 0.5 1 | -0.1 1.1 nan",
    "slt.readings": "0 8 9 | 1 7 -1 -8",
    "slt.labels": "model data | text",
    "slt.approach": "excess_loss arc_length step | time",
    "slt.learning_coefficient.every": "0 | -1",  # an estimate takes seconds: tests/test_readings.py
    "slt.rule.min_checkpoints": "6 8 | 5 0 -1 100",
    "gauges.granularity": "unit block | layer null",
    "launcher.name": "local | torchrun ssh",
    "launcher.parallel": "null | ddp fsdp tcp",
    "wandb.mode": "disabled | loud null",
    "wandb.entity": "null a",
    "name": "gpt a-b | '' a/b .. . ../x null " + "x" * 300,
    "seed": "0 1 2147483647 | -1 2147483648 1000000000000000000000000000000 0.5 null",
    "runs": "FOLDER/runs/deep/er | /dev/null/x /proc/x null",
}
#: Values of groups.
OF_GROUP = {
    "model": "gpt vit deep_mlp | nonsense [] null 5 [gpt,vit]",
    "data": "shakespeare mnist_5k modular file | tinystories cifar10 nonsense [] null",
    "optimizer": (f"{' '.join(OPTIMIZERS)} | sgd [] null [adamw,muon]"),
    "gauges": (
        f"all paper complete none [] [logit_shift,norm_scale] [all,chained_rescale]"
        f" {' '.join(KINDS)} | none [x] false"
    ),
    "scale": "cpu | gpu nonsense [] 1",
    "slt": "none cells | nonsense false",
    "launcher": "local | torchrun nonsense",
    "+experiment": "lm_overtrain vit_scratch grok_mlp | nonsense null",
}
#: Overrides of keys that do not exist, and of no key.
NO_KEY = [
    "foo=1", "+foo=1", "training.epochs=3", "+training.epochs=3", "++training.epochs=3",
    "gauges.spin=true",
    "+gauges.spin=true", "+model.foo=1", "optimizer.radial_rate=0.1", "+optimizer.adam_lr=1",
    "+data.foo.bar=1",
    "+slt.rule.foo=1", "~model", "~optimizer", "~training", "~training.steps", "training=5",
    "training=null",
    "model.layers.x=1", "data={}", "training.steps=${nope}", "optimizer.lr=${seed}",
    "training.steps", "'", "wandb=no",
]  # fmt: skip
#: The same configuration of each model, as small as can be.
SMALL = {
    "gpt": (
        "model=gpt data=shakespeare model.layers=1 model.width=16 model.heads=2 model.kv_heads=1"
        " model.hidden=16 model.context=16 data.train_tokens=2000"
    ),
    "vit": (
        "model=vit data=mnist_5k model.layers=1 model.width=16 model.heads=2 model.hidden=16"
        " model.patch=14"
    ),
    "deep_mlp": "model=deep_mlp data=modular model.depth=2 model.width=16 data.prime=7",
}
SHORT = (
    "training.batch_size=4 training.steps=2 training.evaluations=1 training.evaluation_batches=1"
    " wandb=disabled"
)


def keys_of(schema: type, place: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a schema with their types, those of its parts among them."""
    for name, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            yield from keys_of(typing.cast(type, kind), f"{place}{name}.")
        else:
            yield f"{place}{name}", kind


SCHEMAS = {"model": MODELS, "data": DATA, "optimizer": OPTIMIZERS}
COMMON = dict(keys_of(Config))
KEYS = {
    (group, name): dict(keys_of(s, f"{group}."))
    for group, each in SCHEMAS.items()
    for name, s in each.items()
}
ALL_KEYS = COMMON | {key: kind for keys in KEYS.values() for key, kind in keys.items()}


def values_of(key: str) -> str:
    """Right and wrong values of a key; of an optional one, those of the type that it has else."""
    kind = ALL_KEYS[key]
    return OF_KEY.get(key) or BY_TYPE.get(kind) or BY_TYPE[typing.get_args(kind)[0]]


@st.composite
def chosen(draw: st.DrawFn, values: str) -> str:
    """One of the values, a right one in most draws."""
    right, wrong = (part.split() for part in (values + " |").split("|")[:2])
    return draw(
        st.sampled_from(draw(st.sampled_from([each for each in (*[right] * 5, wrong) if each])))
    )


@st.composite
def command_lines(draw: st.DrawFn) -> str:
    """Overrides of a run that takes moments, some of its groups and keys changed."""
    # to trace a ViT takes seconds
    model = draw(st.sampled_from([*["gpt"] * 5, *["deep_mlp"] * 4, "vit"]))
    optimizer = draw(st.sampled_from(sorted(OPTIMIZERS)))
    overrides = [SMALL[model], SHORT, f"optimizer={optimizer}"]
    groups = draw(st.lists(st.sampled_from(sorted(OF_GROUP)), max_size=2, unique=True))
    overrides += [f"{group}={draw(chosen(OF_GROUP[group]))}" for group in groups]
    keys = {**COMMON, **KEYS["model", model], **KEYS["data", model], **KEYS["optimizer", optimizer]}
    changed = draw(
        st.lists(st.sampled_from(sorted(set(keys) - set(SCHEMAS))), max_size=4, unique=True)
    )
    overrides += [f"{key}={draw(chosen(values_of(key)))}" for key in changed]
    if draw(st.integers(0, 7)) == 7:
        overrides.append(draw(st.sampled_from(NO_KEY)))
    return " ".join(overrides)


NESTED = "|".join(re.escape(key) for key in ALL_KEYS if "." in key)
WHOLE = "|".join({key.split(".")[0] for key in ALL_KEYS} | {"scale", "experiment"})
NAMES_A_KEY = re.compile(rf"\b({NESTED})\b|\b({WHOLE})[=:/]|Unknown key|Invalid override")


def outcome(overrides: str, folder: Path) -> str:
    """What comes of a configuration: "" if it trains, else the message; run as ``train.py`` runs
    it.
    """
    for name, text in (
        ("text", "To be, or not to be. " * 40),
        ("short", "To be"),
        ("empty", ""),
        ("blank", " \n"),
    ):
        (folder / name).write_text(text)
    runs = folder / "runs"
    runs.mkdir()
    arguments = [
        f"runs={runs}",
        *(each.replace("FOLDER", str(folder)) for each in overrides.split()),
    ]
    try:
        config = compose_config(arguments)
        setup = prepare(config, join_ranks(config.launcher, config.training.device))
    except (ValueError, MemoryError) as error:
        assert not list(runs.iterdir())
        return str(error)
    try:
        summary = train(setup)
    except STOPS as error:
        return str(error)
    assert summary["steps"] == setup.config.training.steps <= 3
    return ""


def test_all_keys_are_tried() -> None:
    assert {key.split(".")[0] for key in ALL_KEYS} == {
        field.name for field in dataclasses.fields(Config)
    }
    assert all(values_of(key) for key in set(ALL_KEYS) - set(SCHEMAS))
    assert not set(OF_KEY) - set(ALL_KEYS)


@pytest.mark.slow
@settings(
    max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(overrides=command_lines())
def test_a_configuration_trains_or_is_refused(overrides: str) -> None:
    """None crashes. CI tries the same ones at each run; with another number of examples, others are
    tried.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            message = outcome(overrides, Path(folder))
    finally:
        torch.set_num_threads(1)
    assert not message or NAMES_A_KEY.search(message), message


@pytest.mark.slow
def test_the_page_of_refusals_is_up_to_date() -> None:
    written = page()
    assert (ROOT / "docs/refused.md").read_text() == written, "make refused"
    cases = re.findall(r"^\| `(.*)` \| (.*) \|$", written, re.MULTILINE)
    assert len(cases) == sum(map(len, REFUSED.values()))
    assert all(NAMES_A_KEY.search(message) for _, message in cases)


def test_memory_that_is_not_there_is_no_traceback() -> None:
    """2⁴⁶ weights: more than an address space holds, so that no machine tries."""
    config = compose_config(
        [*f"{SMALL['deep_mlp']} {SHORT}".split(), "data.prime=3", f"model.width={2**23}"]
    )
    with pytest.raises(MemoryError, match=r"training\.batch_size.*model\.width"):
        prepare(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("training.epochs=3", "error: Unknown key training.epochs: TrainingConfig has steps, "),
        ("+training.epochs=3", "error: Unknown key training.epochs: TrainingConfig has steps, "),
        ("slt=false", "error: Invalid slt=false: expected one of cells, full, none"),
        (
            "--multirun optimizer=adamw,sgd",
            "error: Invalid optimizer=sgd: expected one of adamh, adamw, adamw_relative, ",
        ),
        (
            "model.heads=null",
            "error: Invalid model.heads: field 'model.heads' is not Optional; expected int",
        ),
    ],
)
def test_the_command_line_says_it_in_one_line(tmp_path: Path, arguments: str, message: str) -> None:
    process = train_py(*arguments.split(), f"runs={tmp_path}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert output.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in output
    # which is Hydra's own
    assert not [path for path in tmp_path.iterdir() if path.name != "multirun.yaml"]


GPTS = [
    GPTConfig(context=4, layers=1, width=8, heads=2, kv_heads=1, hidden=4, mlp=mlp,
    positions=positions, tied_head=tied,
              qk_norm=qk_norm, norm=norm, bias=norm == "layer")
    for mlp, positions, tied, qk_norm, norm in itertools.product(
        ("swiglu", "relu", "relu2", "gelu"), ("rope", "partial_rope", "learned"), (False, True),
        (False, True),
        ("rms", "layer"),
    )
]  # fmt: skip
MLPS = [DeepMLPConfig(depth=2, width=4, residual=residual) for residual in (False, True)]


def assert_absent_gauges_are_absent(config: ModelConfig, **sizes: Any) -> None:
    """What the configuration says of its gauges is what is found in the model."""
    model = build_model(config, **sizes)
    found = {gauge.kind for per_layer in (False, True) for gauge in find_gauges(model, per_layer)}
    assert found == set(paper_kinds()) - set(config.absent_gauges), config


def test_absent_gauges_are_those_that_are_not_found() -> None:
    for config in GPTS:
        assert_absent_gauges_are_absent(config, vocab_size=5)
    for each in MLPS:
        assert_absent_gauges_are_absent(each, tokens=3, classes=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"mlp": "relu", "qk_norm": True},
        {"mlp": "swiglu", "heads": 8},
        {"mlp": "gelu", "class_token": True},
    ],
)
def test_absent_gauges_of_vision_transformers(options: dict[str, Any]) -> None:
    config = ViTConfig(**{"patch": 2, "layers": 1, "width": 8, "heads": 2, "hidden": 4, **options})
    assert_absent_gauges_are_absent(config, shape=(1, 4, 4), classes=3)


def test_how_gauges_are_asked_for_does_not_name_a_run() -> None:
    """``gauges=all`` says null for each kind, records of older runs true."""
    all_of_them = composed()
    kinds = [
        kind
        for kind in paper_kinds()
        if kind not in ("chained_rescale", *all_of_them.model.absent_gauges)
    ]
    assert (
        composed(f"gauges=[{','.join(kinds)}]", "gauges.relu_rescale=null").run_id
        == all_of_them.run_id
    )
    values = json.loads(json.dumps(dataclasses.asdict(all_of_them)))
    values["gauges"] = {kind: values["gauges"][kind] is not False for kind in KINDS}
    assert values["gauges"]["relu_rescale"] is True
    assert restored(values) == all_of_them


def test_choices_of_gauges() -> None:
    assert composed("gauges=paper").run_id == composed().run_id
    complete = composed("gauges=complete", "gauges.leave_out=true").gauges
    assert complete.kinds == [*complete_kinds()]
    assert not complete.per_layer
    assert composed("gauges=[paper,key_bias]").gauges.key_bias is True
    with pytest.raises(ValueError, match=r"gauges.value_rotation=true with gauges.value_map=true"):
        composed("gauges=[paper,value_map]")


NARROW = ("model.width=16", "model.layers=1", "model.heads=2", "model.kv_heads=2", "model.hidden=8")


def test_gauges_that_an_optimizer_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """Are an error that says what to set, or are left out with a line that says which."""
    small = (*NARROW, "model.context=8", "optimizer=ddcadam")
    with pytest.raises(ValueError, match=r"ddcadam refuses a gauge: .* stream_rotation at"):
        prepare(composed(*small, "gauges=complete"))
    setup = prepare(composed(*small, "gauges=complete", "gauges.leave_out=true"))
    kinds = {gauge.kind for gauge in setup.gauges}
    assert kinds == {"logit_shift", "gated_rescale", "norm_scale", "value_map", "qk_map"}
    assert "left out: 1 of stream_rotation, which optimizer=ddcadam refuses" in caplog.text
    muon = ("optimizer=ddcmuon", "gauges=complete", "gauges.leave_out=true")
    kinds = {gauge.kind for gauge in prepare(composed(*small, *muon)).gauges}
    assert kinds >= {"value_rotation", "qk_rotation", "stream_rotation"}  # in the place of maps
    adamw = prepare(composed(*small, *muon, "optimizer=adamw")).gauges
    assert {gauge.kind for gauge in adamw} == kinds - {"value_rotation", "qk_rotation"} | {
        "value_map",
        "qk_map",
    }
    with pytest.raises(ValueError, match=r"Set gauges.stream_rotation=false"):
        prepare(composed(*small, "gauges=[value_map,stream_rotation,norm_scale]"))
    with pytest.raises(ValueError, match=r"Invalid gauges.value_bias=true: the model has no such"):
        prepare(composed(*small, "gauges=value_bias"))


def test_keys_that_came_later_leave_the_names_of_older_runs() -> None:
    """Of each optimizer's runs in committed records: the configuration has the hash that the run is
    named by.
    """
    seen = set()
    for path in sorted((ROOT / "results").glob("*/runs.jsonl")):
        for record in map(json.loads, path.read_text().splitlines()):
            kind = (
                path,
                *sorted(record["config"]["optimizer"]),
                record["config"]["optimizer"]["name"],
            )
            if kind not in seen:
                seen.add(kind)
                assert restored(record["config"]).run_id == record["id"]
    assert {kind[-1] for kind in seen} >= {"adamw", "ddcadam", "muon", "ddcmuon"}
    names = [
        composed("optimizer=ddcadam", f"gauges.granularity={each}").run_id
        for each in ("unit", "block")
    ]
    assert names[0] == composed("optimizer=ddcadam").run_id != names[1]


def test_the_papers_step_takes_its_gauges_in_blocks(tmp_path: Path) -> None:
    for override, block in (("seed=0", True), ("gauges.granularity=unit", False)):
        setup = run(tmp_path, "optimizer=ddcadam_paper", override)
        group = setup.optimizer.param_groups[0]
        assert (group["step_scale"], group["retract"], group["additive"]) == ("norm", False, True)
        assert [g.block for g in setup.gauges if g.kind == "gated_rescale"] == [block]
        values = json.loads(json.dumps(dataclasses.asdict(setup.config)))
        assert restored(values) == setup.config


def test_a_run_whose_configuration_was_edited_is_not_read(tmp_path: Path) -> None:
    """Nor is a checkpoint that another run left in its folder; pruning a run reads it by the same
    function.
    """
    setup = run(tmp_path)
    train(setup)
    path = setup.folder / "run.json"
    info = json.loads(path.read_text())
    for key, value, message in (
        (
            "width",
            32,
            (
                r"the checkpoint .* another architecture: embedding\.weight is \(256, 16\) there,"
                r" \(256, 32\)"
            ),
        ),
        (
            "mlp",
            "relu",
            (
                r"another architecture: blocks\.0\.mlp\.gate\.weight .* no such parameter in this"
                r" model"
            ),
        ),
        (
            "layers",
            2,
            r"another architecture: blocks\.1\.attention_norm\.weight is no such parameter there",
        ),
        ("width", "wide", r"does not fit this version of the code: Invalid model\.width"),
        ("depth", 3, r"does not fit this version of the code: Unknown key model\.depth"),
        ("name", "resnet", r"does not fit this version of the code: .*'resnet'"),
        ("heads", 3, r"Invalid model\.heads=3"),
    ):
        edited = {
            **info,
            "config": {**info["config"], "model": {**info["config"]["model"], key: value}},
        }
        path.write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=message):
            restore(setup.folder)
    path.write_text(json.dumps(info))
    assert restore(setup.folder).config.model == setup.config.model


def test_a_saved_model_that_was_edited_is_not_read(tmp_path: Path) -> None:
    config = GPTConfig(context=4, layers=1, width=8, heads=2, kv_heads=1, hidden=4)
    save_model(tmp_path, build_model(config, vocab_size=5), config, {"vocab_size": 5})
    path = tmp_path / "model.json"
    about = json.loads(path.read_text())
    for model, sizes, message in (
        ({"width": 16}, {}, "model.safetensors does not fit .*model.json"),
        ({"layers": 2}, {}, "model.safetensors does not fit .*model.json"),
        ({"width": "wide"}, {}, "model.json describes no model .*width"),
        ({"depth": 3}, {}, "model.json describes no model .*depth"),
        ({"name": "resnet"}, {}, "model.json describes no model .*resnet"),
        ({"name": "vit"}, {}, "model.json describes no model"),
        ({}, {"classes": 3}, "model.json describes no model .*classes"),
    ):
        path.write_text(
            json.dumps({"model": {**about["model"], **model}, "sizes": {**about["sizes"], **sizes}})
        )
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"model\.json describes no model"):
        load_model(tmp_path)
    path.write_text(json.dumps(about))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "schema", [*OPTIMIZERS.values(), *MODELS.values(), TextConfig, ImageConfig, ModularConfig]
)
def test_help_explains_every_key(schema: type) -> None:
    fields = {field.name for field in dataclasses.fields(schema)} - {"name"}
    assert fields <= explanations(schema).keys(), f"{schema.__name__} says nothing of some keys"


def test_help_shows_the_keys_and_values_of_what_is_chosen() -> None:
    overrides = ["optimizer=ddcmuon", "slt=cells", "gauges.norm_scale=false"]
    text, found = help_text(overrides), list(keys(compose_config(overrides)))
    for key, value, words in found:
        assert f"{key}={shown(value)}" in text
        assert words, f"{key} is not explained"
    assert {"optimizer.per_head", "slt.rule.kink", "seed"} <= {key for key, _, _ in found}
    assert "gauges.norm_scale=false" in text
    assert "schema" not in text
    with pytest.raises(ValueError, match=r"Unknown key training\.epochs"):
        help_text(["training.epochs=3"])


def test_an_experiment_needs_no_plus() -> None:
    for compose in (compose_config, compose_alike):
        plain, added = (
            compose([f"{each}=grok_mlp", "seed=3"]) for each in ("experiment", "+experiment")
        )
        assert plain == added
        assert plain.name == "grok_mlp"


@pytest.mark.slow
def test_the_command_line_helps() -> None:
    command = [sys.executable, "train.py", "experiment=grok_mlp", "optimizer=muon"]
    help_ = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert help_.returncode == 0, help_.stderr
    assert "optimizer.adjust_lr_fn=original" in help_.stdout
    assert "model.depth=24" in help_.stdout
    wrong = subprocess.run([*command, "seed=x", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: Invalid seed")
