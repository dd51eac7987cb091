"""From text to an open ``ZODB.DB``, with every way this can fail turned into one of two errors."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zc.lockfile
import ZConfig
import ZODB
from ZODB.FileStorage.FileStorage import FileStorageFormatError
from ZODB.POSException import POSError

from dask_zbig import config, uris
from dask_zbig.errors import DatabaseUnavailableError, ZBigError
from dask_zbig.storage.filestorage import FileStorage, blob_directory
from dask_zbig.storage.tempdir import PrivateDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["open_database"]

_CACHE_SIZE = 10_000  # objects for each connection; zodburi's default. ZODB's own, 400, is for small memories


@dataclass(slots=True)
class _Source:
    """What a text resolves to: how its storage is made, and what its database shall be like."""

    storage: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=lambda: {"cache_size": _CACHE_SIZE})
    text: str | None = None  # what another process can be told


def open_database(where: str | os.PathLike[str], options: dict[str, Any]) -> tuple[ZODB.DB, str | None]:
    """Open what a path, URI or ZConfig text names; see ``dask_zbig.database.open``.

    Returns
    -------
    db, text
        `text` opens the same from another process and another working directory. It may hold secrets.
    """
    _check_options(options)
    kind, text = uris.classify(where)
    if kind == "zconfig" and "<zodb" in text:
        return _open_zodb_section(text, options), text
    with _understanding(text):
        source = {"path": _path, "uri": _uri, "zconfig": _storage_section}[kind](text)
    with _reaching(text):
        with _understanding(text):
            storage = source.storage()
        try:
            return ZODB.DB(storage, **{**source.options, **options}), source.text
        except BaseException:
            storage.close()
            raise


def _check_options(options: dict[str, Any]) -> None:
    parameters = inspect.signature(ZODB.DB).parameters
    known = [name for name in parameters if name not in ("storage", "storage_args")]
    for name in options:
        if name not in known:
            raise TypeError(f"ZODB.DB has no option {name!r}; it has {', '.join(known)}")


def _path(path: str) -> _Source:
    return _Source(lambda: FileStorage(path))


def _uri(uri: str) -> _Source:
    import zodburi

    scheme = uri.partition(":")[0]
    if scheme == "zeo":
        return _zeo(uri)
    storage, options = zodburi.resolve_uri(uri)
    parsed = uris.parse_file(uri) if scheme == "file" else None
    if parsed is None:
        return _Source(storage, options, uri)
    path, given = parsed
    blob_dir = given.get("blobstorage_dir") or blob_directory(path)
    flags = {name: bool(_integer(given[name])) for name in ("create", "read_only") if name in given}
    query = {"read_only": "1", "blobstorage_dir": os.path.abspath(blob_dir)}
    text = uris.file_uri(path, **query)
    return _Source(lambda: FileStorage(path, blob_dir=blob_dir, **flags, **_quota(given)), options, text)


def _integer(text: str) -> int:
    from zodburi.datatypes import convert_int

    return int(convert_int(text))


def _quota(given: dict[str, str]) -> dict[str, int]:
    from zodburi.datatypes import convert_bytesize

    return {"quota": int(convert_bytesize(given["quota"]))} if "quota" in given else {}


def _zeo(uri: str) -> _Source:
    import zodburi

    from dask_zbig.storage.zeoclient import ClientStorage

    address, given = uris.parse_zeo(uri)
    if "blob_dir" in given:
        given["blob_dir"] = os.path.abspath(os.path.expanduser(given["blob_dir"]))
    shared = _integer(given.get("shared_blob_dir", "0"))
    if shared and "blob_dir" not in given:
        raise ValueError("shared_blob_dir needs a blob_dir")
    public = uris.zeo_uri(address, **given)
    given.setdefault("wait_timeout", str(max(1, math.ceil(config.get("zeo.wait-timeout")))))

    def client(**more: str) -> Any:
        return ClientStorage.of(zodburi.resolve_uri(uris.zeo_uri(address, **given, **more))[0]())

    def storage() -> Any:
        if "blob_dir" not in given:
            return _with_private_blobs(client)
        if shared and not os.path.isdir(given["blob_dir"]):
            raise DatabaseUnavailableError(
                f"the shared blob directory {given['blob_dir']!r} of {uris.mask(public)!r} is not on this "
                "host: use a URI without blob_dir and shared_blob_dir here"
            )
        return client()

    return _Source(storage, zodburi.resolve_uri(public)[1], public)


def _with_private_blobs(client: Callable[..., Any]) -> Any:
    """Make a ZEO client with a blob cache of its own: without one it can neither read nor store blobs."""
    cache = PrivateDirectory("cache", config.get("scratch-directory"))
    try:
        storage = client(blob_dir=os.path.join(cache.path, "blobs"))
    except BaseException:
        cache.close()
        raise
    weakref.finalize(storage, cache.close)
    return storage


def _storage_section(text: str) -> _Source:
    from io import StringIO

    from ZODB.config import getStorageSchema

    section, _ = ZConfig.loadConfigFile(getStorageSchema(), StringIO(text))
    return _Source(section.storage.open, text=text)


def _open_zodb_section(text: str, options: dict[str, Any]) -> ZODB.DB:
    from io import StringIO

    from ZODB.config import databaseFromConfig, getDbSchema

    if options:
        raise uris.bad(text, f"the options {', '.join(options)} belong into its <zodb> section")
    with _understanding(text):
        section, _ = ZConfig.loadConfigFile(getDbSchema(), StringIO(text))
        if any(database.config.storage is None for database in section.database):
            raise ValueError("a <zodb> section has no storage in it")
    with _reaching(text), _understanding(text):
        return databaseFromConfig(section.database)


@contextlib.contextmanager
def _understanding(text: str) -> Iterator[None]:
    """Turn errors about what the text says into DatabaseURIError."""
    try:
        yield
    except ZBigError:
        raise
    except (FileStorageFormatError, IsADirectoryError) as error:
        raise uris.bad(text, error) from error
    except POSError:
        raise
    except (ZConfig.ConfigurationError, LookupError, TypeError, ValueError) as error:
        raise uris.bad(text, error) from None  # their text repeats ours, secrets and all


@contextlib.contextmanager
def _reaching(text: str) -> Iterator[None]:
    """Turn failures to get at the database into DatabaseUnavailableError."""
    name = repr(uris.mask(text))
    try:
        yield
    except ZBigError:
        raise
    except zc.lockfile.LockError as error:
        raise DatabaseUnavailableError(
            f"FileStorage {name} is open already, in another process or in this one, and can be open once "
            "only: serve it with dz.serve(path) or `dask-zbig serve`, and open the URI that this gives"
        ) from error
    except (OSError, POSError) as error:
        from ZEO.Exceptions import ClientDisconnected

        if isinstance(error, ClientDisconnected):
            raise DatabaseUnavailableError(f"no ZEO server answers at {name}: {error}") from error
        raise DatabaseUnavailableError(f"the database {name} cannot be opened: {error}") from error
