/* One step of all layers: who does what, and the trust ratio between the two passes over a layer.
 *
 * The second pass over a layer follows its first at once, while the layer is still in cache, and walks back from where
 * the first one ended. A large layer is cut into parts that all threads share, with one barrier between its passes; of
 * the small ones each thread takes the next. What is measured of a layer is joined in the order of its parts, which
 * depend on its size alone: no result depends on the number of threads.
 */
#include <math.h>
#include <stdatomic.h>

#include "native.h"

enum { PART = 1 << 14, MAX_PARTS = 4096 };

/* Layers from here on are shared: their four tensors overflow a core's level-2 cache. */
enum { LARGE = 1 << 16 };

/* What a thread takes of the small layers at a time. */
enum { GRAIN = 1 << 14 };

/* Fewer elements than this take less time than it takes to wake a thread. */
enum { WORTH_A_TEAM = 1 << 15 };

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
    float *room;      /* null if another step has it */
    int64_t room_each; /* of `room`, for each of the threads */
    atomic_llong next_small;
};

/* Where u waits for the trust ratio, as far as this goes: to form it again takes twice as long. All threads together
 * have less than 1 MB, which is what a step may take beyond the states. */
enum { ROOM = 240 << 10 };
static float shared_room[ROOM];
static atomic_flag room_is_taken = ATOMIC_FLAG_INIT;

static int64_t part_size(int64_t count) {
    int64_t size = (count + MAX_PARTS - 1) / MAX_PARTS;
    return size <= PART ? PART : (size + PART - 1) / PART * PART;
}

static double clamp(double value, double low, double high) {
    return value < low ? low : value > high ? high : value;
}

/* The factor of the learning rate, as in `norms.trust_ratios`: NaN for a layer that has to stay where it is. */
static double trust_ratio(const struct numbers *h, double x_norm, double u_norm) {
    x_norm *= h->shrink;
    if (!isfinite(u_norm)) return NAN;
    if (!h->adapt || x_norm == 0 || u_norm == 0) return 1;
    double divisor = u_norm + h->ratio_eps;
    if (h->ratio_decay != 0) divisor += h->ratio_decay * x_norm;
    double ratio = clamp(h->coefficient * clamp(x_norm, h->low, h->high) / divisor, h->lower, h->upper);
    return isfinite(ratio) ? ratio : NAN;
}

static double finish(enum norm norm, double measured) { return norm == L2 ? sqrt(measured) : measured; }

/* Keep what was measured of a layer, and return its trust ratio if this is a whole step. */
static double conclude(const struct step *step, int64_t index, const double norms[2], int keep) {
    double ratio = 1;
    if (step->phases & DESCEND)
        ratio = trust_ratio(&step->numbers[step->layers[index].numbers], finish(step->norm, norms[0]),
                            finish(step->norm, norms[1]));
    if (!keep) return ratio;
    for (int k = 0; step->measured && k < 2; k++) step->measured[index + k * step->num_layers] = norms[k];
    if (step->phases & DESCEND) step->ratios[index] = ratio;
    return ratio;
}

static void join_parts(enum norm norm, int64_t num, double (*parts)[2], double norms[2]) {
    norms[0] = norms[1] = 0;
    for (int64_t i = 0; i < num; i++)
        for (int k = 0; k < 2; k++) norms[k] = join(norm, norms[k], parts[i][k]);
}

static int64_t end_of_part(const struct layer *layer, int64_t part, int64_t span) {
    return (part + 1) * span < layer->count ? (part + 1) * span : layer->count;
}

/* The share of one of `size` threads in one layer. `room` is its own. */
static void move_layer(struct step *step, int64_t index, double (*parts)[2], float *room, struct team *team, int rank,
                       int size) {
    const struct layer *layer = &step->layers[index];
    const struct numbers *numbers = &step->numbers[layer->numbers];
    const int64_t span = part_size(layer->count), num_parts = (layer->count + span - 1) / span;
    const int64_t begin = num_parts * rank / size, end = num_parts * (rank + 1) / size;
    const int64_t keeping = step->phases == (DIRECT | DESCEND) ? step->room_each / span : 0; /* that many parts' u */
    double ratio = (step->phases & DIRECT) ? 1 : step->ratios[index];
    if (step->phases & DIRECT) {
        double norms[2];
        for (int64_t i = begin; i < end; i++)
            step->kernel->direct(layer, numbers, step->norm, i * span, end_of_part(layer, i, span),
                                 end - i <= keeping ? room + (end - i - 1) * span : 0, parts[i]);
        if (size > 1) team_barrier(team, size);
        join_parts(step->norm, num_parts, parts, norms);
        ratio = conclude(step, index, norms, rank == 0);
    }
    if ((step->phases & DESCEND) && !isnan(ratio))
        for (int64_t i = end; i-- > begin;)
            step->kernel->descend(layer, numbers, ratio, i * span, end_of_part(layer, i, span),
                                  end - i <= keeping ? room + (end - i - 1) * span : 0);
}

/* Take the next layers for one thread, from the index returned up to `*end`: some elements' worth, since the threads
 * wait for one another here. */
static int64_t take_layers(struct step *step, int64_t *end) {
    long long first = atomic_load(&step->next_small), next;
    do {
        int64_t elements = 0;
        for (next = first; next < step->num_layers && elements < GRAIN; next++)
            if (step->layers[next].count < LARGE) elements += step->layers[next].count;
    } while (!atomic_compare_exchange_weak(&step->next_small, &first, next));
    *end = next;
    return first;
}

/* One thread's part of a step: its shares of the large layers, which all threads meet in the same order, then such small
 * layers as are left. Alone, it takes all as they come. */
static void member(void *context, struct team *team, int rank, int size) {
    struct step *step = context;
    float *room = step->room + step->room_each * rank;
    int turn = 0;
    for (int64_t i = 0; size > 1 && i < step->num_layers; i++)
        if (step->layers[i].count >= LARGE)
            move_layer(step, i, step->parts[turn++ % 2], room, team, rank, size);
    double own_parts[MAX_PARTS][2];
    for (int64_t i, end; (i = take_layers(step, &end)) < end;)
        for (; i < end; i++)
            if (size == 1 || step->layers[i].count < LARGE) move_layer(step, i, own_parts, room, team, 0, 1);
}

/* ---- what Python calls ---- */

static const struct rule_kernel *const kernels[] = {
#ifdef __x86_64__
    [AVX512] = largebatch_avx512,
    [AVX2] = largebatch_avx2,
#endif
    [BASELINE] = largebatch_baseline,
};

/* Tell the sizes of what is shared with Python. */
EXPORTED void largebatch_layout(int64_t sizes[2]) {
    sizes[0] = sizeof(struct layer);
    sizes[1] = sizeof(struct numbers);
}

/* Add one to `num` step counts, and copy them out. */
EXPORTED void largebatch_count(float *const *steps, int64_t num, float *counts) {
    for (int64_t i = 0; i < num; i++) counts[i] = *steps[i] += 1;
}

/* Take the phases of a step that `phases` names, for layers of one rule. See `struct step`. */
EXPORTED void largebatch_step(const struct layer *layers, int64_t num_layers, const struct numbers *numbers, int rule,
                              int norm, int phases, int num_threads, double *measured, double *ratios) {
    double parts[2][MAX_PARTS][2];
    int64_t total = 0;
    for (int64_t i = 0; i < num_layers; i++) total += layers[i].count;
    struct step step = {
        .layers = layers,
        .numbers = numbers,
        .num_layers = num_layers,
        .kernel = &kernels[chosen_isa][rule],
        .norm = (enum norm)norm,
        .phases = phases,
        .measured = measured,
        .ratios = ratios,
        .parts = parts,
    };
    if (total < WORTH_A_TEAM) num_threads = 1;
    const int has_room = !atomic_flag_test_and_set(&room_is_taken);
    if (has_room) step.room = shared_room, step.room_each = ROOM / num_threads;
    run_in_team(num_threads, member, &step);
    if (has_room) atomic_flag_clear(&room_is_taken);
}
