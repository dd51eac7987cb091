"""What the fault matrix is run on: a server, a network that fails, a Dask cluster, clients, a reader.

All but the Dask scheduler are processes of their own, which ask at the steps of `tests.steps` what is to happen.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time

import dask
import numpy as np
import transaction
from distributed import Client, LocalCluster
from ZODB.POSException import POSError
from ZODB.serialize import referencesf
from ZODB.utils import get_pickle_metadata, z64

import dask_zbig as dz
from dask_zbig import database, uris
from dask_zbig.cluster.janitor import collect_garbage
from dask_zbig.cluster.staging import collect
from dask_zbig.storage.filestorage import blob_directory

from tests import saver, steps  # isort: skip
from tests.faults import Fault  # isort: skip
from tests.processes import SECONDS, Control, Process  # isort: skip
from tests.proxy import Proxy  # isort: skip

FAR = 1e11  # a time at which every lease is over


class Site:
    """All of it. By ``with``."""

    def __init__(self):
        self.numbers = itertools.count()
        self.version = 0
        self.broken = False  # a run has not come to its end
        self.meeting = threading.Barrier(2, timeout=SECONDS)
        self._saving = None  # the client whose turn it is
        self._held = False
        self._released = threading.Event()
        self._stack = contextlib.ExitStack()
        self._server_lock = threading.RLock()
        self._others = []  # threads that start servers
        self._savers = {True: [], False: []}

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc):
        self._stack.close()

    def _start(self, stack):
        self.directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="f", dir="/tmp"))
        temporary = os.path.join(self.directory, "tmp")
        os.mkdir(temporary)
        stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = temporary  # where to look for what processes have left
        self.path = os.path.join(self.directory, "x.fs")
        self._socket = os.path.join(self.directory, "zeo")
        control = os.path.join(self.directory, "control")
        self.environment = {
            **os.environ,
            "TMPDIR": temporary,
            steps.VARIABLE: control,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        }
        self.control = stack.enter_context(contextlib.closing(Control(control, self._do)))
        self.proxy = stack.enter_context(contextlib.closing(Proxy(self._socket)))
        options = {"blob_dir": blob_directory(self.path), "shared_blob_dir": "true"}
        self.uris = {}
        for shared in (True, False):  # a client with the server's blob directory, and one with a cache of its own
            place = os.path.join(self.directory, "shared" if shared else "alone")
            self.proxy.listen(place)
            self.uris[shared] = uris.zeo_uri(place, **(options if shared else {}))
        stack.callback(self._stop)
        self.start_server()
        self.uri = uris.zeo_uri(self._socket, **options)
        self.db = stack.enter_context(contextlib.closing(dz.open(self.uri)))
        with self.db.transaction() as connection:
            saver.new(connection.root())
        stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 20}))
        cluster = LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            dashboard_address=None,
            silence_logs=60,
            preload=[steps.__file__],
            env={name: self.environment[name] for name in ("TMPDIR", steps.VARIABLE)},
        )
        self.cluster = stack.enter_context(cluster)
        self.dask = stack.enter_context(Client(self.cluster, set_as_default=False))
        self._fill()
        self.readers = [Process(self, "reader", uri) for uri in (self.uri, self.uris[False])]
        for reader in self.readers:
            stack.callback(reader.kill)
            assert reader.answer(), reader.tail()

    def _stop(self):
        for process in [*self._savers[True], *self._savers[False]]:
            process.kill()
        for thread in self._others:
            thread.join(SECONDS)
        with self._server_lock:
            self.server.kill()

    # -- processes

    def start_server(self):
        with self._server_lock:
            self.server = Process(self, "server", self.path, self._socket)
            assert self.server.answer(), self.server.tail()

    def kill_server(self):
        """Kill it, and start another."""
        with self._server_lock:
            self.server.kill()
            self.start_server()

    def _fill(self):
        """Have clients at hand, which take a while to start."""
        for shared, number in ((True, 2), (False, 1)):
            while len(self._savers[shared]) < number:
                self._savers[shared].append(Process(self, "client", self.uris[shared], self.cluster.scheduler_address))

    def take(self, shared):
        """A client that is ready. `give` it back."""
        while True:
            self._fill()
            process = self._savers[shared].pop(0)
            if not hasattr(process, "ready"):
                process.ready = process.answer()
            if process.ready:
                self._fill()
                return process
            process.kill()
            assert "DatabaseUnavailableError" in process.tail(), process.tail()  # the server was killed meanwhile

    def give(self, shared, process):
        if process.popen.poll() is None:
            self._savers[shared].insert(0, process)
        else:
            process.kill()

    def worker_pids(self):
        return [nanny.process.pid for nanny in self.cluster.workers.values() if nanny.process and nanny.process.pid]

    # -- faults

    def _do(self, fault, pid):
        """Let it happen to the process; returns the answer to that."""
        action = fault.action
        if action == "again":
            return "again"
        if action == "cut":
            self.proxy.cut()
        elif action == "pack":
            with contextlib.suppress(POSError, dz.ZBigError):  # the server may be killed meanwhile
                collect_garbage(self.db)
                self.db.pack()
        elif action == "worker dies":
            self._kill("worker")
        elif action == "hold":
            if not self._held:  # once is enough
                self._held = True
                self._saving.answers.put("held")
                self._released.wait(SECONDS)
        elif action == "meet":
            self.meeting.wait()
        elif action == "trouble":
            self.proxy.expect(fault.trouble)
        elif action == "server starts again" or fault.step in steps.SERVER:
            self.kill_server()
        elif action in ("server dies", "both die"):
            self.server.popen.kill()
            self._others.append(threading.Thread(target=self.kill_server))
            self._others[-1].start()
        return "die" if action in ("die", "both die") else "go"

    # -- a run

    def run(self, faults=(), troubles=(), kills=(), *, how="coordinator", shared=True, retry=False):
        """Save a version while things happen, and again until it is saved; check everything.

        Parameters
        ----------
        kills
            Who is killed after how many seconds.
        how
            See `tests.saver.Saver`.
        shared
            Whether the client and Dask's workers use the server's blob directory.
        retry
            Whether the second try is by `CommitCoordinator.retry`, if that is possible.

        Returns
        -------
        said : list
            What clients said, one after the other; None for one that died. Each is {"saved": True, "before": whether
            it had been saved before} or {"saved": False, "error": ..., "text": ...}.
        happened : list
            Of the faults and troubles.
        """
        self.broken = True
        k = self.version + 1
        said = []
        client = self._saving = self.take(shared)
        self._held = False
        self._released.clear()
        self.control.plan(faults)
        self.proxy.expect(*troubles)
        timers = [threading.Timer(seconds, self._kill, (who,)) for who, seconds in kills]
        for timer in timers:
            timer.start()
        client.ask("save", k, how)
        answer = client.answer()
        if answer == "held":
            while not (said and said[-1]["saved"]):
                assert len(said) < 5, said
                other = self.take(shared)
                said.append(self._save_again(other, k, how))
                self.give(shared, other)
            self._released.set()
            answer = client.answer()
        self._released.set()
        said.append(answer and json.loads(answer))
        for timer in timers:
            timer.join()
        happened = [*self.control.happened, *self.proxy.happened, *kills]
        self.control.plan()
        self.proxy.expect()
        self._wait_for_server()
        assert self.look() in ((k,) if said[-1] and said[-1]["saved"] else (k - 1, k)), said
        retry = retry and how == "coordinator"
        while not (said[-1] and said[-1]["saved"]):
            assert len(said) < 5, said
            retry = retry and client.popen.poll() is None
            client = self._alive(client, shared)
            said.append(self._save_again(client, k, how, retry=retry))
            retry = False
        assert self.look() == k, said
        client = self._alive(client, shared)
        said.append(self._save_again(client, k, how))  # it does nothing
        assert said[-1] == {"saved": True, "before": True}, said
        self.give(shared, client)
        self.version = k
        assert self.look() == k
        self.check_nothing_left()
        self.check_readers()
        self.broken = False
        return said, happened

    def _alive(self, client, shared):
        """The client, or another one if it is dead."""
        if client.popen.poll() is None:
            return client
        client.kill()
        return self.take(shared)

    @staticmethod
    def _save_again(client, k, how, *, retry=False):
        """With nothing in the way."""
        client.ask(*(["retry"] if retry else ["save", k, how]))
        answer = client.answer()
        assert answer is not None, client.tail()
        return json.loads(answer)

    def _kill(self, who):
        """Now, wherever it is."""
        if who == "client":
            self._saving.popen.kill()
            self._saving.popen.wait()
        elif who == "server":
            self.kill_server()
        else:
            for pid in self.worker_pids()[:1]:
                os.kill(pid, signal.SIGKILL)

    def _wait_for_server(self):
        while self._others:
            self._others.pop().join(SECONDS)
        with self._server_lock:
            assert self.server.popen.poll() is None, self.server.tail()

    def look(self):
        """The version that there is now."""
        database.sync(self.db)
        connection = self.db.open(transaction.TransactionManager())
        try:
            return saver.seen(connection.root())
        finally:
            connection.transaction_manager.abort()
            connection.close()

    # -- afterwards

    def check_nothing_left(self):
        """When all is quiet, and every lease over."""
        self._wait_for_workers()
        location = database.location(self.db)
        collect(location, now=FAR)
        collect_garbage(self.db, old=0)
        self.db.pack()
        database.sync(self.db)
        records, serials = self._records()
        with self.db.transaction() as connection:
            root = connection.root()
            arrays = [root[name]._p_oid for name in (*"ABCL", "common")]
        everything, ours = _closure(records, [z64]), _closure(records, arrays)
        assert set(records) == everything, f"a pack has left {set(records) - everything}"
        segments = {oid for oid, (kind, _) in records.items() if kind in ("Blob", "InlineSegment")}
        assert segments <= ours, f"segments of no array: {[records[oid] for oid in segments - ours]}"
        blobs = {oid for oid in segments if records[oid][0] == "Blob"}
        helper = self.db.storage.fshelper
        expected = {helper.getBlobFilename(oid, serials[oid]) for oid in blobs}
        there = {os.path.join(place, name) for _, place in helper.listOIDs() for name in os.listdir(place)}
        assert there == expected, f"left: {there - expected}, lost: {expected - there}"
        names = os.listdir(helper.temp_dir) + os.listdir(self.environment["TMPDIR"])
        files = [n for n in names if not re.match(r"\.zbig-|dz-|dask-", n)]  # what living processes may have
        assert files == [], f"temporary files left: {files}"

    def check_readers(self):
        """They have seen nothing but whole versions until now."""
        for reader in self.readers:
            assert reader.popen.poll() is None, reader.tail()

    def end_readers(self):
        """What they have seen."""
        for reader in self.readers:
            reader.ask("end")
        return [json.loads(reader.answer()) for reader in self.readers]

    def at_once(self, one, two):
        """Have two clients save parts of an array, by `Saver.fill`, both published before either commits."""
        self.broken = True
        clients = [self.take(True), self.take(True)]
        self.control.plan([Fault("client has published", "meet", n) for n in (1, 2)])
        for client, part in zip(clients, (one, two), strict=True):
            client.ask("fill", *part)
        said = [json.loads(client.answer()) for client in clients]
        self.control.plan()
        for client in clients:
            self.give(True, client)
        database.sync(self.db)
        with self.db.transaction() as connection:
            rows = np.array(connection.root()["common"][...])
        self.broken = False
        return said, rows

    def _records(self):
        """All there are: oid -> (class, references), and their serials."""
        records, serials, more = {}, {}, None
        while True:
            oid, tid, data, more = self.db.storage.record_iternext(more)
            _, name = get_pickle_metadata(data)
            records[oid] = (name, referencesf(data))
            serials[oid] = tid
            if more is None:
                return records, serials

    def _wait_for_workers(self):
        """Until they do nothing any more, also for clients that died."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                self.dask.wait_for_workers(2, timeout=5)
                break
            except TimeoutError:
                assert time.monotonic() < deadline, "the workers do not start"
                self.cluster.scale(2)  # now and then a nanny ends with its worker
        while any(self.dask.run(lambda dask_worker: len(dask_worker.active_threads)).values()):
            assert time.monotonic() < deadline, "the workers do not come to an end"
            time.sleep(0.02)


def _closure(records, start):
    found, todo = set(), list(start)
    while todo:
        oid = todo.pop()
        if oid not in found:
            found.add(oid)
            todo += records[oid][1]
    return found
