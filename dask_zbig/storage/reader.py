"""Reading committed segments from any thread.

A segment has one revision for ever, so it is read without MVCC and without the user's Connection: by its oid,
straight from the storage. That is what lets a loader thread serve a fault of any connection.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import xxhash
from ZODB._compat import PersistentUnpickler
from ZODB.blob import Blob
from ZODB.interfaces import IMVCCStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import load_current, maxtid

from dask_zbig.descriptors import Descriptor, Reopened, close_unused
from dask_zbig.errors import LoadError, ZBigError
from dask_zbig.storage import checked
from dask_zbig.storage.segment import GoneError, Identity, InlineSegment, SegmentRef, checksum, oid_of
from dask_zbig.storage.sources import read, read_all

__all__ = ["BlobSource", "InlineSource", "SegmentReader", "SegmentSource", "reader"]

#: A segment gets another revision only when its creation is undone, and when that is undone: we look at this many.
REVISIONS = 16
_STEP = 8 << 20
#: So many objects are asked for ahead at once.
AHEAD = 4096
#: So many segments of at most `SMALL` bytes (1 MiB) stay in memory once they were read or made: a commit compares a
#: page with all that the commits before have put there, and joins what they have put into the same leaf.
RECENT, SMALL = 256, 4096
#: A blob that came damaged is fetched again: a server that is restarted may spoil several downloads in a row.
_DOWNLOADS = 4


class _Committed:
    """A committed segment, read by its oid. Thread-safe."""

    def __init__(self, reader_: SegmentReader, oid: bytes, ref: SegmentRef) -> None:
        self._reader = reader_
        self._oid = oid
        self.length = ref.length
        self._checksum = ref.checksum

    def __repr__(self) -> str:
        return _name(self._oid, self.length)


class InlineSource(_Committed):
    """An `InlineSegment`."""

    in_file = False
    _data: bytes | None = None

    def prime(self, data: bytes) -> None:
        """These are its bytes: they need not be loaded."""
        self._data = data

    @property
    def loaded(self) -> bool:
        """Whether they have been."""
        return self._data is not None

    def local(self) -> bool:
        return True  # (it is one small load away, by which time its leaf has been loaded)

    def descriptor(self) -> Descriptor | None:
        return None

    def read(self, offset: int, size: int) -> bytes:
        data = self._data
        if data is None:
            data = self._data = self._reader.load_inline(self._oid, self.length, self._checksum, self)
        return data[offset : offset + size]

    def recheck(self) -> None:
        """There is no file that could have become shorter."""


class BlobSource(_Committed):
    """A blob."""

    in_file = True

    def __init__(self, reader_: SegmentReader, oid: bytes, ref: SegmentRef) -> None:
        super().__init__(reader_, oid, ref)
        self._lock = threading.Lock()
        self._file = Reopened(partial(reader_.open_blob, oid, ref.length, ref.checksum))
        weakref.finalize(self, self._file.close)

    def local(self) -> bool:
        opened = self._file.opened is not None
        return opened or self._reader.blob_is_local((self._oid, self.length, self._checksum))

    def descriptor(self) -> Descriptor:
        with self._lock:  # a blob is fetched, and checked, by one thread
            return self._file.descriptor()

    def read(self, offset: int, size: int) -> bytes:
        return read_all(self.descriptor(), offset, size, self)

    def recheck(self) -> None:
        """Raise `LoadError` if the file is shorter than it should be by now."""
        file = self.descriptor()
        size = os.fstat(file.fd).st_size
        if size < self.length:
            raise LoadError(f"{self} has only {size} bytes left: its file was truncated")


SegmentSource: TypeAlias = InlineSource | BlobSource


class SegmentReader:
    """Reads segments of one database from any thread."""

    def __init__(self, storage: Any) -> None:
        # A storage with MVCC of its own (RelStorage) is not safe to share between threads: an instance of our
        # own, one thread at a time. Others are.
        self._native = bool(IMVCCStorage.providedBy(storage))
        self._storage = storage.new_instance() if self._native else storage
        self._serial = threading.RLock() if self._native else None
        #: Whether it is of use to tell it what is going to be read.
        self.expects = not self._native and hasattr(storage, "prefetch")
        self._sources: weakref.WeakValueDictionary[Identity, SegmentSource] = weakref.WeakValueDictionary()
        self._recent: deque[InlineSource] = deque(maxlen=RECENT)  # small ones, which are read again and again
        self._serials: dict[Identity, bytes] = {}
        self._verified: set[Identity] = set()

    def source(self, ref: SegmentRef) -> SegmentSource:
        """The source of a committed segment; one per segment while anybody uses it."""
        oid = oid_of(ref)
        if oid is None:
            raise LoadError(f"a segment of {ref.length} bytes was never committed")
        identity = (oid, ref.length, ref.checksum)
        source = self._sources.get(identity)
        if source is None:
            made = InlineSource(self, oid, ref) if ref.inline else BlobSource(self, oid, ref)
            source = self._sources.setdefault(identity, made)
            if isinstance(source, InlineSource) and source.length <= SMALL:
                self._recent.append(source)
        return source

    def remember(self, ref: SegmentRef, data: bytes) -> None:
        """An inline segment has just been made: the next commit reads it, if it is small, and need not load it."""
        source = self.source(ref) if ref.length <= SMALL else None
        if isinstance(source, InlineSource):
            source.prime(data)

    def expect(self, refs: Iterable[SegmentRef]) -> None:
        """Segments are going to be read: a server may be asked for them before it has answered for the first."""
        oids = []
        for ref in refs:
            oid = oid_of(ref)
            if oid is None:
                continue  # not committed yet
            identity = (oid, ref.length, ref.checksum)
            source = self._sources.get(identity)
            if identity not in self._serials and not (isinstance(source, InlineSource) and source.loaded):
                oids.append(oid)
        if len(oids) > 1:
            self._storage.prefetch(oids[:AHEAD], maxtid)

    def _call(self, method: Any, *args: Any) -> Any:
        if self._serial is None:
            return method(*args)
        with self._serial:
            if self._native:
                self._storage.poll_invalidations()
            return method(*args)

    def _load(self, oid: bytes, what: object) -> tuple[bytes, bytes]:
        try:
            try:
                record, serial = self._call(load_current, self._storage, oid)
            except POSKeyError:
                record, serial = self._call(_load_undone, self._storage, oid)
        except POSKeyError as e:
            raise GoneError(f"cannot load {what}: the database does not have it (any more)") from e
        except Exception as e:  # whatever this storage raises: the caller wants to know what could not be read
            raise LoadError(f"cannot load {what}: {type(e).__name__}: {e}") from e
        return record, serial

    def load_inline(self, oid: bytes, length: int, expected: int, what: object) -> bytes:
        """The bytes of an `InlineSegment`, checked."""
        record, _ = self._load(oid, what)
        unpickler = PersistentUnpickler(_find_class, lambda ref: ref, io.BytesIO(record))
        segment = InlineSegment.__new__(InlineSegment)
        segment._p_oid = oid
        try:
            unpickler.load()  # the class
            segment.__setstate__(unpickler.load())
        except ZBigError:
            raise
        except Exception as e:  # whatever unpickling junk raises
            raise LoadError(f"the record of {what} is damaged: {type(e).__name__}: {e}") from e
        data = segment.data
        if len(data) != length or checksum(data) != expected:
            raise LoadError(f"{what} is damaged: its {len(data)} bytes do not have the checksum stored beside it")
        return data

    def _blob_serial(self, identity: Identity, what: object) -> bytes:
        serial = self._serials.get(identity)
        if serial is None:
            _, serial = self._load(identity[0], what)
            self._serials[identity] = serial
        return serial

    def blob_is_local(self, identity: Identity) -> bool:
        """Whether the blob's file is on this host already."""
        helper = getattr(self._storage, "fshelper", None)
        if helper is None or not self._downloads():
            return True
        connected = getattr(self._storage, "is_connected", None)
        if identity not in self._serials and connected is not None and not connected():
            return False  # (to ask would be to wait for the server)
        try:
            serial = self._blob_serial(identity, "a segment")
        except LoadError:
            return False
        return os.path.exists(helper.getBlobFilename(identity[0], serial))

    def _downloads(self) -> bool:
        """Whether the storage keeps copies of blobs that it gets from a server."""
        return not getattr(self._storage, "shared_blob_dir", True)

    def open_blob(self, oid: bytes, length: int, expected: int, *, anew: bool = False) -> int:
        """A descriptor of a blob's file, of the right length (and, if it was downloaded, checksum).

        With `anew`, the checksum of what was downloaded is computed whoever did so before.
        """
        identity, what = (oid, length, expected), _name(oid, length)
        for attempt in range(_DOWNLOADS):
            serial = self._blob_serial(identity, what)
            try:
                path = self._call(self._storage.loadBlob, oid, serial)
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # (of a pipe, it would wait)
            except Exception as e:  # as in _load
                if attempt:
                    raise LoadError(f"cannot open the file of {what}: {type(e).__name__}: {e}") from e
                self._serials.pop(identity, None)  # undo and pack may have put another revision in its place
                close_unused()  # or it was for want of a descriptor
                continue
            try:
                problem = self._problem(fd, identity, anew)
            except BaseException:
                os.close(fd)
                raise
            if problem is None:
                return fd
            os.close(fd)
            if attempt == _DOWNLOADS - 1 or not self._downloads():
                raise LoadError(f"the file of {what}, {path!r}, {problem}")
            _remove(path, what)  # ZEO appends to a stale partial download and serves it: fetch it again
        raise AssertionError

    def verify(self, ref: SegmentRef, progress: Callable[[int], object]) -> None:
        """Read all of a segment and compare it with its length and checksum; what is fetched for that is not kept.

        Parameters
        ----------
        progress
            Called with the numbers of bytes that were read.

        Raises
        ------
        LoadError, FormatError
            Says what is wrong.
        """
        oid, what = ref.key, self.source(ref)
        identity = (oid, ref.length, ref.checksum)
        if ref.inline:
            progress(len(self.load_inline(oid, ref.length, ref.checksum, what)))
            return
        kept = self.blob_is_local(identity)
        fd = self.open_blob(oid, ref.length, ref.checksum, anew=True)
        try:
            if self._downloads():  # then it has just been looked at
                progress(ref.length)
            elif _digest(fd, ref.length, what, progress) != ref.checksum:
                raise LoadError(f"the file of {what} does not have the checksum stored beside it")
        finally:
            os.close(fd)
            if not kept:
                self._verified.discard(identity)
                with contextlib.suppress(OSError):
                    os.unlink(self._storage.fshelper.getBlobFilename(oid, self._serials[identity]))

    def _problem(self, fd: int, identity: Identity, anew: bool) -> str | None:
        _, length, expected = identity
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return "is no ordinary file"
        if found.st_size != length:
            return f"has {found.st_size} bytes where {length} were stored"
        if self._downloads() and (anew or not (checked.is_noted(fd, expected) or identity in self._verified)):
            if _digest(fd, length, "it", lambda _: None) != expected:
                return "does not have the checksum stored beside it"
            if not checked.note(fd, found, expected):
                self._verified.add(identity)
        return None


def _name(oid: bytes, length: int) -> str:
    return f"segment 0x{oid.hex().lstrip('0') or '0'} ({length} bytes)"


def _digest(fd: int, length: int, what: object, progress: Callable[[int], object]) -> int:
    """The checksum of a file, which is not kept in memory."""
    digest = xxhash.xxh3_64()
    for at in range(0, length, _STEP):
        size = min(_STEP, length - at)
        digest.update(read(fd, at, size, what))
        progress(size)
    return int(digest.intdigest())


def _remove(path: str, what: object) -> None:
    try:
        try:
            os.unlink(path)
        except IsADirectoryError:
            os.rmdir(path)
    except FileNotFoundError:
        pass  # somebody else has
    except OSError as e:
        raise LoadError(e.errno, f"cannot remove the damaged copy of {what}, {path!r}: {e.strerror}") from e


def _load_undone(storage: Any, oid: bytes) -> tuple[bytes, bytes]:
    """The record of an object whose creation was undone since: older snapshots have it still.

    Raises
    ------
    POSKeyError
        If there is none.
    """
    for revision in storage.history(oid, REVISIONS):
        with contextlib.suppress(POSKeyError):
            return storage.loadSerial(oid, revision["tid"]), revision["tid"]
    raise POSKeyError(oid)


def _find_class(module: str, name: str) -> Any:
    """The two classes that a segment's record may name; anything else in its place is damage."""
    for cls in (InlineSegment, Blob):
        if (module, name) == (cls.__module__, cls.__name__):
            return cls
    raise LoadError(f"a segment's record names the class {module}.{name}")


_readers: weakref.WeakKeyDictionary[Any, SegmentReader] = weakref.WeakKeyDictionary()
_readers_lock = threading.Lock()


def reader(db: Any) -> SegmentReader:
    """The reader of a ZODB.DB."""
    with _readers_lock:
        found = _readers.get(db)
        if found is None:
            found = _readers[db] = SegmentReader(db.storage)
        return found
