"""Singular structure of a run: observables, dead-direction rates, learning coefficients. See
docs/measurement.md.
"""

from ddc.slt.learning_coefficient import (
    Estimate,
    Settings,
    estimate,
    fit_temperatures,
    minibatches,
    module_loss,
)
from ddc.slt.observables import (
    OBSERVABLES,
    Layer,
    Reading,
    categorical_score,
    layers_of,
    named_layers,
    observe,
)
from ddc.slt.rates import RateRule, read_cells, read_rate

__all__ = [
    "OBSERVABLES",
    "Estimate",
    "Layer",
    "RateRule",
    "Reading",
    "Settings",
    "categorical_score",
    "estimate",
    "fit_temperatures",
    "layers_of",
    "minibatches",
    "module_loss",
    "named_layers",
    "observe",
    "read_cells",
    "read_rate",
]
