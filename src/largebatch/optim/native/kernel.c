/* The mathematics: each rule as in reference.py, in float32.
 *
 * Each pass of a rule is one loop over vectors without branches or calls, so that a processor overlaps its divisions
 * with its memory traffic; a loop for each line of the mathematics, over blocks in the level-1 cache, took 1.5 times as
 * long. What the loops differ in are constant arguments of inlined functions. This file is compiled once for each
 * instruction set, with VARIANT as the name of the table at its end, and with contraction to fused multiply-adds off:
 * these are where the code says so, and not in LAMB's state, whose bits are those of the other backends. All instruction
 * sets that have them compute the same bits, on any number of threads.
 */
#include "vector.h"

enum { BLOCK = 2048 };

/* ---- what is measured of x and of u, as by `norms.measure` ---- */

/* A lane adds up the BLOCK / LANES elements of a block in float32; all beyond is float64. */
struct lanes {
    floats x[VECTORS], u[VECTORS];
    words good; /* no bit is 0 as long as the squares of all elements of the gradient are finite */
};

struct totals {
    double x[LANES], u[LANES];
    uint32_t good;
};

INLINE floats extend(enum norm norm, floats sum, floats a) {
    if (norm == L2) return multiply_add(a, a, sum);
    if (norm == L1) return sum + magnitude(a);
    return larger(sum, magnitude(a));
}

INLINE struct lanes no_lanes(void) { return (struct lanes){.good = ~(words){0}}; }

INLINE void add_block(enum norm norm, struct totals *totals, const struct lanes *lanes, int crossed) {
    float x[LANES], u[LANES];
    store_group(x, lanes->x, crossed);
    store_group(u, lanes->u, crossed);
    for (int k = 0; k < LANES; k++) {
        totals->x[k] = join(norm, totals->x[k], x[k]);
        totals->u[k] = join(norm, totals->u[k], u[k]);
        totals->good &= lanes->good[k % WIDTH];
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

/* A gradient, with 0 for the elements whose squares are not finite. */
INLINE floats usable(floats g, words *good) {
    const words is_good = (words)(g * g < INFINITY);
    *good &= is_good;
    return (floats)((words)g & is_good);
}

/* ---- blocks ---- */

/* Elements of a layer that are worked on at a time: x and g are widened where they are narrow, states are as they are. */
struct block {
    int n;
    float *x;
    const float *g;
    void *state[2];
    float *u;      /* where the first pass leaves u and the second takes it from, or null */
    uint32_t seed; /* of the noise of the first element; that of the next is SPREAD more */
};

struct rooms {
    float x[BLOCK], g[BLOCK];
};

/* Return the block that begins with element `first`. Its gradient is `rooms->g` as it comes where none is taken. */
static struct block block_of(const struct layer *layer, const struct numbers *numbers, int64_t first, int64_t last,
                             int takes_g, float *u, struct rooms *rooms) {
    const struct origin origin = layer->origin;
    int64_t n = last - first < BLOCK ? last - first : BLOCK, place = origin.start + first;
    if (origin.skip) { /* the block ends where elements of the whole layer are missing */
        const int64_t run = first / origin.run, left = (run + 1) * origin.run - first;
        n = n < left ? n : left;
        place += run * origin.skip;
    }
    struct block b = {
        .n = (int)n,
        .x = read_block(layer->x, layer->x_dtype, first, (int)n, rooms->x),
        .g = takes_g ? read_block((void *)layer->g, layer->g_dtype, first, (int)n, rooms->g) : rooms->g,
        .u = u,
        .seed = mix(mix(numbers->t) + layer->position) + (uint32_t)place * SPREAD,
    };
    for (int k = 0; k < 2; k++)
        if (layer->state[k]) b.state[k] = (char *)layer->state[k] + first * width_of(layer->state_dtype);
    return b;
}

/* What is left of a block beyond the last whole group of LANES, filled up with elements whose u is 0. */
struct rest {
    float x[LANES], g[LANES], u[LANES];
    uint32_t state[2][LANES];
};

/* Copy the rest of a block, and return it as a block of its own. */
static struct block take_rest(const struct block *b, int is_narrow, struct rest *rest) {
    const int n = b->n % LANES, at = b->n - n, width = is_narrow ? 2 : 4;
    *rest = (struct rest){0};
    memcpy(rest->x, b->x + at, n * sizeof *rest->x);
    memcpy(rest->g, b->g + at, n * sizeof *rest->g);
    if (b->u) memcpy(rest->u, b->u + at, n * sizeof *rest->u);
    for (int i = 0; i < LANES; i++) rest->state[1][i] = is_narrow ? 0x3f803f80 : 0x3f800000; /* v is 1, not 0 */
    for (int k = 0; k < 2; k++)
        if (b->state[k]) memcpy(rest->state[k], (char *)b->state[k] + at * width, n * width);
    return (struct block){
        .n = LANES,
        .x = rest->x,
        .g = rest->g,
        .state = {b->state[0] ? rest->state[0] : 0, b->state[1] ? rest->state[1] : 0},
        .u = b->u ? rest->u : 0,
        .seed = b->seed + (uint32_t)at * SPREAD,
    };
}

/* Put the rest of a block back. */
static void return_rest(const struct block *b, int is_narrow, const struct rest *rest) {
    const int n = b->n % LANES, at = b->n - n, width = is_narrow ? 2 : 4;
    memcpy(b->x + at, rest->x, n * sizeof *rest->x);
    if (b->u) memcpy(b->u + at, rest->u, n * sizeof *rest->u);
    for (int k = 0; k < 2; k++)
        if (b->state[k]) memcpy((char *)b->state[k] + at * width, rest->state[k], n * width);
}

/* Do something with the whole groups of block `b` as block `part`, and then with its rest as `part`. */
#define IN_GROUPS(b, is_narrow, part, ...)                                            \
    do {                                                                              \
        struct rest rest;                                                             \
        struct block part = (b);                                                      \
        part.n -= part.n % LANES;                                                     \
        for (int is_rest = part.n == 0; is_rest <= ((b).n % LANES != 0); is_rest++) { \
            if (is_rest) part = take_rest(&(b), is_narrow, &rest);                    \
            __VA_ARGS__;                                                              \
            if (is_rest) return_rest(&(b), is_narrow, &rest);                         \
        }                                                                             \
    } while (0)

/* Do something for each vector of a block of whole groups: number j of its group, from element i of the block on. */
#define OVER_VECTORS(b, i, j, ...)                         \
    for (int i = 0; i < (b)->n;)                           \
        for (int j = 0; j < VECTORS; j++, i += WIDTH) {    \
            __VA_ARGS__;                                   \
        }

/* ---- LAMB, N-LAMB and NN-LAMB ---- */

struct lamb {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, m_scale, g_scale, v_scale, g_sq_scale, eps, weight_decay;
    float root_scale, scaled_eps; /* m / (root_scale * sqrt(v) + scaled_eps), where u depends on g by m and v alone */
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
        .root_scale = (float)(sqrt(h->v_scale) / h->m_scale),
        .scaled_eps = (float)(h->eps / h->m_scale),
        .keep = (float)h->keep,
        .step = (float)(h->rate * ratio),
        .looks_ahead = h->g_scale != 0 || h->g_sq_scale != 0,
    };
}

INLINE void load_state(floats a[VECTORS], const void *state, int group, int is_narrow) {
    if (is_narrow)
        load_bfloat16(a, (const uint16_t *)state + group);
    else
        load_group(a, (const float *)state + group, 0);
}

INLINE void store_state(void *state, int group, const floats a[VECTORS], int is_narrow) {
    if (is_narrow)
        store_bfloat16((uint16_t *)state + group, a);
    else
        store_group((float *)state + group, a, 0);
}

INLINE floats lamb_u(floats x, floats g, floats m, floats v, struct lamb h, int looks_ahead) {
    floats direction;
    if (looks_ahead)
        direction = scale_add(h.g_scale, g, h.m_scale * m) /
                    (root(scale_add(h.g_sq_scale, g * g, h.v_scale * v)) + h.eps);
    else
        direction = m / scale_add(h.root_scale, root(v), broadcast(h.scaled_eps));
    return scale_add(h.weight_decay, x, direction);
}

INLINE void lamb_measure(const struct block *b, struct lamb h, struct totals *totals, enum norm norm, int is_narrow,
                         int looks_ahead) {
    struct lanes lanes = no_lanes();
    words place[VECTORS]; /* of an element in the whole layer, times SPREAD, plus the seed */
    progression(place, b->seed, SPREAD, is_narrow);
    for (int group = 0; group < b->n; group += LANES) {
        floats x[VECTORS], g[VECTORS], m[VECTORS], v[VECTORS], u[VECTORS];
        load_group(g, b->g + group, is_narrow);
        load_state(m, b->state[0], group, is_narrow);
        load_state(v, b->state[1], group, is_narrow);
        for (int j = 0; j < VECTORS; j++) {
            g[j] = usable(g[j], &lanes.good);
            m[j] = h.beta1 * m[j] + h.one_minus_beta1 * g[j];
            v[j] = h.beta2 * v[j] + h.one_minus_beta2 * (g[j] * g[j]);
            if (is_narrow) {
                const words noise = scatter(place[j]);
                m[j] = round_by_chance(m[j], noise & 0xffffu);
                v[j] = round_by_chance(v[j], noise >> 16);
                place[j] += LANES * SPREAD;
            }
        }
        store_state(b->state[0], group, m, is_narrow);
        store_state(b->state[1], group, v, is_narrow);
        load_group(x, b->x + group, is_narrow);
        for (int j = 0; j < VECTORS; j++) {
            u[j] = lamb_u(x[j], g[j], m[j], v[j], h, looks_ahead);
            lanes.x[j] = extend(norm, lanes.x[j], x[j]);
            lanes.u[j] = extend(norm, lanes.u[j], u[j]);
        }
        if (b->u) store_group(b->u + group, u, is_narrow);
    }
    add_block(norm, totals, &lanes, is_narrow);
}

INLINE void lamb_move(const struct block *b, struct lamb h, int is_narrow, int looks_ahead) {
    for (int group = 0; group < b->n; group += LANES) {
        floats x[VECTORS], g[VECTORS] = {{0}}, m[VECTORS], v[VECTORS];
        load_group(x, b->x + group, is_narrow);
        if (looks_ahead) load_group(g, b->g + group, is_narrow);
        load_state(m, b->state[0], group, is_narrow);
        load_state(v, b->state[1], group, is_narrow);
        for (int j = 0; j < VECTORS; j++)
            x[j] = scale_add(-h.step, lamb_u(x[j], g[j], m[j], v[j], h, looks_ahead), h.keep * x[j]);
        store_group(b->x + group, x, is_narrow);
    }
}

INLINE void move_along(const struct block *b, float keep, float step) {
    OVER_VECTORS(b, i, j, store(b->x + i, scale_add(-step, load(b->u + i), keep * load(b->x + i))));
}

/* Call one of the two with its last two arguments as constants. */
#define WITH_CONSTANTS(function, ...)                                                                         \
    (is_narrow ? h.looks_ahead ? function(__VA_ARGS__, 1, 1) : function(__VA_ARGS__, 1, 0)                     \
               : h.looks_ahead ? function(__VA_ARGS__, 0, 1) : function(__VA_ARGS__, 0, 0))

static void lamb_direct(const struct layer *layer, const struct numbers *numbers, enum norm norm, int64_t first,
                        int64_t last, float *kept, double norms[2]) {
    const struct lamb h = lamb_of(numbers, 0);
    const int is_narrow = layer->state_dtype == BFLOAT16;
    struct rooms rooms;
    struct totals totals = {.good = UINT32_MAX};
    for (struct block b; first < last; first += b.n, kept += kept ? b.n : 0) {
        b = block_of(layer, numbers, first, last, 1, kept, &rooms);
        IN_GROUPS(b, is_narrow, part, {
            if (norm == L2)
                WITH_CONSTANTS(lamb_measure, &part, h, &totals, L2);
            else
                WITH_CONSTANTS(lamb_measure, &part, h, &totals, norm);
        });
    }
    conclude(norm, &totals, norms);
}

static void lamb_descend(const struct layer *layer, const struct numbers *numbers, double ratio, int64_t first,
                         int64_t last, float *kept) {
    const struct lamb h = lamb_of(numbers, ratio);
    const int is_narrow = layer->state_dtype == BFLOAT16;
    struct rooms rooms;
    for (struct block b; first < last; first += b.n, kept += kept ? b.n : 0) {
        b = block_of(layer, numbers, first, last, h.looks_ahead, kept, &rooms);
        IN_GROUPS(b, is_narrow, part, {
            if (kept)
                move_along(&part, h.keep, h.step);
            else
                WITH_CONSTANTS(lamb_move, &part, h);
        });
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
INLINE floats lars_average(floats x, floats g, floats m, struct lars h) {
    return scale_add(h.momentum, m, h.one_minus_momentum * scale_add(h.weight_decay, x, h.sign * g));
}

INLINE void lars_measure(const struct block *b, struct lars h, struct totals *totals, enum norm norm, int nesterov) {
    struct lanes lanes = no_lanes();
    float *state = b->state[0];
    OVER_VECTORS(b, i, j, {
        const floats x = load(b->x + i), g = usable(load(b->g + i), &lanes.good);
        const floats m = lars_average(x, g, load(state + i), h);
        store(state + i, m);
        lanes.x[j] = extend(norm, lanes.x[j], x);
        lanes.u[j] = extend(norm, lanes.u[j], nesterov ? lars_average(x, g, m, h) : m);
    });
    add_block(norm, totals, &lanes, 0);
}

static void lars_direct(const struct layer *layer, const struct numbers *numbers, enum norm norm, int64_t first,
                        int64_t last, float *kept, double norms[2]) {
    (void)kept; /* u costs little to form again */
    const struct lars h = lars_of(numbers, 0);
    struct rooms rooms;
    struct totals totals = {.good = UINT32_MAX};
    for (struct block b; first < last; first += b.n) {
        b = block_of(layer, numbers, first, last, 1, 0, &rooms);
        IN_GROUPS(b, 0, part, {
            if (norm == L2 && !h.nesterov)
                lars_measure(&part, h, &totals, L2, 0);
            else
                lars_measure(&part, h, &totals, norm, h.nesterov);
        });
    }
    conclude(norm, &totals, norms);
}

static void lars_descend(const struct layer *layer, const struct numbers *numbers, double ratio, int64_t first,
                         int64_t last, float *kept) {
    (void)kept; /* u costs little to form again */
    const struct lars h = lars_of(numbers, ratio);
    struct rooms rooms;
    for (struct block b; first < last; first += b.n) {
        b = block_of(layer, numbers, first, last, h.nesterov, 0, &rooms);
        IN_GROUPS(b, 0, part, {
            const struct block *p = &part;
            const float *m = p->state[0];
            if (h.nesterov)
                OVER_VECTORS(p, i, j, {
                    const floats x = load(p->x + i);
                    store(p->x + i, scale_add(-h.step, lars_average(x, load(p->g + i), load(m + i), h), x));
                })
            else
                OVER_VECTORS(p, i, j, store(p->x + i, scale_add(-h.step, load(m + i), load(p->x + i))))
        });
        write_x(layer, first, b.n, b.x);
    }
}

/* ---- LARS as of 2017: the ratio comes before the momentum, and is made of g ---- */

INLINE void lars2017_measure(const struct block *b, struct totals *totals, enum norm norm) {
    struct lanes lanes = no_lanes();
    OVER_VECTORS(b, i, j, {
        lanes.x[j] = extend(norm, lanes.x[j], load(b->x + i));
        lanes.u[j] = extend(norm, lanes.u[j], usable(load(b->g + i), &lanes.good));
    });
    add_block(norm, totals, &lanes, 0);
}

static void lars2017_direct(const struct layer *layer, const struct numbers *numbers, enum norm norm, int64_t first,
                            int64_t last, float *kept, double norms[2]) {
    (void)kept;
    struct rooms rooms;
    struct totals totals = {.good = UINT32_MAX};
    for (struct block b; first < last; first += b.n) {
        b = block_of(layer, numbers, first, last, 1, 0, &rooms);
        IN_GROUPS(b, 0, part, {
            if (norm == L2)
                lars2017_measure(&part, &totals, L2);
            else
                lars2017_measure(&part, &totals, norm);
        });
    }
    conclude(norm, &totals, norms);
}

static void lars2017_descend(const struct layer *layer, const struct numbers *numbers, double ratio, int64_t first,
                             int64_t last, float *kept) {
    (void)kept; /* u costs little to form again */
    const struct lars h = lars_of(numbers, ratio);
    const float ahead = h.nesterov ? h.momentum : 1, scaled_ahead = h.nesterov ? 1 : 0;
    struct rooms rooms;
    for (struct block b; first < last; first += b.n) {
        b = block_of(layer, numbers, first, last, 1, 0, &rooms);
        IN_GROUPS(b, 0, part, {
            const struct block *p = &part;
            float *momentum = p->state[0];
            OVER_VECTORS(p, i, j, {
                const floats x = load(p->x + i);
                const floats scaled = h.ratio * scale_add(h.weight_decay, x, h.sign * load(p->g + i));
                const floats m = scale_add(h.momentum, load(momentum + i), scaled);
                store(momentum + i, m);
                store(p->x + i, scale_add(-h.rate, scale_add(ahead, m, scaled_ahead * scaled), x));
            });
        });
        write_x(layer, first, b.n, b.x);
    }
}

const struct rule_kernel VARIANT[NUM_RULES] = {
    [LAMB] = {lamb_direct, lamb_descend},
    [LARS] = {lars_direct, lars_descend},
    [LARS2017] = {lars2017_direct, lars2017_descend},
};
