"""Commit, abort, boundaries, conflicts, savepoints and closing: transactions never lie about array data."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time

import dask.config
import numpy as np
import pytest
import transaction
import ZODB
from ZODB.Connection import resetCaches
from ZODB.POSException import ConflictError, ReadConflictError, ReadOnlyError, ReadOnlyHistoryError
from ZODB.utils import p64, u64

import dask_zbig as dz
from dask_zbig.database import open_at
from dask_zbig.memory._native import counters
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.transaction import DataManager

MIB = 1 << 20
SMALL, DEEP = MIB, LEAF_BYTES + MIB  # bytes: below one leaf, and with a node above the leaves
sizes = pytest.mark.parametrize("size", [SMALL, DEEP], ids=["small", "deep"])


def set_and_commit(client, A, **values):
    """A[12] = 5 as _12=5."""
    for key, value in values.items():
        A[int(key[1:])] = value
    client.commit()


def u1(*values):
    return np.array(values, "u1")


# -- what one commits the other sees, from its boundary on


@sizes
def test_isolation(clients, size):
    clients.new(size, "u1")
    one, A, two, B = clients.pair()
    b = B[:]
    where = [0, 4095, 4096, size // 2, size - 1]
    assert not b[where].any()  # holes, when they were read first
    A[where] = [1, 2, 3, 4, 5]
    assert not b[where].any()
    one.commit()
    assert not b[where].any()
    assert not B[:][where].any()
    two.begin()
    assert b[where].tolist() == B[:][where].tolist() == [1, 2, 3, 4, 5]
    A[where] = 9
    one.commit()
    assert b[where].tolist() == [1, 2, 3, 4, 5]
    two.begin()
    assert b[where].tolist() == [9] * 5
    assert b.sum() == 45


@sizes
def test_a_hole_that_was_never_read_is_of_the_same_snapshot(clients, size):
    clients.new(size, "u1")
    one, A, two, B = clients.pair()
    b = B[:]
    assert b[0] == 0
    A[size - 1] = 5
    A[1] = 6
    one.commit()
    assert b[size - 1] == b[1] == 0
    two.begin()
    assert (b[size - 1], b[1]) == (5, 6)


def test_bytes_replaced_by_others(clients):
    """A leaf with data in it gets other data, large enough to be blobs."""
    clients.new(3 * MIB, "u1")
    one, A, two, B = clients.pair()
    A[:] = 1
    one.commit()
    two.begin()
    b = B[:]
    assert (b == 1).all()
    for value in range(2, 5):
        A[MIB : 2 * MIB] = value
        one.commit()
        assert (b[MIB : 2 * MIB] == value - 1).all()
        two.begin()
        assert (b[MIB : 2 * MIB] == value).all()
        assert (b[:MIB] == 1).all()
        assert (b[2 * MIB :] == 1).all()


def test_shape_and_data_are_of_one_snapshot(clients):
    clients.new(1000, "i4")
    one, A, two, B = clients.pair()
    b = B[:]
    A.append([7] * 10)
    one.root["other"] = 5
    one.commit()
    assert (B.shape, "other" in two.root) == ((1000,), False)
    two.begin()
    assert (B.shape, two.root["other"]) == ((1010,), 5)
    assert B[1000:].tolist() == [7] * 10
    A.resize(10)
    one.commit()
    assert B[1009] == 7
    two.begin()
    assert B.shape == (10,)
    assert b.shape == (1000,)


@sizes
def test_abort(clients, size):
    clients.new(size, "u1")
    client = clients.connect()
    A = client.root["A"]
    a = A[:]
    a[:10] = 1
    client.commit()
    a[5:20] = 2
    a[size - 1] = 3
    A.append(u1(9, 9, 9, 9, 9))
    client.abort()
    assert A.shape == (size,)
    assert a[:20].tolist() == [1] * 10 + [0] * 10
    assert a[size - 1] == 0
    client.commit()
    assert not clients.connect(other=True).root["A"][10:].any()


def test_a_commit_without_changes_stores_nothing(clients):
    clients.new(10_000, "i4")
    client = clients.connect()
    A = client.root["A"]
    a = A[:]
    a[:] = 1
    client.commit()
    last = clients.db.lastTransaction()
    assert a.sum() == 10_000
    client.commit()
    client.begin()
    client.commit()
    assert clients.db.lastTransaction() == last
    serial = leaf_of(A)._p_serial
    a[:] = 1  # to what it is already
    client.commit()
    assert leaf_of(A)._p_serial == serial


def test_begin_is_a_boundary_too(clients):
    """What was written in a transaction that is begun anew is aborted, as it is for objects."""
    clients.new(10, "i4")
    client = clients.connect()
    client.begin()
    a = client.root["A"][:]
    a[0] = 1
    client.begin()
    assert a[0] == 0


def test_writes_between_transactions_belong_to_the_next(clients):
    clients.new(10_000, "u1")
    one, A, two, B = clients.pair()
    a, b = A[:], B[:]
    A[0] = 1
    one.commit()
    a[1] = 2  # no transaction has begun yet
    two.begin()
    set_and_commit(two, B, _2=3)
    one.begin()
    assert a[:4].tolist() == [1, 2, 3, 0]
    one.commit()
    two.begin()
    assert b[:4].tolist() == [1, 2, 3, 0]


# guard: transaction.py, `tpc_begin`: `_needs_to_join`; removed -> ValueError: expected txn status 'Active' or 'Doomed'
def test_a_write_after_a_commit_of_nothing_has_begun_belongs_to_the_next(clients, monkeypatch):
    """Threads write to views at any moment: also between the question whether anything has changed, and the flush."""
    clients.new(SMALL, "u1")
    one, A, two, B = clients.pair()
    a = A[:]
    begin = DataManager.tpc_begin

    def write_and_begin(self, current):
        if self.connection is one.connection:
            a[12] = 5
        begin(self, current)

    with monkeypatch.context() as patch:
        patch.setattr(DataManager, "tpc_begin", write_and_begin)
        one.commit()
    assert a[12] == 5
    two.begin()
    assert B[12] == 0
    two.root["other"] = 1
    two.commit()
    one.commit()
    assert a[12] == 5
    two.begin()
    assert B[12] == 5


def test_writes_between_transactions_conflict(clients):
    clients.new(10_000, "u1")
    one, A, two, B = clients.pair()
    a, _ = A[:], B[:]
    A[0] = 1
    one.commit()
    a[1] = 2
    two.begin()
    set_and_commit(two, B, _1=3)
    one.begin()
    with pytest.raises(ConflictError):
        one.commit()
    one.abort()
    assert a[:2].tolist() == [1, 3]


# -- conflicts


@pytest.mark.parametrize("first", [0, 1], ids=["joiner-first", "writer-first"])
def test_compaction_is_no_change(merging, first):
    """Small segments are joined by a commit now and then: that is nobody's change, and conflicts with none."""
    merging.new(10_000, "u1")
    one, A, two, B = merging.pair()
    for k in range(15):
        A[k * 100] = 1
        one.commit()
    two.begin()
    A[5000] = 2  # with the 16th small commit they are joined
    B[100] = 3
    for client in [(one, two), (two, one)][first]:
        client.commit()
    one.begin()
    two.begin()
    assert A[[0, 100, 5000]].tolist() == B[[0, 100, 5000]].tolist() == [1, 3, 2]


def test_who_commits_second_sees_the_merged_bytes(merging):
    merging.new(100, "u1")
    one, A, two, B = merging.pair()
    b = B[:]
    A[1], b[2] = 1, 2
    one.commit()
    two.commit()
    two.begin()
    assert b[:4].tolist() == [0, 1, 2, 0]
    b[3] = 3
    two.commit()
    one.begin()
    assert A[:4].tolist() == [0, 1, 2, 3]


@sizes
def test_same_byte_conflicts(clients, size):
    clients.new(size, "u1")
    clients.new(50, "i4", name="other")
    one, A, two, B = clients.pair()
    a, b, other = A[:], B[:], two.root["other"][:]
    a[10:20] = 1
    b[19:30] = 2
    other[:] = 3
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    assert b[:40].tolist() == a[:40].tolist() == [0] * 10 + [1] * 10 + [0] * 20
    assert not other.any()
    b[19:30] = 2  # and again, as one does
    other[:] = 3
    two.commit()
    one.begin()
    assert a[:40].tolist() == [0] * 10 + [1] * 9 + [2] * 11 + [0] * 10
    assert one.root["other"][:].tolist() == [3] * 50


def test_elements_conflict_as_a_whole(merging):
    """Two writers that change different bytes of one element may not be mixed."""
    merging.new(10, "i8")
    one, A, two, B = merging.pair()
    A[3], B[3] = 0xFF, 0xFF00
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    assert B[3] == 0xFF


def test_appends_conflict(clients):
    clients.new(10, "i4")
    one, A, two, B = clients.pair()
    A.append([1])
    B.append([2])
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    assert B[:].tolist() == [0] * 10 + [1]
    B.append([2])
    two.commit()
    one.begin()
    assert A[:].tolist() == [0] * 10 + [1, 2]


def test_append_and_write_merge(merging):
    merging.new(10, "u1")
    one, A, two, B = merging.pair()
    A.append(u1(1))
    B[0] = 2
    one.commit()
    two.commit()
    one.begin()
    assert A[:].tolist() == [2] + [0] * 9 + [1]


@pytest.mark.parametrize("size", [8000, DEEP])
@pytest.mark.parametrize("hole", [True, False])
def test_a_write_beyond_a_concurrent_shrink_conflicts(clients, size, hole):
    clients.new(size, "u1")
    one, A, two, B = clients.pair()
    if not hole:
        set_and_commit(one, A, **{f"_{size - 1}": 1, f"_{size - 20}": 1})
        two.begin()
    B[size - 10] = 7
    A.resize(1000)
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    assert B.shape == (1000,)


@pytest.mark.parametrize("size", [8000, DEEP])
@pytest.mark.parametrize("hole", [True, False])
def test_shrinking_after_a_concurrent_write_leaves_nothing_behind(clients, size, hole):
    """The array may not be shrunk, or the bytes are gone: growing again never brings them back."""
    clients.new(size, "u1")
    one, A, two, B = clients.pair()
    if not hole:
        set_and_commit(one, A, **{f"_{size - 1}": 1, f"_{size - 20}": 1})
        two.begin()
    B[size - 10] = 7
    A.resize(1000)
    two.commit()
    try:
        one.commit()
    except ConflictError:
        one.abort()
        return
    one.begin()
    A.resize(size)
    assert not A[1000:].any()
    one.commit()
    two.begin()
    assert not B[1000:].any()


# -- views


def test_views_that_outlive_their_array(local):
    local.new(1000, "u1")
    client = local.connect()
    a = client.root["A"][:]
    client.connection.cacheMinimize()
    gc.collect()
    a[5] = 1
    client.commit()
    assert local.connect().root["A"][5] == 1


def test_reset_caches(clients):
    clients.new(1000, "u1")
    one, A, two, B = clients.pair()
    b = B[:]
    assert b[0] == 0
    resetCaches()
    two.close()
    set_and_commit(one, A, _0=1)
    again = clients.connect()
    C = again.root["A"]
    assert C[0] == 1
    C[1] = 2
    again.commit()
    one.begin()
    assert A[:3].tolist() == [1, 2, 0]


# -- savepoints


def test_savepoint_without_rollback(clients):
    clients.new(1000, "u1")
    client = clients.connect()
    A = client.root["A"]
    A[0] = 1
    client.savepoint()
    A[1] = 2
    client.savepoint()
    A.resize(10)
    client.savepoint(), client.savepoint()
    client.commit()
    assert clients.connect(other=True).root["A"][:].tolist() == [1, 2, *[0] * 8]


def test_savepoint_then_abort(clients):
    clients.new(1000, "u1")
    client = clients.connect()
    A = client.root["A"]
    a = A[:]
    A[0] = 1
    A.resize(2000)
    client.savepoint()
    A[1] = 2
    client.abort()
    assert A.shape == (1000,)
    assert not a.any()
    client.commit()
    assert not clients.connect(other=True).root["A"][:].any()


def test_savepoint_before_anything_was_written(clients):
    clients.new(1000, "u1")
    client = clients.connect()
    A = client.root["A"]
    a = A[:]
    savepoint = client.savepoint()
    a[0] = 1
    A.append(u1(1))
    savepoint.rollback()
    assert (a[0], A.shape) == (0, (1000,))
    client.root["x"] = 1
    savepoint = client.savepoint()
    a[0] = 1
    savepoint.rollback()
    assert a[0] == 0


def test_savepoint_of_a_new_array(clients):
    client = clients.connect()
    client.root["B"] = B = dz.ZBigArray(10, "u1")
    b = B[:]
    b[:] = 3
    savepoint = client.savepoint()
    b[0] = 4
    savepoint.rollback()
    assert b[:].tolist() == B[:].tolist() == [3] * 10
    b[1] = 5
    client.commit()
    assert clients.connect(other=True).root["B"][:].tolist() == [3, 5, *[3] * 8]


def test_savepoint_of_a_shrunk_array(clients):
    clients.new(DEEP, "u1")
    client = clients.connect()
    A = client.root["A"]
    A[:] = 1
    client.commit()
    savepoint = client.savepoint()
    A.resize(100)
    savepoint.rollback()
    assert A.shape == (DEEP,)
    assert A[:].sum(dtype="i8") == DEEP
    client.commit()
    assert clients.connect(other=True).root["A"][:].sum(dtype="i8") == DEEP


# -- connections


def test_a_closed_connection_cannot_be_used(clients):
    clients.new(1000, "u1")
    client = clients.connect()
    A = client.root["A"]
    assert A[0] == 0
    client.close()
    for use in (lambda: A[0], lambda: A.__setitem__(0, 1), lambda: A.append(u1(1)), lambda: A.prefetch()):
        with pytest.raises(dz.ClosedError):
            use()


def test_a_connection_in_another_thread(clients):
    clients.new(1000, "u1")
    client = clients.connect()
    set_and_commit(client, client.root["A"], _0=1)
    client.close()

    def use():
        with clients.db.transaction() as connection:
            A = connection.root()["A"]
            got.append(int(A[0]))
            A[1] = 2

    got = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join(60)
    assert got == [1]
    assert clients.connect().root["A"][:3].tolist() == [1, 2, 0]


# guard: openfile.py: `writeable`; always true -> the view took the change
@pytest.mark.parametrize("clients", ["filestorage", "blobless", "zeo", "zeo-cache"], indirect=True)
@pytest.mark.parametrize("how", ["at", "before"])
def test_historical_connections(clients, how):
    clients.new(DEEP, "u1")
    client = clients.connect()
    A = client.root["A"]
    tids = []
    for k in range(1, 4):
        A[0], A[DEEP - 1] = k, k
        client.commit()
        tids.append(client.connection.db().lastTransaction())
    for k, tid in enumerate(tids, 1):
        manager = transaction.TransactionManager()
        last = p64(u64(tid) + (how == "before"))
        old = clients.db.open(manager, **{how: last})
        O = old.root()["A"]  # noqa: E741
        o = O[:]
        assert (o[0], o[DEEP - 1], O[0]) == (k, k, k)
        set_and_commit(client, A, _0=10 + k)
        manager.begin()
        assert (o[0], O[0]) == (k, k)
        assert not o.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            o[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            O[0] = 1
        for size in (5, 2 * DEEP):
            O.resize(size)
            with pytest.raises(ReadOnlyHistoryError):
                manager.commit()
            manager.abort()
            assert (O.shape, o[0]) == ((DEEP,), k)
        with pytest.raises(ValueError, match="read-only"):
            O.append(u1(1))
        manager.abort()
        assert O.shape == (DEEP,)
        old.close()


# guard: the same
def test_a_read_only_storage(tmp_path):
    path = str(tmp_path / "x.fs")
    db = dz.open(path)
    with db.transaction() as connection:
        connection.root()["A"] = A = dz.ZBigArray(100_000, "u1")
        A[:] = 1
    db.close()
    db = dz.open(f"file://{path}?read_only=1&blobstorage_dir={path}.blobs")
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    A = connection.root()["A"]
    a = A[:]
    assert a.sum() == 100_000
    for change in (lambda: a.__setitem__(0, 2), lambda: A.__setitem__(0, 2), lambda: A.append(u1(1))):
        with pytest.raises(ValueError, match="read-only"):
            change()
    A.resize(5)
    with pytest.raises(ReadOnlyError):
        manager.commit()
    manager.abort()
    assert (A.shape, a.sum()) == ((100_000,), 100_000)
    connection.close()
    db.close()


def test_undo(local):
    local.new(100_000, "u1")
    client = local.connect()
    A = client.root["A"]
    a = A[:]
    a[:] = 1
    client.commit()
    a[10] = 2
    client.commit()
    undoer = local.connect()
    local.db.undo(local.db.undoInfo(0, 1)[0]["id"], undoer.tm.get())
    undoer.commit()
    assert a[10] == 2
    client.begin()
    assert a[10] == 1
    assert a.sum() == 100_000


def test_pack(local):
    local.new(DEEP, "u1")
    client = local.connect()
    A = client.root["A"]
    a = A[:]
    for k in range(20):
        a[k * 100_000 : k * 100_000 + 90_000] = k + 1
        a[5] = k
        client.commit()
    expected = a.copy()
    local.db.pack()
    client.connection.cacheMinimize()
    np.testing.assert_array_equal(a, expected)
    np.testing.assert_array_equal(local.connect().root["A"][:], expected)


# -- another process

READER = """
import hashlib, json, sys
import dask_zbig as dz
db = dz.open(sys.argv[1])
conn = db.open()
out = {}
for name in sys.argv[2:]:
    A = conn.root()[name]
    out[name] = [list(A.shape), str(A.dtype), A.order, hashlib.sha256(A[...].tobytes("A")).hexdigest()]
conn.close(); db.close()
print(json.dumps(out))
"""


def read_elsewhere(uri, *names):
    done = subprocess.run(
        [sys.executable, "-c", READER, uri, *names], stdout=subprocess.PIPE, timeout=100, check=True, text=True
    )
    return json.loads(done.stdout)


def digest(array):
    import hashlib

    return hashlib.sha256(array.tobytes("A")).hexdigest()


def test_in_another_process(tmp_path):
    path = str(tmp_path / "x.fs")
    rng = np.random.default_rng(0)
    db = dz.open(path)
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    root = connection.root()
    root["big"], root["small"] = dz.ZBigArray((3000, 3000), "f8"), dz.ZBigArray((30, 40), ">i2", "F")
    root["big"][...] = rng.random((3000, 3000))
    root["small"][3:20, ::2] = 7
    manager.commit()
    root["big"][100:200, 5] = 1
    root["big"].append(rng.random((7, 3000)))
    root["small"][5] = -3
    manager.commit()
    expected = {
        name: [list(root[name].shape), str(root[name].dtype), root[name].order, digest(root[name][...])]
        for name in ("big", "small")
    }
    connection.close()
    db.close()
    assert read_elsewhere(path, "big", "small") == expected


def test_in_another_process_over_zeo(zeo_server):
    db = dz.open(zeo_server)
    with db.transaction() as connection:
        connection.root()["P"] = A = dz.ZBigArray(3_000_000, "u1")
        A[:] = np.arange(3_000_000) % 251
        expected = digest(A[:])
    assert read_elsewhere(zeo_server, "P")["P"][3] == expected
    with db.transaction() as connection:
        del connection.root()["P"]
    db.close()


# -- costs


def grown(path, action):
    """Bytes by which a FileStorage and its blobs grow."""

    def total():
        size = os.path.getsize(path)
        for directory, _, names in os.walk(path + ".blobs"):
            if os.path.basename(directory) == "tmp":
                continue  # the file in which the next change goes on is sparse
            size += sum(os.path.getsize(os.path.join(directory, n)) for n in names)
        return size

    before = total()
    action()
    return total() - before


@pytest.mark.parametrize("written", [0, 128 * MIB, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_small_append_grows_the_database_little(local, tmp_path, written):
    local.new((1 << 20, 1 << 10), "u1")
    client = local.connect()
    A = client.root["A"]
    for lo in range(0, written, 64 * MIB):
        A[lo >> 10 : (lo + 64 * MIB) >> 10] = 3
        client.commit()
    row = np.full((1, 1024), 7, "u1")
    growth = []
    for _ in range(20):

        def append():
            A.append(row)
            client.commit()

        growth.append(grown(str(tmp_path / "x.fs"), append))
    assert A.shape[0] == (1 << 20) + 20
    assert (A[-20:] == 7).all()
    # the 16th may compact: the bytes of 16 appends once more
    assert sorted(growth)[-2] < 4096
    assert max(growth) < 20 * 1024
    assert sum(growth) / len(growth) < 4096


def test_a_terabyte_sparse_array(local, tmp_path):
    def create():
        local.new((1 << 20, 1 << 20), "u1")

    assert grown(str(tmp_path / "x.fs"), create) < 1 << 16
    client = local.connect()
    A = client.root["A"]
    mappings = counters()["mappings"]
    a = A[:]
    assert a.shape == (1 << 20, 1 << 20)
    assert counters()["mappings"] - mappings < 20
    objects = len(client.connection._cache)
    assert objects < 1000
    a[700_000, 5] = 1

    assert grown(str(tmp_path / "x.fs"), client.commit) < 1 << 14
    assert len(client.connection._cache) < objects + 10
    assert counters()["mappings"] - mappings < 40
    assert (a[700_000, 4], a[700_000, 5], a[-1, -1], a[0, 0]) == (0, 1, 0, 0)
    other = local.connect()
    B = other.root["A"]
    assert B[700_000, 4:7].tolist() == [0, 1, 0]
    B[-1, -1] = 2
    other.commit()
    client.begin()
    assert a[-1, -1] == 2
    assert len(other.connection._cache) < 1000


def rss_anon():
    """Bytes of this process's memory that no file backs."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon:")]
    return int(line.split()[1]) << 10


# guard: openfile.py: `_layer_of` refers to scratch files; their bytes instead -> RssAnon grew by more than 64 MiB
@pytest.mark.slow
def test_savepoints_of_more_than_memory_lie_in_files(local):
    size, step = 1 << 30, 64 * MIB
    local.new(size, "u1")
    client = local.connect()
    a = client.root["A"][:]
    before, most = rss_anon(), 0
    for lo in range(0, size, step):
        a[lo : lo + step] = lo // step + 1
        a[lo : lo + step : 4096] = 99
        most = max(most, rss_anon() - before)
        point = client.savepoint()
        most = max(most, rss_anon() - before)
        a[lo] = 0
        point.rollback()
        most = max(most, rss_anon() - before)
    assert a.sum(dtype="i8") == sum((step - step // 4096) * (k + 1) + step // 4096 * 99 for k in range(size // step))
    client.commit()
    assert max(most, rss_anon() - before) < 64 * MIB
    b = local.connect().root["A"][:]
    assert b[::step].tolist() == [99] * (size // step)
    assert b[1::step].tolist() == list(range(1, size // step + 1))


def leaf_of(A, index=0):
    ((_, leaf),) = [(i, x) for i, x in A._file.leaves(0, 1 << 62) if i == index]
    leaf._p_activate()
    return leaf


@pytest.mark.parametrize("clients", ["filestorage", "blobless", "mapping"], indirect=True)
@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_many_small_appends(clients, count):
    clients.new((0, 25), "i4")
    client = clients.connect()
    A = client.root["A"]
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 1 << 30, (count, 25), "i4")
    view = None
    for k in range(len(expected)):
        A.append(expected[k : k + 1])
        client.commit()
        if k % 97 == 0:
            view = A[...]
            np.testing.assert_array_equal(view, expected[: k + 1])
    leaf = leaf_of(A)
    assert len(leaf.refs) < 100
    assert len(leaf.extents) < 100
    other = clients.connect(other=True)
    np.testing.assert_array_equal(other.root["A"][...], expected)
    np.testing.assert_array_equal(view, expected[: len(view)])


def test_many_scattered_writes(local):
    local.new(4 * MIB, "u1")
    client = local.connect()
    A = client.root["A"]
    rng = random.Random(0)
    expected = np.zeros(4 * MIB, "u1")
    for _ in range(400):
        at, value = rng.randrange(4 * MIB), rng.randrange(256)
        A[at] = expected[at] = value
        client.commit()
    np.testing.assert_array_equal(A[:], expected)
    assert len(leaf_of(A).refs) < 100
    np.testing.assert_array_equal(local.connect().root["A"][:], expected)


def test_one_commit_of_many_scattered_changes(clients):
    clients.new(4 * MIB, "u1")
    client = clients.connect()
    A = client.root["A"]
    expected = np.random.default_rng(0).integers(0, 256, 4 * MIB, "u1")
    A[:] = expected
    client.commit()
    A[::5000] = expected[::5000] = 7
    client.commit()
    A[::3] = expected[::3] = 9
    client.commit()
    np.testing.assert_array_equal(A[:], expected)
    np.testing.assert_array_equal(clients.connect(other=True).root["A"][:], expected)


# -- nothing is left behind


def test_no_scratch_file_is_left(clients):
    clients.new(3 * MIB, "u1")
    client = clients.connect()
    A = client.root["A"]

    def write():
        A[:] = np.random.default_rng(0).integers(0, 256, A.shape, "u1")
        A[7] = 3

    write()
    client.commit()
    assert clients.scratch() == []
    A[::4096] = 5
    client.commit()
    assert clients.scratch() == []
    write()
    client.savepoint()
    A[5] = 5
    A.append(u1(1))
    client.commit()
    assert clients.scratch() == []
    write()
    savepoint = client.savepoint()
    write()
    savepoint.rollback()
    client.abort()
    assert clients.scratch() == []
    write()
    client.abort()
    client.close()
    assert clients.scratch() == []


# guard: FileSource.shared; removed -> a blob of 16 MiB
def test_a_large_change_that_goes_on_in_a_scratch_file_is_stored_alone(local, tmp_path):
    local.new(16 * MIB, "u1")
    client = local.connect()
    view = client.root["A"][:]
    for n in range(4):
        view[n * 5000] = 1
        client.commit()
    view[4 * MIB : 12 * MIB] = 9
    client.commit()
    assert sum(blob.stat().st_size for blob in (tmp_path / "x.fs.blobs").rglob("*.blob")) <= 8 * MIB + 65536
    other = client.owner.connect(other=True).root["A"][:]
    assert other.sum() == 4 + 9 * 8 * MIB


# guard: Layer of a savepoint has the scratch file, though the next generation is undone; `_scratch = None` in rollback
@pytest.mark.parametrize("end", ["rollback", "abort", "commit"])
def test_changes_in_a_scratch_file_that_goes_on(clients, end):
    """One transaction goes on in the file of the one before, and a savepoint holds it."""
    clients.new(8 * MIB, "u1")
    client = clients.connect()
    view = client.root["A"][:]
    for n in range(1, 40):
        view[n * 4096 * 5] = n
        client.commit()
        view[5] = n
        savepoint = client.tm.savepoint()
        view[4 * MIB] = n
        if end == "rollback":
            savepoint.rollback()
            assert (view[5], view[4 * MIB]) == (n, 0)
            client.commit()
        elif end == "abort":
            client.abort()
        else:
            client.commit()
        expected = {"rollback": (n, 0), "abort": (0, 0), "commit": (n, n)}[end]
        assert (view[5], view[4 * MIB]) == expected
        assert view[4096 * 5 :: 4096 * 5][:n].tolist() == list(range(1, n + 1))
        assert clients.scratch() == []
    other = clients.connect(other=True).root["A"][:]
    np.testing.assert_array_equal(other, view)


def test_a_new_array_that_is_dropped_leaves_no_scratch_file(local, tmp_path):
    with dask.config.set({"zbig.scratch-directory": str(tmp_path)}):
        A = dz.ZBigArray(3 * MIB, "u1")
        A[:] = 1
        assert [n for n in os.listdir(tmp_path) if n.startswith("zbig")]
        del A
        gc.collect()
        assert not [n for n in os.listdir(tmp_path) if n.startswith("zbig")]


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def maps():
    with open("/proc/self/maps") as file:
        return sum("zbig" in line or ".blob" in line for line in file)


def settled(before):
    """Wait until there is no more than `before`: a loader may for a moment refer to a space that has done its work."""
    deadline = time.monotonic() + 60
    while (descriptors() > before[0] or maps() > before[1]) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)


def test_descriptors_and_mappings_do_not_leak(clients):
    clients.new(3 * MIB, "u1")

    def use():
        client = clients.connect()
        A = client.root["A"]
        a = A[:]
        for k in range(3):
            a[:] = k
            client.commit()
            a[::5000] = k + 1
            client.commit()
            a[7] = 1
            client.abort()
        assert a[1] == 2
        client.close()

    use()
    gc.collect()
    before = descriptors(), maps()
    for _ in range(4):
        use()
        gc.collect()
    settled(before)
    assert descriptors() <= before[0]
    assert maps() <= before[1]


def test_many_commits_in_one_connection_leak_nothing(local):
    local.new(MIB, "u1")
    client = local.connect()
    a = client.root["A"][:]

    def use(n):
        for k in range(n):
            at = k % 5 * 200_000
            a[at : at + 200_000] = k % 251
            client.commit()

    use(10)
    gc.collect()
    before = descriptors(), maps()
    use(100)
    gc.collect()
    assert descriptors() <= before[0] + 5
    assert maps() <= before[1] + 20
    np.testing.assert_array_equal(local.connect().root["A"][:], a)


# -- all with other objects


def test_atomic_with_objects(clients):
    clients.new(1000, "u1")
    one, A, two, B = clients.pair()
    A[0] = 1
    one.root["n"] = 1
    two.root["n"] = 2
    one.commit()
    B[1] = 2
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    assert (B[:2].tolist(), two.root["n"]) == ([1, 0], 1)


def test_two_arrays_in_one_transaction(clients):
    clients.new(1000, "u1", name="A")
    clients.new(DEEP, "f4", name="C")
    one = clients.connect()
    one.root["A"][:] = 1
    one.root["C"].resize(10_000)
    one.root["C"][:] = 2
    one.commit()
    two = clients.connect(other=True)
    assert two.root["A"][:].sum() + two.root["C"][:].sum() == 21_000


def test_moving_an_array_between_containers(clients):
    clients.new(1000, "u1")
    client = clients.connect()
    A = client.root["A"]
    A[0] = 1
    client.commit()
    client.root["B"] = A
    del client.root["A"]
    A[1] = 2
    client.commit()
    assert clients.connect(other=True).root["B"][:3].tolist() == [1, 2, 0]


def test_appends_of_one_transaction_make_no_layers(clients):
    """Each of which would be a scratch file, and slow down what comes after it."""
    clients.new(0, "i4")
    client = clients.connect()
    A = client.root["A"]
    opened = A._open()
    A.resize(1000)
    A[:] = 1
    client.commit()
    A.resize(0)
    client.commit()
    for k in range(50):
        A.append([k])
    assert len(opened.layers) <= 1
    a = A[:]
    savepoint = client.savepoint()
    A.append([50])
    old = A[:]
    savepoint.rollback()
    old[50] = 99  # past the end
    A.append([51])
    assert A[-1] == 51
    A.resize(60)
    assert A[52:].tolist() == [0] * 8
    client.commit()
    assert clients.connect(other=True).root["A"][:].tolist() == [*range(50), 51, *[0] * 9]
    assert a.tolist() == [*range(50)]


@pytest.mark.parametrize("viewed", [True, False])
def test_hooks_and_synchronizers_may_read_after_the_commit(clients, viewed):
    clients.new(1000, "u1")
    client = clients.connect()
    A = client.root["A"]
    a = A[:] if viewed else None
    seen = []

    class Synchronizer:
        def beforeCompletion(self, current):
            pass

        def afterCompletion(self, current):
            seen.append(int(A[0]))

        newTransaction = beforeCompletion  # noqa: N815

    synchronizer = Synchronizer()
    client.tm.registerSynch(synchronizer)
    client.tm.get().addAfterCommitHook(lambda done: seen.append(A[:2].tolist()))
    A[0] = 7
    client.commit()
    assert seen == [7, [7, 0]]
    A[1] = 8
    client.tm.get().addAfterAbortHook(lambda: seen.append(A[:2].tolist()))
    client.abort()
    assert seen[2:] == [[7, 0], 7]
    A[2] = 9  # and it is in the next transaction as ever
    client.commit()
    assert clients.connect(other=True).root["A"][:3].tolist() == [7, 0, 9]
    del a


def test_explicit_transactions(local):
    local.new(1000, "u1")
    manager = transaction.TransactionManager(explicit=True)
    connection = local.db.open(manager)
    manager.begin()
    A = connection.root()["A"]
    a = A[:]
    a[0] = 1
    manager.commit()
    manager.begin()
    assert a[0] == 1
    a[1] = 1
    manager.abort()
    manager.begin()
    assert a[1] == 0
    manager.abort()
    connection.close()


def test_a_read_that_is_current(clients):
    """readCurrent, as ZODB has it: a truncation elsewhere makes the commit of data fail."""
    clients.new(1000, "u1")
    one, A, two, B = clients.pair()
    B[5] = 1
    A.resize(500)
    one.commit()
    with pytest.raises((ReadConflictError, ConflictError)):
        two.commit()
    two.abort()
    B[5] = 1
    two.commit()
    one.begin()
    assert A[5] == 1


def test_demo_storage(tmp_path):
    from ZODB.DemoStorage import DemoStorage
    from ZODB.FileStorage import FileStorage

    path = str(tmp_path / "x.fs")
    db = dz.open(path)
    with db.transaction() as connection:
        connection.root()["A"] = A = dz.ZBigArray(MIB, "u1")
        A[:] = 1
    db.close()
    base = FileStorage(path, read_only=True, blob_dir=path + ".blobs")
    db = ZODB.DB(DemoStorage(base=base))
    with contextlib.closing(db):
        with db.transaction() as connection:
            A = connection.root()["A"]
            A[:10] = 2
            A[500_000:] = 3
        with db.transaction() as connection:
            assert connection.root()["A"][:].sum(dtype="i8") == 20 + 499_990 + 3 * (MIB - 500_000)


@pytest.mark.parametrize("clients", ["filestorage", "blobless", "zeo", "zeo-cache"], indirect=True)
@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_an_old_version_shows_what_was_undone_since(clients, size):
    """Its segments have no current revision any more."""
    clients.new(size, "u1")
    client, undoer = clients.connect(), clients.connect()
    set_and_commit(client, client.root["A"], _0=1)
    client.root["A"][:] = 2
    client.commit()
    for expected in (1, 2):  # undone, and done again
        tid = clients.db.lastTransaction()
        clients.db.undo(clients.db.undoInfo(0, 1)[0]["id"], undoer.tm.begin())
        undoer.commit()
        with contextlib.closing(open_at(clients.db, tid, transaction.TransactionManager())) as old:
            old.root()["A"].prefetch()
            assert old.root()["A"][0] == 3 - expected
        client.begin()
        assert client.root["A"][0] == expected
