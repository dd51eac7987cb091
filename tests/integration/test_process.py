"""A process with views in it: other signal handlers, crashes, signals, threads, forks. Each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import ctypes, faulthandler, os, signal, sys, threading, time
faulthandler.dump_traceback_later(280, exit=True)
import dask, numpy as np, transaction
import dask_zbig as dz
BLOCK = 2 << 20
db = dz.open("x.fs")
conn = db.open()
root = conn.root()

def away():
    for d, _, files in os.walk("x.fs.blobs"):
        for f in files:
            if f.endswith(".blob"):
                os.rename(os.path.join(d, f), os.path.join(d, f) + ".away")

def back():
    for d, _, files in os.walk("x.fs.blobs"):
        for f in files:
            if f.endswith(".away"):
                os.rename(os.path.join(d, f), os.path.join(d, f)[: -len(".away")])

def absent(name="A"):
    "A view with nothing of it mapped."
    view = root[name][:]
    root[name]._open().space.drop(0, view.nbytes)
    return view

def use():
    "Faults of both kinds are served."
    view = absent()
    assert view[5] == 7
    view[3 * BLOCK] = 1
    assert view[3 * BLOCK] == 1
    transaction.abort()
    assert view[3 * BLOCK] == 7
"""

WRITE = """
root["A"] = A = dz.ZBigArray(16 * BLOCK, "u1")
A[:] = 7
transaction.commit()
conn.close(); db.close()
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A directory with a database in which A is 32 MiB of sevens. No test changes it."""
    directory = tmp_path_factory.mktemp("process")
    script(WRITE, directory)
    return directory


def script(body, cwd, status=0, env=None, before=""):
    done = subprocess.run(
        [sys.executable, "-c", before + PRELUDE + textwrap.dedent(body)],
        cwd=cwd, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


# -- other handlers

LIBRARY = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

/* A library that maps its own pages when they are touched, and leaves all other faults to whom they were before. */
static struct sigaction before;
static char *page;
int served;

static void on_fault(int sig, siginfo_t *si, void *ucontext)
{
    if ((char *)si->si_addr >= page && (char *)si->si_addr < page + 4096) {
        mprotect(page, 4096, PROT_READ | PROT_WRITE);
        served++;
    } else if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(sig, si, ucontext);
    } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
        signal(sig, SIG_DFL);
    } else {
        before.sa_handler(sig);
    }
}

void install(void)
{
    struct sigaction ours;
    page = mmap(0, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &ours, &before);
}

char use(void) { mprotect(page, 4096, PROT_NONE); page[5] = 3; return page[5]; }

/* Until the stack is used up. */
int recurse(int n) { volatile char here[1000]; here[n % 1000] = 1; return recurse(n + 1) + here[0]; }

#include <stdlib.h>
void alternate(void)
{
    stack_t s = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigaltstack(&s, 0);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The path of the library above."""
    directory = tmp_path_factory.mktemp("library")
    (directory / "lib.c").write_text(LIBRARY)
    command = ["gcc", "-O0", "-shared", "-fPIC", "-o", "lib.so", "lib.c"]
    subprocess.run(command, cwd=directory, check=True, timeout=300)
    return str(directory / "lib.so")


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_library_with_a_handler_of_its_own(stored, library, order):
    """Both serve their faults, and a crash is one, with its report."""
    done = script(
        f"""
        lib = ctypes.CDLL({library!r})
        if {order!r} == "before":
            lib.install()
        view = root["A"][:]
        if {order!r} == "after":
            lib.install()
        for _ in range(3):
            view[5] = 1  # no call of ours has come in between
            assert lib.use() == 3
            transaction.abort()
            use()
            assert lib.use() == 3
        assert ctypes.c_int.in_dll(lib, "served").value == 6
        faulthandler.enable()
        signal.alarm(200)
        print("alive", flush=True)
        ctypes.string_at(0)
        """,
        stored,
        -signal.SIGSEGV,
    )
    assert done.stdout == "alive\n"
    assert done.stderr.count("Fatal Python error: Segmentation fault") == 1


@pytest.mark.parametrize("report", [False, True], ids=["", "faulthandler"])
@pytest.mark.parametrize("where", ["main", "thread", "thread with an alternate stack"])
def test_a_stack_overflow_is_a_crash_and_no_hang(stored, library, where, report):
    done = script(
        f"""
        lib = ctypes.CDLL({library!r})
        {"faulthandler.enable()" if report else ""}
        use()
        signal.alarm(200)
        def overflow():
            use_up()
        def use_up():
            if "alternate" in {where!r}:
                lib.alternate()
            lib.recurse(0)
        if {where!r} == "main":
            use_up()
        thread = threading.Thread(target=use_up)
        thread.start()
        thread.join()
        """,
        stored,
        -signal.SIGSEGV,
    )
    # (faulthandler has an alternate stack for the main thread only)
    shown = report and where != "thread"
    assert done.stderr.count("Fatal Python error: Segmentation fault") == shown


def test_pytest_and_its_faulthandler(stored):
    """Under pytest, which enables it before each run: views work, and a crash is reported once."""
    test = PRELUDE.replace("faulthandler.dump_traceback_later(280, exit=True)", "") + textwrap.dedent(
        """
        def test_use():
            use()

        def test_crash():
            print("alive", file=sys.__stderr__, flush=True)
            ctypes.string_at(0)
        """
    )
    path = stored / "test_of_a_crash.py"
    path.write_text(test)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", path.name],
        cwd=stored, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    path.unlink()
    assert done.returncode == -signal.SIGSEGV, f"{done.stdout}\n{done.stderr}"
    assert "alive" in done.stderr
    assert done.stderr.count("Fatal Python error: Segmentation fault") == 1


# -- signals


def test_a_thousand_signals_a_second(stored):
    """While pages are loaded, written, committed and dropped: no wrong byte, and none of our waits is cut short."""
    script(
        """
        from dask_zbig.memory._native import counters
        count = 0
        def tick(*_):
            global count
            count += 1
        signal.signal(signal.SIGALRM, tick)
        root["T"] = dz.ZBigArray(16 * BLOCK, "u1")
        transaction.commit()
        written = root["T"][:]
        view = root["A"][:]
        space = root["A"]._open().space
        before = counters()
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        end = time.monotonic() + 3
        turns = 0
        while time.monotonic() < end or turns < 3 or count <= 300:
            turns += 1
            space.drop(0, view.nbytes)
            assert (view[:: BLOCK // 2] == 7).all()
            written[turns::4096] = turns % 250
            assert (written[turns::4096] == turns % 250).all()
            transaction.commit() if turns % 3 == 0 else transaction.abort()
        signal.setitimer(signal.ITIMER_REAL, 0)
        after = counters()
        assert count > 300, count
        assert after["waits"] > before["waits"] and after["write_faults"] > before["write_faults"]
        del root["T"]
        transaction.commit()
        """,
        stored,
    )


# guard: fault.c: `sleep_interruptibly`; removed -> it took until the deadline. loader.py, `_interrupted`:
# `service.failed`; removed -> A.sum() is wrong; the error; removed -> not interrupted, where the handler does not raise
@pytest.mark.parametrize(
    ("call", "handler", "interrupt"),
    [
        ("view.sum()", "signal.default_int_handler", "KeyboardInterrupt"),
        ("A.sum()", "signal.default_int_handler", "KeyboardInterrupt"),
        ("view.sum()", "lambda *_: None", "dz.LoadError"),
    ],
)
def test_ctrl_c_during_a_load(tmp_path, call, handler, interrupt):
    """By a server that does not answer."""
    script(
        f"""
        signal.signal(signal.SIGINT, {handler})
        conn.close(); db.close()
        dask.config.set({{"zbig.load-timeout": 50}})
        server = dz.serve("served.fs", shared_blob_dir=False)
        with server as uri:
            db = dz.open(uri)
            conn = db.open()
            conn.root()["A"] = A = dz.ZBigArray(8 * BLOCK, "u1")
            A[:] = 7
            conn.root()["B"] = B = dz.ZBigArray(8 * BLOCK, "u1")
            B[:] = 5
            transaction.commit()
            conn.close(); db.close()
            db = dz.open(uri)
            conn = db.open()
            A, B = conn.root()["A"], conn.root()["B"]
            view, other = A[:], B[:]
            os.kill(server.pid, signal.SIGSTOP)
            started = []
            def press():
                time.sleep(1)
                started.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=press).start()
            try:
                {call}
                for _ in range(10**6): pass
                sys.exit("not interrupted")
            except {interrupt}:
                took = time.monotonic() - started[0]
            assert took < 25, took
            os.kill(server.pid, signal.SIGCONT)
            if "view" in {call!r}:
                for use in (A.sum, A.prefetch, lambda: np.asarray(A)):
                    try:
                        use()
                        sys.exit("0xFF was taken for data")
                    except dz.LoadError as error:
                        assert "Ctrl-C" in str(error)
                conn.root()["n"] = 1
                try:
                    transaction.commit()
                    sys.exit("committed")
                except dz.LoadError as error:
                    assert "Ctrl-C" in str(error)
                transaction.abort()
            assert other.sum() == 8 * BLOCK * 5
            assert view.sum() == 8 * BLOCK * 7
            view[5] = 1
            transaction.commit()
            assert A[5] == 1
            conn.close(); db.close()
        """,
        tmp_path,
    )


def test_a_thread_that_blocks_sigsegv(stored):
    """The kernel kills whoever faults then; nothing can be done about that. But what is mapped needs no fault."""
    body = """
    A = root["A"]
    view = A[:]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])
    assert view.sum() == 7 * view.nbytes
    A.prefetch(np.s_[:10], writable=True)
    view[5] = 1
    transaction.abort()
    assert A.sum() == 7 * view.nbytes  # (a call of ours maps again what the abort has dropped)
    print("alive", flush=True)
    {}
    """
    assert script(body.format(""), stored).stdout == "alive\n"
    assert script(body.format("view[5] = 1"), stored, -signal.SIGSEGV).stdout == "alive\n"


# -- threads, and the end


def test_threads_that_end_during_a_load(tmp_path):
    """Of a daemon thread nobody waits for; a C thread that is cancelled is no Python thread."""
    script(WRITE, tmp_path)
    script(
        """
        from dask_zbig.memory._native import counters
        dask.config.set({"zbig.load-timeout": 1})
        away()
        view = root["A"][:]
        results = []
        def read(k):
            try:
                value = view[k * BLOCK]
                for _ in range(10**6): pass
                results.append(value)
            except dz.LoadError:
                results.append("told")
        threads = [threading.Thread(target=read, args=(k,), daemon=True) for k in range(16)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert results == ["told"] * 16, results
        back()
        transaction.abort()
        for _ in range(5):
            view = absent()
            threads = [threading.Thread(target=lambda k=k: view[k * BLOCK]) for k in range(16)]
            for t in threads: t.start()
            for t in threads: t.join()
        assert view.sum() == 7 * view.nbytes
        """,
        tmp_path,
    )


# guard: loader.py, `_start_native`; without -> it hung: no greenlet runs while their thread waits for one
@pytest.mark.parametrize("when", ["before", "after"])
def test_loaders_are_threads_where_gevent_has_greenlets(tmp_path, when):
    """Patched before we are imported, or after; greenlets share views, and one is told of a load that failed."""
    pytest.importorskip("gevent")
    script(WRITE, tmp_path)
    patch = "import gevent, gevent.monkey; gevent.monkey.patch_all()\n"
    body = """
    dask.config.set({"zbig.load-timeout": 0.5})
    away()
    view = root["A"][:]
    def read():
        try:
            value = view[0]
            for _ in range(10**6): pass
            return value
        except dz.LoadError:
            return "told"
    assert gevent.spawn(read).get() == "told"
    back()
    transaction.abort()
    view = absent()
    greenlets = [gevent.spawn(lambda k=k: int(view[k * BLOCK : (k + 1) * BLOCK].sum())) for k in range(16)]
    gevent.joinall(greenlets, raise_error=True)
    assert [g.value for g in greenlets] == [7 * BLOCK] * 16
    thread = threading.Thread(target=lambda: view.__setitem__(5, 8))
    thread.start()
    thread.join()
    transaction.commit()
    assert root["A"][4:7].tolist() == [7, 8, 7]
    """
    if when == "before":
        script(body, tmp_path, before=patch)
    else:
        script(patch + textwrap.dedent(body), tmp_path)


@pytest.mark.parametrize("daemon", [True, False])
@pytest.mark.parametrize("end", ["sys.exit(3)", "os._exit(3)", "signal.raise_signal(signal.SIGTERM)"])
def test_the_end_of_the_process_during_a_load(tmp_path, end, daemon):
    """A thread waits for a server that does not answer; a thread that is no daemon is told, and ends."""
    script(
        WRITE.replace("16", "2")
        + f"""
if True:
        from dask_zbig.memory._native import counters
        dask.config.set({{"zbig.load-timeout": 2}})
        away()
        conn = None
        db = dz.open("x.fs"); conn = db.open()
        view = conn.root()["A"][:]
        def read():
            try:
                view.sum()
                for _ in range(10**6): pass
            except dz.LoadError:
                pass
        threading.Thread(target=read, daemon={daemon}).start()
        while not counters()["waits"]:
            time.sleep(0.001)
        {end}
        """,
        tmp_path,
        -signal.SIGTERM if "SIGTERM" in end else 3,
    )


# -- interpreters and processes


SUB = """
import _xxsubinterpreters as sub
def inside(code):
    interpreter = sub.create()
    try:
        sub.run_string(interpreter, code)
        return "ran"
    except sub.RunFailedError as error:
        return str(error)
    finally:
        sub.destroy(interpreter)
"""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the module has another name there")
@pytest.mark.parametrize("when", ["before", "after"])
def test_subinterpreters(stored, when):
    """Views of the main interpreter go on; to import the package in another one is refused, or works."""
    done = script(
        SUB
        + f"""
if True:
    if {when!r} == "before":
        assert inside("x = 1") == "ran"
    use()
    assert inside("x = sum(range(10))") == "ran"
    use()
    said = inside("import dask_zbig")
    print(said)
    assert said == "ran" or "Error" in said, said
    use()
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
        """,
        stored,
    )
    assert done.stdout


def test_a_view_used_in_a_subinterpreter_of_a_thread(stored):
    """The thread has the other interpreter's lock state when it faults in plain C memory of ours."""
    if sys.version_info >= (3, 13):
        pytest.skip("the module has another name there")
    script(
        SUB
        + """
if True:
    view = absent()
    address = view.ctypes.data
    code = f"import ctypes; assert ctypes.string_at({address} + 5 * {BLOCK}, 3) == bytes([7, 7, 7])"
    said = inside(code)
    assert said == "ran", said
    code = f"import ctypes; ctypes.memset({address}, 9, 3)"
    assert inside(code) == "ran"
    assert view[:4].tolist() == [9, 9, 9, 7]
    transaction.abort()
    use()
        """,
        stored,
    )


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing(tmp_path, method):
    """The child opens the database itself, by its URI; an array that is sent there is what was committed."""
    (tmp_path / "job.py").write_text(
        textwrap.dedent(
            f"""
            import multiprocessing, sys
            import numpy as np, transaction
            import dask_zbig as dz

            def total(A, uri):
                db = dz.open(uri)
                with db.transaction() as conn:
                    mine = int(conn.root()["A"].sum())
                db.close()
                return int(A.sum()), mine

            if __name__ == "__main__":
                context = multiprocessing.get_context({method!r})
                with dz.serve("x.fs") as uri:
                    db = dz.open(uri)
                    conn = db.open()
                    conn.root()["A"] = A = dz.ZBigArray(5 << 20, "u1")
                    A[:] = 3
                    transaction.commit()
                    view = A[:]
                    view[5] = 4
                    transaction.commit()
                    with context.Pool(1) as pool:
                        assert pool.apply(total, (A, uri)) == (3 * (5 << 20) + 1,) * 2
                    assert view[5] == 4
                    conn.close(); db.close()
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_fork_and_exec(stored):
    """As `subprocess` does, and by hand, with live views and uncommitted changes."""
    script(
        """
        import subprocess
        view = root["A"][:]
        view[5] = 1
        for _ in range(5):
            assert subprocess.run(["true"]).returncode == 0
        ended = subprocess.run([sys.executable, "-c", "print(1)"], preexec_fn=os.getpid, capture_output=True)
        assert ended.stdout == b"1\\n"
        pid = os.fork()
        if pid == 0:
            os.execv("/bin/true", ["true"])
        assert os.waitpid(pid, 0)[1] == 0
        descriptors = os.popen("ls -l /proc/self/fd").read()
        assert "zbig" not in descriptors, descriptors
        assert view[5] == 1
        view[6] = 2
        transaction.abort()
        use()
        """,
        stored,
    )


# guard: process.c, `poison_is_ours`: else 2 MiB of 0xFF are written over a file of somebody else's
def test_a_child_that_has_closed_all_descriptors(stored):
    """As daemons do; then the numbers are other files'."""
    script(
        """
        from dask_zbig.memory._native import lib, start
        start()
        links = {int(n): f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")}
        (ours,) = [n for n, link in links.items() if os.path.islink(link) and "zbig-poison" in os.readlink(link)]
        with open("other", "wb") as other:
            other.write(b"precious")
        pid = os.fork()
        if pid == 0:
            os.closerange(3, 1024)
            while (fd := os.open("other", os.O_RDWR)) < ours:
                pass
            made = lib.zb_poison_fd()
            right = fd == ours < made and os.pread(made, 3 << 20, 0) == b"\\xff" * (2 << 20)
            right = right and lib.zb_poison_fd() == made and open("other", "rb").read() == b"precious"
            os._exit(0 if right else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert os.pread(lib.zb_poison_fd(), 3 << 20, 0) == b"\\xff" * (2 << 20)
        """,
        stored,
    )


# guard: compiled.py makes all of cffi's types; else cffi's assertion ends the process
@pytest.mark.parametrize("kind", ["zb_request", "zb_count", "zb_piece"])
def test_two_threads_that_need_a_type_of_the_core_for_the_first_time(kind):
    """The collector comes in while one makes it, and lets the other run."""
    code = f"""
        import gc, sys, threading
        from dask_zbig.memory import _core
        gc.disable()
        gc.collect()
        inside, done = threading.Event(), threading.Event()

        def let_the_other_run(phase, info):
            if phase == "start" and not inside.is_set():
                inside.set()
                done.wait(0.3)

        def other():
            inside.wait(2)
            _core.ffi.new("{kind} *")
            done.set()

        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        gc.callbacks.append(let_the_other_run)
        gc.set_threshold(1, 1000, 1000)
        gc.enable()
        _core.ffi.new("{kind} *")
        gc.disable()
        inside.set()
        thread.join(60)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
