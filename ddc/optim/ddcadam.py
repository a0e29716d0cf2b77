"""DDCAdam: Adam in the orbit decomposition of the gauges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddc.gauges import Gauge, Rescale, is_fake, plain_names, whole
from ddc.optim.closure import loss_of
from ddc.optim.hidden import HiddenMatrices
from ddc.optim.parameters import check_has_values, is_plain, listed, names_of, names_under, prepared
from ddc.optim.plan import ChainPlan, Plan, PolarPlan, Role, make_plan
from ddc.optim.ranges import check_ranges
from ddc.optim.saved import (
    as_it_was_if_refused,
    check_shapes,
    in_own_order,
    parameter_names,
    saved_ids,
)
from ddc.optim.sharding import restore_, shards_of
from ddc.optim.stacked import (
    Arithmetic,
    Context,
    Dresser,
    Group,
    Hyper,
    Rates,
    StackedParameter,
    as_tensors,
)
from ddc.optim.stacks import ChainStack, FreeStack, PolarStack

Stack = PolarStack | ChainStack | FreeStack | HiddenMatrices


class DDCAdam(Optimizer):
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
            other, parameters that are all zero and would stay so under their gauge, or parameters
            under one gauge in param groups that differ in anything but weight decay; in ``step``, a
            parameter that was frozen since while what shares its gauge was not.
        RuntimeError: in ``step``, a sparse gradient.
    """

    #: What a step reads of a param group but its rates.
    settings = frozenset(Hyper._fields) - {"lr"}

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
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "radial_rate": radial_rate,
            "vertical": vertical,
            "step_scale": step_scale,
            "retract": retract,
            "additive": additive,
        }
        self._stacks: list[Stack] = []
        self._built: list[tuple[Sequence[int], list[Gauge]]] = []
        self._placed: list[tuple[Tensor, torch.device]] = []
        self._ready = False
        self.compiled = compiled
        super().__init__(listed(params, type(self).__name__), defaults)
        self._build(range(len(self.param_groups)), gauges)
        self._ready = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim``; parameters that come after construction are under no gauge.

        They may come without names, as Lightning's callbacks add them that unfreeze layers.
        """
        check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(prepared(param_group, self.param_groups))
        if self._ready:
            self._build([len(self.param_groups) - 1], ())

    def _build(self, group_indices: Sequence[int], gauges: Iterable[Gauge]) -> None:
        """Plan, stack and allocate the state of these groups."""
        gauges = list(gauges)
        self._built.append((group_indices, gauges))
        groups = [self.param_groups[index] for index in group_indices]
        if gauges and not all("param_names" in group for group in groups):
            raise ValueError(
                "gauges name parameters: pass model.named_parameters(), not parameters()"
            )
        indexed = list(zip(group_indices, groups, strict=True))
        given = [name for index, group in indexed for name in names_of(group, index)]
        places = [(param, index) for index, group in indexed for param in group["params"]]
        params: dict[str, Tensor] = {}
        group_of: dict[str, int] = {}
        for name, (param, index) in zip(
            plain_names(given, names_under(gauges)), places, strict=True
        ):
            if is_plain(param):  # frozen quantised weights are left alone
                params[name], group_of[name] = param, index
        for stack in self._stacks_of(params, group_of, gauges):
            self.state.update(stack.states())
            self._stacks.append(stack)
        device = next(
            (param.device for group in self.param_groups for param in group["params"]),
            torch.device("cpu"),
        )
        self._advance, self._norm = Arithmetic(advance, device), Arithmetic(invariant_norm, device)
        self._placed = [
            (param, param.device) for group in self.param_groups for param in group["params"]
        ]
        self._check_groups()

    def _follow_parameters(self) -> None:
        """Go with what was done to the groups elsewhere: parameters moved to another device, groups
        put beside them.

        Raises:
            ValueError: they hold other parameters than the optimizer was made for.
        """
        if torch.compiler.is_compiling():
            return
        params = [param for group in self.param_groups for param in group["params"]]
        if any(
            param is not mine
            for param, (mine, _) in zip_longest(params, self._placed, fillvalue=(None, None))
        ):
            self._build_groups_put_beside(params)
        if any(param.device != device for param, device in self._placed):
            before = self.state
            built, self._built, self._stacks, self._ready = self._built, [], [], False
            self.state = defaultdict(dict)
            for group_indices, gauges in built:
                self._build(group_indices, gauges)
                self._ready = True
            for param, state in self.state.items():
                for key, value in state.items():
                    if not before[param][key].is_meta:
                        restore_(value, before[param][key])

    def _build_groups_put_beside(self, params: Sequence[Tensor]) -> None:
        """Build the groups that were put beside the others, as Lightning does where it resumes."""
        first = sum(len(indices) for indices, _ in self._built)
        known = sum(len(group["params"]) for group in self.param_groups[:first])
        if known != len(self._placed) or any(
            p is not mine for p, (mine, _) in zip(params, self._placed, strict=False)
        ):
            raise ValueError(
                "param_groups hold other parameters than those that the optimizer was made for:"
                " make it anew, after whatever changed them, or add groups by add_param_group"
            )
        self._build(range(first, len(self.param_groups)), ())

    def _stacks_of(
        self, params: dict[str, Tensor], group_of: dict[str, int], gauges: list[Gauge]
    ) -> list[Stack]:
        """The stacks that together step these parameters, in the order in which they step."""
        return Builder(params, group_of, self.param_groups).stacks(make_plan(params, gauges))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step; returns the loss of ``closure`` where there is one."""
        loss = loss_of(closure)
        self._follow_parameters()
        self._check_groups()
        if any(param.is_meta for param, _ in self._placed):
            for name, (param, _) in zip(parameter_names(self), self._placed, strict=True):
                check_has_values(name, param)
        whole = self._in_one_go()
        rates = [Rates.of(group, self.compiled) for group in self.param_groups]
        self._advance(whole, self._stacks, self._settings(), rates, self.compiled and not whole)
        return loss

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Norm of the gradient in the gauge-invariant metric, for clipping.

        The Euclidean norm depends on the gauge, so that clipping by it would undo equivariance.
        This one measures each block of weights relative to its step scale; at the 1/√fan_in
        initialisation the two about agree, and thresholds carry over. Use with
        ``torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, optimizer.grad_norm())``.

        It is inf or nan where a gradient is, and inf where squares overflow. As with torch's own
        norm, clipping by nan makes every gradient nan, and by inf zero (nan where it was inf). A
        GradScaler skips such a step; without one, look at the norm first if you want an error:
        torch's ``error_if_nonfinite`` waits for the device in the same way.
        """
        self._follow_parameters()
        whole = self._in_one_go()
        norm: Tensor = self._norm(
            whole, self._stacks, self._settings(), self.compiled and not whole
        )
        return norm

    def _settings(self) -> list[Group]:
        """:attr:`settings` of each group; a compiled step must not see numbers, which may change at
        every step.
        """
        groups = [
            {key: value for key, value in group.items() if key in self.settings}
            for group in self.param_groups
        ]
        if not self.compiled:
            return groups
        return [{key: as_tensors(value) for key, value in group.items()} for group in groups]

    def _in_one_go(self) -> bool:
        """Whether to compile all of a step as one function: each stack is taken at once, and no
        gradient is missing.
        """
        return self.compiled and all(
            stack.single_chunk
            and all(
                p.compilable and all(param.grad is not None for param in p.params)
                for p in stack.parameters
            )
            for stack in self._stacks
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, copying it into the buffers that exist, in their dtype and on their device.

        Parameters are matched by name where optimizer and state have names
        (:func:`ddc.optim.saved.in_own_order`). Where a state is refused, the optimizer is as it
        was. If parameters have moved to another device since, the state follows them, here and in
        ``step``: so an optimizer made for a model on the CPU works in the Trainer of transformers,
        which moves the model and then has accelerate load the optimizer's own state.

        Raises:
            ValueError: the state was saved by another optimizer, with other gauges or of other
                parameters.
        """
        self._follow_parameters()
        saved, own = in_own_order(self, state_dict), self.state
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        states = [saved["state"].get(each, {}) for each in saved_ids(saved["param_groups"])]
        for name, param, state in zip(parameter_names(self), params, states, strict=True):
            check_shapes(name, state, own.get(param, {}))
        with as_it_was_if_refused(self):
            super().load_state_dict({**saved, "state": {}})
            self.state = own
            for group in self.param_groups:
                check_hyperparameters(group)
            self._check_agreement()
        for param, state in zip(params, states, strict=True):
            for key, value in own.get(param, {}).items():
                restore_(value, torch.as_tensor(state[key]))

    def __getstate__(self) -> dict[str, Any]:
        names = ("_gauges", "_hidden", "compiled", "_advance", "_norm", "_placed")
        own = {key: value for key, value in vars(self).items() if key in names}
        return {
            **super().__getstate__(),
            "_stacks": self._stacks,
            "_built": self._built,
            "_ready": True,
            **own,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in ``torch.optim``: states that were saved before a hyperparameter came have its
        default.
        """
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("additive", False)

    def _check_groups(self) -> None:
        """Parameters under one gauge must share what the step shares; and gradients must be
        dense.
        """
        self._check_agreement()
        for stack in self._stacks:
            for p in stack.parameters:
                if any(param.grad is not None and param.grad.is_sparse for param in p.params):
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if isinstance(stack, PolarStack | ChainStack):
                check_frozen(stack, self._gauges_of)

    def _gauges_of(self, names: Iterable[str]) -> str:
        """The gauges that several of these parameters are under, for messages."""
        wanted = set(names)
        gauges = [gauge for _, gauges in self._built for gauge in gauges]
        return ", ".join(str(gauge) for gauge in gauges if len(wanted & set(gauge.parameters)) > 1)

    def _check_agreement(self) -> None:
        """Parameters under one gauge must share what the step shares."""
        for stack in self._stacks:
            indices = {index for p in stack.parameters for index in p.groups}
            if len(indices) > 1:
                first, *others = (self.param_groups[index] for index in sorted(indices))
                for other in others:
                    for key in stack.shared:
                        if first[key] is not other[key] and first[key] != other[key]:
                            names = [p.names[0] for p in stack.parameters]
                            raise ValueError(
                                f"param groups disagree in {key} ({first[key]} and {other[key]})"
                                f" over parameters under one gauge: {', '.join(names)}. Put them in"
                                f" one group or leave the gauge out ({self._gauges_of(names)})"
                            )


def advance(
    stacks: Sequence[Stack], groups: list[Group], rates: list[Rates], compiled: bool
) -> None:
    """One step of all stacks, each of which may read the norms of those before it."""
    context = Context(groups, rates, compiled)
    for stack in stacks:
        stack.step(context)


def invariant_norm(stacks: Sequence[Stack], groups: list[Group], compiled: bool) -> Tensor:
    """:meth:`DDCAdam.grad_norm`."""
    # it does not depend on them
    context = Context(groups, [Rates(0.0, 1.0)] * len(groups), compiled)
    terms = [stack.grad_norm_squared(context) for stack in stacks] or [torch.zeros(())]
    return torch.stack([term.to(terms[0]) for term in terms]).sum().sqrt()


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a hyperparameter out of range."""
    check_ranges(group)
    if group["additive"] and group["retract"]:
        raise ValueError(
            "Invalid retract=True with additive=True: what is added is not retracted; set"
            " retract=False"
        )


def check_frozen(stack: PolarStack | ChainStack, gauges_of: Callable[[Iterable[str]], str]) -> None:
    """Raise ValueError where a parameter is frozen, and others that a gauge ties it to are not.

    ``gauges_of`` gives the gauges of some parameters, for the message.
    """
    named = [list(zip(p.names, p.params, strict=True)) for p in stack.parameters]
    tied = (
        zip(*named, strict=True)
        if isinstance(stack, PolarStack)
        else [list(chain.from_iterable(named))]
    )
    for layer in tied:
        if any(param.grad is not None for _, param in layer):
            for name, param in layer:
                if param.grad is None and not param.requires_grad:
                    raise ValueError(
                        f"{name!r} was frozen after the optimizer was made, but would move with"
                        f" what shares its gauge ({gauges_of(each for each, _ in layer)}). Freeze"
                        " that too, or make the optimizer anew without the gauge"
                    )


def check_not_zero(params: Mapping[str, Tensor], why: str, otherwise: str) -> None:
    """Raise ValueError if parameters that cannot leave zero, and could without gauges, are all
    zero.
    """
    if not any(is_fake(param) or bool(whole(param.detach().any())) for param in params.values()):
        names = " and ".join(map(repr, params))
        raise ValueError(
            f"{names}: all zero, and {why}, so would stay zero. Initialise at random, or"
            f" {otherwise}"
        )


class Builder:
    """Makes stacks of a plan: what has equal roles, shapes and param groups is stacked.

    ``place`` says where the norms of each gauge are found in a step: its stack, and which layer of
    it.
    """

    def __init__(
        self, params: dict[str, Tensor], group_of: dict[str, int], groups: list[dict[str, Any]]
    ) -> None:
        self.params, self.group_of, self.groups = params, group_of, groups
        self.place: dict[Rescale, tuple[Dresser, int]] = {}

    def stacks(self, plan: Plan) -> list[Stack]:
        """All stacks of a plan without hidden matrices."""
        return [*self.polar(plan.polar), *self.chains(plan.chains), *self.free(plan.free)]

    def polar(self, plans: list[PolarPlan]) -> list[PolarStack]:
        """Stacks of rescale gauges, in the order of their levels."""
        stacks = []
        for plan in plans:
            self._check_sides(plan)
        for level in sorted({plan.level for plan in plans}):
            alike: dict[object, list[PolarPlan]] = {}
            for plan in plans:
                if plan.level == level:
                    alike.setdefault(self._polar_key(plan), []).append(plan)
            for members in alike.values():
                group = self.groups[self.group_of[members[0].plus[0].name]]
                stack = PolarStack(
                    members[0].gauge.degree,
                    [
                        self.stack(roles)
                        for roles in zip(*(plan.plus for plan in members), strict=True)
                    ],
                    [
                        self.stack(roles)
                        for roles in zip(*(plan.minus for plan in members), strict=True)
                    ],
                    [
                        self.stack(roles)
                        for roles in zip(*(plan.dressed for plan in members), strict=True)
                    ],
                    vertical=group["vertical"] == "adam",
                )
                self.place.update(
                    {plan.gauge: (stack, layer) for layer, plan in enumerate(members)}
                )
                stacks.append(stack)
        return stacks

    def chains(self, plans: list[ChainPlan]) -> list[ChainStack]:
        """Stacks of chains, but of those that are all hidden."""
        stacks = []
        for plan in plans:
            if plan.layers:
                group = self.groups[self.group_of[plan.layers[0].name]]
                for role in plan.layers:
                    why = f"under {plan.gauge} its norm moves by multiplication"
                    check_not_zero({role.name: self.params[role.name]}, why, "leave the gauge out")
                alike: dict[object, list[Role]] = {}
                for role in plan.layers:
                    alike.setdefault(self._role_key(role), []).append(role)
                layers = [self.stack(tuple(roles)) for roles in alike.values()]
                stacks.append(ChainStack(layers, plan.still, vertical=group["vertical"] == "adam"))
        return stacks

    def free(self, roles: list[Role]) -> list[FreeStack]:
        """Stacks of parameters that no rescale decomposes."""
        alike: dict[object, list[Role]] = {}
        for role in roles:
            alike.setdefault(self._role_key(role), []).append(role)
        return [FreeStack(self.stack(tuple(members))) for members in alike.values()]

    def stack(self, roles: tuple[Role, ...]) -> StackedParameter:
        """Parameters of equal roles as one."""
        names = [role.name for role in roles]
        params = [self.params[name] for name in names]
        dressed_by = None
        sources = [self.place[role.dressing.gauge] for role in roles if role.dressing is not None]
        if sources:
            layers = [layer for _, layer in sources]
            index = (
                None
                if layers == [*range(len(layers))]
                else torch.tensor(layers, device=params[0].device)
            )
            dressed_by = (sources[0][0], index)
        return StackedParameter(
            roles[0], names, params, [self.group_of[name] for name in names], dressed_by
        )

    def _kind(self, name: str) -> tuple[object, ...]:
        param = self.params[name]
        return (
            tuple(param.shape),
            param.dtype,
            param.device,
            shards_of(param).layout,
            self.group_of[name],
        )

    def _check_sides(self, plan: PolarPlan) -> None:
        """Raise ValueError for a side that is zero and has no way out: one entry a unit, or no
        other side to go by.
        """
        for side in (plan.plus, plan.minus):
            params = {role.name: self.params[role.name] for role in side}
            single = sum(param.numel() for param in params.values()) == plan.gauge.units(
                self.params
            )
            if side and (single or not plan.minus):
                why = f"under {plan.gauge} its norms move by multiplication"
                check_not_zero(params, why, "leave the gauge out")

    def _role_key(self, role: Role) -> object:
        dressing = role.dressing and (
            id(self.place[role.dressing.gauge][0]),
            role.dressing.axis,
            role.dressing.degree,
        )
        averaging = role.averaging and role.averaging.signature
        kind = self._kind(role.name)
        return kind, role.axis, role.centred, averaging, dressing

    def _polar_key(self, plan: PolarPlan) -> object:
        sides = (tuple(self._role_key(role) for role in side) for side in (plan.plus, plan.minus))
        dressed = tuple(self._role_key(role) for role in plan.dressed)
        return plan.gauge.degree, *sides, dressed
