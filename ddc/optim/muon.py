"""Muon without gauges: the baseline of DDCMuon."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddc.optim.closure import loss_of
from ddc.optim.orthogonal import ORTHOGONALIZERS
from ddc.optim.parameters import (
    check_has_values,
    compute_dtype,
    is_plain,
    listed,
    names_of,
    prepared,
)
from ddc.optim.ranges import ADJUSTMENTS, check_ranges
from ddc.optim.saved import (
    as_it_was_if_refused,
    check_shapes,
    in_own_order,
    parameter_names,
    saved_ids,
)
from ddc.optim.sharding import restore_, shards_of


def check_matrix(name: str, param: Tensor) -> None:
    """Raise ValueError unless a parameter is a matrix of real numbers."""
    if param.ndim != 2 or not is_plain(param) or param.is_complex():
        raise ValueError(
            f"Muon takes matrices of real numbers; {name!r} has shape {tuple(param.shape)} and"
            f" {param.dtype}. Give it to AdamW"
        )


def zero_state(param: Tensor) -> dict[str, Tensor]:
    """The state of a matrix before the first step."""
    return {"momentum_buffer": torch.zeros_like(param, dtype=compute_dtype(param))}


class Muon(Optimizer):
    r"""``torch.optim.Muon`` with a choice of orthogonaliser, matrices of one shape taken together.

    .. math::
        m \leftarrow \mu m + (1 - \mu) g, \qquad
        W \leftarrow (1 - \eta \lambda) W - \eta\, a\, \mathrm{orth}(\mu m + (1 - \mu) g)

    torch's orthogonalises in bfloat16 only, which many CPUs emulate.

    Args:
        params: matrices, their names and tensors, or param groups of them.
        lr, weight_decay, momentum, nesterov: as of ``torch.optim.Muon``.
        adjust_lr_fn: a for a matrix of shape (rows, columns): ``original``, √max(1, rows/columns),
            or ``match_rms_adamw``, 0.2 √max(rows, columns) (Moonlight's, arXiv:2502.16982).
        orthogonalizer: as of :class:`ddc.DDCMuon`.

    Raises:
        ValueError: a hyperparameter out of range, or a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str = "original",
        orthogonalizer: str = "newton_schulz",
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn, "orthogonalizer": orthogonalizer,
        }  # fmt: skip
        super().__init__(listed(params, type(self).__name__), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim``; state is made at once."""
        check_ranges({**self.defaults, **param_group})
        group = prepared(param_group, self.param_groups)
        for name, param in zip(
            names_of(group, len(self.param_groups)), group["params"], strict=True
        ):
            check_matrix(name, param)
        super().add_param_group(group)
        self.state.update({param: zero_state(param) for param in self.param_groups[-1]["params"]})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`ddc.DDCAdam.load_state_dict`; momentum stays in float32 where weights are in
        less.

        Raises:
            ValueError: the state was saved by another optimizer or of other parameters.
        """
        saved = in_own_order(self, state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        states = [saved["state"].get(i, {}) for i in saved_ids(saved["param_groups"])]
        for name, param, state in zip(parameter_names(self), params, states, strict=True):
            check_shapes(name, state, {"momentum_buffer": param.shape})
        with as_it_was_if_refused(self):
            super().load_state_dict({**saved, "state": {}})
            for group in self.param_groups:
                check_ranges(group)
            self.state.update({param: zero_state(param) for param in params})
            for param, state in zip(params, states, strict=True):
                restore_(self.state[param]["momentum_buffer"], state["momentum_buffer"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the loss of ``closure`` where there is one."""
        loss = loss_of(closure)
        for name, param in zip(parameter_names(self), list(self.state), strict=True):
            check_has_values(name, param)
            if self.state[param]["momentum_buffer"].device != param.device:  # it was moved since
                moved = zero_state(param)
                if not self.state[param]["momentum_buffer"].is_meta:
                    restore_(moved["momentum_buffer"], self.state[param]["momentum_buffer"])
                self.state[param] = moved
        for group in self.param_groups:
            alike: dict[object, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    layout = shards_of(param).layout
                    alike.setdefault((param.shape, param.dtype, param.device, layout), []).append(
                        param
                    )
            for params in alike.values():
                self._step(params, group)
        return loss

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        shards = shards_of(params[0])
        buffers = [shards.local(self.state[param]["momentum_buffer"]) for param in params]
        grads = [
            shards.local(param.grad).to(buffers[0].dtype)
            for param in params
            if param.grad is not None
        ]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        momentum = torch.stack(buffers)
        mixed = (
            torch.stack(grads).lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        )
        updates = shards.on_whole(ORTHOGONALIZERS[group["orthogonalizer"]], mixed)
        rate = group["lr"] * ADJUSTMENTS[group["adjust_lr_fn"]](*params[0].shape)
        weights = [shards.local(param) for param in params]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates.to(params[0].dtype)), alpha=-rate)
