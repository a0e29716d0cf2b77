"""The table of analytic rates: ``python -m experiments.known_rates.measure``.

Every network of :mod:`ddc.slt.known_rates` is observed at 24 weight sizes and read by the rule of
the trainer; its exponent and coefficient as t → 0 are put beside what was recovered. Takes seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from ddc.slt.known_rates import known_rates
from ddc.slt.rates import RateRule
from ddc.training.records import provenance
from experiments.output import save_records
from experiments.protocols import ROOT

RESULTS = ROOT / "results/known_rates"


def measure() -> list[dict[str, Any]]:
    """One record a case."""
    rule, about = RateRule(), provenance()
    records = []
    for case in known_rates():
        start = time.perf_counter()
        rate = case.recover(rule)
        records.append(
            {
                "row": case.row,
                "case": case.name,
                "exponent": case.exponent,
                "coefficient": case.coefficient,
                "must_refuse": case.refusal,
                "verdict": rate.verdict,
                "slope": rate.fit.slope if rate.fit else None,
                "recovered_coefficient": case.recovered_coefficient(),
                "note": case.note,
                "seconds": time.perf_counter() - start,
                "rule": vars(rule),
                **about,
            }
        )
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the records."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    save_records(RESULTS / "records.jsonl", measure())


if __name__ == "__main__":
    main()
