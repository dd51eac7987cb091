"""Views that are longer than their array by now, and savepoints around changes of size."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import transaction

import dask_zbig as dz


@pytest.fixture
def connect(tmp_path):
    db = dz.open(tmp_path / "x.fs")
    open_ = []

    def connect():
        connection = db.open(transaction.TransactionManager())
        open_.append(connection)
        return connection

    yield connect
    for connection in open_:
        connection.transaction_manager.abort()
        connection.close()
    db.close()


@pytest.fixture
def stored(connect):
    """A connection, and an array of 1000 threes in it."""
    connection = connect()
    connection.root()["A"] = array = dz.ZBigArray(1000, "u1")
    array[:] = 3
    connection.transaction_manager.commit()
    return connection, array


def test_rollback_after_two_truncations(stored):
    connection, array = stored
    view = array[:]
    array.resize(500)
    savepoint = connection.transaction_manager.savepoint()
    array.resize(200)
    savepoint.rollback()
    assert view[[100, 300, 700]].tolist() == [3, 3, 0]
    array.resize(1000)
    assert array[[100, 300, 700]].tolist() == [3, 3, 0]


@pytest.mark.parametrize("n", [1000, 1 << 20])
def test_what_an_old_view_wrote_past_the_end_is_gone(connect, n):
    connection = connect()
    manager = connection.transaction_manager
    connection.root()["A"] = array = dz.ZBigArray(n, "u1")
    array[:] = 3
    manager.commit()
    view = array[:]
    array.resize(n // 2)
    manager.commit()
    view[n - 1] = 9
    view[n // 2] = 9
    view[0] = 4
    manager.commit()
    array.resize(n)
    assert array[[0, 1, n // 2, n - 1]].tolist() == [4, 3, 0, 0]
    assert view[[0, 1, n // 2, n - 1]].tolist() == [4, 3, 0, 0]
    manager.commit()
    assert connect().root()["A"][[0, 1, n // 2, n - 1]].tolist() == [4, 3, 0, 0]


def test_rollback_to_before_the_first_use_keeps_us_in_the_transaction(stored, connect):
    connection, array = stored
    manager = connection.transaction_manager
    manager.begin()
    first = manager.savepoint()
    view = array[:]
    view[1] = 7
    first.rollback()
    assert view[1] == 3
    view[0] = 5  # by a fault: nothing in Python hears of it
    second = manager.savepoint()
    view[0] = 6
    second.rollback()
    assert view[0] == 5
    manager.commit()
    assert connect().root()["A"][:2].tolist() == [5, 3]


def test_an_array_cannot_be_copied_by_copy(stored):
    for make in (copy.copy, copy.deepcopy):
        with pytest.raises(dz.CopyError, match="assign"):
            make(stored[1])
    assert np.all(stored[1][:] == 3)


def test_a_savepoint_right_after_an_abort_knows_what_a_kept_view_was_given(stored):
    """Asking for it makes a transaction that no synchronizer is told of."""
    conn, A = stored
    view = A[:]
    conn.transaction_manager.abort()
    view[5] = 2
    savepoint = conn.transaction_manager.savepoint()
    view[6] = 4
    savepoint.rollback()
    assert view[5:7].tolist() == [2, 3]
    conn.transaction_manager.commit()
    assert A[5:7].tolist() == [2, 3]
