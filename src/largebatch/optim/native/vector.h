/* Vectors of float32 as wide as the instruction set's registers, in the language of GCC and Clang.
 *
 * A pass over a block goes in groups of LANES elements: one vector or several, whatever their width, so that element i
 * always goes to lane i % LANES and all sums have one order.
 */
#ifndef LARGEBATCH_VECTOR_H
#define LARGEBATCH_VECTOR_H

#include "convert.h"

#if defined __AVX512F__ || defined __AVX2__ || defined __SSE2__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

#ifdef __AVX512F__
#define WIDTH 16
#elif defined __AVX2__
#define WIDTH 8
#else
#define WIDTH 4
#endif

enum { LANES = 16, VECTORS = LANES / WIDTH };

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const float *from) {
    floats a;
    memcpy(&a, from, sizeof a);
    return a;
}

INLINE void store(float *to, floats a) { memcpy(to, &a, sizeof a); }

INLINE floats load_bfloat16(const uint16_t *from) {
#if WIDTH == 8
    return (floats)((words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)) << 16);
#else
    halves a;
    memcpy(&a, from, sizeof a);
    return (floats)(__builtin_convertvector(a, words) << 16);
#endif
}

/* Store a group of floats of which the lower half of the bits is 0. */
INLINE void store_bfloat16(uint16_t *to, const floats a[VECTORS]) {
#if WIDTH == 8 /* the signed shift and the signed saturation leave the 16 bits as they are */
    const __m256i low = _mm256_srai_epi32((__m256i)a[0], 16), high = _mm256_srai_epi32((__m256i)a[1], 16);
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
#else
    for (int j = 0; j < VECTORS; j++) {
        const halves upper = __builtin_convertvector((words)a[j] >> 16, halves);
        memcpy(to + j * WIDTH, &upper, sizeof upper);
    }
#endif
}

INLINE floats root(floats a) {
#ifdef __AVX512F__
    return (floats)_mm512_sqrt_ps((__m512)a);
#elif defined __AVX2__
    return (floats)_mm256_sqrt_ps((__m256)a);
#elif defined __SSE2__
    return (floats)_mm_sqrt_ps((__m128)a);
#elif defined __aarch64__
    return (floats)vsqrtq_f32((float32x4_t)a);
#else
    for (int k = 0; k < WIDTH; k++) a[k] = sqrtf(a[k]);
    return a;
#endif
}

/* first, first + difference, first + 2 * difference, ... */
INLINE words progression(uint32_t first, uint32_t difference) {
    words a;
    for (int k = 0; k < WIDTH; k++) a[k] = first + k * difference;
    return a;
}

/* a * b + c, rounded once where the instruction set can. */
INLINE floats multiply_add(floats a, floats b, floats c) {
#if defined __AVX512F__
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined __FMA__
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined __aarch64__
    return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE floats broadcast(float a) { return a - (floats){0}; }

INLINE floats scale_add(float a, floats b, floats c) { return multiply_add(broadcast(a), b, c); }

INLINE floats magnitude(floats a) { return (floats)((words)a & 0x7fffffffu); }

/* The larger, of which NaN is one. */
INLINE floats larger(floats a, floats b) {
    words takes_b = (words)(b > a) | (words)(b != b);
    return (floats)(((words)a & ~takes_b) | ((words)b & takes_b));
}

/* The noise of rounding, as in `precision.noise`: consecutive elements are SPREAD apart before they are scattered. */
#define SPREAD 0x9e3779b1u

INLINE words scatter(words a) { return (a ^ a >> 13) * 0x846ca68bu; }

/* Round to bfloat16, up or down by chance, so that the expected value is exact: `noise` has 16 bits. The same as
 * `precision.round_stochastically`. NaN stays NaN: where it comes from operands whose lower half is 0, so is its own. */
INLINE floats round_by_chance(floats a, words noise) { return (floats)(((words)a + noise) & 0xffff0000u); }

#endif
