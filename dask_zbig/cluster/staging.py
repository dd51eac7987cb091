"""Segments that are stored but not part of any array yet: jobs, slots, leases.

Workers commit what they computed in transactions of their own. So that a pack keeps it, it hangs from the
database's root: ``root["dask_zbig.staging"][job].slots[slot].entries[attempt]``. Each worker process has a slot
of its own in a job, so workers do not conflict.

A job is removed when it was published or given up; if whoever would do that dies, the next job that begins removes
it, once its lease is over. Whoever works for the job renews the lease: the client (`dask_zbig.cluster.renewal`) and
every worker that stages. The removal of a job conflicts with whatever is done for it at the same time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from BTrees.OOBTree import OOBTree
from persistent import Persistent
from persistent.mapping import PersistentMapping
from persistent.TimeStamp import TimeStamp
from ZODB.blob import Blob
from ZODB.POSException import ConflictError, POSKeyError
from ZODB.utils import z64

from dask_zbig import database
from dask_zbig.cluster.worker import writing
from dask_zbig.config import get
from dask_zbig.database import Location
from dask_zbig.errors import PublishError
from dask_zbig.storage.format import VERSION, unpack_state
from dask_zbig.storage.segment import InlineSegment, SegmentRef

__all__ = [
    "ExpiredJob",
    "Job",
    "JobGoneError",
    "StagedSegment",
    "Term",
    "begin_job",
    "collect",
    "commit_entry",
    "end_job",
    "hold_job",
    "renew",
]

ROOT_KEY = "dask_zbig.staging"
#: Retries of a small commit that conflicts with others on the staging area itself.
TRIES = 20

T = TypeVar("T")


class JobGoneError(PublishError):
    """The job was given up, or its lease ran out."""

    def __init__(self, job: Job) -> None:
        super().__init__(
            f"staging job {job.id} is gone from {job.location.alias}: it was given up, or its lease ran out "
            f"(zbig.lease-seconds); what it staged may have been packed away"
        )
        self.job = job

    def __reduce__(self) -> tuple[Any, ...]:  # it travels from workers
        return (JobGoneError, (self.job,))


# -- what is stored


class StagingJob(Persistent):  # type: ignore[misc]
    """One save by a cluster. Changed only by its end, which therefore conflicts with whoever relies on it."""

    def __init__(self, seconds: float) -> None:
        self.ended = False
        self.lease = Lease(seconds)
        self.slots = OOBTree()

    def __getstate__(self) -> tuple[Any, ...]:
        return (VERSION, self.ended, self.lease, self.slots)

    def __setstate__(self, state: Any) -> None:
        self.ended, self.lease, self.slots = unpack_state(self, state, 3)


class Lease(Persistent):  # type: ignore[misc]
    """Until when a job is not garbage, by the clock of who said so. `until` is 0 if the job has ended."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.until = time.time() + seconds

    def __getstate__(self) -> tuple[Any, ...]:
        return (VERSION, self.seconds, self.until)

    def __setstate__(self, state: Any) -> None:
        self.seconds, self.until = unpack_state(self, state, 2)

    def _p_resolveConflict(self, old: Any, committed: Any, new: Any) -> Any:  # noqa: N802 - ZODB's name
        """Renewed twice at a time: the longer one. But never if one of them ended it."""
        if not (committed[-1] and new[-1]):
            raise ConflictError("a staging job was ended and renewed at the same time")
        return max(committed, new)


class StagingSlot(Persistent):  # type: ignore[misc]
    """What one worker process staged for a job."""

    def __init__(self) -> None:
        self.entries = OOBTree()

    def __getstate__(self) -> tuple[Any, ...]:
        return (VERSION, self.entries)

    def __setstate__(self, state: Any) -> None:
        (self.entries,) = unpack_state(self, state, 1)


# -- how it travels


@dataclass(frozen=True, slots=True)
class Job:
    """A job, as tasks know it. `serial`: the transaction that made it."""

    location: Location
    id: str
    oid: bytes
    serial: bytes


@dataclass(frozen=True, slots=True)
class StagedSegment:
    """A staged segment, as it travels: a few bytes."""

    oid: bytes
    inline: bool
    length: int
    checksum: int

    @classmethod
    def of(cls, ref: SegmentRef) -> StagedSegment:
        """What `ref` is after its commit."""
        return cls(ref.obj._p_oid, ref.inline, ref.length, ref.checksum)

    def ref(self, connection: Any) -> SegmentRef:
        """A reference that `connection` can store. The connection's snapshot may be older than the segment."""
        cls = InlineSegment if self.inline else Blob
        return SegmentRef(connection._reader.load_persistent(self.oid, cls), self.length, self.checksum)


@dataclass(frozen=True, slots=True)
class Term:
    """A lease as it was found or made: it ends at `until`, and is for so many `seconds` at a time."""

    until: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ExpiredJob:
    """A job whose lease is over. `age`: seconds since it began; `bytes` in so many `segments` go with it."""

    id: str
    age: float
    bytes: int
    segments: int


# -- jobs


def begin_job(location: Location, connection: Any) -> Job:
    """Make a job, and remove those whose lease is over.

    `connection` is the user's. Only the first job of a database touches it: see `_show_area`.
    """
    collect(location)
    for attempt in range(TRIES):
        with writing(location) as own:
            root = own.get(z64)
            base, area = root._p_serial, root.get(ROOT_KEY)
            if new := area is None:
                root[ROOT_KEY] = area = OOBTree()
            job = StagingJob(get("lease-seconds"))
            name = uuid.uuid4().hex
            area[name] = job
            try:
                own.transaction_manager.commit()
            except ConflictError:
                _pause(attempt)
                continue
            if new:
                _show_area(connection, base, area)
            return Job(location, name, job._p_oid, job._p_serial)
    raise PublishError(f"no staging job could be made in {location.alias}: too many conflicts")


def _show_area(connection: Any, base: bytes, area: Any) -> None:
    """Let the user's connection know that the database's root has got a staging area.

    Else its transaction would conflict if it changes the root, too. It is told what has just been committed over
    the revision that it has; the storage checks that as it checks every change. What it sees is an empty area, until
    it moves on to a new snapshot.
    """
    root = connection.get(z64)
    root._p_activate()
    if isinstance(root, PersistentMapping) and root._p_serial == base:
        shown = OOBTree()
        shown._p_jar, shown._p_oid, shown._p_serial = connection, area._p_oid, area._p_serial
        connection._cache[area._p_oid] = shown
        root.data[ROOT_KEY] = shown
        root._p_serial = area._p_serial


def hold_job(job: Job, connection: Any) -> None:
    """Let the connection's transaction fail if the job is removed before it commits.

    What was staged is safe from a pack while the job is there, and once an array refers to it; there must be
    no time between.

    Raises
    ------
    PublishError
        If the job has been removed already; at the commit, if it is by then.
    """
    _check_job(job)
    connection.transaction_manager.get().addBeforeCommitHook(_check_job, (job,))
    ghost = connection._reader.load_persistent(job.oid, StagingJob)  # for what happens after that hook
    ghost._p_serial = job.serial
    connection.readCurrent(ghost)


def _check_job(job: Job) -> None:
    _change_job(job, lambda own, stored: None)


def end_job(job: Job) -> None:
    """Remove a job: it is published, or given up. Its segments live on if an array refers to them."""
    with contextlib.suppress(JobGoneError):
        _change_job(job, lambda own, stored: _end(own.root()[ROOT_KEY], job.id))


def collect(location: Location, now: float | None = None, *, dry_run: bool = False) -> list[ExpiredJob]:
    """Remove the jobs whose lease is over; returns what they were.

    A job that is renewed meanwhile stays. What was removed takes no more space after the next pack.
    """
    for attempt in range(TRIES):
        moment = time.time() if now is None else now
        with writing(location) as own:
            jobs = own.root().get(ROOT_KEY, {})
            over = [name for name, job in jobs.items() if job.lease.until < moment]
            found = [_describe(name, jobs[name], moment) for name in over]
            if dry_run or not over:
                return found
            for name in over:
                _end(jobs, name)
            try:
                own.transaction_manager.commit()
                return found
            except ConflictError:
                _pause(attempt)
    raise PublishError(f"the expired staging jobs of {location.alias} could not be removed: too many conflicts")


def _end(jobs: Any, name: str) -> None:
    job = jobs.pop(name)
    job.ended = True  # for who relies on the job: `hold_job`, `_stage`
    job.lease.until = 0.0  # for who renews it


def _describe(name: str, job: StagingJob, now: float) -> ExpiredJob:
    job._p_activate()
    entries = [entry for slot in job.slots.values() for entry in slot.entries.values()]
    age = now - TimeStamp(job._p_serial).timeTime()
    return ExpiredJob(name, age, sum(size for _, size in entries), sum(len(segments) for segments, _ in entries))


def _pause(attempt: int) -> None:
    time.sleep(0.002 * 2 ** min(attempt, 8))


# -- for a job


def renew(job: Job, *, below: float = 1.0) -> Term:
    """Let the lease begin anew, if less than this part of it is left; returns what it is then.

    Raises
    ------
    JobGoneError
        Too late.
    """

    def change(_: Any, stored: StagingJob) -> Term:
        lease = stored.lease
        now = time.time()
        if lease.until - now < below * lease.seconds:
            lease.until = max(lease.until, now + lease.seconds)
        return Term(lease.until, lease.seconds)

    return _change_job(job, change)


def _change_job(job: Job, change: Callable[[Any, StagingJob], T]) -> T:
    """Commit what `change` does to the job, if anything; it gets that with the connection."""
    synced = False
    for attempt in range(TRIES):
        with writing(job.location) as own:
            stored = own.root().get(ROOT_KEY, {}).get(job.id)
            if stored is None:
                if synced:
                    raise JobGoneError(job)
                database.sync(own.db())  # our client may not have heard of the job yet
                synced = True
                continue
            result = change(own, stored)
            try:
                own.transaction_manager.commit()
                return result
            except ConflictError:
                _pause(attempt)
    raise PublishError(f"staging job {job.id} could not be changed: too many conflicts")


# -- in workers


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """What a task wants to have staged."""

    make: Callable[[Any], list[SegmentRef]]
    staged: Future[list[StagedSegment]] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class _Own:
    """This process's slot in a job. One of its tasks commits to it at a time, for all that are waiting."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[_Request] = field(default_factory=deque)
    busy: bool = False
    oid: bytes | None = None
    fresh: float = 0.0  # until then nobody need look after the lease
    #: So many requests were committed the last time. Until `expected` it is worth waiting for as many again: threads
    #: that have just got their answers come back at once, and would else meet a commit that has begun without them.
    together: int = 1
    expected: float = 0.0


#: Jobs of which a process remembers its slot.
REMEMBERED = 256
_own: dict[tuple[int, str], _Own] = {}
_guard = threading.Lock()


def _own_slot(job: Job) -> _Own:
    with _guard:
        own = _own.setdefault((os.getpid(), job.id), _Own())
        for key in list(_own)[: max(0, len(_own) - REMEMBERED)]:
            if not _own[key].busy and _own[key] is not own:
                del _own[key]
        return own


def commit_entry(job: Job, make: Callable[[Any], list[SegmentRef]]) -> list[StagedSegment]:
    """Stage segments: in a transaction of this process's own, together with what other threads stage meanwhile.

    Parameters
    ----------
    make
        Called with the connection, it makes the segments. It may be called by another thread.

    Raises
    ------
    JobGoneError
        If it is.
    Exception
        What any `make` of the same transaction raised.
    """
    mine = _own_slot(job)
    request = _Request(make)
    mine.waiting.append(request)
    try:
        with mine.changed:
            mine.changed.notify_all()
            mine.changed.wait_for(lambda: request.staged.done() or not mine.busy)
            if request.staged.done():
                return request.staged.result()
            mine.busy = True
        try:
            _commit_waiting(job, mine)
        finally:
            with mine.changed:
                mine.busy = False
                mine.changed.notify_all()
        return request.staged.result()
    finally:
        if request.staged.cancel():  # nobody has begun with it, and nobody shall
            with contextlib.suppress(ValueError):
                mine.waiting.remove(request)


def _commit_waiting(job: Job, mine: _Own) -> None:
    """Stage what is asked for by now. Each request gets its answer, or all get the same error."""
    requests: list[_Request] = []
    try:
        if time.time() >= mine.fresh:
            term = renew(job, below=0.5)
            mine.fresh = term.until - term.seconds / 2
        if mine.oid is None:
            mine.oid = _make_slot(job)
        with mine.changed:
            mine.changed.wait_for(lambda: len(mine.waiting) >= mine.together, mine.expected - time.monotonic())
        began = time.monotonic()
        while mine.waiting:
            request = mine.waiting.popleft()
            if request.staged.set_running_or_notify_cancel():
                requests.append(request)
        for request, answer in zip(requests, _stage(job, mine.oid, requests), strict=True):
            request.staged.set_result(answer)
        ended = time.monotonic()
        mine.together, mine.expected = len(requests), ended + (ended - began) / 2
    except BaseException as error:
        shared = error
        if not isinstance(error, Exception):  # that is for this thread only
            shared = PublishError("the thread that staged this together with its own data was interrupted")
        for request in requests:
            if not request.staged.done():
                request.staged.set_exception(shared)
        raise


def _make_slot(job: Job) -> bytes:
    """Make a slot for this process; returns its oid."""

    def change(own: Any, stored: StagingJob) -> StagingSlot:
        slot = StagingSlot()
        stored.slots[f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"] = slot
        return slot

    return bytes(_change_job(job, change)._p_oid)


def _stage(job: Job, slot: bytes, requests: list[_Request]) -> list[list[StagedSegment]]:
    with writing(job.location) as own:
        try:
            entries, stored = own.get(slot).entries, own.get(job.oid)
            if stored.ended:
                raise JobGoneError(job)
            own.readCurrent(stored)
            made = []
            for request in requests:
                refs = request.make(own)
                entries[uuid.uuid4().hex] = (tuple(r.obj for r in refs), sum(r.length for r in refs))
                made.append(refs)
            own.transaction_manager.get().note(f"dask_zbig: stage for job {job.id}")
            own.transaction_manager.commit()
        except (POSKeyError, ConflictError):
            _check_job(job)
            raise
        return [[StagedSegment.of(r) for r in refs] for refs in made]
