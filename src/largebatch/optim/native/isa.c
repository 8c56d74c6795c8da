/* Which instruction set's kernels run here. */
#include <string.h>

#include "native.h"

static const char *const names[] = {
#ifdef __x86_64__
    [AVX512] = "avx512",
    [AVX2] = "avx2",
#endif
    [BASELINE] = "baseline",
};

enum { NUM_ISAS = sizeof names / sizeof *names };

enum isa chosen_isa = BASELINE;

static int runs_here(int isa) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (isa == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    (void)isa;
    return 1;
}

/* Choose the best instruction set that this processor has, none beyond `highest` if that is not null. Return its name,
 * or null if there is no such set as `highest`. */
EXPORTED const char *largebatch_choose(const char *highest) {
    int isa = 0;
    while (highest && isa < NUM_ISAS && strcmp(names[isa], highest)) isa++;
    if (isa == NUM_ISAS) return 0;
    while (!runs_here(isa)) isa++;
    return names[chosen_isa = (enum isa)isa];
}
