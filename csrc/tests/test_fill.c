/* SPDX-License-Identifier: MIT
 * test_fill.c - windows and clean blocks: filling, dropping, releasing. No faults but for one test of writes. */
#define _GNU_SOURCE
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>

#define P ZB_PAGE
#define B ZB_BLOCK

static zb_space *s;
static zb_window *w;
static char *base;

static void begin(uint64_t blocks)
{
    s = fx_space(1);
    w = fx_window(s, 0, blocks * B);
    base = zb_window_base(w);
}

static void end(void)
{
    uint64_t first, last;
    CHECK_OK(zb_discard(s, &first, &last));
    fx_scratch_remove(1, first, last);
    zb_window_free(w);
    zb_space_free(s);
}

static void holes(void)
{
    begin(4);
    CHECK_OK(fx_fill(s, w, B, 4 * B, -1, 0));
    fx_check_all(base + B, 3 * B, 0);
    CHECK_EQ(zb_absent(w, 0, 4 * B), 0);
    CHECK_EQ(zb_absent(w, B, 4 * B), 4 * B);
    end();
}

static void pieces_with_offsets(void)
{
    begin(3);
    int a = fx_file(4 * B, 1), b = fx_file(B, 2);
    zb_piece pieces[] = {{0, 3 * P, 0, -1},
                         {3 * P, B + 5 * P, 7 * P, a},
                         {B + 5 * P, B + 6 * P, 0, b},
                         {B + 6 * P, 2 * B, 0, -1},
                         {2 * B, 3 * B, 2 * B + P, a}};
    CHECK_OK(zb_fill(w, zb_space_epoch(s), 0, 3 * B, pieces, 5));
    close(a);
    close(b);
    fx_check_all(base, 3 * P, 0);
    fx_check_file(base + 3 * P, B + 2 * P, 1, 7 * P);
    fx_check_file(base + B + 5 * P, P, 2, 0);
    fx_check_all(base + B + 6 * P, B - 6 * P, 0);
    fx_check_file(base + 2 * B, B, 1, 2 * B + P);
    end();
}

/* Pieces may begin before the range and end after it. */
static void pieces_wider_than_the_range(void)
{
    begin(3);
    int fd = fx_file(3 * B, 1);
    zb_piece piece = {0, 3 * B, 0, fd};
    CHECK_OK(zb_fill(w, zb_space_epoch(s), B, 2 * B, &piece, 1));
    CHECK_EQ(zb_absent(w, 0, 3 * B), 0);
    CHECK_EQ(zb_absent(w, B, 3 * B), 2 * B);
    fx_check_file(base + B, B, 1, B);
    close(fd);
    end();
}

static void pieces_that_do_not_cover(void)
{
    begin(3);
    int fd = fx_file(3 * B, 1);
    zb_piece gaps[][2] = {{{P, B, 0, fd}, {B, 3 * B, 0, -1}},
                          {{0, B, 0, fd}, {B + P, 3 * B, 0, -1}},
                          {{0, B, 0, fd}, {B, 3 * B - P, 0, -1}}};
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(zb_fill(w, zb_space_epoch(s), 0, 3 * B, gaps[i], 2), -EINVAL);
        uint64_t absent = zb_absent(w, 0, 3 * B);
        CHECK(absent < 3 * B);
        fx_check_file(base, absent, 1, 0);
    }
    CHECK_EQ(zb_fill(w, zb_space_epoch(s), 0, 3 * B, NULL, 0), -EINVAL);
    CHECK_OK(fx_fill(s, w, 0, 3 * B, fd, 0));
    fx_check_file(base, 3 * B, 1, 0);
    close(fd);
    end();
}

static void wrong_arguments(void)
{
    begin(2);
    uint64_t e = zb_space_epoch(s);
    zb_piece ok = {0, 4 * B, 0, -1};
    CHECK_EQ(zb_fill(w, e, P, B, &ok, 1), -EINVAL);
    CHECK_EQ(zb_fill(w, e, 0, B + P, &ok, 1), -EINVAL);
    CHECK_EQ(zb_fill(w, e, 0, 3 * B, &ok, 1), -EINVAL);
    CHECK_EQ(zb_fill(w, e, B, 0, &ok, 1), -EINVAL);
    zb_piece bad[][2] = {{{0, B + 1, 0, -1}, {B, 2 * B, 0, -1}},
                         {{0, 0, 0, -1}, {0, 2 * B, 0, -1}},
                         {{B, 2 * B, 0, -1}, {0, B, 0, -1}},
                         {{0, B + P, 0, -1}, {B, 2 * B, 0, -1}},
                         {{0, B, 5, 0}, {B, 2 * B, 0, -1}}};
    for (int i = 0; i < 5; i++) CHECK_EQ(zb_fill(w, e, 0, 2 * B, bad[i], 2), -EINVAL);
    CHECK_EQ(zb_absent(w, 0, 2 * B), 0);
    zb_window *none;
    CHECK_EQ(zb_window_new(&none, s, P, B), -EINVAL);
    CHECK_EQ(zb_window_new(&none, s, 0, 0), -EINVAL);
    CHECK_EQ(zb_window_new(&none, s, 0, UINT64_MAX), -EINVAL);
    CHECK_EQ(zb_window_new(&none, s, UINT64_MAX - B + 1, 2 * B), -EINVAL);
    CHECK_EQ(zb_window_new(&none, s, 0, 1ULL << 61), -ENOMEM);
    end();
}

static void a_closed_descriptor(void)
{
    begin(1);
    CHECK_EQ(fx_fill(s, w, 0, B, 1000, 0), -EBADF);
    CHECK_EQ(zb_absent(w, 0, B), 0);
    CHECK_OK(fx_fill(s, w, 0, B, -1, 0));
    fx_check_all(base, B, 0);
    end();
}

static void stale_epoch(void)
{
    begin(2);
    uint64_t e = zb_space_epoch(s), before = fx_count().stale_fills, first, last;
    zb_piece piece = {0, 2 * B, 0, -1};
    CHECK_OK(zb_drop(s, 0, 0, 0));
    CHECK(zb_space_epoch(s) != e);
    CHECK_EQ(zb_fill(w, e, 0, 2 * B, &piece, 1), -ESTALE);
    e = zb_space_epoch(s);
    CHECK_OK(zb_discard(s, &first, &last));
    CHECK_EQ(first, last);
    CHECK_EQ(zb_fill(w, e, 0, 2 * B, &piece, 1), -ESTALE);
    CHECK_EQ(fx_count().stale_fills, before + 2);
    CHECK_EQ(zb_absent(w, 0, 2 * B), 0);
    CHECK_OK(zb_fill(w, zb_space_epoch(s), 0, 2 * B, &piece, 1));
    end();
}

static void filled_blocks_are_left(void)
{
    begin(4);
    int a = fx_file(4 * B, 1), b = fx_file(4 * B, 2);
    CHECK_OK(fx_fill(s, w, B, 2 * B, a, 0));
    CHECK_OK(fx_fill(s, w, 3 * B, 4 * B, -1, 0));
    CHECK_OK(fx_fill(s, w, 0, 4 * B, b, 0));
    fx_check_file(base, B, 2, 0);
    fx_check_file(base + B, B, 1, 0);
    fx_check_file(base + 2 * B, B, 2, 2 * B);
    fx_check_all(base + 3 * B, B, 0);
    close(a);
    close(b);
    end();
}

static void absent_scan(void)
{
    begin(8);
    for (uint64_t b = 0; b < 8; b++)
        if (b != 3 && b != 6) CHECK_OK(fx_fill(s, w, b * B, (b + 1) * B, -1, 0));
    CHECK_EQ(zb_absent(w, 0, 8 * B), 3 * B);
    CHECK_EQ(zb_absent(w, 3 * B + 17, 8 * B), 3 * B);
    CHECK_EQ(zb_absent(w, 4 * B, 8 * B), 6 * B);
    CHECK_EQ(zb_absent(w, 7 * B, 8 * B), 8 * B);
    CHECK_EQ(zb_absent(w, 0, 3 * B), 3 * B);
    CHECK_EQ(zb_absent(w, 0, B + 1), 2 * B);
    CHECK_EQ(zb_absent(w, 0, 3 * B + 1), 3 * B);
    CHECK_EQ(zb_ready(w, 0, 3 * B), 1);
    CHECK_EQ(zb_ready(w, 2 * B + 17, 3 * B), 1);
    CHECK_EQ(zb_ready(w, 0, 3 * B + 1), 0);
    end();
}

static void present_scan(void)
{
    begin(8);
    CHECK_EQ(zb_present(w, 0, 8 * B), 8 * B);
    CHECK_OK(fx_fill(s, w, 3 * B, 5 * B, -1, 0));
    CHECK_EQ(zb_present(w, 0, 8 * B), 3 * B);
    CHECK_EQ(zb_present(w, 0, 2 * B + 1), 3 * B);
    CHECK_EQ(zb_present(w, 4 * B + 9, 8 * B), 4 * B);
    CHECK_EQ(zb_present(w, 5 * B, 8 * B), 8 * B);
    end();
}

static void several_windows(void)
{
    begin(4);
    int fd = fx_file(6 * B, 1);
    zb_window *v = fx_window(s, 2 * B, 4 * B), *u = fx_window(s, 3 * B, 1);
    CHECK_OK(fx_fill(s, v, 2 * B, 6 * B, fd, 2 * B));
    CHECK_EQ(zb_absent(w, 0, 4 * B), 0);
    CHECK_EQ(zb_absent(u, 3 * B, 4 * B), 3 * B);
    fx_check_file(zb_window_base(v), 4 * B, 1, 2 * B);
    CHECK_EQ(fx_fill(s, v, B, 3 * B, fd, B), -EINVAL);
    CHECK_OK(fx_fill(s, u, 3 * B, 4 * B, fd, 3 * B));
    CHECK_OK(fx_fill(s, w, 0, 4 * B, fd, 0));
    fx_check_file(zb_window_base(u), B, 1, 3 * B);
    fx_check_file(base, 4 * B, 1, 0);
    /* a drop reaches all of them */
    CHECK_OK(zb_drop(s, 3 * B + 5, 3 * B + 6, 0));
    CHECK_EQ(zb_absent(w, 0, 4 * B), 3 * B);
    CHECK_EQ(zb_absent(v, 2 * B, 6 * B), 3 * B);
    CHECK_EQ(zb_absent(v, 4 * B, 6 * B), 6 * B);
    CHECK_EQ(zb_absent(u, 3 * B, 4 * B), 3 * B);
    zb_window_free(v);
    fx_check_file(base, 3 * B, 1, 0);
    zb_window_free(u);
    close(fd);
    end();
}

static void drop_only_holes(void)
{
    begin(4);
    int fd = fx_file(4 * B, 1);
    zb_piece pieces[] = {{0, B, 0, -1}, {B, 2 * B + P, B, fd}, {2 * B + P, 4 * B, 0, -1}};
    CHECK_OK(zb_fill(w, zb_space_epoch(s), 0, 4 * B, pieces, 3));
    CHECK_OK(zb_drop(s, 0, UINT64_MAX, ZB_DROP_HOLES));
    CHECK_EQ(zb_absent(w, 0, 4 * B), 0);
    CHECK_EQ(zb_absent(w, B, 4 * B), 3 * B); /* a block that is partly a hole is no hole */
    fx_check_file(base + B, B + P, 1, B);
    fx_check_all(base + 2 * B + P, B - P, 0);
    close(fd);
    end();
}

static void release(void)
{
    begin(2);
    int fd = fx_file(2 * B, 1);
    CHECK_OK(fx_fill(s, w, 0, 2 * B, fd, 0));
    fx_check_file(base, 2 * B, 1, 0);
    fx_put(base + 5, 99);
    CHECK(fx_resident(base) && fx_resident(base + B));
    CHECK_OK(zb_release(w));
    CHECK(!fx_resident(base) && !fx_resident(base + B));
    CHECK_EQ(zb_absent(w, 0, 2 * B), 2 * B);
    CHECK_EQ(fx_get(base + 5), 99);
    fx_check_file(base + 6, 2 * B - 6, 1, 6);
    close(fd);
    end();
}

static void a_terabyte_of_hole(void)
{
    const uint64_t size = 1ULL << 40;
    uint64_t before = fx_count().mappings;
    begin(size / B);
    CHECK_OK(fx_fill(s, w, 0, size, -1, 0));
    CHECK_EQ(fx_get(base), 0);
    CHECK_EQ(fx_get(base + size / 2), 0);
    CHECK_EQ(fx_get(base + size - 1), 0);
    CHECK_LE(fx_count().mappings - before, 8);
    CHECK_LE(fx_mappings(base, size), 2);
    fx_put(base + size / 2, 1);
    CHECK_EQ(zb_space_dirty(s), 1);
    CHECK_OK(zb_drop(s, 0, size, 0));
    CHECK_EQ(zb_absent(w, 0, size), 0);
    CHECK_EQ(fx_get(base + size / 2), 1); /* dirty pages stay */
    end();
    CHECK_EQ(fx_count().mappings, before);
}

static void system_calls_on_a_clean_view(void)
{
    begin(3);
    int fd = fx_file(B, 1), out = fx_file(0, 0);
    zb_piece pieces[] = {{0, B, 0, fd}, {B, 2 * B, 0, -1}};
    CHECK_OK(zb_fill(w, zb_space_epoch(s), 0, 2 * B, pieces, 2));
    uint64_t before = fx_count().read_faults;
    CHECK_EQ(write(out, base, 2 * B), 2 * B);
    CHECK_EQ(fx_count().read_faults, before);
    errno = 0;
    CHECK_EQ(pwrite(out, base + 2 * B, P, 0), -1);
    CHECK_EQ(errno, EFAULT); /* absent: it must be filled before */
    CHECK_EQ(pread(out, base, P, 0), -1);
    CHECK_EQ(errno, EFAULT); /* read(2) writes into memory: zb_write() first */
    CHECK_OK(zb_write(w, B + 10, B + 10 + 3 * P, NULL));
    CHECK_EQ(pread(out, base + B + 10, 3 * P, 0), 3 * P);
    fx_check_all(base + B, 10, 0);
    fx_check_file(base + B + 10, 3 * P, 1, 0);
    fx_check_all(base + B + 10 + 3 * P, 5 * P, 0);
    close(fd);
    close(out);
    end();
}

/* The estimate of mappings is never below what the kernel has. */
static void mappings_are_counted(void)
{
    begin(64);
    uint64_t before = fx_count().mappings - 2; /* the window is there already */
    fx_random r = {7};
    for (int i = 0; i < 400; i++) {
        uint64_t lo = fx_below(&r, 64) * B, hi = lo + (1 + fx_below(&r, 4)) * B;
        if (hi > 64 * B) hi = 64 * B;
        if (i % 3)
            CHECK_OK(fx_fill(s, w, lo, hi, -1, 0));
        else
            CHECK_OK(zb_drop(s, lo, hi, 0));
        if (i % 5 == 0) CHECK_LE(fx_mappings(base, 64 * B), fx_count().mappings - before);
    }
    /* After a correction, freeing what had been counted before it must not make it negative. */
    zb_mappings_set(10);
    end();
    CHECK_LE(fx_count().mappings, 1000);
}

int main(void)
{
    fx_start(60);
    RUN(holes);
    RUN(pieces_with_offsets);
    RUN(pieces_wider_than_the_range);
    RUN(pieces_that_do_not_cover);
    RUN(wrong_arguments);
    RUN(a_closed_descriptor);
    RUN(stale_epoch);
    RUN(filled_blocks_are_left);
    RUN(absent_scan);
    RUN(present_scan);
    RUN(several_windows);
    RUN(drop_only_holes);
    RUN(release);
    RUN(a_terabyte_of_hole);
    RUN(system_calls_on_a_clean_view);
    RUN(mappings_are_counted);
    return 0;
}
