/* SPDX-License-Identifier: MIT
 * window.c - the life of spaces and windows, and finding them by address. */
#include "internal.h"

#include <stdlib.h>

/* -- registry ------------------------------------------------------------------------------------------------- */

/* The index of the first window whose base is above `address`. */
ZB_IN_HANDLER static size_t registry_above(const char *at)
{
    size_t lo = 0, hi = zb_g.nwindows;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (zb_g.registry[mid]->base <= at)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

ZB_IN_HANDLER zb_space *zb_find_space(const char *at)
{
    zb_space *s = NULL;
    zb_lock(&zb_g.registry_lock);
    size_t i = registry_above(at);
    if (i > 0) {
        zb_window *w = zb_g.registry[i - 1];
        if (at < w->base + w->blocks * ZB_BLOCK) {
            s = w->space;
            atomic_fetch_add(&s->refs, 1);
        }
    }
    zb_unlock(&zb_g.registry_lock);
    return s;
}

ZB_IN_HANDLER zb_window *zb_find_window(zb_space *s, const char *at)
{
    for (zb_window *w = s->windows; w; w = w->next)
        if (at >= w->base && at < w->base + w->blocks * ZB_BLOCK) return w;
    return NULL;
}

static int registry_add(zb_window *w)
{
    int r = 0;
    zb_lock(&zb_g.registry_lock);
    if (zb_g.nwindows == zb_g.registry_cap) {
        size_t old = zb_g.registry_cap * sizeof *zb_g.registry, cap = old ? 2 * old : 16 * ZB_PAGE;
        void *p = old ? mremap(zb_g.registry, old, cap, MREMAP_MAYMOVE)
                      : mmap(NULL, cap, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) {
            r = -errno;
            goto out;
        }
        zb_g.registry = p;
        zb_g.registry_cap = cap / sizeof *zb_g.registry;
    }
    size_t i = registry_above(w->base);
    memmove(zb_g.registry + i + 1, zb_g.registry + i, (zb_g.nwindows - i) * sizeof *zb_g.registry);
    zb_g.registry[i] = w;
    zb_g.nwindows++;
out:
    zb_unlock(&zb_g.registry_lock);
    return r;
}

static void registry_remove(zb_window *w)
{
    zb_lock(&zb_g.registry_lock);
    size_t i = registry_above(w->base);
    if (i > 0 && zb_g.registry[i - 1] == w) {
        memmove(zb_g.registry + i - 1, zb_g.registry + i, (zb_g.nwindows - i) * sizeof *zb_g.registry);
        zb_g.nwindows--;
    }
    zb_unlock(&zb_g.registry_lock);
}

/* -- spaces --------------------------------------------------------------------------------------------------- */

int zb_space_new(zb_space **out, uint64_t id, const char *directory, const char *prefix)
{
    if (!zb_g.initialised) return -EINVAL;
    zb_space *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (s == MAP_FAILED) return -errno;
    atomic_store(&s->refs, 1);
    s->id = id;
    s->fd = -1;
    int r = zb_space_scratch(s, directory);
    if (!r && strlen(prefix) >= sizeof s->prefix) r = -ENAMETOOLONG;
    if (r) {
        munmap(s, sizeof *s);
        return r;
    }
    strcpy(s->prefix, prefix);
    zb_lock(&zb_g.registry_lock);
    s->next = zb_g.spaces;
    zb_g.spaces = s;
    zb_unlock(&zb_g.registry_lock);
    *out = s;
    return 0;
}

int zb_space_scratch(zb_space *s, const char *directory)
{
    /* room for "/prefix-18446744073709551615" */
    if (strlen(directory) + sizeof s->prefix + 24 > ZB_PATH) return -ENAMETOOLONG;
    int r = 0;
    zb_lock(&s->lock);
    if (s->fd >= 0 || s->file != s->first_file)
        r = -EBUSY; /* the generation's files are opened again by name */
    else
        strcpy(s->directory, directory);
    zb_unlock(&s->lock);
    return r;
}

void zb_space_transient(zb_space *s, int transient)
{
    zb_lock(&s->lock);
    s->transient = transient;
    zb_unlock(&s->lock);
}

void zb_space_limit(zb_space *s, uint64_t bytes)
{
    zb_lock(&s->lock);
    s->limit = bytes;
    zb_unlock(&s->lock);
}

void zb_space_close(zb_space *s)
{
    zb_lock(&s->lock);
    s->closed = true;
    zb_unlock(&s->lock);
    zb_wake(s);
}

ZB_IN_HANDLER void zb_space_unref(zb_space *s)
{
    if (atomic_fetch_sub(&s->refs, 1) != 1) return;
    zb_lock(&zb_g.registry_lock);
    for (zb_space **p = &zb_g.spaces; *p; p = &(*p)->next)
        if (*p == s) {
            *p = s->next;
            break;
        }
    zb_unlock(&zb_g.registry_lock);
    zb_slots_free(s);
    munmap(s, sizeof *s);
}

void zb_space_free(zb_space *s)
{
    zb_space_unref(s);
}

uint64_t zb_space_epoch(zb_space *s)
{
    zb_lock(&s->lock);
    uint64_t epoch = s->epoch;
    zb_unlock(&s->lock);
    return epoch;
}

int zb_space_error(zb_space *s)
{
    zb_lock(&s->lock);
    int e = s->error;
    zb_unlock(&s->lock);
    return e;
}

void zb_space_fail(zb_space *s, int error)
{
    zb_lock(&s->lock);
    if (!s->error) s->error = error;
    zb_unlock(&s->lock);
}

uint64_t zb_space_dirty(zb_space *s)
{
    zb_lock(&s->lock);
    uint64_t n = s->dirty_pages;
    zb_unlock(&s->lock);
    return n;
}

ZB_IN_HANDLER void zb_wake(zb_space *s)
{
    atomic_fetch_add_explicit(&s->seq, 1, memory_order_release);
    zb_futex_wake(&s->seq, INT_MAX);
}

/* -- windows -------------------------------------------------------------------------------------------------- */

int zb_window_new(zb_window **out, zb_space *s, uint64_t start, uint64_t length)
{
    int r = 0;
    if (start % ZB_BLOCK || length == 0 || length > 1ULL << 62 || start > (1ULL << 63) - length) return -EINVAL;
    zb_window *w = calloc(1, sizeof *w);
    if (!w) return -ENOMEM;
    w->space = s;
    w->start = start;
    w->blocks = (length + ZB_BLOCK - 1) / ZB_BLOCK;
    w->reserved = MAP_FAILED;
    w->table = MAP_FAILED;
    w->reserved_len = (w->blocks + 1) * ZB_BLOCK;
    w->reserved = mmap(NULL, w->reserved_len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (w->reserved == MAP_FAILED) {
        r = -errno;
        goto fail;
    }
    w->base = (char *)(((uintptr_t)w->reserved + ZB_BLOCK - 1) & ~(uintptr_t)(ZB_BLOCK - 1));
    w->table = mmap(NULL, w->blocks * sizeof *w->table, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (w->table == MAP_FAILED) {
        r = -errno;
        goto fail;
    }
    /* Where all of a terabyte is viewed the table is gone through: not in 512 faults. (If not, it is as it was.) */
    if (w->blocks * sizeof *w->table >= ZB_BLOCK) madvise(w->table, w->blocks * sizeof *w->table, MADV_HUGEPAGE);
    r = registry_add(w);
    if (r) goto fail;
    zb_lock(&s->lock);
    r = s->forked ? -ENOTCONN : zb_adopt_dirty(w);
    if (!r) {
        w->next = s->windows;
        s->windows = w;
        zb_counted(w, 2);
    } else {
        atomic_fetch_sub_explicit(&zb_g.count.mappings, w->maps, memory_order_relaxed);
    }
    zb_unlock(&s->lock);
    if (r) {
        registry_remove(w);
        goto fail;
    }
    atomic_fetch_add(&s->refs, 1);
    *out = w;
    return 0;
fail:
    if (w->table != MAP_FAILED) munmap(w->table, w->blocks * sizeof *w->table);
    if (w->reserved != MAP_FAILED) munmap(w->reserved, w->reserved_len);
    free(w);
    return r;
}

char *zb_window_base(zb_window *w)
{
    return w->base;
}

void zb_window_free(zb_window *w)
{
    zb_space *s = w->space;
    registry_remove(w);
    zb_lock(&s->lock);
    for (zb_window **p = &s->windows; *p; p = &(*p)->next)
        if (*p == w) {
            *p = w->next;
            break;
        }
    atomic_fetch_sub_explicit(&zb_g.count.mappings, w->maps, memory_order_relaxed);
    zb_unlock(&s->lock);
    munmap(w->table, w->blocks * sizeof *w->table);
    munmap(w->reserved, w->reserved_len);
    free(w);
    zb_wake(s);
    zb_space_unref(s);
}
