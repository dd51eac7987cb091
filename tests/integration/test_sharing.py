"""One array and several who use it: threads with one view, and clients of a server that goes away and comes back."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import dask.config
import numpy as np
import pytest
import transaction
from ZEO.Exceptions import ClientDisconnected
from ZODB.POSException import ConflictError

import dask_zbig as dz
from dask_zbig.memory._native import BLOCK, counters
from dask_zbig.transaction import manager_of

MIB = 1 << 20
THREADS = 8


def together(*actions, times=1):
    """Run each action in a thread of its own, all beginning at once, again and again."""
    barrier = threading.Barrier(len(actions))
    errors = []

    def run(action):
        try:
            for k in range(times):
                barrier.wait(60)
                action(k)
        except BaseException as error:  # noqa: BLE001 - it is raised in the test's own thread
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    for error in errors:
        raise error


# -- threads


# guard: fault.c: a block is FILLING once it was asked for; removed -> more read faults than blocks
@pytest.mark.parametrize("clients", ["zeo-cache"], indirect=True)
def test_a_block_is_loaded_once_whoever_waits_for_it(clients, monkeypatch):
    count = 20
    clients.new(count * BLOCK, "u1")
    client = clients.connect()
    a = client.root["A"][:]
    for k in range(count):
        a[k * BLOCK : (k + 1) * BLOCK] = k + 1  # a blob each
        client.commit()
    reader = clients.connect(other=True)
    b = reader.root["A"][:]
    segments = manager_of(reader.connection).reader
    opened = []
    original = segments.open_blob

    def open_blob(oid, *args):
        opened.append(oid)
        return original(oid, *args)

    monkeypatch.setattr(segments, "open_blob", open_blob)
    before = counters()
    seen = [[] for _ in range(THREADS)]
    together(*[lambda k, mine=mine: mine.append(int(b[k * BLOCK + 5])) for mine in seen], times=count)
    after = counters()
    assert seen == [list(range(1, count + 1))] * THREADS
    assert len(opened) == len(set(opened)) == count
    assert after["read_faults"] - before["read_faults"] == count
    assert after["fills"] - before["fills"] == count
    assert after["waits"] - before["waits"] > count  # there were some who did not load, but waited


# guard: zbigarray.py: _load; removed -> AttributeError: no attribute '_shape'
def test_threads_slice_an_array_that_is_not_loaded(clients):
    clients.new(4000, "u1")
    client = clients.connect()
    A = client.root["A"]
    A[:] = 1
    client.commit()
    setstate = client.connection.setstate
    loading, go_on = threading.Event(), threading.Event()

    def slowly(obj):
        if obj is A:
            loading.set()
            assert go_on.wait(60)
        setstate(obj)

    client.connection.setstate = slowly
    A._p_deactivate()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(lambda: int(A[:1000].sum()))
        assert loading.wait(60)
        others = [pool.submit(lambda k=k: int(A[k * 1000 :][:1000].sum())) for k in (1, 2, 3)]
        wait(others, timeout=0.1)  # those that do not wait for the first one have failed by now
        go_on.set()
        assert [f.result(60) for f in (first, *others)] == [1000] * 4
    del client.connection.setstate


# guard: fault.c: a dirty page is no fault any more, scratch.c: what is dirty is not copied again; removed -> bytes of
# one thread were lost
@pytest.mark.parametrize("clients", ["filestorage", "zeo"], indirect=True)
def test_two_threads_write_one_page_at_the_same_time(clients):
    """Each has every other byte of some pages, and comes to them in the same order. NumPy holds no lock meanwhile."""
    times, pages, width = 200, 64, 16  # (of less than 500 elements it would hold the interpreter's)
    clients.new(BLOCK, "u1")
    client, other = clients.connect(), clients.connect(other=True)
    a = client.root["A"][:]
    order = np.random.default_rng(0).permutation(BLOCK // 4096)[:pages] * 4096
    where = (order[:, None] + np.arange(width)).ravel()
    before = counters()
    done = threading.Barrier(3)
    wrong = []

    def value(k):
        return k % 251 + 1

    def writer(mine):
        def write(k):
            a[mine] = value(k)
            done.wait(60)
            done.wait(60)  # until it is committed, and the pages are clean again

        return write

    def committer(k):
        done.wait(60)
        if not (a[where] == value(k)).all():
            wrong.append(k)
        client.commit()
        if k % 20 == 19:
            other.begin()
            if not (other.root["A"][:][where] == value(k)).all():
                wrong.append(-k)
        done.wait(60)

    together(writer(where[0::2]), writer(where[1::2]), committer, times=times)
    assert wrong == []
    assert a.sum() == where.size * value(times - 1)
    after = counters()
    assert after["write_faults"] - before["write_faults"] >= times * pages
    if len(os.sched_getaffinity(0)) > 1:
        assert after["spurious"] > before["spurious"]  # they did meet


# -- a server that goes away


class Service:
    """A server at one address that can be stopped and started, and databases of its clients."""

    def __init__(self, path, address, shared):
        self._options = {"path": path, "address": address, "shared_blob_dir": shared}
        self._stack = contextlib.ExitStack()
        self._server = None
        self.path = path
        self.start()

    def start(self):
        self._server = dz.serve(**self._options)
        self.uri = self._server.__enter__()

    def stop(self):
        if self._server is not None:
            self._server.__exit__(None, None, None)
            self._server = None

    def open(self):
        """A new connection, of a client of its own."""
        with dask.config.set({"zbig.zeo.wait-timeout": 60}):
            db = dz.open(self.uri)
        db.storage._server.timeout = 4  # from now on: how long to wait for the server
        self._stack.callback(db.close)
        manager = transaction.TransactionManager()
        connection = db.open(manager)
        self._stack.callback(connection.close)
        self._stack.callback(manager.abort)
        return connection, manager


@pytest.fixture(params=[True, False], ids=["shared", "cache"])
def service(request, tmp_path):
    service = Service(str(tmp_path / "x.fs"), str(tmp_path / "socket"), request.param)
    with dask.config.set({"zbig.load-timeout": 20}):
        yield service
        if service._server is None:
            service.start()  # so that closing need not wait for it
        service._stack.close()
    service.stop()


def reconnect(connection):
    """Wait until the client has found the server again."""
    deadline = time.monotonic() + 60
    while True:
        try:
            connection.db().storage.ping()
            return
        except ClientDisconnected:
            assert time.monotonic() < deadline


# guard: basemap.py: leaves are watched; removed -> stale after the boundary; zeoclient.py: `_oids`; removed -> the
# ids of others' objects: ConflictError; storage/extents.py: Overlap; removed -> no conflict
@pytest.mark.parametrize("commits", [1, 150], ids=["few-commits", "more-than-the-server-remembers"])
@pytest.mark.parametrize("change", ["none", "elsewhere", "there"])
def test_a_client_that_was_cut_off_for_long(service, commits, change):
    """What others commit meanwhile shows at the next boundary; what it has not committed is kept, or conflicts."""
    connection, manager = service.open()
    connection.root()["A"] = A = dz.ZBigArray(8 * MIB, "u1")
    A[:] = 1
    manager.commit()
    a = A[:]
    assert (a[0], a[-1]) == (1, 1)
    size = MIB if change != "none" else 0
    at = 0 if change == "there" else 6 * MIB
    a[at : at + size] = 9
    service.stop()

    # others have the database to themselves: there is no server that could tell
    with contextlib.closing(dz.open(service.path)) as db:
        for k in range(commits):
            with db.transaction() as other:
                other.root()["A"][: 2 * MIB if k == 0 else 10] = 2 + k % 100
                other.root()["n"] = k
    first = 2 + (commits - 1) % 100
    assert (a[at + size], a[2 * MIB]) == (1, 1)  # what is mapped stays so

    service.start()
    there, their_manager = service.open()
    there.root()["A"][3 * MIB] = 7
    their_manager.commit()

    reconnect(connection)
    if change == "there":
        with pytest.raises(ConflictError):
            manager.commit()
        manager.abort()
    elif change == "elsewhere":
        manager.commit()
    manager.begin()
    expected = np.ones(8 * MIB, "u1")
    expected[: 2 * MIB] = 2
    if commits > 1:
        expected[:10] = first
    expected[3 * MIB] = 7
    if change == "elsewhere":
        expected[at : at + size] = 9
    np.testing.assert_array_equal(a, expected)
    np.testing.assert_array_equal(connection.root()["A"][:], expected)
    assert connection.root()["n"] == commits - 1
    a[5 * MIB] = 8
    manager.commit()
    there.db().storage.ping()
    their_manager.begin()
    expected[5 * MIB] = 8
    np.testing.assert_array_equal(there.root()["A"][:], expected)


def test_a_commit_while_the_server_is_away_changes_nothing_and_can_be_tried_again(service):
    connection, manager = service.open()
    connection.root()["A"] = A = dz.ZBigArray(8 * MIB, "u1")
    A[:] = 1
    manager.commit()
    a = A[:]
    a[: 3 * MIB] = 2
    service.stop()
    with pytest.raises(ClientDisconnected):
        manager.commit()
    manager.abort()
    service.start()
    reconnect(connection)
    there, their_manager = service.open()
    assert (there.root()["A"][:] == 1).all()
    manager.begin()
    assert (a == 1).all()
    a[: 3 * MIB] = 2
    manager.commit()
    there.db().storage.ping()
    their_manager.begin()
    np.testing.assert_array_equal(there.root()["A"][:], a)
    assert a.sum(dtype="i8") == 11 * MIB
