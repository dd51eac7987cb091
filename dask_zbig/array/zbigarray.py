"""`ZBigArray`: an N-dimensional array whose bytes lie in a `ZBigFile`."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from persistent import Persistent

from dask_zbig.array.indexing import Geometry, is_basic, locate, strides_of
from dask_zbig.errors import CopyError, DTypeError, ShapeError
from dask_zbig.openfile import OpenFile
from dask_zbig.storage.format import VERSION, unpack_state
from dask_zbig.storage.tree import ZBigFile
from dask_zbig.transaction import open_file

__all__ = ["ZBigArray"]

MAX_BYTES = 1 << 63


class ZBigArray(Persistent):  # type: ignore[misc]
    """A transactional array, stored in ZODB, as large as you like; used like an ndarray.

    A slice of it is a real `numpy.ndarray`, a view: bytes load when they are touched, and what is written to a
    view changes the array, for this connection, until ``transaction.commit()`` saves all changes atomically or
    ``transaction.abort()`` discards them.

    Parameters
    ----------
    shape : int or sequence of int
        The elements along each axis. May be empty (one element) or contain zeros.
    dtype : dtype-like, default "f8"
        Anything but object.
    order : {"C", "F"}
        Row-major or column-major. The *major axis* is the first (C) or last (F): that is what `append` extends.

    Raises
    ------
    DTypeError
        For a dtype that has no bytes of its own, such as ``object``.
    ShapeError
        For negative or non-integer lengths, or more than 2^63 bytes.

    Notes
    -----
    As all persistent objects it belongs to one connection and is used by one thread at a time; its views may be
    used by any number of threads. Takes no space until it is written to.

    Examples
    --------
    >>> import dask_zbig as dz, transaction, ZODB
    >>> db = ZODB.DB(None)  # in memory; dz.open("file.fs") for a file
    >>> conn = db.open()
    >>> conn.root()["A"] = A = dz.ZBigArray((1000, 1000), "f8")
    >>> A[10:20] = 5
    >>> transaction.commit()
    >>> a = A[:, 3]
    >>> a[10] = 7
    >>> float(A[10, 3]), float(A[11, 3])
    (7.0, 5.0)
    >>> transaction.abort()
    >>> float(a[10])
    5.0
    >>> conn.close(); db.close()
    """

    def __init__(self, shape: int | Sequence[int], dtype: npt.DTypeLike = "f8", order: str = "C") -> None:
        self._dtype = _checked_dtype(dtype)
        self._shape = _checked_shape(shape, self._dtype.itemsize)
        if order not in ("C", "F"):
            raise ShapeError(f"order must be 'C' or 'F', not {order!r}")
        self._order = order
        self._file = ZBigFile()
        self._file.reserve(self.nbytes)

    # -- persistence

    def __getstate__(self) -> tuple[Any, ...]:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        return (VERSION, self._shape, descr, self._order, self._file)

    def __setstate__(self, state: Any) -> None:
        shape, descr, self._order, self._file = unpack_state(self, state, 4)
        self._shape = tuple(shape)
        self._dtype = np.lib.format.descr_to_dtype(descr)

    def __copy__(self) -> ZBigArray:
        raise CopyError(
            f"{self!r} cannot be copied by copy.copy: make another array, B = ZBigArray(A.shape, A.dtype, A.order), "
            f"and assign, B[...] = A"
        )

    def __deepcopy__(self, memo: Any) -> ZBigArray:
        return self.__copy__()

    def _open(self) -> OpenFile:
        file = self._file  # (loads this object, if need be)
        return open_file(file, self, self._p_jar if self._p_jar is not None else file._p_jar)

    # -- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each axis. Set it by `resize`."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The elements' type."""
        return self._dtype

    @property
    def order(self) -> str:
        """ "C" or "F"."""
        return self._order

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self._shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self._shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self._dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements; not what it takes on disk, which is less where nothing was written."""
        return self.size * self._dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes to step along each axis."""
        return strides_of(self._shape, self.itemsize, self._order)

    @property
    def granule(self) -> int:
        """Bytes that change, and conflict, together."""
        return self._dtype.itemsize

    @property
    def major_axis(self) -> int:
        """The axis that `append` extends: 0 in C order, the last in F order."""
        return 0 if self._order == "C" else self.ndim - 1

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len() of unsized object")
        return self._shape[0]

    def __repr__(self) -> str:
        return f"<ZBigArray shape={self.shape} dtype={self.dtype} order={self.order!r}>"

    # -- access

    def __getitem__(self, index: Any) -> Any:
        """A view of the elements that a basic index selects; a copy, for an advanced one.

        Raises
        ------
        IndexingError
            As NumPy's IndexError.
        LoadError
            If a single element was asked for and cannot be loaded. (A view's bytes load when they are touched.)
        """
        if not is_basic(index):
            return self._view(self._locate(...))[index]
        where = self._locate(index)
        if where.shape or _has_ellipsis(index):
            return self._view(where)
        self._open().prefetch(where.lo, where.hi)
        return self._view(where)[()]

    def __setitem__(self, index: Any, value: Any) -> None:
        """Change elements, in this transaction."""
        if is_basic(index):
            self._view(self._locate(index))[...] = value
        else:
            self._view(self._locate(...))[index] = value

    def __iter__(self) -> Iterator[Any]:
        if not self._shape:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """All of it as an ndarray: a view, unless another dtype or a copy is asked for."""
        view = self[...]
        if dtype is not None and np.dtype(dtype) != self.dtype:
            if copy is False:
                raise ValueError(f"a view of {self!r} as {np.dtype(dtype)} needs a copy")
            return np.asarray(view, dtype)
        return np.array(view) if copy else np.asarray(view)

    def prefetch(self, index: Any = ...) -> None:
        """Bring the bytes of a basic index here now, by ordinary calls with ordinary exceptions.

        Afterwards reading them takes no fault, and system calls on a view of them work.

        Raises
        ------
        LoadError
            If they cannot be loaded.
        """
        where = self._locate(index)
        if where.lo < where.hi:
            self._open().prefetch(where.lo, where.hi)

    def _locate(self, index: Any) -> Geometry:
        return locate(index, self._shape, self._dtype.itemsize, self._order)

    def _view(self, where: Geometry) -> npt.NDArray[Any]:
        if where.lo == where.hi:
            return np.empty(where.shape, self._dtype)
        return self._open().view(where.lo, where.hi, where.position, where.shape, self._dtype, where.strides)

    # -- size

    def resize(self, shape: int | Sequence[int]) -> None:
        """Change the shape, in this transaction. Takes the same time whatever the sizes.

        The elements keep their places in memory order, so this keeps their indices only if no axis but the
        major one changes. What is cut off is gone: growing again reads zeros. Old views keep their size.

        Raises
        ------
        ShapeError
            As for a new array.
        """
        new = _checked_shape(shape, self.itemsize)
        if new == self._shape:
            return  # nor shall the object be stored again, and conflict
        old_bytes = self.nbytes
        new_bytes = math.prod(new) * self.itemsize
        opened = self._open()
        opened.enter()
        if new_bytes < old_bytes:
            opened.truncate(new_bytes)
        elif new_bytes > old_bytes:
            # Nothing should lie there, but a concurrent transaction may have written what another one cut off.
            if self._file.ends_by(old_bytes):
                opened.clear_beyond(old_bytes)
            else:
                opened.truncate(old_bytes)
            self._file.reserve(new_bytes, old_bytes)
        self._shape = new

    def append(self, values: npt.ArrayLike) -> None:
        """Add elements at the end of the major axis, in this transaction, at a cost in proportion to them.

        Parameters
        ----------
        values : array_like
            Of this array's shape but for the major axis.

        Raises
        ------
        ShapeError
            If it has another shape. The array is as before.
        DTypeError
            If it cannot be cast to the array's dtype by the rule "same_kind".
        """
        new = self._as_values(values)
        if not self._shape:
            raise ShapeError("cannot append to a 0-dimensional array")
        axis = self.major_axis
        rest = self._shape[:axis] + self._shape[axis + 1 :]
        if new.ndim != self.ndim or new.shape[:axis] + new.shape[axis + 1 :] != rest:
            raise ShapeError(f"cannot append values of shape {new.shape} along axis {axis} to {self!r}")
        if not np.can_cast(new.dtype, self._dtype, "same_kind"):
            raise DTypeError(f"cannot append {new.dtype} values to {self!r}: not castable by 'same_kind'")
        before = self._shape
        at = before[axis]
        self.resize((*before[:axis], at + new.shape[axis], *before[axis + 1 :]))
        try:
            where: list[Any] = [slice(None)] * self.ndim
            where[axis] = slice(at, None)
            self[tuple(where)] = new
        except BaseException:
            self.resize(before)
            raise

    def _as_values(self, values: npt.ArrayLike) -> npt.NDArray[Any]:
        """`values` as an ndarray; integers that come as Python's take this array's dtype, if they fit."""
        new = np.asarray(values)
        if hasattr(values, "dtype") or new.dtype.kind not in "iu" or self._dtype.kind not in "iu":
            return new
        try:
            return np.asarray(values, self._dtype)
        except OverflowError as e:
            raise DTypeError(f"a value does not fit {self!r}: {e}") from e


def _has_ellipsis(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, tuple) and any(part is Ellipsis for part in index))


def _checked_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    try:
        checked = np.dtype(dtype)
    except TypeError as e:
        raise DTypeError(f"{dtype!r} is no dtype: {e}") from e
    if checked.hasobject:
        raise DTypeError(
            f"dtype {checked} holds Python objects, whose pointers mean nothing on disk; "
            f"store such objects in ZODB itself"
        )
    if checked.subdtype is not None:
        raise DTypeError(f"dtype {checked} is a sub-array: give its axes as part of the shape")
    if checked.itemsize == 0:
        raise DTypeError(f"dtype {checked} has elements of no bytes; give a length, such as 'S10'")
    return checked


def _checked_shape(shape: int | Sequence[int], itemsize: int) -> tuple[int, ...]:
    try:
        parts = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        checked = tuple(operator.index(n) for n in parts)
    except TypeError as e:
        raise ShapeError(f"a shape is an int or a sequence of ints, not {shape!r}") from e
    if any(n < 0 for n in checked):
        raise ShapeError(f"negative length in shape {checked}")
    if math.prod(checked) * itemsize >= MAX_BYTES:
        raise ShapeError(f"shape {checked} with {itemsize} bytes an element exceeds 2^63 bytes")
    return checked
