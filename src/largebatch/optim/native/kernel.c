/* The mathematics: each rule as in reference.py, on blocks of float32 that stay in the level-1 cache.
 *
 * Every function of a rule is one loop without branches or calls, so that any compiler vectorises it. This file is
 * compiled once for each instruction set, with VARIANT as the name of the table at its end, and with contraction to
 * fused multiply-adds off: all variants then compute the same bits, on any number of threads.
 */
#include "convert.h"

enum { BLOCK = 1024, LANES = 32 };

/* ---- norms of a block ---- */

/* What `norms.measure` takes of a vector. The lanes are fixed, not the machine's, and so is the sum's order; a lane of
 * a block adds up 32 terms in float32, and all beyond is float64. */
static double measure(enum norm norm, int n, const float *restrict a) {
    float lanes[LANES] = {0};
    int whole = n / LANES * LANES;
    if (norm == L2) {
        for (int i = 0; i < whole; i += LANES)
            for (int k = 0; k < LANES; k++) lanes[k] += a[i + k] * a[i + k];
        for (int i = whole; i < n; i++) lanes[i - whole] += a[i] * a[i];
    } else if (norm == L1) {
        for (int i = 0; i < whole; i += LANES)
            for (int k = 0; k < LANES; k++) lanes[k] += fabsf(a[i + k]);
        for (int i = whole; i < n; i++) lanes[i - whole] += fabsf(a[i]);
    } else {
        for (int i = 0; i < n; i++) lanes[i % LANES] = (float)join(LINF, lanes[i % LANES], fabsf(a[i]));
    }
    double total = 0;
    for (int k = 0; k < LANES; k++) total = join(norm, total, lanes[k]);
    return total;
}

/* ---- LAMB, N-LAMB and NN-LAMB ---- */

struct lamb {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, m_scale, g_scale, v_scale, g_sq_scale, eps, weight_decay;
};

static struct lamb lamb_of(const struct numbers *h) {
    const double sign = h->maximize ? -1 : 1;
    return (struct lamb){
        .beta1 = (float)h->beta1,
        .one_minus_beta1 = (float)(sign * (1 - h->beta1)),
        .beta2 = (float)h->beta2,
        .one_minus_beta2 = (float)(1 - h->beta2),
        .m_scale = (float)h->m_scale,
        .g_scale = (float)(sign * h->g_scale),
        .v_scale = (float)h->v_scale,
        .g_sq_scale = (float)h->g_sq_scale,
        .eps = (float)h->eps,
        .weight_decay = (float)h->weight_decay,
    };
}

static void lamb_state(int n, const float *restrict g, float *restrict m, float *restrict v, struct lamb h) {
    for (int i = 0; i < n; i++) {
        m[i] = h.beta1 * m[i] + h.one_minus_beta1 * g[i];
        v[i] = h.beta2 * v[i] + h.one_minus_beta2 * (g[i] * g[i]);
    }
}

static void lamb_direction(int n, const float *restrict x, const float *restrict g, const float *restrict m,
                           const float *restrict v, float *restrict u, struct lamb h) {
    if (h.g_scale == 0 && h.g_sq_scale == 0) { /* LAMB itself: g is not read again */
        for (int i = 0; i < n; i++) u[i] = h.m_scale * m[i] / (sqrtf(h.v_scale * v[i]) + h.eps) + h.weight_decay * x[i];
        return;
    }
    for (int i = 0; i < n; i++) {
        float m_hat = h.m_scale * m[i] + h.g_scale * g[i];
        float v_hat = h.v_scale * v[i] + h.g_sq_scale * (g[i] * g[i]);
        u[i] = m_hat / (sqrtf(v_hat) + h.eps) + h.weight_decay * x[i];
    }
}

static void lamb_direct(const struct layer *layer, const struct numbers *numbers, enum norm norm, int64_t first,
                        int64_t last, double norms[2]) {
    const struct lamb h = lamb_of(numbers);
    const uint32_t seed = mix(numbers->t) + 8 * layer->position;
    float x_room[BLOCK], g_room[BLOCK], m_room[BLOCK], v_room[BLOCK], u[BLOCK];
    norms[0] = norms[1] = 0;
    double bad = 0;
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        const float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        const float *g = read_gradient(layer->g, layer->g_dtype, first, n, g_room, &bad);
        float *m = read_block(layer->state[0], layer->state_dtype, first, n, m_room);
        float *v = read_block(layer->state[1], layer->state_dtype, first, n, v_room);
        lamb_state(n, g, m, v, h);
        write_state(layer->state[0], layer->state_dtype, first, n, m, mix(seed), layer->origin);
        write_state(layer->state[1], layer->state_dtype, first, n, v, mix(seed + 1), layer->origin);
        lamb_direction(n, x, g, m, v, u, h);
        norms[0] = join(norm, norms[0], measure(norm, n, x));
        norms[1] = join(norm, norms[1], measure(norm, n, u));
    }
    norms[1] += bad;
}

static void move(int n, float *restrict x, const float *restrict u, float keep, float step) {
    for (int i = 0; i < n; i++) x[i] = keep * x[i] - step * u[i];
}

static void write_x(const struct layer *layer, int64_t first, int n, const float *x) {
    write_block(layer->x, layer->x_dtype, first, n, x);
    if (layer->rounded) write_block(layer->rounded, layer->rounded_dtype, first, n, x);
}

static void lamb_descend(const struct layer *layer, const struct numbers *numbers, double ratio, int64_t first,
                         int64_t last) {
    const struct lamb h = lamb_of(numbers);
    float x_room[BLOCK], g_room[BLOCK], m_room[BLOCK], v_room[BLOCK], u[BLOCK];
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        const float *g = g_room;
        if (h.g_scale != 0 || h.g_sq_scale != 0) g = read_block((void *)layer->g, layer->g_dtype, first, n, g_room);
        const float *m = read_block(layer->state[0], layer->state_dtype, first, n, m_room);
        const float *v = read_block(layer->state[1], layer->state_dtype, first, n, v_room);
        lamb_direction(n, x, g, m, v, u, h);
        move(n, x, u, (float)numbers->keep, (float)(numbers->rate * ratio));
        write_x(layer, first, n, x);
    }
}

/* ---- LARS ---- */

struct lars {
    float momentum, one_minus_momentum, weight_decay, sign;
    int nesterov;
};

static struct lars lars_of(const struct numbers *h) {
    return (struct lars){
        .momentum = (float)h->momentum,
        .one_minus_momentum = (float)(1 - h->momentum),
        .weight_decay = (float)h->weight_decay,
        .sign = h->maximize ? -1 : 1,
        .nesterov = h->nesterov,
    };
}

/* b <- momentum·m + (1 - momentum)(g + weight_decay·x), where b may be m. */
static void lars_average(int n, const float *restrict x, const float *restrict g, const float *m, float *b,
                         struct lars h) {
    for (int i = 0; i < n; i++)
        b[i] = h.momentum * m[i] + h.one_minus_momentum * (h.sign * g[i] + h.weight_decay * x[i]);
}

static void lars_direct(const struct layer *layer, const struct numbers *numbers, enum norm norm, int64_t first,
                        int64_t last, double norms[2]) {
    const struct lars h = lars_of(numbers);
    float x_room[BLOCK], g_room[BLOCK], m_room[BLOCK], u_room[BLOCK];
    norms[0] = norms[1] = 0;
    double bad = 0;
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        const float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        const float *g = read_gradient(layer->g, layer->g_dtype, first, n, g_room, &bad);
        float *m = read_block(layer->state[0], layer->state_dtype, first, n, m_room), *u = m;
        lars_average(n, x, g, m, m, h);
        write_block(layer->state[0], layer->state_dtype, first, n, m);
        if (h.nesterov) lars_average(n, x, g, m, u = u_room, h);
        norms[0] = join(norm, norms[0], measure(norm, n, x));
        norms[1] = join(norm, norms[1], measure(norm, n, u));
    }
    norms[1] += bad;
}

static void lars_descend(const struct layer *layer, const struct numbers *numbers, double ratio, int64_t first,
                         int64_t last) {
    const struct lars h = lars_of(numbers);
    float x_room[BLOCK], g_room[BLOCK], m_room[BLOCK], u_room[BLOCK];
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        float *m = read_block(layer->state[0], layer->state_dtype, first, n, m_room), *u = m;
        if (h.nesterov) {
            const float *g = read_block((void *)layer->g, layer->g_dtype, first, n, g_room);
            lars_average(n, x, g, m, u = u_room, h);
        }
        move(n, x, u, 1, (float)(numbers->rate * ratio));
        write_x(layer, first, n, x);
    }
}

/* ---- LARS as of 2017: the ratio comes before the momentum ---- */

static void lars2017_direct(const struct layer *layer, const struct numbers *numbers, enum norm norm, int64_t first,
                            int64_t last, double norms[2]) {
    (void)numbers;
    float x_room[BLOCK], g_room[BLOCK];
    norms[0] = norms[1] = 0;
    double bad = 0;
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        const float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        const float *g = read_gradient(layer->g, layer->g_dtype, first, n, g_room, &bad);
        norms[0] = join(norm, norms[0], measure(norm, n, x));
        norms[1] = join(norm, norms[1], measure(norm, n, g));
    }
    norms[1] += bad;
}

static void lars2017_move(int n, float *restrict x, const float *restrict g, float *restrict b, struct lars h,
                          float ratio, float rate) {
    const float ahead = h.nesterov ? h.momentum : 1, r_ahead = h.nesterov ? 1 : 0;
    for (int i = 0; i < n; i++) {
        float scaled = ratio * (h.sign * g[i] + h.weight_decay * x[i]);
        b[i] = h.momentum * b[i] + scaled;
        x[i] = x[i] - rate * (r_ahead * scaled + ahead * b[i]);
    }
}

static void lars2017_descend(const struct layer *layer, const struct numbers *numbers, double ratio, int64_t first,
                             int64_t last) {
    const struct lars h = lars_of(numbers);
    float x_room[BLOCK], g_room[BLOCK], b_room[BLOCK];
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        const float *g = read_block((void *)layer->g, layer->g_dtype, first, n, g_room);
        float *b = read_block(layer->state[0], layer->state_dtype, first, n, b_room);
        lars2017_move(n, x, g, b, h, (float)ratio, (float)numbers->rate);
        write_block(layer->state[0], layer->state_dtype, first, n, b);
        write_x(layer, first, n, x);
    }
}

const struct rule_kernel VARIANT[NUM_RULES] = {
    [LAMB] = {lamb_direct, lamb_descend},
    [LARS] = {lars_direct, lars_descend},
    [LARS2017] = {lars2017_direct, lars2017_descend},
};
