/* SPDX-License-Identifier: MIT
 * block.c - what a window's clean blocks are mapped from: filling and dropping them. */
#include "internal.h"

/* -- filling -------------------------------------------------------------------------------------------------- */

typedef struct {
    const zb_piece *pieces;
    size_t n, i; /* i: the first piece that may still matter; positions only go up */
} cursor;

/* Map [lo, hi), which has no dirty page, by the pieces that cover it. */
static int map_pieces(zb_window *w, cursor *c, uint64_t lo, uint64_t hi)
{
    while (lo < hi) {
        while (c->i < c->n && c->pieces[c->i].stop <= lo) c->i++;
        if (c->i == c->n || c->pieces[c->i].start > lo) return -EINVAL;
        const zb_piece *p = &c->pieces[c->i];
        uint64_t stop = p->stop < hi ? p->stop : hi;
        int how = p->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
        void *m = mmap(zb_address(w, lo), stop - lo, PROT_READ, MAP_FIXED | how, p->fd < 0 ? -1 : (int)p->fd,
                       p->fd < 0 ? 0 : p->offset + (int64_t)(lo - p->start));
        if (m == MAP_FAILED) return -errno;
        zb_counted(w, 1);
        lo = stop;
    }
    return 0;
}

/* How many blocks from `at` on are holes as a whole, by the piece that has `at`: from number *i on. */
static uint64_t holes_at(const cursor *c, size_t *i, uint64_t at)
{
    while (*i < c->n && c->pieces[*i].stop <= at) ++*i;
    bool hole = *i < c->n && c->pieces[*i].fd < 0 && c->pieces[*i].start <= at;
    return hole ? (c->pieces[*i].stop - at) / ZB_BLOCK : 0;
}

/* Map the blocks [b, end) of the window, all unfilled; only a single one may have dirty pages. */
static int fill_run(zb_window *w, cursor *c, uint64_t b, uint64_t end)
{
    int r = 0;
    uint64_t at = w->start + b * ZB_BLOCK;
    uint32_t slotno = ZB_SLOT(w->table[b]);
    size_t i = c->i;
    zb_counted(w, 2); /* of what is absent on both sides */
    if (!slotno) {
        r = map_pieces(w, c, at, w->start + end * ZB_BLOCK);
        if (r) zb_map_none(w->base + b * ZB_BLOCK, (end - b) * ZB_BLOCK);
    } else {
        const zb_slot *slot = &w->space->slots[slotno - 1];
        for (unsigned p = 0, q; p < ZB_PAGES_PER_BLOCK && !r; p = q) {
            q = zb_same(slot, p, ZB_PAGES_PER_BLOCK);
            if (zb_is_dirty(slot, p)) continue;
            r = map_pieces(w, c, at + p * ZB_PAGE, at + q * ZB_PAGE);
            if (r) zb_map_none(zb_address(w, at + p * ZB_PAGE), (q - p) * ZB_PAGE);
        }
    }
    for (uint64_t n; b < end; b += n, at += n * ZB_BLOCK) { /* a hole may be of very many blocks */
        uint64_t holes = r ? 0 : holes_at(c, &i, at);
        uint32_t kind = r ? ZB_ABSENT : holes ? ZB_HOLE : ZB_CLEAN;
        n = !holes ? 1 : holes < end - b ? holes : end - b;
        for (uint64_t k = b; k < b + n; k++) w->table[k] = ZB_ENTRY(ZB_SLOT(w->table[k]), kind);
    }
    return r;
}

/* A fill came to nothing: who waits for these blocks must ask for them again. */
static void not_filled(zb_window *w, uint64_t lo, uint64_t hi)
{
    for (uint64_t b = (lo - w->start) / ZB_BLOCK, end = (hi - w->start) / ZB_BLOCK; b < end; b++)
        if (ZB_KIND(w->table[b]) == ZB_FILLING) w->table[b] = ZB_ENTRY(ZB_SLOT(w->table[b]), ZB_ABSENT);
}

int zb_fill(zb_window *w, uint64_t epoch, uint64_t lo, uint64_t hi, const zb_piece *pieces, size_t n)
{
    zb_space *s = w->space;
    if (lo % ZB_BLOCK || hi % ZB_BLOCK || lo < w->start || hi < lo || hi > w->start + w->blocks * ZB_BLOCK)
        return -EINVAL;
    for (size_t k = 0; k < n; k++)
        if (pieces[k].start % ZB_PAGE || pieces[k].stop % ZB_PAGE || pieces[k].start >= pieces[k].stop ||
            (k && pieces[k].start < pieces[k - 1].stop) || (pieces[k].fd >= 0 && pieces[k].offset % (int64_t)ZB_PAGE))
            return -EINVAL;
    int r = 0;
    zb_lock(&s->lock);
    if (s->forked) {
        r = -ENOTCONN;
        goto out;
    }
    if (s->epoch != epoch) {
        ZB_COUNT(stale_fills, 1);
        r = -ESTALE;
        goto out;
    }
    for (size_t k = 0; k < n; k++)
        if (pieces[k].fd == zb_g.poison_fd) s->poisonings++;
    cursor c = {pieces, n, 0};
    for (uint64_t b = (lo - w->start) / ZB_BLOCK, end = (hi - w->start) / ZB_BLOCK; b < end && !r;) {
        if (!zb_unfilled(w->table[b])) {
            b++;
            continue;
        }
        uint64_t e = b + 1;
        if (!ZB_SLOT(w->table[b]))
            while (e < end && zb_unfilled(w->table[e]) && !ZB_SLOT(w->table[e])) e++;
        r = fill_run(w, &c, b, e);
        b = e;
    }
    ZB_COUNT(fills, 1);
out:
    if (r) not_filled(w, lo, hi);
    zb_unlock(&s->lock);
    zb_wake(s);
    return r;
}

#define STRIDE 16u

/* Whether not one of STRIDE entries is (un)filled, as is wanted. Compilers make vectors of this. */
static bool none_of(const uint32_t *table, bool want_unfilled)
{
    uint32_t flip = want_unfilled ? 0 : UINT32_MAX, found = 0;
    for (unsigned k = 0; k < STRIDE; k++) found |= ~(table[k] ^ flip) & ZB_FILLED;
    return !found;
}

static uint64_t scan(zb_window *w, uint64_t lo, uint64_t hi, bool want_unfilled)
{
    uint64_t b = (lo - w->start) / ZB_BLOCK, end = (hi - w->start + ZB_BLOCK - 1) / ZB_BLOCK;
    if (end > w->blocks) end = w->blocks;
    zb_lock(&w->space->lock);
    while (b + STRIDE <= end && none_of(w->table + b, want_unfilled)) b += STRIDE;
    while (b < end && zb_unfilled(w->table[b]) != want_unfilled) b++;
    zb_unlock(&w->space->lock);
    return w->start + b * ZB_BLOCK;
}

int zb_lost(zb_window *w, int error)
{
    zb_lock(&w->space->lock);
    bool done = !w->space->forked && (w->drowned || zb_drown(w, error));
    zb_unlock(&w->space->lock);
    zb_wake(w->space);
    return done ? 0 : -ENOMEM;
}

uint64_t zb_absent(zb_window *w, uint64_t lo, uint64_t hi)
{
    return scan(w, lo, hi, true);
}

uint64_t zb_present(zb_window *w, uint64_t lo, uint64_t hi)
{
    return scan(w, lo, hi, false);
}

int zb_ready(zb_window *w, uint64_t lo, uint64_t hi)
{
    int r = zb_handlers();
    if (r) return r;
    if (w->space->forked) return 0;
    return scan(w, lo, hi, true) >= hi;
}

int zb_release(zb_window *w)
{
    int r = 0;
    zb_lock(&w->space->lock);
    /* Private pages of a failed generation exist nowhere else. Everything else is in files. */
    if (!w->space->error && madvise(w->base, w->blocks * ZB_BLOCK, MADV_DONTNEED)) r = -errno;
    zb_unlock(&w->space->lock);
    return r;
}

/* -- dropping ------------------------------------------------------------------------------------------------- */

/* Make one block absent, but for its dirty pages. */
ZB_IN_HANDLER int zb_block_absent(zb_window *w, uint64_t b)
{
    int r = 0;
    uint32_t slotno = ZB_SLOT(w->table[b]);
    char *at = w->base + b * ZB_BLOCK;
    w->table[b] = ZB_ENTRY(slotno, ZB_ABSENT);
    zb_counted(w, 2);
    if (!slotno) return zb_map_none(at, ZB_BLOCK);
    const zb_slot *slot = &w->space->slots[slotno - 1];
    for (unsigned p = 0, q; p < ZB_PAGES_PER_BLOCK && !r; p = q) {
        q = zb_same(slot, p, ZB_PAGES_PER_BLOCK);
        if (!zb_is_dirty(slot, p)) r = zb_map_none(at + p * ZB_PAGE, (q - p) * ZB_PAGE);
    }
    return r;
}

/* An absent block may show some pages: what was dirty in it before a freeze. */
static inline bool droppable(uint32_t e, unsigned flags)
{
    return !(flags & ZB_DROP_HOLES) || ZB_KIND(e) == ZB_HOLE;
}

static int drop_in(zb_window *w, uint64_t lo, uint64_t hi, unsigned flags)
{
    uint64_t w_end = w->start + w->blocks * ZB_BLOCK;
    if (lo < w->start) lo = w->start;
    if (hi > w_end) hi = w_end;
    if (lo >= hi) return 0;
    uint64_t b = (lo - w->start) / ZB_BLOCK, end = (hi - w->start + ZB_BLOCK - 1) / ZB_BLOCK;
    while (b < end) {
        if (!droppable(w->table[b], flags)) {
            b++;
            continue;
        }
        int r;
        uint64_t e = b + 1;
        if (ZB_SLOT(w->table[b])) {
            r = zb_block_absent(w, b);
        } else {
            while (e < end && droppable(w->table[e], flags) && !ZB_SLOT(w->table[e])) e++;
            r = zb_map_none(w->base + b * ZB_BLOCK, (e - b) * ZB_BLOCK);
            zb_counted(w, 2);
            for (uint64_t k = b; k < e && !r; k++)
                if (w->table[k] != ZB_ABSENT) w->table[k] = ZB_ABSENT; /* (a large table is mostly untouched memory) */
        }
        if (r) return r;
        b = e;
    }
    return 0;
}

int zb_drop(zb_space *s, uint64_t lo, uint64_t hi, unsigned flags)
{
    int r = 0;
    zb_lock(&s->lock);
    s->epoch++;
    for (zb_window *w = s->windows; w && !r; w = w->next) r = drop_in(w, lo, hi, flags);
    zb_unlock(&s->lock);
    zb_wake(s);
    return r;
}
