/* SPDX-License-Identifier: MIT
 *
 * zbig.h - the memory core of dask_zbig: files that live in address space.
 *
 * Model
 * -----
 * A *space* is one array's byte file as one process sees it: bytes 0 .. 2^63-1. A *window* is a reserved
 * address range onto a part of a space; a space may have several, overlapping. A window is managed in *blocks*
 * of ZB_BLOCK bytes. For each block of each window the core knows:
 *
 *     absent   PROT_NONE; touching it asks the loader for a fill and sleeps until it came
 *     filling  as absent, and already asked for
 *     hole     mapped read-only, all zeros
 *     clean    mapped read-only from files (or zeros) that the owner of the space chose
 *
 * and, of every block, which of its pages are *dirty*: mapped read-write, from a private scratch file, at the
 * same offset modulo ZB_BLOCK, in every window at once. A write to a page that is not dirty is served here, in
 * the faulting thread, with no callback. Reads of absent blocks are queued; a loader thread takes them with
 * zb_request_next() and answers with zb_fill().
 *
 * The core knows nothing of Python, of ZODB or of what the bytes mean. It holds no Python.h: what it must know
 * of the interpreter comes as function pointers (zb_hooks), so it can be tested by plain C programs.
 *
 * Conventions
 * -----------
 * Functions return 0 or a negative errno. They never print (but for one line before a forked child is killed
 * for touching a window) and never exit. Positions are byte positions in the space. Unless said otherwise a
 * function may be called from any thread, is not async-signal-safe, must be called *without* the GIL held (or
 * any lock that a faulting thread could hold), and takes the space's lock. In a forked child a space of the parent
 * can only be closed and freed, with its windows; what would use it returns -ENOTCONN.
 */
#ifndef ZBIG_H
#define ZBIG_H

#include <stddef.h>
#include <stdint.h>
#include <wchar.h>

#define ZB_PAGE 4096UL
#define ZB_BLOCK (2UL << 20)
#define ZB_SLOTS_PER_FILE 32u /* a scratch file grows to 64 MiB, then the next one is begun */

#define ZB_API __attribute__((visibility("default")))

typedef struct zb_space zb_space;
typedef struct zb_window zb_window;

/** How the core learns whether the faulting thread holds the interpreter's lock, and gives it up to wait. */
typedef struct {
    void *(*current)(void);     /**< the attached thread state or NULL; must be async-signal-safe */
    void *(*this_thread)(void); /**< if not NULL: attached means current() == this_thread() (CPython < 3.12) */
    size_t ident_offset;        /**< if not 0: where in a thread state its pthread_self() is. With this_thread, for in
                                     a subinterpreter that has another state than current() */
    void *(*detach)(void);      /**< give the lock up; returns what attach() wants back */
    void (*attach)(void *);     /**< take it again */
} zb_hooks;

/** A stretch of a fill: [start, stop) of the space comes from `fd` at `offset`, or is a hole if fd < 0. */
typedef struct {
    uint64_t start, stop; /**< multiples of ZB_PAGE */
    int64_t offset;       /**< multiple of ZB_PAGE */
    int64_t fd;
} zb_piece;

/** A run of dirty pages, as zb_freeze() reports it: [start, stop) lies in scratch file `file` at `offset`. */
typedef struct {
    uint64_t start, stop, offset;
    uint64_t file;
} zb_run;

enum {
    ZB_WANT_FILL = 1,   /**< a thread sleeps on this block: answer with zb_fill() */
    ZB_WANT_CHECK = 2,  /**< with FILL: the file mapped there was too short; look before you fill again */
    ZB_WANT_NOTICE = 4, /**< `error` happened to `thread` in this space: tell it, then zb_request_told(). EIO: it has
                             waited, and perhaps zb_poison_fd() was filled in there: only the loader knows */
};

/** What a faulting thread wants of the loader. */
typedef struct {
    uint64_t space;    /**< the id given to zb_space_new() */
    uint64_t position; /**< of the block (FILL) or of the access (NOTICE) */
    uint64_t thread;   /**< pthread_self() of the faulting thread */
    uint32_t want;     /**< ZB_WANT_* */
    int32_t error;     /**< positive errno, of a NOTICE */
    uint64_t answer;   /**< the core's own */
} zb_request;

enum {
    ZB_DROP_HOLES = 1, /**< drop only blocks that are holes */
};

/** Counters since the process started; see zb_counters(). */
typedef struct {
    uint64_t read_faults, write_faults, bus_faults, spurious, chained;
    uint64_t waits, fills, stale_fills, bytes_copied, overflows, writebacks;
    uint64_t mappings; /**< an estimate, never below the truth, of the mappings the core holds */
} zb_count;

/* -- process ------------------------------------------------------------------------------------------------ */

/** Once per process, before anything else. Registers the fork hook, installs no signal handler. Idempotent. */
ZB_API int zb_init(const zb_hooks *hooks);
/** Install the SIGSEGV and SIGBUS handlers, or put them back if somebody replaced them (who is then chained
 *  to). Cheap: two system calls. Does not take any lock of a space. */
ZB_API int zb_handlers(void);
/** Take our handlers away again, where they are the current ones, so that somebody can put his beneath them. Until
 *  zb_handlers() is called a fault in a window is a crash. */
ZB_API int zb_handlers_off(void);
/** From now on faults on absent blocks are answered with 0xFF bytes at once (interpreter exit: no loader).
 *  Wakes all waiters and makes zb_request_next() return -ESHUTDOWN. */
ZB_API void zb_shutdown(void);
ZB_API void zb_counters(zb_count *out);
/** Correct the estimate of mappings by a true count. */
ZB_API void zb_mappings_set(uint64_t n);
/** A file of ZB_BLOCK bytes of 0xFF, to fill what cannot be loaded. Owned by the core. The first call, by whoever
 *  makes it, writes them: -ENOMEM, say. */
ZB_API int zb_poison_fd(void);

/* -- spaces ------------------------------------------------------------------------------------------------- */

/** A new space. `id` is what requests name it by. Scratch file k is `directory/prefix-k`, created (0600, never
 *  following links) on the first write that needs it and owned, once reported, by the caller. */
ZB_API int zb_space_new(zb_space **out, uint64_t id, const char *directory, const char *prefix);
/** Where scratch files are to be created from now on. -EBUSY while the current generation has some. */
ZB_API int zb_space_scratch(zb_space *s, const char *directory);
/** Whether nobody is going to sync the scratch files: then the disk need not begin with what is written in bulk. */
ZB_API void zb_space_transient(zb_space *s, int transient);
/** The file's size: a growing write does not run past it (it may still be written past, page by page). */
ZB_API void zb_space_limit(zb_space *s, uint64_t bytes);
/** No more service: what is mapped stays readable; absent blocks read as 0xFF and writes go to private memory
 *  that is lost, each with a NOTICE (ENOTCONN). */
ZB_API void zb_space_close(zb_space *s);
/** Release the caller's reference. Windows must have been freed. The struct goes when the last faulting thread
 *  has left it. */
ZB_API void zb_space_free(zb_space *s);
/** Bumped by every zb_drop(), zb_freeze() and zb_discard(): a fill carries the epoch in which it was planned. */
ZB_API uint64_t zb_space_epoch(zb_space *s);
/** The first error that a write in the current generation met (positive errno), or 0. */
ZB_API int zb_space_error(zb_space *s);
/** Have the current generation count as failed by this error (positive errno), unless it has failed already. */
ZB_API void zb_space_fail(zb_space *s, int error);
/** Number of dirty pages of the current generation. */
ZB_API uint64_t zb_space_dirty(zb_space *s);

/* -- windows ------------------------------------------------------------------------------------------------ */

/** Reserve `length` bytes (rounded up to blocks) onto the space from `start` (a multiple of ZB_BLOCK). Dirty
 *  pages of the space show at once; everything else is absent. -ENOMEM if there is no address range. */
ZB_API int zb_window_new(zb_window **out, zb_space *s, uint64_t start, uint64_t length);
ZB_API char *zb_window_base(zb_window *w);
/** Unmap. Nobody may touch the range any more: the caller knows that no view is left. */
ZB_API void zb_window_free(zb_window *w);
/** Map the absent blocks of [lo, hi) (multiples of ZB_BLOCK) by `pieces`, which cover it, sorted; wake who waits.
 *  Blocks that are filled already, and dirty pages, are left as they are. Descriptors may be closed afterwards.
 *  -ESTALE if the epoch is not `epoch`. On another error what was mapped is kept, the rest stays absent. After any
 *  error the threads that wait for blocks of the range ask for them again. */
ZB_API int zb_fill(zb_window *w, uint64_t epoch, uint64_t lo, uint64_t hi, const zb_piece *pieces, size_t n);
/** Nothing of the window can be mapped any more, not even zb_poison_fd(), for want of mappings: show zeros in all of
 *  it, have the generation fail by `error` (positive errno) until zb_discard(), and wake who waits. */
ZB_API int zb_lost(zb_window *w, int error);
/** The first absent or filling block of [lo, hi), as a position, or `hi` (rounded up to a block). */
ZB_API uint64_t zb_absent(zb_window *w, uint64_t lo, uint64_t hi);
/** The first block of [lo, hi) that is neither absent nor filling, in the same way. */
ZB_API uint64_t zb_present(zb_window *w, uint64_t lo, uint64_t hi);
/** Whether an access to [lo, hi) can be served, and needs no loader: 1 if all of it is filled and the handlers are in
 *  place, which this sees to (see zb_handlers()); 0 if not, or in a forked child. In one call, for what is done for every
 *  element that Python asks for. */
ZB_API int zb_ready(zb_window *w, uint64_t lo, uint64_t hi);
/** Give the pages of clean mappings back to the kernel (they stay in the page cache and mapped). */
ZB_API int zb_release(zb_window *w);

/* -- changes ------------------------------------------------------------------------------------------------ */

/** Make the blocks that touch [lo, hi) absent in every window; dirty pages stay. */
ZB_API int zb_drop(zb_space *s, uint64_t lo, uint64_t hi, unsigned flags);
/** End the current generation: its pages become read-only and clean, the next write begins new scratch files.
 *  *runs (sorted by start; free with zb_runs_free) says where they lie; *first .. *last - 1 are the files. If a
 *  write of the generation failed nothing is frozen and -error is returned. */
ZB_API int zb_freeze(zb_space *s, zb_run **runs, size_t *n, uint64_t *first, uint64_t *last);
ZB_API void zb_runs_free(zb_run *runs);
/** Have the next generation begin in the file in which the last one ended, `file` (which was *last - 1 of the
 *  zb_freeze()), behind what lies there: for generations of a few pages, which a new file each would cost as much as
 *  all the rest. Only so many blocks of the next one go there. The file is the caller's as before, but must keep its
 *  name until a zb_freeze() or zb_discard() reports files without it. -EBUSY if the next generation has files already,
 *  -ENOSPC if that one is full, -EINVAL if it is another. */
ZB_API int zb_resume(zb_space *s, uint64_t file);
/** Forget the current generation: its blocks become absent; *first .. *last - 1 are the files to unlink. Also
 *  clears the error. */
ZB_API int zb_discard(zb_space *s, uint64_t *first, uint64_t *last);
/** Make [lo, hi) dirty as a write by faults would, but at once: for direct assignment, and for system calls that
 *  write into a view. With `source` (hi - lo bytes, whole pages) its bytes are written instead of the old ones,
 *  which are then neither read nor copied, nor need be there: an absent block that is overwritten whole counts as
 *  filled. Without, -EAGAIN if a block is absent (fill it first). -EFAULT if the source, or the file mapped there,
 *  cannot be read: a source that would have to be loaded is not, for the space is locked. -ENOSPC and the like from
 *  the scratch file. On an error the blocks before are done, and of this one's dirty pages some may be overwritten. */
ZB_API int zb_write(zb_window *w, uint64_t lo, uint64_t hi, const void *source);

/* -- loader ------------------------------------------------------------------------------------------------- */

/** A loader's thread has been started, and will call zb_request_next() soon: from now on who has something to be told
 *  waits for it. Without one, nobody would ever answer. */
ZB_API void zb_loaders_come(void);
/** Sleep until a thread wants something. Marks the calling thread as a loader: what it touches in a window itself
 *  is served by the others, if they can. -ESHUTDOWN after zb_shutdown(). */
ZB_API int zb_request_next(zb_request *out);
/** The thread of a NOTICE has been told (or cannot be): wake it. Once for each. */
ZB_API void zb_request_told(const zb_request *r);
/** The calling thread begins (phase L"start") or ends to run finalizers of the garbage collector: a callback for
 *  that. May be called with the GIL held. Finalizers run wherever the thread just was, with whatever locks it holds
 *  there, and a loader may need one of them. So the faults of such a thread, and of a loader, wait for zb_patience()
 *  at most. Then 0xFF bytes are shown, and the generation has failed (EDEADLK) until zb_discard(), which drops all
 *  that is shown. At the end (of a loader: in zb_request_next) a NOTICE is sent, one a space, that needs no answer:
 *  whoever gets it drops all of that space, so that nobody else is shown those bytes. */
ZB_API void zb_collecting(const wchar_t *phase, const void *info);
/* (The main thread does not wait on after a SIGINT, either: then 0xFF bytes are shown, the generation has failed
 *  (EINTR) until zb_discard(), which drops all that is shown, and a NOTICE is sent, one a generation.) */
/** Set that time, for the process. At first it is 5000. */
ZB_API void zb_patience(uint32_t milliseconds);

#endif
