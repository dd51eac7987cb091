"""Segments that are stored but not part of any array yet: jobs, slots, leases.

Workers commit what they computed in transactions of their own. So that a pack keeps it, it hangs from the
database's root: ``root["dask_zbig.staging"][job].slots[slot].entries[attempt]``. Each worker process has a slot
of its own in a job, so workers do not conflict. A job is removed when it was published or given up; if whoever
would do that dies, the next job that begins removes it, once its lease is over.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from BTrees.OOBTree import OOBTree
from persistent import Persistent
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.POSException import ConflictError
from ZODB.utils import z64

from dask_zbig import database
from dask_zbig.cluster.worker import writing
from dask_zbig.config import get
from dask_zbig.database import Location
from dask_zbig.errors import PublishError
from dask_zbig.storage.format import VERSION, unpack_state
from dask_zbig.storage.segment import InlineSegment, SegmentRef

__all__ = ["Job", "StagedSegment", "begin_job", "collect", "commit_entry", "end_job", "hold_job"]

ROOT_KEY = "dask_zbig.staging"
#: Retries of a small commit that conflicts with others on the staging area itself.
TRIES = 20


class StagingJob(Persistent):  # type: ignore[misc]
    """One save by a cluster."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self.slots = OOBTree()

    def __getstate__(self) -> tuple[Any, ...]:
        return (VERSION, self.lease, self.slots)

    def __setstate__(self, state: Any) -> None:
        self.lease, self.slots = unpack_state(self, state, 2)


class StagingSlot(Persistent):  # type: ignore[misc]
    """What one worker process staged for a job."""

    def __init__(self) -> None:
        self.entries = OOBTree()

    def __getstate__(self) -> tuple[Any, ...]:
        return (VERSION, self.entries)

    def __setstate__(self, state: Any) -> None:
        (self.entries,) = unpack_state(self, state, 1)


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
            job = StagingJob(time.time() + get("lease-seconds"))
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
    with writing(job.location) as own:
        if job.id not in own.root().get(ROOT_KEY, {}):
            raise PublishError(
                f"staging job {job.id} is gone from {job.location.alias}: it was given up, or its lease ran out "
                f"(zbig.lease-seconds); what it staged may have been packed away"
            )


def end_job(job: Job) -> None:
    """Remove a job: it is published, or given up. Its segments live on if an array refers to them."""
    _remove(job.location, [job.id])


def collect(location: Location, now: float | None = None) -> list[str]:
    """Remove the jobs whose lease is over; returns their ids."""
    moment = time.time() if now is None else now
    with writing(location) as own:
        jobs = own.root().get(ROOT_KEY)
        if not jobs:
            return []
        over = [name for name, job in jobs.items() if job.lease < moment]
    if over:
        _remove(location, over)
    return over


def _remove(location: Location, names: Sequence[str]) -> None:
    for attempt in range(TRIES):
        with writing(location) as own:
            jobs = own.root().get(ROOT_KEY)
            if jobs is None:
                return
            for name in names:
                job = jobs.pop(name, None)
                if job is not None:
                    job.lease = 0.0  # a change of the job itself: see `hold_job`
            try:
                own.transaction_manager.commit()
                return
            except ConflictError:
                _pause(attempt)
    raise PublishError(f"staging jobs {list(names)} could not be removed: too many conflicts")


def _pause(attempt: int) -> None:
    time.sleep(0.002 * 2 ** min(attempt, 8))


# -- in workers


@dataclass(slots=True)
class _Own:
    """This process's slot in a job. Its tasks commit to it one after the other."""

    lock: threading.Lock
    oid: bytes | None = None


#: Jobs of which a process remembers its slot.
REMEMBERED = 256
_own: dict[tuple[int, str], _Own] = {}
_guard = threading.Lock()


def _own_slot(job: Job) -> _Own:
    with _guard:
        own = _own.setdefault((os.getpid(), job.id), _Own(threading.Lock()))
        for key in list(_own)[: max(0, len(_own) - REMEMBERED)]:
            if not _own[key].lock.locked():
                del _own[key]
        return own


def _make_slot(job: Job) -> bytes:
    """Make a slot for this process; returns its oid."""
    synced = False
    for attempt in range(TRIES):
        with writing(job.location) as own:
            jobs = own.root().get(ROOT_KEY, {})
            if job.id not in jobs:
                if synced:
                    raise PublishError(
                        f"staging job {job.id} is gone from {job.location.alias}: it was given up, or its lease ran out"
                    )
                database.sync(own.db())  # our client may not have heard of the job yet
                synced = True
                continue
            slot = StagingSlot()
            jobs[job.id].slots[f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"] = slot
            try:
                own.transaction_manager.commit()
            except ConflictError:
                _pause(attempt)
                continue
            return bytes(slot._p_oid)
    raise PublishError(f"no slot could be made in staging job {job.id}: too many conflicts")


def commit_entry(job: Job, make: Callable[[Any], list[SegmentRef]]) -> list[StagedSegment]:
    """Stage segments: in one transaction of this process's own.

    Parameters
    ----------
    make
        Called with the connection, it makes the segments.

    Raises
    ------
    PublishError
        If the job is gone.
    """
    mine = _own_slot(job)
    with mine.lock:
        if mine.oid is None:
            mine.oid = _make_slot(job)
        with writing(job.location) as own:
            slot = own.get(mine.oid)
            refs = make(own)
            slot.entries[uuid.uuid4().hex] = tuple(r.obj for r in refs)
            own.transaction_manager.get().note(f"dask_zbig: stage for job {job.id}")
            own.transaction_manager.commit()
            return [StagedSegment.of(r) for r in refs]
