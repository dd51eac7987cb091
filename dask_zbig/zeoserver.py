"""The ZEO server process: ZEO's own server, with the settings that arrays need and without its traps.

Against a stock ``runzeo`` it differs in this:

- msgpack on the wire, and clients that answer with pickle are turned away: who may speak that runs code here;
- a unix socket of mode 0600, or TCP: on the loopback device, or with TLS and clients' certificates;
- our FileStorage, which syncs blobs, and always a blob directory;
- no transaction timeout, which would lock the storage for writes, and no conflict resolution by clients,
  which would lose blobs; the persistent classes are imported here instead;
- what it would write to a client that has just gone is dropped (see `zeowrites`);
- it stops between two requests, never within one, and with the process that started it.

``dask_zbig.server`` starts it as a child process, ``dask-zbig serve`` runs it in the foreground.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import stat
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import zc.lockfile
from ZEO.asyncio.marshal import server_decoder
from ZEO.asyncio.server import Acceptor
from ZEO.runzeo import ZEOServer
from ZEO.StorageServer import StorageServer, ZEOStorage
from ZODB.POSException import POSError

from dask_zbig import tls, uris
from dask_zbig.errors import ServerError
from dask_zbig.storage.filestorage import FileStorage, blob_directory
from dask_zbig.storage.transfers import Steps
from dask_zbig.storage.zeowrites import write_carefully

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dask_zbig.uris import Address

__all__ = ["Server", "check_address", "child"]

_SOCKET_PATH_LIMIT = 107  # bytes, in Linux
_logger = logging.getLogger(__name__)


class Server(ZEOServer):  # type: ignore[misc]  # ZEO ships no types
    """A server for one FileStorage. :meth:`main` runs it to its end, in the main thread.

    Parameters
    ----------
    path
        The data file; created if missing.
    address
        The path of a unix socket, or host and port; port 0: the system chooses.
    blob_dir
        ``<path>.blobs`` when not given.
    credentials
        For TLS: the server's certificate, and whose certificates clients may have.
    insecure
        Listen beyond the loopback device without TLS, and warn of it.
    ready
        Called with the actual address when clients can connect.
    lifeline
        A file descriptor; its end of file stops the server.
    parent
        A process whose end stops the server, also when its forked children keep the lifeline open.

    Attributes
    ----------
    abandoned : bool
        Whether it was the lifeline or the parent that stopped it.

    Raises
    ------
    ServerError
        At once: the address is refused, see :func:`check_address`, or the certificates cannot be used.
        From :meth:`main`: the address cannot be used, or the database is open elsewhere or cannot be read.
    """

    def __init__(
        self,
        path: str,
        address: Address,
        *,
        blob_dir: str | None = None,
        credentials: tls.Credentials | None = None,
        insecure: bool = False,
        ready: Callable[[Address], None] = lambda address: None,
        lifeline: int | None = None,
        parent: int | None = None,
    ) -> None:
        check_address(address, encrypted=credentials is not None, insecure=insecure)
        self.path = os.path.abspath(path)
        self.blob_dir = os.path.abspath(blob_dir or blob_directory(self.path))
        self.abandoned = False
        self.storages: dict[str, Any] = {}
        self._ready = ready
        self._lifeline = lifeline
        self._parent = parent
        self._bound = False
        super().__init__(
            SimpleNamespace(
                address=address,
                family=socket.AF_UNIX if isinstance(address, str) else socket.AF_INET,
                storages=[],
                read_only=False,
                msgpack=True,
                client_conflict_resolution=False,
                transaction_timeout=None,
                invalidation_queue_size=1000,
                invalidation_age=None,
                ssl=None if credentials is None else _context(credentials),
                config_logger=None,
            )
        )

    # The steps of ZEOServer.main, in its order.

    def setup_default_logging(self) -> None:
        """Leave logging alone: it belongs to the program that runs this."""

    def check_socket(self) -> None:
        """Refuse an address that is in use, or a path that is something else than a socket."""
        address = self.options.address
        if not isinstance(address, str):
            return  # binding will tell
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(address).st_mode):
                raise ServerError(f"{address!r} exists and is not a socket")
            if self.can_connect(self.options.family, address):
                raise ServerError(f"the address {address!r} is in use")
            os.unlink(address)  # left behind by a server that was killed

    def clear_socket(self) -> None:
        """Remove the socket if it is ours."""
        if self._bound and isinstance(self.options.address, str):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.options.address)

    def make_pidfile(self) -> None:
        """Write none."""

    remove_pidfile = make_pidfile

    def open_storages(self) -> None:
        """Open the FileStorage, and import the classes whose conflicts are to be resolved."""
        try:
            self.storages = {"1": FileStorage(self.path, blob_dir=self.blob_dir)}
        except zc.lockfile.LockError:
            raise ServerError(
                f"FileStorage {self.path!r} is open already, in another process or in the one that serves "
                "it; close it there first"
            ) from None
        except (OSError, POSError) as error:
            raise ServerError(f"{self.path!r} cannot be served: {error}") from error
        importlib.import_module("dask_zbig.storage.tree")

    def setup_signals(self) -> None:
        """Wait for the event loop; see :meth:`loop_forever`."""

    def create_server(self) -> None:
        """Bind and listen."""
        umask = os.umask(0o177)  # the socket's mode is 0600 from the first moment
        try:
            options = self.options
            self.server = _StorageServer(
                options.address,
                self.storages,
                msgpack=options.msgpack,
                invalidation_queue_size=options.invalidation_queue_size,
                ssl=options.ssl,
                Acceptor=_Acceptor,
            )
        except OSError as error:
            raise ServerError(f"cannot listen at {self.options.address!r}: {error}") from error
        finally:
            os.umask(umask)
        self._bound = True

    def loop_forever(self) -> None:
        """Serve until a signal, or until the process that this server belongs to is gone."""
        loop = self.server.acceptor.event_loop
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, loop.stop)
        watched = [] if self._lifeline is None else [self._lifeline]
        if self._parent is not None:
            with contextlib.suppress(OSError, AttributeError):  # no such call, or the parent is gone
                watched.append(os.pidfd_open(self._parent))
            if os.getppid() != self._parent:
                self.abandoned = True
                return
        for fd in watched:
            loop.add_reader(fd, self._abandon, loop)
        self._ready(self.server.acceptor.addr)
        loop.run_forever()

    def close_server(self) -> None:
        """Close the storage whatever happened: its index is saved then."""
        if self.server is not None:
            super().close_server()
        else:
            for opened in self.storages.values():
                opened.close()

    def _abandon(self, loop: Any) -> None:
        self.abandoned = True
        loop.stop()


class _Acceptor(Acceptor):  # type: ignore[misc]  # ZEO ships no types
    def factory(self) -> Any:
        """What serves a new client."""
        protocol = super().factory()
        write_carefully(protocol)
        return protocol


class _StorageServer(StorageServer):  # type: ignore[misc]  # ZEO ships no types
    def create_client_handler(self) -> Any:
        return _ClientHandler(self, self.read_only)


class _ClientHandler(ZEOStorage):  # type: ignore[misc]  # ZEO ships no types
    """ZEO's, for clients that speak msgpack. ZEO lets the client choose, and unpickles whatever it is told to."""

    def notify_connected(self, conn: Any) -> None:
        """The client has said which format it speaks."""
        if conn.protocol_version.startswith(b"M"):
            super().notify_connected(conn)
        else:
            _logger.warning("a client that speaks pickle instead of msgpack is turned away")
            conn.decode = server_decoder(b"M")  # nothing of what it may have sent already is unpickled
            conn.close()

    # What a client uploads goes into a file in large steps, and towards the disk, while it comes.

    blob_tempfile: tuple[int, str] | None
    _upload: Steps | None = None

    def storeBlobStart(self) -> None:  # noqa: N802 - ZEO's name
        """A blob is going to come."""
        super().storeBlobStart()
        assert self.blob_tempfile is not None
        self._upload = Steps(self.blob_tempfile[0], early=True)

    def storeBlobChunk(self, chunk: bytes) -> None:  # noqa: N802 - ZEO's name
        """A piece of a blob has come."""
        with self._uploading() as upload:
            upload.add(chunk)

    def storeBlobEnd(self, oid: bytes, serial: bytes, data: bytes, id: int) -> None:  # noqa: A002, N802 - ZEO's
        """All of a blob has come."""
        with self._uploading() as upload:
            upload.flush()
            self._upload = None  # before its descriptor is closed, and may be another file's
            super().storeBlobEnd(oid, serial, data, id)

    @contextlib.contextmanager
    def _uploading(self) -> Iterator[Steps]:
        """If this fails ZEO closes the connection, and tells us no more of it."""
        try:
            if self._upload is None:
                raise ValueError("a piece of a blob has come, of which the beginning has not")
            yield self._upload
        except BaseException:
            self._forget_upload()
            raise

    def notify_disconnected(self) -> None:
        """The client has gone."""
        self._forget_upload()
        super().notify_disconnected()

    def _forget_upload(self) -> None:
        """Remove what was not uploaded to the end."""
        self._upload = None
        if self.blob_tempfile is not None:
            fd, path = self.blob_tempfile
            self.blob_tempfile = None
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(path)


def _context(credentials: tls.Credentials) -> Any:
    try:
        return credentials.server_context()
    except tls.SettingsError as error:
        raise ServerError(str(error)) from None


def check_address(address: Address, *, encrypted: bool = False, insecure: bool = False) -> None:
    """Refuse an address at which a server must not, or cannot, listen.

    Parameters
    ----------
    encrypted
        Whether it will speak TLS.
    insecure
        Accept what must not be, with a warning in the log.

    Raises
    ------
    ServerError
        TCP that can be reached from other hosts, without TLS. TLS on a unix socket. A socket's path that is
        too long, or that no URI can express.
    """
    if isinstance(address, str):
        if len(os.fsencode(address)) > _SOCKET_PATH_LIMIT:
            raise ServerError(f"the socket's path {address!r} is longer than {_SOCKET_PATH_LIMIT} bytes")
        if not os.path.isabs(address) or uris.parse_zeo(uris.zeo_uri(address)) != (address, {}):
            raise ServerError(f"the socket's path {address!r} cannot be written in a URI")
        if encrypted:
            raise ServerError(f"TLS is for TCP, and {address!r} is a unix socket, which only its owner can open")
        return
    host, port = address
    if not 0 <= port <= 65535:
        raise ServerError(f"there is no port {port}")
    if encrypted or uris.is_loopback(host):
        return
    if not insecure:
        raise ServerError(
            f"{host or 'every address'!r} can be reached from other hosts, and without TLS whoever connects can read "
            "and change the database, and run code: give the server a certificate and a key, and the certificates of "
            "its clients (see docs/howto/hosts.md), or listen at a unix socket"
        )
    _logger.warning("INSECURE: whoever can reach %s:%s can read and change the database, and run code", host, port)


def child() -> None:
    """Be the server that a :class:`dask_zbig.server.ServerProcess` started.

    The settings are the first line of standard input, whose end of file is the end of the parent. The
    answer is one line on standard output: the address, or what went wrong.
    """
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the log
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = json.loads(sys.stdin.readline())

    def ready(address: Address) -> None:
        with answer:
            print(json.dumps({"address": address}), file=answer)

    try:
        server = Server(
            settings["path"],
            _address(settings["address"]),
            blob_dir=settings["blob_dir"],
            credentials=tls.Credentials(**settings["tls"]) if settings["tls"] else None,
            insecure=settings["insecure"],
            ready=ready,
            lifeline=0,
            parent=settings["parent"],
        )
        server.main()
    except Exception as error:  # whatever it is, the parent is told
        expected = isinstance(error, ServerError)
        why = str(error) if expected else f"{type(error).__name__}: {error}"
        _logger.error("the server ends: %s", why, exc_info=not expected)
        if not answer.closed:
            with answer:
                print(json.dumps({"error": why}), file=answer)
        sys.exit(1)
    if server.abandoned:
        import shutil

        shutil.rmtree(settings["directory"], ignore_errors=True)


def _address(value: Any) -> Address:
    return value if isinstance(value, str) else (str(value[0]), int(value[1]))
