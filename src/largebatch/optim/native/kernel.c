/* The mathematics: each rule as in reference.py, in float32.
 *
 * Each pass of a rule is one loop without branches or calls, so that any compiler vectorises it, and a processor
 * overlaps its divisions with its memory traffic; a loop for each line of the mathematics, over blocks in the level-1
 * cache, took 1.5 times as long. What the loops differ in are constant arguments of inlined functions. This file is
 * compiled once for each instruction set, with VARIANT as the name of the table at its end, and with contraction to
 * fused multiply-adds off: all variants then compute the same bits, on any number of threads.
 */
#include "convert.h"

enum { BLOCK = 2048, LANES = 16 };

#define INLINE static inline __attribute__((always_inline))

/* Said of a loop over tensors of which no two overlap. */
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

/* ---- what is measured of x and of u, as by `norms.measure` ---- */

/* Element i of a block goes to lane i % LANES, whatever the machine's vectors are, so that the order of all sums is
 * fixed. A lane adds up the BLOCK / LANES elements of a block in float32; all beyond is float64. */
struct lanes {
    float x[LANES], u[LANES];
    uint32_t good[LANES]; /* no bit is 0 as long as the squares of all elements of the gradient are finite */
};

/* Call something for all elements i < n of a block, with the lane k of each. */
#define OVER_LANES(n, i, k, ...)                                  \
    do {                                                          \
        const int whole = (n) / LANES * LANES;                    \
        for (int begin = 0; begin < whole; begin += LANES)        \
            INDEPENDENT for (int k = 0; k < LANES; k++) {         \
                const int i = begin + k;                          \
                __VA_ARGS__;                                      \
            }                                                     \
        for (int i = whole; i < (n); i++) {                       \
            const int k = i - whole;                              \
            __VA_ARGS__;                                          \
        }                                                         \
    } while (0)

struct totals {
    double x[LANES], u[LANES];
    uint32_t good;
};

INLINE float extend(enum norm norm, float sum, float a) {
    if (norm == L2) return sum + a * a;
    if (norm == L1) return sum + fabsf(a);
    return (float)join(LINF, sum, fabsf(a));
}

INLINE void start(struct lanes *lanes) {
    *lanes = (struct lanes){0};
    for (int k = 0; k < LANES; k++) lanes->good[k] = UINT32_MAX;
}

INLINE void add_block(enum norm norm, struct totals *totals, const struct lanes *lanes) {
    for (int k = 0; k < LANES; k++) {
        totals->x[k] = join(norm, totals->x[k], lanes->x[k]);
        totals->u[k] = join(norm, totals->u[k], lanes->u[k]);
        totals->good &= lanes->good[k];
    }
}

/* The totals of x and of u, of which NaN says that the gradient was not good. */
static void conclude(enum norm norm, struct totals *totals, double norms[2]) {
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) {
            totals->x[k] = join(norm, totals->x[k], totals->x[k + half]);
            totals->u[k] = join(norm, totals->u[k], totals->u[k + half]);
        }
    norms[0] = totals->x[0];
    norms[1] = totals->good == UINT32_MAX ? totals->u[0] : NAN;
}

/* Put a block of x back where `read_block` had it from, and into what a master copy is rounded to. */
static void write_x(const struct layer *layer, int64_t first, int n, const float *x) {
    write_block(layer->x, layer->x_dtype, first, n, x);
    if (layer->rounded) write_block(layer->rounded, layer->rounded_dtype, first, n, x);
}

/* An element of a gradient, or 0 if its square is not finite. */
INLINE float usable(float g, uint32_t *good) {
    const uint32_t is_good = g * g < INFINITY ? UINT32_MAX : 0;
    *good &= is_good;
    return float_of(bits_of(g) & is_good);
}

/* ---- LAMB, N-LAMB and NN-LAMB ---- */

struct lamb {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, m_scale, g_scale, v_scale, g_sq_scale, eps, weight_decay;
    float keep, step;
    int looks_ahead; /* what LAMB does not, and the others do: u depends on g by more than m and v */
};

static struct lamb lamb_of(const struct numbers *h, double ratio) {
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
        .keep = (float)h->keep,
        .step = (float)(h->rate * ratio),
        .looks_ahead = h->g_scale != 0 || h->g_sq_scale != 0,
    };
}

/* A block of a layer: x and g widened where they are narrow, m and v as they are, float32 or bfloat16. */
struct lamb_block {
    int n;
    float *x;
    const float *g;
    float *m, *v, *u;
    uint16_t *narrow_m, *narrow_v;
    uint32_t m_seed, v_seed; /* of the noise of the first element; that of the next is one more */
};

INLINE float lamb_m(const struct lamb_block *b, int i, int is_narrow) {
    return is_narrow ? from_bfloat16(b->narrow_m[i]) : b->m[i];
}

INLINE float lamb_v(const struct lamb_block *b, int i, int is_narrow) {
    return is_narrow ? from_bfloat16(b->narrow_v[i]) : b->v[i];
}

INLINE float lamb_u(float x, float g, float m, float v, struct lamb h, int looks_ahead) {
    float m_hat = h.m_scale * m, v_hat = h.v_scale * v;
    if (looks_ahead) {
        m_hat += h.g_scale * g;
        v_hat += h.g_sq_scale * (g * g);
    }
    return m_hat / (sqrtf(v_hat) + h.eps) + h.weight_decay * x;
}

/* The first pass over element i, which goes to lane k. */
INLINE void lamb_measure(const struct lamb_block *b, int i, int k, struct lamb h, struct lanes *lanes, enum norm norm,
                         int is_narrow, int looks_ahead) {
    const float x = b->x[i], g = usable(b->g[i], &lanes->good[k]);
    float m = h.beta1 * lamb_m(b, i, is_narrow) + h.one_minus_beta1 * g;
    float v = h.beta2 * lamb_v(b, i, is_narrow) + h.one_minus_beta2 * (g * g);
    if (is_narrow) {
        m = round_by_chance(m, mix(b->m_seed + (uint32_t)i));
        v = round_by_chance(v, mix(b->v_seed + (uint32_t)i));
        b->narrow_m[i] = upper_half(m);
        b->narrow_v[i] = upper_half(v);
    } else {
        b->m[i] = m;
        b->v[i] = v;
    }
    const float u = lamb_u(x, g, m, v, h, looks_ahead);
    b->u[i] = u;
    lanes->x[k] = extend(norm, lanes->x[k], x);
    lanes->u[k] = extend(norm, lanes->u[k], u);
}

INLINE void lamb_measure_all(const struct lamb_block *b, struct lamb h, struct totals *totals, enum norm norm,
                             int is_narrow, int looks_ahead) {
    struct lanes lanes;
    start(&lanes);
    OVER_LANES(b->n, i, k, lamb_measure(b, i, k, h, &lanes, norm, is_narrow, looks_ahead));
    add_block(norm, totals, &lanes);
}

INLINE void lamb_move_all(const struct lamb_block *b, struct lamb h, int is_narrow, int looks_ahead) {
    INDEPENDENT for (int i = 0; i < b->n; i++) {
        const float m = lamb_m(b, i, is_narrow), v = lamb_v(b, i, is_narrow);
        const float u = lamb_u(b->x[i], looks_ahead ? b->g[i] : 0, m, v, h, looks_ahead);
        b->x[i] = h.keep * b->x[i] - h.step * u;
    }
}

/* Call one of the two with its last two arguments as constants. */
#define WITH_CONSTANTS(function, ...)                                                                         \
    (is_narrow ? h.looks_ahead ? function(__VA_ARGS__, 1, 1) : function(__VA_ARGS__, 1, 0)                     \
               : h.looks_ahead ? function(__VA_ARGS__, 0, 1) : function(__VA_ARGS__, 0, 0))

/* Return the block that begins with element `first`. */
static struct lamb_block lamb_block_of(const struct layer *layer, const struct numbers *numbers, int64_t first,
                                       int64_t last) {
    const struct origin origin = layer->origin;
    int64_t n = last - first < BLOCK ? last - first : BLOCK, place = origin.start + first;
    if (origin.skip) { /* the block ends where elements of the whole layer are missing */
        const int64_t run = first / origin.run, left = (run + 1) * origin.run - first;
        n = n < left ? n : left;
        place += run * origin.skip;
    }
    if (layer->state_dtype == FLOAT32)
        return (struct lamb_block){
            .n = (int)n,
            .m = (float *)layer->state[0] + first,
            .v = (float *)layer->state[1] + first,
        };
    const uint32_t seed = mix(numbers->t) + 8 * layer->position;
    return (struct lamb_block){
        .n = (int)n,
        .narrow_m = (uint16_t *)layer->state[0] + first,
        .narrow_v = (uint16_t *)layer->state[1] + first,
        .m_seed = mix(seed) + (uint32_t)place,
        .v_seed = mix(seed + 1) + (uint32_t)place,
    };
}

static void lamb_direct(const struct layer *layer, const struct numbers *numbers, enum norm norm, int64_t first,
                        int64_t last, float *kept, double norms[2]) {
    const struct lamb h = lamb_of(numbers, 0);
    const int is_narrow = layer->state_dtype == BFLOAT16;
    float x_room[BLOCK], g_room[BLOCK], u_room[BLOCK];
    struct totals totals = {.good = UINT32_MAX};
    for (struct lamb_block b; first < last; first += b.n, kept += kept ? b.n : 0) {
        b = lamb_block_of(layer, numbers, first, last);
        b.x = read_block(layer->x, layer->x_dtype, first, b.n, x_room);
        b.g = read_block((void *)layer->g, layer->g_dtype, first, b.n, g_room);
        b.u = kept ? kept : u_room;
        if (norm == L2)
            WITH_CONSTANTS(lamb_measure_all, &b, h, &totals, L2);
        else if (norm == L1)
            WITH_CONSTANTS(lamb_measure_all, &b, h, &totals, L1);
        else
            WITH_CONSTANTS(lamb_measure_all, &b, h, &totals, LINF);
    }
    conclude(norm, &totals, norms);
}

static void lamb_descend(const struct layer *layer, const struct numbers *numbers, double ratio, int64_t first,
                         int64_t last, const float *kept) {
    const struct lamb h = lamb_of(numbers, ratio);
    const int is_narrow = layer->state_dtype == BFLOAT16;
    float x_room[BLOCK], g_room[BLOCK];
    for (struct lamb_block b; first < last; first += b.n, kept += kept ? b.n : 0) {
        b = lamb_block_of(layer, numbers, first, last);
        b.x = read_block(layer->x, layer->x_dtype, first, b.n, x_room);
        if (kept) {
            INDEPENDENT for (int i = 0; i < b.n; i++) b.x[i] = h.keep * b.x[i] - h.step * kept[i];
        } else {
            if (h.looks_ahead) b.g = read_block((void *)layer->g, layer->g_dtype, first, b.n, g_room);
            WITH_CONSTANTS(lamb_move_all, &b, h);
        }
        write_x(layer, first, b.n, b.x);
    }
}

/* ---- LARS ---- */

struct lars {
    float momentum, one_minus_momentum, weight_decay, sign, step, ratio, rate;
    int nesterov;
};

static struct lars lars_of(const struct numbers *h, double ratio) {
    return (struct lars){
        .momentum = (float)h->momentum,
        .one_minus_momentum = (float)(1 - h->momentum),
        .weight_decay = (float)h->weight_decay,
        .sign = h->maximize ? -1 : 1,
        .step = (float)(h->rate * ratio),
        .ratio = (float)ratio,
        .rate = (float)h->rate,
        .nesterov = h->nesterov,
    };
}

/* momentum·m + (1 - momentum)(g + weight_decay·x) */
INLINE float lars_average(float x, float g, float m, struct lars h) {
    return h.momentum * m + h.one_minus_momentum * (h.sign * g + h.weight_decay * x);
}

INLINE void lars_measure_all(int n, const float *x, const float *g, float *m, struct lars h, struct totals *totals,
                             enum norm norm, int nesterov) {
    struct lanes lanes;
    start(&lanes);
    OVER_LANES(n, i, k, {
        const float gradient = usable(g[i], &lanes.good[k]), average = lars_average(x[i], gradient, m[i], h);
        const float u = nesterov ? lars_average(x[i], gradient, average, h) : average;
        m[i] = average;
        lanes.x[k] = extend(norm, lanes.x[k], x[i]);
        lanes.u[k] = extend(norm, lanes.u[k], u);
    });
    add_block(norm, totals, &lanes);
}

static void lars_direct(const struct layer *layer, const struct numbers *numbers, enum norm norm, int64_t first,
                        int64_t last, float *kept, double norms[2]) {
    (void)kept; /* u costs little to form again */
    const struct lars h = lars_of(numbers, 0);
    float x_room[BLOCK], g_room[BLOCK];
    struct totals totals = {.good = UINT32_MAX};
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        const float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        const float *g = read_block((void *)layer->g, layer->g_dtype, first, n, g_room);
        float *m = (float *)layer->state[0] + first;
        if (norm == L2 && !h.nesterov)
            lars_measure_all(n, x, g, m, h, &totals, L2, 0);
        else if (norm == L2)
            lars_measure_all(n, x, g, m, h, &totals, L2, 1);
        else if (norm == L1)
            lars_measure_all(n, x, g, m, h, &totals, L1, h.nesterov);
        else
            lars_measure_all(n, x, g, m, h, &totals, LINF, h.nesterov);
    }
    conclude(norm, &totals, norms);
}

static void lars_descend(const struct layer *layer, const struct numbers *numbers, double ratio, int64_t first,
                         int64_t last, const float *kept) {
    (void)kept; /* u costs little to form again */
    const struct lars h = lars_of(numbers, ratio);
    float x_room[BLOCK], g_room[BLOCK];
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        const float *m = (float *)layer->state[0] + first;
        if (h.nesterov) {
            const float *g = read_block((void *)layer->g, layer->g_dtype, first, n, g_room);
            INDEPENDENT for (int i = 0; i < n; i++) x[i] = x[i] - h.step * lars_average(x[i], g[i], m[i], h);
        } else {
            INDEPENDENT for (int i = 0; i < n; i++) x[i] = x[i] - h.step * m[i];
        }
        write_x(layer, first, n, x);
    }
}

/* ---- LARS as of 2017: the ratio comes before the momentum, and is made of g ---- */

INLINE void lars2017_measure_all(int n, const float *x, const float *g, struct totals *totals, enum norm norm) {
    struct lanes lanes;
    start(&lanes);
    OVER_LANES(n, i, k, {
        lanes.x[k] = extend(norm, lanes.x[k], x[i]);
        lanes.u[k] = extend(norm, lanes.u[k], usable(g[i], &lanes.good[k]));
    });
    add_block(norm, totals, &lanes);
}

static void lars2017_direct(const struct layer *layer, const struct numbers *numbers, enum norm norm, int64_t first,
                            int64_t last, float *kept, double norms[2]) {
    (void)numbers, (void)kept;
    float x_room[BLOCK], g_room[BLOCK];
    struct totals totals = {.good = UINT32_MAX};
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        const float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        const float *g = read_block((void *)layer->g, layer->g_dtype, first, n, g_room);
        if (norm == L2)
            lars2017_measure_all(n, x, g, &totals, L2);
        else if (norm == L1)
            lars2017_measure_all(n, x, g, &totals, L1);
        else
            lars2017_measure_all(n, x, g, &totals, LINF);
    }
    conclude(norm, &totals, norms);
}

static void lars2017_descend(const struct layer *layer, const struct numbers *numbers, double ratio, int64_t first,
                             int64_t last, const float *kept) {
    (void)kept; /* u costs little to form again */
    const struct lars h = lars_of(numbers, ratio);
    const float ahead = h.nesterov ? h.momentum : 1, scaled_ahead = h.nesterov ? 1 : 0;
    float x_room[BLOCK], g_room[BLOCK];
    for (int n; first < last; first += n) {
        n = last - first < BLOCK ? (int)(last - first) : BLOCK;
        float *x = read_block(layer->x, layer->x_dtype, first, n, x_room);
        const float *g = read_block((void *)layer->g, layer->g_dtype, first, n, g_room);
        float *b = (float *)layer->state[0] + first;
        INDEPENDENT for (int i = 0; i < n; i++) {
            const float scaled = h.ratio * (h.sign * g[i] + h.weight_decay * x[i]);
            b[i] = h.momentum * b[i] + scaled;
            x[i] = x[i] - h.rate * (scaled_ahead * scaled + ahead * b[i]);
        }
        write_x(layer, first, n, x);
    }
}

const struct rule_kernel VARIANT[NUM_RULES] = {
    [LAMB] = {lamb_direct, lamb_descend},
    [LARS] = {lars_direct, lars_descend},
    [LARS2017] = {lars2017_direct, lars2017_descend},
};
