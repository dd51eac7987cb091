"""The data manager: array data's part in a connection's transactions.

One `DataManager` serves one ZODB Connection, for as long as that is open. ZODB's own Connection stores the
objects, among them the extent map; this one turns changed memory into segments before that, and keeps what is
mapped true to the snapshot that the connection sees.

A write to memory runs no Python, so nothing joins a transaction when it happens. Therefore the manager joins
when a view is made and, at the latest, in ``beforeCompletion``, where it makes the Connection join as well:
joining during the commit is too late. It flushes in ``tpc_begin``, sorted before everything else, so that no
storage is locked yet while data is written and synced.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import transaction
from transaction._transaction import Status
from transaction.interfaces import NoTransaction
from ZODB.POSException import ConnectionStateError

from dask_zbig import database
from dask_zbig.config import get
from dask_zbig.errors import ClosedError, NotStoredError
from dask_zbig.failedcommits import take_back
from dask_zbig.flush import flush
from dask_zbig.guards import guard_connection, watch_get, watch_unjoin
from dask_zbig.memory._native import recount_mappings, start
from dask_zbig.openfile import OpenFile, Owner, State
from dask_zbig.segmentwriter import Target
from dask_zbig.signals import ctrl_c_postponed
from dask_zbig.storage.reader import reader
from dask_zbig.storage.tree import ZBigFile

__all__ = ["DataManager", "about_to_store", "manager_of", "open_file", "store_new"]

_managers: weakref.WeakKeyDictionary[Any, DataManager] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def manager_of(connection: Any) -> DataManager:
    """The data manager of an open Connection."""
    manager = _managers.get(connection)
    if manager is None or not manager.current():
        if connection.opened is None:
            raise ClosedError(f"the connection of this array is closed: {connection!r}")
        with _lock:
            manager = _managers.get(connection)
            if manager is None or not manager.current():
                if manager is not None:
                    manager.close()
                manager = _managers[connection] = DataManager(connection)
    return manager


def open_file(file: ZBigFile, owner: Owner, connection: Any) -> OpenFile:
    """`file` as its connection has it open; `connection` is None for an array that no database knows yet."""
    if connection is not None:
        manager = manager_of(connection)
        opened = manager.files.get(file)
        return opened if opened is not None else manager.open(file, owner)
    opened = _unattached(file)
    if opened is None:
        opened = OpenFile(file, owner, _scratch_directory(None))
        file._v_open = opened
    return opened


def _unattached(file: ZBigFile) -> OpenFile | None:
    return file.__dict__.get("_v_open")


def store_new(opened: OpenFile, connection: Any) -> None:
    """A file's state is being taken. If it has just become part of a database, its data goes there first."""
    if connection is None:
        raise NotStoredError("an array that is not stored in a database cannot be pickled: store it and commit first")
    manager = manager_of(connection)
    if opened.manager is None:
        manager.adopt(opened)
        manager.join_savepoint(opened)
    # A savepoint takes states, too; data then stays in memory, and is flushed when the commit begins.
    committing = manager.transaction_manager.get().status == Status.COMMITTING
    if committing and opened.dirty and opened.file not in manager.flushing:
        manager.flush(opened)


def about_to_store(file: ZBigFile, owner: Owner, connection: Any) -> None:
    """The state of a new array is being taken. If a commit does that, its manager is to know, whatever comes of it."""
    manager = manager_of(connection)
    if manager.transaction_manager.get().status == Status.COMMITTING:
        manager.open(file, owner)


def _scratch_directory(connection: Any) -> str:
    configured = get("scratch-directory")
    if configured:
        return str(configured)
    if connection is not None and database.has_blobs(connection):
        directory = str(connection._normal_storage.temporaryDirectory())
        if os.path.isdir(directory) or not connection.isReadOnly():  # one that is only read may be without
            return directory
    return tempfile.gettempdir()


class DataManager:
    """See the module. Implements ``transaction``'s IDataManager, ISavepointDataManager and ISynchronizer."""

    def __init__(self, connection: Any) -> None:
        self._connection = weakref.ref(connection)
        self.transaction_manager = connection.transaction_manager
        self.files: dict[ZBigFile, OpenFile] = {}
        self.turn = threading.RLock()  # see OpenFile
        self.flushing: set[ZBigFile] = set()
        self._transaction: Any = None  # the one we have joined
        self._adopted: dict[ZBigFile, State] = {}  # by a savepoint of the connection alone
        self._latest: dict[ZBigFile, State] | None = None  # the state of the last savepoint
        self._cache = connection._cache
        self._blobs = database.has_blobs(connection)
        self.durable = not database.uploads_blobs(connection)
        self.scratch = _scratch_directory(connection)
        self.reader = reader(connection.db())
        self._db = weakref.ref(connection.db())
        self.snapshot = database.snapshot(connection)
        self.moves = False  # see `moving`
        self.writeable = connection.before is None and not connection.isReadOnly()
        guard_connection(connection, _managers)
        watch_get(self.transaction_manager, self)
        self.transaction_manager.registerSynch(self)

    @property
    def connection(self) -> Any:
        """The Connection."""
        connection = self._connection()
        assert connection is not None
        return connection

    def current(self) -> bool:
        """Whether this manager still serves its connection: not after that was closed, or lost its cache."""
        connection = self._connection()
        return connection is not None and connection.opened is not None and connection._cache is self._cache

    def open(self, file: ZBigFile, owner: Owner) -> OpenFile:
        """Serve a file from now on, if it is not served already."""
        with self.turn:
            opened = self.files.get(file)
            if opened is None:
                opened = _unattached(file) or OpenFile(file, owner, self.scratch)
                self.adopt(opened)
            return opened

    def adopt(self, opened: OpenFile) -> None:
        """Serve this file from now on."""
        opened.attach(self)
        self.files[opened.file] = opened
        opened.file.__dict__.pop("_v_open", None)

    @contextlib.contextmanager
    def snapshot_connection(self) -> Iterator[Any]:
        """Another connection that sees what this one does, for a loader thread.

        If this one moves on meanwhile, `snapshot` is another.
        """
        db = self._db()
        manager = transaction.TransactionManager(explicit=True)
        connection = database.open_at(db, self.snapshot, manager)
        manager.begin()
        try:
            yield connection
        finally:
            manager.abort()
            connection.close()

    # -- joining

    def join(self) -> None:
        """Take part in the current transaction."""
        if self._transaction is not None:
            return
        with contextlib.suppress(NoTransaction):  # explicit mode, outside of any: reading is allowed
            current = self.transaction_manager.get()
            over = current.status == Status.COMMITTED  # hooks and synchronizers may read then, as they may objects
            if self._transaction is None and not over:  # get() may have begun one, which calls newTransaction
                self._join(current)

    @property
    def joined(self) -> bool:
        """Whether it takes part in a transaction now."""
        return self._transaction is not None

    def _join(self, current: Any) -> None:
        current.join(self)
        self._transaction = current
        watch_unjoin(current, DataManager)

    @property
    def dirty(self) -> bool:
        """Whether any array has uncommitted changes (or cannot be committed)."""
        return any(f.dirty for f in self.files.values())

    def beforeCompletion(self, current: Any) -> None:
        """Called before a commit and before an abort."""
        if not self.dirty or current.status in (Status.COMMITFAILED, Status.COMMITTED):  # (Ctrl-C after a commit)
            return
        if self._transaction is None:
            self._join(current)
        connection = self.connection
        if connection._needs_to_join:
            current.join(connection)
            connection._needs_to_join = False

    # -- two phases

    def sortKey(self) -> str:
        """First of all."""
        return "\x00dask_zbig"

    def tpc_begin(self, current: Any) -> None:
        """Write data out, sync it, and change the extent map."""
        if self.connection._needs_to_join:
            # Nothing had changed when the commit began, and now it is too late for the Connection to join: what another
            # thread has written since is the next transaction's.
            return
        for opened in list(self.files.values()):
            if opened.dirty:
                self.flush(opened)

    def flush(self, opened: OpenFile) -> None:
        """Flush one file, once in a transaction."""
        self.flushing.add(opened.file)
        limit = get("inline-limit")
        flush(opened, Target(self.connection, self._blobs, self.scratch, limit, self.durable))

    def commit(self, current: Any) -> None:
        """The Connection does the rest."""

    def tpc_vote(self, current: Any) -> None:
        """As in `commit`."""

    def tpc_finish(self, current: Any) -> None:
        """Nothing here may fail, and the storage is not done yet: see `afterCompletion`."""

    def tpc_abort(self, current: Any) -> None:
        """The commit failed: what it wrote is undone as by `abort`."""
        self.abort(current)

    def abort(self, current: Any) -> None:
        """Forget all changes."""
        for opened in list(self.files.values()):
            if opened.dirty:
                opened.discard()
        self._leave()

    def _leave(self) -> None:
        """The transaction is over."""
        self._transaction = None
        self._latest = None
        self._adopted.clear()
        self.flushing.clear()
        for opened in list(self.files.values()):
            opened.cool()

    # -- boundaries

    def afterCompletion(self, current: Any) -> None:
        """The transaction is over. What becomes of it is done as a whole."""
        with ctrl_c_postponed(once=True):
            self._over(current)

    def _over(self, current: Any) -> None:
        done = current.status == Status.COMMITTED
        self._leave()
        for file, opened in list(self.files.items()):
            if done:
                if opened.flushed:
                    opened.settle()
            else:
                if opened.dirty:
                    opened.discard()
                take_back(opened.owner, self.connection)  # (see there; we may have come into it too late)
                take_back(file, self.connection)
            if file._p_jar is None and not done:  # it was new
                del self.files[file]
                opened.reset()
                file._v_open = opened
                continue
            opened.boundary()
            opened.mapping.rest()
        recount_mappings()

    def newTransaction(self, current: Any) -> None:
        """A transaction begins. It is by `moving` that we hear when the connection has moved to its snapshot."""
        if self._transaction is None and any(f.mapping.watched for f in self.files.values()):
            start()
            self._join(current)

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """The connection moves to another snapshot meanwhile. What it hears of changes counts from the end of it on.

        Until then views show the old one: no loader could see ours, which is an older one and what we have saved.
        """
        self.moves = True
        try:
            yield
            self.snapshot = database.snapshot(self.connection)
        finally:
            self.moves = False
            for opened in self.files.values():
                opened.moved()
        for file, opened in self.files.items():
            if file._p_jar is not None:  # else it was new, and is about to be reset
                opened.boundary()

    # -- savepoints

    def savepoint(self) -> _Savepoint:
        """Changes so far become layers that a rollback comes back to."""
        self._latest = {file: opened.state() for file, opened in self.files.items()}
        return _Savepoint(self, self._latest)

    def join_savepoint(self, opened: OpenFile) -> None:
        """An array has become known by a savepoint, which is being taken, of the Connection: it is part of it."""
        # If we had no part in that savepoint, see `guard_connection`.
        states = self._latest if self._latest is not None else self._adopted
        states[opened.file] = opened.state()

    def connection_rolled_back(self) -> None:
        """The connection is back at a savepoint. If that was older than our first one we were not asked."""
        if self._latest is None and self._adopted:
            self.rollback(self._adopted)
        for opened in self.files.values():  # what it has invalidated only we, in its thread, can load
            opened.mapping.refill(opened)

    def stays(self, current: Any) -> bool:
        """A rollback to a savepoint older than our part in the transaction wants us out of it. Do we go?"""
        if any(f.mapping.watched for f in self.files.values()):
            self._transaction = current  # no: these views may be written to
            return True
        return False

    def rollback(self, state: dict[ZBigFile, State]) -> None:
        """Back to `state`."""
        for file, opened in self.files.items():
            opened.rollback(state.get(file, ((), None)))

    # -- closing

    def refuse_close(self) -> None:
        """Raise ZODB's `ConnectionStateError` if there is anything that closing would lose."""
        if self.dirty:
            names = ", ".join(repr(f.owner) for f in self.files.values() if f.dirty)
            raise ConnectionStateError(
                f"Cannot close a connection with uncommitted changes of {names}: commit or abort first"
            )

    def close(self) -> None:
        """The connection goes: nothing is served any more."""
        self.transaction_manager.unregisterSynch(self)
        for opened in self.files.values():
            opened.close()
        self.files.clear()


class _Savepoint:
    def __init__(self, manager: DataManager, state: dict[ZBigFile, State]) -> None:
        self._manager = manager
        self._state = state

    def rollback(self) -> None:
        self._manager.rollback(self._state)
