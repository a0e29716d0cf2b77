"""Blocks whose norms stand in the stream, as in BERT and the first transformer: what is left of the
gauges of readers and writers, each by itself.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddc import DDCAdam, check, find_gauges
from ddc.gauges import GaugeSet
from ddc.gauges.certificate import Jacobian, rank, tangents_of

WIDTH, HIDDEN, VOCABULARY = 8, 6, 11
TOKENS = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
SHIFTS = ("stream_mean", "reader_shift", "norm_shift")
Change = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


class PostNorm(nn.Module):
    """One block of BERT, its embeddings normed, with a head.

    Args:
        branch: what is done to what a sublayer gives, before it is added.
        stream: what is done to the output of the first norm, before anything reads it.
        dropout: rate, of what sublayers give.
        biased: whether the second maps of sublayers have biases.
    """

    def __init__(
        self,
        branch: Change = same,
        stream: Change = same,
        dropout: float = 0.0,
        biased: bool = True,
        norm: type[nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch, self.stream, self.dropout = branch, stream, dropout
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH, biased)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, biased)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for norm_ in self.norms:
            for p in norm_.parameters():
                nn.init.normal_(p, 0.5, 0.3)

    def sublayer(self, x: Tensor) -> Tensor:
        return F.dropout(self.branch(x), self.dropout, self.training)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stream(self.norms[0](self.table(tokens)))
        q, k, v = (m(x).unflatten(-1, (2, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norms[1](x + self.sublayer(self.o(y)))
        x = self.norms[2](x + self.sublayer(self.down(F.gelu(self.up(x)))))
        return self.head(x)


def found(model: nn.Module) -> GaugeSet:
    """What the rules find of shifts and means; all of it is a symmetry, in training too."""
    model = model.double()
    gauges = find_gauges(model, inputs=(TOKENS,), verify=False, kinds=SHIFTS)

    def outputs(each: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return each(TOKENS).log_softmax(-1)

    for training in (False, True):
        changes = check(model.train(training), gauges, outputs)
        assert max(changes.values(), default=0.0) < 1e-10, changes
    return gauges


def counts(model: nn.Module) -> dict[str, int]:
    return Counter(str(gauge) for gauge in found(model))


def test_each_writer_and_each_reader_has_its_own() -> None:
    model = PostNorm()
    gauges = found(model)
    assert [str(gauge) for gauge in gauges if gauge.kind == "stream_mean"] == [
        "stream_mean at table",
        "stream_mean at o",
        "stream_mean at down",
    ]
    shifted = {gauge.where for gauge in gauges if gauge.kind == "reader_shift"}
    assert shifted == {"q", "k", "v", "up", "head"}
    shifts = {gauge.where: {*gauge.parameters} for gauge in gauges if gauge.kind == "norm_shift"}
    assert shifts["norms.0"] == {"norms.0.bias", "o.bias"} | {
        f"{each}.{kind}" for each in "qkv" for kind in ("weight", "bias")
    }
    assert shifts["norms.1"] == {"norms.1.bias", "down.bias", "up.weight", "up.bias"}
    assert shifts["norms.2"] == {"norms.2.bias", "head.weight", "head.bias"}
    # rows of the table, columns and bias of the writers; rows of the readers; vectors
    params = dict(model.named_parameters())
    means = VOCABULARY + (WIDTH + 1) + (HIDDEN + 1)
    expected = means + (3 * WIDTH + HIDDEN + VOCABULARY) + 3 * WIDTH
    assert rank(tangents_of(gauges, params)) == expected


@pytest.mark.parametrize(
    ("options", "means", "readers", "shifts"),
    [
        ({}, 3, 5, 3),
        ({"dropout": 0.1}, 1, 5, 1),  # not what is dropped before it is added
        ({"biased": False}, 3, 5, 1),  # nothing takes the shift of the stream back
        ({"branch": lambda x: 0.5 * x}, 3, 5, 1),
        ({"branch": torch.tanh}, 1, 5, 1),
        ({"branch": lambda x: x.cumsum(-1)}, 1, 5, 1),
        ({"branch": lambda x: x.mean(1, keepdim=True)}, 3, 5, 1),
        ({"branch": lambda x: x * torch.ones(WIDTH, dtype=x.dtype)}, 1, 5, 1),
        ({"stream": lambda x: 2 * x}, 3, 2, 2),
        ({"stream": lambda x: x.flip(-1)}, 3, 2, 2),
        ({"stream": lambda x: F.dropout(x, 0.1)}, 3, 2, 2),
        ({"stream": lambda x: x.masked_fill(torch.eye(5, 8).bool(), 0.0)}, 3, 2, 2),
        ({"stream": lambda x: x + x.norm()}, 3, 2, 2),
        ({"stream": lambda x: x.roll(1, 1)}, 3, 5, 3),
        ({"norm": nn.RMSNorm}, 0, 0, 0),
    ],
)
def test_what_is_done_on_the_way(
    options: dict[str, object], means: int, readers: int, shifts: int
) -> None:
    kinds = Counter(gauge.kind for gauge in found(PostNorm(**options)))  # type: ignore[arg-type]
    assert [kinds[kind] for kind in SHIFTS] == [means, readers, shifts]


def test_a_bias_that_two_sums_share_takes_nothing_back() -> None:
    class Shared(PostNorm):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norms[0](self.table(tokens))
            given = self.o(x)
            x = self.norms[1](x + given)
            return self.head(self.norms[2](x + given))

    assert {gauge.where for gauge in found(Shared()) if gauge.kind == "norm_shift"} == {"norms.2"}


def test_a_map_beside_itself_takes_nothing_back_twice() -> None:
    """The bias of a map that is added to what it reads would take the shift back in two ways."""

    class Beside(PostNorm):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norms[0](self.table(tokens))
            return self.head(self.norms[1](x + self.o(x)))

    assert {gauge.where for gauge in found(Beside()) if gauge.kind == "norm_shift"} == {"norms.1"}


def test_an_output_that_is_read_elsewhere_keeps_its_shift() -> None:
    """Readers move by themselves; the shift of a norm, and the mean of a writer, do not."""

    class Read(PostNorm):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norms[0](self.table(tokens))
            given = self.o(x)
            return self.head(self.norms[1](x + given)) + x.square().sum() + given.square().sum()

    kinds = Counter(gauge.kind for gauge in found(Read()))
    assert kinds == {"stream_mean": 1, "reader_shift": 2, "norm_shift": 1}


@pytest.mark.parametrize("writes", [False, True])
def test_a_sum_that_is_made_in_place(writes: bool) -> None:
    """What is read by another name afterwards is the sum."""

    class InPlace(PostNorm):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norms[0](self.table(tokens)) * 1.0
            normed = self.norms[1](x)
            view = normed.view(normed.shape)
            total = normed.add_(self.o(x)) if writes else normed + self.o(x)
            return self.head(self.norms[2](total)) + self.up(view).sum()

    where = {gauge.where for gauge in found(InPlace()) if gauge.kind == "norm_shift"}
    assert ("norms.1" in where) is not writes
    means = {gauge.where for gauge in found(InPlace()) if gauge.kind == "stream_mean"}
    assert ("o" in means) is not writes


class Bare(PostNorm):
    """The same with embeddings that are read as they are.

    Args:
        positions: what is added to the embeddings.
        factor: what these are multiplied by before.
        tied: whether the table is the head's.
    """

    def __init__(
        self, positions: str = "", factor: float = 1.0, tied: bool = False, **options: object
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.positions, self.factor = positions, factor
        self.learned = nn.Parameter(torch.randn(5, WIDTH)) if positions == "learned" else None
        self.norms[0] = nn.Identity()
        if tied:
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.head.weight = self.table.weight

    def embedded(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) * self.factor if self.factor != 1 else self.table(tokens)
        if self.positions == "fixed":
            x = x + torch.arange(5.0, dtype=x.dtype)[:, None].sin() * torch.ones(WIDTH).to(x)
        return x if self.learned is None else x + self.learned

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stream(self.embedded(tokens))
        q, k, v = (m(x).unflatten(-1, (2, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norms[1](x + self.sublayer(self.o(y)))
        x = self.norms[2](x + self.sublayer(self.down(F.gelu(self.up(x)))))
        return self.head(x)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["", "fixed", "learned"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_table_that_is_read_without_a_norm(tied: bool, positions: str, factor: float) -> None:
    """Its rows all move, and what reads them takes it back. Where it is the head's too, that is
    all; else x may become (1 + 1 wᵀ) x as well, which the norm does not see, and which is no kind.
    """
    model = Bare(positions, factor, tied).double().eval()
    gauges = find_gauges(model, inputs=(TOKENS,), loss="cross_entropy", kinds="complete")
    (shift,) = [
        each for each in gauges if each.kind == "translation" and "o.bias" in each.parameters
    ]
    assert {*shift.parameters} == {"table.weight", "o.bias"} | {
        f"{each}.{kind}" for each in "qkv" for kind in ("weight", "bias")
    }
    changes = check(model, gauges, lambda each: each(TOKENS).log_softmax(-1))
    assert max(changes.values()) < 1e-10, changes
    certificate = Jacobian.of(model, (TOKENS,)).certificate(gauges)
    assert certificate.leak < 1e-12
    assert certificate.complete == tied, certificate


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.1},  # the bias that would take it back is dropped
        {"biased": False},
        {"branch": lambda x: 0.5 * x},
        {"stream": lambda x: F.dropout(x, 0.1)},
        {"stream": lambda x: x.flip(-1)},
        {"stream": lambda x: x + x.norm()},
        {"stream": lambda x: x + x.roll(1, 1)},  # moves twice as much
        {"stream": lambda x: x * x},
    ],
)
def test_a_table_that_is_changed_before_it_is_read(options: dict[str, object]) -> None:
    gauges = find_gauges(
        Bare(**options),  # type: ignore[arg-type]
        inputs=(TOKENS,),
        loss="cross_entropy",
        verify=False,
        kinds=["translation"],
    )
    assert not gauges, str(gauges)


def test_a_tied_table_under_another_loss_stays() -> None:
    model = Bare(tied=True)
    kinds = ["translation", "stream_mean"]
    gauges = find_gauges(model, inputs=(TOKENS,), loss="other", kinds=kinds)
    assert "table.weight" not in {name for gauge in gauges for name in gauge.parameters}


@pytest.mark.slow
@pytest.mark.parametrize("model", [PostNorm(), Bare("fixed", 2.0, tied=True)])
def test_ddcadam_is_equivariant_under_all_of_them(model: PostNorm) -> None:
    model = model.double().eval()
    gauges = find_gauges(model, inputs=(TOKENS,), verify=False, kinds="complete")
    assert {gauge.kind for gauge in gauges} >= {*SHIFTS, "value_map", "qk_map"}
    targets = torch.randint(VOCABULARY, TOKENS.shape, generator=torch.Generator().manual_seed(1))

    def trained(moves: tuple[object, ...], steps: int = 100) -> Tensor:
        here = copy.deepcopy(model)
        GaugeSet(moves).transform_(here, torch.Generator().manual_seed(1), 1.0)  # type: ignore[arg-type]
        optimizer = DDCAdam(here.named_parameters(), gauges, lr=3e-3, weight_decay=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(here(TOKENS).flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
        return here(TOKENS).detach().log_softmax(-1)

    plain = trained(())
    assert (plain - trained((), 0)).abs().max() > 0.1
    assert (plain - trained(tuple(gauges))).abs().max() < 1e-7
