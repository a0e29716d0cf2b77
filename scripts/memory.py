"""What a run will need, estimated on any machine: ``python scripts/memory.py scale=gpu
optimizer=ddcadam``.
"""

from __future__ import annotations

import sys

from ddc.training.compose import compose_config
from ddc.training.memory import estimate_memory
from ddc.training.setup import load_data


def main() -> None:
    """Compose the configuration of the command line's overrides and print the estimate."""
    try:
        config = compose_config(sys.argv[1:])
        data = load_data(config.data, config.model, config.seed)
        estimate = estimate_memory(config, data)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"parameters       {estimate.parameters / 1e6:10.1f} M")
    print(f"optimizer state  {estimate.optimizer_state / 2**30:10.2f} GiB")
    print(f"peak of a step   {estimate.peak / 2**30:10.2f} GiB (tensors alone)")


if __name__ == "__main__":
    main()
