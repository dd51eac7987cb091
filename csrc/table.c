/* SPDX-License-Identifier: MIT
 * table.c - packing and splicing the rows of an extent leaf; see table.h. */
#include "table.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "extents are stored little-endian"
#endif

typedef struct __attribute__((packed)) {
    uint64_t start, stop;
    uint32_t segment;
    uint64_t offset;
} extent;
_Static_assert(sizeof(extent) == ZT_EXTENT, "as it is stored");

typedef struct __attribute__((packed)) {
    uint32_t gap, length, segment;
    uint64_t offset;
} row;
_Static_assert(sizeof(row) == ZT_ROW, "as it is stored");

typedef struct __attribute__((packed)) {
    uint64_t start, stop, oid, offset; /* the oid is big-endian */
} moved;
_Static_assert(sizeof(moved) == ZT_MOVED, "as it is noted");

typedef struct __attribute__((packed)) {
    uint32_t gap, length;
    uint64_t oid, offset;
} moved_row;
_Static_assert(sizeof(moved_row) == ZT_MOVED_ROW, "as it is stored");

/* A segment, while its extents are gone through: the last one that was met. */
typedef struct {
    uint64_t start, stop, offset;
    int64_t votes; /* for "behind the one before" rather than "as far from it as in the file" */
    bool met;
} seen;

static seen *seen_new(size_t count)
{
    return calloc(count ? count : 1, sizeof(seen));
}

static void forget(seen *segments, size_t count)
{
    for (size_t i = 0; i < count; i++) segments[i].met = false;
}

static void meet(seen *s, const extent *e)
{
    *s = (seen){e->start, e->stop, e->offset, s->votes, true};
}

static uint64_t behind(const seen *s)
{
    return s->offset + (s->stop - s->start);
}

static uint64_t apart(const seen *s, uint64_t start)
{
    return s->offset + (start - s->start);
}

/* Let the segments vote. Returns whether they are numbered by first appearance; -EINVAL. */
static int vote(const extent *e, size_t n, seen *segments, size_t count)
{
    size_t met = 0;
    bool in_order = true;
    for (size_t i = 0; i < n; i++) {
        if (e[i].segment >= count) return -EINVAL;
        seen *s = &segments[e[i].segment];
        if (s->met)
            s->votes += (e[i].offset == behind(s)) - (e[i].offset == apart(s, e[i].start));
        else
            in_order &= e[i].segment == met++;
        meet(s, &e[i]);
    }
    return in_order;
}

/* Byte k of item i goes to (or comes from) place i of column k, of n. */
static void spread(const void *item, size_t size, size_t i, size_t n, uint8_t *columns)
{
    const uint8_t *bytes = item;
    for (size_t k = 0; k < size; k++) columns[k * n + i] = bytes[k];
}

static void gather(void *item, size_t size, size_t i, size_t n, const uint8_t *columns)
{
    uint8_t *bytes = item;
    for (size_t k = 0; k < size; k++) bytes[k] = columns[k * n + i];
}

int zt_columns(const void *extents, size_t n, const uint64_t *lengths, size_t count, uint64_t base, void *out)
{
    const extent *e = extents;
    uint8_t *at = out;
    seen *segments = seen_new(count);
    if (!segments) return -ENOMEM;
    int in_order = vote(e, n, segments, count);
    if (in_order < 0) {
        free(segments);
        return in_order;
    }
    forget(segments, count);
    uint64_t end = base;
    for (size_t i = 0; i < n; i++) {
        seen *s = &segments[e[i].segment];
        uint64_t expected = !s->met ? 0 : s->votes > 0 ? behind(s) : apart(s, e[i].start);
        row r = {(uint32_t)(e[i].start - end), (uint32_t)(e[i].stop - e[i].start),
                 in_order && !s->met ? 0 : e[i].segment + 1, e[i].offset - expected};
        spread(&r, sizeof r, i, n, at);
        meet(s, &e[i]);
        end = e[i].stop;
    }
    at += n * sizeof(row);
    for (size_t i = 0; i < count; i++) spread(&lengths[i], sizeof *lengths, i, count, at);
    at += count * sizeof *lengths;
    for (size_t i = 0; i < count; i++) at[i] = segments[i].votes > 0;
    free(segments);
    return 0;
}

void zt_moved_columns(const void *moved_, size_t k, uint64_t base, void *out)
{
    const moved *m = moved_;
    uint64_t end = base, before = 0;
    for (size_t i = 0; i < k; i++) {
        uint64_t oid = __builtin_bswap64(m[i].oid);
        moved_row r = {(uint32_t)(m[i].start - end), (uint32_t)(m[i].stop - m[i].start), oid - before, m[i].offset};
        spread(&r, sizeof r, i, k, out);
        end = m[i].stop;
        before = oid;
    }
}

int zt_rows(const void *columns, size_t n, size_t count, uint64_t base, void *extents, uint64_t *lengths,
            uint64_t *most)
{
    const uint8_t *at = columns, *follows = at + n * sizeof(row) + count * sizeof *lengths;
    extent *e = extents;
    bool valid = true;
    seen *segments = seen_new(count);
    if (!segments) return -ENOMEM;
    *most = 0;
    uint64_t end = base, met = 0;
    for (size_t i = 0; i < n; i++) {
        row r;
        gather(&r, sizeof r, i, n, at);
        uint64_t segment = r.segment ? (uint64_t)r.segment - 1 : met++;
        if (segment > *most) *most = segment;
        uint64_t start = end + r.gap;
        end = start + r.length;
        if (segment >= count) { /* (go on: the highest is to be known) */
            valid = false;
            continue;
        }
        seen *s = &segments[segment];
        uint64_t expected = !s->met ? 0 : follows[segment] ? behind(s) : apart(s, start);
        e[i] = (extent){start, end, (uint32_t)segment, r.offset + expected};
        meet(s, &e[i]);
    }
    at += n * sizeof(row);
    for (size_t i = 0; i < count; i++) gather(&lengths[i], sizeof *lengths, i, count, at);
    free(segments);
    return valid ? 0 : -EINVAL;
}

/* The first of the extents that ends behind `position`. */
static size_t first_behind(const extent *e, size_t n, uint64_t position)
{
    size_t lo = 0, hi = n;
    while (lo < hi) {
        size_t middle = lo + (hi - lo) / 2;
        if (e[middle].stop > position)
            hi = middle;
        else
            lo = middle + 1;
    }
    return lo;
}

/* Number the segments of extents by first appearance: order[k] was the number of segment k. Returns how many there are. */
static size_t number(extent *e, size_t n, uint32_t *numbers, size_t count, uint32_t *order)
{
    size_t met = 0;
    memset(numbers, 0xFF, count * sizeof *numbers);
    for (size_t i = 0; i < n; i++) {
        uint32_t *s = &numbers[e[i].segment];
        if (*s == UINT32_MAX) {
            order[met] = e[i].segment;
            *s = (uint32_t)met++;
        }
        e[i].segment = *s;
    }
    return met;
}

int64_t zt_put(const void *extents, size_t n, size_t count, uint64_t start, uint64_t stop, uint64_t offset, void *out,
               uint32_t *order, size_t *used)
{
    const extent *e = extents;
    extent *to = out;
    size_t first = first_behind(e, n, start), k = first, last = first;
    if (count >= UINT32_MAX) return -EINVAL;
    for (size_t i = 0; i < n; i++)
        if (e[i].segment >= count) return -EINVAL;
    uint32_t *numbers = malloc((count + 1) * sizeof *numbers);
    if (!numbers) return -ENOMEM;
    memcpy(to, e, first * sizeof *e);
    if (first < n && e[first].start < start) {
        to[k] = e[first];
        to[k++].stop = start;
    }
    to[k++] = (extent){start, stop, (uint32_t)count, offset};
    while (last < n && e[last].start < stop) last++;
    if (last > first && e[last - 1].stop > stop) {
        to[k] = e[last - 1];
        to[k].offset += stop - to[k].start;
        to[k++].start = stop;
    }
    memcpy(to + k, e + last, (n - last) * sizeof *e);
    k += n - last;
    *used = number(to, k, numbers, count + 1, order);
    free(numbers);
    return (int64_t)k;
}
