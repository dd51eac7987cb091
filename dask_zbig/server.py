"""``serve``: a ZEO server of our own for as long as a ``with`` block lasts.

Only one process can open a FileStorage. To compute on it with a cluster, or to use it from several
programs, it is served: one process has the file, and the others talk to that. Array data does not go
through it: clients on the host map the blob files themselves.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dask_zbig import tls, uris
from dask_zbig.errors import ServerError
from dask_zbig.storage.filestorage import blob_directory
from dask_zbig.storage.tempdir import PrivateDirectory

if TYPE_CHECKING:
    from types import TracebackType

    from dask_zbig.uris import Address

__all__ = ["ServerProcess", "serve"]

_STOP_TIMEOUT = 10.0  # seconds, then SIGKILL; a FileStorage stands that
_LOG_TAIL = 2000  # bytes of the server's log that go into an error
_BOOT = (  # "python -c" puts the working directory first, where any file may shadow a module
    "import sys; sys.path[:] = [p for p in sys.path if p]; "
    "import json; sys.path[:] = json.loads(sys.stdin.readline()); "
    "from dask_zbig.zeoserver import child; child()"
)


def serve(
    path: str | os.PathLike[str],
    *,
    address: str | os.PathLike[str] | tuple[str, int] | None = None,
    blob_dir: str | os.PathLike[str] | None = None,
    timeout: float = 30.0,
    shared_blob_dir: bool | None = None,
    tls_certificate: str | os.PathLike[str] | None = None,
    tls_key: str | os.PathLike[str] | None = None,
    tls_clients: str | os.PathLike[str] | None = None,
    tls_key_password: str | None = None,
    insecure: bool = False,
) -> ServerProcess:
    """Serve a FileStorage from a process of its own while a ``with`` block lasts.

    Parameters
    ----------
    path
        The data file; created if missing. It must not be open, neither here nor elsewhere.
    address
        Where to listen. By default at a unix socket in a new private directory. Else the path of a
        socket, or host and port: ``("127.0.0.1", 0)`` takes a free port. Beyond the loopback device it
        takes TLS.
    blob_dir
        The blob directory; ``<path>.blobs`` by default.
    timeout
        Seconds that the server may take to start: a large database without its index file is read
        through first.
    shared_blob_dir
        Whether the URI tells clients to use the server's blob directory, which saves all copying. If
        not, ``dz.open`` gives each client a private cache, and blobs are downloaded. By default so if the
        address can be reached from this host only.
    tls_certificate, tls_key
        Speak TLS (1.2 or later): the files of the server's certificate and of its key. The certificate names
        the host as clients do. The key may be in the same file.
    tls_clients
        Whom to let in, always needed: a file, or directory, of certificates that a client's must be one of
        or signed by.
    tls_key_password
        Where the key's password is: ``env:NAME``, ``file:PATH`` or ``command:...``.
    insecure
        Listen beyond the loopback device without TLS. Whoever can connect can then run code here, and in
        the clients.

    Returns
    -------
    ServerProcess
        A context manager. Entering starts the server and gives the URI, which any process of the user
        on this host can open; leaving stops it. Clients of a server with TLS need Dask's options
        ``zbig.tls.*``.

    Raises
    ------
    ServerError
        At once: the options for TLS are incomplete. On entering: the server did not start; the message has
        its reason and the end of its log. On leaving: it ended before.

    Notes
    -----
    The server ends with this process, even if that is killed; a forked child that leaves the block does
    not stop it. It works in scripts without ``if __name__ == "__main__"``. Ctrl-C does not reach it.

    Examples
    --------
    >>> import tempfile
    >>> from dask_zbig.database import open
    >>> with tempfile.TemporaryDirectory() as directory, serve(directory + "/x.fs") as uri:
    ...     db = open(uri)
    ...     db.close()
    """
    credentials = server_credentials(tls_certificate, tls_key, tls_clients, tls_key_password)
    return ServerProcess(path, address, blob_dir, timeout, shared_blob_dir, credentials, insecure)


class ServerProcess:
    """The server of :func:`serve`.

    Attributes
    ----------
    uri : str
        What clients open; after entering.
    pid : int
        The server's process; after entering.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        address: str | os.PathLike[str] | tuple[str, int] | None,
        blob_dir: str | os.PathLike[str] | None,
        timeout: float,
        shared_blob_dir: bool | None,
        credentials: tls.Credentials | None,
        insecure: bool,
    ) -> None:
        self.path = os.path.abspath(os.fsdecode(path))
        self.blob_dir = os.path.abspath(os.fsdecode(blob_dir)) if blob_dir else blob_directory(self.path)
        self.uri = ""
        self.pid = 0
        self._address = os.fsdecode(address) if isinstance(address, os.PathLike) else address
        self._timeout = timeout
        self._shared = shared_blob_dir
        self._credentials = credentials
        self._insecure = insecure
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: PrivateDirectory | None = None
        self._owner = 0

    def __enter__(self) -> str:
        if self._process is not None:
            raise ServerError(f"the server for {self.path!r} is running already")
        self._owner = os.getpid()
        self._directory = short_directory()
        try:
            address = self._start(self._directory.path)
        except BaseException:
            self._stop()
            raise
        asked = self._address[0] if isinstance(self._address, tuple) else ""
        self.uri = client_uri(address, asked, self.blob_dir, self._shared, self._credentials is not None)
        return self.uri

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None or self._owner != os.getpid():
            return
        died = self._process.poll()
        tail = self._log_tail() if died is not None else ""
        self._stop()
        if died is not None and error is None:
            raise ServerError(f"the ZEO server for {self.path!r} ended unasked, {_how(died)}{tail}")

    def _start(self, directory: str) -> Address:
        address = self._address or os.path.join(directory, "zeo")
        if isinstance(address, str):
            address = os.path.abspath(address)
        with open(os.path.join(directory, "log"), "wb", opener=_private) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, "dask-zbig-server", self.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,
            )
        self.pid = self._process.pid
        settings = {
            "path": self.path,
            "address": address,
            "blob_dir": self.blob_dir,
            "directory": directory,
            "parent": self._owner,
            "tls": self._credentials and asdict(self._credentials),
            "insecure": self._insecure,
        }
        lines = [json.dumps([os.path.abspath(entry) for entry in sys.path]), json.dumps(settings)]
        answer = self._ask("\n".join(lines) + "\n")
        if "address" not in answer:
            raise ServerError(f"the ZEO server for {self.path!r} did not start: {answer['error']}{self._log_tail()}")
        found = answer["address"]
        return found if isinstance(found, str) else (str(found[0]), int(found[1]))

    def _ask(self, lines: str) -> dict[str, Any]:
        """Send the settings, and wait for the one line that the server answers."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        received = b""
        try:
            process.stdin.write(lines.encode())
        except BrokenPipeError:
            return {"error": _how(process.wait())}
        deadline = time.monotonic() + self._timeout
        while not received.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return {"error": f"no sign of life within {self._timeout:g} seconds"}
            piece = process.stdout.read(4096)
            if not piece:
                return {"error": _how(process.wait())}
            received += piece
        return dict(json.loads(received))

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    def _log_tail(self) -> str:
        assert self._directory is not None
        with open(os.path.join(self._directory.path, "log"), "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_TAIL))
            text = log.read().decode(errors="replace").strip()
        return f"\n--- the end of its log:\n{text}" if text else ""


def server_credentials(
    certificate: str | os.PathLike[str] | None,
    key: str | os.PathLike[str] | None,
    clients: str | os.PathLike[str] | None,
    key_password: str | None,
) -> tls.Credentials | None:
    """Return what a server with TLS needs, or None if nothing is given; ServerError if something is missing."""
    if not (certificate or key or clients or key_password):
        return None
    if not certificate or not clients:
        missing = "the certificates of its clients, or of their CA, are" if certificate else "its certificate is"
        raise ServerError(f"a server with TLS needs its certificate and those of its clients: {missing} not given")
    own, theirs = (os.path.abspath(os.fsdecode(given)) for given in (certificate, clients))
    return tls.Credentials(own, os.path.abspath(os.fsdecode(key)) if key else None, theirs, key_password)


def client_uri(address: Address, asked: str, blob_dir: str, shared: bool | None, encrypted: bool) -> str:
    """Return the URI that clients of a server open.

    Parameters
    ----------
    address
        Where it listens.
    asked
        The host that it was told to listen at: the certificate has that name rather than a number.
    shared
        Whether clients use the server's blob directory; None: if they are on its host.
    """
    local = True
    if not isinstance(address, str):
        local = uris.is_loopback(asked)
        if asked in ("", "0.0.0.0", "::"):
            asked = socket.getfqdn()
        address = (asked, address[1]) if encrypted else (address[0] if local else asked, address[1])
    options = {"blob_dir": blob_dir, "shared_blob_dir": "true"} if shared or (shared is None and local) else {}
    return uris.zeo_uri(address, **options, **({"tls": "true"} if encrypted else {}))


def short_directory() -> PrivateDirectory:
    """Return a new private directory whose path leaves room for a socket's name."""
    directory = PrivateDirectory("serve")
    try:
        if len(os.fsencode(directory.path)) < 90 and not set(directory.path) & set("?#\t\r\n"):
            return directory
    except UnicodeEncodeError:
        pass
    directory.close()
    return PrivateDirectory("serve", "/tmp")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
