/* SPDX-License-Identifier: MIT
 *
 * internal.h - what the core's files share.
 *
 * Lock order: registry lock -> space lock -> queue lock. A thread that holds one has tls_busy set: a fault it
 * takes itself is a bug of ours and goes to the next handler instead of deadlocking. No lock is ever held while
 * sleeping for a fill or while taking the interpreter's lock, and no allocator is called under one: a faulting
 * thread may hold the allocator's lock.
 *
 * ZB_IN_HANDLER marks what a signal handler can reach: no malloc, no stdio, raw system calls (errno is
 * preserved by the handler), little stack.
 */
#ifndef ZBIG_INTERNAL_H
#define ZBIG_INTERNAL_H

#define _GNU_SOURCE
#include "zbig.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ZB_IN_HANDLER
#define ZB_TLS static __thread __attribute__((tls_model("initial-exec")))
#define ZB_PAGES_PER_BLOCK ((unsigned)(ZB_BLOCK / ZB_PAGE))
#define ZB_PATH 4096

/* -- a mutex that works in signal handlers, for threads only (no priority, no robustness) -------------------- */

typedef _Atomic uint32_t zb_mutex; /* 0 free, 1 held, 2 held and waited for */

extern __thread uint32_t zb_busy __attribute__((tls_model("initial-exec"), visibility("hidden")));

ZB_IN_HANDLER static inline void zb_futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

ZB_IN_HANDLER static inline void zb_futex_wake(_Atomic uint32_t *word, int n)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

ZB_IN_HANDLER static inline void zb_lock(zb_mutex *m)
{
    zb_busy++;
    uint32_t free_ = 0;
    if (atomic_compare_exchange_strong_explicit(m, &free_, 1, memory_order_acquire, memory_order_relaxed)) return;
    while (atomic_exchange_explicit(m, 2, memory_order_acquire) != 0) zb_futex_wait(m, 2);
}

ZB_IN_HANDLER static inline void zb_unlock(zb_mutex *m)
{
    if (atomic_exchange_explicit(m, 0, memory_order_release) == 2) zb_futex_wake(m, 1);
    zb_busy--;
}

/* -- state --------------------------------------------------------------------------------------------------- */

/* A window's table has one entry a block: the kind in the low two bits, above them the slot number plus one of
 * the block's dirty pages in the current generation, or 0. */
enum { ZB_ABSENT, ZB_FILLING, ZB_HOLE, ZB_CLEAN };
#define ZB_FILLED 2u /* the bit of the latter two */
#define ZB_KIND(e) ((e) & 3u)
#define ZB_SLOT(e) ((e) >> 2)
#define ZB_ENTRY(slot, kind) ((uint32_t)(slot) << 2 | (uint32_t)(kind))

struct zb_window {
    zb_space *space;
    char *base;     /* of block 0; a multiple of ZB_BLOCK */
    char *reserved; /* what was mmapped, with its length */
    size_t reserved_len;
    uint64_t start; /* position of base */
    uint64_t blocks;
    uint32_t *table;
    uint64_t maps;   /* its share of the count of mappings */
    bool drowned;    /* one mapping of private zeros, because there were no others to be had: until discarded */
    zb_window *next; /* in the space */
};

/* The dirty pages of one block, in the current generation. Slot i lies in file `file` at `offset`. */
typedef struct {
    uint64_t block;
    uint64_t file;
    uint64_t offset;
    uint64_t bits[ZB_PAGES_PER_BLOCK / 64];
} zb_slot;

#define ZB_NO_FILE UINT64_MAX /* a slot whose pages are private memory: the scratch failed */
#define ZB_STREAMS 8
#define ZB_RESUMED_SLOTS 4u /* more than so many blocks are worth a file of their own, which becomes a segment whole */

struct zb_space {
    zb_mutex lock;
    _Atomic uint32_t seq; /* futex: bumped when anything was filled or dropped */
    _Atomic uint32_t refs;
    uint64_t id, epoch, limit;
    zb_window *windows;
    bool closed, forked;
    bool transient; /* the scratch files need not get to the disk */
    bool spoiled; /* 0xFF is shown somewhere that could have been loaded: gone with the generation */
    uint32_t poisonings; /* fills by zb_poison_fd(): who waited meanwhile is to be told */
    int error;
    zb_space *next; /* of all, under the registry's lock */

    zb_slot *slots; /* mmapped, grown by mremap */
    size_t nslots, slots_cap;
    uint64_t dirty_pages;
    uint64_t file, first_file; /* number of the file being filled; of the first of this generation */
    unsigned in_file;          /* slots used in it */
    unsigned room;             /* slots that may be */
    unsigned ended;            /* slots used in the file before it, if that may be resumed, else 0 */
    unsigned resumed;          /* slots used in it by the generations before, else 0 */
    int fd;                    /* open while the generation grows, else -1 */
    char directory[ZB_PATH], prefix[128];
    char path[ZB_PATH]; /* of the file being opened: a handler has no room for it on its stack */

    struct {
        uint64_t next_page;
        uint32_t unit;
    } streams[ZB_STREAMS];
    unsigned stream_clock;
};

extern struct zb_globals {
    zb_mutex registry_lock;
    zb_window **registry; /* sorted by base */
    size_t nwindows, registry_cap;
    zb_space *spaces;
    zb_hooks hooks;
    bool initialised;
    _Atomic bool shut;
    _Atomic int poison_fd;
    struct {
        _Atomic uint64_t read_faults, write_faults, bus_faults, spurious, chained;
        _Atomic uint64_t waits, fills, stale_fills, bytes_copied, overflows, writebacks, mappings;
    } count;
} zb_g __attribute__((visibility("hidden")));

#define ZB_COUNT(name, n) atomic_fetch_add_explicit(&zb_g.count.name, (n), memory_order_relaxed)

/* Count n mappings more, with the space locked. */
ZB_IN_HANDLER static inline void zb_counted(zb_window *w, uint64_t n)
{
    w->maps += n;
    ZB_COUNT(mappings, n);
}

/* -- shared by all */
ZB_IN_HANDLER static inline char *zb_address(const zb_window *w, uint64_t position)
{
    return w->base + (position - w->start);
}
ZB_IN_HANDLER static inline int zb_map_none(char *at, size_t len)
{
    void *p = mmap(at, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return p == MAP_FAILED ? -errno : 0;
}
ZB_IN_HANDLER static inline bool zb_unfilled(uint32_t e)
{
    return !(e & ZB_FILLED);
}
/* Whether the window has this block (which is counted from the space's first byte), as its own number *b. */
ZB_IN_HANDLER static inline bool zb_has_block(const zb_window *w, uint64_t block, uint64_t *b)
{
    *b = block - w->start / ZB_BLOCK;
    return block >= w->start / ZB_BLOCK && *b < w->blocks;
}

/* -- window.c */
ZB_IN_HANDLER zb_space *zb_find_space(const char *address); /* referenced, or NULL */
ZB_IN_HANDLER zb_window *zb_find_window(zb_space *s, const char *address);
ZB_IN_HANDLER void zb_space_unref(zb_space *s);
ZB_IN_HANDLER void zb_wake(zb_space *s);
/* Something changed that nobody sleeps for: faults that it overtook are spurious for a reason. */
ZB_IN_HANDLER static inline void zb_changed(zb_space *s)
{
    atomic_fetch_add_explicit(&s->seq, 1, memory_order_release);
}

/* -- block.c */
ZB_IN_HANDLER int zb_block_absent(zb_window *w, uint64_t b); /* b: its number in the window */

/* -- write.c */
ZB_IN_HANDLER int zb_write_fault(zb_window *w, uint64_t position);

/* -- scratch.c */
/* Make pages [lo, hi) of block `b` of the window dirty, by their old bytes (the block must be filled) or `source`. */
ZB_IN_HANDLER int zb_dirty_pages(zb_window *w, uint64_t b, unsigned lo, unsigned hi, const char *source);
ZB_IN_HANDLER int zb_overflow(zb_window *w, uint64_t position, int error); /* 1: the generation's first */
ZB_IN_HANDLER void zb_slots_free(zb_space *s);
/* Let every window know that `block`'s dirty pages are in slot number `slotno` (counted from 1; 0: none). */
ZB_IN_HANDLER void zb_set_slot(zb_space *s, uint64_t block, size_t slotno);
/* The process has no mapping left, not even for a page: make one, of private memory, of all that the window has. What
 * it shows is wrong then, and the generation has failed by `error`; but the thread lives to hear of it. */
ZB_IN_HANDLER bool zb_drown(zb_window *w, int error);
void zb_dry(zb_window *w);
/* Mappings that are there to be given up then; made at the start, and again once the generation is discarded. */
void zb_spare_make(void);
int zb_adopt_dirty(zb_window *w); /* show what is dirty already in a new window */
ZB_IN_HANDLER static inline bool zb_is_dirty(const zb_slot *slot, unsigned page)
{
    return slot->bits[page / 64] >> (page % 64) & 1;
}
/* The end of the run of pages from `page` that are all dirty (or all not) below `end`. */
ZB_IN_HANDLER unsigned zb_same(const zb_slot *slot, unsigned page, unsigned end);

/* -- request.c */
ZB_IN_HANDLER void zb_request_put(const zb_request *r); /* may wait for room: not with the GIL held */
ZB_IN_HANDLER bool zb_is_loader(void);
/* Have this thread told of an error. With `wait` it waits for that: it must not go on as if nothing had happened.
 * Without, nothing happens if there is no room. */
ZB_IN_HANDLER void zb_request_tell(zb_request *notice, bool wait);
void zb_request_fork(void);
void zb_request_shutdown(void);

/* -- fault.c: send the notices of what this thread was shown because it could not wait */
void zb_tell_spoiled(void);
/* This thread is back in Python after a Ctrl-C. */
void zb_wait_again(void);

/* -- arch.c: 1 a write, 0 a read, -1 unknown */
ZB_IN_HANDLER int zb_is_write(const void *ucontext);

#endif
