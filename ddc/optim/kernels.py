"""Adam's step on stacked matrices, in Triton: each pass over the weights is one kernel for all
layers.

A matrix is (rows, columns), one a layer, wherever it lies: ``weights`` and ``grads`` are those of
the first layer, and their ``offsets``, (L,), say how many entries further on those of each begin. A
*unit* of a gauge is a row (``UNIT`` 0) or a column (1). A *factor* dresses rows
or columns (``FACTOR`` 0, 1; -1: none). Where a rotation turns indices along an axis (``AVERAGED``
0: rows, 1: columns; -1: none), the second moment has one entry a group of them, and ``order`` lists
the indices group by group, group i from ``starts[i]`` to ``starts[i + 1]``.

A program has a block of one layer: some units, and all of their entries (rows) or those of some
rows (columns), whose sums go to ``sums``, (kinds, L, parts, units), to be added up in a fixed
order. Where it has one tile, blocks of rows and columns are counted together along the first axis
of the grid, for the others end at 65,535. All arithmetic is in float32. :mod:`ddc.optim.fused`
calls them.
"""

# mypy: ignore-errors
# (Triton reads annotations of a kernel, and knows no types but its own)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _of_layer(first, offsets, layer, ALIGNED: tl.constexpr):
    """Where a layer's entries begin; their multiple lets loads take several at once."""
    return first + tl.multiple_of(tl.load(offsets + layer), ALIGNED)


@triton.jit
def _indices(order, starts, group, groups, SIZE: tl.constexpr, GROUPED: tl.constexpr):
    """The indices of a group, or of a block of ``SIZE`` in order, and which of them there are."""
    if GROUPED:
        start = tl.load(starts + group, mask=group < groups, other=0)
        stop = tl.load(starts + group + 1, mask=group < groups, other=0)
        places = start + tl.arange(0, SIZE)
        there = places < stop
        indices = tl.load(order + places, mask=there, other=0)
    else:
        indices = group * SIZE + tl.arange(0, SIZE)
        there = indices < groups
    return indices, there


@triton.jit
def _of_tile(vector, layer, rows, columns, ROWS, COLUMNS, AXIS: tl.constexpr):
    """Entries of a vector along an axis, (L, rows or columns), to what broadcasts with a tile."""
    if AXIS == 0:
        values = tl.load(vector + layer * ROWS + rows, mask=rows < ROWS, other=1.0)[:, None]
    else:
        values = tl.load(vector + layer * COLUMNS + columns, mask=columns < COLUMNS, other=1.0)
        values = values[None, :]
    return values


@triton.jit
def _dressed(
    weights,
    weight_offsets,
    grads,
    grad_offsets,
    factor,
    inverse,
    means,
    layer,
    layers,
    rows,
    columns,
    there,
    ROWS,
    COLUMNS,
    ALIGNED: tl.constexpr,
    FACTOR: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Weights and gradients of a tile, without the mean of each column and dressed."""
    places = rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
    weight = tl.load(
        _of_layer(weights, weight_offsets, layer, ALIGNED) + places, mask=there, other=0.0
    )
    grad = tl.load(_of_layer(grads, grad_offsets, layer, ALIGNED) + places, mask=there, other=0.0)
    weight, grad = weight.to(tl.float32), grad.to(tl.float32)
    if CENTRED:
        weight -= _of_tile(means, layer, rows, columns, ROWS, COLUMNS, 1)
        grad -= _of_tile(means + layers * COLUMNS, layer, rows, columns, ROWS, COLUMNS, 1)
        weight, grad = tl.where(there, weight, 0.0), tl.where(there, grad, 0.0)
    if FACTOR >= 0:
        weight *= _of_tile(factor, layer, rows, columns, ROWS, COLUMNS, FACTOR)
        grad *= _of_tile(inverse, layer, rows, columns, ROWS, COLUMNS, FACTOR)
    return weight, grad


@triton.jit
def _moved(mean, x, first):
    """The mean, moved to x by a share ``first``: all of the way where that is 1."""
    way = x - mean
    return tl.where(first < 0.5, mean + first * way, x - (1 - first) * way)


@triton.jit
def _direction(
    x,
    exp_avg,
    exp_avg_sq,
    places,
    rows,
    columns,
    row_there,
    column_there,
    layer,
    group,
    groups,
    first,
    second,
    rest,
    epsilon,
    ROWS,
    COLUMNS,
    AVERAGED: tl.constexpr,
):
    """Take a tile of inputs x into the moments; Adam's direction, without bias corrections."""
    there = row_there[:, None] & column_there[None, :]
    mean = tl.load(exp_avg + places, mask=there, other=0.0)
    mean = _moved(mean, x, first)
    tl.store(exp_avg + places, mean, mask=there)
    square = tl.where(there, x * x, 0.0)
    if AVERAGED == 0:
        count = tl.sum(row_there.to(tl.float32), 0)
        known = columns < tl.where(group < groups, COLUMNS, 0)
        at = (layer.to(tl.int64) * groups + group) * COLUMNS + columns
        moment = tl.load(exp_avg_sq + at, mask=known, other=0.0) * second
        moment += tl.sum(square, 0) / tl.maximum(count, 1.0) * rest
        tl.store(exp_avg_sq + at, moment, mask=known)
        u = mean / (tl.sqrt_rn(moment) + epsilon)[None, :]
    elif AVERAGED == 1:
        count = tl.sum(column_there.to(tl.float32), 0)
        known = rows < tl.where(group < groups, ROWS, 0)
        at = (layer.to(tl.int64) * ROWS + rows) * groups + group
        moment = tl.load(exp_avg_sq + at, mask=known, other=0.0) * second
        moment += tl.sum(square, 1) / tl.maximum(count, 1.0) * rest
        tl.store(exp_avg_sq + at, moment, mask=known)
        u = mean / (tl.sqrt_rn(moment) + epsilon)[:, None]
    else:
        moment = tl.load(exp_avg_sq + places, mask=there, other=0.0) * second + square * rest
        tl.store(exp_avg_sq + places, moment, mask=there)
        u = mean / (tl.sqrt_rn(moment) + epsilon)
    return u


@triton.jit
def _store_sums(
    sums,
    one,
    two,
    three,
    layer,
    layers,
    part,
    parts,
    ROWS,
    COLUMNS,
    UNIT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """What a program has summed up of three kinds, (BR, BC) each, by unit."""
    if UNIT == 1:
        units, count = tl.program_id(0) * BC + tl.arange(0, BC), COLUMNS
    else:
        units, count = tl.program_id(0) * BR + tl.arange(0, BR), ROWS
    place, kind = (layer * parts + part) * count + units, layers * parts * count
    tl.store(sums + place, tl.sum(one, 1 - UNIT), mask=units < count)
    tl.store(sums + kind + place, tl.sum(two, 1 - UNIT), mask=units < count)
    tl.store(sums + 2 * kind + place, tl.sum(three, 1 - UNIT), mask=units < count)


@triton.jit
def column_sums(
    weights,
    weight_offsets,
    grads,
    grad_offsets,
    sums,
    layers,
    parts,
    ROWS,
    COLUMNS,
    STEPS,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums of weights and of gradients down each column: kinds 0 and 1."""
    layer, part = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    weight_sum, grad_sum = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for step in range(STEPS):
        rows = (part * STEPS + step) * BR + tl.arange(0, BR)
        there = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
        weight, grad = _dressed(
            weights, weight_offsets, grads, grad_offsets, weights, weights, weights, layer, layers,
            rows, columns, there, ROWS, COLUMNS, ALIGNED, -1, False,
        )  # fmt: skip
        weight_sum += tl.sum(weight, 0)
        grad_sum += tl.sum(grad, 0)
    place = (layer * parts + part) * COLUMNS + columns
    tl.store(sums + place, weight_sum, mask=columns < COLUMNS)
    tl.store(sums + layers * parts * COLUMNS + place, grad_sum, mask=columns < COLUMNS)


@triton.jit
def unit_sums(
    weights,
    weight_offsets,
    grads,
    grad_offsets,
    factor,
    inverse,
    means,
    sums,
    layers,
    parts,
    ROWS,
    COLUMNS,
    STEPS,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    FACTOR: tl.constexpr,
    CENTRED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Of each unit, the sums of w², w g and g²: kinds 0, 1, 2."""
    layer, part = tl.program_id(1), tl.program_id(2)
    squares = tl.zeros((BR, BC), tl.float32)
    products = tl.zeros((BR, BC), tl.float32)
    grad_squares = tl.zeros((BR, BC), tl.float32)
    for step in range(STEPS):
        if UNIT == 1:
            rows = (part * STEPS + step) * BR + tl.arange(0, BR)
            columns = tl.program_id(0) * BC + tl.arange(0, BC)
        else:
            rows = tl.program_id(0) * BR + tl.arange(0, BR)
            columns = step * BC + tl.arange(0, BC)
        there = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
        weight, grad = _dressed(
            weights, weight_offsets, grads, grad_offsets, factor, inverse, means, layer, layers,
            rows, columns, there, ROWS, COLUMNS, ALIGNED, FACTOR, CENTRED,
        )  # fmt: skip
        squares += weight * weight
        products += weight * grad
        grad_squares += grad * grad
    _store_sums(
        sums, squares, products, grad_squares, layer, layers, part, parts, ROWS, COLUMNS,
        UNIT, BR, BC,
    )  # fmt: skip


@triton.jit
def direct(
    weights,
    weight_offsets,
    grads,
    grad_offsets,
    factor,
    inverse,
    means,
    exp_avg,
    exp_avg_sq,
    norm,
    leaning,
    floor,
    sums,
    order,
    starts,
    groups,
    first,
    second,
    rest,
    layers,
    parts,
    ROWS,
    COLUMNS,
    STEPS,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    FACTOR: tl.constexpr,
    CENTRED: tl.constexpr,
    AVERAGED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Take x = norm g - leaning w into the moments; of Adam's direction u, the sums over each unit
    of u w, u² and u: kinds 0, 1, 2.

    ``first`` is 1 - beta1, ``second`` beta2, ``rest`` 1 - beta2, ``floor`` eps times the root of
    the second bias correction, (L,).
    """
    layer, part = tl.program_id(1), tl.program_id(2)
    products, squares = tl.zeros((BR, BC), tl.float32), tl.zeros((BR, BC), tl.float32)
    total = tl.zeros((BR, BC), tl.float32)
    epsilon = tl.load(floor + layer)
    for step in range(STEPS):
        group = part * STEPS + step
        if UNIT == 1:
            rows, row_there = _indices(order, starts, group, groups, BR, AVERAGED == 0)
            columns = tl.program_id(0) * BC + tl.arange(0, BC)
        else:
            rows = tl.program_id(0) * BR + tl.arange(0, BR)
            row_there = rows < ROWS
            columns = step * BC + tl.arange(0, BC)
        there = row_there[:, None] & (columns < COLUMNS)[None, :]
        weight, grad = _dressed(
            weights, weight_offsets, grads, grad_offsets, factor, inverse, means, layer, layers,
            rows, columns, there, ROWS, COLUMNS, ALIGNED, FACTOR, CENTRED,
        )  # fmt: skip
        x = grad * _of_tile(norm, layer, rows, columns, ROWS, COLUMNS, UNIT)
        x -= weight * _of_tile(leaning, layer, rows, columns, ROWS, COLUMNS, UNIT)
        places = (layer.to(tl.int64) * ROWS + rows[:, None]) * COLUMNS + columns[None, :]
        u = _direction(
            x, exp_avg, exp_avg_sq, places, rows, columns, row_there, columns < COLUMNS, layer,
            group, groups, first, second, rest, epsilon, ROWS, COLUMNS, AVERAGED,
        )  # fmt: skip
        u = tl.where(there, u, 0.0)
        products += u * weight
        squares += u * u
        total += u
    _store_sums(
        sums, products, squares, total, layer, layers, part, parts, ROWS, COLUMNS,
        UNIT, BR, BC,
    )  # fmt: skip


@triton.jit
def write(
    weights,
    weight_offsets,
    factor,
    undress,
    means,
    exp_avg,
    exp_avg_sq,
    keep,
    turn,
    floor,
    mean_u,
    order,
    starts,
    groups,
    ROWS,
    COLUMNS,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    FACTOR: tl.constexpr,
    CENTRED: tl.constexpr,
    AVERAGED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Weights become keep · w - turn · u, undressed, with the mean of each column back."""
    blocks = tl.cdiv(COLUMNS, BC)
    layer, block, group = tl.program_id(1), tl.program_id(0) % blocks, tl.program_id(0) // blocks
    epsilon = tl.load(floor + layer)
    rows, row_there = _indices(order, starts, group, groups, BR, AVERAGED == 0)
    columns = block * BC + tl.arange(0, BC)
    there = row_there[:, None] & (columns < COLUMNS)[None, :]
    inside = rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
    places = layer.to(tl.int64) * ROWS * COLUMNS + inside
    target = _of_layer(weights, weight_offsets, layer, ALIGNED) + inside
    original = tl.load(target, mask=there, other=0.0).to(tl.float32)
    mean = tl.load(exp_avg + places, mask=there, other=0.0)
    if AVERAGED == 0:
        known = columns < tl.where(group < groups, COLUMNS, 0)
        at = (layer.to(tl.int64) * groups + group) * COLUMNS + columns
        moment = tl.load(exp_avg_sq + at, mask=known, other=1.0)
        u = mean / (tl.sqrt_rn(moment) + epsilon)[None, :]
    else:
        moment = tl.load(exp_avg_sq + places, mask=there, other=1.0)
        u = mean / (tl.sqrt_rn(moment) + epsilon)
    weight = original
    if CENTRED:
        middle = _of_tile(means, layer, rows, columns, ROWS, COLUMNS, 1)
        weight -= middle
        u -= _of_tile(mean_u, layer, rows, columns, ROWS, COLUMNS, 1)
    if FACTOR >= 0:
        weight *= _of_tile(factor, layer, rows, columns, ROWS, COLUMNS, FACTOR)
    weight = weight * _of_tile(keep, layer, rows, columns, ROWS, COLUMNS, UNIT)
    weight -= u * _of_tile(turn, layer, rows, columns, ROWS, COLUMNS, UNIT)
    if FACTOR >= 0:  # what a dead factor dresses has no effect, and stays as it is
        back = _of_tile(undress, layer, rows, columns, ROWS, COLUMNS, FACTOR)
        if CENTRED:
            weight = tl.where(back > 0, weight * back, original - middle)
        else:
            weight = tl.where(back > 0, weight * back, original)
    if CENTRED:
        weight += middle
    tl.store(target, weight.to(weights.dtype.element_ty), mask=there)


@triton.jit
def free(
    weights,
    weight_offsets,
    grads,
    grad_offsets,
    inverse,
    undress,
    relaxed,
    exp_avg,
    exp_avg_sq,
    keep,
    turn,
    floor,
    order,
    starts,
    groups,
    first,
    second,
    rest,
    ROWS,
    COLUMNS,
    ALIGNED: tl.constexpr,
    FACTOR: tl.constexpr,
    RELAXED: tl.constexpr,
    AVERAGED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """All of a step of what no gauge scales: moments, and w becomes (keep · w - turn · u) with
    ``keep`` and ``turn`` one number a layer, (L,); gradients dressed, u undressed.
    """
    blocks = tl.cdiv(ROWS, BR) if AVERAGED == 1 else tl.cdiv(COLUMNS, BC)
    layer, block, group = tl.program_id(1), tl.program_id(0) % blocks, tl.program_id(0) // blocks
    epsilon = tl.load(floor + layer)
    if AVERAGED == 1:
        rows = block * BR + tl.arange(0, BR)
        row_there = rows < ROWS
        columns, column_there = _indices(order, starts, group, groups, BC, True)
    else:
        rows, row_there = _indices(order, starts, group, groups, BR, AVERAGED == 0)
        columns = block * BC + tl.arange(0, BC)
        column_there = columns < COLUMNS
    there = row_there[:, None] & column_there[None, :]
    inside = rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
    places = layer.to(tl.int64) * ROWS * COLUMNS + inside
    target = _of_layer(weights, weight_offsets, layer, ALIGNED) + inside
    weight = tl.load(target, mask=there, other=0.0).to(tl.float32)
    x = tl.load(_of_layer(grads, grad_offsets, layer, ALIGNED) + inside, mask=there, other=0.0).to(
        tl.float32
    )
    if FACTOR >= 0:
        x *= _of_tile(inverse, layer, rows, columns, ROWS, COLUMNS, FACTOR)
    u = _direction(
        x, exp_avg, exp_avg_sq, places, rows, columns, row_there, column_there, layer, group,
        groups, first, second, rest, epsilon, ROWS, COLUMNS, AVERAGED,
    )  # fmt: skip
    if FACTOR >= 0:
        u *= _of_tile(undress, layer, rows, columns, ROWS, COLUMNS, FACTOR)
    weight = weight * tl.load(keep + layer) - u * tl.load(turn + layer)
    if RELAXED >= 0:
        weight /= _of_tile(relaxed, layer, rows, columns, ROWS, COLUMNS, RELAXED)
    tl.store(target, weight.to(weights.dtype.element_ty), mask=there)
