/* SPDX-License-Identifier: MIT
 * fault.c - the SIGSEGV and SIGBUS handlers.
 *
 * A fault in a window is served in the faulting thread: a write by scratch.c, at once; a read of an absent block
 * by asking a loader and sleeping. Everything else goes on to the handler that was there before us. All signals
 * are blocked while we are inside (a handler of the application must not run on top of our locks), so a signal
 * that the previous handler raised again is pending when it returns: then it wants the default action. */
#include "internal.h"

#include <sys/uio.h>
#include <ucontext.h>
#include <wchar.h>

static struct sigaction previous[2][2]; /* [SEGV, BUS][generation & 1]: replaced while a handler may read it */
static struct sigaction *_Atomic current_previous[2];
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;

ZB_TLS struct {
    const char *address;
    uint32_t seen; /* of the space's changes */
    unsigned times, still;
} tls_spurious;

/* Threads that loaders may be waiting for: a finalizer that the garbage collector runs has interrupted code that may
 * hold any lock, and so has one that is run in a loader. Their faults are served as all are, by the (other) loaders.
 * But these may need that lock: so such a thread does not wait for ever, and then reads 0xFF. */
ZB_TLS bool tls_collecting;
static _Atomic uint32_t patience = 5000; /* milliseconds */

/* Where this thread was shown 0xFF so, at most once a space. It tells when the finalizer is done: whoever then drops
 * what is shown would otherwise do so before the interrupted instruction is run again, which would wait again. */
#define SPOILED 8u
ZB_TLS struct {
    unsigned n;
    struct {
        uint64_t space, position;
    } at[SPOILED];
} tls_spoiled;

ZB_IN_HANDLER static void note_spoiled(zb_space *s, uint64_t position)
{
    s->spoiled = true;
    if (!s->error) s->error = EDEADLK;
    for (unsigned i = 0; i < tls_spoiled.n; i++)
        if (tls_spoiled.at[i].space == s->id) return;
    if (tls_spoiled.n == SPOILED) return; /* nobody hears of it, but that the generation has failed */
    tls_spoiled.at[tls_spoiled.n].space = s->id;
    tls_spoiled.at[tls_spoiled.n++].position = position;
}

void zb_tell_spoiled(void)
{
    for (unsigned i = 0; i < tls_spoiled.n; i++) {
        zb_request notice = {.space = tls_spoiled.at[i].space,
                             .position = tls_spoiled.at[i].position,
                             .thread = (uint64_t)pthread_self(),
                             .want = ZB_WANT_NOTICE,
                             .error = EDEADLK};
        zb_request_tell(&notice, false);
    }
    tls_spoiled.n = 0;
}

void zb_collecting(const wchar_t *phase, const void *info)
{
    (void)info;
    tls_collecting = wcscmp(phase, L"start") == 0;
    if (!tls_collecting) zb_tell_spoiled();
}

void zb_patience(uint32_t milliseconds)
{
    atomic_store(&patience, milliseconds);
}

ZB_IN_HANDLER static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* Ctrl-C is for the main thread, which notices it between two instructions of Python: not while it sleeps here. So
 * there SIGINT is let through meanwhile (if it was before), and when it came nothing is waited for any more: what is
 * asked for reads as 0xFF, and so does what the same loop touches next, until there was nothing for some time. */
#define INTERRUPTED_FOR 200u /* milliseconds */
ZB_TLS uint64_t tls_interrupted; /* until then; 0: not */

ZB_IN_HANDLER static bool interrupted(void)
{
    if (!tls_interrupted) return false;
    uint64_t t = now();
    tls_interrupted = t < tls_interrupted ? t + INTERRUPTED_FOR : 0;
    return tls_interrupted != 0;
}

void zb_wait_again(void)
{
    tls_interrupted = 0;
}

ZB_IN_HANDLER static void sleep_interruptibly(_Atomic uint32_t *word, uint32_t value)
{
    sigset_t open_, old;
    sigemptyset(&open_);
    sigaddset(&open_, SIGINT);
    pthread_sigmask(SIG_UNBLOCK, &open_, &old);
    long r = syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
    if (r && errno == EINTR) tls_interrupted = now() + INTERRUPTED_FOR;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

ZB_IN_HANDLER static bool may_be_interrupted(const void *ucontext)
{
    return getpid() == (pid_t)syscall(SYS_gettid) &&
           !sigismember(&((const ucontext_t *)ucontext)->uc_sigmask, SIGINT);
}

/* Sleep until *word is not `value` any more, or it is `deadline`; 0: no deadline. */
ZB_IN_HANDLER static void sleep_on(_Atomic uint32_t *word, uint32_t value, uint64_t deadline, const void *ucontext)
{
    if (!deadline) {
        if (may_be_interrupted(ucontext))
            sleep_interruptibly(word, value);
        else
            zb_futex_wait(word, value);
        return;
    }
    uint64_t t = now();
    if (t >= deadline) return;
    struct timespec rest = {(time_t)((deadline - t) / 1000), (long)((deadline - t) % 1000) * 1000000};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &rest, NULL, 0);
}

/* A fault that finds its page mapped as it should be was overtaken by another thread. If that goes on at one
 * address though nothing changes in the space, or for very long, something changed the mapping behind our back: a
 * crash is better than a hang. */
#define SPURIOUS_STILL 10000u
#define SPURIOUS_LIMIT 1000000u

/* Whether a state that holds the interpreter's lock is of this thread, in a subinterpreter. Another thread's may be
 * freed meanwhile: so it is read as the kernel would, not touched. */
ZB_IN_HANDLER static bool is_ours(const void *state)
{
    uint64_t ident = 0;
    struct iovec to = {&ident, sizeof ident};
    struct iovec from = {(char *)(uintptr_t)state + zb_g.hooks.ident_offset, sizeof ident};
    return zb_g.hooks.ident_offset &&
           syscall(SYS_process_vm_readv, getpid(), &to, 1, &from, 1, 0) == (long)sizeof ident &&
           ident == (uint64_t)pthread_self();
}

ZB_IN_HANDLER static bool attached(void)
{
    if (!zb_g.hooks.current) return false;
    void *state = zb_g.hooks.current();
    return state && (!zb_g.hooks.this_thread || zb_g.hooks.this_thread() == state || is_ours(state));
}

/* Nobody can load this block any more: 0xFF bytes. */
ZB_IN_HANDLER static bool poison(zb_window *w, uint64_t b)
{
    if (zb_block_absent(w, b)) return false;
    uint32_t slotno = ZB_SLOT(w->table[b]);
    static const zb_slot none;
    int fd = zb_poison_fd();
    if (fd < 0) return false;
    const zb_slot *slot = slotno ? &w->space->slots[slotno - 1] : &none;
    for (unsigned p = 0, q; p < ZB_PAGES_PER_BLOCK; p = q) {
        q = zb_same(slot, p, ZB_PAGES_PER_BLOCK);
        if (zb_is_dirty(slot, p)) continue;
        zb_counted(w, 2);
        if (mmap(w->base + b * ZB_BLOCK + p * ZB_PAGE, (q - p) * ZB_PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED,
                 fd, (off_t)(p * ZB_PAGE)) == MAP_FAILED)
            return false;
    }
    w->table[b] = ZB_ENTRY(slotno, ZB_CLEAN);
    return true;
}

ZB_IN_HANDLER static bool spurious(const zb_space *s, const char *at)
{
    uint32_t seen = atomic_load_explicit(&s->seq, memory_order_relaxed);
    ZB_COUNT(spurious, 1);
    if (tls_spurious.address != at) tls_spurious.times = tls_spurious.still = 0;
    if (tls_spurious.seen != seen) tls_spurious.still = 0;
    tls_spurious.address = at;
    tls_spurious.seen = seen;
    return ++tls_spurious.still < SPURIOUS_STILL && ++tls_spurious.times < SPURIOUS_LIMIT;
}

typedef enum { DONE, FOREIGN, LOAD } verdict;

/* One look at the fault with the space locked. LOAD: the block is (now) being filled; *ask if by us. `late`: if so,
 * do not wait for it any longer. */
ZB_IN_HANDLER static verdict look(zb_space *s, const char *at, const void *ucontext, bool *bus, bool slept, bool late,
                                  zb_request *ask)
{
    zb_window *w = zb_find_window(s, at);
    if (!w) return FOREIGN;
    uint64_t position = w->start + (uint64_t)(at - w->base), b = (uint64_t)(at - w->base) / ZB_BLOCK;
    uint32_t e = w->table[b];
    if (w->drowned) return spurious(s, at) ? DONE : FOREIGN; /* all of it is mapped */
    if (ZB_SLOT(e) && zb_is_dirty(&s->slots[ZB_SLOT(e) - 1], (unsigned)(position % ZB_BLOCK / ZB_PAGE)))
        return !*bus && spurious(s, at) ? DONE : FOREIGN;
    if (*bus && (ZB_KIND(e) == ZB_CLEAN || ZB_KIND(e) == ZB_HOLE)) {
        /* The file under the mapping is shorter than it was: what is left of it is not to be trusted. */
        ZB_COUNT(bus_faults, 1);
        zb_block_absent(w, b);
        ask->want |= ZB_WANT_CHECK;
        *bus = false;
    }
    e = w->table[b];
    if (ZB_KIND(e) == ZB_CLEAN || ZB_KIND(e) == ZB_HOLE) {
        if (slept) return DONE; /* the fill came; run the instruction again */
        if (zb_is_write(ucontext) == 0) return spurious(s, at) ? DONE : FOREIGN;
        ZB_COUNT(write_faults, 1);
        tls_spurious.address = NULL;
        int r = s->closed ? -ENOTCONN : zb_write_fault(w, position);
        if (r == 0) return DONE;
        if (r != -EFAULT) {
            int first = zb_overflow(w, position, -r);
            if (first < 0) { /* not even that */
                first = !w->drowned;
                if (!zb_drown(w, -r)) return FOREIGN; /* a crash is what is left */
            }
            ask->want = first ? ZB_WANT_NOTICE : 0;
            ask->position = position;
            ask->error = -r;
            return DONE;
        }
        zb_block_absent(w, b); /* copying found what SIGBUS finds */
        ask->want |= ZB_WANT_CHECK;
        e = w->table[b];
    }
    bool over = s->closed || atomic_load(&zb_g.shut);
    if (over || late) {
        if (!poison(w, b)) return FOREIGN;
        if (!over && tls_interrupted) {
            ask->want = s->spoiled ? 0 : ZB_WANT_NOTICE;
            ask->position = position;
            ask->error = EINTR;
            s->spoiled = true;
            if (!s->error) s->error = EINTR;
            return DONE;
        }
        if (!over) {
            note_spoiled(s, position);
            return DONE;
        }
        ask->want = ZB_WANT_NOTICE;
        ask->position = position;
        ask->error = ENOTCONN;
        return DONE;
    }
    if (ZB_KIND(e) == ZB_ABSENT) {
        ZB_COUNT(read_faults, 1);
        w->table[b] = ZB_ENTRY(ZB_SLOT(e), ZB_FILLING);
        ask->want |= ZB_WANT_FILL;
        ask->position = w->start + b * ZB_BLOCK;
    } else {
        ask->want = 0;
    }
    tls_spurious.address = NULL;
    return LOAD;
}

ZB_IN_HANDLER static uint64_t position_of(zb_space *s, const char *at)
{
    const zb_window *w = zb_find_window(s, at);
    return w ? w->start + (uint64_t)(at - w->base) : 0;
}

ZB_IN_HANDLER static bool serve_in(zb_space *s, const char *at, const void *ucontext, bool bus)
{
    void *state = NULL;
    bool slept = false, hurried = tls_collecting || zb_is_loader();
    uint64_t deadline = hurried ? now() + atomic_load(&patience) : 0;
    uint32_t poisonings = 0;
    verdict v;
    for (;;) {
        zb_request ask = {.space = s->id, .thread = (uint64_t)pthread_self()};
        zb_lock(&s->lock);
        v = look(s, at, ucontext, &bus, slept, (slept && hurried && now() >= deadline) || interrupted(), &ask);
        if (slept && v == DONE && !ask.want && s->poisonings != poisonings) {
            /* Perhaps what came is 0xFF: whoever asked for it was told, and this thread is to hear of it, too. */
            ask.want = ZB_WANT_NOTICE;
            ask.error = EIO;
            ask.position = position_of(s, at);
        }
        poisonings = s->poisonings;
        uint32_t seen = atomic_load_explicit(&s->seq, memory_order_acquire);
        zb_unlock(&s->lock);
        bool tell = ask.want & ZB_WANT_NOTICE;
        /* The loader is Python: it needs the interpreter's lock, which this thread may hold. */
        if ((tell || v == LOAD) && !state && attached()) state = zb_g.hooks.detach();
        if (tell) zb_request_tell(&ask, !hurried && !tls_interrupted);
        if (v != LOAD) break;
        if (ask.want & ZB_WANT_FILL) zb_request_put(&ask);
        ZB_COUNT(waits, 1);
        sleep_on(&s->seq, seen, deadline, ucontext);
        slept = true;
        bus = false; /* whatever is mapped there now is not what was too short */
    }
    if (state) zb_g.hooks.attach(state);
    return v == DONE;
}

ZB_IN_HANDLER static void tell_child(void)
{
    static const char text[] = "dask_zbig: this process was forked from one that had opened a ZBigArray, and now "
                               "touches a view of it. Open the database again in the child, or use 'spawn'.\n";
    ssize_t n = write(STDERR_FILENO, text, sizeof text - 1);
    (void)n;
}

ZB_IN_HANDLER static bool serve(int sig, const siginfo_t *si, const void *ucontext)
{
    if (zb_busy) return false;
    if (sig == SIGSEGV ? si->si_code != SEGV_ACCERR && si->si_code != SEGV_MAPERR : si->si_code != BUS_ADRERR)
        return false;
    zb_space *s = zb_find_space(si->si_addr);
    if (!s) return false;
    bool served = false;
    if (s->forked)
        tell_child();
    else
        served = serve_in(s, si->si_addr, ucontext, sig == SIGBUS);
    zb_space_unref(s);
    return served;
}

/* -- chaining ------------------------------------------------------------------------------------------------- */

ZB_IN_HANDLER static void set_default(int sig)
{
    struct sigaction dfl;
    memset(&dfl, 0, sizeof dfl);
    dfl.sa_handler = SIG_DFL;
    sigaction(sig, &dfl, NULL);
}

/* The handler that a fault is passed on to may have been installed over us, and call us as "the one before". It does
 * so with the same context and further down the stack. Then it wants who was there before us, if we know. */
ZB_TLS struct {
    const void *ucontext;
    const char *frame;
    unsigned depth;
} tls_chain;

ZB_IN_HANDLER static const struct sigaction *next_handler(int sig, const void *ucontext, const char *frame)
{
    bool again = tls_chain.ucontext == ucontext && frame < tls_chain.frame;
    unsigned i = sig == SIGBUS, depth = again ? tls_chain.depth + 1 : 0;
    const struct sigaction *p = atomic_load(&current_previous[i]);
    tls_chain.ucontext = ucontext;
    tls_chain.frame = frame;
    tls_chain.depth = depth;
    return depth == 0 ? p : depth == 1 ? &previous[i][p == &previous[i][0]] : NULL;
}

ZB_IN_HANDLER static void chain(int sig, siginfo_t *si, void *ucontext)
{
    ZB_COUNT(chained, 1);
    const struct sigaction *p = next_handler(sig, ucontext, __builtin_frame_address(0));
    if (!p || (!(p->sa_flags & SA_SIGINFO) && (p->sa_handler == SIG_DFL || p->sa_handler == SIG_IGN))) {
        set_default(sig);
        if (si->si_code <= 0) raise(sig); /* from kill(): it will not happen again by itself */
        return;                           /* else the instruction runs again, and dumps core where it stands */
    }
    if (p->sa_flags & SA_SIGINFO)
        p->sa_sigaction(sig, si, ucontext);
    else
        p->sa_handler(sig);
    tls_chain.ucontext = NULL;
    sigset_t pending;
    if (!sigpending(&pending) && sigismember(&pending, sig)) set_default(sig);
}

static void on_fault(int sig, siginfo_t *si, void *ucontext)
{
    int saved = errno;
    if (!serve(sig, si, ucontext)) chain(sig, si, ucontext);
    errno = saved;
}

static int install(int sig)
{
    unsigned i = sig == SIGBUS;
    struct sigaction now, ours;
    if (sigaction(sig, NULL, &now)) return -errno;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_fault) return 0;
    struct sigaction *slot = &previous[i][atomic_load(&current_previous[i]) == &previous[i][0]];
    *slot = now;
    atomic_store(&current_previous[i], slot);
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigfillset(&ours.sa_mask);
    return sigaction(sig, &ours, NULL) ? -errno : 0;
}

/* Put back who was there before us, where we are the handler. */
static int uninstall(int sig)
{
    struct sigaction now;
    if (sigaction(sig, NULL, &now)) return -errno;
    if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_fault) return 0;
    return sigaction(sig, atomic_load(&current_previous[sig == SIGBUS]), NULL) ? -errno : 0;
}

int zb_handlers_off(void)
{
    pthread_mutex_lock(&install_lock);
    int r = uninstall(SIGSEGV);
    if (!r) r = uninstall(SIGBUS);
    pthread_mutex_unlock(&install_lock);
    return r;
}

int zb_handlers(void)
{
    zb_wait_again();
    pthread_mutex_lock(&install_lock);
    int r = install(SIGSEGV);
    if (!r) r = install(SIGBUS);
    pthread_mutex_unlock(&install_lock);
    return r;
}
