"""Two optimizers as one: plain Muon for hidden matrices, AdamW for the rest."""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ddc.optim.closure import loss_of


class JoinedState(ChainMap[Any, Any]):
    """States of several optimizers as one; they are defaultdicts, which must not make an entry when
    they are asked.
    """

    def __getitem__(self, key: Any) -> Any:
        for state in self.maps:
            if key in state:
                return state[key]
        raise KeyError(key)


class CombinedOptimizer(Optimizer):
    """Steps several optimizers over disjoint parameters; groups and state are theirs, one after the
    other.

    Args:
        parts: the optimizers; their hyperparameters are changed through ``param_groups`` as ever.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Groups and state as those of the parts have them now."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = JoinedState(*(part.state for part in self.parts))  # type: ignore[assignment]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each part; returns the loss of ``closure`` where there is one."""
        loss = loss_of(closure)
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave. Where one part refuses its state, all are as they
        were.

        Raises:
            ValueError: it was saved by another kind of optimizer, or does not fit the parameters.
        """
        if len(state_dict.get("parts", ())) != len(self.parts):
            raise ValueError("the saved state is not of a combined optimizer with as many parts")
        before = [copy.deepcopy(part.state_dict()) for part in self.parts]
        loaded = 0
        try:
            for part, state in zip(self.parts, state_dict["parts"], strict=True):
                part.load_state_dict(state)
                loaded += 1
        except Exception:
            for part, state in zip(self.parts[:loaded], before, strict=False):
                part.load_state_dict(state)
            raise
        finally:
            self._join()
