"""A connection that does as it is told, here or in a process of its own.

Everything goes in and comes out as plain values, so that a pipe can carry it. Run as a script this file is the
other process: it may import nothing of the tests.
"""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection as Pipe

import numpy as np
import transaction
from ZODB.Connection import resetCaches
from ZODB.POSException import ConflictError, ConnectionStateError

import dask_zbig as dz
from dask_zbig.database import open_at

COUNTERS = 3
SAVEPOINTS = 4  # the last ones are kept
SECONDS = 60  # by then an answer has come, or never will


class Actor:
    """A connection to `db`, the array root["A"] in it, views of that, and a few counters beside it."""

    def __init__(self, db):
        self.db = db
        self.tm = transaction.TransactionManager()
        self.open()

    def open(self):
        self._hear()
        self.connection = self.db.open(self.tm)
        self.array = self.connection.root()["A"]
        self.views = []
        self.savepoints = []

    def _hear(self):
        """A client of a server learns first what others committed."""
        if hasattr(self.db.storage, "ping"):
            self.db.storage.ping()

    # -- data

    def write(self, index, value):
        self.array[index] = value

    def write_by_view(self, index, value):
        self.array[:][index] = value

    def write_by_kept_view(self, which, index, value):
        self.views[which][index] = value

    def read(self, index):
        return np.array(self.array[index])

    def keep_view(self):
        self.views = [*self.views[-2:], self.array[:]]

    def drop_views(self):
        self.views.clear()

    def append(self, values):
        self.array.append(values)

    def resize(self, size):
        self.array.resize(size)

    def count(self, which):
        self.connection.root()["counters"][which]["n"] += 1

    def see(self, regions):
        """The shape, the counters, and what lies in these regions: by a new view, and by those that were kept."""
        size = len(self.array)
        views = [self.array[:], *self.views]
        shown = [[np.array(v[lo : size if hi is None else min(hi, size)]) for lo, hi in regions] for v in views]
        return self.array.shape, [c["n"] for c in self.connection.root()["counters"]], shown

    # -- transactions

    def begin(self):
        self._hear()
        self.tm.begin()
        self.savepoints.clear()

    def commit(self, note):
        """Whether it went through; what conflicts is aborted."""
        self.savepoints.clear()
        self.tm.get().note(note)
        try:
            self.tm.commit()
        except ConflictError:
            self.tm.abort()
            return False
        return True

    def abort(self):
        self.savepoints.clear()
        self.tm.abort()

    def savepoint(self):
        self.savepoints = [*self.savepoints[1 - SAVEPOINTS :], self.tm.savepoint()]

    def rollback(self, which):
        self.savepoints[which].rollback()
        del self.savepoints[which + 1 :]

    # -- the connection

    def minimize(self):
        self.connection.cacheMinimize()

    def collect(self):
        self.connection.cacheGC()
        gc.collect()

    def reset_caches(self):
        """Whatever connection is opened from now on has a new cache."""
        resetCaches()

    def close_is_refused(self):
        try:
            self.connection.close()
        except ConnectionStateError:
            return True
        return False

    def close(self):
        self.views.clear()
        self.tm.abort()
        self.connection.close()


class Historical:
    """A connection to an old version, with a view, and what they should show for ever."""

    def __init__(self, db, tid, expected):
        self.manager = transaction.TransactionManager()
        self.connection = open_at(db, tid, self.manager)
        self.array = self.connection.root()["A"]
        self.view = self.array[:]
        self.expected = expected

    def compare(self, regions):
        shape, counters, parts = self.expected
        assert self.array.shape == shape
        assert [c["n"] for c in self.connection.root()["counters"]] == counters
        for (lo, hi), part in zip(regions, parts, strict=True):
            np.testing.assert_array_equal(self.view[lo:hi], part)
            np.testing.assert_array_equal(self.array[lo:hi], part)

    def close(self):
        self.manager.abort()
        self.connection.close()


class RemoteActors:
    """Makes actors in one other process, all of one database. Close it."""

    def __init__(self, uri):
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [sys.executable, __file__, str(theirs.fileno()), uri]
            self.process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()])
        self._pipe = Pipe(ours.detach())

    def new(self):
        """A new actor. The one before it must be closed."""
        self.call("new")
        return _Remote(self)

    def call(self, *message):
        """Have it done there. An exception there fails the test here, as does silence."""
        self._pipe.send(message)
        assert self._pipe.poll(SECONDS), f"no answer to {message[0]} in {SECONDS} s"
        failure, answer = self._pipe.recv()
        assert failure is None, f"in the other process, {message[0]}:\n{failure}"
        return answer

    def close(self):
        self._pipe.close()  # which ends it
        try:
            assert self.process.wait(SECONDS) == 0
        finally:
            self.process.kill()


class _Remote:
    def __init__(self, actors):
        self._actors = actors

    def __getattr__(self, name):
        return lambda *args: self._actors.call(name, *args)


def main(fd, uri):
    pipe = Pipe(fd)
    db = dz.open(uri)
    actor = None
    while True:
        try:
            name, *args = pipe.recv()
        except EOFError:
            break
        failure = answer = None
        try:
            if name == "new":
                actor = Actor(db)
            else:
                answer = getattr(actor, name)(*args)
        except Exception:  # noqa: BLE001  (whatever it is, the test is to show it)
            failure = traceback.format_exc()
        pipe.send((failure, answer))
    db.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
