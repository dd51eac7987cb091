"""xarray's engine "zbig": ``xr.open_dataset(uri, engine="zbig", group="path/in/root")``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint

from dask_zbig import database, uris
from dask_zbig.cluster.source import Moment, tid_at
from dask_zbig.cluster.worker import reading
from dask_zbig.ecosystem.snapshot import dataset_of, find_group
from dask_zbig.errors import DatabaseUnavailableError

__all__ = ["ZBigBackendEntrypoint"]


class ZBigBackendEntrypoint(BackendEntrypoint):  # type: ignore[misc]
    """Opens the datasets that `from_xarray` has stored, at the last snapshot or at one of the past.

    What is at a ``zeo://`` URI is read through a client that this process keeps. The file of a FileStorage is opened
    read-only, next to whoever writes it, unless this process has it open anyway; ``ds.close()`` closes it.
    """

    description = "Datasets in ZODB databases, by dask_zbig"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "group", "at")

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        group: str | None = None,
        at: Moment | None = None,
    ) -> xr.Dataset:
        """As of `xarray.open_dataset`.

        Parameters
        ----------
        filename_or_obj : str or path
            As for `dask_zbig.open`.
        group : str
            Where in the database the dataset is: keys from the root on, separated by "/".
        at : bytes, datetime, float or TimeStamp, optional
            As for `from_zbigarray`.
        """
        where = os.fspath(filename_or_obj)
        if not isinstance(where, str):
            raise TypeError(f"expected the URI or path of a database, not {filename_or_obj!r}")
        location, private = _located(where)
        db = private if private is not None else database.database(location)
        try:
            if at is None:
                database.sync(db)
            tid = bytes(db.lastTransaction()) if at is None else tid_at(at, db)
            with reading(location, tid, 0) as connection:
                ds = dataset_of(find_group(connection, group or ""), location, tid)
        except BaseException:
            if private is not None:
                private.close()
            raise
        if private is not None:
            ds.set_close(private.close)
        names = {drop_variables} if isinstance(drop_variables, str) else set(drop_variables or ())
        return ds.drop_vars(names & set(ds.variables))


def _located(where: str) -> tuple[database.Location, Any]:
    """Where a database is, and the database if it was opened for this."""
    alias = uris.alias_of(where)
    if alias is None or not alias.startswith("file://"):
        return database.locate(where), None
    path = alias.removeprefix("file://")
    if not os.path.exists(path):
        raise DatabaseUnavailableError(f"there is no FileStorage {path!r}")
    ours = database.open_here(alias)
    if ours is not None and not ours.storage.isReadOnly():
        return database.location(ours), None
    # (one that is open to read may be behind: it does not see what others append to the file)
    if uris.classify(where)[0] == "path":
        where = uris.file_uri(os.path.abspath(where), read_only="1")
    db = database.open(where)
    return database.location(db), db
