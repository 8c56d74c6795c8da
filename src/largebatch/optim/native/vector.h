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

/* ---- groups of LANES elements ----
 *
 * AVX2 packs and unpacks 16 bits within halves of a register. A group that has to do with them is `crossed` there: its
 * first vector has elements 0 to 3 and 8 to 11, its second the others, which spares each packing a permutation. */

#define CAN_CROSS (WIDTH == 8)

INLINE void load_group(floats a[VECTORS], const float *from, int crossed) {
#if CAN_CROSS
    if (crossed) {
        for (int j = 0; j < 2; j++) {
            const __m128 low = _mm_loadu_ps(from + 4 * j), high = _mm_loadu_ps(from + 8 + 4 * j);
            a[j] = (floats)_mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
        }
        return;
    }
#endif
    (void)crossed;
    for (int j = 0; j < VECTORS; j++) a[j] = load(from + j * WIDTH);
}

INLINE void store_group(float *to, const floats a[VECTORS], int crossed) {
#if CAN_CROSS
    if (crossed) {
        for (int j = 0; j < 2; j++) {
            _mm_storeu_ps(to + 4 * j, _mm256_castps256_ps128((__m256)a[j]));
            _mm_storeu_ps(to + 8 + 4 * j, _mm256_extractf128_ps((__m256)a[j], 1));
        }
        return;
    }
#endif
    (void)crossed;
    for (int j = 0; j < VECTORS; j++) store(to + j * WIDTH, a[j]);
}

/* The group is crossed. */
INLINE void load_bfloat16(floats a[VECTORS], const uint16_t *from) {
#if CAN_CROSS
    const __m256i bits = _mm256_loadu_si256((const __m256i *)from), zero = _mm256_setzero_si256();
    a[0] = (floats)_mm256_unpacklo_epi16(zero, bits);
    a[1] = (floats)_mm256_unpackhi_epi16(zero, bits);
#elif defined __AVX512F__ /* GCC 12 makes five operations of the conversion */
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    a[0] = (floats)_mm512_slli_epi32(bits, 16);
#else
    for (int j = 0; j < VECTORS; j++) {
        halves upper;
        memcpy(&upper, from + j * WIDTH, sizeof upper);
        a[j] = (floats)(__builtin_convertvector(upper, words) << 16);
    }
#endif
}

/* Store a crossed group of floats of which the lower half of the bits is 0. */
INLINE void store_bfloat16(uint16_t *to, const floats a[VECTORS]) {
#if CAN_CROSS /* the signed shift and the signed saturation leave the 16 bits as they are */
    const __m256i low = _mm256_srai_epi32((__m256i)a[0], 16), high = _mm256_srai_epi32((__m256i)a[1], 16);
    _mm256_storeu_si256((__m256i *)to, _mm256_packs_epi32(low, high));
#elif defined __AVX512F__
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)a[0], 16)));
#else
    for (int j = 0; j < VECTORS; j++) {
        const halves upper = __builtin_convertvector((words)a[j] >> 16, halves);
        memcpy(to + j * WIDTH, &upper, sizeof upper);
    }
#endif
}

/* Element 0 is `first`, each other one `difference` more than the one before. */
INLINE void progression(words a[VECTORS], uint32_t first, uint32_t difference, int crossed) {
    for (int j = 0; j < VECTORS; j++) {
        words elements = {0};
        for (int k = 0; k < WIDTH; k++) elements[k] = CAN_CROSS && crossed ? k + 4 * (j + (k >= 4)) : k + WIDTH * j;
        a[j] = first + elements * difference;
    }
}

/* ---- arithmetic ---- */

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
