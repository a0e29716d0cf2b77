"""What a run will need, estimated on any machine: ``python scripts/memory.py scale=gpu optimizer=ddcadam``."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

from ddc.training.config import register_schemas, resolve
from ddc.training.loop import load_data
from ddc.training.memory import estimate_memory


def main() -> None:
    """Compose the configuration of the command line's overrides and print the estimate."""
    register_schemas()
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "configs"), version_base="1.3"):
        config = resolve(compose("config", overrides=sys.argv[1:]))
    estimate = estimate_memory(config, load_data(config.data, config.model, config.seed))
    print(f"parameters       {estimate.parameters / 1e6:10.1f} M")
    print(f"optimizer state  {estimate.optimizer_state / 2**30:10.2f} GiB")
    print(f"peak of a step   {estimate.peak / 2**30:10.2f} GiB (tensors alone)")


if __name__ == "__main__":
    main()
