/* SPDX-License-Identifier: MIT
 * process.c - what there is once in a process: starting and stopping, forks, counters. */
#include "internal.h"

#include <sys/uio.h>

struct zb_globals zb_g = {.poison_fd = -1};
__thread uint32_t zb_busy __attribute__((tls_model("initial-exec")));
static unsigned char poison_page[ZB_PAGE];
static struct iovec poison_all[ZB_PAGES_PER_BLOCK];
static atomic_bool poison_filled;

/* -- fork ----------------------------------------------------------------------------------------------------- */

static void fork_prepare(void)
{
    zb_lock(&zb_g.registry_lock);
}

static void fork_parent(void)
{
    zb_unlock(&zb_g.registry_lock);
}

/* The child shares the parent's scratch files: no page of them may stay writable here, nor can anything be
 * loaded. So every window goes dark; touching one says why and is a plain SIGSEGV. */
static void fork_child(void)
{
    for (size_t i = 0; i < zb_g.nwindows; i++) {
        zb_window *w = zb_g.registry[i];
        zb_map_none(w->base, w->blocks * ZB_BLOCK);
    }
    for (zb_space *s = zb_g.spaces; s; s = s->next) {
        s->forked = true;
        s->lock = 0;
        if (s->fd >= 0) close(s->fd);
        s->fd = -1;
    }
    zb_request_fork();
    zb_g.registry_lock = 0;
    zb_busy = 0;
}

/* -- process -------------------------------------------------------------------------------------------------- */

/* The bytes come later: to write them takes longer than most of what the first view does. */
static int make_poison(void)
{
    int fd = memfd_create("zbig-poison", MFD_CLOEXEC);
    if (fd < 0) return -errno;
    memset(poison_page, 0xFF, sizeof poison_page);
    for (unsigned i = 0; i < ZB_PAGES_PER_BLOCK; i++) poison_all[i] = (struct iovec){poison_page, sizeof poison_page};
    zb_g.poison_fd = fd;
    return 0;
}

ZB_IN_HANDLER int zb_poison_fd(void)
{
    if (atomic_load(&poison_filled)) return zb_g.poison_fd;
    for (unsigned done = 0; done < ZB_PAGES_PER_BLOCK;) { /* (several threads at once write the same) */
        ssize_t n = pwritev(zb_g.poison_fd, poison_all + done, (int)(ZB_PAGES_PER_BLOCK - done),
                            (off_t)(done * ZB_PAGE));
        if (n < 0 && errno == EINTR) continue;
        if (n < (ssize_t)ZB_PAGE) return n < 0 ? -errno : -EIO;
        done += (unsigned)((size_t)n / ZB_PAGE); /* (a page of which a part was written is written again) */
    }
    atomic_store(&poison_filled, true);
    return zb_g.poison_fd;
}

int zb_init(const zb_hooks *hooks)
{
    if (zb_g.initialised) return 0;
    int r = make_poison();
    if (r) return r;
    r = pthread_atfork(fork_prepare, fork_parent, fork_child);
    if (r) return -r;
    zb_spare_make();
    zb_g.hooks = *hooks;
    zb_g.initialised = true;
    return 0;
}

void zb_shutdown(void)
{
    atomic_store(&zb_g.shut, true);
    zb_request_shutdown();
    zb_lock(&zb_g.registry_lock);
    for (size_t i = 0; i < zb_g.nwindows; i++) zb_wake(zb_g.registry[i]->space);
    zb_unlock(&zb_g.registry_lock);
}

void zb_counters(zb_count *out)
{
#define GET(name) out->name = atomic_load_explicit(&zb_g.count.name, memory_order_relaxed)
    GET(read_faults);
    GET(write_faults);
    GET(bus_faults);
    GET(spurious);
    GET(chained);
    GET(waits);
    GET(fills);
    GET(stale_fills);
    GET(bytes_copied);
    GET(overflows);
    GET(writebacks);
    GET(mappings);
#undef GET
}

void zb_mappings_set(uint64_t n)
{
    zb_lock(&zb_g.registry_lock);
    for (size_t i = 0; i < zb_g.nwindows; i++) { /* n has what they counted; freeing them must not take it off */
        zb_window *w = zb_g.registry[i];
        zb_lock(&w->space->lock);
        w->maps = 0;
        zb_unlock(&w->space->lock);
    }
    atomic_store_explicit(&zb_g.count.mappings, n, memory_order_relaxed);
    zb_unlock(&zb_g.registry_lock);
}
