/* SPDX-License-Identifier: MIT
 * request.c - the queue from faulting threads to the loaders.
 *
 * A ring under a futex lock. It cannot overflow in practice (a sleeping thread has one request in it, a NOTICE
 * is put at most once per block and generation); if it does, the putter waits for room: loaders never put. A
 * NOTICE is dropped then: nobody sleeps for it, and its thread may hold the interpreter's lock, without which no
 * loader makes room. */
#include "internal.h"

#define RING 4096u

static struct {
    zb_mutex lock;
    _Atomic uint32_t puts, takes; /* futex words: bumped by each */
    uint32_t head, tail;
    zb_request ring[RING];
} q;

ZB_TLS bool tls_loader;

ZB_IN_HANDLER bool zb_is_loader(void)
{
    return tls_loader;
}

ZB_IN_HANDLER void zb_request_put(const zb_request *r)
{
    for (;;) {
        zb_lock(&q.lock);
        if (q.head - q.tail < (r->want & ZB_WANT_NOTICE ? RING / 2 : RING)) {
            q.ring[q.head++ % RING] = *r;
            atomic_fetch_add_explicit(&q.puts, 1, memory_order_release);
            zb_unlock(&q.lock);
            zb_futex_wake(&q.puts, 1);
            return;
        }
        uint32_t seen = atomic_load_explicit(&q.takes, memory_order_acquire);
        zb_unlock(&q.lock);
        if (r->want & ZB_WANT_NOTICE || atomic_load(&zb_g.shut)) return;
        zb_futex_wait(&q.takes, seen);
    }
}

int zb_request_next(zb_request *out)
{
    tls_loader = true;
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

void zb_request_shutdown(void)
{
    atomic_fetch_add(&q.puts, 1); /* so that a thread about to sleep does not */
    atomic_fetch_add(&q.takes, 1);
    zb_futex_wake(&q.puts, INT_MAX);
    zb_futex_wake(&q.takes, INT_MAX);
}

void zb_request_fork(void)
{
    q.lock = 0;
    q.head = q.tail = 0;
    tls_loader = false;
}
