/* A team of threads: torch's own, where the process has torch's OpenMP runtime, else one made for the occasion.
 *
 * The OpenMP symbols are weak, and nothing here links to OpenMP. Loaded after torch, they resolve to the runtime that
 * torch brought, under whatever file name, so that its threads are used again; a second runtime would bring a second
 * set of threads, and the two would wait for one another in busy loops.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "native.h"

#ifdef __APPLE__
#define IF_LOADED __attribute__((weak_import))
#else
#define IF_LOADED __attribute__((weak))
#endif

extern void GOMP_parallel(void (*)(void *), void *, unsigned size, unsigned flags) IF_LOADED;
extern int omp_get_thread_num(void) IF_LOADED;
extern int omp_get_num_threads(void) IF_LOADED;

enum { SPINS = 4096, MAX_THREADS = 1024 };

struct team {
    team_body body;
    void *context;
    atomic_int size;            /* of a team of POSIX threads; 0 until all of them are there */
    atomic_int arrived, rounds; /* of the barrier */
};

/* Wait until `*value` is no longer `old`: busily at first, then leaving the core to others. */
static int wait_for_change(atomic_int *value, int old) {
    for (int spins = 0, now;; spins++) {
        if ((now = atomic_load_explicit(value, memory_order_acquire)) != old) return now;
        if (spins >= SPINS) sched_yield();
    }
}

void team_barrier(struct team *team, int size) {
    const int round = atomic_load_explicit(&team->rounds, memory_order_acquire);
    if (atomic_fetch_add(&team->arrived, 1) == size - 1) {
        atomic_store(&team->arrived, 0);
        atomic_store_explicit(&team->rounds, round + 1, memory_order_release);
    } else {
        wait_for_change(&team->rounds, round);
    }
}

static void openmp_member(void *pointer) {
    struct team *team = pointer;
    team->body(team->context, team, omp_get_thread_num(), omp_get_num_threads()); /* maybe fewer than asked for */
}

struct member {
    struct team *team;
    int rank;
    pthread_t thread;
};

static void *posix_member(void *pointer) {
    struct member *member = pointer;
    struct team *team = member->team;
    team->body(team->context, team, member->rank, wait_for_change(&team->size, 0));
    return 0;
}

static void run_in_posix_threads(struct team *team, int size) {
    struct member members[MAX_THREADS];
    int started = 1; /* this thread is the first member */
    while (started < size && started < MAX_THREADS) {
        struct member *member = &members[started];
        *member = (struct member){.team = team, .rank = started};
        if (pthread_create(&member->thread, 0, posix_member, member)) break;
        started++;
    }
    atomic_store_explicit(&team->size, started, memory_order_release);
    team->body(team->context, team, 0, started);
    for (int rank = 1; rank < started; rank++) pthread_join(members[rank].thread, 0);
}

void run_in_team(int size, team_body body, void *context) {
    struct team team = {.body = body, .context = context};
    if (size <= 1)
        body(context, &team, 0, 1);
    else if (GOMP_parallel && omp_get_thread_num && omp_get_num_threads)
        GOMP_parallel(openmp_member, &team, (unsigned)size, 0);
    else
        run_in_posix_threads(&team, size);
}
