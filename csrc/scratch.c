/* SPDX-License-Identifier: MIT
 * scratch.c - dirty pages: a private file under the pages that were written, one generation after the other.
 *
 * A block that is written gets a slot: ZB_BLOCK bytes of a scratch file, so that a page lies in the file at the
 * same offset modulo ZB_BLOCK as in memory. Only the pages that are dirty are written there: one pwrite copies
 * their old bytes (the kernel reads them from the clean mapping, or from our zeros for a hole), which allocates
 * the file's blocks too - a full disk is pwrite's return value, never a SIGBUS later - and makes large folios. */
#include "internal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>

static const char zeros[ZB_BLOCK];

/* With this many mappings in the process a random write dirties more than its page: see min_unit(). */
#define MANY_MAPPINGS 16000u
#define TOO_MANY_MAPPINGS 28000u

ZB_IN_HANDLER static unsigned first_bit(uint64_t word)
{
    return (unsigned)__builtin_ctzll(word);
}

ZB_IN_HANDLER unsigned zb_same(const zb_slot *slot, unsigned page, unsigned end)
{
    uint64_t flip = zb_is_dirty(slot, page) ? UINT64_MAX : 0; /* look for the first bit that differs */
    while (page < end) {
        uint64_t word = (slot->bits[page / 64] ^ flip) >> (page % 64);
        if (word) {
            page += first_bit(word);
            return page < end ? page : end;
        }
        page = (page / 64 + 1) * 64;
    }
    return end;
}

/* -- files ---------------------------------------------------------------------------------------------------- */

ZB_IN_HANDLER static void file_path(const zb_space *s, uint64_t number, char *out)
{
    size_t n = strlen(s->directory);
    memcpy(out, s->directory, n);
    out[n++] = '/';
    size_t m = strlen(s->prefix);
    memcpy(out + n, s->prefix, m);
    n += m;
    out[n++] = '-';
    char digits[24];
    int d = 0;
    do digits[d++] = (char)('0' + number % 10);
    while (number /= 10);
    while (d) out[n++] = digits[--d];
    out[n] = 0;
}

ZB_IN_HANDLER static int open_file(zb_space *s, uint64_t number, int flags)
{
    file_path(s, number, s->path);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, s->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | flags, 0600);
    return fd < 0 ? -errno : fd;
}

ZB_IN_HANDLER static int full_pwrite(int fd, const char *from, size_t len, uint64_t offset)
{
    while (len) {
        ssize_t n = pwrite(fd, from, len, (off_t)offset);
        if (n < 0) {
            if (errno == EINTR) continue;
            return -errno;
        }
        if (n == 0) return -EIO;
        from += n;
        offset += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

/* -- slots ---------------------------------------------------------------------------------------------------- */

ZB_IN_HANDLER static int slots_room(zb_space *s)
{
    if (s->nslots < s->slots_cap) return 0;
    size_t old = s->slots_cap * sizeof *s->slots, len = old ? 2 * old : 16 * ZB_PAGE;
    void *p = old ? mremap(s->slots, (old + ZB_PAGE - 1) & ~(ZB_PAGE - 1), len, MREMAP_MAYMOVE)
                  : mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return -errno;
    s->slots = p;
    s->slots_cap = len / sizeof *s->slots;
    return 0;
}

ZB_IN_HANDLER void zb_slots_free(zb_space *s)
{
    if (s->slots) munmap(s->slots, (s->slots_cap * sizeof *s->slots + ZB_PAGE - 1) & ~(ZB_PAGE - 1));
    if (s->fd >= 0) close(s->fd);
    s->slots = NULL;
    s->fd = -1;
}

/* Let every window know that `block`'s dirty pages are in slot number `slotno` (counted from 1; 0: none). */
ZB_IN_HANDLER static void set_slot(zb_space *s, uint64_t block, size_t slotno)
{
    for (zb_window *w = s->windows; w; w = w->next) {
        uint64_t b = block - w->start / ZB_BLOCK;
        if (block >= w->start / ZB_BLOCK && b < w->blocks) w->table[b] = ZB_ENTRY(slotno, ZB_KIND(w->table[b]));
    }
}

ZB_IN_HANDLER static int new_slot(zb_space *s, uint64_t block, bool backed, zb_slot **out)
{
    int r = slots_room(s);
    if (r) return r;
    if (backed && (s->fd < 0 || s->in_file == ZB_SLOTS_PER_FILE)) {
        int fd = open_file(s, s->fd < 0 ? s->file : s->file + 1, O_CREAT | O_EXCL);
        if (fd < 0) return fd;
        if (s->fd >= 0) {
            close(s->fd);
            s->file++;
        }
        s->fd = fd;
        s->in_file = 0;
    }
    zb_slot *slot = &s->slots[s->nslots++];
    memset(slot, 0, sizeof *slot);
    slot->block = block;
    slot->file = backed ? s->file : ZB_NO_FILE;
    slot->offset = backed ? s->in_file++ * ZB_BLOCK : 0;
    set_slot(s, block, s->nslots);
    *out = slot;
    return 0;
}

ZB_IN_HANDLER static void mark_dirty(zb_space *s, zb_slot *slot, unsigned lo, unsigned hi)
{
    for (unsigned p = lo; p < hi; p++) {
        uint64_t bit = 1ULL << (p % 64);
        if (slot->bits[p / 64] & bit) continue;
        slot->bits[p / 64] |= bit;
        s->dirty_pages++;
    }
    zb_changed(s);
}

/* -- mapping -------------------------------------------------------------------------------------------------- */

/* Whether the kernel makes one mapping of this block and the one before. */
ZB_IN_HANDLER static bool continues(const zb_space *s, const zb_slot *slot)
{
    return slot > s->slots && slot[-1].block + 1 == slot->block && slot[-1].file == slot->file;
}

ZB_IN_HANDLER static int show(zb_window *w, const zb_slot *slot, unsigned lo, unsigned hi, int fd)
{
    uint64_t at = slot->block * ZB_BLOCK;
    if (at < w->start || at >= w->start + w->blocks * ZB_BLOCK) return 0;
    void *m = mmap(w->base + (at - w->start) + lo * ZB_PAGE, (hi - lo) * ZB_PAGE, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_FIXED, fd, (off_t)(slot->offset + lo * ZB_PAGE));
    if (m == MAP_FAILED) return -errno;
    if (hi - lo < ZB_PAGES_PER_BLOCK || !continues(w->space, slot)) zb_counted(w, 2);
    return 0;
}

ZB_IN_HANDLER static int slot_fd(zb_space *s, const zb_slot *slot)
{
    return slot->file == s->file && s->fd >= 0 ? s->fd : open_file(s, slot->file, 0);
}

static int show_dirty(zb_window *w, const zb_slot *slot)
{
    int r = 0, fd = slot_fd(w->space, slot);
    if (fd < 0) return fd;
    for (unsigned p = 0, q; p < ZB_PAGES_PER_BLOCK && !r; p = q) {
        q = zb_same(slot, p, ZB_PAGES_PER_BLOCK);
        if (zb_is_dirty(slot, p)) r = show(w, slot, p, q, fd);
    }
    if (fd != w->space->fd) close(fd);
    return r;
}

/* Map a page that is mapped shared at `from` at `to` too. */
ZB_IN_HANDLER static int same_page(const char *from, char *to)
{
    void *m = mremap((void *)(uintptr_t)from, 0, ZB_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    return m == MAP_FAILED ? -errno : 0;
}

/* The dirty pages of a slot that no file backs, as they are in another window. Returns 1, or 0 if no window has
 * them: then they are lost, as the generation is. */
static int mirror_dirty(zb_window *w, size_t slotno)
{
    const zb_slot *slot = &w->space->slots[slotno - 1];
    uint64_t at = slot->block * ZB_BLOCK;
    for (const zb_window *v = w->space->windows; v; v = v->next) {
        if (at < v->start || at >= v->start + v->blocks * ZB_BLOCK) continue;
        if (ZB_SLOT(v->table[(at - v->start) / ZB_BLOCK]) != slotno) continue;
        for (unsigned p = 0; p < ZB_PAGES_PER_BLOCK; p++) {
            if (!zb_is_dirty(slot, p)) continue;
            int r = same_page(v->base + (at - v->start) + p * ZB_PAGE, w->base + (at - w->start) + p * ZB_PAGE);
            if (r) return r;
            zb_counted(w, 2);
        }
        return 1;
    }
    return 0;
}

int zb_adopt_dirty(zb_window *w)
{
    zb_space *s = w->space;
    for (size_t i = 0; i < s->nslots; i++) {
        const zb_slot *slot = &s->slots[i];
        uint64_t at = slot->block * ZB_BLOCK;
        if (at < w->start || at >= w->start + w->blocks * ZB_BLOCK) continue;
        int r = slot->file == ZB_NO_FILE ? mirror_dirty(w, i + 1) : show_dirty(w, slot);
        if (r < 0) return r;
        if (r || slot->file != ZB_NO_FILE) w->table[(at - w->start) / ZB_BLOCK] = ZB_ENTRY(i + 1, ZB_ABSENT);
    }
    return 0;
}

/* Bring pages [lo, hi) of a slot's block into its file: the old bytes of those not dirty, or all of `source`. */
ZB_IN_HANDLER static int copy_in(zb_window *w, const zb_slot *slot, unsigned lo, unsigned hi, int fd,
                                 const char *source)
{
    if (source) return full_pwrite(fd, source, (hi - lo) * ZB_PAGE, slot->offset + lo * ZB_PAGE);
    uint64_t b = slot->block - w->start / ZB_BLOCK;
    bool hole = ZB_KIND(w->table[b]) == ZB_HOLE;
    for (unsigned p = lo, q; p < hi; p = q) {
        q = zb_same(slot, p, hi);
        if (zb_is_dirty(slot, p)) continue;
        const char *old = hole ? zeros : w->base + b * ZB_BLOCK + p * ZB_PAGE;
        int r = full_pwrite(fd, old, (q - p) * ZB_PAGE, slot->offset + p * ZB_PAGE);
        if (r) return r;
        ZB_COUNT(bytes_copied, (q - p) * ZB_PAGE);
    }
    return 0;
}

/* A writer in bulk has come to the next block: let the disk begin with the one before, so that the sync at
 * commit finds most of its work done. A hint: nothing depends on it. */
ZB_IN_HANDLER static void start_writeback(int fd, uint64_t offset)
{
    sync_file_range(fd, (off_t)offset, ZB_BLOCK, SYNC_FILE_RANGE_WRITE);
}

/* Make pages [lo, hi) of block `b` of the window dirty. The block is filled, unless source covers what is asked. */
ZB_IN_HANDLER static int dirty_pages(zb_window *w, uint64_t b, unsigned lo, unsigned hi, const char *source)
{
    zb_space *s = w->space;
    uint32_t slotno = ZB_SLOT(w->table[b]);
    zb_slot *slot = slotno ? &s->slots[slotno - 1] : NULL;
    bool shown = false;
    int r = 0;
    if (!slot) {
        r = new_slot(s, w->start / ZB_BLOCK + b, true, &slot);
        if (r) return r;
    }
    if (slot->file == ZB_NO_FILE) return s->error ? -s->error : -EIO;
    int fd = slot_fd(s, slot);
    if (fd < 0) return fd;
    for (;;) {
        r = copy_in(w, slot, lo, hi, fd, source);
        for (zb_window *v = s->windows; v && !r; v = v->next) {
            r = show(v, slot, lo, hi, fd);
            shown |= !r;
        }
        if (r != -ENOMEM || hi - lo == ZB_PAGES_PER_BLOCK || source) break;
        lo = 0; /* out of mappings: a whole block needs fewer of them than its pages do */
        hi = ZB_PAGES_PER_BLOCK;
    }
    if (!r) {
        mark_dirty(s, slot, lo, hi);
        if (hi - lo == ZB_PAGES_PER_BLOCK && slot->offset) start_writeback(fd, slot->offset - ZB_BLOCK);
    } else if (shown && !s->error) {
        s->error = -r; /* a window shows pages that are in no run */
    }
    if (fd != s->fd) close(fd);
    return r;
}

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
    int r = dirty_pages(w, b, lo, hi, NULL);
    if (!r) s->streams[s->stream_clock].next_page = block_at / ZB_PAGE + hi;
    return r;
}

/* The scratch cannot take the page: let the write go to private memory, so that the thread lives to hear of it.
 * The generation is marked as failed: it can only be discarded. */
ZB_IN_HANDLER int zb_overflow(zb_window *w, uint64_t position, int error)
{
    zb_space *s = w->space;
    uint64_t b = (position - w->start) / ZB_BLOCK;
    unsigned page = (unsigned)((position - w->start) % ZB_BLOCK / ZB_PAGE);
    uint32_t slotno = ZB_SLOT(w->table[b]);
    zb_slot *slot = slotno ? &s->slots[slotno - 1] : NULL;
    ZB_COUNT(overflows, 1);
    bool first = !s->error;
    if (first) s->error = error;
    if (!slot && new_slot(s, w->start / ZB_BLOCK + b, false, &slot)) return -ENOMEM;
    slot->file = ZB_NO_FILE; /* from now on: no later write may map a file over private pages */
    char *copy = mmap(NULL, ZB_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (copy == MAP_FAILED) return -ENOMEM;
    struct iovec to = {copy, ZB_PAGE}, from = {w->base + b * ZB_BLOCK + page * ZB_PAGE, ZB_PAGE};
    if (syscall(SYS_process_vm_readv, getpid(), &to, 1, &from, 1, 0) != (long)ZB_PAGE) memset(copy, 0xFF, ZB_PAGE);
    int r = 0;
    uint64_t at = slot->block * ZB_BLOCK;
    for (zb_window *v = s->windows; v && !r; v = v->next) {
        if (at < v->start || at >= v->start + v->blocks * ZB_BLOCK) continue;
        r = same_page(copy, v->base + (at - v->start) + page * ZB_PAGE);
        zb_counted(v, 2);
    }
    munmap(copy, ZB_PAGE);
    if (r) return -ENOMEM;
    mark_dirty(s, slot, page, page + 1);
    return first;
}

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
        uint32_t kind = ZB_KIND(w->table[b]);
        if (s->closed || s->forked)
            r = -ENOTCONN;
        else if (!source && (kind == ZB_ABSENT || kind == ZB_FILLING))
            r = -EAGAIN;
        else
            r = dirty_pages(w, b, p, q, source ? (const char *)source + (at - lo) : NULL);
        zb_unlock(&s->lock);
        at = stop;
    }
    return r;
}

/* -- generations ---------------------------------------------------------------------------------------------- */

static void end_generation(zb_space *s, uint64_t *first, uint64_t *last)
{
    *first = s->first_file;
    *last = s->fd >= 0 ? s->file + 1 : s->file;
    if (s->fd >= 0) {
        close(s->fd);
        s->fd = -1;
        s->file++;
    }
    s->first_file = s->file;
    s->in_file = 0;
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

int zb_discard(zb_space *s, uint64_t *first, uint64_t *last)
{
    int r = 0;
    zb_lock(&s->lock);
    if (s->forked) {
        zb_unlock(&s->lock);
        return -ENOTCONN; /* the files are the parent's */
    }
    for (size_t i = 0; i < s->nslots; i++) {
        uint64_t block = s->slots[i].block;
        set_slot(s, block, 0);
        for (zb_window *w = s->windows; w; w = w->next) {
            uint64_t b = block - w->start / ZB_BLOCK;
            if (block < w->start / ZB_BLOCK || b >= w->blocks) continue;
            int e = zb_block_absent(w, b);
            if (e && !r) r = e;
        }
    }
    end_generation(s, first, last);
    s->error = 0;
    s->epoch++;
    zb_unlock(&s->lock);
    zb_wake(s);
    return r;
}
