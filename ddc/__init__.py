"""Gauge-equivariant optimizers for PyTorch, and the harness that tests the paper's claims about them."""

from ddc.gauges import find_gauges
from ddc.optim import DDCAdam

__all__ = ["DDCAdam", "find_gauges"]
__version__ = "0.1.0"
