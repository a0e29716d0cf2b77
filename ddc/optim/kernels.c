/* Adam's step on stacked matrices, on a CPU. ddc/optim/native.py compiles this file.
 *
 * `polar` is a step of ddc/optim/polar.py, or the norm of a gradient there: all of it for some
 * units of one layer at a time, so that what one pass has read is in the cache for the next. `free`
 * is the step of ddc/optim/free.py, and has the arguments of the kernel in ddc/optim/kernels.py,
 * which explains them. A kernel does the programs from `begin` to `end`. All arithmetic on entries
 * is in float32, and so are sums of up to ROUND rows or PIECE columns, which are added up in double.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>

typedef int64_t i64;
enum { WIDEST = 8192, PIECE = 1024, ROUND = 64, LINE = 64, CENTRED_ROUNDING = 16 };
static const float ONES[WIDEST] = {[0 ... WIDEST - 1] = 1.0f};

#define PRAGMA(x) _Pragma(#x)
#define EACH PRAGMA(omp simd) for (i64 i = 0; i < n; i++)
#define SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__)) for (i64 i = 0; i < n; i++)
#define INLINE static inline __attribute__((always_inline))
#define KERNEL(name) void ddc_##name
#define PROGRAMS                                                                                   \
    for (i64 program = begin; program < end; program++) {                                          \
        const i64 block = program % blocks, layer = program / blocks % count;
#define END }

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
/* The larger of x and zero; what is nan stays it, as it does not in fmaxf. */
INLINE float positive(float x) { return x < 0 ? 0 : x; }
INLINE i64 quotient(i64 a, i64 b) { return (a + b - 1) / b; } /* rounded up */

/* Adam's numbers. */
typedef struct {
    float first, second, rest, epsilon;
} Adam;

/* A mean, moved to x by a share `first`: all of the way where that is 1. */
INLINE float moved(float mean, float x, float first) { return mean * (1 - first) + x * first; }

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

/* ---- one rescale gauge: what Python fills in ---- */

/* A matrix of a side, or one that the plus side dresses, in each of L layers. Its units are rows
 * (`unit` 0) or columns (1); a vector along units is a matrix of one row. */
typedef struct {
    const i64 *weights, *grads;  /* where those of each layer lie */
    float *exp_avg, *exp_avg_sq; /* (L, rows, columns), the second maybe with groups for rows */
    const float *before, *after; /* norms whose `degree`-th power dresses it along `axis`, if >= 0 */
    const int32_t *order, *starts; /* groups of rows that share a second moment, if `averaged` */
    i64 rows, columns, groups, unit, axis, centred, averaged;
    float degree, offset, decay;
} Matrix;

/* A side: its matrices, how many entries a unit has, and its step scale over its norm. */
typedef struct {
    const Matrix *matrices;
    i64 count, unit_size;
    float init_scale;
} Side;

enum { FREEZE, ADAM, BALANCE };

/* A gauge of `units` in each of `layers`, `block` of them at a time. */
typedef struct {
    Side plus, minus, dressed;
    float *radial, *radial_sq, *vertical, *vertical_sq, *plus_waking, *minus_waking;
    float *before, *after, *squares; /* (L, U): norms of the plus side; of the gradient */
    const float *steps;              /* (L,) */
    i64 units, block, measure, mode, by_norm, retract;
    double first, second, first_rest, second_rest, eps;
    float lr, radial_rate, degree;
} Polar;

/* For a test, that Python gives them the same. */
const i64 ddc_size_of_matrix = sizeof(Matrix), ddc_size_of_side = sizeof(Side),
          ddc_size_of_polar = sizeof(Polar);

/* ---- one rescale gauge: some units of a layer ---- */

/* One matrix there: where its entries are, and room for the directions of all of them. */
typedef struct {
    const Matrix *matrix;
    float *restrict weights;
    const float *restrict grads;
    float *restrict mean, *restrict moments;
    float *restrict factor, *restrict inverse, *restrict undress;
    float *restrict means, *restrict grad_means, *restrict mean_u, *restrict u;
    i64 n;
} Piece;

/* A side there: sums over each unit, and what they say. */
typedef struct {
    const Side *side;
    Piece *pieces;
    double *restrict squares, *restrict products, *restrict grad_squares, *restrict taken;
    float *restrict norm, *restrict scale, *restrict leaning, *restrict change;
    float *restrict keep, *restrict turn, *restrict after;
    int32_t *restrict waking;
} Half;

/* Numbers of a layer: those of Adam, and by what its directions are to be multiplied. */
typedef struct {
    Adam adam;
    float ratio;
} Clock;

/* `by_column`, a constant in a branch of its own, says whether each column has its factor. */
#define BRANCHES(function, ...)                                                                    \
    {                                                                                              \
        if (piece->matrix->axis == 1)                                                              \
            function(__VA_ARGS__, 1);                                                              \
        else                                                                                       \
            function(__VA_ARGS__, 0);                                                              \
    }

/* Of a row from a column on, n entries: weight w and gradient g, dressed. */
#define ROW(row, column)                                                                           \
    const i64 place = (row) * piece->matrix->columns + (column);                                   \
    float *restrict weight = piece->weights + place;                                               \
    const float *restrict grad = piece->grads + place;                                             \
    const float *restrict factors = piece->factor + (column);                                      \
    const float *restrict inverses = piece->inverse + (column);                                    \
    const float offset = piece->matrix->offset;                                                    \
    const int by_row = piece->matrix->axis == 0;                                                   \
    const float factor = by_row ? piece->factor[row] : 1;                                          \
    const float inverse = by_row ? piece->inverse[row] : 1;                                        \
    (void)weight, (void)grad, (void)factors, (void)inverses, (void)factor, (void)inverse;
#define BY(x) (by_column ? x##s[i] : x)
#define WEIGHT(mean) const float w = (weight[i] + offset - mean) * BY(factor);
#define GRAD(mean) const float g = (grad[i] - mean) * BY(inverse);

/* Means of the columns, which a centred matrix is without. */
static void centre(Piece *piece)
{
    const Matrix *m = piece->matrix;
    const i64 n = piece->n;
    double one[n], two[n];
    EACH one[i] = two[i] = 0;
    for (i64 row = 0; row < m->rows; row++) {
        const float *restrict weight = piece->weights + row * m->columns;
        const float *restrict grad = piece->grads + row * m->columns;
        EACH {
            one[i] += weight[i] + m->offset;
            two[i] += grad[i];
        }
    }
    EACH {
        piece->means[i] = (float)(one[i] / (double)m->rows);
        piece->grad_means[i] = (float)(two[i] / (double)m->rows);
    }
}

/* Add up w², w g and g² over each unit. */
INLINE void sum_columns(const Piece *piece, const Half *to, const int by_column)
{
    const i64 n = piece->n, rows = piece->matrix->rows;
    const float *restrict means = piece->means, *restrict grad_means = piece->grad_means;
    float one[n], two[n], three[n];
    for (i64 start = 0; start < rows; start += ROUND) {
        EACH one[i] = two[i] = three[i] = 0;
        for (i64 row = start; row < least(start + ROUND, rows); row++) {
            ROW(row, 0)
            EACH {
                WEIGHT(means[i])
                GRAD(grad_means[i])
                one[i] += w * w;
                two[i] += w * g;
                three[i] += g * g;
            }
        }
        EACH {
            to->squares[i] += one[i];
            to->products[i] += two[i];
            to->grad_squares[i] += three[i];
        }
    }
}

INLINE void sum_rows(const Piece *piece, const Half *to, const int by_column)
{
    for (i64 row = 0; row < piece->n; row++)
        for (i64 column = 0; column < piece->matrix->columns; column += PIECE) {
            const i64 n = least(PIECE, piece->matrix->columns - column);
            float one = 0, two = 0, three = 0;
            ROW(row, column)
            SUM(one, two, three)
            {
                WEIGHT(0)
                GRAD(0)
                one += w * w;
                two += w * g;
                three += g * g;
            }
            to->squares[row] += one;
            to->products[row] += two;
            to->grad_squares[row] += three;
        }
}

/* And the squares of what centring has taken off. */
static void sum_taken(const Piece *piece, const Half *to)
{
    const Matrix *m = piece->matrix;
    double rows = (double)m->rows;
    if (m->axis == 0) {
        rows = 0;
        for (i64 row = 0; row < m->rows; row++)
            rows += (double)piece->factor[row] * piece->factor[row];
    }
    for (i64 i = 0; i < piece->n; i++) {
        const double mean = piece->means[i] * (m->axis == 1 ? piece->factor[i] : 1);
        to->taken[i] += rows * mean * mean;
    }
}

/* The directions u of x = norm g - leaning w, with the moments, and the sums of u w, u² and u. */
#define DIRECTION                                                                                  \
    const float to = moved(mean[i], x, adam.first);                                                \
    const float square = moment[i] * adam.second + x * x * adam.rest;                              \
    const float u = direction(to, square, adam.epsilon);                                           \
    mean[i] = to;                                                                                  \
    moment[i] = square;                                                                            \
    out[i] = u;
#define COLUMN_SUMS                                                                                \
    one[i] += u * w;                                                                               \
    two[i] += u * u;                                                                               \
    three[i] += u;
INLINE void direct_columns(
    const Piece *piece, const Half *half, Adam adam, const int by_column)
{
    const Matrix *m = piece->matrix;
    const i64 n = piece->n, groups = m->averaged ? m->groups : quotient(m->rows, ROUND);
    const float *restrict norm = half->scale, *restrict leaning = half->leaning;
    const float *restrict means = piece->means, *restrict grad_means = piece->grad_means;
    float one[n], two[n], three[n], gathered[n];
    i64 added = 0; /* rows since the sums were cleared */
    for (i64 group = 0; group < groups; group++) {
        const Indices those =
            indices_of(m->order, m->starts, group, ROUND, m->rows, (int)m->averaged);
        if (!added)
            EACH one[i] = two[i] = three[i] = 0;
        if (m->averaged) { /* the moment of the group, before its directions */
            float *restrict moment = piece->moments + group * m->columns;
            EACH gathered[i] = 0;
            for (i64 k = those.start; k < those.stop; k++) {
                const i64 row = index_at(those, k);
                float *restrict mean = piece->mean + row * m->columns;
                ROW(row, 0)
                EACH {
                    WEIGHT(means[i])
                    GRAD(grad_means[i])
                    const float x = g * norm[i] - w * leaning[i];
                    mean[i] = moved(mean[i], x, adam.first);
                    gathered[i] += x * x;
                }
            }
            const float share = adam.rest / (float)(those.stop - those.start);
            EACH {
                moment[i] = moment[i] * adam.second + gathered[i] * share;
                gathered[i] = 1 / (sqrtf(moment[i]) + adam.epsilon);
            }
            for (i64 k = those.start; k < those.stop; k++) {
                const i64 row = index_at(those, k);
                const float *restrict mean = piece->mean + row * m->columns;
                float *restrict out = piece->u + row * n;
                ROW(row, 0)
                EACH {
                    WEIGHT(means[i])
                    const float u = mean[i] * gathered[i];
                    out[i] = u;
                    COLUMN_SUMS
                }
            }
        } else
            for (i64 row = those.start; row < those.stop; row++) {
                float *restrict mean = piece->mean + row * m->columns;
                float *restrict moment = piece->moments + row * m->columns;
                float *restrict out = piece->u + row * n;
                ROW(row, 0)
                EACH {
                    WEIGHT(means[i])
                    GRAD(grad_means[i])
                    const float x = g * norm[i] - w * leaning[i];
                    DIRECTION
                    COLUMN_SUMS
                }
            }
        added += those.stop - those.start;
        if (added < ROUND && group < groups - 1)
            continue;
        added = 0;
        EACH {
            half->products[i] += one[i];
            half->squares[i] += two[i];
            half->taken[i] += three[i];
        }
    }
}

INLINE void direct_rows(
    const Piece *piece, const Half *half, Adam adam, const int by_column)
{
    const i64 columns = piece->matrix->columns;
    for (i64 row = 0; row < piece->n; row++) {
        const float norm = half->scale[row], leaning = half->leaning[row];
        for (i64 column = 0; column < columns; column += PIECE) {
            const i64 n = least(PIECE, columns - column);
            float one = 0, two = 0;
            ROW(row, column)
            float *restrict mean = piece->mean + place;
            float *restrict moment = piece->moments + place;
            float *restrict out = piece->u + place;
            SUM(one, two)
            {
                WEIGHT(0)
                GRAD(0)
                const float x = g * norm - w * leaning;
                DIRECTION
                one += u * w;
                two += u * u;
            }
            half->products[row] += one;
            half->squares[row] += two;
        }
    }
}

/* Weights become keep w - turn u, undressed; what a dead factor dresses has no effect, and stays. */
#define WRITE(keep, turn, middle, mean)                                                            \
    const float was = weight[i] + offset - middle;                                                 \
    const float to = was * BY(factor) * keep - (out[i] - mean) * turn, undress = BY(back);         \
    weight[i] = (undress > 0 ? to * undress : was) + middle - offset;
INLINE void write_columns(const Piece *piece, const Half *half, const int by_column)
{
    const i64 n = piece->n;
    const float *restrict keep = half->keep, *restrict turn = half->turn;
    const float *restrict means = piece->means, *restrict mean_u = piece->mean_u;
    const float *restrict backs = piece->undress;
    const float decay = piece->matrix->decay;
    for (i64 row = 0; row < piece->matrix->rows; row++) {
        const float *restrict out = piece->u + row * n;
        ROW(row, 0)
        const float back = by_row ? piece->undress[row] : 1;
        EACH { WRITE(keep[i] * decay, turn[i] * decay, means[i], mean_u[i]) }
    }
}

INLINE void write_rows(const Piece *piece, const Half *half, const int by_column)
{
    const i64 columns = piece->matrix->columns;
    for (i64 row = 0; row < piece->n; row++) {
        const float keep = half->keep[row] * piece->matrix->decay;
        const float turn = half->turn[row] * piece->matrix->decay;
        for (i64 column = 0; column < columns; column += PIECE) {
            const i64 n = least(PIECE, columns - column);
            const float *restrict backs = piece->undress + column;
            ROW(row, column)
            const float back = by_row ? piece->undress[row] : 1;
            const float *restrict out = piece->u + place;
            EACH { WRITE(keep, turn, 0, 0) }
        }
    }
}

/* x^exponent for a negative exponent: ddc.optim.compiled.safe_power. */
INLINE float safe_power(float x, float exponent)
{
    const float smallest = exponent == -1 ? FLT_MIN : fmaxf(FLT_MIN, powf(FLT_MAX, 1 / exponent));
    if (!(x >= smallest))
        return 0;
    return exponent == -1 ? 1 / x : powf(x, exponent);
}

/* The step of a number by Adam's rule, times a rate. */
INLINE float number_step(float x, float *mean, float *moment, Clock clock, float rate)
{
    *mean = moved(*mean, x, clock.adam.first);
    *moment = *moment * clock.adam.second + x * x * clock.adam.rest;
    return direction(*mean, *moment, clock.adam.epsilon) * rate * clock.ratio;
}

static void clear(double *values, i64 n) { EACH values[i] = 0; }

static void zero(float *values, i64 n) { EACH values[i] = 0; }

/* Read a side: the sums over each unit, and its norms. */
static void read_side(Half *half, i64 n)
{
    clear(half->squares, n), clear(half->products, n), clear(half->grad_squares, n);
    clear(half->taken, n);
    int centred = 0;
    for (i64 i = 0; i < half->side->count; i++) {
        Piece *piece = &half->pieces[i];
        zero(piece->means, n), zero(piece->grad_means, n), zero(piece->mean_u, n);
        if (piece->matrix->centred)
            centre(piece), sum_taken(piece, half), centred = 1;
        if (piece->matrix->unit == 1)
            BRANCHES(sum_columns, piece, half)
        else
            BRANCHES(sum_rows, piece, half)
    }
    for (i64 i = 0; i < n; i++) {
        /* of rows that are all alike, centring leaves rounding, which is no direction */
        const double rounding = CENTRED_ROUNDING * FLT_EPSILON;
        const int alive = !centred || half->squares[i] > rounding * rounding * half->taken[i];
        half->squares[i] *= alive, half->products[i] *= alive; /* what is nan stays it */
        half->norm[i] = (float)sqrt(half->squares[i]);
    }
}

/* What is rho in the step of a side, and which units are waking: PolarStack._scales. */
static void scale_side(Half *half, const Half *other, const float *waking, float exponent, i64 n)
{
    const float usual = 1 / half->side->init_scale, others = 1 / other->side->init_scale;
    for (i64 i = 0; i < n; i++) {
        const float norm = half->norm[i];
        half->waking[i] = norm == 0;
        half->scale[i] = norm;
        if (norm > 0 && !(waking[i] > 0))
            continue; /* which is so of nearly all */
        const float length = usual * safe_power(other->norm[i] / others, exponent);
        half->waking[i] |= norm < length;
        if (half->waking[i])
            half->scale[i] = length;
    }
}

/* Changes of the logarithms of both norms: PolarStack._radial. */
static void radial(
    const Polar *s, Half *plus, Half *minus, const Half *dressed, Clock clock, i64 place, i64 n)
{
    const float k = s->degree, size = sqrtf(1 + k * k), rate = -s->lr * s->radial_rate;
    for (i64 i = 0; i < n; i++) {
        const i64 at = place + i;
        const float from_plus = (float)(plus->products[i] - k * dressed->products[i]);
        const float from_minus = (float)minus->products[i];
        const float shared = (k * from_plus + from_minus) / size;
        const float radial = number_step(shared, &s->radial[at], &s->radial_sq[at], clock, rate);
        float vertical = 0;
        if (s->mode == ADAM) {
            const float against = (from_plus - k * from_minus) / size;
            vertical = number_step(against, &s->vertical[at], &s->vertical_sq[at], clock, rate);
        } else if (s->mode == BALANCE) {
            const float gap = logf(plus->norm[i]) - k * logf(minus->norm[i]);
            vertical = isfinite(gap) ? rate * gap / size : 0;
        }
        plus->change[i] = (k * radial + vertical) / size;
        minus->change[i] = (radial - k * vertical) / size;
    }
}

INLINE float step_scale(const Polar *s, const Half *half, i64 i)
{
    return s->by_norm ? half->scale[i] : half->scale[i] * half->side->init_scale;
}

/* The two coefficients of a side, from the sums of its directions: Block.turn. */
static void turn_side(const Polar *s, Half *half, Clock clock, i64 n)
{
    for (i64 i = 0; i < n; i++) {
        const float norm = half->norm[i], growth = expf(half->change[i]);
        if (half->side->unit_size == 1) {
            half->keep[i] = growth, half->turn[i] = 0, half->after[i] = growth * norm;
            continue;
        }
        const int awake = !half->waking[i];
        const float inverse = safe_power(half->scale[i], -1), stride = s->lr * step_scale(s, half, i);
        const float product = clock.ratio * (float)half->products[i];
        const float squares = clock.ratio * clock.ratio * (float)half->squares[i];
        const float along = awake ? inverse * product : 0, angle = stride * inverse;
        const float across = positive(squares - along * along);
        const float stretch = sqrtf(1 + angle * angle * across);
        const float grown = s->retract && awake ? growth / stretch : growth;
        const float woken =
            sqrtf(positive(norm * norm - 2 * stride * product + stride * stride * squares));
        half->after[i] = grown * (awake ? norm * stretch : woken);
        half->keep[i] = grown * (1 + angle * along);
        half->turn[i] = grown * stride * clock.ratio;
    }
}

/* The directions of a matrix, whose mean row is no part of them. */
static void direct_centred(Piece *piece, Half *half, Adam adam)
{
    const i64 n = piece->n;
    const double rows = (double)piece->matrix->rows;
    double others[n];
    EACH others[i] = half->squares[i], half->squares[i] = half->taken[i] = 0;
    BRANCHES(direct_columns, piece, half, adam)
    EACH {
        const double mean = half->taken[i] / rows;
        const double own = half->squares[i] - rows * mean * mean;
        piece->mean_u[i] = (float)mean;
        half->squares[i] = others[i] + (own < 0 ? 0 : own); /* what is nan stays it */
    }
}

/* Turn a side and write it. */
static void move_side(const Polar *s, Half *half, Clock clock, i64 n)
{
    if (half->side->unit_size > 1) {
        EACH half->leaning[i] = half->waking[i]
            ? 0
            : (float)half->products[i] * safe_power(half->scale[i], -1);
        clear(half->products, n), clear(half->squares, n), clear(half->taken, n);
        for (i64 i = 0; i < half->side->count; i++) {
            Piece *piece = &half->pieces[i];
            if (piece->matrix->centred)
                direct_centred(piece, half, clock.adam);
            else if (piece->matrix->unit == 1)
                BRANCHES(direct_columns, piece, half, clock.adam)
            else
                BRANCHES(direct_rows, piece, half, clock.adam)
        }
    } else /* a number by itself has no direction */
        zero(half->pieces[0].u, n);
    turn_side(s, half, clock, n);
    for (i64 i = 0; i < half->side->count; i++) {
        Piece *piece = &half->pieces[i];
        if (piece->matrix->unit == 1)
            BRANCHES(write_columns, piece, half)
        else
            BRANCHES(write_rows, piece, half)
    }
}

static i64 lines(i64 n) { return quotient(n, LINE / sizeof(float)) * (LINE / sizeof(float)); }

/* Take n numbers of four bytes, or of eight, where a line of the cache begins. */
static void *take(float **room, i64 n, i64 bytes)
{
    float *at = *room;
    *room += lines(n * bytes / 4);
    return at;
}

/* How many numbers dress n units of a matrix. */
static i64 dressed_by(const Matrix *m, i64 n)
{
    return m->axis < 0 ? 0 : m->axis == m->unit ? n : m->axis == 0 ? m->rows : m->columns;
}

/* How many numbers of four bytes a side needs, for so many units at a time. */
static i64 room_of(const Side *side, i64 block, int steps)
{
    i64 n = 4 * lines(2 * block) + 8 * lines(block);
    n += lines(quotient(side->count * sizeof(Piece), sizeof(float)));
    for (i64 i = 0; i < side->count; i++) {
        const Matrix *m = &side->matrices[i];
        n += 3 * lines(block);
        n += steps ? lines(block * (m->unit == 1 ? m->rows : m->columns)) : 0;
        n += 3 * lines(dressed_by(m, block));
    }
    return n;
}

/* By what the entries of a matrix are multiplied, and their gradients; and what undresses them. */
static void dress(Piece *piece, i64 norms, i64 n)
{
    const Matrix *m = piece->matrix;
    for (i64 i = 0; i < n; i++) {
        const float before = m->before[norms + i], after = m->after[norms + i];
        piece->factor[i] = m->degree == 1 ? before : powf(before, m->degree);
        piece->inverse[i] = safe_power(piece->factor[i], -1);
        piece->undress[i] = safe_power(m->degree == 1 ? after : powf(after, m->degree), -1);
    }
}

static Half half_of(const Side *side, i64 layer, i64 from, i64 n, int steps, float **room)
{
    Half half = {
        .side = side,
        .pieces = take(room, quotient(side->count * sizeof(Piece), 4), 4),
        .squares = take(room, n, 8),
        .products = take(room, n, 8),
        .grad_squares = take(room, n, 8),
        .taken = take(room, n, 8),
        .norm = take(room, n, 4),
        .scale = take(room, n, 4),
        .leaning = take(room, n, 4),
        .change = take(room, n, 4),
        .keep = take(room, n, 4),
        .turn = take(room, n, 4),
        .after = take(room, n, 4),
        .waking = take(room, n, 4),
    };
    for (i64 i = 0; i < side->count; i++) {
        const Matrix *m = &side->matrices[i];
        const i64 first = m->unit == 1 ? from : from * m->columns;
        const i64 size = m->rows * m->columns, squares = m->averaged ? m->groups * m->columns : size;
        const i64 dressed = dressed_by(m, n);
        const i64 norms = layer * (m->axis == 1 ? m->columns : m->rows) +
            (m->axis == m->unit ? from : 0);
        half.pieces[i] = (Piece){
            .matrix = m,
            .weights = (float *)(intptr_t)m->weights[layer] + first,
            .grads = (const float *)(intptr_t)m->grads[layer] + first,
            .mean = m->exp_avg + layer * size + first,
            .moments = m->exp_avg_sq + layer * squares + first,
            .factor = take(room, dressed, 4),
            .inverse = take(room, dressed, 4),
            .undress = take(room, dressed, 4),
            .means = take(room, n, 4),
            .grad_means = take(room, n, 4),
            .mean_u = take(room, n, 4),
            .u = steps ? take(room, n * (m->unit == 1 ? m->rows : m->columns), 4) : 0,
            .n = n,
        };
        dress(&half.pieces[i], norms, dressed);
    }
    return half;
}

static Clock clock_of(const Polar *s, i64 layer)
{
    /* through expm1, which does not cancel where beta^t is near 1 */
    const double step = s->steps[layer];
    const double first = s->first > 0 ? -expm1(step * log(s->first)) : 1;
    const double second = sqrt(s->second > 0 ? -expm1(step * log(s->second)) : 1);
    return (Clock){
        {(float)s->first_rest, (float)s->second, (float)s->second_rest, (float)(s->eps * second)},
        (float)(second / first),
    };
}

/* How many numbers of four bytes a thread needs. */
i64 ddc_polar_room(const Polar *s)
{
    const i64 block = least(s->block, s->units);
    return room_of(&s->plus, block, 1) + room_of(&s->minus, block, 1) +
        room_of(&s->dressed, block, 0);
}

/* With so much room, where a line of the cache begins. */
KERNEL(polar)(i64 begin, i64 end, const Polar *s, float *const kept)
{
    const i64 blocks = quotient(s->units, s->block);
    for (i64 program = begin; program < end; program++) {
        const i64 layer = program / blocks, from = program % blocks * s->block;
        const i64 n = least(s->block, s->units - from), place = layer * s->units + from;
        float *room = kept;
        Half plus = half_of(&s->plus, layer, from, n, 1, &room);
        Half minus = half_of(&s->minus, layer, from, n, 1, &room);
        Half dressed = half_of(&s->dressed, layer, from, n, 0, &room);
        read_side(&plus, n);
        for (i64 i = 0; i < n; i++) {
            s->before[place + i] = plus.norm[i];
            plus.scale[i] = plus.norm[i], plus.waking[i] = plus.norm[i] == 0, plus.change[i] = 0;
        }
        if (minus.side->count) {
            read_side(&minus, n);
            scale_side(&plus, &minus, s->plus_waking + place, -1 / s->degree, n);
            scale_side(&minus, &plus, s->minus_waking + place, -s->degree, n);
        }
        if (s->measure) {
            for (i64 i = 0; i < n; i++) {
                const float a = step_scale(s, &plus, i);
                float squares = (float)plus.grad_squares[i] * a * a;
                if (minus.side->count) {
                    const float b = step_scale(s, &minus, i);
                    squares += (float)minus.grad_squares[i] * b * b;
                }
                s->squares[place + i] = squares;
            }
            continue;
        }
        const Clock clock = clock_of(s, layer);
        if (minus.side->count) {
            read_side(&dressed, n);
            radial(s, &plus, &minus, &dressed, clock, place, n);
            for (i64 i = 0; i < n; i++) {
                s->plus_waking[place + i] = (float)plus.waking[i];
                s->minus_waking[place + i] = (float)minus.waking[i];
            }
            move_side(s, &minus, clock, n);
        }
        move_side(s, &plus, clock, n);
        for (i64 i = 0; i < n; i++)
            s->after[place + i] = plus.after[i];
    }
}

/* ---- what no gauge scales ---- */

/* Rows and columns of a matrix. */
typedef struct {
    i64 rows, columns;
} Shape;

/* What a vector, (L, rows or columns), has along an axis, in all rows, from a column on; where there
 * is nothing these are ones. */
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
#define FREE_GATHER(at)                                                                                 \
    const i64 i = at;                                                                              \
    FREE_INPUT                                                                                     \
    mean[i] = moved(mean[i], x, adam.first);                                                       \
    gathered += x * x;
    if (side_by_side)
        PRAGMA(omp simd reduction(+ : gathered)) for (i64 k = 0; k < n; k++) { FREE_GATHER(begin + k) }
    else
        for (i64 k = 0; k < n; k++) { FREE_GATHER(order[k]) }
    *moment = *moment * adam.second + gathered / (float)n * adam.rest;
    const float over = 1.0f / (sqrtf(*moment) + adam.epsilon);
#define FREE_AT_ORDER(at)                                                                                  \
    const i64 i = at;                                                                              \
    const float u = mean[i] * over;                                                                \
    FREE_WRITE
    if (side_by_side)
        PRAGMA(omp simd) for (i64 k = 0; k < n; k++) { FREE_AT_ORDER(begin + k) }
    else
        for (i64 k = 0; k < n; k++) { FREE_AT_ORDER(order[k]) }
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
