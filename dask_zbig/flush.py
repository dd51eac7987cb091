"""How changes become part of the extent map: trim to what really changed, make segments of it, splice them in.

Called while a transaction commits, before the storage's commit lock is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_zbig.distinct import among
from dask_zbig.errors import LoadError
from dask_zbig.memory.plan import Source
from dask_zbig.openfile import OpenFile
from dask_zbig.segmentwriter import (
    INLINE_PIECE,
    Changes,
    SegmentWriter,
    Target,
    pieces,
    store_inline,
    store_packed,
)
from dask_zbig.storage import extents as ex
from dask_zbig.storage.compaction import BLOB_BYTES, to_join
from dask_zbig.storage.format import LEAF_BYTES, name_of
from dask_zbig.storage.segment import SegmentRef
from dask_zbig.storage.sources import BytesSource
from dask_zbig.storage.tree import ZBigFile, checked
from dask_zbig.trim import STEP, compose, torn, trim

__all__ = ["flush", "guard_truncation", "join_segments"]

_log = logging.getLogger(__name__)

#: Holes up to this size are filled when their neighbours are joined.
BRIDGE = 64


def _combine(file: OpenFile) -> Changes:
    end = file.owner.nbytes  # an old view may have written past it
    if len(file.layers) == 1:
        (layer,) = file.layers
        loose = [ref is None and not layer.exact for ref in layer.refs]
        return Changes(ex.clip(layer.extents, 0, end), list(layer.sources), list(layer.refs), loose, layer.written)
    all_ = Changes(ex.empty())
    for layer in file.layers:
        shift = np.arange(len(layer.sources)) + len(all_.sources)
        all_.extents = ex.splice(all_.extents, ex.renumber(layer.extents, shift))
        all_.sources += layer.sources
        all_.refs += layer.refs
        all_.loose += [ref is None and not layer.exact for ref in layer.refs]
        all_.written = ex.union(all_.written, layer.written)
    all_.extents = ex.clip(all_.extents, 0, end)
    return all_


def _trimmed(file: OpenFile, changes: Changes) -> npt.NDArray[np.void]:
    parts: list[ex.Extents] = []
    todo = changes.extents
    if not all(changes.loose):
        loose = np.array(changes.loose, bool)[changes.extents["segment"]]
        parts, todo = [changes.extents[~loose]], changes.extents[loose]
    for lo, hi in ex.covered(todo).tolist():
        file.resolve(lo, hi)
        base, base_sources = file.content(lo, hi, base_only=True)
        part = ex.clip(todo, lo, hi)
        # What was written without a look at the old bytes need not be compared if these would have to be fetched. Nor
        # with a hole: zeros that are among the new bytes would only cut them into pieces.
        far = [i for i, source in enumerate(base_sources) if not source.local()]
        certain: list[tuple[int, int]] = []
        if not far and hi - lo <= STEP:
            certain = _uncovered(changes.written, base, lo, hi)
        elif len(changes.written):
            there = ex.covered(base[~among(base["segment"], far)])
            unseen = ex.intersect(changes.written, ex.subtract(ex.one_range(lo, hi), there))
            parts.append(ex.restrict(part, unseen))
            part = ex.restrict(part, ex.subtract(ex.one_range(lo, hi), unseen))
        parts.append(trim(part, changes.sources, base, base_sources, file.owner.granule, certain))
    if len(parts) == 1:
        (part,) = parts
        return part
    joined = np.concatenate([ex.empty(), *parts], dtype=ex.EXTENT)
    return joined[np.argsort(joined["start"], kind="stable")]


def _uncovered(written: ex.Ranges, base: npt.NDArray[np.void], lo: int, hi: int) -> list[tuple[int, int]]:
    """The parts of [lo, hi) that were written and are a hole in the base. (For a few rows, faster than by arrays.)"""
    holes, at = [], lo
    for start, stop, *_ in base.tolist():
        if start > at:
            holes.append((at, start))
        at = stop
    holes.append((at, hi))
    found = [(max(a, x), min(b, y)) for a, b in written.tolist() for x, y in holes]
    return [(a, b) for a, b in found if a < b]


def _whole_elements(file: OpenFile, changes: Changes) -> None:
    """Claim elements as a whole, also where only one of the pages that they lie in was written."""
    rows, parts, offset = [], [], 0
    for lo, hi in torn(changes.extents, file.owner.granule).tolist():
        file.resolve(lo, hi)
        parts.append(compose(*file.content(lo, hi), lo, hi))
        rows.append((lo, hi, len(changes.sources), offset))
        offset += hi - lo
    if not rows:
        return
    changes.extents = ex.splice(changes.extents, ex.make(rows))
    changes.sources.append(BytesSource(b"".join(parts)))
    changes.refs.append(None)


def flush(file: OpenFile, target: Target) -> None:
    """Turn a file's layers into segments, and splice them into its leaves.

    Raises
    ------
    Exception
        `OpenFile.failure`, if there is one; `ScratchError`; whatever the storage raises.
    """
    file.freeze()
    if file.failure is not None:
        raise file.failure
    if not file.layers:
        return
    changes = _combine(file)
    changes.extents = _trimmed(file, changes)
    _whole_elements(file, changes)
    extents, refs = SegmentWriter(file, target).store(changes)
    touched = sorted(
        {i for lo, hi in ex.covered(extents).tolist() for i in range(lo // LEAF_BYTES, (hi - 1) // LEAF_BYTES + 1)}
    )
    for index in touched:
        leaf = checked(file.file.leaf(index), index)
        leaf.splice(ex.clip(extents, index * LEAF_BYTES, (index + 1) * LEAF_BYTES), refs)
        _compact(file, leaf, target)
    guard_truncation(file.file, target.connection)
    file.spliced(touched)


def guard_truncation(file: ZBigFile, connection: Any) -> None:
    """A concurrent truncation might take the very leaf away: then this commit must conflict."""
    truncation = file.truncation
    if truncation._p_oid is not None and truncation._p_jar is connection and not truncation._p_changed:
        truncation._p_activate()
        if truncation._p_serial is not None:
            connection.readCurrent(truncation)


def _compact(file: OpenFile, leaf: Any, target: Target) -> None:
    """Join small segments of a leaf where there have come to be too many; see `storage.compaction`."""
    chosen = to_join(leaf.extents, leaf.refs, blobs=target.blobs, local=lambda ref: file.source(ref).local())
    if chosen:
        try:
            join_segments(leaf, chosen, file.source, target, file)
        except LoadError as e:  # of what others have written: whoever reads that is to hear of it, not who commits
            _log.warning("small segments of %s are not joined: %s", name_of(leaf), e)


def join_segments(
    leaf: Any, chosen: list[int], source: Callable[[SegmentRef], Source], target: Target, file: OpenFile | None = None
) -> None:
    """Copy what a leaf shows of some of its segments, by their indices, into a new one.

    Parameters
    ----------
    source
        Where the bytes of a segment can be read.
    file
        Whose leaf it is, if that is open here and shall know of the new segment.
    """
    mask = among(leaf.extents["segment"], chosen)
    rows = _bridged(leaf.extents, mask, len(leaf.refs))
    moved = [(a, b, leaf.refs[i].key, offset) for a, b, i, offset in leaf.extents[mask].tolist()]
    sources: list[Source] = [source(ref) if i in chosen else BytesSource(b"") for i, ref in enumerate(leaf.refs)]
    sources.append(BytesSource(bytes(BRIDGE)))
    if target.blobs and ex.total(ex.covered(rows)) >= BLOB_BYTES:
        new, refs = store_packed(file, target, rows, sources)
        leaf.join(ex.make(new), refs, moved)
        return
    parts, new, offset = [], [], 0
    for lo, data in pieces(rows, sources, INLINE_PIECE):
        new.append((lo, lo + len(data), 0, offset))
        parts.append(data)
        offset += len(data)
    leaf.join(ex.make(new), [store_inline(file, target.connection, b"".join(parts))], moved)


def _bridged(extents: npt.NDArray[np.void], chosen: npt.NDArray[np.bool_], zeros: int) -> npt.NDArray[np.void]:
    """The chosen extents, with the small holes between two of them filled from segment number `zeros`.

    Zeros that were written over a hole count as unchanged; left out, they would keep an array of appended pieces
    in pieces for ever.
    """
    rows = extents[chosen]
    follows = np.flatnonzero(chosen[1:] & chosen[:-1])
    lo, hi = extents["stop"][follows], extents["start"][follows + 1]
    small = (hi > lo) & (hi - lo <= BRIDGE)
    bridges = np.zeros(int(small.sum()), ex.EXTENT)
    bridges["start"], bridges["stop"], bridges["segment"] = lo[small], hi[small], zeros
    joined = np.concatenate([rows, bridges], dtype=ex.EXTENT)
    return joined[np.argsort(joined["start"])]
