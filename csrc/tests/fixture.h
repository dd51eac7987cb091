/* SPDX-License-Identifier: MIT
 * fixture.h - what stands in for Python, ZODB and the disk in the tests of the core.
 *
 * A fake GIL (a mutex, and a flag of each thread that tells whether it holds it), a loader thread that needs it,
 * files of known bytes, and a store: what is committed, page by page. */
#ifndef ZBIG_TESTS_FIXTURE_H
#define ZBIG_TESTS_FIXTURE_H

#include "check.h"
#include "zbig.h"

#include <pthread.h>
#include <stdbool.h>

#if defined(__SANITIZE_THREAD__)
#define FX_TSAN 1
#else
#define FX_TSAN 0
#endif

/* -- process: the core started with hooks that know the fake GIL; a directory of the test's own, removed at exit */

void fx_start(int seconds);
const char *fx_directory(void);
void fx_remove_tree(const char *path);

void fx_gil_take(void);
void fx_gil_drop(void);
bool fx_gil_held(void);         /* by this thread */
unsigned fx_gil_detached(void); /* how often the core gave it up */

zb_count fx_count(void);
/* Mappings that the kernel has in [base, base + length). */
uint64_t fx_mappings(const char *base, uint64_t length);
/* Whether the page is in this process's page tables; whether it can be written, without writing. */
bool fx_resident(const void *page);
bool fx_writable(const void *page);

/* -- bytes */

/* A file of `size` bytes fx_byte(seed, offset), unlinked already. */
int fx_file(uint64_t size, uint32_t seed);
unsigned char fx_byte(uint32_t seed, uint64_t offset);
/* [at, at + size) is what fx_file has from `offset` on; is all `value`. */
void fx_check_file(const char *at, uint64_t size, uint32_t seed, uint64_t offset);
void fx_check_all(const char *at, uint64_t size, unsigned char value);
void fx_check_same(const void *got, const void *wanted, uint64_t size, uint64_t position);

typedef struct {
    uint64_t state;
} fx_random;
uint64_t fx_next(fx_random *r);
uint64_t fx_below(fx_random *r, uint64_t limit);

/* Access to views, which may race on purpose. TSan is not shown it, for it sees no page tables: to it an mmap is a
 * write to the whole range (to us it makes the range readable, with the same bytes), and a store that faults happens
 * before the fault is served (so it seems to race with the pwrite that copies the old bytes). */
#define FX_ACCESS static inline __attribute__((no_sanitize("thread")))

FX_ACCESS unsigned char fx_get(const char *at)
{
    return __atomic_load_n((const unsigned char *)at, __ATOMIC_RELAXED);
}
FX_ACCESS void fx_put(char *at, unsigned char value)
{
    __atomic_store_n((unsigned char *)at, value, __ATOMIC_RELAXED);
}
FX_ACCESS uint64_t fx_get_word(const uint64_t *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}
FX_ACCESS void fx_put_word(uint64_t *at, uint64_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}
FX_ACCESS void fx_add_to_word(uint64_t *at, uint64_t value)
{
    __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

/* -- spaces */

zb_space *fx_space(uint64_t id); /* scratch files: fx_directory()/s<id>-<k> */
int fx_scratch_open(uint64_t id, uint64_t file);
void fx_scratch_remove(uint64_t id, uint64_t first, uint64_t last);
zb_window *fx_window(zb_space *s, uint64_t start, uint64_t length);
/* Fill [lo, hi) from a file, in which position p lies at p - lo + offset; by a hole if fd < 0. */
int fx_fill(zb_space *s, zb_window *w, uint64_t lo, uint64_t hi, int fd, int64_t offset);

/* -- a loader thread: takes requests, and the fake GIL to serve them; until zb_shutdown() */

typedef void fx_serve(const zb_request *request, void *context);
void fx_loader(fx_serve *serve, void *context);

/* -- store: what is committed. Not thread-safe. */

typedef struct {
    int fd; /* < 0: a hole */
    uint64_t offset;
} fx_page;

typedef struct {
    uint64_t id; /* of the space whose scratch files it takes over */
    uint64_t npages;
    fx_page *pages;
    uint64_t *used; /* pages that lie in a file, by descriptor; it is closed when none does */
    uint64_t file;  /* if it is resumed, the scratch file that keeps its name for that */
    bool resumed;
} fx_store;

void fx_store_open(fx_store *store, uint64_t id, uint64_t npages);
void fx_store_close(fx_store *store);
/* Freeze the space, and take its runs and files over. With `resume` the next generation goes on in the last of these
 * files, if it may. Returns how many pages that were. */
uint64_t fx_store_freeze(fx_store *store, zb_space *s, bool resume);
/* A generation has ended with these files: remove them, and the one that was resumed, if it was not written to. */
void fx_store_ended(fx_store *store, uint64_t first, uint64_t last);
/* What [lo, hi) is made of. `pieces` has room for one a page. */
size_t fx_store_pieces(const fx_store *store, uint64_t lo, uint64_t hi, zb_piece *pieces);

#endif
