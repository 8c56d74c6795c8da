/* Rows of matrices in groups of LANES elements, float32 in registers whatever they are in memory, and their dropout. */
#ifndef LARGEBATCH_ROWS_H
#define LARGEBATCH_ROWS_H

#include "models.h"
#include "vector.h"

typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));

/* A mask of the first n lanes of AVX-512. */
#define FIRST(n) ((uint16_t)(0xffffu >> (LANES - (n))))

/* The first n elements, and `fill` for what is missing of a group. */
INLINE void read_floats(floats a[VECTORS], const float *from, int64_t n, int crossed, float fill) {
    if (n == LANES) {
        load_group(a, from, crossed);
        return;
    }
#ifdef __AVX512F__
    a[0] = (floats)_mm512_mask_loadu_ps((__m512)broadcast(fill), FIRST(n), from);
#else
    float room[LANES];
    for (int k = 0; k < LANES; k++) room[k] = fill;
    memcpy(room, from, n * sizeof *room);
    load_group(a, room, crossed);
#endif
}

INLINE void write_floats(float *to, int64_t n, const floats a[VECTORS], int crossed) {
    if (n == LANES) {
        store_group(to, a, crossed);
        return;
    }
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(to, FIRST(n), (__m512)a[0]);
#else
    float room[LANES];
    store_group(room, a, crossed);
    memcpy(to, room, n * sizeof *room);
#endif
}

/* The same for elements from `at` on of either dtype; the group is crossed where they are narrow. */
INLINE void read(floats a[VECTORS], const void *from, int64_t at, int64_t n, int narrow, float fill) {
    if (!narrow) {
        read_floats(a, (const float *)from + at, n, 0, fill);
        return;
    }
    const uint16_t *elements = (const uint16_t *)from + at, filling = (uint16_t)(bits_of(fill) >> 16);
    if (n == LANES) {
        load_bfloat16(a, elements);
        return;
    }
#ifdef __AVX512F__
    const __m256i bits = _mm256_mask_loadu_epi16(_mm256_set1_epi16((short)filling), FIRST(n), elements);
    a[0] = (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#else
    uint16_t room[LANES];
    for (int k = 0; k < LANES; k++) room[k] = filling;
    memcpy(room, elements, n * sizeof *room);
    load_bfloat16(a, room);
#endif
}

/* What is written as bfloat16 has been rounded to it. */
INLINE void write(void *to, int64_t at, int64_t n, const floats a[VECTORS], int narrow) {
    if (!narrow) {
        write_floats((float *)to + at, n, a, 0);
        return;
    }
    uint16_t *elements = (uint16_t *)to + at;
    if (n == LANES) {
        store_bfloat16(elements, a);
        return;
    }
#ifdef __AVX512F__
    _mm256_mask_storeu_epi16(elements, FIRST(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)a[0], 16)));
#else
    uint16_t room[LANES];
    store_bfloat16(room, a);
    memcpy(elements, room, n * sizeof *room);
#endif
}

/* Round to what the dtype can hold, to the nearest or the even one. */
INLINE floats rounded(floats a, int narrow) {
    if (!narrow) return a;
    const words bits = (words)a;
    return (floats)((bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u);
}

INLINE floats where(words mask, floats a) { return (floats)((words)a & mask); }

/* In one order, whatever the instruction set. */
INLINE float sum_of(const floats a[VECTORS], int narrow) {
    float lanes[LANES];
    store_group(lanes, a, narrow);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) lanes[k] += lanes[k + half];
    return lanes[0];
}

/* The larger where both are numbers, else `b`. */
INLINE floats maximum(floats a, floats b) {
#if defined __AVX512F__
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined __AVX2__
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    const words takes_a = (words)(a > b);
    return (floats)(((words)a & takes_a) | ((words)b & ~takes_a));
#endif
}

/* The smaller where both are numbers, else `b`. */
INLINE floats minimum(floats a, floats b) {
#if defined __AVX512F__
    return (floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined __AVX2__
    return (floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    const words takes_a = (words)(a < b);
    return (floats)(((words)a & takes_a) | ((words)b & ~takes_a));
#endif
}

INLINE float largest_of(const floats a[VECTORS]) {
    float lanes[LANES];
    store_group(lanes, a, 0);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) lanes[k] = lanes[k + half] > lanes[k] ? lanes[k + half] : lanes[k];
    return lanes[0];
}

/* e^x for x <= 0, to 2 units in the last place; 0 below -87. */
INLINE floats exponential(floats x) {
    const words tiny = (words)(x < -87.0f);
    x = (floats)((words)x & ~tiny);
    const floats magic = broadcast(12582912.0f), shifted = scale_add(1.44269504088896341f, x, magic);
    const floats n = shifted - magic; /* x / ln 2, to the nearest integer, which the lower bits of `shifted` hold */
    floats r = scale_add(-0.693359375f, n, x);
    r = scale_add(2.12194440e-4f, n, r);
    floats p = scale_add(1.9875691500e-4f, r, broadcast(1.3981999507e-3f));
    p = multiply_add(p, r, broadcast(8.3334519073e-3f));
    p = multiply_add(p, r, broadcast(4.1665795894e-2f));
    p = multiply_add(p, r, broadcast(1.6666665459e-1f));
    p = multiply_add(p, r, broadcast(5.0000001201e-1f));
    p = multiply_add(p, r * r, r) + 1.0f;
    const floats power = (floats)(((words)shifted << 23) + 0x3f800000u);
    return where(~tiny, p * power);
}

/* ---- dropout by keys: the same hash as in dropout.py ---- */

#define SIGN 0x80000000u
#define GOLDEN 0x9e3779b9u

INLINE words mix_words(words h) {
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= h >> 15;
    h *= 0x846ca68bu;
    return h ^ h >> 16;
}

/* Bits for columns `at` to `at + LANES` of a row, whose own `base` is; 16 for each of two elements. */
INLINE void hash(words a[VECTORS], uint32_t base, int64_t at, int narrow) {
    progression(a, (uint32_t)at * GOLDEN, GOLDEN, narrow);
    for (int j = 0; j < VECTORS; j++) a[j] = mix_words(a[j] ^ base);
}

/* All bits set where the element lives that has the upper or the lower 16 bits of each. */
INLINE words living(words hashes, int upper, int32_t kept) {
    const ints low = (ints)(hashes & 0xffffu), high = (ints)(hashes >> 16 ^ 0x8000u);
    return (words)(((upper ? high : low) - kept) >> 31);
}

/* How many elements a group at `at` has in a row of n. */
INLINE int64_t left(int64_t n, int64_t at) { return n - at < LANES ? n - at : LANES; }

#endif
