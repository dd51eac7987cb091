/* SPDX-License-Identifier: MIT
 * scratch.c - dirty pages: a private file under the pages that were written, one generation after the other.
 *
 * A block that is written gets a slot: ZB_BLOCK bytes of a scratch file, so that a page lies in the file at the
 * same offset modulo ZB_BLOCK as in memory. Only the pages that are dirty are written there: one pwrite copies
 * their old bytes (the kernel reads them from the clean mapping, or from our zeros for a hole), which allocates
 * the file's blocks too - a full disk is pwrite's return value, never a SIGBUS later - and makes large folios. */
#include "internal.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>

static const char zeros[ZB_BLOCK];

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
    int fd;
    do fd = (int)syscall(SYS_openat, AT_FDCWD, s->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | flags, 0600);
    while (fd < 0 && errno == EINTR);
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

ZB_IN_HANDLER void zb_set_slot(zb_space *s, uint64_t block, size_t slotno)
{
    uint64_t b;
    for (zb_window *w = s->windows; w; w = w->next)
        if (zb_has_block(w, block, &b)) w->table[b] = ZB_ENTRY(slotno, ZB_KIND(w->table[b]));
}

/* Go on in the file of the generation before. If it is not there any more there will be a new one. */
ZB_IN_HANDLER static bool resume_file(zb_space *s)
{
    s->fd = open_file(s, s->file, 0);
    if (s->fd < 0) {
        s->fd = -1;
        s->first_file = ++s->file;
        return false;
    }
    s->in_file = s->resumed;
    s->room = s->resumed + ZB_RESUMED_SLOTS;
    if (s->room > ZB_SLOTS_PER_FILE) s->room = ZB_SLOTS_PER_FILE;
    return true;
}

ZB_IN_HANDLER static int new_slot(zb_space *s, uint64_t block, bool backed, zb_slot **out)
{
    int r = slots_room(s);
    if (r) return r;
    if (backed && s->fd < 0 && s->resumed && !resume_file(s)) s->resumed = 0;
    if (backed && (s->fd < 0 || s->in_file == s->room)) {
        int fd = open_file(s, s->fd < 0 ? s->file : s->file + 1, O_CREAT | O_EXCL);
        if (fd < 0) return fd;
        if (s->fd >= 0) {
            close(s->fd);
            s->file++;
        }
        s->fd = fd;
        s->in_file = 0;
        s->room = ZB_SLOTS_PER_FILE;
    }
    zb_slot *slot = &s->slots[s->nslots++];
    memset(slot, 0, sizeof *slot);
    slot->block = block;
    slot->file = backed ? s->file : ZB_NO_FILE;
    slot->offset = backed ? s->in_file++ * ZB_BLOCK : 0;
    zb_set_slot(s, block, s->nslots);
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

/* A block whose pages are all dirty has nothing left that could be absent: who waits for it need not. */
ZB_IN_HANDLER static void filled_by_dirt(zb_space *s, const zb_slot *slot)
{
    uint64_t b;
    bool awaited = false;
    if (zb_same(slot, 0, ZB_PAGES_PER_BLOCK) != ZB_PAGES_PER_BLOCK) return;
    for (zb_window *w = s->windows; w; w = w->next) {
        if (!zb_has_block(w, slot->block, &b) || !zb_unfilled(w->table[b])) continue;
        awaited |= ZB_KIND(w->table[b]) == ZB_FILLING;
        w->table[b] = ZB_ENTRY(ZB_SLOT(w->table[b]), ZB_CLEAN);
    }
    if (awaited) zb_wake(s);
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
    ZB_COUNT(writebacks, 1);
    sync_file_range(fd, (off_t)offset, ZB_BLOCK, SYNC_FILE_RANGE_WRITE);
}

ZB_IN_HANDLER int zb_dirty_pages(zb_window *w, uint64_t b, unsigned lo, unsigned hi, const char *source)
{
    zb_space *s = w->space;
    uint32_t slotno = ZB_SLOT(w->table[b]);
    zb_slot *slot = slotno ? &s->slots[slotno - 1] : NULL;
    bool shown = false, again = false;
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
        again = zb_is_dirty(slot, lo) && zb_same(slot, lo, hi) == hi; /* then every window shows them */
        for (zb_window *v = s->windows; v && !r && !again; v = v->next) {
            r = show(v, slot, lo, hi, fd);
            shown |= !r;
        }
        if (r != -ENOMEM || hi - lo == ZB_PAGES_PER_BLOCK || source) break;
        lo = 0; /* out of mappings: a whole block needs fewer of them than its pages do */
        hi = ZB_PAGES_PER_BLOCK;
    }
    if (!r) {
        mark_dirty(s, slot, lo, hi);
        filled_by_dirt(s, slot);
        if (!s->transient && !again && hi - lo == ZB_PAGES_PER_BLOCK && slot->offset)
            start_writeback(fd, slot->offset - ZB_BLOCK);
    } else if (shown && !s->error) {
        s->error = -r; /* a window shows pages that are in no run */
    }
    if (fd != s->fd) close(fd);
    return r;
}

#define SPARES 32u
static char *_Atomic spare; /* pages, of which every other one is another mapping */

void zb_spare_make(void)
{
    if (atomic_load(&spare)) return;
    char *p = mmap(NULL, SPARES * ZB_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return;
    for (unsigned i = 1; i < SPARES; i += 2) /* (if there are no more, there are less) */
        if (mprotect(p + i * ZB_PAGE, ZB_PAGE, PROT_READ)) break;
    char *none = NULL;
    if (!atomic_compare_exchange_strong(&spare, &none, p)) munmap(p, SPARES * ZB_PAGE);
}

ZB_IN_HANDLER static void spare_give_up(void)
{
    char *p = atomic_exchange(&spare, NULL);
    if (p) munmap(p + ZB_PAGE, (SPARES - 1) * ZB_PAGE); /* (what is before may be one with a neighbour: no cut there) */
}

ZB_IN_HANDLER bool zb_drown(zb_window *w, int error)
{
    spare_give_up();
    if (mmap(w->base, w->blocks * ZB_BLOCK, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
        return false;
    w->drowned = true;
    if (!w->space->error) w->space->error = error;
    zb_changed(w->space);
    return true;
}

void zb_dry(zb_window *w)
{
    if (!w->drowned || zb_map_none(w->base, w->blocks * ZB_BLOCK)) return;
    w->drowned = false;
    for (uint64_t b = 0; b < w->blocks; b++)
        if (w->table[b] != ZB_ABSENT) w->table[b] = ZB_ABSENT; /* (a large table is mostly untouched memory) */
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
