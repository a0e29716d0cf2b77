"""The certificate of the zoo: models made narrow, told apart by what they compute, recorded piece
by piece.
"""

from __future__ import annotations

import copy
import itertools
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddc import certify, find_gauges
from ddc.gauges.certificate import LARGEST
from ddc.training.records import Records
from experiments.completeness import zoo
from experiments.completeness.report import ZOO, ZOO_MODELS, zoo_table
from experiments.completeness.zoo import certificate_of, run, signature
from experiments.zoo.architectures import (
    USUAL,
    Architecture,
    Made,
    Scale,
    architectures,
    make_of_timm,
    narrowest,
    timm,
)
from experiments.zoo.arguments import alternating, narrow_arguments, narrowed

EVERY = {each.name: each for each in architectures()}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Wav2Vec2ForCTC"])
def test_configs_become_narrow_enough(name: str) -> None:
    model = narrowest(EVERY[name]).model
    assert sum(p.numel() for p in model.parameters()) <= LARGEST
    # a vocabulary of three times the width or more, but for specials
    assert model.config.vocab_size >= 4 * 8
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["convnext_atto", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_arguments_become_narrow_enough(name: str) -> None:
    made = narrowest(EVERY[name])
    assert sum(p.numel() for p in made.model.parameters()) <= LARGEST
    places: dict[str, int] = {}

    def see(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        places[type(module).__name__] = given[0].shape[2:].numel()

    for module in made.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(see)
    made.model(*made.example)
    # the last convolution over places (not of a head or a gate) sees several of them
    assert places["Conv2d"] > 1 or name == "efficientnet_b0"


def test_examples_have_ordinary_tokens_alone() -> None:
    made = narrowest(EVERY["BertForMaskedLM"])
    assert made.draw is not None
    # its own eps, 1e-12, would make a symmetry of what holds at 0 alone
    norms = [each for each in made.model.modules() if isinstance(each, nn.LayerNorm)]
    assert {each.eps for each in norms} == {1e-5}
    one, other = (made.draw(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    again = made.draw(torch.Generator().manual_seed(0))
    assert one["input_ids"].equal(again["input_ids"])
    assert not one["input_ids"].equal(other["input_ids"])
    assert int(one["input_ids"].min()) >= 3
    assert int(one["input_ids"].max()) < 31


def test_widths_that_differ_differ_when_they_are_narrow() -> None:
    dims = {"dims": (40, 80, 160, 320), "stem_width": 40, "heads": (5, 10), "depths": (3, 4, 23, 3)}
    narrow = {key: narrowed(key, value, alternating(dims, 8)) for key, value in dims.items()}
    assert narrow == {
        "dims": (8, 16, 8, 16),
        "stem_width": 8,
        "heads": (2, 2),
        "depths": (1, 1, 1, 1),
    }


def test_timm_builds_as_before_afterwards() -> None:
    def size() -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model("convnext_atto").parameters())

    before = size()
    with narrow_arguments(8) as names:
        assert size() < before
        assert {"dims", "depths"} <= names.keys()
    assert size() == before


def test_models_of_tests_have_no_narrow_form() -> None:
    with pytest.raises(ValueError, match="by hand"):
        EVERY["ViT, ReLU"].make(Scale(**{**vars(USUAL), "layers": 1}))


class Net(nn.Module):
    """A small network with what a signature is to see, or not to see."""

    def __init__(
        self, hidden: int = 4, eps: float = 1e-5, sign: float = 1.0, power: float = 2.0
    ) -> None:
        super().__init__()
        self.first = nn.Linear(3, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.second = nn.Linear(hidden, 5)
        self.register_buffer("mask", sign * torch.ones(hidden))
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x).relu() * self.mask) ** self.power)


class Other(Net):
    """Of another class, with other names."""

    def __init__(self) -> None:
        super().__init__()
        self.third, self.first = self.first, None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.third(x).relu() * self.mask) ** self.power)


def test_a_signature_is_of_the_program() -> None:
    x = (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),)
    same = signature(Net(), x)
    for alike in (Net(), Net(eps=1e-6), Other()):  # weights, eps, class and names
        assert signature(alike, x) == same
    tied = Net(3)
    tied.norm.bias = tied.norm.weight
    others = [
        Net(6),
        Net(sign=-1.0),
        Net(power=3.0),
        Net(3),
        tied,
    ]  # shapes, buffers, numbers, ties
    assert len({same, *(signature(each, x) for each in others)}) == 6


def test_models_of_timm_that_differ_in_size_alone_are_one() -> None:
    made = {
        name: narrowest(Architecture("timm", "convnext", name, partial(make_of_timm, name)))
        for name in ("convnext_tiny", "convnext_small", "convnextv2_tiny")
    }
    tiny, small, other = (signature(each.model, each.example) for each in made.values())
    assert tiny == small != other


# ----------------------------------------------------------------------------------------------
# records


def network(*widths: int) -> Made:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    x = torch.randn(32, widths[0], generator=torch.Generator().manual_seed(0))
    return Made(nn.Sequential(*layers[:-1]), (x,), (x,))


def small(scale: Scale) -> Made:
    return network(3, 4, 5)


def large(scale: Scale) -> Made:
    return network(4, 6, 5)


def unbuilt(scale: Scale) -> Made:
    raise KeyError("no such width")


class Chosen(nn.Linear):
    """Looks at its data to choose what to do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def chosen(scale: Scale) -> Made:
    x = torch.randn(16, 3)
    return Made(Chosen(3, 5), (x,), (x,))


def asleep(scale: Scale) -> Made:
    while True:
        time.sleep(0.01)
        sum(range(10**5))


def entries(*makes: object) -> list[Architecture]:
    return [
        Architecture("timm", "some", f"{make.__name__}{i}", make) for i, make in enumerate(makes)
    ]  # type: ignore[attr-defined,arg-type]


def test_a_record_grows_piece_by_piece(tmp_path: Path) -> None:
    every = entries(large, small, small, unbuilt, chosen)
    run(tmp_path, every, minutes=0)  # nothing is begun
    assert not (tmp_path / ZOO_MODELS).exists()
    run(tmp_path, every, limit=1)
    models, certificates = Records(tmp_path / ZOO_MODELS), Records(tmp_path / ZOO)
    assert [each["model"] for each in models.read()] == [each.name for each in every]
    # the smallest first, and two entries are one
    assert len(certificates.read()) == 1
    run(tmp_path, every)
    found = {each["model"]: each for each in certificates.read()}
    assert [*found] == ["chosen4", "small1", "large0"]
    assert found["small1"]["models"] == [["timm", "small1"], ["timm", "small2"]]
    assert found["small1"]["complete"]
    assert found["small1"]["kernel"] == 4 + 1
    assert "data-dependent" in found["chosen4"]["refused"]
    refused = {each["model"]: each.get("refused") for each in models.read()}
    assert refused["unbuilt3"] == "no narrow form: 'no such width'"
    # all is there: nothing is made
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run(tmp_path, every)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # what was refused is tried again where that is asked for, and nothing else is touched
    run(tmp_path, [every[4]], again=True)
    assert {each["model"] for each in certificates.read()} == {*found}
    assert certificates.read()[-1]["model"] == "chosen4"
    # a part of it makes a table
    text = zoo_table(models.read(), [found["chosen4"], found["small1"]])
    assert "| timm | 5 | 3 | 2 | 1 | 0 | 0 | 1 |" in text
    assert "no narrow form: 'no such width' (unbuilt3)" in text
    # what came to be known later shares what is there
    run(tmp_path, entries(large, small, small, unbuilt, chosen, small))
    assert len(models.read()) == 6
    shared = {each["model"]: each["models"] for each in certificates.read()}
    assert shared["small1"][-1] == ["timm", "small5"]


def test_one_that_hangs_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "NARROWING", 1.0)
    run(tmp_path, entries(asleep, small))
    models = Records(tmp_path / ZOO_MODELS).read()
    assert models[0]["refused"] == "out of time: 1 s in building"
    assert "signature" in models[1]
    assert len(Records(tmp_path / ZOO).read()) == 1


def test_what_is_unexplained_is_named() -> None:
    made = network(3, 4, 5)
    none = certify(made.model, (), made.example, explain=True)
    # the logits' shift alone: one column, the same for each row, and one bias
    assert none.unexplained == 5
    assert none.closing == {"logit_shift": 5}
    assert none.places == pytest.approx({"2.weight": 4.0, "2.bias": 1.0})
    gauges = find_gauges(made.model, inputs=made.example)
    assert certify(made.model, gauges, made.example, explain=True).places == {}


def test_a_batch_norm_is_measured_in_training() -> None:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 5)).eval()
    before = copy.deepcopy(model.state_dict())
    record = certificate_of(Made(model, (x,), (x,)))
    assert record["mode"] == "training"
    # the biases before the norm move nothing; in evaluation they would go against its shift
    assert (record["dead"], record["unexplained"]) == (4, 0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
