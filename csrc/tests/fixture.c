/* SPDX-License-Identifier: MIT
 * fixture.c - see fixture.h. */
#define _GNU_SOURCE
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/stat.h>

/* Crashes are expected here, and are to look like crashes; a handler must not be ours and the sanitizer's. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "handle_segv=0:handle_sigbus=0:use_sigaltstack=0:detect_leaks=0";
}

const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "handle_segv=0:handle_sigbus=0:use_sigaltstack=0:die_after_fork=0:halt_on_error=1";
}

/* -- the fake GIL --------------------------------------------------------------------------------------------- */

static pthread_mutex_t gil = PTHREAD_MUTEX_INITIALIZER;
static __thread bool gil_mine;
static _Atomic unsigned detached;

void fx_gil_take(void)
{
    pthread_mutex_lock(&gil);
    gil_mine = true;
}

void fx_gil_drop(void)
{
    gil_mine = false;
    pthread_mutex_unlock(&gil);
}

bool fx_gil_held(void)
{
    return gil_mine;
}

unsigned fx_gil_detached(void)
{
    return detached;
}

static void *hook_current(void)
{
    return gil_mine ? &gil_mine : NULL;
}

static void *hook_detach(void)
{
    detached++;
    fx_gil_drop();
    return &gil_mine;
}

static void hook_attach(void *state)
{
    CHECK(state == &gil_mine);
    fx_gil_take();
}

/* -- process -------------------------------------------------------------------------------------------------- */

static char directory[PATH_MAX];
static pid_t owner;

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st, (void)type, (void)ftw;
    remove(path);
    return 0;
}

void fx_remove_tree(const char *path)
{
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

static void remove_directory(void)
{
    if (getpid() == owner) fx_remove_tree(directory);
}

const char *fx_directory(void)
{
    return directory;
}

void fx_start(int seconds)
{
    static const zb_hooks hooks = {.current = hook_current, .detach = hook_detach, .attach = hook_attach};
    struct rlimit no_core = {0, 0};
    watchdog(seconds);
    CHECK_SYS(setrlimit(RLIMIT_CORE, &no_core));
    const char *parent = getenv("TMPDIR");
    snprintf(directory, sizeof directory, "%s/zbig-test-XXXXXX", parent ? parent : "/tmp");
    CHECK(mkdtemp(directory));
    owner = getpid();
    atexit(remove_directory);
    CHECK_OK(zb_init(&hooks));
    CHECK_OK(zb_init(&hooks));
    CHECK_OK(zb_handlers());
}

zb_count fx_count(void)
{
    zb_count c;
    zb_counters(&c);
    return c;
}

uint64_t fx_mappings(const char *base, uint64_t length)
{
    FILE *f = fopen("/proc/self/maps", "r");
    CHECK(f);
    char line[PATH_MAX + 128];
    unsigned long lo, hi;
    uint64_t n = 0;
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "%lx-%lx", &lo, &hi) == 2 && lo < (uintptr_t)base + length && hi > (uintptr_t)base) n++;
    fclose(f);
    return n;
}

bool fx_resident(const void *page)
{
    uint64_t entry;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    CHECK_SYS(fd);
    CHECK_EQ(pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)page / ZB_PAGE * sizeof entry)), sizeof entry);
    close(fd);
    return entry >> 63;
}

/* The kernel can store into a page only if we could. It stores what is there. */
bool fx_writable(const void *page)
{
    int ends[2];
    CHECK_SYS(pipe(ends));
    CHECK_EQ(write(ends[1], page, 1), 1);
    ssize_t n = read(ends[0], (void *)(uintptr_t)page, 1);
    CHECK(n == 1 || errno == EFAULT);
    close(ends[0]);
    close(ends[1]);
    return n == 1;
}

/* -- bytes ---------------------------------------------------------------------------------------------------- */

unsigned char fx_byte(uint32_t seed, uint64_t offset)
{
    uint64_t x = (offset / 8 + 1) * 0x9E3779B97F4A7C15u ^ (uint64_t)seed << 32;
    x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9u;
    return (unsigned char)(x >> (8 * (offset % 8)));
}

static int new_file(void)
{
    char name[PATH_MAX + 16];
    snprintf(name, sizeof name, "%s/file-XXXXXX", directory);
    int fd = mkostemp(name, O_CLOEXEC);
    CHECK_SYS(fd);
    CHECK_SYS(unlink(name));
    return fd;
}

int fx_file(uint64_t size, uint32_t seed)
{
    int fd = new_file();
    static unsigned char buffer[1 << 16];
    for (uint64_t at = 0; at < size;) {
        size_t n = size - at < sizeof buffer ? (size_t)(size - at) : sizeof buffer;
        for (size_t i = 0; i < n; i++) buffer[i] = fx_byte(seed, at + i);
        CHECK_EQ(pwrite(fd, buffer, n, (off_t)at), n);
        at += n;
    }
    return fd;
}

void fx_check_file(const char *at, uint64_t size, uint32_t seed, uint64_t offset)
{
    for (uint64_t i = 0; i < size; i++)
        if (fx_get(at + i) != fx_byte(seed, offset + i))
            check_failed(__FILE__, __LINE__, "byte %llu of %p is %d, not %d (file %u)", (unsigned long long)i,
                         (const void *)at, fx_get(at + i), fx_byte(seed, offset + i), seed);
}

void fx_check_all(const char *at, uint64_t size, unsigned char value)
{
    for (uint64_t i = 0; i < size; i++)
        if (fx_get(at + i) != value)
            check_failed(__FILE__, __LINE__, "byte %llu of %p is %d, not %d", (unsigned long long)i, (const void *)at,
                         fx_get(at + i), value);
}

void fx_check_same(const void *got, const void *wanted, uint64_t size, uint64_t position)
{
    const unsigned char *g = got, *w = wanted;
    if (memcmp(g, w, size) == 0) return;
    uint64_t i = 0;
    while (g[i] == w[i]) i++;
    check_failed(__FILE__, __LINE__, "position %llu (block %llu, page %llu) holds %d, not %d",
                 (unsigned long long)(position + i), (unsigned long long)((position + i) / ZB_BLOCK),
                 (unsigned long long)((position + i) % ZB_BLOCK / ZB_PAGE), g[i], w[i]);
}

uint64_t fx_next(fx_random *r)
{
    uint64_t x = r->state += 0x9E3779B97F4A7C15u; /* splitmix64 */
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

uint64_t fx_below(fx_random *r, uint64_t limit)
{
    return fx_next(r) % limit;
}

/* -- spaces --------------------------------------------------------------------------------------------------- */

zb_space *fx_space(uint64_t id)
{
    char prefix[32];
    zb_space *s;
    snprintf(prefix, sizeof prefix, "s%llu", (unsigned long long)id);
    CHECK_OK(zb_space_new(&s, id, directory, prefix));
    return s;
}

static void scratch_path(char *out, size_t size, uint64_t id, uint64_t file)
{
    snprintf(out, size, "%s/s%llu-%llu", directory, (unsigned long long)id, (unsigned long long)file);
}

int fx_scratch_open(uint64_t id, uint64_t file)
{
    char path[PATH_MAX + 48];
    scratch_path(path, sizeof path, id, file);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK_SYS(fd);
    return fd;
}

void fx_scratch_remove(uint64_t id, uint64_t first, uint64_t last)
{
    char path[PATH_MAX + 48];
    for (uint64_t k = first; k < last; k++) {
        scratch_path(path, sizeof path, id, k);
        CHECK_SYS(unlink(path));
    }
}

zb_window *fx_window(zb_space *s, uint64_t start, uint64_t length)
{
    zb_window *w;
    CHECK_OK(zb_window_new(&w, s, start, length));
    CHECK_EQ((uintptr_t)zb_window_base(w) % ZB_BLOCK, 0);
    return w;
}

int fx_fill(zb_space *s, zb_window *w, uint64_t lo, uint64_t hi, int fd, int64_t offset)
{
    zb_piece piece = {lo, hi, offset, fd};
    return zb_fill(w, zb_space_epoch(s), lo, hi, &piece, 1);
}

/* -- loader --------------------------------------------------------------------------------------------------- */

typedef struct {
    fx_serve *serve;
    void *context;
} loader_arguments;

static void *loader_main(void *p)
{
    loader_arguments a = *(loader_arguments *)p;
    free(p);
    zb_request r;
    int result;
    while ((result = zb_request_next(&r)) == 0) {
        fx_gil_take();
        a.serve(&r, a.context);
        if (r.want & ZB_WANT_NOTICE) zb_request_told(&r);
        fx_gil_drop();
    }
    CHECK_EQ(result, -ESHUTDOWN);
    return NULL;
}

void fx_loader(fx_serve *serve, void *context)
{
    pthread_t thread;
    loader_arguments *a = malloc(sizeof *a);
    CHECK(a);
    *a = (loader_arguments){serve, context};
    CHECK_OK(pthread_create(&thread, NULL, loader_main, a));
    CHECK_OK(pthread_detach(thread));
}

/* -- store ---------------------------------------------------------------------------------------------------- */

#define MAX_FD 4096

void fx_store_open(fx_store *store, uint64_t id, uint64_t npages)
{
    store->id = id;
    store->npages = npages;
    store->pages = malloc(npages * sizeof *store->pages);
    store->used = calloc(MAX_FD, sizeof *store->used);
    CHECK(store->pages && store->used);
    for (uint64_t p = 0; p < npages; p++) store->pages[p] = (fx_page){-1, 0};
}

void fx_store_close(fx_store *store)
{
    for (int fd = 0; fd < MAX_FD; fd++)
        if (store->used[fd]) close(fd);
    free(store->pages);
    free(store->used);
}

static void store_page(fx_store *store, uint64_t page, fx_page to)
{
    CHECK_LE(page + 1, store->npages);
    fx_page *p = &store->pages[page];
    if (p->fd >= 0 && --store->used[p->fd] == 0) close(p->fd);
    *p = to;
    store->used[to.fd]++;
}

static void remove_files(fx_store *store, uint64_t first, uint64_t last, bool but_the_last)
{
    if (store->resumed && (store->file < first || store->file >= last))
        fx_scratch_remove(store->id, store->file, store->file + 1);
    store->resumed = but_the_last;
    store->file = last - 1;
    fx_scratch_remove(store->id, first, last - but_the_last);
}

void fx_store_ended(fx_store *store, uint64_t first, uint64_t last)
{
    remove_files(store, first, last, false);
}

uint64_t fx_store_freeze(fx_store *store, zb_space *s, bool resume)
{
    zb_run *runs;
    size_t n;
    uint64_t first, last, pages = 0;
    int fds[64];
    CHECK_OK(zb_freeze(s, &runs, &n, &first, &last));
    CHECK_LE(last - first, 64);
    for (uint64_t k = first; k < last; k++) {
        fds[k - first] = fx_scratch_open(store->id, k);
        CHECK_LE(fds[k - first], MAX_FD - 1);
        store->used[fds[k - first]]++; /* until all runs are in */
    }
    remove_files(store, first, last, resume && last > first && zb_resume(s, last - 1) == 0);
    for (size_t i = 0; i < n; i++) {
        CHECK(runs[i].start < runs[i].stop && runs[i].start % ZB_PAGE == 0 && runs[i].stop % ZB_PAGE == 0);
        CHECK(runs[i].file >= first && runs[i].file < last);
        CHECK_EQ(runs[i].offset % ZB_BLOCK, runs[i].start % ZB_BLOCK);
        if (i) CHECK_LE(runs[i - 1].stop, runs[i].start);
        for (uint64_t at = runs[i].start; at < runs[i].stop; at += ZB_PAGE, pages++)
            store_page(store, at / ZB_PAGE, (fx_page){fds[runs[i].file - first], runs[i].offset + at - runs[i].start});
    }
    for (uint64_t k = first; k < last; k++)
        if (--store->used[fds[k - first]] == 0) close(fds[k - first]);
    zb_runs_free(runs);
    return pages;
}

size_t fx_store_pieces(const fx_store *store, uint64_t lo, uint64_t hi, zb_piece *pieces)
{
    size_t n = 0;
    for (uint64_t at = lo; at < hi; at += ZB_PAGE) {
        fx_page p = at / ZB_PAGE < store->npages ? store->pages[at / ZB_PAGE] : (fx_page){-1, 0};
        zb_piece *last = n ? &pieces[n - 1] : NULL;
        if (last && last->fd == p.fd && (p.fd < 0 || (uint64_t)last->offset + at - last->start == p.offset))
            last->stop = at + ZB_PAGE;
        else
            pieces[n++] = (zb_piece){at, at + ZB_PAGE, (int64_t)p.offset, p.fd};
    }
    return n;
}
