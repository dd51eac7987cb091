"""`from_zbigarray`: a stored array as a Dask array whose tasks read one snapshot."""

from __future__ import annotations

import math
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.array.core import normalize_chunks
from dask.base import tokenize
from dask.utils import parse_bytes

from dask_zbig import database
from dask_zbig.array.indexing import is_basic, locate
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.chunk import Origin, open_chunk
from dask_zbig.errors import ClosedError, IndexingError, NotStoredError, UncommittedChangesError
from dask_zbig.memory._native import BLOCK
from dask_zbig.transaction import open_file

__all__ = ["ArraySource", "from_zbigarray"]


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
        return ArraySource, (self.origin, self.shape, self.dtype, self.order)

    def __dask_tokenize__(self) -> Any:
        descr = repr(np.lib.format.dtype_to_descr(self.dtype))
        origin = self.origin
        return (
            "dask_zbig.ArraySource",
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
            f"<ArraySource {origin.location.alias} oid=0x{origin.oid.hex().lstrip('0')} tid=0x{origin.tid.hex()} "
            f"shape={self.shape} dtype={self.dtype}>"
        )

    def __getitem__(self, index: Any) -> Any:
        """Runs in the task."""
        if not is_basic(index):
            return self._fancy(index if isinstance(index, tuple) else (index,))
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


def from_zbigarray(array: ZBigArray, chunks: Any = "auto", *, name: str | None = None) -> da.Array:
    """A Dask array over a stored array.

    All tasks, on whatever worker and whenever they run, read the array as this connection sees it now, whatever
    is committed meanwhile. They open their own connections. So it is fine to read and to write one array in one
    graph.

    Parameters
    ----------
    array : ZBigArray
        Stored, with no uncommitted changes.
    chunks : optional
        As in `dask.array.from_array`. "auto" cuts along the major axis, to at most ``array.chunk-size`` of
        Dask's configuration, at multiples of 2 MiB where that is possible.
    name : str, optional
        The prefix and token of the keys. By default it is the same for the same snapshot and chunks. (Dask's
        array expressions choose names themselves.)

    Returns
    -------
    dask.array.Array

    Raises
    ------
    NotStoredError
        If the array was never committed.
    UncommittedChangesError
        If it has uncommitted changes, which no other process could see.
    ClosedError
        If its connection or database is closed.

    Notes
    -----
    To be computed by other processes the database must be one that they can open: see `serve`.

    Examples
    --------
    >>> import dask_zbig as dz, transaction, ZODB
    >>> db = ZODB.DB(None); conn = db.open()
    >>> conn.root()["A"] = A = dz.ZBigArray(1000, "i8")
    >>> A[:] = range(1000)
    >>> transaction.commit()
    >>> int(dz.from_zbigarray(A, chunks=100).sum().compute(scheduler="threads"))
    499500
    >>> conn.close(); db.close()
    """
    source = ArraySource(origin_of(array), array.shape, array.dtype, array.order)
    grid = _chunks(source, chunks)
    options: dict[str, Any] = {}
    if not _expressions():
        options["name"] = name or f"zbigarray-{tokenize(source, grid)}"
    meta = np.empty((0,) * source.ndim, source.dtype)
    return da.from_array(source, chunks=grid, inline_array=True, asarray=False, meta=meta, **options)


def origin_of(array: ZBigArray) -> Origin:
    """Where other processes find what this connection sees of `array`."""
    if not isinstance(array, ZBigArray):
        raise TypeError(f"expected a ZBigArray, not {type(array).__name__}")
    connection = array._p_jar
    if connection is not None and connection.opened is None:
        raise ClosedError(f"the connection of a ZBigArray is closed: {connection!r}")
    if connection is None or array._p_oid is None or _is_new(array):
        raise NotStoredError(f"{array!r} was never committed: store it in a database and commit first")
    opened = open_file(array._file, array, connection)
    if opened.dirty or array._p_changed:
        raise UncommittedChangesError(
            f"{array!r} has uncommitted changes, which workers could not see: commit or abort first"
        )
    tid = database.snapshot(connection)
    return Origin(database.location(connection.db()), array._p_oid, tid)


def _is_new(array: ZBigArray) -> bool:
    array._p_activate()
    return array._p_serial in (None, b"\0" * 8)


def _expressions() -> bool:
    enabled = getattr(da, "array_expr_enabled", None)
    return bool(enabled is not None and enabled())


def _chunks(source: ArraySource, chunks: Any) -> Any:
    if chunks != "auto":
        return normalize_chunks(chunks, source.shape, dtype=source.dtype)
    if 0 in source.shape or not source.shape:
        return normalize_chunks(-1, source.shape, dtype=source.dtype)
    limit = parse_bytes(dask.config.get("array.chunk-size"))
    axis = 0 if source.order == "C" else source.ndim - 1
    row = math.prod(source.shape[:axis] + source.shape[axis + 1 :]) * source.dtype.itemsize
    rows = limit // row
    if rows == 0:  # one row is more than a chunk may have: cut other axes too
        return normalize_chunks("auto", source.shape, limit=limit, dtype=source.dtype)
    step = BLOCK // math.gcd(BLOCK, row)
    if rows >= step:
        rows -= rows % step
    grid: list[Any] = [-1] * source.ndim
    grid[axis] = min(rows, source.shape[axis])
    return normalize_chunks(tuple(grid), source.shape, dtype=source.dtype)
