"""The FileStorage under every database that ``dz.open(path)`` and ``dz.serve(path)`` open.

ZODB's own syncs ``Data.fs`` once for each commit, and the blobs not at all: after a power cut the transaction may
be there and its data not, or only parts of it. This one syncs in the order in which one thing relies on another, and
closes a few other gaps that array data would fall through; see :class:`FileStorage`. The files are those of a plain
FileStorage, in both directions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from typing import Any

from ZODB._compat import FILESTORAGE_MAGIC
from ZODB.blob import LAYOUT_MARKER, FilesystemHelper, rename_or_copy_blob
from ZODB.FileStorage import FileStorage as _FileStorage
from ZODB.FileStorage.FileStorage import FileStorageFormatError

from dask_zbig.signals import ctrl_c_postponed
from dask_zbig.storage.modes import follow, make_directory
from dask_zbig.storage.tail import unfinished

__all__ = ["FileStorage", "blob_directory", "create_directory"]

_logger = logging.getLogger(__name__)


def blob_directory(path: str) -> str:
    """Return where the blobs of the FileStorage at `path` lie by default: ``x.fs`` -> ``x.fs.blobs``."""
    return path + ".blobs"


class FileStorage(_FileStorage):  # type: ignore[misc]  # ZODB ships no types
    """A FileStorage whose transactions are durable with their blobs, and whole, whatever a crash leaves.

    - Blob files, and the directories that name them, are synced in ``tpc_vote``, before the transaction
      can become visible. So is the transaction itself: a disk may write in any order, and what is marked as finished
      must be.
    - A transaction that a crash has interrupted is cut off when the file is opened, whatever part of it is there.
    - The index and the blob directory's mark are on the disk before their names are, and a packed file before it
      replaces the old one, which it does in one step.
    - A transaction that ends before its vote leaves no blob files behind.
    - Ctrl-C while a transaction becomes visible is raised after it, and does not close the storage.
    - Pack keeps no second copy, neither of ``Data.fs`` nor of the blobs.
    - No object gets the oid of one that was packed away: clients, which may know that one still, would take them for
      the same. (ZODB's own forgets these when it is opened again. The highest is kept in ``<path>.oid``.)
    - One that is opened for reading only writes nothing, and needs neither the blob directory's ``tmp`` nor its mark.
    - A missing data file is created next to blobs that exist; they are not deleted.
    - What is created is private to the user: the data file 0600, the blob directory and missing parent
      directories 0700. Modes of existing files are kept, also by pack, and what is new beside or in them has
      these modes too: index and lock file that of the data file, directories of blobs that of the blob directory.

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

    _closed = False

    def __init__(self, path: str, *, blob_dir: str | None = None, **options: Any) -> None:
        path = os.path.abspath(path)
        blob_dir = os.path.abspath(blob_dir or blob_directory(path))
        self._entered: set[str] = set()  # directories known to be durable in their parents
        writable = not options.get("read_only")
        _check_format(path, writable)
        if writable:
            create_directory(os.path.dirname(path))
            _create_private(path, 0o600, FILESTORAGE_MAGIC)
            for temporary in (".tmp", ".lock"):
                _create_fresh(path + temporary, _mode(path))
            create_directory(blob_dir)
            make_directory(os.path.join(blob_dir, "tmp"), _mode(blob_dir))
            _mark(blob_dir)
        options.setdefault("pack_keep_old", False)
        try:
            super().__init__(path, blob_dir=blob_dir if os.path.isdir(blob_dir) else None, **options)
        except BaseException:
            self._let_go()
            raise
        follow(getattr(self, "fshelper", None))
        if writable:
            self.set_max_oid(_noted_oid(path))
            for left in (".pack", ".oid.new", ".index.index_tmp"):  # by one that was killed
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + left)
            for directory in {os.path.dirname(path), os.path.dirname(blob_dir), blob_dir}:
                _sync(directory)

    def _blob_init(self, blob_dir: str, layout: str = "automatic") -> None:
        if not self._is_read_only:
            super()._blob_init(blob_dir, layout)
            return
        # ZODB's own makes `tmp` and the mark, where nothing may be made: on a read-only disk, in somebody's copy.
        self.fshelper = FilesystemHelper(blob_dir, layout)
        self.dirty_oids: list[Any] = []

    def tpc_vote(self, transaction: Any) -> Any:
        """Make the transaction durable, with its blobs, all but the mark that it is finished."""
        if self.dirty_oids:
            self._sync_blobs()
        resolved = super().tpc_vote(transaction)
        os.fdatasync(self._file.fileno())
        return resolved

    def tpc_finish(self, transaction: Any, f: Any = None) -> bytes:
        """Finish the transaction. Ctrl-C has to wait: if anything fails here, the storage closes."""
        with ctrl_c_postponed():
            tid: bytes = super().tpc_finish(transaction, f)
        return tid

    def _finish_finish(self, tid: bytes) -> None:
        # ZODB's own, but that this syncs the one byte that has changed, and not the file's times, for half the price.
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self._pos = self._nextpos
        self._index.update(self._tindex)
        self._ltid = tid
        self._blob_tpc_finish()

    def close(self) -> None:
        """Close. The index is saved while nobody else can open the file."""
        if not self._closed:
            try:
                self._save_index()
            except OSError:
                _logger.exception("the index of %s was not saved", self._file_name)
        self._closed = True
        super().close()

    def pack(self, t: float, referencesf: Any, gc: bool | None = None) -> None:
        """Pack; the data file keeps its mode, and the new one is on the disk before it replaces the old."""
        if not self.isReadOnly():
            _note_oid(self._file_name, self._oid)
        new = self._file_name + ".pack"
        created = _create_fresh(new, _mode(self._file_name))
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
            path = storage._file_name
            try:
                _sync(path + ".pack")
                storage._clear_index()  # which is of the old file
                _sync(os.path.dirname(path))
                with contextlib.suppress(OSError):  # there are file systems without links
                    os.link(path, path + ".old")  # pack is about to give it this name: no moment without a data file
            except BaseException:
                storage._commit_lock.release()
                raise
        return packed

    def _remove_blob_files_tagged_for_removal_during_pack(self) -> None:
        _sync(os.path.dirname(self._file_name))  # or the old file may come back, without its blobs
        super()._remove_blob_files_tagged_for_removal_during_pack()

    def _restore_index(self) -> Any:
        # The place in ZODB's __init__ where the file is open and locked, and has not been read.
        if self._is_read_only:
            return super()._restore_index()
        restored = super()._restore_index()
        end = unfinished(self._file, restored[1] if restored else len(FILESTORAGE_MAGIC))
        if end is not None:
            _logger.warning("%s: a transaction that was not finished is cut off at %d", self._file_name, end)
            self._file.truncate(end)
        if not self._file.seek(0, 2):
            self._file.write(FILESTORAGE_MAGIC)
            self._file.flush()
        os.fsync(self._file.fileno())  # what is there will be seen, and may be the page cache's only
        return restored

    def _save_index(self) -> None:
        if self._is_read_only or self._closed:
            return
        name = self._file_name + ".index"
        new = name + ".index_tmp"
        _create_fresh(new, _mode(self._file_name))
        self._index.save(self._pos, new)
        _sync(new)
        os.replace(new, name)
        self._saved += 1

    def _abort(self) -> None:
        super()._abort()  # which forgets the blobs when there was no vote
        self._blob_tpc_abort()

    def _blob_storeblob(self, oid: bytes, serial: bytes, blobfilename: str) -> None:
        with self._lock:
            self.dirty_oids.append((oid, serial))  # first: should this fail half way, the abort removes what there is
            target = self.fshelper.getBlobFilename(oid, serial)
            self.fshelper.getPathForOID(oid, create=True)
            rename_or_copy_blob(blobfilename, target)

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
    _create_fresh(new, _mode(path))
    with open(new, "w") as file:
        file.write(oid.hex())
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path + ".oid")
    _sync(os.path.dirname(path))


def _check_format(path: str, writable: bool) -> None:
    """Refuse what is no FileStorage before any file is made beside it."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path!r} is a directory, not a FileStorage")
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        start = file.read(len(FILESTORAGE_MAGIC) + 1)
        if writable and start == bytes(len(FILESTORAGE_MAGIC)):
            os.truncate(path, 0)  # the power failed when it was made
        elif start[: len(FILESTORAGE_MAGIC)] not in (b"", FILESTORAGE_MAGIC):
            raise FileStorageFormatError(f"{path!r} is not a FileStorage")


def create_directory(path: str) -> None:
    """Make a directory and those above it that are missing, all of mode 0700 and all durable."""
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        create_directory(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        _sync(parent)


def _create_private(path: str, mode: int, content: bytes = b"") -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        return False
    with open(fd, "wb") as file:
        os.fchmod(fd, mode)  # whatever the umask
        file.write(content)
    return True


def _create_fresh(path: str, mode: int) -> bool:
    """The same for a name that nobody else should have made: what a symbolic link there points to is not touched."""
    if os.path.islink(path):
        os.unlink(path)
    return _create_private(path, mode)


def _mark(blob_dir: str) -> None:
    """Mark a blob directory that is not in use yet with its layout, as ZODB does: blobs are not found without."""
    mark = os.path.join(blob_dir, LAYOUT_MARKER)
    if os.path.exists(mark) and os.path.getsize(mark):
        return
    if any(name != "tmp" and not name.startswith(".") for name in os.listdir(blob_dir)):
        return  # ZODB knows what to make of that
    new = mark + ".new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    _create_private(new, _mode(blob_dir) & 0o666, b"bushy")
    _sync(new)
    os.replace(new, mark)


def _mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
