"""A real cluster of two processes over a real server: one snapshot to read, one atomic save to write."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time

import dask
import dask.array as da
import numpy as np
import pytest
import transaction
import ZODB
from distributed import Client, LocalCluster, wait
from distributed.comm import tcp
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils import nbytes
from ZODB.POSException import ConflictError

import dask_zbig as dz
from dask_zbig import database
from dask_zbig.cluster.staging import ROOT_KEY
from dask_zbig.errors import DatabaseUnavailableError

TIMEOUT = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with dz.serve(tmp_path_factory.mktemp("cluster") / "x.fs") as uri:
        yield uri


@pytest.fixture(scope="module")
def cluster():
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "20s", "distributed.scheduler.allowed-failures": 5}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=60) as cluster,
    ):
        yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster) as client:
        both(client, cluster)
        yield client


def both(client, cluster):
    """Wait for both workers."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            client.wait_for_workers(2, timeout=10)
            return
        except (TimeoutError, asyncio.TimeoutError):
            assert time.monotonic() < deadline, "the workers do not start"
            cluster.scale(2)  # now and then a nanny ends with its worker


class User:
    """A database client and a connection of its own."""

    def __init__(self, uri):
        self.db = dz.open(uri)
        self.connection = self.db.open(transaction.TransactionManager())

    @property
    def root(self):
        return self.connection.root()

    def begin(self):
        self.db.storage.ping()
        self.connection.transaction_manager.begin()

    def commit(self):
        self.connection.transaction_manager.commit()

    def abort(self):
        self.connection.transaction_manager.abort()

    def new(self, name, data, order="C"):
        self.root[name] = array = dz.ZBigArray(data.shape, data.dtype, order)
        array[...] = data
        self.commit()
        return array

    def close(self):
        if self.connection.opened is not None:
            self.abort()
            self.connection.close()
        self.db.close()


@pytest.fixture
def users(server):
    """Makes users. What they store is removed at the end."""
    made = []

    def make():
        made.append(User(server))
        return made[-1]

    yield make
    for user in made:
        user.close()
    last = User(server)
    assert list(last.root.get(ROOT_KEY, ())) == []
    for name in list(last.root):
        if name != ROOT_KEY:
            del last.root[name]
    last.commit()
    last.close()


@pytest.fixture
def user(users, client):
    return users()


class Background:
    """Calls `step(k)` again and again in a thread, until the ``with`` ends. Its errors are raised there."""

    def __init__(self, step):
        self._step = step
        self._stop = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error = None
        self.count = 0

    def _run(self):
        try:
            while not self._stop.is_set():
                self._step(self.count)
                self.count += 1
                self._first.set()
        except BaseException as error:  # noqa: BLE001 - raised in the test
            self._error = error
        finally:
            self._first.set()

    def __enter__(self):
        self._thread.start()
        assert self._first.wait(TIMEOUT)
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error


# -- reading


def test_a_sum_while_another_client_commits_all_the_time(user, users):
    array = user.new("A", np.arange(100_000).reshape(100, 1000))
    other = users()

    def change(k):
        other.begin()
        target = other.root["A"]
        target[k % 100 :: 30] += 1
        if k % 5 == 0:
            target.append(np.full((3, 1000), k))
        other.commit()

    sums = set()
    with Background(change) as changes:
        for _ in range(4):
            user.begin()
            before = changes.count
            x = dz.from_zbigarray(array, chunks=(20, 400))
            expected = np.array(array[:])
            assert int(x.sum().compute()) == expected.sum()
            assert np.array_equal(x[::3, ::-1].compute(), expected[::3, ::-1])
            assert int(x.max().compute()) == expected.max()
            while changes.count == before and changes._thread.is_alive():  # it has had no turn yet
                assert int(x.sum().compute()) == expected.sum()
            assert changes.count > before
            sums.add(int(expected.sum()))
    assert len(sums) > 1


def test_a_snapshot_stays_while_its_array_is_packed_away(user):
    """As long as somebody has it mapped. Whoever else reads it gets the same, or an error that says so."""
    data = np.arange(300_000.0)
    array = user.new("A", data)
    x = dz.from_zbigarray(array, chunks=100_000)
    kept = x.persist()
    wait(kept, TIMEOUT)
    array[:] = 0
    array.resize(5)
    user.commit()
    user.db.pack()
    assert float(kept.sum().compute()) == data.sum()
    with contextlib.suppress(dz.SnapshotError, dz.LoadError):  # (see test_source.py for who must get that)
        assert float(x[::2].sum().compute()) == data[::2].sum()
    with pytest.raises((dz.SnapshotError, dz.LoadError)):  # a process that has had nothing of it
        x[::2].sum().compute(scheduler="processes", num_workers=1)


def test_by_uri_without_opening_it_here(user, client, tmp_path):
    """The client asks a worker where the array is, and what."""
    with dz.serve(tmp_path / "other.fs") as uri:
        elsewhere = User(uri)
        elsewhere.root["group"] = {}
        elsewhere.root["group"]["A"] = A = dz.ZBigArray((100, 10), "i8")
        A[...] = 3
        elsewhere.commit()
        alias = database.location(elsewhere.db).alias
        elsewhere.close()
        x = dz.from_zbigarray(uri, "group/A", chunks=(10, 10))
        assert x.shape == (100, 10)
        assert int(x.sum().compute()) == 3000
        with pytest.raises(dz.NotStoredError, match="group/B"):
            dz.from_zbigarray(uri, "group/B")
        assert database._registry.find(alias) is None
        assert alias not in database._registry._kept

        def close():  # (workers cannot import this module)
            from dask_zbig import database

            db = database._registry.find(alias)
            if db:  # not each of them has opened it
                db.close()

        client.run(close)


def test_chunks_travel_by_reference(user, client, cluster):
    data = np.arange(3_000_000.0).reshape(3000, 1000)
    array = user.new("A", data)
    one, two = client.scheduler_info(n_workers=-1)["workers"]
    x = dz.from_zbigarray(array, chunks=(500, 1000))
    with dask.annotate(workers=[one], allow_other_workers=False):
        kept = x.map_blocks(lambda block: block[::2]).persist(optimize_graph=False)
    wait(kept, TIMEOUT)
    sizes = [task.nbytes for key, task in cluster.scheduler.tasks.items() if key[0] == kept.name]
    assert len(sizes) == 6
    assert sum(sizes) < 6 * 1024
    with dask.annotate(workers=[two], allow_other_workers=False):
        total = kept.sum()
        assert float(total.compute(optimize_graph=False)) == data.reshape(6, 500, 1000)[:, ::2].sum()
    block = kept.blocks[2].compute()
    assert np.array_equal(block, data[1000:1500:2])
    assert block.flags.writeable
    (future,) = [f for f in client.futures_of(kept) if f.key[1] == 3]
    assert type(future.result(TIMEOUT)).__name__ == "Chunk"  # of this process's own mapping
    assert np.array_equal(future.result(TIMEOUT), data[1500:2000:2])


def test_what_dask_does_with_arrays(user):
    data = np.random.default_rng(0).random((120, 90, 5))
    array = user.new("A", data, "F")
    x = dz.from_zbigarray(array, chunks=(40, 40, 2))
    assert np.allclose(x.mean(axis=0).compute(), data.mean(axis=0))
    assert np.array_equal(x.rechunk((120, 10, 5)).compute(), data)
    assert np.array_equal(x.T.compute(), data.T)
    smooth = x.map_overlap(lambda b: b + np.roll(b, 1, 0), depth=1, boundary="periodic").compute()
    assert np.allclose(smooth, data + np.roll(data, 1, 0))
    with pytest.raises(ValueError, match="to_zbigarray"):  # workers have a snapshot, which cannot be written to
        da.store(x, array, lock=False)


def test_a_view_is_scattered_by_value(user, client):
    data = np.random.default_rng(0).random((300, 1000))
    array = user.new("A", data)
    view = array[100:200, ::2]
    future = client.scatter(view)
    view[...] = 0
    assert np.array_equal(client.submit(np.negative, future).result(TIMEOUT), -data[100:200, ::2])
    user.abort()


# -- writing


def whole_or_nothing(user, names):
    """Looks at the arrays in one snapshot, and says how many were written."""
    user.begin()
    firsts = [user.root[name][:].reshape(-1)[[0, -1]] for name in names]
    return [bool(v) for first in firsts for v in first]


def test_abort_leaves_nothing_visible(user, users):
    array, other = user.new("B", np.zeros((500, 300))), users()
    result = dz.to_zbigarray(da.ones((500, 300), chunks=(77, 300)), array)
    assert result.tid is None
    assert result.bytes == 500 * 300 * 8
    assert array[:].all()  # it is part of this transaction
    assert not any(whole_or_nothing(other, ["B"]))
    assert list(other.root[ROOT_KEY]) == [result.job_id]
    user.abort()
    assert not array[:].any()
    assert not any(whole_or_nothing(other, ["B"]))
    assert list(other.root[ROOT_KEY]) == []
    user.commit()
    assert not any(whole_or_nothing(other, ["B"]))


def test_commit_shows_everything_at_once(user, users):
    names = ["B", "C", "D"]
    arrays = [user.new(name, np.zeros((400, 250))) for name in names]
    other, seen = users(), []
    with Background(lambda k: seen.append(whole_or_nothing(other, names))):
        for array in arrays:
            dz.to_zbigarray(da.ones((400, 250), chunks=(90, 100)), array)
        user.root["done"] = True
        user.commit()
    assert whole_or_nothing(other, names) == [True] * 6
    assert other.root["done"]
    assert seen[0] == [False] * 6
    assert all(len(set(state)) == 1 for state in seen)


def test_a_coordinator_with_all_kinds_of_arrays(user, users):
    rng = np.random.default_rng(3)
    data = rng.random((700, 333))
    whole = user.new("whole", np.zeros((700, 333)))
    columns = user.new("columns", np.zeros((700, 333), "f4"), "F")
    parts = user.new("parts", np.full((900, 400), -1.0))
    log = user.new("log", np.zeros((2, 333)))
    x = da.from_array(data, chunks=(123, 100))
    with dz.CommitCoordinator(user.connection) as save:
        save.store(x, whole)
        save.store(x, columns)
        save.store(x[::-1, ::2], parts, region=np.s_[899:199:-1, 7:174])
        save.append(x.sum(axis=0, keepdims=True), log)
    other = users()
    assert np.array_equal(other.root["whole"][:], data)
    assert np.array_equal(other.root["columns"][:], data.astype("f4"))
    expected = np.full((900, 400), -1.0)
    expected[899:199:-1, 7:174] = data[::-1, ::2]
    assert np.array_equal(other.root["parts"][:], expected)
    assert np.allclose(other.root["log"][2], data.sum(axis=0))
    journal = other.root["log"]._file.journal
    assert journal.jobs == (save.result.job_id,)
    assert save.result.tid == journal._p_serial
    assert save.result.bytes == (700 * 333) * 8 + 700 * 333 * 4 + 700 * 167 * 8 + 333 * 8


def test_an_exception_saves_nothing(user, users):
    array = user.new("B", np.zeros(50_000))

    def broken(block):
        raise ZeroDivisionError("in a task")

    with pytest.raises(KeyError), dz.CommitCoordinator(user.connection) as save:  # noqa: PT012
        save.store(da.ones(50_000, chunks=9000), array)
        raise KeyError
    with pytest.raises(ZeroDivisionError), dz.CommitCoordinator(user.connection) as save:  # noqa: PT012
        save.store(da.ones(50_000, chunks=9000), array)
        save.store(da.ones(10).map_blocks(broken, dtype="f8", meta=np.empty(0)), array, region=np.s_[:10])
    assert not array[:].any()
    assert not users().root["B"][:].any()


def test_reading_and_writing_one_array_in_one_graph(user, users):
    data = np.arange(400_000.0).reshape(1000, 400)
    array = user.new("A", data)
    x = dz.from_zbigarray(array, chunks=(150, 400))
    dz.to_zbigarray(x[::-1] + x, array)
    user.commit()
    assert np.array_equal(users().root["A"][:], data[::-1] + data)
    assert np.array_equal(x.compute(), data)  # still that snapshot


def test_pack_between_staging_and_publishing_loses_nothing(user, users):
    array, other = user.new("B", np.zeros(300_000)), users()
    values = np.random.default_rng(5).random(300_000)
    dz.to_zbigarray(da.from_array(values, chunks=70_000), array)
    other.db.pack()
    user.commit()
    other.db.pack()
    late = users()
    assert np.array_equal(late.root["B"][:], values)


# -- two clients


def test_two_clients_write_different_regions(user, users):
    array, other = user.new("B", np.zeros(100_000)), users()
    twin = other.root["B"]
    with dz.CommitCoordinator(other.connection) as late:
        late.store(da.full(50_000, 2.0, chunks=20_000), twin, region=np.s_[50_000:])
        with dz.CommitCoordinator(user.connection) as early:
            early.store(da.full(50_000, 1.0, chunks=20_000), array, region=np.s_[:50_000])
    assert early.result.tid < late.result.tid
    seen = users().root["B"][:]
    assert (seen[:50_000] == 1).all()
    assert (seen[50_000:] == 2).all()


def test_two_clients_at_the_same_time(user, users):
    user.new("B", np.zeros((40, 10_000)))
    barrier = threading.Barrier(2, timeout=TIMEOUT)
    failures = []

    def save(start, own):
        try:
            for k in range(5):
                own.begin()
                barrier.wait()
                with dz.CommitCoordinator(own.connection) as save:
                    x = da.full((20, 10_000), float(k + 1), chunks=(7, 10_000))
                    save.store(x, own.root["B"], region=np.s_[start::2])
        except BaseException as error:  # noqa: BLE001 - for the test to see
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=save, args=(start, users())) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert failures == []
    assert (users().root["B"][:] == 5).all()


def test_two_clients_write_the_same_bytes(user, users):
    array, other = user.new("B", np.zeros(100_000)), users()
    side = other.new("C", np.zeros(10))
    user.begin()
    twin = other.root["B"]
    with pytest.raises(ConflictError), dz.CommitCoordinator(other.connection) as late:  # noqa: PT012
        late.store(da.full(50_000, 2.0, chunks=20_000), twin, region=np.s_[40_000:90_000])
        late.store(da.ones(10), side)
        with dz.CommitCoordinator(user.connection) as early:
            early.store(da.full(50_000, 1.0, chunks=20_000), array, region=np.s_[:50_000])
    assert late.result is None
    late.discard()
    assert early.result.tid is not None
    third = users()
    assert third.root["B"][:].sum() == 50_000
    assert not third.root["C"][:].any()
    other.begin()
    with dz.CommitCoordinator(other.connection) as again:
        again.store(da.full(50_000, 2.0, chunks=20_000), twin, region=np.s_[40_000:90_000])
    third.begin()
    assert third.root["B"][:].sum() == 40_000 + 2 * 50_000


# -- workers that die


class Killer(SchedulerPlugin):
    """Kills the worker that has done the `n`-th staging task."""

    def __init__(self, n, pids):
        self.n = n
        self.pids = pids
        self.killed = None
        self.done = []

    def transition(self, key, start, finish, *args, worker="", **kwargs):
        if finish == "memory" and "zbig-stage" in str(key):
            self.done.append(key)
            if len(self.done) == self.n and worker in self.pids:
                self.killed = self.pids[worker]
                os.kill(self.killed, signal.SIGKILL)


@pytest.mark.parametrize("n", [1, 5])
def test_a_worker_is_killed_in_the_middle(user, users, client, cluster, n):
    values = np.random.default_rng(n).random((600, 500))
    array = user.new("B", np.zeros((600, 500)))
    killer = Killer(n, client.run(os.getpid))
    cluster.scheduler.add_plugin(killer, name="killer")
    try:
        with dz.CommitCoordinator(user.connection) as save:
            save.store(da.from_array(values, chunks=(50, 250)), array)
    finally:
        cluster.scheduler.remove_plugin("killer")
    assert killer.killed
    assert len(killer.done) > 24  # what it had staged was staged again
    assert np.array_equal(users().root["B"][:], values)
    assert save.result.segments == 24
    both(client, cluster)


def test_a_worker_dies_while_it_reads_and_computes(user, users, client, cluster, tmp_path):
    def die_once(block, marker):  # (not of this module, which workers cannot import)
        """Kill the worker that gets here first."""
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return block
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    data = np.arange(500_000.0)
    array = user.new("A", data)
    x = dz.from_zbigarray(array, chunks=40_000)
    marker = str(tmp_path / "died")
    with dz.CommitCoordinator(user.connection) as save:
        save.store(x.map_blocks(die_once, marker, dtype="f8", meta=np.empty(0)) * 2, array)
    assert os.path.exists(marker)
    assert np.array_equal(users().root["A"][:], data * 2)
    both(client, cluster)


# -- what cannot work


@pytest.mark.parametrize("kind", ["filestorage", "mapping"])
def test_a_database_that_only_one_process_can_open(client, tmp_path, kind):
    db = dz.open(tmp_path / "y.fs") if kind == "filestorage" else ZODB.DB(None)
    connection = db.open(transaction.TransactionManager())
    connection.root()["A"] = array = dz.ZBigArray(1000)
    connection.transaction_manager.commit()
    with pytest.raises(DatabaseUnavailableError, match="serve it"):
        dz.from_zbigarray(array, chunks=500).sum().compute()
    with pytest.raises(DatabaseUnavailableError, match="serve it"):
        dz.to_zbigarray(da.ones(1000, chunks=500), array)
    assert list(connection.root().get(ROOT_KEY, ())) == []
    with dask.config.set(scheduler="threads"):
        dz.to_zbigarray(da.ones(1000, chunks=500), array)
    connection.transaction_manager.commit()
    assert array[:].all()
    connection.close()
    db.close()


def test_bad_input_costs_nothing(user, cluster):
    """It is refused before anything is computed."""
    array = user.new("B", np.zeros((10, 4), "i4"))
    before = set(cluster.scheduler.tasks)
    unknown = da.ones(10, chunks=5)[da.ones(10, chunks=5) > 0]
    for x, region, error in [
        (da.ones((10, 5), dtype="i4"), None, dz.ShapeError),
        (da.ones((10, 4)), None, dz.DTypeError),
        (unknown, np.s_[:, 0], dz.ShapeError),
        (da.from_array(np.array([[None]]), chunks=1), np.s_[:1, :1], dz.DTypeError),
    ]:
        with pytest.raises(error):
            dz.to_zbigarray(x, array, region)
    fresh = dz.ZBigArray(3)
    with pytest.raises(dz.NotStoredError):
        dz.from_zbigarray(fresh)
    array[0] = 1
    with pytest.raises(dz.UncommittedChangesError):
        dz.from_zbigarray(array)
    assert set(cluster.scheduler.tasks) <= before  # (some may have gone meanwhile)


@pytest.fixture
def traffic(monkeypatch):
    """The bytes that this process, which is client and scheduler, has sent and received."""
    counted = [0]
    to_frames, from_frames = tcp.to_frames, tcp.from_frames

    async def counting_to(*args, **kwargs):
        frames = await to_frames(*args, **kwargs)
        counted[0] += sum(map(nbytes, frames))
        return frames

    async def counting_from(frames, *args, **kwargs):
        counted[0] += sum(map(nbytes, frames if isinstance(frames, (list, tuple)) else [frames]))
        return await from_frames(frames, *args, **kwargs)

    monkeypatch.setattr(tcp, "to_frames", counting_to)
    monkeypatch.setattr(tcp, "from_frames", counting_from)
    return counted


def save_much(user, traffic, size, chunk):
    user.root["much"] = array = dz.ZBigArray(size, "u1")
    user.commit()
    before = traffic[0]
    with dz.CommitCoordinator(user.connection) as save:
        save.store(da.full(size, 7, dtype="u1", chunks=chunk), array)
    passed = traffic[0] - before
    assert (save.result.bytes, save.result.segments) == (size, -(-size // chunk))
    assert array[size - 1] == 7
    return passed


def test_what_is_saved_does_not_pass_through_scheduler_and_client(user, traffic):
    passed = save_much(user, traffic, 256 << 20, 16 << 20)
    assert 1000 < passed < 8 << 20  # (heartbeats are counted, too)


@pytest.mark.slow
def test_of_4_gib_less_than_10_mb_pass_through_scheduler_and_client(user, traffic):
    passed = save_much(user, traffic, 4 << 30, 64 << 20)
    assert 1000 < passed < 10_000_000
