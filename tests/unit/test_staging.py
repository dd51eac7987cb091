"""Jobs, slots and leases: what is staged is kept while its job is there, and goes with it."""

from __future__ import annotations

import contextlib
import pickle
import threading
import time

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
    StagedSegment,
    StagingJob,
    StagingSlot,
    begin_job,
    collect,
    commit_entry,
    end_job,
    hold_job,
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
    with dask.config.set({"zbig.lease-seconds": 100}):
        short = begin_job(location, connection)
    with dask.config.set({"zbig.lease-seconds": "1 h"}):
        long = begin_job(location, connection)
    assert collect(location) == []
    assert collect(location, time.time() + 99) == []
    assert collect(location, time.time() + 101) == [short.id]
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
    assert collect(location, time.time() + 1e9) == [job.id]
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
    commit_entry(job, segment(b"x"))
    assert synced == [connection.db()]


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


@pytest.mark.parametrize("cls", [StagingJob, StagingSlot])
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
    ((entry,),) = slot.entries.values()
    assert entry._p_oid == staged.oid
