"""DDCAdam: Adam in the orbit decomposition of the gauges."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ddc.gauges import Gauge
from ddc.optim.lift import Lift
from ddc.optim.rules import Adam


class DDCAdam(Lift):
    r"""Adam lifted to the orbits of a model's gauges: a gauge transformation of the weights
    commutes with the step.

    For each unit of a rescale gauge with sides P and M, :math:`L \mapsto L` under :math:`(cP,
    c^{-k}M)`, with weights W and gradient g of a side, :math:`\rho = |W|`:

    .. math::
        \hat g &= \langle g, W \rangle, \qquad x = \rho\, g - (\hat g / \rho)\, W \\
        \Delta_U &= -\eta\, r\, \mathrm{Adam}\big((k \hat g_P + \hat g_M) / \sqrt{1 + k^2}\big) \\
        u &= \mathrm{Adam}(x), \qquad u \leftarrow u - \langle u, W \rangle W / \rho^2 \\
        W &\leftarrow (1 - \eta \lambda)\, e^{\Delta}\, \rho\, (W - \eta s u) / |W - \eta s u|

    with :math:`\Delta = k \Delta_U / \sqrt{1 + k^2}` on P and :math:`\Delta_U / \sqrt{1 + k^2}` on
    M (and the vertical mode, below). Parameters under several rescales are decomposed by one and
    multiplied by the norms of the others ("dressed"). Under a rotation gauge Adam's second moment
    is averaged over the indices that it turns; under a logit shift gradient and update are centred
    over the vocabulary. All else is AdamW. Source: arXiv:2606.29176 and its companion
    arXiv:2606.05957; the retraction, the step scale "init", the averaged second moment, the rule
    for overlaps and the treatment of dead sides are ours (docs/method.md).

    Args:
        params: ``model.named_parameters()``, or param groups whose ``"params"`` are such pairs.
            Plain tensors will do only without gauges. They may be DTensors, as ``fully_shard``
            makes them, of a model whose gauges were found before (docs/distributed.md).
        gauges: what :func:`ddc.find_gauges` returns, or any sequence of gauges. Without gauges this
            is AdamW.
        lr: learning rate; as for AdamW, a float or a tensor of one element.
        betas, eps: Adam's, for every one of the moments above.
        weight_decay: decoupled, applied to a weight as it stands (under a logit shift to its
            centred part).
        radial_rate: r above: the rate of the norms relative to that of the directions; 0 freezes
            the norms.
        vertical: what becomes of the gauge coordinate log rho_P - k log rho_M: ``"freeze"`` leaves
            it as it is, ``"adam"`` steps on its gradient (which is rounding error), ``"balance"``
            relaxes it to 0 at rate ``lr * radial_rate``. No choice changes the function that the
            network computes.
        step_scale: s above: ``"init"`` is √fan_in · rms(W), which is 1 at the usual initialisation;
            ``"norm"`` is the paper's rho.
        retract: keep the norm under the tangential step (division above); without, every step
            lengthens W a little, as in the paper's statement.
        additive: the order of the paper's companion: decay first, and the exponential on W alone.
            With :math:`W \leftarrow (1 - \eta\lambda) W`, and all of the above read from this W,
            :math:`W \leftarrow e^{\Delta}\, W - \eta s u`. Needs ``retract=False``. With
            ``step_scale="norm"`` and gauges :func:`in blocks <ddc.gauges.in_blocks>` it is the step
            of the companion's machine-checked model (repository DeadDirections/DeadDirections,
            ``DdcAdamEquivariance.lean``), but that ``"balance"``, which that model does not have,
            moves all of the side along the gauge: with :math:`\Delta_V` its part of :math:`\Delta`,
            :math:`W \leftarrow e^{\Delta}\, W - e^{\Delta_V} \eta s u`.
        compiled: compile the step, and :meth:`grad_norm`, with ``torch.compile`` when they are
            first called: as one function, or where layers are large as one for each stack of alike
            layers. That takes tens of seconds for a transformer, and on a CPU a C++ compiler; what
            it saves is in docs/speed.md. A step in which gradients are missing is compiled by
            stacks, but for those that miss one. Not compiled are parameters that are split over
            ranks, of lower precision than float32 or complex; and all of it no longer once
            hyperparameters that are no numbers have changed often. Numbers, such as lr and betas,
            may change at every step.
        fused: let kernels step what there are kernels for, in Triton on a GPU, in C on a CPU;
            docs/speed.md says what. False leaves all to torch's operations, as a compiled step
            does.
        approximate: take gauges that are symmetries at eps = 0 alone
            (:func:`ddc.gauges.approximate_kinds`) too, which are refused otherwise. The step is
            equivariant under them, the loss up to their size.

    Weights of lower precision than float32 have their state, and their arithmetic, in float32.
    State is complete from construction: ``exp_avg`` and ``exp_avg_sq`` as Adam's (the latter
    averaged as above), ``step``, and ``radial_exp_avg``, ``radial_exp_avg_sq`` (``vertical_…``)
    with the first parameter of a gauge.

    A layer of which no parameter has a gradient is left alone; where only some have, the missing
    gradients are zero. A side of norm zero has no direction: it takes its tangential step in the
    scale of the other side until it has one. If both sides are zero, or the side is a single entry
    (the gamma of an RMSNorm), it stays, and so does what a zero gamma dresses. A gradient that is
    inf or nan is not hidden: all units that it is in become nan, on both sides of their gauges.
    More on degenerate weights and gradients: docs/method.md.

    Raises:
        ValueError: a hyperparameter out of range, gauges that do not fit the parameters or each
            other, or hold at eps = 0 alone, parameters that are all zero and would stay so under
            their gauge, or parameters under one gauge in param groups that differ in anything but
            weight decay; in ``step``, a parameter that was frozen since while what shares its gauge
            was not.
        RuntimeError: in ``step``, a sparse gradient.
    """

    rule = Adam()

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[Tensor] | Iterable[dict[str, Any]],
        gauges: Iterable[Gauge] = (),
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        radial_rate: float = 1.0,
        vertical: str = "freeze",
        step_scale: str = "init",
        retract: bool = True,
        additive: bool = False,
        compiled: bool = False,
        fused: bool = True,
        approximate: bool = False,
    ) -> None:
        super().__init__(
            params,
            gauges,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            radial_rate=radial_rate,
            vertical=vertical,
            step_scale=step_scale,
            retract=retract,
            additive=additive,
            compiled=compiled,
            fused=fused,
            approximate=approximate,
        )
