"""Gauge-equivariant optimizers for PyTorch."""

from ddc.gauges import (
    audit,
    canonicalise_,
    certify,
    check,
    find_gauges,
    hidden_matrices,
    param_groups,
    parameter_roles,
)
from ddc.optim import (
    DDCSGD,
    DDCAdam,
    DDCLion,
    DDCMuon,
    DDCShampoo,
    InvariantClipping,
    clip_grad_norm_,
    grad_norm,
)

__all__ = [
    "DDCSGD",
    "DDCAdam",
    "DDCLion",
    "DDCMuon",
    "DDCShampoo",
    "InvariantClipping",
    "audit",
    "canonicalise_",
    "certify",
    "check",
    "clip_grad_norm_",
    "find_gauges",
    "grad_norm",
    "hidden_matrices",
    "param_groups",
    "parameter_roles",
]
__version__ = "0.1.0"
