"""Direct assignment: `dask_zbig.assign`, against what NumPy's assignment to a view does."""

from __future__ import annotations

import errno
import os
import threading
import tracemalloc

import dask
import numpy as np
import pytest
import transaction
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import ConflictError

import dask_zbig as dz
from dask_zbig import assign as module
from dask_zbig.array.indexing import locate
from dask_zbig.assign import assign
from dask_zbig.memory._native import BLOCK, PAGE, counters

from tests.names import named  # isort: skip

MIB = 1 << 20
STRUCT = np.dtype([("a", "<u4"), ("b", "<f8")])


def put(A, index, values):
    """``A[index] = values`` by direct assignment."""
    where = locate(index, A.shape, A.itemsize, A.order)
    assign(A._open(), where.lo, where.hi, where.position, where.shape, A.dtype, where.strides, values)


def random(shape, dtype, seed=0):
    """An array of any bytes (that a float can have)."""
    dtype = np.dtype(dtype)
    shape = shape if isinstance(shape, tuple) else (shape,)
    raw = np.random.default_rng(seed).integers(1, 64, (*shape, dtype.itemsize), dtype="u1")
    return (raw % 2 if dtype.kind == "b" else raw).view(dtype).reshape(shape)


@pytest.fixture
def always(monkeypatch):
    """However little it is, it is assigned directly."""
    monkeypatch.setattr(module, "DIRECT", 1)


class Counted:
    """What the core did meanwhile."""

    def __enter__(self):
        self._before = counters()
        return self

    def __exit__(self, *_):
        now = counters()
        self.__dict__.update({name: now[name] - n for name, n in self._before.items()})


# -- as NumPy does


SIZES = (
    0,
    1,
    7,
    PAGE - 1,
    PAGE,
    PAGE + 1,
    3 * PAGE,
    BLOCK - PAGE,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    BLOCK + PAGE,
    2 * BLOCK,
)
DTYPES = ("u1", "<i2", ">f4", "f8", "c16", STRUCT, "S7", "M8[s]", "?")


def _value(kind, shape, dtype, seed):
    """Something that can be assigned to elements of this shape."""
    full = random(shape, dtype, seed)
    if kind == "straight" or not shape:
        return full
    if kind == "scalar":
        return full.reshape(-1)[0] if full.size else np.zeros((), dtype)
    if kind == "row":
        return random(shape[-1:], dtype, seed)
    if kind == "column":
        return random((1, *shape[:-1], 1), dtype, seed)
    if kind == "reversed":
        return full[::-1]
    if kind == "fortran":
        return np.asfortranarray(full)
    if kind == "strided":
        return np.repeat(full, 2, axis=-1)[..., ::2]
    return full.astype(dtype.newbyteorder() if dtype.kind in "SMV?" else "f4" if dtype.kind != "c" else "c8")


KINDS = ("straight", "scalar", "row", "column", "reversed", "fortran", "strided", "converted")


@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_numpy_assigns_to_one_axis(local, always, dtype):
    dtype = np.dtype(dtype)
    n = 5 * BLOCK // dtype.itemsize // 2
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray(n, dtype)
    model = np.zeros(n, dtype)

    @given(st.integers(0, n - 1), st.sampled_from(SIZES), st.booleans(), st.sampled_from(KINDS), st.integers(0, 99))
    def assigned(start, size, backwards, kind, seed):
        start = start - start % (PAGE // dtype.itemsize) if seed % 3 else start
        stop = min(n, start + -(-size // dtype.itemsize))
        index = slice(start, stop)
        if backwards and stop > start:
            index = slice(stop - 1, start - 1 if start else None, -1)
        value = _value(kind, model[index].shape, dtype, seed)
        model[index] = value
        put(A, index, value)
        assert A[max(0, start - 9) : stop + 9].tobytes() == model[max(0, start - 9) : stop + 9].tobytes()
        if seed % 10 == 0:
            client.commit()

    assigned()
    assert A[:].tobytes() == model.tobytes()
    client.commit()
    assert local.connect().root["A"][:].tobytes() == model.tobytes()


@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("order", ["C", "F"])
def test_as_numpy_assigns_to_several_axes(local, always, order):
    shape, dtype = (37, 211, 90), np.dtype("<f8")  # 5.4 MiB
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray(shape, dtype, order)
    model = np.zeros(shape, dtype)
    ends = [st.one_of(st.none(), st.integers(0, n)) for n in shape]
    parts = [
        st.one_of(st.builds(slice, end, end, st.sampled_from([None, None, None, -1, 2])), st.integers(0, n - 1))
        for n, end in zip(shape, ends, strict=True)
    ]

    @given(st.tuples(*parts), st.sampled_from(["", "...", "new"]), st.sampled_from(KINDS), st.integers(0, 99))
    def assigned(index, more, kind, seed):
        if more == "...":
            index = (index[0], ...) if order == "C" else (..., index[2])
        elif more == "new":
            index = (None, *index)
        value = _value(kind, model[index].shape, dtype, seed)
        model[index] = value
        put(A, index, value)
        assert np.array_equal(A[index], model[index])

    assigned()
    assert np.array_equal(A[...], model)
    client.commit()
    assert np.array_equal(local.connect().root["A"][...], model)


def _outcome(assignment):
    try:
        assignment()
    except Exception as e:  # noqa: BLE001 - to be compared
        return type(e), str(e)
    return None


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("u1", 300),
        ("u1", -1),
        ("u1", np.int64(300)),
        ("u1", [1, 300, 4, 5]),
        ("i4", 1.9),
        ("i4", [1.9, 2, 3, 4]),
        ("f8", None),
        ("f8", "1.5"),
        ("f8", "x"),
        ("f8", b"2"),
        ("f8", np.array(["1", "2", "3", "y"])),
        ("f8", np.array([1, None, 2.5, "7"], object)),
        ("f8", np.ones(3)),
        ("f8", np.ones((2, 4))),
        ("f8", np.ones((1, 1, 4))),
        ("f8", np.ma.masked_array([1.0, 2, 3, 4], [0, 1, 0, 0])),
        ("f8", memoryview(np.arange(4.0))),
        ("f8", [[1, 2, 3, 4]]),
        ("f8", [1, [2, 3], 4]),
        ("f8", object()),
        ("M8[s]", "2020-01-01"),
        ("M8[s]", 5),
        ("S3", "abcdef"),
        ("S3", ["a", "b", "c", "defg"]),
        (STRUCT, (1, 2.5)),
        (STRUCT, [(1, 2.5)] * 4),
        (STRUCT, 7),
    ],
    ids=named,
)
def test_values_of_all_sorts_and_the_errors_of_numpy(local, always, dtype, value):
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray(4, dtype)
    model = np.zeros(4, dtype)
    wanted = _outcome(lambda: model.__setitem__(..., value))
    assert _outcome(lambda: put(A, ..., value)) == wanted
    if wanted is None:
        assert A[:].tobytes() == model.tobytes()


def test_shapes_that_do_not_fit(local):
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray((0, 5))
    put(A, ..., np.ones((0, 5)))
    with pytest.raises(ValueError, match="could not broadcast"):
        put(A, ..., np.ones((3, 5)))
    client.root["B"] = B = dz.ZBigArray((MIB, 2), "u1")
    with pytest.raises(ValueError, match="could not broadcast"):
        put(B, ..., np.ones((MIB, 3)))
    assert not B[...].any()


# -- the old bytes are not needed


def test_it_neither_faults_nor_copies(local):
    local.new(16 * MIB, "u1")
    client = local.connect()
    A = client.root["A"]
    x = random(8 * MIB, "u1")
    for committed in (False, True):
        for value in (x, x.astype("f4"), 7):
            with Counted() as count:
                put(A, slice(3 * PAGE, 3 * PAGE + 8 * MIB), value)
            assert (count.write_faults, count.read_faults, count.fills, count.bytes_copied) == (0, 0, 0, 0)
            assert np.array_equal(A[3 * PAGE : 3 * PAGE + 8 * MIB], np.broadcast_to(value, x.shape).astype("u1"))
            if committed:
                client.commit()
            else:
                client.abort()
                assert not A[:].any()
    put(A, slice(5, 8 * MIB + 5), x)
    with Counted() as count:
        put(A, slice(5, 8 * MIB + 5), x)
    assert (count.write_faults, count.bytes_copied) == (0, 0)


def test_zeros_among_new_values_do_not_cut_them_into_pieces(local):
    """Zeros on a hole are no change, but they were assigned, and a piece of an extent map for each gap costs more."""
    local.new(MIB, "f8")
    user = local.connect()
    A = user.root["A"]
    A[:] = np.tile(np.arange(128.0), MIB // 128)
    user.commit()
    leaf = A._file.leaf(0)
    assert leaf.extents[["start", "stop"]].tolist() == [(0, A.nbytes)]


def test_small_and_scattered_regions_go_the_ordinary_way(local):
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray((1000, 1000), "u1")
    with Counted() as count:
        put(A, np.s_[3], 1)
        put(A, np.s_[:, 3:600], 2)
    assert count.write_faults > 0
    assert A[:, 3:600].min() == 2
    assert A[3].sum() == 2 * 597 + 403


@pytest.mark.parametrize("clients", ["zeo-cache"], indirect=True)
def test_bytes_that_are_overwritten_are_not_fetched(clients, monkeypatch):
    first = clients.connect()
    first.root["A"] = A = dz.ZBigArray(96 * MIB, "u1")
    old = random(96 * MIB, "u1", 1)
    put(A, ..., old)
    first.commit()
    other = clients.connect(other=True)
    B = other.root["A"]
    new = random(8 * MIB, "u1", 2)
    fetched = []
    storage = other.connection.db().storage
    load = storage.loadBlob

    def watched(oid, serial):
        fetched.append(oid)
        return load(oid, serial)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "loadBlob", watched)
        put(B, np.s_[4 * MIB : 12 * MIB], new)
        assert np.array_equal(B[4 * MIB : 12 * MIB], new)  # nor are they to look at what was written
        other.commit()
        assert not fetched
        old[4 * MIB : 12 * MIB] = new
        view = B[:]
        assert not fetched
        assert np.array_equal(view[: 16 * MIB], old[: 16 * MIB])
        assert fetched
    assert np.array_equal(view, old)
    first.begin()
    assert np.array_equal(A[:], old)


@pytest.mark.parametrize("clients", ["zeo-cache"], indirect=True)
def test_a_block_that_is_overwritten_in_part_is_filled_later(clients):
    first = clients.connect()
    first.root["A"] = A = dz.ZBigArray(16 * MIB, "u1")
    old = random(16 * MIB, "u1", 1)
    put(A, ..., old)
    first.commit()
    other = clients.connect(other=True)
    B = other.root["A"]
    new = random(5 * MIB, "u1", 2)
    lo, hi = BLOCK + 5 * PAGE, BLOCK + 5 * PAGE + 5 * MIB
    put(B, np.s_[lo:hi], new)
    view = B[:]
    old[lo:hi] = new
    assert np.array_equal(view[lo - 1 : hi + 1], old[lo - 1 : hi + 1])
    view[hi + PAGE] = 99
    old[hi + PAGE] = 99
    other.savepoint()
    put(B, np.s_[0 : 2 * BLOCK], 1)
    old[: 2 * BLOCK] = 1
    other.commit()
    assert np.array_equal(view, old)
    first.begin()
    assert np.array_equal(A[:], old)


# -- values that are in the array itself


@pytest.mark.parametrize("shift", [1, 7, PAGE, 3 * PAGE + 5, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("up", [True, False])
def test_moving_by_less_than_its_length(local, shift, up):
    client = local.connect()
    n = 12 * MIB
    client.root["A"] = A = dz.ZBigArray(n, "u1")
    model = random(n, "u1")
    put(A, ..., model)
    client.commit()
    to, of = (slice(shift, None), slice(0, n - shift)) if up else (slice(0, n - shift), slice(shift, None))
    source = A[of]
    tracemalloc.start()
    try:
        put(A, to, source)
        assert tracemalloc.get_traced_memory()[1] < 3 * MIB
    finally:
        tracemalloc.stop()
    model[to] = model[of].copy()
    assert np.array_equal(A[:], model)
    client.commit()
    assert np.array_equal(local.connect().root["A"][:], model)


@pytest.mark.parametrize("how", ["reversed", "row", "converted", "strided"])
def test_values_made_of_what_they_overwrite(local, how):
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray((1024, 1024), "f8")
    model = random((1024, 1024), "f8")
    put(A, ..., model)

    def values(array):
        if how == "reversed":
            return array[::-1, ::-1]
        if how == "row":
            return array[700]
        if how == "converted":
            return array.view("i8")
        return array[::2]

    to = np.s_[512:] if how == "strided" else ...
    put(A, to, values(A[...]))
    model[to] = values(model).copy()
    assert A[...].tobytes() == model.tobytes()


def test_values_seen_by_another_window(local):
    """Their addresses do not overlap, their bytes do."""
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray(4 * MIB, "u1")
    model = random(4 * MIB, "u1")
    put(A, ..., model)
    old = A[:]
    A.resize((12 * MIB,))
    assert len(A._open().space.windows()) == 1
    put(A, np.s_[4 * MIB :], random(8 * MIB, "u1", 2))
    new = A[:]
    assert len(A._open().space.windows()) == 2
    model = new.copy()
    put(A, np.s_[PAGE + 1 : 4 * MIB + PAGE + 1], old)
    model[PAGE + 1 : 4 * MIB + PAGE + 1] = model[: 4 * MIB].copy()
    assert np.array_equal(new, model)
    put(A, np.s_[: 4 * MIB], old[::-1])
    model[: 4 * MIB] = model[: 4 * MIB][::-1].copy()
    assert np.array_equal(new, model)
    assert np.array_equal(old, model[: 4 * MIB])


def test_what_is_there_already_is_not_written_again(local):
    """`A[i:j] += 1` assigns a view to itself."""
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray(8 * MIB, "u1")
    put(A, ..., 1)
    client.commit()
    view = A[MIB : 5 * MIB]
    put(A, np.s_[MIB : 5 * MIB], view)
    assert A._open().space.dirty_pages == 0
    view += 1
    put(A, np.s_[MIB : 5 * MIB], view)
    assert A[:].sum(dtype="i8") == 12 * MIB
    put(A, np.s_[MIB : 5 * MIB], view.reshape(-1, 4)[:, ::-1].reshape(-1))
    assert A[:].sum(dtype="i8") == 12 * MIB


# -- values that must be loaded


@pytest.mark.parametrize("clients", ["blobless", "zeo-cache"], indirect=True)
def test_values_that_are_not_here_yet(clients):
    first = clients.connect()
    model = random(10 * MIB, "u1")
    first.root["A"] = A = dz.ZBigArray(10 * MIB, "u1")
    first.root["B"] = dz.ZBigArray(10 * MIB, "u1")
    put(A, ..., model)
    first.commit()
    other = clients.connect(other=True)
    A, B = other.root["A"], other.root["B"]
    source = A[:]
    A._open().space.drop(0, 10 * MIB)
    with Counted() as count:
        put(B, np.s_[:], source)
    assert count.read_faults > 0
    assert count.write_faults == 0
    assert np.array_equal(B[:], model)
    A._open().space.drop(0, 10 * MIB)
    put(B, np.s_[PAGE:], source[::-1][PAGE:])
    other.commit()
    model[PAGE:] = model[::-1][PAGE:].copy()
    first.begin()
    assert np.array_equal(first.root["B"][:], model)


def test_values_that_cannot_be_loaded(local, monkeypatch):
    local.new(4 * MIB, "u1", name="B")
    client = local.connect()
    client.root["A"] = A = dz.ZBigArray(4 * MIB, "u1")
    put(A, ..., 5)
    client.commit()
    client.close()
    with dask.config.set({"zbig.load-timeout": 0.01}):
        client = local.connect()
        A, B = client.root["A"], client.root["B"]
        source = A[:]
        A._open().space.drop(0, 4 * MIB)

        def serve(lo, hi, recheck):
            raise dz.LoadError("gone")

        monkeypatch.setattr(A._open(), "serve", serve)
        with pytest.raises(dz.LoadError):
            put(B, np.s_[:], source)
        with pytest.raises(dz.LoadError):
            client.commit()
        client.abort()
        assert not B[:].any()


# -- transactions


def test_abort_savepoint_and_rollback(clients):
    client = clients.connect()
    client.root["A"] = A = dz.ZBigArray(5 * MIB, "u1")
    put(A, ..., 1)
    client.commit()
    view = A[:]
    put(A, np.s_[PAGE:], 2)
    saved = client.savepoint()
    put(A, np.s_[100 : 4 * MIB], 3)
    assert view[100] == 3
    saved.rollback()
    assert (view[:PAGE] == 1).all()
    assert (view[PAGE:] == 2).all()
    put(A, np.s_[: 2 * BLOCK], 4)
    client.abort()
    assert (view == 1).all()
    put(A, np.s_[BLOCK + 7 :], 5)
    client.commit()
    assert (view[: BLOCK + 7] == 1).all()
    assert (view[BLOCK + 7 :] == 5).all()
    assert np.array_equal(clients.connect().root["A"][:], view)
    assert clients.scratch() == []


def test_neighbours_do_not_conflict(merging):
    """Regions that share a page, and an element's neighbours."""
    merging.new(3 * MIB, STRUCT)
    one, A, two, B = merging.pair()
    middle = 1_400_001
    put(A, np.s_[:middle], (1, 1.5))
    put(B, np.s_[middle:], random(3 * MIB - middle, STRUCT))
    one.commit()
    two.commit()
    one.begin()
    assert (A[:middle] == np.array((1, 1.5), STRUCT)).all()
    assert np.array_equal(A[middle:], random(3 * MIB - middle, STRUCT))
    put(A, np.s_[:middle], (2, 1.5))
    two.begin()
    put(B, np.s_[middle - 1 :], (3, 2.5))
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()


def test_what_follows_the_array_stays_zero(local):
    client = local.connect()
    n = BLOCK + 5 * PAGE + 100
    client.root["A"] = A = dz.ZBigArray(n, "u1")
    put(A, ..., 1)
    client.commit()
    A.resize((n + BLOCK,))
    assert A[n:].sum() == 0
    put(A, np.s_[n:], 2)
    client.commit()
    A.resize((n,))
    A.resize((4 * BLOCK,))
    put(A, np.s_[n + 1 : 3 * BLOCK], 3)
    assert (int(A[n - 1]), int(A[n]), int(A[n + 1]), int(A[3 * BLOCK])) == (1, 0, 3, 0)
    client.commit()
    found = local.connect().root["A"][:]
    assert found.sum(dtype="i8") == n + 3 * (3 * BLOCK - n - 1)


def test_an_array_that_was_never_stored():
    A = dz.ZBigArray(5 * MIB, "u1")
    x = random(4 * MIB, "u1")
    put(A, np.s_[MIB:], x)
    assert np.array_equal(A[MIB:], x)
    assert not A[:MIB].any()


@pytest.mark.parametrize("other_writes", [False, True])
def test_outside_of_a_transaction(local, other_writes):
    """What is assigned before one begins conflicts with what others have committed by then."""
    local.new(8 * MIB, "u1")
    manager = transaction.TransactionManager(explicit=True)
    manager.begin()
    connection = local.db.open(manager)
    A = connection.root()["A"]
    manager.commit()
    put(A, np.s_[: 4 * MIB], 1)
    if other_writes:
        other = local.connect()
        put(other.root["A"], np.s_[: 2 * MIB], 9)
        other.commit()
    manager.begin()
    assert int(A[MIB]) == 1
    if other_writes:
        with pytest.raises(ConflictError):
            manager.commit()
        manager.abort()
    else:
        manager.commit()
    manager.begin()
    assert (int(A[MIB]), int(A[3 * MIB])) == ((9, 0) if other_writes else (1, 1))
    manager.abort()
    connection.close()


# -- refusals


def test_read_only(local):
    local.new(MIB, "u1")
    client = local.connect()
    client.root["A"][0] = 1
    client.commit()
    connection = local.db.open(transaction.TransactionManager(), before=client.connection._storage.lastTransaction())
    A = connection.root()["A"]
    for values in (1, np.ones(3)):  # as of an ndarray, that comes first
        with pytest.raises(ValueError, match="assignment destination is read-only"):
            put(A, ..., values)
    assert not A[:].any()
    connection.close()


def test_closed(local):
    local.new(4 * MIB, "u1")
    client = local.connect()
    A = client.root["A"]
    put(A, np.s_[:], 1)
    client.abort()
    opened = A._open()
    client.connection.close()
    for value in (1, random(4 * MIB, "u1")):
        with pytest.raises(dz.ClosedError):
            assign(opened, 0, 4 * MIB, 0, (4 * MIB,), np.dtype("u1"), (1,), value)


def _scratch(directory):
    return [name for name in os.listdir(directory) if not name.startswith(".")]


@pytest.mark.parametrize("clients", ["filestorage", "blobless"], indirect=True)
@pytest.mark.parametrize("kind", ["straight", "converted"])
def test_disk_full(clients, tiny_disk, kind):
    """The error comes at once, and half of an assignment is not committed."""
    clients.new(32 * MIB, "u1")
    values = np.ones(32 * MIB, "u1" if kind == "straight" else "i2")
    with dask.config.set({"zbig.scratch-directory": tiny_disk}):
        client = clients.connect()
        A = client.root["A"]
        view = A[:]
        view[5] = 1
        with pytest.raises(dz.ScratchError) as info:
            put(A, ..., values)
        assert info.value.errno == errno.ENOSPC
        assert view[0] == 1  # part of it has happened
        with pytest.raises(dz.ScratchError):
            client.commit()
        client.abort()
        assert not view.any()
        assert _scratch(tiny_disk) == []
        client.begin()
        view[5] = 2
        saved = client.savepoint()
        with pytest.raises(dz.ScratchError):
            put(A, ..., values)
        saved.rollback()
        assert (int(view[5]), int(view.sum())) == (2, 2)
        put(A, np.s_[: 3 * MIB], values[: 3 * MIB])
        client.commit()
        assert _scratch(tiny_disk) == []
        client.close()
    assert clients.connect().root["A"][:].sum(dtype="i8") == 3 * MIB


# -- threads


def test_threads_that_use_views_meanwhile(local):
    client = local.connect()
    n = 16 * MIB
    client.root["A"] = A = dz.ZBigArray(n, "u1")
    put(A, ..., 1)
    client.commit()
    view = A[:]
    wrong, done = [], threading.Event()

    def look():
        random = np.random.default_rng(1)
        while not done.is_set():
            at = int(random.integers(0, n - 5 * PAGE - 100))
            if not np.isin(view[at : at + 100], (1, 2, 3, 4)).all():
                wrong.append(at)

    def touch():  # in the last block, beyond what is assigned
        own = view[n - 4 * PAGE + 5 : n - 4 * PAGE + 1005]
        value = 0
        while not done.is_set():
            value = value % 200 + 1
            own[:] = value
            if not (own == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=look), threading.Thread(target=touch)]
    for thread in threads:
        thread.start()
    source = np.full(n - 6 * PAGE, 2, "u1")
    for turn in range(30):
        put(A, np.s_[PAGE : n - 5 * PAGE], source)
        put(A, np.s_[PAGE + 1 : n - 5 * PAGE], 3 + turn % 2)
        if turn % 10 == 9:
            client.savepoint()
            A._open().space.drop(0, n)  # so that all is absent, and comes by faults
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
