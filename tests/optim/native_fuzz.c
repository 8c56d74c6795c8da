/* Random layers through the native kernel, to be compiled with sanitizers: native_fuzz SEED ROUNDS.
 *
 * Every tensor is an allocation of its exact size, so that an address sanitizer sees any access outside of it. Each step
 * is taken twice, from the same state, on different numbers of threads and, where they have fused multiply-adds, on
 * different instruction sets; it must leave the same bits. Fails by exit status or by what the sanitizers print.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <math.h>

#include "native.h"

const char *largebatch_choose(const char *highest);
void largebatch_count(float *const *steps, int64_t num, float *counts);
void largebatch_step(const struct layer *layers, int64_t num_layers, const struct numbers *numbers, int rule, int norm,
                     int phases, int num_threads, double *measured, double *ratios);

enum { MAX_LAYERS = 12, TENSORS = 5 }; /* x, g, two of state, and what x is rounded to */

static uint64_t seed;

static uint32_t draw(uint32_t below) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % below;
}

static int64_t draw_count(void) {
    static const int64_t edges[] = {0, 1, 15, 16, 17, 2047, 2048, 2049, 32767, 32768, 32769, 65535, 65536, 65537};
    return draw(2) ? edges[draw(sizeof edges / sizeof *edges)] : draw(1u << draw(18));
}

static size_t width(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* Numbers of every kind and magnitude, some of them bad. */
static void fill(void *tensor, int dtype, int64_t count, int any) {
    for (int64_t i = 0; i < count; i++) {
        float a = (float)((int)draw(2001) - 1000) / 997;
        uint32_t bits = draw(1u << 16) << 16 | draw(1u << 16);
        if (!any) memcpy(&bits, &a, 4);
        if (dtype == FLOAT32)
            memcpy((char *)tensor + 4 * i, &bits, 4);
        else
            ((uint16_t *)tensor)[i] = (uint16_t)(dtype == BFLOAT16 ? bits >> 16 : any ? bits : 0x3c00u + draw(512));
    }
}

struct problem {
    int rule, norm, num_layers, num_numbers, num_threads;
    struct numbers numbers[3];
    struct layer layers[MAX_LAYERS];
    void *tensors[MAX_LAYERS][TENSORS];
    size_t sizes[MAX_LAYERS][TENSORS];
    double ratios[MAX_LAYERS], measured[2 * MAX_LAYERS];
};

static void make(struct problem *p) {
    *p = (struct problem){
        .rule = (int)draw(NUM_RULES), .norm = (int)draw(3), .num_layers = (int)draw(MAX_LAYERS) + 1, .num_numbers = 3};
    for (int i = 0; i < p->num_numbers; i++)
        p->numbers[i] = (struct numbers){
            .rate = 0.01, .keep = draw(2) ? 1 : 0.99, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-6,
            .weight_decay = draw(2) ? 0.01 : 0, .m_scale = 2, .g_scale = draw(2) ? 0.1 : 0, .v_scale = 3,
            .g_sq_scale = draw(2) ? 0.2 : 0, .momentum = 0.9, .shrink = 1, .low = draw(2) ? 0 : -INFINITY,
            .high = draw(2) ? 10 : INFINITY, .ratio_decay = 0.01 * draw(2), .coefficient = 1, .lower = 0,
            .upper = INFINITY, .t = draw(1000), .maximize = (int)draw(2), .nesterov = (int)draw(2),
            .adapt = (int)draw(2)};
    for (int i = 0; i < p->num_layers; i++) {
        const int64_t count = draw_count();
        const int has_master = !draw(4);
        struct layer *layer = &p->layers[i];
        *layer = (struct layer){.count = count, .position = (uint32_t)i, .numbers = (int32_t)draw(3)};
        layer->x_dtype = has_master ? FLOAT32 : (int8_t)draw(3);
        layer->g_dtype = (int8_t)draw(3);
        layer->state_dtype = p->rule == LAMB ? (int8_t)draw(2) : FLOAT32;
        layer->rounded_dtype = (int8_t)(1 + draw(2));
        if (!draw(4)) layer->origin = (struct origin){draw(1000), 1 + draw(3000), draw(3000)};
        const int dtypes[] = {layer->x_dtype, layer->g_dtype, layer->state_dtype, layer->state_dtype,
                              layer->rounded_dtype};
        for (int k = 0; k < TENSORS; k++) {
            if ((k == 3 && p->rule != LAMB) || (k == 4 && !has_master)) continue;
            p->sizes[i][k] = (size_t)count * width(dtypes[k]);
            p->tensors[i][k] = malloc(p->sizes[i][k]);
            fill(p->tensors[i][k], dtypes[k], count, k == 1 && !draw(3));
            if (k == 3) memset(p->tensors[i][k], 0, p->sizes[i][k]);
        }
        layer->x = p->tensors[i][0];
        layer->g = p->tensors[i][1];
        layer->state[0] = p->tensors[i][2];
        layer->state[1] = p->tensors[i][3];
        layer->rounded = p->tensors[i][4];
    }
}

/* Take a step on copies of the tensors, in one call or in two, and return these. */
static void take(const struct problem *from, struct problem *to, const char *isa, int num_threads, int in_two) {
    *to = *from;
    for (int i = 0; i < to->num_layers; i++) {
        void **of_layer[] = {&to->layers[i].x, (void **)&to->layers[i].g, &to->layers[i].state[0],
                             &to->layers[i].state[1], &to->layers[i].rounded};
        for (int k = 0; k < TENSORS; k++) {
            if (!from->tensors[i][k]) continue;
            *of_layer[k] = to->tensors[i][k] = malloc(to->sizes[i][k]);
            memcpy(to->tensors[i][k], from->tensors[i][k], to->sizes[i][k]);
        }
    }
    largebatch_choose(isa);
    if (in_two) {
        largebatch_step(to->layers, to->num_layers, to->numbers, to->rule, to->norm, 1, num_threads, to->measured, 0);
        memcpy(to->ratios, from->ratios, sizeof to->ratios);
        largebatch_step(to->layers, to->num_layers, to->numbers, to->rule, to->norm, 2, num_threads, 0, to->ratios);
    } else {
        largebatch_step(to->layers, to->num_layers, to->numbers, to->rule, to->norm, 3, num_threads, 0, to->ratios);
    }
}

static int differ(const struct problem *a, const struct problem *b) {
    for (int i = 0; i < a->num_layers; i++)
        for (int k = 0; k < TENSORS; k++)
            if (a->tensors[i][k] && memcmp(a->tensors[i][k], b->tensors[i][k], a->sizes[i][k])) return 1;
    return 0;
}

static void release(struct problem *p) {
    for (int i = 0; i < p->num_layers; i++)
        for (int k = 0; k < TENSORS; k++) free(p->tensors[i][k]);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    seed = strtoull(argv[1], 0, 10);
    const int num_rounds = atoi(argv[2]);
    int num_moved = 0;
    for (int round = 0; round < num_rounds; round++) {
        static struct problem start, once, again;
        make(&start);
        const int is_baseline = !draw(3);
        take(&start, &once, is_baseline ? "baseline" : "avx2", 1, 0);
        memcpy(start.ratios, once.ratios, sizeof start.ratios);
        take(&start, &again, is_baseline ? "baseline" : draw(2) ? 0 : "avx2", 1 + (int)draw(4), (int)draw(2));
        if (differ(&once, &again)) {
            fprintf(stderr, "round %d: rule %d, norm %d: the results differ\n", round, start.rule, start.norm);
            return 1;
        }
        num_moved += differ(&start, &once);
        release(&start);
        release(&once);
        release(&again);
    }
    float step = 3, count = 0, *steps[] = {&step};
    largebatch_count(steps, 1, &count);
    return count != 4 || step != 4 || num_moved < num_rounds / 2;
}
