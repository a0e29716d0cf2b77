"""Time and memory of ``find_gauges`` at real size: ``python -m benchmarks.discovery`` writes
results/benchmark/discovery.json and .md.

Models are built from configs of transformers, weights at random, those of Llama on the meta device,
where they have no values. Each is looked at in a process of its own on one thread: seconds of the
processor (the machine may be busy), and by how much the process grew over the model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import discovery_table
from ddc import find_gauges
from ddc.compatibility import provide_torchvision_operators
from ddc.training.records import provenance, write_atomically, write_json

#: Title, class, sizes and device.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPT-2 124M": ("GPT2", {}, "cpu"),
    "Qwen2 0.5B": (
        "Qwen2",
        {
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        "cpu",
    ),
    "Llama 7B, without values": ("Llama", {}, "meta"),
    "Llama 70B, without values": (
        "Llama",
        {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        },
        "meta",
    ),
}  # fmt: skip
GIB = 2**20  # of what getrusage counts in


def measure(title: str, verify: bool) -> dict[str, Any]:
    """One model, in this process."""
    torch.set_num_threads(1)
    provide_torchvision_operators()
    import transformers

    name, sizes, device = MODELS[title]
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gauges = find_gauges(model, verify=verify)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "model": title,
        "parameters": sum(p.numel() for p in model.parameters()),
        "verify": verify,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "seconds": wall,
        "grown_gib": (after.ru_maxrss - before.ru_maxrss) / GIB,
        "peak_gib": after.ru_maxrss / GIB,
        "gauges": dict(Counter(gauge.kind for gauge in gauges)),
        "unchecked": len(gauges.unchecked),
    }


def main() -> None:
    """Measure, and write after each model into the record that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path("results/benchmark"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "discovery.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["model"], row["verify"]): row for row in found}
    about = provenance()  # before the first record is written, which git may follow
    for title in arguments.models:
        for verify in (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows[title, verify] = {**pool.apply(measure, (title, verify)), **about}
            order = [rows[key] for t in MODELS for v in (False, True) if (key := (t, v)) in rows]
            write_json(path, {"rows": order, "seed": None})
            write_atomically(path.with_suffix(".md"), discovery_table({"rows": order}).encode())
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
