"""Rules: base optimizers, one a file, as :mod:`ddc.optim.lift` needs them."""

from ddc.optim.rules.adam import Adam
from ddc.optim.rules.base import Direction, Rule, Subject
from ddc.optim.rules.muon import Orthogonaliser

__all__ = ["Adam", "Direction", "Orthogonaliser", "Rule", "Subject"]
