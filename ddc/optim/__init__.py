"""How a step respects a gauge: the orbit decomposition, and base optimizers lifted to it."""

from ddc.optim.clipping import InvariantClipping, clip_grad_norm_, grad_norm
from ddc.optim.ddcadam import DDCAdam
from ddc.optim.ddcmuon import DDCMuon
from ddc.optim.lift import Lift
from ddc.optim.respected import respected
from ddc.optim.rules.lion import DDCLion
from ddc.optim.rules.sgd import DDCSGD
from ddc.optim.rules.shampoo import DDCShampoo

__all__ = [
    "DDCSGD",
    "DDCAdam",
    "DDCLion",
    "DDCMuon",
    "DDCShampoo",
    "InvariantClipping",
    "Lift",
    "clip_grad_norm_",
    "grad_norm",
    "respected",
]
