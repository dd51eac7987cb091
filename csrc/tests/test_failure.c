/* SPDX-License-Identifier: MIT
 * test_failure.c - scratch files that cannot take what is written. The argument says why: "directory" (it does
 * not exist), "full" (a tiny tmpfs; needs root), "size" (RLIMIT_FSIZE). The writing thread must live and see its
 * bytes in every window, must hear of it, and nothing may be saved. */
#define _GNU_SOURCE
#include "fixture.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define P ZB_PAGE
#define B ZB_BLOCK
enum { BLOCKS = 8 };

static struct {
    int error;      /* what writes meet */
    uint64_t fits;  /* so many bytes can be written before they do */
    char bad[4096]; /* the directory */
    void (*heal)(void);
} why;

static zb_space *s;
static zb_window *w;
static char *base;
static int fd;

static struct {
    _Atomic unsigned notices;
    _Atomic int error;
    _Atomic uint64_t thread;
} heard;

static void hear(const zb_request *r, void *context)
{
    (void)context;
    if (r->want == ZB_WANT_FILL) {
        CHECK_OK(fx_fill(s, w, r->position, r->position + B, fd, (int64_t)r->position));
        return;
    }
    CHECK_EQ(r->want, ZB_WANT_NOTICE);
    heard.error = r->error;
    heard.thread = r->thread;
    heard.notices++;
}

static void begin(void)
{
    CHECK_OK(zb_space_new(&s, 1, why.bad, "bad"));
    w = fx_window(s, 0, BLOCKS * B);
    base = zb_window_base(w);
    CHECK_OK(fx_fill(s, w, 0, (BLOCKS - 1) * B, fd, 0));
    CHECK_EQ(fx_get(base + (BLOCKS - 1) * B), fx_byte(1, (BLOCKS - 1) * B)); /* so the loader is there */
    heard.notices = 0;
}

static void remove_files(uint64_t first, uint64_t last)
{
    char path[4096 + 64];
    for (; first < last; first++) {
        snprintf(path, sizeof path, "%s/bad-%llu", why.bad, (unsigned long long)first);
        CHECK_SYS(unlink(path));
    }
}

/* After discard everything is as it had been. */
static void discard(void)
{
    uint64_t first, last;
    CHECK_OK(zb_discard(s, &first, &last));
    remove_files(first, last);
    CHECK_EQ(zb_space_error(s), 0);
    CHECK_EQ(zb_space_dirty(s), 0);
    CHECK_OK(fx_fill(s, w, 0, BLOCKS * B, fd, 0));
    fx_check_file(base, BLOCKS * B, 1, 0);
}

static void end(void)
{
    uint64_t first, last;
    CHECK_OK(zb_discard(s, &first, &last));
    remove_files(first, last);
    zb_window_free(w);
    zb_space_free(s);
}

static void cannot_freeze(void)
{
    zb_run *runs;
    size_t n;
    uint64_t first, last;
    CHECK_EQ(zb_freeze(s, &runs, &n, &first, &last), -why.error);
}

/* Use up what fits; then write byte 0 of page 3 of block 6. */
static void write_too_much(void)
{
    for (uint64_t at = 0; at < why.fits; at += P) fx_put(base + at, 1);
    fx_put(base + 6 * B + 3 * P, 42);
}

static void the_write_goes_to_private_memory(void)
{
    begin();
    uint64_t overflows = fx_count().overflows;
    write_too_much();
    CHECK_EQ(fx_get(base + 6 * B + 3 * P), 42);
    fx_check_file(base + 6 * B, 3 * P, 1, 6 * B);
    fx_check_file(base + 6 * B + 3 * P + 1, B - 3 * P - 1, 1, 6 * B + 3 * P + 1);
    CHECK_EQ(zb_space_error(s), why.error);
    CHECK_EQ(heard.notices, 1); /* before the thread went on */
    CHECK_EQ(heard.error, why.error);
    CHECK_EQ(heard.thread, (uint64_t)pthread_self());
    fx_put(base + 6 * B + 3 * P + 1, 43); /* once it is private it is */
    CHECK_LE(1, fx_count().overflows - overflows);
    cannot_freeze();
    discard();
    end();
}

static void it_goes_on_so(void)
{
    begin();
    write_too_much();
    for (uint64_t at = 5 * B; at < 8 * B; at += 8) fx_put(base + at, (unsigned char)(at / 8));
    for (uint64_t at = 5 * B; at < 8 * B; at += 8) CHECK_EQ(fx_get(base + at), (unsigned char)(at / 8));
    CHECK_OK(zb_release(w)); /* must not lose it */
    CHECK_EQ(fx_get(base + 5 * B + 16), 2);
    CHECK_OK(zb_drop(s, 0, BLOCKS * B, 0));
    CHECK_EQ(fx_get(base + 5 * B + 16), 2);
    cannot_freeze();
    CHECK_EQ(heard.notices, 1); /* one a generation */
    discard();
    end();
}

static void every_window_sees_it(void)
{
    begin();
    zb_window *v = fx_window(s, 5 * B, 3 * B); /* absent there */
    char *other = zb_window_base(v) - 5 * B;
    write_too_much();
    CHECK_EQ(fx_get(other + 6 * B + 3 * P), 42);
    fx_put(other + 6 * B + 3 * P + 1, 43);
    CHECK_EQ(fx_get(base + 6 * B + 3 * P + 1), 43);
    CHECK_OK(fx_fill(s, v, 5 * B, 8 * B, fd, 5 * B));
    CHECK_EQ(fx_get(other + 6 * B + 3 * P), 42);
    fx_put(other + 6 * B + 4 * P, 44);
    CHECK_EQ(fx_get(base + 6 * B + 4 * P), 44);
    fx_put(base + 6 * B + 4 * P + 1, 45);
    CHECK_EQ(fx_get(other + 6 * B + 4 * P + 1), 45);
    CHECK_EQ(fx_get(other + 6 * B + 5 * P), fx_byte(1, 6 * B + 5 * P));
    zb_window_free(v);
    discard();
    end();
}

static void a_new_window_sees_it(void)
{
    begin();
    write_too_much();
    zb_window *v = fx_window(s, 5 * B, 3 * B);
    char *other = zb_window_base(v) - 5 * B;
    CHECK_EQ(fx_get(other + 6 * B + 3 * P), 42);
    CHECK_OK(fx_fill(s, v, 5 * B, 8 * B, fd, 5 * B));
    fx_put(other + 6 * B + 3 * P + 1, 43);
    CHECK_EQ(fx_get(base + 6 * B + 3 * P + 1), 43);
    fx_check_file(other + 6 * B, 3 * P, 1, 6 * B);
    zb_window_free(w); /* its views are gone; what the other shows stays */
    w = v;
    CHECK_EQ(fx_get(other + 6 * B + 3 * P), 42);
    zb_window_free(v);
    w = fx_window(s, 0, BLOCKS * B); /* the bytes are lost, with the generation; but nothing crashes */
    base = zb_window_base(w);
    CHECK_OK(fx_fill(s, w, 0, BLOCKS * B, fd, 0));
    (void)fx_get(base + 6 * B + 3 * P);
    fx_put(base + 6 * B + 3 * P, 46);
    CHECK_EQ(fx_get(base + 6 * B + 3 * P), 46);
    cannot_freeze();
    discard();
    end();
}

static void direct_writes_return_it(void)
{
    static char source[6 * B];
    memset(source, 7, sizeof source);
    begin();
    CHECK_EQ(zb_write(w, 0, BLOCKS * B, NULL), -why.error);
    discard();
    CHECK_EQ(zb_write(w, B, 7 * B, source), -why.error);
    fx_check_file(base + 7 * B, B, 1, 7 * B);
    discard();
    end();
}

/* With room again, discarding is enough to go on. */
static void discard_heals(void)
{
    begin();
    write_too_much();
    cannot_freeze();
    discard();
    why.heal();
    CHECK_OK(zb_space_scratch(s, fx_directory()));
    for (uint64_t at = 0; at < BLOCKS * B; at += P) fx_put(base + at + 1, 42);
    CHECK_EQ(zb_space_error(s), 0);
    zb_run *runs;
    size_t n;
    uint64_t first, last;
    char byte, path[4096 + 64];
    CHECK_OK(zb_freeze(s, &runs, &n, &first, &last));
    CHECK_EQ(n, 1);
    CHECK_EQ(last - first, 1);
    snprintf(path, sizeof path, "%s/bad-%llu", fx_directory(), (unsigned long long)first);
    FILE *f = fopen(path, "r");
    CHECK(f);
    CHECK_SYS(fseek(f, 6 * B + 1, SEEK_SET));
    CHECK_EQ(fread(&byte, 1, 1, f), 1);
    CHECK_EQ(byte, 42);
    fclose(f);
    zb_runs_free(runs);
    zb_window_free(w);
    zb_space_free(s);
}

/* -- reasons -------------------------------------------------------------------------------------------------- */

static void nothing(void)
{
}

static void no_directory(void)
{
    why.error = ENOENT;
    why.heal = nothing;
    snprintf(why.bad, sizeof why.bad, "%s/missing", fx_directory());
}

static void unmount(void)
{
    umount2(why.bad, MNT_DETACH);
    rmdir(why.bad);
}

static void full(void)
{
    why.error = ENOSPC;
    why.heal = unmount;
    why.fits = 5 * B;
    snprintf(why.bad, sizeof why.bad, "%s/tiny", fx_directory());
    CHECK_SYS(mkdir(why.bad, 0700));
    /* In a mount namespace of our own, so that nothing is left behind. */
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        mount("tiny", why.bad, "tmpfs", 0, "size=10m,huge=never")) {
        printf("skipped: cannot mount a tmpfs: %m\n");
        rmdir(why.bad);
        exit(SKIP);
    }
}

static void lift_limit(void)
{
    struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY};
    CHECK_SYS(setrlimit(RLIMIT_FSIZE, &none));
}

static void size_limit(void)
{
    struct rlimit limit = {5 * B, RLIM_INFINITY};
    signal(SIGXFSZ, SIG_IGN);
    CHECK_SYS(setrlimit(RLIMIT_FSIZE, &limit));
    why.error = EFBIG;
    why.heal = lift_limit;
    why.fits = 5 * B;
    snprintf(why.bad, sizeof why.bad, "%s", fx_directory());
}

int main(int argc, char **argv)
{
    const char *reason = argc > 1 ? argv[1] : "directory";
    fx_start(60);
    fd = fx_file(BLOCKS * B, 1);
    strcmp(reason, "full") == 0 ? full() : strcmp(reason, "size") == 0 ? size_limit() : no_directory();
    fx_loader(hear, NULL);
    RUN(the_write_goes_to_private_memory);
    RUN(it_goes_on_so);
    RUN(every_window_sees_it);
    RUN(a_new_window_sees_it);
    RUN(direct_writes_return_it);
    RUN(discard_heals);
    return 0;
}
