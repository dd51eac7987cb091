/* SPDX-License-Identifier: MIT
 * request.c - the queue from faulting threads to the loaders.
 *
 * A ring under a futex lock. It cannot overflow in practice (a sleeping thread has one request in it); if it does, the
 * putter waits for room: loaders never put, and nobody puts with the interpreter's lock held.
 *
 * The thread of a NOTICE waits for its ticket to be answered. The answers lie here, not with the thread: at shutdown
 * it leaves without one, and a loader may still come with it. */
#include "internal.h"

#define RING 4096u

static struct {
    zb_mutex lock;
    _Atomic uint32_t puts, takes; /* futex words: bumped by each */
    _Atomic bool loaders;         /* whether there are some, or are about to be */
    _Atomic uint32_t answers;     /* futex word: bumped by each, and at shutdown */
    uint32_t head, tail;
    zb_request ring[RING];
    _Atomic uint64_t tickets, answered[RING]; /* by ticket: the last one that was */
} q;

ZB_TLS bool tls_loader;

ZB_IN_HANDLER bool zb_is_loader(void)
{
    return tls_loader;
}

/* If there is room; else *seen is what `takes` was. */
ZB_IN_HANDLER static bool put(const zb_request *r, uint32_t *seen)
{
    zb_lock(&q.lock);
    bool room = q.head - q.tail < RING;
    if (room) {
        q.ring[q.head++ % RING] = *r;
        atomic_fetch_add_explicit(&q.puts, 1, memory_order_release);
    } else {
        *seen = atomic_load_explicit(&q.takes, memory_order_acquire);
    }
    zb_unlock(&q.lock);
    if (room) zb_futex_wake(&q.puts, 1);
    return room;
}

ZB_IN_HANDLER void zb_request_put(const zb_request *r)
{
    uint32_t seen;
    while (!put(r, &seen)) {
        if (atomic_load(&zb_g.shut)) return;
        zb_futex_wait(&q.takes, seen);
    }
}

void zb_loaders_come(void)
{
    atomic_store(&q.loaders, true);
}

int zb_request_next(zb_request *out)
{
    zb_loaders_come();
    tls_loader = true;
    zb_tell_spoiled();
    for (;;) {
        if (atomic_load(&zb_g.shut)) return -ESHUTDOWN;
        zb_lock(&q.lock);
        if (q.head != q.tail) {
            *out = q.ring[q.tail++ % RING];
            atomic_fetch_add_explicit(&q.takes, 1, memory_order_release);
            zb_unlock(&q.lock);
            zb_futex_wake(&q.takes, INT_MAX);
            return 0;
        }
        uint32_t seen = atomic_load_explicit(&q.puts, memory_order_acquire);
        zb_unlock(&q.lock);
        zb_futex_wait(&q.puts, seen);
    }
}

ZB_IN_HANDLER void zb_request_tell(zb_request *r, bool wait)
{
    if (atomic_load(&zb_g.shut) || !atomic_load(&q.loaders)) return;
    uint32_t full;
    if (!wait) {
        put(r, &full);
        return;
    }
    r->answer = atomic_fetch_add(&q.tickets, 1) + 1;
    zb_request_put(r);
    for (;;) {
        uint32_t seen = atomic_load_explicit(&q.answers, memory_order_acquire);
        if (atomic_load(&q.answered[r->answer % RING]) >= r->answer || atomic_load(&zb_g.shut)) return;
        zb_futex_wait(&q.answers, seen);
    }
}

void zb_request_told(const zb_request *r)
{
    if (!r->answer) return; /* nobody waits */
    atomic_store(&q.answered[r->answer % RING], r->answer);
    atomic_fetch_add_explicit(&q.answers, 1, memory_order_release);
    zb_futex_wake(&q.answers, INT_MAX);
}

void zb_request_shutdown(void)
{
    atomic_fetch_add(&q.puts, 1); /* so that a thread about to sleep does not */
    atomic_fetch_add(&q.takes, 1);
    atomic_fetch_add(&q.answers, 1);
    zb_futex_wake(&q.puts, INT_MAX);
    zb_futex_wake(&q.takes, INT_MAX);
    zb_futex_wake(&q.answers, INT_MAX);
}

void zb_request_fork(void)
{
    q.lock = 0;
    q.head = q.tail = 0;
    atomic_store(&q.loaders, false);
    tls_loader = false;
}
