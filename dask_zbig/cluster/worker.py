"""A process's connections for Dask tasks: to read at a snapshot, and to stage.

A connection is checked out for the time of a task, not kept by thread: Dask's threads come and go. Idle ones
are kept a while, because opening one costs more than a small task.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import transaction
from transaction.interfaces import NoTransaction

from dask_zbig import database
from dask_zbig.database import Location

__all__ = ["reading", "writing"]

#: Idle connections that are kept, over all databases and snapshots.
IDLE = 8


class _Pool:
    """Idle connections by (database, snapshot), the last used last. Thread-safe; empty after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._pid = os.getpid()

    def take(self, key: Any) -> Any:
        with self._lock:
            if self._pid != os.getpid():
                self._idle.clear()
                self._pid = os.getpid()
            for number, (other, connection) in reversed(self._idle.items()):
                if other == key:
                    del self._idle[number]
                    return connection
        return None

    def give(self, key: Any, connection: Any) -> None:
        with self._lock:
            self._idle[id(connection)] = (key, connection)
            spare = [self._idle.popitem(last=False)[1][1] for _ in range(len(self._idle) - IDLE)]
        for old in spare:
            old.close()


_pool = _Pool()


@contextlib.contextmanager
def reading(location: Location, tid: bytes) -> Iterator[Any]:
    """A connection that sees the database as of `tid`. What is mapped through it outlives the ``with``.

    Raises
    ------
    DatabaseUnavailableError, SnapshotError
        See `dask_zbig.database`.
    """
    db = database.database(location)
    key = (id(db), tid)
    connection = _pool.take(key)
    if connection is None or connection.opened is None:
        # (not explicit: DB.close() aborts the transactions of open connections, begun or not)
        connection = database.open_at(db, tid, transaction.TransactionManager())
    connection.transaction_manager.begin()
    try:
        yield connection
    finally:
        connection.transaction_manager.abort()
        _pool.give(key, connection)


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
