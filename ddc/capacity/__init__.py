"""How much of a network's feed-forward capacity is used: what its hidden units do, and the network
without some.
"""

from ddc.capacity.blocks import FeedForward, feed_forward_blocks
from ddc.capacity.measure import (
    RemovalEffects,
    Spectrum,
    UnitStatistics,
    dressed_spectra,
    removal_effects,
    unit_norms,
    unit_statistics,
)
from ddc.capacity.pruning import contributions, kept_units, pruned_parameters

__all__ = [
    "FeedForward",
    "RemovalEffects",
    "Spectrum",
    "UnitStatistics",
    "contributions",
    "dressed_spectra",
    "feed_forward_blocks",
    "kept_units",
    "pruned_parameters",
    "removal_effects",
    "unit_norms",
    "unit_statistics",
]
