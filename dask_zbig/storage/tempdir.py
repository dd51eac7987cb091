"""Directories that live as long as their process: a served database's socket, a ZEO client's blob cache.

A process that is killed runs no clean-up, and a cluster's workers are often killed. So each directory is
locked by its owner for as long as that lives, and whoever makes the next one removes those that nobody
holds any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import weakref

from dask_zbig.storage.modes import make_directory

__all__ = ["PrivateDirectory"]

_OWNER = ".owner"
_SETTLED = 60.0  # seconds; a younger directory may not be locked yet


class PrivateDirectory:
    """A new directory of mode 0700, removed by :meth:`close`, at exit, or by the next process after a kill.

    Parameters
    ----------
    kind
        A word for the name, so that a person who finds the directory knows what it is.
    base
        Where to make it; the system's temporary directory when not given.

    Attributes
    ----------
    path : str

    Notes
    -----
    A forked child neither owns nor removes it.
    """

    def __init__(self, kind: str, base: str | None = None) -> None:
        base = base or tempfile.gettempdir()
        make_directory(os.path.abspath(base))
        prefix = f"dz-{kind}-"
        _sweep(base, prefix)
        self.path = tempfile.mkdtemp(prefix=prefix, dir=base)
        lock = os.open(os.path.join(self.path, _OWNER), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        """Remove the directory with all that is in it; a second call does nothing."""
        self._finalizer()


def _remove(path: str, lock: int, pid: int) -> None:
    if os.getpid() != pid:
        return
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _sweep(base: str, prefix: str) -> None:
    """Remove the directories of this user whose owners are gone."""
    with contextlib.suppress(OSError), os.scandir(base) as entries:
        for entry in entries:
            if entry.name.startswith(prefix):
                with contextlib.suppress(OSError):
                    _remove_if_orphaned(entry)


def _remove_if_orphaned(entry: os.DirEntry[str]) -> None:
    info = entry.stat(follow_symlinks=False)
    if not entry.is_dir(follow_symlinks=False) or info.st_uid != os.getuid():
        return
    if time.time() - info.st_mtime < _SETTLED:
        return
    lock = os.open(os.path.join(entry.path, _OWNER), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(lock)
