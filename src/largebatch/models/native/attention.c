/* Softmax with dropout, and the way back, row by row.
 *
 * A row stays in the level-1 cache from its first pass to its last. This file is compiled once for each instruction
 * set, with VARIANT as the name of the table at its end.
 */
#include "rows.h"

/* ---- softmax ---- */

/* Rows of the two heads of a pair, of which the upper may be missing. */
struct rows {
    int64_t starts[2];
    floats values[2][MAX_LENGTH / LANES][VECTORS];
};

INLINE void take_scores(const struct attention *a, struct rows *rows, int row, floats top[VECTORS], int64_t at,
                        int64_t n, int narrow) {
    floats *group = rows->values[row][at / LANES];
    read(group, a->probs, rows->starts[row] + at, n, narrow, -INFINITY);
    for (int j = 0; j < VECTORS; j++) top[j] = maximum(group[j], top[j]);
}

INLINE void put_probs(const struct attention *a, struct rows *rows, int num, const float shares[2], uint32_t base,
                      int64_t at, int64_t n, int narrow) {
    words hashes[VECTORS];
    hash(hashes, base, at, narrow);
    for (int row = 0; row < num; row++) {
        floats probs[VECTORS], dropped[VECTORS];
        for (int j = 0; j < VECTORS; j++) {
            const floats prob = rounded(rows->values[row][at / LANES][j] * shares[row], narrow);
            const words lives = living(hashes[j], row, a->kept);
            dropped[j] = where(lives, prob);
            probs[j] = (floats)((words)prob | (~lives & SIGN));
        }
        write(a->probs, rows->starts[row] + at, n, probs, narrow);
        write(a->dropped, rows->starts[row] + at, n, dropped, narrow);
    }
}

INLINE void softmax_rows(const struct attention *a, struct rows *rows, int num, uint32_t base, int narrow) {
    const int64_t length = a->length, whole = length / LANES * LANES;
    float shares[2];
    for (int row = 0; row < num; row++) {
        floats top[VECTORS], total[VECTORS];
        for (int j = 0; j < VECTORS; j++) top[j] = broadcast(-INFINITY), total[j] = broadcast(0);
        for (int64_t at = 0; at < whole; at += LANES) take_scores(a, rows, row, top, at, LANES, narrow);
        if (whole < length) take_scores(a, rows, row, top, whole, length - whole, narrow);
        const floats largest = broadcast(largest_of(top));
        for (int64_t at = 0; at < length; at += LANES)
            for (int j = 0; j < VECTORS; j++) {
                floats *value = &rows->values[row][at / LANES][j];
                *value = exponential(*value - largest);
                total[j] += *value;
            }
        shares[row] = 1 / sum_of(total, narrow);
    }
    for (int64_t at = 0; at < whole; at += LANES) put_probs(a, rows, num, shares, base, at, LANES, narrow);
    if (whole < length) put_probs(a, rows, num, shares, base, whole, length - whole, narrow);
}

INLINE void softmax_of(const struct attention *a, int64_t first, int64_t last, int narrow) {
    const int64_t matrix = a->length * a->length, pairs = (a->heads + 1) / 2;
    struct rows rows;
    for (int64_t item = first; item < last; item++) {
        const int64_t sequence = item / pairs, pair = item % pairs;
        for (int64_t i = 0; i < a->length; i++) {
            const uint32_t key = (uint32_t)a->keys[sequence * a->length + i];
            const uint32_t base = mix(mix(key ^ (uint32_t)pair * GOLDEN) + a->site);
            rows.starts[0] = (sequence * a->heads + pair) * matrix + i * a->length;
            rows.starts[1] = rows.starts[0] + pairs * matrix;
            if (pair + pairs < a->heads)
                softmax_rows(a, &rows, 2, base, narrow);
            else
                softmax_rows(a, &rows, 1, base, narrow);
        }
    }
}

static void softmax(const void *work, int64_t first, int64_t last) {
    const struct attention *a = work;
    if (a->narrow)
        softmax_of(a, first, last, 1);
    else
        softmax_of(a, first, last, 0);
}

struct pass {
    floats grads[MAX_LENGTH / LANES][VECTORS], probs[MAX_LENGTH / LANES][VECTORS];
};

INLINE void take_grads(const struct attention *a, struct pass *pass, int64_t start, floats total[VECTORS], int64_t at,
                       int64_t n, int narrow) {
    floats *g = pass->grads[at / LANES], *p = pass->probs[at / LANES], dropped[VECTORS];
    read(g, a->grads, start + at, n, narrow, 0);
    read(p, a->probs, start + at, n, narrow, 0);
    for (int j = 0; j < VECTORS; j++) {
        const words lives = ~(words)((ints)p[j] >> 31);
        p[j] = magnitude(p[j]);
        g[j] = where(lives, g[j]);
        dropped[j] = where(lives, p[j]);
        total[j] = multiply_add(p[j], g[j], total[j]);
    }
    write(a->dropped, start + at, n, dropped, narrow);
}

INLINE void put_grads(const struct attention *a, const struct pass *pass, int64_t start, float common, int64_t at,
                      int64_t n, int narrow) {
    floats of_scores[VECTORS];
    for (int j = 0; j < VECTORS; j++)
        of_scores[j] = rounded(pass->probs[at / LANES][j] * (pass->grads[at / LANES][j] - common), narrow);
    write(a->grads, start + at, n, of_scores, narrow);
}

INLINE void softmax_backward_of(const struct attention *a, int64_t first, int64_t last, int narrow) {
    const int64_t length = a->length, whole = length / LANES * LANES;
    struct pass pass;
    for (int64_t start = first * length; start < last * length; start += length) {
        floats total[VECTORS];
        for (int j = 0; j < VECTORS; j++) total[j] = broadcast(0);
        for (int64_t at = 0; at < whole; at += LANES) take_grads(a, &pass, start, total, at, LANES, narrow);
        if (whole < length) take_grads(a, &pass, start, total, whole, length - whole, narrow);
        const float common = sum_of(total, narrow);
        for (int64_t at = 0; at < whole; at += LANES) put_grads(a, &pass, start, common, at, LANES, narrow);
        if (whole < length) put_grads(a, &pass, start, common, whole, length - whole, narrow);
    }
}

static void softmax_backward(const void *work, int64_t first, int64_t last) {
    const struct attention *a = work;
    if (a->narrow)
        softmax_backward_of(a, first, last, 1);
    else
        softmax_backward_of(a, first, last, 0);
}

/* ---- heads ---- */

INLINE void copy_group(const void *from, void *to, const float *bias, float *sums, float scale, int64_t at, int64_t n,
                       int narrow) {
    floats a[VECTORS], more[VECTORS];
    read(a, from, at, n, narrow, 0);
    if (bias) {
        read_floats(more, bias + at, n, narrow, 0);
        for (int j = 0; j < VECTORS; j++) a[j] += more[j];
    }
    for (int j = 0; j < VECTORS; j++) a[j] *= scale;
    if (sums) {
        read_floats(more, sums + at, n, narrow, 0);
        for (int j = 0; j < VECTORS; j++) more[j] += a[j];
        write_floats(sums + at, n, more, narrow);
    }
    for (int j = 0; j < VECTORS; j++) a[j] = rounded(a[j], narrow);
    write(to, at, n, a, narrow);
}

/* One row of one head. */
INLINE void copy(const void *from, void *to, const float *bias, float *sums, float scale, int64_t width, int narrow) {
    const int64_t whole = width / LANES * LANES;
    for (int64_t at = 0; at < whole; at += LANES) copy_group(from, to, bias, sums, scale, at, LANES, narrow);
    if (whole < width) copy_group(from, to, bias, sums, scale, whole, width - whole, narrow);
}

/* All heads of a row after those of another: the rows lie far apart, and a head's would be each on a page of its own. */
INLINE void copy_heads(const struct heads *h, int64_t first, int64_t last, int joins, int narrow) {
    const int64_t size = narrow ? 2 : 4, all = h->heads * h->width, num_rows = h->count * h->length;
    for (int64_t block = first; block < last; block++) {
        float *sums = h->sums ? h->sums + block * all : NULL;
        if (sums) memset(sums, 0, all * sizeof *sums);
        const int64_t end = (block + 1) * HEADS_ROWS < num_rows ? (block + 1) * HEADS_ROWS : num_rows;
        for (int64_t row = block * HEADS_ROWS; row < end; row++) {
            const int64_t sequence = row / h->length, i = row % h->length;
            for (int64_t head = 0; head < h->heads; head++) {
                const int64_t column = head * h->width;
                char *of_rows = (char *)h->rows + (row * h->stride + column) * size;
                char *of_head = (char *)h->by_head +
                                ((sequence * h->heads + head) * h->length + i) * h->width * size;
                char *from = joins ? of_head : of_rows, *to = joins ? of_rows : of_head;
                if (h->scale == 1 && !h->bias && !sums)
                    memcpy(to, from, h->width * size);
                else
                    copy(from, to, h->bias ? h->bias + column : NULL, sums ? sums + column : NULL, h->scale, h->width,
                         narrow);
            }
        }
    }
}

static void split(const void *work, int64_t first, int64_t last) {
    const struct heads *h = work;
    if (h->narrow)
        copy_heads(h, first, last, 0, 1);
    else
        copy_heads(h, first, last, 0, 0);
}

static void join_heads(const void *work, int64_t first, int64_t last) {
    const struct heads *h = work;
    if (h->narrow)
        copy_heads(h, first, last, 1, 1);
    else
        copy_heads(h, first, last, 1, 0);
}

const struct attention_kernel VARIANT = {softmax, softmax_backward, split, join_heads};
