"""The unlinked file that backs composed pages, so that everything mapped is a file the kernel can evict."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
import threading
import weakref

from dask_zbig.errors import ScratchError
from dask_zbig.memory._native import PAGE
from dask_zbig.tempfiles import new_name

__all__ = ["CacheFile"]

_libc = ctypes.CDLL(None, use_errno=True)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


class CacheFile:
    """Pages with no name. Places are never used twice, so a late writer cannot spoil what is mapped.

    Thread-safe. Disk space comes back by `punch` and when the object dies; what is mapped then lives on.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._fd = -1
        self._end = 0
        self._lock = threading.Lock()

    def _open(self) -> int:
        if self._fd < 0:
            try:
                self._fd = _unnamed(self._directory)
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise
                # What is composed here is only read: so a database that may only be read can be.
                self._fd = _unnamed(tempfile.gettempdir())
            weakref.finalize(self, os.close, self._fd)
        return self._fd

    def add(self, data: bytes | bytearray | memoryview) -> tuple[int, int]:
        """Store whole pages; return (descriptor, offset) of where they are."""
        if len(data) % PAGE:
            raise ValueError(f"not whole pages: {len(data)} bytes")
        try:
            with self._lock:
                fd = self._open()
                offset, self._end = self._end, self._end + len(data)
            done = 0
            with memoryview(data) as view:
                while done < len(data):
                    done += os.pwrite(fd, view[done:], offset + done)
        except OSError as e:
            raise ScratchError(
                e.errno,
                f"cannot write {len(data)} bytes to a cache file in {self._directory!r}: {e.strerror}",
            ) from e
        return fd, offset

    def punch(self, offset: int, size: int) -> None:
        """Give the disk space of [offset, offset + size) back. A file system that cannot is left alone."""
        if self._fd >= 0:
            _libc.fallocate(self._fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_longlong(offset), ctypes.c_longlong(size))


def _unnamed(directory: str) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # a file system without O_TMPFILE
        fd, path = tempfile.mkstemp(prefix=new_name() + "-", dir=directory)
        os.unlink(path)
        return fd
