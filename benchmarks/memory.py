"""Memory of a training step by model and optimizer, found on any machine. ``python -m
benchmarks.memory``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.report import memory_table
from ddc.report.runs import TITLES
from ddc.training.compose import compose_config
from ddc.training.memory import estimate_memory
from ddc.training.records import provenance, write_atomically, write_json
from ddc.training.setup import load_data

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "GPT, scale=cpu": ["+experiment=lm_overtrain", "scale=cpu"],
    "ViT, scale=cpu": ["+experiment=vit_scratch", "scale=cpu"],
    "GPT, scale=gpu": ["+experiment=lm_overtrain", "scale=gpu"],
}


def main() -> None:
    """Measure, and write the record and the table."""
    rows = []
    for model, overrides in MODELS.items():
        for optimizer in TITLES:
            config = compose_config([*overrides, f"optimizer={optimizer}"])
            estimate = estimate_memory(config, load_data(config.data, config.model, config.seed))
            rows.append(
                {
                    "model": model,
                    "optimizer": optimizer,
                    "overrides": overrides,
                    **dataclasses.asdict(estimate),
                }
            )
            print(rows[-1])
    record = {"rows": rows, "seed": 0, **provenance()}
    folder = ROOT / "results/benchmark"
    write_json(folder / "memory.json", record)
    write_atomically(folder / "memory.md", memory_table(record).encode())
    print(memory_table(record))


if __name__ == "__main__":
    main()
