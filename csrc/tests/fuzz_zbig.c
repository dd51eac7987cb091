/* SPDX-License-Identifier: MIT
 * fuzz_zbig.c - random sequences of the calls of zbig.h, and of accesses that fault, against a plain array of bytes.
 *
 * One thread does all that an owner of spaces may do, rightly and wrongly; two loaders serve its read faults. After
 * each call that is refused everything must be as before. Rounds begin with seed 1, 2, ..., until the time is over:
 * ZB_FUZZ_SECONDS (5). ZB_FUZZ_SEED=n runs round n alone: a failure names it. */
#define _GNU_SOURCE
#include "fixture.h"

#include <errno.h>
#include <stdatomic.h>

#define P ZB_PAGE
#define B ZB_BLOCK
enum { BLOCKS = 4, WINDOWS = 4, SPACES = 2, STEPS = 250 };
#define SIZE (BLOCKS * B)

typedef struct {
    zb_space *s;
    uint64_t id;
    fx_store store;
    unsigned char *now, *saved; /* what views must show; what is committed */
    bool failed;                /* the generation was said to have failed */
    zb_window *windows[WINDOWS];
    uint64_t starts[WINDOWS], lengths[WINDOWS];
} space;

static struct {
    fx_random random;
    space spaces[SPACES];
    pthread_mutex_t lock; /* of the spaces: held by loaders, and by this thread but for accesses */
    _Atomic uint64_t served;
    uint64_t next_id, calls, refused;
} f;

static uint64_t any(uint64_t limit)
{
    return fx_below(&f.random, limit);
}

/* -- the loaders ---------------------------------------------------------------------------------------------- */

static void serve(const zb_request *r, void *context)
{
    static __thread zb_piece pieces[B / P];
    (void)context;
    if (!(r->want & ZB_WANT_FILL)) return; /* a notice: of a space that was closed */
    f.served++;
    pthread_mutex_lock(&f.lock); /* to the end: whoever waits is awake after the first zb_fill */
    for (int k = 0; k < SPACES; k++) {
        space *a = &f.spaces[k];
        if (a->id != r->space) continue;
        for (int i = 0; i < WINDOWS; i++) {
            zb_window *w = a->windows[i];
            if (!w || r->position < a->starts[i] || r->position >= a->starts[i] + a->lengths[i]) continue;
            size_t n = fx_store_pieces(&a->store, r->position, r->position + B, pieces);
            CHECK_OK(zb_fill(w, zb_space_epoch(a->s), r->position, r->position + B, pieces, n));
        }
    }
    pthread_mutex_unlock(&f.lock);
}

/* -- accesses ------------------------------------------------------------------------------------------------- */

/* A window of the space, and a range of it: of some bytes, some pages or anything. */
static int range(space *a, uint64_t *lo, uint64_t *hi)
{
    int k = (int)any(WINDOWS);
    while (!a->windows[k]) k = (k + 1) % WINDOWS; /* the first one is always there */
    uint64_t most = (uint64_t[]){16, 3 * P, 40 * P, a->lengths[k]}[any(4)];
    *lo = a->starts[k] + any(a->lengths[k]);
    *hi = *lo + 1 + any(most);
    if (*hi > a->starts[k] + a->lengths[k]) *hi = a->starts[k] + a->lengths[k];
    return k;
}

static char *at(space *a, int k, uint64_t position)
{
    return zb_window_base(a->windows[k]) + (position - a->starts[k]);
}

/* Of a long range only some bytes of each page are looked at, or written. */
static uint64_t stride(uint64_t lo, uint64_t hi)
{
    return hi - lo <= 3 * P ? 1 : hi - lo <= 40 * P ? 61 : 1021 + any(3000);
}

static void check_bytes(space *a, int k, uint64_t lo, uint64_t hi)
{
    for (uint64_t p = lo, step = stride(lo, hi); p < hi; p += step) {
        unsigned char got = fx_get(at(a, k, p));
        if (got != a->now[p])
            check_failed(__FILE__, __LINE__, "space %llu, byte %llu (page %llu): %d, not %d", (unsigned long long)a->id,
                         (unsigned long long)p, (unsigned long long)(p / P), got, a->now[p]);
    }
}

static void put_bytes(space *a, int k, uint64_t lo, uint64_t hi)
{
    for (uint64_t p = lo, step = stride(lo, hi); p < hi; p += step) {
        a->now[p] = (unsigned char)fx_next(&f.random);
        fx_put(at(a, k, p), a->now[p]);
    }
}

static void touch(space *a)
{
    uint64_t lo, hi;
    int k = range(a, &lo, &hi);
    bool with_gil = any(2);
    if (with_gil) fx_gil_take();
    any(2) ? check_bytes(a, k, lo, hi) : put_bytes(a, k, lo, hi);
    if (with_gil) fx_gil_drop();
}

static void fill(space *a, int k, uint64_t lo, uint64_t hi)
{
    static zb_piece pieces[SIZE / P];
    lo = lo / B * B;
    hi = (hi + B - 1) / B * B;
    size_t n = fx_store_pieces(&a->store, lo, hi, pieces);
    CHECK_OK(zb_fill(a->windows[k], zb_space_epoch(a->s), lo, hi, pieces, n));
    CHECK_EQ(zb_absent(a->windows[k], lo, hi), hi);
    CHECK_EQ(zb_present(a->windows[k], lo, hi), lo);
}

static void fill_some(space *a)
{
    uint64_t lo, hi;
    int k = range(a, &lo, &hi);
    fill(a, k, lo, hi);
}

static void write_directly(space *a)
{
    uint64_t lo, hi;
    int k = range(a, &lo, &hi);
    if (a->failed) return; /* it may be refused */
    pthread_mutex_lock(&f.lock);
    if (any(2)) {
        lo = lo / P * P;
        hi = (hi + P - 1) / P * P;
        for (uint64_t p = lo; p < hi; p++) a->now[p] = (unsigned char)(p * 31 + f.calls);
        CHECK_OK(zb_write(a->windows[k], lo, hi, a->now + lo));
    } else {
        int r = zb_write(a->windows[k], lo, hi, NULL);
        if (r == -EAGAIN) {
            fill(a, k, lo, hi); /* (to touch it is not enough: just that page may be dirty, and there) */
            r = zb_write(a->windows[k], lo, hi, NULL);
        }
        CHECK_OK(r);
    }
    pthread_mutex_unlock(&f.lock);
    check_bytes(a, k, lo, hi);
}

/* -- the owner's calls ---------------------------------------------------------------------------------------- */

static void discard(space *a)
{
    uint64_t first, last;
    CHECK_OK(zb_discard(a->s, &first, &last));
    fx_store_ended(&a->store, first, last);
    memcpy(a->now, a->saved, SIZE);
    a->failed = false;
    CHECK_EQ(zb_space_error(a->s), 0);
    CHECK_EQ(zb_space_dirty(a->s), 0);
}

static void freeze(space *a)
{
    if (a->failed) {
        zb_run *runs;
        size_t n;
        uint64_t first, last;
        CHECK_EQ(zb_freeze(a->s, &runs, &n, &first, &last), -ENOSPC);
        discard(a);
        return;
    }
    uint64_t dirty = zb_space_dirty(a->s);
    CHECK_EQ(fx_store_freeze(&a->store, a->s, any(2)), dirty);
    memcpy(a->saved, a->now, SIZE);
}

static void other_window(space *a)
{
    int k = 1 + (int)any(WINDOWS - 1);
    if (a->windows[k]) zb_window_free(a->windows[k]);
    a->windows[k] = NULL;
    if (any(3) == 0) return;
    a->starts[k] = any(BLOCKS) * B;
    a->lengths[k] = (1 + any(BLOCKS - a->starts[k] / B)) * B;
    a->windows[k] = fx_window(a->s, a->starts[k], a->lengths[k]);
}

static void fail(space *a)
{
    zb_space_fail(a->s, ENOSPC);
    zb_space_fail(a->s, EIO);
    CHECK_EQ(zb_space_error(a->s), ENOSPC);
    a->failed = true;
}

/* What breaks the rules is refused, whatever it is. */
static void refused(space *a)
{
    uint64_t lo, hi, end, wild = fx_next(&f.random);
    int k = range(a, &lo, &hi);
    zb_window *w = a->windows[k], *none;
    zb_piece one = {a->starts[k], a->starts[k] + B, 0, -1}, two[2] = {one, one};
    uint64_t epoch = zb_space_epoch(a->s);
    end = a->starts[k] + a->lengths[k];
    f.refused++;
    switch (any(14)) {
    case 0: CHECK_EQ(zb_fill(w, epoch + 1 + any(9), one.start, one.stop, &one, 1), -ESTALE); break;
    case 1: CHECK_EQ(zb_fill(w, epoch, one.start, end + B, &one, 1), -EINVAL); break;
    case 2: CHECK_EQ(zb_fill(w, epoch, one.start + 1 + any(B - 1), one.stop, &one, 1), -EINVAL); break;
    case 3: CHECK_EQ(zb_fill(w, epoch, end, one.start, &one, 1), -EINVAL); break;
    case 4: CHECK_EQ(zb_fill(w, epoch, one.start, one.stop, two, 2), -EINVAL); break;
    case 5:
        one.stop = wild % B ? one.start : one.start - B;
        CHECK_EQ(zb_fill(w, epoch, one.start, one.start + B, &one, 1), -EINVAL);
        break;
    case 6:
        one.start += 1 + any(P - 1);
        CHECK_EQ(zb_fill(w, epoch, a->starts[k], one.stop, &one, 1), -EINVAL);
        break;
    case 7:
        one.fd = 0;
        one.offset = 1 + (int64_t)any(P - 1);
        CHECK_EQ(zb_fill(w, epoch, one.start, one.stop, &one, 1), -EINVAL);
        break;
    case 8: CHECK_EQ(zb_write(w, lo, end + 1 + wild % (1ULL << 40), NULL), -EINVAL); break;
    case 9: CHECK_EQ(zb_write(w, hi, lo, NULL), -EINVAL); break;
    case 10: CHECK_EQ(zb_write(w, lo / P * P + 1, lo / P * P + P, a->now), -EINVAL); break;
    case 11: CHECK_EQ(zb_window_new(&none, a->s, wild | 1, B), -EINVAL); break;
    case 12: CHECK_EQ(zb_window_new(&none, a->s, (1ULL << 63) - B * any(2), 2 * B), -EINVAL); break;
    default:
        CHECK_EQ(zb_window_new(&none, a->s, 0, any(2) ? 0 : (1ULL << 62) + 1 + wild / 4), -EINVAL);
        CHECK(zb_resume(a->s, wild | 1ULL << 40) < 0);
        if (zb_space_dirty(a->s)) CHECK_EQ(zb_space_scratch(a->s, fx_directory()), -EBUSY);
    }
    CHECK_EQ(zb_space_epoch(a->s), epoch);
}

static void call(space *a)
{
    uint64_t lo = any(SIZE), hi = lo + any(2 * SIZE);
    pthread_mutex_lock(&f.lock);
    switch (any(16)) {
    case 0: freeze(a); break;
    case 1: any(3) ? freeze(a) : discard(a); break;
    case 2:
    case 3:
    case 4:
        if (!a->failed) CHECK_OK(zb_drop(a->s, any(8) ? lo : 0, any(8) ? hi : ~0ULL, any(4) ? 0 : ZB_DROP_HOLES));
        break;
    case 5:
    case 6: other_window(a); break;
    case 7: CHECK_OK(zb_release(a->windows[0])); break;
    case 8: freeze(a); break;
    case 9: zb_space_limit(a->s, any(3) ? any(SIZE) : fx_next(&f.random)); break;
    case 10: any(6) ? fill_some(a) : fail(a); break;
    case 11: fill_some(a); break;
    default: refused(a);
    }
    pthread_mutex_unlock(&f.lock);
}

static void step(void)
{
    space *a = &f.spaces[any(SPACES)];
    f.calls++;
    switch (any(8)) {
    case 0: write_directly(a); break;
    case 1:
    case 2:
    case 3: touch(a); break;
    default: call(a);
    }
}

/* -- a round -------------------------------------------------------------------------------------------------- */

static void open_space(space *a)
{
    pthread_mutex_lock(&f.lock);
    *a = (space){.id = ++f.next_id};
    a->now = calloc(2, SIZE);
    CHECK(a->now);
    a->saved = a->now + SIZE;
    fx_store_open(&a->store, a->id, SIZE / P);
    a->s = fx_space(a->id);
    a->lengths[0] = SIZE;
    a->windows[0] = fx_window(a->s, 0, SIZE);
    pthread_mutex_unlock(&f.lock);
}

static void close_space(space *a)
{
    for (int k = 0; k < WINDOWS; k++)
        if (a->windows[k]) check_bytes(a, k, a->starts[k], a->starts[k] + a->lengths[k]);
    discard(a);
    check_bytes(a, 0, 0, SIZE);
    zb_window *w = a->windows[0];
    zb_space_close(a->s);
    CHECK_EQ(zb_write(w, 0, P, a->now), -ENOTCONN);
    check_bytes(a, 0, 0, SIZE); /* it is still mapped */
    pthread_mutex_lock(&f.lock);
    for (int k = 0; k < WINDOWS; k++)
        if (a->windows[k]) zb_window_free(a->windows[k]);
    zb_space_free(a->s);
    fx_store_close(&a->store);
    free(a->now);
    a->id = 0;
    pthread_mutex_unlock(&f.lock);
}

static void play(uint64_t seed)
{
    f.random.state = seed;
    for (int k = 0; k < SPACES; k++) open_space(&f.spaces[k]);
    for (int i = 0; i < STEPS; i++) step();
    for (int k = 0; k < SPACES; k++) close_space(&f.spaces[k]);
}

int main(void)
{
    const char *seconds = getenv("ZB_FUZZ_SECONDS"), *only = getenv("ZB_FUZZ_SEED");
    time_t end = time(NULL) + (seconds ? atoi(seconds) : 5);
    uint64_t seed = only ? strtoull(only, NULL, 0) : 1;
    fx_start((int)(end - time(NULL)) + 100);
    CHECK_OK(pthread_mutex_init(&f.lock, NULL));
    fx_loader(serve, NULL);
    fx_loader(serve, NULL);
    do {
        printf("seed %llu\n", (unsigned long long)seed);
        fflush(stdout); /* a crash shows which it was */
        play(seed++);
    } while (!only && time(NULL) < end);
    zb_count c = fx_count();
    printf("%llu calls, %llu refused, %llu read faults (%llu served), %llu write faults\n", (unsigned long long)f.calls,
           (unsigned long long)f.refused, (unsigned long long)c.read_faults, (unsigned long long)f.served,
           (unsigned long long)c.write_faults);
    CHECK(only || (f.refused && f.served && c.write_faults));
    return 0;
}
