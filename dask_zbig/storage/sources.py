"""Where bytes that are not committed yet can be read: in memory, and in files of this process's own."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from dask_zbig.descriptors import Descriptor, Reopened
from dask_zbig.errors import LoadError

__all__ = ["BytesSource", "FileSource", "read", "read_all"]


@dataclass(frozen=True, slots=True)
class BytesSource:
    """Bytes that are in memory already."""

    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)

    @property
    def in_file(self) -> bool:
        return False

    def local(self) -> bool:
        return True

    def descriptor(self) -> Descriptor | None:
        return None

    def read(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


class FileSource:
    """A file of this process's own, such as a scratch file.

    What is left under its name when the source goes is removed: a blob has moved it by then.
    """

    in_file = True

    def __init__(self, path: str) -> None:
        self._name = _Name(path)
        self._file = Reopened(self._name.open)
        self.shared = False  # with the changes of transactions before
        # Its very first use: that the file is there, and which file it is, is known from now on.
        file = self._file.descriptor()
        self.length = os.fstat(file.fd).st_size
        self.close = weakref.finalize(self, _drop_file, self._name, self._file, os.getpid())

    def grown(self) -> FileSource:
        """The same, when another generation has been written to the file, behind what was there."""
        file = self._file.descriptor()
        self.length = os.fstat(file.fd).st_size
        self.shared = True
        return self

    @property
    def path(self) -> str:
        """Where the file is now."""
        return self._name.path

    def local(self) -> bool:
        return True

    def descriptor(self) -> Descriptor:
        return self._file.descriptor()

    def read(self, offset: int, size: int) -> bytes:
        return read_all(self._file.descriptor(), offset, size, self.path)

    def give(self, take: Callable[[str], None]) -> None:
        """Have `take(path)` move the file away. It can be read here as before: it keeps a second name.

        On a file system that knows no second names it stays open instead.
        """
        path = self._name.path
        kept = f"{path}-kept"
        try:
            os.link(path, kept)
        except OSError:
            self._name.only = self._file.descriptor()
        else:
            self._name.path = kept
        try:
            take(path)
        except BaseException:
            if self._name.path != path:  # it is where it was, and needs no other name
                with contextlib.suppress(OSError):
                    os.unlink(kept)
                self._name.path = path
            raise


class _Name:
    """By what name a file is to be opened. It outlives its source, for whose finalizer it is."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.only: Descriptor | None = None  # if the file has no name any more
        self._identity: tuple[int, int] | None = None

    def open(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise LoadError(e.errno, f"cannot open {self.path!r}: {e.strerror}") from e
        found = os.fstat(fd)
        identity = (found.st_dev, found.st_ino)
        if self._identity not in (None, identity):
            os.close(fd)
            raise LoadError(f"{self.path!r} is not the file that it was: somebody has put another one in its place")
        self._identity = identity
        return fd


def _drop_file(name: _Name, file: Reopened, pid: int) -> None:
    file.close()
    name.only = None
    if os.getpid() == pid:  # a forked child has the same object, but the file is not its own
        with contextlib.suppress(OSError):  # (it may be a commit that ends here: what is left is swept some day)
            os.unlink(name.path)


def read_all(file: Descriptor, offset: int, size: int, what: object) -> bytes:
    """Of a file, which stays open meanwhile."""
    return read(file.fd, offset, size, what)


def read(fd: int, offset: int, size: int, what: object) -> bytes:
    parts, want = [], size
    while want:
        try:
            part = os.pread(fd, want, offset)
        except OSError as e:
            raise LoadError(e.errno, f"cannot read {want} bytes at {offset} of {what}: {e.strerror}") from e
        if not part:
            raise LoadError(f"{what} ends {want} bytes before byte {offset + want}: it was truncated")
        parts.append(part)
        want -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
