"""How changes become segments: trim to what really changed, choose where it goes, splice the extent map.

Called while a transaction commits, before the storage's commit lock is taken.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from ZODB.blob import Blob

from dask_zbig.errors import ScratchError
from dask_zbig.memory._native import PAGE
from dask_zbig.memory.plan import Source
from dask_zbig.openfile import OpenFile, compose
from dask_zbig.storage import extents as ex
from dask_zbig.storage.compaction import BLOB_BYTES, to_join
from dask_zbig.storage.format import LEAF_BYTES
from dask_zbig.storage.segment import BytesSource, FileSource, InlineSegment, SegmentRef, checksum

__all__ = ["Target", "add_blobs", "flush", "seal", "store_inline", "trim"]

#: Of a longer run only this much at each end is compared: what is between was written in bulk.
EDGE = 2 << 20
STEP = 64 << 10
#: More separate changes than this in one run are joined to larger ones: the extent map must stay small.
MAX_RANGES = 512
INLINE_PIECE = 1 << 20
#: Holes up to this size are filled when their neighbours are joined.
BRIDGE = 64
PACKED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """Where segments go."""

    connection: Any
    blobs: bool
    scratch: str
    inline_limit: int


# -- trimming


def trim(
    extents: npt.NDArray[np.void],
    sources: Sequence[Source],
    base: npt.NDArray[np.void],
    base_sources: Sequence[Source],
    granule: int,
) -> npt.NDArray[np.void]:
    """Reduce runs of dirty pages to the bytes that differ from the base, in whole elements of `granule` bytes.

    Without this a writer would claim, and conflict over, its neighbours' bytes in the same page.
    """
    rows: list[tuple[int, int, int, int]] = []
    for start, stop, index, offset in extents.tolist():

        def differing(lo: int, hi: int, index: int = index, shift: int = offset - start) -> list[list[int]]:
            new = sources[index].read(lo + shift, hi - lo)
            return _differing(new, compose(base, base_sources, lo, hi), lo, granule)

        changed = differing(start, stop) if stop - start <= 2 * EDGE else _edges(differing, start, stop)
        for lo, hi in ex.normalize(np.array(changed, np.uint64).reshape(-1, 2)).tolist():
            rows.append((lo, hi, index, offset + (lo - start)))
    return ex.coalesce(ex.make(rows))


def _edges(differing: Callable[[int, int], list[list[int]]], start: int, stop: int) -> list[list[int]]:
    """Compare a long run from both ends, up to EDGE, as far as a step in which every element was changed."""
    changed: list[list[int]] = []
    lo, hi = start, stop
    while lo < start + EDGE:
        step = differing(lo, lo + STEP)
        changed += step
        lo += STEP
        if step == [[lo - STEP, lo]]:
            break
    while hi > stop - EDGE:
        step = differing(hi - STEP, hi)
        changed += step
        hi -= STEP
        if step == [[hi, hi + STEP]]:
            break
    return [*changed, [lo, hi]]


def _differing(new: bytes, old: bytearray, at: int, granule: int) -> list[list[int]]:
    """Ranges of the elements, clipped to these bytes, in which some byte differs."""
    if new == old:
        return []
    first_item = at // granule
    head = at - first_item * granule
    items = -(-(head + len(new)) // granule)
    unequal = np.zeros(items * granule, np.bool_)
    np.not_equal(np.frombuffer(new, np.uint8), np.frombuffer(old, np.uint8), out=unequal[head : head + len(new)])
    wide = np.dtype(f"u{granule}") if granule in (1, 2, 4, 8) else None
    changed: npt.NDArray[Any]
    changed = np.not_equal(unequal.view(wide), 0) if wide is not None else unequal.reshape(-1, granule).any(axis=1)
    turns = np.flatnonzero(changed[1:] != changed[:-1]) + 1
    turns = np.concatenate([[0] if changed[0] else [], turns, [items] if changed[-1] else []]).astype(np.int64)
    lo, hi = turns[0::2], turns[1::2]
    gap = 1
    while len(lo) > MAX_RANGES:
        gap *= 4
        apart = lo[1:] - hi[:-1] > gap
        lo, hi = lo[np.append(True, apart)], hi[np.append(apart, True)]
    lo = np.maximum((lo + first_item) * granule, at)
    hi = np.minimum((hi + first_item) * granule, at + len(new))
    return np.stack([lo, hi], 1).tolist()  # type: ignore[no-any-return]


# -- flushing


@dataclass
class _Changes:
    """What a transaction changed: extents into one list of sources."""

    extents: npt.NDArray[np.void]
    sources: list[Source] = field(default_factory=list)
    refs: list[SegmentRef | None] = field(default_factory=list)
    loose: list[bool] = field(default_factory=list)  # dirty pages, of which not every byte was changed


def _combine(file: OpenFile) -> _Changes:
    all_ = _Changes(ex.empty())
    for layer in file.layers:
        shift = np.arange(len(layer.sources)) + len(all_.sources)
        all_.extents = ex.splice(all_.extents, ex.renumber(layer.extents, shift))
        all_.sources += layer.sources
        all_.refs += layer.refs
        all_.loose += [ref is None and not layer.exact for ref in layer.refs]
    all_.extents = ex.clip(all_.extents, 0, file.owner.nbytes)  # an old view may have written past the end
    return all_


def _trimmed(file: OpenFile, changes: _Changes) -> npt.NDArray[np.void]:
    loose = np.array(changes.loose)[changes.extents["segment"]]
    parts = [changes.extents[~loose]]
    todo = changes.extents[loose]
    for lo, hi in ex.covered(todo).tolist():
        file.resolve(lo, hi)
        base, base_sources = file.content(lo, hi, base_only=True)
        parts.append(trim(ex.clip(todo, lo, hi), changes.sources, base, base_sources, file.owner.granule))
    joined = np.concatenate(parts)
    return joined[np.argsort(joined["start"], kind="stable")]


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
    extents, refs = _Writer(file, target).store(changes)
    touched = sorted(
        {i for lo, hi in ex.covered(extents).tolist() for i in range(lo // LEAF_BYTES, (hi - 1) // LEAF_BYTES + 1)}
    )
    for index in touched:
        leaf = file.file.leaf(index)
        part = ex.clip(extents, index * LEAF_BYTES, (index + 1) * LEAF_BYTES)
        used = ex.used(part)
        mapping = np.zeros(len(refs), np.int64)
        mapping[used] = np.arange(len(used))
        leaf.splice(ex.renumber(part, mapping), [refs[i] for i in used.tolist()])
        _compact(file, leaf, target)
    _guard_truncation(file, target.connection)
    file.spliced(touched)


def _guard_truncation(file: OpenFile, connection: Any) -> None:
    """A concurrent truncation might take the very leaf away: then this commit must conflict."""
    truncation = file.file.truncation
    if truncation._p_oid is not None and truncation._p_jar is connection and not truncation._p_changed:
        truncation._p_activate()
        if truncation._p_serial is not None:
            connection.readCurrent(truncation)


# -- writing segments


class _Writer:
    """Makes segments for one file's changes."""

    def __init__(self, file: OpenFile, target: Target) -> None:
        self.file = file
        self.target = target
        self.refs: list[SegmentRef] = []
        self.rows: list[tuple[int, int, int, int]] = []

    def store(self, changes: _Changes) -> tuple[npt.NDArray[np.void], list[SegmentRef]]:
        extents, sources = changes.extents, changes.sources
        staged = np.array([r is not None for r in changes.refs], bool)[extents["segment"]]
        self._keep(extents[staged], changes.refs)
        rest = extents[~staged]
        if not self.target.blobs or ex.total(ex.covered(rest)) <= self.target.inline_limit:
            self._inline(rest, sources)
        else:
            dense = self._dense(rest, sources)
            self._whole(rest[np.isin(rest["segment"], dense)], sources)
            self._packed(rest[~np.isin(rest["segment"], dense)], sources)
        return ex.make(sorted(self.rows)), self.refs

    def _keep(self, extents: npt.NDArray[np.void], refs: Sequence[SegmentRef | None]) -> None:
        """What is in segments already."""
        index: dict[int, int] = {}
        for start, stop, i, offset in extents.tolist():
            if i not in index:
                ref = refs[i]
                assert ref is not None
                index[i] = self._add(ref)
            self.rows.append((start, stop, index[i], offset))

    def _add(self, ref: SegmentRef) -> int:
        self.refs.append(ref)
        return len(self.refs) - 1

    def _inline(self, extents: npt.NDArray[np.void], sources: Sequence[Source]) -> None:
        """Bytes into objects, at most INLINE_PIECE each."""
        batch: list[tuple[int, bytes]] = []
        size = 0
        for lo, data in _pieces(extents, sources, INLINE_PIECE):
            if size + len(data) > INLINE_PIECE:
                self._put_inline(batch)
                batch, size = [], 0
            batch.append((lo, data))
            size += len(data)
        self._put_inline(batch)

    def _put_inline(self, batch: list[tuple[int, bytes]]) -> None:
        if not batch:
            return
        index = self._add(store_inline(self.file, self.target.connection, b"".join(data for _, data in batch)))
        offset = 0
        for lo, data in batch:
            self.rows.append((lo, lo + len(data), index, offset))
            offset += len(data)

    @staticmethod
    def _dense(extents: npt.NDArray[np.void], sources: Sequence[Source]) -> list[int]:
        """The sources whose files are worth keeping whole: no more than half of them is unused."""
        live = np.zeros(len(sources), np.int64)
        np.add.at(live, extents["segment"], (extents["stop"] - extents["start"]).astype(np.int64))
        return [i for i in ex.used(extents).tolist() if 2 * live[i] >= sources[i].length]

    def _whole(self, extents: npt.NDArray[np.void], sources: Sequence[Source]) -> None:
        """Scratch files become blobs as they are: no byte is copied."""
        used = ex.used(extents).tolist()
        files = [s for s in (sources[i] for i in used) if isinstance(s, FileSource)]
        assert len(files) == len(used)
        refs = store_files(self.file, self.target, files)
        index = {i: self._add(ref) for i, ref in zip(used, refs, strict=True)}
        self.rows += [(a, b, index[i], o) for a, b, i, o in extents.tolist()]

    def _packed(self, extents: npt.NDArray[np.void], sources: Sequence[Source]) -> None:
        """Scattered changes are copied together, each at its place within a page so that it can be mapped."""
        packer = _Packer(self.target.scratch)
        rows: list[tuple[int, int, int, int]] = []
        for lo, data in _pieces(extents, sources, PACKED_BYTES):
            number, offset = packer.add(lo, data)
            rows.append((lo, lo + len(data), number, offset))
        refs = store_files(self.file, self.target, packer.finish())
        index = [self._add(ref) for ref in refs]
        self.rows += [(a, b, index[n], o) for a, b, n, o in rows]


def _pieces(extents: npt.NDArray[np.void], sources: Sequence[Source], most: int) -> Iterator[tuple[int, bytes]]:
    for start, stop, index, offset in extents.tolist():
        for lo in range(start, stop, most):
            yield lo, sources[index].read(offset + (lo - start), min(most, stop - lo))


class _Packer:
    """Files of up to PACKED_BYTES in which pieces lie at the same offset modulo a page as in the array."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._paths: list[str] = []
        self._out: Any = None

    def add(self, position: int, data: bytes) -> tuple[int, int]:
        """Write a piece; returns the number of its file and the offset in it."""
        try:
            if self._out is None or self._out.tell() + len(data) > PACKED_BYTES + PAGE:
                self._next()
            offset = self._out.tell()
            offset += (position - offset) % PAGE
            self._out.seek(offset)
            self._out.write(data)
        except OSError as e:
            raise ScratchError(e.errno, f"cannot write to {self._paths[-1]!r}: {e.strerror}") from e
        return len(self._paths) - 1, offset

    def _next(self) -> None:
        if self._out is not None:
            self._out.close()
        self._paths.append(os.path.join(self._directory, f"zbig-packed-{os.getpid()}-{secrets.token_hex(8)}"))
        fd = os.open(self._paths[-1], os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._out = os.fdopen(fd, "wb")

    def finish(self) -> list[FileSource]:
        """The files."""
        if self._out is not None:
            self._out.close()
        return [FileSource(path) for path in self._paths]


def store_inline(file: OpenFile | None, connection: Any, data: bytes) -> SegmentRef:
    """A new inline segment."""
    segment = InlineSegment(data)
    connection.add(segment)
    ref = SegmentRef(segment, len(data), checksum(data))
    if file is not None:
        file.local[ref.key] = BytesSource(data)
    return ref


def store_files(file: OpenFile | None, target: Target, files: Sequence[FileSource]) -> list[SegmentRef]:
    """New blobs out of these files, which are moved. Durable before the transaction is."""
    return add_blobs(file, target.connection, files, seal(files))


def seal(files: Sequence[FileSource]) -> list[int]:
    """Make files durable, and return their checksums."""
    with ThreadPoolExecutor(1, "zbig-sync") as pool:
        syncs = [pool.submit(_sync, source) for source in files]
        sums = [_file_checksum(source) for source in files]  # while the disk is busy
        for sync in syncs:
            sync.result()
    return sums


def add_blobs(
    file: OpenFile | None, connection: Any, files: Sequence[FileSource], sums: Sequence[int]
) -> list[SegmentRef]:
    """New blobs out of sealed files, which are moved."""
    refs = []
    for source, digest in zip(files, sums, strict=True):
        ref = SegmentRef(_new_blob(connection, source.path), source.length, digest)
        if file is not None:
            file.local[ref.key] = source
        refs.append(ref)
    return refs


def _new_blob(connection: Any, path: str) -> Blob:
    blob = Blob()
    connection.add(blob)  # before consumeFile, or that would move the file to the system's temporary directory
    blob.consumeFile(path)
    # In the middle of a commit (of an array that was not stored before) the connection has the blob on two
    # lists now, as added and as changed, and would store it twice.
    added = connection._added_during_commit
    if added is not None and blob in added:
        added.remove(blob)
    return blob


def _sync(source: FileSource) -> None:
    try:
        os.fsync(source.fileno())
    except OSError as e:
        raise ScratchError(e.errno, f"cannot sync {source.path!r}: {e.strerror}") from e


def _file_checksum(source: FileSource) -> int:
    return checksum(np.memmap(source.path, np.uint8, "r")) if source.length else checksum(b"")


# -- compaction


def _compact(file: OpenFile, leaf: Any, target: Target) -> None:
    """Join small segments of a leaf where there have come to be too many; see `storage.compaction`."""
    chosen = to_join(leaf.extents, leaf.refs)
    if not chosen:
        return
    rows = _bridged(leaf.extents, np.isin(leaf.extents["segment"], chosen), len(leaf.refs))
    sources: list[Source] = [file.source(ref) if i in chosen else BytesSource(b"") for i, ref in enumerate(leaf.refs)]
    sources.append(BytesSource(bytes(BRIDGE)))
    if target.blobs and ex.total(ex.covered(rows)) >= BLOB_BYTES:
        packer = _Packer(target.scratch)
        new = []
        for lo, data in _pieces(rows, sources, PACKED_BYTES):
            number, offset = packer.add(lo, data)
            new.append((lo, lo + len(data), number, offset))
        leaf.splice(ex.make(new), store_files(file, target, packer.finish()))
        return
    parts, new, offset = [], [], 0
    for lo, data in _pieces(rows, sources, INLINE_PIECE):
        new.append((lo, lo + len(data), 0, offset))
        parts.append(data)
        offset += len(data)
    leaf.splice(ex.make(new), [store_inline(file, target.connection, b"".join(parts))])


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
    joined = np.concatenate([rows, bridges])
    return joined[np.argsort(joined["start"])]
