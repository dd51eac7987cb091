"""Is a database sound? Every array in it is looked at, every byte of every segment read and compared.

Objects are read as they are stored (see `dask_zbig.storage.records`): none is made, so nothing of the application need
be importable, and what is damaged harms nobody. Memory: a bit for each object, and 16 bytes for each segment.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import transaction
import ZODB
from BTrees.LLBTree import LLBTree
from ZODB.POSException import POSKeyError
from ZODB.utils import u64, z64

from dask_zbig import database, uris
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.errors import DatabaseUnavailableError, NotStoredError, ZBigError
from dask_zbig.opening import open_database
from dask_zbig.patience import may_heal, patiently
from dask_zbig.storage import extents as ex
from dask_zbig.storage.format import FANOUT, LEAF_BYTES, broken
from dask_zbig.storage.reader import SegmentReader, reader
from dask_zbig.storage.records import CLASSES, Reference, children, read_record, reference_to
from dask_zbig.storage.segment import GoneError, SegmentRef, checksum
from dask_zbig.storage.tree import ExtentLeaf, ZBigFile, checked, node_bytes

__all__ = ["CheckReport", "Damage", "check"]

_END = 1 << 63
_FILE = f"{ZBigFile.__module__}.{ZBigFile.__name__}"
_ARRAY = f"{ZBigArray.__module__}.{ZBigArray.__name__}"
#: Of one leaf and one segment, so many ranges of bytes are told apart.
_MOST_RANGES = 16

Progress = Callable[[int, str], object]


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it should be.

    Attributes
    ----------
    path : str
        Where the array is: keys from the root on, joined by "/".
    kind : {"array", "map", "segment", "object"}
        What is damaged: the array object, a part of its extent map, bytes of it, or an object that is none of ours.
    oid : str
        Of the object that is damaged: of a segment, for instance.
    start, stop : int or None
        The bytes of the array that cannot be had, or are wrong.
    elements : str
        The same as an index along the major axis, such as ``[20:30]``.
    problem : str
        What is wrong.
    """

    path: str
    kind: str
    oid: str
    problem: str
    start: int | None = None
    stop: int | None = None
    elements: str = ""

    def __str__(self) -> str:
        where = f", bytes {self.start}..{self.stop}" if self.start is not None else ""
        return f"{self.path or 'the root'}{self.elements}{where}: {self.problem}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was looked at, and what is damaged. `snapshot`: the id of the transaction, in hexadecimal."""

    snapshot: str
    arrays: int
    leaves: int
    segments: int
    bytes: int
    damages: tuple[Damage, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return {"sound": self.sound, **asdict(self)}


def check(
    db_or_uri: Any, paths: Iterable[str] = (), *, at: bytes | None = None, progress: Progress | None = None
) -> CheckReport:
    """Verify every array in a database: its extent map, and the length and checksum of each of its segments.

    Goes on after whatever it finds. Arrays are found wherever they are, inside any persistent object. Segments are
    streamed; those that have to be fetched from a server are not kept. Nothing is changed.

    Parameters
    ----------
    db_or_uri : ZODB.DB or path, URI or ZConfig text
        A database, or what `dask_zbig.open` takes; that is opened for this, and closed. A path is opened for reading
        only, so another process may have it open; but if it may write to it, check by way of that one's server.
    paths : iterable of str
        Look only at the arrays at these places, and below them, such as ``"group/A"``. All, if there are none.
    at : bytes, optional
        A transaction's id: look at the database as it was then. By default as it is now.
    progress : callable, optional
        Called with the bytes that have been read so far, and the path of the array.

    Returns
    -------
    CheckReport

    Raises
    ------
    DatabaseURIError, DatabaseUnavailableError
        As by `dask_zbig.open`; or the server is gone and did not come back until the time-out.
    NotStoredError
        If there is no array at one of the paths.
    SnapshotError
        If the database has no such transaction.

    Notes
    -----
    Reads every byte that is stored: that takes as long as copying the database.

    Examples
    --------
    >>> import dask_zbig as dz, transaction
    >>> db = dz.open("memory://")
    >>> with db.transaction() as conn:
    ...     conn.root()["A"] = A = dz.ZBigArray(1000, "u1")
    ...     A[:] = 7
    >>> report = check(db)
    >>> report.sound, report.arrays, report.bytes
    (True, 1, 1000)
    >>> db.close()
    """
    with _opened(db_or_uri) as db:
        database.sync(db)
        for last_try in (False, False, True):
            tid = bytes(db.lastTransaction()) if at is None else at
            walk = _Walk(db, tid, tuple(p.strip("/") for p in paths), progress or (lambda done, path: None))
            try:
                report = walk.run()
            except ZBigError:
                raise
            except Exception as e:
                if may_heal(e):
                    raise DatabaseUnavailableError(f"the database cannot be read any more: {e}") from e
                raise
            # What is missing may have been packed away since, with whatever referred to it.
            if not walk.missing or at is not None or last_try or bytes(db.lastTransaction()) == tid:
                return report
    raise AssertionError


@contextlib.contextmanager
def _opened(db_or_uri: Any) -> Iterator[Any]:
    if isinstance(db_or_uri, ZODB.DB):
        yield db_or_uri
        return
    where = db_or_uri
    kind, text = uris.classify(where)
    alias = uris.alias_of(os.fspath(where))
    if alias is not None and alias.startswith("file://") and not os.path.exists(alias.removeprefix("file://")):
        raise DatabaseUnavailableError(f"there is no FileStorage {alias.removeprefix('file://')!r}")
    if kind == "path":
        where = uris.file_uri(os.path.abspath(text), read_only="1")
    with contextlib.closing(open_database(where, {})[0]) as db:  # (not for the registry: others could not write to it)
        yield db


class _Seen:
    """A set of oids, by a bit each."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def add(self, oid: bytes) -> bool:
        """Whether it was not in there."""
        page, bit = divmod(u64(oid), 1 << 15)
        bits = self._pages.setdefault(page, bytearray(1 << 12))
        known = bits[bit >> 3] >> (bit & 7) & 1
        bits[bit >> 3] |= 1 << (bit & 7)
        return not known


@dataclass(slots=True)
class _Array:
    """What is known of the array whose file is looked at. Without `array`, nothing."""

    path: str
    array: Any = None

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes) if self.array is not None else _END

    def elements(self, start: int, stop: int) -> str:
        if self.array is None or not self.array.ndim or not self.nbytes:
            return ""
        axis = self.array.major_axis
        step = self.nbytes // self.array.shape[axis]
        rows = f"{start // step}:{min(-(-stop // step), self.array.shape[axis])}"
        return f"[{rows}]" if axis == 0 else f"[..., {rows}]"


@dataclass
class _Walk:
    """One round through a database at a snapshot."""

    db: Any
    tid: bytes
    paths: tuple[str, ...]
    progress: Progress
    arrays: int = 0
    leaves: int = 0
    segments: int = 0
    done: int = 0
    missing: bool = False
    hidden: str = ""  # what else is damaged
    damages: list[Damage] = field(default_factory=list)
    seen: _Seen = field(default_factory=_Seen)
    checked: Any = field(default_factory=LLBTree)  # segments by oid: a digest of their length and checksum
    bad: dict[tuple[bytes, int, int], str] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)
    storage: Any = None
    reader: SegmentReader | None = None

    def run(self) -> CheckReport:
        manager = transaction.TransactionManager()
        connection = database.open_at(self.db, self.tid, manager)
        try:
            self.storage = connection._storage
            self.reader = reader(self.db)
            self._objects()
        finally:
            manager.abort()
            connection.close()
        for path in self.paths:
            if path not in self.found:
                raise NotStoredError(f"there is no array at {path!r}, or below{self.hidden}")
        return CheckReport(self.tid.hex(), self.arrays, self.leaves, self.segments, self.done, tuple(self.damages))

    # -- objects

    def _objects(self) -> None:
        todo: list[tuple[str, Reference, _Array | None]] = [("", Reference(z64, ""), None)]
        self.seen.add(z64)
        while todo:
            path, reference, array = todo.pop()
            oid = reference.oid
            try:
                kind, state = self._referred(reference)
                if kind == _FILE:
                    if self._wanted(path):
                        self._file(oid, state, array or _Array(path))
                    continue
                owner, more = self._array(path, oid, kind, state)
            except ZBigError as e:
                self._object_damage(array or _Array(path), oid, e)
                continue
            for key, child in more:
                name = f"{path}/{key}" if path and key else path or key
                if self.seen.add(child.oid):
                    todo.append((name, child, owner if not key else None))
                elif child.kind == _FILE:  # which should be of one array only
                    try:
                        self._referred(child)
                    except ZBigError as e:
                        self._object_damage(_Array(name), child.oid, e)

    def _referred(self, reference: Reference) -> tuple[str, Any]:
        kind, state = self._read(reference.oid)
        if kind != reference.kind and (reference.kind in CLASSES or reference.kind == _ARRAY):
            raise _Unreadable(f"object 0x{u64(reference.oid):x} is a {kind}, not a {reference.kind}")
        return kind, state

    def _object_damage(self, where: _Array, oid: bytes, error: ZBigError) -> None:
        if self._wanted(where.path):
            self._damage(where, "object", oid, error)
        else:
            self.hidden = f", but {error}"

    def _wanted(self, path: str) -> bool:
        wanted = [p for p in self.paths if path == p or path.startswith(p + "/")]
        self.found.update(wanted)
        return bool(wanted) or not self.paths

    def _array(self, path: str, oid: bytes, kind: str, state: Any) -> tuple[_Array | None, Any]:
        """What an object is if it is an array, and what it refers to."""
        ours = isinstance(state, tuple) and len(state) > 4 and isinstance(state[4], ZBigFile)
        if kind != _ARRAY and not ours:
            return None, children(kind, state)
        owner = _Array(path)
        if self._wanted(path):
            self.arrays += 1
            self.progress(self.done, path)
            try:
                owner.array = _made(ZBigArray, oid, state)
            except ZBigError as e:
                self._damage(owner, "array", oid, e)
        more = children("", state[-1]) if ours and len(state) > 5 else ()
        return owner, [("", reference_to(state[4])), *more] if ours else children(kind, state)

    def _read(self, oid: bytes) -> tuple[str, Any]:
        try:
            record, _ = patiently(lambda: self.storage.load(oid))
        except POSKeyError as e:
            self.missing = True
            raise _Unreadable(f"object 0x{u64(oid):x} is missing") from e
        except Exception as e:  # whatever a storage makes of damage
            if may_heal(e):
                raise
            raise _Unreadable(f"object 0x{u64(oid):x} cannot be read: {type(e).__name__}: {e}") from e
        return read_record(oid, record)

    def _damage(
        self, where: _Array, kind: str, oid: bytes, why: object, start: int | None = None, stop: int | None = None
    ) -> None:
        elements = ""
        if start is not None and stop is not None and start < where.nbytes:
            stop = min(stop, where.nbytes)
            elements = where.elements(start, stop)
        self.damages.append(Damage(where.path, kind, f"0x{u64(oid):x}", str(why), start, stop, elements))

    # -- the extent map

    def _file(self, oid: bytes, state: Any, owner: _Array) -> None:
        try:
            file = _made(ZBigFile, oid, state)
        except ZBigError as e:
            self._damage(owner, "map", oid, e, 0, owner.nbytes)
            return
        for part in (file.truncation, file.journal):
            try:
                self._get(part)
            except ZBigError as e:
                self._damage(owner, "map", part._p_oid, e)
        if file.root is not None:
            self._map(file.root, file.depth, 0, owner)

    def _get(self, ghost: Any) -> Any:
        kind, state = self._read(ghost._p_oid)
        if kind != reference_to(ghost).kind:
            raise broken(ghost, f"is a {kind}")
        return _made(type(ghost), ghost._p_oid, state)

    def _map(self, ghost: Any, level: int, base: int, owner: _Array) -> None:
        """A leaf (level 0) or node of the map, whose bytes begin at `base`."""
        try:
            found = self._get(ghost)
            if base >= _END:
                raise broken(found, "is beyond the end of what a file can be")
            if level == 0:
                checked(found, base // LEAF_BYTES)
            elif found.level != level:
                raise broken(found, f"is of level {found.level}, in the place of one of level {level}")
        except ZBigError as e:
            size = LEAF_BYTES if level == 0 else FANOUT * node_bytes(level)
            self._damage(owner, "map", ghost._p_oid, e, base, base + size)
            return
        if level == 0:
            self._leaf(found, owner)
            return
        for key in sorted(found.children):
            self._map(found.children[key], level - 1, base + key * node_bytes(level), owner)

    def _leaf(self, leaf: ExtentLeaf, owner: _Array) -> None:
        self.leaves += 1
        for i in ex.used(leaf.extents).tolist():
            ref = leaf.refs[i]
            problem = self._segment(ref, owner)
            if problem is None:
                continue
            ranges = ex.covered(leaf.extents[leaf.extents["segment"] == i])
            if len(ranges) > _MOST_RANGES:
                ranges = np.array([(ranges[0, 0], ranges[-1, 1])])
            for start, stop in ranges.tolist():
                self._damage(owner, "segment", ref.key, problem, start, stop)

    # -- segments

    def _segment(self, ref: SegmentRef, owner: _Array) -> str | None:
        """What is wrong with a segment. Looks at each only once."""
        identity = (ref.key, ref.length, ref.checksum)
        token = checksum(b"%x %x" % (ref.length, ref.checksum)) & (1 << 63) - 1
        oid = u64(ref.key) & (1 << 63) - 1
        if self.checked.get(oid) == token:
            return self.bad.get(identity)
        self.checked[oid] = token
        self.segments += 1
        assert self.reader is not None
        segments = self.reader
        try:
            patiently(lambda: segments.verify(ref, lambda size: self._did(size, owner)))
        except ZBigError as e:
            if may_heal(e):
                raise DatabaseUnavailableError(f"the database cannot be read any more: {e}") from e
            self.missing = self.missing or isinstance(e, GoneError)
            self.bad[identity] = str(e)
        return self.bad.get(identity)

    def _did(self, size: int, owner: _Array) -> None:
        self.done += size
        self.progress(self.done, owner.path)


class _Unreadable(ZBigError):
    """An object cannot be had. For us only."""


def _made(cls: Any, oid: bytes, state: Any) -> Any:
    """An object of ours, in no connection, or the error that its state is."""
    obj = cls.__new__(cls)
    obj._p_oid = oid
    obj.__setstate__(state)
    return obj
