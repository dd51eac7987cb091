"""`to_zbigarray` and `CommitCoordinator`: what a whole cluster writes, saved at once.

The workers stage; here the client collects their manifests - which bytes of which array lie in which staged
segment - and lays them over the arrays as part of the current transaction. Committing that is what publishes:
one small transaction on the extent map, together with whatever else it contains. Until then nobody sees a byte.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.array import core
from dask.base import tokenize
from dask.layers import ArraySliceDep
from ZODB.POSException import POSError

from dask_zbig import database
from dask_zbig.array.indexing import is_basic, locate
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.source import from_zbigarray
from dask_zbig.cluster.staging import Job, begin_job, end_job, hold_job
from dask_zbig.cluster.store import Manifest, Place, stage_block
from dask_zbig.errors import ClosedError, DTypeError, NotStoredError, PublishError, ShapeError, ZBigError
from dask_zbig.openfile import Layer
from dask_zbig.storage import extents as ex
from dask_zbig.storage.segment import SegmentRef
from dask_zbig.transaction import open_file

__all__ = ["CommitCoordinator", "SaveResult", "to_zbigarray"]


@dataclass(frozen=True, slots=True)
class SaveResult:
    """What a save did. `tid`: the transaction's id, None until it is committed; `seconds`: computing and saving."""

    job_id: str
    tid: bytes | None
    bytes: int
    segments: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Store:
    """One call of `store`; where two write the same bytes the later one wins. `staged`: the manifests to be."""

    array: ZBigArray
    staged: core.Array


class _Save:
    """Arrays being stored by one job, into one connection's transaction."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.location = database.location(connection.db())
        self.job = begin_job(self.location, connection)
        self.stores: list[_Store] = []
        self.bytes = 0
        self.segments = 0

    def add(self, x: Any, array: ZBigArray, region: Any) -> None:
        """Plan the tasks that stage `x`."""
        x, where = _checked(x, array, region, self.connection)
        number = len(self.stores)
        place = Place(number, where.position, where.shape, where.strides, array.dtype)
        blocks = _blocks(x)
        staged = core.map_blocks(
            stage_block,
            blocks,
            ArraySliceDep(blocks.chunks),
            whole=place,
            job=self.job,
            chunks=tuple((1,) * n for n in blocks.numblocks),
            dtype=object,
            meta=np.empty((0,) * x.ndim, object),
            name=f"zbig-stage-{tokenize(x.name, self.job.id, number)}",
        )
        self.stores.append(_Store(array, staged))

    def run(self) -> None:
        """Compute, all arrays in one graph, and lay what was staged over the arrays."""
        if not self.stores:
            return
        results = dask.compute(*(s.staged for s in self.stores))
        hold_job(self.job, self.connection)
        for store, result in zip(self.stores, results, strict=True):
            manifests: list[Manifest] = np.asarray(result).ravel().tolist()
            self._overlay(store.array, manifests)
        for array in {id(s.array): s.array for s in self.stores}.values():
            array._file.journal.add(self.job.id)

    def _overlay(self, array: ZBigArray, manifests: list[Manifest]) -> None:
        opened = open_file(array._file, array, self.connection)
        opened.enter()
        if self.job.id in array._file.journal.jobs:
            raise PublishError(f"job {self.job.id} has been published into {array!r} already")
        refs: list[SegmentRef] = []
        parts: list[ex.Extents] = []
        for manifest in manifests:
            part = np.frombuffer(manifest.extents, ex.EXTENT)
            parts.append(ex.renumber(part, np.arange(len(manifest.segments)) + len(refs)))
            refs += [s.ref(self.connection) for s in manifest.segments]
        if not refs:
            return
        joined = np.concatenate(parts)
        order = np.argsort(joined["start"], kind="stable")
        joined = joined[order]
        reader = opened.reader
        assert reader is not None
        sources = tuple(reader.source(r) for r in refs)
        ex.validate(joined, [r.length for r in refs], 0, max(array.nbytes, 1))
        opened.overlay(Layer(joined, sources, tuple(refs), True))
        self.bytes += ex.total(ex.covered(joined))
        self.segments += len(refs)

    def forget_afterwards(self) -> None:
        """Once the transaction is over, however it ends, the job is no longer needed."""
        current = self.connection.transaction_manager.get()
        current.addAfterCommitHook(_forget, (self.job,))
        current.addAfterAbortHook(_forget_aborted, (self.job,))

    def give_up(self) -> None:
        """Before anything was made part of the transaction."""
        _forget(False, self.job)

    def tid(self) -> bytes:
        """The transaction that has just published."""
        serials = []
        for store in self.stores:
            journal = store.array._file.journal
            journal._p_activate()  # it is a ghost if the commit merged it with another job's
            if journal.jobs[-1:] == (self.job.id,):
                serials.append(journal._p_serial)
        return bytes(max(serials, default=self.connection.db().lastTransaction()))


def _forget(committed: bool, job: Job) -> None:
    # The lease sees to it, if the database cannot be reached now.
    with contextlib.suppress(ZBigError, POSError, OSError):
        end_job(job)


def _forget_aborted(job: Job) -> None:
    _forget(False, job)


def _blocks(x: Any) -> core.Array:
    """`x` without array expressions: those know no arguments that differ by block."""
    if isinstance(x, core.Array):
        return x
    optimized = x.optimize()
    return core.Array(dict(optimized.__dask_graph__()), optimized.name, x.chunks, meta=x._meta)


def _check_target(array: Any, connection: Any) -> None:
    """Whether a save into `connection`'s transaction can write to `array` at all."""
    if not isinstance(array, ZBigArray):
        raise TypeError(f"the target must be a ZBigArray, not {type(array).__name__}")
    if array._p_jar is None:
        raise NotStoredError(
            f"{array!r} belongs to no database yet: commit it first, or give it to its connection by conn.add(array)"
        )
    if array._p_jar is not connection:
        raise ZBigError(f"{array!r} belongs to another connection than this save")
    _check_open(connection)


def _check_open(connection: Any) -> None:
    if connection.opened is None:
        raise ClosedError(f"the connection is closed: {connection!r}")
    if connection.before is not None or connection.isReadOnly():
        raise PublishError(f"the connection is read-only: {connection!r}")


def _as_dask(x: Any) -> Any:
    """`x` as a Dask array of known shape."""
    if isinstance(x, ZBigArray):
        return from_zbigarray(x)
    if not isinstance(x, (da.Array, core.Array)):
        values = np.asarray(x)
        x = da.from_array(values, chunks=-1 if values.dtype.hasobject else "auto")
    if any(np.isnan(n) for n in x.shape):
        raise ShapeError(f"a Dask array of unknown shape {x.shape} cannot be stored: call compute_chunk_sizes() on it")
    return x


def _checked(x: Any, array: ZBigArray, region: Any, connection: Any) -> tuple[da.Array, Any]:
    """`x` as a Dask array that fits `array[region]`, and where that lies."""
    _check_target(array, connection)
    x = _as_dask(x)
    if not np.can_cast(x.dtype, array.dtype, "same_kind"):
        raise DTypeError(f"cannot store {x.dtype} values in {array!r}: not castable by 'same_kind'")
    index = Ellipsis if region is None else region
    if not is_basic(index):
        raise ShapeError(f"a region is made of integers and slices, not {region!r}")
    where = locate(index, array.shape, array.itemsize, array.order)
    if where.shape != x.shape:
        named = "" if region is None else f"[{region!r}]"
        raise ShapeError(f"cannot store an array of shape {x.shape} in {array!r}{named}, which has shape {where.shape}")
    return x, where


def to_zbigarray(x: Any, array: ZBigArray, region: Any = None) -> SaveResult:
    """``array[region] = x``, done by Dask: every chunk is written by the task that has it.

    Returns when all is computed and staged. It is then part of the current transaction of the array's connection,
    where it can be read; ``transaction.commit()`` saves it, with everything else, ``transaction.abort()`` saves
    nothing.

    Parameters
    ----------
    x : dask.array.Array or array_like
        Of the region's shape, castable to the array's dtype by "same_kind".
    array : ZBigArray
        That a database knows.
    region : basic index, optional
        The part to write; by default all of it.

    Returns
    -------
    SaveResult
        With `tid` None.

    Raises
    ------
    ShapeError, DTypeError
        If `x` does not fit. Nothing was computed.
    NotStoredError
        If the array belongs to no database.
    ClosedError, PublishError
        If the array's connection is closed, or read-only. PublishError also if the computation outlasted the
        lease (`zbig.lease-seconds`) of what it staged.
    DatabaseUnavailableError
        If a worker cannot open the database.
    """
    connection = getattr(array, "_p_jar", None)
    _checked(x, array, region, connection)
    started = time.perf_counter()
    save = _Save(connection)
    try:
        save.add(x, array, region)
        save.run()
    except BaseException:
        save.give_up()
        raise
    save.forget_afterwards()
    return SaveResult(save.job.id, None, save.bytes, save.segments, time.perf_counter() - started)


class CommitCoordinator:
    """Several arrays, one graph, one atomic save.

    Used by ``with``: on leaving it computes what was asked for and commits the connection's transaction, with
    everything else in it; on an exception it aborts.

    Parameters
    ----------
    connection : ZODB.Connection.Connection

    Attributes
    ----------
    result : SaveResult or None
        After the save.

    Raises
    ------
    ConflictError
        On leaving, if another transaction changed the same bytes. (The transaction is aborted.)

    Examples
    --------
    >>> import dask.array as da, dask_zbig as dz, transaction, ZODB
    >>> db = ZODB.DB(None); conn = db.open()
    >>> root = conn.root()
    >>> root["B"], root["C"] = dz.ZBigArray(100), dz.ZBigArray((0, 3), "i4")
    >>> transaction.commit()
    >>> with dz.CommitCoordinator(conn) as save:
    ...     save.store(da.ones(50, chunks=10), root["B"], region=slice(50, 100))
    ...     save.append(da.zeros((4, 3), dtype="i4", chunks=2), root["C"])
    >>> float(root["B"][:].sum()), root["C"].shape
    (50.0, (4, 3))
    >>> conn.close(); db.close()
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._save: _Save | None = None
        self._started = 0.0
        self.result: SaveResult | None = None

    def __enter__(self) -> CommitCoordinator:
        if self._save is not None:
            raise PublishError("this CommitCoordinator is in use already")
        _check_open(self._connection)
        self._started = time.perf_counter()
        self._save = _Save(self._connection)
        return self

    def _current(self) -> _Save:
        if self._save is None:
            raise PublishError("use CommitCoordinator by `with`: outside of it there is nothing to store into")
        return self._save

    def store(self, x: Any, array: ZBigArray, region: Any = None) -> None:
        """``array[region] = x``; see `to_zbigarray`. Computed on leaving the ``with``."""
        self._current().add(x, array, region)

    def append(self, x: Any, array: ZBigArray) -> None:
        """Add `x` at the end of the array's major axis."""
        save = self._current()
        _check_target(array, self._connection)
        x = _as_dask(x)
        if not array.ndim or x.ndim != array.ndim:
            raise ShapeError(f"cannot append an array of shape {x.shape} to {array!r}")
        axis = array.major_axis
        before = array.shape
        if x.shape[:axis] + x.shape[axis + 1 :] != before[:axis] + before[axis + 1 :]:
            raise ShapeError(f"cannot append an array of shape {x.shape} along axis {axis} to {array!r}")
        array.resize((*before[:axis], before[axis] + x.shape[axis], *before[axis + 1 :]))
        region = tuple(slice(before[axis], None) if i == axis else slice(None) for i in range(array.ndim))
        try:
            save.add(x, array, region)
        except BaseException:
            array.resize(before)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        save, self._save = self._current(), None
        manager = self._connection.transaction_manager
        if error is not None:
            manager.abort()
            save.give_up()
            return
        try:
            save.run()
        except BaseException:
            manager.abort()
            save.give_up()
            raise
        save.forget_afterwards()
        try:
            manager.commit()
        except BaseException:
            manager.abort()
            raise
        seconds = time.perf_counter() - self._started
        self.result = SaveResult(save.job.id, save.tid(), save.bytes, save.segments, seconds)
