"""Gauge-equivariant optimizers for PyTorch."""

from ddc.gauges import audit, canonicalise_, certify, check, find_gauges, hidden_matrices
from ddc.optim import DDCSGD, DDCAdam, DDCLion, DDCMuon, DDCShampoo, grad_norm

__all__ = [
    "DDCSGD",
    "DDCAdam",
    "DDCLion",
    "DDCMuon",
    "DDCShampoo",
    "audit",
    "canonicalise_",
    "certify",
    "check",
    "find_gauges",
    "grad_norm",
    "hidden_matrices",
]
__version__ = "0.1.0"
