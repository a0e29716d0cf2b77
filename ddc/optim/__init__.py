"""How a step respects a gauge: orbit decomposition, DDCAdam, DDCMuon."""

from ddc.optim.clipping import grad_norm
from ddc.optim.ddcadam import DDCAdam
from ddc.optim.ddcmuon import DDCMuon

__all__ = ["DDCAdam", "DDCMuon", "grad_norm"]
