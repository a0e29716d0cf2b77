"""What ``find_gauges`` makes of random networks: every twist by itself, then as many random ones as
are asked for.

Networks and check are those of the tests (``tests/random_networks.py``,
``tests/test_random_networks.py``):

    python -m experiments.zoo.random_networks --count 1000 --seed 0

The record is one line of JSON; a fault is printed with the simplest network that shows it, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.progress import track

from tests.random_networks import TWISTS, Block, Network, random_network, simplest
from tests.test_random_networks import Examined, examine

#: The networks on which every twist is tried alone.
PLAIN = (
    Network(blocks=(Block(mixer="attention"),)),
    Network(
        blocks=(Block(mixer="attention", mlp="gated"), Block(mixer="attention", mlp="gated")),
        inputs="tokens",
    ),
)
#: Surgeries are tried at so many places.
PLACES = 6


def plain_networks() -> list[Network]:
    """A network for every twist alone, on each plain one, and surgeries at several places."""
    return [
        replace(twist, index=index).apply(network)
        for network in PLAIN
        for twist in TWISTS
        for index in range(PLACES if twist.part == "surgery" else 1)
    ]


def run(count: int, seed: int, singly: bool = True) -> dict[str, Any]:
    """Examine random networks, with a bar.

    Args:
        count: how many random networks.
        seed: of the first; the others follow.
        singly: whether to try every twist by itself as well, before.

    Returns:
        A record for JSON: ``networks``, how many; ``found`` and ``refused``, gauges by kind;
            ``refused_networks``,
        messages of ValueError and how often; numbers of networks with a fault of each kind (see
            :func:`kinds_of`);
        and ``faults``, a list of ``{"network", "faults"}``, made simple and each but once.
    """
    networks = [
        *(plain_networks() if singly else ()),
        *(random_network(seed + i) for i in range(count)),
    ]
    found: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    faulty: Counter[str] = Counter()
    faults: dict[str, list[str]] = {}
    for network in track(networks, "random networks"):
        examined = examine(network)
        found.update(examined.found)
        refused.update(examined.refused)
        errors.update([examined.error] if examined.error else [])
        kinds = kinds_of(examined)
        faulty.update(kinds)
        if kinds:
            simple = simplest(network, partial(has_fault, kinds))
            faults.setdefault(repr(replace(simple, seed=0)), examine(simple).faults)
    return {
        "networks": len(networks),
        "seed": seed,
        "found": dict(found),
        "refused": dict(refused),
        "refused_networks": dict(errors),
        **{
            kind: faulty[kind]
            for kind in (
                "false",
                "crashes",
                "left",
                "unusable",
                "unchecked",
                "broken",
                "refused as a whole",
            )
        },
        "faults": [{"network": network, "faults": each} for network, each in faults.items()],
    }


def has_fault(kinds: set[str], network: Network) -> bool:
    """Whether a network shows a fault of one of these kinds."""
    return bool(kinds & kinds_of(examine(network)))


def kinds_of(examined: Examined) -> set[str]:
    """The kinds of faults that a network shows."""
    kinds = {
        "false": examined.false,
        "crashes": examined.crash,
        "left": examined.left,
        "unusable": examined.unusable,
        "unchecked": examined.unchecked,
        "broken": examined.broken,
        "refused as a whole": examined.error and not examined.may_be_refused,
    }
    return {kind for kind, fault in kinds.items() if fault}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--randomly", action="store_true", help="leave out the twists by themselves"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    record = run(options.count, options.seed, singly=not options.randomly)
    for fault in record["faults"]:
        print(fault["network"], *fault["faults"], sep="\n    ")
    print(json.dumps({key: value for key, value in record.items() if key != "faults"}))
    if record["faults"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
