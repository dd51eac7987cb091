"""Workers whose memory limit is a fraction of the array that they read."""

from __future__ import annotations

import logging
import mmap
import os
import types

import dask
import numpy as np
import pytest
import transaction
from distributed import Client, LocalCluster, get_worker
from distributed.diagnostics.plugin import SchedulerPlugin

import dask_zbig as dz
from dask_zbig.cluster.memory import NannyMemory, WorkerMemory, charged

MIB = 1 << 20


class Events(SchedulerPlugin):
    """Notes what the memory monitors do to workers."""

    def __init__(self):
        self.seen = []

    def add_worker(self, scheduler, worker):
        self.seen.append("added")

    def remove_worker(self, scheduler, worker, **kwargs):
        self.seen.append("removed")


@pytest.fixture
def served(tmp_path):
    with dz.serve(tmp_path / "x.fs") as uri:
        db = dz.open(uri)
        conn = db.open(transaction.TransactionManager())
        yield conn
        conn.transaction_manager.abort()
        conn.close()
        db.close()


def fill(conn, size):
    conn.root()["A"] = A = dz.ZBigArray(size // 8, "f8")
    step = 64 * MIB // 8
    for start in range(0, len(A), step):
        A[start : start + step] = np.arange(start, start + step)
        conn.transaction_manager.commit()
    return A


def check(conn, limit, size):
    def watch_pauses(dask_worker):  # (workers cannot import this module)
        """In a worker: count how often it is paused, and what it spills."""
        logger = logging.getLogger("distributed.worker.memory")
        dask_worker.zbig_texts = texts = []
        handler = logging.Handler()
        handler.emit = lambda record: texts.append(record.getMessage())
        logger.addHandler(handler)

    def what_happened(dask_worker):
        return dask_worker.zbig_texts, sorted(os.listdir(os.path.join(dask_worker.local_directory, "storage")))

    A = fill(conn, size)
    expected = float(len(A) * (len(A) - 1) // 2)
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit=limit, dashboard_address=None, silence_logs=logging.ERROR
        ) as cluster,
        Client(cluster) as client,
    ):
        events = Events()
        client.register_plugin(events)
        client.run(watch_pauses)
        x = dz.from_zbigarray(A, chunks=32 * MIB // 8)
        assert float(x.sum().compute()) == pytest.approx(expected)
        kept = x.persist()
        for _ in range(2):
            assert float(kept.sum().compute()) == pytest.approx(expected)
        assert float((kept + 1).max().compute()) == len(A)
        (happened,) = client.run(what_happened).values()
        assert happened == ([], [])
        assert events.seen == []
        assert client.submit(lambda: "dask_zbig-memory" in get_worker().plugins).result(60)


def test_a_worker_reads_four_times_its_limit(served):
    check(served, 400 * MIB, 1600 * MIB)


@pytest.mark.slow
def test_a_worker_of_1_gib_reads_4_gib(served):
    check(served, 1024 * MIB, 4096 * MIB)


def test_memory_that_is_really_used_still_counts(served):
    """The monitors are not switched off: a task that takes memory for good gets its worker killed."""
    A = fill(served, 64 * MIB)
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit=400 * MIB, dashboard_address=None, silence_logs=60
        ) as cluster,
        Client(cluster) as client,
    ):
        assert dz.from_zbigarray(A).max().compute() == len(A) - 1
        future = client.submit(lambda: np.ones(600 * MIB // 8).sum() + __import__("time").sleep(200), pure=False)
        with pytest.raises(Exception, match=r"KilledWorker|died"):
            future.result(200)


def test_charged_is_without_mapped_files(tmp_path):
    before = charged(os.getpid())
    path = tmp_path / "x"
    path.write_bytes(bytes(64 * MIB))
    mapped = np.memmap(path, "u1", "r")
    assert mapped.sum() == 0
    assert charged(os.getpid()) - before < 16 * MIB
    with mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:  # (malloc's may be resident already)
        np.frombuffer(held, "u1")[:] = 1
        assert charged(os.getpid()) - before > 48 * MIB
    with pytest.raises(OSError, match="No such file"):
        charged(1 << 30)


def test_a_dask_with_other_insides_is_left_alone(caplog):
    """And said so."""
    worker = types.SimpleNamespace(monitor=types.SimpleNamespace())
    WorkerMemory().setup(worker)
    WorkerMemory().teardown(worker)
    assert vars(worker.monitor) == {}
    nanny = types.SimpleNamespace(periodic_callbacks={"memory_monitor": object()})
    NannyMemory().setup(nanny)
    NannyMemory().teardown(nanny)
    NannyMemory().setup(types.SimpleNamespace())
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "this Dask's workers measure memory in a way unknown to dask_zbig",
        "this Dask's nannies measure memory in a way unknown to dask_zbig",
    ]
