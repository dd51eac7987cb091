"""A stored array at a snapshot, as a small picklable reference: what Dask's graphs hold, and pickled arrays become."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np

from dask_zbig import database
from dask_zbig.array.arraylike import NDArrayLike
from dask_zbig.array.indexing import Geometry, is_basic, locate, strides_of
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.chunk import Origin, open_chunk
from dask_zbig.errors import ClosedError, IndexingError, NotStoredError, PickleError, UncommittedChangesError
from dask_zbig.transaction import open_file

__all__ = ["ArraySnapshot", "ArraySource", "by_reference", "origin_of", "token"]


class ArraySource:
    """A picklable reference to a stored array at a snapshot, that Dask slices. Opens nothing before that."""

    __slots__ = ("dtype", "order", "origin", "shape")

    def __init__(self, origin: Origin, shape: tuple[int, ...], dtype: np.dtype[Any], order: str) -> None:
        self.origin = origin
        self.shape = shape
        self.dtype = dtype
        self.order = order

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __reduce__(self) -> Any:
        return type(self), (self.origin, self.shape, self.dtype, self.order)

    def __dask_tokenize__(self) -> Any:
        descr = repr(np.lib.format.dtype_to_descr(self.dtype))
        origin = self.origin
        return (
            f"dask_zbig.{type(self).__name__}",
            1,
            origin.location.alias,
            origin.oid,
            origin.tid,
            self.shape,
            descr,
            self.order,
        )

    def __repr__(self) -> str:
        origin = self.origin
        return (
            f"<{type(self).__name__} {origin.location.alias} oid=0x{origin.oid.hex().lstrip('0')} "
            f"tid=0x{origin.tid.hex()} shape={self.shape} dtype={self.dtype}>"
        )

    def __getitem__(self, index: Any) -> Any:
        """Runs in the task."""
        if not is_basic(index):
            parts = index if isinstance(index, tuple) else (index,)
            return self._fancy(parts) if all(map(_is_for_one_axis, parts)) else self[...][index]
        where = locate(index, self.shape, self.dtype.itemsize, self.order)
        return open_chunk(self.origin, where.position, where.shape, where.strides, self.dtype)

    def _fancy(self, index: tuple[Any, ...]) -> Any:
        """Arrays among the indices (Dask fuses them in): read the box that they lie in, index that."""
        box: list[Any] = []
        inner: list[Any] = []
        axis = 0
        for part in self._spread(index):
            if part is None:
                box.append(None)
                inner.append(slice(None))
                continue
            n = self.shape[axis]
            if isinstance(part, slice):
                box.append(part)
                inner.append(slice(None))
            else:
                where = _positions(part, n, axis)
                low = int(where.min()) if where.size else 0
                box.append(slice(low, int(where.max()) + 1 if where.size else 0))
                inner.append(where - low)
            axis += 1
        return np.asarray(self[tuple(box)])[tuple(inner)]

    def _spread(self, index: tuple[Any, ...]) -> list[Any]:
        """The index with full slices in place of an Ellipsis."""
        parts = list(index)
        dots = [i for i, part in enumerate(parts) if part is Ellipsis]
        missing = self.ndim - sum(1 for part in parts if part is not None and part is not Ellipsis)
        at = dots[0] if dots else len(parts)
        parts[at : at + len(dots)] = [slice(None)] * missing
        return parts


class ArraySnapshot(NDArrayLike, ArraySource):
    """A stored array as it was committed at some time, to be read in any process: what a pickled ZBigArray becomes.

    Slices are read-only ndarrays, loaded when they are made; all else is as in `ZBigArray`. Thread-safe. Every
    access opens, or takes from a pool, a connection of its own.
    """

    __slots__ = ()

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes to step along each axis."""
        return strides_of(self.shape, self.dtype.itemsize, self.order)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise ValueError(
            f"assignment destination is read-only: {self!r} is a snapshot. To write from tasks, see dz.to_zbigarray"
        )

    def view_at(self, where: Geometry, dtype: np.dtype[Any]) -> Any:
        """For `ArrayRef`: a view of some bytes, which must be inside of the array."""
        return open_chunk(self.origin, where.position, where.shape, where.strides, dtype)


def _is_for_one_axis(part: Any) -> bool:
    """Whether a part of an index is neither a field's name nor a mask of several axes, or of none."""
    if part is None or part is Ellipsis or isinstance(part, slice):
        return True
    values = np.asarray(part)
    return values.dtype.kind in "iu" or values.size == 0 or (values.dtype == bool and values.ndim == 1)


def _positions(part: Any, n: int, axis: int) -> Any:
    """An array, a list or an integer among the indices as non-negative positions on an axis of length `n`."""
    where = np.asarray(part)
    if where.dtype == bool:
        if where.shape != (n,):
            raise IndexingError(f"a mask of shape {where.shape} does not fit axis {axis} with size {n}")
        return np.flatnonzero(where)
    if where.size == 0:
        return where.astype(np.intp)
    if where.min() < -n or where.max() >= n:
        raise IndexingError(f"an index is out of bounds for axis {axis} with size {n}")
    return np.where(where < 0, where + n, where)


def origin_of(array: ZBigArray | ArraySource, *, changed: bool = False) -> Origin:
    """Where other processes find what this connection sees of `array`.

    Raises
    ------
    NotStoredError, ClosedError
    UncommittedChangesError
        Not if it may be `changed`.
    """
    if isinstance(array, ArraySource):
        return array.origin
    if not isinstance(array, ZBigArray):
        raise TypeError(f"expected a ZBigArray, not {type(array).__name__}")
    connection = array._p_jar
    if connection is not None and connection.opened is None:
        raise ClosedError(f"the connection of a ZBigArray is closed: {connection!r}")
    if connection is None or array._p_oid is None or _is_new(array):
        raise NotStoredError(f"{array!r} was never committed: store it in a database and commit first")
    opened = open_file(array._file, array, connection)
    if (opened.dirty or _is_changed(array, connection)) and not changed:
        raise UncommittedChangesError(
            f"{array!r} has uncommitted changes, which workers could not see: commit or abort first"
        )
    tid = database.snapshot(connection)
    return Origin(database.location(connection.db()), array._p_oid, tid)


def _is_new(array: ZBigArray) -> bool:
    array._p_activate()
    return array._p_serial in (None, b"\0" * 8)


def _is_changed(array: ZBigArray, connection: Any) -> bool:
    """Whether the object has uncommitted changes. (To ZODB those before a savepoint are none.)"""
    saved = connection._savepoint_storage
    return bool(array._p_changed) or (saved is not None and array._p_oid in saved.index)


def by_reference(array: ZBigArray) -> Any:
    """How pickle takes a ZBigArray."""
    try:
        origin = origin_of(array)
    except (NotStoredError, UncommittedChangesError) as e:
        raise PickleError(f"a ZBigArray is pickled by reference, and there is none: {e}") from e
    return ArraySnapshot, (origin, array.shape, array.dtype, array.order)


def token(array: ZBigArray) -> Any:
    """What an array is to Dask: if committed, always the same."""
    try:
        origin = origin_of(array)
    except (NotStoredError, UncommittedChangesError):
        return "dask_zbig.ZBigArray", uuid.uuid4().hex
    return "dask_zbig.ZBigArray", ArraySource(origin, array.shape, array.dtype, array.order).__dask_tokenize__()
