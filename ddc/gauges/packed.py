"""Queries, keys and values that one weight gives: which of its rows are which."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ddc.gauges.parts import named_part
from ddc.gauges.trace import LinearMap, Trace, labels_of
from ddc.gauges.traced import Finding


def attention_parts(trace: Trace) -> dict[str, list[str]]:
    """By weight that gives several of the queries, keys and values of attention, the parts that are
    one of these each: linear maps by themselves. Where the rows of a part lie in several stretches,
    head by head, each stretch is a part.
    """
    finding = Finding(trace)
    found: dict[str, tuple[LinearMap, list[frozenset[int]]]] = {}
    for attention in finding.attentions:
        for read in (attention.query, attention.key, attention.value):
            linear = None if read is None else finding.origin(read.value)
            if read is None or linear is None or not trace.used_once(linear.weight):
                continue
            before = trace.ancestors(read.value, [linear.output])
            rows: set[int] = set()
            for end in trace.flow({linear.output: labels_of(linear.output)}).arrivals:
                here = end.node is read.node and end.argument == read.argument
                if here or end.node in before:
                    rows.update(end.labels.unique().tolist())
            found.setdefault(linear.weight, (linear, []))[1].append(frozenset(rows))
    parts = {}
    for weight, (linear, sets) in found.items():
        size, apart = trace.tensors[weight].shape[linear.rows], {*sets}
        if len(apart) > 1 and sorted(row for rows in apart for row in rows) == [*range(size)]:
            parts[weight] = [
                named_part(weight, linear.rows, stretch, size)
                for stretch in sorted(stretch for rows in apart for stretch in stretches(rows))
            ]
    return parts


def stretches(rows: Iterable[int]) -> list[list[int]]:
    """Indices as ranges: one, where they are one, else as few of neighbours as there can be."""
    ordered = np.array(sorted(rows))
    steps = np.diff(ordered)
    if len({*steps.tolist()}) < 2:
        return [ordered.tolist()]
    return [run.tolist() for run in np.split(ordered, np.flatnonzero(steps > 1) + 1)]
