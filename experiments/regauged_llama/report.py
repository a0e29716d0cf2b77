"""Claim W1b as tables and a figure: those of W1, from the records of the Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ddc.report.claims import Claim, Verdict
from ddc.report.stages import Record
from experiments.output import Results
from experiments.regauged import report
from experiments.regauged_llama.plan import FINE_TUNING

FIGURES = {"W1b": "starts"}


def load() -> list[Record]:
    """The committed records, complete or not."""
    return FINE_TUNING.experiment.records


def verdicts(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Verdict]:
    """One row a comparison."""
    return report.verdicts(records, claims, FINE_TUNING)


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """Tables, and the figure where an optimizer has run from every start."""
    return report.results(records, claims, FINE_TUNING)
