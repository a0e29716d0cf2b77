"""How a step respects a gauge: orbit decomposition, DDCAdam."""

from ddc.optim.ddcadam import DDCAdam

__all__ = ["DDCAdam"]
