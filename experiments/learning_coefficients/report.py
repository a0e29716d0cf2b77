"""Estimated against known learning coefficients, as a table, from records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from ddc.report.claims import Claim
from ddc.report.runs import read_lines
from ddc.report.stages import Record
from experiments.learning_coefficients.measure import BATCH, NOISE, RESULTS, SAMPLES
from experiments.output import Results


def load() -> list[Record]:
    """The committed records."""
    return read_lines(RESULTS / "records.jsonl")


def results(records: Sequence[Record], claims: Mapping[str, Claim]) -> list[Results]:
    """The table."""
    return [Results(RESULTS, {"table": partial(table, records)})]


def near(records: Sequence[Record]) -> int:
    """How many estimates are within 5% of the true coefficient."""
    return sum(abs(record["value"] / record["truth"] - 1) < 0.05 for record in records)


def table(records: Sequence[Record]) -> str:
    """Markdown, one row a record."""
    lines = [
        (
            "| case | method | λ, m | estimate | 95% interval | off λ | met | energy at this τ |"
            " off it | R-hat | ESS | seconds |"
        ),
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in records:
        low, high = r["interval"]
        off = r["value"] / r["truth"] - 1
        met = [
            text
            for text, holds in (("5%", abs(off) < 0.05), ("interval", low <= r["truth"] <= high))
            if holds
        ]
        at_tau = ["–", "–"]
        if r["expected"] != r["truth"]:
            at_tau = [f"{r['expected']:.4f}", f"{100 * (r['value'] / r['expected'] - 1):+.1f}%"]
        found = f"{r['value']:.4f}" + (f", m={r['multiplicity']}" if "multiplicity" in r else "")
        lines.append(
            f"| {r['family']}: {r['case']} | {r['method']} | {r['truth']:g},"
            f" {r['truth_multiplicity']} | {found} | {low:.4f} to {high:.4f} | {100 * off:+.1f}% |"
            f" {' and '.join(met) or 'no'} | {' | '.join(at_tau)} | {r['r_hat']:.3f} |"
            f" {r['ess']:.0f} | {r['seconds']:.1f} |"
        )
    first = records[0]
    lines += [
        "",
        (
            f"{near(records)} of {len(records)} estimates are within 5% of the coefficient λ in"
            " closed form. At one τ an estimate falls short of it by about (m - 1)/log τ (log τ is"
            " 14 for HMC on reduced rank, 6 for SGLD): of a normal crossing with m > 1 the exact"
            " energy at that τ, by quadrature, stands beside it, for it is what the sampler is to"
            " find there. The fit over τ takes the next pole of w1^2 w2^4 for a multiplicity: a"
            " limit of its form. The interval covers the error of sampling alone. Fits give the"
            f" largest R-hat and smallest ESS of their temperatures. SGLD on {SAMPLES} samples with"
            f" noise {NOISE}, batches of {BATCH}. One thread of {first['machine']['cpu']}, seeds"
            f" {sorted({r['seed'] for r in records})}, commit {first['commit']}. Made by `make"
            " learning_coefficients` from `records.jsonl` beside it."
        ),
    ]
    return "\n".join(lines) + "\n"
