/* SPDX-License-Identifier: MIT
 *
 * table.h - the table of an extent leaf, row by row: what every small commit does, and Python is slow at.
 *
 * Pure functions over memory that the caller owns. They have nothing to do with the memory core (zbig.h), as storage and
 * memory know nothing of each other. Thread-safe.
 *
 * An *extent* is 28 bytes, little-endian, as it is stored: start, stop (u64), segment (u32), offset (u64), at any
 * alignment. Arithmetic is modulo 2^64. Lengths of segments are u64, aligned. What the columns mean is described in
 * dask_zbig/storage/packing.py and format.py.
 */
#ifndef ZBIG_TABLE_H
#define ZBIG_TABLE_H

#include <stddef.h>
#include <stdint.h>

#define ZT_API __attribute__((visibility("default")))
#define ZT_EXTENT 28u /* bytes of an extent */
#define ZT_ROW 20u    /* bytes of its row in the columns: gap, length, segment (u32), offset (u64) */
#define ZT_MOVED 32u  /* bytes of a run that was moved: start, stop (u64), oid (8 bytes), offset (u64) */
#define ZT_MOVED_ROW 24u /* bytes of its row: gap, length (u32), oid (less the one before), offset (u64) */

/** The columns of n extents (sorted, disjoint, of the leaf that begins at byte `base`) and of the `count` segments that
 *  they refer to: n * ZT_ROW + count * 9 bytes. -ENOMEM; -EINVAL if an extent refers to another segment. */
ZT_API int zt_columns(const void *extents, size_t n, const uint64_t *lengths, size_t count, uint64_t base, void *out);

/** The columns of k runs (sorted, disjoint) that were moved: k * ZT_MOVED_ROW bytes. */
ZT_API void zt_moved_columns(const void *moved, size_t k, uint64_t base, void *out);

/** The inverse of zt_columns(), for columns of unknown origin: n extents, which need not be sorted or make sense
 *  otherwise, and the lengths of `count` segments. -ENOMEM. -EINVAL if one refers to no segment of these: then *most is
 *  the highest that is referred to, and what was written does not count. */
ZT_API int zt_rows(const void *columns, size_t n, size_t count, uint64_t base, void *extents, uint64_t *lengths,
                   uint64_t *most);

/** Put [start, stop) of a new segment, from its `offset` on, over n extents of `count` segments. `out` has room for n + 2,
 *  `order` for count + 1. Segments are numbered by first appearance then: number k, of *used, is the one that was
 *  order[k], or `count` for the new one. Returns how many extents there are. -ENOMEM; -EINVAL if one refers to another
 *  segment. */
ZT_API int64_t zt_put(const void *extents, size_t n, size_t count, uint64_t start, uint64_t stop, uint64_t offset,
                      void *out, uint32_t *order, size_t *used);

#endif
