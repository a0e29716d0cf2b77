"""The logit shift of heads whose outputs are added, averaged or picked from, and what looks like
it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import DDCAdam, DDCMuon, find_gauges, hidden_matrices, parameter_roles
from ddc.gauges import Gauge, GaugeSet, named_parameters
from tests.test_false_gauges import CLASSES, WIDTH, Of, X, linear

Forward = Callable[..., Any]


def head(bias: bool = True) -> nn.Linear:
    return linear(CLASSES, bias)


def parts(**more: Any) -> dict[str, Any]:
    """Two towers with a head each, and more."""
    torch.manual_seed(0)
    return {
        "s": linear(),
        "t": linear(),
        "a": head(),
        "b": head(bias=False),
        "temperature": nn.Parameter(torch.tensor(1.3)),
        "by_class": nn.Parameter(torch.rand(CLASSES) + 0.5),
        "g": linear(1),
        **more,
    }


def shifts(gauges: GaugeSet) -> set[str]:
    return {gauge.where for gauge in gauges if gauge.kind == "logit_shift"}


def found(model: nn.Module, inputs: tuple[Tensor, ...] = (X,), **options: Any) -> set[str]:
    """The heads with a shift, which rules prove alone: the trial drops none of these."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_trial = shifts(find_gauges(model, inputs=inputs, **options))
        assert by_trial == shifts(find_gauges(model, inputs=inputs, verify=False, **options))
    return by_trial


@torch.no_grad()
def change(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...], gauge: Gauge) -> float:
    """The largest change of a log-probability, in evaluation and in training, in float64."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    params = named_parameters(model)
    for p in params.values():
        if p.requires_grad:
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def said() -> list[Tensor]:
        outputs = []
        for training in (False, True):
            model.train(training)
            torch.manual_seed(2)
            given = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
            given = given["logits"] if isinstance(given, Mapping) else given
            outputs.append((given[0] if isinstance(given, tuple) else given).log_softmax(-1))
        return outputs

    before = said()
    gauge.act_(params, gauge.sample(params, generator, spread=3.0))
    return max(
        float((x - y).abs().max() / x.abs().max()) for x, y in zip(before, said(), strict=True)
    )


def features(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.s(x).tanh(), m.t(x).tanh()


def two(join: Callable[[Any, Tensor, Tensor, Tensor], Any]) -> Forward:
    """A forward pass that joins the outputs of both heads; it also sees the features."""

    def forward(m: Any, x: Tensor) -> Any:
        h, k = features(m, x)
        return join(m, m.a(h), m.b(k), h)

    return forward


#: All heads have a shift.
TRUE: dict[str, Forward] = {
    "mean of two": two(lambda m, y, z, h: (y + z) / 2),
    "difference": two(lambda m, y, z, h: torch.sub(y, z, alpha=3)),
    "stacked": two(lambda m, y, z, h: torch.stack([y, z]).mean(0)),
    "stacked in front of classes": two(lambda m, y, z, h: torch.stack([y, z], -2).sum(-2)),
    "positions put side by side": two(lambda m, y, z, h: torch.cat([y, z], 1).mean(1)),
    "mean over positions": two(lambda m, y, z, h: (y + z).mean(1)),
    "last position": two(lambda m, y, z, h: (y - z)[:, -1]),
    "positions that are chosen": two(
        lambda m, y, z, h: (y + z)[torch.arange(3), (h[:, :, 0] > 0).long().argmax(-1)]
    ),
    "learned temperature": two(lambda m, y, z, h: y / m.temperature.exp() + z),
    "gate of a position": two(lambda m, y, z, h: m.g(h).sigmoid() * y + z),
    "a bias by class": two(lambda m, y, z, h: y + z + m.by_class),
    "classes moved there and back": two(lambda m, y, z, h: (y + z).mT.mean(-1, keepdim=True).mT),
    "in place": two(lambda m, y, z, h: (y * 1.0).add_(z).mul_(0.5)),
    "chunks": two(lambda m, y, z, h: sum(torch.cat([y, z], 1).chunk(4, 1))),
}
#: Which heads have none, and why not.
FALSE: dict[str, tuple[Forward, set[str], str]] = {
    "probabilities": (
        two(lambda m, y, z, h: (y.softmax(-1) + z.softmax(-1)).log()),
        {"a", "b"},
        "log, of which|log, which gives",
    ),
    "bounded": (two(lambda m, y, z, h: (y + z).tanh()), {"a", "b"}, "tanh, which gives"),
    "one bounded": (two(lambda m, y, z, h: y + z.tanh()), {"a", "b"}, "tanh, of which"),
    "greatest": (two(lambda m, y, z, h: torch.maximum(y, z)), {"a", "b"}, "maximum"),
    "product": (two(lambda m, y, z, h: y * z), {"a", "b"}, "mul"),
    "scaled by class": (two(lambda m, y, z, h: (y + z) * m.by_class), {"a", "b"}, "mul"),
    "one scaled by class": (two(lambda m, y, z, h: y * m.by_class + z), {"a", "b"}, "mul"),
    "numerator": (two(lambda m, y, z, h: m.temperature / (y + z)), {"a", "b"}, "div"),
    "normed": (
        two(lambda m, y, z, h: F.layer_norm(y + z, (CLASSES,)) * m.by_class),
        {"a", "b"},
        "mul",
    ),
    "turned against each other": (
        two(lambda m, y, z, h: (w := (y + z)[:, :CLASSES]) + w.mT),
        {"a", "b"},
        "not a linear map",
    ),
    "fewer classes": (two(lambda m, y, z, h: (y + z)[..., 1:]), {"a", "b"}, "slice"),
    "one read elsewhere": (
        two(lambda m, y, z, h: y + z * y.square().mean(-1, keepdim=True)),
        {"a"},
        "read by .* as well",
    ),
    "its own gate": (
        two(lambda m, y, z, h: y * y.amax(-1, keepdim=True) + z),
        {"a"},
        "read by amax as well",
    ),
    "a gate by class that is added as well": (
        two(lambda m, y, z, h: (y[..., None, :] * (w := z[..., None])).mean(-2) + w.squeeze(-1)),
        {"b"},
        "read by mul as well",
    ),
    "one given as well": (
        two(lambda m, y, z, h: (y + z, z)),
        {"b"},
        "read by the output of the model as well",
    ),
    "penalty on one": (
        two(lambda m, y, z, h: (y + z, y.logsumexp(-1).square().mean())),
        {"a"},
        "read by logsumexp as well",
    ),
    "one weight read elsewhere": (
        two(lambda m, y, z, h: y + z + F.linear(h, m.b.weight).mean(-1, keepdim=True)),
        {"b"},
        "used more than once",
    ),
    "what a stream adds": (
        lambda m, x: x[..., :CLASSES] + m.a(m.s(x).tanh()),
        {"a"},
        "slice, of which",
    ),
}


@pytest.mark.parametrize("name", TRUE)
def test_each_head_has_a_shift(name: str) -> None:
    model = Of(TRUE[name], **parts())
    assert found(model) == {"a", "b"}
    for gauge in find_gauges(model, inputs=(X,)):
        if gauge.kind == "logit_shift":
            assert change(model, (X.double(),), gauge) < 1e-9


@pytest.mark.parametrize("name", FALSE)
def test_what_is_no_shift_is_refused_by_rules_alone(name: str) -> None:
    forward, without, reason = FALSE[name]
    model = Of(forward, **parts())
    gauges = find_gauges(model, inputs=(X,), verify=False)
    assert not shifts(gauges) & without, str(gauges)
    assert found(model) == shifts(gauges)
    import re

    assert any(
        re.search(reason, refusal.reason)
        for refusal in gauges.refused
        if refusal.kind == "logit_shift"
    ), str(gauges)


def test_of_a_sum_with_something_else_the_caller_says_the_loss() -> None:
    """The shift of ``a`` is exact, if softmax it is: of what else is added nobody can tell."""
    model = Of(two(lambda m, y, z, h: y + z.tanh()), **parts())
    assert found(model, loss="cross_entropy") == {"a"}
    (gauge,) = find_gauges(model, inputs=(X,), loss="cross_entropy").only(["logit_shift"])
    assert change(model, (X.double(),), gauge) < 1e-9


@pytest.mark.parametrize("bend", [torch.relu, torch.tanh], ids=["relu", "tanh"])
def test_a_head_that_is_added_to_what_bends_it_has_no_shift(bend: Callable[..., Tensor]) -> None:
    """Whatever the loss: what ends the way back to the heads reads one of them."""
    model = Of(two(lambda m, y, z, h: y + bend(y) + z), **parts())
    assert found(model, loss="cross_entropy") == {"b"}


def test_one_head_read_twice() -> None:
    both = Of(lambda m, x: (m.a(m.s(x)) + m.a(m.t(x).tanh())) / 2, **parts())
    assert found(both) == {"a"}
    (gauge,) = find_gauges(both, inputs=(X,)).only(["logit_shift"])
    assert change(both, (X.double(),), gauge) < 1e-9
    fed_back = Of(
        lambda m, x: m.a(m.s(x)) + m.b(F.linear(m.a(m.t(x)), m.w)),
        **parts(w=nn.Parameter(torch.randn(WIDTH, CLASSES))),
    )
    assert found(fed_back) == {"b"}
    biases = Of(lambda m, x: m.a(m.s(x)) + F.linear(m.t(x), m.a.weight, m.by_class), **parts())
    assert found(biases) == set()


def test_dropout_of_logits() -> None:
    model = Of(lambda m, x: m.d(m.a(x)) + m.b(x), d=nn.Dropout(0.5), **parts())
    assert found(model) == set()
    model.d.p = 0.0
    assert found(model) == {"a", "b"}


def test_heads_that_training_gives_apart() -> None:
    """The first output is said to go into a softmax, of the second nothing is: its own softmax
    would not see a shift either, but any other loss would.
    """

    def forward(m: Any, x: Tensor) -> Any:
        y, z = m.a(x), m.b(x)
        return (y, z) if m.training else (y + z) / 2

    model = Of(forward, **parts())
    with pytest.warns(UserWarning, match="logit_shift at b is no symmetry .* in training mode"):
        gauges = find_gauges(model, inputs=(X,))
    assert shifts(gauges) == {"a"}
    (gauge,) = gauges.only(["logit_shift"])
    assert change(model, (X.double(),), gauge) < 1e-9


def test_they_are_heads_to_optimizers_too() -> None:
    model = Of(TRUE["mean of two"], **parts())
    names = {each.parameter for each in hidden_matrices(model, inputs=(X,))}
    assert not names & {"a.weight", "b.weight"}
    roles = {role.parameter: role.role for role in parameter_roles(model, inputs=(X,))}
    assert roles["a.weight"] == roles["b.weight"] == "head"


@pytest.mark.parametrize(
    "first", [nn.Embedding(30, WIDTH), nn.Linear(5, WIDTH)], ids=["table", "map"]
)
def test_what_writes_to_a_stream_that_is_given_is_hidden(first: nn.Module) -> None:
    """A transformer without norm and head at its end: what its blocks add up is no logits."""

    def forward(m: Any, x: Tensor) -> Tensor:
        stream = m.first(x)
        stream = stream + m.a(F.layer_norm(m.b(stream), (WIDTH,)).relu())
        return stream + m.c(F.layer_norm(m.d(stream), (WIDTH,)).relu())

    model = Of(forward, first=first, **{each: linear() for each in "abcd"})
    x = torch.randn(3, 6, 5) if isinstance(first, nn.Linear) else torch.randint(30, (3, 6))
    hidden = {f"{each}.weight" for each in "abcd"}
    assert {each.parameter for each in hidden_matrices(model, inputs=(x,))} == hidden
    roles = {each.parameter: each.role for each in parameter_roles(model, inputs=(x,))}
    assert {roles[each] for each in hidden} == {"hidden"}
    assert roles["first.weight"] == ("input" if isinstance(first, nn.Linear) else "embedding")


@pytest.mark.parametrize("optimizer", [DDCAdam, DDCMuon])
def test_training_is_equivariant(optimizer: type) -> None:
    """Two runs that start a shift of each head apart say the same after every step."""
    first = Of(TRUE["mean over positions"], **parts()).double()
    unused = ("temperature", "by_class", "g.weight", "g.bias")
    gauges = find_gauges(first, inputs=(X.double(),))
    assert shifts(gauges) == {"a", "b"}
    second = copy.deepcopy(first)
    generator = torch.Generator().manual_seed(3)
    for gauge in gauges:
        params = named_parameters(second)
        gauge.act_(params, gauge.sample(params, generator))
    said = []
    for model in (first, second):
        named = [(k, p) for k, p in model.named_parameters() if k not in unused]
        extra = (
            {"hidden": hidden_matrices(model, inputs=(X.double(),))}
            if (optimizer is DDCMuon)
            else {}
        )
        steps = optimizer(named, gauges=gauges, lr=0.02, weight_decay=0.1, **extra)
        said.append([])
        for step in range(6):
            x = X.double().roll(step, 0) * (1 + step)
            logits = model(x)
            F.cross_entropy(logits, torch.arange(3)).backward()
            steps.step()
            steps.zero_grad()
            said[-1].append(logits.detach().log_softmax(-1))
    difference = torch.stack(said[0]) - torch.stack(said[1])
    assert difference.abs().max() < 1e-9
    assert (said[0][0] - said[0][-1]).abs().max() > 1e-2  # they moved


# ---- models of others


def test_a_distilled_transformer_of_timm() -> None:
    timm = pytest.importorskip("timm")

    model = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=CLASSES,
    )
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    gauges = find_gauges(model)
    assert shifts(gauges) == {"head", "head_dist"}
    for gauge in gauges:
        assert change(model, (image.double(),), gauge) < 1e-9, str(gauge)
    model.set_distilled_training(True)
    with pytest.warns(UserWarning, match="logit_shift at head_dist"):
        assert shifts(find_gauges(model)) == {"head"}


def test_a_classifier_that_picks_a_position() -> None:
    transformers = pytest.importorskip("transformers")

    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=CLASSES
    )
    config.pad_token_id = 0
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(config)
    tokens = {"input_ids": torch.randint(1, 30, (2, 6))}
    gauges = find_gauges(model, inputs=tokens)
    assert shifts(gauges) == {"score"}
    for gauge in gauges:
        assert change(model, tokens, gauge) < 1e-9, str(gauge)
    config.problem_type = "multi_label_classification"
    assert not shifts(find_gauges(model, inputs=tokens))
