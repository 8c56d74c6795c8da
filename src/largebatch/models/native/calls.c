/* What Python calls: each shares the items of a work among a team of threads. */
#include "models.h"

/* Fewer elements than this take less time than it takes to wake a thread. */
enum { WORTH_A_TEAM = 1 << 14 };

#ifdef __x86_64__
#define VARIANTS(name) {[AVX512] = &name##_avx512, [AVX2] = &name##_avx2, [BASELINE] = &name##_baseline}
#else
#define VARIANTS(name) {[BASELINE] = &name##_baseline}
#endif

static const struct attention_kernel *const attention[] = VARIANTS(attention);
static const struct norm_kernel *const norm[] = VARIANTS(norm);
static const struct gelu_kernel *const gelu[] = VARIANTS(gelu);
static const struct loss_kernel *const loss[] = VARIANTS(loss);

struct job {
    task task;
    const void *work;
    int64_t items;
};

static void member(void *context, struct team *team, int rank, int size) {
    (void)team;
    const struct job *job = context;
    job->task(job->work, job->items * rank / size, job->items * (rank + 1) / size);
}

static void share(task task, const void *work, int64_t items, int64_t elements, int num_threads) {
    struct job job = {task, work, items};
    run_in_team(elements < WORTH_A_TEAM ? 1 : num_threads, member, &job);
}

EXPORTED int largebatch_max_length(void) { return MAX_LENGTH; }

EXPORTED void largebatch_softmax(int64_t count, int64_t heads, int64_t length, int narrow, const int32_t *keys,
                                 uint32_t site, int kept, void *probs, void *dropped, int num_threads) {
    const struct attention a = {.count = count, .heads = heads, .length = length, .narrow = narrow, .kept = kept,
                                .site = site, .keys = keys, .probs = probs, .dropped = dropped};
    share(attention[chosen_isa]->softmax, &a, count * ((heads + 1) / 2), count * heads * length * length, num_threads);
}

EXPORTED void largebatch_softmax_backward(int64_t rows, int64_t length, int narrow, void *grads, const void *probs,
                                          void *dropped, int num_threads) {
    const struct attention a = {.length = length, .narrow = narrow, .probs = (void *)probs, .dropped = dropped,
                                .grads = grads};
    share(attention[chosen_isa]->softmax_backward, &a, rows, rows * length, num_threads);
}

EXPORTED int largebatch_heads_rows(void) { return HEADS_ROWS; }

EXPORTED void largebatch_heads(int joins, int64_t count, int64_t heads, int64_t length, int64_t width, int64_t stride,
                               int narrow, float scale, void *rows, void *by_head, const float *bias, float *sums,
                               int num_threads) {
    const struct heads h = {.count = count, .heads = heads, .length = length, .width = width, .stride = stride,
                            .narrow = narrow, .scale = scale, .rows = rows, .by_head = by_head, .bias = bias,
                            .sums = sums};
    const struct attention_kernel *kernel = attention[chosen_isa];
    share(joins ? kernel->join : kernel->split, &h, (count * length + HEADS_ROWS - 1) / HEADS_ROWS,
          count * heads * length * width, num_threads);
}

EXPORTED int largebatch_norm_rows(void) { return NORM_ROWS; }

EXPORTED void largebatch_add_norm(int64_t rows, int64_t width, int narrow, const int32_t *keys, uint32_t site, int kept,
                                  float scale, float eps, const void *x, const float *x_bias, const float *residual,
                                  const float *weight, const float *bias, float *sum, float *moments, float *y,
                                  int num_threads) {
    const struct add_norm n = {.rows = rows, .width = width, .narrow = narrow, .kept = kept, .site = site, .keys = keys,
                               .scale = scale, .eps = eps, .x = x, .x_bias = x_bias, .residual = residual,
                               .weight = weight, .bias = bias, .sum = sum, .moments = moments, .y = y};
    share(norm[chosen_isa]->forward, &n, rows, rows * width, num_threads);
}

EXPORTED void largebatch_add_norm_backward(int64_t rows, int64_t width, int narrow, const int32_t *keys, uint32_t site,
                                           int kept, float scale, const float *weight, const float *sum,
                                           const float *moments, const float *grad_y, void *grad_x,
                                           float *grad_residual, float *grad_params, int num_threads) {
    const struct add_norm n = {.rows = rows, .width = width, .narrow = narrow, .kept = kept, .site = site, .keys = keys,
                               .scale = scale, .weight = weight, .sum = (float *)sum, .moments = (float *)moments,
                               .grad_y = grad_y, .grad_x = grad_x, .grad_residual = grad_residual,
                               .grad_params = grad_params};
    share(norm[chosen_isa]->backward, &n, (rows + NORM_ROWS - 1) / NORM_ROWS, rows * width, num_threads);
}

EXPORTED int largebatch_gelu_rows(void) { return GELU_ROWS; }

EXPORTED void largebatch_gelu(int64_t rows, int64_t width, const void *x, const float *bias, void *y, int num_threads) {
    const struct gelu g = {.rows = rows, .width = width, .x = x, .bias = bias, .y = y};
    share(gelu[chosen_isa]->forward, &g, rows, rows * width, num_threads);
}

EXPORTED void largebatch_gelu_backward(int64_t rows, int64_t width, const void *x, const float *bias,
                                       const void *grad_y, void *grad_x, float *grad_bias, int num_threads) {
    const struct gelu g = {.rows = rows, .width = width, .x = x, .bias = bias, .y = (void *)grad_y, .grad_x = grad_x,
                           .grad_bias = grad_bias};
    share(gelu[chosen_isa]->backward, &g, (rows + GELU_ROWS - 1) / GELU_ROWS, rows * width, num_threads);
}

EXPORTED int largebatch_loss_rows(void) { return LOSS_ROWS; }

EXPORTED void largebatch_loss(int64_t rows, int64_t classes, int narrow, void *products, const float *bias,
                              const int64_t *labels, float *losses, uint8_t *right, float *grad_bias, int num_threads) {
    const struct loss l = {.rows = rows, .classes = classes, .narrow = narrow, .products = products, .bias = bias,
                           .labels = labels, .losses = losses, .right = right, .grad_bias = grad_bias};
    share(loss[chosen_isa]->loss, &l, (rows + LOSS_ROWS - 1) / LOSS_ROWS, rows * classes, num_threads);
}
