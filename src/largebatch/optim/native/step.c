/* One step of all layers: who does what, and the trust ratio between the two passes over a layer.
 *
 * The second pass over a layer follows its first at once, while the layer is still in cache, and walks back from where
 * the first one ended. A large layer is cut into parts that all threads share, with one barrier between its passes; of
 * the small ones each thread takes the next. What is measured of a layer is joined in the order of its parts, which
 * depend on its size alone: no result depends on the number of threads.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "native.h"

enum { PART = 1 << 15, MAX_PARTS = 4096 };

/* Layers from here on are shared: their four tensors overflow a core's level-2 cache. */
enum { LARGE = 1 << 16 };

enum phase { DIRECT = 1, DESCEND = 2 };

struct step {
    const struct layer *layers;
    const struct numbers *numbers;
    int64_t num_layers;
    const struct rule_kernel *kernel;
    enum norm norm;
    int phases;
    double *measured; /* [2, layers]: what `norms.combine` takes, of x and of u */
    double *ratios;   /* [layers] */
    double (*parts)[MAX_PARTS][2]; /* of two large layers in turn: one may still be read when the next is measured */
    atomic_llong next_small;
};

static int64_t part_size(int64_t count) {
    int64_t size = (count + MAX_PARTS - 1) / MAX_PARTS;
    return size <= PART ? PART : (size + PART - 1) / PART * PART;
}

static double clamp(double value, double low, double high) {
    return value < low ? low : value > high ? high : value;
}

/* The factor of the learning rate, as in `norms.trust_ratio`. */
static double trust_ratio(const struct numbers *h, double x_norm, double u_norm) {
    x_norm *= h->shrink;
    if (!h->adapt || x_norm == 0 || u_norm == 0) return 1;
    double divisor = u_norm + h->ratio_eps + h->ratio_decay * x_norm;
    return clamp(h->coefficient * clamp(x_norm, h->low, h->high) / divisor, h->lower, h->upper);
}

static double finish(enum norm norm, double measured) { return norm == L2 ? sqrt(measured) : measured; }

/* Keep what was measured of a layer, and return its trust ratio if this is a whole step. */
static double conclude(const struct step *step, int64_t index, const double norms[2], int keep) {
    double ratio = 1;
    if (step->phases & DESCEND)
        ratio = trust_ratio(&step->numbers[step->layers[index].numbers], finish(step->norm, norms[0]),
                            finish(step->norm, norms[1]));
    if (!keep) return ratio;
    if (step->measured) {
        step->measured[index] = norms[0];
        step->measured[index + step->num_layers] = norms[1];
    }
    if (step->phases & DESCEND) step->ratios[index] = ratio;
    return ratio;
}

static void join_parts(enum norm norm, int64_t num, double (*parts)[2], double norms[2]) {
    norms[0] = norms[1] = 0;
    for (int64_t i = 0; i < num; i++)
        for (int k = 0; k < 2; k++) norms[k] = join(norm, norms[k], parts[i][k]);
}

/* The share of one of `size` threads in one layer. */
static void move_layer(struct step *step, int64_t index, double (*parts)[2], struct team *team, int rank, int size) {
    const struct layer *layer = &step->layers[index];
    const struct numbers *numbers = &step->numbers[layer->numbers];
    const int64_t span = part_size(layer->count), num_parts = (layer->count + span - 1) / span;
    const int64_t begin = num_parts * rank / size, end = num_parts * (rank + 1) / size;
    double ratio = (step->phases & DIRECT) ? 1 : step->ratios[index];
    if (step->phases & DIRECT) {
        double norms[2];
        for (int64_t i = begin; i < end; i++) {
            int64_t last = (i + 1) * span;
            step->kernel->direct(layer, numbers, step->norm, i * span, last < layer->count ? last : layer->count,
                                 parts[i]);
        }
        if (size > 1) team_barrier(team, size);
        join_parts(step->norm, num_parts, parts, norms);
        ratio = conclude(step, index, norms, rank == 0);
    }
    if (step->phases & DESCEND)
        for (int64_t i = end; i-- > begin;) {
            int64_t last = (i + 1) * span;
            step->kernel->descend(layer, numbers, ratio, i * span, last < layer->count ? last : layer->count);
        }
}

static void member(void *context, struct team *team, int rank, int size) {
    struct step *step = context;
    int turn = 0;
    for (int64_t i = 0; size > 1 && i < step->num_layers; i++)
        if (step->layers[i].count >= LARGE) move_layer(step, i, step->parts[turn++ % 2], team, rank, size);
    double own_parts[MAX_PARTS][2];
    for (int64_t i; (i = atomic_fetch_add(&step->next_small, 1)) < step->num_layers;)
        if (size == 1 || step->layers[i].count < LARGE) move_layer(step, i, own_parts, team, 0, 1);
}
