"""Databases: how they are opened, how another process finds the same one, and the snapshots one reads at.

A database is a plain ``ZODB.DB``. What this module adds is knowledge about it, its :class:`Location`: a
Dask graph carries that, 200 bytes without any secret, and :func:`database` turns it into the worker's own
``ZODB.DB`` for the same data. A process has one for each database, found or opened once.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dask_zbig import config, uris
from dask_zbig.errors import ClosedError, DatabaseUnavailableError, ForkError, SnapshotError
from dask_zbig.location import Location, describe, why_not

if TYPE_CHECKING:
    from collections.abc import Callable

    import ZODB
    from transaction.interfaces import ITransactionManager
    from ZODB.Connection import Connection

__all__ = [
    "Location",
    "database",
    "has_blobs",
    "is_open",
    "locate",
    "location",
    "open",
    "open_at",
    "open_here",
    "register",
    "snapshot",
    "sync",
    "uploads_blobs",
]


def open(where: str | os.PathLike[str], **db_options: Any) -> ZODB.DB:
    """Open a database.

    Parameters
    ----------
    where
        - A path: a FileStorage, created if missing, with the blob directory ``<path>.blobs`` beside it.
          This process opens it alone; ``dz.serve`` shares it.
        - A URI that zodburi knows: ``zeo://host:port``, ``zeo:///path/to/socket``, ``file://``,
          ``memory://``, ``zconfig://``, ``demo:``. A ZEO client that is given no ``blob_dir`` gets a private
          one, removed with the client; no ``wait_timeout``: that of the option ``zbig.zeo.wait-timeout``.
        - ZConfig text, with a ``<zodb>`` section or just a storage's.
    **db_options
        Options of ``ZODB.DB``, such as ``pool_size``. They go before those in a URI.

    Returns
    -------
    ZODB.DB
        Yours to close.

    Raises
    ------
    DatabaseURIError
        `where` names no database: unknown scheme, empty, a directory, settings that cannot be read.
    DatabaseUnavailableError
        The server does not answer, or the file is open in another process, or cannot be read or made.
    TypeError
        An option that ``ZODB.DB`` does not have.

    Notes
    -----
    Safe to call from any thread.

    Examples
    --------
    >>> db = open("memory://")
    >>> with db.transaction() as conn:
    ...     conn.root()["answer"] = 42
    >>> db.close()
    """
    from dask_zbig.opening import open_database

    db, text = open_database(where, db_options)
    _registry.add(db, describe(db, text))
    return db


def register(db: ZODB.DB) -> Location:
    """Make a ``ZODB.DB`` that was opened without :func:`open` known to this process.

    A ZEO client is recognised by its server's address. Other storages are taken for exclusive, as nothing
    says how another process could open them. A database that is known already is not registered again.

    Raises
    ------
    ClosedError
        The database is closed.
    ForkError
        It was opened before this process was forked.
    """
    if not is_open(db):
        raise ClosedError(f"the database {db.database_name!r} is closed")
    known = _registry.get(db)
    if known is None:
        known = _registry.add(db, describe(db, None))
    if known.pid != os.getpid():
        raise ForkError(
            f"the database {known.alias} was opened by process {known.pid}, before the fork that made "
            f"process {os.getpid()}; open it again here"
        )
    return known


def location(db: ZODB.DB) -> Location:
    """Return the location of an open database, registering it if need be; see :func:`register`."""
    return register(db)


def database(location: Location) -> ZODB.DB:
    """Return this process's database for a location, opening it if it has none.

    Parameters
    ----------
    location
        From :func:`location`, here or in another process.

    Returns
    -------
    ZODB.DB
        The one that is open here; else one that is opened with the URI which the option
        ``zbig.database-uris`` has for the alias, or with the location's own, and kept. Do not close it.

    Raises
    ------
    DatabaseUnavailableError
        Nothing says how to open it, it is exclusive to another process, or it cannot be opened.
    DatabaseURIError
        The configured URI is not one.

    Notes
    -----
    Safe to call from any thread: one opens, the others wait and get the same database or the same error.
    """
    return _registry.find(location.alias) or _registry.opened(location.alias, lambda: _open_lazily(location))


def open_here(alias: str) -> ZODB.DB | None:
    """Return the database of an alias that this process has open, or None."""
    return _registry.find(alias)


def locate(where: str) -> Location:
    """Return the location of what a path, URI or ZConfig text names, opened here if it is not.

    A database that is opened for this is kept, for the next time: do not close it.

    Raises
    ------
    DatabaseURIError, DatabaseUnavailableError
        As :func:`open` does.
    """
    alias = uris.alias_of(where)
    found = _registry.find(alias) if alias else None
    if found is None:
        path = (alias or "").removeprefix("file://")
        if path != alias and path and not os.path.exists(path):
            raise DatabaseUnavailableError(f"there is no database {alias}")
        found = _registry.opened(alias or f"text:{uris.fingerprint(where)}", lambda: open(where))
    return location(found)


def snapshot(conn: Connection) -> bytes:
    """Return the id of the transaction at which a connection reads.

    Raises
    ------
    ClosedError
        The connection is closed.
    SnapshotError
        It reads at none yet: its transaction manager is explicit, and no transaction has begun.
    """
    if conn.opened is None:
        raise ClosedError(f"the connection {conn!r} is closed: it reads at no snapshot")
    storage = conn._normal_storage
    before = conn.before or getattr(storage, "_start", b"")
    if before is None:
        raise SnapshotError(f"the connection {conn!r} reads at no snapshot yet: begin a transaction first")
    if not before:  # the storage does MVCC itself, and each connection has an instance of it (RelStorage)
        return bytes(storage.lastTransaction())
    return (int.from_bytes(before, "big") - 1).to_bytes(8, "big")


def open_at(
    db: ZODB.DB, tid: bytes, transaction_manager: ITransactionManager | None = None, *, timeout: float = 5.0
) -> Connection:
    """Open a read-only connection at a snapshot.

    A client hears of commits with a delay. When the snapshot is newer than what it heard, it is synced
    with its server first.

    Parameters
    ----------
    db
        An open database.
    tid
        A transaction id, 8 bytes, as from :func:`snapshot`.
    transaction_manager
        As for ``db.open``.
    timeout
        Seconds to wait for a snapshot that the server does not have either.

    Raises
    ------
    SnapshotError
        `tid` is not a transaction id, or still in the future when the time is over.
    DatabaseUnavailableError
        The server is gone.
    ClosedError
        The database is closed.
    """
    if not isinstance(tid, bytes) or len(tid) != 8:
        raise SnapshotError(f"{tid!r} is no snapshot: a transaction id is 8 bytes")
    if not is_open(db):
        raise ClosedError(f"the database {db.database_name!r} is closed")
    deadline = time.monotonic() + timeout
    while True:
        if tid <= db.lastTransaction():
            return db.open(transaction_manager, at=tid)
        sync(db)
        if tid > db.lastTransaction():
            if time.monotonic() > deadline:
                raise SnapshotError(
                    f"the database {location(db).alias} has no snapshot {tid.hex()}: its last transaction is "
                    f"{bytes(db.lastTransaction()).hex()}"
                )
            time.sleep(0.02)


def has_blobs(conn: Connection) -> bool:
    """Return whether blobs can be stored through a connection.

    Asking for the interface is not enough: a ZEO client of a server with blobs provides it even when it has
    no directory to put one.
    """
    from ZODB.interfaces import IBlobStorage
    from ZODB.POSException import POSError

    storage = conn._normal_storage
    if not IBlobStorage.providedBy(storage):
        return False
    try:
        return bool(storage.temporaryDirectory())
    except (AttributeError, TypeError, OSError, POSError):
        return False


def uploads_blobs(conn: Connection) -> bool:
    """Return whether blobs that are stored through a connection are copied to a server, which keeps them."""
    return not getattr(conn.db().storage, "shared_blob_dir", True)


def sync(db: ZODB.DB) -> None:
    """Have the database hear of what was committed elsewhere.

    Raises
    ------
    DatabaseUnavailableError
        The server does not answer.
    ClosedError
        The database is closed.
    """
    from ZEO.Exceptions import ClientDisconnected

    storage = vars(db).get("storage")
    try:
        if getattr(storage, "ping", None) is not None:
            storage.ping()  # the answer comes after every invalidation that the server sent before it
        elif hasattr(storage, "poll_invalidations"):
            storage.sync()
            storage.poll_invalidations()
        elif storage is None or hasattr(storage, "ping"):  # (ZEO takes the method away)
            raise ClosedError(f"the database {db.database_name!r} is closed")
    except ClientDisconnected as error:
        if not is_open(db):
            raise ClosedError(f"the database {db.database_name!r} is closed") from error
        raise DatabaseUnavailableError(f"the server of {location(db).alias} does not answer") from error


def is_open(db: ZODB.DB) -> bool:
    """Return whether a database has not been closed."""
    return "storage" in vars(db)  # DB.close() deletes it, and there is no other sign


def _open_lazily(location: Location) -> ZODB.DB:
    from dask_zbig.opening import open_database

    uri = config.get("database-uris").get(location.alias)
    if uri is None:
        uri = location.uri
        if uri is None or location.exclusive:
            raise DatabaseUnavailableError(why_not(location))
    db, text = open_database(uri, {})
    _registry.add(db, replace(describe(db, text), alias=location.alias))
    return db


class _Registry:
    """The databases of this process: those that users opened, held weakly, and those opened for them."""

    def __init__(self) -> None:
        self._parents: tuple[Any, ...] = ()
        self._forget()
        os.register_at_fork(after_in_child=self._after_fork)

    def _forget(self) -> None:
        self._lock = threading.RLock()  # a garbage collection may come in while it is held
        self._locations: weakref.WeakKeyDictionary[ZODB.DB, Location] = weakref.WeakKeyDictionary()
        self._kept: dict[str, ZODB.DB] = {}
        self._opening: dict[str, Future[ZODB.DB]] = {}

    def _after_fork(self) -> None:
        # The parent's clients have no threads here, and its files are not ours to write. They are kept,
        # as their destructors might write, and still known, so that their use can be refused.
        locations = self._locations
        self._parents = (list(locations), self._kept, self._parents)
        self._forget()
        self._locations = locations

    def add(self, db: ZODB.DB, location: Location) -> Location:
        with self._lock:
            return self._locations.setdefault(db, location)

    def get(self, db: ZODB.DB) -> Location | None:
        with self._lock:
            return self._locations.get(db)

    def find(self, alias: str) -> ZODB.DB | None:
        """Return the database that was registered last under an alias and is still open."""
        pid = os.getpid()
        with self._lock:
            for db, known in reversed(list(self._locations.items())):
                if known.alias == alias and known.pid == pid and is_open(db):
                    return db
        return None

    def opened(self, alias: str, opener: Callable[[], ZODB.DB]) -> ZODB.DB:
        """Have one thread open a database, and keep it."""
        with self._lock:
            future = self._opening.get(alias)
            mine = future is None
            if future is None:
                found = self.find(alias) or self._kept.get(alias)
                if found is not None and is_open(found):
                    return found
                future = self._opening[alias] = Future()
        if mine:
            try:
                db = self._kept[alias] = opener()
                future.set_result(db)
            except BaseException as error:
                future.set_exception(error)
                raise
            finally:
                with self._lock:
                    del self._opening[alias]
        return future.result()


_registry = _Registry()
