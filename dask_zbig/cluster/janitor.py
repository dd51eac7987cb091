"""What is left of those who died: staged data that nobody will publish, temporary files that nobody will remove.

Most of it goes by itself: a job that begins removes those whose lease is over, and a process that uses a directory
removes the temporary files of dead ones from it. `collect_garbage` does both when it is asked to, says what it found,
and looks after ZODB's own leftovers too.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ZODB

from dask_zbig import database, tempfiles, uris
from dask_zbig.cluster.staging import ExpiredJob, collect
from dask_zbig.cluster.worker import writing
from dask_zbig.config import get
from dask_zbig.database import Location
from dask_zbig.errors import DatabaseUnavailableError
from dask_zbig.storage.blobfiles import orphans
from dask_zbig.tempfiles import OLD, TemporaryFile

__all__ = ["ExpiredJob", "GarbageReport", "TemporaryFile", "collect_garbage"]


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What was removed; or would have been, if it was a `dry_run`.

    Attributes
    ----------
    jobs : tuple of ExpiredJob
        With `id`, `age` (seconds since it began), `bytes` and `segments` that were staged.
    files : tuple of TemporaryFile
        With `path`, `bytes` and `age` (seconds since it was changed or moved last).
    """

    dry_run: bool
    jobs: tuple[ExpiredJob, ...]
    files: tuple[TemporaryFile, ...]

    @property
    def staged_bytes(self) -> int:
        """Bytes in the database, which the next pack gives back."""
        return sum(job.bytes for job in self.jobs)

    @property
    def file_bytes(self) -> int:
        """Bytes in temporary files."""
        return sum(file.bytes for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return asdict(self)


def collect_garbage(db_or_uri: Any, *, dry_run: bool = False, old: float = OLD) -> GarbageReport:
    """Remove what clients, workers and servers have left in a database and beside it when they died.

    - Data that was staged for a save, but never published: if the job's lease is over
      (option ``zbig.lease-seconds``, renewed while anybody works for the job). Its disk space comes back at the
      next pack.
    - Temporary files of dead processes, in the directories that this process would use: the database's own,
      the option ``zbig.scratch-directory``, the system's.
    - What ZODB itself leaves in the directory of blobs: uncommitted ones, and those of transactions that never were.
      Nothing tells whether somebody is still at work with these, but their age.

    Parameters
    ----------
    db_or_uri : ZODB.DB or path, URI or ZConfig text
        A database, or what `dask_zbig.open` takes; that is opened for this, and closed.
    dry_run : bool
        Only say what would be removed.
    old : float
        Seconds after which a file is garbage if only its age tells; by default a day. It must be longer than any
        transaction takes.

    Returns
    -------
    GarbageReport

    Raises
    ------
    DatabaseURIError, DatabaseUnavailableError
        As by `dask_zbig.open`. A file that does not exist is not made.
    PublishError
        If others changed the staging area all the time. Try again.

    Notes
    -----
    Safe to call at any time, by any number of processes. A job that is renewed meanwhile stays. Clocks of hosts should
    agree to a small part of a lease.

    Examples
    --------
    >>> import dask_zbig as dz
    >>> db = dz.open("memory://")
    >>> collect_garbage(db).jobs
    ()
    >>> db.close()
    """
    with _opened(db_or_uri) as db:
        location = database.location(db)
        jobs = collect(location, dry_run=dry_run)
        own = _blob_directory(location)
        places = dict.fromkeys(p for p in (own, get("scratch-directory"), tempfile.gettempdir()) if p)
        files = [file for place in places for file in tempfiles.sweep(place, old=old, dry_run=dry_run)]
        files += tempfiles.remove(orphans(db.storage, own), old, dry_run=dry_run)
    return GarbageReport(dry_run, tuple(jobs), tuple(files))


@contextlib.contextmanager
def _opened(db_or_uri: Any) -> Iterator[ZODB.DB]:
    if isinstance(db_or_uri, ZODB.DB):
        yield db_or_uri
        return
    _check_exists(db_or_uri)
    with contextlib.closing(database.open(db_or_uri)) as db:
        yield db


def _check_exists(where: str | os.PathLike[str]) -> None:
    """`open` makes a missing file, but there is no garbage in a new database: it is a mistake."""
    alias = uris.alias_of(os.fspath(where))
    if alias is not None and alias.startswith("file://") and not os.path.exists(alias.removeprefix("file://")):
        raise DatabaseUnavailableError(f"there is no FileStorage {alias.removeprefix('file://')!r}")


def _blob_directory(location: Location) -> str | None:
    """Where blobs are before they are committed."""
    with writing(location) as connection:
        return str(connection._normal_storage.temporaryDirectory()) if database.has_blobs(connection) else None
