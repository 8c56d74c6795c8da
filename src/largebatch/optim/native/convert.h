/* Blocks of elements of any dtype, as float32, and back.
 *
 * Only integer operations that every compiler vectorises for every machine: neither AVX-512's bfloat16 instructions
 * nor F16C are asked for, and the results are the same bits everywhere.
 */
#ifndef LARGEBATCH_CONVERT_H
#define LARGEBATCH_CONVERT_H

#include <math.h>
#include <string.h>

#include "native.h"

static inline uint32_t bits_of(float a) {
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float a;
    memcpy(&a, &bits, sizeof a);
    return a;
}

/* ---- bfloat16: the upper half of a float32 ---- */

static inline float from_bfloat16(uint16_t a) { return float_of((uint32_t)a << 16); }

static inline uint16_t to_bfloat16(float a) {
    uint32_t bits = bits_of(a);
    uint32_t nearest_even = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(a != a ? 0x7fc0u : nearest_even);
}

/* C. Wellons' `lowbias32`: every input bit reaches every output bit. The same as `precision.mix`. */
static inline uint32_t mix(uint32_t h) {
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= h >> 15;
    h *= 0x846ca68bu;
    h ^= h >> 16;
    return h;
}

/* ---- float16 ---- */

static inline float from_float16(uint16_t a) {
    const uint32_t smallest_normal = 113u << 23; /* 2^-14 */
    uint32_t magnitude = (uint32_t)(a & 0x7fffu) << 13;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t subnormal = bits_of(float_of(magnitude + smallest_normal) - float_of(smallest_normal));
    uint32_t not_finite = magnitude | 0x7f800000u;
    uint32_t bits = magnitude < 0x400u << 13 ? subnormal : magnitude < 0x7c00u << 13 ? normal : not_finite;
    return float_of(bits | (uint32_t)(a & 0x8000u) << 16);
}

/* What float16 cannot hold becomes its largest number, not inf. */
static inline uint16_t to_float16(float a) {
    a = a > 65504 ? 65504 : a < -65504 ? -65504 : a;
    uint32_t sign = bits_of(a) & 0x80000000u, magnitude = bits_of(a) ^ sign;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f); /* the addition rounds to 2^-24 */
    uint32_t bits = magnitude < 113u << 23 ? subnormal : a == a ? normal : 0x7e00u;
    return (uint16_t)(bits | sign >> 16);
}

static inline int width_of(int8_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* ---- blocks ---- */

/* Return elements first to first + n - 1 of a tensor as float32: in place, or widened into `room`. */
static inline float *read_block(void *tensor, int8_t dtype, int64_t first, int n, float *restrict room) {
    if (dtype == FLOAT32) return (float *)tensor + first;
    const uint16_t *restrict narrow = (const uint16_t *)tensor + first;
    if (dtype == BFLOAT16)
        for (int i = 0; i < n; i++) room[i] = from_bfloat16(narrow[i]);
    else
        for (int i = 0; i < n; i++) room[i] = from_float16(narrow[i]);
    return room;
}

/* Write float32 elements, rounded to nearest; to where `read_block` returned them in place, nothing is to be done. */
static inline void write_block(void *tensor, int8_t dtype, int64_t first, int n, const float *restrict block) {
    if (dtype == FLOAT32) {
        if ((float *)tensor + first != block) memcpy((float *)tensor + first, block, n * sizeof *block);
        return;
    }
    uint16_t *restrict narrow = (uint16_t *)tensor + first;
    if (dtype == BFLOAT16)
        for (int i = 0; i < n; i++) narrow[i] = to_bfloat16(block[i]);
    else
        for (int i = 0; i < n; i++) narrow[i] = to_float16(block[i]);
}

#endif
