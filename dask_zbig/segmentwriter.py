"""Making segments out of changes: which become blobs as they are, which are packed together, which go inline."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from ZODB.blob import Blob

from dask_zbig.distinct import among
from dask_zbig.errors import ScratchError
from dask_zbig.memory._native import PAGE
from dask_zbig.memory.plan import Source
from dask_zbig.openfile import OpenFile
from dask_zbig.storage import extents as ex
from dask_zbig.storage.segment import InlineSegment, SegmentRef, checksum
from dask_zbig.storage.sources import BytesSource, FileSource
from dask_zbig.tempfiles import new_name

__all__ = [
    "Changes",
    "Packer",
    "SegmentWriter",
    "Target",
    "add_blobs",
    "pieces",
    "seal",
    "store_files",
    "store_inline",
    "store_packed",
]

INLINE_PIECE = 1 << 20
PACKED_BYTES = 64 << 20
#: Of so few bytes the checksums take less time than to start a thread that syncs them meanwhile.
ALONE = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """Where segments go.

    `durable`: whether their files must be, here: not if a server gets copies of them, and syncs these.
    """

    connection: Any
    blobs: bool
    scratch: str
    inline_limit: int
    durable: bool = True


@dataclass
class Changes:
    """What a transaction changed: extents into one list of sources."""

    extents: npt.NDArray[np.void]
    sources: list[Source] = field(default_factory=list)
    refs: list[SegmentRef | None] = field(default_factory=list)
    loose: list[bool] = field(default_factory=list)  # dirty pages, of which not every byte was changed
    written: ex.Ranges = field(default_factory=ex.no_ranges)  # but here every byte was


class SegmentWriter:
    """Makes segments for one file's changes."""

    def __init__(self, file: OpenFile, target: Target) -> None:
        self.file = file
        self.target = target
        self.refs: list[SegmentRef] = []
        self.rows: list[tuple[int, int, int, int]] = []

    def store(self, changes: Changes) -> tuple[npt.NDArray[np.void], list[SegmentRef]]:
        rest, sources = changes.extents, changes.sources
        if any(r is not None for r in changes.refs):
            staged = np.array([r is not None for r in changes.refs], bool)[rest["segment"]]
            self._keep(rest[staged], changes.refs)
            rest = rest[~staged]
        if self._large(rest):
            whole = among(rest["segment"], self._dense(rest, sources))
            self._whole(rest[whole], sources)
            rest = rest[~whole]
        if self._large(rest):
            self._packed(rest, sources)
        else:
            self._inline(rest, sources)
        return ex.make(sorted(self.rows)), self.refs

    def _large(self, extents: npt.NDArray[np.void]) -> bool:
        return self.target.blobs and ex.total(ex.covered(extents)) > self.target.inline_limit

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
        for lo, data in pieces(extents, sources, INLINE_PIECE):
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
        """The scratch files that are worth keeping whole: no more than half of them is unused, and none is old."""
        live = np.zeros(len(sources), np.int64)
        np.add.at(live, extents["segment"], (extents["stop"] - extents["start"]).astype(np.int64))
        used = ex.used(extents).tolist()
        files = [(i, source) for i in used if isinstance(source := sources[i], FileSource)]
        return [i for i, source in files if not source.shared and 2 * live[i] >= source.length]

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
        rows, refs = store_packed(self.file, self.target, extents, sources)
        index = [self._add(ref) for ref in refs]
        self.rows += [(a, b, index[n], o) for a, b, n, o in rows]


def pieces(extents: npt.NDArray[np.void], sources: Sequence[Source], most: int) -> Iterator[tuple[int, bytes]]:
    for start, stop, index, offset in extents.tolist():
        for lo in range(start, stop, most):
            yield lo, sources[index].read(offset + (lo - start), min(most, stop - lo))


class Packer:
    """Files of up to PACKED_BYTES in which pieces lie at the same offset modulo a page as in the array.

    `directory` is held (see `dask_zbig.tempfiles`) by the space of the file that the pieces are of.
    """

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
        self._paths.append(os.path.join(self._directory, new_name()))
        fd = os.open(self._paths[-1], os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._out = os.fdopen(fd, "wb")

    def finish(self) -> list[FileSource]:
        """The files."""
        if self._out is not None:
            self._out.close()
        return [FileSource(path) for path in self._paths]

    def discard(self) -> None:
        """Remove the files, as far as they are still there."""
        if self._out is not None:
            with contextlib.suppress(OSError):  # what was not written yet need not be
                self._out.close()
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)


def store_packed(
    file: OpenFile | None, target: Target, extents: npt.NDArray[np.void], sources: Sequence[Source]
) -> tuple[list[tuple[int, int, int, int]], list[SegmentRef]]:
    """New blobs with what the extents describe; returns extents of these, as rows. Or an error, and no file is left."""
    packer = Packer(target.scratch)
    files: list[FileSource] = []
    try:
        rows = []
        for lo, data in pieces(extents, sources, PACKED_BYTES):
            number, offset = packer.add(lo, data)
            rows.append((lo, lo + len(data), number, offset))
        files = packer.finish()
        return rows, store_files(file, target, files)
    except BaseException:
        for source in files:
            source.close()
        packer.discard()
        raise


def store_inline(file: OpenFile | None, connection: Any, data: bytes) -> SegmentRef:
    """A new inline segment."""
    segment = InlineSegment(data)
    connection.add(segment)
    ref = SegmentRef(segment, len(data), checksum(data))
    if file is not None:
        file.local[ref.key] = BytesSource(data)
        if file.reader is not None:
            file.reader.remember(ref, data)
    return ref


def store_files(file: OpenFile | None, target: Target, files: Sequence[FileSource]) -> list[SegmentRef]:
    """New blobs out of these files, which are moved. Durable before the transaction is."""
    return add_blobs(file, target.connection, files, seal(files, durable=target.durable))


def seal(files: Sequence[FileSource], *, durable: bool = True) -> list[int]:
    """Make files durable, unless they need not be, and return their checksums."""
    if not durable:
        return [_file_checksum(source) for source in files]
    if sum(source.length for source in files) <= ALONE:
        for source in files:
            _sync(source)
        return [_file_checksum(source) for source in files]
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
        blob = Blob()
        connection.add(blob)  # before it consumes the file, or that would go to the system's temporary directory
        if file is None:
            blob.consumeFile(source.path)
        else:
            source.give(blob.consumeFile)
        _remove_if_not_stored(blob, connection.transaction_manager.get())
        _once(connection, blob)
        ref = SegmentRef(blob, source.length, digest)
        if file is not None:
            file.local[ref.key] = source
        refs.append(ref)
    return refs


def _remove_if_not_stored(blob: Blob, current: Any) -> None:
    """ZODB's own callback for this is lost if a blob dies as part of a cycle: after a commit that failed, it does."""
    # Not when the blob ends, but its transaction: while code runs at the end of a persistent object, another thread may
    # take that from the connection's cache (see `storage.tree._Callbacks`).
    weakref.finalize(current, _unlink, blob._p_blob_uncommitted, os.getpid())


def _unlink(path: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has the same object, but the file is not its own
        with contextlib.suppress(FileNotFoundError):  # the storage has moved it
            os.unlink(path)


def _once(connection: Any, blob: Blob) -> None:
    # In the middle of a commit (of an array that was not stored before) the connection has the blob on two
    # lists now, as added and as changed, and would store it twice.
    added = connection._added_during_commit
    if added is not None and blob in added:
        added.remove(blob)


def _sync(source: FileSource) -> None:
    try:
        file = source.descriptor()
        os.fsync(file.fd)
    except OSError as e:
        raise ScratchError(e.errno, f"cannot sync {source.path!r}: {e.strerror}") from e


def _file_checksum(source: FileSource) -> int:
    return checksum(np.memmap(source.path, np.uint8, "r")) if source.length else checksum(b"")
