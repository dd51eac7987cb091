"""Names for temporary files, such that those of a killed process are found and removed.

A process that is killed runs no clean-up, and a cluster's workers often are. So all temporary files of a process
carry its token in their names, and while it may have some in a directory it keeps a locked file there,
``.zbig-<token>.lock``. Whoever gets that lock knows that the owner is dead, as the kernel has let go of it. Every
process looks into each directory that it uses, now and then.

A lock says something only on the host where it is held: a network file system need not show it to others. So a
token begins with eight digits for the host's boot. What belongs to another host or boot, and what has no lock,
is judged by its age.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import itertools
import os
import re
import secrets
import shutil
import socket
import stat
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

__all__ = ["BOOT", "OLD", "Hold", "TemporaryFile", "new_name", "remove", "sweep"]

#: Seconds after which a file that no lock speaks for is taken for garbage.
OLD = 86400.0
#: Seconds after which a process looks again into a directory that it uses.
EVERY = 600.0
_FILE = re.compile(r"zbig-([0-9a-f]{24})-.+")
_LOCK = re.compile(r"\.zbig-([0-9a-f]{24})\.lock")


# -- this process


@dataclass(slots=True)
class _Lock:
    """Of one directory. `fd` is -1 where no lock can be had."""

    count: int = 0
    fd: int = -1


@dataclass(slots=True, eq=False)
class _Process:
    """This process: its token, the locks that it holds, and when it is to look for others' files, by directory."""

    token: str
    locks: dict[str, _Lock] = field(default_factory=dict)
    next_look: dict[str, float] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    guard: threading.Lock = field(default_factory=threading.Lock)
    released: deque[str] = field(default_factory=deque)

    def lock_path(self, directory: str) -> str:
        return os.path.join(directory, f".zbig-{self.token}.lock")


def _boot() -> str:
    """Eight digits for this host since it was started."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            text = file.read()
    except OSError:
        text = socket.gethostname()
    return f"{zlib.crc32(text.strip().encode()):08x}"


#: Which host this is, since it was started.
BOOT = _boot()


def _new_process() -> _Process:
    return _Process(BOOT + secrets.token_hex(8))


_own = _new_process()


def new_name() -> str:
    """A name for a temporary file of this process, or for what several names begin with. Nobody gets it twice."""
    return f"zbig-{_own.token}-{os.getpid()}-{next(_own.numbers)}"


class Hold:
    """Tells other processes, while it exists, that this process's temporary files in a directory are in use.

    Get one before the first file is made, and `release` it when all are gone; or use it by ``with``.

    Notes
    -----
    Thread-safe. It never fails: that a directory cannot be written is for whoever makes a file to tell. In a forked
    child it holds nothing.
    """

    def __init__(self, directory: str) -> None:
        process = _own
        with process.guard:
            lock = process.locks.setdefault(directory, _Lock())
            lock.count += 1
            _ensure(process, directory, lock)
        self._finalizer = weakref.finalize(self, _release, process, directory)
        self._finalizer.atexit = False  # see `_at_exit`
        _settle(process)
        now = time.monotonic()
        if process.next_look.get(directory, now) <= now:
            process.next_look[directory] = now + EVERY
            sweep(directory)

    def release(self) -> None:
        """No file of ours is left. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()


def _ensure(process: _Process, directory: str, lock: _Lock) -> None:
    """Have the lock, where it should be: the directory may have been removed since, and made again."""
    path = process.lock_path(directory)
    while lock.fd < 0 or not _is_at(lock.fd, path):
        if lock.fd >= 0:
            os.close(lock.fd)
            lock.fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return  # no file can be made here
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:  # no locks in this file system
            os.close(fd)
            os.unlink(path)
            return
        lock.fd = fd  # and again, if somebody took it for a dead process's before we had locked it


def _is_at(fd: int, path: str) -> bool:
    try:
        there, here = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _release(process: _Process, directory: str) -> None:
    # It may be a garbage collection that calls this, within anything, also with the guard held by this thread.
    process.released.append(directory)
    _settle(process)


def _settle(process: _Process) -> None:
    """Do what was released, unless somebody is at it, who then does this too."""
    while process.released and process is _own and process.guard.acquire(blocking=False):
        try:
            while process.released:
                directory = process.released.popleft()
                lock = process.locks[directory]
                lock.count -= 1
                if not lock.count:
                    _unlock(process, directory)
        finally:
            process.guard.release()


def _unlock(process: _Process, directory: str) -> None:
    lock = process.locks.pop(directory)
    if lock.fd >= 0:
        with contextlib.suppress(OSError):
            os.unlink(process.lock_path(directory))  # before it is let go: only who has the lock may remove it
        os.close(lock.fd)


@atexit.register
def _at_exit() -> None:
    """Let go of what is still held. Where files are left, the lock file stays, and the next process removes all."""
    with _own.guard:
        for directory in list(_own.locks):
            if not _files(directory, _own.token):
                _unlock(_own, directory)


def _in_child() -> None:
    """A forked child is a process of its own. By its copies of the parent's locks they would outlive the parent."""
    global _own
    parent, _own = _own, _new_process()
    for lock in parent.locks.values():
        if lock.fd >= 0:
            os.close(lock.fd)


os.register_at_fork(after_in_child=_in_child)


# -- what dead processes left


@dataclass(frozen=True, slots=True)
class TemporaryFile:
    """What a dead process has left: a file, or a directory of ZODB's. `age`: seconds since it was changed or moved."""

    path: str
    bytes: int
    age: float


def sweep(directory: str, *, old: float = OLD, dry_run: bool = False) -> list[TemporaryFile]:
    """Remove the temporary files of dead processes from a directory; returns what they were.

    Parameters
    ----------
    old
        The age at which a file that no lock speaks for is removed.
    dry_run
        Remove nothing.

    Notes
    -----
    Any number of processes may do this at a time. A living process's files are not touched, unless there are no
    locks, or it runs on another host, and they are `old`. What cannot be removed stays, and is not returned.
    """
    names = _names(directory)
    locked = {match[1] for name in names if (match := _LOCK.fullmatch(name))}
    loose = [name for name in names if (match := _FILE.fullmatch(name)) and match[1] not in {*locked, _own.token}]
    found = remove([os.path.join(directory, name) for name in loose], old, dry_run=dry_run)
    for token in sorted(locked - {_own.token}):
        with contextlib.suppress(OSError):
            found += _sweep_locked(directory, token, old, dry_run)
    return found


def _sweep_locked(directory: str, token: str, old: float, dry_run: bool) -> list[TemporaryFile]:
    """The files of one process, if it does not hold its lock."""
    path = os.path.join(directory, f".zbig-{token}.lock")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        info = os.fstat(fd)
        age = 0.0 if token.startswith(BOOT) else old
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return []  # it lives
        except OSError:  # no locks in this file system
            age = old
        if not stat.S_ISREG(info.st_mode) or not _is_at(fd, path):
            return []  # (somebody else was faster)
        # now that it can make no more of them
        files = [p for p in _files(directory, token) if os.lstat(p).st_uid == info.st_uid]
        found = remove(files, age, dry_run=dry_run)
        if not dry_run and not _files(directory, token):
            remove([path], age)
        return found
    finally:
        os.close(fd)


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _files(directory: str, token: str) -> list[str]:
    names = [name for name in _names(directory) if (match := _FILE.fullmatch(name)) and match[1] == token]
    return [os.path.join(directory, name) for name in names]


def remove(paths: Iterable[str], old: float, *, dry_run: bool = False) -> list[TemporaryFile]:
    """Remove those files and directories that have not been changed, nor moved, for so many seconds."""
    removed = []
    for path in paths:
        with contextlib.suppress(OSError):
            file = _measure(path)
            if file.age < old:
                continue
            if not dry_run:
                _delete(file.path)
            removed.append(file)
    return removed


def _measure(path: str) -> TemporaryFile:
    info = os.lstat(path)
    size, changed = info.st_size, _changed(info)
    if stat.S_ISDIR(info.st_mode):
        size = 0
        for folder, _, names in os.walk(path):
            for name in names:
                inside = os.lstat(os.path.join(folder, name))
                size, changed = size + inside.st_size, max(changed, _changed(inside))
    return TemporaryFile(path, size, max(0.0, time.time() - changed))


def _changed(info: os.stat_result) -> float:
    return max(info.st_mtime, info.st_ctime)


def _delete(path: str) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)
