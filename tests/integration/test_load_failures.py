"""Bytes that cannot be had: what each call says, what a plain access does, and that it heals when the cause is gone."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time

import dask
import numpy as np
import pytest
import transaction
from ZEO.Exceptions import ClientDisconnected
from ZODB.POSException import ReadConflictError

import dask_zbig as dz
from dask_zbig import config, openfile
from dask_zbig.openfile import OpenFile

MIB = 1 << 20
SIZE = 3 * MIB


def impatient(seconds=0.5):
    """For what cannot be loaded."""
    return dask.config.set({"zbig.load-timeout": seconds})


@pytest.fixture(autouse=True)
def _patience(request):
    """Little of it where there is no server: what can be loaded is so at the first attempt."""
    served = {"site", "cached"} & set(request.fixturenames)
    with impatient(60 if served else 0.5), dask.config.set({"zbig.zeo.wait-timeout": 0.3}):
        yield


# -- a database of one process


def blob_files(path):
    return [os.path.join(d, f) for d, _, files in os.walk(f"{path}.blobs") for f in files if f.endswith(".blob")]


def open_here(files):
    """Which of these files this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # it is closed by now
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return found & {os.path.realpath(file) for file in files}


@contextlib.contextmanager
def away(path):
    """The blobs are not there."""
    files = blob_files(path)
    assert files
    deadline = time.monotonic() + 60
    while open_here(files):  # by a loader that has mapped them, and woken us, and has not come to its end yet
        assert time.monotonic() < deadline, "a file stays open"
        time.sleep(0.001)
    for file in files:
        os.rename(file, file + ".away")
    try:
        yield
    finally:
        for file in files:
            os.rename(file + ".away", file)


@pytest.fixture
def stored(tmp_path):
    """A database with an array of sevens, opened anew: its path, and a connection."""
    path = str(tmp_path / "x.fs")
    with contextlib.closing(dz.open(path)) as db, db.transaction() as there:
        for name in "AB":
            there.root()[name] = array = dz.ZBigArray((SIZE // 1024, 1024), "u1")
            array[:] = 7
    db = dz.open(path)
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    yield path, connection
    manager.abort()
    connection.close()
    db.close()


MASK = np.zeros(SIZE // 1024, bool)
MASK[5] = True

READS = {
    "prefetch": lambda A, B: A.prefetch(),
    "prefetch of a part": lambda A, B: A.prefetch(np.s_[5:9]),
    "prefetch to write": lambda A, B: A.prefetch(np.s_[5:9], writable=True),
    "element": lambda A, B: A[3, 4],
    "rows": lambda A, B: A[[3, -5]],
    "mask": lambda A, B: A[MASK],
    "mask of all axes": lambda A, B: A[np.broadcast_to(MASK[:, None], A.shape)],
    "columns": lambda A, B: A[:, [3, 4]],
    "sum": lambda A, B: A.sum(),
    "mean of an axis": lambda A, B: A.mean(axis=0),
    "argmax": lambda A, B: A.argmax(),
    "item": lambda A, B: A.item(5),
    "take": lambda A, B: A.take([5]),
    "tolist": lambda A, B: A.tolist(),
    "tobytes": lambda A, B: A.tobytes(),
    "bytes": lambda A, B: bytes(A),
    "astype": lambda A, B: A.astype("i2"),
    "add": lambda A, B: A + 1,
    "radd": lambda A, B: 1 + A,
    "add in place": lambda A, B: A.__iadd__(1),
    "of two": lambda A, B: np.zeros(A.shape) + B,
    "compare": lambda A, B: A == B,
    "compare the other way": lambda A, B: np.zeros(A.shape) != A,
    "contains": lambda A, B: 7 in A,
    "asarray": lambda A, B: np.asarray(A) + 1,
    "array": lambda A, B: np.array(A),
    "array of a dtype": lambda A, B: np.asarray(A, "f8"),
    "function": lambda A, B: np.median(A),
    "concatenate": lambda A, B: np.concatenate([A, B]),
    "save": lambda A, B: np.save(io.BytesIO(), A),
    "str": lambda A, B: str(A),
    "format": lambda A, B: f"{A}",
    "copyto an ndarray": lambda A, B: np.copyto(np.zeros(A.shape, "u1"), A),
    "assign a part": lambda A, B: A.__setitem__((5, slice(3, 9)), 1),
    "assign rows": lambda A, B: A.__setitem__([5, 6], 1),
    "assign where": lambda A, B: A.__setitem__(MASK, 1),
    "assign a region that ends within a page": lambda A, B: A.__setitem__(np.s_[1:200], 1),
    "assign another array": lambda A, B: B.__setitem__(..., A),
    "append another array": lambda A, B: A.append(B),
    "fields": lambda A, B: A.dot(np.ones(1024)),
    "sort": lambda A, B: A.sort(),
    "to an ndarray by assignment": lambda A, B: np.zeros(A.shape).__setitem__(..., A),
    "ufunc at": lambda A, B: np.add.at(A, [5], 1),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_call_that_reads_raises_and_the_transaction_goes_on(stored, read):
    path, connection = stored
    A, B = connection.root()["A"], connection.root()["B"]
    with away(path), pytest.raises(dz.LoadError, match="cannot open the file of segment"):
        read(A, B)
    read(A, B)
    connection.root()["n"] = 1
    connection.transaction_manager.commit()
    assert (A[2000:2010] == (8 if read is READS["add in place"] else 7)).all()


VIEWS = {
    "slice": lambda A: A[:],
    "transposed": lambda A: A.T,
    "reshaped": lambda A: A.reshape(-1),
    "function": lambda A: np.swapaxes(A, 0, 1),
    "reference": lambda A: dz.ArrayRef(A[5:7]).deref(),
    "flat": lambda A: A.flat,
    "shape": np.shape,
    "repr": repr,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_is_lazy(stored, view):
    path, connection = stored
    with away(path):
        made = view(connection.root()["A"])
    if isinstance(made, np.ndarray):
        assert (made == 7).all()


def read_soon(view, seconds=0.5):
    """Read a byte that cannot be loaded: the error comes at the next call or turn of a loop."""
    with impatient(seconds), pytest.raises(dz.LoadError):  # noqa: PT012 - for the same reason
        assert view.flat[5] == 255
        for _ in range(10**6):
            pass


def test_what_was_shown_as_0xff_is_refused_by_calls_until_the_abort(stored):
    path, connection = stored
    A = connection.root()["A"]
    with away(path):
        read_soon(A[:])
    for read in (A.sum, A.prefetch, lambda: A[0, 5], lambda: A[[0, 1]], lambda: np.asarray(A)):
        with pytest.raises(dz.LoadError, match="must be aborted"):
            read()
    assert connection.root()["B"].sum() == 7 * SIZE  # is another array
    connection.root()["n"] = 1
    with pytest.raises(dz.LoadError):
        connection.transaction_manager.commit()
    connection.transaction_manager.abort()
    assert A.sum() == 7 * SIZE


# guard: openfile.py, `discard`: what was 0xFF is forgotten; else the first rows are refused for ever after
def test_what_has_healed_is_not_refused_when_something_else_is_lost(stored):
    path, connection = stored
    A = connection.root()["A"]
    view = A[:]
    first, last = np.s_[:10], np.s_[-10:]  # in two blocks
    for rows in (first, last):
        A._open().space.drop(0, SIZE)
        with away(path), pytest.raises(dz.LoadError, match="segment"):  # noqa: PT012 - it comes at the next turn
            assert view[rows].max() == 255
            for _ in range(10**6):
                pass
        with pytest.raises(dz.LoadError, match="must be aborted"):
            A.prefetch(rows)
        if rows is first:
            connection.transaction_manager.abort()
            A.prefetch(rows)
    A.prefetch(first)
    connection.transaction_manager.abort()
    assert A.sum() == 7 * SIZE


# guard: ahead.py, `_ordinary`: a conflict is not a LoadError, for whoever would try again
def test_a_conflict_while_the_extent_map_is_loaded_stays_one(stored, monkeypatch):
    _, connection = stored

    def resolve(self, *_):
        raise ReadConflictError("as from a storage that has no history")

    monkeypatch.setattr(OpenFile, "resolve", resolve)
    with pytest.raises(ReadConflictError):
        connection.root()["A"].prefetch()


# guard: fault.c: a thread that has slept asks whether it was told; removed -> only the first was
def test_all_threads_that_wait_for_a_block_are_told(stored):
    path, connection = stored
    with away(path), impatient(3):  # so long, that all of them come to wait
        view = connection.root()["A"][:]
        outcomes, barrier = [], threading.Barrier(8)

        def read():
            barrier.wait()
            try:
                value = int(view[0, 5])
                for _ in range(10**6):
                    pass
                outcomes.append(value)
            except dz.LoadError:
                outcomes.append("told")

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert outcomes == ["told"] * 8
    lost = connection.root()["A"]._open().space.lost
    assert [error.__traceback__ for error in lost.values()] == [None]  # (it would keep all that the loader had)
    connection.transaction_manager.abort()
    assert not lost
    assert view.sum() == 7 * SIZE


# guard: openfile.py, `failed`: the first one; else the commit told of the second
def test_the_first_failure_is_why_a_commit_is_refused(stored):
    path, connection = stored
    A = connection.root()["A"]
    with away(path):
        view = A[:]
        read_soon(view)
    A._open().failed(2 * MIB, SIZE, dz.LoadError("another"))
    with pytest.raises(dz.LoadError, match="segment"):
        connection.transaction_manager.commit()
    connection.transaction_manager.abort()
    assert view.sum() == 7 * SIZE


def test_other_arrays_threads_and_connections_go_on(stored):
    """While a thread waits for what cannot be loaded, and after it was told."""
    path, connection = stored
    b = connection.root()["B"][:]
    db = connection.db()
    others = db.open(transaction.TransactionManager())
    mine = others.root()["B"][:]
    with away(path):
        a = connection.root()["A"][:]
        reader = threading.Thread(target=read_soon, args=(a, 3))
        reader.start()
        turns = 0
        while reader.is_alive():
            assert b.sum() == 7 * SIZE
            mine[turns % 1000, 3] = 7 + turns % 2
            turns += 1
        assert turns > 3
    mine[:, 3] = 8
    others.transaction_manager.commit()
    others.close()
    connection.transaction_manager.abort()
    assert a.sum() == 7 * SIZE
    assert b[:, 3].tolist() == [8] * len(b)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_tasks_raise_it_and_can_be_tried_again(stored, scheduler):
    path, connection = stored
    x = dz.from_zbigarray(connection.root()["A"], chunks=(512, -1))
    with away(path), pytest.raises(dz.LoadError, match="segment"):
        (x + 1).sum().compute(scheduler=scheduler)
    assert x.sum().compute(scheduler=scheduler) == 7 * SIZE


# -- damage


def harm(path, how):
    (file,) = {os.path.realpath(f) for f in blob_files(path)}
    os.chmod(file, 0o600)
    if how == "truncated":
        os.truncate(file, 5000)
    elif how == "longer":
        with open(file, "ab") as f:
            f.write(b"more")
    elif how == "changed":
        with open(file, "r+b") as f:
            f.seek(5000)
            f.write(b"x")
    else:
        os.unlink(file)


WHY = {
    "missing": "cannot open the file of segment",
    "truncated": "has 5000 bytes where",
    "longer": f"has {SIZE + 4} bytes where",
    "changed": "does not have the checksum",
}


@pytest.mark.parametrize("how", ["missing", "truncated", "longer"])
def test_damage_of_a_local_file(tmp_path, how):
    path = str(tmp_path / "x.fs")
    with contextlib.closing(dz.open(path)) as db, db.transaction() as there:
        there.root()["A"] = A = dz.ZBigArray(SIZE, "u1")
        A[:] = 7
    with contextlib.closing(dz.open(path)) as db:
        harm(path, how)
        connection = db.open(transaction.TransactionManager())
        A = connection.root()["A"]
        for read in (A.prefetch, A.sum, dz.from_zbigarray(A).sum().compute):
            with pytest.raises(dz.LoadError, match=WHY[how]):
                read()
        read_soon(A[:])
        connection.transaction_manager.abort()
        connection.close()


# -- a server


class Site:
    """A server with an array of sevens (a blob) and one of threes (in an object), and clients with blob caches."""

    def __init__(self, directory, shared):
        self.path = os.path.join(directory, "x.fs")
        self.address = os.path.join(directory, "socket")
        self.shared = shared
        self.server = None
        self._databases = []
        self.start()
        db = self.connected(self.uri)
        with db.transaction() as there:
            there.root()["A"] = A = dz.ZBigArray(SIZE, "u1")
            A[:] = 7
            there.root()["I"] = inline = dz.ZBigArray(100, "u1")
            inline[:] = 3
        db.close()

    def start(self):
        self.server = dz.serve(self.path, address=self.address, shared_blob_dir=self.shared)
        self.uri = self.server.__enter__()

    def stop(self):
        self.server.__exit__(None, None, None)
        self.server = None

    def connected(self, uri):
        """A database. Only when it is there `zbig.zeo.wait-timeout` counts, for when the server is away."""
        wait = max(1, config.get("zeo.wait-timeout"))
        with dask.config.set({"zbig.zeo.wait-timeout": 60}):
            db = dz.open(uri)
        db.storage._server.timeout = wait
        return db

    def open(self, **options):
        """The root, as a new client sees it; the objects of the arrays are loaded."""
        uri = self.uri + "".join(f"{'&' if '?' in self.uri else '?'}{k}={v}" for k, v in options.items())
        db = self.connected(uri)
        self._databases.append(db)
        root = db.open(transaction.TransactionManager()).root()
        for name in "AI":
            root[name]._p_activate()
            root[name]._file._p_activate()
        return root

    def close(self):
        if self.server is None:
            self.start()
        self.close_databases()
        self.stop()

    def close_databases(self):
        while self._databases:
            self._databases.pop().close()


@pytest.fixture(params=[False, True], ids=["cache", "shared"])
def site(request, tmp_path):
    site = Site(str(tmp_path), request.param)
    yield site
    site.close()


@pytest.fixture
def cached(tmp_path):
    site = Site(str(tmp_path), False)
    yield site
    site.close()


def reconnect(array):
    """Wait until the client has found the server again, which it looks for once a second."""
    deadline = time.monotonic() + 60
    while True:
        try:
            array._p_jar.db().storage.ping()
            return
        except ClientDisconnected:
            assert time.monotonic() < deadline


def test_a_server_that_was_stopped(site):
    root = site.open()
    A = root["A"]
    site.stop()
    for read in (A.prefetch, A.sum, lambda: A[3]):
        with impatient(), pytest.raises(dz.LoadError, match="ClientDisconnected"):
            read()
    site.start()
    reconnect(A)
    assert A.sum() == 7 * SIZE
    root["I"][5] = 4
    A._p_jar.transaction_manager.commit()


def test_a_server_that_was_stopped_when_the_extents_were_known(cached):
    A = cached.open()["A"]
    view = A[:]
    cached.stop()
    with impatient(), pytest.raises(dz.LoadError, match=r"segment .* ClientDisconnected"):
        A.sum()
    read_soon(view)
    cached.start()
    A._p_jar.transaction_manager.abort()
    reconnect(A)
    assert view.sum() == 7 * SIZE


# guard: loader.py, `_give_up`: what is no error of ours becomes a LoadError; else it was ClientDisconnected
def test_a_server_that_was_stopped_when_the_extents_were_not_known(site, monkeypatch):
    monkeypatch.setattr(openfile, "EAGER_LEAVES", 0)  # a loader asks for them
    A = site.open()["A"]
    view = A[:]
    site.stop()
    read_soon(view)
    with pytest.raises(ClientDisconnected):  # (as it is: who repeats transactions knows that this may heal)
        A._p_jar.transaction_manager.commit()
    site.start()
    A._p_jar.transaction_manager.abort()
    reconnect(A)
    assert view.sum() == 7 * SIZE


def test_a_server_that_does_not_answer(site):
    """Its process is stopped; the connection lasts."""
    root = site.open()
    A, manager = root["A"], root._p_jar.transaction_manager
    os.kill(site.server.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with impatient(), pytest.raises(dz.LoadError, match="has not answered"):
            A.sum()
        assert time.monotonic() - began < 20
    finally:
        os.kill(site.server.pid, signal.SIGCONT)
    assert A.sum() == 7 * SIZE
    view = A[:]
    A._open().space.drop(0, SIZE)
    manager.abort()
    assert view[5] == 7


def test_a_server_that_does_not_answer_a_plain_access(cached):
    root = cached.open()
    view, manager = root["A"][:], root._p_jar.transaction_manager  # nothing of the blob is here
    os.kill(cached.server.pid, signal.SIGSTOP)
    try:
        read_soon(view)
    finally:
        os.kill(cached.server.pid, signal.SIGCONT)
    root["n"] = 1
    with pytest.raises(dz.LoadError):
        manager.commit()
    manager.abort()
    assert view.sum() == 7 * SIZE


def test_a_download_that_stops_on_its_way(cached, monkeypatch):
    """Some pieces come, and then no more."""
    root = cached.open()
    A = root["A"]
    storage = A._p_jar.db().storage
    came = []
    receive = storage._server.client.receiveBlobChunk

    def stop_after_the_first(*args):
        receive(*args)
        came.append(1)
        if len(came) == 1:
            os.kill(cached.server.pid, signal.SIGSTOP)
            stack.enter_context(impatient())  # not before, or none might come

    storage._server.client.receiveBlobChunk = stop_after_the_first
    try:
        with contextlib.ExitStack() as stack, pytest.raises(dz.LoadError, match="has not answered"):
            A.prefetch()
    finally:
        os.kill(cached.server.pid, signal.SIGCONT)
    assert came
    assert A.sum() == 7 * SIZE


@pytest.mark.parametrize("how", WHY)
def test_damage_of_a_servers_file(cached, how):
    root = cached.open()
    A = root["A"]
    A.shape  # noqa: B018
    harm(cached.path, how)
    for read in (A.prefetch, A.sum):
        with pytest.raises(dz.LoadError, match=WHY[how]):
            read()
    read_soon(A[:])
    A._p_jar.transaction_manager.abort()
    assert root["I"].sum() == 300


def test_a_full_blob_cache(cached, tiny_disk):
    root = cached.open(blob_dir=os.path.join(tiny_disk, "cache"))
    A, manager = root["A"], root._p_jar.transaction_manager
    filler = os.path.join(tiny_disk, "filler")
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        file.write(bytes(6 << 20))
    for read in (A.prefetch, A.sum, lambda: A[5]):
        with pytest.raises(dz.LoadError, match="cannot write to the blob cache: No space left on device"):
            read()
    view = A[:]
    read_soon(view)
    os.unlink(filler)
    manager.abort()
    assert view.sum() == 7 * SIZE
    view[5] = 1
    manager.commit()
    A._p_jar.db().close()
    cached._databases.clear()


def test_what_may_read_a_bit_of_a_large_remote_array_fetches_nothing_up_front(cached, monkeypatch):
    """And yet what goes wrong is raised at the end of the call."""
    monkeypatch.setattr(OpenFile, "remote", lambda *_: 1 << 40)
    A = cached.open()["A"]
    file = A._open()
    assert np.asarray(A) is not None
    assert file.lacks(0, SIZE)
    assert A.searchsorted(7) == 0
    assert not file.lacks(0, 10)
    reads = [lambda A: A.searchsorted(7), lambda A: A.take([5]), lambda A: A.item(5), lambda A: str(A)]
    arrays = [cached.open()["A"] for _ in reads]
    views = [A[:] for A in arrays]
    cached.stop()
    for read, array in zip(reads, arrays, strict=True):
        with impatient(), pytest.raises(dz.LoadError):
            read(array)
        assert array._open().failure is not None  # which shows that it was lazy
    assert len(views) == len(reads)
    cached.start()
    for array in arrays:
        array._p_jar.transaction_manager.abort()


def test_rows_of_a_remote_array_are_fetched_without_the_others(cached):
    with contextlib.closing(cached.connected(cached.uri)) as db, db.transaction() as there:
        there.root()["L"] = array = dz.ZBigArray((256, MIB), "u1")  # of four leaves, one blob each
        for i in range(4):
            array[64 * i] = 1 + i
    L = cached.open()["L"]
    assert L[[64, -64], 5].tolist() == [2, 4]
    assert [bool(L._open().lacks(64 * i * MIB, (64 * i + 1) * MIB)) for i in range(4)] == [True, False, True, False]


# -- a server that is restarted in the middle


def again(action):
    """As any program that uses ZODB does it: what failed for a passing reason is repeated."""
    for _ in range(100):
        with contextlib.suppress(transaction.interfaces.TransientError, dz.DatabaseUnavailableError):
            return action()
        time.sleep(0.05)
    raise AssertionError("it goes on for ever")


def use_by_calls(root, turn):
    assert root["A"].sum() == 7 * SIZE
    assert root["I"][5] == 3
    assert (root["A"][[4, 5]] == 7).all()


def use_by_a_view(root, turn):
    view = root["A"][:]
    for _ in range(5):
        assert view.sum() == 7 * SIZE
        root["A"]._open().space.drop(0, SIZE)


def use_by_writing(root, turn):
    manager = root._p_jar.transaction_manager

    def write():
        try:
            manager.begin()
            root["A"][turn : turn + 100] = 7
            root["W"][turn] = turn
            root["W"][100_000:] = turn  # (a blob)
            manager.commit()
        except BaseException:
            manager.abort()
            raise

    again(write)
    manager.begin()
    assert root["W"][turn] == turn
    assert root["W"][200_000] == turn


def use_by_staging(root, turn):
    manager = root._p_jar.transaction_manager

    def save():
        try:
            manager.begin()
            x = dz.from_zbigarray(root["A"], chunks=MIB) + np.uint8(turn)
            dz.to_zbigarray(x, root["W"], region=np.s_[:SIZE])
            manager.commit()
        except BaseException:
            manager.abort()
            raise

    with dask.config.set(scheduler="threads"):
        again(save)
    manager.begin()
    assert (root["W"][:SIZE] == (7 + turn) % 256).all()


@pytest.mark.slow
@pytest.mark.parametrize("use", [use_by_calls, use_by_a_view, use_by_writing, use_by_staging])
def test_a_server_that_is_restarted_again_and_again(site, use):
    """It is killed at any moment, and started again at its address: each use ends well within the deadline."""
    with contextlib.closing(site.connected(site.uri)) as db, db.transaction() as there:
        there.root()["W"] = dz.ZBigArray(SIZE, "u1")
    stop, restarts, wrong, used = threading.Event(), [], [], []

    def restart():
        pause, before = 0.7, 0
        try:
            while not stop.wait(pause):
                # a slow machine gets nowhere in so short a time
                pause = 0.7 if len(used) > before else min(1.3 * pause, 6)
                before = len(used)
                os.kill(site.server.pid, signal.SIGKILL)
                with contextlib.suppress(dz.ServerError):
                    site.server.__exit__(None, None, None)
                site.start()
                restarts.append(1)
        except BaseException as error:
            wrong.append(error)
            raise

    killer = threading.Thread(target=restart)
    turn = 0
    with dask.config.set({"zbig.load-timeout": 30, "zbig.zeo.wait-timeout": 30}):
        killer.start()
        try:
            end = time.monotonic() + float(os.environ.get("ZBIG_RESTART_SECONDS", "2"))
            while time.monotonic() < end or not restarts:
                turn += 1
                root = again(site.open)
                use(root, turn)
                used.append(turn)
                root._p_jar.transaction_manager.abort()
                site.close_databases()
        finally:
            stop.set()
            killer.join()
    assert not wrong
    assert restarts
