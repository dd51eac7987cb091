"""A process's connections for Dask tasks: to read at a snapshot, and to stage.

A connection is checked out for the time of a task, not kept by thread: Dask's threads come and go. Idle ones
are kept a while, because opening one costs more than a small task.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import transaction
from transaction.interfaces import NoTransaction, TransientError

from dask_zbig import database
from dask_zbig.config import get
from dask_zbig.database import Location
from dask_zbig.errors import DatabaseUnavailableError

__all__ = ["blob_directory", "persevere", "reading", "transient", "writing"]

#: Idle connections that are kept, over all databases and snapshots.
IDLE = 8
#: A connection through which so many bytes were mapped is closed: it keeps what it learned of the extent map,
#: and copies of bytes that had to be put together, but opening a new one costs nothing against this much data.
RETIRE_BYTES = 1 << 30
#: ZODB warns of more connections than this at one snapshot.
HISTORICAL_POOL = 64

T = TypeVar("T")


class _Pool:
    """Idle connections by (database, snapshot), the last used last. Thread-safe; empty after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, tuple[Any, Any, int]] = OrderedDict()
        self._pid = os.getpid()

    def take(self, key: Any) -> tuple[Any, int]:
        """An idle connection, and how many bytes were mapped through it; (None, 0) if there is none."""
        with self._lock:
            if self._pid != os.getpid():
                self._idle.clear()
                self._pid = os.getpid()
            for number, (other, connection, used) in reversed(self._idle.items()):
                if other == key:
                    del self._idle[number]
                    return connection, used
        return None, 0

    def give(self, key: Any, connection: Any, used: int) -> None:
        with self._lock:
            if used < RETIRE_BYTES:
                self._idle[id(connection)] = (key, connection, used)
            spare = [self._idle.popitem(last=False)[1][1] for _ in range(len(self._idle) - IDLE)]
        for old in spare if used < RETIRE_BYTES else [*spare, connection]:
            _close(old)


def _close(connection: Any) -> None:
    """Close it, unless its database was closed meanwhile.

    A task may open a connection while another thread closes the database, which then does not know of it: it is left
    open, and there is no pool any more that would take it back.
    """
    try:
        connection.close()
    except (KeyError, AssertionError):  # what ZODB's pool raises for a connection that it has never seen
        if database.is_open(connection.db()):
            raise


_pool = _Pool()
_directories: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def reading(location: Location, tid: bytes, size: int) -> Iterator[Any]:
    """A connection that sees the database as of `tid`, to map `size` bytes, which outlive the ``with``.

    Raises
    ------
    DatabaseUnavailableError, SnapshotError
        See `dask_zbig.database`.
    """
    db = database.database(location)
    key = (id(db), tid)
    connection, used = _pool.take(key)
    if connection is None or connection.opened is None:
        if db.getHistoricalPoolSize() < HISTORICAL_POOL:
            db.setHistoricalPoolSize(HISTORICAL_POOL)
        # (not explicit: DB.close() aborts the transactions of open connections, begun or not)
        connection, used = database.open_at(db, tid, transaction.TransactionManager()), 0
    connection.transaction_manager.begin()
    try:
        yield connection
    finally:
        connection.transaction_manager.abort()
        _pool.give(key, connection, used + size)


@contextlib.contextmanager
def writing(location: Location) -> Iterator[Any]:
    """A connection with a transaction of its own, aborted at the end if it was not committed."""
    manager = transaction.TransactionManager(explicit=True)
    connection = database.database(location).open(manager)
    manager.begin()
    try:
        yield connection
    finally:
        with contextlib.suppress(NoTransaction):  # it was committed
            manager.abort()
        connection.close()


def persevere(location: Location, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, although the connection to the server is lost meanwhile, or something conflicts.

    For what may be done twice: it is unknown whether the attempt before has committed.

    Raises
    ------
    DatabaseUnavailableError, transaction.interfaces.TransientError
        If that goes on for longer than ``zbig.zeo.wait-timeout``.
    """
    deadline = time.monotonic() + get("zeo.wait-timeout")
    while True:
        try:
            return attempt()
        except (TransientError, DatabaseUnavailableError) as error:
            if not transient(error) or time.monotonic() > deadline:
                raise
        with contextlib.suppress(DatabaseUnavailableError):  # (or the connection is lost again)
            database.sync(database.database(location))  # which waits for the server


def transient(error: BaseException) -> bool:
    """Whether trying again may help: the connection was lost, perhaps in a load or while it was made, or a conflict."""
    return isinstance(error, TransientError) or isinstance(error.__cause__, TransientError)


def blob_directory(location: Location) -> str | None:
    """Where this process can make files that are to become blobs; None if the database has no blobs."""
    db = database.database(location)
    if db not in _directories:
        with writing(location) as connection:
            own = connection._normal_storage.temporaryDirectory() if database.has_blobs(connection) else None
            _directories[db] = own
    own = _directories[db]
    return own and (get("scratch-directory") or str(own))
