"""``find_gauges``: which gauges a model has, which it does not, and why."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection
from functools import singledispatch

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ddc.gauges.approximate import measured
from ddc.gauges.base import KINDS, check_kind, complete_kinds, paper_kinds, unwrapped
from ddc.gauges.further import gauges_of_kinds
from ddc.gauges.gauge_set import GaugeSet
from ddc.gauges.trace import Inputs, example, traced
from ddc.gauges.traced import OF_READERS, RULES, gauges_of_trace
from ddc.gauges.twin import narrow_twin
from ddc.gauges.unsplit import unsplit
from ddc.gauges.verify import refuse, unchecked, unfit, verified, verified_by_twin

#: What may be said of a loss.
LOSSES = ("cross_entropy", "other")


def find_gauges(
    model: nn.Module,
    per_layer: bool = False,
    inputs: Inputs | None = None,
    *,
    loss: str | None = None,
    verify: bool = True,
    kinds: str | Collection[str] = "paper",
) -> GaugeSet:
    """Read the gauges of a model: what was found, and what was refused with the reason. Never
    guesses.

    The model is traced on an example, and gauges are proved on the operations that it makes
    (``ddc.gauges.traced``). Then they are tried: a random element of all groups at once must change
    nothing that the model computes, with random weights in float64, on the example in evaluation
    and in training, and on other and longer ones (``ddc.gauges.verify``). What fails is refused,
    with a warning; what cannot be tried is marked in :attr:`GaugeSet.unchecked`, with another.

    Args:
        model: any model that ``torch.export`` traces; left as it is. Its weights may be on any
            device, without values (``torch.device("meta")``) or split by ``fully_shard``.
        per_layer: where a chain of ReLU layers can be rescaled neuron by neuron, take the smaller
            group that rescales it layer by layer instead (the chained rescale).
        inputs: an example of what the model takes, as a tuple or, by keyword, a mapping: three
            positions or more, where there are positions. Not needed for models of transformers and
            timm, nor for ``nn.Sequential`` of linear maps and torch's encoder layers, nor where
            ``model.example_inputs()`` gives a tuple.
        loss: ``"cross_entropy"`` if the model is trained by softmax cross-entropy of its output
            ``logits``, or of its first; ``"other"`` if by anything else: the logit shift is a gauge
            of the former alone. None assumes the former, but refuses the shift where the model
            speaks against it (one output, several, ``config.problem_type``).
        verify: whether to try the gauges. It takes copies of the weights in float64, and some
            fifteen forward passes.
        kinds: ``"paper"``, the paper's (:func:`ddc.gauges.paper_kinds`); ``"complete"``, all exact
            ones (:func:`ddc.gauges.complete_kinds`); or names of kinds, also of those that hold at
            eps = 0 alone (:func:`ddc.gauges.approximate_kinds`), whose size is measured if gauges
            are tried.

    Raises:
        ValueError: the model cannot be traced, ``inputs`` are needed, or an unknown ``loss`` or
            kind, or ``per_layer`` beside other kinds than the paper's.
    """
    if loss is not None and loss not in LOSSES:
        raise ValueError(f"Invalid {loss=}: expected None or one of {', '.join(LOSSES)}")
    wanted = kinds_named(kinds)
    if per_layer and kinds != "paper":
        raise ValueError(
            "Invalid per_layer=True: it goes with kinds='paper'; elsewhere name chained_rescale in"
            " kinds, and not relu_rescale"
        )
    gauges, checked = _found(unsplit(unwrapped(model)), per_layer, inputs, loss, verify, wanted)
    reason_of = {(refusal.kind, refusal.where): refusal.reason for refusal in checked.refused}
    for gauge in gauges:
        if gauge not in checked.found:
            reason = reason_of[gauge.kind, gauge.where]
            warnings.warn(
                f"find_gauges: {gauge} is no symmetry of the model and is left out: {reason}",
                stacklevel=2,
            )
    for reason, count in Counter(checked.unchecked.values()).items():
        what = (
            "gauges were proved by rules alone" if count > 1 else "gauge was proved by rules alone"
        )
        warnings.warn(f"find_gauges: {count} {what} and not tried: {reason}", stacklevel=2)
    return checked


def kinds_named(kinds: str | Collection[str]) -> tuple[str, ...]:
    """Kinds of gauges by name, or by the name of a set of them.

    Raises:
        ValueError: an unknown one.
    """
    if kinds == "paper":
        return paper_kinds()
    if kinds == "complete":
        return complete_kinds()
    if isinstance(kinds, str):
        raise ValueError(f"Invalid {kinds=}: expected paper, complete, or a list of kinds")
    for kind in kinds:
        check_kind(kind)
    return tuple(kinds)


def _found(
    model: nn.Module,
    per_layer: bool,
    inputs: Inputs | None,
    loss: str | None,
    verify: bool,
    kinds: tuple[str, ...],
) -> tuple[GaugeSet, GaugeSet]:
    """The gauges that rules find, and what is left of them after they were tried, if they are to
    be.
    """
    if {*kinds} <= {*paper_kinds()}:
        gauges = read_gauges(model, per_layer, inputs, loss)
        further = [prove for prove in RULES if prove not in OF_READERS]
        if further and read_gauges.dispatch(type(model)) is not read_gauges.dispatch(nn.Module):
            more = gauges_of_trace(traced(model, inputs), per_layer, loss, further)
            gauges = GaugeSet(gauges.found + more.found, gauges.refused + more.refused)
        gauges = gauges if kinds == paper_kinds() else gauges.only(kinds)
    else:
        trace = traced(model, inputs)
        gauges = gauges_of_kinds(trace, kinds, loss)
    if loss == "other":
        shifts = [gauge for gauge in gauges if gauge.kind == "logit_shift"]
        gauges = refuse(gauges, dict.fromkeys(shifts, "the loss is not softmax cross-entropy"))
    if not verify:
        return gauges, gauges
    exact = tuple(kind for kind in kinds if not KINDS[kind].approximate)
    if exact == kinds:
        return gauges, _checked(model, gauges, per_layer, inputs, loss, kinds)
    checked = _checked(model, gauges.only(exact), per_layer, inputs, loss, exact)
    others = measured(gauges.only(set(kinds) - set(exact)), trace)
    return gauges, GaugeSet(
        checked.found + others.found,
        checked.refused + others.refused,
        {**checked.unchecked, **others.unchecked},
        others.sizes,
    )


def _checked(
    model: nn.Module,
    gauges: GaugeSet,
    per_layer: bool,
    inputs: Inputs | None,
    loss: str | None,
    kinds: tuple[str, ...],
) -> GaugeSet:
    """The gauges that a random element leaves without effect, on the model or, where it cannot be
    run, on a twin.
    """
    try:
        if not (reason := unfit(model)):
            return verified(gauges, model, *example(model, inputs))
        twin = narrow_twin(model)
        if still := unfit(twin):
            return unchecked(gauges, f"{reason}, and of its narrow twin: {still}")
        _, of_twin = _found(
            twin, per_layer, tree_map_only(Tensor, Tensor.cpu, inputs), loss, True, kinds
        )
    except ValueError as error:
        return unchecked(gauges, f"{reason}, and {error}" if reason else str(error))
    return verified_by_twin(gauges, of_twin)


@singledispatch
def read_gauges(
    model: nn.Module, per_layer: bool, inputs: Inputs | None, loss: str | None
) -> GaugeSet:
    """The gauges of a model by rules alone; arguments as for :func:`find_gauges`.

    A family of models whose gauges can be told without a trace, as those of :mod:`ddc.models`, has
    a reader of its own, registered with ``read_gauges.register``, which gives the same and takes no
    time.
    """
    return gauges_of_trace(traced(model, inputs), per_layer, loss)
