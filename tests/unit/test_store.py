"""`to_zbigarray` and `CommitCoordinator` on the threaded scheduler: every byte at its place, or a clear refusal."""

from __future__ import annotations

import errno
import os
import pickle
import time

import dask
import dask.array as da
import numpy as np
import pytest
import transaction
import ZODB
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError

import dask_zbig as dz
from dask_zbig.cluster import store
from dask_zbig.cluster.coordinator import CommitCoordinator, to_zbigarray
from dask_zbig.cluster.staging import ROOT_KEY, begin_job, collect, end_job
from dask_zbig.cluster.store import Place, stage
from dask_zbig.errors import (
    ClosedError,
    DTypeError,
    NotStoredError,
    PublishError,
    ScratchError,
    ShapeError,
    ZBigError,
)
from dask_zbig.memory._native import BLOCK
from dask_zbig.storage import extents as ex

KINDS = {
    "blobs": lambda directory: dz.open(directory / "x.fs"),
    "no blobs": lambda directory: ZODB.DB(FileStorage(str(directory / "x.fs"))),
    "mapping": lambda directory: ZODB.DB(MappingStorage()),
}


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads"):
        yield


def client_of(kind, directory):
    db = KINDS[kind](directory)
    connection = db.open(transaction.TransactionManager())
    connection.root()["start"] = True
    connection.transaction_manager.commit()
    yield connection
    if connection.opened is not None:
        connection.transaction_manager.abort()
        connection.close()
    db.close()


@pytest.fixture(params=KINDS)
def connection(request, tmp_path):
    yield from client_of(request.param, tmp_path)


@pytest.fixture
def local(tmp_path):
    """Of a database with blobs."""
    yield from client_of("blobs", tmp_path)


@pytest.fixture(scope="module", params=KINDS)
def shared(request, tmp_path_factory):
    """For many small tests, which leave nothing behind but unused objects."""
    yield from client_of(request.param, tmp_path_factory.mktemp("store"))


def stored(connection, data, order="C", name="A"):
    connection.root()[name] = array = dz.ZBigArray(data.shape, data.dtype, order)
    array[...] = data
    connection.transaction_manager.commit()
    return array


def second(connection):
    """What another client sees."""
    return connection.db().open(transaction.TransactionManager())


def jobs(connection):
    with connection.db().transaction() as other:
        return list(other.root().get(ROOT_KEY, ()))


def published(array, job):
    """The transaction that published `job`, if it was the last one to publish into `array`."""
    assert array._file.journal.jobs[-1] == job
    return array._file.journal._p_serial


def scratch(connection):
    directory = connection._normal_storage.temporaryDirectory()
    return [name for name in os.listdir(directory) if name.startswith(("zbig-stage", "BUC"))]


# -- every byte at its place


@st.composite
def saves(draw):
    """(shape, dtype, order, region, chunk sizes along each axis of what is stored)"""
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=0, max_size=3)))
    region = []
    for n in shape:
        part = draw(st.sampled_from(["all", "part", "step", "back", "int" if n else "all"]))
        a, b = sorted([draw(st.integers(0, n)), draw(st.integers(0, n))])
        step = draw(st.integers(1, 3))
        region.append(
            {
                "all": slice(None),
                "part": slice(a, b),
                "step": slice(a, b, step),
                "back": slice(b, a, -step),
                "int": min(a, max(n - 1, 0)),
            }[part]
        )
    dtype = draw(st.sampled_from(["u1", "i2", "f8", "S3", "c16", "M8[s]"]))
    sizes = draw(st.lists(st.integers(1, 7), min_size=3, max_size=3))
    return shape, dtype, draw(st.sampled_from("CF")), tuple(region), sizes


@settings(max_examples=40)
@given(save=saves(), inline=st.booleans())
def test_any_region_of_any_array(shared, save, inline):
    shape, dtype, order, region, sizes = save
    total = int(np.prod(shape))
    expected = (np.arange(total) % 99).astype("i8").astype(dtype).reshape(shape)
    array = stored(shared, expected, order)
    before = expected.copy()
    target = expected[region]
    values = (np.arange(target.size) + 100).astype("i8").astype(dtype).reshape(target.shape)
    expected[region] = values
    x = da.from_array(values, chunks=tuple(sizes[: values.ndim]))
    with dask.config.set({"zbig.inline-limit": 1 << 20 if inline else 0}):
        result = to_zbigarray(x, array, region)
    assert result.bytes == values.nbytes
    assert np.array_equal(array[...], expected)
    shared.transaction_manager.abort()
    assert np.array_equal(array[...], before)
    with CommitCoordinator(shared) as save:
        save.store(x, array, region)
    assert np.array_equal(array[...], expected)
    other = second(shared)
    assert np.array_equal(other.root()["A"][...], expected)
    other.transaction_manager.abort()
    other.close()


def test_chunks_that_align_to_nothing(connection):
    """Over the borders of pages, of blocks, and of the leaves of the extent map."""
    n = (64 << 20) + 3 * BLOCK
    array = stored(connection, np.zeros(0, "u1"))
    array.resize(n)
    connection.transaction_manager.commit()
    start = (64 << 20) - BLOCK - 77
    values = np.random.default_rng(1).integers(1, 255, 2 * BLOCK + 12345, dtype="u1")
    to_zbigarray(da.from_array(values, chunks=333333), array, np.s_[start : start + len(values)])
    connection.transaction_manager.commit()
    assert np.array_equal(array[start : start + len(values)], values)
    assert not array[start - 9 : start].any()
    assert not array[start + len(values) :].any()


def test_runs_longer_than_the_pieces_of_inline_segments(connection, monkeypatch):
    monkeypatch.setattr(store, "INLINE_PIECE", 1000)
    values = np.arange(4000, dtype="i4").reshape(40, 100)
    array = stored(connection, np.zeros((40, 200), "i4"))
    with dask.config.set({"zbig.inline-limit": 1 << 20}):
        to_zbigarray(da.from_array(values, chunks=(15, 100)), array, np.s_[:, 50:150])
    connection.transaction_manager.commit()
    assert np.array_equal(array[:, 50:150], values)
    assert not array[:, :50].any()
    assert not array[:, 150:].any()


@pytest.mark.parametrize(("size", "unit"), [(4 * BLOCK, BLOCK), (BLOCK, 4096)])
def test_a_segment_lies_as_the_array_does(local, size, unit):
    """At the same offset in a page, or the kernel could not map it; a large one in a block: huge pages, then."""
    array = stored(local, np.zeros(8 * BLOCK, "u1"))
    job = begin_job(dz.database.location(local.db()), local)
    for start in (0, 4096, BLOCK + 12345):
        place = Place(0, start, (size,), (1,), array.dtype)
        manifest = stage(np.ones(size, "u1"), place, job)
        (extent,) = np.frombuffer(manifest.extents, ex.EXTENT).tolist()
        assert extent == (start, start + size, 0, start % unit)
        assert len(manifest.segments) == 1
        assert manifest.segments[0].length == start % unit + size
        assert not manifest.segments[0].inline
    end_job(job)


def test_casts(connection):
    array = stored(connection, np.zeros(10, "f4"))
    for values in (np.arange(10), np.arange(10, dtype="f8") / 2, np.arange(10) > 5, np.arange(10, dtype=">f8")):
        to_zbigarray(da.from_array(values, chunks=3), array)
        assert np.array_equal(array[:], values.astype("f4"))
    swapped = stored(connection, np.zeros(10, ">i4"), name="B")
    to_zbigarray(da.arange(10, chunks=4), swapped)
    assert np.array_equal(swapped[:], np.arange(10))
    words = stored(connection, np.zeros(3, "S5"), name="C")
    to_zbigarray(da.from_array(np.array([b"a", b"bcd", b""]), chunks=2), words)
    assert words[:].tolist() == [b"a", b"bcd", b""]


def test_what_is_not_a_dask_array(connection):
    array = stored(connection, np.zeros((4, 3)))
    source = stored(connection, np.ones((4, 3)), name="B")
    to_zbigarray([[1, 2, 3]] * 4, array)
    assert array[:].sum() == 24
    to_zbigarray(source, array)
    assert array[:].sum() == 12
    to_zbigarray(7, array, np.s_[0, 0])
    assert array[0, 0] == 7


def test_an_array_that_is_new_in_this_transaction(connection):
    root = connection.root()
    root["A"] = array = dz.ZBigArray((50, 20))
    with pytest.raises(NotStoredError, match=r"conn\.add"):
        to_zbigarray(da.ones((50, 20)), array)
    connection.add(array)
    array[:5] = 2
    to_zbigarray(da.ones((40, 20), chunks=7), array, np.s_[10:])
    assert array[:].sum() == 40 * 20 + 5 * 20 * 2
    connection.transaction_manager.commit()
    other = second(connection)
    assert other.root()["A"][:].sum() == 40 * 20 + 5 * 20 * 2
    other.close()


def test_together_with_changes_made_by_hand(connection):
    array = stored(connection, np.zeros((40, 1000)))
    view = array[:]
    view[:20] = 1
    to_zbigarray(da.full((20, 1000), 2.0, chunks=(6, 300)), array, np.s_[10:30])
    view[15] = 3
    expected = np.zeros((40, 1000))
    expected[:20], expected[10:30], expected[15] = 1, 2, 3
    assert np.array_equal(view, expected)
    connection.transaction_manager.commit()
    assert np.array_equal(view, expected)
    connection.cacheMinimize()
    assert np.array_equal(array[:], expected)


def test_savepoints(connection):
    array = stored(connection, np.zeros(5000))
    to_zbigarray(da.ones(5000, chunks=1000), array)
    savepoint = connection.transaction_manager.savepoint()
    to_zbigarray(da.full(3000, 2.0, chunks=1000), array, np.s_[1000:4000])
    assert array[:].sum() == 8000
    savepoint.rollback()
    assert array[:].sum() == 5000
    connection.transaction_manager.commit()
    assert array[:].sum() == 5000
    assert jobs(connection) == []


# -- several arrays, one save


def test_a_coordinator_saves_all_at_once(connection):
    one = stored(connection, np.zeros((30, 20)), name="one")
    two = stored(connection, np.zeros((20, 30), "i4"), "F", name="two")
    three = stored(connection, np.zeros((0, 4)), name="three")
    other = second(connection)
    seen = other.root()
    x = da.arange(600, chunks=97).reshape(30, 20)
    with CommitCoordinator(connection) as save:
        save.store(x.astype("f8"), one)
        save.store(x.T, two)
        save.store(-da.ones((5, 20), chunks=2), one, region=np.s_[3:8])  # later wins
        save.append(da.ones((6, 4), chunks=4), three)
        save.append(da.full((2, 4), 2.0), three)
        assert save.result is None
        assert not seen["one"][:].any()
    expected = np.arange(600).reshape(30, 20)
    assert np.array_equal(two[:], expected.T)
    expected[3:8] = -1
    assert np.array_equal(one[:], expected)
    assert three[:, 0].tolist() == [1] * 6 + [2] * 2
    assert not seen["one"][:].any()
    assert seen["three"].shape == (0, 4)
    other.transaction_manager.begin()
    assert np.array_equal(seen["one"][:], expected)
    assert seen["three"].shape == (8, 4)
    assert save.result.tid == published(seen["two"], save.result.job_id)
    assert save.result.bytes == 600 * 8 + 600 * 4 + 100 * 8 + 8 * 4 * 8
    assert jobs(connection) == []
    other.close()


def test_append_along_the_major_axis_of_a_fortran_array(connection):
    array = stored(connection, np.ones((3, 4), "i4"), "F")
    with CommitCoordinator(connection) as save:
        save.append(da.full((3, 5), 7, dtype="i4", chunks=(2, 2)), array)
    assert np.array_equal(array[:], [[1] * 4 + [7] * 5] * 3)


def test_an_exception_inside_saves_nothing(connection):
    array = stored(connection, np.zeros(100))
    grown = stored(connection, np.zeros(5), name="B")
    with pytest.raises(KeyError, match="mine"), CommitCoordinator(connection) as save:  # noqa: PT012
        save.store(da.ones(100, chunks=30), array)
        save.append(da.ones(5), grown)
        connection.root()["x"] = 1
        raise KeyError("mine")
    assert not array[:].any()
    assert grown.shape == (5,)
    assert "x" not in connection.root()
    assert save.result is None
    assert jobs(connection) == []


def fail(block, block_info=None):
    if block_info[0]["chunk-location"] == (2,):
        raise ZeroDivisionError("in a task")
    return block


def test_a_task_that_fails_saves_nothing(connection):
    array = stored(connection, np.zeros(100))
    x = da.ones(100, chunks=30).map_blocks(fail, dtype="f8", meta=np.empty(0))
    with pytest.raises(ZeroDivisionError), CommitCoordinator(connection) as save:
        save.store(x, array)
    with pytest.raises(ZeroDivisionError):
        to_zbigarray(x, array)
    assert not array[:].any()
    connection.transaction_manager.commit()
    assert not array[:].any()
    assert jobs(connection) == []
    to_zbigarray(da.ones(100), array)
    assert array[:].all()


def test_abort_leaves_nothing(local):
    array = stored(local, np.full(1 << 20, 7, "u1"))
    to_zbigarray(da.ones(1 << 20, dtype="u1", chunks=1 << 18), array)
    assert len(jobs(local)) == 1
    local.transaction_manager.abort()
    assert jobs(local) == []
    assert (array[:] == 7).all()
    assert scratch(local) == []
    local.db().pack()
    blobs = [f for _, _, files in os.walk(local.db().storage.fshelper.base_dir) for f in files if f.endswith(".blob")]
    assert len(blobs) == 1  # the array's own


def test_pack_between_staging_and_publishing_loses_nothing(connection):
    array = stored(connection, np.zeros(200000))
    to_zbigarray(da.arange(200000, dtype="f8", chunks=70000), array)
    connection.db().pack()
    connection.transaction_manager.commit()
    connection.db().pack()
    connection.cacheMinimize()
    other = second(connection)
    assert np.array_equal(other.root()["A"][:], np.arange(200000))
    other.close()


def test_a_lease_that_ran_out_before_publishing(connection, monkeypatch):
    """As when the client was suspended. Its data may have been packed away: never publish that."""
    array = stored(connection, np.zeros(100000))
    with dask.config.set({"zbig.lease-seconds": "1 s"}), monkeypatch.context() as patch:
        patch.setattr("dask_zbig.cluster.renewal._keep", lambda job, stopped: None)
        result = to_zbigarray(da.ones(100000, chunks=30000), array)
    other = second(connection)
    assert [job.id for job in collect(dz.database.location(connection.db()), now=time.time() + 2)] == [result.job_id]
    twin = stored(other, np.zeros(10), name="B")
    to_zbigarray(da.ones(10), twin)
    assert result.job_id not in jobs(connection)
    other.transaction_manager.commit()
    connection.db().pack()
    with pytest.raises(PublishError, match="lease"):
        connection.transaction_manager.commit()
    connection.transaction_manager.abort()
    assert not array[:].any()
    other.close()


def test_a_lease_that_runs_out_in_the_middle_of_the_commit(connection):
    array = stored(connection, np.zeros(100000))
    result = to_zbigarray(da.ones(100000, chunks=30000), array)
    location = dz.database.location(connection.db())

    class Late:
        """Comes after everything was checked, before anything is stored."""

        def __getattr__(self, name):
            return lambda transaction: None

        def sortKey(self):
            return "\x00"

        def tpc_begin(self, transaction):
            assert [job.id for job in collect(location, now=1e12)] == [result.job_id]

    connection.transaction_manager.get().join(Late())
    with pytest.raises(ConflictError):
        connection.transaction_manager.commit()
    connection.transaction_manager.abort()
    assert not array[:].any()


def test_a_lease_that_runs_out_while_computing(connection):
    array = stored(connection, np.zeros(100))
    location = dz.database.location(connection.db())

    def late(block):
        collect(location, now=1e12)
        return block

    with pytest.raises(PublishError, match="lease"):
        to_zbigarray(da.ones(100).map_blocks(late, dtype="f8", meta=np.empty(0)), array)


def test_conflicts(connection):
    array = stored(connection, np.zeros(3000))
    other = second(connection)
    twin = other.root()["A"]
    with pytest.raises(ConflictError), CommitCoordinator(other) as save:  # noqa: PT012
        save.store(da.full(2000, 2.0, chunks=500), twin, region=np.s_[:2000])
        array[1999] = 1
        connection.transaction_manager.commit()
    assert save.result is None
    assert len(jobs(connection)) == 1  # what was staged can still be saved
    save.discard()
    assert jobs(connection) == []
    if isinstance(connection.db().storage, MappingStorage):  # it resolves no conflicts
        return
    with CommitCoordinator(other) as save:
        save.store(da.full(1000, 3.0, chunks=300), twin, region=np.s_[:1000])
        array[1000] = 4
        connection.transaction_manager.commit()
    connection.transaction_manager.begin()
    assert array[:].sum() == 3000 + 4 + 1
    assert save.result.tid == published(array, save.result.job_id)
    other.close()


def test_the_result_knows_its_transaction_even_after_a_merge(local):
    array = stored(local, np.zeros(3000))
    other = second(local)
    twin = other.root()["A"]
    with CommitCoordinator(other) as late:
        late.store(da.ones(1000), twin, region=np.s_[2000:])
        with CommitCoordinator(local) as early:
            early.store(da.ones(1000), array, region=np.s_[:1000])
    assert early.result.tid < late.result.tid
    serials = [t.tid for t in local.db().storage.iterator()]
    assert early.result.tid in serials
    assert late.result.tid in serials
    other.transaction_manager.begin()
    assert twin[:].sum() == 2000
    other.close()


def test_nothing_to_save(connection):
    array = stored(connection, np.zeros((5, 4)))
    with CommitCoordinator(connection) as save:
        connection.root()["x"] = 1
    assert save.result.bytes == save.result.segments == 0
    assert connection.root()["x"] == 1
    to_zbigarray(da.ones((0, 4)), array, np.s_[2:2])
    with CommitCoordinator(connection) as save:
        save.append(da.ones((0, 4)), array)
        save.store(da.ones((5, 0)), array, region=np.s_[:, :0])
    assert array.shape == (5, 4)
    assert not array[:].any()
    assert jobs(connection) == []


# -- what is refused


def test_shapes_and_regions(connection):
    array = stored(connection, np.zeros((6, 4)))
    for x, region in [
        (da.ones((6, 5)), None),
        (da.ones(4), None),
        (da.ones((2, 4)), np.s_[:3]),
        (da.ones((2, 4)), [0, 1]),
        (da.ones((2, 4)), np.array([True, True, False, False, False, False])),
        (da.ones(6)[da.ones(6) > 0], np.s_[:, 0]),
    ]:
        with pytest.raises(ShapeError):
            to_zbigarray(x, array, region)
    with pytest.raises(ShapeError, match="compute_chunk_sizes"):
        to_zbigarray(da.ones(6)[da.ones(6) > 0], array, np.s_[:, 0])
    with pytest.raises(IndexError):
        to_zbigarray(da.ones(4), array, 6)
    with CommitCoordinator(connection) as save:
        for x in (da.ones((3, 5)), da.ones(4), da.ones((3, 4))[da.ones(3) > 0]):
            with pytest.raises(ShapeError):
                save.append(x, array)
        with pytest.raises(ShapeError):
            save.append(da.ones(3), stored(connection, np.zeros(()), name="S"))
    assert array.shape == (6, 4)
    assert jobs(connection) == []


def test_dtypes(connection):
    array = stored(connection, np.zeros(4, "i4"))
    for x in (da.ones(4), da.ones(4, dtype="c8"), da.from_array(np.array(list("abcd")))):
        with pytest.raises(DTypeError, match="same_kind"):
            to_zbigarray(x, array)
    objects = np.array([1, None, "a", []], object)
    for x in (objects, da.from_array(objects, chunks=2)):
        with pytest.raises(DTypeError):
            to_zbigarray(x, array)
    with CommitCoordinator(connection) as save:
        with pytest.raises(DTypeError):
            save.append(da.ones(2), array)
        assert array.shape == (4,)


def test_targets(connection, tmp_path):
    array = stored(connection, np.zeros(4))
    other = second(connection)
    for target in (np.zeros(4), None, "A"):
        with pytest.raises(TypeError, match="ZBigArray"):
            to_zbigarray(da.ones(4), target)
    with pytest.raises(NotStoredError):
        to_zbigarray(da.ones(4), dz.ZBigArray(4))
    with CommitCoordinator(connection) as save:
        with pytest.raises(ZBigError, match="another connection"):
            save.store(da.ones(4), other.root()["A"])
        with pytest.raises(ZBigError, match="another connection"):
            save.append(da.ones(4), other.root()["A"])
        with pytest.raises(TypeError, match="ZBigArray"):
            save.append(da.ones(4), np.ones(4))
        with pytest.raises(PublishError, match="in use"):
            save.__enter__()
    past = connection.db().open(transaction.TransactionManager(), at=connection.db().lastTransaction())
    with pytest.raises(PublishError, match="read-only"):
        to_zbigarray(da.ones(4), past.root()["A"])
    with pytest.raises(PublishError, match="with"):
        CommitCoordinator(connection).store(da.ones(4), array)
    past.close()
    twin = other.root()["A"]
    other.close()
    with pytest.raises(ClosedError):
        to_zbigarray(da.ones(4), twin)
    with pytest.raises(ClosedError):
        CommitCoordinator(other).__enter__()


def test_blocks_that_are_not_what_dask_says(connection):
    """`map_blocks` takes its user's word for chunks and dtype."""
    array = stored(connection, np.zeros(12, "i4"))
    shorter = da.ones(12, dtype="i4", chunks=4).map_blocks(lambda b: b[1:], dtype="i4", meta=np.empty(0, "i4"))
    with pytest.raises(ShapeError, match="chunks"):
        to_zbigarray(shorter, array)
    floats = da.Array({("wrong", 0): (np.full, (12,), 1.5)}, "wrong", ((12,),), meta=np.empty(0, "i4"))
    with pytest.raises(DTypeError, match="same_kind"):
        to_zbigarray(floats, array)
    assert not array[:].any()


@pytest.mark.parametrize("changed", ["before", "after", "before and after"])
def test_the_first_save_of_a_database_and_a_changed_root(connection, changed):
    """It adds the staging area to the root: that must not conflict with the user's own changes of it."""
    root = connection.root()
    array = stored(connection, np.zeros(10))
    if "before" in changed:
        root["x"] = 1
        del root["start"]
    to_zbigarray(da.ones(10), array)
    assert list(root[ROOT_KEY]) == []  # as it was when the transaction began, more or less
    if "after" in changed:
        root["y"] = dz.ZBigArray(5)
        root["y"][:] = 3
    connection.transaction_manager.commit()
    other = second(connection)
    seen = other.root()
    assert seen["A"][:].all()
    assert set(seen) == {"A", ROOT_KEY} | ({"x"} if "before" in changed else {"start"}) | (
        {"y"} if "after" in changed else set()
    )
    assert list(seen[ROOT_KEY]) == []
    connection.transaction_manager.begin()
    assert list(root[ROOT_KEY]) == []
    other.close()


def test_the_first_save_and_an_abort(connection):
    root = connection.root()
    array = stored(connection, np.zeros(10))
    root["x"] = 1
    to_zbigarray(da.ones(10), array)
    connection.transaction_manager.abort()
    assert set(root) == {"A", "start", ROOT_KEY}
    root["x"] = 2
    connection.transaction_manager.commit()


def test_a_root_that_another_client_changed(connection):
    array = stored(connection, np.zeros(10))
    other = second(connection)
    other.root()["x"] = 1
    other.transaction_manager.commit()
    other.close()
    to_zbigarray(da.ones(10), array)
    connection.root()["y"] = 1
    with pytest.raises(ConflictError):  # as it would without us
        connection.transaction_manager.commit()
    connection.transaction_manager.abort()
    assert connection.root()["x"] == 1
    assert not array[:].any()


def test_a_full_disk(local, monkeypatch):
    array = stored(local, np.zeros(100000))

    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(store.os, "pwrite", full)
        with pytest.raises(ScratchError, match="No space left"):
            to_zbigarray(da.ones(100000, chunks=30000), array)
    assert scratch(local) == []
    assert jobs(local) == []
    to_zbigarray(da.ones(100000, chunks=30000), array)
    assert array[:].all()


def test_manifests_are_small(local):
    job = begin_job(dz.database.location(local.db()), local)
    stored(local, np.zeros(0))
    manifest = stage(np.ones((1000, 1000)), Place(0, 0, (1000, 1000), (8000, 8), np.dtype("f8")), job)
    assert len(pickle.dumps(manifest)) < 1000
    end_job(job)
