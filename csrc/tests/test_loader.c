/* SPDX-License-Identifier: MIT
 * test_loader.c - read faults, served by loader threads that need what the faulting thread holds: the GIL. */
#define _GNU_SOURCE
#include "fixture.h"

#include <errno.h>
#include <stdatomic.h>

#define P ZB_PAGE
#define B ZB_BLOCK
enum { BLOCKS = 32, THREADS = 8 };

/* The space under test: what the loader fills with, what it saw. A test sets `serve` to do it its own way. */
static struct {
    zb_space *s;
    zb_window *w;
    char *base;
    int fd;
    uint32_t seed;
    fx_serve *_Atomic serve;
    _Atomic unsigned asked[BLOCKS], checks, notices, served;
    _Atomic uint64_t noticed_thread, noticed_position;
    _Atomic int noticed_error;
} t;
static uint64_t next_id = 1;

static void serve_from_file(const zb_request *r, void *context)
{
    (void)context;
    CHECK_OK(fx_fill(t.s, t.w, r->position, r->position + B, t.fd, (int64_t)r->position));
}

static void dispatch(const zb_request *r, void *context)
{
    CHECK(fx_gil_held());
    if (r->space != next_id) return; /* of a space that is closed */
    if (r->want & ZB_WANT_NOTICE) {
        t.noticed_thread = r->thread;
        t.noticed_position = r->position;
        t.noticed_error = r->error;
        t.notices++;
    }
    if (r->want & ZB_WANT_CHECK) t.checks++;
    if (r->want & ZB_WANT_FILL) {
        CHECK_EQ(r->position % B, 0);
        t.asked[r->position / B]++;
        fx_serve *serve = t.serve;
        serve(r, context);
        t.served++;
    }
}

/* Loaders hold the GIL while they serve: so none is still busy with the test before. */
static void begin(void)
{
    fx_gil_take();
    next_id++;
    t.s = fx_space(next_id);
    t.w = fx_window(t.s, 0, BLOCKS * B);
    t.base = zb_window_base(t.w);
    t.seed = (uint32_t)next_id;
    t.fd = fx_file(BLOCKS * B, t.seed);
    t.serve = serve_from_file;
    t.checks = t.notices = t.served = 0;
    for (int b = 0; b < BLOCKS; b++) t.asked[b] = 0;
    fx_gil_drop();
}

static void end(void)
{
    uint64_t first, last;
    fx_gil_take();
    CHECK_OK(zb_discard(t.s, &first, &last));
    fx_scratch_remove(next_id, first, last);
    next_id++; /* what is still asked for is not served */
    zb_window_free(t.w);
    zb_space_free(t.s);
    close(t.fd);
    fx_gil_drop();
}

static void wait_until(_Atomic unsigned *value, unsigned at_least)
{
    while (*value < at_least) usleep(1000);
}

static void in_threads(int n, void *(*run)(void *), void *argument)
{
    pthread_t threads[THREADS];
    CHECK_LE(n, THREADS);
    for (int i = 0; i < n; i++) CHECK_OK(pthread_create(&threads[i], NULL, run, argument));
    for (int i = 0; i < n; i++) CHECK_OK(pthread_join(threads[i], NULL));
}

/* -- the way there and back ----------------------------------------------------------------------------------- */

static void the_gil_is_given_up_and_taken_again(void)
{
    begin();
    unsigned before = fx_gil_detached();
    zb_count c = fx_count();
    fx_gil_take();
    fx_check_file(t.base + 3 * B, B, t.seed, 3 * B);
    CHECK(fx_gil_held());
    CHECK_EQ(fx_gil_detached(), before + 1);
    CHECK_EQ(fx_get(t.base + 4 * B), fx_byte(t.seed, 4 * B));
    fx_gil_drop();
    CHECK_EQ(fx_gil_detached(), before + 2);
    CHECK_EQ(t.asked[3], 1);
    CHECK_EQ(fx_count().read_faults, c.read_faults + 2);
    CHECK_EQ(fx_count().fills, c.fills + 2);
    CHECK_EQ(zb_absent(t.w, 0, BLOCKS * B), 0);
    end();
}

static void a_thread_without_the_gil_gives_up_nothing(void)
{
    begin();
    unsigned before = fx_gil_detached();
    CHECK_EQ(fx_get(t.base + 5), fx_byte(t.seed, 5));
    CHECK(!fx_gil_held());
    CHECK_EQ(fx_gil_detached(), before);
    end();
}

static void a_write_to_an_absent_block_is_filled_then_served(void)
{
    begin();
    fx_gil_take();
    fx_put(t.base + B + 100, 7);
    CHECK(fx_gil_held());
    fx_gil_drop();
    CHECK_EQ(zb_space_dirty(t.s), 1);
    CHECK_EQ(fx_get(t.base + B + 100), 7);
    fx_check_file(t.base + B, 100, t.seed, B);
    fx_check_file(t.base + B + 101, B - 101, t.seed, B + 101);
    end();
}

static void *read_all(void *with_gil)
{
    static _Atomic unsigned turn;
    uint64_t shift = turn++ * 5;
    if (with_gil) fx_gil_take();
    for (uint64_t i = 0; i < BLOCKS; i++) {
        uint64_t at = (i + shift) % BLOCKS * B + shift;
        CHECK_EQ(fx_get(t.base + at), fx_byte(t.seed, at));
    }
    if (with_gil) fx_gil_drop();
    return NULL;
}

static void a_block_is_filled_once_whoever_waits(void)
{
    for (int with_gil = 0; with_gil < 2; with_gil++) {
        begin();
        uint64_t fills = fx_count().fills;
        in_threads(THREADS, read_all, with_gil ? &t : NULL);
        for (int b = 0; b < BLOCKS; b++) CHECK_EQ(t.asked[b], 1);
        CHECK_EQ(fx_count().fills - fills, BLOCKS);
        end();
    }
}

/* -- fills that come late or wrong: the block is asked for again ---------------------------------------------- */

static int other_fd;
static void (*meanwhile)(void);

/* The first fill of a block is planned from the old file; then something happens; it is too late. */
static void serve_late(const zb_request *r, void *context)
{
    if (t.served > 0) {
        CHECK_OK(fx_fill(t.s, t.w, r->position, r->position + B, other_fd, (int64_t)r->position));
        return;
    }
    zb_piece piece = {r->position, r->position + B, (int64_t)r->position, t.fd};
    uint64_t epoch = zb_space_epoch(t.s);
    (void)context;
    meanwhile();
    CHECK_EQ(zb_fill(t.w, epoch, r->position, r->position + B, &piece, 1), -ESTALE);
}

static void late(void (*what)(void))
{
    begin();
    meanwhile = what;
    other_fd = fx_file(BLOCKS * B, 1000);
    t.serve = serve_late;
    fx_check_file(t.base + 2 * B, B, 1000, 2 * B);
    CHECK_LE(2, t.asked[2]);
    CHECK_LE(t.asked[2], 3); /* once more if it is asked for again before the late fill comes */
    close(other_fd);
    end();
}

static void drop_it(void)
{
    CHECK_OK(zb_drop(t.s, 2 * B, 3 * B, 0));
}

static void drop_another(void)
{
    CHECK_OK(zb_drop(t.s, 9 * B, 10 * B, 0));
}

static void drop_holes(void)
{
    CHECK_OK(zb_drop(t.s, 0, BLOCKS * B, ZB_DROP_HOLES));
}

static void discard(void)
{
    uint64_t first, last;
    CHECK_OK(zb_discard(t.s, &first, &last));
}

static void drop_during_a_fill(void)
{
    late(drop_it);
}

static void drop_elsewhere_during_a_fill(void)
{
    late(drop_another);
}

static void drop_of_holes_during_a_fill(void)
{
    late(drop_holes);
}

static void discard_during_a_fill(void)
{
    late(discard);
}

static void serve_wrong(const zb_request *r, void *context)
{
    zb_piece piece = {r->position + P, r->position + B, 0, -1};
    if (t.served == 0)
        CHECK_EQ(zb_fill(t.w, zb_space_epoch(t.s), r->position, r->position + B, &piece, 1), -EINVAL);
    else
        serve_from_file(r, context);
}

static void a_failed_fill(void)
{
    begin();
    t.serve = serve_wrong;
    CHECK_EQ(fx_get(t.base + B), fx_byte(t.seed, B));
    CHECK_EQ(t.asked[1], 2);
    end();
}

/* Page 0 of a block that is absent otherwise is dirty. A fill planned before it is frozen has its old bytes. */
static void freeze_it(void)
{
    zb_run *runs;
    size_t n;
    uint64_t first, last;
    CHECK_OK(zb_freeze(t.s, &runs, &n, &first, &last));
    CHECK_EQ(n, 1);
    CHECK_EQ(runs[0].start, 2 * B);
    zb_runs_free(runs);
    fx_scratch_remove(next_id, first, last);
}

static void freeze_during_a_fill(void)
{
    begin();
    static char page[P];
    memset(page, 5, P);
    CHECK_OK(zb_write(t.w, 2 * B, 2 * B + P, page));
    meanwhile = freeze_it;
    other_fd = fx_file(3 * B, 1000); /* what is committed then */
    CHECK_EQ(pwrite(other_fd, page, P, 2 * B), P);
    t.serve = serve_late;
    CHECK_EQ(fx_get(t.base + 2 * B + P), fx_byte(1000, 2 * B + P));
    fx_check_all(t.base + 2 * B, P, 5);
    CHECK_EQ(t.asked[2], 2);
    close(other_fd);
    end();
}

/* A reader and somebody who drops what it reads, for longer than the guard against loops allows for. */
static _Atomic bool enough;

static void *drop_always(void *none)
{
    while (!enough) {
        CHECK_OK(zb_drop(t.s, 0, B, 0));
        for (volatile int i = 0; i < 5000; i++) continue;
    }
    return none;
}

static void serve_if_in_time(const zb_request *r, void *context)
{
    (void)context;
    int result = fx_fill(t.s, t.w, r->position, r->position + B, t.fd, (int64_t)r->position);
    CHECK(result == 0 || result == -ESTALE);
}

static void drops_all_the_time(void)
{
    begin();
    pthread_t thread;
    enough = false;
    t.serve = serve_if_in_time;
    CHECK_OK(pthread_create(&thread, NULL, drop_always, NULL));
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        CHECK_EQ(fx_get(t.base + 9), fx_byte(t.seed, 9));
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec - start.tv_sec < 2);
    enough = true;
    CHECK_OK(pthread_join(thread, NULL));
    end();
}

/* -- files that became short ---------------------------------------------------------------------------------- */

static void serve_other_after_check(const zb_request *r, void *context)
{
    if (r->want & ZB_WANT_CHECK || t.checks)
        CHECK_OK(fx_fill(t.s, t.w, r->position, r->position + B, other_fd, (int64_t)r->position));
    else
        serve_from_file(r, context);
}

static void truncated_begin(void)
{
    begin();
    other_fd = fx_file(BLOCKS * B, t.seed);
    t.serve = serve_other_after_check;
    for (uint64_t b = 0; b < BLOCKS; b++) CHECK_EQ(fx_get(t.base + b * B), fx_byte(t.seed, b * B));
    CHECK_SYS(ftruncate(t.fd, 0));
}

static void a_truncated_file_is_checked_on_reading(void)
{
    truncated_begin();
    uint64_t before = fx_count().bus_faults;
    fx_gil_take();
    CHECK_EQ(fx_get(t.base + 5 * B + P), fx_byte(t.seed, 5 * B + P));
    CHECK(fx_gil_held());
    fx_gil_drop();
    CHECK_EQ(t.checks, 1);
    CHECK_EQ(t.asked[5], 2);
    CHECK_EQ(fx_count().bus_faults, before + 1);
    close(other_fd);
    end();
}

static void a_truncated_file_is_checked_on_writing(void)
{
    truncated_begin();
    fx_put(t.base + 5 * B + P, 42);
    CHECK_EQ(t.checks, 1);
    CHECK_EQ(zb_space_error(t.s), 0);
    CHECK_EQ(fx_get(t.base + 5 * B + P), 42);
    fx_check_file(t.base + 5 * B, P, t.seed, 5 * B);
    fx_check_file(t.base + 5 * B + P + 1, B - P - 1, t.seed, 5 * B + P + 1);
    close(other_fd);
    end();
}

static void a_truncated_file_under_many_threads(void)
{
    truncated_begin();
    in_threads(THREADS, read_all, NULL);
    CHECK_LE(1, t.checks);
    close(other_fd);
    end();
}

/* -- faults of loaders, and of finalizers ---------------------------------------------------------------------- */

enum { QUICKLY = 300, PATIENTLY = 60000 };
static _Atomic int seen_by_loader;

/* Serving block 1 touches block 5, as a finalizer might that is run in a loader. */
static void serve_and_touch(const zb_request *r, void *context)
{
    if (r->position == B) seen_by_loader = fx_get(t.base + 5 * B + 77);
    serve_from_file(r, context);
}

static void a_loader_is_served_by_another(void)
{
    begin();
    zb_patience(PATIENTLY);
    t.serve = serve_and_touch;
    CHECK_EQ(fx_get(t.base + B), fx_byte(t.seed, B));
    CHECK_EQ(seen_by_loader, fx_byte(t.seed, 5 * B + 77));
    CHECK_EQ(zb_space_error(t.s), 0);
    CHECK_EQ(t.notices, 0);
    end();
}

static void serve_all_but_block_5(const zb_request *r, void *context)
{
    if (r->position != 5 * B) serve_and_touch(r, context);
}

static void spoiled_until_discarded(void)
{
    uint64_t first, last;
    zb_run *runs;
    size_t n;
    wait_until(&t.notices, 1);
    CHECK_EQ(t.noticed_error, EDEADLK);
    CHECK_EQ(t.noticed_position / B, 5);
    CHECK_EQ(zb_space_error(t.s), EDEADLK);
    CHECK_EQ(zb_freeze(t.s, &runs, &n, &first, &last), -EDEADLK);
    t.serve = serve_from_file;
    CHECK_OK(zb_discard(t.s, &first, &last));
    CHECK_EQ(zb_space_error(t.s), 0);
    fx_check_file(t.base + 5 * B, B, t.seed, 5 * B);
}

static void a_loader_that_cannot_be_served(void)
{
    begin();
    zb_patience(QUICKLY);
    t.serve = serve_all_but_block_5;
    CHECK_EQ(fx_get(t.base + B), fx_byte(t.seed, B));
    CHECK_EQ(seen_by_loader, 0xFF);
    spoiled_until_discarded();
    end();
}

/* All loaders wait for a lock that the thread which runs a finalizer holds: here, the request of block 5. */
static void a_finalizer_that_cannot_be_served(void)
{
    begin();
    zb_patience(QUICKLY);
    t.serve = serve_all_but_block_5;
    fx_gil_take();
    zb_collecting(L"start", NULL);
    CHECK_EQ(fx_get(t.base + 5 * B), 0xFF);
    CHECK_EQ(fx_get(t.base + 2 * B), fx_byte(t.seed, 2 * B));
    CHECK_EQ(t.notices, 0);
    zb_collecting(L"stop", NULL);
    CHECK(fx_gil_held());
    fx_gil_drop();
    spoiled_until_discarded();
    CHECK_EQ(t.noticed_thread, (uint64_t)pthread_self());
    end();
}

static void a_finalizer_that_writes(void)
{
    begin();
    zb_patience(QUICKLY);
    t.serve = serve_all_but_block_5;
    zb_collecting(L"start", NULL);
    fx_put(t.base + 5 * B + 9, 3);
    zb_collecting(L"stop", NULL);
    CHECK_EQ(fx_get(t.base + 5 * B + 9), 3);
    CHECK_EQ(fx_get(t.base + 5 * B + 8), 0xFF);
    CHECK_EQ(zb_space_dirty(t.s), 1);
    uint64_t first, last;
    wait_until(&t.notices, 1);
    t.serve = serve_from_file;
    CHECK_OK(zb_discard(t.s, &first, &last));
    fx_scratch_remove(next_id, first, last);
    fx_check_file(t.base + 5 * B, B, t.seed, 5 * B);
    end();
}

/* -- the end -------------------------------------------------------------------------------------------------- */

static void a_closed_space(void)
{
    begin();
    CHECK_EQ(fx_get(t.base), fx_byte(t.seed, 0));
    zb_space_close(t.s);
    fx_check_file(t.base, B, t.seed, 0);
    CHECK_EQ(t.notices, 0);
    fx_check_all(t.base + B, B, 0xFF);
    CHECK_EQ(t.notices, 1); /* before the thread went on */
    CHECK_EQ(t.noticed_error, ENOTCONN);
    CHECK_EQ(t.noticed_thread, (uint64_t)pthread_self());
    CHECK_EQ(t.noticed_position / B, 1);
    fx_put(t.base + 10, 42);
    CHECK_EQ(t.notices, 2);
    CHECK_EQ(t.noticed_error, ENOTCONN);
    CHECK_EQ(fx_get(t.base + 10), 42);
    fx_check_file(t.base + 11, P, t.seed, 11);
    CHECK_EQ(zb_space_error(t.s), ENOTCONN);
    CHECK_EQ(t.asked[1], 0);
    end();
}

static void serve_nothing(const zb_request *r, void *context)
{
    (void)r, (void)context;
}

static void *read_ff(void *at)
{
    CHECK_EQ(fx_get(at), 0xFF);
    return NULL;
}

static void closing_wakes_who_waits(void)
{
    begin();
    t.serve = serve_nothing;
    pthread_t a, b;
    CHECK_OK(pthread_create(&a, NULL, read_ff, t.base + B));
    CHECK_OK(pthread_create(&b, NULL, read_ff, t.base + B + P));
    wait_until(&t.served, 1);
    zb_space_close(t.s);
    CHECK_OK(pthread_join(a, NULL));
    CHECK_OK(pthread_join(b, NULL));
    end();
}

/* The thread waits to be told, which takes the GIL that it holds. */
static void a_notice_with_the_gil_held(void)
{
    begin();
    zb_space_close(t.s);
    fx_gil_take();
    for (uint64_t b = 0; b < BLOCKS; b++) {
        CHECK_EQ(fx_get(t.base + b * B), 0xFF);
        CHECK(fx_gil_held());
        CHECK_EQ(t.notices, b + 1);
    }
    fx_gil_drop();
    end();
}

static void *read_once(void *with_gil)
{
    static _Atomic unsigned turn;
    if (with_gil) fx_gil_take();
    CHECK_EQ(fx_get(t.base + turn++ * B), 0xFF);
    if (with_gil) fx_gil_drop();
    return NULL;
}

static void notices_of_many_threads(void)
{
    begin();
    zb_space_close(t.s);
    for (int i = 0; i < BLOCKS / THREADS; i++) in_threads(THREADS, read_once, i % 2 ? &t : NULL);
    CHECK_EQ(t.notices, BLOCKS);
    end();
}

static void *wait_for_request(void *none)
{
    zb_request r;
    while (zb_request_next(&r) == 0) continue; /* and tells nobody */
    CHECK_EQ(zb_request_next(&r), -ESHUTDOWN);
    return none;
}

/* Who waits for a fill, to be told (the loaders are too busy for that) and for requests. */
static void shutdown_wakes_all(void)
{
    begin();
    t.serve = serve_nothing;
    zb_space *closed = fx_space(0);
    zb_window *w = fx_window(closed, 0, B);
    zb_space_close(closed);
    pthread_t reader, warned, loader;
    CHECK_OK(pthread_create(&reader, NULL, read_ff, t.base + B));
    wait_until(&t.served, 1);
    CHECK_OK(pthread_create(&loader, NULL, wait_for_request, NULL));
    usleep(20000);
    fx_gil_take();
    CHECK_OK(pthread_create(&warned, NULL, read_ff, zb_window_base(w)));
    usleep(20000);
    zb_shutdown();
    CHECK_OK(pthread_join(reader, NULL));
    CHECK_OK(pthread_join(warned, NULL));
    CHECK_OK(pthread_join(loader, NULL));
    fx_gil_drop();
    zb_window_free(w);
    zb_space_free(closed);
    fx_check_all(t.base + 2 * B, B, 0xFF); /* and nobody waits any more */
    fx_put(t.base + 2 * B, 1);
    CHECK_EQ(zb_space_error(t.s), 0);
    end();
}

int main(void)
{
    fx_start(100);
    fx_loader(dispatch, NULL);
    fx_loader(dispatch, NULL);
    RUN(the_gil_is_given_up_and_taken_again);
    RUN(a_thread_without_the_gil_gives_up_nothing);
    RUN(a_write_to_an_absent_block_is_filled_then_served);
    RUN(a_block_is_filled_once_whoever_waits);
    RUN(drop_during_a_fill);
    RUN(drop_elsewhere_during_a_fill);
    RUN(drop_of_holes_during_a_fill);
    RUN(discard_during_a_fill);
    RUN(a_failed_fill);
    RUN(freeze_during_a_fill);
    RUN(drops_all_the_time);
    RUN(a_truncated_file_is_checked_on_reading);
    RUN(a_truncated_file_is_checked_on_writing);
    RUN(a_truncated_file_under_many_threads);
    RUN(a_loader_is_served_by_another);
    RUN(a_loader_that_cannot_be_served);
    RUN(a_finalizer_that_cannot_be_served);
    RUN(a_finalizer_that_writes);
    RUN(a_closed_space);
    RUN(closing_wakes_who_waits);
    RUN(a_notice_with_the_gil_held);
    RUN(notices_of_many_threads);
    RUN(shutdown_wakes_all);
    return 0;
}
