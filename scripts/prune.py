"""A smaller model from a finished run: ``python scripts/prune.py RUN_DIR --keep 0.5``.

Removes hidden units of the feed-forward blocks that contribute least to what a block puts out, and
trains no more: the bias of W_down, where there is one, takes over the means of the removed units.
Writes model.safetensors and model.json to OUTPUT, reads them again, and shows what the smaller
model does beside the whole one. To use it: ``from ddc.models import load_model; model =
load_model(OUTPUT)``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ddc.capacity import feed_forward_blocks, pruned_parameters, unit_statistics
from ddc.gauges import named_parameters
from ddc.models import GPTConfig, ViTConfig, build_model, load_model, save_model
from ddc.training.display import print_plainly
from ddc.training.evaluate import evaluation_batches, measure
from ddc.training.records import provenance
from ddc.training.setup import Setup, restore


def main() -> None:
    """Prune the run of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--keep", type=float, default=0.5, help="share of the hidden units to keep, in (0, 1]"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the smaller model; RUN_DIR/pruned-KEEP"
    )
    arguments = parser.parse_args()
    try:
        whole = restore(arguments.folder)
        output = arguments.output or arguments.folder / f"pruned-{arguments.keep:g}"
        prune(whole, arguments.keep, output)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    small = dataclasses.replace(whole, model=load_model(output).to(whole.device))
    Console().print(comparison({"whole": whole, "pruned": small}))
    print(output)


def prune(setup: Setup, keep: float, output: Path) -> None:
    """Write the model of a run with a share of its hidden units.

    Raises:
        ValueError: a share out of range, or a model without a feed-forward block of configurable
            width.
    """
    architecture = setup.config.model
    if not isinstance(architecture, GPTConfig | ViTConfig):
        raise ValueError(
            f"model={architecture.name} has no feed-forward width to change (no key model.hidden)"
        )
    batches = [x for x, _ in evaluation_batches(setup, "train")]
    blocks = feed_forward_blocks(setup.model, (batches[0],))
    if not blocks:
        raise ValueError(
            f"model={architecture.name} has no feed-forward blocks whose units are its own"
        )
    parameters = named_parameters(setup.model)
    changed = pruned_parameters(
        parameters, blocks, unit_statistics(setup.model, blocks, batches), keep
    )
    columns = blocks[0].outward.axis
    assert isinstance(columns, int)
    hidden = changed[blocks[0].outward.parameter].shape[columns]
    config = dataclasses.replace(architecture, hidden=hidden)
    small = build_model(config, **setup.data.sizes)
    small.load_state_dict({**setup.model.state_dict(), **changed})
    about = {"run": setup.folder.name, "data": setup.data.source, "keep": keep, **provenance()}
    save_model(output, small, config, setup.data.sizes, **about)


def comparison(setups: dict[str, Setup]) -> Table:
    """Size, loss and accuracy of models, one a column."""
    table = Table("", *setups)
    rows = {
        "parameters": [
            f"{sum(p.numel() for p in each.model.parameters()):,}" for each in setups.values()
        ]
    }
    for split in ("train", "validation"):
        found = [measure(each, evaluation_batches(each, split)) for each in setups.values()]
        for key in found[0]:
            rows[f"{split} {key.replace('_', ' ')}"] = [f"{values[key]:.4f}" for values in found]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    print_plainly()
    main()
