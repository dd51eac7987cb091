"""References: `ArrayRef`, and ZBigArrays that are pickled."""

from __future__ import annotations

import copy
import multiprocessing
import operator
import pickle
import traceback

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
from dask.base import tokenize
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import dask_zbig as dz


@pytest.fixture
def stored(local):
    """A client, and an array of two axes that is stored."""
    local.new((20, 30), "i4")
    client = local.connect()
    A = client.root["A"]
    A[...] = np.arange(600).reshape(20, 30)
    client.commit()
    return client, A


# -- ArrayRef


@given(st.data())
def test_any_view(data):
    A = dz.ZBigArray((4, 5, 6), "<i4", data.draw(st.sampled_from("CF")))
    A[...] = np.arange(120).reshape(4, 5, 6)
    view = A[data.draw(hnp.basic_indices(A.shape, allow_newaxis=True, max_dims=5))]
    if not isinstance(view, np.ndarray) or not view.size:
        return
    for change in data.draw(st.lists(st.sampled_from(["T", "last", "bytes"]), max_size=3)):
        if change == "T":
            view = view.T
        elif change == "last" and view.ndim:
            view = view[..., ::-1]
        elif change == "bytes" and view.ndim and view.flags.c_contiguous:
            view = view.view("u1")
    ref = dz.ArrayRef(view)
    again = ref.deref()
    assert (again.dtype, again.shape, again.strides) == (view.dtype, view.shape, view.strides)
    np.testing.assert_array_equal(again, view)
    again[...] += np.ones((), view.dtype)
    np.testing.assert_array_equal(again, view)  # the same memory
    assert ref.array is A
    assert ref == dz.ArrayRef(again)
    assert hash(ref) == hash(dz.ArrayRef(again))
    assert ref != dz.ArrayRef(A[...].view("u4"))


def test_stored_with_other_objects(stored, local):
    client, A = stored
    client.root["refs"] = {"row": dz.ArrayRef(A[3]), "field": dz.ArrayRef(A[...].view("u2,u2")["f0"])}
    client.commit()
    other = local.connect()
    refs = other.root["refs"]
    assert refs["row"].array is other.root["A"]
    refs["row"].deref()[...] = 7
    assert refs["field"].deref()[3].tolist() == [7] * 30
    other.commit()
    client.begin()
    assert (A[3] == 7).all()
    # it keeps the array, which nothing else refers to
    del other.root["A"]
    other.commit()
    local.db.pack()
    other.connection.cacheMinimize()
    assert other.root["refs"]["row"].deref().sum() == 210


def test_it_is_small(stored, local):
    client, A = stored
    client.root["ref"] = dz.ArrayRef(A[::2, 5])
    assert len(pickle.dumps(client.root["ref"])) < 600


def test_what_is_no_view_of_a_stored_array(stored):
    _, A = stored
    for thing in (A[3].copy(), np.zeros(3), [1, 2], A, A[[1, 2]], dz.RAMArray(3)[:], A[3:3], A[0, 0]):
        with pytest.raises(dz.ViewError):
            dz.ArrayRef(thing)


def test_a_view_that_is_no_longer_inside(stored):
    _, A = stored
    ref = dz.ArrayRef(A[10:])
    assert ref.deref().shape == (10, 30)
    A.resize(19, 30)
    with pytest.raises(dz.ShapeError, match="not inside"):
        ref.deref()
    A.resize(20, 30)
    assert not ref.deref()[-1].any()


@pytest.mark.parametrize(
    "change",
    [
        {"position": -4}, {"position": 2400}, {"position": 1 << 70}, {"shape": (1 << 40,)}, {"shape": (-1,)},
        {"strides": (-4,)}, {"strides": (1 << 62,)}, {"strides": (4, 4)}, {"dtype": "|O"}, {"dtype": "<i8"},
        {"dtype": "junk"}, {"position": 1.5}, {"shape": 3}, {"shape": ("a",)}, {"array": 5}, {"array": None},
        {"shape": (1,) * 65, "strides": (4,) * 65},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_geometry_is_refused(stored, change):
    """Whatever is in a pickle, no view is made that looks beyond the array."""
    _, A = stored
    state = {"array": A, "position": 0, "shape": (600,), "strides": (4,), "dtype": "<i4", **change}
    ref = dz.ArrayRef.__new__(dz.ArrayRef)

    def use():
        ref.__setstate__((1, *state.values()))
        ref.deref()

    with pytest.raises(dz.ZBigError):
        use()


def test_unknown_version_is_refused(stored):
    _, A = stored
    version, *rest = dz.ArrayRef(A[3]).__getstate__()
    with pytest.raises(dz.FormatError, match="newer"):
        dz.ArrayRef.__new__(dz.ArrayRef).__setstate__((version + 1, *rest))


# -- pickling


def test_pickled_by_reference(stored, local):
    client, A = stored
    other = local.connect()
    for dumps in (pickle.dumps, cloudpickle.dumps):
        raw = dumps(A)
        assert len(raw) < 500
        B = pickle.loads(raw)
        assert (B.shape, B.dtype, B.order, B.nbytes) == (A.shape, A.dtype, A.order, A.nbytes)
        for index in np.s_[3, 5:7, ::-2, ..., (0, 0), [5, 3]]:
            np.testing.assert_array_equal(B[index], A[index])
        assert B.sum() == A.sum()
        assert (B + 1 == A + 1).all()
        assert not B[3:5].flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            B[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            B += 1
        with pytest.raises(TypeError, match="unhashable"):
            hash(B)
        assert pickle.loads(pickle.dumps(B)).sum() == A.sum()
        ref = pickle.loads(dumps(dz.ArrayRef(A[3:5, ::2].T)))
        assert ref.deref().tolist() == A[3:5, ::2].T.tolist()
    # it is what was committed then
    total = A.sum()
    other.root["A"][0] = 1
    other.commit()
    assert pickle.loads(raw).sum() == total
    client.begin()
    assert pickle.loads(pickle.dumps(A)).sum() == A.sum() != total


@pytest.mark.parametrize(
    "index",
    ["a", ["b"], True, np.ones((3, 4), bool), np.s_[:, np.ones((4, 5), bool)], np.s_[[0, -1], :, [1, 2]]],
    ids=str,
)
def test_a_snapshot_takes_the_indices_of_an_ndarray(local, index):
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray((3, 4, 5), [("a", "i4"), ("b", "f8")])
    A["a"] = np.arange(60).reshape(3, 4, 5)
    client.commit()
    got, expected = pickle.loads(pickle.dumps(A))[index], A[...][index]
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert (got == expected).all()


def test_what_cannot_be_pickled(stored):
    client, A = stored
    new = dz.ZBigArray(3)
    for step in ("nowhere", "in a container", "dirty", "resized"):
        if step == "in a container":
            client.root["new"] = new
        if step == "dirty":
            new = A
            A[:5, 0] += 1
        if step == "resized":
            client.abort()
            A.resize(5, 5)
        for thing in (new, [new], *([dz.ArrayRef(A[3])] if new is A else [])):
            with pytest.raises(TypeError, match=r"never committed|uncommitted changes") as info:
                pickle.dumps(thing)
            assert isinstance(info.value, dz.PickleError)
    client.savepoint()  # to ZODB the object is unchanged after that
    with pytest.raises(dz.PickleError, match="uncommitted changes"):
        pickle.dumps(A)
    with pytest.raises(dz.UncommittedChangesError):
        dz.from_zbigarray(A)
    client.abort()
    pickle.dumps(A)
    client.close()
    with pytest.raises(dz.ClosedError):
        pickle.dumps(A)


class Special(dz.ZBigArray):
    """A class of a user."""


def test_subclasses_are_pickled_by_reference_too(local):
    client = local.connect()
    client.root["A"] = A = Special(10, "i4")
    A[:] = 3
    client.commit()
    assert type(local.connect().root["A"]) is Special
    assert pickle.loads(pickle.dumps(A)).sum() == 30


def test_copies_are_still_refused(stored):
    _, A = stored
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(dz.CopyError):
            copied(A)


def test_tokens(stored, local):
    client, A = stored
    other = local.connect()
    assert tokenize(A) == tokenize(A) == tokenize(other.root["A"])
    before = tokenize(A)
    A[0, 0] += 1
    assert tokenize(A) != tokenize(A)
    client.commit()
    assert tokenize(A) == tokenize(A) != before


def test_in_other_processes(zeo_server):
    """What a plain user of Dask, of pickle, of multiprocessing tries."""
    db = dz.open(zeo_server)
    conn = db.open()
    conn.root()["A"] = A = dz.ZBigArray((1000, 300), "i8")
    A[...] = np.arange(300)
    conn.transaction_manager.commit()
    total = int(A.sum())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for thing in (A, dz.ArrayRef(A[5]).array):
            assert pool.apply_async(operator.methodcaller("sum"), (thing,)).get(60) == total
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=60) as cluster,
        Client(cluster) as client,
    ):
        assert client.submit(lambda A: int(A.sum()), A).result(60) == total
        assert client.submit(lambda r: int(r.deref().sum()), dz.ArrayRef(A[:, 1])).result(60) == 1000
        x = da.from_array(A, chunks=(100, 300))
        assert int(x.sum().compute()) == total
        assert (da.from_array(A, chunks=(100, 300)) + x).sum().compute() == 2 * total
        A[0] = 1
        with pytest.raises(TypeError) as info:
            client.submit(lambda A: A, A)
        assert "uncommitted changes" in "".join(traceback.format_exception(info.value))
        conn.transaction_manager.abort()
    conn.close()
    db.close()


def test_dask_threads_slice_one_array_at_once(clients):
    """`da.from_array(A)` and `da.store(x, A)` with the threaded scheduler use the array in all threads."""
    clients.new((400, 1000), "f8")
    client = clients.connect()
    client.root["A"][...] = np.arange(1000)
    client.commit()
    for _ in range(5):
        other = clients.connect(other=True)
        A = other.root["A"]
        x = da.from_array(A, chunks=(7, 1000))
        with dask.config.set(scheduler="threads", num_workers=8):
            assert float(x.sum().compute()) == 400 * 499_500
            da.store(x * 2, A, lock=False)
        assert A.sum() == 2 * 400 * 499_500
        other.abort()
        assert A.sum() == 400 * 499_500
        other.close()


def test_from_zbigarray_of_a_pickled_array(stored):
    _, A = stored
    x = dz.from_zbigarray(pickle.loads(pickle.dumps(A)), chunks=(5, 30))
    assert int(x.sum().compute(scheduler="threads")) == A.sum()
