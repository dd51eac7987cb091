"""How our ZEO client and server write to a connection that is ending: not at all.

From Python 3.12 on, `writelines` of asyncio's transports does not look whether the connection is lost (CPython's issue
136234), as `write` does. Between the loss and the moment when ZEO is told of it a message may end in a TypeError, where
ZEO knows what to do with a ClientDisconnected; or it leaves the socket's descriptor with the event loop, and the next
connection, which gets the same number, is never read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["write_carefully"]


def write_carefully(protocol: Any) -> None:
    """Have a protocol of ZEO's, not connected yet, drop its messages once the connection ends.

    Whoever waits for answers is told of the end.
    """
    made = protocol.connection_made

    def connection_made(transport: Any) -> None:
        del protocol.connection_made  # or there would be a cycle
        made(_Transport(transport))

    protocol.connection_made = connection_made


class _Transport:
    """What of a transport ZEO uses."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._closed = False  # (with TLS the other must not be asked once the connection is lost, before Python 3.11)
        self.get_extra_info = transport.get_extra_info

    def writelines(self, lines: Iterable[bytes]) -> None:
        """Write, unless the connection ends."""
        if not (self._closed or self._transport.is_closing()):
            self._transport.writelines(lines)

    def close(self) -> None:
        """Close. ZEO does so when the connection is lost, too."""
        self._closed = True
        self._transport.close()
