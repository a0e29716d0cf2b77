"""Cost of one reading: ``python -m benchmarks.probe`` writes results/benchmark/probe.json and .md.

The LM of ``scale=cpu`` is observed at all layers on probes of 128, 512 and 2,048 sequences, each in
a process of its own, with one thread and with two: seconds (the fastest of three), and by how much
the process grew while it observed, which must not depend on the size of the probe.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import reading_table
from ddc.data import TextConfig, load_text
from ddc.models import GPT, GPTConfig
from ddc.slt.observables import categorical_score, layers_of, observe
from ddc.training.records import provenance, write_atomically, write_json

BATCH = 16


def measure(sequences: int, threads: int) -> dict[str, Any]:
    """Time and memory of one probe, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = GPTConfig()
    data = load_text(TextConfig(), config.context)
    model = GPT(config, data.vocab_size)
    batches = data.evaluation_batches("train", sequences // BATCH, BATCH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        observe(model, layers_of(model), batches, categorical_score(0))
        seconds.append(time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"sequences": sequences, "threads": threads, "seconds": min(seconds), "grown_mib": grown}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/benchmark"))
    arguments = parser.parse_args()
    cells = [(sequences, threads) for threads in (1, 2) for sequences in (128, 512, 2048)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = pool.starmap(measure, cells, chunksize=1)
    record = {"rows": rows, **provenance()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "probe.json", record)
    write_atomically(arguments.output / "probe.md", reading_table(record).encode())
    print(reading_table(record))


if __name__ == "__main__":
    main()
