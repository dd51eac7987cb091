"""Many threads on one view, while its connection commits, aborts and moves on."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from ZODB.POSException import ConflictError

from dask_zbig.memory._native import BLOCK

pytestmark = pytest.mark.stress

THREADS = 8
MIB = 1 << 20


class Team:
    """Threads that repeat something until they are stopped; the first error of any is raised at the end."""

    def __init__(self, *actions):
        self._stop = threading.Event()
        self._errors = []
        self._rounds = [0] * len(actions)
        self._threads = [threading.Thread(target=self._run, args=item) for item in enumerate(actions)]

    def _run(self, number, action):
        try:
            while not self._stop.is_set():
                action()
                self._rounds[number] += 1
        except BaseException as error:  # noqa: BLE001 - it is raised in the test's own thread
            self._errors.append(error)

    def everybody_has_run(self):
        return all(self._rounds) or bool(self._errors)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        for error in self._errors:
            raise error


def rounds(least, team):
    """At least this many, and until every thread has done something meanwhile."""
    k = 0
    while k < least or (not team.everybody_has_run() and k < 1000 * least):
        yield k
        k += 1


def test_readers_of_committed_data_never_see_anything_else(clients):
    """A page that is filled, dropped and filled again holds the same bytes always."""
    clients.new(8 * MIB, "u1")
    client = clients.connect()
    A = client.root["A"]
    a = A[:]
    expected = np.random.default_rng(0).integers(0, 256, 8 * MIB, "u1")
    a[:] = expected
    client.commit()
    half = 4 * MIB  # below it nobody writes

    def reader(seed):
        rng = np.random.default_rng(seed)

        def read():
            at = int(rng.integers(0, half - 70_000))
            np.testing.assert_array_equal(a[at : at + 70_000], expected[at : at + 70_000])

        return read

    with Team(*[reader(i) for i in range(THREADS)]) as team:
        for k in rounds(60, team):
            a[half + k * 1000 % half] = k
            (client.abort if k % 3 == 0 else client.commit)()
            if k % 5 == 0:
                client.connection.cacheMinimize()


def test_readers_see_whole_commits(clients):
    """What another client commits shows at the boundary only, all of it."""
    clients.new(4 * MIB, "u1")
    one, A, two, B = clients.pair()
    b = B[:]
    lock = threading.Condition()
    current = [0]

    def read():
        with lock:  # no boundary in between
            value = current[0]
            assert (b[:: BLOCK // 8] == value).all()
            assert b[-1] == value

    with Team(*[read] * 4) as team:
        for k in rounds(30, team):
            A[:] = (k + 1) % 256
            one.commit()
            with lock:
                two.begin()
                current[0] = (k + 1) % 256


def test_writers_of_one_page(clients):
    """Each thread has bytes of its own, next to the others' in the same pages; none is lost."""
    clients.new(64 * 4096, "u1")
    client = clients.connect()
    A = client.root["A"]
    a = A[:]

    def writer(number):
        mine = a[number::THREADS]

        def write():
            mine[:] = (mine[0] + 1) % 251

        return write

    with Team(*[writer(i) for i in range(THREADS)]) as team:
        for _ in rounds(100, team):
            client.commit()
    for number in range(THREADS):
        assert len(set(a[number::THREADS].tolist())) == 1
    client.commit()
    np.testing.assert_array_equal(clients.connect(other=True).root["A"][:], a)


def test_writers_of_many_blocks(clients):
    """Bulk writers, each of blocks of its own, while all is committed again and again."""
    size = THREADS * BLOCK
    clients.new(size, "u1")
    client = clients.connect()
    a = client.root["A"][:]

    def writer(number):
        mine = a[number * BLOCK : (number + 1) * BLOCK]
        value = [0]

        def write():
            assert (mine == value[0]).all()
            value[0] = (value[0] + 1) % 251
            mine[:] = value[0]

        return write

    with Team(*[writer(i) for i in range(THREADS)]) as team:
        for _ in rounds(15, team):
            client.commit()
    client.commit()
    b = clients.connect(other=True).root["A"][:]
    np.testing.assert_array_equal(a, b)
    assert all(len(set(part.tolist())) == 1 for part in b.reshape(THREADS, BLOCK)[:, ::4096])


def test_parallel_loads(clients):
    """Threads that read absent blocks of all at once get what was committed."""
    clients.new(16 * MIB, "u4")
    client = clients.connect()
    expected = np.arange(16 * MIB, dtype="u4")
    client.root["A"][:] = expected
    client.commit()
    for _ in range(5):
        reader = clients.connect(other=True)
        a = reader.root["A"][:]
        start = threading.Barrier(THREADS)
        wrong = []

        def read(seed, a=a, start=start, wrong=wrong):
            order = np.random.default_rng(seed).permutation(len(a) // 65536)
            start.wait(60)
            for k in order.tolist():
                part = slice(k * 65536, (k + 1) * 65536)
                if not (a[part] == expected[part]).all():
                    wrong.append(k)

        threads = [threading.Thread(target=read, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive()
        assert wrong == []
        reader.close()


def test_many_connections_in_threads(merging):
    """Each thread has a connection, and writes bytes of its own into the same pages; all commits are kept."""
    merging.new(100_000, "u1")
    count = 25
    errors = []

    def work(number):
        try:
            client = merging.connect(other=number % 2 == 0)
            A = client.root["A"]
            a = A[:]
            for k in range(count):
                while True:  # (in a storm of commits, one that joins small segments may conflict)
                    client.begin()
                    assert a[number] == k
                    a[number] = k + 1
                    a[50_000 + number * 100 + k] = number + 1
                    try:
                        client.commit()
                        break
                    except ConflictError:
                        client.abort()
            client.close()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    last = merging.connect()
    last.begin()
    a = last.root["A"][:]
    assert a[:THREADS].tolist() == [count] * THREADS
    for number in range(THREADS):
        assert (a[50_000 + number * 100 : 50_000 + number * 100 + count] == number + 1).all()
