/* SPDX-License-Identifier: MIT
 * test_mappings.c - the process has no mapping left (vm.max_map_count). What the core cannot do it says; nothing is
 * saved that is not whole, and with room again everything works. */
#define _GNU_SOURCE
#include "fixture.h"

#include <errno.h>
#include <sys/mman.h>

#define P ZB_PAGE
#define B ZB_BLOCK
enum { BLOCKS = 8 };

static zb_space *s;
static zb_window *w;
static char *base, *hog;
static const size_t hogged = (1UL << 20) * P;
static int fd;

/* Every other page of a range made readable: two mappings each. */
static void use_all(void)
{
    hog = mmap(NULL, hogged, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(hog != MAP_FAILED);
    for (size_t at = P; at < hogged; at += 2 * P)
        if (mprotect(hog + at, P, PROT_READ)) {
            CHECK_EQ(errno, ENOMEM);
            /* The last ones; then one less, so that a mapping can be replaced as a whole, but not split. */
            void *p, *last = MAP_FAILED;
            while ((p = mmap(NULL, P, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) != MAP_FAILED) last = p;
            CHECK(last != MAP_FAILED);
            CHECK_SYS(munmap(last, P));
            return;
        }
    printf("skipped: vm.max_map_count is too large\n");
    exit(SKIP);
}

static void give_back(void)
{
    CHECK_SYS(munmap(hog, hogged));
}

static void begin(void)
{
    s = fx_space(1);
    w = fx_window(s, 0, BLOCKS * B);
    base = zb_window_base(w);
    CHECK_OK(fx_fill(s, w, 0, BLOCKS / 2 * B, fd, 0));
}

static void end(void)
{
    uint64_t first, last;
    CHECK_OK(zb_discard(s, &first, &last));
    CHECK_EQ(zb_space_error(s), 0);
    fx_scratch_remove(1, first, last);
    CHECK_OK(fx_fill(s, w, 0, BLOCKS * B, fd, 0));
    fx_check_file(base, BLOCKS * B, 1, 0);
    fx_put(base + 5, 42);
    CHECK_EQ(zb_space_error(s), 0);
    CHECK_EQ(zb_space_dirty(s), 1);
    CHECK_OK(zb_discard(s, &first, &last));
    fx_scratch_remove(1, first, last);
    zb_window_free(w);
    zb_space_free(s);
}

static char source[B];

/* Nothing was changed: what had been written before is saved. */
static void a_direct_write(void)
{
    zb_run *runs;
    size_t n;
    uint64_t first, last;
    begin();
    fx_put(base, 42);
    use_all();
    CHECK_EQ(zb_write(w, B + P, B + 2 * P, source), -ENOMEM);
    CHECK_EQ(fx_get(base), 42);
    fx_check_file(base + 1, BLOCKS / 2 * B - 1, 1, 1);
    give_back();
    CHECK_OK(zb_freeze(s, &runs, &n, &first, &last));
    CHECK_EQ(n, 1);
    CHECK_EQ(runs[0].stop, P);
    zb_runs_free(runs);
    fx_scratch_remove(1, first, last);
    CHECK_OK(zb_drop(s, 0, B, 0));
    end();
}

/* One window shows it, for the other there is no mapping: this generation cannot be saved. */
static void a_direct_write_in_one_window_of_two(void)
{
    zb_run *runs;
    size_t n;
    uint64_t first, last;
    begin();
    fx_put(base, 42);
    zb_window *v = fx_window(s, B, B);
    CHECK_OK(fx_fill(s, v, B, 2 * B, fd, B)); /* a mapping of its own, that is replaced as a whole */
    use_all();
    CHECK_EQ(zb_write(w, B, 2 * B, source), -ENOMEM);
    CHECK_EQ(zb_space_error(s), ENOMEM);
    CHECK_EQ(zb_freeze(s, &runs, &n, &first, &last), -ENOMEM);
    give_back();
    zb_window_free(v);
    end();
}

static void a_fill(void)
{
    begin();
    use_all();
    CHECK_EQ(fx_fill(s, w, 6 * B, 7 * B, fd, 6 * B), -ENOMEM);
    CHECK_EQ(zb_absent(w, 0, BLOCKS * B), BLOCKS / 2 * B);
    fx_check_file(base, BLOCKS / 2 * B, 1, 0);
    give_back();
    end();
}

static void a_drop(void)
{
    begin();
    use_all();
    CHECK_EQ(zb_drop(s, B, 2 * B, 0), -ENOMEM);
    fx_check_file(base, BLOCKS / 2 * B, 1, 0);
    give_back();
    CHECK_OK(zb_drop(s, B, 2 * B, 0));
    end();
}

int main(void)
{
    fx_start(60);
    fd = fx_file(BLOCKS * B, 1);
    RUN(a_direct_write);
    RUN(a_direct_write_in_one_window_of_two);
    RUN(a_fill);
    RUN(a_drop);
    return 0;
}
