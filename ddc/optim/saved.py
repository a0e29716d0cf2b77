"""Loading what an optimizer saved: by name where there are names, and all of it or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddc.gauges import plain_names
from ddc.optim.parameters import names_of

Group = dict[str, Any]


@contextlib.contextmanager
def as_it_was_if_refused(optimizer: Optimizer) -> Iterator[None]:
    """Give an optimizer back the groups and the state that it had, where what follows raises and
    wrote to neither.
    """
    groups, state = optimizer.param_groups, optimizer.state
    try:
        yield
    except Exception:
        optimizer.param_groups, optimizer.state = groups, state
        raise


def in_own_order(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state with groups and parameters as an optimizer has them, matched by name where both
    have names.

    Names are compared as the unwrapped model has them. A group's hyperparameters are those of the
    saved group that its parameters were in; what that does not have stays. Where one side has no
    names, the position counts, as in torch.

    Raises:
        ValueError: other parameters, or other groups of them.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        keys = sorted(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(
            f"the state of a {type(optimizer).__name__} has 'state' and 'param_groups'; this has"
            f" {keys}"
        )
    own, theirs = optimizer.param_groups, saved["param_groups"]
    match = by_name if has_names(own) and has_names(theirs) else by_position
    return {**saved, "param_groups": match(own, theirs)}


def has_names(groups: Iterable[Group]) -> bool:
    """Whether all parameters have names."""
    return all("param_names" in group for group in groups if group["params"])


def unwrapped_names(groups: Iterable[Group]) -> list[str]:
    """Names of the parameters of all groups, as the unwrapped model has them."""
    return plain_names([name for group in groups for name in group.get("param_names", ())])


def settings(group: Group) -> Group:
    """The hyperparameters of a group."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def by_position(own: Sequence[Group], theirs: Sequence[Group]) -> list[Group]:
    """The saved groups, completed by the own hyperparameters that they lack."""
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (own, theirs))
    if sizes != saved_sizes:
        raise ValueError(
            f"the saved state has param groups of {saved_sizes} parameters, this optimizer of"
            f" {sizes}: make the same groups of the same parameters, named ones"
            " (named_parameters()) in any order"
        )
    return [{**mine, **its} for mine, its in zip(own, theirs, strict=True)]


def by_name(own: Sequence[Group], theirs: Sequence[Group]) -> list[Group]:
    """Groups like the own ones, with what was saved of their parameters."""
    saved_names, own_names = iter(unwrapped_names(theirs)), iter(unwrapped_names(own))
    home = {
        next(saved_names): (index, saved_id)
        for index, group in enumerate(theirs)
        for saved_id in group["params"]
    }
    names = [[next(own_names) for _ in group["params"]] for group in own]
    check_same(list(chain.from_iterable(names)), list(home))
    sources = [sorted({home[name][0] for name in group}) for group in names]
    for group, indices in zip(names, sources, strict=True):
        check_agree(
            [theirs[i] for i in indices],
            f"{listing(group)}, which are one group here, were saved in groups that",
        )
    for index, saved in enumerate(theirs):
        mine = [own[i] for i, indices in enumerate(sources) if index in indices]
        check_agree(
            mine,
            f"{listing(saved.get('param_names', ()))}, which were saved as one group, are in groups"
            " here that",
        )
    return [
        {
            **mine,
            **(settings(theirs[indices[0]]) if indices else {}),
            "params": [home[name][1] for name in group],
        }
        for mine, group, indices in zip(own, names, sources, strict=True)
    ]


def check_same(own: Sequence[str], saved: Sequence[str]) -> None:
    """Raise ValueError unless there is a saved state of each parameter, and of no other."""
    lacking, unknown = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if lacking or unknown:
        wrong = [f"it lacks {listing(lacking)}"] * bool(lacking)
        wrong += [f"it has {listing(unknown)}, which this optimizer has not"] * bool(unknown)
        raise ValueError(
            f"the saved state is of other parameters: {'; '.join(wrong)}. Load the state of an"
            " optimizer over the same parameters"
        )


def check_agree(groups: Sequence[Group], what: str) -> None:
    """Raise ValueError if groups that are split or joined have different hyperparameters."""
    for key in settings(groups[0]) if groups else ():
        values = [group.get(key) for group in groups]
        if any(value is not values[0] and value != values[0] for value in values):
            raise ValueError(
                f"{what} differ in {key} ({', '.join(map(str, values))}): make the param groups as"
                " they were saved"
            )


def listing(names: Sequence[str], most: int = 4) -> str:
    """Names in a message, the first few of many."""
    return ", ".join(map(repr, names[:most])) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def check_shapes(
    name: object, saved: Mapping[str, Any], own: Mapping[str, Tensor | Sequence[int]]
) -> None:
    """Raise ValueError unless a parameter's saved state has what its own has, of the same
    shapes.
    """
    shapes, saved_shapes = (
        {key: shape_of(value) for key, value in each.items()} for each in (own, saved)
    )
    if shapes != saved_shapes:
        raise ValueError(
            f"the saved state of parameter {name!r} is {saved_shapes}, this optimizer's is"
            f" {shapes}: it was saved with other gauges, another vertical mode or another optimizer"
        )


def shape_of(value: Any) -> object:
    """The shape of what a state holds; of what is no number, its type."""
    if isinstance(value, Tensor | int | float | complex):
        return tuple(torch.as_tensor(value).shape)
    return tuple(value) if isinstance(value, torch.Size | tuple | list) else type(value).__name__


def parameter_names(optimizer: Optimizer) -> list[str]:
    """What messages call the parameters of an optimizer, in its order."""
    return [
        name
        for index, group in enumerate(optimizer.param_groups)
        for name in names_of(group, index)
    ]


def saved_ids(groups: Iterable[Group]) -> list[Any]:
    """The keys under which the parameters of saved groups have their state."""
    return list(chain.from_iterable(group["params"] for group in groups))
