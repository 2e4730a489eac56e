/* A thread pool: shares the tiles of a phase of work among threads.

   The caller goes from phase to phase; helpers only take tiles. A tile goes to whichever thread runs, so a helper that
   was preempted holds up the one tile that it has, and one that has none holds up nobody. Who waits
   spins for a short while, then sleeps on a futex. `leave` tells how long the call took and how much of that was lost
   to threads that did not run: what `threads.py` decides by.

   One pool a process: a call that finds it in use runs alone, as does a child after fork(), which has no helpers. */

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MOST_THREADS 256
#define SHORT_SPINS 300      /* looks before the first at the clock */
#define CALLER_SPINS 50e-6   /* seconds; then its core is free for the helper that it waits for */
#define HELPER_SPINS 1500e-6 /* long enough to outlast what happens between two calls of a busy engine */
#ifndef TILE
#define TILE (1 << 20)       /* multiply-adds: a tile takes 20 to 200 microseconds */
#endif
#define GIVE_UP 10e-3        /* a call that lost so much, and a third of its time, continues alone */

typedef void (*Work)(const void *what, long item, int thread);

static struct {
  _Alignas(64) _Atomic uint64_t ticket;           /* how many threads may claim << 32 | tiles left */
  _Alignas(64) _Atomic uint32_t undone;           /* tiles not finished */
  _Atomic uint32_t caller_sleeps;
  _Alignas(64) Work work;                         /* of the phase; who holds a tile may read them */
  const void *what;
  long items, grain;
  _Alignas(64) _Atomic int in_use;
  int helpers;
  struct { _Alignas(64) _Atomic uint32_t sleeps; } helper[MOST_THREADS];
} pool;

static __thread struct {                          /* the call that this thread makes */
  int threads, leads;                             /* leads: whether the pool is its own */
  double began, began_cpu, waited, slept;         /* seconds */
} call;

static inline double seconds(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static inline void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, 0, 0, 0);
#else
  (void)word, (void)value, sched_yield();
#endif
}

static void wake(_Atomic uint32_t *word) {
#if defined(__linux__)
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
#else
  (void)word;
#endif
}

static inline int may_claim(uint64_t ticket, int thread) {
  return (uint64_t)thread < ticket >> 32 && (uint32_t)ticket;
}

static inline int take_tile(int thread) { /* and do it; 0: there is none left */
  uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_relaxed);
  do
    if (!may_claim(ticket, thread)) return 0;
  while (!atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket - 1, memory_order_acquire,
                                                memory_order_relaxed));
#ifdef PEDRO_ODD_SCHEDULES /* for a test: whoever has a tile may be preempted */
  static _Atomic uint32_t draws;
  const uint32_t draw = atomic_fetch_add(&draws, 1) * 2654435761u >> 26;
  if (!draw) sched_yield();
  for (uint32_t i = 0; i < 8 * draw; i++) pause_briefly();
#endif
  const long stop = pool.items - ((long)(uint32_t)ticket - 1) * pool.grain; /* the first tile may be a short one */
  for (long item = stop > pool.grain ? stop - pool.grain : 0; item < stop; item++) pool.work(pool.what, item, thread);
  if (atomic_fetch_sub(&pool.undone, 1) == 1 && thread && atomic_load(&pool.caller_sleeps)) wake(&pool.undone);
  return 1;
}

static void *help(void *number) {
  const int thread = (int)(intptr_t)number;
  _Atomic uint32_t *sleeps = &pool.helper[thread].sleeps;
  for (;;) {
    for (double until = 0; !until || seconds(CLOCK_MONOTONIC) < until;) {
      while (take_tile(thread)) until = 0;
      int soon = 0; /* mostly the next phase is there before a look at the clock would be over */
      for (int i = 0; i < SHORT_SPINS && !until && !soon; i++) {
        soon = may_claim(atomic_load_explicit(&pool.ticket, memory_order_relaxed), thread);
        pause_briefly();
      }
      if (soon) continue;
      if (!until) until = seconds(CLOCK_MONOTONIC) + HELPER_SPINS;
      for (int i = 0; i < 64 && !may_claim(atomic_load_explicit(&pool.ticket, memory_order_relaxed), thread); i++)
        pause_briefly();
    }
    atomic_store(sleeps, 1);
    if (may_claim(atomic_load(&pool.ticket), thread)) atomic_store(sleeps, 0);
    while (atomic_load(sleeps)) sleep_while(sleeps, 1);
  }
  return 0;
}

static void enter(long wanted) { /* a call of this thread begins; `wanted` threads at most */
  int nobody = 0;
  call.leads = wanted > 1 && atomic_compare_exchange_strong(&pool.in_use, &nobody, 1);
  call.threads = !call.leads ? 1 : wanted < MOST_THREADS ? wanted : MOST_THREADS;
  for (pthread_t id; pool.helpers < call.threads - 1; pool.helpers++) {
    sigset_t every, before; /* signals are for the program's own threads */
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    const int failed = pthread_create(&id, 0, help, (void *)(intptr_t)(pool.helpers + 1));
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (failed) {
      call.threads = pool.helpers + 1;
      break;
    }
    pthread_detach(id);
  }
  call.waited = call.slept = 0;
  call.began_cpu = seconds(CLOCK_THREAD_CPUTIME_ID);
  call.began = seconds(CLOCK_MONOTONIC);
}

static void leave(double *spent, double *lost) { /* the call ends; seconds that it took, and lost to absent threads */
  *spent = seconds(CLOCK_MONOTONIC) - call.began;
  const double absent = *spent - (seconds(CLOCK_THREAD_CPUTIME_ID) - call.began_cpu) - call.slept;
  *lost = call.leads ? call.waited + (absent > 0 ? absent : 0) : 0;
  if (call.leads) atomic_store(&pool.in_use, 0);
}

static void wait_for_helpers(void) { /* who hold the last tiles */
  if (!atomic_load_explicit(&pool.undone, memory_order_acquire)) return;
  for (int i = 0; i < SHORT_SPINS; i++) {
    if (!atomic_load_explicit(&pool.undone, memory_order_acquire)) return;
    pause_briefly();
  }
  const double began = seconds(CLOCK_MONOTONIC);
  double now = began;
  while (atomic_load_explicit(&pool.undone, memory_order_acquire) && now - began < CALLER_SPINS) {
    for (int i = 0; i < 16 && atomic_load_explicit(&pool.undone, memory_order_acquire); i++) pause_briefly();
    now = seconds(CLOCK_MONOTONIC);
  }
  if (atomic_load_explicit(&pool.undone, memory_order_acquire)) {
    atomic_store(&pool.caller_sleeps, 1);
    for (uint32_t left; (left = atomic_load(&pool.undone));) sleep_while(&pool.undone, left);
    atomic_store(&pool.caller_sleeps, 0);
    const double slept_from = now;
    now = seconds(CLOCK_MONOTONIC);
    call.slept += now - slept_from;
  }
  call.waited += now - began;
  if (call.waited > GIVE_UP && 3 * call.waited > now - call.began) call.threads = 1;
}

static long tiles_of(double cost, long most) { /* how many tiles of about TILE: as many for every thread */
  const long tiles = ((long)(cost / TILE) + call.threads) / call.threads * call.threads;
  return most < 1 ? 1 : tiles < most ? tiles : most;
}

static void share(long items, double cost, Work work, const void *what) {
  /* One phase: returns once all items are done. `cost`: of an item, in multiply-adds; small ones share a tile. */
  const long most = tiles_of(cost * items, items), grain = (items + most - 1) / most;
  const long tiles = grain ? (items + grain - 1) / grain : 0;
  if (call.threads == 1 || tiles <= 1 || cost * items * 32 < TILE) {
    for (long item = 0; item < items; item++) work(what, item, 0);
    return;
  }
  pool.work = work, pool.what = what, pool.items = items, pool.grain = grain;
  atomic_store_explicit(&pool.undone, tiles, memory_order_relaxed);
  atomic_store(&pool.ticket, (uint64_t)call.threads << 32 | (uint32_t)tiles);
  for (int thread = 1; thread < call.threads && thread < tiles; thread++)
    if (atomic_load(&pool.helper[thread].sleeps)) {
      atomic_store(&pool.helper[thread].sleeps, 0);
      wake(&pool.helper[thread].sleeps);
    }
  while (take_tile(0)) {}
  wait_for_helpers();
}
