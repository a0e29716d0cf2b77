"""A saved model at the balanced point of its gauge orbit, where it computes the same.

python scripts/canonicalise.py FOLDER OUTPUT              # gauges of the paper's kinds
python scripts/canonicalise.py FOLDER OUTPUT --kinds complete

FOLDER holds either ``model.safetensors`` and ``model.json`` (:func:`ddc.models.save_model`, as
scripts/prune.py writes them) or a model of transformers (``config.json``, and weights in its
formats). OUTPUT becomes the same kind of folder; whatever else is in FOLDER (a tokenizer, say) is
copied. That the model computes the same is tried in float64 before anything is written. Shows how
far each weight moved.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from ddc import canonicalise_, find_gauges
from ddc.compatibility import provide_torchvision_operators
from ddc.gauges import named_parameters
from ddc.models import load_model
from ddc.models.saved import CONFIG, WEIGHTS
from ddc.training.display import print_plainly

#: Files of weights of transformers, which are written anew.
OTHERS_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def main() -> None:
    """Move the model of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument(
        "--kinds", default="paper", help="of gauges: paper, complete, or names with commas between"
    )
    arguments = parser.parse_args()
    try:
        table = canonicalised(arguments.folder, arguments.output, arguments.kinds)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    Console().print(table)
    print(arguments.output)


def canonicalised(folder: Path, output: Path, kinds: str) -> Table:
    """Write the balanced model, and tabulate what moved.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: output that is there already, unknown kinds, a model without gauges, or one that
            would compute something else.
        RuntimeError: no balanced point was found.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: name a new folder")
    model = loaded(folder)
    named = kinds if kinds in ("paper", "complete") else kinds.split(",")
    gauges = find_gauges(model, kinds=named)
    if not gauges.found:
        raise ValueError(f"no gauges of kinds {kinds} were found in the model of {folder}")
    before = norms(model)
    moved = canonicalise_(model, gauges)
    write(model, folder, output)
    return tabulated(before, norms(model), moved)


def loaded(folder: Path) -> nn.Module:
    """The model of a folder, on the CPU, in evaluation mode and in the dtype of its weights.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be loaded.
    """
    if (folder / CONFIG).exists():
        return load_model(folder)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no model: neither {CONFIG} nor config.json")
    provide_torchvision_operators()
    import transformers

    architectures = json.loads(path.read_text()).get("architectures") or [""]
    architecture = getattr(transformers, architectures[0], None)
    if architecture is None:
        raise ValueError(f"{path}: transformers has no architecture {architectures[0]!r}")
    model: nn.Module = architecture.from_pretrained(folder, dtype="auto")
    return model.eval()


def write(model: nn.Module, folder: Path, output: Path) -> None:
    """The model in the format of its folder, and what else is there."""
    output.mkdir(parents=True, exist_ok=True)
    if (folder / CONFIG).exists():
        safetensors.torch.save_model(model, str(output / WEIGHTS))
    else:
        model.save_pretrained(output)  # type: ignore[operator]
    weights = {path for pattern in OTHERS_WEIGHTS for path in folder.glob(pattern)}
    for path in folder.iterdir():
        if path.is_file() and path not in weights and not (output / path.name).exists():
            shutil.copy2(path, output)


def norms(model: nn.Module) -> dict[str, float]:
    """The norm of each parameter."""
    return {name: float(p.detach().double().norm()) for name, p in named_parameters(model).items()}


def tabulated(
    before: Mapping[str, float], after: Mapping[str, float], moved: Mapping[str, float]
) -> Table:
    """One row a parameter, and one of all."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("parameter")
    for name in ("norm before", "norm after", "|W' - W| / |W|"):
        table.add_column(name, justify="right")
    for name, size in before.items():
        distance = f"{moved[name]:.3g}" if name in moved else "under no gauge"
        table.add_row(name, f"{size:.4g}", f"{after[name]:.4g}", distance)
    whole = [sum(size**2 for size in each.values()) ** 0.5 for each in (before, after)]
    table.add_section()
    table.add_row("all", *(f"{size:.4g}" for size in whole), "")
    return table


if __name__ == "__main__":
    print_plainly()
    main()
