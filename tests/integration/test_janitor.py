"""Those who died: their staged data and their files go, those of the living stay. Real processes, real servers."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import time

import dask
import numpy as np
import pytest
import transaction

import dask_zbig as dz
from dask_zbig import database, tempfiles
from dask_zbig.cluster import renewal, staging
from dask_zbig.cluster.janitor import collect_garbage
from dask_zbig.cluster.renewal import Renewal
from dask_zbig.cluster.staging import ROOT_KEY, JobGoneError, begin_job, collect, commit_entry, end_job, hold_job, renew
from dask_zbig.cluster.store import Place, stage
from dask_zbig.errors import DatabaseUnavailableError
from dask_zbig.segmentwriter import store_inline
from dask_zbig.storage.blobfiles import orphans

SECONDS = 200
MIB = 1 << 20


def segment(connection):
    return [store_inline(None, connection, b"x" * 100)]


def jobs(db):
    """Until when each has a lease."""
    if hasattr(db.storage, "ping"):
        db.storage.ping()
    with db.transaction() as connection:
        return {name: job.lease.until for name, job in connection.root().get(ROOT_KEY, {}).items()}


def set_lease(db, job, until):
    with db.transaction() as connection:
        connection.root()[ROOT_KEY][job.id].lease.until = until


def wait_until(ready):
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def python(code, *args):
    """Another process. It is killed in the end, if it has not ended by itself."""
    command = [sys.executable, "-c", code, *map(str, args)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


# -- two at a time, interleaved at each step


class Interleaved:
    """Has `other` done, by another client, when the `n`-th step of something is reached."""

    def __init__(self, clients, monkeypatch):
        self.location = database.location(clients.db)
        self._clients = clients
        self._other = clients.database(other=True)
        self._by_other = False
        self._todo = None
        monkeypatch.setattr(staging, "writing", self._writing)
        monkeypatch.setattr(staging, "_pause", lambda attempt: time.sleep(0.001))

    def run(self, first, other, n):
        """Returns what both returned (or raised), and whether there was an `n`-th step."""
        self._left, self._todo, self._answer = n, other, None
        answer = self._answer_of(first)
        reached = self._todo is None
        if not reached:
            self._step_of_other()
        return answer, self._answer, reached

    @staticmethod
    def _answer_of(what):
        try:
            return what()
        except JobGoneError as error:
            return error

    def _step(self):
        if self._by_other or self._todo is None:
            return
        self._left -= 1
        if self._left < 0:
            self._step_of_other()

    def _step_of_other(self):
        todo, self._todo = self._todo, None
        self._by_other = True
        try:
            self._answer = self._answer_of(todo)
        finally:
            self._by_other = False

    @contextlib.contextmanager
    def _writing(self, location):
        assert location == self.location
        db = self._other if self._by_other else self._clients.db
        manager = transaction.TransactionManager(explicit=True)
        self._step()
        connection = db.open(manager)
        manager.begin()
        self._step()
        commit = manager.commit

        def stepwise():
            self._step()
            manager.get().join(self)
            commit()

        manager.commit = stepwise
        try:
            yield connection
            self._step()
        finally:
            with contextlib.suppress(transaction.interfaces.NoTransaction):
                manager.abort()
            connection.close()

    # as a data manager that comes first: before the storage is locked, when everything was checked

    transaction_manager = None

    def sortKey(self):
        return "\0"

    def tpc_begin(self, _):
        self._step()

    def commit(self, _):
        pass

    def tpc_vote(self, _):
        pass

    def tpc_finish(self, _):
        pass

    def tpc_abort(self, _):
        pass

    def abort(self, _):
        pass


@pytest.fixture
def interleaved(clients, monkeypatch):
    return Interleaved(clients, monkeypatch)


def both(clients, interleaved, first, other):
    """Every way in which they can meet: [(job, answer of first, of other)]."""
    connection = clients.connect().connection
    for n in range(100):
        job = begin_job(interleaved.location, connection)
        set_lease(clients.db, job, time.time() - 1)
        with contextlib.suppress(AttributeError):
            interleaved._other.storage.ping()
        one, two, reached = interleaved.run(lambda: first(job), lambda: other(job), n)  # noqa: B023 - called now
        yield job, one, two
        with contextlib.suppress(JobGoneError):
            end_job(job)
        if not reached:
            assert n >= 5
            return
    raise AssertionError("it takes no end")


def removed(collected, job):
    return job.id in [found.id for found in collected]


@pytest.mark.parametrize("first", ["renew", "collect"])
def test_a_job_is_renewed_or_removed(clients, interleaved, first):
    def collecting(job):
        return collect(interleaved.location)

    outcomes = set()
    order = (renew, collecting) if first == "renew" else (collecting, renew)
    for job, one, two in both(clients, interleaved, *order):
        term, collected = (one, two) if first == "renew" else (two, one)
        was_removed = removed(collected, job)
        assert was_removed == isinstance(term, JobGoneError)
        assert (job.id in jobs(clients.db)) != was_removed
        outcomes.add(was_removed)
    assert outcomes == {True, False}


@pytest.mark.parametrize("first", ["stage", "collect"])
def test_a_job_is_staged_for_or_removed(clients, interleaved, first):
    def collecting(job):
        return collect(interleaved.location)

    def staging_(job):
        return commit_entry(job, segment)

    outcomes = set()
    order = (staging_, collecting) if first == "stage" else (collecting, staging_)
    for job, one, two in both(clients, interleaved, *order):
        staged, collected = (one, two) if first == "stage" else (two, one)
        was_removed = removed(collected, job)
        assert was_removed == isinstance(staged, JobGoneError)
        assert (job.id in jobs(clients.db)) != was_removed
        outcomes.add(was_removed)
    assert outcomes == {True, False}


@pytest.mark.parametrize("first", ["renew", "end"])
def test_a_job_ends_although_it_is_renewed(clients, interleaved, first):
    order = (renew, end_job) if first == "renew" else (end_job, renew)
    for job, _, _ in both(clients, interleaved, *order):
        assert job.id not in jobs(clients.db)


def test_two_janitors(clients, interleaved):
    def collecting(job):
        return collect(interleaved.location)

    for job, one, two in both(clients, interleaved, collecting, collecting):
        assert removed(one, job) != removed(two, job)
        assert job.id not in jobs(clients.db)


# -- while the client lives


@pytest.fixture
def quick():
    """Leases of three seconds."""
    with dask.config.set({"zbig.lease-seconds": 3}):
        yield


def test_a_computation_longer_than_the_lease(merging, quick, monkeypatch):
    monkeypatch.setattr(renewal, "PATIENCE", SECONDS)  # `stop` waits for a renewal that is under way
    client = merging.connect()
    job = begin_job(database.location(merging.db), client.connection)
    first = jobs(merging.db)[job.id]
    keeper = Renewal(job)
    # (just renewed, so that it is not over when we look)
    wait_until(lambda: jobs(merging.db)[job.id] > max(first + 3, time.time() + 1.5))
    assert collect(database.location(merging.db)) == []
    assert keeper.running
    keeper.stop()
    keeper.stop()
    assert not keeper.running
    assert not keeper._thread.is_alive()
    assert removed(collect(database.location(merging.db), time.time() + 4), job)


def test_renewal_ends_with_its_owner_or_its_job(local, quick):
    client = local.connect()
    location = database.location(local.db)
    job, other = begin_job(location, client.connection), begin_job(location, client.connection)
    keeper, kept = Renewal(job), Renewal(other)
    thread = keeper._thread
    assert thread.daemon
    del keeper
    gc.collect()
    thread.join(SECONDS)
    assert not thread.is_alive()
    end_job(other)
    kept._thread.join(SECONDS)
    assert not kept.running
    end_job(job)


def test_renewal_while_the_server_is_away(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(renewal, "RETRY", 0.2)
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as place, contextlib.ExitStack() as stack:
        address = os.path.join(place, "zeo")
        with dz.serve(tmp_path / "x.fs", address=address) as uri:
            db = stack.enter_context(contextlib.closing(dz.open(uri)))
            db.storage._server.timeout = 1  # from now on: how long to wait for the server
            connection = db.open(transaction.TransactionManager())
            job = begin_job(database.location(db), connection)
            connection.close()
            keeper = Renewal(job)
        over = time.time() + 4
        wait_until(lambda: time.time() > over)  # the lease is over, but there is nobody who could collect it
        assert keeper.running
        stack.enter_context(dz.serve(tmp_path / "x.fs", address=address))
        wait_until(db.storage.is_connected)
        wait_until(lambda: jobs(db)[job.id] > time.time() + 1)
        assert collect(database.location(db)) == []
        keeper.stop()
        end_job(job)


def test_a_renewal_does_not_keep_the_process(tmp_path):
    code = """
import sys, transaction
import dask_zbig as dz
from dask_zbig import database
from dask_zbig.cluster.staging import begin_job
from dask_zbig.cluster.renewal import Renewal
db = dz.open(sys.argv[1])
keeper = Renewal(begin_job(database.location(db), db.open()))
print("ready", flush=True)
"""
    with python(code, tmp_path / "x.fs") as process:
        assert process.stdout.readline() == "ready\n"
        assert process.wait(SECONDS) == 0


def test_janitors_at_work_all_the_time_beside_a_short_lease(tmp_path, monkeypatch):
    """Renewed by one process, attacked by two others: it goes only when it was not renewed in time."""
    attack = """
import sys, threading, time
import dask_zbig as dz
from dask_zbig import database
from dask_zbig.cluster.staging import collect
db = dz.open(sys.argv[1])
location = database.location(db)
stopped = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stopped.set()), daemon=True).start()
print("ready", flush=True)
while not stopped.is_set():
    now = time.time()
    for job in collect(location, now):
        print(job.id, repr(now), flush=True)
"""
    until = {}
    own = set()  # what `begin_job` collects here, before it makes another one

    def noting(*args, **options):
        found = collect(*args, **options)
        own.update(job.id for job in found)
        return found

    monkeypatch.setattr(staging, "collect", noting)
    with dz.serve(tmp_path / "x.fs") as uri, contextlib.closing(dz.open(uri)) as db:
        connection = db.open(transaction.TransactionManager())
        with python(attack, uri) as one, python(attack, uri) as two:
            attackers = [one, two]
            assert [process.stdout.readline() for process in attackers] == ["ready\n"] * 2
            for k in range(12):
                with dask.config.set({"zbig.lease-seconds": (0.03, 0.1, 0.3)[k % 3]}):
                    job = begin_job(database.location(db), connection)
                with contextlib.suppress(JobGoneError):
                    for n in range(40):
                        until[job.id] = renew(job).until
                        if n > 30:  # it gets tired
                            time.sleep(0.04)
            wait_until(lambda: not jobs(db))
            outputs = [process.communicate(timeout=SECONDS)[0].split() for process in attackers]
            assert [process.returncode for process in attackers] == [0, 0]
        connection.close()
    collected = [(out[i], float(out[i + 1])) for out in outputs for i in range(0, len(out), 2)]
    assert len(collected) == len({job for job, _ in collected}) > 0
    for job, now in collected:
        assert until.get(job, 0.0) < now
    assert set(until) <= {job for job, _ in collected} | own


# -- after a kill

BEGIN = """
import os, pickle, sys, threading
import numpy as np, transaction
import dask_zbig as dz
from dask_zbig.cluster import staging, store
from dask_zbig.cluster.store import Place, stage
db = dz.open(sys.argv[1])
connection = db.open()
def hang(*args, **options):
    print("ready", flush=True)
    threading.Event().wait()
"""
WRITER = (
    BEGIN
    + """
a = connection.root()["A"][:]
a[:] = 1
hang()
"""
)
#: sys.argv[2:]: the job, and before which step of staging it hangs.
WORKER = (
    BEGIN
    + """
job = pickle.loads(bytes.fromhex(sys.argv[2]))
if sys.argv[3] == "commit":
    store.commit_entry = hang
elif sys.argv[3] == "store":
    db.storage.store = hang
data = np.ones(1 << 20, "u1")
stage(data, Place(0, 0, data.shape, (1,), data.dtype), job)
hang()
"""
)


@pytest.fixture(params=["file", "server", "cache"])
def where(request, tmp_path):
    """Something to open a database by, and its directory of blobs; "cache": each client has one of its own."""
    path = str(tmp_path / "x.fs")
    with contextlib.ExitStack() as stack:
        uri = path
        if request.param != "file":
            uri = stack.enter_context(dz.serve(path, shared_blob_dir=request.param == "server"))
        if request.param == "cache":
            uri += f"?blob_dir={tmp_path / 'cache'}"
            yield uri, str(tmp_path / "cache")
        else:
            yield uri, path + ".blobs"


def new_array(uri, shape=2 * MIB):
    with contextlib.closing(dz.open(uri)) as db, db.transaction() as connection:
        connection.root()["A"] = dz.ZBigArray(shape, "u1")


def ours(place):
    return sorted(name for name in os.listdir(os.path.join(place, "tmp")) if "zbig" in name)


def blob_files(place):
    """All files below the directory of blobs, but for what describes it."""
    found = [os.path.join(path, name) for path, _, names in os.walk(place) for name in names]
    return sorted(f for f in found if os.path.basename(f) not in (".layout", "README.md"))


def test_a_killed_writers_files_go_when_the_database_is_used_again(where, monkeypatch):
    uri, place = where
    monkeypatch.setattr(tempfiles, "EVERY", 0.0)  # as a new process would
    new_array(uri)
    with python(WRITER, uri) as process:
        assert process.stdout.readline() == "ready\n"
    assert len(ours(place)) >= 2
    with contextlib.closing(dz.open(uri)) as db, contextlib.closing(db.open()) as connection:
        assert not connection.root()["A"][:].any()
        assert [name for name in ours(place) if not name.endswith(".lock")] == []
        transaction.abort()
    gc.collect()
    assert ours(place) == []


def test_a_living_writers_files_stay(tmp_path):
    with dz.serve(tmp_path / "x.fs") as uri:
        place = str(tmp_path / "x.fs.blobs")
        new_array(uri)
        with python(WRITER, uri) as process, contextlib.closing(dz.open(uri)) as db:
            assert process.stdout.readline() == "ready\n"
            before = ours(place)
            assert len(before) >= 2
            assert [f for f in collect_garbage(db, old=0.0).files if f.path.startswith(place)] == []
            assert ours(place) == before


@pytest.mark.parametrize("step", ["commit", "store", "answer"])
def test_nothing_is_left_of_a_killed_worker(tmp_path, step):
    place = str(tmp_path / "x.fs.blobs")
    with dz.serve(tmp_path / "x.fs") as uri, contextlib.closing(dz.open(uri)) as db:
        connection = db.open(transaction.TransactionManager())
        end_job(begin_job(database.location(db), connection))
        connection.close()
        db.pack()
        size, files = len(db.storage), blob_files(place)
        job = begin_job(database.location(db), connection := db.open(transaction.TransactionManager()))
        connection.close()
        with python(WORKER, uri, pickle.dumps(job).hex(), step) as process:
            assert process.stdout.readline() == "ready\n"
        assert len(blob_files(place)) > len(files)
        db.storage.ping()
        assert collect_garbage(db).jobs == ()
        set_lease(db, job, time.time() - 1)
        report = collect_garbage(db, dry_run=True, old=0.0)
        assert [found.id for found in report.jobs] == [job.id]
        assert collect_garbage(db, old=0.0).jobs[0].id == job.id
        db.pack()
        db.storage.ping()
        assert blob_files(place) == files
        assert len(db.storage) == size
        assert (report.staged_bytes, report.jobs[0].segments) == ((MIB, 1) if step == "answer" else (0, 0))
        assert collect_garbage(db, old=0.0).jobs == ()


def test_pack_between_stage_and_publish(tmp_path):
    with dz.serve(tmp_path / "x.fs") as uri, contextlib.closing(dz.open(uri)) as db:
        connection = db.open(transaction.TransactionManager())
        job = begin_job(database.location(db), connection)
        data = np.arange(MIB, dtype="u1")
        staged = stage(data, Place(0, 0, data.shape, (1,), data.dtype), job).segments
        db.pack()
        assert collect_garbage(db, old=0.0).jobs == ()
        refs = [s.ref(connection) for s in staged]
        hold_job(job, connection)
        connection.root()["kept"] = [r.obj for r in refs]
        connection.transaction_manager.commit()
        end_job(job)
        db.pack()
        connection.cacheMinimize()
        with connection.root()["kept"][0].open("r") as file:
            assert file.read()[-MIB:] == data.tobytes()
        connection.close()


# -- blobs of no transaction


def test_blob_files_of_no_transaction(where):
    uri, place = where
    new_array(uri)
    with contextlib.closing(dz.open(uri)) as db, contextlib.closing(db.open()) as connection:
        for value in (1, 2):
            connection.root()["A"][:] = value
            transaction.commit()
        assert list(orphans(db.storage, os.path.join(place, "tmp"))) == []
        kept = blob_files(place)
        blob = next(f for f in kept if f.endswith(".blob"))
        folder = os.path.dirname(blob)
        shared = getattr(db.storage, "shared_blob_dir", True)
        strays = [
            os.path.join(place, "tmp", "BUCabcdefgh"),
            os.path.join(place, "tmp", "tmpabcd_f12"),
            os.path.join(place, "tmp", "savepointsabc", "0x01", "x.spb"),
            os.path.join(folder, "0x00abcdefgh.tmp-"),
            os.path.join(folder, "0x040d38fc689a4d88abcdefgh.tmp"),
            os.path.join(folder, f"0x{(1 << 62) + 5:016x}.blob"),
            os.path.join(folder, "0x0000000000000001.blob"),
        ]
        for stray in strays:
            os.makedirs(os.path.dirname(stray), exist_ok=True)
            with open(stray, "wb") as file:
                file.write(b"12345")
        assert [f for f in collect_garbage(db).files if f.path.startswith(place)] == []
        found = [f for f in collect_garbage(db, old=0.0).files if f.path.startswith(place)]
        expected = strays if shared else strays[:3]
        assert sorted(f.bytes for f in found) == [5] * len(expected)
        assert blob_files(place) == sorted(kept + strays[len(expected) :])
        assert (connection.root()["A"][:] == 2).all()


# -- the report


def test_the_report(tmp_path):
    path = str(tmp_path / "x.fs")
    new_array(path)
    with python(WRITER, path) as process:
        assert process.stdout.readline() == "ready\n"
    with contextlib.closing(dz.open(path)) as db:
        connection = db.open(transaction.TransactionManager())
        over, alive = (begin_job(database.location(db), connection) for _ in range(2))
        for _ in range(3):
            commit_entry(over, segment)
            commit_entry(alive, segment)
        connection.close()
        set_lease(db, over, time.time() - 1)
        with pytest.raises(DatabaseUnavailableError, match="open"):
            collect_garbage(path)
    dry = collect_garbage(path, dry_run=True)
    report = collect_garbage(path)
    assert (dry.dry_run, report.dry_run) == (True, False)
    (job,) = report.jobs
    assert (job.id, job.bytes, job.segments, report.staged_bytes) == (over.id, 300, 3, 300)
    assert 0 <= job.age < SECONDS
    files = [f for f in report.files if f.path.startswith(path)]
    assert [f.path for f in files] == [f.path for f in dry.files if f.path.startswith(path)]
    assert sum(f.bytes for f in files) >= 2 * MIB
    assert report.file_bytes == sum(f.bytes for f in report.files)
    again = collect_garbage(path)
    assert again.jobs == ()
    assert [f for f in again.files if f.path.startswith(path)] == []
    with contextlib.closing(dz.open(path)) as db:
        assert list(jobs(db)) == [alive.id]


def test_what_is_no_database(tmp_path):
    with pytest.raises(DatabaseUnavailableError, match=r"no FileStorage.*nope\.fs"):
        collect_garbage(str(tmp_path / "nope.fs"))
    assert os.listdir(tmp_path) == []
    with pytest.raises(dz.DatabaseURIError):
        collect_garbage("nope://x")


def test_a_database_without_blobs_and_one_that_is_new(clients):
    assert collect_garbage(clients.db).jobs == ()


# -- all at once


def test_janitors_among_writers_and_workers(tmp_path):
    """Two of each; whoever loses a file fails. Some are killed, and only their files go."""
    code = (
        BEGIN
        + """
import time
from dask_zbig import database
from dask_zbig.cluster.janitor import collect_garbage
kind, name, end = sys.argv[2], sys.argv[3], time.monotonic() + float(sys.argv[4])
A = connection.root()[name]
print("ready", flush=True)
rounds = 0
while rounds < 3 or time.monotonic() < end:
    rounds += 1
    if kind == "janitor":
        collect_garbage(db)
    elif kind == "writer":
        A[:] = rounds % 251
        transaction.savepoint()
        A[:100_000] += 1
        transaction.commit()
    else:
        import dask, dask.array as da
        with dask.config.set(scheduler="threads"):
            dz.to_zbigarray(da.full(A.shape, rounds % 251, chunks=300_000, dtype="u1"), A)
        transaction.commit()
    db.storage.ping()
    transaction.begin()
    a = A[100_000:]
    assert a.min() == a.max(), (kind, rounds)
"""
    )
    kinds = ["writer", "worker", "janitor", "janitor", "writer"]
    with dz.serve(tmp_path / "x.fs") as uri, contextlib.closing(dz.open(uri)) as db, contextlib.ExitStack() as stack:
        with db.transaction() as connection:
            for k in range(len(kinds)):
                connection.root()[f"A{k}"] = dz.ZBigArray(MIB, "u1")
        seconds = [4, 4, 4, 4, 1000]
        processes = [
            stack.enter_context(python(code, uri, kind, f"A{k}", s))
            for k, (kind, s) in enumerate(zip(kinds, seconds, strict=True))
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        processes[-1].kill()
        for process in processes[:-1]:
            process.communicate(timeout=SECONDS)
            assert process.returncode == 0  # (then it has made its rounds)
        collect_garbage(db)
        assert ours(str(tmp_path / "x.fs.blobs")) == []
