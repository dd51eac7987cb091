"""wendelin.core's known failures (DESIGN.md, section 9), a test for each: none of them may happen here.

Those that ended the process are in test_failures.py. Over each test its guard is named, and how the test failed
when that guard was taken out.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest
from transaction.interfaces import InvalidSavepointRollbackError
from ZODB.POSException import ConflictError, ConnectionStateError

import dask_zbig as dz
from dask_zbig.storage.format import LEAF_BYTES

MIB = 1 << 20
SMALL, DEEP = MIB, LEAF_BYTES + MIB  # bytes: below one leaf, and with a node above the leaves
sizes = pytest.mark.parametrize("size", [SMALL, DEEP], ids=["small", "deep"])
places = pytest.mark.parametrize("where", [5000, 70 * LEAF_BYTES + 5000], ids=["in-a-leaf", "where-no-leaf-is"])


def until_raised(error, action, seconds=30.0):
    """An error of a fault comes at the next call or loop edge, not at once."""
    deadline = time.monotonic() + seconds
    with pytest.raises(error):  # noqa: PT012 - for the same reason
        while time.monotonic() < deadline:
            action()
            for _ in range(1000):
                pass


# -- holes that are filled


# guard: basemap.py: nodes and leaves are watched; either removed -> b[where] was still 0 after the boundary
@places
def test_who_has_read_a_hole_is_told_when_it_is_filled(clients, where):
    clients.new(80 * LEAF_BYTES, "u1")
    one, A, two, B = clients.pair()
    b = B[:]
    assert b[where] == 0
    A[where] = 1
    one.commit()
    assert b[where] == 0
    two.begin()
    assert b[where] == 1
    b[where + 1] = 2
    two.commit()
    one.begin()
    assert A[where : where + 3].tolist() == [1, 2, 0]


# guard: flush.py: `trim` claims changed bytes only; storage/extents.py: `changed` raises Overlap. Each is enough:
# both removed -> the other's 1 was overwritten by 0
@places
def test_who_writes_beside_a_hole_does_not_erase_what_fills_it_meanwhile(clients, where):
    clients.new(80 * LEAF_BYTES, "u1")
    one, A, two, B = clients.pair()
    b = B[:]
    assert b[where] == 0
    b[where + 1] = 2  # the whole page is copied, with the hole in it
    A[where] = 1
    one.commit()
    with contextlib.suppress(ConflictError):
        two.commit()
    two.begin()
    assert b[where] == 1
    b[where + 1] = 2
    two.commit()
    one.begin()
    assert A[where : where + 3].tolist() == b[where : where + 3].tolist() == [1, 2, 0]


# -- objects that leave the cache


# guard: basemap.py: `_watched` holds the nodes and leaves; removed -> no invalidation came, and b[10] kept its old
# value
def test_no_stale_reads_after_cache_minimize(clients):
    clients.new(DEEP, "u1")
    one, A, two, B = clients.pair()
    b = B[:]
    assert b[10] == b[DEEP - 1] == 0
    for k in range(3):
        two.connection.cacheMinimize()
        b[100 + k] = 1
        two.connection.cacheMinimize()
        assert b[100 + k] == 1
        one.begin()
        A[10] = A[DEEP - 1] = k + 1
        one.commit()
        assert b[10] == b[DEEP - 1] == k
        if clients.merges:
            two.commit()
        else:
            two.abort()
        two.connection.cacheMinimize()
        two.begin()
        assert b[10] == b[DEEP - 1] == k + 1
        assert b[100 + k] == clients.merges


# guard: the same; removed -> b[10] was 0 after the boundary
def test_no_stale_reads_after_cache_gc(clients):
    clients.new(DEEP, "u1")
    one, A, two, B = clients.pair()
    b = B[:]
    assert b[10] == 0
    two.connection._cache.cache_size = 0
    two.connection.cacheGC()
    A[10] = 1
    one.commit()
    assert b[10] == 0
    two.begin()
    assert b[10] == 1


# -- views and changes of size


# guard: transaction.py: `files` by ZBigFile, not by what an invalidation takes away; an OpenFile in a _v_ attribute
# of the array -> the old view lacked the new one's changes. scratch.c: dirty pages show in every window; in one only
# -> SIGSEGV; `zb_adopt_dirty` removed -> a new window lacked them. block.c: zb_drop in one window only -> old[3] was
# stale
def test_a_remote_append_orphans_no_view(clients):
    clients.new(1000, "u1")
    one, A, two, B = clients.pair()
    old = B[:]
    assert not old.any()
    A.append(np.full(5 * MIB, 4, "u1"))  # more than the first window has room for
    A[0] = 1
    one.commit()
    two.begin()
    assert old[0] == 1
    old[1] = 5
    new = B[:]
    assert new[-1] == 4
    new[2] = 6
    assert new[:4].tolist() == old[:4].tolist() == [1, 5, 6, 0]
    two.commit()
    one.begin()
    assert A[:4].tolist() == [1, 5, 6, 0]
    A.resize(10)
    A[3] = 7
    one.commit()
    two.begin()
    assert (old[3], new[3], B.shape) == (7, 7, (10,))
    old[4] = 8
    two.commit()
    one.begin()
    assert A[:].tolist() == [1, 5, 6, 7, 8, 0, 0, 0, 0, 0]


# guard: as above; -> views disagreed after the abort. transaction.py: `discard` in abort and afterCompletion; removed
# -> ConnectionStateError, the changes were still there
def test_abort_after_resize_orphans_no_view_and_what_is_committed_is_one_copy(clients):
    clients.new(1000, "u1")
    client = clients.connect()
    A = client.root["A"]
    before = A[:]
    before[0] = 2
    A.append(np.full(5 * MIB, 2, "u1"))  # more than the first window has room for
    during = A[:]
    before[1], during[2] = 3, 4
    assert before[:3].tolist() == during[:3].tolist() == [2, 3, 4]
    client.abort()
    assert A.shape == (1000,)
    after = A[:]
    assert not any(view.any() for view in (before, during, after))
    before[3], during[4], after[5] = 6, 7, 8
    for view in (before, during, after, A):
        assert view[2:7].tolist() == [0, 6, 7, 8, 0]
    client.commit()
    assert clients.connect(other=True).root["A"][:7].tolist() == [0, 0, 0, 6, 7, 8, 0]
    after[3] = 9  # of two copies the other would commit its own again
    before[4] = 1
    client.commit()
    assert clients.connect(other=True).root["A"][:7].tolist() == [0, 0, 0, 9, 1, 8, 0]


# guard: openfile.py: `truncate` cuts the tree, the layers, and what is mapped, `clear_beyond` what old views wrote;
# each one removed -> bytes beyond 1000 were not 0. `settle` drops what lies past the end; removed -> an old view
# showed it. flush.py: what is past the end is not stored, and zbigarray.py: `ends_by`: both removed -> the 6 came
# back
@sizes
@pytest.mark.parametrize("commits", [True, False], ids=["commits", "one-transaction"])
def test_shrink_then_grow_brings_nothing_back(clients, size, commits):
    clients.new(size, "u1")
    client = clients.connect()
    A = client.root["A"]
    old = A[:]
    A[500:] = 5
    client.commit()
    A.resize(1000)
    old[2000] = old[size - 2] = 6  # an old view keeps its size, but what is beyond the end is nowhere
    if commits:
        client.commit()
        assert not old[1000:].any()
        old[2001] = old[size - 3] = 6
    A.resize(size)
    assert not A[1000:].any()
    A[size - 1] = 7
    client.commit()
    for view in (A[:], old, clients.connect(other=True).root["A"][:]):
        assert view.sum(dtype="i8") == 5 * 500 + 7
        assert view[size - 1] == 7


# -- savepoints and connections


# guard: transaction.py: `rollback`; `join` when a view is made and in `newTransaction`; openfile.py: `rollback`
# discards the generation; each one removed -> the data stayed as they were before the rollback
@sizes
@pytest.mark.parametrize("kept", [False, True], ids=["new-view", "kept-view"])
def test_savepoint_rollback_is_of_data_too(clients, size, kept):
    clients.new(size, "u1")
    client = clients.connect()
    A = client.root["A"]
    a = A[:]
    if kept:
        assert a[5] == 0
        client.commit()
        client.begin()  # from now on nothing in Python tells of a write to the view
    a[0] = 1
    first = client.savepoint()
    a[0:2] = 2
    a[size - 1] = 2
    second = client.savepoint()
    a[:] = 3
    second.rollback()
    assert (a[0], a[1], a[2], a[size - 1]) == (2, 2, 0, 2)
    A.append(np.full(10, 4, "u1"))
    third = client.savepoint()
    A[-1] = a[2] = 5
    third.rollback()
    assert (A.shape, A[-1], a[0], a[2]) == ((size + 10,), 4, 2, 0)
    a[2] = 6
    second.rollback()
    assert (A.shape, a[2]) == ((size,), 0)
    first.rollback()
    assert (a[0], a[1], a[size - 1]) == (1, 0, 0)
    a[3] = 7
    client.commit()
    assert a[:5].tolist() == [1, 0, 0, 7, 0]
    assert clients.connect(other=True).root["A"][:].sum() == 8


# guard: transaction.py: `_guard` wraps close; its check removed -> no ConnectionStateError
def test_close_refuses_while_there_are_changes(clients):
    clients.new(1000, "u1")
    client = clients.connect()
    connection = client.connection
    a = client.root["A"][:]
    a[0] = 1
    with pytest.raises(ConnectionStateError):
        connection.close()
    client.commit()
    a[1] = 2  # outside of any transaction
    with pytest.raises(ConnectionStateError, match="ZBigArray"):
        connection.close()
    assert a[1] == 2
    client.abort()
    assert a[:2].tolist() == [1, 0]
    connection.close()
    user = clients.connect()
    assert user.connection is connection
    b = user.root["A"][:]
    user.commit()
    assert b[:2].tolist() == [1, 0]
    assert clients.connect(other=True).root["A"][:2].tolist() == [1, 0]


# guard: transaction.py: close ends the data manager; removed -> the last user's view showed the next one's data;
# openfile.py: `space.close`; removed -> the last user's write was no error
def test_a_pooled_connection_shows_its_next_user_nothing_of_the_last(clients):
    clients.new(1000, "u1")
    last = clients.connect()
    connection, A = last.connection, last.root["A"]
    a = A[:]
    a[0] = 1
    last.commit()
    a[1] = 2
    point = last.savepoint()
    A.resize(3 * MIB)
    long = A[:]
    long[2 * MIB] = a[2] = 9
    last.savepoint()
    last.tm.doom()
    last.abort()
    last.close()
    user = clients.connect()
    assert user.connection is connection
    writer = clients.connect()
    writer.root["A"][3] = 3
    writer.commit()
    stored = clients.db.lastTransaction()
    user.begin()
    B = user.root["A"]
    b = B[:]
    assert B.shape == (1000,)
    assert b[:5].tolist() == [1, 0, 0, 3, 0]
    with pytest.raises(InvalidSavepointRollbackError):
        point.rollback()
    assert a[:4].tolist() == long[:4].tolist() == [1, 0, 0, 0]  # what was mapped stays readable
    until_raised(dz.ClosedError, lambda: a.__setitem__(4, 4))
    assert b[:5].tolist() == [1, 0, 0, 3, 0]
    user.commit()
    assert clients.db.lastTransaction() == stored
    b[5] = 6
    user.commit()
    assert clients.connect(other=True).root["A"][:7].tolist() == [1, 0, 0, 3, 0, 6, 0]


# -- conflicts


# guard: flush.py: `trim`, storage/tree.py: `_p_resolveConflict` of a leaf; either removed -> ConflictError
@sizes
@pytest.mark.parametrize("distance", [1, 4096, SMALL - 10])
def test_writers_of_different_bytes_of_a_block_do_not_conflict(merging, size, distance):
    merging.new(size, "u1")
    one, A, two, B = merging.pair()
    a, b = A[:], B[:]
    a[5], b[5 + distance] = 1, 2
    one.commit()
    two.commit()
    where = [5, 5 + distance]
    one.begin()
    two.begin()
    assert a[where].tolist() == b[where].tolist() == [1, 2]
    assert merging.connect().root["A"][:].sum() == 3
    a[6], b[5] = 7, 8  # once more, over what is there now
    two.commit()
    one.commit()
    one.begin()
    two.begin()
    assert a[5:7].tolist() == b[5:7].tolist() == [8, 7]


# -- NumPy's ways


# guard: transaction.py: `_unattached`; removed -> what was written before the array had a connection was 0.
# openfile.py: `on_store`; removed -> zeros were stored. `join_savepoint`; removed -> rollback went to before the
# array was known
@pytest.mark.parametrize("viewed", [False, True], ids=["first-array", "second-array"])
@pytest.mark.parametrize("savepoint", [False, True], ids=["no-savepoint", "savepoint"])
def test_arrays_work_before_their_first_commit(clients, savepoint, viewed):
    clients.new(10, "u1", name="stored")
    client = clients.connect()
    if viewed:  # then our data manager joins the transaction before the connection does
        assert not client.root["stored"][:].any()
    A, B = dz.ZBigArray((100, 3), "f8"), dz.ZBigArray(100, "u1")
    A[5] = 1
    a, b = A[...], B[:]
    b[5] = 1
    A.append(np.ones((1, 3)))
    client.connection.add(A)
    A[6] = 2
    assert a[5:7].tolist() == [[1] * 3, [2] * 3]
    client.root["list"] = [{"deep": A}, B]  # B is not touched by anything but the commit, or the savepoint
    a[7] = b[7] = 3
    if savepoint:
        point = client.savepoint()
        a[8] = b[8] = 5
        point.rollback()
    client.commit()
    assert a[5:9, 0].tolist() == [1, 2, 3, 0]
    a[8] = b[8] = 4
    client.commit()
    other = clients.connect(other=True)
    C = other.root["list"][0]["deep"]
    assert C is not A
    assert C.shape == (101, 3)
    assert C[4:10, 1].tolist() == [0, 1, 2, 3, 4, 0]
    assert other.root["list"][1][4:10].tolist() == [0, 1, 0, 3, 4, 0]


EVEN = (np.arange(30) % 2 == 0).reshape(10, 3)


# guard: indexing.py: `is_basic`; always true -> masks and lists failed; the place of the Ellipsis; wrong -> A[..., 1]
# was a row
@pytest.mark.parametrize("index", [(..., 1), 3, (3, ...), EVEN, [True, False] * 5, -10, (slice(None, None, -3), 2)])
def test_indices_as_numpy_has_them(index):
    A, a = dz.ZBigArray((10, 3), "i4"), np.arange(30, dtype="i4").reshape(10, 3)
    A[...] = a
    assert A[index].tolist() == a[index].tolist()
    A[index] = a[index] = -5
    assert A[...].tolist() == a.tolist()
    A[index] = a[index] = a[index] * 7
    assert A[...].tolist() == a.tolist()


# guard: indexing.py: `locate` checks the bounds; removed -> no IndexError
@pytest.mark.parametrize("index", [-15, -11, 10])
def test_an_index_out_of_bounds_is_refused(index):
    A = dz.ZBigArray(10, "i4")
    with pytest.raises(IndexError):
        A[index]
    with pytest.raises(IndexError):
        A[index] = 1
    assert not A[:].any()


# guard: zbigarray.py: an element is taken by [()]; by [0] -> IndexError
def test_an_array_of_no_dimensions(clients):
    clients.new((), "i4")
    client = clients.connect()
    A = client.root["A"]
    a = A[...]
    assert (A[()], a.shape) == (0, ())
    A[()] = 3
    assert a == 3
    a[...] = 4
    client.commit()
    assert clients.connect(other=True).root["A"][()] == 4
