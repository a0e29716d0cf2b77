r"""LoRA-RITE, a rival: Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration
for LoRA Optimization", arXiv:2410.20625, Algorithm 1, written anew from its equations.

An adapter is :math:`Z = A B^\top` with A of shape (n, r) and B of (m, r) (peft's ``lora_A`` is the
transpose of one of them, its ``lora_B`` the other). With :math:`A = U_A R_A` and
:math:`B = U_B R_B`, of A, and the same of B with the two exchanged:

.. math::
    \bar g &= \nabla_A R_B^{-1} && \text{the unmagnified gradient, } \nabla_Z U_B \\
    P &= U_{B,t}^\top U_{B,t-1} && \text{from the last basis to this one} \\
    \bar V_t &= P \bar V_{t-1} P^\top + \bar g^\top \bar g, \qquad
    \rho_t = \rho_{t-1} + d(\bar V_{t-1}, P \bar V_{t-1} P^\top) && \text{escaped mass} \\
    \bar S &= \bar g\, (\bar V_t + \rho_t I)^{-1/2}, \qquad
    \bar M_t = \beta_1 \bar M_{t-1} P^\top + (1 - \beta_1) \bar S \\
    A &\leftarrow A - \eta\, \bar M_t R_B^{-\top}

where :math:`d(X, Y) = \min(\max_i(\lambda_i(X) - \lambda_i(Y)), \operatorname{tr} X -
\operatorname{tr} Y)`, not below zero.

*What the algorithm leaves open*, and what is done here, as in the authors' reimplementation
(github.com/gkevinyen5418/LoRA-RITE) where it does something:

- The sum over steps in :math:`\bar V` is Adagrad's. In practice it is Adam's average:
  :math:`\bar g^\top \bar g / n`, its weight :math:`1 - \beta_2`, with bias correction; escaped mass
  decays by :math:`\beta_2` too.
- :math:`(\cdot)^{-1/2}` has the eigenvalues :math:`1 / (\sqrt{\lambda + \rho} + \epsilon)`.
- U and R by QR. Another factorisation turns bases, and nothing else.
- Where B is zero, as at LoRA's start, R has no inverse: its pseudoinverse leaves A where it is for
  one step, and what the first basis is does not matter, for the moments of A are zero.
- That code clips unmagnified gradients at a total norm of 1 and skips those of a root mean square
  above 1, and leaves escaped mass out by default. The algorithm does none of it; nor is it done
  here.

Every step of Z is the same from :math:`(A G, B G^{-\top})` as from (A, B), whatever the invertible
G: bases turn by a rotation, in which all moments are covariant. Bases, moments and inverses are in
float64, as :mod:`ddc.optim.factor` has its metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: A and B of some adapters of one shape: (L, n, r) and (L, m, r).
Pair = tuple[Tensor, Tensor]


class LoRARite(Optimizer):
    """LoRA-RITE without decay.

    Args:
        pairs: of each adapter, as peft has them: ``lora_A``'s weight, (r, n), and ``lora_B``'s,
            (m, r), with n and m not below r.
        lr: η.
        betas: decay of the first and the second moments.
        eps: beside roots of second moments of unmagnified gradients.

    Raises:
        ValueError: a rank above a side of its map, or pairs that do not fit.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        alike: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
        for a, b in pairs:
            if a.shape[0] != b.shape[1] or a.shape[0] > min(a.shape[1], b.shape[0]):
                raise ValueError(f"no adapter: A is {tuple(a.shape)}, B is {tuple(b.shape)}")
            alike.setdefault((a.shape, b.shape), []).append((a, b))
        groups = [{"params": [each for pair in found for each in pair]} for found in alike.values()]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            a, b = stacked(group["params"], lambda p: p)
            for key, p, other in (("a", a, b), ("b", b, a)):
                square = p.new_zeros(len(p), p.shape[2], p.shape[2])
                group[key] = {
                    "basis": torch.zeros_like(other),
                    "first": torch.zeros_like(p),
                    "second": square,
                    "spectrum": square[..., 0].clone(),
                    "escaped": square[:, 0, 0].clone(),
                }
            group["step"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all adapters; each must have its gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            params = group["params"]
            a, b = stacked(params, lambda p: p)
            grad_a, grad_b = stacked(params, gradient)
            changes = (
                direction(group["a"], grad_a, b, group),
                direction(group["b"], grad_b, a, group),
            )
            for i, p in enumerate(params):
                change = changes[i % 2][i // 2]
                p.sub_(group["lr"] * (change if i % 2 else change.mT).to(p))
        return loss


def stacked(params: Sequence[Tensor], of: Callable[[Tensor], Tensor]) -> Pair:
    """Something of A and of B of some adapters, which alternate, in float64."""
    return (
        torch.stack([of(p).mT for p in params[::2]]).double(),
        torch.stack([of(p) for p in params[1::2]]).double(),
    )


def gradient(p: Tensor) -> Tensor:
    """Of a parameter.

    Raises:
        ValueError: it has none.
    """
    if p.grad is None:
        raise ValueError("a factor of an adapter has no gradient")
    return p.grad


def direction(
    state: dict[str, Tensor], grad: Tensor, other: Tensor, group: dict[str, Any]
) -> Tensor:
    """What η multiplies, for one side; its moments are moved to the basis of the other side.

    Args:
        state: of this side, changed in place.
        grad: of this side, (L, n, r).
        other: the weights of the other side, (L, m, r).
        group: of the optimizer.
    """
    weights = [average_weight(beta, group["step"]) for beta in group["betas"]]
    basis, r = torch.linalg.qr(other)
    inverse = inverse_of(r)
    unmagnified = grad @ inverse
    turn = basis.mT @ state["basis"]
    moved = turn @ state["second"] @ turn.mT
    escaped = state["escaped"] + escaped_mass(state["spectrum"], torch.linalg.eigvalsh(moved))
    fresh = unmagnified.mT @ unmagnified / unmagnified.shape[1]
    second = torch.lerp(moved, fresh, weights[1])
    escaped = escaped * (1 - weights[1])
    values, vectors = torch.linalg.eigh(second)
    sizes = (values.clamp_min(0) + escaped[:, None]).sqrt() + group["eps"]
    scaled = unmagnified @ (vectors / sizes[:, None, :]) @ vectors.mT
    first = torch.lerp(state["first"] @ turn.mT, scaled, weights[0])
    state |= {
        "basis": basis, "first": first, "second": second, "spectrum": values, "escaped": escaped
    }  # fmt: skip
    return first @ inverse.mT


def average_weight(beta: float, step: int) -> float:
    """Of what is new in an average that is corrected for its bias as it goes."""
    return (1 - beta) / (1 - beta**step)


def inverse_of(r: Tensor) -> Tensor:
    """Of upper triangular matrices, (L, r, r); the pseudoinverse where one of them is singular."""
    if (r.diagonal(dim1=1, dim2=2) == 0).any():
        return torch.linalg.pinv(r)
    one = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device).expand_as(r)
    return torch.linalg.solve_triangular(r, one, upper=True)


def escaped_mass(before: Tensor, after: Tensor) -> Tensor:
    """How much a second moment has lost on the way to another basis, from its eigenvalues in
    ascending order, (L, r): a number each.
    """
    lost = before - after
    return torch.minimum(lost.amax(1), lost.sum(1)).clamp_min(0)
