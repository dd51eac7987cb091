"""Blobs between a ZEO server and its clients: they come in small pieces, and are written in large ones."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat

__all__ = ["STEP", "Download", "Steps"]

#: So much is written at once: then the page cache keeps it in pages of this size, and a view of it takes one fault, and
#: one look into the page table, for 2 MiB. Of a blob that was written as it came, in pieces of 59 KB, a sum took twice
#: the time.
STEP = 2 << 20

_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Steps:
    """Writes pieces to a file from its beginning, `STEP` bytes at a time.

    Parameters
    ----------
    fd : int
        Of a new file.
    early : bool
        Have the disk begin with what was written, so that a sync in the end finds most of its work done.
    """

    def __init__(self, fd: int, *, early: bool = False) -> None:
        self._fd, self._early = fd, early
        self._buffer = bytearray(STEP)  # one: memory that is new must be cleared by the kernel first
        self._size = 0  # bytes in it
        self._written = 0

    def add(self, piece: bytes) -> None:
        """Add a piece."""
        with memoryview(piece) as left:
            at = 0
            while at < len(piece):
                size = min(len(piece) - at, STEP - self._size)
                self._buffer[self._size : self._size + size] = left[at : at + size]
                at += size
                self._size += size
                if self._size == STEP:
                    self.flush()

    def flush(self) -> None:
        """Write what is left."""
        with memoryview(self._buffer) as data:
            done = 0
            while done < self._size:
                done += os.write(self._fd, data[done : self._size])
        if self._early and _sync_file_range is not None:
            _sync_file_range(self._fd, self._written, self._size, _WRITE)  # (a hint: whether it fails does not matter)
        self._written += self._size
        self._size = 0


class Download:
    """The file of a blob that comes in pieces. It has its name when all of it is there.

    It is ``<path>.dl`` until then, as ZEO's own has it. What another download has left there is replaced; and if
    another one, of a client that had given up waiting for this, has replaced ours, it is that one's to finish.

    Parameters
    ----------
    path : str
        In a directory that exists.
    """

    def __init__(self, path: str) -> None:
        self._path, self._new = path, path + ".dl"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._new)
        self._fd = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._steps = Steps(self._fd)

    def write(self, piece: bytes) -> None:
        """Add a piece."""
        self._steps.add(piece)

    def finish(self) -> None:
        """It is complete."""
        self._steps.flush()
        if self._is_ours():
            os.fchmod(self._fd, stat.S_IREAD)
            os.rename(self._new, self._path)

    def close(self) -> None:
        """Remove what was not finished."""
        if self._is_ours():
            with contextlib.suppress(OSError):
                os.unlink(self._new)
        os.close(self._fd)

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._new), os.fstat(self._fd))
        except FileNotFoundError:
            return False
