"""`ZBigArray`: an N-dimensional array whose bytes lie in a `ZBigFile`."""

from __future__ import annotations

import copyreg
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from persistent import Persistent
from ZODB.utils import z64

from dask_zbig.ahead import ALL, LAZY, SOME
from dask_zbig.array.arraylike import NDArrayLike
from dask_zbig.array.indexing import Geometry, is_basic, locate, major_rows
from dask_zbig.array.resizable import ResizableArray, checked_dtype, checked_shape
from dask_zbig.assign import DIRECT, assign
from dask_zbig.errors import CopyError
from dask_zbig.openfile import OpenFile
from dask_zbig.patience import patiently
from dask_zbig.storage.format import VERSION, broken, unpack_state
from dask_zbig.storage.tree import ZBigFile, load
from dask_zbig.transaction import about_to_store, manager_of, open_file

__all__ = ["ZBigArray"]

_STATE = frozenset({"_dtype", "_file", "_order", "_shape"})


class ZBigArray(ResizableArray, Persistent):  # type: ignore[misc]
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
    used by any number of threads. Takes no space until it is written to. Other attributes that you give it, or that
    a subclass has, are stored with it, as with any persistent object.

    Two transactions that change the same element conflict, as a whole: also if they change different fields of it,
    or bytes of it that lie in different pages. An element larger than a page (4096 bytes) is the exception: of that
    only the parts that lie in the pages which were written conflict.

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
        self._begin(shape, dtype, order)
        self._file = ZBigFile()
        self._file.reserve(self.nbytes)

    # -- persistence

    def __getstate__(self) -> tuple[Any, ...]:
        if self._p_jar is not None and self._p_serial == z64:
            about_to_store(self._file, self, self._p_jar)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        state = (VERSION, self._shape, descr, self._order, self._file)
        others = {k: v for k, v in vars(self).items() if k not in _STATE and not k.startswith(("_p_", "_v_"))}
        return (*state, others) if others else state

    def __setstate__(self, state: Any) -> None:
        shape, descr, order, file, *others = unpack_state(self, state, 4, optional=1)
        try:
            dtype, inner = checked_dtype(np.lib.format.descr_to_dtype(descr))
            shape = checked_shape(shape, dtype.itemsize)
        except Exception as e:  # whatever NumPy makes of it. An object dtype would take bytes for addresses
            raise broken(self, f"has no shape and dtype, but {shape!r} and {descr!r}: {e}") from e
        if inner or order not in ("C", "F") or not isinstance(file, ZBigFile):
            raise broken(self, f"has fields of wrong types: {descr!r}, {order!r}, {type(file).__name__}")
        for attributes in others:
            if not isinstance(attributes, dict) or not _STATE.isdisjoint(attributes):
                raise broken(self, "has other attributes that are none")
            self.__dict__.update(attributes)
        self._shape, self._dtype, self._order, self._file = shape, dtype, order, file

    def __copy__(self) -> ZBigArray:
        raise CopyError(
            f"{self!r} cannot be copied by copy.copy: make another array, B = ZBigArray(A.shape, A.dtype, A.order), "
            f"and assign, B[...] = A"
        )

    def __deepcopy__(self, memo: Any) -> ZBigArray:
        return self.__copy__()

    def _shorten(self) -> None:
        """Let the next access go a short way, if it can."""
        path = self.__dict__.get("_v_path")
        if (path is None or path.window is None) and self._order == "C":
            self.__dict__["_v_path"] = self._open().short(self._shape, self._dtype)

    def _open(self) -> OpenFile:
        file = self._file  # (loads this object, if need be)
        return open_file(file, self, self._p_jar if self._p_jar is not None else file._p_jar)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle, not for ZODB: by reference, see `dask_zbig.cluster.source`. Subclasses, too."""
        return copyreg.dispatch_table[ZBigArray](self)

    @property
    def granule(self) -> int:
        """Bytes that change, and conflict, together: the size of an element."""
        return self._dtype.itemsize

    # -- access

    def __getitem__(self, index: Any) -> Any:
        """A view of the elements that a basic index selects; a copy, for an advanced one.

        Raises
        ------
        IndexingError
            As NumPy's IndexError.
        LoadError
            If a copy or a single element was asked for and cannot be loaded. (A view's bytes load when they are
            touched.)
        """
        path = self.__dict__.get("_v_path")  # (an attribute would have ZODB load the object, see `_load`)
        if path is not None:
            kind = index.__class__
            if kind is int:
                found = path.row(index)
            elif kind is slice:
                found = path.rows(index)
            else:
                found = path.item(index) if kind is tuple else None
            if found is not None:
                return found
        _load(self)
        if not is_basic(index):
            index = _in_memory(index)
            return self._picked(index).__getitem__(index)  # (a call: what happened in it is raised at its end)
        where = self._locate(index)
        if where.shape or _has_ellipsis(index):
            view = self._view(where)
            self._shorten()
            return view
        value = self._view(where, ALL)[()]
        self._shorten()
        return value

    def __setitem__(self, index: Any, value: Any) -> None:
        """Change elements, in this transaction. What was in a large contiguous region is not even looked at.

        Raises
        ------
        IndexingError, ValueError, TypeError
            As NumPy does.
        ScratchError
            If the disk is full. Nothing can be committed then; abort, or roll back to a savepoint.
        """
        if isinstance(value, NDArrayLike):
            value = value._values(ALL)
        path = self.__dict__.get("_v_path")
        if path is not None:
            kind = index.__class__
            if (kind is int and path.put((index,), value)) or (kind is tuple and path.put(index, value)):
                return
            view = path.rows(index) if kind is slice else None
            if view is not None and view.nbytes < DIRECT:
                view[...] = value
                return
        _load(self)
        if not is_basic(index):
            index = _in_memory(index)
            self._picked(index).__setitem__(index, value)  # (a call: what happened in it is raised at its end)
            return
        to = self._locate(index)
        assign(self._open(), to.lo, to.hi, to.position, to.shape, self._dtype, to.strides, value)

    def prefetch(self, index: Any = ..., *, writable: bool = False) -> None:
        """Bring the bytes of a basic index here now, by ordinary calls with ordinary exceptions.

        Afterwards reading them takes no fault, and system calls that read from a view of them work.

        Parameters
        ----------
        index : basic index
        writable : bool
            Make them writable as well, until the end of the transaction or the next savepoint: then system calls
            that write into a view work, such as ``file.readinto(view)`` and ``sock.recv_into(view)``, which else
            find memory that they may not write to (EFAULT). All from the first to the last byte of `index` is copied
            to scratch space for that, of which so much is needed. What is not changed is not stored; but of more than
            4 MiB in a row all that is further than 2 MiB from both ends counts as changed, as it does whenever so
            much was written.

        Raises
        ------
        LoadError
            If they cannot be loaded, though that was tried until the deadline where it might have helped.
        ScratchError
            If there is no room to make them writable. Nothing is lost, the transaction may go on.

        Examples
        --------
        >>> import dask_zbig as dz, io
        >>> A = dz.ZBigArray(8, "u1")
        >>> A.prefetch(np.s_[2:5], writable=True)
        >>> io.BytesIO(b"abc").readinto(A[2:5])
        3
        >>> A.tolist()
        [0, 0, 97, 98, 99, 0, 0, 0]
        """
        _load(self)
        where = self._locate(index)
        if where.lo < where.hi:
            self._open().prefetch(where.lo, where.hi, writable=writable)

    def _locate(self, index: Any) -> Geometry:
        return locate(index, self._shape, self._dtype.itemsize, self._order)

    def view_at(self, where: Geometry, dtype: np.dtype[Any], most: int = LAZY) -> npt.NDArray[Any]:
        """A view of some bytes, which must be inside of the array. For `ArrayRef`. `most`: see `ahead.bring`."""
        if where.lo == where.hi:
            return np.empty(where.shape, dtype)
        return self._open().view(where.lo, where.hi, where.position, where.shape, dtype, where.strides, most)

    def _view(self, where: Geometry, most: int = LAZY) -> npt.NDArray[Any]:
        return self.view_at(where, self._dtype, most)

    def _values(self, most: int) -> npt.NDArray[Any]:
        _load(self)
        return self._view(self._locate(...), most)

    def _picked(self, index: Any) -> npt.NDArray[Any]:
        """A view of all elements, of which those that an advanced index selects have been brought here."""
        where = self._locate(...)
        view = self._view(where)
        if where.lo == where.hi:
            return view
        opened = self._open()
        rows = major_rows(index, self._shape) if self._order == "C" and opened.lacks(where.lo, where.hi) else None
        if rows is None:
            opened.prefetch(where.lo, where.hi, SOME)
        else:
            for lo, hi in (rows * (self.nbytes // self._shape[0])).tolist():
                opened.prefetch(lo, hi)
        return view

    # -- size

    def resize(self, *shape: Any) -> None:
        """Change the shape, in this transaction. Takes the same time whatever the sizes.

        The elements keep their places in memory order, so this keeps their indices only if no axis but the
        major one changes. What is cut off is gone: growing again reads zeros. Old views keep their size.

        Parameters
        ----------
        *shape : int or sequence of int
            As for `numpy.ndarray.resize`: ``A.resize((3, 4))`` or ``A.resize(3, 4)``.

        Raises
        ------
        ShapeError
            As for a new array.
        """
        new = self._asked_shape(shape)
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
        opened.cool()


def _load(array: ZBigArray) -> None:
    """Load the object's state, if need be. Several threads may slice an array (Dask's do).

    While one of them loads it, by whatever attribute it asks for first, ZODB would show it half loaded to the others.
    """
    if array._p_changed is not False and array._p_jar is not None:
        with manager_of(array._p_jar).turn:
            patiently(lambda: load(array))


def _in_memory(index: Any) -> Any:
    """An index with ndarrays in place of arrays of ours."""
    if isinstance(index, tuple):
        return tuple(map(_in_memory, index))
    return index._values(ALL) if isinstance(index, NDArrayLike) else index


def _has_ellipsis(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, tuple) and any(part is Ellipsis for part in index))
