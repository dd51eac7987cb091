"""Hot indexing goes a short way (`dask_zbig.memory.fastpath`): what it gives is what the long way would."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import transaction

import dask_zbig as dz
from dask_zbig.array.zbigarray import ZBigArray
from dask_zbig.errors import ForkError
from dask_zbig.memory._native import counters
from dask_zbig.memory.space import _Lease

N = 3000
INDICES = [5, -1, slice(10, 20), slice(-5, None), slice(0, 0), slice(8, 2), slice(None, None, 2), slice(None, None, -1)]


@pytest.fixture
def user(clients):
    clients.new((N, 7), "i4", name="A")
    clients.new(N, "f8", name="V")
    client = clients.connect()
    client.root["A"][...] = np.arange(N * 7).reshape(N, 7)
    client.root["V"][...] = np.arange(N)
    client.commit()
    return client


def hot(array):
    """Have the short way made."""
    array[...]
    path = array.__dict__["_v_path"]
    assert path.window is not None
    return path


def is_cut(array):
    path = array.__dict__.get("_v_path")
    return path is None or path.window is None


# guard: FastPath.cut, `_held = None`; removed -> the window is not idle after the commit
def test_the_base_of_views_stays_for_a_transaction(user):
    A = user.root["A"]
    hot(A)
    window = A.__dict__["_v_path"].window
    first = A[3:9].base
    assert A[10:20].base is first
    assert not window.idle
    del first
    user.commit()
    assert window.idle


# guard: FastPath._view, `lavish`; removed -> the pages stay for as long as the transaction lasts
def test_pages_are_given_back_in_a_long_transaction(clients):
    clients.new(64 << 20, "u1", name="B")
    B = clients.connect().root["B"]
    hot(B)
    window = B.__dict__["_v_path"].window
    step, idle = 1 << 20, 0
    for at in range(0, 64 << 20, step):
        assert not B[at : at + step].any()
        idle += window.idle
    assert 3 <= idle <= 6
    assert is_cut(B) or not window.lavish


@pytest.mark.parametrize("name", ["A", "V"])
def test_it_gives_what_numpy_gives(user, name):
    A = user.root[name]
    like = np.array(A)
    hot(A)
    more = [(3, 4), (-1, -7), (0, 0), (3,), (2, slice(1, 3))] if name == "A" else [(3,), (-1,)]
    for index in [*INDICES, *more, np.int64(3), True, None, ...]:
        given, wanted = A[index], like[index]
        assert type(given) is type(wanted), index
        np.testing.assert_array_equal(given, wanted)
        if isinstance(given, np.ndarray) and given.size and index is not True:
            assert np.shares_memory(given, A[...]), index
            assert given.strides == wanted.strides, index
    for index in [N, -N - 1, 1 << 70, (0, 7), (N, 0), (0, 0, 0), "x", 1.0]:
        with pytest.raises(IndexError):
            A[index]
        with pytest.raises(IndexError):
            A[index] = 1


def test_it_is_gone_by_for_what_is_hot_and_only_then(user, monkeypatch):
    A = user.root["A"]
    long_ways = []
    locate = ZBigArray._locate
    monkeypatch.setattr(ZBigArray, "_locate", lambda self, index: long_ways.append(index) or locate(self, index))
    A[5]
    assert long_ways == [5]
    A[5], A[5:9], A[5, 6]
    A[5, 6] = 1
    A[5:9] = 1
    assert long_ways == [5]
    user.commit()
    A[5]
    assert long_ways == [5, 5]


def test_what_is_not_mapped_is_fetched_by_a_call_not_by_a_fault(user):
    A = user.root["A"]
    path = hot(A)
    for use in (lambda: A[5], lambda: A[5:7], lambda: A[5, 6], lambda: A.__setitem__((5, 6), 41)):
        A._open().space.drop(0, 1 << 62)
        assert path.window is not None
        before = counters()["read_faults"]
        use()
        assert counters()["read_faults"] == before


@pytest.mark.parametrize("index", [7, (7,), slice(7, 9)])
def test_assignment(user, clients, index):
    V = user.root["V"]
    hot(V)
    V[index] = 2.5
    assert V[7] == 2.5
    user.commit()
    assert clients.connect().root["V"][7] == 2.5
    hot(V)
    with pytest.raises(ValueError, match="could not convert"):
        V[index] = "x"
    assert V[7] == 2.5


@pytest.mark.parametrize(
    "event",
    [
        lambda user, A: user.commit(),
        lambda user, A: user.abort(),
        lambda user, A: user.begin(),
        lambda user, A: A.resize(7, N),
        lambda user, A: A.append(np.zeros((1, 7), "i4")),
        lambda user, A: user.connection.cacheMinimize(),
    ],
    ids=["commit", "abort", "begin", "reshape", "append", "cacheMinimize"],
)
def test_what_cuts_it(user, event):
    A = user.root["A"]
    path = hot(A)
    event(user, A)
    assert is_cut(A) or path.window is None or "_v_path" not in A.__dict__
    assert A.shape[1] in (7, N)
    assert len(A[0]) == A.shape[1]
    assert A[len(A) - 1].shape == A.shape[1:]


def test_a_shape_of_as_many_bytes(user):
    A = user.root["A"]
    hot(A)
    A.resize(7, N)
    assert A[6].shape == (N,)
    user.abort()
    assert A[6].shape == (7,)
    savepoint = user.savepoint()
    A.resize(N * 7)
    assert hot(A)
    assert A[N * 7 - 1] == N * 7 - 1
    savepoint.rollback()
    assert A[6].shape == (7,)
    with pytest.raises(IndexError):
        A[N * 7 - 1]


def test_what_others_commit_is_seen_after_the_boundary_and_not_before(user, clients):
    A = user.root["A"]
    hot(A)
    other = clients.connect(other=True)
    other.root["A"][5, 6] = 1000
    other.root["A"].append(np.ones((2, 7), "i4"))
    other.commit()
    assert A[5, 6] == 41
    assert A[5][6] == 41
    with pytest.raises(IndexError):
        A[N]
    user.begin()
    assert A[5, 6] == 1000
    assert A[N + 1, 0] == 1


def test_it_joins_the_transaction(user):
    """What the short way writes is never left out of a commit, whatever transaction it is."""
    V = user.root["V"]
    for k in range(5):
        V[0] = k + 0.5
        V[1] = k + 0.25
        (user.commit, user.abort)[k % 2]()
    assert V[:2].tolist() == [4.5, 4.25]


def test_after_close(user):
    V = user.root["V"]
    user.begin()
    hot(V)
    user.connection.close()
    assert V._p_jar.opened is None
    with pytest.raises(dz.ClosedError):
        V[0]
    with pytest.raises(dz.ClosedError):
        V[0] = 1


def test_read_only(user):
    db = user.connection.db()
    V = db.open(transaction.TransactionManager(), before=db.lastTransaction()).root()["V"]
    try:
        hot(V)
        for index in (0, (0,), slice(0, 2)):
            with pytest.raises(ValueError, match="read-only"):
                V[index] = 1
        assert not V[:3].flags.writeable
    finally:
        V._p_jar.transaction_manager.abort()
        V._p_jar.close()


def test_an_element_of_a_structured_array_is_a_view(clients):
    clients.new(10, [("x", "i4"), ("y", "f8")], name="S")
    user = clients.connect()
    S = user.root["S"]
    hot(S)
    one = S[3]
    base = one
    while isinstance(base, (np.void, np.ndarray)):
        base = base.base
    assert isinstance(base, _Lease)
    one["x"] = 5
    assert S["x"].tolist()[3] == 5
    S[4] = (1, 2.0)
    user.commit()
    assert S[4].tolist() == (1, 2.0)
    assert one["x"] == 5


def test_a_forked_child_is_refused(local):
    local.new(N, name="V")
    user = local.connect()
    V = user.root["V"]
    hot(V)
    pid = os.fork()
    if pid == 0:
        refused = 0
        for use in (lambda: V[0], lambda: V[0:2], lambda: V[(0,)], lambda: V.__setitem__(0, 1)):
            try:
                use()
            except ForkError:
                refused += 1
        os._exit(0 if refused == 4 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert V[0] == 0


def test_by_threads(local):
    local.new((N, 7), "i4", name="A")
    user = local.connect()
    A = user.root["A"]
    A[...] = np.arange(N * 7).reshape(N, 7)
    user.commit()
    wrong, stop = [], threading.Event()

    def read(seed):
        chance = np.random.default_rng(seed)
        while not stop.is_set():
            i = int(chance.integers(N))
            if A[i, 3] != i * 7 + 3 or A[i][3] != i * 7 + 3 or A[i : i + 1][0, 3] != i * 7 + 3:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):  # the way is cut and made again below them
        A._open().cool()
        A[0]
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
