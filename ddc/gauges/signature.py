"""What is done between two nodes of a trace, as a text: equal where the same is done, in another
layer say.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.fx import Node

from ddc.gauges.trace import Trace, value_of_any

#: Constants of so many entries at most are compared by their values; larger ones are known by name.
SMALL = 2**16


def signature(trace: Trace, start: Node, target: Node) -> str:
    """All operations by which ``target`` is computed, from ``start`` and from what the model holds
    and is given.

    Parameters and large constants stand in it by their names, small constants by their values.
    """
    numbers: dict[Node, str] = {}
    lines: dict[str, str] = {}

    def number(node: Node) -> str:
        # one that lends its type or shape alone is not computed
        if node in numbers:
            return numbers[node]
        value = value_of_any(node)
        return f"like {tuple(value.shape)} {value.dtype}"

    for node in sorted(trace.ancestors(target, [start]), key=trace.order.__getitem__):
        if node is start:
            value = node.meta["val"]
            line = f"start {tuple(value.shape)} {value.dtype} {value.device}"
        elif node.op == "call_function":
            arguments = torch.fx.node.map_arg((node.args, dict(node.kwargs)), number)
            line = f"{node.target} {arguments}"
        else:
            line = f"{node.op} {_constant(trace, node)}"
        numbers[node] = lines.setdefault(line, f"%{len(lines)}")
    return "\n".join([*lines, numbers[target]])


def _constant(trace: Trace, node: Node) -> str:
    value = trace.constant(node)
    if node in trace.parameters or not isinstance(value, Tensor) or value.is_meta:
        return str(node.target)
    if value.numel() > SMALL:
        return str(node.target)
    content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(content).hexdigest()}"
