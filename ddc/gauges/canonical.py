"""A representative of each gauge orbit, and the distance between two orbits.

On the orbit of a point under shifts and scales there is one point of least norm: logits centred,
and for every unit the two sides in balance, |plus|² = degree · |minus|² (Kempf and Ness: such
points are unique up to the isometries of the group, here the rotations). What is measured there is
a function of the orbit alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ddc.gauges.actions import Chain, Rescale, Rotation, Shift
from ddc.gauges.base import Gauge, Params, unit_view


@torch.no_grad()
def balance_(
    params: Params, gauges: Iterable[Gauge], tolerance: float = 1e-12, sweeps: int = 10_000
) -> None:
    """Move parameters, in place, to the point of least norm of their orbit under shifts and scales.

    Where gauges overlap (a SwiGLU block's W_up lies on a norm scale and on a gated rescale) each is
    balanced in turn until none moves; the problem is convex in the logarithms of the scales, so the
    order does not matter. The layers of a chain get equal norms; a chain and rescales of its units
    are not balanced together. A unit with a side of norm zero has no balanced point and is left as
    it is.

    Args:
        params: the model's parameters by name, of any floating dtype; float64 for exact invariance.
        gauges: those to balance; rotations leave the norm alone and are passed over.
        tolerance: on the last sweep, the largest ``|log c|`` of a unit (not below the dtype's
            rounding).
        sweeps: at most so many.

    Raises:
        RuntimeError: not balanced after ``sweeps``.
    """
    # shifts and chains have their balanced point in closed form
    gauges = list(gauges)
    for gauge in gauges:
        if isinstance(gauge, Shift):
            for name in gauge.parameters:
                params[name].sub_(params[name].mean(0))
        elif isinstance(gauge, Chain):
            _balance_chain_(params, gauge)
    # rescales may overlap: in turn, until none moves
    rescales = [gauge for gauge in gauges if isinstance(gauge, Rescale)]
    if not rescales:
        return
    rounding = max(torch.finfo(params[gauge.parameters[0]].dtype).eps for gauge in rescales)
    for _ in range(sweeps):
        moved = 0.0
        for gauge in rescales:
            log_plus, log_minus = gauge.log_norms(params)
            # |P|² c² + |M|² c^-2k is least where c^(2 + 2k) = k |M|² / |P|²
            ratio = torch.tensor(float(gauge.degree)).log() / 2 + log_minus - log_plus
            log_scale = torch.where(ratio.isfinite(), ratio / (1 + gauge.degree), 0.0)
            gauge.act_(params, log_scale.exp().to(params[gauge.parameters[0]]))
            moved = max(moved, float(log_scale.abs().max()))
        if moved <= max(tolerance, 8 * rounding):
            return
    raise RuntimeError(
        f"not balanced after {sweeps} sweeps over the scales: the last one moved by {moved:.1e}"
    )


def _balance_chain_(params: Params, chain: Chain) -> None:
    """Give all layers the same norm, their geometric mean; a layer of norm zero leaves the chain as
    it is.
    """
    log_norms = torch.stack([params[name].double().norm().log() for name in chain.weights])
    if log_norms.isfinite().all():
        for name, log_scale in zip(chain.weights, log_norms.mean() - log_norms, strict=True):
            params[name].mul_(log_scale.exp().to(params[name]))


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
