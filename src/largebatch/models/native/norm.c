/* LayerNorm of a residual and what a dropout leaves of a matrix product and its bias, and the way back, row by row.
 *
 * A row stays in the level-1 cache from its first pass to its last. This file is compiled once for each instruction
 * set, with VARIANT as the name of the table at its end.
 */
#include "rows.h"

/* The columns of a row that have the lower bits of the hashes, and those that have the upper. */
struct half {
    int upper;
    int64_t start, end;
};

INLINE struct half half_of(int64_t width, int upper) {
    const int64_t middle = (width + 1) / 2;
    return upper ? (struct half){1, middle, width} : (struct half){0, 0, middle};
}

INLINE uint32_t base_of(const struct add_norm *n, int64_t row) { return mix((uint32_t)n->keys[row] + n->site); }

/* By how much the dropout multiplies the group of columns at `at`. */
INLINE void factors_of(floats a[VECTORS], const struct add_norm *n, uint32_t base, struct half half, int64_t at,
                       int narrow) {
    words hashes[VECTORS];
    hash(hashes, base, at - half.start, narrow);
    for (int j = 0; j < VECTORS; j++) a[j] = where(living(hashes[j], half.upper, n->kept), broadcast(n->scale));
}

/* ---- forward ---- */

INLINE void add_group(const struct add_norm *n, int64_t row, uint32_t base, struct half half, floats total[VECTORS],
                      int64_t at, int64_t num, int narrow) {
    const int64_t place = row * n->width + at;
    floats x[VECTORS], x_bias[VECTORS], sum[VECTORS], factors[VECTORS];
    read(x, n->x, place, num, narrow, 0);
    read_floats(x_bias, n->x_bias + at, num, narrow, 0);
    read_floats(sum, n->residual + place, num, narrow, 0);
    factors_of(factors, n, base, half, at, narrow);
    for (int j = 0; j < VECTORS; j++) {
        sum[j] = multiply_add(x[j] + x_bias[j], factors[j], sum[j]);
        total[j] += sum[j];
    }
    write_floats(n->sum + place, num, sum, narrow);
}

INLINE void square_group(const float *sum, float mean, floats total[VECTORS], int64_t num) {
    floats a[VECTORS];
    read_floats(a, sum, num, 0, mean);
    for (int j = 0; j < VECTORS; j++) total[j] = multiply_add(a[j] - mean, a[j] - mean, total[j]);
}

INLINE void normalize_group(const struct add_norm *n, const float *sum, float *y, const float moments[2], int64_t at,
                            int64_t num) {
    floats a[VECTORS], weight[VECTORS], bias[VECTORS];
    read_floats(a, sum + at, num, 0, 0);
    read_floats(weight, n->weight + at, num, 0, 0);
    read_floats(bias, n->bias + at, num, 0, 0);
    for (int j = 0; j < VECTORS; j++) a[j] = multiply_add((a[j] - moments[0]) * moments[1], weight[j], bias[j]);
    write_floats(y + at, num, a, 0);
}

INLINE void forward_row(const struct add_norm *n, int64_t row, int narrow) {
    const int64_t width = n->width, whole = width / LANES * LANES;
    const float *sum = n->sum + row * width;
    float *y = n->y + row * width, *moments = n->moments + 2 * row;
    const uint32_t base = base_of(n, row);
    floats total[VECTORS], squares[VECTORS];
    for (int j = 0; j < VECTORS; j++) total[j] = squares[j] = broadcast(0);
    for (int upper = 0; upper < 2; upper++) {
        const struct half half = half_of(width, upper);
        int64_t at = half.start;
        for (; at + LANES <= half.end; at += LANES) add_group(n, row, base, half, total, at, LANES, narrow);
        if (at < half.end) add_group(n, row, base, half, total, at, half.end - at, narrow);
    }
    moments[0] = sum_of(total, narrow) / (float)width;
    for (int64_t at = 0; at < whole; at += LANES) square_group(sum + at, moments[0], squares, LANES);
    if (whole < width) square_group(sum + whole, moments[0], squares, width - whole);
    moments[1] = 1 / sqrtf(sum_of(squares, 0) / (float)width + n->eps);
    for (int64_t at = 0; at < whole; at += LANES) normalize_group(n, sum, y, moments, at, LANES);
    if (whole < width) normalize_group(n, sum, y, moments, whole, width - whole);
}

static void forward(const void *work, int64_t first, int64_t last) {
    const struct add_norm *n = work;
    for (int64_t row = first; row < last; row++) {
        if (n->narrow)
            forward_row(n, row, 1);
        else
            forward_row(n, row, 0);
    }
}

/* ---- backward ---- */

/* Add to the gradients of weight and bias, and to what the gradient of the sum needs of the whole row. */
INLINE void measure_group(const struct add_norm *n, int64_t row, const float moments[2], float *grad_params,
                          floats totals[2][VECTORS], int64_t at, int64_t num) {
    const int64_t place = row * n->width + at;
    floats x[VECTORS], g[VECTORS], weight[VECTORS], of_weight[VECTORS], of_bias[VECTORS];
    read_floats(x, n->sum + place, num, 0, 0);
    read_floats(g, n->grad_y + place, num, 0, 0);
    read_floats(weight, n->weight + at, num, 0, 0);
    read_floats(of_weight, grad_params + at, num, 0, 0);
    read_floats(of_bias, grad_params + n->width + at, num, 0, 0);
    for (int j = 0; j < VECTORS; j++) {
        x[j] = (x[j] - moments[0]) * moments[1];
        of_weight[j] = multiply_add(g[j], x[j], of_weight[j]);
        of_bias[j] += g[j];
        g[j] *= weight[j];
        totals[0][j] += g[j];
        totals[1][j] = multiply_add(g[j], x[j], totals[1][j]);
    }
    write_floats(grad_params + at, num, of_weight, 0);
    write_floats(grad_params + n->width + at, num, of_bias, 0);
}

INLINE void return_group(const struct add_norm *n, int64_t row, const float moments[2], const float means[2],
                         uint32_t base, struct half half, float *grad_x_bias, int64_t at, int64_t num, int narrow) {
    const int64_t place = row * n->width + at;
    floats x[VECTORS], g[VECTORS], weight[VECTORS], of_bias[VECTORS], factors[VECTORS];
    read_floats(x, n->sum + place, num, narrow, 0);
    read_floats(g, n->grad_y + place, num, narrow, 0);
    read_floats(weight, n->weight + at, num, narrow, 0);
    read_floats(of_bias, grad_x_bias + at, num, narrow, 0);
    factors_of(factors, n, base, half, at, narrow);
    for (int j = 0; j < VECTORS; j++) {
        x[j] = (x[j] - moments[0]) * moments[1];
        g[j] = (g[j] * weight[j] - means[0] - x[j] * means[1]) * moments[1];
        x[j] = g[j] * factors[j];
        of_bias[j] += x[j];
        x[j] = rounded(x[j], narrow);
    }
    write_floats(grad_x_bias + at, num, of_bias, narrow);
    write_floats(n->grad_residual + place, num, g, narrow);
    write(n->grad_x, place, num, x, narrow);
}

INLINE void backward_row(const struct add_norm *n, int64_t row, float *grad_params, int narrow) {
    const int64_t width = n->width, whole = width / LANES * LANES;
    const float *moments = n->moments + 2 * row;
    float *grad_x_bias = grad_params + 2 * width;
    const uint32_t base = base_of(n, row);
    floats totals[2][VECTORS];
    for (int j = 0; j < VECTORS; j++) totals[0][j] = totals[1][j] = broadcast(0);
    for (int64_t at = 0; at < whole; at += LANES) measure_group(n, row, moments, grad_params, totals, at, LANES);
    if (whole < width) measure_group(n, row, moments, grad_params, totals, whole, width - whole);
    const float means[] = {sum_of(totals[0], 0) / (float)width, sum_of(totals[1], 0) / (float)width};
    for (int upper = 0; upper < 2; upper++) {
        const struct half half = half_of(width, upper);
        int64_t at = half.start;
        for (; at + LANES <= half.end; at += LANES)
            return_group(n, row, moments, means, base, half, grad_x_bias, at, LANES, narrow);
        if (at < half.end)
            return_group(n, row, moments, means, base, half, grad_x_bias, at, half.end - at, narrow);
    }
}

static void backward(const void *work, int64_t first, int64_t last) {
    const struct add_norm *n = work;
    for (int64_t block = first; block < last; block++) {
        float *grad_params = n->grad_params + 3 * block * n->width;
        const int64_t end = (block + 1) * NORM_ROWS < n->rows ? (block + 1) * NORM_ROWS : n->rows;
        memset(grad_params, 0, 3 * n->width * sizeof *grad_params);
        for (int64_t row = block * NORM_ROWS; row < end; row++) {
            if (n->narrow)
                backward_row(n, row, grad_params, 1);
            else
                backward_row(n, row, grad_params, 0);
        }
    }
}

const struct norm_kernel VARIANT = {forward, backward};
