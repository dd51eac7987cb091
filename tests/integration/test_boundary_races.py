"""Threads read and write a view at the very moment at which its connection moves to another snapshot.

What they do is held back, or made to happen, at the one point where it used to go wrong. A thread with no such luck
needs days to find it; `tests/stress/hammer.py` found the first of these in minutes.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from persistent import Persistent

from dask_zbig import openfile
from dask_zbig.basemap import BaseMap
from dask_zbig.mapping import Mapping
from dask_zbig.memory._native import BLOCK
from dask_zbig.memory.space import Space
from dask_zbig.openfile import OpenFile
from dask_zbig.storage.format import LEAF_BYTES

SIZE = 1 << 20
LAST = SIZE - 1
SECONDS = 60.0


class Spy(Persistent):
    """Does something while its connection processes invalidations."""

    def _p_invalidate(self):
        action = SPIES.get(self._p_jar)
        if action is not None:
            action()
        super()._p_invalidate()


SPIES = {}


@pytest.fixture(autouse=True)
def _no_spies():
    yield
    SPIES.clear()


@pytest.fixture
def both(merging):
    """A client, its view of an array, another client, and that one's array."""
    merging.new(SIZE, "u1")
    with merging.db.transaction() as connection:
        connection.root()["spies"] = [Spy() for _ in range(20)]
        for spy in connection.root()["spies"]:
            connection.add(spy)
    one, A, two, B = merging.pair()
    a = A[:]
    assert a.sum() == 0
    return one, a, two, B


def beside_a_writer(merging, place):
    """As `both`, but nothing of the view is loaded, and the other one has written a 1 before it was made."""
    merging.new(SIZE, "u1")
    one, A, two, B = merging.pair()
    B[place] = 1
    two.commit()
    one.begin()
    return one, A[:], two, B


def save_by_another(two, B, place, value):
    B[place] = value
    for spy in two.root["spies"]:
        spy._p_changed = True
    two.commit()


def watch(one, action):
    """Have something done between invalidations: there are spies enough that some come after any other object."""
    for spy in one.root["spies"]:
        spy._p_activate()
    SPIES[one.connection] = action


def in_a_thread(action):
    thread = threading.Thread(target=action, daemon=True)  # (else the process would wait for one that hangs)
    thread.start()
    return thread


def joined(thread):
    thread.join(SECONDS)
    assert not thread.is_alive()


def after_commit(one, a, two, B, expected):
    """The view is right, and so is what is saved from it."""
    np.testing.assert_array_equal(a, expected)
    one.commit()
    two.begin()
    np.testing.assert_array_equal(B, expected)


# guard: openfile.py, `_stale`: put off while the connection moves; else a[0] is 0 again: the snapshot before the commit
def test_what_was_just_saved_is_there_while_invalidations_come(both):
    one, a, two, B = both
    seen = []
    a[0] = 1
    save_by_another(two, B, LAST, 2)
    watch(one, lambda: seen.append((int(a[0]), int(a[LAST]))))
    one.commit()
    assert set(seen) == {(1, 0)}
    assert (a[0], a[LAST]) == (1, 2)


# the same guard: else the commit after next writes the 0 beside a[place] over the 1
@pytest.mark.parametrize("place", [1, 5000, LAST - 1])
def test_what_is_written_while_invalidations_come_is_kept(both, place):
    one, a, two, B = both

    def write():
        a[place] += 1

    a[0] = 1
    save_by_another(two, B, LAST, 2)
    watch(one, write)
    one.commit()
    SPIES.clear()
    expected = np.zeros(SIZE, "u1")
    expected[[0, LAST]] = 1, 2
    two.begin()
    np.testing.assert_array_equal(B, expected)
    expected[place] = a[place]
    assert a[place] >= 20
    after_commit(one, a, two, B, expected)


# guard: openfile.py, `_resolve_elsewhere`: are we still at that snapshot? Else a[place] stays 1
def test_a_loader_that_comes_with_an_old_leaf_is_too_late(merging, monkeypatch):
    monkeypatch.setattr(openfile, "EAGER_LEAVES", 0)  # all are loaded when they are touched, by other connections
    place = 5000
    original = BaseMap.leaves_of
    loaded, go_on = threading.Event(), threading.Event()

    def slow(file, ranges):
        found = original(file, ranges)
        loaded.set()
        assert go_on.wait(SECONDS)
        return found

    one, a, two, B = beside_a_writer(merging, place)
    with monkeypatch.context() as patch:
        patch.setattr(BaseMap, "leaves_of", staticmethod(slow))
        reader = in_a_thread(lambda: a[place])
        assert loaded.wait(SECONDS)
    B[place] = 2
    two.commit()
    one.begin()
    go_on.set()
    joined(reader)
    assert a[place] == 2


# guard: basemap.py, `give_back` looks only when it has the lock; else a[place] stays 1 for all of the transaction
def test_a_loader_that_is_noting_what_it_has_loaded_is_waited_for(merging, monkeypatch):
    monkeypatch.setattr(openfile, "EAGER_LEAVES", 0)
    place = 5000
    original = BaseMap.borrow
    noting, moved = threading.Event(), threading.Event()

    def slow(self, ranges, found):
        noting.set()
        moved.wait(0.5)  # (in vain: who moves waits for us)
        original(self, ranges, found)

    one, a, two, B = beside_a_writer(merging, place)
    B[place] = 2
    two.commit()
    with monkeypatch.context() as patch:
        patch.setattr(BaseMap, "borrow", slow)
        reader = in_a_thread(lambda: a[place])
        assert noting.wait(SECONDS)
        one.begin()
        moved.set()
        joined(reader)
    assert a[place] == 2


# guard: openfile.py, `_resolve_elsewhere`: `_cut`; else a[100] is 9 again
def test_what_a_transaction_has_cut_off_stays_so_when_a_loader_loads_it(merging, monkeypatch):
    """It does so by another connection, which does not see what this transaction has done."""
    monkeypatch.setattr(openfile, "EAGER_LEAVES", 0)
    merging.new(SIZE, "u1")
    one, A, two, B = merging.pair()
    B[[10, 100, LAST]] = [8, 9, 7]
    two.commit()
    one.begin()
    A.resize(50)
    A.resize(SIZE)
    a = A[:]
    assert (a[10], a[100], a[LAST]) == (8, 0, 0)
    one.commit()
    two.begin()
    assert (B[10], B[100], B[LAST]) == (8, 0, 0)


# guard: loader.py, `_fill`: again after StaleFill; else the reader slept for ever: what had changed was another block
def test_a_savepoint_while_a_leaf_is_loaded_for_another_block(merging, monkeypatch):
    monkeypatch.setattr(openfile, "EAGER_LEAVES", 0)
    original = BaseMap.leaves_of
    loaded, go_on = threading.Event(), threading.Event()

    def slow(file, ranges):
        found = original(file, ranges)
        loaded.set()
        assert go_on.wait(SECONDS)
        return found

    merging.new(LEAF_BYTES + SIZE, "u1")
    one, A, two, B = merging.pair()
    B[0] = 5
    two.commit()
    one.begin()
    a = A[:]
    a[-1] = 1
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(BaseMap, "leaves_of", staticmethod(slow))
        reader = in_a_thread(lambda: seen.append(a[0]))
        assert loaded.wait(SECONDS)
        one.savepoint()
        go_on.set()
        joined(reader)
    assert seen == [5]


# the same guard: a resize forgets all of the leaf in which the array ends, and drops what is cut off
def test_a_resize_while_a_block_is_filled(merging, monkeypatch):
    size = 4 * BLOCK
    merging.new(size, "u1")
    one, A, two, B = merging.pair()
    B[0] = 5
    two.commit()
    one.begin()
    a = A[:]
    opened = A._open()
    fill, refill = Mapping.map, Mapping.refill
    coming, go_on, tried = threading.Event(), threading.Event(), threading.Event()

    def held(self, owner, lo, hi, local_only):
        if threading.current_thread().name.startswith("zbig-loader") and not coming.is_set():
            coming.set()
            assert go_on.wait(SECONDS)
            try:
                fill(self, owner, lo, hi, local_only)
            finally:
                tried.set()
        else:
            fill(self, owner, lo, hi, local_only)

    def after_the_loader(self, owner):
        go_on.set()
        assert tried.wait(SECONDS)
        refill(self, owner)

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(Mapping, "map", held)
        patch.setattr(Mapping, "refill", after_the_loader)
        opened.space.drop(0, 1)
        reader = in_a_thread(lambda: seen.append(a[0]))
        assert coming.wait(SECONDS)
        A.resize(3 * BLOCK)
        joined(reader)
    assert seen == [5]


# guard: openfile.py, `_stale`: drop first, then see what is dirty. Else the 0 at LAST is written over the 2
def test_a_write_just_before_pages_are_dropped(both, monkeypatch):
    one, a, two, B = both
    drop = Mapping.drop
    written = []

    def write_first(self, ranges):
        if self is mapping and not written:
            written.append(LAST - 1)
            a[LAST - 1] = 3
        drop(self, ranges)

    mapping = one.root["A"]._open().mapping
    one.commit()
    save_by_another(two, B, LAST, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Mapping, "drop", write_first)
        one.begin()
    expected = np.zeros(SIZE, "u1")
    expected[LAST - 1 :] = 3, 2
    after_commit(one, a, two, B, expected)


# guard: openfile.py, `_reconcile`: the lock. Else the 0 at LAST, of a page that is not reduced yet, comes back
def test_a_write_while_pages_are_reduced_to_their_changes(both, monkeypatch):
    one, a, two, B = both
    freeze = OpenFile.freeze
    writers = []

    def write():
        a[LAST - 2] = 4

    def then_write(self):
        freeze(self)
        if not writers:
            writers.append(in_a_thread(write))
            writers[0].join(0.3)  # it may have to wait until we are done

    one.commit()
    a[LAST - 1] = 3  # after the transaction
    save_by_another(two, B, LAST, 2)
    with monkeypatch.context() as patch:
        patch.setattr(OpenFile, "freeze", then_write)
        one.begin()
    joined(writers[0])
    expected = np.zeros(SIZE, "u1")
    expected[LAST - 2 :] = 4, 3, 2
    after_commit(one, a, two, B, expected)


# guard: transaction.py, `moving`: the `finally`. Else nothing becomes stale any more
def test_a_move_that_fails(both, monkeypatch):
    one, a, two, B = both
    one.commit()
    save_by_another(two, B, LAST, 2)

    def fail(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(one.connection._storage, "poll_invalidations", fail)
        with pytest.raises(ZeroDivisionError):
            one.connection.newTransaction(None)
    one.begin()
    assert a[LAST] == 2


# guard: openfile.py, `_were_known`: where there was no leaf either. Else the 0 beside a[place] is written over the 2
@pytest.mark.parametrize("size", [SIZE, 80 * LEAF_BYTES])
def test_what_is_written_into_a_hole_before_the_transaction_begins_does_not_erase_what_fills_it(merging, size):
    merging.new(size, "u1")
    one, A, two, B = merging.pair()
    a = A[:]
    assert a[size - 1] == 0
    one.commit()
    a[size - 2] = 1
    B[size - 1] = 2
    two.commit()
    one.begin()
    assert a[size - 2 :].tolist() == [1, 2]
    one.commit()
    two.begin()
    assert B[size - 2 :].tolist() == [1, 2]


# guard: openfile.py, `rollback`: drop first. Else a[0] is 2 again, and is saved
def test_a_write_while_changes_are_rolled_back(both, monkeypatch):
    one, a, two, B = both
    discard = Space.discard
    writers = []

    def write():
        a[1] = 3

    def then_write(self):
        files = discard(self)
        if not writers:
            writers.append(in_a_thread(write))
            writers[0].join(0.3)  # it may have to wait until we are done
        return files

    a[0] = 1
    savepoint = one.savepoint()
    a[0] = 2
    one.savepoint()
    with monkeypatch.context() as patch:
        patch.setattr(Space, "discard", then_write)
        savepoint.rollback()
    joined(writers[0])
    expected = np.zeros(SIZE, "u1")
    expected[:2] = 1, 3
    after_commit(one, a, two, B, expected)


# guard: openfile.py, `moved`: `_cut`. Else loaders take what others save beyond that size for cut off
@pytest.mark.parametrize("end", ["commit", "abort"])
def test_a_size_of_a_transaction_that_is_over(merging, monkeypatch, end):
    monkeypatch.setattr(openfile, "EAGER_LEAVES", 0)
    merging.new(SIZE, "u1")
    one, A, two, B = merging.pair()
    A.resize(SIZE // 2)
    getattr(one, end)()
    two.begin()
    B.resize(SIZE)
    B[LAST] = 2
    two.commit()
    one.begin()
    a = A[:]
    seen = []
    joined(in_a_thread(lambda: seen.append(a[LAST])))
    assert seen == [2]
