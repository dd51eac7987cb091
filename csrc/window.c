/* SPDX-License-Identifier: MIT
 * window.c - spaces and windows: address ranges, what each block is, filling and dropping clean blocks. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>

struct zb_globals zb_g = {.poison_fd = -1};
__thread uint32_t zb_busy __attribute__((tls_model("initial-exec")));

/* -- address space -------------------------------------------------------------------------------------------- */

ZB_IN_HANDLER static int map_none(char *at, size_t len)
{
    void *p = mmap(at, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return p == MAP_FAILED ? -errno : 0;
}

ZB_IN_HANDLER static inline char *address(const zb_window *w, uint64_t position)
{
    return w->base + (position - w->start);
}

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

/* -- fork ----------------------------------------------------------------------------------------------------- */

static void fork_prepare(void)
{
    zb_lock(&zb_g.registry_lock);
}

static void fork_parent(void)
{
    zb_unlock(&zb_g.registry_lock);
}

/* The child shares the parent's scratch files: no page of them may stay writable here, nor can anything be
 * loaded. So every window goes dark; touching one says why and is a plain SIGSEGV. */
static void fork_child(void)
{
    for (size_t i = 0; i < zb_g.nwindows; i++) {
        zb_window *w = zb_g.registry[i];
        map_none(w->base, w->blocks * ZB_BLOCK);
    }
    for (zb_space *s = zb_g.spaces; s; s = s->next) {
        s->forked = true;
        s->lock = 0;
        if (s->fd >= 0) close(s->fd);
        s->fd = -1;
    }
    zb_request_fork();
    zb_g.registry_lock = 0;
    zb_busy = 0;
}

/* -- process -------------------------------------------------------------------------------------------------- */

static int make_poison(void)
{
    int fd = memfd_create("zbig-poison", MFD_CLOEXEC);
    if (fd < 0) return -errno;
    unsigned char page[ZB_PAGE];
    memset(page, 0xFF, sizeof page);
    for (size_t done = 0; done < ZB_BLOCK;) {
        ssize_t n = write(fd, page, sizeof page);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            int e = n < 0 ? errno : EIO;
            close(fd);
            return -e;
        }
        done += (size_t)n;
    }
    zb_g.poison_fd = fd;
    return 0;
}

int zb_init(const zb_hooks *hooks)
{
    if (zb_g.initialised) return 0;
    int r = make_poison();
    if (r) return r;
    r = pthread_atfork(fork_prepare, fork_parent, fork_child);
    if (r) return -r;
    zb_g.hooks = *hooks;
    zb_g.initialised = true;
    return 0;
}

int zb_poison_fd(void)
{
    return zb_g.poison_fd;
}

void zb_shutdown(void)
{
    atomic_store(&zb_g.shut, true);
    zb_request_shutdown();
    zb_lock(&zb_g.registry_lock);
    for (size_t i = 0; i < zb_g.nwindows; i++) zb_wake(zb_g.registry[i]->space);
    zb_unlock(&zb_g.registry_lock);
}

void zb_counters(zb_count *out)
{
#define GET(name) out->name = atomic_load_explicit(&zb_g.count.name, memory_order_relaxed)
    GET(read_faults);
    GET(write_faults);
    GET(bus_faults);
    GET(spurious);
    GET(chained);
    GET(waits);
    GET(fills);
    GET(stale_fills);
    GET(bytes_copied);
    GET(overflows);
    GET(mappings);
#undef GET
}

void zb_mappings_set(uint64_t n)
{
    zb_lock(&zb_g.registry_lock);
    for (size_t i = 0; i < zb_g.nwindows; i++) { /* n has what they counted; freeing them must not take it off */
        zb_window *w = zb_g.registry[i];
        zb_lock(&w->space->lock);
        w->maps = 0;
        zb_unlock(&w->space->lock);
    }
    atomic_store_explicit(&zb_g.count.mappings, n, memory_order_relaxed);
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
        void *m = mmap(address(w, lo), stop - lo, PROT_READ, MAP_FIXED | how, p->fd < 0 ? -1 : (int)p->fd,
                       p->fd < 0 ? 0 : p->offset + (int64_t)(lo - p->start));
        if (m == MAP_FAILED) return -errno;
        zb_counted(w, 1);
        lo = stop;
    }
    return 0;
}

/* Whether the block at `at` is a hole as a whole, by the pieces from c->i on. */
static bool hole_at(const cursor *c, size_t *i, uint64_t at)
{
    while (*i < c->n && c->pieces[*i].stop <= at) ++*i;
    return *i < c->n && c->pieces[*i].fd < 0 && c->pieces[*i].start <= at && c->pieces[*i].stop >= at + ZB_BLOCK;
}

static inline bool unfilled(uint32_t e)
{
    return ZB_KIND(e) == ZB_ABSENT || ZB_KIND(e) == ZB_FILLING;
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
        if (r) map_none(w->base + b * ZB_BLOCK, (end - b) * ZB_BLOCK);
    } else {
        const zb_slot *slot = &w->space->slots[slotno - 1];
        for (unsigned p = 0, q; p < ZB_PAGES_PER_BLOCK && !r; p = q) {
            q = zb_same(slot, p, ZB_PAGES_PER_BLOCK);
            if (zb_is_dirty(slot, p)) continue;
            r = map_pieces(w, c, at + p * ZB_PAGE, at + q * ZB_PAGE);
            if (r) map_none(address(w, at + p * ZB_PAGE), (q - p) * ZB_PAGE);
        }
    }
    for (; b < end; b++, at += ZB_BLOCK) {
        int kind = r ? ZB_ABSENT : hole_at(c, &i, at) ? ZB_HOLE : ZB_CLEAN;
        w->table[b] = ZB_ENTRY(ZB_SLOT(w->table[b]), kind);
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
    cursor c = {pieces, n, 0};
    for (uint64_t b = (lo - w->start) / ZB_BLOCK, end = (hi - w->start) / ZB_BLOCK; b < end && !r;) {
        if (!unfilled(w->table[b])) {
            b++;
            continue;
        }
        uint64_t e = b + 1;
        if (!ZB_SLOT(w->table[b]))
            while (e < end && unfilled(w->table[e]) && !ZB_SLOT(w->table[e])) e++;
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

/* The part of a piece in one window, block by block. */
static int remap_in(zb_window *w, const zb_piece *p)
{
    uint64_t w_end = w->start + w->blocks * ZB_BLOCK;
    uint64_t lo = p->start > w->start ? p->start : w->start, hi = p->stop < w_end ? p->stop : w_end;
    cursor c = {p, 1, 0};
    int r = 0;
    if (lo < hi) zb_counted(w, 1); /* of what is cut off at the end */
    for (uint64_t next; lo < hi && !r; lo = next) {
        uint64_t b = (lo - w->start) / ZB_BLOCK, at = w->start + b * ZB_BLOCK;
        next = at + ZB_BLOCK < hi ? at + ZB_BLOCK : hi;
        uint32_t e = w->table[b];
        if (unfilled(e)) continue;
        w->table[b] = ZB_ENTRY(ZB_SLOT(e), ZB_CLEAN);
        if (!ZB_SLOT(e)) {
            r = map_pieces(w, &c, lo, next);
            continue;
        }
        const zb_slot *slot = &w->space->slots[ZB_SLOT(e) - 1];
        unsigned end = (unsigned)((next - at) / ZB_PAGE);
        for (unsigned k = (unsigned)((lo - at) / ZB_PAGE), q; k < end && !r; k = q) {
            q = zb_same(slot, k, end);
            if (!zb_is_dirty(slot, k)) r = map_pieces(w, &c, at + k * ZB_PAGE, at + q * ZB_PAGE);
        }
    }
    return r;
}

int zb_remap(zb_space *s, const zb_piece *pieces, size_t n)
{
    for (size_t k = 0; k < n; k++)
        if (pieces[k].start % ZB_PAGE || pieces[k].stop % ZB_PAGE || pieces[k].offset % (int64_t)ZB_PAGE)
            return -EINVAL;
    zb_lock(&s->lock);
    int r = s->forked ? -ENOTCONN : 0;
    for (zb_window *w = s->windows; w && !r; w = w->next)
        for (size_t k = 0; k < n && !r; k++) r = remap_in(w, &pieces[k]);
    zb_unlock(&s->lock);
    return r;
}

static uint64_t scan(zb_window *w, uint64_t lo, uint64_t hi, bool want_unfilled)
{
    uint64_t b = (lo - w->start) / ZB_BLOCK, end = (hi - w->start + ZB_BLOCK - 1) / ZB_BLOCK;
    zb_lock(&w->space->lock);
    while (b < end && b < w->blocks && unfilled(w->table[b]) != want_unfilled) b++;
    zb_unlock(&w->space->lock);
    return w->start + b * ZB_BLOCK;
}

uint64_t zb_absent(zb_window *w, uint64_t lo, uint64_t hi)
{
    return scan(w, lo, hi, true);
}

uint64_t zb_present(zb_window *w, uint64_t lo, uint64_t hi)
{
    return scan(w, lo, hi, false);
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
    if (!slotno) return map_none(at, ZB_BLOCK);
    const zb_slot *slot = &w->space->slots[slotno - 1];
    for (unsigned p = 0, q; p < ZB_PAGES_PER_BLOCK && !r; p = q) {
        q = zb_same(slot, p, ZB_PAGES_PER_BLOCK);
        if (!zb_is_dirty(slot, p)) r = map_none(at + p * ZB_PAGE, (q - p) * ZB_PAGE);
    }
    return r;
}

static inline bool droppable(uint32_t e, unsigned flags)
{
    return flags & ZB_DROP_HOLES ? ZB_KIND(e) == ZB_HOLE : ZB_KIND(e) != ZB_ABSENT;
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
            r = map_none(w->base + b * ZB_BLOCK, (e - b) * ZB_BLOCK);
            zb_counted(w, 2);
            if (!r)
                for (uint64_t k = b; k < e; k++) w->table[k] = ZB_ABSENT;
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
