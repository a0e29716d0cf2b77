"""DDCMuon: Muon in the orbit decomposition of the gauges."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ddc.gauges import Gauge, HiddenMatrix, plain_names
from ddc.gauges.parts import whole_name
from ddc.optim.build import Builder, check_hidden
from ddc.optim.hidden import HiddenStack
from ddc.optim.lift import Lift
from ddc.optim.parameters import listed, names_under
from ddc.optim.parts import Cut, cut
from ddc.optim.plan import make_plan
from ddc.optim.rules import Adam, Orthogonaliser
from ddc.optim.saved import listing
from ddc.optim.stack import LIFT, Stack


class DDCMuon(Lift):
    r"""Muon lifted to the orbits of a model's gauges: hidden matrices turn by orthogonalised
    momentum.

    Every rescale that acts on rows or columns of a hidden matrix dresses it: the matrix is
    multiplied by a vector that scales against the gauge, its gradient divided by the same, and
    undressed after the step. In these coordinates, with :math:`\rho = |W|_F`, gradient g, momentum
    :math:`\mu` and learning rate :math:`\eta`:

    .. math::
        \hat g &= \langle g, W \rangle, \qquad x = \rho\, g - (\hat g / \rho)\, W \\
        m &\leftarrow \mu m + (1 - \mu) x, \qquad O = \mathrm{orth}(\mu m + (1 - \mu) x) \\
        O &\leftarrow O - \langle O, W \rangle W / \rho^2, \qquad T = W / \rho - \eta\, O / |O|_F \\
        W &\leftarrow (1 - \eta \lambda)\, e^{\Delta} \rho\, T / |T|_F, \qquad
        \Delta = - \eta\, r\, Q\, \mathrm{Adam}(Q^T \hat g)

    The columns of Q are the radial coordinates: orthonormal directions of the log-norms of all
    matrices, perpendicular to those along which gauges move norms against each other (along a chain
    of ReLU layers, the total alone). orth is equivariant to rotations of rows and columns by
    itself. All other parameters take the steps of :class:`DDCAdam`. Source: arXiv:2606.29176; the
    frames by which matrices are dressed, and Q, are ours (docs/method.md).

    Args:
        params: ``model.named_parameters()``, or param groups whose ``"params"`` are such pairs.
            Each group is split in two, for hidden matrices, whose rate is its ``"lr"``, and for the
            rest, whose rate is its ``"adam_lr"``.
        gauges: as for :class:`DDCAdam`.
        hidden: :func:`ddc.hidden_matrices` of the model, or the matrices named by hand.
        lr: for hidden matrices: the angle of a step, in radians.
        adam_lr: for all other parameters.
        momentum: :math:`\mu` above.
        nesterov: orthogonalise :math:`\mu m + (1 - \mu) x`; else m.
        orthogonalizer: ``"newton_schulz"`` (in the precision of the state),
            ``"newton_schulz_bfloat16"`` (faster where the hardware has bfloat16 products, many
            times slower where it has not) or ``"polar"`` (exact; slow; raises
            ``torch.linalg.LinAlgError`` for a gradient that is not finite).
        betas, eps, radial_rate, vertical: as for :class:`DDCAdam`; on hidden matrices they are
            those of the norms. ``vertical="adam"`` steps on the norms' gauge coordinates,
            ``"balance"`` relaxes the frames to 1.
        weight_decay: as for :class:`DDCAdam`.
        step_scale, retract, additive: as for :class:`DDCAdam`; hidden matrices have their own step,
            above.
        compiled, fused, approximate: as for :class:`DDCAdam`; kernels step the part that Adam does.

    The state of a hidden matrix is its ``momentum_buffer``, half of AdamW's. A matrix that starts
    at zero moves by ``lr`` times its usual norm until it has that (docs/method.md). A hidden matrix
    without a gradient is left alone; ``balance`` waits for a step in which all that the frames
    scale has one.

    Raises:
        ValueError: a hyperparameter out of range; a hidden matrix that is absent, no matrix, does
            not divide into its heads, or is zero under a chain; and as :class:`DDCAdam`.
    """

    rule, matrix_rule = Adam(), Orthogonaliser()
    kept = (*Lift.kept, "_gauges", "_hidden")

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        gauges: Iterable[Gauge] = (),
        hidden: Sequence[HiddenMatrix] = (),
        *,
        lr: float | Tensor = 0.02,
        adam_lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        orthogonalizer: str = "newton_schulz",
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
        self._hidden = {matrix.parameter: matrix for matrix in hidden}
        gauges = list(gauges)
        muon = {"momentum": momentum, "nesterov": nesterov, "orthogonalizer": orthogonalizer}
        self.matrix_rule.check(muon)
        super().__init__(
            split_groups(
                params,
                {*map(whole_name, self._hidden)},
                names_under(gauges),
                {"lr": lr, **muon},
                {"lr": adam_lr},
            ),
            gauges,
            {"lr": adam_lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            radial_rate=radial_rate,
            vertical=vertical,
            step_scale=step_scale,
            retract=retract,
            additive=additive,
            compiled=compiled,
            fused=fused,
            approximate=approximate,
        )

    @property
    def settings(self) -> tuple[str, ...]:
        # not by super(), whose properties torch.compile does not trace
        return (*LIFT, *self.rule.settings, *self.matrix_rule.settings)

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``, with the order of the hidden matrices, in which there is a state
        of their norms.
        """
        return {**super().state_dict(), "hidden": self._order()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As :meth:`ddc.DDCAdam.load_state_dict`.

        Raises:
            ValueError: as there; and for hidden matrices that come in another order than they were
                saved in.
        """
        saved, own = list(state_dict.get("hidden", self._order())), self._order()
        if saved != own:
            raise ValueError(
                f"hidden matrices are in the order {listing(own)} and were saved in the order"
                f" {listing(saved)}, which the state of their norms has too: pass the same matrices"
                " as hidden, in the order of state_dict['hidden'], and the same param groups"
            )
        super().load_state_dict(state_dict)

    def _order(self) -> list[str]:
        hidden = [stack for stack in self._stacks if isinstance(stack, HiddenStack)]
        return [name for stack in hidden for p in stack.parameters for name in p.names]

    def routing(self) -> str:
        """A table: which parameter takes which step, and what conditions it."""
        rows = [("parameter", "step", "conditioned by")]
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                rows.append((name, *self._route(name, param)))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def _route(self, name: str, param: Tensor) -> tuple[str, str]:
        by = (
            ", ".join(str(gauge) for gauge in self._gauges if name in gauge.parameters)
            or "no gauge"
        )
        parts = [key for key in self._order() if name == whole_name(key)]
        if not parts:
            return "DDCAdam" if by != "no gauge" else "AdamW", by
        heads = self._hidden[name].heads if name in self._hidden else 1
        more = f", {heads} heads" if heads > 1 else ""
        return "Muon" + (f", {len(parts)} parts" if parts != [name] else more), by

    def _cut(self, params: dict[str, Tensor], gauges: list[Gauge]) -> Cut:
        return cut(params, gauges, {} if self._ready else self._hidden)

    def _stacks_of(self, parts: Cut, group_of: dict[str, int]) -> list[Stack]:
        if self._ready:  # a group added later
            return super()._stacks_of(parts, group_of)
        self._gauges = [*dict.fromkeys(parts.given.values())]
        params, hidden = parts.params, parts.hidden
        check_hidden(hidden, params)
        plan = make_plan(params, parts.gauges, hidden)
        groups, rules = self.param_groups, (self.rule, self.matrix_rule)
        return Builder(params, group_of, groups, *rules, hidden).stacks(plan)


def split_groups(
    params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
    hidden: Collection[str],
    known: set[str],
    muon: dict[str, Any],
    adam: dict[str, Any],
) -> list[dict[str, Any]]:
    """Each param group as two: of its hidden matrices, with defaults ``muon``, and of the rest,
    with ``adam``.

    Parameters are named as in the unwrapped model.

    Raises:
        ValueError: parameters without names.
    """
    given = listed(params, DDCMuon.__name__)
    groups = [each if isinstance(each, dict) else None for each in given]
    whole = (
        [{"params": given}] if not all(groups) else [group for group in groups if group is not None]
    )
    pairs = [list(group["params"]) for group in whole]
    if not all(isinstance(pair, tuple) for of_group in pairs for pair in of_group):
        raise ValueError(
            "hidden matrices are known by name: pass model.named_parameters(), not parameters()"
        )
    names = iter(
        plain_names([name for of_group in pairs for name, _ in of_group], known | {*hidden})
    )
    split = []
    for group, of_group in zip(whole, pairs, strict=True):
        named = [(next(names), param) for _, param in of_group]
        own = {key: value for key, value in group.items() if key not in ("lr", "adam_lr")}
        for is_hidden, key, defaults in ((True, "lr", muon), (False, "adam_lr", adam)):
            mine = [(name, p) for name, p in named if (name in hidden) == is_hidden]
            if mine:
                split.append(
                    {**defaults, **own, "lr": group.get(key, defaults["lr"]), "params": mine}
                )
    return split
