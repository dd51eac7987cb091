"""Indices to byte geometry, and blocks to runs of bytes, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dask_zbig.array.indexing import bounds, is_basic, locate, strides_of
from dask_zbig.cluster.store import runs_of
from dask_zbig.errors import IndexingError, ShapeError

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
orders = st.sampled_from("CF")


def ends(n):
    return st.none() | st.integers(-n - 3, n + 3)


@st.composite
def slices(draw, n):
    step = draw(st.none() | st.integers(-4, 4).filter(bool))
    return slice(draw(ends(n)), draw(ends(n)), step)


@st.composite
def indices(draw, shape):
    """A basic index that NumPy takes: a tuple, or its only part alone."""
    parts = []
    for n in shape[: draw(st.integers(0, len(shape)))]:
        ints = st.integers(-n, n - 1) if n else st.nothing()
        parts.append(draw(slices(n) | ints | ints.map(np.int64)))
    rest = shape[len(parts) :]
    if draw(st.booleans()):  # an ellipsis somewhere, and perhaps axes counted from the end
        tail = rest[len(rest) - draw(st.integers(0, len(rest))) :]
        parts.append(...)
        parts += [draw(slices(n)) for n in tail]
    for _ in range(draw(st.integers(0, 2))):
        parts.insert(draw(st.integers(0, len(parts))), None)
    return parts[0] if len(parts) == 1 and draw(st.booleans()) else tuple(parts)


@st.composite
def cases(draw):
    shape = draw(shapes)
    return shape, draw(orders), draw(indices(shape))


@example(((), "C", ()))
@example(((3, 0), "F", (slice(None, None, -1),)))
@given(cases())
def test_locate(case):
    shape, order, index = case
    itemsize = 4
    whole = np.zeros(shape, "i4", order)
    # number the elements by where they lie, and ask NumPy for what an index selects
    numbered = np.arange(whole.size).reshape(shape, order=order)
    expected = numbered[index]
    assert is_basic(index)
    got = locate(index, shape, itemsize, order)
    assert got.shape == np.shape(expected)
    if np.size(expected) == 0:
        assert got.lo == got.hi
        return
    buffer = np.arange(whole.size)
    at = np.lib.stride_tricks.as_strided(
        buffer[got.position // itemsize :], got.shape, [s // itemsize * buffer.itemsize for s in got.strides]
    )
    np.testing.assert_array_equal(at, expected)
    assert (got.lo, got.hi) == (expected.min() * itemsize, (expected.max() + 1) * itemsize)
    assert got.strides == (whole[index].strides if got.shape else ())


@given(shapes, orders)
def test_strides(shape, order):
    assert strides_of(shape, 8, order) == np.empty(shape, "f8", order).strides or 0 in shape


def test_bounds():
    assert bounds(100, (3, 2), (-10, 4), 4) == (80, 108)
    assert bounds(100, (3, 0), (-10, 4), 4) == (100, 100)
    assert bounds(100, (), (), 4) == (100, 104)


@pytest.mark.parametrize("index", [10, -11, (0, 0, 0), (..., ...), (..., 3), (0, -4), np.int64(10)], ids=repr)
def test_refused(index):
    array = np.zeros((10, 3))
    with pytest.raises(IndexError):
        array[index]
    with pytest.raises(IndexingError):
        locate(index, array.shape, 8, "C")


def test_of_ten_elements_index_minus_15_is_an_error():
    with pytest.raises(IndexingError, match="index -15 is out of bounds for axis 0 with size 10"):
        locate(-15, (10,), 8, "C")


def test_slice_step_zero():
    with pytest.raises(ValueError, match="zero"):
        locate(slice(None, None, 0), (10,), 8, "C")


@pytest.mark.parametrize("index", [[0], np.array([1]), True, np.True_, np.array(0), (0, [1]), "a", 1.0], ids=repr)
def test_advanced(index):
    assert not is_basic(index)


def test_larger_than_the_address_space():
    n = (1 << 62) - 1
    got = locate(slice(n - 2, None), (n,), 1, "C")
    assert (got.lo, got.hi, got.shape) == (n - 2, n, (2,))
    got = locate((5, slice(None, None, -1)), (1 << 40, 1 << 20), 4, "C")
    assert (got.lo, got.hi) == (5 << 22, 6 << 22)
    with pytest.raises(ShapeError):
        locate(0, (1 << 40, 1 << 20), 8, "C")


# -- runs


@given(cases())
def test_runs(case):
    shape, order, index = case
    itemsize = 4
    where = locate(index, shape, itemsize, order)
    if where.lo == where.hi:
        return
    block = np.random.default_rng(0).integers(1, 1 << 30, where.shape, "i4")
    starts, size, axes, flipped = runs_of(where.shape, where.position, where.strides, itemsize)
    starts = starts.tolist()
    assert sorted(set(starts)) == starts
    assert size * len(starts) == block.nbytes
    data = np.ascontiguousarray(np.flip(block, flipped).transpose(axes)).tobytes()
    flat = np.zeros(int(np.prod(shape)), "i4")
    raw = flat.view("u1")
    for k, start in enumerate(starts):
        raw[start : start + size] = np.frombuffer(data[k * size : (k + 1) * size], "u1")
    expected = np.zeros(shape, "i4", order)
    expected[index] = block
    np.testing.assert_array_equal(flat.reshape(shape, order=order), expected)


def test_runs_are_as_long_as_can_be():
    starts, size, _, _ = runs_of((4, 5), 0, (20, 4), 4)
    assert (starts.tolist(), size) == ([0], 80)
    starts, size, _, _ = runs_of((4, 3), 8, (20, 4), 4)
    assert (starts.tolist(), size) == ([8, 28, 48, 68], 12)
