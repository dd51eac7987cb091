/* SPDX-License-Identifier: MIT
 * test_stress.c - threads that read and write one space through two windows, while another one freezes, drops and
 * releases. No byte may be wrong at any time. Argument or ZB_STRESS_SECONDS: how long (3), ZB_STRESS_THREADS (4).
 *
 * The words of a page belong to the threads in turn: word i to thread i % (N + 1), which knows what it wrote. The
 * words of number N belong to nobody: all threads add to them, atomically, and the sum must come out. */
#define _GNU_SOURCE
#include "fixture.h"

#include <errno.h>
#include <stdatomic.h>

#define P ZB_PAGE
#define B ZB_BLOCK
enum { BLOCKS = 12, MAX_THREADS = 16, SHARED = 16 };
#define SIZE (BLOCKS * B)
#define WORDS (SIZE / 8)

static struct {
    zb_space *s;
    zb_window *w, *v; /* v begins at V */
    fx_store store;
    pthread_mutex_t lock; /* of the store */
    unsigned threads;
    _Atomic bool stop;
    _Atomic uint64_t reads, writes, adds, freezes, stale;
} t;
#define V (3 * B)

static uint64_t *word(uint64_t i, bool second)
{
    uint64_t at = i * 8;
    char *p = second && at >= V ? zb_window_base(t.v) + (at - V) : zb_window_base(t.w) + at;
    return (uint64_t *)(void *)p;
}

static uint64_t stride(void)
{
    return t.threads + 1;
}

/* -- the loader ----------------------------------------------------------------------------------------------- */

static void fill(zb_window *w, uint64_t position, zb_piece *pieces)
{
    pthread_mutex_lock(&t.lock);
    uint64_t epoch = zb_space_epoch(t.s);
    size_t n = fx_store_pieces(&t.store, position, position + B, pieces);
    pthread_mutex_unlock(&t.lock);
    int r = zb_fill(w, epoch, position, position + B, pieces, n);
    if (r == -ESTALE)
        t.stale++; /* who waits asks again */
    else
        CHECK_OK(r);
}

static void serve(const zb_request *r, void *context)
{
    static __thread zb_piece pieces[B / P];
    (void)context;
    CHECK_EQ(r->want, ZB_WANT_FILL);
    fill(t.w, r->position, pieces);
    if (r->position >= V) fill(t.v, r->position, pieces);
}

/* -- the threads ---------------------------------------------------------------------------------------------- */

static void own_word(fx_random *r, uint64_t number, uint64_t *model)
{
    uint64_t k = fx_below(r, WORDS / stride()), i = k * stride() + number;
    uint64_t count = fx_below(r, 8) ? 1 : 2000; /* now and then many in a row */
    bool write_ = fx_below(r, 3) == 0, second = fx_below(r, 2);
    for (; count && k < WORDS / stride(); count--, k++, i += stride()) {
        uint64_t got = fx_get_word(word(i, second));
        if (got != model[k])
            check_failed(__FILE__, __LINE__, "word %llu (page %llu) is %llx, not %llx", (unsigned long long)i,
                         (unsigned long long)(i * 8 / P), (unsigned long long)got, (unsigned long long)model[k]);
        t.reads++;
        if (!write_) continue;
        model[k] = fx_next(r);
        fx_put_word(word(i, second), model[k]);
        t.writes++;
    }
}

static uint64_t shared_word(uint64_t k)
{
    return k * (WORDS / SHARED) / stride() * stride() + t.threads;
}

static void *work(void *argument)
{
    uint64_t number = (uint64_t)(uintptr_t)argument, *model = calloc(WORDS / stride(), 8);
    CHECK(model);
    fx_random r = {number + 1};
    bool with_gil = number % 2;
    while (!t.stop) {
        if (with_gil) fx_gil_take();
        for (int i = 0; i < 50; i++) own_word(&r, number, model);
        fx_add_to_word(word(shared_word(fx_below(&r, SHARED)), fx_below(&r, 2)), 1);
        t.adds++;
        if (with_gil) fx_gil_drop();
    }
    for (uint64_t k = 0; k < WORDS / stride(); k++) CHECK_EQ(fx_get_word(word(k * stride() + number, k % 2)), model[k]);
    free(model);
    return NULL;
}

static void freeze(void)
{
    pthread_mutex_lock(&t.lock);
    fx_store_freeze(&t.store, t.s, true);
    pthread_mutex_unlock(&t.lock);
    t.freezes++;
}

static void *disturb(void *none)
{
    fx_random r = {99};
    while (!t.stop) {
        uint64_t lo = fx_below(&r, SIZE), hi = lo + fx_below(&r, SIZE / 2);
        switch (fx_below(&r, 6)) {
        case 0: freeze(); break;
        case 1:
        case 2:
        case 3: CHECK_OK(zb_drop(t.s, lo, hi, fx_below(&r, 4) ? 0 : ZB_DROP_HOLES)); break;
        case 4: CHECK_OK(zb_release(fx_below(&r, 2) ? t.w : t.v)); break;
        default: { /* a window that comes and goes */
            zb_window *w = fx_window(t.s, lo / B * B, B + fx_below(&r, SIZE));
            (void)zb_absent(w, lo / B * B, lo / B * B + B);
            zb_window_free(w);
        }
        }
        usleep((useconds_t)fx_below(&r, 4000));
    }
    return none;
}

static unsigned setting(const char *name, unsigned otherwise)
{
    const char *text = getenv(name);
    return text ? (unsigned)atoi(text) : otherwise;
}

int main(int argc, char **argv)
{
    unsigned seconds = argc > 1 ? (unsigned)atoi(argv[1]) : setting("ZB_STRESS_SECONDS", 3);
    pthread_t threads[MAX_THREADS], disturber;
    fx_start((int)seconds + 60);
    t.threads = setting("ZB_STRESS_THREADS", 4);
    CHECK(t.threads >= 1 && t.threads <= MAX_THREADS);
    CHECK_OK(pthread_mutex_init(&t.lock, NULL));
    t.s = fx_space(1);
    t.w = fx_window(t.s, 0, SIZE);
    t.v = fx_window(t.s, V, SIZE - V);
    fx_store_open(&t.store, 1, SIZE / P);
    fx_loader(serve, NULL);
    fx_loader(serve, NULL);
    for (unsigned i = 0; i < t.threads; i++) CHECK_OK(pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)i));
    CHECK_OK(pthread_create(&disturber, NULL, disturb, NULL));
    sleep(seconds);
    t.stop = true;
    for (unsigned i = 0; i < t.threads; i++) CHECK_OK(pthread_join(threads[i], NULL));
    CHECK_OK(pthread_join(disturber, NULL));
    uint64_t sum = 0;
    for (uint64_t k = 0; k < SHARED; k++) sum += fx_get_word(word(shared_word(k), false));
    CHECK_EQ(sum, t.adds);
    freeze();
    zb_count c = fx_count();
    printf("%llu reads, %llu writes, %llu additions, %llu freezes, %llu stale fills\n", (unsigned long long)t.reads,
           (unsigned long long)t.writes, (unsigned long long)t.adds, (unsigned long long)t.freezes,
           (unsigned long long)t.stale);
    printf("%llu read faults, %llu write faults, %llu spurious, %llu waits\n", (unsigned long long)c.read_faults,
           (unsigned long long)c.write_faults, (unsigned long long)c.spurious, (unsigned long long)c.waits);
    zb_window_free(t.w);
    zb_window_free(t.v);
    zb_space_free(t.s);
    fx_store_close(&t.store);
    return 0;
}
