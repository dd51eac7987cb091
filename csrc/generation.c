/* SPDX-License-Identifier: MIT
 * generation.c - the end of a generation: its pages become somebody's, or are forgotten. */
#include "internal.h"

#include <stdlib.h>

static void end_generation(zb_space *s, uint64_t *first, uint64_t *last)
{
    *first = s->first_file;
    *last = s->fd >= 0 ? s->file + 1 : s->file;
    s->ended = s->fd >= 0 ? s->in_file : 0;
    if (s->fd >= 0 || s->resumed) { /* (a file that was to be resumed, and was not, has its number) */
        if (s->fd >= 0) close(s->fd);
        s->fd = -1;
        s->file++;
    }
    s->first_file = s->file;
    s->in_file = 0;
    s->resumed = 0;
    s->nslots = 0;
    s->dirty_pages = 0;
}

static size_t count_runs(const zb_space *s)
{
    size_t n = 0;
    for (size_t i = 0; i < s->nslots; i++)
        for (unsigned p = 0, q; p < ZB_PAGES_PER_BLOCK; p = q) {
            q = zb_same(&s->slots[i], p, ZB_PAGES_PER_BLOCK);
            n += zb_is_dirty(&s->slots[i], p);
        }
    return n;
}

static int by_start(const void *a, const void *b)
{
    uint64_t x = ((const zb_run *)a)->start, y = ((const zb_run *)b)->start;
    return (x > y) - (x < y);
}

static size_t join_runs(zb_run *runs, size_t n)
{
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        zb_run *last = k ? &runs[k - 1] : NULL;
        if (last && last->stop == runs[i].start && last->file == runs[i].file &&
            last->offset + (last->stop - last->start) == runs[i].offset)
            last->stop = runs[i].stop;
        else
            runs[k++] = runs[i];
    }
    return k;
}

/* Give the dirty pages of a slot this protection, in every window. */
static int protect_slot(zb_space *s, const zb_slot *slot, int prot)
{
    uint64_t at = slot->block * ZB_BLOCK;
    for (zb_window *w = s->windows; w; w = w->next) {
        if (at < w->start || at >= w->start + w->blocks * ZB_BLOCK) continue;
        for (unsigned p = 0, q; p < ZB_PAGES_PER_BLOCK; p = q) {
            q = zb_same(slot, p, ZB_PAGES_PER_BLOCK);
            if (!zb_is_dirty(slot, p)) continue;
            if (mprotect(w->base + (at - w->start) + p * ZB_PAGE, (q - p) * ZB_PAGE, prot)) return -errno;
        }
    }
    return 0;
}

int zb_freeze(zb_space *s, zb_run **runs, size_t *n, uint64_t *first, uint64_t *last)
{
    zb_run *out = NULL;
    size_t room = 0, k = 0;
    int r = 0;
    for (;;) {
        zb_lock(&s->lock);
        size_t need = count_runs(s);
        if (need <= room) break; /* with the lock held */
        zb_unlock(&s->lock);
        free(out);
        room = need + 16;
        out = malloc(room * sizeof *out);
        if (!out) return -ENOMEM;
    }
    if (s->forked || s->error) {
        r = s->forked ? -ENOTCONN : -s->error;
        goto out;
    }
    for (size_t i = 0; i < s->nslots && !r; i++) r = protect_slot(s, &s->slots[i], PROT_READ);
    if (r) { /* nothing is frozen, then: what is dirty must be writable */
        for (size_t i = 0; i < s->nslots; i++) protect_slot(s, &s->slots[i], PROT_READ | PROT_WRITE);
        goto out;
    }
    for (size_t i = 0; i < s->nslots; i++) {
        const zb_slot *slot = &s->slots[i];
        uint64_t at = slot->block * ZB_BLOCK;
        for (unsigned p = 0, q; p < ZB_PAGES_PER_BLOCK; p = q) {
            q = zb_same(slot, p, ZB_PAGES_PER_BLOCK);
            if (zb_is_dirty(slot, p))
                out[k++] = (zb_run){at + p * ZB_PAGE, at + q * ZB_PAGE, slot->offset + p * ZB_PAGE, slot->file};
        }
        for (zb_window *w = s->windows; w; w = w->next) {
            if (at < w->start || at >= w->start + w->blocks * ZB_BLOCK) continue;
            uint32_t *e = &w->table[(at - w->start) / ZB_BLOCK];
            *e = ZB_ENTRY(0, ZB_KIND(*e) == ZB_HOLE ? ZB_CLEAN : ZB_KIND(*e));
        }
    }
    end_generation(s, first, last);
    s->epoch++; /* what a fill was planned on does not have these pages yet */
    zb_changed(s);
out:
    zb_unlock(&s->lock);
    if (r) {
        free(out);
        return r;
    }
    if (k) qsort(out, k, sizeof *out, by_start);
    *n = join_runs(out, k);
    *runs = out;
    return 0;
}

void zb_runs_free(zb_run *runs)
{
    free(runs);
}

int zb_resume(zb_space *s, uint64_t file)
{
    int r = 0;
    zb_lock(&s->lock);
    if (s->fd >= 0 || s->file != s->first_file || s->resumed)
        r = -EBUSY;
    else if (!s->ended || file + 1 != s->file)
        r = -EINVAL;
    else if (s->ended == ZB_SLOTS_PER_FILE)
        r = -ENOSPC;
    else {
        s->resumed = s->ended;
        s->first_file = s->file = file;
    }
    zb_unlock(&s->lock);
    return r;
}

int zb_discard(zb_space *s, uint64_t *first, uint64_t *last)
{
    int r = 0;
    zb_wait_again();
    zb_lock(&s->lock);
    if (s->forked) {
        zb_unlock(&s->lock);
        return -ENOTCONN; /* the files are the parent's */
    }
    for (size_t i = 0; i < s->nslots; i++) {
        uint64_t block = s->slots[i].block;
        zb_set_slot(s, block, 0);
        for (zb_window *w = s->windows; w; w = w->next) {
            uint64_t b = block - w->start / ZB_BLOCK;
            if (block < w->start / ZB_BLOCK || b >= w->blocks) continue;
            int e = zb_block_absent(w, b);
            if (e && !r) r = e;
        }
    }
    for (zb_window *w = s->spoiled ? s->windows : NULL; w; w = w->next)
        for (uint64_t b = 0; b < w->blocks; b++)
            if (ZB_KIND(w->table[b]) != ZB_ABSENT) {
                int e = zb_block_absent(w, b);
                if (e && !r) r = e;
            }
    for (zb_window *w = s->windows; w; w = w->next) zb_dry(w);
    zb_spare_make();
    end_generation(s, first, last);
    s->ended = 0; /* its files are to go */
    s->error = 0;
    s->spoiled = false;
    s->epoch++;
    zb_unlock(&s->lock);
    zb_wake(s);
    return r;
}
