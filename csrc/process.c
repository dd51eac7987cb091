/* SPDX-License-Identifier: MIT
 * process.c - what there is once in a process: starting and stopping, forks, counters. */
#include "internal.h"

#include <sys/stat.h>
#include <sys/uio.h>

struct zb_globals zb_g = {.poison_fd = -1};
__thread uint32_t zb_busy __attribute__((tls_model("initial-exec")));

/* The file of 0xFF. It is made early, when there is a descriptor to be had. Its bytes come when it is needed: to write
 * them takes longer than most of what the first view does. */
static struct {
    zb_mutex lock; /* of all of it, and of zb_g.poison_fd */
    bool filled;
    dev_t device;
    ino_t inode;
    unsigned char page[ZB_PAGE];
    struct iovec all[ZB_PAGES_PER_BLOCK];
} poison;

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
    poison.lock = 0;
    zb_busy = 0;
}

/* -- process -------------------------------------------------------------------------------------------------- */

/* Whether it is still the file that we made: in a forked child, or behind closefrom(), its number may be another's. */
ZB_IN_HANDLER static bool poison_is_ours(void)
{
    struct stat now;
    return zb_g.poison_fd >= 0 && fstat(zb_g.poison_fd, &now) == 0 && now.st_dev == poison.device &&
           now.st_ino == poison.inode;
}

ZB_IN_HANDLER static int make_poison(void)
{
    struct stat made;
    int fd = (int)syscall(SYS_memfd_create, "zbig-poison", MFD_CLOEXEC);
    if (fd < 0) return -errno;
    if (fstat(fd, &made)) {
        int e = errno;
        close(fd);
        return -e;
    }
    poison.device = made.st_dev;
    poison.inode = made.st_ino;
    poison.filled = false;
    zb_g.poison_fd = fd;
    return 0;
}

ZB_IN_HANDLER static int fill_poison(void)
{
    for (unsigned done = 0; done < ZB_PAGES_PER_BLOCK;) {
        ssize_t n = pwritev(zb_g.poison_fd, poison.all + done, (int)(ZB_PAGES_PER_BLOCK - done),
                            (off_t)(done * ZB_PAGE));
        if (n < 0 && errno == EINTR) continue;
        if (n < (ssize_t)ZB_PAGE) return n < 0 ? -errno : -EIO;
        done += (unsigned)((size_t)n / ZB_PAGE); /* (a page of which a part was written is written again) */
    }
    poison.filled = true;
    return 0;
}

ZB_IN_HANDLER int zb_poison_fd(void)
{
    zb_lock(&poison.lock);
    int r = poison_is_ours() ? 0 : make_poison();
    if (!r && !poison.filled) r = fill_poison();
    int fd = r ? r : zb_g.poison_fd;
    zb_unlock(&poison.lock);
    return fd;
}

int zb_init(const zb_hooks *hooks)
{
    if (zb_g.initialised) return 0;
    memset(poison.page, 0xFF, sizeof poison.page);
    for (unsigned i = 0; i < ZB_PAGES_PER_BLOCK; i++) poison.all[i] = (struct iovec){poison.page, sizeof poison.page};
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
