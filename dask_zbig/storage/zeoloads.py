"""How our ZEO client loads: it does not wait for ever, and says why a blob cannot be kept."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ZEO.ClientStorage import ClientStorage
from ZEO.Exceptions import ClientDisconnected
from ZODB.POSException import POSKeyError

from dask_zbig.config import get
from dask_zbig.storage.transfers import Download

__all__ = ["Loads"]

_LOOK = 0.5  # seconds between looks at whether it is worth waiting on


def _look(answered: Any) -> None:
    """Look at the error of what nobody waits for."""
    with contextlib.suppress(asyncio.CancelledError):
        answered.exception()


class Loads(ClientStorage):  # type: ignore[misc]  # ZEO ships no types
    """What of a ClientStorage loads objects and blobs, with two gaps closed.

    - ZEO waits for a connection for some time only, but for an answer for as long as the connection lasts: for ever,
      if the server's process is stopped, or its host hangs. Here it is `zbig.load-timeout`, of a blob since its last
      piece came.
    - If the blob cache's disk is full, it takes what fits for all of the blob, and logs every piece of the rest.

    Notes
    -----
    Thread-safe, as ZEO's.
    """

    _pieces: int  # of blobs, that came
    _downloads: dict[tuple[bytes, bytes], Download]  # blobs that are on their way
    _refused: dict[tuple[bytes, bytes], OSError]  # blobs that could not be written

    def __init__(self, *args: Any, **options: Any) -> None:
        self._pieces, self._downloads, self._refused = 0, {}, {}
        super().__init__(*args, **options)
        self._call = self._bounded_call

    def _answer(self, coroutine: Any, more: float = 0.0) -> Any:
        """What the coroutine returns, within the load time-out and so many seconds `more`, or since the last piece."""
        try:
            future = self._server.io_call(coroutine, wait=False)
        except BaseException:  # it is closed
            coroutine.close()
            raise
        pieces, since = self._pieces, time.monotonic()
        while True:
            patience = get("load-timeout") + more
            try:
                return future.result(min(_LOOK, patience))
            except asyncio.TimeoutError:
                if self._server.is_closed():  # by another thread: nobody is left who could give the answer
                    with contextlib.suppress(RuntimeError, ValueError):  # (it had begun)
                        coroutine.close()
                    raise ClientDisconnected("closed") from None
                if self._pieces != pieces:
                    pieces, since = self._pieces, time.monotonic()
                elif time.monotonic() - since >= patience:
                    self._forget(future)
                    raise ClientDisconnected(f"the server has not answered for {patience:g} seconds") from None

    def _forget(self, future: Any) -> None:
        """Nobody waits for its answer any more. Its error, if nobody looked at it, would be logged when it is freed."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._server.loop.call_soon_threadsafe(future.add_done_callback, _look)

    def loadBefore(self, oid: bytes, tid: bytes) -> Any:  # noqa: N802 - ZODB's name
        """The record of an object as of before `tid`."""
        found = self._cache.loadBefore(oid, tid)
        return found or self._answer(self._server.load_before_co(oid, tid, self._server.timeout))

    def prefetch(self, oids: Iterable[bytes], tid: bytes) -> None:
        """Ask for objects of which each is going to be loaded now: the loads will find their answers on the way.

        What goes wrong is for those to tell, while ZEO's own would log it as an error.
        """
        coroutine = self._expect(tuple(oids), tid)
        try:
            self._server.io_call(coroutine, wait=False)
        except (ClientDisconnected, RuntimeError):  # it is closed
            coroutine.close()

    async def _expect(self, oids: Iterable[bytes], tid: bytes) -> None:
        client = self._server.client
        if not client.operational:
            return
        for oid in oids:
            if client.cache.loadBefore(oid, tid) is None:
                client.protocol.load_before(oid, tid).add_done_callback(_look)

    def loadBlob(self, oid: bytes, serial: bytes) -> Any:  # noqa: N802 - ZODB's name
        """The path of a blob's file."""
        try:
            return super().loadBlob(oid, serial)
        except POSKeyError:
            error = self._refused.pop((oid, serial), None)
            if error is None:
                raise
            path = self.fshelper.getBlobFilename(oid, serial)
            raise OSError(error.errno, f"cannot write to the blob cache: {error.strerror}", path) from error

    def _bounded_call(self, method: str, *args: Any, **options: Any) -> Any:
        """What `_call` is to be."""
        if method not in ("sendBlob", "ping"):
            return self._server.call(method, *args, **options)
        timeout = self._server.timeout
        more = timeout if method == "ping" else 0.0  # who asks for it wants to wait for the connection
        return self._answer(self._server.call_sync_co(method, args, timeout), more)

    # -- downloads, in the client's own thread

    def receiveBlobStart(self, oid: bytes, serial: bytes) -> None:  # noqa: N802 - ZEO's name
        """A blob is going to come."""
        self._forget_download(oid, serial)
        self._refused.pop((oid, serial), None)
        try:
            new = Download(self.fshelper.getBlobFilename(oid, serial))
        except OSError as error:
            self._refused[oid, serial] = error
        else:
            self._downloads[oid, serial] = new

    def receiveBlobChunk(self, oid: bytes, serial: bytes, chunk: bytes) -> None:  # noqa: N802 - ZEO's name
        """A piece of a blob has come."""
        self._pieces += 1
        with self._writing(oid, serial) as download:
            if download is not None:
                download.write(chunk)
                self._blob_data_bytes_loaded += len(chunk)
                self._check_blob_size(self._blob_data_bytes_loaded)

    def receiveBlobStop(self, oid: bytes, serial: bytes) -> None:  # noqa: N802 - ZEO's name
        """All of a blob has come."""
        with self._writing(oid, serial) as download:
            if download is not None:
                download.finish()
        self._forget_download(oid, serial)

    @contextlib.contextmanager
    def _writing(self, oid: bytes, serial: bytes) -> Iterator[Download | None]:
        try:
            yield self._downloads.get((oid, serial))
        except OSError as error:
            self._refused[oid, serial] = error
            self._forget_download(oid, serial)

    def _forget_download(self, oid: bytes, serial: bytes) -> None:
        old = self._downloads.pop((oid, serial), None)
        if old is not None:
            old.close()

    def notify_disconnected(self) -> None:
        """ZEO has lost the connection: what was on its way does not come any more."""
        self._forget_downloads()
        super().notify_disconnected()

    def close(self) -> None:
        """Close."""
        super().close()
        self._forget_downloads()

    def _forget_downloads(self) -> None:
        for key in list(self._downloads):
            self._forget_download(*key)
