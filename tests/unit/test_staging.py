"""Jobs, slots and leases: what is staged is kept while its job is there, and goes with it."""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dask
import numpy as np
import pytest
import transaction
import ZODB
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError, POSKeyError

import dask_zbig as dz
from dask_zbig import database
from dask_zbig.cluster import staging
from dask_zbig.cluster.staging import (
    ROOT_KEY,
    TRIES,
    Job,
    JobGoneError,
    Lease,
    StagedSegment,
    StagingJob,
    StagingSlot,
    begin_job,
    collect,
    commit_entry,
    end_job,
    hold_job,
    renew,
)
from dask_zbig.errors import FormatError, PublishError
from dask_zbig.flush import store_inline


@pytest.fixture(params=["filestorage", "mapping"])
def connection(request, tmp_path):
    db = dz.open(tmp_path / "x.fs") if request.param == "filestorage" else ZODB.DB(MappingStorage())
    connection = db.open(transaction.TransactionManager())
    yield connection
    connection.transaction_manager.abort()
    connection.close()
    db.close()


@pytest.fixture
def location(connection):
    return database.location(connection.db())


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """No waiting; the attempts that would have been followed by it."""
    noted = []
    monkeypatch.setattr(staging, "_pause", noted.append)
    return noted


@pytest.fixture
def conflicts(monkeypatch):
    """`conflicts(n)`: the next n commits of the staging area meet a conflict."""
    left = [0]
    original = staging.writing

    @contextlib.contextmanager
    def writing(location):
        with original(location) as own:
            commit = own.transaction_manager.commit

            def commit_or_not():
                if left[0]:
                    left[0] -= 1
                    raise ConflictError("injected")
                commit()

            own.transaction_manager.commit = commit_or_not
            yield own

    monkeypatch.setattr(staging, "writing", writing)

    def inject(count):
        left[0] = count

    yield inject
    assert left[0] == 0


def area(connection):
    with connection.db().transaction() as other:
        return {
            name: {s: len(slot.entries) for s, slot in job.slots.items()}
            for name, job in other.root()[ROOT_KEY].items()
        }


def segment(data):
    return lambda connection: [store_inline(None, connection, data)]


def ids(jobs):
    return [job.id for job in jobs]


def lease_of(connection, job):
    with connection.db().transaction() as other:
        return other.root()[ROOT_KEY][job.id].lease.until


def set_lease(connection, job, until):
    with connection.db().transaction() as other:
        other.root()[ROOT_KEY][job.id].lease.until = until


def test_a_job_comes_and_goes(connection, location):
    first, second = begin_job(location, connection), begin_job(location, connection)
    assert area(connection) == {first.id: {}, second.id: {}}
    assert len(pickle.dumps(first)) < 500
    end_job(first)
    end_job(first)
    assert area(connection) == {second.id: {}}
    end_job(second)
    assert area(connection) == {}


def test_ending_where_nothing_was_ever_staged(location):
    end_job(Job(location, "none", b"\0" * 8, b"\0" * 8))
    assert collect(location) == []


def test_leases(connection, location):
    with dask.config.set({"zbig.lease-seconds": 1000}):
        short = begin_job(location, connection)
    with dask.config.set({"zbig.lease-seconds": "1 h"}):
        long = begin_job(location, connection)
    assert collect(location) == []
    assert collect(location, time.time() + 900) == []
    assert ids(collect(location, time.time() + 1001, dry_run=True)) == [short.id]
    assert set(area(connection)) == {short.id, long.id}
    assert ids(collect(location, time.time() + 1001)) == [short.id]
    assert set(area(connection)) == {long.id}
    with dask.config.set({"zbig.lease-seconds": 1e-9}):
        over = begin_job(location, connection)
    assert over.id in area(connection)
    begin_job(location, connection)  # removes it
    assert over.id not in area(connection)


def test_a_process_has_one_slot_in_a_job(connection, location):
    job, other = begin_job(location, connection), begin_job(location, connection)
    failures = []

    def work(k):
        try:
            commit_entry(job, segment(b"x%d" % k))
        except BaseException as error:  # noqa: BLE001 - for the test to see
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    commit_entry(other, segment(b"y"))
    found = area(connection)
    assert list(found[job.id].values()) == [8]
    assert list(found[other.id].values()) == [1]


def test_old_jobs_slots_are_forgotten(connection, location, monkeypatch):
    monkeypatch.setattr(staging, "_own", {})
    monkeypatch.setattr(staging, "REMEMBERED", 3)
    jobs = [begin_job(location, connection) for _ in range(5)]
    for job in (*jobs, jobs[0]):
        commit_entry(job, segment(b"x"))
    assert len(staging._own) == 3
    assert [sum(v.values()) for v in (area(connection)[j.id] for j in jobs)] == [2, 1, 1, 1, 1]


def test_what_is_staged_can_be_referred_to_from_an_older_snapshot(connection, location):
    job = begin_job(location, connection)
    (staged,) = commit_entry(job, segment(b"hello"))
    assert staged == StagedSegment(staged.oid, True, 5, staged.checksum)
    with pytest.raises((POSKeyError, ConflictError)):
        connection.get(staged.oid)  # it is newer than what the connection sees
    ref = staged.ref(connection)
    connection.root()["kept"] = [ref.obj]
    connection.transaction_manager.commit()
    end_job(job)
    connection.db().pack()
    connection.cacheMinimize()
    assert connection.root()["kept"][0].data == b"hello"


def test_what_is_staged_outlives_a_pack_as_long_as_its_job(connection, location):
    job = begin_job(location, connection)
    (staged,) = commit_entry(job, segment(b"hello"))
    connection.db().pack()
    connection.transaction_manager.begin()
    assert connection.get(staged.oid).data == b"hello"
    end_job(job)
    connection.db().pack()
    connection.transaction_manager.begin()
    connection.cacheMinimize()
    with pytest.raises(POSKeyError):
        connection.get(staged.oid)


# -- conflicts


def test_conflicts_are_tried_again(connection, location, conflicts, pauses):
    conflicts(2)
    job = begin_job(location, connection)
    assert pauses == [0, 1]
    conflicts(3)
    commit_entry(job, segment(b"x"))
    assert list(area(connection)[job.id].values()) == [1]
    conflicts(2)
    assert ids(collect(location, time.time() + 1e9)) == [job.id]
    job = begin_job(location, connection)
    conflicts(1)
    end_job(job)
    assert area(connection) == {}


def test_but_not_for_ever(connection, location, conflicts):
    conflicts(TRIES)
    with pytest.raises(PublishError, match="conflicts"):
        begin_job(location, connection)
    job = begin_job(location, connection)
    conflicts(TRIES)
    with pytest.raises(PublishError, match="conflicts"):
        commit_entry(job, segment(b"x"))
    conflicts(TRIES)
    with pytest.raises(PublishError, match="conflicts"):
        end_job(job)
    conflicts(TRIES)
    with pytest.raises(PublishError, match="conflicts"):
        collect(location, time.time() + 1e9)
    assert list(area(connection)) == [job.id]


def test_pauses_grow_and_are_bounded(monkeypatch):
    monkeypatch.undo()
    slept = []
    monkeypatch.setattr(staging.time, "sleep", slept.append)
    for attempt in range(TRIES):
        staging._pause(attempt)
    assert slept == sorted(slept)
    assert sum(slept) < 10


# -- a job that is gone


def test_staging_for_a_job_that_is_gone(connection, location):
    job = begin_job(location, connection)
    end_job(job)
    with pytest.raises(PublishError, match="given up"):
        commit_entry(job, segment(b"x"))
    with pytest.raises(JobGoneError, match="given up") as info:
        renew(job)
    again = pickle.loads(pickle.dumps(info.value))
    assert (type(again), str(again)) == (JobGoneError, str(info.value))


@pytest.mark.parametrize("packed", [False, True])
def test_staging_when_the_job_goes_after_the_slot_was_made(connection, location, packed):
    job = begin_job(location, connection)
    commit_entry(job, segment(b"x"))
    end_job(job)
    if packed:
        connection.db().pack()
        connection.db().cacheMinimize()
    with pytest.raises(JobGoneError):
        commit_entry(job, segment(b"y"))


def test_staging_when_the_job_goes_meanwhile(connection, location):
    job = begin_job(location, connection)
    commit_entry(job, segment(b"x"))
    last = connection.db().lastTransaction()

    def make(own):
        end_job(job)
        return segment(b"y")(own)

    with pytest.raises(JobGoneError):
        commit_entry(job, make)
    assert len(list(connection.db().storage.iterator(last))) == 2  # what was staged first, and the end of the job


def test_a_client_that_has_not_heard_of_the_job_is_synced(connection, location, monkeypatch):
    job = begin_job(location, connection)
    original, synced = staging.writing, []

    @contextlib.contextmanager
    def behind(location):
        with original(location) as own:
            if not synced:
                own.root()[ROOT_KEY].pop(job.id)
            yield own

    monkeypatch.setattr(staging, "writing", behind)
    monkeypatch.setattr(database, "sync", synced.append)
    for use in (lambda: commit_entry(job, segment(b"x")), lambda: hold_job(job, connection), lambda: end_job(job)):
        synced.clear()
        use()
        assert synced == [connection.db()]
    assert area(connection) == {}


def test_a_held_job_that_goes_stops_the_commit(connection, location):
    job, kept = begin_job(location, connection), begin_job(location, connection)
    connection.root()["x"] = 1
    hold_job(kept, connection)
    connection.transaction_manager.commit()
    connection.root()["x"] = 2
    hold_job(job, connection)
    end_job(job)
    with pytest.raises(PublishError, match=job.id):
        connection.transaction_manager.commit()
    connection.transaction_manager.abort()
    with pytest.raises(PublishError, match=job.id):
        hold_job(job, connection)
    connection.root()["x"] = 3
    connection.transaction_manager.commit()


# -- on disk


@pytest.mark.parametrize("cls", [StagingJob, StagingSlot, Lease])
def test_an_unknown_version_is_refused_by_name(cls):
    new = cls.__new__(cls)
    with pytest.raises(FormatError, match=cls.__name__):
        new.__setstate__((99, 1, 2))


def test_slots_hold_real_references(connection, location):
    """Or a pack would drop what they hold."""
    job = begin_job(location, connection)
    (staged,) = commit_entry(job, segment(np.arange(10).tobytes()))
    connection.transaction_manager.begin()
    (slot,) = connection.root()[ROOT_KEY][job.id].slots.values()
    (((entry,), size),) = slot.entries.values()
    assert (entry._p_oid, size) == (staged.oid, 80)


def test_what_was_staged_twice_goes_with_the_job(connection, location):
    """A task may run twice, and by other threads; whatever it staged is garbage if it is not published."""
    db = connection.db()
    begun = begin_job(location, connection)
    end_job(begun)
    db.pack()
    before = len(db.storage)
    job = begin_job(location, connection)
    staged = [commit_entry(job, segment(b"x" * 1000))[0] for _ in range(40)]
    assert len({s.oid for s in staged}) == 40
    (found,) = collect(location, time.time() + 1e9, dry_run=True)
    assert (found.id, found.bytes, found.segments) == (job.id, 40_000, 40)
    assert found.age == pytest.approx(1e9, rel=1e-3)
    db.pack()
    assert len(db.storage) > before + 40
    end_job(job)
    db.pack()
    assert len(db.storage) == before


# -- renewal


def test_renewing(connection, location):
    with dask.config.set({"zbig.lease-seconds": 100}):
        job = begin_job(location, connection)
    first = lease_of(connection, job)
    assert renew(job, below=0.5).until == lease_of(connection, job) == first  # there is more
    set_lease(connection, job, time.time() + 49)
    term = renew(job, below=0.5)
    assert term.seconds == 100
    assert term.until == lease_of(connection, job) == pytest.approx(time.time() + 100, abs=40)
    set_lease(connection, job, time.time() - 1)  # nobody has noticed
    assert renew(job).until == pytest.approx(time.time() + 100, abs=40)
    assert collect(location) == []


def test_staging_renews(connection, location):
    job = begin_job(location, connection)
    set_lease(connection, job, time.time() + 10)
    commit_entry(job, segment(b"x"))
    assert lease_of(connection, job) == pytest.approx(time.time() + 86400, abs=60)
    set_lease(connection, job, time.time() + 10)
    commit_entry(job, segment(b"x"))  # the process knows of a lease that lasts long enough
    assert lease_of(connection, job) < time.time() + 20
    staging._own_slot(job).fresh = 0.0
    commit_entry(job, segment(b"x"))
    assert lease_of(connection, job) > time.time() + 80000


def test_renewing_twice_at_a_time_is_no_conflict(connection, location, pauses, monkeypatch):
    """Where conflicts are resolved; elsewhere the second is tried again, and finds that it need not."""
    job = begin_job(location, connection)
    set_lease(connection, job, time.time() + 10)
    original, nested = staging.writing, []

    @contextlib.contextmanager
    def writing(location):
        with original(location) as own:
            commit = own.transaction_manager.commit

            def after_another():
                if not nested:
                    nested.append(None)
                    nested[0] = renew(job).until
                commit()

            own.transaction_manager.commit = after_another
            yield own

    monkeypatch.setattr(staging, "writing", writing)
    mine = renew(job, below=0.5).until
    assert lease_of(connection, job) >= max(mine, nested[0]) - 1e-6
    merges = isinstance(connection.db().storage, ZODB.FileStorage.FileStorage)
    assert pauses == ([] if merges else [0])


@pytest.mark.parametrize(("committed", "new"), [(0.0, 5.0), (5.0, 0.0), (0.0, 0.0)])
def test_an_end_is_merged_with_nothing(committed, new):
    with pytest.raises(ConflictError, match="ended"):
        Lease(1.0)._p_resolveConflict((1, 10.0, 3.0), (1, 10.0, committed), (1, 10.0, new))


def test_renewals_are_merged():
    assert Lease(1.0)._p_resolveConflict((1, 10.0, 3.0), (1, 10.0, 7.0), (1, 10.0, 5.0)) == (1, 10.0, 7.0)


# -- many at once


class Blocked:
    """Segments that are made when told."""

    def __init__(self, data=b"first", error=None):
        self.entered, self.go = threading.Event(), threading.Event()
        self.data, self.error = data, error

    def __call__(self, connection):
        self.entered.set()
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return segment(self.data)(connection)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(10) as pool:
        yield pool


def all_wait(job, count):
    mine = staging._own_slot(job)
    deadline = time.monotonic() + 60
    while len(mine.waiting) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_threads_stage_in_one_transaction(connection, location, pool):
    job = begin_job(location, connection)
    first = Blocked()
    one = pool.submit(commit_entry, job, first)
    assert first.entered.wait(60)
    rest = [pool.submit(commit_entry, job, segment(b"%d" % k)) for k in range(8)]
    all_wait(job, 8)
    last = connection.db().lastTransaction()
    first.go.set()
    staged = [one.result(60)[0], *(r.result(60)[0] for r in rest)]
    connection.transaction_manager.begin()
    objects = [connection.get(s.oid) for s in staged]
    assert [o.data for o in objects] == [b"first", *(b"%d" % k for k in range(8))]
    assert len({o._p_serial for o in objects[1:]}) == 1
    assert objects[0]._p_serial < objects[1]._p_serial
    assert [t.tid for t in connection.db().storage.iterator(last)][-2:] == [o._p_serial for o in objects[:2]]
    (slot,) = connection.root()[ROOT_KEY][job.id].slots.values()
    assert len(slot.entries) == 9
    connection.transaction_manager.abort()
    connection.cacheMinimize()
    end_job(job)


def test_threads_that_come_again_are_waited_for(connection, location, pool):
    job = begin_job(location, connection)
    commit_entry(job, segment(b"x"))
    mine = staging._own_slot(job)
    assert mine.together == 1
    mine.together, mine.expected = 2, time.monotonic() + 60
    one = pool.submit(commit_entry, job, segment(b"1"))
    all_wait(job, 1)
    (two,) = commit_entry(job, segment(b"2"))
    staged = [*one.result(60), two]
    connection.transaction_manager.begin()
    objects = [connection.get(s.oid) for s in staged]
    assert [o.data for o in objects] == [b"1", b"2"]
    assert objects[0]._p_serial == objects[1]._p_serial
    assert mine.together == 2
    mine.expected = time.monotonic() - 1  # those are not coming
    assert commit_entry(job, segment(b"x"))


def test_one_that_fails_fails_its_transaction_only(connection, location, pool):
    job = begin_job(location, connection)
    first, bad = Blocked(), Blocked(error=dz.ScratchError(28, "no space"))
    one = pool.submit(commit_entry, job, first)
    assert first.entered.wait(60)
    bad.go.set()
    rest = [pool.submit(commit_entry, job, segment(b"x")), pool.submit(commit_entry, job, bad)]
    all_wait(job, 2)
    first.go.set()
    assert one.result(60)
    for future in rest:
        with pytest.raises(dz.ScratchError, match="no space"):
            future.result(60)
    assert commit_entry(job, segment(b"y"))
    assert list(area(connection)[job.id].values()) == [2]


def test_an_interrupt_reaches_its_own_thread_only(connection, location, pool):
    job = begin_job(location, connection)
    first, bad = Blocked(), Blocked(error=KeyboardInterrupt())
    one = pool.submit(commit_entry, job, first)
    assert first.entered.wait(60)
    rest = [pool.submit(commit_entry, job, bad), pool.submit(commit_entry, job, segment(b"x"))]
    all_wait(job, 2)
    first.go.set()
    bad.go.set()
    assert one.result(60)
    errors = [type(future.exception(60)) for future in rest]
    assert sorted(e.__name__ for e in errors) == ["KeyboardInterrupt", "PublishError"]
    assert commit_entry(job, segment(b"y"))


def test_who_gives_up_waiting_stages_nothing(connection, location, pool, monkeypatch):
    """Its file may be gone when the others commit."""
    job = begin_job(location, connection)
    first = Blocked()
    one = pool.submit(commit_entry, job, first)
    assert first.entered.wait(60)
    called = []

    def interrupted(ready):
        raise KeyboardInterrupt

    mine = staging._own_slot(job)
    with monkeypatch.context() as patch:
        patch.setattr(mine.changed, "wait_for", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            commit_entry(job, called.append)
    assert not mine.waiting
    first.go.set()
    assert one.result(60)
    assert commit_entry(job, segment(b"y"))
    assert called == []
