"""What happens when bytes cannot be had, or the process is not what it was: each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import faulthandler, os, sys
faulthandler.dump_traceback_later(280, exit=True)
import dask, numpy as np, transaction
import dask_zbig as dz
from dask_zbig.cluster import worker
dask.config.set({"zbig.load-timeout": 0.5})

def blob_files():
    return [os.path.join(d, f) for d, _, files in os.walk("x.fs.blobs") for f in files if f.endswith(".blob")]

def away():
    for path in blob_files():
        os.rename(path, path + ".away")

def back():
    for d, _, files in os.walk("x.fs.blobs"):
        for f in files:
            if f.endswith(".away"):
                os.rename(os.path.join(d, f), os.path.join(d, f[: -len(".away")]))

def raises(error, action):
    try:
        action()
        for _ in range(100):
            str(action)  # what a fault raises comes at the next call
    except error as e:
        return str(e)
    sys.exit(f"no {error.__name__}")

db = dz.open("x.fs")
conn = db.open()
root = conn.root()
"""

WRITE = """
root["A"] = A = dz.ZBigArray(1 << 20, "u1")
A[:] = 7
root["B"] = B = dz.ZBigArray(1 << 20, "u1")
B[:] = 5
transaction.commit()
"""


def run(body, cwd, status=0, write=True):
    """Run a script in `cwd`; `write`: another process has stored A and B there before."""
    if write:
        run(WRITE + "conn.close(); db.close()", cwd, write=False)
    script = PRELUDE + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_missing_file_is_an_ordinary_error_in_python_calls(tmp_path):
    run(
        """
        away()
        A = root["A"]
        for call in (lambda: A.prefetch(np.s_[:10]), lambda: A[3]):
            assert "segment" in raises(dz.LoadError, call)
        back()
        assert A[3] == 7
        """,
        tmp_path,
    )


# guard: loader.py: `_give_up`; removed -> the thread slept for ever; without `service.failed` -> the commit went
# through; without `_raise_in` -> no LoadError
def test_missing_file_in_a_plain_access_dooms_the_transaction(tmp_path):
    run(
        """
        A, B = root["A"], root["B"]
        b = B[:]
        away()
        a = A[:]
        raises(dz.LoadError, lambda: a[5])
        assert a[5] == 255, a[5]
        assert b[5] == 5
        root["n"] = 1
        raises(dz.LoadError, transaction.commit)
        back()
        transaction.abort()
        assert a[5] == 7 and a.sum() == 7 << 20
        root["n"] = 2
        a[0] = 1
        transaction.commit()
        assert a[0] == 1
        """,
        tmp_path,
    )


# guard: openfile.py: `discard` forgets `failure`; removed -> the next commit failed
def test_a_transaction_doomed_by_a_load_is_over_with_abort(tmp_path):
    """The next user of the connection has nothing to do with it."""
    run(
        """
        away()
        a = root["A"][:]
        raises(dz.LoadError, lambda: a[5])
        transaction.abort()
        conn.close()
        back()
        again = db.open()
        assert again is conn
        b = again.root()["A"][:]
        assert b[5] == 7 and b.sum() == 7 << 20
        b[0] = 1
        transaction.commit()
        """,
        tmp_path,
    )


# guard: openfile.py: `if recheck`, reader.py: `size < self.length`; removed -> the file is mapped again for ever
@pytest.mark.parametrize("held", [False, True], ids=["opened anew", "open"])
def test_a_shorter_file_is_noticed(tmp_path, held):
    """Also while somebody has it open, whose descriptor is used then."""
    run(
        """
        root["L"] = dz.ZBigArray(8 << 20, "u1")
        root["L"][:] = 3
        transaction.commit()
        conn.close(); db.close()
        """,
        tmp_path,
        write=False,
    )
    run(
        f"""
        a = root["L"][:]
        assert a[5_000_000] == 3
        kept = root["L"]._open().content(0, 8 << 20)[1] if {held} else []
        for source in kept:
            source.descriptor()
        for path in blob_files():
            os.truncate(path, 4096)
        why = raises(dz.LoadError, lambda: a[5_000_000])
        assert ("has only 4096 bytes left" if {held} else "has 4096 bytes where 8388608") in why, why
        raises(dz.LoadError, transaction.commit)
        """,
        tmp_path,
        write=False,
    )


# guard: fault.c: `zb_overflow`; removed -> SIGSEGV; scratch.c: it notes the error; removed -> no ScratchError at
# commit
def test_full_scratch_is_an_error_and_abort_heals(tmp_path):
    run(
        """
        import resource, signal
        a = root["A"][:]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        raises(dz.ScratchError, lambda: a.__setitem__(10, 1))
        assert a[10] == 1 and a[11] == 7
        raises(dz.ScratchError, transaction.commit)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        transaction.abort()
        assert a[10] == 7
        a[10] = 2
        transaction.commit()
        assert a[10] == 2
        """,
        tmp_path,
    )


# guard: loader.py: `zb_loaders_come`; removed -> no ScratchError but at commit
def test_a_write_that_fails_before_there_is_a_loader_is_told(tmp_path):
    run(
        """
        import resource, signal, threading
        from dask_zbig.memory import loader
        run, failed = loader._run, threading.Event()

        def late(*arguments):
            failed.wait()
            run(*arguments)

        loader._run = late
        a = root["A"][:]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        threading.Timer(0.5, failed.set).start()  # a write that told nobody is over long before
        raises(dz.ScratchError, lambda: a.__setitem__(10, 1))
        assert failed.is_set()
        transaction.abort()
        """,
        tmp_path,
    )


# guard: fault.c: `s->closed` at a write; removed -> no ClosedError
def test_views_after_close_keep_what_they_had_and_refuse_changes(tmp_path):
    run(
        """
        A = root["A"]
        a = A[:]
        conn.close()
        assert a[5] == 7
        raises(dz.ClosedError, lambda: a.__setitem__(5, 1))
        again = db.open()
        assert again.root()["A"][5] == 7
        again.root()["n"] = 1
        transaction.commit()
        again.cacheMinimize()
        assert again.root()["A"][5] == 7
        """,
        tmp_path,
    )


# guard: fault.c: `s->closed` at a read, or ClosedError in `serve` and the loader; all removed -> the thread slept for
# ever
@pytest.mark.parametrize("closed", ["conn.close()", "conn.close(); db.close()", "conn.close(); del A, root, conn"])
def test_absent_bytes_after_close_are_an_error_and_no_crash(tmp_path, closed):
    run(
        f"""
        import gc
        away()
        A = root["A"]
        a, b = A[:], root["B"][:]
        {closed}
        gc.collect()
        back()
        raises(dz.ClosedError, lambda: a[5])
        assert a[5] == 255
        raises(dz.ClosedError, lambda: b.__setitem__(5, 1))
        """,
        tmp_path,
    )


FORK = """
a, b = root["A"][:], root["B"][:]
a[:] = 1  # enough for the scratch file to become a blob as it is
transaction.savepoint()
a[1] = 2
faulthandler.cancel_dump_traceback_later()  # at its end a child would wait for the thread that does this
pid = os.fork()
if pid == 0:
    {}
    os._exit(6)
_, status = os.waitpid(pid, 0)
assert {}, status
assert a[:4].tolist() == [1, 2, 1, 1] and b[2] == 5
a[3] = 4
transaction.commit()
conn.close(); db.close()
"""
FORKED = "a, b = root['A'][:], root['B'][:]; assert a[:5].tolist() == [1, 2, 1, 4, 1]; assert b[2] == 5"


# guard: process.c: `fork_child` makes windows dark; removed -> the child wrote to the parent's page; fault.c:
# `forked`; removed -> it was served; space.py: `check_process`; removed -> no ForkError
@pytest.mark.parametrize("touch", ["a[2] = 9", "b[2] = 9", "a[2]"], ids=["dirty-page", "clean-page", "read"])
def test_forked_child_is_told_and_cannot_reach_the_parent(tmp_path, touch):
    child = f"assert 'spawn' in raises(dz.ForkError, lambda: root['A'][0]); print('told', flush=True); {touch}"
    done = run(FORK.format(child, "os.WIFSIGNALED(status) and os.WTERMSIG(status) == 11"), tmp_path)
    assert done.stdout == "told\n"
    assert "forked" in done.stderr
    run(FORKED, tmp_path, write=False)


# guard: process.c: the child forgets the descriptor, and zb_discard refuses: both removed, or storage/sources.py:
# `_drop_file` asks for the pid: removed -> the child's exit took the parent's scratch files, and its commit failed
def test_forked_child_that_ends_leaves_the_parent_its_files(tmp_path):
    run(FORK.format("del a; import gc; gc.collect(); sys.exit(5)", "os.waitstatus_to_exitcode(status) == 5"), tmp_path)
    run(FORKED, tmp_path, write=False)


# guard: _native.py: `_tame_faulthandler`; removed -> SIGSEGV at a[1 << 19]; without `zb_handlers_off` -> the crash
# was passed for ever to a handler that had been disabled
@pytest.mark.parametrize(
    ("before", "after", "reports"),
    [
        ("faulthandler.enable()", "", 1),
        ("faulthandler.enable()", "faulthandler.disable()", 0),
        ("", "faulthandler.enable()", 1),
        ("", "faulthandler.enable(); faulthandler.disable()", 0),
        ("faulthandler.enable()", "faulthandler.disable(); faulthandler.enable()", 1),
    ],
)
def test_faulthandler_reports_crashes_and_no_fault_of_a_view(tmp_path, before, after, reports):
    """It may be enabled and disabled before the first view is made, and after."""
    done = run(
        f"""
        import ctypes, signal
        {before}
        a = root["A"][:]
        a[0] = 1
        {after}
        a[1 << 19] = 2
        assert a[1 << 19] == 2
        print("alive", flush=True)
        signal.alarm(200)  # or it would crash for ever, if it were passed on to a handler that does nothing
        ctypes.string_at(0)
        """,
        tmp_path,
        status=-signal.SIGSEGV,
    )
    assert done.stdout == "alive\n"
    assert done.stderr.count("Fatal Python error: Segmentation fault") == reports


def test_interpreter_exit_while_others_load(tmp_path):
    run(
        """
        dask.config.set({"zbig.load-timeout": 1000})  # longer than whoever waited for it would live
        import threading
        A = root["A"]
        for path in blob_files():
            os.rename(path, path + ".away")
        a = A[:]
        started = threading.Event()
        def use():
            started.set()
            a.sum()
        threading.Thread(target=use, daemon=True).start()
        started.wait()
        from dask_zbig.memory._native import counters
        while not counters()["waits"]:
            os.sched_yield()
        sys.exit(0)
        """,
        tmp_path,
    )


@pytest.mark.parametrize("use", ["A[0]", "transaction.begin()"])
def test_whoever_takes_the_signal_handlers_away_has_them_until_the_next_use(tmp_path, use):
    run(
        f"""
        import signal
        A = root["A"]
        a = A[:]
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        {use}
        a[0] = 1
        assert a[0] == 1
        """,
        tmp_path,
    )
