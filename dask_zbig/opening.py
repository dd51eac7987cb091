"""From text to an open ``ZODB.DB``, with every way this can fail turned into one of two errors."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import ssl
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zc.lockfile
import ZConfig
import ZODB
from ZODB.FileStorage.FileStorage import FileStorageFormatError
from ZODB.POSException import POSError

from dask_zbig import config, tls, uris
from dask_zbig.errors import DatabaseUnavailableError, DatabaseURIError, ZBigError
from dask_zbig.failedcommits import guard_commits_of
from dask_zbig.storage.filestorage import FileStorage, blob_directory, create_directory
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
    db, text = _open(where, options)
    for one in db.databases.values():
        guard_commits_of(one)
    return db, text


def _open(where: str | os.PathLike[str], options: dict[str, Any]) -> tuple[ZODB.DB, str | None]:
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
    with _naming_certificates():
        storage, options = zodburi.resolve_uri(uri)
    parsed = uris.parse_file(uri) if scheme == "file" else None
    if parsed is None:
        return _Source(_watched(getattr(storage, "__self__", None), storage), options, uri)
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

    address, given = uris.parse_zeo(uri)
    context = _client_tls(address, given.pop("tls", None))
    if "blob_dir" in given:
        given["blob_dir"] = os.path.abspath(os.path.expanduser(given["blob_dir"]))
    shared = _integer(given.get("shared_blob_dir", "0"))
    if shared and "blob_dir" not in given:
        raise ValueError("shared_blob_dir needs a blob_dir")
    plain = uris.zeo_uri(address, **given)
    public = plain if context is None else uris.zeo_uri(address, **given, tls="true")
    given.setdefault("wait_timeout", str(max(1, math.ceil(config.get("zeo.wait-timeout")))))

    def storage() -> Any:
        if shared and not os.path.isdir(given["blob_dir"]):
            raise DatabaseUnavailableError(
                f"the shared blob directory {given['blob_dir']!r} of {uris.mask(public)!r} is not on this "
                "host: use a URI without blob_dir and shared_blob_dir here"
            )
        with _diagnosing([address], context, None):
            if "blob_dir" not in given:
                return _with_private_blobs(lambda blobs: _client(address, context, {**given, "blob_dir": blobs}))
            if not shared:
                create_directory(given["blob_dir"])
            return _client(address, context, given)

    return _Source(storage, zodburi.resolve_uri(plain)[1], public)


def _client(address: uris.Address, context: ssl.SSLContext | None, given: dict[str, str]) -> Any:
    """Make a ZEO client; zodburi would, but knows no TLS."""
    from ZODB.DemoStorage import DemoStorage
    from zodburi.resolvers import client_storage_resolver

    from dask_zbig.storage.zeoclient import ClientStorage

    options, _ = client_storage_resolver.interpret_kwargs(given)
    demo = "demostorage" in options
    options.pop("demostorage", None)
    storage = ClientStorage(address, ssl=context, **options)
    return DemoStorage(base=storage) if demo else storage


def _client_tls(address: uris.Address, asked: str | None) -> ssl.SSLContext | None:
    """What a client needs to speak TLS; None: it speaks plain text."""
    if asked is not None and not _integer(asked):
        raise ValueError("tls can only be true; without it the options zbig.tls.* decide")
    if isinstance(address, str):
        if asked:
            raise ValueError("a unix socket has no TLS")
        return None
    name = uris.zeo_uri(address)
    try:
        credentials = tls.configured()
        if credentials is not None:
            return credentials.client_context()
    except tls.SettingsError as error:
        raise DatabaseUnavailableError(f"{name} cannot be opened: {error}") from None
    if asked or config.get("tls.require"):
        raise DatabaseUnavailableError(_without_tls(name))
    return None


def _without_tls(name: str) -> str:
    return (
        f"{name} must be opened with TLS, which is not configured here: set Dask's options zbig.tls.ca-file, "
        "zbig.tls.certificate and zbig.tls.key"
    )


def _watched(section: Any, opener: Callable[[], Any]) -> Callable[[], Any]:
    """The `opener` of a storage that ZConfig describes; if it is a ZEO client, with a diagnosis."""

    def storage() -> Any:
        with _diagnosing(*_server_of(section)):
            return opener()

    return storage


def _server_of(section: Any) -> tuple[list[uris.Address], ssl.SSLContext | None, str | None]:
    """Addresses, context and host name of a ZEO client's section; no addresses if it is another storage's."""
    from ZEO.zconfig import ClientStorageConfig
    from ZODB.config import ZEOClient

    if not isinstance(section, (ClientStorageConfig, ZEOClient)):
        return [], None, None
    addresses: list[uris.Address] = [server.address for server in section.config.server]
    context, hostname = getattr(section.config, "ssl", None) or (None, None)
    if context is None and config.get("tls.require"):
        for address in addresses:
            if not isinstance(address, str):
                raise DatabaseUnavailableError(_without_tls(uris.zeo_uri(address)))
    return addresses, context, hostname


@contextlib.contextmanager
def _diagnosing(addresses: list[uris.Address], context: ssl.SSLContext | None, hostname: str | None) -> Iterator[None]:
    """Have it said at once, or when the time is over, why a ZEO server and this client cannot talk."""
    from ZEO.Exceptions import ClientDisconnected

    def check(error: Exception | None) -> None:
        why = tls.diagnose(addresses, context, hostname, late=error is not None)
        if why is not None:
            raise DatabaseUnavailableError(f"the ZEO server cannot be used, {why}") from error

    check(None)
    try:
        yield
    except ClientDisconnected as error:
        check(error)  # it may have come up meanwhile
        raise


def _with_private_blobs(client: Callable[[str], Any]) -> Any:
    """Make a ZEO client with a blob cache of its own: without one it can neither read nor store blobs."""
    cache = PrivateDirectory("cache", config.get("scratch-directory"))
    try:
        storage = client(os.path.join(cache.path, "blobs"))
    except BaseException:
        cache.close()
        raise
    weakref.finalize(storage, cache.close)
    return storage


def _storage_section(text: str) -> _Source:
    from io import StringIO

    from ZODB.config import getStorageSchema

    with _naming_certificates():
        section, _ = ZConfig.loadConfigFile(getStorageSchema(), StringIO(text))
    return _Source(_watched(section.storage, section.storage.open), text=text)


def _open_zodb_section(text: str, options: dict[str, Any]) -> ZODB.DB:
    from io import StringIO

    from ZODB.config import databaseFromConfig, getDbSchema

    if options:
        raise uris.bad(text, f"the options {', '.join(options)} belong into its <zodb> section")
    with _understanding(text):
        with _naming_certificates():
            section, _ = ZConfig.loadConfigFile(getDbSchema(), StringIO(text))
        if any(database.config.storage is None for database in section.database):
            raise ValueError("a <zodb> section has no storage in it")
    with _reaching(text), _understanding(text), contextlib.ExitStack() as stack:
        for database in section.database:
            stack.enter_context(_diagnosing(*_server_of(database.config.storage)))
        return databaseFromConfig(section.database)


@contextlib.contextmanager
def _naming_certificates() -> Iterator[None]:
    """The certificates of an <ssl> section are read with the text, and OpenSSL does not say which cannot be."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"a file that it names, such as a certificate or key, cannot be used: {error}") from None


@contextlib.contextmanager
def _understanding(text: str) -> Iterator[None]:
    """Turn errors about what the text says into DatabaseURIError."""
    try:
        yield
    except ZBigError:
        raise
    except (FileStorageFormatError, IsADirectoryError) as error:
        raise DatabaseURIError(uris.mask(str(error))) from error  # which names the file, and what it is not
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
