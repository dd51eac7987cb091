"""A save by a cluster: planned here, staged by tasks, then laid over arrays in a client's transaction.

The tasks return manifests: which bytes of the array lie in which staged segment. Committing the transaction over
whose arrays they were laid is what publishes: one small transaction on the extent map, together with whatever else
is in it. Until then nobody sees a byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dask
import dask.array as da
import numpy as np
from dask.array import core
from dask.base import tokenize
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed
from dask.layers import ArraySliceDep
from distributed import as_completed, futures_of

from dask_zbig.array.indexing import Geometry, is_basic, locate
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.snapshot import ArraySnapshot
from dask_zbig.cluster.source import from_zbigarray
from dask_zbig.cluster.staging import Job, end_job, hold_job
from dask_zbig.cluster.store import Manifest, Place, run_size, stage_block
from dask_zbig.errors import ClosedError, DTypeError, NotStoredError, PublishError, ShapeError, ZBigError
from dask_zbig.openfile import Layer
from dask_zbig.storage import extents as ex
from dask_zbig.storage.segment import SegmentRef
from dask_zbig.transaction import open_file

__all__ = [
    "Plan",
    "Rechunk",
    "SaveProgress",
    "StagedSave",
    "appended_shape",
    "check_open",
    "check_target",
    "fit",
    "plan",
    "publish",
    "stage_all",
]

Rechunk = bool | Literal["auto"]
#: Chunks whose bytes lie in the array in more pieces than this, smaller ones than that, are cut anew.
MANY_RUNS = 256
SMALL_RUN = 64 << 10


@dataclass(frozen=True, slots=True)
class SaveProgress:
    """How far a save has come: `chunks` of `total` are staged, with this many `bytes`."""

    chunks: int
    total: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """Which array, and what it was when the save was planned. `rows`: to be appended at byte `end`, or 0."""

    oid: bytes
    minor: tuple[int, ...]
    rows: int
    end: int


@dataclass(frozen=True, slots=True)
class StagedSave:
    """Data that workers have stored for an array, but that no array refers to yet.

    What ``to_zbigarray(..., compute=False)`` computes to: small, picklable, good for as long as its lease lasts.
    """

    job: Job
    ledger_id: str
    target: Target
    manifests: tuple[Manifest, ...]

    @property
    def bytes(self) -> int:
        """Bytes that were staged."""
        return sum(m.nbytes for m in self.manifests)

    @property
    def segments(self) -> int:
        """Segments they are in."""
        return sum(len(m.segments) for m in self.manifests)

    @property
    def stop(self) -> int:
        """Where the last byte of the array that it changes ends."""
        return max(
            (int(np.frombuffer(m.extents, ex.EXTENT)["stop"].max()) for m in self.manifests if m.extents), default=0
        )

    def publish(self, array: ZBigArray) -> None:
        """Make it part of the current transaction of the array's connection, which the user then commits.

        Raises
        ------
        PublishError
            If it is for another array, was published before, or if its lease is over.
        ShapeError
            If the array has another shape by now.
        """
        check_target(array, getattr(array, "_p_jar", None))
        publish([(array, self)], array._p_jar)

    def discard(self) -> None:
        """Give it up, or, once it is published, let its lease go. It cannot be published any more."""
        end_job(self.job)

    def ranges(self, shift: int = 0) -> ex.Ranges:
        """The bytes of the array that it changes."""
        parts = [np.frombuffer(m.extents, ex.EXTENT) for m in self.manifests]
        rows = np.concatenate([ex.empty(), *parts], dtype=ex.EXTENT)
        return ex.covered(np.sort(rows, order="start")) + np.uint64(shift)


# -- planning


@dataclass(frozen=True, slots=True)
class Plan:
    """One array to be stored. `staged` computes to the manifests; where two write the same bytes the later wins."""

    array: ZBigArray
    staged: core.Array
    chunks: tuple[tuple[int, ...], ...]
    place: Place
    job: Job
    ledger_id: str
    target: Target

    def lazily(self) -> Delayed:
        """What will have been staged, as a `StagedSave`."""
        name = f"zbig-staged-{tokenize(self.job.id)}"
        return delayed(_gathered)(self.staged, self.job, self.ledger_id, self.target, dask_key_name=name)

    def result(self, computed: Any) -> StagedSave:
        """What was staged."""
        return _gathered(computed, self.job, self.ledger_id, self.target)


def _gathered(computed: Any, job: Job, ledger_id: str, target: Target) -> StagedSave:
    manifests: list[Manifest] = np.asarray(computed).ravel().tolist()
    return StagedSave(job, ledger_id, target, tuple(manifests))


def plan(
    x: Any, array: ZBigArray, region: Any, rows: int, end: int, rechunk: Rechunk, job: Job, ledger_id: str, number: int
) -> Plan:
    """Plan the tasks that stage `x`, which `fit` has looked at.

    Parameters
    ----------
    rows, end
        If it is to be appended: how many rows, and the byte at which the array will end by then.
    number
        Of the store within its job.
    """
    where = _region(array, region, rows, end)
    x = _rechunked(x, where, array.itemsize, rechunk)
    place = Place(number, where.position, where.shape, where.strides, array.dtype)
    blocks = _blocks(x)
    staged = core.map_blocks(
        stage_block,
        blocks,
        ArraySliceDep(blocks.chunks),
        whole=place,
        job=job,
        chunks=tuple((1,) * n for n in blocks.numblocks),
        dtype=object,
        meta=np.empty((0,) * x.ndim, object),
        name=f"zbig-stage-{tokenize(x.name, job.id, number)}",
    )
    target = Target(array._p_oid, _minor(array), rows, end)
    return Plan(array, staged, blocks.chunks, place, job, ledger_id, target)


def fit(x: Any, array: ZBigArray, region: Any, append: bool, connection: Any) -> Any:
    """`x` as a Dask array that fits `array[region]`, or its end.

    Raises
    ------
    TypeError, ZBigError
        If it does not, or if the array cannot be written by this connection.
    """
    check_target(array, connection)
    x = _as_dask(x)
    if not np.can_cast(x.dtype, array.dtype, "same_kind"):
        raise DTypeError(f"cannot store {x.dtype} values in {array!r}: not castable by 'same_kind'")
    if append:
        if region is not None:
            raise ShapeError("what is appended goes to the end of the array: it has no region")
        appended_shape(array, x.shape)
        return x
    where = _region(array, region, 0, 0)
    if where.shape != x.shape:
        named = "" if region is None else f"[{region!r}]"
        raise ShapeError(f"cannot store an array of shape {x.shape} in {array!r}{named}, which has shape {where.shape}")
    return x


def appended_shape(array: ZBigArray, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The array's shape with values of a shape at its end. Raises `ShapeError`."""
    axis = array.major_axis
    before = array.shape
    if not before or len(shape) != len(before) or _without(shape, axis) != _without(before, axis):
        raise ShapeError(f"cannot append an array of shape {shape} to {array!r}")
    return (*before[:axis], before[axis] + shape[axis], *before[axis + 1 :])


def _region(array: ZBigArray, region: Any, rows: int, end: int) -> Geometry:
    """Where in the array's file something goes; for an append, as if the array ended at byte `end`."""
    if rows:
        axis = array.major_axis
        row = math.prod(_minor(array)) * array.itemsize
        first = end // row
        shape = (*array.shape[:axis], first + rows, *array.shape[axis + 1 :])
        index: Any = tuple(slice(first, None) if i == axis else slice(None) for i in range(array.ndim))
        return locate(index, shape, array.itemsize, array.order)
    index = Ellipsis if region is None else region
    if not is_basic(index):
        raise ShapeError(f"a region is made of integers and slices, not {region!r}")
    return locate(index, array.shape, array.itemsize, array.order)


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _minor(array: ZBigArray) -> tuple[int, ...]:
    return _without(array.shape, array.major_axis) if array.shape else ()


def _as_dask(x: Any) -> Any:
    """`x` as a Dask array of known shape."""
    if isinstance(x, (ZBigArray, ArraySnapshot)):
        return from_zbigarray(x)
    if not isinstance(x, (da.Array, core.Array)):
        values = np.asarray(x)
        x = da.from_array(values, chunks=-1 if values.dtype.hasobject else "auto")
    if any(np.isnan(n) for n in x.shape):
        raise ShapeError(f"a Dask array of unknown shape {x.shape} cannot be stored: call compute_chunk_sizes() on it")
    return x


def _blocks(x: Any) -> core.Array:
    """`x` without array expressions: those know no arguments that differ by block."""
    if isinstance(x, core.Array):
        return x
    optimized = x.optimize()
    return core.Array(dict(optimized.__dask_graph__()), optimized.name, x.chunks, meta=x._meta)


def _rechunked(x: Any, where: Geometry, itemsize: int, rechunk: Rechunk) -> Any:
    """Cut `x` along the major axis only, if that makes the pieces in which a chunk's bytes lie worth it."""
    if rechunk is False or x.ndim < 2 or 0 in x.shape:
        return x
    order = sorted(range(x.ndim), key=lambda i: -abs(where.strides[i]))
    major = next((i for i in order if x.shape[i] > 1), order[0])
    if all(len(c) == 1 for i, c in enumerate(x.chunks) if i != major):
        return x
    shape = tuple(max(c) for c in x.chunks)
    whole = tuple(n if i == major else x.shape[i] for i, n in enumerate(shape))
    before, after = (run_size(s, where.strides, itemsize) for s in (shape, whole))
    runs = math.prod(shape) * itemsize // before
    if rechunk == "auto" and (runs <= MANY_RUNS or before >= SMALL_RUN or after < 4 * before):
        return x
    row = math.prod(n for i, n in enumerate(x.shape) if i != major)
    rows = max(1, math.prod(shape) // row)
    return x.rechunk(tuple(rows if i == major else -1 for i in range(x.ndim)))


def check_target(array: Any, connection: Any) -> None:
    """Whether a save into `connection`'s transaction can write to `array` at all."""
    if not isinstance(array, ZBigArray):
        raise TypeError(f"the target must be a ZBigArray, not {type(array).__name__}")
    if array._p_jar is None:
        raise NotStoredError(
            f"{array!r} belongs to no database yet: commit it first, or give it to its connection by conn.add(array)"
        )
    if array._p_jar is not connection:
        raise ZBigError(f"{array!r} belongs to another connection than this save")
    check_open(connection)


def check_open(connection: Any) -> None:
    """Whether anything can be written by a connection. Raises ClosedError, PublishError."""
    if connection.opened is None:
        raise ClosedError(f"the connection is closed: {connection!r}")
    if connection.before is not None or connection.isReadOnly():
        raise PublishError(f"the connection is read-only: {connection!r}")


# -- staging


def stage_all(plans: Sequence[Plan], hooks: Iterable[Callable[[SaveProgress], None]]) -> list[StagedSave]:
    """Compute, all arrays in one graph. `hooks` are told, in this thread or a scheduler's, as chunks are staged."""
    arrays = [p.staged for p in plans]
    told = _Told(sum(a.npartitions for a in arrays), list(hooks))
    if told.hooks:
        with Callback(posttask=told.local):  # of a scheduler in this process
            kept = dask.persist(*arrays)
        futures = futures_of(kept)
        for batch in as_completed(futures, with_results=True, raise_errors=False).batches() if futures else ():
            for future, result in batch:
                if future.status == "finished":
                    told.staged(result)
        arrays = kept
    results = dask.compute(*arrays)
    return [p.result(r) for p, r in zip(plans, results, strict=True)]


class _Told:
    """Counts, and tells."""

    def __init__(self, total: int, hooks: list[Callable[[SaveProgress], None]]) -> None:
        self.hooks = hooks
        self._total = total
        self._chunks = 0
        self._bytes = 0

    def local(self, key: Any, result: Any, *_: Any) -> None:
        if isinstance(key, tuple) and str(key[0]).startswith("zbig-stage-"):
            self.staged(result)

    def staged(self, result: Any) -> None:
        self._chunks += 1
        self._bytes += np.asarray(result).ravel()[0].nbytes
        for hook in self.hooks:
            hook(SaveProgress(self._chunks, self._total, self._bytes))


# -- publishing


def publish(stores: Sequence[tuple[ZBigArray, StagedSave]], connection: Any) -> None:
    """Lay what was staged over the arrays, as part of the connection's transaction.

    Raises
    ------
    PublishError, ShapeError
        See `StagedSave.publish`. Nothing was changed.
    """
    jobs = {staged.job.id: staged.job for _, staged in stores}
    ledger_ids = {staged.ledger_id for _, staged in stores}
    for array, staged in stores:
        if array._p_oid != staged.target.oid:
            raise PublishError(
                f"{array!r} is not the array that was staged for (0x{staged.target.oid.hex().lstrip('0')})"
            )
        if _minor(array) != staged.target.minor:
            raise ShapeError(
                f"{array!r} has another shape than when its data was staged: rows of {staged.target.minor}"
            )
        if not staged.target.rows and staged.stop > array.nbytes:
            raise ShapeError(f"{array!r} is smaller than when its data was staged, which reaches to byte {staged.stop}")
        if any(i in array._file.journal.jobs for i in ledger_ids):
            raise PublishError(f"job {staged.ledger_id} has been published into {array!r} already")
    for job in jobs.values():
        hold_job(job, connection)
    for array, staged in stores:
        _lay_over(array, staged, connection)
    for array, staged in {id(a): (a, s) for a, s in stores}.values():
        array._file.journal.add(staged.ledger_id)


def _lay_over(array: ZBigArray, staged: StagedSave, connection: Any) -> None:
    shift = 0
    target = staged.target
    if target.rows:
        shift = array.nbytes - target.end
        axis = array.major_axis
        array.resize((*array.shape[:axis], array.shape[axis] + target.rows, *array.shape[axis + 1 :]))
    opened = open_file(array._file, array, connection)
    opened.enter()
    refs: list[SegmentRef] = []
    parts: list[ex.Extents] = []
    for manifest in staged.manifests:
        part = np.frombuffer(manifest.extents, ex.EXTENT)
        parts.append(ex.renumber(part, np.arange(len(manifest.segments)) + len(refs)))
        refs += [s.ref(connection) for s in manifest.segments]
    if not refs:
        return
    joined = np.concatenate(parts)
    joined = joined[np.argsort(joined["start"], kind="stable")]
    joined["start"] += np.uint64(shift)
    joined["stop"] += np.uint64(shift)
    reader = opened.reader
    assert reader is not None
    sources = tuple(reader.source(r) for r in refs)
    ex.validate(joined, [r.length for r in refs], 0, max(array.nbytes, 1))
    opened.overlay(Layer(joined, sources, tuple(refs), True))
