"""The ZEO client under every database that ``dz.open("zeo://...")`` opens: ZEO's own, with some gaps closed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

from ZEO.asyncio.client import ClientIO, ClientThread

from dask_zbig.storage.modes import follow
from dask_zbig.storage.zeoloads import Loads
from dask_zbig.storage.zeowrites import write_carefully

__all__ = ["ClientStorage"]


class _PatientIO(ClientIO):  # type: ignore[misc]  # ZEO ships no types
    """ZEO's, with a pause, and with an end to waiting.

    A server that accepts connections and ends them, as with TLS it may, must not be flooded; and one that accepts
    them but never greets, as one that is hung or gone behind a forwarder, must not be waited for for ever.
    """

    GREETING = 5.0
    """A server has so many seconds for its greeting, and up to twice as many."""

    _not_before = 0.0
    _later: Any = None

    def try_connecting(self) -> None:
        """Connect to the servers, but not twice within a second. In the client's own thread."""
        now = self.loop.time()
        if now < self._not_before:
            if self._later is None:
                self._later = self.loop.call_at(self._not_before, self.try_connecting)
            return
        self._not_before = now + self.connect_poll
        if self._later is not None:
            self._later.cancel()
            self._later = None
        super().try_connecting()
        for protocol in self.protocols:
            write_carefully(protocol)
        self.loop.call_later(self.GREETING, self._end_silent, self.protocols, frozenset())

    def _end_silent(self, attempts: Any, before: frozenset[Any]) -> None:
        """End those connections that had no greeting `before` and have none yet."""
        if self.closed or self.protocols is not attempts:
            return  # connected, or there are new attempts
        silent = frozenset(p for p in attempts if not p.closed and _is_connected(p) and not _is_greeted(p))
        for protocol in silent & before:
            protocol.close(TimeoutError("The server did not greet."))
            self.disconnected(protocol)  # connects again if no other attempt goes on
        if self.protocols is attempts:
            self.loop.call_later(self.GREETING, self._end_silent, attempts, silent)


def _is_connected(protocol: Any) -> bool:
    return protocol.sm_protocol is not None


def _is_greeted(protocol: Any) -> bool:
    return hasattr(protocol, "heartbeat_bytes")


class _Thread(ClientThread):  # type: ignore[misc]  # ZEO ships no types
    def setup_delegation(self, loop: Any) -> None:
        """Make what it runs. In the client's own thread, whose loop does not run yet."""
        super().setup_delegation(loop)
        self.client.__class__ = _PatientIO
        for protocol in self.client.protocols:
            write_carefully(protocol)


class ClientStorage(Loads):
    """A ClientStorage that forgets what it must, and leaves nothing behind.

    - A transaction that is aborted leaves no copies of its blobs in the blob directory: in a cache that is
      not private they would stay for ever, and in the server's directory too.
    - Object ids that were reserved before the connection was lost are not used after it. A server that was
      restarted knows nothing of them, and gives them to others: each use would be a conflict.
    - It is not read-only while the server is away: arrays that are opened then would be for good.
    - It does not wait for a load for ever: see `Loads`.
    - A server that hangs up on it is asked once a second, not hundreds of times.
    - It does not write to a connection that has just been lost: see `zeowrites`.

    Notes
    -----
    Thread-safe, as ZEO's.
    """

    _making = threading.local()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, _client_factory=_Thread, **options)
        if self.fshelper is not None:  # it has a blob directory
            follow(self.fshelper)
            self.fshelper.blob_mkstemp = self._noting(self.fshelper.blob_mkstemp)

    @classmethod
    def _noting(cls, mkstemp: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str]]:
        def blob_mkstemp(oid: bytes, tid: bytes) -> tuple[int, str]:
            fd, name = mkstemp(oid, tid)
            cls._making.names.append(name)  # (only `storeBlob` calls this)
            return fd, name

        return blob_mkstemp

    def notify_connected(self, conn: Any, info: Any) -> None:
        """ZEO is connected (again)."""
        self._oids: list[bytes] = []
        super().notify_connected(conn, info)

    def is_read_only(self) -> bool:
        """Whether nothing can be stored by the present connection, or could be by the last one."""
        return bool(self._is_read_only)

    isReadOnly = is_read_only  # noqa: N815 - ZODB's name

    def storeBlob(  # noqa: N802 - ZODB's name
        self, oid: bytes, serial: bytes, data: bytes, path: str, version: str, txn: Any
    ) -> Any:
        """Store a blob, and note where its file went."""
        names = self._making.names = []
        try:
            return super().storeBlob(oid, serial, data, path, version, txn)
        finally:
            if names:
                vars(txn.data(self)).setdefault("names", []).extend(names)

    def tpc_abort(self, txn: Any, timeout: float | None = None) -> None:
        """Abort, and remove the blobs' files that are still where they were put."""
        names: list[str] = []
        with contextlib.suppress(KeyError):  # the transaction was not begun here
            buffer = txn.data(self)  # None if it has ended
            names = names if buffer is None else vars(buffer).get("names", names)
        try:
            super().tpc_abort(txn, timeout)
        finally:
            for name in names:
                for path in (name, name + "-"):  # ZEO makes the one and renames it to the other
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
