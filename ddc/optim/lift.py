"""What lifts a base optimizer to the orbits of a model's gauges, whatever its rule."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, ClassVar, TypedDict, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddc.gauges import Gauge, plain_names
from ddc.gauges.parts import whole_name
from ddc.optim.build import Builder
from ddc.optim.closure import loss_of
from ddc.optim.compiled import Arithmetic, Hyper, as_tensors
from ddc.optim.parameters import check_has_values, is_plain, listed, names_of, names_under, prepared
from ddc.optim.parts import Cut, Views, cut
from ddc.optim.plan import check_exact, make_plan
from ddc.optim.ranges import check_ranges
from ddc.optim.rules import Rule
from ddc.optim.saved import (
    as_it_was_if_refused,
    check_shapes,
    in_own_order,
    parameter_names,
    saved_ids,
)
from ddc.optim.sections import Sections
from ddc.optim.sharding import restore_
from ddc.optim.stack import LIFT, Context, Stack

Params = Iterable[tuple[str, Tensor]] | Iterable[Tensor] | Iterable[dict[str, Any]]


class LiftOptions(TypedDict, total=False):
    """Keyword arguments of every lift; :class:`ddc.DDCAdam` documents them."""

    radial_rate: float
    vertical: str
    step_scale: str
    retract: bool
    additive: bool
    compiled: bool
    fused: bool
    approximate: bool


class Lift(Optimizer):
    """A base optimizer in the orbit decomposition of the gauges.

    Parameters are decomposed and dressed by role (:mod:`ddc.optim.plan`), stacked, and the rule is
    handed the invariant input of each; its direction is put back. All else about an optimizer is
    here: param groups, loading, copies, compiling, clipping. A subclass names its rule, and the
    defaults of its hyperparameters.

    Args:
        params: ``model.named_parameters()``, or param groups of such pairs.
        gauges: what :func:`ddc.find_gauges` returns, or any sequence of gauges.
        hyper: the defaults of ``lr``, ``weight_decay`` and the rule's settings.
        options: :class:`LiftOptions`.
    """

    #: What gives the directions.
    rule: ClassVar[Rule]
    #: Attributes that copies and pickles keep.
    kept: ClassVar[tuple[str, ...]] = (
        "compiled",
        "fused",
        "_stacks",
        "_sections",
        "_built",
        "_ready",
        "_advance",
        "_norm",
        "_placed",
        "_parts",
    )

    def __init__(
        self,
        params: Params,
        gauges: Iterable[Gauge],
        hyper: dict[str, Any],
        *,
        radial_rate: float = 1.0,
        vertical: str = "freeze",
        step_scale: str = "init",
        retract: bool = True,
        additive: bool = False,
        compiled: bool = False,
        fused: bool = True,
        approximate: bool = False,
    ) -> None:
        gauges = list(gauges)
        if not approximate:
            check_exact(gauges)
        defaults = {
            **hyper,
            "radial_rate": radial_rate,
            "vertical": vertical,
            "step_scale": step_scale,
            "retract": retract,
            "additive": additive,
        }
        self._stacks: list[Stack] = []
        self._parts = Views()
        self._sections: list[Sections] = []
        self._built: list[tuple[Sequence[int], list[Gauge]]] = []
        self._placed: list[tuple[Tensor, torch.device, torch.dtype]] = []
        self._ready = False
        self.compiled, self.fused = compiled, fused
        super().__init__(listed(params, type(self).__name__), defaults)
        self._build(range(len(self.param_groups)), gauges)
        self._ready = True

    @property
    def settings(self) -> tuple[str, ...]:
        """What a step reads of a param group, besides rate and decay."""
        return (*LIFT, *self.rule.settings)

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a hyperparameter out of range."""
        check_ranges(group)
        self.rule.check(group)
        if group["additive"] and group["retract"]:
            raise ValueError(
                "Invalid retract=True with additive=True: what is added is not retracted; set"
                " retract=False"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim``; parameters that come after construction are under no gauge.

        They may come without names, as Lightning's callbacks add them that unfreeze layers.
        """
        self.check({**self.defaults, **param_group})
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
        parts = self._cut(params, gauges)
        group_of = {
            name: group_of[name if name in params else whole_name(name)] for name in parts.params
        }
        self._parts.add(parts.views)
        for stack in self._stacks_of(parts, group_of):
            for param, state in self._parts.joined(stack.states()):
                self.state[param] |= state
            self._stacks.append(stack)
        if (sections := Sections(gauges, params)).gauges:
            self._sections.append(sections)
        device = next(
            (param.device for group in self.param_groups for param in group["params"]),
            torch.device("cpu"),
        )
        self._advance, self._norm = Arithmetic(advance, device), Arithmetic(invariant_norm, device)
        self._placed = [
            (param, param.device, param.dtype)
            for group in self.param_groups
            for param in group["params"]
        ]
        self._check_groups()

    def _follow_parameters(self) -> None:
        """Go with what was done to the groups elsewhere: parameters moved to another device or
        dtype, groups put beside them.

        Raises:
            ValueError: they hold other parameters than the optimizer was made for.
        """
        if torch.compiler.is_compiling():
            return
        params = [param for group in self.param_groups for param in group["params"]]
        if any(
            param is not mine
            for param, (mine, *_) in zip_longest(params, self._placed, fillvalue=(None, None))
        ):
            self._build_groups_put_beside(params)
        if any(p.device != device or p.dtype != dtype for p, device, dtype in self._placed):
            before = self.state
            built, self._built, self._parts = self._built, [], Views()
            self._stacks, self._sections, self._ready = [], [], False
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
            p is not mine for p, (mine, *_) in zip(params, self._placed, strict=False)
        ):
            raise ValueError(
                "param_groups hold other parameters than those that the optimizer was made for:"
                " make it anew, after whatever changed them, or add groups by add_param_group"
            )
        self._build(range(first, len(self.param_groups)), ())

    def _cut(self, params: dict[str, Tensor], gauges: list[Gauge]) -> Cut:
        """The parameters, with parts in the place of those of which gauges name parts."""
        return cut(params, gauges)

    def _stacks_of(self, parts: Cut, group_of: dict[str, int]) -> list[Stack]:
        """The stacks that together step these parameters, in the order in which they step."""
        plan = make_plan(parts.params, parts.gauges)
        return Builder(parts.params, group_of, self.param_groups, self.rule).stacks(plan)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step; returns the loss of ``closure`` where there is one."""
        loss = loss_of(closure)
        self._follow_parameters()
        with self._parts.followed():
            self._check_groups()
            if any(param.is_meta for param, *_ in self._placed):
                for name, (param, *_) in zip(parameter_names(self), self._placed, strict=True):
                    check_has_values(name, param)
            whole = self._in_one_go()
            compiled = self.compiled and not whole
            with self._at_sections() as grads:
                self._advance(whole, self._stacks, self._settings(), compiled, self._fuses, grads)
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
        with self._parts.followed():
            whole = self._in_one_go()
            compiled = self.compiled and not whole
            with self._at_sections(restore=True) as grads:
                norm: Tensor = self._norm(
                    whole, self._stacks, self._settings(), compiled, self._fuses, grads
                )
        return norm

    @property
    def _fuses(self) -> bool:
        """Whether kernels step what there are kernels for; a compiler makes its own."""
        return self.fused and not self.compiled

    @contextlib.contextmanager
    def _at_sections(self, restore: bool = False) -> Iterator[dict[Tensor, Tensor]]:
        """Within, weights are where gauges that add have nothing to add; gradients that differ
        there.
        """
        grads: dict[Tensor, Tensor] = {}
        with contextlib.ExitStack() as entered:
            for each in self._sections:
                entered.enter_context(each.entered(grads, restore))
            yield grads | self._parts.among(grads)

    def _settings(self) -> list[Hyper]:
        """What a step reads of each group: settings, rate and the factor of decay. A compiled step
        must not see numbers, which may change at every step.
        """
        groups = [
            {key: group[key] for key in self.settings if key in group}
            | {"lr": group["lr"], "decay": 1 - group["lr"] * group["weight_decay"]}
            for group in self.param_groups
        ]
        if not self.compiled:
            return groups
        return [{key: as_tensors(value) for key, value in group.items()} for group in groups]

    def _in_one_go(self) -> bool:
        """Whether to compile all of a step as one function: each stack is taken at once, and no
        gradient is missing.
        """
        return (
            self.compiled
            and not self._sections
            and all(
                stack.single_chunk
                and all(
                    p.compilable and all(param.grad is not None for param in p.params)
                    for p in stack.parameters
                )
                for stack in self._stacks
            )
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
        for i, (name, param) in enumerate(zip(parameter_names(self), params, strict=True)):
            mine = own.get(param, {})
            if states[i]:  # saved before what is waking was kept: nothing is
                since = {k: torch.zeros_like(v) for k, v in mine.items() if k.endswith("waking")}
                states[i] = {**since, **states[i]}
            check_shapes(name, states[i], mine)
        with as_it_was_if_refused(self):
            super().load_state_dict({**saved, "state": {}})
            self.state = own
            for group in self.param_groups:
                self.check(group)
            self._check_agreement()
        for param, state in zip(params, states, strict=True):
            for key, value in own.get(param, {}).items():
                restore_(value, torch.as_tensor(state[key]))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in self.kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in ``torch.optim``: states that were saved before a hyperparameter came have its
        default.
        """
        super().__setstate__(state)  # torch calls it in load_state_dict as well, with groups alone
        self.__dict__.setdefault("_sections", [])
        self.__dict__.setdefault("_parts", Views())
        self.__dict__.setdefault("fused", True)
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
            check_frozen(stack.tied(), self._gauges_of)
        for sections in self._sections:
            check_frozen(sections.tied(), self._gauges_of)

    def _gauges_of(self, names: Iterable[str]) -> str:
        """The gauges that several of these parameters are under, for messages."""
        wanted = {*map(whole_name, names)}  # parts have the gauges of what they are parts of
        gauges = [gauge for _, gauges in self._built for gauge in gauges]
        return ", ".join(str(gauge) for gauge in gauges if len(wanted & {*gauge.parameters}) > 1)

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
    stacks: Sequence[Stack],
    groups: list[Hyper],
    compiled: bool,
    fused: bool,
    grads: dict[Tensor, Tensor],
) -> None:
    """One step of all stacks, each of which may read the norms of those before it."""
    context = Context(groups, compiled, fused, grads)
    for stack in stacks:
        stack.step(context)


def invariant_norm(
    stacks: Sequence[Stack],
    groups: list[Hyper],
    compiled: bool,
    fused: bool,
    grads: dict[Tensor, Tensor],
) -> Tensor:
    """:meth:`Lift.grad_norm`."""
    context = Context(groups, compiled, fused, grads)
    terms = [stack.grad_norm_squared(context) for stack in stacks] or [torch.zeros(())]
    return torch.stack([term.to(terms[0]) for term in terms]).sum().sqrt()


def check_frozen(
    tied: Iterable[Sequence[tuple[str, Tensor]]], gauges_of: Callable[[Iterable[str]], str]
) -> None:
    """Raise ValueError where a parameter is frozen, and others that a gauge ties it to are not.

    Args:
        tied: parameters, with their names, that gauges move together.
        gauges_of: the gauges of some parameters, for the message.
    """
    for together in tied:
        if any(param.grad is not None for _, param in together):
            for name, param in together:
                if param.grad is None and not param.requires_grad:
                    raise ValueError(
                        f"{name!r} was frozen after the optimizer was made, but would move with"
                        f" what shares its gauge ({gauges_of(each for each, _ in together)})."
                        " Freeze that too, or make the optimizer anew without the gauge"
                    )
