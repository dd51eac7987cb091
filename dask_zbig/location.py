"""Where a database is: what one process can tell another about it."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_zbig import uris

if TYPE_CHECKING:
    import ZODB

__all__ = ["Location", "describe", "why_not"]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a database is, as one process can tell another. Small, picklable, and free of secrets.

    Attributes
    ----------
    alias
        The database's name: the same in every process that opens the same thing, however it spells it.
        ``file:///data/x.fs``, ``zeo://host:8100``, ``mapping:<uuid>``. Options and blob directories are
        not part of it. The keys of the option ``zbig.database-uris`` are aliases.
    uri
        The URI or ZConfig text with which another process can open it. None when there is none: the
        database is exclusive, or its settings hold a secret.
    exclusive
        Whether one process only can have it open: a FileStorage, a MappingStorage, anything without a
        server.
    pid
        The process that said so.
    """

    alias: str
    uri: str | None
    exclusive: bool
    pid: int


def describe(db: ZODB.DB, text: str | None) -> Location:
    """Tell where an open database is.

    Parameters
    ----------
    db
        Its storage tells most.
    text
        The URI or ZConfig text that it was opened with, if any, good for any directory to be opened from.
    """
    storage, pid = db.storage, os.getpid()
    uri = None if text is None or uris.has_secret(text) else text
    path = getattr(storage, "_file_name", None)
    if isinstance(path, str):
        shareable = uri is not None and storage.isReadOnly()
        return Location(f"file://{os.path.realpath(path)}", uri if shareable else None, not shareable, pid)
    if _is_a(storage, "ZEO.ClientStorage"):
        alias = uris.zeo_alias(list(storage._addr), storage._storage)
        return Location(alias, _client_uri(storage) if text is None else uri, False, pid)
    if text is None or _is_a(storage, "ZODB.MappingStorage", "ZODB.DemoStorage"):
        kind = type(storage).__name__.removesuffix("Storage").lower()
        return Location(f"{kind}:{uuid.uuid4()}", None, True, pid)
    place = uris.mask(text).partition("?")[0]
    alias = f"zconfig:{uris.fingerprint(text)}" if "\n" in place else place
    return Location(alias, uri, False, pid)


def why_not(location: Location) -> str:
    """Say why this process cannot open a location that it does not have open, and what to do."""
    alias, owner = location.alias, location.pid
    if not location.exclusive:
        return (
            f"nothing says how to open the database {alias} from here: its settings hold a secret, or it was "
            "not opened with dz.open; set Dask's option zbig.database-uris to "
            f"{{{alias!r}: '<URI or ZConfig text>'}}"
        )
    path = alias.removeprefix("file://")
    name = f"FileStorage {path!r}" if path != alias else f"the database {alias}"
    if owner == os.getpid():
        return f"{name} was closed by this process; open it again"
    if path == alias:
        path = "x.fs"
    return (
        f"{name} can be opened by one process only, and belongs to process {owner}; "
        f"serve it: with dz.serve({path!r}) as uri: db = dz.open(uri)"
    )


def _is_a(storage: Any, *modules: str) -> bool:
    """Whether a storage's class comes from a module, without importing the module."""
    return any(base.__module__ in modules for base in type(storage).__mro__)


def _client_uri(storage: Any) -> str | None:
    """Return a URI for the server of a ZEO client that was made by hand; None when none will do."""
    client = getattr(storage._server, "client", None)
    encrypted = getattr(client, "ssl", "unknown")
    if len(storage._addr) != 1 or encrypted == "unknown":
        return None
    options: dict[str, str] = {}
    if encrypted is not None:
        if isinstance(storage._addr[0], str):
            return None  # no URI expresses TLS on a unix socket
        options["tls"] = "true"
    if storage._storage != "1":
        options["storage"] = storage._storage
    if storage.blob_dir and storage.shared_blob_dir:
        options.update(blob_dir=os.path.abspath(storage.blob_dir), shared_blob_dir="true")
    return uris.zeo_uri(storage._addr[0], **options)
