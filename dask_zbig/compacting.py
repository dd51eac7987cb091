"""Tidying up an array: small segments, and what is left of larger ones, are copied together.

A commit does this for what it touches, a little at a time (`dask_zbig.storage.compaction`). Here it is done for all of
an array at once, on demand, and more thoroughly: after it a part of 64 MiB has hardly more segments than it needs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import transaction
from ZODB.POSException import ConflictError

from dask_zbig import database
from dask_zbig.config import get
from dask_zbig.flush import guard_truncation, join_segments
from dask_zbig.memory._native import PAGE
from dask_zbig.segmentwriter import INLINE_PIECE, Target
from dask_zbig.storage import extents as ex
from dask_zbig.storage.compaction import DONE, DONE_INLINE
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.reader import reader
from dask_zbig.storage.segment import SegmentRef
from dask_zbig.storage.survey import Survey, survey
from dask_zbig.storage.tree import ExtentLeaf, checked
from dask_zbig.tempfiles import Hold
from dask_zbig.transaction import manager_of

__all__ = ["CompactReport", "compact_array"]

#: A leaf with more extents than this is copied whole, if that joins them.
FRAGMENTED = 256
#: How often a transaction is tried that others' changes get in the way of.
TRIES = 8


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What was done. Of extents and segments: how many there were, and are."""

    bytes: int
    transactions: int
    extents: tuple[int, int]
    segments: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return asdict(self)


def compact_array(
    db: Any,
    oid: bytes,
    *,
    transaction_size: int = 256 << 20,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CompactReport:
    """Join what small segments an array has; its bytes stay what they are.

    Parameters
    ----------
    db : ZODB.DB
    oid : bytes
        Of the array.
    transaction_size : int
        Bytes that are copied in one transaction, at least one leaf's 64 MiB.
    progress
        Called with the number of leaves that are done, and of all.

    Raises
    ------
    LoadError
        If a segment cannot be read. Then the transaction that needed it is not done, those before it are.
    ConflictError
        If others change the same leaves all the time.
    POSKeyError
        There is no such array.

    Notes
    -----
    May run while others read and write. A writer of the same 64 MiB may get a ConflictError, as from any other writer.
    Space on disk comes back at the next pack.
    """
    with _connected(db) as (connection, manager):
        array = connection.get(oid)
        file, size = array._file, array.nbytes
        before = survey(file, size)
        indices = [index for index, _ in file.leaves(0, size)]
        copied = transactions = done = 0
        while done < len(indices):
            batch = _Batch(connection, oid, before)
            for last in (False,) * (TRIES - 1) + (True,):
                try:
                    manager.get().note(f"compact {array!r}")
                    stop = batch.run(indices, done, transaction_size)
                    manager.commit()
                    break
                except ConflictError:
                    manager.abort()
                    if last:
                        raise
                    time.sleep(0.05)  # (who commits all the time should get on)
            copied += batch.copied
            transactions += batch.copied > 0
            done = stop
            connection.cacheGC()
            progress(done, len(indices))
        after = survey(file, array.nbytes)
        return CompactReport(
            copied,
            transactions,
            (before.extents, after.extents),
            (len(before.segments), len(after.segments)),
        )


@contextlib.contextmanager
def _connected(db: Any) -> Iterator[tuple[Any, Any]]:
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    hold = Hold(manager_of(connection).scratch)
    try:
        yield connection, manager
    finally:
        manager.abort()
        hold.release()
        connection.close()


class _Batch:
    """Leaves that are compacted in one transaction."""

    def __init__(self, connection: Any, oid: bytes, before: Survey) -> None:
        self._array = connection.get(oid)
        self._before = before
        self._reader = reader(connection.db())
        blobs = database.has_blobs(connection)
        durable = not database.uploads_blobs(connection)
        self._target = Target(connection, blobs, manager_of(connection).scratch, get("inline-limit"), durable)
        self.copied = 0

    def run(self, indices: list[int], first: int, size: int) -> int:
        """Compact the leaves from number `first` on, until so many bytes were copied; returns the next one."""
        self.copied = 0
        file = self._array._file
        n = first
        while n < len(indices) and self.copied < size:
            for index, leaf in file.leaves(indices[n] * LEAF_BYTES, (indices[n] + 1) * LEAF_BYTES):
                self._compact(checked(leaf, index))
            n += 1
        if self.copied:
            guard_truncation(file, self._target.connection)
        return n

    def _compact(self, leaf: ExtentLeaf) -> None:
        keys = self._chosen(leaf)
        for group in self._groups(leaf, keys):
            chosen = [i for i, ref in enumerate(leaf.refs) if ref.key in group]
            size = int(_sizes(leaf)[chosen].sum())
            join_segments(leaf, chosen, self._reader.source, self._target)
            self.copied += size

    def _chosen(self, leaf: ExtentLeaf) -> list[Any]:
        """The keys of the segments to be joined."""
        extents = leaf.extents
        if len(extents) > FRAGMENTED and len(extents) > 2 * len(ex.covered(extents)):
            return [ref.key for ref in leaf.refs]
        blobs = self._target.blobs
        sizes = zip(leaf.refs, _sizes(leaf).tolist(), strict=True)
        able = [(ref.key, size) for ref, size in sizes if size < DONE and (blobs or ref.inline)]
        small = [key for key, size in able if size < DONE_INLINE]
        medium = [key for key, size in able if size >= DONE_INLINE]
        if blobs and len(medium) > 1:  # (of one there would be just another copy)
            small += medium
        sparse = [ref.key for i, ref in enumerate(leaf.refs) if self._is_sparse(ref, extents[extents["segment"] == i])]
        return list(dict.fromkeys(small + sparse)) if sparse or len(small) > 1 else []

    def _is_sparse(self, ref: SegmentRef, shown: ex.Extents) -> bool:
        """Whether most of a blob was overwritten, in all of the array, and a copy would take less."""
        use = self._before.segments.get(ref.key)
        return not ref.inline and use is not None and 2 * use.live < ref.length and 2 * _packed(shown) < ref.length

    def _groups(self, leaf: ExtentLeaf, keys: list[Any]) -> Iterator[set[Any]]:
        """What is to be joined to one segment: all, or, if it must be an object, what that should hold."""
        if self._target.blobs:
            if keys:
                yield set(keys)
            return
        sizes = dict(zip((ref.key for ref in leaf.refs), _sizes(leaf).tolist(), strict=True))
        group: list[Any] = []
        for key in keys:
            if group and sum(sizes[k] for k in group) + sizes[key] > INLINE_PIECE:
                if len(group) > 1:
                    yield set(group)
                group = []
            group.append(key)
        if group and (len(group) > 1 or len(keys) == 1):
            yield set(group)


def _sizes(leaf: ExtentLeaf) -> Any:
    """The bytes that a leaf shows of each of its segments."""
    sizes = np.zeros(len(leaf.refs), np.int64)
    np.add.at(sizes, leaf.extents["segment"], (leaf.extents["stop"] - leaf.extents["start"]).astype(np.int64))
    return sizes


def _packed(extents: ex.Extents) -> int:
    """What a `Packer` would make of them: each run begins at its place within a page."""
    size = 0
    for start, stop in ex.covered(extents).tolist():
        size += (start - size) % PAGE + stop - start
    return size
