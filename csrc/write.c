/* SPDX-License-Identifier: MIT
 * write.c - what a write makes dirty: the pages of a fault, or all that is assigned at once. */
#include "internal.h"

/* With this many mappings in the process a random write dirties more than its page: see min_unit(). */
#define MANY_MAPPINGS 16000u
#define TOO_MANY_MAPPINGS 28000u

/* -- the unit of a write fault -------------------------------------------------------------------------------- */

/* How many pages a write at `page` makes dirty: one, doubling as long as a writer goes on where it was. */
ZB_IN_HANDLER static uint32_t stream_unit(zb_space *s, uint64_t page)
{
    for (unsigned i = 0; i < ZB_STREAMS; i++)
        if (s->streams[i].unit && s->streams[i].next_page == page) {
            uint32_t unit = s->streams[i].unit * 2;
            s->streams[i].unit = unit < ZB_PAGES_PER_BLOCK ? unit : ZB_PAGES_PER_BLOCK;
            s->stream_clock = i;
            return s->streams[i].unit;
        }
    s->stream_clock = (s->stream_clock + 1) % ZB_STREAMS;
    s->streams[s->stream_clock].unit = 1;
    return 1;
}

/* Each dirty page on its own costs two mappings, and a process has 65,530: widen before they run out. */
ZB_IN_HANDLER static uint32_t min_unit(void)
{
    uint64_t n = atomic_load_explicit(&zb_g.count.mappings, memory_order_relaxed);
    return n < MANY_MAPPINGS ? 1 : n < TOO_MANY_MAPPINGS ? 16 : ZB_PAGES_PER_BLOCK;
}

ZB_IN_HANDLER int zb_write_fault(zb_window *w, uint64_t position)
{
    zb_space *s = w->space;
    uint64_t b = (position - w->start) / ZB_BLOCK, block_at = w->start + b * ZB_BLOCK;
    unsigned page = (unsigned)((position - block_at) / ZB_PAGE);
    uint32_t unit = stream_unit(s, position / ZB_PAGE), least = min_unit();
    unsigned lo = page, hi;
    if (unit < least) {
        unit = least;
        lo = page & ~(least - 1);
    }
    hi = lo + unit < ZB_PAGES_PER_BLOCK ? lo + unit : ZB_PAGES_PER_BLOCK;
    if (s->limit > block_at && s->limit - block_at < ZB_BLOCK) {
        unsigned end = (unsigned)((s->limit - block_at + ZB_PAGE - 1) / ZB_PAGE);
        if (hi > end) hi = end > page ? end : page + 1;
    }
    int r = zb_dirty_pages(w, b, lo, hi, NULL);
    if (!r) s->streams[s->stream_clock].next_page = block_at / ZB_PAGE + hi;
    return r;
}

/* -- at once -------------------------------------------------------------------------------------------------- */

int zb_write(zb_window *w, uint64_t lo, uint64_t hi, const void *source)
{
    zb_space *s = w->space;
    if (lo < w->start || hi < lo || hi > w->start + w->blocks * ZB_BLOCK) return -EINVAL;
    if (source && (lo % ZB_PAGE || hi % ZB_PAGE)) return -EINVAL;
    int r = 0;
    for (uint64_t at = lo; at < hi && !r;) {
        uint64_t b = (at - w->start) / ZB_BLOCK, block_at = w->start + b * ZB_BLOCK;
        uint64_t stop = block_at + ZB_BLOCK < hi ? block_at + ZB_BLOCK : hi;
        unsigned p = (unsigned)((at - block_at) / ZB_PAGE);
        unsigned q = (unsigned)((stop - block_at + ZB_PAGE - 1) / ZB_PAGE);
        zb_lock(&s->lock); /* block by block: others need not wait for all of a large write */
        if (s->closed || s->forked)
            r = -ENOTCONN;
        else if (!source && zb_unfilled(w->table[b]))
            r = -EAGAIN;
        else
            r = zb_dirty_pages(w, b, p, q, source ? (const char *)source + (at - lo) : NULL);
        zb_unlock(&s->lock);
        at = stop;
    }
    return r;
}
