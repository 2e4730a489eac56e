/* Lets the wall clock of a process jump: LD_PRELOAD it, and name in CHAOS_CLOCK a file with eight bytes, the offset in
   nanoseconds, which may change at any time. Monotonic clocks go on as they are, as they do when a machine's clock is set.
   Deadlines that were made of the jumped clock are given to the kernel in the true one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *offset;
static const int64_t none = 0;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *page = file >= 0 ? mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, file, 0) : MAP_FAILED;
    if (file >= 0) close(file);
    offset = page == MAP_FAILED ? &none : page;
}

static int64_t now_off(void) { return offset ? *offset : 0; }

static void shift(struct timespec *t, int64_t by) {
    int64_t ns = t->tv_nsec + by % 1000000000;
    t->tv_sec += by / 1000000000;
    if (ns >= 1000000000) ns -= 1000000000, t->tv_sec++;
    if (ns < 0) ns += 1000000000, t->tv_sec--;
    t->tv_nsec = ns;
}

/* Of the oldest version of a symbol dlsym may give, conditions of C++ are not. */
#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlvsym(RTLD_NEXT, #name, "GLIBC_2.3.2"); \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int clock_gettime(clockid_t id, struct timespec *t) {
    NEXT(clock_gettime);
    int wrong = next(id, t);
    if (!wrong && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) shift(t, now_off());
    return wrong;
}

int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}

/* Of the wall clock are those that lie after 2001: no machine is up for so long. */
static const struct timespec *truly(const struct timespec *until, struct timespec *room) {
    if (!until || until->tv_sec < 1000000000) return until;
    *room = *until;
    shift(room, -now_off());
    return room;
}

int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *until) {
    NEXT(pthread_cond_timedwait);
    struct timespec room;
    return next(c, m, truly(until, &room));
}

int pthread_cond_clockwait(pthread_cond_t *c, pthread_mutex_t *m, clockid_t id, const struct timespec *until) {
    NEXT(pthread_cond_clockwait);
    struct timespec room;
    return next(c, m, id, truly(until, &room));
}

int pthread_mutex_timedlock(pthread_mutex_t *m, const struct timespec *until) {
    NEXT(pthread_mutex_timedlock);
    struct timespec room;
    return next(m, truly(until, &room));
}

int sem_timedwait(sem_t *s, const struct timespec *until) {
    NEXT(sem_timedwait);
    struct timespec room;
    return next(s, truly(until, &room));
}

int sem_clockwait(sem_t *s, clockid_t id, const struct timespec *until) {
    NEXT(sem_clockwait);
    struct timespec room;
    return next(s, id, truly(until, &room));
}
