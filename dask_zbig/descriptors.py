"""Open files, of which a process may have only so many: they are opened when they are used, and few stay open.

A transaction may have thousands of scratch files, and an array thousands of blobs; `ulimit -n` is often 1024. So
whoever reads a file opens it through a `Reopened`, and the last `KEPT` that anybody used stay open for the next use.

A descriptor is an object: it is closed when nobody refers to it any more, and so never while somebody uses it.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable

__all__ = ["KEPT", "Descriptor", "Reopened", "close_unused"]

#: Descriptors that stay open though nobody uses them. To open a file again costs some microseconds.
KEPT = 64


class Descriptor:
    """An open file; closed when the last reference to this object goes.

    So write ``file = source.descriptor(); use(file.fd)``. In ``use(source.descriptor().fd)`` nobody refers to it any
    more: another thread closes it, and opens another file, which gets the number.
    """

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, os.close, fd).atexit = False  # a thread may still be using it then


# The collector may run a finalizer that comes here while this very thread is here: hence an RLock, and no step in
# between that another call could spoil.
_lock = threading.RLock()
_kept: dict[Descriptor, None] = {}  # the last used last


def _keep(used: Descriptor) -> None:
    gone = []  # (closed after the lock is free)
    with _lock:
        _kept.pop(used, None)
        _kept[used] = None
        while len(_kept) > KEPT:
            oldest = next(iter(_kept))
            _kept.pop(oldest, None)
            gone.append(oldest)


def close_unused() -> None:
    """Close all descriptors that nobody uses at the moment."""
    with _lock:
        gone = list(_kept)
        _kept.clear()
    del gone


class Reopened:
    """A file that is opened when it is used. Thread-safe.

    Parameters
    ----------
    open_ : callable
        Returns a new descriptor (an int), or raises. May be called by several threads at a time, and again and again.
    """

    __slots__ = ("__weakref__", "_last", "_open")

    def __init__(self, open_: Callable[[], int]) -> None:
        self._open = open_
        self._last: weakref.ref[Descriptor] | None = None

    @property
    def opened(self) -> Descriptor | None:
        """The descriptor, if it is open now."""
        return self._last() if self._last is not None else None

    def descriptor(self) -> Descriptor:
        """An open descriptor: keep the object for as long as the number is used. Raises what `open_` does."""
        used = self.opened
        if used is None:
            try:
                used = Descriptor(self._open())
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                close_unused()
                used = Descriptor(self._open())
            self._last = weakref.ref(used)
        _keep(used)
        return used

    def close(self) -> None:
        """Do not stay open. (Whoever uses it at the moment may go on.)"""
        used = self.opened
        if used is not None:
            with _lock:
                _kept.pop(used, None)
