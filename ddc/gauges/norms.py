"""What reads a norm, and the gauges that shift it: rows of readers by 1/γ, the norm's own β."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from ddc.gauges.actions import Axis
from ddc.gauges.affine import ScaledShift, Shear, Sheared, Translated, Translation
from ddc.gauges.base import Gauge
from ddc.gauges.stream import Norm, carried
from ddc.gauges.trace import (
    CONVOLUTIONS,
    KEEPS,
    MOVES,
    SUMS,
    Arrival,
    Trace,
    arguments,
    drops,
    has_fixed_shape,
    inputs,
    labels_of,
    number_of,
    operation,
    readers,
    value_of,
)
from ddc.gauges.traced import Finding, NotProved, once, owner


class NormReaders:
    """What reads the norms of a trace.

    Args:
        finding: of the trace; what is read is kept there.
    """

    def __init__(self, finding: Finding) -> None:
        self.finding, self.trace, self.kept = finding, finding.trace, finding.kept

    def _scaled(self, norm: Norm) -> tuple[Node, tuple[Axis, ...]]:
        """The node that a norm gives with its scale and shift, and these, if it has any.

        Raises:
            NotProved: they are no parameters as they stand.
        """
        node = norm.output
        scale = self.finding.scale(node)
        while (
            scale is None
            and len(users := readers(node)) == 1
            and operation(users[0]) in (KEEPS - {"dropout"} | {"mul"})
        ):
            node = users[0]
            scale = self.finding.scale(node)
            if operation(node) == "mul":
                break
        if scale is not None:
            source, plus, reason = scale
            if reason:
                raise NotProved(reason)
            return source, plus
        if not has_fixed_shape(norm.output):
            raise NotProved("how many positions it has depends on values")
        if operation(norm.output) in ("layer_norm", "rms_norm") and any(
            isinstance(each, Node) for each in arguments(norm.output)[2:4]
        ):
            raise NotProved("its scale and shift are no parameters as they stand")
        return norm.output, ()

    @once
    def behind(
        self, norm: Norm
    ) -> tuple[tuple[str, float] | None, str | None, list[tuple[str, int]]]:
        """Scale of a norm, with what is added to it, its shift, and the columns of all linear maps
        and convolutions that read it.

        Raises:
            NotProved: it is read by anything else.
        """
        source, plus = self._scaled(norm)
        require_passed_on(self.trace, source)
        if not plus:
            return None, None, columns_of(self.finding.readers_of(source))
        gauge = self.finding.norm_scale(source, plus, owner(plus[0].parameter))
        gamma, *beta = plus
        shift = beta[0].parameter if beta else None
        return (gamma.parameter, gamma.offset), shift, columns_of(gauge.minus)

    def _behind_matrices(self, norm: Norm) -> tuple[str | None, str | None, list[tuple[str, int]]]:
        """The same where the scale is a parameter as it stands, and single maps read it."""
        scale, shift, columns = self.behind(norm)
        if scale is not None and scale[1]:
            raise NotProved("its scale is more than the parameter")
        for name, _ in columns:
            if self.trace.tensors[name].ndim != 2 and name not in self.trace.convolutions:
                raise NotProved("experts read it, whose weights are stacked")
        return None if scale is None else scale[0], shift, columns

    def reader_shift(self, norm: Norm) -> list[Gauge]:
        """Rows of what reads a norm that centres move by 1/γ, which its output does not see: a
        gauge of each reader, whatever else reads the norm.
        """
        if not norm.centres:
            raise NotProved("the norm does not centre")
        scale, shift, linears, _, others = self._readers(norm)
        gauges: list[Gauge] = []
        for weight, columns in linears:
            bias = bias_of(self.trace, weight)
            if shift is not None:
                if bias is None:
                    raise NotProved(f"{owner(weight)} has no bias of its own")
                self._require_unpadded(weight)
            where = owner(weight)
            gauges.append(
                ScaledShift("reader_shift", where, weight, 1 - columns, bias, scale, shift)
            )
        if others and not gauges:
            raise NotProved(others[0])
        return gauges

    def norm_shift(self, norm: Norm) -> list[Gauge]:
        """A vector added to the shift of a norm, and taken back by the biases of its readers; where
        it is added to a sum, by a bias in that.
        """
        scale, shift, linears, taking, others = self._readers(norm)
        if shift is None:
            return []
        if others:
            raise NotProved(others[0])
        alone = scale is not None and norm.centres and not taking
        found = self._taking_back(linears, without_bias=alone)
        names = [shift, *taking]
        self._require_apart(names if taking else [], found)
        self.finding.require_single(names)
        slots = (Translated(shift, 0), *(Translated(name, 0, -1.0) for name in taking))
        scale = scale if any(reader.bias is None for reader in found) else None
        if not found:
            return [Translation("norm_shift", owner(shift), slots)]
        return [Shear("norm_shift", owner(shift), slots, found, scale)]

    def table_shift(self, table: str, looked_up: Sequence[Node]) -> list[Gauge]:
        """A vector added to all rows of a table that linear maps read without a norm, and taken
        back by their biases, and by those of the sums that it is added to.

        Args:
            table: its name.
            looked_up: everything that reads it, but for a head that does not see it move.
        """
        if any(operation(each) != "embedding" for each in looked_up) or table in self.trace.shared:
            raise NotProved(f"{owner(table)} is tied to another parameter, or used more than once")
        starts = [_behind_numbers(each) for each in looked_up]
        (factor, *others) = {factor for _, factor in starts}
        linears, taking, reasons = self._read([node for node, _ in starts])
        if reasons or others:
            raise NotProved(reasons[0] if reasons else "different numbers multiply it")
        found = self._taking_back(linears)
        self._require_apart([table, *taking], found)
        self.finding.require_single(taking)
        slots = (Translated(table, 1), *(Translated(name, 0, -factor) for name in taking))
        readers = tuple(each._replace(rate=factor) for each in found)
        if not found:
            return [Translation("translation", owner(table), slots)] if taking else []
        return [Shear("translation", owner(table), slots, readers)]

    def _taking_back(
        self, linears: Sequence[tuple[str, int]], without_bias: bool = False
    ) -> tuple[Sheared, ...]:
        """The readers, by columns, whose biases take a shift back; ``without_bias`` also those
        matrices that have none.
        """
        found = []
        for weight, axis in linears:
            bias = bias_of(self.trace, weight)
            self._require_unpadded(weight)
            if bias is None and not (without_bias and self.trace.tensors[weight].ndim == 2):
                raise NotProved(f"{owner(weight)} has no bias of its own")
            columns = np.arange(self.trace.tensors[weight].shape[axis])[None]
            found.append(Sheared(weight, axis, columns, bias))
        return tuple(found)

    def _require_apart(self, names: Sequence[str], found: Sequence[Sheared]) -> None:
        """Raise NotProved if a parameter is to move twice."""
        if names and len({*names, *(each.bias for each in found)}) < len(names) + len(found):
            raise NotProved("two of those that would take it back are one parameter")

    def _require_unpadded(self, weight: str) -> None:
        """Raise NotProved for a convolution that adds zeros around what it reads: a shift is none
        there.
        """
        if (convolution := self.trace.convolutions.get(weight)) is not None:
            _, _, *options = arguments(convolution)
            padding: Any = options[2] if len(options) > 2 else 0
            sides = [padding] if isinstance(padding, int | str) else list(padding)
            if any(side not in (0, "valid") for side in sides):
                raise NotProved(f"{owner(weight)} reads zeros around what the norm gives")

    @once
    def _readers(
        self, norm: Norm
    ) -> tuple[str | None, str | None, list[tuple[str, int]], list[str], list[str]]:
        """Scale and shift of a norm; the columns of the linear maps that read it as it is; the
        biases that are added to the sums that it is added to; and what else reads it, in words.

        Raises:
            NotProved: the scale is none that is a parameter as it stands, or nothing reads it but
                what is not known.
        """
        try:
            return *self._behind_matrices(norm), [], []
        except NotProved as error:
            reason = error
        source, plus = self._scaled(norm)
        if plus and plus[0].offset:
            raise reason
        names = [axis.parameter for axis in plus]
        if len({*names}) < len(names) or not has_fixed_shape(source):
            raise reason
        linears, taking, others = self._read([source])
        if not linears and not taking:
            raise reason
        scale, shift = [*names, None, None][:2]
        return scale, shift, linears, taking, others

    def _read(self, sources: Sequence[Node]) -> tuple[list[tuple[str, int]], list[str], list[str]]:
        """The columns of the linear maps that read some nodes as they are; the biases that are
        added to the sums that they are added to; and what else reads them, in words.

        Raises:
            NotProved: they are written to in place.
        """
        linears: list[tuple[str, int]] = []
        taking: list[str] = []
        others: list[str] = []
        waiting, seen, starts = [*sources], {*sources}, {*sources}
        while waiting:
            node = waiting.pop()
            if node in self.trace.rewritten:
                raise NotProved("it is written to in place")
            for user in readers(node):
                add = operation(user) in SUMS
                try:
                    if user in self.trace.linear_maps:
                        linears += columns_of([self._reader_of(user, node)])
                    elif add and (bias := self._bias_in(user, node)) is not None:
                        taking.append(bias)
                    else:
                        self._require_carried(user, node, starts)
                        waiting += [user] if user not in seen else []
                        seen.add(user)
                except NotProved as error:
                    others.append(str(error))
        return linears, taking, others

    def _require_carried(self, user: Node, node: Node, sources: set[Node]) -> None:
        """Raise NotProved unless an operation only moves a node, keeps it, averages it over
        positions, or adds to it what does not follow from sources.
        """
        name = operation(user) or "the output of the model"
        if name == "add":
            others = [each for each in inputs(user) if each is not node]
            apart = len(others) == 1 and not {*others, *self.trace.ancestors(others[0])} & sources
        else:
            apart = name in MOVES | KEEPS | {"mean", "index"} and not drops(user)
        if not apart:
            raise NotProved(f"{name} changes what it gives")
        if carried(user, node, -1) != -1:
            raise NotProved(f"{name} mixes what it gives")

    def _reader_of(self, user: Node, node: Node) -> Axis:
        """The columns of a linear map that reads a node, one for each entry."""
        found = [i for i, each in enumerate(arguments(user)) if each is node]
        if len(found) != 1:
            raise NotProved("what reads it is not a linear map")
        axis = self.finding.reader(Arrival(user, found[0], labels_of(node), 1.0))
        self.finding.require_single([], [axis])
        return axis

    def _bias_in(self, add: Node, node: Node) -> str | None:
        """The bias of a linear map that is added to a node, at each of its positions and nowhere
        else, if there is one.
        """
        if len(inputs(add)) != 2 or len(arguments(add)) != 2 or add.kwargs:
            return None
        (other,) = [each for each in inputs(add) if each is not node]
        if not value_of(other).shape == value_of(node).shape == value_of(add).shape:
            return None
        waiting = [other]
        while waiting:
            each = waiting.pop()
            if len(readers(each)) != 1 or each in self.trace.rewritten:
                continue
            linear = self.trace.maps_by_output.get(each)
            if linear is not None:
                if linear.bias is not None and self.trace.used_once(linear.bias):
                    return linear.bias
            elif operation(each) in SUMS and not each.kwargs:
                whole = [x for x in inputs(each) if value_of(x).shape == value_of(each).shape]
                waiting += whole if len(arguments(each)) == 2 else []
            elif operation(each) in MOVES | KEEPS and not drops(each):
                before = arguments(each)[0]
                if len(inputs(each)) == 1 and carried(each, before, -1) == -1:
                    waiting.append(before)
        return None


def _behind_numbers(node: Node) -> tuple[Node, float]:
    """The last of the products with a number that alone read a node, and the number by which it is
    then multiplied.
    """
    factor = 1.0
    while len(users := readers(node)) == 1 and (number := number_of(users[0])) is not None:
        node, factor = users[0], factor * number
    return node, factor


def require_passed_on(trace: Trace, source: Node) -> None:
    """Linear maps alone read a node, as it is: moved, or averaged over positions."""
    waiting = [source]
    while waiting:
        for user in readers(waiting.pop()):
            if user in trace.linear_maps or user in trace.expert_maps:
                continue
            name = operation(user)
            if name in CONVOLUTIONS:
                continue  # whose input channels :meth:`Finding.reader` has proved
            if drops(user) or name not in MOVES | KEEPS | {"mean", "getitem", "index"}:
                raise NotProved(f"{name or 'the output of the model'} changes what it gives")
            waiting.append(user)


def bias_of(trace: Trace, weight: str) -> str | None:
    """The bias of the one linear map with this weight, if nothing else uses it."""
    if (convolution := trace.convolutions.get(weight)) is not None:
        view = trace.parameter((*arguments(convolution), None)[2])
        return view[0] if view is not None and trace.used_once(view[0]) else None
    for linear in trace.linear_maps.values():
        if linear.weight == weight and linear.bias is not None:
            return linear.bias if trace.used_once(linear.bias) else None
    return None


def columns_of(axes: Sequence[Axis]) -> list[tuple[str, int]]:
    """Weights and the axes of their columns."""
    return [(name, axis) for name, axis, _ in axes if isinstance(axis, int)]
