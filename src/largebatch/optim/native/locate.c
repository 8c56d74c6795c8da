/* Where tensors lie, as the framework tells by DLPack's interface in C: see locate.py. */
#include "native.h"

/* DLTensor of DLPack 1. */
struct dl_tensor {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

enum { DL_CPU = 1 };

/* DLPackDLTensorFromPyObjectNoSync. Returns 0, or else there is a Python exception. */
typedef int (*describe)(void *object, struct dl_tensor *tensor);

static int is_of(const struct dl_tensor *t, uint32_t type, const int64_t (*sizes)[2], int64_t ndim) {
    if (t->device_type != DL_CPU || t->ndim != ndim) return 0;
    if (type != (t->code | (uint32_t)t->bits << 8 | (uint32_t)t->lanes << 16)) return 0;
    for (int64_t k = 0; k < ndim; k++)
        if (t->shape[k] != sizes[k][0] || t->strides[k] != sizes[k][1]) return 0;
    return 1;
}

/* Between two steps all these objects leave the caches, and of each the parts that `describe` reads are found one by way
 * of the other: the Python object, the tensor, its storage. So they are fetched ahead, from where `hints` has the latter
 * two. A hint that is wrong costs time, and no more. */
enum { AHEAD = 6, LINE = 64, TENSOR = 4 * LINE, STORAGE = 2 * LINE };

/* Inlined, since GCC takes calls of what does nothing but this to be of no effect. */
#define INLINE static inline __attribute__((always_inline))

INLINE void fetch(const char *from, int size) {
    for (int at = 0; at < size; at += LINE) __builtin_prefetch(from + at);
}

INLINE void fetch_ahead(void *const *objects, const char *const (*hints)[2], int64_t i, int64_t num) {
    if (i + 2 * AHEAD < num) fetch(objects[i + 2 * AHEAD], LINE);
    if (i + AHEAD >= num) return;
    if (!hints) { /* the word after the head of a Python object is, in a tensor's, the address of the latter */
        fetch(((const char *const *)objects[i + AHEAD])[2], TENSOR);
        return;
    }
    fetch(hints[i + AHEAD][0], TENSOR);
    fetch(hints[i + AHEAD][1], STORAGE);
}

/* Find out where the elements of `num` tensors, which are Python objects, begin. Return 1 if all are on the CPU and as is
 * expected: tensor i has type `types[i]`, and `sizes` from number `ends[i - 1]` up to `ends[i]` are size and stride of
 * each of its dimensions. Return 0 if one is not, or cannot be described. `hints` may be null. The caller holds the
 * interpreter's lock. */
EXPORTED int largebatch_locate(describe describe, void *const *objects, int64_t num, void **addresses,
                               const uint32_t *types, const int64_t *ends, const int64_t (*sizes)[2],
                               const char *const (*hints)[2]) {
    for (int64_t i = 0, start = 0; i < num; start = ends[i++]) {
        struct dl_tensor t;
        fetch_ahead(objects, hints, i, num);
        if (describe(objects[i], &t) || !is_of(&t, types[i], sizes + start, ends[i] - start)) return 0;
        addresses[i] = (char *)t.data + t.byte_offset;
    }
    return 1;
}
