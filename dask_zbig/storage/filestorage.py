"""The FileStorage under every database that ``dz.open(path)`` and ``dz.serve(path)`` open.

ZODB's own syncs ``Data.fs`` at each commit, but not the blobs: after a power cut the transaction may be
there and its data not. This one syncs them first, and closes a few other gaps that array data would
fall through; see :class:`FileStorage`. The files are those of a plain FileStorage, in both directions.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Any

from ZODB._compat import FILESTORAGE_MAGIC
from ZODB.FileStorage import FileStorage as _FileStorage
from ZODB.FileStorage.FileStorage import FileStorageFormatError

__all__ = ["FileStorage", "blob_directory"]


def blob_directory(path: str) -> str:
    """Return where the blobs of the FileStorage at `path` lie by default: ``x.fs`` -> ``x.fs.blobs``."""
    return path + ".blobs"


class FileStorage(_FileStorage):  # type: ignore[misc]  # ZODB ships no types
    """A FileStorage whose transactions are durable with their blobs.

    - Blob files, and the directories that name them, are synced in ``tpc_vote``, before the transaction
      can become visible.
    - A transaction that ends before its vote leaves no blob files behind.
    - Pack keeps no second copy, neither of ``Data.fs`` nor of the blobs.
    - No object gets the oid of one that was packed away: clients, which may know that one still, would take them for
      the same. (ZODB's own forgets these when it is opened again. The highest is kept in ``<path>.oid``.)
    - A missing data file is created next to blobs that exist; they are not deleted.
    - What is created is private to the user: the data file 0600, the blob directory and missing parent
      directories 0700. Modes of existing files are kept, also by pack.

    Parameters
    ----------
    path
        The data file; it is created when missing, with the directories above it.
    blob_dir
        The blob directory; ``<path>.blobs`` when not given.
    **options
        As for ZODB's FileStorage.

    Raises
    ------
    zc.lockfile.LockError
        The file is open already, in another process or in this one.
    IsADirectoryError, FileStorageFormatError, OSError
        There is something at `path` that is no FileStorage, or it cannot be read or created.

    Notes
    -----
    Thread-safe, as ZODB's.
    """

    def __init__(self, path: str, *, blob_dir: str | None = None, **options: Any) -> None:
        path = os.path.abspath(path)
        blob_dir = os.path.abspath(blob_dir or blob_directory(path))
        self._entered: set[str] = set()  # directories known to be durable in their parents
        _check_format(path)
        writable = not options.get("read_only")
        if writable:
            _create_directory(os.path.dirname(path))
            _create_private(path, 0o600)
            _create_private(path + ".tmp", _mode(path))
            _create_directory(blob_dir)
        options.setdefault("pack_keep_old", False)
        try:
            super().__init__(path, blob_dir=blob_dir if os.path.isdir(blob_dir) else None, **options)
        except BaseException:
            self._let_go()
            raise
        if writable:
            self.set_max_oid(_noted_oid(path))
            for directory in {os.path.dirname(path), os.path.dirname(blob_dir), blob_dir}:
                _sync(directory)

    def tpc_vote(self, transaction: Any) -> Any:
        """Make the transaction's blobs durable, then vote."""
        if self.dirty_oids:
            self._sync_blobs()
        return super().tpc_vote(transaction)

    def pack(self, t: float, referencesf: Any, gc: bool | None = None) -> None:
        """Pack; the data file keeps its mode, and the new one is on the disk before it replaces the old."""
        if not self.isReadOnly():
            _note_oid(self._file_name, self._oid)
        new = self._file_name + ".pack"
        created = _create_private(new, _mode(self._file_name))
        try:
            super().pack(t, referencesf, gc)
        finally:
            self._entered.clear()  # pack removes directories that have become empty
            if created:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(new)  # nothing was packed
        _sync(os.path.dirname(self._file_name))

    @staticmethod
    def packer(storage: Any, referencesf: Any, stop: bytes, gc: bool) -> Any:
        """Write the packed file and sync it; called by :meth:`pack`, returns holding the commit lock."""
        packed = _FileStorage.packer(storage, referencesf, stop, gc)
        if packed is not None:
            try:
                _sync(storage._file_name + ".pack")
            except BaseException:
                storage._commit_lock.release()
                raise
        return packed

    def _abort(self) -> None:
        super()._abort()  # which forgets the blobs when there was no vote
        self._blob_tpc_abort()

    def _sync_blobs(self) -> None:
        # A new blob has a directory of its own, and a ZEO client with a shared blob directory makes it, so
        # what is new cannot be known here: sync each file, its directory and the one above. Those further
        # up, one for 256 blobs and fewer, are remembered once they have got into their parents.
        base = os.path.abspath(self.fshelper.base_dir)
        directories: set[str] = set()
        entered: set[str] = set()
        for oid, serial in self.dirty_oids:
            file = self.fshelper.getBlobFilename(oid, serial)
            _sync(file)
            directory = own = os.path.dirname(file)
            directories.add(own)
            while directory != base and directory not in self._entered:
                if directory != own:
                    entered.add(directory)
                directory = os.path.dirname(directory)
                directories.add(directory)
        for directory in directories:
            _sync(directory)
        if not self._pack_is_in_progress:
            self._entered |= entered

    def _let_go(self) -> None:
        for name in ("_tfile", "_file", "_lock_file"):
            held = getattr(self, name, None)
            if held is not None:
                held.close()


def _noted_oid(path: str) -> bytes:
    """The highest oid before the last pack of the FileStorage at `path`."""
    try:
        with open(path + ".oid") as file:
            return bytes.fromhex(file.read())
    except FileNotFoundError:
        return bytes(8)


def _note_oid(path: str, oid: bytes) -> None:
    """Remember it, durably."""
    new = path + ".oid.new"
    _create_private(new, _mode(path))
    with open(new, "w") as file:
        file.write(oid.hex())
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path + ".oid")
    _sync(os.path.dirname(path))


def _check_format(path: str) -> None:
    """Refuse what is no FileStorage before any file is made beside it."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path!r} is a directory, not a FileStorage")
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        magic = file.read(len(FILESTORAGE_MAGIC))
        if magic and magic != FILESTORAGE_MAGIC:
            raise FileStorageFormatError(f"{path!r} is not a FileStorage")


def _create_directory(path: str) -> None:
    """Make a directory and those above it that are missing, all of mode 0700 and all durable."""
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        _create_directory(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        _sync(parent)


def _create_private(path: str, mode: int) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    except FileExistsError:
        return False
    return True


def _mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
