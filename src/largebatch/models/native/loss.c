/* Cross-entropy of logits over a vocabulary, and its gradient in their place, row by row.
 *
 * This file is compiled once for each instruction set, with VARIANT as the name of the table at its end.
 */
#include "rows.h"

/* ---- passes over a row: its logits are products + bias ---- */

INLINE void logits_of(floats a[VECTORS], const struct loss *l, int64_t start, int64_t at, int64_t n, int narrow,
                      float fill) {
    floats bias[VECTORS];
    read(a, l->products, start + at, n, narrow, fill);
    read_floats(bias, l->bias + at, n, narrow, 0);
    for (int j = 0; j < VECTORS; j++) a[j] += bias[j];
}

INLINE void raise_top(const struct loss *l, int64_t start, floats top[VECTORS], int64_t at, int64_t n, int narrow) {
    floats a[VECTORS];
    logits_of(a, l, start, at, n, narrow, -INFINITY);
    for (int j = 0; j < VECTORS; j++) top[j] = maximum(a[j], top[j]);
}

INLINE void add_exponentials(const struct loss *l, int64_t start, float largest, floats total[VECTORS], int64_t at,
                             int64_t n, int narrow) {
    floats a[VECTORS];
    logits_of(a, l, start, at, n, narrow, -INFINITY);
    for (int j = 0; j < VECTORS; j++) total[j] += exponential(a[j] - largest);
}

INLINE void put_gradient(const struct loss *l, int64_t start, float largest, float share, float *grad_bias, int64_t at,
                         int64_t n, int narrow) {
    floats a[VECTORS], sums[VECTORS];
    logits_of(a, l, start, at, n, narrow, -INFINITY);
    read_floats(sums, grad_bias + at, n, narrow, 0);
    for (int j = 0; j < VECTORS; j++) {
        a[j] = exponential(a[j] - largest) * share;
        sums[j] += a[j];
        a[j] = rounded(a[j], narrow);
    }
    write_floats(grad_bias + at, n, sums, narrow);
    write(l->products, start + at, n, a, narrow);
}

INLINE float logit_at(const struct loss *l, int64_t start, int64_t column, int narrow) {
    const float product = narrow ? from_bfloat16(((const uint16_t *)l->products)[start + column])
                                 : ((const float *)l->products)[start + column];
    return product + l->bias[column];
}

/* Whether the label's logit is the largest, and of several the first. */
INLINE int wins(const struct loss *l, int64_t start, int64_t label, float largest, int narrow) {
    if (logit_at(l, start, label, narrow) != largest) return 0;
    for (int64_t column = 0; column < label; column++)
        if (logit_at(l, start, column, narrow) == largest) return 0;
    return 1;
}

INLINE void loss_of_row(const struct loss *l, int64_t row, float *grad_bias, int narrow) {
    const int64_t classes = l->classes, whole = classes / LANES * LANES, start = row * classes, label = l->labels[row];
    floats top[VECTORS], total[VECTORS];
    for (int j = 0; j < VECTORS; j++) top[j] = broadcast(-INFINITY), total[j] = broadcast(0);
    for (int64_t at = 0; at < whole; at += LANES) raise_top(l, start, top, at, LANES, narrow);
    if (whole < classes) raise_top(l, start, top, whole, classes - whole, narrow);
    const float largest = largest_of(top);
    for (int64_t at = 0; at < whole; at += LANES) add_exponentials(l, start, largest, total, at, LANES, narrow);
    if (whole < classes) add_exponentials(l, start, largest, total, whole, classes - whole, narrow);
    const float sum = sum_of(total, narrow), answer = logit_at(l, start, label, narrow);
    l->losses[row] = largest - answer + logf(sum);
    l->right[row] = (uint8_t)wins(l, start, label, largest, narrow);
    if (!grad_bias) return;
    for (int64_t at = 0; at < whole; at += LANES)
        put_gradient(l, start, largest, 1 / sum, grad_bias, at, LANES, narrow);
    if (whole < classes) put_gradient(l, start, largest, 1 / sum, grad_bias, whole, classes - whole, narrow);
    const float grad = expf(answer - largest) / sum - 1;
    grad_bias[label] -= 1;
    if (narrow)
        ((uint16_t *)l->products)[start + label] = to_bfloat16(grad);
    else
        ((float *)l->products)[start + label] = grad;
}

/* ---- blocks of rows, each with a sum of its own for the gradient of the bias ---- */

static void loss(const void *work, int64_t first, int64_t last) {
    const struct loss *l = work;
    for (int64_t block = first; block < last; block++) {
        float *grad_bias = l->grad_bias ? l->grad_bias + block * l->classes : 0;
        const int64_t end = (block + 1) * LOSS_ROWS < l->rows ? (block + 1) * LOSS_ROWS : l->rows;
        if (grad_bias) memset(grad_bias, 0, l->classes * sizeof *grad_bias);
        for (int64_t row = block * LOSS_ROWS; row < end; row++) {
            if (l->narrow)
                loss_of_row(l, row, grad_bias, 1);
            else
                loss_of_row(l, row, grad_bias, 0);
        }
    }
}

const struct loss_kernel VARIANT = {loss};
