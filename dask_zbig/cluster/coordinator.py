"""`to_zbigarray` and `CommitCoordinator`: what a whole cluster writes, saved at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from transaction.interfaces import NoTransaction
from ZODB.POSException import ConflictError, POSError

from dask_zbig import database
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.cluster.conflict import changed_between, conflict
from dask_zbig.cluster.readback import read_back
from dask_zbig.cluster.renewal import Renewal
from dask_zbig.cluster.save import (
    Plan,
    Rechunk,
    SaveProgress,
    StagedSave,
    check_open,
    check_target,
    fit,
    plan,
    publish,
    stage_all,
)
from dask_zbig.cluster.staging import Job, JobGoneError, begin_job, end_job, renew
from dask_zbig.cluster.worker import persevere, reading, transient
from dask_zbig.errors import OutcomeUnknownError, PublishError, ZBigError
from dask_zbig.transaction import manager_of

__all__ = ["CommitCoordinator", "SaveResult", "store_together", "to_zbigarray"]

#: How often publishing is tried again after conflicts that are none of data, or when the connection was lost.
TRIES = 10


@dataclass(frozen=True, slots=True)
class SaveResult:
    """What a save did.

    Attributes
    ----------
    job_id : str
        What it is called in the arrays' ledgers.
    tid : bytes or None
        The transaction's id; None until it is committed, or if the job had been saved before.
    bytes, segments : int
        What was written. 0 if the job had been saved before.
    seconds : float
        That it took, to compute and to save.
    retries : int
        How often publishing was repeated because of others' commits.
    """

    job_id: str
    tid: bytes | None
    bytes: int
    segments: int
    seconds: float
    retries: int = 0


def to_zbigarray(
    x: Any,
    array: ZBigArray,
    region: Any = None,
    *,
    append: bool = False,
    compute: bool = True,
    job_id: str | None = None,
    return_stored: bool = False,
    rechunk: Rechunk = "auto",
) -> Any:
    """``array[region] = x``, done by Dask: every chunk is written by the task that has it.

    Returns when all is computed and staged. It is then part of the current transaction of the array's connection,
    where it can be read; ``transaction.commit()`` saves it, with everything else, ``transaction.abort()`` saves
    nothing.

    Parameters
    ----------
    x : dask.array.Array or array_like
        Of the region's shape, castable to the array's dtype by "same_kind".
    array : ZBigArray
        That a database knows.
    region : basic index, optional
        The part to write; by default all of it.
    append : bool
        Add `x` at the end of the array's major axis instead.
    compute : bool
        If False, return a `dask.delayed.Delayed` of a `StagedSave`: compute it when and where you like, then
        call its ``publish(array)``. What it stages is kept for as long as its lease lasts (``zbig.lease-seconds``).
    job_id : str, optional
        A name of your own for this save. If the array's ledger, which knows the last 256, has it already, nothing is
        computed or written: so a program that is run again saves once.
    return_stored : bool
        Return a Dask array that reads what was stored, chunk by chunk as `x` is, also before it is committed.
    rechunk : bool or "auto"
        Whether `x` is cut anew, along the array's major axis, before it is written. A chunk that is cut along other
        axes lies in the array in many short pieces. "auto": if a chunk has more than 256 of them, shorter than
        64 KiB, and that makes them at least 4 times as long; it moves data between workers.

    Returns
    -------
    SaveResult, dask.delayed.Delayed or dask.array.Array
        See `compute` and `return_stored`; by default a SaveResult with `tid` None.

    Raises
    ------
    ShapeError, DTypeError
        If `x` does not fit. Nothing was computed.
    NotStoredError
        If the array belongs to no database.
    ClosedError, PublishError
        If the array's connection is closed, or read-only. PublishError also if the computation outlasted the
        lease of what it staged.
    DatabaseUnavailableError
        If a worker cannot open the database.
    """
    if return_stored and not compute:
        raise ValueError("return_stored needs compute=True: what compute=False returns says itself what was stored")
    connection = getattr(array, "_p_jar", None)
    check_target(array, connection)
    started = time.perf_counter()
    _check_job_id(job_id)
    if job_id is not None and job_id in array._file.journal.jobs:
        if return_stored or not compute:
            raise PublishError(f"job {job_id!r} has been saved already: there is nothing to stage or to read back")
        return SaveResult(job_id, None, 0, 0, time.perf_counter() - started)
    x = fit(x, array, region, append, connection)
    save = _Save(connection, job_id)
    try:
        planned = save.add(x, array, region, append, rechunk)
        if not compute:
            return planned.lazily()
        (staged,) = stage_all(save.plans, ())
        publish([(array, staged)], connection)
    except BaseException:
        save.end()
        raise
    save.end_with_transaction()
    if return_stored:
        return read_back(staged, planned)
    return SaveResult(save.ledger_id, None, staged.bytes, staged.segments, time.perf_counter() - started)


def store_together(stores: Sequence[tuple[Any, ZBigArray, bool]], connection: Any) -> None:
    """Store several arrays, each as of `to_zbigarray`, by one graph, as part of the connection's transaction.

    Parameters
    ----------
    stores
        What to write (or to append, if it says so), and where.
    connection
        Of all the arrays.
    """
    fitting = [(fit(x, array, None, append, connection), array, append) for x, array, append in stores]
    save = _Save(connection, None)
    try:
        for x, array, append in fitting:
            save.add(x, array, None, append, "auto")
        save.staged = stage_all(save.plans, ())
        save.publish()
    except BaseException:
        save.end()
        raise
    save.end_with_transaction()


class _Save:
    """A job, and what it is to store."""

    def __init__(self, connection: Any, job_id: str | None) -> None:
        self.connection = connection
        self.location = database.location(connection.db())
        self.job: Job = persevere(self.location, lambda: begin_job(self.location, connection))
        self._renewal = Renewal(self.job)  # for as long as there is this object
        self.ledger_id = job_id or self.job.id
        self.plans: list[Plan] = []
        self.staged: list[StagedSave] | None = None

    def add(self, x: Any, array: ZBigArray, region: Any, append: bool, rechunk: Rechunk) -> Plan:
        """Plan the tasks that stage `x`."""
        rows, end = 0, 0
        if append:
            rows = x.shape[array.major_axis]
            before = [p.target for p in self.plans if p.array is array and p.target.rows]
            end = array.nbytes
            end += sum(t.rows for t in before) * (array.nbytes // max(array.shape[array.major_axis], 1))
        planned = plan(x, array, region, rows, end, rechunk, self.job, self.ledger_id, len(self.plans))
        self.plans.append(planned)
        return planned

    def publish(self) -> None:
        assert self.staged is not None
        publish([(p.array, s) for p, s in zip(self.plans, self.staged, strict=True)], self.connection)

    def end(self) -> None:
        """The job is not needed any more. (If the database cannot be reached now, its lease sees to it.)"""
        self._renewal.stop()
        with contextlib.suppress(ZBigError, POSError, OSError):
            end_job(self.job)

    def end_with_transaction(self) -> None:
        """The same, once the current transaction is over, however it ends."""
        current = self.connection.transaction_manager.get()
        current.addAfterCommitHook(_end, (self,))
        current.addAfterAbortHook(self.end)


def _end(committed: bool, save: _Save) -> None:
    save.end()


class CommitCoordinator:
    """Several arrays, one graph, one atomic save.

    Used by ``with``: on leaving it computes what was asked for and commits the connection's transaction, with
    everything else in it; on an exception it aborts.

    Parameters
    ----------
    connection : ZODB.Connection.Connection
    job_id : str, optional
        As of `to_zbigarray`: a save that the ledgers of all its arrays know is not done again, nor is the rest of its
        transaction, which is aborted then.

    Attributes
    ----------
    result : SaveResult or None
        After the save.
    progress : list of callable
        Called with a `SaveProgress` whenever a chunk has been staged. Add yours inside of the ``with``.

    Raises
    ------
    SaveConflictError
        On leaving, if another transaction changed the same bytes. It is a ZODB ConflictError. The transaction is
        aborted, but what was staged is kept: `retry` saves it over theirs, `discard` gives it up. Other conflicts, such
        as of two appends, are resolved by publishing again, if there is nothing else in the transaction.
    OutcomeUnknownError
        If the server went away while it was asked to commit, and does not come back. See `published`.

    Notes
    -----
    As its connection it belongs to one thread.

    Examples
    --------
    >>> import dask.array as da, dask_zbig as dz, transaction, ZODB
    >>> db = ZODB.DB(None); conn = db.open()
    >>> root = conn.root()
    >>> root["B"], root["C"] = dz.ZBigArray(100), dz.ZBigArray((0, 3), "i4")
    >>> transaction.commit()
    >>> with dz.CommitCoordinator(conn) as save:
    ...     save.store(da.ones(50, chunks=10), root["B"], region=slice(50, 100))
    ...     save.append(da.zeros((4, 3), dtype="i4", chunks=2), root["C"])
    >>> float(root["B"][:].sum()), root["C"].shape
    (50.0, (4, 3))
    >>> conn.close(); db.close()
    """

    def __init__(self, connection: Any, job_id: str | None = None) -> None:
        _check_job_id(job_id)
        self._connection = connection
        self._job_id = job_id
        self._save: _Save | None = None
        self._open = False
        self._started = 0.0
        self.result: SaveResult | None = None
        self.progress: list[Callable[[SaveProgress], None]] = []

    # -- what to save

    def __enter__(self) -> CommitCoordinator:
        if self._save is not None:
            raise PublishError("this CommitCoordinator is in use already")
        check_open(self._connection)
        self._started = time.perf_counter()
        self.result = None
        self._save = _Save(self._connection, self._job_id)
        self._open = True
        return self

    def _current(self) -> _Save:
        if self._save is None or not self._open:
            raise PublishError("use CommitCoordinator by `with`: outside of it there is nothing to store into")
        return self._save

    def store(self, x: Any, array: ZBigArray, region: Any = None, *, rechunk: Rechunk = "auto") -> None:
        """``array[region] = x``; see `to_zbigarray`. Computed on leaving the ``with``."""
        save = self._current()
        save.add(fit(x, array, region, False, self._connection), array, region, False, rechunk)

    def append(self, x: Any, array: ZBigArray, *, rechunk: Rechunk = "auto") -> None:
        """Add `x` at the end of the array's major axis, on leaving the ``with``."""
        save = self._current()
        save.add(fit(x, array, None, True, self._connection), array, None, True, rechunk)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        save = self._current()
        self._open = False
        if error is not None:
            self._connection.transaction_manager.abort()
            self.discard()
            return
        try:
            if self._job_id is not None and save.plans and self.published():
                self._finish_again(save)
                return
            save.staged = stage_all(save.plans, self.progress)
        except BaseException:
            self._connection.transaction_manager.abort()
            self.discard()
            raise
        self._publish(save)

    # -- saving

    def retry(self) -> SaveResult:
        """Publish what was staged once more, in the connection's current transaction, and commit that.

        For after a conflict: it is saved over what others have committed meanwhile. Nothing is computed again.

        Raises
        ------
        PublishError
            If there is nothing staged: it was saved, given up, or its lease is over.
        """
        save = self._save
        if save is None or save.staged is None or self._open:
            raise PublishError("there is nothing staged that could be published again")
        self._started = time.perf_counter()
        if self.published():
            self._finish_again(save)
        else:
            self._publish(save)
        assert self.result is not None
        return self.result

    def discard(self) -> None:
        """Give up what was staged."""
        save, self._save = self._save, None
        if save is not None:
            save.end()

    def published(self) -> bool:
        """Whether the ledgers of its arrays, as the server has them now, know this save.

        Raises
        ------
        DatabaseUnavailableError
            If the server does not answer.
        """
        save = self._save
        if save is None:
            return self.result is not None
        return persevere(save.location, lambda: self._ask_ledgers(save))

    def _ask_ledgers(self, save: _Save) -> bool:
        db = self._connection.db()
        database.sync(db)
        stored = [p.array for p in save.plans if _is_stored(p.array)]
        with reading(save.location, bytes(db.lastTransaction()), 0) as now:
            return bool(stored) and all(save.ledger_id in now.get(a._p_oid)._file.journal.jobs for a in stored)

    def _publish(self, save: _Save) -> None:
        manager = self._connection.transaction_manager
        alone = _is_alone(self._connection)
        before = database.snapshot(self._connection)
        retries = 0
        while True:
            try:
                save.publish()
                manager.commit()
                break
            except BaseException as error:
                with contextlib.suppress(POSError, OSError):
                    manager.abort()
                if isinstance(error, ConflictError):
                    # by another client that runs the same job, or by a try of ours that arrived late
                    if self.published():
                        self._finish_again(save)
                        return
                elif self._is_saved_after_all(save, error):
                    self._move_on()
                    break
                if not transient(error):
                    raise
                database.sync(self._connection.db())
                manager.begin()
                self._check_unchanged(save, before, error)
                if not alone or retries == TRIES:
                    manager.abort()
                    raise
            retries += 1
        self._finish(save, retries)

    def _move_on(self) -> None:
        """Let the connection see what is saved. (In explicit mode it will when its next transaction begins.)"""
        if not self._connection.transaction_manager.explicit:
            self._connection.transaction_manager.begin()

    def _check_unchanged(self, save: _Save, before: bytes, error: BaseException) -> None:
        """Raise, if it is data of ours that others have changed since the snapshot `before`, up to the present one.

        If that cannot be told, raise `error`. Nothing may be published over what others did unless the user says so.
        """
        after = database.snapshot(self._connection)
        assert save.staged is not None
        for planned, staged in zip(save.plans, save.staged, strict=True):
            if staged.target.rows or not _is_stored(planned.array):
                continue
            look = partial(changed_between, save.location, staged.target.oid, before, after, staged.ranges())
            try:
                theirs = persevere(save.location, look)
            except (ZBigError, POSError, OSError):
                self._connection.transaction_manager.abort()
                raise error from None
            if len(theirs):
                found = conflict(planned.array, theirs)
                self._connection.transaction_manager.abort()
                raise found from error

    def _is_saved_after_all(self, save: _Save, error: BaseException) -> bool:
        """The answer to a commit was lost, perhaps: ask the ledger."""
        if not isinstance(error, (POSError, OSError)):
            return False
        try:
            # What was sent may arrive after all. The server does one commit at a time: so when it has done another
            # one, it has done ours, or never will.
            with contextlib.suppress(JobGoneError):
                persevere(save.location, lambda: renew(save.job))
            return self.published()
        except (ZBigError, POSError, OSError) as e:
            raise OutcomeUnknownError(
                f"the server went away while it was asked to commit ({type(error).__name__}: {error}). Whether the "
                f"save is done, `published()` tells when it answers again; if not, `retry()` publishes what was staged"
            ) from e

    def _finish(self, save: _Save, retries: int) -> None:
        assert save.staged is not None
        size, segments = sum(s.bytes for s in save.staged), sum(s.segments for s in save.staged)
        seconds = time.perf_counter() - self._started
        self.result = SaveResult(save.ledger_id, self._tid(save), size, segments, seconds, retries)
        self.discard()

    def _finish_again(self, save: _Save) -> None:
        """It was saved before: then so was what else is in the transaction."""
        with contextlib.suppress(NoTransaction):
            self._connection.transaction_manager.abort()
        self._move_on()
        self.result = SaveResult(save.ledger_id, None, 0, 0, time.perf_counter() - self._started)
        self.discard()

    def _tid(self, save: _Save) -> bytes | None:
        """The transaction that has just published; None if there was nothing to publish."""
        serials = []
        for planned in save.plans:
            journal = planned.array._file.journal
            journal._p_activate()  # it is a ghost if the commit merged it with another job's
            if journal.jobs[-1:] == (save.ledger_id,):
                serials.append(journal._p_serial)
        if not save.plans:
            return None
        return bytes(max(serials, default=self._connection.db().lastTransaction()))


def _check_job_id(job_id: Any) -> None:
    if job_id is not None and (not isinstance(job_id, str) or not job_id):
        raise TypeError(f"a job_id is a text of at least one letter, not {job_id!r}")


def _is_stored(array: ZBigArray) -> bool:
    array._p_activate()
    return array._p_serial not in (None, b"\0" * 8)


def _is_alone(connection: Any) -> bool:
    """Whether there is nothing in the connection's transaction: then publishing may be repeated in another one."""
    manager = manager_of(connection)
    others = [r for r in connection.transaction_manager.get()._resources if r is not manager]
    return connection._needs_to_join and not manager.dirty and not others
