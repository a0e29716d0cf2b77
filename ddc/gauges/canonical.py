"""A representative of each gauge orbit, and the distance between two orbits.

On the orbit of a point under shifts, scales and linear maps of heads there is one point of least
norm: logits centred, for every unit the two sides in balance, ``|plus|² = degree · |minus|²``, and
for every head Σ x xᵀ the same on both sides (Kempf and Ness: such points are unique up to the
isometries of the group, here the rotations). What is measured there is a function of the orbit
alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ddc.gauges.actions import Rotation
from ddc.gauges.base import Gauge, Params, is_fake, is_split, named_parameters, unit_view
from ddc.gauges.gauge_set import gauges_of
from ddc.gauges.trace import Inputs, example
from ddc.gauges.verify import TOLERANCE, NotTried, Subject, unfit

#: How near to balance :func:`canonicalise_` comes, in logarithms of scales.
BALANCED = 1e-9


@torch.no_grad()
def balance_(
    params: Params, gauges: Iterable[Gauge], tolerance: float = 1e-12, sweeps: int = 10_000
) -> None:
    """Move parameters, in place, to the point of least norm of their orbit, as far as it is known
    (:meth:`Gauge.balancing`).

    Where gauges overlap (a SwiGLU block's W_up lies on a norm scale and on a gated rescale) each is
    balanced in turn until none moves. Under shifts, scales, chains and maps of heads the problem is
    convex along geodesics of the group, so the order does not matter. Translations and shears of
    biases are least squares for given scales; together with scales they reach a point where no
    gauge alone lowers the norm. Rotations, also of residual streams, and shears behind a norm whose
    readers have no biases are passed over. A unit with a side of norm zero, or a head with a side
    that does not have full rank, has no balanced point and is left as it is.

    Args:
        params: the model's parameters by name, of any floating dtype; float64 for exact invariance.
        gauges: those to balance.
        tolerance: on the last sweep, the largest distance that a gauge moves (not below the dtype's
            rounding).
        sweeps: at most so many.

    Raises:
        RuntimeError: not balanced after ``sweeps``.
    """
    gauges = list(gauges)
    rounding = max((torch.finfo(params[g.parameters[0]].dtype).eps for g in gauges), default=0.0)
    for _ in range(sweeps):
        moved = 0.0
        for gauge in gauges:
            if (found := gauge.balancing(params)) is not None:
                gauge.act_(params, found[0])
                moved = max(moved, found[1])
        if moved <= max(tolerance, 8 * rounding):
            return
    raise RuntimeError(
        f"not balanced after {sweeps} sweeps over the gauges: the last one moved by {moved:.1e}"
    )


@torch.no_grad()
def canonicalise_(
    model: nn.Module,
    gauges: Iterable[Gauge],
    inputs: Inputs | None = None,
    *,
    verify: bool = True,
) -> dict[str, float]:
    """Move a model's weights, in place, to the balanced point of their gauge orbit
    (:func:`balance_`), which computes the same.

    The point is found in float64 and rounded to the dtype of the weights, so in lower precision the
    function changes by that rounding. An optimizer's state is not moved: Adam's moments stay those
    of the coordinates before.

    Args:
        model: one that may be compiled or wrapped by DDP, but not split by FSDP.
        gauges: of this very model (:func:`ddc.find_gauges`).
        inputs: an example of what the model takes, for the check, as of :func:`ddc.find_gauges`.
        verify: compare, in float64, what the model computes before and after, on the example in
            evaluation and in training, and on other and longer ones.

    Returns:
        By parameter under a gauge, how far it moved: ``|W' - W| / |W|`` (0 where it is zero).

    Raises:
        TypeError: something that is no gauge.
        ValueError: a gauge of other parameters, weights that are split, not finite or have no
            values, no ``inputs`` where they are needed, or the model would compute something else:
            then it is left as it was.
        RuntimeError: no balanced point was found.
    """
    gauges = gauges_of(model, gauges)
    params = named_parameters(model)
    for name, p in params.items():
        if is_split(p) or is_fake(p):
            why = "split over processes" if is_split(p) else "on the meta device, without values"
            raise ValueError(f"{name!r} is {why}: canonicalise the model before")
        if not p.isfinite().all():
            raise ValueError(f"{name!r} is not finite: what the model computes cannot be kept")
    if reason := unfit(model) if verify else "":
        raise ValueError(f"the model cannot be tried: {reason}; verify=False moves it untried")
    before = {name: p.detach().double() for name, p in params.items()}
    names = dict.fromkeys(name for gauge in gauges for name in gauge.parameters)
    after = before | {name: before[name].clone() for name in names}
    balance_(after, gauges, BALANCED)
    if verify:
        check_the_same(model, before, after, gauges, inputs)
    moved = {name: _relative(after[name] - before[name], before[name]) for name in names}
    for name in names:
        params[name].copy_(after[name])
    return moved


def check_the_same(
    model: nn.Module, before: Params, after: Params, gauges: list[Gauge], inputs: Inputs | None
) -> None:
    """Raise ValueError unless a model computes the same with two sets of weights, in float64."""
    try:
        subject = Subject(model, *example(model, inputs), weights=before)
        change = subject.change_to(after, gauges)
    except NotTried as error:
        raise ValueError(f"the model cannot be tried: {error}; verify=False moves it") from error
    if change.size > TOLERANCE:
        raise ValueError(
            f"the balanced point of these gauges computes something else than the model: {change};"
            " take the gauges that find_gauges finds in this very model"
        )


def _relative(difference: Tensor, of: Tensor) -> float:
    size = float(of.norm())
    return float(difference.norm()) / size if size else 0.0


@torch.no_grad()
def align_(params: Params, reference: Params, gauges: Iterable[Gauge]) -> None:
    """Turn the units of every rotation gauge, in place, as close to ``reference`` as they go
    (Procrustes).

    Schönemann 1966: the rotation that minimises ``|R x - y|`` over all slices x of a unit is the
    polar factor of Σ y xᵀ; where the group has no reflections, its smallest singular direction is
    flipped if need be (Kabsch).
    """
    for gauge in gauges:
        if not isinstance(gauge, Rotation):
            continue
        gauge.act_(
            params,
            nearest_turn(gauge, params, reference, gauge.reflections).to(
                params[gauge.parameters[0]]
            ),
        )


@torch.no_grad()
def nearest_turn(gauge: Rotation, params: Params, reference: Params, reflections: bool) -> Tensor:
    """Per unit, the orthogonal matrix that turns ``params`` as close to ``reference`` as it goes.

    Args:
        gauge: whose units.
        params: parameters by name.
        reference: likewise.
        reflections: whether its determinant may be -1.

    Returns:
        A float64 tensor of shape (units, k, k), on the CPU.
    """
    units, k = gauge.shape
    moment = torch.zeros(units, k, k, dtype=torch.float64)
    for name, axis, indices in gauge.slots:
        index = torch.from_numpy(indices)
        x, y = (unit_view(p[name], axis).double().cpu()[index] for p in (params, reference))
        moment += torch.einsum("ucid,ucjd->uij", y, x)
    u, _, vh = torch.linalg.svd(moment)
    if not reflections:
        u[:, :, -1] *= torch.linalg.det(u @ vh).sign()[:, None]
    return u @ vh


@torch.no_grad()
def orbit_distance(first: Params, second: Params, gauges: Iterable[Gauge]) -> Tensor:
    """Euclidean distance of two points' balanced representatives, turned onto each other.

    A function of the two orbits: either point may be moved by any element of the product group.
    Between nearby points of a trajectory it is the length of the step in the metric that the
    balanced points inherit, an invariant one; summed, the arc length of the trajectory.

    Args:
        first: parameters by name; copied, not changed, and taken in float64.
        second: likewise.
        gauges: the gauges of the model.

    Returns:
        A float64 scalar.
    """
    gauges = list(gauges)
    a, b = (
        {name: p.detach().double().clone() for name, p in point.items()}
        for point in (first, second)
    )
    for point in (a, b):
        balance_(point, gauges)
    align_(b, a, gauges)
    return torch.stack([(b[name] - a[name]).square().sum() for name in a]).sum().sqrt()
