"""Which matrices of a model are hidden: linear maps between hidden representations, and what heads
they hold.

An optimizer that treats a matrix as a linear map (Muon) is meant for these alone. A table of
vectors (an embedding, a head) has the shape of a matrix but not the role, so the role is read from
the model, never from a name or a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

from torch import nn

from ddc.gauges.base import unwrapped
from ddc.gauges.heads import heads_of
from ddc.gauges.packed import attention_parts
from ddc.gauges.routing import gives_output, heads_of_matrices
from ddc.gauges.trace import Inputs, NoValue, arguments, traced
from ddc.gauges.unsplit import unsplit


@dataclass(frozen=True)
class HiddenMatrix:
    """A linear map from one hidden representation to another.

    Args:
        parameter: name of the weight, of shape (out, in), or (experts, out, in): each of stacked
            experts is a map by itself. It may be a part of a parameter, as ``"qkv.weight[0:64]"``;
            then all of that must be parts.
        heads: how many heads it holds; each is a linear map by itself, to be orthogonalised by
            itself. 1 takes the matrix as a whole (the heads *stacked*).
        axis: along which the heads lie: 0 for queries, keys and values, 1 for the output
            projection.

    Raises:
        ValueError: a number of heads or an axis that cannot be.
    """

    parameter: str
    heads: int = 1
    axis: int = 0

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(
                f"Invalid heads={self.heads} of {self.parameter}: expected a positive integer"
            )
        if self.axis not in (0, 1):
            raise ValueError(
                f"Invalid axis={self.axis} of {self.parameter}: expected 0 (rows) or 1 (columns)"
            )


@singledispatch
def hidden_matrices(
    model: nn.Module, per_head: bool = False, inputs: Inputs | None = None, apart: bool = False
) -> Sequence[HiddenMatrix]:
    """The hidden matrices of a model, in its order.

    The model is traced on an example. Its linear maps are hidden but for the head, which gives the
    output (as it is, capped, as probabilities, or averaged with that of other heads), and those
    that read the model's inputs as they are; weights that are used twice are left out. Stacked
    experts are matrices each by itself.

    Args:
        model: any model that ``torch.export`` traces.
        per_head: attention matrices head by head, where these could be told apart, instead of
            stacked (:func:`ddc.parameter_roles` says which).
        inputs: as for :func:`ddc.find_gauges`.
        apart: queries, keys and values that one weight gives as matrices of their own: its parts,
            which DDCMuon takes.

    Raises:
        ValueError: the model cannot be traced, ``inputs`` are needed, or ``per_head`` is asked of a
            model without values.
    """
    if (inner := unsplit(unwrapped(model))) is not model:
        # wrapped by torch.compile, DDP or FSDP2
        return hidden_matrices(inner, per_head, inputs, apart)
    trace = traced(model, inputs)
    try:
        heads = heads_of_matrices(trace) if per_head else {}
    except NoValue as error:
        raise ValueError(
            f"Invalid per_head=True: which outputs of a {type(model).__name__} are heads is not"
            f" known ({error}). Name matrices and heads yourself:"
            " [HiddenMatrix('layers.0.query.weight', heads=8), ...]"
        ) from None
    of_output = heads_of(trace)
    maps = [
        (linear.node, linear.input, linear.weight)
        for linear in trace.linear_maps.values()
        if linear not in of_output and not gives_output(trace, linear)
    ]
    maps += [
        (experts.node, arguments(experts.node)[experts.argument], experts.weight)
        for experts in trace.expert_maps.values()
    ]
    parts = attention_parts(trace) if apart else {}
    found = []
    for _, read, weight in sorted(maps, key=lambda each: trace.order[each[0]]):
        if not trace.used_once(weight) or not trace.depends_on_parameters(read):
            continue
        if weight in heads:
            found.append(HiddenMatrix(weight, *heads[weight]))
        else:
            found += [HiddenMatrix(part) for part in parts.get(weight, [weight])]
    return found
