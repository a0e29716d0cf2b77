"""The gauges of a model, found and refused, and the two kinds of evidence that they are real."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddc.gauges.actions import Shift
from ddc.gauges.base import (
    KINDS,
    Gauge,
    Refusal,
    check_kind,
    named_parameters,
    plain_names,
    whole,
)
from ddc.gauges.double import InDouble

Entry = TypeVar("Entry", Gauge, Refusal)


@dataclass(frozen=True)
class GaugeSet(Sequence[Gauge]):
    """A sequence of gauges, with the refusals beside them. Printed, it is a table of both.

    Attributes:
        found: the gauges.
        refused: what was looked for and not granted.
        unchecked: those of ``found`` that rules proved, but that could not be tried numerically,
            with the reason.
        sizes: of those that are symmetries at eps = 0 alone, how much a random element changes the
            centred log-probabilities, relative to another move of the same weights by as much.
    """

    found: tuple[Gauge, ...] = ()
    refused: tuple[Refusal, ...] = ()
    unchecked: Mapping[Gauge, str] = field(default_factory=dict)
    sizes: Mapping[Gauge, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Gauge]:
        return iter(self.found)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int or slice, as a tuple
        return self.found[index]

    def only(self, kinds: Iterable[str]) -> GaugeSet:
        """The gauges (and refusals) of these kinds alone.

        Raises:
            ValueError: an unknown kind.
        """
        kinds = set(kinds)
        for kind in kinds:
            check_kind(kind)
        return GaugeSet(
            tuple(gauge for gauge in self.found if gauge.kind in kinds),
            tuple(refusal for refusal in self.refused if refusal.kind in kinds),
            {gauge: reason for gauge, reason in self.unchecked.items() if gauge.kind in kinds},
            {gauge: size for gauge, size in self.sizes.items() if gauge.kind in kinds},
        )

    def among(self, parameters: Iterable[tuple[str, Tensor]]) -> GaugeSet:
        """The gauges that move nothing but these parameters, as far as they are trainable: those of
        a model that is partly frozen, or trained by several optimizers.

        A gauge of which a part is frozen is no symmetry of what is left to train, and is refused.
        A logit shift of a head without its bias remains one.

        Args:
            parameters: pairs as ``named_parameters()`` gives them; ``requires_grad`` counts as it
                is now.
        """
        pairs = list(parameters)
        known = {name for gauge in self.found for name in gauge.parameters}
        names = plain_names([name for name, _ in pairs], known)
        trainable = {
            name: param.requires_grad for name, (_, param) in zip(names, pairs, strict=True)
        }
        found, refused, unchecked = [], list(self.refused), {}
        for gauge in self.found:
            kept = gauge
            if isinstance(gauge, Shift) and gauge.bias and not trainable.get(gauge.bias):
                kept = replace(gauge, bias=None)
            still = [name for name in kept.parameters if not trainable.get(name)]
            if still:
                what = "frozen" if still[0] in trainable else "not among the parameters"
                refused.append(Refusal(gauge.kind, gauge.where, f"{still[0]!r} is {what}"))
                continue
            found.append(kept)
            if gauge in self.unchecked:
                unchecked[kept] = self.unchecked[gauge]
        sizes = {gauge: size for gauge, size in self.sizes.items() if gauge in found}
        return GaugeSet(tuple(found), tuple(refused), unchecked, sizes)

    def dimension(self, model: nn.Module) -> int:
        """Dimension of the product group: how many directions of parameter space the loss cannot
        see.
        """
        params = named_parameters(model)
        return sum(gauge.dimension(params) for gauge in self.found)

    def transform_(self, model: nn.Module, generator: torch.Generator, spread: float = 1.0) -> None:
        """Apply a random element of the whole product group to the model, in place."""
        params = named_parameters(model)
        for gauge in self.found:
            gauge.act_(params, gauge.sample(params, generator, spread))

    def _verdict(self, gauge: Gauge) -> str:
        reason, size = self.unchecked.get(gauge), self.sizes.get(gauge)
        verdict = "found, at eps = 0 alone" if KINDS[gauge.kind].approximate else "found"
        verdict += "" if size is None else f": changes {size:.0e} of what other moves do"
        return verdict if reason is None else f"{verdict}, not checked: {reason}"

    def __str__(self) -> str:
        header = ("gauge", "where", "verdict")
        rows = [
            *_rows(self.found, self._verdict),
            *_rows(self.refused, lambda r: f"refused: {r.reason}"),
        ]
        if not rows:
            return "no gauges"
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in [header, *rows]]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


#: The number of a block in a name that a verdict mentions.
BLOCK = re.compile(r"(?<=[a-z_]\.)\d+(?=\.[a-z_])")


def _rows(entries: Iterable[Entry], verdict: Callable[[Entry], str]) -> list[tuple[str, str, str]]:
    """Table rows; entries that differ only in the number of their block are drawn together: in
    where they are, and in the places that a verdict names.
    """
    order = (*KINDS,)

    def key(entry: Entry) -> tuple[int, str, str]:
        place = ".".join("*" if part.isdigit() else part for part in entry.where.split("."))
        return order.index(entry.kind), place, BLOCK.sub("*", verdict(entry))

    rows = []
    for (kind, place, text), members in groupby(sorted(entries, key=key), key=key):
        first, *others = members
        if others:
            rows.append((order[kind], f"{place} ({1 + len(others)}×)", text))
        else:
            rows.append((order[kind], first.where, verdict(first)))
    return rows


LogProbs = Callable[[nn.Module], Tensor]


@torch.no_grad()
def check(
    model: nn.Module,
    gauges: Iterable[Gauge],
    log_probs: LogProbs,
    seed: int = 0,
    spread: float = 1.0,
) -> dict[Gauge, float]:
    """Apply a random element of each gauge to a float64 copy of the model and compare its
    log-probabilities.

    Args:
        model: left as it is.
        gauges: what is checked, each by itself.
        log_probs: gives the model's log-probabilities on some fixed batch. Logits will not do: the
            logit shift changes them.
        seed: of the random elements.
        spread: of the random elements, as in :meth:`Gauge.sample`.

    Returns:
        The largest absolute change of a log-probability for each gauge: about 1e-13 for a true
            symmetry. All is
        computed in float64, also what the model itself computes in float32
            (:class:`ddc.gauges.double.InDouble`).

    Raises:
        TypeError: something that is no gauge.
        ValueError: a gauge of parameters that the model does not have or that have no values, or
            ``log_probs`` that gives something else than a tensor.
    """
    gauges = gauges_of(model, gauges)
    if nowhere := [name for name, p in named_parameters(model).items() if p.is_meta]:
        raise ValueError(
            f"{nowhere[0]!r} is on the meta device and has no values: give the model weights first"
        )

    def evaluated(model: nn.Module) -> Tensor:
        with InDouble():
            value = log_probs(model)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"log_probs gave a {type(value).__name__}: it must give a tensor, as"
                " log_softmax(-1) does"
            )
        return value

    model = copy.deepcopy(model).double()
    before = evaluated(model)
    changes = {}
    for gauge in gauges:
        moved = copy.deepcopy(model)
        GaugeSet((gauge,)).transform_(moved, torch.Generator().manual_seed(seed), spread)
        changes[gauge] = float((evaluated(moved) - before).abs().max())
    return changes


def audit(model: nn.Module, gauges: Iterable[Gauge]) -> dict[Gauge, float]:
    """Read, from the gradients that the model's parameters hold, how stationary the loss is along
    each orbit.

    Costs one pass over weights and gradients and no forward pass, so it can be logged during
    training. What is split over ranks is gathered, so all ranks must call.

    Returns:
        :meth:`Gauge.audit` for each gauge: rounding error for a true symmetry, of order 1 for a
            false one.

    Raises:
        TypeError: something that is no gauge.
        ValueError: a parameter under a gauge is none of the model's, or has no gradient.
    """
    gauges = gauges_of(model, gauges)
    split = named_parameters(model)
    grads = {name: whole(p.grad) for name, p in split.items() if p.grad is not None}
    params = {name: whole(p.detach()) for name, p in split.items()}
    ratios = {}
    for gauge in gauges:
        missing = [name for name in gauge.parameters if name not in grads]
        if missing:
            raise ValueError(
                f"{gauge}: no gradient on {', '.join(missing)}; call audit after backward()"
            )
        ratios[gauge] = gauge.audit(params, grads)
    return ratios


def gauges_of(model: nn.Module, gauges: Iterable[Gauge]) -> list[Gauge]:
    """The gauges as a list, all of them of parameters of the model."""
    if isinstance(gauges, Gauge):
        raise TypeError(f"expected several gauges, got one: pass [gauge] for {gauges}")
    gauges = list(gauges)
    names = named_parameters(model)
    for gauge in gauges:
        if not isinstance(gauge, Gauge):
            raise TypeError(
                f"expected gauges as find_gauges returns them, got {type(gauge).__name__}"
            )
        for name in gauge.parameters:
            if name not in names:
                raise ValueError(
                    f"{gauge}: the model has no parameter {name!r}; take the gauges of this very"
                    " model"
                )
    return gauges
