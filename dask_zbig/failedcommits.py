"""What a commit that fails leaves behind in ZODB, and should not.

New objects are to be new again, so that they can be stored once more. What ZODB does about it reaches those that were
stored already, and those that somebody has added. An object in whose midst the commit failed, and those that it has
numbered and not come to, stay the connection's, with oids that the database does not have; who stores them again would
store references to nothing. And objects that somebody has added are emptied if they were stored, as if the database
had them; so are all that a savepoint has stored.

What is not mended: a new Blob has lost its file, and an object that the connection's cache has emptied after a
savepoint its state; a weak reference to a new object keeps the oid.

Of Ctrl-C in `tpc_begin` a storage may keep the lock that it has just got, and nobody commits any more. In
`tpc_finish` it would have the Connection disown new objects that the database has.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from ZODB.utils import z64

from dask_zbig.signals import ctrl_c_postponed

__all__ = ["guard_commits", "guard_commits_of", "take_back"]


def guard_commits_of(db: Any) -> None:
    """Do `guard_commits` for all connections of a ZODB.DB, if that was not done."""
    cls = db.klass
    if isinstance(cls, types.FunctionType) and cls.__module__ == __name__:
        return

    def connection(*args: Any, **options: Any) -> Any:
        made = cls(*args, **options)
        guard_commits(made)
        return made

    db.klass = connection
    db._connectionMap(guard_commits)  # the one that has made the root object


def guard_commits(connection: Any) -> None:
    """Have a Connection leave everything right if a commit, or a savepoint, fails. See the module."""
    if "_zbig_commits" in connection.__dict__:
        return
    cls = type(connection)

    def tpc_begin(self: Any, current: Any) -> None:
        with ctrl_c_postponed(once=True):  # another thread may be committing
            cls.tpc_begin(self, current)

    def store_objects(self: Any, writer: Any, current: Any) -> None:
        walk = _Walk(writer, self)
        try:
            cls._store_objects(self, walk, current)
        except BaseException:
            walk.take_back()
            raise

    # ZODB disowns new objects, too, but after it has emptied some, as if the database had them. We do it before.

    def note_savepoints(self: Any) -> None:
        if self._savepoint_storage is not None:
            self._creating.update(self._savepoint_storage.creating)

    def abort(self: Any, current: Any) -> None:
        note_savepoints(self)
        cls.abort(self, current)

    def abort_registered(self: Any) -> None:
        unique = {id(obj): obj for obj in self._registered_objects}.values()
        self._registered_objects = [obj for obj in unique if obj._p_oid is not None]  # (ZODB asserts that)
        for obj in self._registered_objects:
            if self._creating.pop(obj._p_oid, None) is not None:
                self._added[obj._p_oid] = obj  # as before it was stored
        self._invalidate_creating()
        cls._abort(self)

    def tpc_abort(self: Any, current: Any) -> None:
        note_savepoints(self)
        self._invalidate_creating()
        cls.tpc_abort(self, current)

    def tpc_finish(self: Any, current: Any) -> None:
        with ctrl_c_postponed(once=True):  # a server may not answer
            cls.tpc_finish(self, current)
            self._modified = []  # or an abort would have them loaded as they were before, in explicit mode for good

    connection.tpc_begin = types.MethodType(tpc_begin, connection)
    connection._store_objects = types.MethodType(store_objects, connection)
    connection.abort = types.MethodType(abort, connection)
    connection._abort = types.MethodType(abort_registered, connection)
    connection.tpc_abort = types.MethodType(tpc_abort, connection)
    connection.tpc_finish = types.MethodType(tpc_finish, connection)
    connection._zbig_commits = True


class _Walk:
    """An ObjectWriter that knows which object is being stored."""

    def __init__(self, writer: Any, connection: Any) -> None:
        self.serialize = writer.serialize
        self._stack = writer._stack
        self._connection = connection
        self._object: Any = None
        self._added = False

    def __iter__(self) -> Iterator[Any]:
        while self._stack:
            self._object = self._stack[-1]  # before it is taken from there: Ctrl-C may come at any time
            self._added = self._object._p_oid in self._connection._added
            self._stack.pop()
            yield self._object

    def take_back(self) -> None:
        """Let the objects that were not stored be as they were before."""
        connection, obj = self._connection, self._object
        if obj is not None and obj._p_serial == z64 and connection._cache.get(obj._p_oid) is not obj:
            connection._creating.pop(obj._p_oid, None)
            if self._added:
                connection._added[obj._p_oid] = obj
            take_back(obj, connection)
        for obj in self._stack:
            take_back(obj, connection)


def take_back(obj: Any, connection: Any) -> None:
    """Let a new object that was not stored be new again."""
    if obj._p_jar is not connection or obj._p_changed is None or obj._p_serial != z64:
        return
    if obj._p_oid in connection._added:  # by the user: it goes when the transaction is aborted
        return
    if connection._cache.get(obj._p_oid) is obj:
        del connection._cache[obj._p_oid]
    obj._p_changed = False
    del obj._p_jar, obj._p_oid
