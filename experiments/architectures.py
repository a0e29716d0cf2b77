"""Which gauges find_gauges finds in models that others wrote (``make architectures``).

The models are those of the tests (``tests/zoo.py``), small and with random weights. Every gauge is checked in float64.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import track

from ddc import find_gauges
from ddc.gauges import KINDS, GaugeSet, check
from ddc.training.records import write_atomically
from tests.zoo import ZOO, logits, make

SHOWN = [kind for kind in KINDS if kind != "chained_rescale"]


def row(gauges: GaugeSet) -> list[str]:
    """How many gauges of each kind were found, or why none was."""
    found: dict[str, int] = defaultdict(int)
    reasons: dict[str, list[str]] = defaultdict(list)
    for gauge in gauges:
        found[gauge.kind] += 1
    for refusal in gauges.refused:
        reasons[refusal.kind].append(refusal.reason)
    cells = []
    for kind in SHOWN:
        why = "; ".join(dict.fromkeys(reasons[kind]))
        cells.append(str(found[kind]) + (f" ({why})" if why else "") if found[kind] else why or "–")
    return cells


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.md"))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    rows, largest = [], 0.0
    for name in track(ZOO, "tracing"):
        model, inputs = make(name)
        gauges = find_gauges(model, inputs=inputs)
        changes = check(model, gauges, lambda each, inputs=inputs: logits(each, inputs).log_softmax(-1))  # type: ignore[misc]
        largest = max(largest, *changes.values())
        rows.append([name, *row(gauges)])
    header = ["model", *(kind.replace("_", " ") for kind in SHOWN)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    text = f"""# Gauges of models that others wrote

Number of gauges that `find_gauges` found in models of two blocks, or the reason why it refused; both where it did both. `–` is a
kind that was not looked for, since nothing in the model suggests it. Each gauge was applied at random in float64: the largest
change of a log-probability is {largest:.0e}. Made by `make architectures` (`experiments/architectures.py`, models in
`tests/zoo.py`) with transformers {version("transformers")} and timm {version("timm")}.

"""  # noqa: E501
    write_atomically(output, (text + "\n".join(lines) + "\n").encode())
    print(output)


if __name__ == "__main__":
    main()
