"""What every optimizer of this package asks of its parameters, and how it calls those that have no
name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ddc.gauges import is_split, plain_name
from ddc.optim.sharding import shards_of


def listed(params: Iterable[Any], optimizer: str) -> list[Any]:
    """What an optimizer of this name is given, as a list.

    Raises:
        TypeError: it is a model.
        ValueError: there is nothing in it.
    """
    if isinstance(params, nn.Module):
        raise TypeError(f"{optimizer} takes parameters, not a model: pass model.named_parameters()")
    given = [params] if isinstance(params, Tensor) else list(params)
    if not given:
        raise ValueError(
            f"{optimizer} got no parameters: the model has none (quantised modules of torch.ao keep"
            " theirs elsewhere), or what gave them was used up before. Pass"
            " model.named_parameters() of a model that has some"
        )
    return given


def prepared(group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A param group that is to be added to others: checked, and with names where they have names.

    Parameters that come without, as callbacks add them that unfreeze layers, are called by their
    place.

    Raises:
        ValueError: a parameter that cannot be trained, or two of one name.
    """
    given = group["params"]
    if isinstance(given, set):
        return group  # which torch refuses
    pairs = [each if isinstance(each, tuple) else (None, each) for each in listed_group(given)]
    names: list[Any] = [name for name, _ in pairs]
    params = [param for _, param in pairs]
    if len(unnamed := [i for i, name in enumerate(names) if name is None]) == len(names):
        names = list(group.get("param_names", ()))
    elif unnamed:
        raise ValueError(
            f"parameter {unnamed[0]} of param group {len(groups)} has no name, and others of it"
            " have: pass all as pairs, as model.named_parameters() gives them"
        )
    others = [each for each in groups if each["params"]]
    if any("param_names" in each for each in others) and not names:
        names = names_of({"params": params}, len(groups))
    elif names and not all("param_names" in each for each in others):
        raise ValueError(
            f"the parameters of param group {len(groups)} have names ({names[0]!r}), those of the"
            " groups before have not: pass named_parameters() for all groups, or for none"
        )
    check_names(names, others)
    for name, param in zip(names or names_of({"params": params}, len(groups)), params, strict=True):
        if isinstance(param, Tensor):  # torch says it, where it is something else
            check_parameter(name, param)
    if names or any("param_names" in each for each in others):
        for each in groups:
            each.setdefault("param_names", [])  # of a group without parameters
        return {**group, "params": params, "param_names": names}
    return {**group, "params": params}


def listed_group(given: Any) -> list[Any]:
    """The parameters of one param group."""
    return [given] if isinstance(given, Tensor) else list(given)


def names_of(group: dict[str, Any], index: int) -> list[str]:
    """What the parameters of a param group, of this index, are called; by their place where they
    have no names.
    """
    return group.get("param_names") or [
        f"group {index}, parameter {i}" for i in range(len(group["params"]))
    ]


def names_under(gauges: Iterable[Any]) -> set[str]:
    """Names of all parameters under some gauges; what is no gauge, which is refused later, has
    none.
    """
    return {name for gauge in gauges for name in getattr(gauge, "parameters", ())}


def check_names(names: Iterable[str], groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for two parameters of one name, of which a step would move one alone."""
    seen = {plain_name(name): name for group in groups for name in group.get("param_names", ())}
    for name in names:
        if (plain := plain_name(name)) in seen:
            raise ValueError(
                f"two parameters are called {plain!r} (given as {seen[plain]!r} and {name!r}): give"
                " each a name of its own, as named_parameters() of the whole model does"
            )
        seen[plain] = name


def check_parameter(name: str, param: Tensor) -> None:
    """Raise ValueError for a parameter that should be trained, and that no step can move."""
    if not param.requires_grad and not is_plain(param):
        return  # is left alone
    if not is_plain(param):
        raise ValueError(
            f"{name!r} is a {type(param).__name__}, which keeps its values in another form"
            " (quantised, say): steps move plain tensors. Leave it to the optimizer of that"
            " library, and pass the others alone"
        )
    if param.is_complex() and (is_split(param) or param.is_conj()):
        how = "split over ranks" if is_split(param) else "a conjugated view"
        raise ValueError(
            f"{name!r} is complex and {how}: only whole complex tensors are stepped. Hold its real"
            " and imaginary part as a real parameter (torch.view_as_real)"
        )
    try:
        shards_of(param)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def is_plain(param: Tensor) -> bool:
    """Whether the values of a parameter are its own real or complex numbers; those of quantised
    ones are not.
    """
    wrapped: bool = is_traceable_wrapper_subclass(param)
    return (is_split(param) or not wrapped) and (param.is_floating_point() or param.is_complex())


def check_has_values(name: str, param: Tensor) -> None:
    """Raise ValueError for a parameter that a model was left with when it got its values."""
    if param.is_meta and param.grad is None:
        raise ValueError(
            f"{name!r} is on the meta device, without values and without a gradient: the model got"
            " its own values (to_empty, say) in other tensors. Make the optimizer after that"
        )


def compute_dtype(param: Tensor) -> torch.dtype:
    """State and arithmetic are in float32 for lower precisions, else in the parameter's own dtype
    (or its parts').
    """
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32
