"""An optimizer's step in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.gpu.record import NotHere


class InGraph(Optimizer):
    """An optimizer whose step is captured once and replayed: gradients have places that stay, and
    rates are those of the capture.

    Args:
        optimizer: steps :data:`WARM` times, uncaptured, on the gradients as they are, or zero.

    Raises:
        NotHere: there is no CUDA.
    """

    #: Steps before the capture, which make what is made once.
    WARM = 3

    def __init__(self, optimizer: Optimizer) -> None:
        if not torch.cuda.is_available():
            raise NotHere("CUDA graphs need a GPU")
        self.captured = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters
        ]
        self.place_gradients()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            optimizer.step()

    def place_gradients(self) -> None:
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeros, in the places that the graph reads."""
        self.place_gradients()
        torch._foreach_zero_(self.gradients)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Replay it."""
        self.graph.replay()
