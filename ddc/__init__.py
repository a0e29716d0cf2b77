"""Gauge-equivariant optimizers for PyTorch, and the harness that tests the paper's claims about
them.
"""

from ddc.gauges import find_gauges, hidden_matrices
from ddc.optim import DDCSGD, DDCAdam, DDCLion, DDCMuon, DDCShampoo, grad_norm

__all__ = [
    "DDCSGD",
    "DDCAdam",
    "DDCLion",
    "DDCMuon",
    "DDCShampoo",
    "find_gauges",
    "grad_norm",
    "hidden_matrices",
]
__version__ = "0.1.0"
