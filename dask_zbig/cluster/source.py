"""`from_zbigarray`: a stored array as a Dask array whose tasks read one snapshot."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from datetime import datetime, timezone
from numbers import Real
from typing import Any, Protocol, TypeAlias, overload

import dask
import dask.array as da
import numpy as np
from dask.array.core import normalize_chunks
from dask.base import tokenize
from dask.utils import parse_bytes
from distributed import default_client, get_worker
from persistent.TimeStamp import TimeStamp
from ZODB.POSException import POSKeyError

from dask_zbig import database, uris
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.chunk import Origin
from dask_zbig.cluster.snapshot import ArraySnapshot, ArraySource, origin_of
from dask_zbig.cluster.worker import reading
from dask_zbig.errors import DatabaseURIError, NotStoredError, SnapshotError
from dask_zbig.memory._native import BLOCK

__all__ = ["Moment", "dask_array", "from_zbigarray", "tid_at"]


class _TimeStamp(Protocol):
    """A `persistent.TimeStamp.TimeStamp`, which is no class."""

    def raw(self) -> bytes: ...


#: A transaction id, a point in time (a datetime without a zone is in UTC), or seconds since 1970.
Moment: TypeAlias = bytes | datetime | float | _TimeStamp


@overload
def from_zbigarray(
    array: ZBigArray | ArraySnapshot,
    chunks: Any = "auto",
    *,
    at: Moment | None = None,
    uri: str | None = None,
    name: str | None = None,
) -> da.Array: ...
@overload
def from_zbigarray(
    array: str, path: str, chunks: Any = "auto", *, at: Moment | None = None, name: str | None = None
) -> da.Array: ...
def from_zbigarray(array: Any, *args: Any, **options: Any) -> da.Array:
    """A Dask array over a stored array.

    ``from_zbigarray(A, chunks="auto", *, at=None, uri=None, name=None)``, or
    ``from_zbigarray(uri, path, chunks="auto", *, at=None, name=None)``.

    All tasks, on whatever worker and whenever they run, read the array as this connection sees it now, or as it
    was at another time, whatever is committed meanwhile. They open their own connections. So it is fine to read
    and to write one array in one graph.

    Parameters
    ----------
    array : ZBigArray or str
        Stored, with no uncommitted changes; or one that was pickled. Or the URI of its database: then that is
        opened by a worker, and by this process only if it has no Dask client.
    path : str
        Where in the database the array is: keys from the root on, separated by "/".
    chunks : optional
        As in `dask.array.from_array`. "auto" cuts along the major axis, to at most ``array.chunk-size`` of
        Dask's configuration, at multiples of 2 MiB where that is possible.
    at : bytes, datetime, float or TimeStamp, optional
        Read what was committed up to then: a transaction id, a time (in UTC, if it has no zone), seconds since
        1970 (such as a transaction's time in ``db.undoInfo()``).
    uri : str, optional
        How workers open the database, if not as this process did. It may hold no secret, see the option
        ``zbig.database-uris``.
    name : str, optional
        The prefix and token of the keys. By default it is the same for the same snapshot and chunks. (Dask's
        array expressions choose names themselves.)

    Returns
    -------
    dask.array.Array

    Raises
    ------
    NotStoredError
        If the array was never committed, or if there is none at `path`.
    UncommittedChangesError
        If it has uncommitted changes, which no other process could see.
    SnapshotError
        If the database does not have the array as of `at`.
    ClosedError
        If its connection or database is closed.
    DatabaseURIError, DatabaseUnavailableError
        If the URI is none, or holds a secret, or nothing answers there.

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
    >>> x = dz.from_zbigarray(A, chunks=100)
    >>> before = db.lastTransaction()
    >>> A.resize(10)
    >>> transaction.commit()
    >>> int(x.sum().compute(scheduler="threads"))
    499500
    >>> dz.from_zbigarray(A).shape, dz.from_zbigarray(A, at=before).shape
    ((10,), (1000,))
    >>> conn.close(); db.close()
    """
    if isinstance(array, str):
        return _from_uri(array, *args, **options)
    return _from_array(array, *args, **options)


def _from_array(
    array: ZBigArray | ArraySnapshot,
    chunks: Any = "auto",
    *,
    at: Moment | None = None,
    uri: str | None = None,
    name: str | None = None,
) -> da.Array:
    if at is None:
        source = ArraySource(origin_of(array), array.shape, array.dtype, array.order)
    else:
        origin = origin_of(array, changed=True)
        source = _source_at(replace(origin, tid=tid_at(at, database.database(origin.location))))
    if uri is not None:
        uris.classify(uri)
        if uris.has_secret(uri):
            raise DatabaseURIError(
                f"{uris.mask(uri)!r} holds a secret, and would be sent around; set Dask's option zbig.database-uris "
                f"on the workers to {{{source.origin.location.alias!r}: '<URI>'}}"
            )
        location = replace(source.origin.location, uri=uri, exclusive=False)
        source.origin = replace(source.origin, location=location)
    return dask_array(source, chunks, name)


def _from_uri(
    uri: str, path: str = "", chunks: Any = "auto", *, at: Moment | None = None, name: str | None = None
) -> da.Array:
    if not isinstance(path, str) or not path.strip("/"):
        raise TypeError(f"a URI needs the path of a ZBigArray in its database, such as 'group/A', not {path!r}")
    client = None if uris.has_secret(uri) else _client()
    source = client.submit(_find, uri, path, at, pure=False).result() if client else _find(uri, path, at)
    return dask_array(source, chunks, name)


def _client() -> Any:
    """The Dask client that this thread can wait for, or None."""
    with contextlib.suppress(ValueError):
        get_worker()
        return None  # a task has a worker's connections at hand
    with contextlib.suppress(ValueError):
        client = default_client()
        return None if client.asynchronous else client
    return None


def _find(uri: str, path: str, at: Moment | None) -> ArraySource:
    """The array at `path`, as of a moment or now."""
    location = database.locate(uri)
    db = database.database(location)
    if at is None:
        database.sync(db)
    tid = bytes(db.lastTransaction()) if at is None else tid_at(at, db)
    with reading(location, tid, 0) as connection:
        found = connection.root()
        keys = path.strip("/").split("/")
        for n, key in enumerate(keys, 1):
            try:
                found = found[key]
            except (KeyError, TypeError, IndexError) as e:
                raise NotStoredError(f"there is nothing at {'/'.join(keys[:n])!r} in {location.alias}") from e
        if not isinstance(found, ZBigArray):
            raise NotStoredError(f"{path!r} in {location.alias} is no ZBigArray, but a {type(found).__name__}")
        return ArraySource(Origin(location, found._p_oid, tid), found.shape, found.dtype, found.order)


def _source_at(origin: Origin) -> ArraySource:
    """An array as it was at another snapshot."""
    with reading(origin.location, origin.tid, 0) as connection:
        try:
            array = connection.get(origin.oid)
            return ArraySource(origin, array.shape, array.dtype, array.order)
        except POSKeyError as e:
            raise SnapshotError(
                f"{origin.location.alias} does not have the array 0x{origin.oid.hex().lstrip('0')} as of "
                f"transaction 0x{origin.tid.hex()}: it was made later, or that was packed away"
            ) from e


def tid_at(at: Moment, db: Any) -> bytes:
    """The id of the last transaction of a database at a moment, or before."""
    if isinstance(at, bytes):
        if len(at) != 8:
            raise SnapshotError(f"{at!r} is no transaction id: that is 8 bytes")
        return at
    upto = _end_of(at)
    database.sync(db)
    last = bytes(db.lastTransaction())
    if upto > last and TimeStamp(upto).timeTime() > time.time() + 1:
        raise SnapshotError(f"{at!r} is in the future: the last transaction is {last.hex()}, of {TimeStamp(last)} UTC")
    return min(upto, last)


def _end_of(at: Any) -> bytes:
    """The last transaction id that a moment, taken as all of its microsecond, could have."""
    if hasattr(at, "raw"):
        return bytes(at.raw())
    if isinstance(at, bool) or not isinstance(at, (datetime, Real)):
        raise SnapshotError(f"{at!r} is neither a transaction id nor a time")
    try:
        if isinstance(at, datetime):
            seconds = at.replace(tzinfo=at.tzinfo or timezone.utc).timestamp() + 1e-6
        else:
            seconds = math.nextafter(float(at), math.inf)  # ids are finer than these
        parts = time.gmtime(seconds)
        return bytes(TimeStamp(*parts[:5], parts[5] + seconds % 1).raw())
    except (ValueError, OverflowError, OSError) as e:
        raise SnapshotError(f"there is no transaction at {at!r}: {e}") from e


def dask_array(source: ArraySource, chunks: Any, name: str | None) -> da.Array:
    """What `from_zbigarray` returns, for an array that was found."""
    grid = _chunks(source, chunks)
    options: dict[str, Any] = {}
    if not _expressions():
        options["name"] = name or f"zbigarray-{tokenize(source, grid)}"
    meta = np.empty((0,) * source.ndim, source.dtype)
    return da.from_array(source, chunks=grid, inline_array=True, asarray=False, meta=meta, **options)


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
