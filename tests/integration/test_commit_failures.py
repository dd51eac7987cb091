"""A commit that fails anywhere changes nothing, leaves nothing behind, and can be tried again."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os

import dask.config
import numpy as np
import pytest
import transaction
from ZODB.POSException import ConflictError

import dask_zbig as dz
from dask_zbig import database, segmentwriter
from dask_zbig.storage.tree import ExtentLeaf

from tests.scratch import left  # isort: skip

MIB = 1 << 20
INLINE, BLOB = 1000, 3 * MIB  # bytes
sizes = pytest.mark.parametrize("size", [INLINE, BLOB], ids=["inline", "blob"])


class Sabotage(Exception):
    """What the tests here let go wrong."""


class Saboteur:
    """A second data manager, which fails at one step of a commit, after all others have taken it."""

    def __init__(self, step):
        self.step = step
        self.transaction_manager = None

    def sortKey(self):
        return "~~~~"

    def __getattr__(self, name):
        def method(*args):
            if name == self.step:
                raise Sabotage(name)

        if name in ("abort", "tpc_begin", "commit", "tpc_vote", "tpc_finish", "tpc_abort"):
            return method
        raise AttributeError(name)


def fails(step):
    """Sabotage in a data manager that is asked last."""
    return lambda client, patch: client.tm.get().join(Saboteur(step))


def hooked(client, patch):
    """Sabotage before anybody is asked."""

    def hook():
        raise Sabotage

    client.tm.get().addBeforeCommitHook(hook)


def breaks(target, name, after):
    """Sabotage in a call of our own, or of ZODB's, after some that were good."""

    def prepare(client, patch):
        owner = client.connection._storage if target == "storage" else target
        original = getattr(owner, name)
        left = [after]

        def broken(*args, **kwargs):
            if left[0] == 0:
                raise Sabotage(name)
            left[0] -= 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, broken, raising=False)

    return prepare


def voted(client, patch):
    """Sabotage when the storage has voted, and waits for no more than to be told to finish."""
    storage = client.connection._storage
    original = storage.tpc_vote

    def broken(*args):
        original(*args)
        raise Sabotage

    patch.setattr(storage, "tpc_vote", broken, raising=False)


STEPS = {
    "before": hooked,
    "interrupt-in-freeze": breaks(dz.openfile, "FileSource", 0),
    "sync": breaks(os, "fsync", 0),
    "blob": breaks(segmentwriter, "Blob", 1),
    "splice": breaks(ExtentLeaf, "splice", 1),
    "tpc_begin": fails("tpc_begin"),
    "storage-begin": breaks("storage", "tpc_begin", 0),
    "store": breaks("storage", "store", 2),
    "store-blob": breaks("storage", "storeBlob", 1),
    "commit": fails("commit"),
    "storage-vote": breaks("storage", "tpc_vote", 0),
    "voted": voted,
    "tpc_vote": fails("tpc_vote"),
}
BLOB_STEPS = ("sync", "blob", "store-blob")


@pytest.fixture
def unlogged(caplog):
    """A log keeps exceptions, these their frames, those the segments, and files are removed when segments go."""
    caplog.set_level(logging.CRITICAL + 1, "txn")


@pytest.fixture
def files_of(unlogged):
    """Every file that a commit may leave in the blob directory, but for scratch files."""

    def files_of(clients):
        if not clients.blobs:
            return []
        gc.collect()
        top = clients.db.storage.fshelper.base_dir
        found = [os.path.join(d, f) for d, _, files in os.walk(top) for f in files]
        return sorted(os.path.relpath(f, top) for f in found if not os.path.basename(f).startswith("zbig"))

    return files_of


# guard: transaction.py: `discard` in abort; removed -> still dirty; openfile.py: it unlinks; removed -> scratch files
# left; it drops what is mapped; removed -> `a` was not what it had been. segmentwriter.py: `_remove_if_not_stored`,
# zeoclient.py: `tpc_abort`, filestorage.py: `_abort`; each removed -> files of blobs left
@pytest.mark.parametrize("step", STEPS)
@sizes
def test_a_commit_that_fails(clients, step, size, files_of, monkeypatch):
    if step in BLOB_STEPS and (size == INLINE or not clients.blobs):
        pytest.skip("takes no such step")
    clients.new(size, "u1")
    client = clients.connect()
    if step == "sync" and database.uploads_blobs(client.connection):
        pytest.skip("takes no such step: the server syncs")
    A = client.root["A"]
    a = A[:]
    a[:] = 1
    client.commit()
    last, files = clients.db.lastTransaction(), files_of(clients)
    a[5 : size // 2] = 2
    A.append(np.full(10, 4, "u1"))
    new = client.root["B"] = dz.ZBigArray(size, "u1")
    new[:] = 6
    with monkeypatch.context() as patch:
        STEPS[step](client, patch)
        with pytest.raises(Sabotage):
            client.commit()
    if step != "before":
        with pytest.raises(transaction.interfaces.TransactionFailedError):
            client.commit()
    client.abort()
    assert A.shape == (size,)
    assert (a == 1).all()
    assert "B" not in client.root
    assert (files_of(clients), clients.scratch()) == (files, [])
    assert clients.db.lastTransaction() == last
    a[6] = 3
    a[size // 2 :] = 5
    B = client.root["B"] = dz.ZBigArray(size, "u1")
    B[:] = 7
    client.commit()
    assert clients.scratch() == []
    expected = np.repeat(np.array([1, 5], "u1"), [size // 2, size - size // 2])
    expected[6] = 3
    for other in (client, clients.connect(other=True)):
        np.testing.assert_array_equal(other.root["A"][:], expected)
        assert (other.root["B"][:] == 7).all()


NEW_STEPS = [step for step in STEPS if step not in BLOB_STEPS]


@pytest.mark.parametrize("step", NEW_STEPS)
def test_a_new_array_is_stored_after_all(local, step, monkeypatch):
    """Not only another one like it."""
    local.new(10, "u1")
    client = local.connect()
    client.root["A"][:] = 1
    new = client.root["B"] = dz.ZBigArray(INLINE, "u1")
    new[:] = 6
    with monkeypatch.context() as patch:
        STEPS[step](client, patch)
        with pytest.raises(Sabotage):
            client.commit()
    client.abort()
    client.root["B"] = new
    with dask.config.set({"zbig.load-timeout": 1}):
        new[:] = 7
    client.commit()
    assert (local.connect().root["B"][:] == 7).all()


# guard: storage/extents.py: Overlap; removed -> no ConflictError
@sizes
def test_a_conflict(clients, size, files_of):
    clients.new(size, "u1")
    one, A, two, B = clients.pair()
    A[:] = 1
    one.commit()
    two.begin()
    b = B[:]
    b[: size // 2] = 2
    new = two.root["B"] = dz.ZBigArray(size, "u1")
    new[:] = 6
    A[size // 4 :] = 3
    one.commit()
    last, files = clients.db.lastTransaction(), files_of(clients)
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    expected = np.repeat(np.array([1, 3], "u1"), [size // 4, size - size // 4])
    np.testing.assert_array_equal(b, expected)
    assert (files_of(clients), clients.scratch()) == (files, [])
    assert clients.connect().connection.db().lastTransaction() == last
    b[: size // 2] = expected[: size // 2] = 2
    two.commit()
    one.begin()
    np.testing.assert_array_equal(A[:], expected)
    assert "B" not in one.root
    assert clients.scratch() == []


# -- full disks


# guard: scratch.c: pages are written before they are mapped; a sparse file instead -> SIGBUS
@pytest.mark.parametrize("clients", ["filestorage", "blobless", "zeo"], indirect=True)
def test_disk_full_for_scratch(clients, tiny_disk):
    clients.new(32 * MIB, "u1")
    clients.new(1000, "u1", name="other")
    with dask.config.set({"zbig.scratch-directory": tiny_disk}):
        client = clients.connect()
        A, other = client.root["A"], client.root["other"]
        a = A[:]
        other[:] = 1
        with pytest.raises(dz.ScratchError) as info:  # noqa: PT012 - it comes a little later
            a[:] = 1
            for _ in range(10**6):
                pass
        assert isinstance(info.value, OSError)
        with pytest.raises(dz.ScratchError):
            client.commit()
        client.abort()
        assert [f for f in os.listdir(tiny_disk) if not f.endswith(".lock")] == []
        assert not a.any()
        assert not other[:].any()
        a[: MIB // 2] = 2
        client.commit()
        assert [f for f in os.listdir(tiny_disk) if not f.endswith(".lock")] == []
        assert (a[: MIB // 2] == 2).all()
        client.close()
    assert clients.connect(other=True).root["A"][:].sum(dtype="i8") == MIB


@pytest.fixture(params=["scratch-too", "inline", "blob"])
def full(request, tmp_path, tiny_disk):
    """Options with which changes of 32 MiB fill the small disk that the database is on: with their scratch files,
    as objects, or as a blob that is copied there."""
    options = {"zbig.scratch-directory": None if request.param == "scratch-too" else str(tmp_path)}
    if request.param == "inline":
        options["zbig.inline-limit"] = 64 * MIB
    with dask.config.set(options):
        yield tmp_path


def test_disk_full_for_the_database(tiny_disk, full, unlogged):
    with contextlib.closing(dz.open(os.path.join(tiny_disk, "x.fs"))) as db:
        manager = transaction.TransactionManager()
        connection = db.open(manager)
        connection.root()["A"] = A = dz.ZBigArray(32 * MIB, "u1")
        A[:100_000] = 1
        manager.commit()
        a = A[:]
        last, files = db.lastTransaction(), sorted(os.walk(tiny_disk))
        with pytest.raises(OSError) as info:  # noqa: PT012 - when it comes is not said
            a[:] = 2
            for _ in range(10**6):
                pass
            manager.commit()
        assert info.value.errno == errno.ENOSPC
        del info  # whose traceback has the frames, and those have the files
        manager.abort()
        gc.collect()
        assert a.sum() == 100_000
        assert db.lastTransaction() == last
        assert left(full) == []
        assert sorted(os.walk(tiny_disk)) == files
        a[5] = 2
        manager.commit()
        other = db.open(transaction.TransactionManager())
        assert other.root()["A"][:].sum() == a.sum() == 100_001
        other.close()
        connection.close()
    gc.collect()


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("stored", range(6))
def test_a_new_array_after_a_commit_that_stored_only_some_objects(local, stored, fresh, monkeypatch):
    """Whichever object of it was the first that could not be stored."""
    local.new(10, "u1")
    client = local.connect()
    if not fresh:
        assert client.root["A"].sum() == 0
    new = client.root["B"] = dz.ZBigArray(100_000, "u1")
    new[:] = 6
    storage, left = client.connection._storage, [stored]
    store = storage.store

    def broken(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "no space left")
        return store(*args)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "store", broken)
        with pytest.raises(OSError, match="no space"):
            client.commit()
    client.abort()
    new[:] = 7
    client.root["B"] = new
    client.commit()
    assert (local.connect().root["B"][:] == 7).all()
