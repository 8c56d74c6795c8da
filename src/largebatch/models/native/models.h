/* What the parts of the CPU kernel of BERT share. Tensors are float32, or bfloat16 where `narrow`. */
#ifndef LARGEBATCH_MODELS_H
#define LARGEBATCH_MODELS_H

#include "native.h"

/* The longest row there is room for. */
enum { MAX_LENGTH = 4096 };

/* Matrices of probabilities [count, heads, length, length], and which of their elements a dropout of dropout.py keeps:
 * those of which 16 bits of a hash are less than `kept`. */
struct attention {
    int64_t count, heads, length;
    int32_t narrow, kept;
    uint32_t site;
    const int32_t *keys; /* [count, length] */
    void *probs;         /* forward: in place of the scores. The sign of a probability says that it was dropped */
    void *dropped;       /* the probabilities, with zeros for those that were dropped */
    void *grads;         /* backward: of `dropped`; in its place come those of the scores */
};

/* Rows [count, length, heads, width], `stride` elements from one to the next, and the same [count, heads, length, width]:
 * of one the other plus a bias, times `scale`. */
struct heads {
    int64_t count, heads, length, width, stride;
    int32_t narrow;
    float scale;
    void *rows, *by_head;
    const float *bias; /* [heads, width], or null */
    float *sums;       /* [blocks of HEADS_ROWS rows, heads, width]: the sums of what is written; or null */
};

enum { HEADS_ROWS = 32 };

/* y = LayerNorm(residual + dropout(x + x_bias)), all [rows, width]. x and its gradient are bfloat16 where `narrow`, all else is
 * float32. */
struct add_norm {
    int64_t rows, width;
    int32_t narrow, kept;
    uint32_t site;
    const int32_t *keys; /* [rows] */
    float scale;         /* makes up for what is dropped */
    float eps;
    const void *x;
    const float *x_bias, *residual, *weight, *bias;
    float *sum, *moments, *y; /* what is normalised; of each row its mean and 1 / standard deviation */
    const float *grad_y;
    void *grad_x;
    float *grad_residual;
    float *grad_params; /* [blocks of NORM_ROWS rows, 3, width]: their sums for weight, bias and x_bias */
};

enum { NORM_ROWS = 64 };

/* y = GELU(x + bias), [rows, width], of bfloat16 but for the bias. */
struct gelu {
    int64_t rows, width;
    const void *x;
    const float *bias;
    void *y;          /* backward: its gradient, which is read */
    void *grad_x;
    float *grad_bias; /* [blocks of GELU_ROWS rows, width]: their sums */
};

enum { GELU_ROWS = 64 };

/* Cross-entropy of logits products + bias, [rows, classes], for each row's label. The products are float32, or bfloat16
 * where `narrow`; in their place come the gradients of the sum of all losses. */
struct loss {
    int64_t rows, classes;
    int32_t narrow;
    void *products;
    const float *bias;
    const int64_t *labels;
    float *losses;
    uint8_t *right;   /* whether the label has the first of the largest logits */
    float *grad_bias; /* [blocks of LOSS_ROWS rows, classes]: their sums; or null, where no gradients are wanted */
};

enum { LOSS_ROWS = 16 };

/* Each does items `first` up to `last` of its work. */
typedef void (*task)(const void *work, int64_t first, int64_t last);

/* attention.c, norm.c, gelu.c and loss.c, compiled once for each instruction set. */
struct attention_kernel {
    task softmax;          /* of a sequence, a pair of heads */
    task softmax_backward; /* a row of a matrix */
    task split, join;      /* a block of HEADS_ROWS rows: from `rows` to `by_head`, and back */
};

struct norm_kernel {
    task forward;  /* a row */
    task backward; /* a block of NORM_ROWS rows */
};

struct gelu_kernel {
    task forward;  /* a row */
    task backward; /* a block of GELU_ROWS rows */
};

struct loss_kernel {
    task loss; /* a block of LOSS_ROWS rows */
};

extern const struct attention_kernel attention_baseline, attention_avx2, attention_avx512;
extern const struct norm_kernel norm_baseline, norm_avx2, norm_avx512;
extern const struct gelu_kernel gelu_baseline, gelu_avx2, gelu_avx512;
extern const struct loss_kernel loss_baseline, loss_avx2, loss_avx512;

#endif
