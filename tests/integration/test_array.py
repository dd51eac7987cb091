"""A ZBigArray against an ndarray: the same indices, values, views, sizes and errors."""

from __future__ import annotations

import io

import numpy as np
import pytest
import transaction
import ZODB
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import dask_zbig as dz

DTYPES = [
    "?", "i1", "u8", "<i4", ">i4", "f2", "f4", "f8", ">f8", "c8", "c16", "S5", "<U3", ">U3", "M8[us]", "m8[D]", "V7",
    [("a", "u1"), ("b", "<f8"), ("c", "S3")],
    {"names": ["x", "y"], "formats": ["<i2", "<f4"], "offsets": [0, 8], "itemsize": 16},
    [("p", "<i4", (2, 3))],
]  # fmt: skip
dtypes = st.sampled_from(DTYPES).map(np.dtype)
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@pytest.fixture(scope="module")
def conn():
    """A connection to a database in memory, for arrays that need no storage of their own."""
    db = ZODB.DB(None)
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    yield connection
    manager.abort()
    connection.close()
    db.close()


def filled(shape, dtype, order, seed=0):
    """An ndarray of which no two elements are equal, as far as the dtype can."""
    array = np.zeros(shape, dtype, order)
    raw = np.random.default_rng(seed).integers(0, 100, array.nbytes, "u1")
    if dtype.names is None and dtype.kind in "bfcOSUMm":
        plain = np.arange(1, array.size + 1)
        values = plain % 2 if dtype.kind == "b" else plain.astype("i8" if dtype.kind in "Mm" else dtype)
        array[...] = values.astype(dtype).reshape(shape)
    elif array.size:
        flat = np.frombuffer(raw.tobytes(), dtype)
        array[...] = flat.reshape(shape)
    return array


def same(got, expected):
    """Equal in value, shape, dtype and kind."""
    assert type(got) is type(expected)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert repr(got.tolist()) == repr(expected.tolist())  # (there are NaNs, and tuples of arrays)


def basic(shape):
    return hnp.basic_indices(shape, min_dims=0, max_dims=6, allow_newaxis=True, allow_ellipsis=True)


def check_basic_index(conn, data, shape, dtype, order):
    index = data.draw(basic(shape), "index")
    model = filled(shape, dtype, order)
    A = dz.ZBigArray(shape, dtype, order)
    if data.draw(st.booleans(), "stored"):
        conn.add(A)
    A[...] = model
    assert (A.shape, A.dtype, A.order, A.ndim, A.size, A.nbytes) == (
        shape, dtype, order, model.ndim, model.size, model.nbytes,
    )  # fmt: skip
    expected = model[index]
    same(A[index], expected)
    whole = A[...]
    assert whole.strides == model.strides or 0 in shape
    if isinstance(expected, np.ndarray):
        assert A[index].flags.writeable
        if expected.size:
            assert A[index].strides == expected.strides
    # change what is selected, by the array and by a view
    new = filled(model.shape, dtype, order, seed=1)[index]
    A[index] = new
    model[index] = new
    same(A[...], model)
    same(whole, model)
    if isinstance(expected, np.ndarray):
        view = A[index]
        view[...] = np.zeros((), dtype)
        model[index] = np.zeros((), dtype)
        same(whole, model)
    conn.transaction_manager.abort()


@given(st.data(), shapes, dtypes, st.sampled_from("CF"))
def test_basic_indices(conn, data, shape, dtype, order):
    check_basic_index(conn, data, shape, dtype, order)


@pytest.mark.slow
@settings(max_examples=2500)
@given(st.data(), shapes, dtypes, st.sampled_from("CF"))
def test_ten_thousand_indices(conn, data, shape, dtype, order):
    for _ in range(4):  # of one array each: to draw shapes takes longer than to check
        check_basic_index(conn, data, shape, dtype, order)


def one_axis(n, length):
    """What may stand for an axis of length `n`; arrays have `length` elements, so that they fit together."""
    integers = hnp.arrays(np.intp, length, elements=st.integers(-n, n - 1))
    masks = st.permutations([True] * min(length, n) + [False] * max(n - length, 0)).map(np.array)
    return st.one_of(st.slices(n), st.integers(-n, n - 1), integers, integers.map(np.ndarray.tolist), masks)


@st.composite
def mixed(draw, shape):
    """Lists, integer arrays and masks among slices, integers, Ellipsis and newaxis."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.one_of(hnp.arrays(np.bool_, shape), st.booleans(), hnp.integer_array_indices(shape)))
    length = draw(st.integers(0, 3))
    parts = [draw(one_axis(n, length)) for n in shape[: draw(st.integers(1, len(shape)))]]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), None)
    if draw(st.booleans()):
        parts.append(...)
    return tuple(parts)


def check_advanced_index(data, shape, dtype, order):
    model = filled(shape, dtype, order)
    A = dz.ZBigArray(shape, dtype, order)
    A[...] = model
    index = data.draw(mixed(shape), "index")
    try:
        expected = model[index]
    except IndexError:
        with pytest.raises(IndexError):
            A[index]
        with pytest.raises(IndexError):
            A[index] = np.zeros((), dtype)
        return
    got = A[index]
    same(got, expected)
    if isinstance(expected, np.ndarray):
        assert got.flags.writeable
        got[...] = filled(model.shape, dtype, order, seed=2)[index]  # a copy, or a view, as NumPy's
        expected[...] = filled(model.shape, dtype, order, seed=2)[index]
        same(A[...], model)
    new = filled(model.shape, dtype, order, seed=1)[index]  # (where an element is named twice, the last counts)
    A[index] = new
    model[index] = new
    same(A[...], model)
    A[index] = np.zeros((), dtype)
    model[index] = np.zeros((), dtype)
    same(A[...], model)


sizable = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@given(st.data(), sizable, dtypes, st.sampled_from("CF"))
def test_advanced_indices(data, shape, dtype, order):
    check_advanced_index(data, shape, dtype, order)


@pytest.mark.slow
@settings(max_examples=5_000)
@given(st.data(), sizable, dtypes, st.sampled_from("CF"))
def test_thousands_of_advanced_indices(data, shape, dtype, order):
    check_advanced_index(data, shape, dtype, order)


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), st.sampled_from("CF"))
def test_views_alias(data, shape, order):
    A, model = dz.ZBigArray(shape, "i4", order), np.zeros(shape, "i4", order)
    chains = []
    for _ in range(3):
        index = data.draw(basic(shape))
        chains.append((A[index], model[index]))
    for k, (mine, theirs) in enumerate(chains):
        if isinstance(mine, np.ndarray):
            mine[...] = k + 1
            theirs[...] = k + 1
    for mine, theirs in chains:
        if isinstance(mine, np.ndarray):
            same(mine, theirs)
    same(A[...], model)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1)])
@pytest.mark.parametrize("order", "CF")
def test_odd_shapes(shape, order):
    A, a = dz.ZBigArray(shape, "i4", order), np.zeros(shape, "i4", order)
    A[...] = 5
    a[...] = 5
    same(A[...], a)
    same(np.asarray(A), a)
    A[()] = 6
    a[()] = 6
    same(A[()], a[()])
    same(A[None], a[None])
    if shape:
        assert len(A) == len(a)
        same(A[::-1], a[::-1])
    else:
        with pytest.raises(TypeError):
            len(A)
        with pytest.raises(TypeError):
            iter(A)


def test_zero_dimensional_view_aliases():
    A = dz.ZBigArray((), "f8")
    view = A[...]
    assert view.shape == ()
    A[()] = 3
    assert view[()] == 3
    assert A[()] == np.float64(3)
    assert type(A[()]) is np.float64


def test_assignment():
    A, a = dz.ZBigArray((4, 5), "i4"), np.zeros((4, 5), "i4")
    for array in (A, a):
        array[3] = 7
        array[1, 1] = -1
        array[0] = range(5)
        array[:, 2] = [[1], [2], [3], [4]][0]
        array[2:, ::-2] = np.arange(3)
        array[..., -1] = 9
        array[np.int64(2), np.uint8(3)] = 11
        array[2:2] = 1
    same(A[...], a)
    for index, value in [(0, [1, 2]), (..., np.zeros((5, 4))), ((0, 0), [1, 2])]:
        with pytest.raises(ValueError):
            A[index] = value
    same(A[...], a)


def test_assignment_of_itself():
    A = dz.ZBigArray(1000, "i4")
    A[...] = np.arange(1000)
    A[1:] = A[:-1]
    assert A[...].tolist() == [0, *range(999)]


def test_iteration():
    A = dz.ZBigArray((3, 2), "i4")
    A[...] = [[1, 2], [3, 4], [5, 6]]
    assert [row.tolist() for row in A] == [[1, 2], [3, 4], [5, 6]]
    next(iter(A))[0] = 9
    assert A[0, 0] == 9


def test_as_an_array():
    A = dz.ZBigArray((3, 2), "i4")
    A[...] = 5
    view = np.asarray(A)
    view[0, 0] = 1
    assert A[0, 0] == 1
    copy = np.array(A)
    copy[...] = 0
    assert A[0, 0] == 1
    assert np.asarray(A, "f8").dtype == "f8"
    np.asarray(A, "f8")[...] = 0
    assert A[0, 0] == 1
    assert np.array(A, copy=False)[0, 0] == 1
    with pytest.raises(ValueError, match="copy"):
        np.array(A, "f8", copy=False)
    assert np.mean(A) == np.mean(view)
    assert (np.sum(A, axis=0) == view.sum(0)).all()


def test_repr_reads_nothing():
    assert repr(dz.ZBigArray((1 << 30, 1 << 10), "f8", "F")) == (
        "<ZBigArray shape=(1073741824, 1024) dtype=float64 order='F'>"
    )


def test_system_calls_on_a_view():
    A = dz.ZBigArray(3 << 20, "u1")
    A[:] = 3
    assert io.BytesIO().write(A[:]) == 3 << 20


# -- size


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["resize", "append", "write"]), st.integers(0, 7)), max_size=8),
    st.sampled_from("CF"),
    st.integers(1, 3),
)
def test_sizes(conn, steps, order, ndim):
    """Resize and append along the major axis, within a transaction or over several."""
    axis = 0 if order == "C" else ndim - 1

    def shaped(n):
        shape = [2, 3, 2][:ndim]
        shape[axis] = n
        return tuple(shape)

    A, a = dz.ZBigArray(shaped(3), "i4", order), np.zeros(shaped(3), "i4", order)
    conn.root()["sizes"] = A
    for value, (kind, n) in enumerate(steps, 1):
        if kind == "resize":
            A.resize(shaped(n))
            bigger = np.zeros(shaped(n), "i4", order)
            keep = [slice(None)] * ndim
            keep[axis] = slice(min(n, a.shape[axis]))
            bigger[tuple(keep)] = a[tuple(keep)]
            a = bigger
        elif kind == "append":
            A.append(np.full(shaped(n), value))
            a = np.concatenate([a, np.full(shaped(n), value, "i4")], axis)
        else:
            A[...] = value
            a[...] = value
            if n % 2:
                conn.transaction_manager.commit()
        assert A.shape == a.shape
        assert A[...].tolist() == a.tolist()
    conn.transaction_manager.commit()
    conn.cacheMinimize()
    assert A[...].tolist() == a.tolist()


def test_old_views_keep_their_size_and_alias():
    A = dz.ZBigArray((4, 2), "i4")
    old = A[...]
    old[...] = 1
    A.append([[2, 2]])
    new = A[...]
    assert (old.shape, new.shape) == ((4, 2), (5, 2))
    old[0] = 7
    new[1] = 8
    assert new[0].tolist() == [7, 7]
    assert old[1].tolist() == [8, 8]
    A.resize((100_000, 2))
    A[99_999] = 3
    new[0] = 9
    assert A[0, 0] == old[0, 0] == 9


def test_what_was_cut_off_is_gone():
    A = dz.ZBigArray(3000, "i4")
    A[:] = 5
    old = A[:]
    A.resize(1000)
    old[2000] = 6  # it still has its size, but nobody sees what is written there
    A.resize(3000)
    assert A[:1000].tolist() == [5] * 1000
    assert not A[1000:].any()


def test_append_of_wrong_things_changes_nothing():
    A = dz.ZBigArray((2, 3), "i4")
    A[...] = 1
    for values, error in [
        ([1, 2, 3], dz.ShapeError),
        ([[1, 2]], dz.ShapeError),
        (5, dz.ShapeError),
        ([[1.5, 2, 3]], dz.DTypeError),
        ([["a", "b", "c"]], dz.DTypeError),
        ([[1, 2], [3]], ValueError),
    ]:
        with pytest.raises(error):
            A.append(values)
        assert A.shape == (2, 3)
    A.append(np.zeros((0, 3), "i8"))
    assert A.shape == (2, 3)
    A.append(A[:1])
    assert A[...].tolist() == [[1, 1, 1]] * 3
    with pytest.raises(dz.ShapeError):
        dz.ZBigArray(()).append(1)


def test_resize_to_nothing_and_back():
    A = dz.ZBigArray((2, 3), "i4")
    A[...] = 1
    A.resize((0, 3))
    assert A.shape == (0, 3)
    A.append([[1, 2, 3]])
    assert A[...].tolist() == [[1, 2, 3]]


# -- bad input


OVERLAPPING = {"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2]}
DISORDERED = {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 0]}


@pytest.mark.parametrize(
    "dtype", ["O", [("a", "O")], "nonsense", "S", "U0", "V", ("O", (2,)), "T", OVERLAPPING, DISORDERED], ids=repr
)
def test_dtypes_refused(dtype):
    with pytest.raises(dz.DTypeError) as info:
        dz.ZBigArray(3, dtype)
    assert isinstance(info.value, TypeError)


@pytest.mark.parametrize("shape", [-1, (2, -1), 1.5, "3", None, (1, "2"), 1 << 63, (1 << 40, 1 << 40)], ids=repr)
def test_shapes_refused(shape):
    with pytest.raises(dz.ShapeError) as info:
        dz.ZBigArray(shape)
    assert isinstance(info.value, ValueError)
    A = dz.ZBigArray(3)
    A[:] = 1
    with pytest.raises(dz.ShapeError):
        A.resize(shape)
    assert A[:].tolist() == [1, 1, 1]


def test_order_refused():
    with pytest.raises(dz.ShapeError, match="'K'"):
        dz.ZBigArray(3, order="K")


@pytest.mark.parametrize(
    "index", [10, -11, -15, (0, 0, 0), (..., ...), "a", 1.0, {}, (0, "a"), [20], slice("a"), [[True]]], ids=repr
)
def test_indices_refused(index):
    A, a = dz.ZBigArray((10, 3)), np.zeros((10, 3))
    with pytest.raises((IndexError, TypeError)) as theirs:
        a[index]
    with pytest.raises(theirs.type):
        A[index]
    with pytest.raises(theirs.type):
        A[index] = 1


@pytest.mark.parametrize("index", [10, -11, -15, (0, 0, 0), (..., ...)], ids=repr)
def test_index_errors_are_ours(index):
    with pytest.raises(dz.IndexingError) as info:
        dz.ZBigArray((10, 3))[index]
    assert isinstance(info.value, IndexError)
    assert isinstance(info.value, dz.ZBigError)


def test_too_large_for_the_address_space():
    A = dz.ZBigArray((1 << 62) - 1, "u1")
    with pytest.raises(dz.WindowError, match="address space") as info:
        A[:]
    assert isinstance(info.value, MemoryError)
    A[-1] = 7
    assert A[(1 << 62) - 2] == 7
    assert A[-3:].tolist() == [0, 0, 7]
    assert A[:3].tolist() == [0, 0, 0]


# -- in every kind of database, at every stage of an array's life


def test_a_new_array_outlives_an_abort(clients):
    client = clients.connect()
    A = dz.ZBigArray(10, "i4")
    A[:] = 1
    client.abort()
    assert A[:].tolist() == [1] * 10  # it was in no transaction
    client.root["A"] = A
    client.commit()
    assert clients.connect(other=True).root["A"][:].tolist() == [1] * 10


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
def test_dtypes_are_stored(local, dtype):
    model = filled((5, 4), np.dtype(dtype), "F")
    local.new((5, 4), dtype, "F")
    client = local.connect()
    client.root["A"][...] = model
    client.commit()
    client.close()
    again = local.connect()
    again.connection.cacheMinimize()
    same(again.root["A"][...], model)


def test_metadata_of_a_dtype_is_left_out(local, recwarn):
    local.new(3, np.dtype("f8", metadata={"unit": "m"}))
    assert local.connect().root["A"].dtype.metadata is None
    assert not [w for w in recwarn if "metadata" in str(w.message)]


class Labelled(dz.ZBigArray):
    """A class of a user, with an attribute of its own."""

    def __init__(self, *args, label, **options):
        super().__init__(*args, **options)
        self.label = label


def test_other_attributes_are_stored(clients):
    client = clients.connect()
    client.root["A"] = A = Labelled(10, "i4", label="first")
    client.root["B"] = B = dz.ZBigArray(10, "i4")
    A[:] = 3
    B.unit, B.of, B._v_cached = "kg", A, 1
    client.commit()
    other = clients.connect(other=True)
    A2, B2 = other.root["A"], other.root["B"]
    assert (type(A2), A2.label, A2[3]) == (Labelled, "first", 3)
    assert (B2.unit, B2.of is A2, hasattr(B2, "_v_cached")) == ("kg", True, False)
    B2.unit = "g"
    other.abort()
    assert B2.unit == "kg"
    del B2.unit, B2.of
    other.commit()
    client.begin()
    assert not hasattr(B, "unit")
    assert B.shape == (10,)


def test_items_larger_than_a_block(local):
    local.new(3, "V5000000")
    client = local.connect()
    A = client.root["A"]
    raw = A[:].view("u1")
    raw[7_000_000] = 5
    client.commit()
    client.connection.cacheMinimize()
    assert np.flatnonzero(clients_view(local)).tolist() == [7_000_000]


def clients_view(clients):
    return np.asarray(clients.connect().root["A"][:]).view("u1")


def test_prefetch(clients):
    clients.new((1000, 1000), "f8")
    client = clients.connect()
    client.root["A"][...] = np.arange(1000)
    client.commit()
    other = clients.connect(other=True)
    A = other.root["A"]
    A.prefetch(np.s_[10:20])
    A.prefetch()
    A.prefetch((0, 0))
    A.prefetch(np.s_[5:5])
    assert A[19].tolist() == list(range(1000))
    with pytest.raises(dz.IndexingError):
        A.prefetch(1000)
