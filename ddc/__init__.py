"""Gauge-equivariant optimizers for PyTorch, and the harness that tests the paper's claims about
them.
"""

from ddc.gauges import certify, check, find_gauges, hidden_matrices
from ddc.optim import DDCAdam, DDCMuon, grad_norm

__all__ = [
    "DDCAdam",
    "DDCMuon",
    "certify",
    "check",
    "find_gauges",
    "grad_norm",
    "hidden_matrices",
]
__version__ = "0.1.0"
