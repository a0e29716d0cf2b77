"""How often the intervals of rates hold the true slope: ``python -m
experiments.coverage.measure``.

Straight lines of slope 2 in residuals of a known lag-one correlation, over 1.3 decades, as many
points as a window of a cell has. Of 2,000 lines in each row: how many intervals of
:func:`ddc.slt.rates.fit_line` hold the slope, and how many of ordinary least squares, which takes
residuals for white; how many lines :func:`ddc.slt.rates.read_rate` reads, which chooses a window
first, and of these how many intervals hold it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from scipy import stats
from scipy.signal import lfilter

from ddc.slt.rates import RateRule, fit_line, read_rate
from ddc.training.records import provenance
from experiments.output import save_records
from experiments.protocols import ROOT

RESULTS = ROOT / "results/coverage"
CORRELATIONS, POINTS = (0.0, 0.5, 0.8), (8, 16, 30)
LINES, SLOPE, NOISE, SEED = 2000, 2.0, 0.2, 0


def autoregressive(
    rho: float, shape: tuple[int, int], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Rows of unit variance whose neighbours correlate by ``rho``."""
    noise = generator.normal(size=shape)
    noise[:, 1:] *= math.sqrt(1 - rho**2)
    return np.asarray(lfilter([1], [1, -rho], noise, axis=1))


def measure() -> list[dict[str, Any]]:
    """One record a correlation and number of points."""
    rule, about, records = RateRule(), provenance(), []
    for rho, points in track([*itertools.product(CORRELATIONS, POINTS)], "simulating"):
        began = time.perf_counter()
        generator = np.random.default_rng([SEED, points, round(100 * rho)])
        x = np.linspace(0, -3, points)
        plain = stats.t.ppf((1 + rule.confidence) / 2, points - 2)
        held, white, read = [], [], []
        for noise in autoregressive(rho, (LINES, points), generator):
            y = SLOPE * x + NOISE * noise
            fit, line, rate = (
                fit_line(x, y, rule.confidence),
                stats.linregress(x, y),
                read_rate(x, y, rule),
            )
            held.append(fit.low <= SLOPE <= fit.high)
            white.append(abs(line.slope - SLOPE) <= plain * line.stderr)
            if rate.read and rate.fit is not None:
                read.append(rate.fit.low <= SLOPE <= rate.fit.high)
        records.append(
            {
                "correlation": rho,
                "points": points,
                "lines": LINES,
                "held": int(np.sum(held)),
                "white_held": int(np.sum(white)),
                "read": len(read),
                "read_held": int(np.sum(read)),
                "slope": SLOPE,
                "noise": NOISE,
                "seed": SEED,
                "rule": vars(rule),
                "seconds": time.perf_counter() - began,
                **about,
            }
        )
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, and write the records."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    save_records(RESULTS / "records.jsonl", measure())


if __name__ == "__main__":
    main()
