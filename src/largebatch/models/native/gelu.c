/* GELU of a matrix product and a bias, and the way back, in bfloat16.
 *
 * GELU(x) = x·P(X < x) = max(x, 0) - |x|·P(X > |x|), X normal. The probability, and GELU's slope, are cubics around the
 * nearest of POINTS points, right to 2e-6: some 20 operations where an error function takes 50. This file is compiled
 * once for each instruction set, with VARIANT as the name of the table at its end.
 */
#include "rows.h"

enum { POINTS = 32 };
#define PER_UNIT 5.25f /* points; beyond the last, at 5.9, GELU is x or 0 */

/* Printed by dev/gelu_table.py. At point 0, 1, ..., the coefficients of 1, r, r^2 and r^3: of P(X > x), and of GELU's
 * slope less 1/2. */
static const float tails[4][POINTS] = {
    {5.00000000e-01f, 4.24468094e-01f, 3.51619464e-01f, 2.83854805e-01f, 2.23058659e-01f, 1.70452124e-01f,
     1.26549127e-01f, 9.12113342e-02f, 6.37782053e-02f, 4.32381370e-02f, 2.84054808e-02f, 1.80748609e-02f,
     1.11354258e-02f, 6.63957385e-03f, 3.83032706e-03f, 2.13732441e-03f, 1.15327918e-03f, 6.01631244e-04f,
     3.03369029e-04f, 1.47835655e-04f, 6.96120470e-05f, 3.16682522e-05f, 1.39168725e-05f, 5.90725751e-06f,
     2.42164510e-06f, 9.58679252e-07f, 3.66468011e-07f, 1.35258248e-07f, 4.81974886e-08f, 1.65801604e-08f,
     5.50591881e-09f, 0.00000000e+00f},
    {-7.59889863e-02f, -7.46229306e-02f, -7.06703514e-02f, -6.45424576e-02f, -5.68456243e-02f, -4.82827362e-02f,
     -3.95484979e-02f, -3.12400263e-02f, -2.37977589e-02f, -1.74825183e-02f, -1.23855466e-02f, -8.46193339e-03f,
     -5.57528737e-03f, -3.54248588e-03f, -2.17066198e-03f, -1.28268335e-03f, -7.30953719e-04f, -4.01701500e-04f,
     -2.12892400e-04f, -1.08807785e-04f, -5.36293915e-05f, -2.54911150e-05f, -1.16847072e-05f, -5.16523224e-06f,
     -2.20193684e-06f, -9.05238090e-07f, -3.58891945e-07f, -1.37216868e-07f, -5.05934342e-08f, -1.79896888e-08f,
     -6.16873255e-09f, 0.00000000e+00f},
    {-2.15292160e-15f, 1.35067574e-03f, 2.55847829e-03f, 3.50542539e-03f, 4.11731684e-03f, 4.37246367e-03f,
     4.29908908e-03f, 3.96332143e-03f, 3.45186952e-03f, 2.85415187e-03f, 2.24787316e-03f, 1.69031932e-03f,
     1.21570613e-03f, 8.37392403e-04f, 5.52992191e-04f, 3.50392257e-04f, 2.13168223e-04f, 1.24582657e-04f,
     6.99768336e-05f, 3.77898703e-05f, 1.96272159e-05f, 9.80667454e-06f, 4.71482689e-06f, 2.18161606e-06f,
     9.71708344e-07f, 4.16682886e-07f, 1.72046840e-07f, 6.84087281e-08f, 2.61967163e-08f, 9.66261195e-09f,
     3.43314480e-09f, 0.00000000e+00f},
    {4.58870549e-04f, 4.34294302e-04f, 3.64900882e-04f, 2.62638231e-04f, 1.44220937e-04f, 2.73576615e-05f,
     -7.28683043e-05f, -1.46539733e-04f, -1.89876118e-04f, -2.04669018e-04f, -1.96638994e-04f, -1.73366648e-04f,
     -1.42403998e-04f, -1.09958783e-04f, -8.02774478e-05f, -5.56324951e-05f, -3.66999909e-05f, -2.30952240e-05f,
     -1.38867181e-05f, -7.98821583e-06f, -4.40062638e-06f, -2.32355904e-06f, -1.17669800e-06f, -5.71870290e-07f,
     -2.66846877e-07f, -1.19602150e-07f, -5.15090408e-08f, -2.13221246e-08f, -8.48590277e-09f, -3.24780580e-09f,
     -1.19563445e-09f, 0.00000000e+00f},
};

static const float slopes[4][POINTS] = {
    {-3.37336399e-17f, 1.50154387e-01f, 2.89720444e-01f, 4.09771607e-01f, 5.04322908e-01f, 5.70960826e-01f,
     6.10741426e-01f, 6.27468729e-01f, 6.26604005e-01f, 6.14104834e-01f, 5.95450355e-01f, 5.75006757e-01f,
     5.55768302e-01f, 5.39412930e-01f, 5.26559041e-01f, 5.17102960e-01f, 5.10541972e-01f, 5.06227265e-01f,
     5.03528659e-01f, 5.01919480e-01f, 5.01002950e-01f, 5.00503627e-01f, 5.00243135e-01f, 5.00112886e-01f,
     5.00050421e-01f, 5.00021670e-01f, 5.00008964e-01f, 5.00003569e-01f, 5.00001368e-01f, 5.00000505e-01f,
     5.00000180e-01f, 5.00000000e-01f},
    {1.51977895e-01f, 1.46538385e-01f, 1.31084646e-01f, 1.08009821e-01f, 8.06924583e-02f, 5.27716655e-02f,
     2.74418872e-02f, 6.94229950e-03f, -7.66271243e-03f, -1.64121230e-02f, -2.01651161e-02f, -2.02242185e-02f,
     -1.79774774e-02f, -1.46358766e-02f, -1.10945244e-02f, -7.90554537e-03f, -5.32720048e-03f, -3.40855969e-03f,
     -2.07679976e-03f, -1.20750354e-03f, -6.71041649e-04f, -3.56878860e-04f, -1.81816959e-04f, -8.88055218e-05f,
     -4.16126341e-05f, -1.87167225e-05f, -8.08454949e-06f, -3.35486748e-06f, -1.33793909e-06f, -5.12940369e-07f,
     -1.89094460e-07f, 0.00000000e+00f},
    {2.71947991e-16f, -5.34772372e-03f, -9.85213795e-03f, -1.28646398e-02f, -1.40677253e-02f, -1.35160605e-02f,
     -1.15786923e-02f, -8.81069567e-03f, -5.80081090e-03f, -3.04128519e-03f, -8.50376707e-04f, 6.44525307e-04f,
     1.47496149e-03f, 1.77322085e-03f, 1.71106363e-03f, 1.45173719e-03f, 1.12222592e-03f, 8.04577937e-04f,
     5.40515694e-04f, 3.42473687e-04f, 2.05561641e-04f, 1.17252134e-04f, 6.37056674e-05f, 3.30286476e-05f,
     1.63632203e-05f, 7.75534352e-06f, 3.51954636e-06f, 1.53058141e-06f, 6.38245665e-07f, 2.55338728e-07f,
     9.80494051e-08f, 0.00000000e+00f},
    {-1.83423423e-03f, -1.68762851e-03f, -1.28210249e-03f, -7.10128467e-04f, -9.50045676e-05f, 4.43582541e-04f,
     8.19365110e-04f, 9.95787723e-04f, 9.85757734e-04f, 8.37931309e-04f, 6.16500308e-04f, 3.82017761e-04f,
     1.78571337e-04f, 2.91254420e-05f, -6.22501267e-05f, -1.04242487e-04f, -1.11360537e-04f, -9.83839290e-05f,
     -7.71041668e-05f, -5.52223795e-05f, -3.67131089e-05f, -2.28689753e-05f, -1.34285366e-05f, -7.46438891e-06f,
     -3.93976625e-06f, -1.97905148e-06f, -9.47828713e-07f, -4.33416204e-07f, -1.89444740e-07f, -7.92271227e-08f,
     -3.17265907e-08f, 0.00000000e+00f},
};

INLINE floats look_up(const float table[POINTS], words index) {
#ifdef __AVX512F__ /* which takes the lower five bits of an index */
    return (floats)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index, _mm512_loadu_ps(table + 16));
#else
    floats a;
    for (int k = 0; k < WIDTH; k++) a[k] = table[index[k] % POINTS];
    return a;
#endif
}

/* The function of a table at x >= 0; NaN at NaN. */
INLINE floats cubic(const float table[4][POINTS], floats x) {
    const floats magic = broadcast(12582912.0f), t = minimum(broadcast(POINTS - 1), x * PER_UNIT);
    const floats shifted = t + magic; /* whose lower bits hold the nearest integer */
    const floats r = t - (shifted - magic);
    const words index = (words)shifted;
    floats sum = multiply_add(look_up(table[3], index), r, look_up(table[2], index));
    sum = multiply_add(sum, r, look_up(table[1], index));
    return multiply_add(sum, r, look_up(table[0], index));
}

INLINE void forward_group(const struct gelu *g, int64_t row, int64_t at, int64_t n) {
    floats x[VECTORS], bias[VECTORS];
    read(x, g->x, row * g->width + at, n, 1, 0);
    read_floats(bias, g->bias + at, n, 1, 0);
    for (int j = 0; j < VECTORS; j++) {
        x[j] += bias[j];
        const floats size = magnitude(x[j]);
        x[j] = rounded(multiply_add(-size, cubic(tails, size), maximum(broadcast(0), x[j])), 1);
    }
    write(g->y, row * g->width + at, n, x, 1);
}

INLINE void backward_group(const struct gelu *g, int64_t row, float *grad_bias, int64_t at, int64_t n) {
    floats x[VECTORS], bias[VECTORS], grad[VECTORS], sums[VECTORS];
    read(x, g->x, row * g->width + at, n, 1, 0);
    read_floats(bias, g->bias + at, n, 1, 0);
    read(grad, g->y, row * g->width + at, n, 1, 0);
    read_floats(sums, grad_bias + at, n, 1, 0);
    for (int j = 0; j < VECTORS; j++) {
        x[j] += bias[j];
        const words slope = (words)cubic(slopes, magnitude(x[j])) ^ ((words)x[j] & SIGN);
        grad[j] *= (floats)slope + 0.5f;
        sums[j] += grad[j];
        grad[j] = rounded(grad[j], 1);
    }
    write_floats(grad_bias + at, n, sums, 1);
    write(g->grad_x, row * g->width + at, n, grad, 1);
}

static void forward(const void *work, int64_t first, int64_t last) {
    const struct gelu *g = work;
    const int64_t whole = g->width / LANES * LANES;
    for (int64_t row = first; row < last; row++) {
        for (int64_t at = 0; at < whole; at += LANES) forward_group(g, row, at, LANES);
        if (whole < g->width) forward_group(g, row, whole, g->width - whole);
    }
}

static void backward(const void *work, int64_t first, int64_t last) {
    const struct gelu *g = work;
    const int64_t whole = g->width / LANES * LANES;
    for (int64_t block = first; block < last; block++) {
        float *grad_bias = g->grad_bias + block * g->width;
        const int64_t end = (block + 1) * GELU_ROWS < g->rows ? (block + 1) * GELU_ROWS : g->rows;
        memset(grad_bias, 0, g->width * sizeof *grad_bias);
        for (int64_t row = block * GELU_ROWS; row < end; row++) {
            for (int64_t at = 0; at < whole; at += LANES) backward_group(g, row, grad_bias, at, LANES);
            if (whole < g->width) backward_group(g, row, grad_bias, whole, g->width - whole);
        }
    }
}

const struct gelu_kernel VARIANT = {forward, backward};
