"""Limits of the process and the machine: when one is reached that is an exception, nothing is lost, and it goes on."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import textwrap

import dask
import numpy as np
import pytest
import transaction

import dask_zbig as dz

MIB = 1 << 20

PRELUDE = """
import faulthandler, os, resource, sys
faulthandler.dump_traceback_later(250, exit=True)
import dask, numpy as np, transaction
import dask_zbig as dz
MIB, BLOCK = 1 << 20, 2 << 20
"""


def script(body, cwd, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body), *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# -- address space and mappings


def test_little_address_space(tmp_path):
    """A view that does not fit is a WindowError; smaller ones work, reads and writes, and the whole file in parts."""
    script(
        """
        db = dz.open("x.fs")
        conn = db.open()
        conn.root()["A"] = A = dz.ZBigArray(512 * MIB, "u1")
        transaction.commit()
        conn.root()["B"] = B = dz.ZBigArray(MIB, "u1")
        B[1] = 1
        transaction.commit()
        view = B[:]
        B._open().space.drop(0, 1)
        assert view[1] == 1  # so that the threads, with their memory, are there
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + 256 * MIB,) * 2)
        for _ in range(3):
            try:
                A[:]
                sys.exit("it fits")
            except dz.WindowError as error:
                assert isinstance(error, MemoryError) and "address space" in str(error), error
        for at in range(0, 512, 64):
            part = A[at * MIB : (at + 64) * MIB]
            part[5] = 1 + at % 100
            del part
        transaction.commit()
        assert [int(A[at * MIB + 5]) for at in range(0, 512, 64)] == [1 + at % 100 for at in range(0, 512, 64)]
        total = sum(int(A[at * MIB : (at + 64) * MIB].sum()) for at in range(0, 512, 64))
        assert total == sum(1 + at % 100 for at in range(0, 512, 64))
        conn.close(); db.close()
        """,
        tmp_path,
    )


@pytest.mark.slow
def test_other_mappings_have_taken_nearly_all(tmp_path):
    """Of vm.max_map_count. What cannot be mapped is an exception, or served in larger units; with room it goes on."""
    script(
        """
        import ctypes, mmap
        dask.config.set({"zbig.load-timeout": 0.2})
        limit = int(open("/proc/sys/vm/max_map_count").read())
        if limit > 300_000:
            sys.exit(0)
        db = dz.open("x.fs")
        conn = db.open()
        conn.root()["A"] = A = dz.ZBigArray(64 * BLOCK, "u1")
        A[:] = 7
        transaction.commit()
        view = A[:]
        libc = ctypes.CDLL(None)
        have = open("/proc/self/maps").read().count(chr(10))
        n = limit - have - 150
        hog = mmap.mmap(-1, (n + 2) * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = ctypes.addressof(ctypes.c_char.from_buffer(hog))
        for k in range(0, n, 2):  # every other page another protection: each is a mapping
            assert libc.mprotect(ctypes.c_void_p(base + k * 4096), ctypes.c_size_t(4096), 1) == 0
        failed = 0
        rng = np.random.default_rng(1)
        where = rng.integers(64 * BLOCK, size=3000)
        for turn in range(2):
            try:
                for i in where.tolist():
                    view[i] = 9
                view[where[0]] = 9
                for _ in range(100): pass
                transaction.commit()
            except (dz.ZBigError, MemoryError, OSError) as error:
                failed += 1
                transaction.abort()
                assert (A[:: BLOCK // 2] == A[:: BLOCK // 2]).all()
        for k in range(0, n, 2):
            libc.mprotect(ctypes.c_void_p(base + k * 4096), ctypes.c_size_t(4096), 3)
        transaction.abort()
        view[where] = 5
        transaction.commit()
        expected = np.full(64 * BLOCK, 7, "u1")
        expected[where] = 5
        assert (view == expected).all()
        conn.close(); db.close()
        db = dz.open("x.fs")
        assert (db.open().root()["A"][:] == expected).all()
        """,
        tmp_path,
    )


# -- disks


def stored_on(disk, megabytes):
    """A database on this disk with an array of sevens, opened anew: what wrote it takes no space any more."""
    path = os.path.join(disk, "x.fs")
    with contextlib.closing(dz.open(path)) as db, db.transaction() as there:
        there.root()["A"] = array = dz.ZBigArray(megabytes * MIB, "u1")
        array[:] = 7
    del array, there
    gc.collect()
    db = dz.open(path)
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    return db, connection, manager, connection.root()["A"]


@contextlib.contextmanager
def full(disk, leave=0):
    """Nothing more fits on the disk, but for `leave` bytes."""
    path = os.path.join(disk, "filler")
    gc.collect()  # files of ours that nobody needs any more would make room later
    with open(path, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(max(0, file.tell() - leave))
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def until_told(action):
    """What a write to memory met comes at the next call or turn of a loop."""
    action()
    for _ in range(10**6):
        pass


@pytest.mark.parametrize("where", ["all", "scratch"])
def test_a_full_disk_under_the_scratch(tmp_path, tiny_disk, where):
    """Under that of the whole database, or elsewhere: the write is told, and abort heals."""
    option = {"zbig.scratch-directory": tiny_disk} if where == "scratch" else {}
    with dask.config.set(option):
        db, connection, manager, A = stored_on(tiny_disk if where == "all" else str(tmp_path), 2)
        view = A[:]
        with full(tiny_disk):
            with pytest.raises(dz.ScratchError):
                until_told(lambda: view.__setitem__(MIB, 1))
            with pytest.raises(dz.ScratchError):
                manager.commit()
            manager.abort()
            with pytest.raises(dz.ScratchError):
                A[:] = 9
            manager.abort()
            assert view[[5, MIB]].tolist() == [7, 7]
        view[MIB] = 2
        manager.commit()
        assert connection.db().open(transaction.TransactionManager()).root()["A"][[5, MIB]].tolist() == [7, 2]
        connection.close()
        db.close()


@pytest.mark.parametrize("size", [100, MIB], ids=["inline", "blob"])
def test_a_full_disk_under_the_database(tmp_path, tiny_disk, size):
    """The scratch is elsewhere: the commit fails. The same changes, made again when there is room, are saved."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with dask.config.set({"zbig.scratch-directory": str(scratch)}):
        db, connection, manager, A = stored_on(tiny_disk, 2)
        view = A[:]
        with full(tiny_disk):
            view[:size] = 3
            connection.root()["n"] = bytes(20000)
            with pytest.raises(OSError, match="No space left"):
                manager.commit()
            manager.abort()
            assert (view == 7).all()
        view[:size] = 3
        manager.commit()
        assert (view[:size] == 3).all()
        assert (view[size:] == 7).all()
        connection.close()
        db.close()
        db = dz.open(os.path.join(tiny_disk, "x.fs"))
        connection = db.open()
        assert (connection.root()["A"][:] == view).all()
        del view
        connection.close()
        db.close()


def test_a_scratch_on_tmpfs(tmp_path):
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    scratch = f"/dev/shm/zbig-test-{os.getpid()}"
    os.mkdir(scratch)
    try:
        with dask.config.set({"zbig.scratch-directory": scratch}):
            db, connection, manager, A = stored_on(str(tmp_path), 5)
            view = A[:]
            for turn in range(3):
                view[turn::7] = turn
                savepoint = manager.savepoint()
                view[:] = 9
                savepoint.rollback()
                manager.commit()
            expected = np.full(5 * MIB, 7, "u1")
            for turn in range(3):
                expected[turn::7] = turn
            assert (view == expected).all()
            connection.close()
            db.close()
            assert [f for f in os.listdir(scratch) if not f.endswith(".lock")] == []
    finally:
        subprocess.run(["rm", "-r", scratch], check=True)


def test_a_blob_directory_that_cannot_be_written_to(tmp_path):
    """As of a user who may only read it. Reading works; a change is refused, and nothing is lost by it."""
    db, connection, _, _ = stored_on(str(tmp_path), 4)
    connection.close()
    db.close()
    script(
        """
        warm = dz.open("warm.fs")  # (imports all; afterwards we may not be allowed to)
        with warm.transaction() as there:
            there.root()["A"] = A = dz.ZBigArray(4 * MIB, "u1")
            A[:] = 1
        warm.close()
        if os.getuid() == 0:  # whom modes do not stop
            os.chmod(".", 0o755)
            os.umask(0)
            for d, _, files in os.walk("."):
                os.chmod(d, 0o777 if "blobs" not in d else 0o555)
                for f in files:
                    os.chmod(os.path.join(d, f), 0o666 if "blobs" not in d else 0o444)
            os.setgid(65534)
            os.setuid(65534)
        try:
            db = dz.open("x.fs")
        except (dz.ZBigError, OSError) as error:
            print("refused", type(error).__name__, error)
            sys.exit(0)
        conn = db.open()
        A = conn.root()["A"]
        assert (A[:] == 7).all()
        try:
            A[5] = 1
            transaction.commit()
            sys.exit("committed")
        except (dz.ZBigError, OSError) as error:
            print("refused", type(error).__name__, error)
        transaction.abort()
        assert (A[:] == 7).all()
        conn.close(); db.close()
        """,
        tmp_path,
    )


# -- memory

READ_AND_WRITE = """
    SIZE = int(sys.argv[1]) * MIB
    STEP = 8 * MIB
    db = dz.open("x.fs")
    conn = db.open()
    conn.root()["A"] = A = dz.ZBigArray(SIZE // 8, "i8")
    view = A[:]
    for at in range(0, SIZE // 8, STEP // 8):
        view[at : at + STEP // 8] = np.arange(at, at + STEP // 8)
    transaction.commit()
    total = sum(int(view[at : at + STEP // 8].sum()) for at in range(0, SIZE // 8, STEP // 8))
    assert total == (SIZE // 8) * (SIZE // 8 - 1) // 2
    assert int(A.sum()) == total
    A += 1
    transaction.commit()
    assert int(A.sum()) == total + SIZE // 8
    conn.close(); db.close()
"""


LITTLE = """
db = dz.open("warm.fs")  # (what that takes is there before)
db.open().root()["A"] = dz.ZBigArray(3 * MIB)
db.open().root()
db.close()
with open("/proc/self/status") as file:
    used = next(int(line.split()[1]) for line in file if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 128 * MIB,) * 2)
"""


@pytest.fixture
def small_cgroup():
    """The path of a memory cgroup's file for processes; its limit is ZBIG_CGROUP_MIB (128)."""
    limit = int(os.environ.get("ZBIG_CGROUP_MIB", "128")) * MIB
    for root, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        path = os.path.join(root, f"zbig-test-{os.getpid()}")
        try:
            os.mkdir(path)
        except OSError:
            continue
        try:
            with open(os.path.join(path, name), "w") as file:
                file.write(str(limit))
        except OSError:
            os.rmdir(path)
            continue
        yield os.path.join(path, "cgroup.procs")
        os.rmdir(path)
        return
    pytest.skip("no memory cgroup can be made here")


@pytest.mark.slow
def test_an_array_of_eight_times_the_memory(tmp_path, small_cgroup):
    """In a memory cgroup; page cache counts there, too."""
    script(
        f"open({small_cgroup!r}, 'w').write(str(os.getpid()))\n" + textwrap.dedent(READ_AND_WRITE),
        tmp_path,
        os.environ.get("ZBIG_ARRAY_MIB", "1024"),
    )


@pytest.mark.slow
def test_little_private_memory(tmp_path):
    """The limit is on memory that no file backs; array data does not count."""
    script(LITTLE + textwrap.dedent(READ_AND_WRITE), tmp_path, "512")
