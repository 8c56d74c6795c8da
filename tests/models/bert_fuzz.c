/* Random matrices through the CPU kernel of BERT, to be compiled with sanitizers: bert_fuzz SEED ROUNDS.
 *
 * Every tensor is an allocation of its exact size, so that an address sanitizer sees any access outside of it. Each work
 * is done twice, on different numbers of threads and, where they have fused multiply-adds, on different instruction
 * sets; it must leave the same bits. Fails by exit status or by what the sanitizers print.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models.h"

const char *largebatch_choose(const char *highest);
int largebatch_max_length(void), largebatch_norm_rows(void);
void largebatch_softmax(int64_t count, int64_t heads, int64_t length, int narrow, const int32_t *keys, uint32_t site,
                        int kept, void *probs, void *dropped, int num_threads);
void largebatch_softmax_backward(int64_t rows, int64_t length, int narrow, void *grads, const void *probs,
                                 void *dropped, int num_threads);
void largebatch_heads(int joins, int64_t count, int64_t heads, int64_t length, int64_t width, int64_t stride,
                      int narrow, float scale, void *rows, void *by_head, const float *bias, float *sums,
                      int num_threads);
int largebatch_heads_rows(void);
void largebatch_add_norm(int64_t rows, int64_t width, int narrow, const int32_t *keys, uint32_t site, int kept,
                         float scale, float eps, const void *x, const float *x_bias, const float *residual,
                         const float *weight, const float *bias, float *sum, float *moments, float *y, int num_threads);
void largebatch_add_norm_backward(int64_t rows, int64_t width, int narrow, const int32_t *keys, uint32_t site,
                                  int kept, float scale, const float *weight, const float *sum, const float *moments,
                                  const float *grad_y, void *grad_x, float *grad_residual, float *grad_params,
                                  int num_threads);
void largebatch_gelu(int64_t rows, int64_t width, const void *x, const float *bias, void *y, int num_threads);
void largebatch_gelu_backward(int64_t rows, int64_t width, const void *x, const float *bias, const void *grad_y,
                              void *grad_x, float *grad_bias, int num_threads);
int largebatch_gelu_rows(void);
void largebatch_loss(int64_t rows, int64_t classes, int narrow, void *products, const float *bias,
                     const int64_t *labels, float *losses, uint8_t *right, float *grad_bias, int num_threads);
int largebatch_loss_rows(void);

enum { TENSORS = 13 };

static uint64_t seed;

static uint32_t draw(uint32_t below) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % below;
}

/* A work's tensors, made anew from the same seed for each time that it is done. */
struct tensors {
    int num;
    void *memory[TENSORS];
    size_t sizes[TENSORS];
};

static void *make(struct tensors *all, int64_t count, int narrow) {
    const size_t size = (size_t)count * (narrow ? 2 : 4);
    char *tensor = malloc(size);
    for (int64_t i = 0; i < count; i++) {
        float a = (float)((int)draw(2001) - 1000) / 97;
        uint32_t bits;
        memcpy(&bits, &a, 4);
        if (narrow)
            ((uint16_t *)tensor)[i] = (uint16_t)(bits >> 16);
        else
            memcpy(tensor + 4 * i, &bits, 4);
    }
    all->sizes[all->num] = size;
    return all->memory[all->num++] = tensor;
}

static void attend(struct tensors *all, int num_threads) {
    const int64_t count = 1 + draw(4), heads = 1 + draw(5), width = 1 + draw(40);
    const int64_t length = draw(8) ? 1 + draw(70) : largebatch_max_length() - (int64_t)draw(2);
    const int64_t sequences = length > 70 ? 1 : count, rows = sequences * length, apart = draw(9);
    const int narrow = (int)draw(2);
    if (length > 70) { /* a few rows of a matrix are enough */
        const int64_t some = 1 + draw(20);
        void *grads = make(all, some * length, narrow), *probs = make(all, some * length, narrow);
        largebatch_softmax_backward(some, length, narrow, grads, probs, make(all, some * length, narrow), num_threads);
        return;
    }
    const int64_t elements = sequences * heads * length * length;
    const int32_t *keys = make(all, rows, 0);
    void *probs = make(all, elements, narrow), *dropped = make(all, elements, narrow);
    largebatch_softmax(sequences, heads, length, narrow, keys, draw(9), (int)draw(65537), probs, dropped, num_threads);
    void *grads = make(all, elements, narrow);
    largebatch_softmax_backward(sequences * heads * length, length, narrow, grads, probs, dropped, num_threads);
    const int64_t stride = heads * width + apart;
    void *packed = make(all, rows * stride - apart, narrow), *by_head = make(all, rows * heads * width, narrow);
    const int64_t blocks = (rows + largebatch_heads_rows() - 1) / largebatch_heads_rows();
    const float *bias = make(all, heads * width, 0);
    float *sums = make(all, blocks * heads * width, 0);
    const int joins = (int)draw(2);
    largebatch_heads(joins, sequences, heads, length, width, stride, narrow, draw(2) ? 1 : 0.3f, packed, by_head,
                     draw(2) ? bias : NULL, draw(2) ? sums : NULL, num_threads);
}

static void add_and_normalize(struct tensors *all, int num_threads) {
    const int64_t rows = 1 + draw(200), width = 1 + draw(300), elements = rows * width;
    const int64_t blocks = (rows + largebatch_norm_rows() - 1) / largebatch_norm_rows();
    const int narrow = (int)draw(2), kept = (int)draw(65537);
    const uint32_t site = draw(9);
    const int32_t *keys = make(all, rows, 0);
    const float *weight = make(all, width, 0), *bias = make(all, width, 0);
    void *x = make(all, elements, narrow), *grad_x = make(all, elements, narrow);
    float *residual = make(all, elements, 0), *sum = make(all, elements, 0), *y = make(all, elements, 0);
    float *moments = make(all, 2 * rows, 0), *grad_residual = make(all, elements, 0);
    float *grad_params = make(all, 3 * blocks * width, 0);
    const float *x_bias = make(all, width, 0);
    largebatch_add_norm(rows, width, narrow, keys, site, kept, 1.25f, 1e-6f, x, x_bias, residual, weight, bias, sum,
                        moments, y, num_threads);
    largebatch_add_norm_backward(rows, width, narrow, keys, site, kept, 1.25f, weight, sum, moments, y, grad_x,
                                 grad_residual, grad_params, num_threads);
}

static void activate(struct tensors *all, int num_threads) {
    const int64_t rows = 1 + draw(300), width = 1 + draw(100);
    const int64_t blocks = (rows + largebatch_gelu_rows() - 1) / largebatch_gelu_rows();
    const void *x = make(all, rows * width, 1), *grad_y = make(all, rows * width, 1);
    const float *bias = make(all, width, 0);
    void *y = make(all, rows * width, 1), *grad_x = make(all, rows * width, 1);
    float *grad_bias = make(all, blocks * width, 0);
    largebatch_gelu(rows, width, x, bias, y, num_threads);
    largebatch_gelu_backward(rows, width, x, bias, grad_y, grad_x, grad_bias, num_threads);
}

static void predict(struct tensors *all, int num_threads) {
    const int64_t rows = 1 + draw(100), classes = 1 + draw(300);
    const int64_t blocks = (rows + largebatch_loss_rows() - 1) / largebatch_loss_rows();
    const int narrow = (int)draw(2);
    int64_t *labels = make(all, 2 * rows, 0);
    for (int64_t i = 0; i < rows; i++) labels[i] = draw((uint32_t)classes);
    void *products = make(all, rows * classes, narrow);
    const float *bias = make(all, classes, 0);
    float *losses = make(all, rows, 0), *grad_bias = draw(3) ? make(all, blocks * classes, 0) : 0;
    uint8_t *right = make(all, rows, 0);
    largebatch_loss(rows, classes, narrow, products, bias, labels, losses, right, grad_bias, num_threads);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const uint64_t first = strtoull(argv[1], 0, 10);
    const int num_rounds = atoi(argv[2]);
    for (int round = 0; round < num_rounds; round++) {
        void (*const works[])(struct tensors *, int) = {attend, add_and_normalize, activate, predict};
        struct tensors done[2] = {0};
        for (int time = 0; time < 2; time++) {
            seed = first * 1000003 + (uint64_t)round;
            draw(2);
            const int is_baseline = !draw(3);
            largebatch_choose(is_baseline ? "baseline" : time ? 0 : "avx2");
            works[round % 4](&done[time], time ? 1 + round % 4 : 1);
        }
        for (int i = 0; i < done[0].num; i++) {
            if (memcmp(done[0].memory[i], done[1].memory[i], done[0].sizes[i])) {
                fprintf(stderr, "round %d: tensor %d differs\n", round, i);
                return 1;
            }
            free(done[0].memory[i]);
            free(done[1].memory[i]);
        }
    }
    return 0;
}
