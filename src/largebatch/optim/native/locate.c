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

static int is_of(const struct dl_tensor *t, uint32_t type, const int64_t *strides, int64_t ndim) {
    if (t->device_type != DL_CPU || t->ndim != ndim) return 0;
    if (type != (t->code | (uint32_t)t->bits << 8 | (uint32_t)t->lanes << 16)) return 0;
    for (int64_t k = 0; k < ndim; k++)
        if (t->strides[k] != strides[k]) return 0;
    return 1;
}

/* Find out where the elements of `num` tensors, which are Python objects, begin. Return 1 if all are on the CPU and as is
 * expected: tensor i has type `types[i]`, and strides from number `ends[i - 1]` up to `ends[i]`. Return 0 if one is not, or
 * cannot be described. The caller holds the interpreter's lock. */
EXPORTED int largebatch_locate(describe describe, void *const *objects, int64_t num, void **addresses,
                               const uint32_t *types, const int64_t *ends, const int64_t *strides) {
    for (int64_t i = 0, start = 0; i < num; start = ends[i++]) {
        struct dl_tensor t;
        if (describe(objects[i], &t) || !is_of(&t, types[i], strides + start, ends[i] - start)) return 0;
        addresses[i] = (char *)t.data + t.byte_offset;
    }
    return 1;
}
