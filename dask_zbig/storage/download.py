"""A blob on its way from a ZEO server into the blob cache."""

from __future__ import annotations

import contextlib
import os
import stat

__all__ = ["Download"]

#: So much is written at once: then the page cache keeps it in pages of this size, and a view of it takes one fault, and
#: one look into the page table, for 2 MiB. Of a blob that was written as it came, in pieces of 59 KB, a sum took twice
#: the time.
STEP = 2 << 20


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
        self._pieces: list[bytes] = []
        self._size = 0  # of these
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._new)
        self._fd = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, piece: bytes) -> None:
        """Add a piece."""
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size >= STEP:
            data = memoryview(b"".join(self._pieces))
            whole = len(data) - len(data) % STEP
            self._pieces, self._size = [bytes(data[whole:])], len(data) - whole
            self._flush(data[:whole])

    def finish(self) -> None:
        """It is complete."""
        self._flush(memoryview(b"".join(self._pieces)))
        self._pieces.clear()
        if self._is_ours():
            os.fchmod(self._fd, stat.S_IREAD)
            os.rename(self._new, self._path)

    def close(self) -> None:
        """Remove what was not finished."""
        if self._is_ours():
            with contextlib.suppress(OSError):
                os.unlink(self._new)
        os.close(self._fd)

    def _flush(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._new), os.fstat(self._fd))
        except FileNotFoundError:
            return False
