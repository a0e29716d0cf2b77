r"""What weight decay acts on.

Decay multiplies a parameter by :math:`1 - \eta \lambda e`, e its *share*. On matrices alone (a
share of 1, and 0 for vectors) it moves units along their orbits, where the loss does not see it:
the readers of a norm shrink, and its scale does not. The place of a unit on its orbit under a
rescale of degree k is :math:`\log \rho_P - k \log \rho_M`. So decay is *consistent* with the
gauge, and moves nothing along the orbit, if :math:`e_P = k\, e_M` for all parameters on the two
sides (exactly at k = 1, else up to :math:`(\eta \lambda)^2`). A chain asks for one share of all its
layers.

What decay does to the function, it does through the radial coordinate, at the rate :math:`k\, e_P +
e_M`. Of all consistent shares, those are taken whose rates are nearest to the rates of decay on
matrices alone, by least squares over the gauges. So where a norm scale is the only gauge of a
matrix, both decay by half.

What is frozen does not decay, and holds what it is tied to. Of the paper's kinds the others scale
nothing. The scale of a norm that multiplies by 1 + γ decays with that under a DDC optimizer; under
others γ itself shrinks, which no share makes consistent
(:func:`ddc.optim.factory.make_optimizer` refuses it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddc.gauges import Chain, Gauge, Rescale, plain_name
from ddc.gauges.parts import whole_name

DECAY_ON = ("matrices", "all", "consistent")
#: Relative size below which a singular value is rounding error; digits of a share.
ROUNDING, DIGITS = 1e-9, 9
Side = tuple[str, ...]


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    decay_on: str = "matrices",
    gauges: Iterable[Gauge] = (),
) -> list[dict[str, Any]]:
    """Param groups of a model by their decay, the largest first.

    Args:
        model: whose named parameters they hold.
        weight_decay: of a parameter whose share is 1.
        decay_on: ``matrices``, not vectors (norm scales and biases); ``all`` parameters alike; or
            ``consistent`` with the rescales among ``gauges``.
        gauges: of the model.

    Raises:
        ValueError: another ``decay_on``.
    """
    named = list(model.named_parameters())
    shares = decay_shares({plain_name(n): p for n, p in named}, decay_on, gauges)
    return [
        {
            "params": [(n, p) for n, p in named if shares[plain_name(n)] == share],
            "weight_decay": share * weight_decay,
        }
        for share in sorted({*shares.values()}, reverse=True)
    ]


def decay_shares(
    params: Mapping[str, Tensor], decay_on: str, gauges: Iterable[Gauge] = ()
) -> dict[str, float]:
    """By parameter, its share e of the decay; arguments as of :func:`decay_groups`.

    Raises:
        ValueError: another ``decay_on``.
    """
    on_matrices = {name: float(p.ndim >= 2) for name, p in params.items()}
    match decay_on:
        case "matrices":
            return on_matrices
        case "all":
            return dict.fromkeys(params, 1.0)
        case "consistent":
            frozen = [name for name, p in params.items() if not p.requires_grad]
            return on_matrices | consistent(on_matrices, gauges, frozen)
    raise ValueError(f"Invalid {decay_on=}: expected one of {', '.join(DECAY_ON)}")


def consistent(
    on_matrices: Mapping[str, float], gauges: Iterable[Gauge], frozen: Iterable[str] = ()
) -> dict[str, float]:
    """The consistent shares of all parameters under rescales; zero where there is no other."""
    found = list(rescales(gauges))
    names = sorted({name for plus, minus, _ in found for name in plus + minus})
    if not names:
        return {}
    column = {name: i for i, name in enumerate(names)}

    def row(shares: Mapping[str, float]) -> Tensor:
        values = torch.zeros(len(names), dtype=torch.float64)
        for name, value in shares.items():
            values[column[name]] += value
        return values

    # all consistent shares are combinations of the columns of ``basis``
    ties = torch.stack(
        [row({p: 1.0}) - row({m: k}) for ps, ms, k in found for p in ps for m in ms]
        + [row({name: 1.0}) for name in frozen if name in column]
    )
    _, singular, directions = torch.linalg.svd(ties)
    rank = int((singular > ROUNDING * singular.max()).sum())
    if rank == len(names):  # degrees that contradict each other along a circle
        return dict.fromkeys(names, 0.0)
    basis = directions[rank:].T
    # a side has the share of any of its parameters, and on matrices that of its matrix
    rates = torch.stack([row({ps[0]: k}) + row({ms[0]: 1.0}) for ps, ms, k in found])
    wanted = [
        k * max(on_matrices[p] for p in ps) + max(on_matrices[m] for m in ms) for ps, ms, k in found
    ]
    right = torch.tensor(wanted, dtype=torch.float64).unsqueeze(1)
    shares = basis @ torch.linalg.lstsq(rates @ basis, right).solution
    # equal shares are to be one param group
    return {name: round(float(e), DIGITS) for name, e in zip(names, shares, strict=True)}


def rescales(gauges: Iterable[Gauge]) -> Iterator[tuple[Side, Side, float]]:
    """The two sides of each gauge that scales, by parameters, and its degree; of a chain, those of
    each two neighbours.
    """
    for gauge in gauges:
        if isinstance(gauge, Rescale):
            plus, minus = (
                tuple(dict.fromkeys(whole_name(axis.parameter) for axis in side))
                for side in (gauge.plus, gauge.minus)
            )
            yield plus, minus, gauge.degree
        elif isinstance(gauge, Chain):
            for before, after in zip(gauge.weights, gauge.weights[1:], strict=False):
                yield (before,), (after,), 1.0
