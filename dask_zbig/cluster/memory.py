"""What Dask's memory monitors count on workers that read our arrays: what the process really holds.

They count resident pages, and of those, pages of mapped files are the kernel's to evict. A worker that has summed
more of an array than its limit looks as if it had used it up: it would be paused, spill for nothing, and be killed by
its nanny. So on the first use of an array a worker has a pair of plugins registered, on all workers and nannies of its
cluster, by which only anonymous and shared memory counts. Nobody needs to set anything up.

Both touch attributes of Dask that it does not promise. Where they are missing nothing is changed, but for a warning.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

from distributed import NannyPlugin, WorkerPlugin, get_worker
from distributed.protocol.pickle import dumps

__all__ = ["NannyMemory", "WorkerMemory", "charged", "watch_memory"]

_log = logging.getLogger(__name__)
_watched: weakref.WeakSet[Any] = weakref.WeakSet()


def charged(pid: int) -> int:
    """Bytes of a process's memory that cannot be dropped: what is resident, without the pages of files.

    Raises
    ------
    OSError
        If there is no such process (any more).
    """
    with open(f"/proc/{pid}/status", "rb") as status:
        fields = [line.split() for line in status if line.startswith((b"RssAnon:", b"RssShmem:"))]
    return sum(int(kibibytes) << 10 for _, kibibytes, _ in fields)


class WorkerMemory(WorkerPlugin):  # type: ignore[misc]
    """Has a worker pause and spill by what is charged to it."""

    name = "dask_zbig-memory"
    idempotent = True

    def setup(self, worker: Any) -> None:
        monitor = worker.monitor
        if not callable(getattr(monitor, "get_process_memory", None)):
            _log.warning("this Dask's workers measure memory in a way unknown to dask_zbig: mapped files will count")
            return
        pid = os.getpid()
        monitor.get_process_memory = lambda: charged(pid)

    def teardown(self, worker: Any) -> None:
        vars(worker.monitor).pop("get_process_memory", None)


class NannyMemory(NannyPlugin):  # type: ignore[misc]
    """Keeps a nanny from killing a worker for its mapped files."""

    name = "dask_zbig-nanny-memory"
    restart = False

    def __init__(self) -> None:
        self._original: Callable[[], Any] | None = None

    def setup(self, nanny: Any) -> None:
        manager = getattr(nanny, "memory_manager", None)
        watcher = getattr(nanny, "periodic_callbacks", {}).get("memory_monitor")
        if watcher is None:
            return  # this worker has no limit
        fraction, limit = (getattr(manager, name, None) for name in ("memory_terminate_fraction", "memory_limit"))
        if not callable(getattr(watcher, "callback", None)) or not fraction or not limit:
            _log.warning("this Dask's nannies measure memory in a way unknown to dask_zbig: mapped files will count")
            return
        original = self._original = watcher.callback

        def watch() -> Any:
            process = nanny.process and nanny.process.process
            try:
                if process is not None and charged(process.pid) <= fraction * limit:
                    return None
            except OSError:
                return None  # it has ended
            return original()

        watcher.callback = watch

    def teardown(self, nanny: Any) -> None:
        watcher = getattr(nanny, "periodic_callbacks", {}).get("memory_monitor")
        if watcher is not None and self._original is not None:
            watcher.callback = self._original


def watch_memory() -> None:
    """Called in a task: have the plugins registered, once, by this worker. Does not wait for it."""
    try:
        worker = get_worker()
    except ValueError:
        return  # not a worker of dask.distributed
    if worker not in _watched:
        _watched.add(worker)
        worker.loop.add_callback(_register, worker)


async def _register(worker: Any) -> None:
    try:
        for register, plugin in (
            (worker.scheduler.register_worker_plugin, WorkerMemory()),
            (worker.scheduler.register_nanny_plugin, NannyMemory()),
        ):
            await register(plugin=dumps(plugin), name=plugin.name, idempotent=True)
    except Exception as e:  # noqa: BLE001 - whatever another version of Dask may do here, the task is not to suffer
        _log.warning("mapped files will count as used memory on %s: %s: %s", worker.address, type(e).__name__, e)
