/* SPDX-License-Identifier: MIT
 * test_chain.c - what happens to faults that are not ours, and to ours in odd places. Each case is a child process
 * of its own, with an expected end. */
#define _GNU_SOURCE
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define P ZB_PAGE
#define B ZB_BLOCK

static volatile int *shared; /* survives the child: how often a handler was called */

/* -- children ------------------------------------------------------------------------------------------------- */

enum { EXITED = 0, KILLED = 1000 }; /* + the status, the signal */

static int run_child(void (*body)(void), const char *expected_output)
{
    int ends[2], status;
    char text[4096];
    size_t n = 0;
    *shared = 0;
    CHECK_SYS(pipe(ends));
    fflush(stdout);
    pid_t pid = fork();
    CHECK_SYS(pid);
    if (pid == 0) {
        watchdog(20);
        if (expected_output) dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        body();
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got; n < sizeof text - 1 && (got = read(ends[0], text + n, sizeof text - 1 - n)) > 0;)
        n += (size_t)got;
    text[n] = 0;
    close(ends[0]);
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    if (expected_output && !strstr(text, expected_output))
        check_failed(__FILE__, __LINE__, "the child said \"%s\"", text);
    return WIFSIGNALED(status) ? KILLED + WTERMSIG(status) : EXITED + WEXITSTATUS(status);
}

#define CHILD(body, expected, said, called)                                                                            \
    do {                                                                                                               \
        if (!wanted(#body)) break;                                                                                     \
        printf("%s\n", #body);                                                                                         \
        CHECK_EQ(run_child(body, said), expected);                                                                     \
        if (called >= 0) CHECK_EQ(*shared, called);                                                                    \
    } while (0)

static zb_space *s;
static zb_window *w;
static char *base;
static int fd;

/* The core with a window of four blocks, filled but for the last. */
static void begin(void)
{
    fx_start(20);
    s = fx_space(1);
    w = fx_window(s, 0, 4 * B);
    base = zb_window_base(w);
    fd = fx_file(3 * B, 1);
    CHECK_OK(fx_fill(s, w, 0, 3 * B, fd, 0));
}

static void our_faults_work(void)
{
    static uint64_t page;
    page++;
    fx_put(base + 2 * page * P, 42);
    CHECK_EQ(zb_space_dirty(s), page);
    CHECK_EQ(fx_get(base + 2 * page * P + 1), fx_byte(1, 2 * page * P + 1));
}

static char *volatile nowhere = (char *)8;

__attribute__((no_sanitize("undefined", "address", "thread"))) static void crash(void)
{
    *nowhere = 1;
}

static void install(int sig, void (*handler)(int, siginfo_t *, void *), int flags, struct sigaction *old)
{
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_sigaction = handler;
    a.sa_flags = flags;
    CHECK_SYS(sigaction(sig, &a, old));
}

/* -- crashes -------------------------------------------------------------------------------------------------- */

static void crash_with_no_other_handler(void)
{
    begin();
    our_faults_work();
    crash();
}

static void write_to_read_only_memory(void)
{
    begin();
    char *p = mmap(NULL, P, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    nowhere = p;
    crash();
}

static void crash_just_outside_of_a_window(void)
{
    begin();
    char *p = mmap(base + 4 * B, P, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(p == base + 4 * B);
    nowhere = p;
    crash();
}

static void crash_after_a_window_was_freed(void)
{
    begin();
    nowhere = base;
    zb_window_free(w);
    crash();
}

static void truncated_file_of_others(void)
{
    begin();
    int other = fx_file(P, 1);
    char *p = mmap(NULL, P, PROT_READ, MAP_PRIVATE, other, 0);
    CHECK_SYS(ftruncate(other, 0));
    printf("%d", fx_get(p));
}

static void raised_segv(void)
{
    begin();
    our_faults_work();
    raise(SIGSEGV);
}

static void raised_bus(void)
{
    begin();
    raise(SIGBUS);
}

static void sent_segv(void)
{
    begin();
    kill(getpid(), SIGSEGV);
    pause();
}

/* -- other handlers ------------------------------------------------------------------------------------------- */

static void exits_with_7(int sig, siginfo_t *si, void *ucontext)
{
    _exit(sig == SIGSEGV && si->si_addr == nowhere && ucontext ? 7 : 8);
}

static void plain_exits_with_6(int sig)
{
    _exit(sig == SIGSEGV ? 6 : 8);
}

static void handler_from_before(void)
{
    install(SIGSEGV, exits_with_7, SA_SIGINFO, NULL);
    begin();
    our_faults_work();
    crash();
}

static void plain_handler_from_before(void)
{
    signal(SIGSEGV, plain_exits_with_6);
    begin();
    our_faults_work();
    crash();
}

static void replaced_handler_is_put_back_on_top(void)
{
    begin();
    our_faults_work();
    install(SIGSEGV, exits_with_7, SA_SIGINFO, NULL);
    CHECK_OK(zb_handlers());
    our_faults_work();
    CHECK_OK(zb_handlers());
    our_faults_work();
    crash();
}

static struct sigaction older;

/* As faulthandler does: tell, put the older handler back, raise the signal again. */
static void resets_and_raises(int sig, siginfo_t *si, void *ucontext)
{
    (void)si, (void)ucontext;
    ++*shared;
    sigaction(sig, &older, NULL);
    raise(sig);
}

static void reset_and_raise_below_us(void)
{
    install(SIGSEGV, resets_and_raises, SA_SIGINFO | SA_NODEFER, &older);
    begin();
    our_faults_work();
    crash();
}

static void reset_and_raise_between_us(void)
{
    begin();
    install(SIGSEGV, resets_and_raises, SA_SIGINFO | SA_NODEFER, &older); /* older is ours */
    CHECK_OK(zb_handlers());
    our_faults_work();
    crash();
}

/* It leaves the default action in place and returns: the instruction runs again. */
static void resets_only(int sig, siginfo_t *si, void *ucontext)
{
    (void)si, (void)ucontext;
    ++*shared;
    signal(sig, SIG_DFL);
}

static void reset_below_us(void)
{
    install(SIGSEGV, resets_only, SA_SIGINFO, NULL);
    begin();
    crash();
}

/* Calls who was there before, as many libraries do. */
static void calls_older(int sig, siginfo_t *si, void *ucontext)
{
    ++*shared;
    if (older.sa_flags & SA_SIGINFO)
        older.sa_sigaction(sig, si, ucontext);
    else
        signal(sig, SIG_DFL);
}

static void call_between_us(void)
{
    begin();
    install(SIGSEGV, calls_older, SA_SIGINFO, &older); /* older is ours */
    our_faults_work();
    CHECK_EQ(*shared, 1);
    CHECK_OK(zb_handlers());
    our_faults_work();
    CHECK_EQ(*shared, 1);
    *shared = 0;
    crash();
}

static void call_between_us_and_another(void)
{
    install(SIGSEGV, exits_with_7, SA_SIGINFO, NULL);
    begin();
    install(SIGSEGV, calls_older, SA_SIGINFO, &older);
    CHECK_OK(zb_handlers());
    crash();
}

/* -- odd places ----------------------------------------------------------------------------------------------- */

static void errno_is_kept(void)
{
    begin();
    errno = 1234;
    fx_put(base + 5, 1);
    CHECK_EQ(errno, 1234);
    zb_space_close(s);
    errno = 1234;
    CHECK_EQ(fx_get(base + 3 * B), 0xFF);
    CHECK_EQ(errno, 1234);
    fx_put(base + B, 1); /* goes to private memory */
    CHECK_EQ(errno, 1234);
}

/* A handler of the application that runs on its small stack, and touches a view there. */
static void touches(int sig)
{
    (void)sig;
    fx_put(base + 2 * B + 9, 42);
    *shared = fx_get(base + B);
}

static void fault_on_an_alternate_stack(void)
{
    begin();
    /* As small as can be: two frames of the kernel, 4 KiB for us and 2 for the handler above. A guard page tells. */
    size_t frame = getauxval(AT_MINSIGSTKSZ) ? getauxval(AT_MINSIGSTKSZ) : 2048;
    size_t size = FX_TSAN ? 1 << 18 : (2 * frame + 4096 + 2048 + P - 1) / P * P;
    char *stack = mmap(NULL, size + P, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(stack != MAP_FAILED);
    CHECK_SYS(mprotect(stack + P, size, PROT_READ | PROT_WRITE));
    stack_t alternate = {.ss_sp = stack + P, .ss_size = size};
    CHECK_SYS(sigaltstack(&alternate, NULL));
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = touches;
    a.sa_flags = SA_ONSTACK;
    CHECK_SYS(sigaction(SIGUSR1, &a, NULL));
    if (!FX_TSAN) { /* which runs handlers of such signals later, with all others blocked */
        raise(SIGUSR1);
        CHECK_EQ(*shared, fx_byte(1, B));
    }
    fx_put(base + B, 3); /* and on it straight away */
    CHECK_EQ(fx_get(base + B), 3);
}

static void fault_on_a_stack_of_sigstksz(void)
{
    begin();
    size_t size = (size_t)sysconf(_SC_SIGSTKSZ);
    stack_t alternate = {.ss_sp = malloc(size), .ss_size = size};
    CHECK_SYS(sigaltstack(&alternate, NULL));
    our_faults_work();
    zb_space_close(s);
    CHECK_EQ(fx_get(base + 3 * B), 0xFF);
}

/* -- fork ----------------------------------------------------------------------------------------------------- */

static int grandchild(void (*body)(void))
{
    int status;
    pid_t pid = fork();
    CHECK_SYS(pid);
    if (pid == 0) {
        watchdog(10);
        body();
        _exit(0);
    }
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    return WIFSIGNALED(status) ? KILLED + WTERMSIG(status) : EXITED + WEXITSTATUS(status);
}

static void reads_clean(void)
{
    printf("%d", fx_get(base));
}

static void reads_dirty(void)
{
    printf("%d", fx_get(base + 5));
}

static void writes_dirty(void)
{
    fx_put(base + 5, 66);
}

static void writes_clean(void)
{
    fx_put(base + B, 66);
}

static void forked(void (*body)(void))
{
    begin();
    fx_put(base + 5, 42);
    CHECK_EQ(grandchild(body), KILLED + SIGSEGV);
    CHECK_EQ(fx_get(base + 5), 42);
    CHECK_EQ(fx_get(base + B), fx_byte(1, B));
    fx_put(base + 6, 43);
    fx_put(base + B + 1, 44);
    zb_run *runs;
    size_t n;
    uint64_t first, last;
    CHECK_OK(zb_freeze(s, &runs, &n, &first, &last));
    CHECK_EQ(n, 2);
    char bytes[2];
    CHECK_EQ(pread(fx_scratch_open(1, first), bytes, 2, 5), 2);
    CHECK(bytes[0] == 42 && bytes[1] == 43);
    fx_scratch_remove(1, first, last);
    exit(0);
}

static void forked_child_reads_clean(void)
{
    forked(reads_clean);
}

static void forked_child_reads_dirty(void)
{
    forked(reads_dirty);
}

static void forked_child_writes_dirty(void)
{
    forked(writes_dirty);
}

static void forked_child_writes_clean(void)
{
    forked(writes_clean);
}

/* No function of the core gives the child what is the parent's; freeing works. */
static void uses_the_parents_space(void)
{
    static char page[P];
    zb_run *runs;
    size_t n;
    uint64_t first, last;
    zb_window *v;
    memset(page, 66, P);
    CHECK_EQ(zb_write(w, 0, P, page), -ENOTCONN);
    CHECK_EQ(zb_write(w, 0, P, NULL), -ENOTCONN);
    CHECK_EQ(fx_fill(s, w, 0, B, fd, 0), -ENOTCONN);
    CHECK_EQ(zb_freeze(s, &runs, &n, &first, &last), -ENOTCONN);
    CHECK_EQ(zb_discard(s, &first, &last), -ENOTCONN);
    CHECK_EQ(zb_window_new(&v, s, 0, B), -ENOTCONN);
    zb_space_close(s);
    zb_window_free(w);
    zb_space_free(s);
}

static void forked_child_uses_the_core(void)
{
    begin();
    fx_put(base + 5, 42);
    CHECK_EQ(grandchild(uses_the_parents_space), EXITED);
    CHECK_EQ(fx_get(base + 5), 42);
    int scratch = fx_scratch_open(1, 0);
    char byte;
    CHECK_EQ(pread(scratch, &byte, 1, 5), 1);
    CHECK_EQ(byte, 42);
    fx_scratch_remove(1, 0, 1);
    exit(0);
}

static void serve_in_child(const zb_request *r, void *context)
{
    (void)context;
    CHECK_OK(fx_fill(s, w, r->position, r->position + B, fd, 0));
}

static void makes_a_space_of_its_own(void)
{
    s = fx_space(2);
    w = fx_window(s, 0, 4 * B);
    base = zb_window_base(w);
    fx_loader(serve_in_child, NULL);
    fx_gil_take();
    CHECK_EQ(fx_get(base + 2 * B + 1), fx_byte(1, 1));
    fx_put(base + 5, 66);
    CHECK_EQ(fx_get(base + 5), 66);
    fx_gil_drop();
    fx_scratch_remove(2, 0, 1);
}

static void forked_child_begins_anew(void)
{
    begin();
    fx_put(base + 5, 42);
    CHECK_EQ(grandchild(makes_a_space_of_its_own), EXITED);
    CHECK_EQ(fx_get(base + 5), 42);
    fx_scratch_remove(1, 0, 1);
    exit(0);
}

static void *write_always(void *stop)
{
    for (uint64_t at = 0; !__atomic_load_n((bool *)stop, __ATOMIC_RELAXED); at = (at + 3 * P) % (3 * B)) {
        fx_put(base + at, 1);
        CHECK_OK(zb_drop(s, 0, 0, 0));
    }
    return NULL;
}

static void does_little(void)
{
    zb_space_close(s);
    zb_window_free(w);
    zb_space_free(s);
    CHECK_OK(zb_handlers());
}

/* Forking while other threads are inside of the core leaves no lock behind in the child. */
static void fork_among_threads(void)
{
    begin();
    pthread_t threads[2];
    bool stop = false;
    for (int i = 0; i < 2; i++) CHECK_OK(pthread_create(&threads[i], NULL, write_always, &stop));
    for (int i = 0; i < 50; i++) CHECK_EQ(grandchild(does_little), EXITED);
    __atomic_store_n(&stop, true, __ATOMIC_RELAXED);
    for (int i = 0; i < 2; i++) CHECK_OK(pthread_join(threads[i], NULL));
    fx_scratch_remove(1, 0, 1);
    exit(0);
}

static char directory[64] = "/tmp/zbig-chain-XXXXXX"; /* of all children: who is killed does not tidy up */

int main(void)
{
    CHECK(mkdtemp(directory));
    CHECK_SYS(setenv("TMPDIR", directory, 1));
    shared = mmap(NULL, P, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    CHILD(crash_with_no_other_handler, KILLED + SIGSEGV, NULL, -1);
    CHILD(write_to_read_only_memory, KILLED + SIGSEGV, NULL, -1);
    CHILD(crash_just_outside_of_a_window, KILLED + SIGSEGV, NULL, -1);
    CHILD(crash_after_a_window_was_freed, KILLED + SIGSEGV, NULL, -1);
    CHILD(truncated_file_of_others, KILLED + SIGBUS, NULL, -1);
    CHILD(raised_segv, KILLED + SIGSEGV, NULL, -1);
    CHILD(raised_bus, KILLED + SIGBUS, NULL, -1);
    CHILD(sent_segv, KILLED + SIGSEGV, NULL, -1);
    CHILD(handler_from_before, EXITED + 7, NULL, -1);
    CHILD(plain_handler_from_before, EXITED + 6, NULL, -1);
    CHILD(replaced_handler_is_put_back_on_top, EXITED + 7, NULL, -1);
    CHILD(reset_and_raise_below_us, KILLED + SIGSEGV, NULL, 1);
    CHILD(reset_and_raise_between_us, KILLED + SIGSEGV, NULL, 1);
    CHILD(reset_below_us, KILLED + SIGSEGV, NULL, 1);
    CHILD(call_between_us, KILLED + SIGSEGV, NULL, 1);
    CHILD(call_between_us_and_another, EXITED + 7, NULL, 1);
    CHILD(errno_is_kept, EXITED, NULL, -1);
    CHILD(fault_on_an_alternate_stack, EXITED, NULL, -1);
    CHILD(fault_on_a_stack_of_sigstksz, EXITED, NULL, -1);
    CHILD(forked_child_reads_clean, EXITED, "forked from one", -1);
    CHILD(forked_child_reads_dirty, EXITED, "forked from one", -1);
    CHILD(forked_child_writes_dirty, EXITED, "forked from one", -1);
    CHILD(forked_child_writes_clean, EXITED, "forked from one", -1);
    CHILD(forked_child_uses_the_core, EXITED, NULL, -1);
    CHILD(forked_child_begins_anew, EXITED, NULL, -1);
    CHILD(fork_among_threads, EXITED, NULL, -1);
    fx_remove_tree(directory);
    return 0;
}
