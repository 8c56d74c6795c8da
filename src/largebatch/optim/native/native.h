/* What the parts of the native backend share: the description of a step's work, which Python fills in.
 *
 * library.py mirrors `struct layer` and `struct numbers` field by field; `largebatch_layout` tells it their sizes.
 */
#ifndef LARGEBATCH_NATIVE_H
#define LARGEBATCH_NATIVE_H

#include <stdint.h>

enum dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum rule { LAMB, LARS, LARS2017, NUM_RULES };
enum norm { L2, L1, LINF };

/* One parameter tensor and what a step of it takes. All its tensors lie in memory in the same order, without holes. */
struct layer {
    void *x;           /* the weights, or their float32 master copy */
    const void *g;     /* the gradient: read only */
    void *state[2];    /* LAMB: m and v. LARS: the momentum, and nothing */
    void *rounded;     /* where a master copy is rounded to, or null */
    int64_t count;     /* elements */
    struct origin {
        int64_t start, run, skip;
    } origin;          /* element i is number start + i + (i / run) * skip of the whole layer: see precision.Origin */
    uint32_t position; /* among all parameters of the optimizer: seeds the stochastic rounding */
    int32_t numbers;   /* index of its `struct numbers` */
    int8_t x_dtype, g_dtype, state_dtype, rounded_dtype;
};

/* The numbers of one step, which many layers share. The names are those of `lamb.Hyper`, `lars.Hyper` and
 * `norms.Ratio`, where they are explained. */
struct numbers {
    double rate, keep, beta1, beta2, eps, weight_decay, m_scale, g_scale, v_scale, g_sq_scale, momentum;
    double shrink, low, high, ratio_eps, ratio_decay, coefficient, lower, upper;
    uint32_t t;
    int32_t maximize, nesterov, adapt;
};

/* The mathematics of one rule, over elements `first` up to `last` of a layer. */
struct rule_kernel {
    /* Advance the state, form u, leave x alone; what was measured of x and of u is returned in `norms`. Where the rule
     * keeps u and `kept` is not null, u is left there. */
    void (*direct)(const struct layer *, const struct numbers *, enum norm norm, int64_t first, int64_t last,
                   float *kept, double norms[2]);
    /* Take u from `kept`, or form it again where that is null, and move x along it. */
    void (*descend)(const struct layer *, const struct numbers *, double ratio, int64_t first, int64_t last,
                    float *kept);
};

/* kernel.c, compiled once for each instruction set. */
extern const struct rule_kernel largebatch_baseline[NUM_RULES];
extern const struct rule_kernel largebatch_avx2[NUM_RULES];
extern const struct rule_kernel largebatch_avx512[NUM_RULES];

/* Join what was measured of two disjoint parts: sums of squares or of magnitudes add up, of maxima the larger counts,
 * and NaN always stays. */
static inline double join(enum norm norm, double a, double b) {
    if (norm != LINF) return a + b;
    return b > a || b != b ? b : a;
}

/* What the library shows; all else is compiled with hidden visibility. */
#define EXPORTED __attribute__((visibility("default")))

/* isa.c: the instruction sets, the best first. */
#ifdef __x86_64__
enum isa { AVX512, AVX2, BASELINE };
#else
enum isa { BASELINE };
#endif
extern enum isa chosen_isa;

/* threads.c */
struct team;
typedef void (*team_body)(void *context, struct team *, int rank, int size);
void run_in_team(int size, team_body, void *context);
void team_barrier(struct team *, int size);

#endif
