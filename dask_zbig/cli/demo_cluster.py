"""The demo's workers, and an eye on their tasks: for the progress bar, and to kill one at the right moment."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dask.config
from distributed import Client, LocalCluster
from distributed.diagnostics.plugin import SchedulerPlugin

from dask_zbig.signals import ctrl_c_not_inherited

__all__ = ["MEMORY", "Watch", "cluster"]

MEMORY = "512 MiB"  # of a worker: less than the array
_WRITES = "zbig-stage"  # in the names of tasks that write
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Watch(SchedulerPlugin):  # type: ignore[misc]
    """Counts a cluster's tasks. Called in the scheduler's thread, which is one of ours.

    Attributes
    ----------
    killed : int
        The process that was killed, or 0.
    killed_after, staged_total, again : int
        How many writing tasks were done by then, how many there are, how many were done more than once.
    """

    def __init__(self) -> None:
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self.killed = self.killed_after = self.again = self.staged_total = 0
        self._pids: dict[str, int] = {}
        self._total = 0
        self._done: set[Any] = set()
        self._staged: set[Any] = set()

    def begin(self, progress: Callable[[int, int], None]) -> None:
        """Count from 0, and show it."""
        self._total, self._done = 0, set()
        self.progress = progress

    def kill_in_the_middle(self, pids: dict[str, int]) -> None:
        """Kill a worker as soon as a third of the writing tasks is done: the one that has just done one."""
        self._pids = pids

    def update_graph(self, scheduler: Any, *, tasks: Any, **kwargs: Any) -> None:
        self._total += len(tasks)
        self.staged_total += sum(_WRITES in str(task) for task in tasks)

    def transition(self, key: Any, start: str, finish: str, *args: Any, worker: str = "", **kwargs: Any) -> None:
        if finish != "memory":
            return
        self._done.add(key)
        self.progress(len(self._done), self._total)
        if _WRITES in str(key):
            self.again += key in self._staged
            self._staged.add(key)
            if worker in self._pids and not self.killed and 3 * len(self._staged) >= self.staged_total:
                self.killed, self.killed_after = self._pids[worker], len(self._staged)
                os.kill(self.killed, signal.SIGKILL)


@contextmanager
def cluster(workers: int, directory: str) -> Iterator[tuple[Any, Watch]]:
    """Worker processes of one thread each, used by Dask's ``compute`` while the block lasts."""
    with (
        dask.config.set({"temporary-directory": directory}),
        _start(workers) as local,
        Client(local) as client,
    ):
        watch = Watch()
        local.scheduler.add_plugin(watch)
        yield client, watch


def _start(workers: int) -> Any:
    with ctrl_c_not_inherited():  # by the workers, nor by the thread here that starts them
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=MEMORY,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            env=_THREADS,
            preload=["dask_zbig"],
        )
