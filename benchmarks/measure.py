"""What the sides share: the data, databases, clocks and counts."""

from __future__ import annotations

import contextlib
import glob
import mmap
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import transaction

import dask_zbig as dz

STEP = 64 << 20  # bytes written between two syncs
Put = Callable[[int, np.ndarray], object]


def source() -> np.ndarray:
    """The 64 MiB that are written again and again."""
    return np.arange(STEP // 8, dtype="f8")


def check(total: float, mib: int) -> None:
    """The sum of an array that was filled with the source must be right."""
    expected = float(source().sum()) * ((mib << 20) // STEP)
    assert abs(total / expected - 1) < 1e-9, (total, expected)


def warm(size: int) -> None:
    """Touch memory, right before the clock starts: the first use of a page of a virtual machine's host takes long.

    In huge pages, which come from where the page cache will take its own. Where free memory is reported to the host
    (a balloon's free page reporting does so within a second or two), just such pages are given back to it.
    """
    if size:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, "u1")[...] = 1


def fill(mib: int, put: Put, sync: Callable[[], object], *, copies: int = 1) -> dict[str, float]:
    """Put the source at every 64 MiB, and sync after each: seconds, those of the syncs, and the rest.

    `copies`: how many times it will lie in the page cache.
    """
    data, synced = source(), 0.0
    warm((mib << 21) * copies)
    start = time.perf_counter()
    for at in range(0, mib << 17, len(data)):
        put(at, data)
        t = time.perf_counter()
        sync()
        synced += time.perf_counter() - t
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "sync": synced, "fill": seconds - synced}


@contextlib.contextmanager
def opened(where: str) -> Iterator[Any]:
    """A connection to a database that is open for as long as the block lasts."""
    db = dz.open(where)
    connection = db.open()
    try:
        yield connection
    finally:
        transaction.abort()
        connection.close()
        db.close()


@contextlib.contextmanager
def served(path: str, *, cache: str | None = None) -> Iterator[str]:
    """The URI of a ZEO server; clients share its blob directory or, with `cache`, keep one of their own there."""
    with dz.serve(path, shared_blob_dir=cache is None) as uri:
        yield uri if cache is None else f"{uri}?blob_dir={cache}"


def discard(path: str) -> None:
    """Remove a database that nobody reads any more: it takes page cache from those that follow."""
    for name in glob.glob(glob.escape(path) + "*"):
        if os.path.isdir(name):
            shutil.rmtree(name)
        else:
            os.unlink(name)


def reread(path: str) -> None:
    """Read all files of a database: who reads what was just written takes twice as long as who reads it after that."""
    for name in glob.glob(glob.escape(path) + "*"):
        for directory, _, files in os.walk(name) if os.path.isdir(name) else [(os.path.dirname(name), [], [name])]:
            for file in files:
                with open(os.path.join(directory, file), "rb", buffering=0) as opened_:
                    while opened_.read(4 << 20):
                        pass


def median_of(times: int, once: Callable[[], float]) -> float:
    """The median of what `once` returns."""
    return statistics.median(once() for _ in range(times))


def per_call(call: Callable[[], object], seconds: float = 0.2) -> float:
    """Seconds a call takes, when it is hot: the best of five loops."""
    times, spent = 1, 0.0
    while spent < seconds / 10:
        times *= 4
        spent = _loop(call, times)
    return min(_loop(call, times) for _ in range(5)) / times


def _loop(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def mappings() -> int:
    """How many mappings the process has; the kernel allows 65,530."""
    with open("/proc/self/maps", "rb") as maps:
        return sum(1 for _ in maps)


def anonymous() -> int:
    """Bytes of memory that belong to the process alone and that the kernel cannot drop."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def written() -> int:
    """Bytes that the process has asked the kernel to write."""
    with open("/proc/self/io") as io:
        return next(int(line.split()[1]) for line in io if line.startswith("wchar"))


class Peak:
    """The most anonymous memory that the process has while the block runs, above what it had before."""

    def __enter__(self) -> Peak:
        self._base, self.bytes, self._end = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self.bytes = max(self.bytes, anonymous() - self._base)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous() - self._base)


class Tree:
    """A directory whose files are to be durable: `sync` syncs what is new or changed in it since the last time."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: dict[str, tuple[int, int]] = {}

    def sync(self) -> None:
        """Sync files, and the directories that list new ones."""
        for path, _, names in os.walk(self._path):
            new = False
            for name in names:
                file = os.path.join(path, name)
                status = os.stat(file)
                if self._seen.get(file) != (status.st_mtime_ns, status.st_size):
                    new |= file not in self._seen
                    self._seen[file] = (status.st_mtime_ns, status.st_size)
                    sync_file(file)
            if new:
                sync_file(path)


def sync_file(path: str) -> None:
    """Sync a file or a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
