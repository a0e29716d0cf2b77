"""Train one model: ``python train.py +experiment=lm_overtrain optimizer=ddcadam``.

By several processes: ``torchrun --nproc-per-node=2 train.py launcher=torchrun
+experiment=lm_overtrain``. What the exit status says: :mod:`ddc.training.command`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ddc.training.command import draw, fail, run_config, show, speaks
from ddc.training.compose import check_choices, register_schemas, resolve, spelled_out
from ddc.training.display import print_plainly
from ddc.training.errors import explained
from ddc.training.help import FLAGS, help_text

register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(composed: DictConfig) -> None:
    """Run what the composed configuration says, and show what came of it."""
    try:
        config = resolve(composed)
    except ValueError as error:
        fail(f"error: {error}")
    drawn = functools.cache(draw)  # for W&B and for the list below
    folder, summary = run_config(config, drawn)
    if speaks():
        show(folder, summary, drawn(folder))


def show_help(overrides: Sequence[str]) -> NoReturn:
    """Print what can be chosen and set, and end."""
    try:
        print(help_text(overrides))
    except ValueError as error:
        fail(f"error: {error}")
    sys.exit(0)


if __name__ == "__main__":
    print_plainly()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come here, to be said in one line
    sys.argv[1:] = spelled_out(sys.argv[1:])
    try:
        if not {*FLAGS}.isdisjoint(sys.argv):
            show_help([each for each in sys.argv[1:] if "=" in each and each[0] != "-"])
        check_choices(sys.argv[1:])
        main()
    except (HydraException, OmegaConfBaseException) as error:
        fail(f"error: {explained(error)}")
