/* Adam's step on stacked matrices, on a CPU: what ddc/optim/kernels.py is in Triton, with the same
 * names and arguments, which are explained there. ddc/optim/native.py compiles this file.
 *
 * A kernel does the programs from `begin` to `end` of a grid of (blocks, count, parts), the first
 * of which varies fastest. A program takes its rows one by one, in pieces of at most BC <= WIDEST
 * columns. What a side multiplies its entries by, or takes off them, is a number of the row times
 * an entry for each column, so that one loop, over one piece, does for every kind of side; where
 * there is nothing these are ones, or zeros. All arithmetic is in float32.
 */
#include <math.h>
#include <stdint.h>

typedef int64_t i64;
enum { WIDEST = 8192 };
static const float ONES[WIDEST] = {[0 ... WIDEST - 1] = 1.0f}, ZEROS[WIDEST];

#define PRAGMA(x) _Pragma(#x)
#define EACH PRAGMA(omp simd) for (i64 i = 0; i < n; i++)
#define SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__)) for (i64 i = 0; i < n; i++)
#define INLINE static inline __attribute__((always_inline))
#define KERNEL(name) void ddc_##name
#define PROGRAMS                                                                                   \
    for (i64 program = begin; program < end; program++) {                                          \
        const i64 block = program % blocks, layer = program / blocks % count,                      \
                  part = program / blocks / count;                                                 \
        (void)part;
#define END }

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 quotient(i64 a, i64 b) { return (a + b - 1) / b; } /* rounded up */

/* Rows and columns of a matrix. */
typedef struct {
    i64 rows, columns;
} Shape;

/* What a vector, (L, rows or columns), has along an axis, in all rows, from a column on. */
typedef struct {
    const float *restrict of_rows, *restrict of_columns;
} Vector;

INLINE Vector vector(const float *values, i64 axis, i64 layer, i64 column, Shape shape)
{
    if (axis == 0)
        return (Vector){values + layer * shape.rows, ONES};
    return (Vector){0, axis == 1 ? values + layer * shape.columns + column : ONES};
}

INLINE float at_row(Vector v, i64 row) { return v.of_rows ? v.of_rows[row] : 1.0f; }

/* Weights and gradients of a layer from a column on, the means of the columns, and what dresses
 * them. */
typedef struct {
    const float *restrict weights, *restrict grads, *restrict means, *restrict grad_means;
    Vector factor, inverse;
} Source;

INLINE Source source_of(
    const float *weights, const i64 *weight_offsets, const float *grads, const i64 *grad_offsets,
    const float *factor, const float *inverse, const float *means, i64 layers, i64 axis,
    i64 centred, i64 layer, i64 column, Shape shape)
{
    const float *own = means + layer * shape.columns + column;
    return (Source){
        weights + weight_offsets[layer] + column,
        grads + grad_offsets[layer] + column,
        centred ? own : ZEROS,
        centred ? own + layers * shape.columns : ZEROS,
        vector(factor, axis, layer, column, shape),
        vector(inverse, axis, layer, column, shape),
    };
}

/* Adam's moments, and its numbers. */
typedef struct {
    float first, second, rest, epsilon;
} Adam;

/* A mean, moved to x by a share `first`: all of the way where that is 1. */
INLINE float moved(float mean, float x, float first)
{
    return first < 0.5f ? mean + first * (x - mean) : x - (1 - first) * (x - mean);
}

INLINE float direction(float mean, float moment, float epsilon)
{
    return mean / (sqrtf(moment) + epsilon);
}

/* Which indices a group has, or a block of `size` in order. */
typedef struct {
    const int32_t *order;
    i64 start, stop;
} Indices;

INLINE Indices indices_of(
    const int32_t *order, const int32_t *starts, i64 group, i64 size, i64 all, int grouped)
{
    if (grouped)
        return (Indices){order, starts[group], starts[group + 1]};
    return (Indices){0, group * size, least((group + 1) * size, all)};
}

INLINE i64 index_at(Indices x, i64 i) { return x.order ? x.order[i] : i; }

/* Three sums of each unit, and where they go. */
typedef struct {
    float *restrict one, *restrict two, *restrict three;
} Sums;

INLINE Sums sums_of(float *sums, i64 layers, i64 parts, i64 layer, i64 part, i64 units, i64 first)
{
    float *one = sums + (layer * parts + part) * units + first;
    const i64 kind = layers * parts * units;
    return (Sums){one, one + kind, one + 2 * kind};
}

INLINE void clear(Sums sums, i64 n)
{
    EACH sums.one[i] = sums.two[i] = sums.three[i] = 0;
}

KERNEL(column_sums)(
    i64 begin, i64 end, i64 blocks, i64 count, const float *weights, const i64 *weight_offsets,
    const float *grads, const i64 *grad_offsets, float *sums, i64 layers, i64 parts, i64 rows,
    i64 columns, i64 steps, i64 aligned, i64 BR, i64 BC)
{
    (void)aligned;
    PROGRAMS
        const i64 column = block * BC, n = least(BC, columns - column);
        float *restrict one = sums + (layer * parts + part) * columns + column;
        float *restrict two = one + layers * parts * columns;
        EACH one[i] = two[i] = 0;
        const i64 stop = least((part + 1) * steps * BR, rows);
        for (i64 row = part * steps * BR; row < stop; row++) {
            const float *restrict w = weights + weight_offsets[layer] + row * columns + column;
            const float *restrict g = grads + grad_offsets[layer] + row * columns + column;
            EACH {
                one[i] += w[i];
                two[i] += g[i];
            }
        }
    END
}

/* Add a piece of a row to the sums of its columns, or of itself. */
INLINE void sum_piece(const Source *s, Sums sums, i64 row, i64 unit, i64 n, i64 columns)
{
    const float *restrict weight = s->weights + row * columns;
    const float *restrict grad = s->grads + row * columns;
    const float *restrict means = s->means, *restrict grad_means = s->grad_means;
    const float *restrict factors = s->factor.of_columns;
    const float *restrict inverses = s->inverse.of_columns;
    const float factor = at_row(s->factor, row), inverse = at_row(s->inverse, row);
    float squares = 0, products = 0, grad_squares = 0;
#define DRESSED                                                                                    \
    const float w = (weight[i] - means[i]) * factor * factors[i];                                  \
    const float g = (grad[i] - grad_means[i]) * inverse * inverses[i];
    if (unit == 1)
        EACH {
            DRESSED
            sums.one[i] += w * w;
            sums.two[i] += w * g;
            sums.three[i] += g * g;
        }
    else {
        SUM(squares, products, grad_squares)
        {
            DRESSED
            squares += w * w;
            products += w * g;
            grad_squares += g * g;
        }
        *sums.one += squares;
        *sums.two += products;
        *sums.three += grad_squares;
    }
}

KERNEL(unit_sums)(
    i64 begin, i64 end, i64 blocks, i64 count, const float *weights, const i64 *weight_offsets,
    const float *grads, const i64 *grad_offsets, const float *factor, const float *inverse,
    const float *means, float *sums, i64 layers, i64 parts, i64 rows, i64 columns, i64 steps,
    i64 aligned, i64 unit, i64 axis, i64 centred, i64 BR, i64 BC)
{
    (void)aligned;
    const Shape shape = {rows, columns};
#define SOURCE(column)                                                                             \
    source_of(                                                                                     \
        weights, weight_offsets, grads, grad_offsets, factor, inverse, means, layers, axis,        \
        centred, layer, column, shape)
    PROGRAMS
        if (unit == 1) {
            const i64 column = block * BC, n = least(BC, columns - column);
            const Source source = SOURCE(column);
            const Sums own = sums_of(sums, layers, parts, layer, part, columns, column);
            clear(own, n);
            const i64 stop = least((part + 1) * steps * BR, rows);
            for (i64 row = part * steps * BR; row < stop; row++)
                sum_piece(&source, own, row, 1, n, columns);
            continue;
        }
        for (i64 row = block * BR; row < least((block + 1) * BR, rows); row++) {
            const Sums own = sums_of(sums, layers, parts, layer, part, rows, row);
            clear(own, 1);
            for (i64 column = 0; column < columns; column += BC) {
                const Source source = SOURCE(column);
                sum_piece(&source, own, row, 0, least(BC, columns - column), columns);
            }
        }
    END
}

/* What x = norm g - leaning w is made of. */
typedef struct {
    Source source;
    Vector norm, leaning;
} Input;

#define TANGENTIAL                                                                                 \
    const Source *const s = &input->source;                                                        \
    const float *restrict weight = s->weights + row * columns;                                     \
    const float *restrict grad = s->grads + row * columns;                                         \
    const float *restrict means = s->means, *restrict grad_means = s->grad_means;                  \
    const float *restrict factors = s->factor.of_columns;                                          \
    const float *restrict inverses = s->inverse.of_columns;                                        \
    const float *restrict norms = input->norm.of_columns;                                          \
    const float *restrict leanings = input->leaning.of_columns;                                    \
    const float factor = at_row(s->factor, row), inverse = at_row(s->inverse, row);                \
    const float norm = at_row(input->norm, row), leaning = at_row(input->leaning, row);
#define WEIGHT const float w = (weight[i] - means[i]) * factor * factors[i];
#define INPUT                                                                                      \
    WEIGHT                                                                                         \
    const float g = (grad[i] - grad_means[i]) * inverse * inverses[i];                             \
    const float x = g * norm * norms[i] - w * leaning * leanings[i];

/* Take x into the mean of a row whose moment is that of a group, and its squares into `squares`. */
INLINE void gather_piece(
    const Input *input, float *restrict mean, float *restrict squares, Adam adam, i64 row, i64 n,
    i64 columns)
{
    TANGENTIAL
    EACH {
        INPUT
        mean[i] = moved(mean[i], x, adam.first);
        squares[i] += x * x;
    }
}

/* The direction u of a piece of a row, with its moments, and the sums of u w, u² and u. `grouped`:
 * the moments are there. */
INLINE void direct_piece(
    const Input *input, float *restrict mean, float *restrict moment, Adam adam, Sums sums, i64 row,
    i64 unit, i64 grouped, i64 n, i64 columns)
{
    TANGENTIAL
    (void)grad_means, (void)inverses, (void)norms, (void)leanings;
    (void)inverse, (void)norm, (void)leaning, (void)grad;
    float products = 0, squares = 0, total = 0;
#define DIRECT                                                                                     \
    INPUT                                                                                          \
    const float to = moved(mean[i], x, adam.first);                                                \
    const float square = moment[i] * adam.second + x * x * adam.rest;                              \
    const float u = direction(to, square, adam.epsilon);                                           \
    mean[i] = to;                                                                                  \
    moment[i] = square;
#define BY_COLUMN                                                                                  \
    sums.one[i] += u * w;                                                                          \
    sums.two[i] += u * u;                                                                          \
    sums.three[i] += u;
    if (grouped)
        EACH {
            WEIGHT
            const float u = direction(mean[i], moment[i], adam.epsilon);
            BY_COLUMN
        }
    else if (unit == 1)
        EACH {
            DIRECT
            BY_COLUMN
        }
    else {
        SUM(products, squares, total)
        {
            DIRECT
            products += u * w;
            squares += u * u;
            total += u;
        }
        *sums.one += products;
        *sums.two += squares;
        *sums.three += total;
    }
}

KERNEL(direct)(
    i64 begin, i64 end, i64 blocks, i64 count, const float *weights, const i64 *weight_offsets,
    const float *grads, const i64 *grad_offsets, const float *factor, const float *inverse,
    const float *means, float *exp_avg, float *exp_avg_sq, const float *norm, const float *leaning,
    const float *floor, float *sums, const int32_t *order, const int32_t *starts, i64 groups,
    float first, float second, float rest, i64 layers, i64 parts, i64 rows, i64 columns, i64 steps,
    i64 aligned, i64 unit, i64 axis, i64 centred, i64 averaged, i64 BR, i64 BC)
{
    (void)aligned;
    const Shape shape = {rows, columns};
#define INPUT_FROM(column)                                                                         \
    {                                                                                              \
        SOURCE(column), vector(norm, unit, layer, column, shape),                                  \
            vector(leaning, unit, layer, column, shape)                                            \
    }
    float gathered[BC];
    PROGRAMS
        const Adam adam = {first, second, rest, floor[layer]};
        float *const mean = exp_avg + layer * rows * columns;
        float *const moments = exp_avg_sq + layer * rows * columns;
        if (unit == 1) {
            const i64 column = block * BC, n = least(BC, columns - column);
            const Input input = INPUT_FROM(column);
            const Sums own = sums_of(sums, layers, parts, layer, part, columns, column);
            clear(own, n);
            for (i64 group = part * steps; group < least((part + 1) * steps, groups); group++) {
                const Indices those = indices_of(order, starts, group, BR, rows, averaged == 0);
                if (averaged == 0) { /* the moment of the group, before its directions */
                    float *restrict moment =
                        exp_avg_sq + (layer * groups + group) * columns + column;
                    EACH gathered[i] = 0;
                    for (i64 k = those.start; k < those.stop; k++) {
                        const i64 row = index_at(those, k), place = row * columns + column;
                        gather_piece(&input, mean + place, gathered, adam, row, n, columns);
                    }
                    const float share = rest / (float)(those.stop - those.start);
                    EACH moment[i] = moment[i] * second + gathered[i] * share;
                    for (i64 k = those.start; k < those.stop; k++) {
                        const i64 row = index_at(those, k), place = row * columns + column;
                        direct_piece(
                            &input, mean + place, moment, adam, own, row, 1, 1, n, columns);
                    }
                } else
                    for (i64 row = those.start; row < those.stop; row++) {
                        const i64 place = row * columns + column;
                        direct_piece(
                            &input, mean + place, moments + place, adam, own, row, 1, 0, n,
                            columns);
                    }
            }
            continue;
        }
        for (i64 row = block * BR; row < least((block + 1) * BR, rows); row++) {
            const Sums own = sums_of(sums, layers, parts, layer, part, rows, row);
            clear(own, 1);
            for (i64 column = 0; column < columns; column += BC) {
                const Input input = INPUT_FROM(column);
                const i64 place = row * columns + column, n = least(BC, columns - column);
                direct_piece(
                    &input, mean + place, moments + place, adam, own, row, 0, 0, n, columns);
            }
        }
    END
}

KERNEL(write)(
    i64 begin, i64 end, i64 blocks, i64 count, float *weights, const i64 *weight_offsets,
    const float *factor, const float *undress, const float *means, const float *exp_avg,
    const float *exp_avg_sq, const float *keep, const float *turn, const float *floor,
    const float *mean_u, const int32_t *order, const int32_t *starts, i64 groups, i64 rows,
    i64 columns, i64 aligned, i64 unit, i64 axis, i64 centred, i64 averaged, i64 BR, i64 BC)
{
    (void)aligned;
    const Shape shape = {rows, columns};
    const i64 across = quotient(columns, BC);
    PROGRAMS
        const float epsilon = floor[layer];
        const i64 group = block / across, column = block % across * BC;
        const i64 n = least(BC, columns - column);
        const Indices those = indices_of(order, starts, group, BR, rows, averaged == 0);
        const Vector factor_of = vector(factor, axis, layer, column, shape);
        const Vector undress_of = vector(undress, axis, layer, column, shape);
        const Vector keep_of = vector(keep, unit, layer, column, shape);
        const Vector turn_of = vector(turn, unit, layer, column, shape);
        const float *restrict middle = centred ? means + layer * columns + column : ZEROS;
        const float *restrict middle_u = centred ? mean_u + layer * columns + column : ZEROS;
        const float *restrict factors = factor_of.of_columns;
        const float *restrict backs = undress_of.of_columns;
        const float *restrict keeps = keep_of.of_columns, *restrict turns = turn_of.of_columns;
        for (i64 k = those.start; k < those.stop; k++) {
            const i64 row = index_at(those, k), place = (layer * rows + row) * columns + column;
            float *restrict target = weights + weight_offsets[layer] + row * columns + column;
            const float *restrict mean = exp_avg + place;
            const float *restrict moment = averaged == 0
                ? exp_avg_sq + (layer * groups + group) * columns + column
                : exp_avg_sq + place;
            const float factor_at = at_row(factor_of, row) * at_row(keep_of, row);
            const float turn_at = at_row(turn_of, row), back_at = at_row(undress_of, row);
            EACH {
                const float w = target[i] - middle[i];
                const float u = direction(mean[i], moment[i], epsilon) - middle_u[i];
                const float back = back_at * backs[i];
                const float to = w * factor_at * factors[i] * keeps[i] - u * turn_at * turns[i];
                /* what a dead factor dresses has no effect, and stays as it is */
                target[i] = (back > 0 ? to * back : w) + middle[i];
            }
        }
    END
}

/* What a step of what no gauge scales writes to, from a column on, and by what it is dressed. */
typedef struct {
    float *restrict target;
    const float *restrict grads;
    Vector inverse, undress, relaxed;
    float keep, turn;
} Free;

/* Weights of a piece of a row, or of one entry, after the step: the direction is `u`. */
#define FREE_AT(row)                                                                               \
    float *restrict target = f->target + row * columns;                                            \
    const float *restrict grad = f->grads + row * columns;                                         \
    const float *restrict inverses = f->inverse.of_columns;                                        \
    const float *restrict backs = f->undress.of_columns;                                           \
    const float *restrict relaxes = f->relaxed.of_columns;                                         \
    const float inverse = at_row(f->inverse, row), back = at_row(f->undress, row);                 \
    const float relaxed = at_row(f->relaxed, row), keep = f->keep, turn = f->turn;                 \
    (void)grad, (void)inverses, (void)inverse;
#define FREE_INPUT const float x = grad[i] * inverse * inverses[i];
#define FREE_WRITE                                                                                 \
    target[i] = (target[i] * keep - u * back * backs[i] * turn) / (relaxed * relaxes[i]);

INLINE void free_piece(
    const Free *f, float *restrict mean, float *restrict moment, Adam adam, i64 row, i64 n,
    i64 columns)
{
    FREE_AT(row)
    EACH {
        FREE_INPUT
        const float to = moved(mean[i], x, adam.first);
        const float square = moment[i] * adam.second + x * x * adam.rest;
        const float u = direction(to, square, adam.epsilon);
        mean[i] = to;
        moment[i] = square;
        FREE_WRITE
    }
}

/* The same of rows that have one moment. */
INLINE void free_rows(
    const Free *f, float *restrict means, float *restrict moment, Adam adam, Indices those,
    float *restrict gathered, i64 n, i64 columns)
{
    EACH gathered[i] = 0;
    for (i64 k = those.start; k < those.stop; k++) {
        const i64 row = index_at(those, k);
        float *restrict mean = means + row * columns;
        FREE_AT(row)
        (void)target, (void)backs, (void)relaxes, (void)back, (void)relaxed, (void)keep, (void)turn;
        EACH {
            FREE_INPUT
            mean[i] = moved(mean[i], x, adam.first);
            gathered[i] += x * x;
        }
    }
    const float share = adam.rest / (float)(those.stop - those.start);
    EACH moment[i] = moment[i] * adam.second + gathered[i] * share;
    for (i64 k = those.start; k < those.stop; k++) {
        const i64 row = index_at(those, k);
        const float *restrict mean = means + row * columns;
        FREE_AT(row)
        EACH {
            const float u = direction(mean[i], moment[i], adam.epsilon);
            FREE_WRITE
        }
    }
}

/* The same of columns that have one moment in each row, which lie side by side, or anywhere. */
INLINE void free_columns(
    const Free *f, float *restrict means, float *restrict moment, Adam adam, Indices those, i64 row,
    i64 columns)
{
    float *restrict mean = means + row * columns;
    FREE_AT(row)
    const int32_t *restrict order = those.order + those.start;
    const i64 n = those.stop - those.start, begin = order[0];
    const int side_by_side = order[n - 1] - begin == n - 1; /* they are in order */
    float gathered = 0;
#define GATHER(at)                                                                                 \
    const i64 i = at;                                                                              \
    FREE_INPUT                                                                                     \
    mean[i] = moved(mean[i], x, adam.first);                                                       \
    gathered += x * x;
    if (side_by_side)
        PRAGMA(omp simd reduction(+ : gathered)) for (i64 k = 0; k < n; k++) { GATHER(begin + k) }
    else
        for (i64 k = 0; k < n; k++) { GATHER(order[k]) }
    *moment = *moment * adam.second + gathered / (float)n * adam.rest;
    const float over = 1.0f / (sqrtf(*moment) + adam.epsilon);
#define WRITE(at)                                                                                  \
    const i64 i = at;                                                                              \
    const float u = mean[i] * over;                                                                \
    FREE_WRITE
    if (side_by_side)
        PRAGMA(omp simd) for (i64 k = 0; k < n; k++) { WRITE(begin + k) }
    else
        for (i64 k = 0; k < n; k++) { WRITE(order[k]) }
}

KERNEL(free)(
    i64 begin, i64 end, i64 blocks, i64 count, float *weights, const i64 *weight_offsets,
    const float *grads, const i64 *grad_offsets, const float *inverse, const float *undress,
    const float *relaxed, float *exp_avg, float *exp_avg_sq, const float *keep, const float *turn,
    const float *floor, const int32_t *order, const int32_t *starts, i64 groups, float first,
    float second, float rest, i64 rows, i64 columns, i64 aligned, i64 axis, i64 relaxed_axis,
    i64 averaged, i64 BR, i64 BC)
{
    (void)aligned;
    const Shape shape = {rows, columns};
    const i64 across = quotient(columns, BC);
    float gathered[BC];
    PROGRAMS
        const Adam adam = {first, second, rest, floor[layer]};
        const i64 column = averaged == 1 ? 0 : block % across * BC;
        const i64 group = averaged == 1 ? block % groups : block / across;
        const Free it = {
            weights + weight_offsets[layer] + column,
            grads + grad_offsets[layer] + column,
            vector(inverse, axis, layer, column, shape),
            vector(undress, axis, layer, column, shape),
            vector(relaxed, relaxed_axis, layer, column, shape),
            keep[layer],
            turn[layer],
        };
        float *const means = exp_avg + layer * rows * columns + column;
        if (averaged == 1) {
            const Indices those = indices_of(order, starts, group, BC, columns, 1);
            const i64 from = block / groups * BR; /* rows are in the cache for the next group */
            float *const squares = exp_avg_sq + layer * rows * groups + group;
            for (i64 row = from; row < least(from + BR, rows); row++)
                free_columns(&it, means, squares + row * groups, adam, those, row, columns);
            continue;
        }
        const i64 n = least(BC, columns - column);
        const Indices those = indices_of(order, starts, group, BR, rows, averaged == 0);
        if (averaged == 0) {
            float *const moment = exp_avg_sq + (layer * groups + group) * columns + column;
            free_rows(&it, means, moment, adam, those, gathered, n, columns);
            continue;
        }
        float *const moments = exp_avg_sq + layer * rows * columns + column;
        for (i64 row = those.start; row < those.stop; row++)
            free_piece(
                &it, means + row * columns, moments + row * columns, adam, row, n, columns);
    END
}
