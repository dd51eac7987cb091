/* SPDX-License-Identifier: MIT
 * test_table.c - packing and splicing the rows of a leaf: what goes in comes out, junk stays inside of what it was given,
 * and a splice shows, byte by byte, what it should. All memory is allocated to the byte, for AddressSanitizer to see. */
#include "check.h"
#include "table.h"

#include <errno.h>

enum { BYTES = 300, SEGMENTS = 6, ROUNDS = 100000 };

typedef struct __attribute__((packed)) {
    uint64_t start, stop;
    uint32_t segment;
    uint64_t offset;
} extent;

static uint64_t state = 88172645463325252ULL;

static uint64_t below(uint64_t limit)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % limit;
}

static void *exactly(size_t size)
{
    void *p = malloc(size ? size : 1);
    CHECK(p);
    return p;
}

/* Some extents of bytes `base` to base + BYTES, in an allocation of just their size. */
static extent *any_extents(uint64_t base, size_t *n, size_t count)
{
    extent found[BYTES];
    size_t k = 0;
    for (uint64_t at = base + below(20); at < base + BYTES && k < 40;) {
        uint64_t stop = at + 1 + below(30);
        if (stop > base + BYTES) stop = base + BYTES;
        found[k] = (extent){at, stop, (uint32_t)below(count), below(3) ? below(1000) : UINT64_MAX - below(50)};
        if (k && below(2)) { /* what packing expects */
            found[k].segment = found[k - 1].segment;
            found[k].offset = found[k - 1].offset + (below(2) ? at : found[k - 1].stop) - found[k - 1].start;
        }
        k++;
        at = stop + below(2) * below(20);
    }
    extent *out = exactly(k * sizeof *out);
    memcpy(out, found, k * sizeof *out);
    *n = k;
    return out;
}

static void what_goes_in_comes_out(void)
{
    for (int round = 0; round < ROUNDS; round++) {
        size_t n, count = 1 + below(SEGMENTS);
        uint64_t base = below(2) ? 0 : (1ULL << 62) + below(1000), most;
        extent *e = any_extents(base, &n, count), *again = exactly(n * sizeof *e);
        uint64_t *lengths = exactly(count * sizeof *lengths), *found = exactly(count * sizeof *found);
        uint8_t *columns = exactly(n * ZT_ROW + count * 9);
        for (size_t i = 0; i < count; i++) lengths[i] = below(2) ? below(100) : UINT64_MAX - below(100);
        CHECK_OK(zt_columns(e, n, lengths, count, base, columns));
        CHECK_OK(zt_rows(columns, n, count, base, again, found, &most));
        CHECK(memcmp(e, again, n * sizeof *e) == 0);
        CHECK(memcmp(lengths, found, count * sizeof *lengths) == 0);
        if (n) {
            e[below(n)].segment = (uint32_t)count;
            CHECK_EQ(zt_columns(e, n, lengths, count, base, columns), -EINVAL);
        }
        free(e), free(again), free(lengths), free(found), free(columns);
    }
}

static void what_was_moved(void)
{
    uint64_t rows[2][4] = {{100, 110, 0x0100000000000000, 7}, {115, 120, 0x0300000000000000, UINT64_MAX}};
    uint8_t *moved = exactly(2 * ZT_MOVED), *columns = exactly(2 * ZT_MOVED_ROW);
    uint8_t expected[2 * ZT_MOVED_ROW] = {[0] = 36, [1] = 5, [8] = 10, [9] = 5, [16] = 1, [17] = 2, [32] = 7};
    for (int i = 0; i < 8; i++) expected[33 + 2 * i] = 0xFF;
    memcpy(moved, rows, sizeof rows);
    zt_moved_columns(moved, 2, 64, columns);
    CHECK(memcmp(columns, expected, sizeof expected) == 0);
    free(moved), free(columns);
}

static void junk_stays_inside(void)
{
    unsigned refused = 0, taken = 0;
    for (int round = 0; round < ROUNDS; round++) {
        size_t n = below(8), count = below(SEGMENTS), size = n * ZT_ROW + count * 9;
        uint64_t most, highest = 0, *lengths = exactly(count * sizeof *lengths);
        uint8_t *columns = exactly(size);
        extent *e = exactly(n * sizeof *e);
        for (size_t i = 0; i < size; i++) columns[i] = (uint8_t)below(256);
        if (below(2)) /* or hardly one would be taken */
            for (size_t i = 8 * n; i < 12 * n; i++) columns[i] = i < 9 * n ? (uint8_t)below(count + 1) : 0;
        int r = zt_rows(columns, n, count, below(1000), e, lengths, &most);
        if (r) {
            CHECK_EQ(r, -EINVAL);
            CHECK_LE(count, most);
            refused++;
        } else {
            for (size_t i = 0; i < n; i++)
                if (e[i].segment > highest) highest = e[i].segment;
            CHECK_EQ(most, highest);
            taken++;
        }
        free(columns), free(e), free(lengths);
    }
    CHECK_LE(1000, refused);
    CHECK_LE(1000, taken);
}

/* What byte `at` of the array is: the segment and the offset in it, as one number. */
static uint64_t shown(const extent *e, size_t n, const uint32_t *order, uint64_t at)
{
    for (size_t i = 0; i < n; i++)
        if (e[i].start <= at && at < e[i].stop)
            return (order ? order[e[i].segment] : e[i].segment) * 1000003ULL + (e[i].offset + at - e[i].start) + 1;
    return 0;
}

static void a_splice_shows_what_it_should(void)
{
    for (int round = 0; round < ROUNDS / 10; round++) {
        size_t n, count = below(5) ? 1 + below(SEGMENTS) : 0, used = 0, met = 0;
        extent *e = any_extents(0, &n, count ? count : 1), *out = exactly((n + 2) * sizeof *out);
        uint32_t *order = exactly((count + 1) * sizeof *order);
        uint64_t start = below(BYTES), stop = start + 1 + below(BYTES);
        int64_t k = zt_put(e, n, count, start, stop, 5, out, order, &used);
        if (!count && n) {
            CHECK_EQ(k, -EINVAL);
        } else {
            CHECK(k >= 1 && k <= (int64_t)n + 2 && used <= count + 1);
            for (int64_t i = 0; i < k; i++) {
                CHECK(out[i].start < out[i].stop && (!i || out[i - 1].stop <= out[i].start));
                if (out[i].segment == met) met++;
                CHECK(out[i].segment < met);
            }
            CHECK_EQ(met, used);
            for (uint64_t at = 0; at < 2 * BYTES; at++) {
                uint64_t wanted = start <= at && at < stop ? count * 1000003ULL + 5 + at - start + 1 : shown(e, n, NULL, at);
                CHECK_EQ(shown(out, (size_t)k, order, at), wanted);
            }
        }
        free(e), free(out), free(order);
    }
}

int main(void)
{
    watchdog(100);
    RUN(what_goes_in_comes_out);
    RUN(what_was_moved);
    RUN(junk_stays_inside);
    RUN(a_splice_shows_what_it_should);
    return 0;
}
