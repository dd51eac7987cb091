/* SPDX-License-Identifier: MIT
 * trap.c - stop a process at its Nth file-system call, make that call fail, or write down all of them.
 *
 * A seccomp filter turns every call of interest, by whoever it is made (libc, a raw syscall, any thread), into a SIGSYS,
 * and the handler does it instead. So nothing is missed, and nothing is slower until it is installed. It stays installed
 * for the life of the process and its forked children. x86-64 Linux. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { KILL_BEFORE = 1, KILL_AFTER, FAIL, FAIL_FROM, SHORT };

struct record { /* of one call, in the log; then come the two paths and the data */
    uint32_t pid, nr;
    int64_t result, extra; /* extra: the offset of a write, the size of a truncation, whether an open created the file */
    uint32_t path, other, data, is_directory;
};

/* The one place from which the filter lets these calls through. */
long trap_raw(long nr, long a, long b, long c, long d, long e, long f);
extern const char trap_gate[];
__asm__(".text\n.globl trap_raw\n.type trap_raw, @function\ntrap_raw:\n"
        "mov %rdi, %rax\nmov %rsi, %rdi\nmov %rdx, %rsi\nmov %rcx, %rdx\nmov %r8, %r10\nmov %r9, %r8\n"
        "mov 8(%rsp), %r9\nsyscall\n.globl trap_gate\ntrap_gate:\nret\n");

#define RAW(nr, a, b, c, d, e, f) \
    trap_raw(nr, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

static const int calls[] = {
    SYS_open,   SYS_openat,    SYS_creat,     SYS_write,           SYS_pwrite64,  SYS_writev,  SYS_pwritev,
    SYS_fsync,  SYS_fdatasync, SYS_rename,    SYS_sync_file_range, SYS_renameat,  SYS_link,    SYS_renameat2,
    SYS_linkat, SYS_unlink,    SYS_unlinkat,  SYS_rmdir,           SYS_truncate,  SYS_mkdir,   SYS_ftruncate,
    SYS_close,  SYS_mkdirat,   SYS_fallocate, SYS_copy_file_range, SYS_sendfile,  SYS_msync,   SYS_splice,
    SYS_symlink, SYS_symlinkat, SYS_pwritev2, SYS_openat2,         SYS_chmod,     SYS_fchmod,  SYS_fchmodat,
};
enum { NCALLS = sizeof calls / sizeof *calls };

static char root[512];
static size_t root_len;
static int log_fd = -1;
static atomic_long count, target;
static atomic_int armed, mode, argument;
static atomic_flag busy = ATOMIC_FLAG_INIT;
static char content[1 << 22];

static int inside(const char *path)
{
    return !strncmp(path, root, root_len) && (path[root_len] == '/' || !path[root_len]);
}

static void path_of_fd(long fd, char *out, size_t size)
{
    char name[32] = "/proc/self/fd/", digits[16];
    size_t n = 0, at = 14;
    *out = 0;
    if (fd < 0) return;
    do digits[n++] = (char)('0' + fd % 10);
    while (fd /= 10);
    while (n) name[at++] = digits[--n];
    name[at] = 0;
    long r = RAW(SYS_readlink, name, out, size - 1, 0, 0, 0);
    out[r > 0 ? r : 0] = 0;
}

static void path_at(long directory, long name, char *out, size_t size)
{
    const char *p = (const char *)name;
    *out = 0;
    if (!p) return;
    if (*p != '/') {
        if ((int)directory == AT_FDCWD) {
            if (RAW(SYS_getcwd, out, size, 0, 0, 0, 0) < 0) *out = 0;
        } else
            path_of_fd((int)directory, out, size);
        strncat(out, "/", size - strlen(out) - 1);
    }
    strncat(out, p, size - strlen(out) - 1);
}

static int is_open(long nr)
{
    return nr == SYS_open || nr == SYS_openat || nr == SYS_creat || nr == SYS_openat2;
}

static int is_write(long nr)
{
    return nr == SYS_write || nr == SYS_pwrite64 || nr == SYS_writev || nr == SYS_pwritev || nr == SYS_pwritev2;
}

static void paths_of(long nr, const long a[6], char *path, char *other, size_t size)
{
    *other = 0;
    switch (nr) {
    case SYS_open: case SYS_creat: case SYS_unlink: case SYS_rmdir: case SYS_truncate: case SYS_mkdir: case SYS_chmod:
        path_at(AT_FDCWD, a[0], path, size);
        break;
    case SYS_openat: case SYS_openat2: case SYS_unlinkat: case SYS_mkdirat: case SYS_fchmodat:
        path_at(a[0], a[1], path, size);
        break;
    case SYS_rename: case SYS_link:
        path_at(AT_FDCWD, a[0], path, size);
        path_at(AT_FDCWD, a[1], other, size);
        break;
    case SYS_renameat: case SYS_renameat2: case SYS_linkat:
        path_at(a[0], a[1], path, size);
        path_at(a[2], a[3], other, size);
        break;
    case SYS_symlink:
        path_at(AT_FDCWD, a[1], path, size);
        break;
    case SYS_symlinkat:
        path_at(a[1], a[2], path, size);
        break;
    case SYS_copy_file_range: case SYS_splice:
        path_of_fd(a[2], path, size);
        break;
    case SYS_msync:
        *path = 0;
        break;
    default: /* the first argument is the descriptor */
        path_of_fd(a[0], path, size);
    }
}

/* What the log keeps of a call, beside its paths; before it is done. */
static void look(long nr, const long a[6], const char *path, struct record *rec, struct iovec *data)
{
    struct stat info;
    *data = (struct iovec){(void *)a[1], (size_t)a[2]};
    if (nr == SYS_write)
        rec->extra = RAW(SYS_lseek, a[0], 0, SEEK_CUR, 0, 0, 0);
    else if (nr == SYS_pwrite64)
        rec->extra = a[3];
    else if (nr == SYS_fsync || nr == SYS_fdatasync) { /* what stores into a mapping wrote is seen only here */
        data->iov_base = content;
        data->iov_len = 0;
        RAW(SYS_fstat, a[0], &info, 0, 0, 0, 0);
        rec->is_directory = S_ISDIR(info.st_mode);
        if (rec->is_directory) return;
        char name[600];
        strcpy(name, path);
        long fd = RAW(SYS_open, name, O_RDONLY | O_CLOEXEC, 0, 0, 0, 0);
        if (fd < 0) return;
        long n = RAW(SYS_pread64, fd, content, sizeof content, 0, 0, 0);
        data->iov_len = n > 0 ? (size_t)n : 0;
        RAW(SYS_close, fd, 0, 0, 0, 0, 0);
    } else {
        data->iov_len = 0;
        if (is_open(nr)) {
            long flags = nr == SYS_openat ? a[2] : a[1];
            rec->extra = flags & O_CREAT && RAW(SYS_stat, path, &info, 0, 0, 0, 0) == -ENOENT;
            if (flags & O_TRUNC) rec->extra |= 2;
        } else if (nr == SYS_ftruncate || nr == SYS_truncate)
            rec->extra = a[1];
    }
}

static void put(struct record *rec, const char *path, const char *other, struct iovec data)
{
    rec->path = (uint32_t)strlen(path);
    rec->other = (uint32_t)strlen(other);
    rec->data = (uint32_t)data.iov_len;
    struct iovec parts[4] = {{rec, sizeof *rec}, {(char *)path, rec->path}, {(char *)other, rec->other}, data};
    RAW(SYS_writev, log_fd, parts, 4, 0, 0, 0);
}

static long do_call(long nr, const long a[6])
{
    char path[600], other[600];
    if (!atomic_load(&armed)) return RAW(nr, a[0], a[1], a[2], a[3], a[4], a[5]);
    paths_of(nr, a, path, other, sizeof path);
    if (!inside(path) && !inside(other)) return RAW(nr, a[0], a[1], a[2], a[3], a[4], a[5]);
    long n = atomic_fetch_add(&count, 1) + 1, goal = atomic_load(&target), length = a[2], result;
    int how = atomic_load(&mode), hit = n == goal, error = atomic_load(&argument);
    if (hit && how == KILL_BEFORE) RAW(SYS_kill, RAW(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
    if ((hit && how == FAIL) || (how == FAIL_FROM && n >= goal && (is_write(nr) || nr == SYS_fallocate))) {
        if (nr == SYS_close) RAW(nr, a[0], 0, 0, 0, 0, 0); /* as Linux does: it is closed all the same */
        return -error;
    }
    if (hit && how == SHORT && (nr == SYS_write || nr == SYS_pwrite64) && length > 1) length /= 2;
    struct record rec = {.pid = (uint32_t)RAW(SYS_getpid, 0, 0, 0, 0, 0, 0), .nr = (uint32_t)nr};
    struct iovec data;
    if (log_fd >= 0) {
        while (atomic_flag_test_and_set(&busy)) {}
        look(nr, a, path, &rec, &data);
    }
    result = RAW(nr, a[0], a[1], length, a[3], a[4], a[5]);
    if (log_fd >= 0) {
        rec.result = result;
        put(&rec, path, other, data);
        atomic_flag_clear(&busy);
    }
    if (hit && how == KILL_AFTER) RAW(SYS_kill, RAW(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
    return result;
}

static void on_trap(int number, siginfo_t *info, void *context)
{
    (void)number;
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    long a[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
    int saved = errno;
    r[REG_RAX] = do_call(info->si_syscall, a);
    errno = saved;
}

/* Trap what concerns `directory` and all below it. Call it when the core has its SIGSEGV handler: that blocks all
 * signals, and makes calls of its own, and a SIGSYS that is blocked is deadly. */
int trap_install(const char *directory, int log)
{
    struct sock_filter code[NCALLS + 8];
    int n = 0;
    uint64_t gate = (uint64_t)(uintptr_t)trap_gate;
    root_len = strlen(directory);
    if (root_len >= sizeof root) return -ENAMETOOLONG;
    strcpy(root, directory);
    log_fd = log;

    struct sigaction fault, ours = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSYS, &ours, NULL);
    sigaction(SIGSEGV, NULL, &fault);
    sigdelset(&fault.sa_mask, SIGSYS);
    sigaction(SIGSEGV, &fault, NULL);

    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < NCALLS; i++)
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i], NCALLS - i, 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    size_t ip = offsetof(struct seccomp_data, instruction_pointer);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, ip);
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)gate, 0, 3);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, ip + 4);
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(gate >> 32), 0, 1);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    struct sock_fprog program = {(unsigned short)n, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -errno;
    long r = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
    return r ? (r < 0 ? -errno : -ESRCH) : 0;
}

/* From now on: count, log, and do `how` at call number `when` (0: at none). */
void trap_arm(long when, int how, int error)
{
    atomic_store(&count, 0);
    atomic_store(&mode, how);
    atomic_store(&argument, error);
    atomic_store(&target, when);
    atomic_store(&armed, 1);
}

/* No more. Returns how many calls there were. */
long trap_disarm(void)
{
    atomic_store(&armed, 0);
    return atomic_load(&count);
}

/* A note between the calls in the log. */
void trap_mark(const char *text)
{
    struct record rec = {.pid = (uint32_t)RAW(SYS_getpid, 0, 0, 0, 0, 0, 0), .nr = UINT32_MAX};
    put(&rec, text, "", (struct iovec){NULL, 0});
}
