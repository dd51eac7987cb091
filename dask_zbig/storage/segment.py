"""Segments: immutable runs of bytes, in a ZODB Blob or in an object; and reading them from any thread.

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
from dataclasses import dataclass
from functools import partial
from typing import Any

import xxhash
from persistent import Persistent
from ZODB._compat import PersistentUnpickler
from ZODB.blob import Blob
from ZODB.interfaces import IMVCCStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import load_current, maxtid

from dask_zbig.descriptors import Descriptor, Reopened, close_unused
from dask_zbig.errors import LoadError, ZBigError
from dask_zbig.storage import checked
from dask_zbig.storage.format import VERSION, broken, unpack_state

__all__ = [
    "BytesSource",
    "FileSource",
    "GoneError",
    "InlineSegment",
    "SegmentReader",
    "SegmentRef",
    "SegmentSource",
    "reader",
]


#: A segment gets another revision only when its creation is undone, and when that is undone: we look at this many.
REVISIONS = 16
_STEP = 8 << 20
#: So many objects are asked for ahead at once.
AHEAD = 4096
#: So many segments of at most `SMALL` bytes stay in memory once they were read: a commit compares a page with all that
#: the commits before have put there.
RECENT, SMALL = 32, 4096
#: A blob that came damaged is fetched again: a server that is restarted may spoil several downloads in a row.
_DOWNLOADS = 4


class GoneError(LoadError):
    """The database has no record of a segment: it was packed away, if it was ever committed."""


class InlineSegment(Persistent):  # type: ignore[misc]
    """A small segment: its bytes are in the object. Immutable."""

    data: bytes

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __getstate__(self) -> tuple[int, bytes]:
        return (VERSION, self.data)

    def __setstate__(self, state: Any) -> None:
        (data,) = unpack_state(self, state, 1)
        if not isinstance(data, bytes):
            raise broken(self, f"holds a {type(data).__name__} where bytes belong")
        self.data = data


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """What an extent map knows of a segment: the object (often a ghost), its length and its checksum."""

    obj: Any
    length: int
    checksum: int

    @property
    def key(self) -> Any:
        """What tells segments apart: the oid, or the object itself before it has one."""
        oid = _oid(self)
        return oid if oid is not None else id(self.obj)

    @property
    def inline(self) -> bool:
        """Whether the bytes lie in an object."""
        return isinstance(self.obj, InlineSegment)


#: A segment's oid, length and checksum. An oid is not enough: once its object was packed away, and the server was
#: restarted, some storages give it to another one.
_Identity = tuple[bytes, int, int]


def _oid(ref: SegmentRef) -> bytes | None:
    """None before it is stored."""
    oid: bytes | None = ref.obj._p_oid if isinstance(ref.obj, Persistent) else ref.obj.oid
    return oid


def checksum(data: Any) -> int:
    """The format's checksum of bytes-like `data`."""
    return int(xxhash.xxh3_64_intdigest(data))


@dataclass(frozen=True, slots=True)
class BytesSource:
    """Bytes that are in memory already."""

    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)

    @property
    def in_file(self) -> bool:
        return False

    def local(self) -> bool:
        return True

    def descriptor(self) -> Descriptor | None:
        return None

    def read(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


class FileSource:
    """A file of this process's own, such as a scratch file.

    What is left under its name when the source goes is removed: a blob has moved it by then.
    """

    in_file = True

    def __init__(self, path: str) -> None:
        self._name = _Name(path)
        self._file = Reopened(self._name.open)
        self.shared = False  # with the changes of transactions before
        # Its very first use: that the file is there, and which file it is, is known from now on.
        file = self._file.descriptor()
        self.length = os.fstat(file.fd).st_size
        self.close = weakref.finalize(self, _drop_file, self._name, self._file, os.getpid())

    def grown(self) -> FileSource:
        """The same, when another generation has been written to the file, behind what was there."""
        file = self._file.descriptor()
        self.length = os.fstat(file.fd).st_size
        self.shared = True
        return self

    @property
    def path(self) -> str:
        """Where the file is now."""
        return self._name.path

    def local(self) -> bool:
        return True

    def descriptor(self) -> Descriptor:
        return self._file.descriptor()

    def read(self, offset: int, size: int) -> bytes:
        return _read_all(self._file.descriptor(), offset, size, self.path)

    def give(self, take: Callable[[str], None]) -> None:
        """Have `take(path)` move the file away. It can be read here as before: it keeps a second name.

        On a file system that knows no second names it stays open instead.
        """
        path = self._name.path
        kept = f"{path}-kept"
        try:
            os.link(path, kept)
        except OSError:
            self._name.only = self._file.descriptor()
        else:
            self._name.path = kept
        try:
            take(path)
        except BaseException:
            if self._name.path != path:  # it is where it was, and needs no other name
                with contextlib.suppress(OSError):
                    os.unlink(kept)
                self._name.path = path
            raise


class _Name:
    """By what name a file is to be opened. It outlives its source, for whose finalizer it is."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.only: Descriptor | None = None  # if the file has no name any more
        self._identity: tuple[int, int] | None = None

    def open(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise LoadError(e.errno, f"cannot open {self.path!r}: {e.strerror}") from e
        found = os.fstat(fd)
        identity = (found.st_dev, found.st_ino)
        if self._identity not in (None, identity):
            os.close(fd)
            raise LoadError(f"{self.path!r} is not the file that it was: somebody has put another one in its place")
        self._identity = identity
        return fd


def _drop_file(name: _Name, file: Reopened, pid: int) -> None:
    file.close()
    name.only = None
    if os.getpid() == pid:  # a forked child has the same object, but the file is not its own
        with contextlib.suppress(OSError):  # (it may be a commit that ends here: what is left is swept some day)
            os.unlink(name.path)


def _read_all(file: Descriptor, offset: int, size: int, what: object) -> bytes:
    """Of a file, which stays open meanwhile."""
    return _read(file.fd, offset, size, what)


def _read(fd: int, offset: int, size: int, what: object) -> bytes:
    parts, want = [], size
    while want:
        try:
            part = os.pread(fd, want, offset)
        except OSError as e:
            raise LoadError(e.errno, f"cannot read {want} bytes at {offset} of {what}: {e.strerror}") from e
        if not part:
            raise LoadError(f"{what} ends {want} bytes before byte {offset + want}: it was truncated")
        parts.append(part)
        want -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class SegmentSource:
    """A committed segment, read by its oid. Thread-safe."""

    def __init__(self, reader_: SegmentReader, oid: bytes, ref: SegmentRef) -> None:
        self._reader = reader_
        self._oid = oid
        self.length = ref.length
        self._checksum = ref.checksum
        self._inline = ref.inline
        self._data: bytes | None = None
        self._lock = threading.Lock()
        self._file = Reopened(partial(reader_.open_blob, oid, ref.length, ref.checksum, repr(self)))
        weakref.finalize(self, self._file.close)

    def __repr__(self) -> str:
        return f"segment 0x{self._oid.hex().lstrip('0') or '0'} ({self.length} bytes)"

    @property
    def in_file(self) -> bool:
        return not self._inline

    def prime(self, data: bytes) -> None:
        """These are the bytes of this inline segment: they need not be loaded."""
        self._data = data

    @property
    def loaded(self) -> bool:
        """Whether its record has been read: all of it, if it is inline."""
        return self._data is not None

    def local(self) -> bool:
        if self._inline or self._file.opened is not None:
            return True  # (an inline segment is one small load away, by which time its leaf has been loaded)
        return self._reader.blob_is_local((self._oid, self.length, self._checksum))

    def descriptor(self) -> Descriptor | None:
        return None if self._inline else self._opened()

    def _opened(self) -> Descriptor:
        with self._lock:  # a blob is fetched, and checked, by one thread
            return self._file.descriptor()

    def read(self, offset: int, size: int) -> bytes:
        if not self._inline:
            return _read_all(self._opened(), offset, size, self)
        data = self._data
        if data is None:
            data = self._data = self._reader.load_inline(self._oid, self.length, self._checksum, self)
        return data[offset : offset + size]

    def recheck(self) -> None:
        """Raise `LoadError` if the file is shorter than it should be by now."""
        if self._inline:
            return
        file = self._opened()
        size = os.fstat(file.fd).st_size
        if size < self.length:
            raise LoadError(f"{self} has only {size} bytes left: its file was truncated")


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
        self._sources: weakref.WeakValueDictionary[_Identity, SegmentSource] = weakref.WeakValueDictionary()
        self._recent: deque[SegmentSource] = deque(maxlen=RECENT)  # small inline ones, which are read again and again
        self._serials: dict[_Identity, bytes] = {}
        self._verified: set[_Identity] = set()

    def source(self, ref: SegmentRef) -> SegmentSource:
        """The source of a committed segment; one per segment while anybody uses it."""
        oid = _oid(ref)
        if oid is None:
            raise LoadError(f"a segment of {ref.length} bytes was never committed")
        identity = (oid, ref.length, ref.checksum)
        source = self._sources.get(identity)
        if source is None:
            source = self._sources.setdefault(identity, SegmentSource(self, oid, ref))
            if ref.inline and ref.length <= SMALL:
                self._recent.append(source)
        return source

    def remember(self, ref: SegmentRef, data: bytes) -> None:
        """An inline segment has just been made: the next commit reads it, if it is small, and need not load it."""
        if ref.length <= SMALL:
            self.source(ref).prime(data)

    def expect(self, refs: Iterable[SegmentRef]) -> None:
        """Segments are going to be read: a server may be asked for them before it has answered for the first."""
        oids = []
        for ref in refs:
            oid = _oid(ref)
            if oid is None:
                continue  # not committed yet
            identity = (oid, ref.length, ref.checksum)
            source = self._sources.get(identity)
            if identity not in self._serials and not (source is not None and source.loaded):
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

    def _blob_serial(self, identity: _Identity, what: object) -> bytes:
        serial = self._serials.get(identity)
        if serial is None:
            _, serial = self._load(identity[0], what)
            self._serials[identity] = serial
        return serial

    def blob_is_local(self, identity: _Identity) -> bool:
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

    def open_blob(self, oid: bytes, length: int, expected: int, what: object, *, anew: bool = False) -> int:
        """A descriptor of a blob's file, of the right length (and, if it was downloaded, checksum).

        With `anew`, the checksum of what was downloaded is computed whoever did so before.
        """
        identity = (oid, length, expected)
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
        fd = self.open_blob(oid, ref.length, ref.checksum, what, anew=True)
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

    def _problem(self, fd: int, identity: _Identity, anew: bool) -> str | None:
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


def _digest(fd: int, length: int, what: object, progress: Callable[[int], object]) -> int:
    """The checksum of a file, which is not kept in memory."""
    digest = xxhash.xxh3_64()
    for at in range(0, length, _STEP):
        size = min(_STEP, length - at)
        digest.update(_read(fd, at, size, what))
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
