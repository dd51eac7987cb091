"""Giving back the pages of living chunks, before Dask's memory monitor takes them for used memory.

Pages of mapped files are the kernel's to evict, but they count as a process's resident memory; a worker that has
computed on more of them than its limit would be paused, then killed. A chunk's pages go when it dies. Of those
that are kept (persisted ones, say) pages are given back here, after every `BYTES` that were computed on. They come
back from the page cache when they are touched again.
"""

from __future__ import annotations

import threading
import weakref

from dask_zbig.memory.space import Window

__all__ = ["BYTES", "keep_low", "touched"]

#: 256 MiB: giving back and touching again costs some per cent of reading that much once.
BYTES = 1 << 28

_lock = threading.Lock()
_windows: weakref.WeakSet[Window] = weakref.WeakSet()
_count = 0


def keep_low(window: Window) -> None:
    """Give back this window's pages, too. It must be one that is only read."""
    with _lock:
        _windows.add(window)


def touched(size: int) -> None:
    """`size` bytes of some chunks have been computed on. Thread-safe."""
    global _count
    with _lock:
        _count += size
        if _count < BYTES:
            return
        _count = 0
        windows = list(_windows)
    for window in windows:
        window.release()
