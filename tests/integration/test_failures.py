"""What happens when bytes cannot be had, or the process is not what it was: each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import faulthandler, os, sys
faulthandler.dump_traceback_later(60, exit=True)
import dask, numpy as np, transaction
import dask_zbig as dz
from dask_zbig.cluster import worker
dask.config.set({"zbig.load-timeout": 0.5})

def blob_files():
    return [os.path.join(d, f) for d, _, files in os.walk("x.fs.blobs") for f in files if f.endswith(".blob")]

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
        [sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_missing_file_is_an_ordinary_error_in_python_calls(tmp_path):
    run(
        """
        for path in blob_files():
            os.rename(path, path + ".away")
        A = root["A"]
        for call in (lambda: A.prefetch(np.s_[:10]), lambda: A[3]):
            try:
                call()
            except dz.LoadError as e:
                assert "segment" in str(e), e
            else:
                sys.exit("no error")
        for path in os.popen("find . -name '*.away'").read().split():
            os.rename(path, path[: -len(".away")])
        assert A[3] == 7
        """,
        tmp_path,
    )


def test_missing_file_in_a_plain_access_dooms_the_transaction(tmp_path):
    run(
        """
        A, B = root["A"], root["B"]
        b = B[:]
        for path in blob_files():
            os.rename(path, path + ".away")
        a = A[:]
        def use():
            x = int(a[5])
            for _ in range(10):
                str(x)  # an asynchronous exception comes at the next call
            return x
        try:
            x = use()
        except dz.LoadError as e:
            pass
        else:
            sys.exit(f"no error, but {x}")
        assert a[5] == 255, a[5]
        assert b[5] == 5
        root["n"] = 1
        try:
            transaction.commit()
        except dz.LoadError:
            pass
        else:
            sys.exit("committed")
        for path in os.popen("find . -name '*.away'").read().split():
            os.rename(path, path[: -len(".away")])
        transaction.abort()
        assert a[5] == 7 and a.sum() == 7 << 20
        root["n"] = 2
        a[0] = 1
        transaction.commit()
        assert a[0] == 1
        """,
        tmp_path,
    )


def test_truncated_file_is_noticed(tmp_path):
    run(
        """
        a, b = root["A"][:], root["B"][:]
        for path in blob_files():
            os.truncate(path, 4096)
        def use():
            x = int(a[500000])
            for _ in range(10):
                str(x)
        try:
            use()
        except dz.LoadError as e:
            assert "truncated" in str(e), e
        else:
            sys.exit("no error")
        """,
        tmp_path,
    )


def test_full_scratch_is_an_error_and_abort_heals(tmp_path):
    run(
        """
        import resource
        A = root["A"]
        a = A[:]
        signal = __import__("signal")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        def use():
            a[10] = 1
            for _ in range(10):
                str(a)
        try:
            use()
        except dz.ScratchError:
            pass
        else:
            sys.exit("no error")
        assert a[10] == 1 and a[11] == 7
        try:
            transaction.commit()
        except dz.ScratchError:
            pass
        else:
            sys.exit("committed")
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        transaction.abort()
        assert a[10] == 7
        a[10] = 2
        transaction.commit()
        assert a[10] == 2
        """,
        tmp_path,
    )


def test_views_after_close_keep_what_they_had_and_refuse_changes(tmp_path):
    run(
        """
        A = root["A"]
        a = A[:]
        conn.close()
        assert a[5] == 7
        def use():
            a[5] = 1
            for _ in range(10):
                str(a)
        try:
            use()
        except dz.ClosedError:
            pass
        else:
            sys.exit("no error")
        again = db.open()
        assert again.root()["A"][5] == 7
        """,
        tmp_path,
    )


def test_forked_child_is_told_and_cannot_reach_the_parent(tmp_path):
    done = run(
        """
        A = root["A"]
        a = A[:]
        a[0] = 1
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            try:
                A[0]
            except dz.ForkError as e:
                assert "spawn" in str(e)
            else:
                os._exit(5)
            a[1] = 9
            os._exit(6)
        _, status = os.waitpid(pid, 0)
        import signal
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV, status
        assert a[0] == 1 and a[1] == 7
        transaction.commit()
        """,
        tmp_path,
    )
    assert "forked" in done.stderr


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_real_crash_still_crashes_once(tmp_path, when):
    done = run(
        f"""
        import ctypes
        if {when == "before"}:
            faulthandler.enable()
        a = root["A"][:]
        a[0] = 1
        faulthandler.enable()
        a[1 << 19] = 2
        root["B"][:]
        ctypes.string_at(0)
        """,
        tmp_path,
        status=-signal.SIGSEGV,
    )
    assert done.stderr.count("Fatal Python error: Segmentation fault") == 1


def test_interpreter_exit_while_others_load(tmp_path):
    run(
        """
        dask.config.set({"zbig.load-timeout": 60})
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
