"""Arrays of ours in the place of an ndarray: operators, methods, NumPy's functions. Each against a view."""

from __future__ import annotations

import copy
import operator
import os
import pickle
import subprocess
import sys

import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dask_zbig as dz

CLASSES = [dz.ZBigArray, dz.RAMArray]


@pytest.fixture(params=CLASSES)
def cls(request):
    return request.param


def pair(cls, shape=(4, 3), dtype="f8", order="C", low=1):
    """An array of this class and an equal ndarray."""
    model = np.zeros(shape, dtype, order)
    model[...] = (np.arange(low, low + model.size)[::-1] % 7 - 2).reshape(shape)
    array = cls(shape, dtype, order)
    array[...] = model
    return array, model


def same(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, (np.ndarray, np.generic)):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
    np.testing.assert_array_equal(got, expected)


BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
]  # fmt: skip
OF_INTEGERS = [operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift]
UNARY = [operator.neg, operator.pos, abs, operator.invert]


@pytest.mark.parametrize("op", BINARY + OF_INTEGERS)
@pytest.mark.parametrize("order", "CF")
def test_operators(cls, op, order):
    dtype = "i4" if op in OF_INTEGERS else "f8"
    A, a = pair(cls, dtype=dtype, order=order)
    B, b = pair(cls, dtype=dtype, low=5)
    with np.errstate(all="ignore"):
        for theirs, ours in [(b, B), (b, b), (2, 2), (b[0], b[0]), (b[0].tolist(), b[0].tolist())]:
            same(op(A, ours), op(a, theirs))
            same(op(ours, A), op(theirs, a))


@pytest.mark.parametrize("op", UNARY)
def test_unary_operators(cls, op):
    A, a = pair(cls, dtype="i4")
    same(op(A), op(a))


@pytest.mark.parametrize(
    "name", ["iadd", "isub", "imul", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift"]
)
def test_operators_in_place(cls, name):
    A, a = pair(cls, dtype="i8")
    old, view, op = A, A[1:], getattr(operator, name)
    for value in (3, a[0].copy(), view[1]):
        with np.errstate(divide="ignore"):
            a, A = op(a, np.array(value)), op(A, value)
        assert A is old
        same(A[...], a)
        same(view, a[1:])


def test_divmod_and_matmul(cls):
    A, a = pair(cls)
    same(A @ A.T, a @ a.T)
    same(a.T @ A, a.T @ a)
    for got, expected in zip(divmod(A, 2), divmod(a, 2), strict=True):
        same(got, expected)


def test_errors_are_numpys(cls):
    A, a = pair(cls, dtype="i4")
    for change in (lambda x: x.__iadd__(1.5), lambda x: operator.iadd(x, [1, 2]), lambda x: x + np.zeros(7)):
        with pytest.raises((TypeError, ValueError)) as theirs:
            change(a)
        with pytest.raises(theirs.type):
            change(A)
    same(A[...], a)


METHODS = [
    ("all",), ("all", 0), ("any", 1), ("argmax",), ("argmin", 1), ("argsort",), ("astype", "f4"), ("byteswap",),
    ("clip", 0, 2), ("compress", [True, False, True], 0), ("conj",),
    ("conjugate",), ("cumprod", 0), ("cumsum",), ("diagonal",), ("dot", [[1], [2], [3]]), ("flatten", "F"), ("item", 3),
    ("max", 0), ("mean",), ("mean", 0), ("min", 1), ("nonzero",), ("prod", 1), ("ravel",), ("repeat", 2, 1),
    ("reshape", -1), ("reshape", (2, 6), ), ("reshape", 3, 4), ("round", 1), ("squeeze",), ("std",), ("sum",),
    ("sum", 0), ("swapaxes", 0, 1), ("take", [1, 0, 1], 0), ("tobytes",), ("tolist",), ("trace",), ("transpose",),
    ("transpose", 1, 0), ("var", 1), ("view", "u8"), ("argpartition", 1),
]  # fmt: skip


@pytest.mark.parametrize("call", METHODS, ids=str)
@pytest.mark.parametrize("order", "CF")
def test_methods(cls, call, order):
    A, a = pair(cls, dtype="i8", order=order)
    name, *args = call
    got, expected = getattr(A, name)(*args), getattr(a, name)(*args)
    if isinstance(expected, tuple):
        for mine, theirs in zip(got, expected, strict=True):
            same(mine, theirs)
    else:
        same(got, expected)


def test_every_public_name_of_an_ndarray_is_here_or_explained(cls):
    A, a = pair(cls)
    missing = {n for n in dir(a) if not n.startswith("_") and not hasattr(A, n)}
    assert missing == {
        "base", "copy", "ctypes", "data", "device", "dump", "dumps", "getfield", "setfield", "setflags", "to_device",
    }  # fmt: skip
    for name in missing:
        with pytest.raises(AttributeError, match=r"copy in memory|owns its elements|A\[\.\.\.\]\." + name):
            getattr(A, name)
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        _ = A.nonsense


def test_methods_that_change(cls):
    A, a = pair(cls, dtype="i8")
    for x in (A, a):
        x.fill(3)
        x.put([0, 5], [-1, 9])
        x[2] = [3, 1, 2]
        x.sort(axis=1)
        x.partition(1, axis=0)
        x.flat[4] = 77
        x.real[0, 0] = 5
    same(A[...], a)


def test_attributes(cls):
    A, a = pair(cls, shape=(2, 3, 4), dtype="c16", order="F")
    for name in ("T", "mT", "real", "imag", "shape", "dtype", "size", "ndim", "itemsize", "nbytes", "strides"):
        same(getattr(A, name), getattr(a, name))
    assert A.flags.f_contiguous
    assert list(A.flat) == list(a.flat)
    A.imag[...] = 8
    assert (A[...].imag == 8).all()
    assert len(A) == 2
    with pytest.raises(AttributeError):
        A.shape = (24,)


FUNCTIONS = [
    np.mean, np.sum, np.std, np.median, np.sort, np.unique, np.cumsum, np.transpose, np.ravel, np.shape, np.ndim,
    np.size, np.sqrt, np.isfinite, np.diff, np.gradient, np.argwhere, np.flipud, np.atleast_3d, np.zeros_like,
    np.linalg.norm, np.array_str, np.array2string, np.count_nonzero, np.ptp, np.amax, np.nan_to_num, np.fft.fft,
    np.histogram, np.isrealobj, np.sign,
    lambda x: np.concatenate([x, x], 1),
    lambda x: np.stack([x, x]),
    lambda x: np.where(x > 0, x, -x),
    lambda x: np.einsum("ij,ij->i", x, x),
    lambda x: np.tensordot(x, x, 2),
    lambda x: np.percentile(x, [10, 50], axis=0),
    lambda x: np.add.reduce(x, axis=1),
    lambda x: np.subtract.outer(x[0], x),
    lambda x: np.array_equal(x, x),
    lambda x: np.block([[x, x]]),
    lambda x: np.split(x, 2),
    lambda x: np.take_along_axis(x, np.argsort(x, 1), 1),
    lambda x: np.apply_along_axis(sum, 0, x),
    lambda x: x.astype("i4").choose([10, 20, 30], mode="wrap"),
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(cls, function):
    A, a = pair(cls)
    with np.errstate(all="ignore"):
        got, expected = function(A), function(a)
    if isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        for mine, theirs in zip(got, expected, strict=True):
            same(mine, theirs)
    else:
        same(got, expected)


def test_functions_that_change_an_argument(cls):
    A, a = pair(cls)
    mask = a > 0
    for x in (A, a):
        np.copyto(x, 5, where=~mask)
        np.putmask(x, mask, [1, 2, 3])
        np.place(x, mask, [7, 8])
        np.put(x, [0, 1], 3)
        np.fill_diagonal(x, -1)
        np.add.at(x, ([0, 0], [1, 1]), 10)
        np.add(x, 1, out=x)
        np.cumsum(x[...], axis=0, out=x)
        np.sum(x[...], axis=0, out=x[0])
        np.clip(x, 0, 20, out=x)
    same(A[...], a)
    assert np.add(a, 1, out=A) is A
    assert np.negative(A[...], A) is A
    quotient, rest = np.divmod(A, 2, out=(None, A))
    assert rest is A
    assert type(quotient) is np.ndarray


def test_python_protocols(cls):
    A, a = pair(cls)
    assert (3 in A) == (3 in a) is True
    assert 99 not in A
    assert [row.tolist() for row in A] == a.tolist() == A.tolist()
    for x in (A, a):
        with pytest.raises(ValueError, match="ambiguous"):
            bool(x)
        with pytest.raises(TypeError, match="unhashable"):
            hash(x)
    one = cls((1, 1), "i4")
    assert not one
    one[...] = 4
    assert one
    one = cls((), "i4")
    one[...] = 4
    assert (int(one), float(one), complex(one), [0, 1, 2, 3, "four"][one]) == (4, 4.0, 4 + 0j, "four")
    assert f"{one:03}" == "004"
    with pytest.raises(TypeError):
        int(A)


@pytest.mark.parametrize("dtype", ["i4", "U3", "V3", [("a", "i4"), ("b", "U2")]], ids=repr)
def test_equality_is_an_ndarrays(cls, dtype):
    """Also where the ufuncs have no loop: fields, raw bytes, and numbers with strings."""
    A, a = cls(3, dtype), np.zeros(3, dtype)
    other = np.zeros(3, dtype)
    other.view("u1")[1] = 49
    for x in (A, a):
        x[2:] = other[:1]
    for y in (other, A, a, a[0], *([] if a.dtype.kind == "V" else ["x", None])):
        mine = a if y is A else y
        same(y == A, a == mine)
        same(y != A, a != mine)
        same(y == A, mine == a)
    for compare in (operator.eq, operator.ne):
        for x in (A, a):
            with pytest.raises(ValueError, match="broadcast"):
                compare(x, np.zeros(4, dtype))


@pytest.mark.parametrize("shape", [(4, 3), (1,), ()], ids=repr)
def test_bytes_are_those_in_memory(cls, shape):
    A, a = pair(cls, shape, "i4", low=3)
    assert bytes(A) == bytes(a)


def test_as_an_array_of_a_dtype_without_length(cls):
    A = cls(2, "S3")
    assert np.shares_memory(np.asarray(A, "S"), A[...])
    copied = np.array(A, "S", copy=True)
    assert copied.dtype == "S3"
    assert not np.shares_memory(copied, A[...])
    with pytest.raises(ValueError, match="copy"):
        np.asarray(A, "U", copy=False)


def test_resize_to_no_shape_is_no_change(cls):
    A, a = pair(cls)
    A.resize()
    same(A[...], a)
    A.resize(())
    assert A.shape == ()


def test_texts(cls):
    A, a = pair(cls)
    assert repr(A) == f"<{cls.__name__} shape=(4, 3) dtype=float64 order='C'>"
    assert str(A) == f"{A}" == str(a)


def test_the_text_of_a_terabyte_reads_its_corners():
    A = dz.ZBigArray((1 << 20, 1 << 17), "f8")
    A[0, 0], A[-1, -1] = 5, 6
    assert str(A).startswith("[[5. 0. 0. ...")
    assert str(A).endswith("0. 0. 6.]]")
    huge = dz.ZBigArray(1 << 62, "u1")
    assert str(huge) == repr(huge)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(huge)


def test_with_other_libraries_arrays(cls):
    """Who else takes part in a call decides what comes out of it."""
    A, a = pair(cls)
    x = da.from_array(a, chunks=2)
    for lazy in (A + x, x + A, np.add(A, x), np.concatenate([A, x]), x @ A.T):
        assert isinstance(lazy, da.Array)
    np.testing.assert_array_equal((x + A).compute(), a + a)
    masked = np.ma.masked_less(a, 0)
    assert isinstance(A + masked, np.ma.MaskedArray)
    same(A == None, a == None)  # noqa: E711


@given(st.data())
def test_fields(data):
    dtype = np.dtype([("a", "u1"), ("b", "<f8", (2,)), ("c", "S3")], align=True)
    A, a = dz.ZBigArray((3, 2), dtype), np.zeros((3, 2), dtype)
    name = data.draw(st.sampled_from(["a", "b", "c"]))
    value = {"a": 7, "b": [1, 2], "c": b"xy"}[name]
    for x in (A, a):
        x[name] = value
        x[1][name] = x[0][name]
        x[2, 1] = (9, (3, 4), b"z")
    for index in (name, ["a", "c"], 1, (2, 1)):
        assert repr(A[index].tolist()) == repr(a[index].tolist())  # (tuples of arrays)
        assert A[index].dtype == a[index].dtype
    A[name][...] = np.zeros((), a[name].dtype)  # a view of the field
    assert A[name].tolist() == np.zeros_like(a[name]).tolist()


def test_a_dtype_with_axes_adds_them_to_the_shape(cls):
    A, a = cls(3, ("f4", (2, 5))), np.zeros(3, ("f4", (2, 5)))
    assert (A.shape, A.dtype) == (a.shape, a.dtype)
    with pytest.raises(dz.DTypeError, match="Python objects"):
        cls(3, ("O", (2,)))
    with pytest.raises(dz.ShapeError, match="65 axes"):
        cls((1,) * 65)


def test_append_casts_as_told(cls):
    A = cls(0, "i4")
    with pytest.raises(dz.DTypeError, match="same_kind"):
        A.append([1.5])
    A.append([1.5, 2.5], casting="unsafe")
    with pytest.raises(dz.DTypeError, match="safe"):
        A.append(np.zeros(1, "i8"), casting="safe")
    assert A.tolist() == [1, 2]


# -- in memory only


def test_ram_array_sizes():
    A = dz.RAMArray((4, 2), "i4")
    old = A[...]
    old[...] = 1
    A.append([[2, 2]] * 5000)
    new = A[...]
    old[0], new[1] = 7, 8
    assert A[:5].tolist() == [[7, 7], [8, 8], [1, 1], [1, 1], [2, 2]]
    new[3000] = 9
    A.resize(2, 2)
    new[4000] = 9  # where nobody sees it
    A.resize((6000, 2))
    assert A[:2].tolist() == [[7, 7], [8, 8]]
    assert not A[2:].any()
    assert len(new) == 5004
    A.prefetch()
    with pytest.raises(IndexError):
        A.prefetch(6000)


def test_ram_array_too_large():
    with pytest.raises(dz.WindowError, match="reserve"):
        dz.RAMArray(1 << 50)
    A = dz.RAMArray(10)
    A[:] = 1
    with pytest.raises(dz.WindowError, match="cannot grow"):
        A.resize(1 << 50)
    assert A.sum() == 10


def test_ram_array_is_copied_by_value():
    A = dz.RAMArray((2, 3), "i4", "F")
    A[...] = 5
    for B in (copy.copy(A), copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert (B.shape, B.dtype, B.order) == (A.shape, A.dtype, "F")
        B[...] += 1
        assert B.sum() == 36
    assert A.sum() == 30


def test_ram_array_in_a_forked_child_is_a_copy():
    code = """if True:
        import os
        import dask_zbig as dz
        A = dz.RAMArray(10, "i4")
        view = A[:]
        if not (pid := os.fork()):
            view[:] = 1
            os._exit(int(A.sum()))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 10
        assert A.sum() == 0
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=os.environ)
