/* SPDX-License-Identifier: MIT
 * bench_fault.c - what a write fault costs: nanoseconds of one, the unit being a page, on a hole and on clean pages; of
 * those of a sequential writer, a MiB; and of a bare SIGSEGV, whose handler just steps over the instruction.
 * Prints "name number" lines. Not a test: built on request, by `cmake --build BUILD --target bench_fault`. */
#define _GNU_SOURCE
#include "fixture.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>

#define P ZB_PAGE
#define B ZB_BLOCK
enum { BLOCKS = 1024, ROUNDS = 9, TRIPS = 20000, SEQUENTIAL = 64 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static int by_value(const void *left, const void *right)
{
    double l = *(const double *)left, r = *(const double *)right;
    return (l > r) - (l < r);
}

static double median(double *values)
{
    qsort(values, ROUNDS, sizeof *values, by_value);
    return values[ROUNDS / 2];
}

/* -- bare: an instruction of known length faults, the handler steps over it */

static void step_over(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info;
    ucontext_t *u = context;
#if defined(__x86_64__)
    u->uc_mcontext.gregs[REG_RIP] += 3;
#elif defined(__aarch64__)
    u->uc_mcontext.pc += 4;
#else
#error "unknown machine"
#endif
}

static inline void faulting_store(char *at)
{
#if defined(__x86_64__)
    __asm__ volatile("movb $0, (%%rdi)" : : "D"(at) : "memory"); /* c6 07 00 */
#else
    __asm__ volatile("strb wzr, [%0]" : : "r"(at) : "memory");
#endif
}

static double bare(char *page)
{
    struct sigaction ours, old;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = step_over;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigfillset(&ours.sa_mask);
    CHECK_SYS(sigaction(SIGSEGV, &ours, &old));
    double start = now();
    for (int i = 0; i < TRIPS; i++) faulting_store(page);
    double spent = now() - start;
    CHECK_SYS(sigaction(SIGSEGV, &old, NULL));
    return spent / TRIPS;
}

/* -- ours: one page of each block, in no order, so that the unit does not grow */

static double faults(int fd)
{
    uint64_t first, last;
    zb_space *s = fx_space(1);
    zb_window *w = fx_window(s, 0, (uint64_t)BLOCKS * B);
    char *base = zb_window_base(w);
    for (uint64_t i = 0; i < BLOCKS; i++) CHECK_OK(fx_fill(s, w, i * B, (i + 1) * B, fd, 0));
    uint64_t before = fx_count().write_faults;
    double start = now();
    for (uint64_t i = 0; i < BLOCKS; i++) {
        uint64_t block = i * 387 % BLOCKS; /* coprime */
        fx_put(base + block * B + (block * 37 % 500 + 5) * P, 1);
    }
    double spent = now() - start;
    CHECK_EQ(fx_count().write_faults - before, BLOCKS);
    CHECK_EQ(zb_space_dirty(s), BLOCKS);
    CHECK_OK(zb_discard(s, &first, &last));
    fx_scratch_remove(1, first, last);
    zb_window_free(w);
    zb_space_free(s);
    return spent / BLOCKS;
}

static double sequential(void)
{
    uint64_t first, last;
    zb_space *s = fx_space(1);
    zb_window *w = fx_window(s, 0, (uint64_t)SEQUENTIAL * B);
    char *base = zb_window_base(w);
    CHECK_OK(fx_fill(s, w, 0, (uint64_t)SEQUENTIAL * B, -1, 0));
    uint64_t before = fx_count().write_faults;
    for (uint64_t at = 0; at < (uint64_t)SEQUENTIAL * B; at += P) fx_put(base + at, 1);
    double count = (double)(fx_count().write_faults - before);
    CHECK_OK(zb_discard(s, &first, &last));
    fx_scratch_remove(1, first, last);
    zb_window_free(w);
    zb_space_free(s);
    return count / (SEQUENTIAL * (B >> 20));
}

int main(void)
{
    double trips[ROUNDS], holes[ROUNDS], pages[ROUNDS];
    fx_start(100);
    char *page = mmap(NULL, P, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(page != MAP_FAILED);
    int fd = fx_file(B, 1);
    for (int i = 0; i < ROUNDS; i++) {
        trips[i] = bare(page);
        holes[i] = faults(-1);
        pages[i] = faults(fd);
    }
    printf("bare_ns %.0f\nhole_ns %.0f\nclean_ns %.0f\n", median(trips), median(holes), median(pages));
    printf("sequential_faults_per_mib %.3f\n", sequential());
    return 0;
}
