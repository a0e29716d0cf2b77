"""How sharp a loss is at a point: the largest eigenvalue and the trace of its Hessian, by products
with vectors.

Neither is a function of the network alone: a rescale changes both, and can make either as large as
one likes (Dinh et al., Sharp minima can generalize for deep nets, arXiv:1703.04933). At the
balanced point of its gauge orbit (:func:`ddc.gauges.balance_`) they are functions of the orbit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddc.slt.learning_coefficient import Loss

#: The product of a symmetric matrix with a vector.
Product = Callable[[Tensor], Tensor]


class Eigenvalue(NamedTuple):
    """The largest eigenvalue of a symmetric matrix.

    Attributes:
        value: its Ritz value, which is not larger.
        residual: ``|A v - value v|`` of the unit vector v that belongs to it; an eigenvalue is
            within this of ``value``.
        products: of the matrix with a vector, that it took.
    """

    value: float
    residual: float
    products: int


class Trace(NamedTuple):
    """An estimate of a trace, and its standard error over the probes."""

    value: float
    standard_error: float


def hessian(loss: Loss, params: Mapping[str, Tensor], *batch: Tensor) -> Product:
    """Products with the Hessian of ``loss(params, *batch)``, in all parameters as one vector.

    The graph of the gradient is made once and kept, so a product costs about two backward passes
    and the memory of one batch.

    Args:
        loss: see :func:`ddc.slt.learning_coefficient.module_loss`.
        params: the point, all of one dtype and device; float64 for eigenvalues to many digits.
        batch: the data.

    Raises:
        ValueError: a loss that is not finite there.
    """
    point = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    # the fused kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss(point, *batch)
        gradients = torch.autograd.grad(value, [*point.values()], create_graph=True)
    if not value.isfinite():
        raise ValueError(f"Invalid params: the loss there is {float(value.detach())}")
    gradient = torch.cat([g.flatten() for g in gradients])

    def product(vector: Tensor) -> Tensor:
        found = torch.autograd.grad(
            gradient, [*point.values()], vector, retain_graph=True, materialize_grads=True
        )
        return torch.cat([each.flatten() for each in found])

    return product


@torch.no_grad()
def largest_eigenvalue(
    product: Product, like: Tensor, tolerance: float = 1e-3, seed: int = 0, most: int = 500
) -> Eigenvalue:
    """The largest eigenvalue by Lanczos' method, every vector made orthogonal to all before it.

    Args:
        product: with a symmetric matrix.
        like: a vector of its size, dtype and device.
        tolerance: on the residual, relative to the eigenvalue.
        seed: of the first vector.
        most: products, at most.

    Raises:
        ValueError: a product that is not finite.
        RuntimeError: not within ``tolerance`` after ``most`` products.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(like), generator=generator, dtype=torch.float64).to(like)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for count in range(1, most + 1):
        image = product(basis[-1])
        if not image.isfinite().all():
            raise ValueError("Invalid params: a second derivative of the loss there is not finite")
        diagonal.append(float(basis[-1] @ image))
        known = torch.stack(basis)
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            image = image - known.T @ (known @ image)
        length = float(image.norm())
        values, vectors = torch.linalg.eigh(tridiagonal(diagonal, beside))
        value, residual = float(values[-1]), length * abs(float(vectors[-1, -1]))
        # with as many vectors as there are dimensions the rest is rounding error
        if residual <= tolerance * abs(value) or count == len(like):
            return Eigenvalue(value, residual, count)
        beside.append(length)
        basis.append(image / length)
    raise RuntimeError(
        f"the largest eigenvalue, about {value:.4g}, is known to {residual:.1e} after {most}"
        f" products, and {tolerance * abs(value):.1e} is asked for: allow more"
    )


def tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    """The symmetric matrix of this diagonal and of these numbers beside it."""
    off = torch.tensor(beside, dtype=torch.float64)
    main = torch.tensor(diagonal, dtype=torch.float64)
    return torch.diag(main) + torch.diag(off, 1) + torch.diag(off, -1)


@torch.no_grad()
def trace(product: Product, like: Tensor, probes: int, seed: int = 0) -> Trace:
    """The trace by Hutchinson's estimator: the mean of v·Av over random signs v.

    Args:
        product: with a symmetric matrix.
        like: a vector of its size, dtype and device.
        probes: how many, two at least.
        seed: of the signs.

    Raises:
        ValueError: fewer probes.
    """
    if probes < 2:
        raise ValueError(f"Invalid {probes=}: a standard error needs two at least")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(probes):
        signs = (2.0 * torch.randint(2, (len(like),), generator=generator) - 1).to(like)
        found.append(float(signs @ product(signs)))
    values = torch.tensor(found, dtype=torch.float64)
    return Trace(float(values.mean()), float(values.std()) / math.sqrt(probes))
